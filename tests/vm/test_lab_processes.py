"""The process server in a VM: streams, terminals, signals, and what becomes of a process whose caller goes away."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from conftest import ARCH, ROOT

from lab.vm import payload, processes, tools
from lab.vm.machine import Machine, RunningMachine, running
from lab.vm.processes import Command, ProcessError, RemoteProcess, Terminal

BOOT = 600.0
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


@pytest.fixture(scope="module")
def initrd(guest_initfs: Path) -> Path:
    added = payload.build(ARCH, cache=tools.cache(), say=print)
    return payload.join("guest", ARCH, [guest_initfs], added, ROOT / "build/lab" / ARCH, cache=tools.cache())


@asynccontextmanager
async def carried(address: str, command: Command) -> AsyncIterator[RemoteProcess]:
    """A process that is carried while the block runs."""
    async with trio.open_nursery() as nursery:
        process = await processes.start(address, command)
        nursery.start_soon(process.run)
        yield process
        nursery.cancel_scope.cancel()


async def everything(process: RemoteProcess) -> bytes:
    said = b""
    while data := await process.stdout.receive_some():
        said += data
    return said


async def test_processes(kernel: Path, initrd: Path, machine_directory: Callable[[str], Path]) -> None:
    machine = Machine("processes", machine_directory("processes"), kernel, initrd, append="quiet", arch=ARCH)
    address = machine.address(processes.PORT)

    async def run(*arguments: str) -> tuple[int, bytes]:
        return await processes.run(address, Command(arguments, ENVIRONMENT))

    async with running(machine) as vm:
        with trio.fail_after(BOOT):
            await trio.aclose_forcefully(await vm.wait_connect(processes.PORT))
        with trio.fail_after(BOOT):
            # How they end.
            assert await run("sh", "-c", "echo out; exit 3") == (3, b"out\n")
            assert await run("sh", "-c", "kill -9 $$") == (-9, b"")
            # What it has said is there when its end is told of, also where another has its streams still.
            said = Command(("sh", "-c", "sleep 600 & head -c 60000 /dev/zero"), ENVIRONMENT)
            async with carried(address, said) as process:
                assert await process.wait() == 0
                assert sum(map(len, process.stdout._waiting)) == 60000
            with pytest.raises(ProcessError, match="nosuch: No such file or directory"):
                await run("nosuch")
            # The streams are apart, and what is large arrives whole.
            async with carried(address, Command(["sh", "-c", "echo one; echo two >&2"], ENVIRONMENT)) as process:
                assert await everything(process) == b"one\n"
                assert await process.stderr.receive_some() == b"two\n"
            _, said = await run("dd", "if=/dev/zero", "bs=65536", "count=64", "status=none")
            assert len(said) == 64 * 65536
            # Input, to its end.
            data = os.urandom(1_000_000)
            async with carried(address, Command(["sha256sum"], ENVIRONMENT, stdin=True)) as process:
                await process.stdin.send_all(data)
                await process.stdin.aclose()
                assert (await everything(process)).split()[0].decode() == hashlib.sha256(data).hexdigest()
            # A terminal, with a size that changes.
            script = "tty; stty size; read line; stty size; echo got $line; exit 7"
            terminal = Command(["sh", "-c", script], ENVIRONMENT, stdin=True, terminal=Terminal(33, 101))
            async with carried(address, terminal) as process:
                shown = b""
                while b"33 101" not in shown:
                    shown += await process.stdout.receive_some()
                process.resize(50, 120)
                await process.stdin.send_all(b"hello\n")
                shown += await everything(process)
                assert b"/dev/pts/" in shown and b"50 120" in shown and b"got hello" in shown
                assert await process.wait() == 7
            await _signals_and_leftovers(vm)


async def _signals_and_leftovers(vm: RunningMachine) -> None:
    address = vm.machine.address(processes.PORT)
    async with carried(address, Command(["sleep", "1000"], ENVIRONMENT)) as process:
        assert process.kill(15)
        assert await process.wait() == -15
    # A process whose caller goes away ends, with what it started; what outlived its own process is left alone.
    script = "sleep 4001 & sleep 4002"
    async with carried(address, Command(["sh", "-c", script], ENVIRONMENT)) as process:
        while await _count(address, "^sleep 400[12]") != 2:
            await trio.sleep(0.05)
    while await _count(address, "^sleep 400[12]"):
        await trio.sleep(0.05)
    await processes.run(address, Command(["sh", "-c", "setsid sleep 4003 >/dev/null 2>&1 </dev/null &"], ENVIRONMENT))
    assert await _count(address, "^sleep 4003") == 1
    # Many at once.
    codes: list[int] = []

    async def exit_with(code: int) -> None:
        codes.append((await processes.run(address, Command(["sh", "-c", f"exit {code}"], ENVIRONMENT)))[0])

    async with trio.open_nursery() as nursery:
        for code in range(10):
            nursery.start_soon(exit_with, code)
    assert sorted(codes) == list(range(10))


async def _count(address: str, pattern: str) -> int:
    """How many processes of the VM have a command line like that."""
    _, said = await processes.run(address, Command(["ps", "-o", "args"], ENVIRONMENT))
    return len(re.findall(pattern, said.decode(), re.MULTILINE))
