"""What containers run on: namespaces of this machine (`lab.runtime.namespaces`), or VMs (`lab.vm.containers`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lab.runtime.bundle import MountSpec, ProcessSpec

if TYPE_CHECKING:
    from lab.runtime.containers import Container, Process


class Child(Protocol):
    """A process that was started."""

    async def wait(self) -> int:
        """Its exit code when it has ended, negative for a signal; called once."""

    def kill(self, signum: int = ...) -> bool:
        """Sends a signal; False when it is gone."""


@dataclass(frozen=True)
class Guest:
    """Where a container's agent is."""

    control: str
    data: str


@dataclass(frozen=True)
class Layout:
    """Where what a container is made of is, as its OCI runtime sees it.

    Args:
        root: its root file system.
        files: files that are bound over its own, by path in the container.
        mounts: its mounts.
        netns: its network namespace's path; None: the one that the OCI runtime runs in.
    """

    root: Path
    files: Mapping[str, Path]
    mounts: Sequence[MountSpec]
    netns: str | None


class Engine(Protocol):
    """Boots containers and runs processes in them; one call at a time for each container."""

    host_network: bool
    """Whether a container can have the host's network."""

    async def boot(self, container: Container, *, own_network: bool) -> Guest | None:
        """Makes the root file system be there, and the agent answer; None when it has none.

        Raises:
            OSError: it cannot be done; what was begun is for `halt`.
        """

    def layout(self, container: Container) -> Layout:
        """How a booted container is made up."""

    async def start(self, container: Container, process: Process, config: dict[str, Any], spec: ProcessSpec) -> Child:
        """Starts a process, opens its streams, and makes it the process's child.

        Args:
            config: the container's for the main process (its id is empty), only the process's for another.

        Raises:
            InvalidFailure: the program cannot be executed, with Docker's text.
        """

    async def end(self, container: Container) -> None:
        """The main process has ended: nothing else of the container may run."""

    async def halt(self, container: Container) -> None:
        """Undoes `boot`, however far it came."""

    def pid(self, child: Child) -> int:
        """A process's pid as the machine sees it; 0 when it sees none."""
