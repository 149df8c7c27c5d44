"""Hot connect and disconnect, 200 times, under load on another network: nothing lost, nothing leaked."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from fabric import Fabric, children, fabric, until

from agent_helper.spares import SpareTaps
from taploom.address import connect, parse_address
from taploom.contracts.taploom.bridge.v1 import ConnectGuestRequest, DisconnectGuestRequest
from taploom.contracts.taploom.bridge.v1.rpc import NetworkServiceClient
from taploom.rpc import open_channel

pytestmark = pytest.mark.system

ROUNDS = 200


@pytest.fixture(scope="module")
def lab() -> Iterator[Fabric]:
    with fabric("web", "db") as lab:
        lab.run("network", "create", "app", "--ipv6")
        lab.run("network", "create", "side", "--ipv6")
        for network in ("app", "side"):
            lab.run("network", "connect", network, "db")
        lab.run("network", "connect", "app", "web")
        yield lab


def inventory(lab: Fabric) -> Counter[str]:
    """Everything that could leak, counted."""
    counted: Counter[str] = Counter()
    processes = lab.processes()
    for name, process in processes.items():
        counted[f"fds of {name}"] = len(list(Path(f"/proc/{process['pid']}/fd").iterdir()))
    helper = processes["helper"]["pid"]
    for pid in children(helper):
        with contextlib.suppress(OSError):
            counted["daemon " + Path(f"/proc/{pid}/comm").read_text().strip()] += 1
            counted[f"namespace {Path(f'/proc/{pid}/ns/net').readlink()}"] += 1
    for name in json.loads(_output("ip", "-json", "netns", "list") or "[]"):
        if f".{lab.name}." in name["name"]:
            counted["named namespaces"] += 1
    status = lab.json("lab", "status")
    for netns in (status["helper_netns"], *(guest["netns"] for guest in status["guests"])):
        links = json.loads(_output("ip", "-netns", netns, "-json", "link"))
        counted[f"interfaces in {netns.rpartition('.')[2]}"] = len(links)
        routes = _output("ip", "-netns", netns, "route", "show", "table", "all").splitlines()
        counted[f"routes in {netns.rpartition('.')[2]}"] = len(routes)
    for database, table in TABLES:
        socket = next((lab.path / "helper").rglob("db.sock"))
        transaction = json.dumps([database, {"op": "select", "table": table, "where": [], "columns": ["_uuid"]}])
        rows = json.loads(_output("ovsdb-client", "transact", f"unix:{socket}", transaction))
        counted[f"{database} {table}"] = len(rows[0]["rows"])
    counted["hosts files"] = len([p for p in (lab.path / "helper").rglob("*hosts*/*") if p.is_file()])
    return counted


def at_rest(lab: Fabric) -> Counter[str] | None:
    """The inventory, unless something is still coming or going."""
    found = inventory(lab)
    return found if inventory(lab) == found else None


def spares(lab: Fabric) -> int:
    """How many TAPs of the helper are plugged for nobody yet."""
    socket = next((lab.path / "helper").rglob("db.sock"))
    condition = ["external_ids", "includes", ["map", [["taploom-spare", "true"]]]]
    transaction = json.dumps(["Open_vSwitch", {"op": "select", "table": "Interface", "where": [condition]}])
    return len(json.loads(_output("ovsdb-client", "transact", f"unix:{socket}", transaction))[0]["rows"])


TABLES = [
    *(("Open_vSwitch", table) for table in ("Port", "Interface", "Bridge")),
    *(
        ("OVN_Northbound", table)
        for table in (
            "Logical_Switch",
            "Logical_Switch_Port",
            "Logical_Router",
            "Logical_Router_Port",
            "ACL",
            "Address_Set",
            "Port_Group",
            "NAT",
            "Logical_Router_Static_Route",
        )
    ),
    *(("OVN_Southbound", table) for table in ("Port_Binding", "Datapath_Binding", "Chassis")),
]


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


async def test_churn_under_load(lab: Fabric, tmp_path: Path) -> None:
    path = parse_address(f"unix:{lab.path}/bridge.sock")
    database = lab.address("db", "app")

    async def churn(rounds: int) -> None:
        async with open_channel(await connect(path)) as channel:
            client = NetworkServiceClient(channel)
            for number in range(rounds):
                request = ConnectGuestRequest(network="side", guest="web", aliases=[f"alias{number}"])
                response = await client.connect_guest(request, timeout=60)
                assert response.endpoint is not None
                assert response.endpoint.interface_name == "eth1"
                if number % 20 == 0:  # it carries frames each time it is asked
                    lab.until_answers("web", "db.side")
                await client.disconnect_guest(DisconnectGuestRequest(network="side", guest="web"), timeout=60)

    await churn(3)  # what is made once (caches, worker threads) is there before counting
    lab.until_converged()
    until(lambda: spares(lab) == SpareTaps.COUNT, "spare TAPs are there again")
    before = until(lambda: at_rest(lab), "nothing is under way any more")

    server = lab.start_in_guest("db", "iperf3", "--server", "--forceflush")
    assert server.stdout is not None
    for line in server.stdout:
        if "listening" in line:
            break
    load = lab.start_in_guest("web", "iperf3", "--client", database, "--time", "0", "--bitrate", "300M", "--json")
    log = tmp_path / "ping"
    with log.open("w") as output:
        ping = lab.start_in_guest("web", "ping", "-n", "-i", "0.01", database, stdout=output)
    try:
        until(lambda: "bytes from" in log.read_text(), "the first reply")
        await churn(ROUNDS)
        ping.send_signal(signal.SIGINT)
        ping.wait(10)
        load.send_signal(signal.SIGINT)
        report = json.loads(load.communicate(timeout=20)[0])
    finally:
        for process in (ping, load, server):
            process.kill()
            process.wait()

    # The last one may have been under way when ping was told to stop.
    answered = [int(number) for number in re.findall(r"icmp_seq=(\d+) ttl", log.read_text())]
    assert sorted(set(range(1, answered[-1] + 1)) - set(answered)) == [], "the ping lost packets"
    assert len(answered) == len(set(answered)), "a packet was answered twice"
    assert report["end"]["sum_sent"]["bytes"] > 0

    lab.until_converged()
    try:
        until(lambda: inventory(lab) == before, "nothing has leaked", timeout=20)
    except AssertionError:
        after = inventory(lab)
        changed = {key: (before[key], after[key]) for key in before | after if before[key] != after[key]}
        pytest.fail(f"leaked (before, after {ROUNDS} rounds): {changed}")
