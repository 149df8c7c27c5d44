"""Further processes in running containers: `docker exec`."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

from host_bridge.containers.errors import ContainerError, conflict
from host_bridge.containers.model import Container
from host_bridge.waiting import Signal
from taploom.contracts.taploom.runtime import v1 as runtime

# As many that have ended are kept for whoever asks how; dockerd forgets them with time.
_KEPT = 512


@dataclass(eq=False)
class Exec:
    """A process that was or is to be run in a container.

    Attributes:
        id: 64 hexadecimal characters; the runtime's process id too.
        config: Docker's ExecConfig.
        environment: what it is run with.
        running: from its start to its end.
        exit_code: None while it has not ended.
        pid: as the host sees it, 0 when unknown.
        used: True once it was started: it is not started twice.
        started: True once the runtime has started it.
        quiet: True for the bridge's own: no events tell of it.
    """

    id: str
    container: Container
    config: dict[str, Any]
    environment: list[str]
    running: bool = False
    exit_code: int | None = None
    pid: int = 0
    used: bool = False
    started: bool = False
    quiet: bool = False
    columns: int = 0
    rows: int = 0
    changed: Signal = field(default_factory=Signal)

    @property
    def command(self) -> str:
        """The command in one line, as events show it."""
        arguments: list[str] = self.config["Cmd"]
        return arguments[0] + " " + " ".join(arguments[1:])

    def spec(self, *, terminal: bool) -> runtime.ProcessSpec:
        """What the runtime is asked to run."""
        config, container = self.config, self.container
        host = container.host
        return runtime.ProcessSpec(
            arguments=config["Cmd"],
            environment=self.environment,
            working_directory=config["WorkingDir"] or container.docker["WorkingDir"],
            user=config["User"] or container.docker["User"],
            terminal=terminal,
            stdin=config["AttachStdin"],
            privileged=config["Privileged"] or host["Privileged"],
            add_capabilities=capabilities(host["CapAdd"]),
            drop_capabilities=capabilities(host["CapDrop"]),
            stdin_once=True,
            columns=self.columns,
            rows=self.rows,
        )

    def ended(self, code: int) -> None:
        """Notes the end."""
        self.running = False
        self.exit_code = code
        self.changed.notify()

    def inspect(self) -> dict[str, Any]:
        """What GET /exec/ID/json answers."""
        config = self.config
        process: dict[str, Any] = {
            "tty": config["Tty"],
            "entrypoint": config["Cmd"][0],
            "arguments": config["Cmd"][1:],
            "privileged": config["Privileged"],
        }
        if config["User"]:
            process["user"] = config["User"]
        return {
            "ID": self.id,
            "Running": self.running,
            "ExitCode": self.exit_code,
            "ProcessConfig": process,
            "OpenStdin": config["AttachStdin"],
            "OpenStderr": config["AttachStderr"],
            "OpenStdout": config["AttachStdout"],
            "CanRemove": False,
            "ContainerID": self.container.id,
            "DetachKeys": config["DetachKeys"],
            "Pid": self.pid,
        }


class Execs:
    """All further processes, by id."""

    def __init__(self) -> None:
        self._by_id: dict[str, Exec] = {}

    def add(self, container: Container, config: dict[str, Any], environment: list[str]) -> Exec:
        """A process that is to be started later."""
        over = len(self._by_id) - _KEPT
        if over > 0:
            for key in [key for key, one in self._by_id.items() if one.exit_code is not None][:over]:
                del self._by_id[key]
        one = Exec(secrets.token_hex(32), container, config, environment)
        self._by_id[one.id] = one
        return one

    def get(self, exec_id: str) -> Exec:
        """The process of an id; raises ContainerError 404."""
        found = self._by_id.get(exec_id)
        if found is None or found.container.removed:
            raise ContainerError(404, f"No such exec instance: {exec_id}")
        return found

    def find(self, exec_id: str) -> Exec | None:
        """The process of an id, or None."""
        return self._by_id.get(exec_id)

    def use(self, one: Exec) -> None:
        """Claims the process for its only start; raises ContainerError 409."""
        if one.running:
            raise conflict(f"Error: Exec command {one.id} is already running")
        if one.used:
            raise conflict(f"Error: Exec command {one.id} has already run")
        one.used = True

    def running_in(self, container: Container) -> list[Exec]:
        """Those of a container that run."""
        return [one for one in self._by_id.values() if one.container is container and one.running]

    def of(self, container: Container) -> list[str] | None:
        """The ids that a container's inspect shows: of processes that run or wait for their start; None: none."""
        found = [one.id for one in self._by_id.values() if one.container is container and one.exit_code is None]
        return found or None

    def forget(self, container: Container) -> None:
        """Drops all of a container."""
        for key in [key for key, one in self._by_id.items() if one.container is container]:
            del self._by_id[key]


def capabilities(given: list[str] | None) -> list[str]:
    """Capabilities as the runtime contract names them: without CAP_."""
    return [name.removeprefix("CAP_") for name in given or ()]
