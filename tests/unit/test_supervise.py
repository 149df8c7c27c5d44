from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from taploom.supervise import SupervisedProcess


async def _changed(process: SupervisedProcess, pid: int) -> None:
    while process.pid in (0, pid):
        await trio.sleep(0.01)


async def test_restarts_at_once_and_counts(tmp_path: Path, nursery: trio.Nursery) -> None:
    states: list[str] = []
    process = SupervisedProcess(
        "sleeper", ["sleep", "1000"], log=tmp_path / "log", on_change=lambda p: states.append(p.state)
    )
    await nursery.start(process.run)
    assert process.state == "running"
    first = process.pid
    os.kill(first, signal.SIGKILL)
    with trio.fail_after(10):
        await _changed(process, first)
        await process.wait_ready()
    assert process.restarts == 1
    assert process.last_exit == "was ended by SIGKILL"
    assert states[:4] == ["starting", "running", "down", "starting"]


async def test_cancel_stops_the_process(tmp_path: Path) -> None:
    process = SupervisedProcess("sleeper", ["sleep", "1000"], log=tmp_path / "log")
    async with trio.open_nursery() as nursery:
        await nursery.start(process.run)
        pid = process.pid
        nursery.cancel_scope.cancel()
    assert process.state == "down"
    assert not Path(f"/proc/{pid}").exists()


async def test_a_running_child_is_taken_over(tmp_path: Path, nursery: trio.Nursery) -> None:
    pid = os.posix_spawnp("sleep", ["sleep", "1000"], os.environ)
    prepared: list[int] = []
    process = SupervisedProcess(
        "sleeper", ["sleep", "1000"], log=tmp_path / "log", prepare=lambda: prepared.append(1), adopt=pid
    )
    await nursery.start(process.run)
    assert (process.pid, process.state, prepared) == (pid, "running", [])
    process.kill(signal.SIGKILL)
    with trio.fail_after(10):
        await _changed(process, pid)
        await process.wait_ready()
    assert process.last_exit == "was ended by SIGKILL"
    assert prepared == [1]


async def test_a_child_that_was_taken_over_is_stopped(tmp_path: Path) -> None:
    pid = os.posix_spawnp("sleep", ["sleep", "1000"], os.environ)
    process = SupervisedProcess("sleeper", ["sleep", "1000"], log=tmp_path / "log", adopt=pid)
    async with trio.open_nursery() as nursery:
        await nursery.start(process.run)
        nursery.cancel_scope.cancel()
    assert process.last_exit == "was ended by SIGTERM"
    assert not Path(f"/proc/{pid}").exists()


async def test_started_with_its_niceness(tmp_path: Path, nursery: trio.Nursery) -> None:
    process = SupervisedProcess("sleeper", ["sleep", "1000"], log=tmp_path / "log", nice=3)
    await nursery.start(process.run)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, process.pid) == min(own + 3, 19)


async def test_started_only_when_ready(tmp_path: Path, nursery: trio.Nursery) -> None:
    answered = trio.Event()
    process = SupervisedProcess("sleeper", ["sleep", "1000"], log=tmp_path / "log", ready=answered.wait)
    nursery.start_soon(nursery.start, process.run)
    await trio.testing.wait_all_tasks_blocked()
    assert process.state == "starting"
    answered.set()
    with trio.fail_after(10):
        await process.wait_ready()
    assert process.state == "running"


async def test_a_process_that_always_ends_is_retried(tmp_path: Path, nursery: trio.Nursery) -> None:
    process = SupervisedProcess("false", ["sh", "-c", "exit 3"], log=tmp_path / "log", backoff_max=0.1)
    nursery.start_soon(process.run)
    with trio.fail_after(10):
        while process.restarts < 4:
            await trio.sleep(0.01)
    assert process.last_exit == "ended with exit code 3"


async def test_missing_program(tmp_path: Path) -> None:
    process = SupervisedProcess("nothing", ["/nonexistent/program"], log=tmp_path / "log")
    with pytest.raises(FileNotFoundError):
        await process.run()


def test_children_die_with_a_killed_parent(tmp_path: Path) -> None:
    script = (
        "import sys, trio\n"
        "from pathlib import Path\n"
        "from taploom.supervise import SupervisedProcess\n"
        "async def main():\n"
        "    p = SupervisedProcess('s', ['sleep', '1000'], log=Path(sys.argv[1]))\n"
        "    async with trio.open_nursery() as n:\n"
        "        await n.start(p.run)\n"
        "        print(p.pid, flush=True)\n"
        "trio.run(main)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, tmp_path / "log"], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    fd = os.pidfd_open(child)
    parent.kill()
    parent.wait()

    async def gone() -> None:
        with trio.fail_after(10):
            await trio.lowlevel.wait_readable(fd)

    trio.run(gone)
    os.close(fd)
