"""`taploom lab exec` in a VM: a process there with this terminal, or with these streams."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import termios
import tty
from collections.abc import Iterator, Mapping, Sequence

import trio

from lab.state import LabError
from lab.vm.processes import Command, Output, ProcessError, RemoteProcess, Terminal, start

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# What others write to the streams of a process that has ended is waited for as long as it comes without a pause.
_DRAIN = 0.5
_CHUNK = 64 * 1024
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def execute(address: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Runs a command in the VM whose process server is there; returns its exit code, 128 + the signal that ended it.

    Args:
        environment: added to the process's environment.

    Raises:
        LabError: the VM does not answer.
    """
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    size = shutil.get_terminal_size()
    environment = {"PATH": _PATH, "HOME": "/root", "LANG": "C.UTF-8", **(environment or {})}
    if interactive:
        environment["TERM"] = os.environ.get("TERM", "linux")
    command = Command(
        arguments,
        environment,
        stdin=True,
        terminal=Terminal(size.lines, size.columns) if interactive else None,
    )
    with _raw_terminal() if interactive else contextlib.nullcontext():
        code = trio.run(_run, address, command)
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    """Every key goes to the VM's terminal."""
    before = termios.tcgetattr(0)
    try:
        tty.setraw(0)
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


async def _run(address: str, command: Command) -> int:
    try:
        process = await start(address, command)
    except ProcessError as error:
        print(f"taploom: {error}", end="\r\n" if command.terminal else "\n", file=sys.stderr)
        return 127
    except OSError as error:
        raise LabError(f"the VM does not answer: {error}") from error
    async with trio.open_nursery() as nursery:
        nursery.start_soon(process.run)
        nursery.start_soon(_carry_input, process)
        nursery.start_soon(_forward_signals, process)
        async with trio.open_nursery() as outputs:
            last = _Clock()
            outputs.start_soon(_carry_output, process.stdout, 1, last)
            outputs.start_soon(_carry_output, process.stderr, 2, last)
            await process.gone.wait()
            while outputs.child_tasks and (left := last.time + _DRAIN - trio.current_time()) > 0:
                with trio.move_on_after(left):
                    await last.both_ended.wait()
                    break
            # What has come is written, however long that takes.
            process.stdout.end()
            process.stderr.end()
        nursery.cancel_scope.cancel()
    return await process.wait()


class _Clock:
    """When output came last, and whether all of it has."""

    def __init__(self) -> None:
        self.time = trio.current_time()
        self.open = 2
        self.both_ended = trio.Event()


async def _carry_output(output: Output, fd: int, last: _Clock) -> None:
    while data := await output.receive_some():
        last.time = trio.current_time()
        view = memoryview(data)
        while view:
            try:
                view = view[await trio.to_thread.run_sync(os.write, fd, view) :]
            except OSError:  # nobody reads it: as in a pipe, but the process is the VM's
                output.close()
                break
    last.open -= 1
    if not last.open:
        last.both_ended.set()


async def _carry_input(process: RemoteProcess) -> None:
    # A thread reads: the descriptor is shared with who started us, and is to stay a blocking one.
    with contextlib.suppress(trio.BrokenResourceError, OSError):
        while data := await trio.to_thread.run_sync(os.read, 0, _CHUNK, abandon_on_cancel=True):
            await process.stdin.send_all(data)
    await process.stdin.aclose()


async def _forward_signals(process: RemoteProcess) -> None:
    with trio.open_signal_receiver(signal.SIGWINCH, *_FORWARDED) as signals:
        async for number in signals:
            if number == signal.SIGWINCH:
                size = shutil.get_terminal_size()
                process.resize(size.lines, size.columns)
            else:
                process.kill(number)
