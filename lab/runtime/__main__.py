"""`python -m lab.runtime LAB`: the lab's container runtime; the lab's supervisor keeps it running."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
from pathlib import Path

from lab.runtime import kernel


def main() -> None:
    """Runs the runtime in namespaces of its own until SIGTERM, which ends all containers."""
    parser = argparse.ArgumentParser(description="The lab's container runtime; 'taploom lab up' starts it.")
    parser.add_argument("lab")
    name = parser.parse_args().lab
    # Where a pid is what the machine calls it: the runtime's own /proc has the numbers of its namespace.
    machine_proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWPID)
    # Before the fork: this process must not be ended while it may have no child to take along.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD})
    alive, parent_end = os.pipe()
    child = os.fork()
    if child:
        _keep(child)
    os.close(parent_end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD})
    kernel.die_with_parent(signal.SIGKILL)
    if select.select([alive], [], [], 0)[0]:
        sys.exit(1)  # the parent was gone before the signal was armed
    os.close(alive)
    _own_mounts()

    from lab.runtime.serve import run

    sys.exit(run(name, machine_proc))


def _keep(child: int) -> None:
    """Waits for the runtime; ends it, and with it all that runs in its PID namespace, when told to end."""
    while True:
        if signal.sigwait({signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}) != signal.SIGCHLD:
            os.kill(child, signal.SIGKILL)
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            # _exit: what this copy of the process inherited is the child's to flush.
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _own_mounts() -> None:
    # Slave: what the machine unmounts goes here too, and nothing of ours is seen outside.
    kernel.mount("none", Path("/"), "", kernel.MS_REC | kernel.MS_SLAVE)
    kernel.mount("proc", Path("/proc"), "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    # crun looks at the machine's control groups although it is told to leave them alone, and gives up on the hybrid
    # layout that many machines without systemd have.
    cgroup = Path("/sys/fs/cgroup")
    if cgroup.is_dir():
        kernel.mount("tmpfs", cgroup, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC, "size=16k")


if __name__ == "__main__":
    main()
