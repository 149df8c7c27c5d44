"""A lab of virtual machines for tests, driven by the commands that people type."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from system import fabric
from system.fabric import TAPLOOM, Fabric

# Longest waits; nothing here is a promise about speed. With an emulated processor a VM takes half a minute to boot, and
# longer on a busy machine.
BOOT = 600.0
RECOVERY = 480.0
PAUSE = 0.3

TOOL = "/run/vmtool"
# The image's modules are in one file, which an interpreter has to be told.
_PROGRAM = """import sys
sys.path.insert(0, "/usr/lib/taploom")
import start
start.Bundle().install()
exec(compile({program!r}, {path!r}, "exec"), {{"__name__": "__main__"}})
"""
_DROPPED = ("link_up", "linkUp", "connected", "problem", "status")


def until(condition: Callable[[], Any], what: str | Callable[[], str], timeout: float = RECOVERY) -> Any:
    """As fabric.until, with the patience that emulated machines need, and leaving them the processors meanwhile."""
    return fabric.until(condition, what, timeout, PAUSE)


def compile_tool(target: Path) -> Path:
    """Compiles vmtool.c to a program that needs nothing else."""
    source = Path(__file__).with_name("vmtool.c")
    subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-static", "-o", str(target), str(source)], check=True)
    return target


class VmFabric(Fabric):
    """One lab on VMs, with `vmtool` in every guest."""

    def __init__(self, tool: Path) -> None:
        super().__init__()
        self._tool = tool
        self._programs: set[tuple[str, str]] = set()

    def up(self, *guests: str) -> None:
        self.run("lab", "up", "--vm", *(part for guest in guests for part in ("--guest", guest)), timeout=900)
        for guest in guests:
            self.put_tool(guest)

    def put_tool(self, guest: str) -> None:
        """Copies vmtool into a VM, where it is gone after a boot."""
        self._write(guest, TOOL, self._tool.read_bytes())
        self.in_guest(guest, "chmod", "755", TOOL)

    def write(self, guest: str, path: str, text: str) -> None:
        """Writes a file in a VM."""
        self._write(guest, path, text.encode())

    def guest(self, name: str, *command: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        return super().guest(name, *self._command(name, command), timeout=timeout)

    def in_guest(self, name: str, *command: str, timeout: float = 60) -> str:
        return super().in_guest(name, *self._command(name, command), timeout=timeout)

    def start_in_guest(self, name: str, *command: str, **options: Any) -> subprocess.Popen[str]:
        return super().start_in_guest(name, *self._command(name, command), **options)

    def _command(self, guest: str, command: Sequence[str]) -> Sequence[str]:
        """A command as it is in a VM: tests' Python programs, by path or with -c, run with the image's interpreter."""
        if not command or command[0] != sys.executable:
            return command
        text, *arguments = command[2:] if command[1] == "-c" else (Path(command[1]).read_text(), *command[2:])
        path = f"/run/{hashlib.sha256(text.encode()).hexdigest()[:16]}.py"
        if (guest, path) not in self._programs:
            self.write(guest, path, _PROGRAM.format(program=text, path=path))
            self._programs.add((guest, path))
        return ["/usr/bin/python3", "-I", "-S", "-B", path, *arguments]

    def _write(self, guest: str, path: str, data: bytes) -> None:
        subprocess.run(
            [TAPLOOM, "lab", "exec", guest, "--", "sh", "-c", 'cat >"$0"', path],
            input=data,
            env=self.environment,
            check=True,
            timeout=120,
        )

    def answers(self, guest: str, target: str, *options: str) -> bool:
        """True when one ping is answered, however late; it is sent once the name is found.

        A guest's resolver gives a network's server a second, which is not enough for it where processors are emulated
        and something floods them.
        """

        def found() -> subprocess.CompletedProcess[str] | None:
            done = self.guest(guest, "ping", "-n", "-c1", "-W30", *options, target)
            return None if done.returncode == 2 else done

        done = until(found, lambda: f"{guest} finds {target}\n{self.logs()}")
        print(f"ping {target} in {guest}: {done.returncode}\n{done.stdout}{done.stderr}")  # seen when a test fails
        return done.returncode == 0

    def silent(self, guest: str, *targets: str) -> bool:
        """True when pings to none of them are answered; they are sent at once."""
        script = 'for target; do ping -n -c1 -W3 "$target" >/dev/null 2>&1 && echo "$target" & done; wait'
        return self.in_guest(guest, "sh", "-c", script, "sh", *targets) == ""

    def until_answers(self, guest: str, target: str, *options: str) -> None:
        until(lambda: self.answers(guest, target, *options), f"{target} answers {guest}\n{self.logs()}")

    def in_helper(self, *command: str) -> str:
        return self.in_guest("helper", *command)

    def pid(self, name: str) -> int:
        """The pid of one of the lab's processes: helper, guest/NAME, each with /vsock too; bridge."""
        return int(self.processes()[name]["pid"])

    def kill(self, name: str) -> int:
        """kill -9 of one of the lab's processes; returns what its pid was, when it is gone."""
        pid = self.pid(name)
        fd = os.pidfd_open(pid)
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        until(lambda: not _alive(pid), f"{name} ends")
        os.close(fd)
        return pid

    def until_restarted(self, name: str, old: int) -> None:
        def restarted() -> bool:
            process = self.processes().get(name)
            return process is not None and process["pid"] not in (None, 0, old)

        until(restarted, f"{name} is started again\n{self.logs()}", RECOVERY)

    def until_whole(self) -> None:
        """Waits until all that should be connected is."""
        self.until_converged(RECOVERY, PAUSE)

    def agent_pid(self, vm: str) -> int:
        """The pid of the agent in a VM: the process of our own with the vsock addresses among its arguments."""
        found = self.guest(vm, "sh", "-c", "grep -la vsock: /proc/[0-9]*/cmdline; true").stdout
        pids = [int(match) for match in re.findall(r"/proc/(\d+)/cmdline", found)]
        candidates = [
            pid
            for pid in pids
            if pid != 1 and "python" in self.guest(vm, "sh", "-c", f"readlink /proc/{pid}/exe; true").stdout
        ]
        assert candidates, f"no agent among {pids} in {vm}"
        return min(candidates)

    def snapshot(self, *networks: str) -> Any:
        """What must not change over any failure: networks and guests with ids, addresses, aliases and MACs."""
        return [
            [_stable(self.json("network", "inspect", network)) for network in networks],
            [_stable(guest) for guest in self.json("guest", "ls")],
        ]

    def rss(self, pid: int) -> int:
        """A process's resident memory in bytes."""
        return _rss(Path(f"/proc/{pid}/status").read_text())

    def rss_in(self, vm: str, pid: int) -> int:
        """The same of a process in a VM."""
        return _rss(self.in_guest(vm, "cat", f"/proc/{pid}/status"))

    def logs(self) -> str:
        text = super().logs()
        for path in sorted(self.path.rglob("console.log")):
            lines = path.read_text(errors="replace").splitlines()
            text += f"\n--- {path.relative_to(self.path)}\n" + "\n".join(lines[-12:])
        return text


def _rss(status: str) -> int:
    match = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
    assert match is not None, status
    return int(match[1]) * 1024


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stable(member) for key, member in value.items() if key not in _DROPPED}
    if isinstance(value, list):
        return [_stable(item) for item in value]
    return value


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Lines:
    """The lines that a command in a guest prints, read as they come."""

    def __init__(self, lab: VmFabric, guest: str, *command: str, **options: Any) -> None:
        self.process = lab.start_in_guest(guest, *command, **options)
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append(line.rstrip("\n"))

    def so_far(self) -> list[str]:
        return list(self._lines)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(10)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class Ping(Lines):
    """A ping that goes on, several a second."""

    def __init__(self, lab: VmFabric, guest: str, target: str) -> None:
        super().__init__(lab, guest, "ping", "-n", "-i", "0.2", target)

    def replies(self) -> int:
        return sum("bytes from" in line for line in self.so_far())

    def until_goes_on(self, lab: VmFabric, what: str, more: int = 10) -> None:
        """Waits until further replies have come."""
        before = self.replies()
        until(lambda: self.replies() >= before + more, f"the ping goes on {what}\n{lab.logs()}", RECOVERY)


class Talk:
    """A TCP connection between two guests that stays open through a failure."""

    def __init__(self, lab: VmFabric, client: str, server: str, address: str, port: int = 7) -> None:
        self._server = Lines(lab, server, TOOL, "serve", str(port))
        until(lambda: "ready" in self._server.so_far(), f"the echo server is there\n{lab.logs()}")
        self._client = Lines(lab, client, TOOL, "talk", address, str(port), stdin=subprocess.PIPE)
        self.lab = lab
        self.says("before")

    def says(self, word: str) -> None:
        """Sends a word, and waits for its echo."""
        stdin = self._client.process.stdin
        assert stdin is not None
        stdin.write(word + "\n")
        stdin.flush()

        def answered() -> bool:
            assert self._client.process.poll() is None, f"the connection broke: {self._client.so_far()}"
            return word in self._client.so_far()

        until(answered, f"{word!r} comes back over the TCP connection\n{self.lab.logs()}", RECOVERY)

    def close(self) -> None:
        self._client.stop()
        self._server.stop()


@contextlib.contextmanager
def vm_fabric(tool: Path, *guests: str) -> Iterator[VmFabric]:
    """A lab on VMs with these guests, removed at the end."""
    lab = VmFabric(tool)
    try:
        lab.up(*guests)
        yield lab
    finally:
        lab.command("lab", "down", timeout=120)
