"""Agents in VMs and who they speak with: the host only, and bridges of other contract versions."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from system.fabric import TAPLOOM
from vmlab import BOOT, compile_tool, until

from images.common import cpio
from lab.vm import tools
from lab.vm.machine import Machine

CONTROL, DATA, NOBODY = "5555", "5556", "5599"
AGENT_CID, SIBLING_CID = 3, 4

# A bridge that speaks other contract versions than this one; the rest of it is ours.
BRIDGE = """
import sys
import host_bridge.peer
host_bridge.peer.CONTRACT_VERSIONS = frozenset(map(int, sys.argv[1].split(",")))
from host_bridge.__main__ import main
raise SystemExit(main(sys.argv[2:]))
"""


@contextlib.contextmanager
def process(log: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process for the length of the block."""
    with log.open("wb") as output:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield child
    finally:
        child.kill()
        child.wait()


@pytest.fixture(scope="module")
def machines(
    kernel: Path, guest_initfs: Path, machine_directory: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Machine, Machine]]:
    """A guest with its agent, and a VM beside it that tries to speak to it: both vsocks are one process's, which lets
    them reach each other.
    """
    base = tmp_path_factory.mktemp("sibling")
    (base / "root").mkdir()
    compile_tool(base / "root" / "init")
    cpio.write_newc(base / "root", base / "initrd", devices=cpio.CONSOLE)
    agent = Machine("agent", machine_directory("agent"), kernel, guest_initfs)
    append = f"-- reach {AGENT_CID} {NOBODY} {CONTROL} {DATA}"
    sibling = Machine("sibling", machine_directory("sibling"), kernel, base / "initrd", append=append)
    vsocks = []
    for machine, cid in ((agent, AGENT_CID), (sibling, SIBLING_CID)):
        machine.prepare_vsock()
        device = f"guest-cid={cid},socket={machine.vhost_socket},uds-path={machine.vsock_socket}"
        vsocks += ["--vm", f"{device},tx-buffer-size=65536,queue-size=1024,groups=all"]
    with contextlib.ExitStack() as stack:
        log = agent.directory / "vsock.log"
        stack.enter_context(process(log, str(tools.vhost_device_vsock()), *vsocks))
        until(lambda: agent.vhost_socket.exists() and sibling.vhost_socket.exists(), "vhost-device-vsock listens")
        for machine, said in ((agent, "agent answers"), (sibling, f"reach {DATA}")):
            stack.enter_context(process(machine.directory / "qemu.log", *machine.qemu_command()))
            until(lambda machine=machine, said=said: said in printed(machine), f"{machine.name}: {said}", BOOT)
        yield agent, sibling
    for machine in (agent, sibling):
        shutil.rmtree(machine.directory)


def printed(machine: Machine) -> str:
    return machine.console.read_text(errors="replace") if machine.console.exists() else ""


def test_only_the_host_may_connect(machines: tuple[Machine, Machine]) -> None:
    agent, sibling = machines
    said = dict(line.split()[1:3] for line in printed(sibling).splitlines() if line.startswith("reach "))
    assert said[NOBODY] == "ECONNRESET", "the way to the other VM is there"
    assert (said[CONTROL], said[DATA]) == ("closed", "closed")
    assert printed(agent).count(f"CID {SIBLING_CID} is not the host") == 2


@pytest.mark.parametrize(
    ("versions", "problem"), [("1,2", ""), ("2", "speaks contract versions 1, this bridge speaks 2: update guest")]
)
def test_a_bridge_that_is_one_contract_version_newer(
    machines: tuple[Machine, Machine], tmp_path: Path, versions: str, problem: str
) -> None:
    agent = machines[0]
    address = f"unix:{agent.directory}/bridge.sock"
    command = [sys.executable, "-c", BRIDGE, versions, "--socket", address, "--state-dir", str(tmp_path / "state")]
    command += ["--helper", f"unix:{tmp_path}/no-helper.sock"]

    def taploom(*arguments: str) -> str:
        done = subprocess.run(
            [TAPLOOM, "--bridge", address, *arguments, "--json"],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        return done.stdout

    with process(tmp_path / "bridge.log", *command):
        until(lambda: Path(address.removeprefix("unix:")).exists(), "the bridge is there")
        registered = json.loads(taploom("guest", "register", "agent", agent.address(int(CONTROL))))
        if problem:
            until(lambda: problem in taploom("status"), "the bridge says so")
        else:
            until(lambda: json.loads(taploom("guest", "ls"))[0].get("connected"), f"{registered} is connected")
