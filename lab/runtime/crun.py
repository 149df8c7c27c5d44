"""crun, the OCI runtime that does the work with namespaces and processes."""

from __future__ import annotations

import array
import contextlib
import itertools
import json
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from lab.runtime import children
from lab.runtime.errors import InvalidFailure

_NOT_FOUND = re.compile(r"executable file `(.*)` not found in \$PATH")
_CHDIR = re.compile(r"chdir `(.*)`: (.*)")


@dataclass(frozen=True)
class Stdio:
    """A process's ends of its streams; None is /dev/null. Not used where there is a terminal."""

    stdin: int | None
    stdout: int
    stderr: int


class Crun:
    """crun with its state below a directory."""

    def __init__(self, state: Path) -> None:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._command = [children.program("crun"), "--cgroup-manager=disabled", "--root", str(state)]
        self._serial = itertools.count(1)

    async def run(
        self, name: str, bundle: Path, config: dict[str, Any], stdio: Stdio | None
    ) -> tuple[children.Child, int | None]:
        """Starts a container's main process; returns it, and its terminal's master side if it has one.

        Raises:
            InvalidFailure: the program cannot be executed, with Docker's text.
        """
        (bundle / "config.json").write_text(json.dumps(config))
        arguments = config["process"]["args"]
        return await self._start(["run", "--detach", "--bundle", str(bundle)], [name], bundle, arguments, stdio)

    async def execute(
        self, name: str, bundle: Path, process: dict[str, Any], stdio: Stdio | None
    ) -> tuple[children.Child, int | None]:
        """Starts a further process, as `run`."""
        path = bundle / f"process-{next(self._serial)}.json"
        path.write_text(json.dumps(process))
        try:
            return await self._start(
                ["exec", "--detach", "--process", str(path)], [name], bundle, process["args"], stdio
            )
        finally:
            path.unlink()

    async def delete(self, name: str) -> None:
        """Forgets a container, and ends it if it runs. Nothing when it is not known."""
        await children.run([*self._command, "delete", "--force", name])

    async def _start(
        self, command: list[str], target: list[str], bundle: Path, arguments: list[str], stdio: Stdio | None
    ) -> tuple[children.Child, int | None]:
        serial = next(self._serial)
        log, pid_file, console = (bundle / f"{kind}-{serial}" for kind in ("log", "pid", "console"))
        options = ["--pid-file", str(pid_file)]
        try:
            with contextlib.ExitStack() as stack:
                listener = None
                if stdio is None:
                    listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                    listener.bind(str(console))
                    listener.listen(1)
                    options += ["--console-socket", str(console)]
                # Shielded: half a start would leave a process that nobody knows.
                with trio.CancelScope(shield=True):
                    code = await children.run(
                        [self._command[0], "--log", str(log), *self._command[1:], *command, *options, *target],
                        stdin=stdio.stdin if stdio else None,
                        stdout=stdio.stdout if stdio else None,
                        stderr=stdio.stderr if stdio else None,
                    )
                if code:
                    raise failure(log.read_text(errors="replace").strip() if log.exists() else "", arguments)
                child = children.adopt(int(pid_file.read_text()))
                # crun has sent the terminal before it ended.
                return child, None if listener is None else _receive_terminal(listener)
        finally:
            for path in (log, pid_file, console):
                path.unlink(missing_ok=True)


def _receive_terminal(listener: socket.socket) -> int:
    listener.setblocking(False)
    connection, _ = listener.accept()
    with connection:
        descriptors = array.array("i")
        _, ancillary, _, _ = connection.recvmsg(4096, socket.CMSG_LEN(descriptors.itemsize))
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(data[: descriptors.itemsize])
    if not descriptors:
        raise OSError("crun sent no terminal")
    os.set_inheritable(descriptors[0], False)
    return descriptors[0]


def failure(text: str, arguments: list[str]) -> InvalidFailure:
    """What Docker's runtime says where crun says `text`."""
    # The last line is the error; warnings may stand before it, each after its time.
    text = re.sub(r"^\d{4}-\d\d-\d\dT\S+ ", "", text.splitlines()[-1]) if text else "crun failed without a word"
    program = arguments[0] if arguments else ""
    quoted = json.dumps(program)
    if _NOT_FOUND.search(text) or text.startswith("open executable"):
        if "/" not in program:
            return InvalidFailure(f"exec: {quoted}: executable file not found in $PATH")
        if text.startswith("open executable"):
            return InvalidFailure(f"exec: {quoted}: permission denied")
        return InvalidFailure(f"exec: {quoted}: stat {program}: no such file or directory")
    if match := _CHDIR.search(text):
        reason = match[2][:1].lower() + match[2][1:]
        return InvalidFailure(f'chdir to cwd ("{match[1]}") set in config.json failed: {reason}')
    return InvalidFailure(text)
