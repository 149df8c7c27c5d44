"""A container as the manager has it in memory: its record, its lock and who waits for it."""

from __future__ import annotations

import copy
import datetime
from dataclasses import dataclass, field
from typing import Any

import trio

from host_bridge.containers import times
from host_bridge.model import ContainerRecord
from host_bridge.waiting import Signal

JSON = dict[str, Any]

CREATING, STARTING, REMOVING = "creating", "starting", "removing"


def new_state() -> JSON:
    """The state of a container that never ran."""
    return {
        "Running": False,
        "Restarting": False,
        "OOMKilled": False,
        "Dead": False,
        "Pid": 0,
        "ExitCode": 0,
        "Error": "",
        "StartedAt": times.ZERO,
        "FinishedAt": times.ZERO,
        "RestartCount": 0,
        "ManuallyStopped": False,
        "SandboxID": "",
        # What was begun and is not finished; start-up takes it back or finishes it.
        "Phase": CREATING,
        # What was published (port/protocol, host address, host port), so that a new bridge publishes the same.
        "Published": [],
    }


@dataclass(eq=False)
class Container:
    """A container. Its record is durable; changes of `config` and `state` count once the manager has saved them.

    `config` has Docker's Config and HostConfig, the image's id, mounts, and the wanted networks; `state` what
    `new_state` has.

    Attributes:
        lock: held while the container is started, ended, removed, or put on networks.
        changed: notified after each change of the state.
        runs: how many times it was started by this process, so that a waiter for the next exit knows it.
        exit_seen: when its last exit was, as the runtime said it; an older event is old news.
        removed: True when the record is gone.
    """

    id: str
    name: str
    created_at: datetime.datetime
    config: JSON
    state: JSON
    lock: trio.Lock = field(default_factory=trio.Lock)
    changed: Signal = field(default_factory=Signal)
    exits: int = 0
    exit_seen: datetime.datetime | None = None
    removed: bool = False
    restart_scope: trio.CancelScope | None = None
    restart_delay: float = 0.0

    @classmethod
    def of(cls, record: ContainerRecord) -> Container:
        """The container of a record."""
        config, state = copy.deepcopy(dict(record.config)), copy.deepcopy(dict(record.state))
        return cls(record.id, record.name, record.created_at, config, new_state() | state)

    def record(self) -> ContainerRecord:
        """The container as the database keeps it."""
        return ContainerRecord(
            self.id, self.name, self.created_at, copy.deepcopy(self.config), copy.deepcopy(self.state)
        )

    @property
    def docker(self) -> JSON:
        """Docker's Config."""
        config: JSON = self.config["Config"]
        return config

    @property
    def host(self) -> JSON:
        """Docker's HostConfig."""
        host: JSON = self.config["HostConfig"]
        return host

    @property
    def networks(self) -> JSON:
        """The networks that it is to be on: wanted endpoints by name."""
        networks: JSON = self.config["Networks"]
        return networks

    @property
    def mode(self) -> str:
        """Its network mode."""
        return str(self.host["NetworkMode"])

    @property
    def running(self) -> bool:
        """True while it runs, and while it is about to be started again."""
        return bool(self.state["Running"])

    @property
    def restarting(self) -> bool:
        """True between an exit and the start that follows by policy."""
        return bool(self.state["Restarting"])

    @property
    def alive(self) -> bool:
        """True while its main process runs."""
        return self.running and not self.restarting

    @property
    def removing(self) -> bool:
        """True once its removal has begun."""
        return bool(self.state["Phase"] == REMOVING)

    @property
    def status(self) -> str:
        """Docker's one word for its state."""
        if self.restarting:
            return "restarting"
        if self.running:
            return "running"
        if self.removing:
            return "removing"
        if self.state["Dead"]:
            return "dead"
        return "created" if self.state["StartedAt"] == times.ZERO else "exited"

    def status_text(self) -> str:
        """Docker's sentence for its state, such as `Up 5 seconds`."""
        state = self.state
        if self.restarting:
            return f"Restarting ({state['ExitCode']}) {times.human(times.ago_seconds(state['FinishedAt']))} ago"
        if self.running:
            return f"Up {times.human(times.ago_seconds(state['StartedAt']))}"
        if self.removing:
            return "Removal In Progress"
        if state["Dead"]:
            return "Dead"
        if state["StartedAt"] == times.ZERO:
            return "Created"
        if state["FinishedAt"] == times.ZERO:
            return ""
        return f"Exited ({state['ExitCode']}) {times.human(times.ago_seconds(state['FinishedAt']))} ago"
