"""The lab's own commands: side by side, again and again, and gone without a trace."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fabric import Fabric, children, fabric, until

pytestmark = pytest.mark.system


def traces(lab: Fabric) -> list[str]:
    """All that exists of a lab."""
    found = [str(path) for path in Path("/run/netns").glob(f"taploom.{lab.name}.*")]
    if lab.path.exists():
        found.append(str(lab.path))
    marker = f"TAPLOOM_LAB_DIR={lab.path}".encode()
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                if marker in (process / "environ").read_bytes().split(b"\0"):
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
    return found


@pytest.fixture
def lab() -> Iterator[Fabric]:
    with fabric("web") as lab:
        yield lab


def test_up_again_adds_guests(lab: Fabric) -> None:
    pids = {name: process["pid"] for name, process in lab.processes().items()}
    lab.run("lab", "up", "--guest", "web", "--guest", "db")
    processes = lab.processes()
    assert {name: processes[name]["pid"] for name in pids} == pids
    assert "guest/db" in processes
    assert lab.in_guest("db", "hostname") == "db\n"
    lab.run("lab", "rm", "db")
    assert "guest/db" not in lab.processes()
    assert [guest["name"] for guest in lab.json("guest", "ls")] == ["web"]


def test_exec_is_like_a_shell(lab: Fabric) -> None:
    run = ("lab", "exec", "web", "--")
    assert lab.command(*run, "sh", "-c", "exit 7").returncode == 7
    assert lab.command(*run, "nonexistent-program").returncode == 127
    assert lab.run(*run, "printf", "%s|", "a b", "--flag", "$HOME") == "a b|--flag|$HOME|"


def test_two_labs_side_by_side(lab: Fabric) -> None:
    with fabric("web", "db") as other:
        for each in (lab, other):
            each.run("network", "create", "app")
            each.run("network", "connect", "app", "web")
        other.run("network", "connect", "app", "db")
        assert lab.address("web", "app") == other.address("web", "app")
        other.until_answers("web", "db")
        assert not lab.answers("web", other.address("db", "app"))
    assert traces(other) == []
    lab.until_answers("web", "172.18.0.1")


def test_a_guest_that_reboots(lab: Fabric) -> None:
    lab.run("lab", "add", "db")
    lab.run("network", "create", "app")
    for guest in ("web", "db"):
        lab.run("network", "connect", "app", guest)
    os.kill(lab.processes()["guest/db/holder"]["pid"], signal.SIGKILL)
    until(lambda: lab.processes()["guest/db/holder"]["restarts"] == 1, "the guest starts again")
    lab.until_answers("web", "db")


def _everything(lab: Fabric) -> list[int]:
    supervisor = lab.json("lab", "status")["supervisor_pid"]
    return [supervisor, *children(supervisor)]


def test_down_after_the_supervisor_was_killed(lab: Fabric) -> None:
    lab.run("network", "create", "app")
    lab.run("network", "connect", "app", "web")
    everything = _everything(lab)
    os.kill(everything[0], signal.SIGKILL)
    assert "no lab" in lab.command("status").stderr or lab.command("status").returncode == 1
    lab.run("lab", "down")
    assert traces(lab) == []


def test_up_after_the_supervisor_was_killed_keeps_the_state(lab: Fabric) -> None:
    lab.run("network", "create", "app")
    lab.run("network", "connect", "app", "web", "--alias", "www")
    before = lab.endpoint("web", "app")
    os.kill(_everything(lab)[0], signal.SIGKILL)
    lab.run("lab", "up")
    lab.until_converged()
    assert lab.endpoint("web", "app") == before
    lab.until_answers("web", "172.18.0.1")


def test_down_after_everything_was_killed(lab: Fabric) -> None:
    process = lab.start_in_guest("web", "sleep", "1000")
    for pid in _everything(lab):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    lab.run("lab", "down")
    process.wait(10)
    assert traces(lab) == []


def test_down_twice_and_without_a_lab(lab: Fabric) -> None:
    lab.run("lab", "down")
    lab.run("lab", "down")
    assert "lab up" in lab.fails("lab", "status")
    assert "lab up" in lab.fails("network", "ls")
    assert traces(lab) == []


def test_bad_lab_names() -> None:
    lab = Fabric()
    assert "lab name" in lab.fails("lab", "up", "--lab", "../x")
    assert "guest name" in lab.fails("lab", "up", "--guest", "a/b")
    assert not lab.path.exists()
    assert (
        subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.count(lab.name) == 0
    )
