"""Chooses the host's ports and binds them: all of a container's, or none.

Ports are taken as dockerd takes them: next fit, per address and protocol, through a range or through the system's
ephemeral ports. A port that another program has is skipped where there is a choice.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from host_bridge.errors import InvalidError
from host_bridge.ports.model import (
    AddressNotLocalError,
    NoPortLeftError,
    PortAllocatedError,
    PortBinding,
    PortError,
    PortInUseError,
    Protocol,
    ProtocolError,
    PublishedPort,
)
from taploom.link.datagrams import tell_destinations

__all__ = ["BoundPort", "PortAllocator", "ephemeral_range"]

_RANGE_FILE: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
_DEFAULT_RANGE: Final = (49153, 65535)  # where the system does not say: IANA's, as dockerd has it
_BACKLOG: Final = 4096
_ANY: Final = ("0.0.0.0", "::")  # noqa: S104 - what publishing to all addresses means
# As dockerd: so many ports of a range may be taken by others before the container's start fails.
_ATTEMPTS: Final = 10


@dataclass(frozen=True, slots=True)
class BoundPort:
    """A published port and its socket: TCP ones listen, none blocks."""

    port: PublishedPort
    sock: socket.socket


def ephemeral_range() -> tuple[int, int]:
    """First and last of the ports that the system gives out by itself (ip(7), ip_local_port_range)."""
    try:
        first, last = (int(word) for word in _RANGE_FILE.read_text().split())
    except (OSError, ValueError):
        return _DEFAULT_RANGE
    return (first, last) if 0 < first <= last <= 65535 else _DEFAULT_RANGE


class PortAllocator:
    """Which ports are ours."""

    def __init__(self) -> None:
        self._taken: dict[tuple[str, Protocol], set[int]] = {}
        # Where the last search of a range ended, by address, protocol and range.
        self._last: dict[tuple[str, Protocol, int, int], int] = {}

    def bind(self, bindings: Sequence[PortBinding]) -> list[BoundPort]:
        """Bind all of them. Raises PortError, or InvalidError for an address that is none, and has then bound
        nothing.
        """
        bound: list[BoundPort] = []
        try:
            for binding in bindings:
                bound += self._bind_one(binding)
        except BaseException:
            for one in bound:
                self.free(one)
            raise
        return bound

    def free(self, bound: BoundPort) -> None:
        """Close the socket and forget the port."""
        bound.sock.close()
        self.forget(bound.port)

    def forget(self, port: PublishedPort) -> None:
        """Forget a port whose socket somebody else closes."""
        taken = self._taken.get((port.host_ip, port.protocol))
        if taken is not None:
            taken.discard(port.host_port)

    def _bind_one(self, binding: PortBinding) -> list[BoundPort]:
        if binding.protocol not in ("tcp", "udp"):
            raise ProtocolError(binding.protocol)
        addresses = _ANY if not binding.host_ip else (_canonical(binding.host_ip),)
        first, last = binding.host_port, binding.host_port_end or binding.host_port
        if first and first == last:
            return self._try(addresses, binding, first)
        if not first:
            first, last = ephemeral_range()
        attempts = 0
        for port in self._candidates(addresses[0], binding.protocol, first, last):
            try:
                found = self._try(addresses, binding, port)
            except PortAllocatedError:
                continue
            except PortInUseError:
                attempts += 1
                if attempts == _ATTEMPTS:
                    raise
                continue
            self._last[addresses[0], binding.protocol, first, last] = port
            return found
        raise NoPortLeftError

    def _candidates(self, address: str, protocol: Protocol, first: int, last: int) -> Iterator[int]:
        """Every port of the range once, from the one after the last that was taken."""
        begin = self._last.get((address, protocol, first, last), last) + 1
        yield from range(begin, last + 1)
        yield from range(first, min(begin, last + 1))

    def _try(self, addresses: Sequence[str], binding: PortBinding, port: int) -> list[BoundPort]:
        """Bind one port on all the addresses."""
        bound: list[BoundPort] = []
        try:
            for address in addresses:
                taken = self._taken.setdefault((address, binding.protocol), set())
                if port in taken:
                    raise PortAllocatedError(address, port)
                try:
                    sock = _bind(address, binding.protocol, port)
                except _NoIPv6Error:
                    if len(addresses) == 1:
                        raise
                    continue  # a host without IPv6 publishes on IPv4 only
                taken.add(port)
                published = PublishedPort(binding.container_port, binding.protocol, address, port)
                bound.append(BoundPort(published, sock))
        except BaseException:
            for one in bound:
                self.free(one)
            raise
        return bound


class _NoIPv6Error(AddressNotLocalError):
    """The host has no IPv6."""


def _canonical(address: str) -> str:
    try:
        return str(ipaddress.ip_address(address))
    except ValueError as error:
        raise InvalidError(f"invalid IP address in port binding: {address}") from error


def _bind(address: str, protocol: Protocol, port: int) -> socket.socket:
    v6 = ":" in address
    family = 6 if v6 else 4
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with contextlib.ExitStack() as cleanup:
        try:
            sock = cleanup.enter_context(socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, kind))
            sock.setblocking(False)
            if v6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if protocol == "tcp":
                # Connections that have ended need not be waited for; a listener still excludes others.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            else:
                tell_destinations(sock)
            sock.bind((address, port))
            if protocol == "tcp":
                sock.listen(_BACKLOG)
        except OSError as error:
            raise _refused(error, family, protocol, address, port) from error
        cleanup.pop_all()
    return sock


def _refused(error: OSError, family: int, protocol: Protocol, address: str, port: int) -> PortError:
    number = error.errno or errno.EIO
    why = _GO_TEXTS.get(number) or os.strerror(number).lower()
    if number == errno.EADDRINUSE:
        return PortInUseError(family, protocol, address, port, why)
    if family == 6 and (number == errno.EAFNOSUPPORT or (number == errno.EADDRNOTAVAIL and address == "::")):
        return _NoIPv6Error(family, protocol, address, port, why)
    return AddressNotLocalError(family, protocol, address, port, why)


# Where Go's texts (syscall/zerrors) are not the C library's.
_GO_TEXTS: Final = {errno.EADDRNOTAVAIL: "cannot assign requested address"}
