"""A lab on virtual machines: its commands, what comes back by itself, containers, and its end."""

from __future__ import annotations

import json
import os
import pty
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from system.fabric import until

from lab import cleanup
from lab.state import Lab, replace_json

pytestmark = pytest.mark.system

TAPLOOM = str(Path(sys.executable).with_name("taploom"))
BOOT = 900.0
RECOVERY = 480.0
COMMAND = 120.0


class VmLab:
    """One lab, driven by the commands that people type."""

    def __init__(self) -> None:
        self.lab = Lab("t" + secrets.token_hex(4))
        self.environment = {**os.environ, "TAPLOOM_LAB": self.lab.name, "DOCKER_HOST": self.lab.docker_host}

    def run(
        self, *arguments: str, timeout: float = COMMAND, check: bool = True, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        return self._run([TAPLOOM, *arguments], timeout, check, stdin)

    def docker(self, *arguments: str, timeout: float = COMMAND, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self._run(["docker", *arguments], timeout, check, "")

    def _run(self, command: list[str], timeout: float, check: bool, stdin: str) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=timeout, env=self.environment, check=False
        )
        if check:
            assert result.returncode == 0, f"{command}: {result.returncode}\n{result.stdout}{result.stderr}"
        return result

    def in_guest(self, guest: str, *command: str, **more: object) -> subprocess.CompletedProcess[str]:
        return self.run("lab", "exec", guest, "--", *command, **more)  # type: ignore[arg-type]

    def status(self) -> dict[str, object]:
        return dict(json.loads(self.run("lab", "status", "--json").stdout))

    def process(self, name: str) -> dict[str, object]:
        """What the supervisor says of one of its processes."""
        found = [row for row in self.status()["processes"] if row["name"] == name]  # type: ignore[attr-defined]
        assert len(found) == 1
        return dict(found[0])

    def ready(self, component: str) -> bool:
        """Whether the bridge reaches it."""
        listed = self.status()["fabric"]["components"]  # type: ignore[index]
        return any(entry["name"] == component and "OK" in entry["state"] for entry in listed)


@pytest.fixture(scope="module")
def lab(watch_consoles: Callable[[Path], None]) -> Iterator[VmLab]:
    """A lab with one guest, web, on the network app."""
    lab = VmLab()
    watch_consoles(lab.lab.path)
    try:
        lab.run("lab", "up", "--vm", "--guest", "web", timeout=BOOT)
        lab.run("network", "create", "app", "--ipv6")
        lab.run("network", "connect", "app", "web")
        yield lab
    finally:
        lab.run("lab", "down", check=False)


def test_status_says_what_runs(lab: VmLab) -> None:
    status = lab.status()
    assert status["vm"] is True and status["helper_netns"] is None
    assert status["guests"] == [
        {
            "name": "web",
            "address": f"hybrid:{lab.lab.path}/guests/web/vsock.sock:5555",
            "netns": None,
            "directory": f"{lab.lab.path}/guests/web",
        }
    ]
    names = {row["name"] for row in status["processes"]}  # type: ignore[attr-defined]
    assert names == {"runtime", "bridge", "helper", "helper/vsock", "guest/web", "guest/web/vsock"}


def test_commands_in_a_guest(lab: VmLab) -> None:
    done = lab.in_guest("web", "sh", "-c", "echo out; echo err >&2; exit 3", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    assert lab.in_guest("web", "cat", stdin="through\n").stdout == "through\n"
    assert lab.in_guest("web", "sh", "-c", "kill -TERM $$", check=False).returncode == 128 + signal.SIGTERM
    missing = lab.in_guest("web", "nosuch", check=False)
    assert missing.returncode == 127 and "nosuch: No such file or directory" in missing.stderr
    unknown = lab.in_guest("nobody", "true", check=False)
    assert unknown.returncode == 1 and "there is no guest 'nobody'" in unknown.stderr
    control = "/run/taploom-helper/run/ovs-vswitchd.ctl"
    assert "system@ovs-system" in lab.in_guest("helper", "ovs-appctl", "-t", control, "dpif/show").stdout


def test_a_terminal_in_a_guest(lab: VmLab) -> None:
    pid, master = pty.fork()
    if pid == 0:
        os.environ.update(lab.environment)
        os.execv(TAPLOOM, [TAPLOOM, "lab", "exec", "web", "--", "sh", "-c", "tty; read line; echo got $line; exit 5"])
    shown = b""
    os.set_blocking(master, True)

    def read_until(wanted: bytes) -> None:
        nonlocal shown
        while wanted not in shown:
            shown += os.read(master, 4096)

    try:
        read_until(b"/dev/pts/")
        os.write(master, b"hello\r")
        read_until(b"got hello")
    finally:
        _, status = os.waitpid(pid, 0)
        os.close(master)
    assert os.waitstatus_to_exitcode(status) == 5


def test_the_way_out_is_the_helpers_card(lab: VmLab) -> None:
    for address in ("198.51.100.1", "2001:db8:1::1"):
        lab.in_guest("web", "ping", "-n", "-c1", "-W20", address)
    assert "taploom-vm" in Path(f"/proc/{lab.process('helper')['pid']}/comm").read_text()


REQUEST = 'head -c 70000 /dev/zero | nc "$0" "$1"'  # ends its half of the connection, then reads to the other's end


def test_a_connection_to_the_machine_ends_each_way_by_itself(lab: VmLab) -> None:
    """A gateway stands for the machine; the answer is sent after the request's end has come."""
    gateway = next(a for a in json.loads(lab.run("network", "inspect", "app", "--json").stdout)["gateways"] if "." in a)
    got: list[int] = []

    def answer(listener: socket.socket) -> None:
        with listener.accept()[0] as peer:
            peer.settimeout(COMMAND)
            got.append(sum(map(len, iter(lambda: peer.recv(65536), b""))))
            peer.sendall(b"answer")

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        listener.settimeout(COMMAND)
        answering = pool.submit(answer, listener)
        port = str(listener.getsockname()[1])
        assert lab.in_guest("web", "sh", "-c", REQUEST, gateway, port).stdout == "answer"
        answering.result()
    assert got == [70000]


def test_a_guest_comes_and_goes(lab: VmLab) -> None:
    lab.run("lab", "add", "db", timeout=BOOT)
    lab.run("network", "connect", "app", "db", "--alias", "postgres")
    assert "bytes from" in lab.in_guest("web", "ping", "-n", "-c3", "-W20", "postgres").stdout
    again = lab.run("lab", "add", "db", check=False)
    assert again.returncode == 1 and "choose another name" in again.stderr
    lab.run("lab", "rm", "db")
    assert [guest["name"] for guest in lab.status()["guests"]] == ["web"]  # type: ignore[attr-defined]
    assert not lab.lab.guest_directory("db").exists()


def test_a_vsock_device_that_dies_is_replaced_under_the_running_vm(lab: VmLab) -> None:
    boot = lab.in_guest("web", "cat", "/proc/sys/kernel/random/boot_id").stdout
    os.kill(int(str(lab.process("guest/web/vsock")["pid"])), signal.SIGKILL)
    until(
        lambda: lab.process("guest/web/vsock")["restarts"] >= 1 and lab.ready("guest/web"),
        "the guest answers again",
        RECOVERY,
    )
    assert lab.in_guest("web", "cat", "/proc/sys/kernel/random/boot_id").stdout == boot
    assert lab.process("guest/web")["restarts"] == 0


def test_a_vm_that_ends_boots_anew_with_its_networks(lab: VmLab) -> None:
    boot = lab.in_guest("web", "cat", "/proc/sys/kernel/random/boot_id").stdout
    os.kill(int(str(lab.process("guest/web")["pid"])), signal.SIGKILL)

    def back() -> bool:
        found = lab.in_guest("web", "cat", "/proc/sys/kernel/random/boot_id", check=False)
        return found.returncode == 0 and found.stdout != boot

    until(back, "the VM boots anew", RECOVERY)
    until(lambda: "eth0" in lab.in_guest("web", "ip", "-brief", "link").stdout, "its interface is back", RECOVERY)


def test_a_container_is_a_vm(lab: VmLab, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("of the host\n")
    lab.docker(
        *("run", "-d", "--name", "api", "--network", "app", "--hostname", "box", "-v", f"{tmp_path}:/volume"),
        *("host", "sh", "-c", "echo started; trap 'exit 5' TERM; while :; do sleep 1; done"),
        timeout=BOOT,
    )
    # Its kernel is the VM's, its files are the machine's and the volume's, its name is the network's.
    assert "taploom" in lab.docker("exec", "api", "uname", "-r").stdout
    assert lab.docker("exec", "api", "cat", "/volume/file").stdout == "of the host\n"
    lab.docker("exec", "api", "sh", "-c", "echo of the container > /volume/new; hostname > /root/kept")
    assert (tmp_path / "new").read_text() == "of the container\n"
    assert "bytes from" in lab.in_guest("web", "ping", "-n", "-c3", "-W20", "api").stdout
    assert lab.docker("exec", "api", "sh", "-c", "exit 4", check=False).returncode == 4
    missing = lab.docker("exec", "api", "nosuch", check=False)
    assert missing.returncode == 126 and "executable file not found in $PATH" in missing.stdout + missing.stderr
    lab.docker("stop", "api")
    assert lab.docker("inspect", "-f", "{{.State.ExitCode}}", "api").stdout.strip() == "5"
    assert lab.docker("logs", "api").stdout == "started\n"
    lab.docker("rm", "api")
    refused = lab.docker("run", "--rm", "--network", "host", "host", "true", check=False)
    assert refused.returncode != 0


def test_a_lab_is_one_or_the_other(lab: VmLab) -> None:
    # In a lab on VMs, guests are VMs whether that is said again or not.
    other = Lab("t" + secrets.token_hex(4))
    other.create()
    replace_json(other.path / "lab.json", {"guests": [], "vm": False})
    try:
        refused = lab.run("--lab", other.name, "lab", "up", "--vm", check=False)
        assert refused.returncode == 1 and "its guests are namespaces" in refused.stderr
    finally:
        cleanup.remove(other)


def test_down_removes_all_of_it_when_everything_was_killed(lab: VmLab) -> None:
    supervisor = lab.status()["supervisor_pid"]
    assert isinstance(supervisor, int)
    os.kill(supervisor, signal.SIGKILL)
    lab.run("lab", "down")
    assert cleanup.processes(lab.lab) == [] and cleanup.namespaces(lab.lab) == []
    assert not lab.lab.path.exists()
