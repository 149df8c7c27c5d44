"""`taploom` commands without a new interpreter each: a server that has imported them forks for every one.

A command is a process of its own, with its arguments, environment and streams; what is saved is the quarter of a second
of processor time in which Python starts and imports, a thousand times in a run. That a command starts from nothing is
tested where it is run as people do.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping

# One request: arguments and environment, with standard output, standard error and where its pid and exit code go.
_LARGEST = 1 << 17


def run(arguments: tuple[str, ...], environment: Mapping[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Runs `taploom ARGUMENTS` with nothing on standard input, whatever it exits with.

    Raises:
        subprocess.TimeoutExpired: it took longer than `timeout` seconds, and has been killed.
    """
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with mine, tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as error:
        with theirs:
            request = json.dumps([arguments, dict(environment)]).encode()
            socket.send_fds(_server(), [request], [output.fileno(), error.fileno(), theirs.fileno()])
        pid = int(mine.recv(32))
        mine.settimeout(timeout)
        try:
            code = int(mine.recv(32))
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(arguments, timeout) from None
        texts = []
        for file in (output, error):
            file.seek(0)
            texts.append(file.read().decode())
        return subprocess.CompletedProcess(["taploom", *arguments], code, *texts)


@functools.cache
def _server() -> socket.socket:
    """Where this process's server takes requests; the server ends with this process."""
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
        )
    return mine


def _serve(requests: socket.socket) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C it ends when who asks has ended
    children: dict[int, tuple[int, socket.socket]] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is requests:
                    request, fds, _, _ = socket.recv_fds(requests, _LARGEST, 3)
                    if not request:
                        return
                    pid = os.fork()
                    if pid == 0:
                        requests.close()
                        os._exit(_command(request, fds))
                    answer = socket.socket(fileno=fds.pop())
                    for fd in fds:
                        os.close(fd)
                    with contextlib.suppress(BrokenPipeError):
                        answer.send(str(pid).encode())
                    pidfd = os.pidfd_open(pid)
                    children[pidfd] = pid, answer
                    selector.register(pidfd, selectors.EVENT_READ)
                else:
                    pid, answer = children.pop(key.fd)
                    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    with answer, contextlib.suppress(BrokenPipeError):
                        answer.send(str(code).encode())
                    selector.unregister(key.fd)
                    os.close(key.fd)


def _command(request: bytes, fds: list[int]) -> int:
    """What the forked process does; returns its exit code."""
    from host_bridge.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    arguments, environment = json.loads(request)
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(fds[0], 1)
    os.dup2(fds[1], 2)
    for fd in fds:
        os.close(fd)
    try:
        main(arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError, AttributeError):
        sys.stdout.flush()
        sys.stderr.flush()
    return code


def _import() -> None:
    """What commands import, most of them when they are run."""
    import importlib
    import pkgutil

    import host_bridge.commands

    for module in pkgutil.iter_modules(host_bridge.commands.__path__, "host_bridge.commands."):
        importlib.import_module(module.name)
    for name in (
        *("host_bridge.cli", "host_bridge.client", "host_bridge.quick", "lab.cli"),
        *("betterproto2", "rich.console", "rich.table", "trio", "yaml"),
        *("taploom.contracts.taploom.bridge.v1", "taploom.contracts.taploom.bridge.v1.rpc", "taploom.rpc"),
    ):
        importlib.import_module(name)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as listening:
        _import()
        gc.collect()
        gc.freeze()  # so that a fork shares what there is
        _serve(listening)
