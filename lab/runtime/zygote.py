"""Starts guest agents by forking a process that has imported the agent's code already.

`python -m lab.runtime.zygote FD`: FD is a SOCK_SEQPACKET socket. A request is JSON {"argv": the agent's arguments,
"log": where its output is appended} with one descriptor, the network namespace to start in. The answer is one
descriptor, the agent's pidfd, or {"error": TEXT}.

The agent is the process that `python -m agent_guest ARGV` would be, only the start of the interpreter and the imports,
0.3 s of it, have been done once for all.
"""

from __future__ import annotations

import array
import gc
import importlib
import json
import os
import signal
import socket
import sys
from typing import NoReturn

from lab.runtime import kernel

AGENT = "agent_guest"


def main() -> None:
    """Serves requests until the other side closes."""
    server = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(server.fileno(), False)
    importlib.import_module("taploom.lean").without_unused()  # as the agent's own start does
    agent = importlib.import_module(f"{AGENT}.__main__")
    importlib.import_module(f"{AGENT}.cli")
    gc.collect()
    gc.freeze()  # a collection in an agent would copy the pages that all of them share
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # agents are waited for by pidfd, by who asked for them
    while True:
        request, ancillary, _, _ = server.recvmsg(1 << 16, socket.CMSG_LEN(4))
        if not request:
            return
        received = array.array("i")
        for _, _, data in ancillary:
            received.frombytes(data)
        netns = received[0]
        wanted = json.loads(request)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            server.close()
            _become(agent.main, wanted["argv"], wanted["log"], netns, parent)
        os.close(netns)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            server.sendmsg([json.dumps({"error": str(error)}).encode()])
            continue
        server.sendmsg([b"{}"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [pidfd]))])
        os.close(pidfd)


def _become(run: object, argv: list[str], log: str, netns: int, parent: int) -> NoReturn:
    """This process is the agent from here on."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        kernel.die_with_parent(signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        os.setsid()
        kernel.setns(netns, kernel.CLONE_NEWNET)
        os.close(netns)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        for source, target in ((null, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        os.close(output)
        os.close(null)
        kernel.name_process("taploom-guest")  # the command line stays that of the process it was forked from
        sys.argv = [AGENT, *argv]
        assert callable(run)
        run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
