"""The ways of joining two guests that the benchmark compares, each built for a run and gone with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from bench.run import Netns

How = Literal["API", "CLI"]

PROBE_PORT, IPERF_PORT = "7007", "5201"
"""Where netprobe and iperf3 listen in every server."""


@dataclass(frozen=True)
class Link:
    """Two guests on one network with one MTU (bytes); `address` is the server's IPv4 address on it."""

    path: str
    mtu: int
    client: Netns
    server: Netns
    address: str

    @property
    def name(self) -> str:
        return f"{self.path}-{self.mtu}"


@dataclass(frozen=True)
class Published:
    """Ports of a container that are published on its host's 127.0.0.1.

    Attributes:
        client: the host: where the ports are connected to.
        server: the container.
        ports: the host's port by the container's.
    """

    client: Netns
    server: Netns
    ports: dict[str, str]


class HotConnect(Protocol):
    """A second network that the server is on and that the client can be connected to while it runs."""

    client: Netns
    server: Netns
    address: str

    def connect(self, how: How) -> tuple[int, int]:
        """Connects the client; returns CLOCK_MONOTONIC in ns just before the call and when it returned."""

    def disconnect(self) -> None:
        """Disconnects the client again."""


@dataclass(frozen=True)
class Process:
    """A process that the path needs."""

    label: str
    pid: int


@dataclass
class Path:
    """A path that is up."""

    name: str
    links: list[Link]
    versions: dict[str, str] = field(default_factory=dict)
    hot: HotConnect | None = None
    published: Published | None = None
    processes: Callable[[], list[Process]] = list
