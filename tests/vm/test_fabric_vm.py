"""The whole fabric between real virtual machines: names, isolation, connecting under load, and what happens when a part
of it, a VM or a vsock device is killed or behaves badly.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scapy.all import ARP, IP, UDP, Dot1Q, Ether, Raw
from system.fabric import camel
from vmlab import TOOL, Lines, Ping, Talk, VmFabric, compile_tool, until, vm_fabric

pytestmark = pytest.mark.system

MIB = 1 << 20
GUEST_PORTS = ("5555", "5556")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, watch_consoles: Callable[[Path], None]) -> Iterator[VmFabric]:
    """web and db are on app, web has another name there; cache is alone on lone."""
    with vm_fabric(compile_tool(tmp_path_factory.mktemp("tool") / "vmtool"), "web", "db", "cache") as lab:
        watch_consoles(lab.path)
        lab.run("network", "create", "app", "--ipv6")
        lab.run("network", "create", "lone", "--ipv6")
        lab.run("network", "connect", "app", "web", "--alias", "front")
        lab.run("network", "connect", "app", "db", "--alias", "postgres")
        lab.run("network", "connect", "lone", "cache")
        lab.until_whole()
        yield lab


@pytest.fixture(autouse=True)
def whole(lab: VmFabric) -> Iterator[None]:
    """Each test begins with everything in order."""
    lab.until_whole()
    yield


def frames(*wanted: Ether) -> str:
    return "".join(bytes(frame).hex() + "\n" for frame in wanted)


def mark(name: str) -> Raw:
    return Raw(f"MARK<{name}>".encode() + bytes(32))


def test_the_helpers_datapath_is_the_kernels(lab: VmFabric) -> None:
    links = json.loads(lab.in_helper("ip", "-json", "link"))
    datapath = next(link for link in links if link["ifname"] == "ovs-system")
    taps = [link for link in links if link.get("master") == "ovs-system"]
    assert datapath, links
    assert len(taps) >= 3, "each endpoint's TAP is a port of the kernel's datapath"


def test_names(lab: VmFabric) -> None:
    v4, v6 = lab.address("db", "app"), lab.address("db", "app", 6)
    for name in ("db", "postgres", "db.app", "postgres.app", "POSTGRES"):
        assert lab.in_guest("web", "getent", "ahostsv4", name).split()[0] == v4
        assert lab.in_guest("web", "getent", "ahostsv6", name).split()[0] == v6
        assert lab.answers("web", name, "-4")
        assert lab.answers("web", name, "-6")
    assert lab.in_guest("web", "getent", "hosts", v4).split() == [v4, "db.app"]
    assert lab.in_guest("db", "getent", "hosts", lab.address("web", "app")).split()[1] == "web.app"
    assert lab.answers("db", "front")
    assert lab.guest("web", "getent", "hosts", "nobody").returncode == 2
    assert lab.guest("web", "getent", "hosts", "cache").returncode == 2, "a name of another network"


def test_names_end_with_the_connection(lab: VmFabric) -> None:
    lab.run("network", "connect", "app", "cache", "--alias", "shortly")
    address = lab.address("cache", "app")
    assert lab.in_guest("web", "getent", "ahostsv4", "shortly").split()[0] == address
    assert lab.answers("web", "cache")
    lab.run("network", "disconnect", "app", "cache")
    for name in ("shortly", "cache", "cache.app", address):
        assert lab.guest("web", "getent", "hosts", name).returncode == 2
    assert lab.silent("web", address)


def test_other_networks_cannot_be_reached(lab: VmFabric) -> None:
    victim, victim6 = lab.address("cache", "lone"), lab.address("cache", "lone", 6)
    gateways = lab.json("network", "inspect", "lone")["gateways"]
    own_gateway = next(g for g in lab.json("network", "inspect", "app")["gateways"] if ":" not in g)
    lab.until_answers("cache", next(g for g in gateways if ":" not in g))
    assert lab.silent("web", victim, victim6)
    lab.in_guest("web", "ip", "route", "replace", victim, "via", own_gateway, "dev", "eth0")
    assert lab.silent("web", victim)
    lab.in_guest("web", "ip", "route", "replace", victim, "dev", "eth0", "scope", "link")
    lab.in_guest(
        *("web", "ip", "neigh", "replace", victim, "dev", "eth0", "lladdr"),
        camel(lab.endpoint("cache", "lone"), "mac_address"),
    )
    assert lab.silent("web", victim)
    lab.in_guest("web", "ip", "neigh", "del", victim, "dev", "eth0")
    lab.in_guest("web", "ip", "route", "del", victim)
    assert lab.answers("web", "db")


def test_forged_frames_are_dropped(lab: VmFabric) -> None:
    """Whatever a root process in a guest puts on its interface: addresses of others, VLANs, another network's MACs."""
    own, peer, victim = (lab.endpoint(*at) for at in (("web", "app"), ("db", "app"), ("cache", "lone")))
    mac, peer_mac, victim_mac = (camel(endpoint, "mac_address") for endpoint in (own, peer, victim))
    ip, peer_ip, victim_ip = lab.address("web", "app"), lab.address("db", "app"), lab.address("cache", "lone")
    nobody = ip.rpartition(".")[0] + ".200"
    udp = UDP(sport=4000, dport=4000)
    sniffers = [Lines(lab, guest, TOOL, "sniff", "eth0") for guest in ("db", "cache")]
    try:
        for sniffer in sniffers:
            until(lambda sniffer=sniffer: "ready" in sniffer.so_far(), "the sniffers are there")
        forged = [
            Ether(dst=peer_mac, src="02:00:00:00:be:ef") / IP(src=ip, dst=peer_ip) / udp / mark("spoofed MAC"),
            Ether(dst=peer_mac, src=mac) / IP(src=nobody, dst=peer_ip) / udp / mark("spoofed IP"),
            Ether(dst=peer_mac, src=mac) / ARP(op=2, hwsrc=mac, psrc=nobody, pdst=peer_ip) / mark("spoofed ARP"),
            Ether(dst=peer_mac, src=mac) / Dot1Q(vlan=5) / IP(src=ip, dst=peer_ip) / udp / mark("VLAN"),
            Ether(dst=victim_mac, src=mac) / IP(src=ip, dst=victim_ip) / udp / mark("other network"),
            Ether(dst=victim_mac, src=mac, type=0x88B5) / mark("other network without IP"),
            Ether(dst="ff:ff:ff:ff:ff:ff", src=mac) / IP(src=ip, dst=victim_ip) / udp / mark("everyone"),
        ]
        # Frames keep their order: once this one is there, those before it have been dealt with.
        honest = Ether(dst=peer_mac, src=mac) / IP(src=ip, dst=peer_ip) / udp / mark("end")
        lab_input = frames(*forged, honest)
        sender = Lines(lab, "web", TOOL, "send", "eth0", stdin=subprocess.PIPE)
        assert sender.process.stdin is not None
        sender.process.stdin.write(lab_input)
        sender.process.stdin.close()
        until(lambda: "end" in sniffers[0].so_far(), f"the honest frame arrives\n{lab.logs()}")
        sender.stop()
        assert set(sniffers[0].so_far()) - {"everyone"} == {"ready", "end"}
        assert sniffers[1].so_far() == ["ready"]
    finally:
        for sniffer in sniffers:
            sniffer.stop()


def test_connecting_under_load(lab: VmFabric) -> None:
    """iperf3 goes on while endpoints come and go, and each that comes has its first ping answered."""
    lab.run("network", "create", "hot")
    lab.run("network", "connect", "hot", "db")
    server = Lines(lab, "db", "iperf3", "-s", "-1", "--forceflush")
    try:
        until(lambda: any("listening" in line for line in server.so_far()), "iperf3 listens")
        client = Lines(lab, "web", "iperf3", "-c", lab.address("db", "app"), "-t", "300", "-i", "1", "--forceflush")
        until(lambda: _intervals(client) >= 2, f"iperf3 runs\n{lab.logs()}")
        for _ in range(3):
            lab.run("network", "connect", "hot", "cache")
            assert lab.answers("cache", "db.hot"), lab.logs()
            lab.run("network", "connect", "hot", "web")
            assert lab.answers("web", "cache.hot"), lab.logs()
            lab.run("network", "disconnect", "hot", "web")
            lab.run("network", "disconnect", "hot", "cache")
        seen = _intervals(client)
        until(lambda: _intervals(client) >= seen + 3, f"iperf3 goes on\n{client.so_far()[-5:]}\n{lab.logs()}")
        client.stop()
    finally:
        server.stop()
        lab.run("network", "disconnect", "hot", "db")
        lab.run("network", "rm", "hot")


def _intervals(client: Lines) -> int:
    """The seconds in which something was carried."""
    return sum("bits/sec" in line and " 0.00 bits/sec" not in line for line in client.so_far())


VICTIMS = ("bridge", "guest/web/vsock", "helper/vsock", "agent of web", "agent of helper")


@pytest.mark.parametrize("victim", VICTIMS)
def test_killed_and_back(lab: VmFabric, victim: str) -> None:
    """No VM boots anew, and connections between guests live on."""
    before = lab.snapshot("app", "lone")
    qemu = {name: lab.pid(name) for name in ("guest/web", "guest/db", "helper")}
    talk = Talk(lab, "web", "db", lab.address("db", "app"))
    ping = Ping(lab, "cache", lab.json("network", "inspect", "lone")["gateways"][0])
    try:
        ping.until_goes_on(lab, "before", 3)
        if victim.startswith("agent of "):
            vm = victim.removeprefix("agent of ")
            _restart_agent(lab, vm)
        else:
            lab.until_restarted(victim, lab.kill(victim))
        lab.until_whole()
        ping.until_goes_on(lab, f"after {victim} was killed")
        if victim != "guest/web/vsock":  # over which the client in that VM is given its words
            talk.says("after")
        for name in ("db", "postgres"):
            lab.until_answers("web", name)
        assert lab.snapshot("app", "lone") == before
        assert {name: lab.pid(name) for name in qemu} == qemu
    finally:
        ping.stop()
        talk.close()


def _agent_now(lab: VmFabric, vm: str) -> int | None:
    try:
        return lab.agent_pid(vm)
    except AssertionError:
        return None


def test_a_guest_is_killed_under_load_and_started_again(lab: VmFabric) -> None:
    before = lab.snapshot("app", "lone")
    server = Lines(lab, "web", "iperf3", "-s", "-1", "--forceflush")
    try:
        until(lambda: any("listening" in line for line in server.so_far()), "iperf3 listens")
        client = Lines(lab, "db", "iperf3", "-c", lab.address("web", "app"), "-t", "300", "-i", "1", "--forceflush")
        until(lambda: _intervals(client) >= 2, f"iperf3 runs\n{lab.logs()}")
        lab.until_restarted("guest/db", lab.kill("guest/db"))
        client.stop()
    finally:
        server.stop()
    lab.until_whole()
    lab.put_tool("db")
    lab.until_answers("web", "postgres")
    lab.until_answers("db", "front")
    assert lab.snapshot("app", "lone") == before


def test_the_helper_vm_is_killed(lab: VmFabric) -> None:
    """Every network comes back by itself, and a connection between guests lives on."""
    before = lab.snapshot("app", "lone")
    talk = Talk(lab, "web", "db", lab.address("db", "app"))
    ping = Ping(lab, "web", lab.address("db", "app"))
    try:
        ping.until_goes_on(lab, "before", 3)
        lab.until_restarted("helper", lab.kill("helper"))
        lab.until_whole()
        ping.until_goes_on(lab, "after the helper VM was killed")
        talk.says("after")
        for name in ("db", "postgres.app"):
            lab.until_answers("web", name)
        lab.until_answers("cache", next(g for g in lab.json("network", "inspect", "lone")["gateways"] if "." in g))
        assert lab.guest("web", "getent", "hosts", "cache").returncode == 2
        assert lab.snapshot("app", "lone") == before
    finally:
        ping.stop()
        talk.close()


class Memory:
    """What the processes on the way of a guest's bytes hold, before and after."""

    def __init__(self, lab: VmFabric, guest: str) -> None:
        self._lab = lab
        self._guest = guest
        self._before = self._now()

    def _now(self) -> dict[str, int]:
        lab = self._lab
        return {
            "bridge": lab.rss(lab.pid("bridge")),
            "vhost-device-vsock": lab.rss(lab.pid(f"guest/{self._guest}/vsock")),
            "helper's vhost-device-vsock": lab.rss(lab.pid("helper/vsock")),
            "helper agent": lab.rss_in("helper", lab.agent_pid("helper")),
        }

    def check(self) -> None:
        """No buffer grows with what a guest sends."""
        now = self._now()
        grown = {name: now[name] - before for name, before in self._before.items() if now[name] - before > 24 * MIB}
        assert not grown, f"grown: {grown}"


def test_a_guest_that_knocks_at_the_hosts_ports(lab: VmFabric) -> None:
    """No vsock port of the host is open to guests: it is the host that dials."""
    memory, ping = Memory(lab, "cache"), Ping(lab, "web", lab.address("db", "app"))
    try:
        ports = ("1", "22", "1024", *GUEST_PORTS, "6000", "6001")
        said = lab.in_guest("cache", TOOL, "knock", "5", *ports)
        assert said.startswith("let in 0, "), said
        ping.until_goes_on(lab, "while another guest knocks")
        memory.check()
    finally:
        ping.stop()
    # Nor is its own agent's to whoever is in the guest: guests have no vsock loopback.
    own = lab.in_guest("cache", TOOL, "reach", "1", *GUEST_PORTS)
    assert "closed" not in own, own
    assert "open" not in own, own


def test_a_guest_that_floods_its_interface(lab: VmFabric) -> None:
    memory, ping = Memory(lab, "cache"), Ping(lab, "web", lab.address("db", "app"))
    try:
        flood = Lines(lab, "cache", TOOL, "frames", "eth0", "8")
        ping.until_goes_on(lab, "under another guest's flood")
        until(lambda: flood.process.poll() is not None, "the flood ends")
        memory.check()
    finally:
        ping.stop()
    lab.until_whole()
    lab.until_answers("cache", next(g for g in lab.json("network", "inspect", "lone")["gateways"] if "." in g))


def test_a_guest_that_sends_garbage_on_its_data_link(lab: VmFabric) -> None:
    """Its link breaks, alone, and is dialled again."""
    memory, ping = Memory(lab, "cache"), Ping(lab, "web", lab.address("db", "app"))
    gateway = next(g for g in lab.json("network", "inspect", "lone")["gateways"] if "." in g)
    try:
        for _ in range(3):
            lab.until_answers("cache", gateway)
            assert lab.in_guest("cache", TOOL, "garble", str(lab.agent_pid("cache")), "5556").strip() == "1"
        ping.until_goes_on(lab, "while another guest sends garbage")
        lab.until_whole()
        lab.until_answers("cache", gateway)
        memory.check()
    finally:
        ping.stop()


def test_a_guest_whose_agent_is_hostile(lab: VmFabric) -> None:
    """Who answers the bridge in it floods with garbage and reads nothing; the real agent is welcome again after it."""
    memory, ping = Memory(lab, "cache"), Ping(lab, "web", lab.address("db", "app"))
    try:
        fake = Lines(lab, "cache", TOOL, "fake", "12", *GUEST_PORTS)
        until(lambda: "listening" in fake.so_far(), f"the hostile agent is there: {fake.so_far()}\n{lab.logs()}")
        ping.until_goes_on(lab, "while another guest's agent is hostile", 20)
        lab.run("network", "disconnect", "app", "db")
        lab.run("network", "connect", "app", "db", "--alias", "postgres")
        until(lambda: fake.process.poll() is not None, "the hostile agent ends")
        lab.until_whole()
        memory.check()
    finally:
        ping.stop()
    lab.until_answers("cache", next(g for g in lab.json("network", "inspect", "lone")["gateways"] if "." in g))
    lab.until_answers("web", "postgres")


START = "/usr/lib/taploom/start.pyc"
COMPILE = """
import marshal, sys, _frozen_importlib_external as importing
source, path = sys.argv[1:]
with open(source) as file:
    code = compile(file.read(), path, "exec")
with open(path, "wb") as file:
    file.write(importing.MAGIC_NUMBER + bytes(12) + marshal.dumps(code))
"""


def _changed(module: str, *changes: tuple[str, str]) -> str:
    """A module's source, with each old text changed to a new one."""
    source = (Path(__file__).parents[2] / module).read_text()
    for old, new in changes:
        assert old in source, f"{old} is not in {module} any more"
        source = source.replace(old, new)
    return source


@pytest.mark.parametrize(
    ("versions", "problem"), [("[1, 2]", ""), ("[2]", "speaks contract versions 2, this bridge speaks 1")]
)
def test_an_agent_that_is_one_contract_version_newer(lab: VmFabric, versions: str, problem: str) -> None:
    """One that speaks ours too is as good as ours; with another the bridge says what to do, and nobody else suffers."""
    front = _changed(
        "agent_guest/front.py",
        ("CONTRACT_VERSIONS = [1]", f"CONTRACT_VERSIONS = {versions}"),
        ("features=sorted(self._features)", "features=[*sorted(self._features), 4000]"),
    )
    modules = 'self.modules = index["modules"]'
    start = _changed("images/common/start.py", (modules, f'{modules}; self.modules.pop("agent_guest.front", None)'))
    lab.in_guest("cache", "mkdir", "-p", "/usr/lib/taploom/agent_guest")
    lab.write("cache", "/usr/lib/taploom/agent_guest/front.py", front)
    lab.in_guest("cache", "cp", START, f"{START}.was")
    lab.write("cache", "/run/compile.py", COMPILE)  # a file: for -c Python wants modules that the image lacks
    lab.write("cache", "/run/start.py", start)
    lab.in_guest("cache", "/usr/bin/python3", "-I", "-S", "/run/compile.py", "/run/start.py", START)
    try:
        _restart_agent(lab, "cache")
        if problem:
            until(lambda: problem in lab.command("status", "--json").stdout, f"the bridge says so\n{lab.logs()}")
        else:
            lab.until_whole()
            lab.run("network", "connect", "app", "cache")
            lab.until_answers("cache", "postgres")
            lab.run("network", "disconnect", "app", "cache")
        lab.until_answers("web", "postgres")
    finally:
        lab.in_guest("cache", "mv", f"{START}.was", START)
        _restart_agent(lab, "cache")
    lab.until_whole()
    lab.until_answers("cache", next(g for g in lab.json("network", "inspect", "lone")["gateways"] if "." in g))


def _restart_agent(lab: VmFabric, vm: str) -> None:
    old = lab.agent_pid(vm)
    lab.in_guest(vm, "kill", "-9", str(old))
    until(lambda: _agent_now(lab, vm) not in (None, old), f"the agent is back\n{lab.logs()}")
