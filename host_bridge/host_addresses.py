"""This machine's addresses, and when they change.

Read with getifaddrs(3), which Linux and macOS both have; news come from the kernel's routing socket (rtnetlink(7),
route(4)), so that nothing is polled.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

# On Linux, what only a bridge has (sysfs).
_BRIDGE = "/sys/class/net/{}/bridge"
_IFF_UP = 0x1
_IFF_LOOPBACK = 0x8
_RTMGRP_LINK = 0x1
_RTMGRP_IPV4_IFADDR = 0x10
_RTMGRP_IPV6_IFADDR = 0x100
_CHUNK = 65_536

Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface


class _IfAddrs(ctypes.Structure):
    """struct ifaddrs, as Linux and macOS both lay it out."""


_IfAddrs._fields_ = [
    ("next", ctypes.POINTER(_IfAddrs)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("addr", ctypes.c_void_p),
    ("netmask", ctypes.c_void_p),
    ("dstaddr", ctypes.c_void_p),
    ("data", ctypes.c_void_p),
]


@dataclass(frozen=True, slots=True)
class HostAddress:
    """An address of an interface that is up and no loopback."""

    interface: str
    address: Interface


def read_addresses() -> list[HostAddress]:
    """The addresses of this machine's interfaces, link-local ones of IPv6 left out: they say nothing without a zone.

    Raises:
        OSError: the kernel refused.
    """
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    first = ctypes.POINTER(_IfAddrs)()
    if libc.getifaddrs(ctypes.byref(first)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    try:
        return list(_walk(first))
    finally:
        libc.freeifaddrs(first)


def host_networks() -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    """The networks that this machine is on. Those of its own bridges, such as another container engine's, do not count:
    guests have no business there."""
    return [one.address.network for one in read_addresses() if not Path(_BRIDGE.format(one.interface)).exists()]


def _walk(entry: ctypes._Pointer[_IfAddrs]) -> Iterator[HostAddress]:
    while entry:
        one = entry.contents
        entry = one.next
        if not one.addr or not one.flags & _IFF_UP or one.flags & _IFF_LOOPBACK:
            continue
        address = _sockaddr(one.addr)
        mask = _sockaddr(one.netmask, address) if one.netmask else None
        if address is None or (address.version == 6 and address.is_link_local):
            continue
        prefix = address.max_prefixlen if mask is None else int(mask).bit_count()
        yield HostAddress(os.fsdecode(one.name), ipaddress.ip_interface((address, prefix)))


def _sockaddr(
    pointer: int, like: ipaddress.IPv4Address | ipaddress.IPv6Address | None = None
) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address in a struct sockaddr; None when it is of another family. macOS has the length before the family, and
    masks there may lack the family: it is that of the address `like`."""
    head = ctypes.string_at(pointer, 2)
    family = head[1] if sys.platform == "darwin" else struct.unpack("=H", head)[0]
    if like is not None:
        family = socket.AF_INET if like.version == 4 else socket.AF_INET6
    if family == socket.AF_INET:
        return ipaddress.IPv4Address(ctypes.string_at(pointer + 4, 4))
    if family == socket.AF_INET6:
        return ipaddress.IPv6Address(ctypes.string_at(pointer + 8, 16))
    return None


class HostAddresses:
    """This machine's addresses, kept up to date while `run` runs."""

    def __init__(self) -> None:
        self._current = _texts()

    def current(self) -> Sequence[str]:
        """The addresses without prefix length, sorted."""
        return self._current

    async def run(
        self, on_change: Callable[[], None], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Calls `on_change` whenever the addresses are others, until cancelled."""
        with _routing_socket() as sock:
            task_status.started()
            while True:
                self._refresh(on_change)
                await trio.lowlevel.wait_readable(sock)
                # What happened is read anew; that messages were lost (ENOBUFS) says no less than a message.
                with contextlib.suppress(OSError):
                    while True:
                        sock.recv(_CHUNK)

    def _refresh(self, on_change: Callable[[], None]) -> None:
        now = _texts()
        if now != self._current:
            self._current = now
            on_change()


def _texts() -> tuple[str, ...]:
    return tuple(sorted({str(one.address.ip) for one in read_addresses()}))


def _routing_socket() -> socket.socket:
    if sys.platform == "linux":
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        sock.bind((0, _RTMGRP_LINK | _RTMGRP_IPV4_IFADDR | _RTMGRP_IPV6_IFADDR))
    else:
        sock = socket.socket(socket.AF_ROUTE, socket.SOCK_RAW, 0)
    sock.setblocking(False)
    return sock
