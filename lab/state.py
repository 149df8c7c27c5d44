"""Where a lab keeps its state, and what it is asked to have.

A lab is a directory, /run/taploom/NAME (0700):

    lab.json            what the lab is asked to have; only ever replaced as a whole
    status.json         what the supervisor has running; only ever replaced as a whole
    supervisor.lock     held (flock) by the supervisor while it lives; contains its pid
    bridge.sock         the bridge's API
    docker.sock         Docker's API, served by the bridge
    runtime.sock        the container runtime's API
    bridge/             the bridge's state
    helper/             the helper agent's sockets and state
    guests/NAME/        a guest's sockets, resolv.conf, hosts, and the pid that holds its namespaces
    images/             root file systems that were imported
    containers/ID/      a container's files
    crun/               crun's state
    logs/               one file per process

In a lab on virtual machines (`taploom lab up --vm`), helper/ and guests/NAME/ are the VMs' directories, which
lab/vm/machine.py describes, and vm.json says what they boot.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path("/run/taploom")
DEFAULT_LAB = "default"
# Every process of a lab has this in its environment, and so have their children, whatever they do: it is how
# `lab down` finds all of them, also when the supervisor is gone.
MARKER = "TAPLOOM_LAB_DIR"
# On the VMs' vsock; the data ports are the next ones.
GUEST_PORT = 5555
HELPER_PORT = 6000

_LAB_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,19}")
_GUEST_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{1,62}")


class LabError(Exception):
    """Something that the person at the keyboard can mend; the message says how."""


@dataclass(frozen=True)
class Lab:
    """One lab's names and paths."""

    name: str

    def __post_init__(self) -> None:
        if not _LAB_NAME.fullmatch(self.name):
            raise LabError(
                f"{self.name!r} is not a lab name: use 1 to 20 of a-z, 0-9, '_' and '-', the first a letter or digit"
            )

    @property
    def path(self) -> Path:
        return ROOT / self.name

    @property
    def bridge_address(self) -> str:
        return f"unix:{self.path}/bridge.sock"

    @property
    def runtime_address(self) -> str:
        return f"unix:{self.path}/runtime.sock"

    @property
    def docker_socket(self) -> str:
        return f"unix:{self.path}/docker.sock"

    @property
    def containers(self) -> Path:
        return self.path / "containers"

    @property
    def helper_directory(self) -> Path:
        return self.path / "helper"

    @property
    def helper_address(self) -> str:
        """Where the helper agent's control port is."""
        if self.on_vms():
            return f"hybrid:{self.helper_directory}/vsock.sock:{HELPER_PORT}"
        return f"unix:{self.helper_directory}/control.sock"

    def guest_address(self, guest: str) -> str:
        """Where a guest's agent's control port is."""
        if self.on_vms():
            return f"hybrid:{self.guest_directory(guest)}/vsock.sock:{GUEST_PORT}"
        return f"unix:{self.guest_directory(guest)}/control.sock"

    @property
    def helper_netns(self) -> str:
        return self.netns_prefix + "helper"

    @property
    def internet_netns(self) -> str:
        return self.netns_prefix + "internet"

    @property
    def netns_prefix(self) -> str:
        # A lab's name has no dot, so no lab's prefix is another's.
        return f"taploom.{self.name}."

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def guest_directory(self, guest: str) -> Path:
        return self.path / "guests" / guest

    def guest_netns(self, guest: str) -> str:
        return f"{self.netns_prefix}guest.{guest}"

    @property
    def docker_host(self) -> str:
        """What the docker command takes as DOCKER_HOST."""
        return "unix://" + self.docker_socket.removeprefix("unix:")

    def environment(self) -> dict[str, str]:
        """The environment of the lab's processes."""
        return {**os.environ, MARKER: str(self.path), "TAPLOOM_BRIDGE": self.bridge_address}

    def exists(self) -> bool:
        return (self.path / "lab.json").exists()

    def guests(self) -> list[str]:
        """The guests that the lab is asked to have.

        Raises:
            LabError: there is no such lab.
        """
        try:
            return list(json.loads((self.path / "lab.json").read_bytes())["guests"])
        except FileNotFoundError:
            raise LabError(f"lab {self.name!r} is not up; start it with 'taploom lab up{self.option}'") from None

    @property
    def option(self) -> str:
        """How to name this lab on the command line."""
        return "" if self.name == DEFAULT_LAB else f" --lab {self.name}"

    def on_vms(self) -> bool:
        """Whether its guests and helper are virtual machines; False where there is no such lab."""
        try:
            return bool(json.loads((self.path / "lab.json").read_bytes()).get("vm"))
        except FileNotFoundError:
            return False

    def ask_for(self, guests: list[str], *, vm: bool = False) -> None:
        """Records which guests the lab is to have, and what they are."""
        replace_json(self.path / "lab.json", {"guests": guests, "vm": vm})

    def create(self) -> None:
        for path in (ROOT, self.path, self.logs, self.helper_directory, self.path / "guests", self.path / "bridge"):
            path.mkdir(mode=0o700, exist_ok=True)

    def supervisor_pid(self) -> int | None:
        """The supervisor's pid, or None when it does not run."""
        try:
            with (self.path / "supervisor.lock").open("rb") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return int(lock.read() or b"0") or None
        except FileNotFoundError:
            pass
        return None

    @contextmanager
    def commands_locked(self) -> Iterator[None]:
        """Lets one command at a time change the lab."""
        ROOT.mkdir(mode=0o700, exist_ok=True)
        # Beside the lab's directory: `lab down` removes that.
        with (ROOT / f".{self.name}.lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def enter_guest(lab: Lab, guest: str) -> list[str]:
    """The command prefix that runs what follows inside a guest."""
    holder = shlex.quote(str(lab.guest_directory(guest) / "holder"))
    # The shell reads the pid when the command starts: the guest may have rebooted since.
    return [
        "sh",
        "-c",
        f'read -r pid < {holder} && exec nsenter --target "$pid" --mount --uts --net -- "$@"',
        "sh",
    ]


def check_guest_name(name: str) -> str:
    """Returns the name.

    Raises:
        LabError: it cannot be a guest's name.
    """
    if not _GUEST_NAME.fullmatch(name):
        raise LabError(
            f"{name!r} is not a guest name: use 2 to 63 of a-z, A-Z, 0-9, '_', '.' and '-', the first a letter or digit"
        )
    return name


def replace_json(path: Path, value: Any) -> None:
    """Writes a JSON file so that readers see either the old or the new one, whole."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)
