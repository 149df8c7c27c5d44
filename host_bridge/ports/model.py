"""What is published, and why it cannot be. The texts are those of dockerd 20.10."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from host_bridge.errors import ExhaustedError, InvalidError, PreconditionError, TakenError

__all__ = [
    "AddressNotLocalError",
    "NoPortLeftError",
    "PortAllocatedError",
    "PortBinding",
    "PortError",
    "PortInUseError",
    "Protocol",
    "ProtocolError",
    "PublishedPort",
]

Protocol = Literal["tcp", "udp"]


@dataclass(frozen=True, slots=True)
class PortBinding:
    """A port that is to be published.

    Attributes:
        container_port: where the container listens.
        protocol: "tcp" or "udp".
        host_ip: the host's address, IPv4 or IPv6; empty: 0.0.0.0 and ::.
        host_port: the first port that may be taken; 0: any of the system's ephemeral ports.
        host_port_end: the last one; 0: `host_port`.
    """

    container_port: int
    protocol: Protocol = "tcp"
    host_ip: str = ""
    host_port: int = 0
    host_port_end: int = 0


@dataclass(frozen=True, slots=True)
class PublishedPort:
    """A port that is published: one entry per family where a binding is for both."""

    container_port: int
    protocol: Protocol
    host_ip: str
    host_port: int


class PortError(Exception):
    """Mixed into all of these: a port that cannot be published. Nothing was changed."""


class PortAllocatedError(PortError, TakenError):
    """We publish that port already."""

    def __init__(self, host_ip: str, host_port: int) -> None:
        super().__init__(f"Bind for {host_ip}:{host_port} failed: port is already allocated")
        self.host_ip, self.host_port = host_ip, host_port


class PortInUseError(PortError, TakenError):
    """Another program has the port, or one that overlaps it."""

    def __init__(self, family: int, protocol: str, host_ip: str, host_port: int, why: str) -> None:
        super().__init__(_listen(family, protocol, host_ip, host_port, why))
        self.host_ip, self.host_port = host_ip, host_port


class AddressNotLocalError(PortError, PreconditionError):
    """The host has no such address, or we may not bind that port."""

    def __init__(self, family: int, protocol: str, host_ip: str, host_port: int, why: str) -> None:
        super().__init__(_listen(family, protocol, host_ip, host_port, why))
        self.host_ip, self.host_port = host_ip, host_port


class NoPortLeftError(PortError, ExhaustedError):
    """We publish every port of the range already."""

    def __init__(self) -> None:
        super().__init__("all ports are allocated")


class ProtocolError(PortError, InvalidError):
    """Neither TCP nor UDP."""

    def __init__(self, protocol: str) -> None:
        super().__init__(f"publishing {protocol} ports is not supported: only tcp and udp can be published")
        self.protocol = protocol


def _listen(family: int, protocol: str, host_ip: str, host_port: int, why: str) -> str:
    """As Go's net.OpError says it."""
    shown = f"[{host_ip}]" if ":" in host_ip else host_ip
    return f"Error starting userland proxy: listen {protocol}{family} {shown}:{host_port}: bind: {why}"
