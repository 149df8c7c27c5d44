"""Kernel interfaces of the switch's side: hardening, MTU, and the veth pair and namespace of a network's DNS server.

Blocking functions of a millisecond or two: call them in a worker thread. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from agent_helper.rtnetlink import NetlinkError, Rtnetlink, delete_ovs_datapath, has_ovs

_CLONE_NEWNET = 0x40000000  # sched.h
_SIOCSIFMTU, _SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8922, 0x8913, 0x8914, 0x1  # netdevice(7)
_MARK = "taploom:datapath"
_libc = ctypes.CDLL(None, use_errno=True)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

# The userspace data path reads frames beside the kernel, which sees them too. It must neither answer nor forward,
# whatever addresses the machine has (Documentation/networking/ip-sysctl.rst). The interface's own MAC is random and is
# never sent.
_SYSCTLS = {
    "ipv6": {"disable_ipv6": "1"},
    "ipv4": {
        "arp_ignore": "8",
        "forwarding": "0",
        "rp_filter": "1",
        "route_localnet": "0",
        "accept_local": "0",
        "drop_unicast_in_l2_multicast": "1",
    },
}


def harden(interface: str) -> None:
    """Makes the kernel deaf on a switch-side interface, which must still be down."""
    for family, settings in _SYSCTLS.items():
        for name, value in settings.items():
            path = Path(f"/proc/sys/net/{family}/conf/{interface}/{name}")
            with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6, say
                path.write_text(value)


def set_mtu(interface: str, mtu: int) -> None:
    """Sets the MTU in bytes.

    Raises:
        OSError: no such interface, or an MTU that it cannot have.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, _SIOCSIFMTU, struct.pack("16si12x", interface.encode(), mtu))


def set_up(interface: str) -> None:
    """Brings the interface up.

    Raises:
        OSError: no such interface.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sH14x", interface.encode(), 0)
        flags = struct.unpack_from("16sH", fcntl.ioctl(sock, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH14x", interface.encode(), flags | _IFF_UP))


class Namespace:
    """A network namespace without a name: it goes when its last process, socket and file descriptor go.

    `probes` are UDP sockets in it, by family: a socket belongs to the namespace that it was opened in, for good.
    """

    def __init__(self) -> None:
        self.fd = -1
        self.index = 0  # of its one interface, once it has one
        with _own_namespace_kept():
            _check(_libc.unshare(_CLONE_NEWNET), "make a network namespace")
            self.fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
            self.probes = {4: socket.socket(socket.AF_INET, kind)}
            with contextlib.suppress(OSError):  # a kernel without IPv6
                self.probes[6] = socket.socket(socket.AF_INET6, kind)
            # A new namespace has the machine's own settings, of which forwarding may be one.
            for family, setting in (("ipv4", "forwarding"), ("ipv6", "forwarding"), ("ipv6", "accept_ra")):
                for scope in ("default", "all"):
                    with contextlib.suppress(FileNotFoundError):
                        Path(f"/proc/sys/net/{family}/conf/{scope}/{setting}").write_text("0")

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Has the calling thread, and no other, in the namespace."""
        with _own_namespace_kept():
            _check(_libc.setns(self.fd, _CLONE_NEWNET), "enter a network namespace")
            yield

    def close(self) -> None:
        """Lets go of the namespace."""
        for probe in self.probes.values():
            probe.close()
        os.close(self.fd)


@contextlib.contextmanager
def _own_namespace_kept() -> Iterator[None]:
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            yield
        finally:
            _check(_libc.setns(before, _CLONE_NEWNET), "return to the network namespace")
    finally:
        os.close(before)


def plug_veth(  # noqa: PLR0917 -- what a veth pair is
    namespace: Namespace,
    outer: str,
    inner: str,
    mac: str,
    mtu: int,
    addresses: list[Address],
    routes: list[IPNetwork],
) -> int:
    """Creates a veth pair, `outer` here and `inner` in the namespace with these addresses and on-link routes; returns
    the index of `inner` there.

    Raises:
        OSError: the kernel refused; nothing is left.
    """
    try:
        with Rtnetlink() as here:
            here.add_veth(outer, inner, mtu=mtu, mac=mac, namespace=namespace.fd)
            harden(outer)
            here.set_up(socket.if_nametoindex(outer))
        with namespace.entered(), Rtnetlink() as there:
            there.set_up(socket.if_nametoindex("lo"))
            index = socket.if_nametoindex(inner)
            there.set_up(index)
            for address in addresses:
                # With its prefix: a link-local address alone has no route by which to answer.
                there.add_address(index, address, 64 if address.version == 6 else address.max_prefixlen)
            for route in routes:
                if any(address.version == route.version for address in addresses):
                    there.add_route(index, route)
        return index
    except NetlinkError as exc:
        delete_link(outer)
        raise OSError(exc.errno, f"cannot set up the DNS server's interface {outer}: {exc.strerror}") from exc


def delete_link(name: str) -> None:
    """Deletes an interface; nothing when it is not there."""
    with Rtnetlink() as kernel:
        try:
            kernel.delete_link(name)
        except NetlinkError as exc:
            if exc.errno != errno.ENODEV:
                raise OSError(exc.errno, f"cannot delete {name}: {exc.strerror}") from exc


def mark(name: str) -> None:
    """Marks an interface that outlives its maker as ours; nothing when it is not there."""
    with Rtnetlink() as kernel:
        for link in kernel.links():
            if link.name == name:
                kernel.set_alias(link.index, _MARK)


def marked() -> list[str]:
    """The interfaces here that are marked as ours."""
    with Rtnetlink() as kernel:
        return [link.name for link in kernel.links() if link.alias == _MARK]


def free_name(prefix: str, numbers: Iterator[int]) -> str:
    """The prefix with the next number that no interface here has."""
    while True:
        name = f"{prefix}{next(numbers)}"
        try:
            socket.if_nametoindex(name)
        except OSError:
            return name


def has_kernel_datapath() -> bool:
    """Whether the kernel has Open vSwitch: asking for it also loads the module."""
    return has_ovs()


def delete_kernel_datapath() -> None:
    """Removes the kernel's data path with its interfaces; nothing when it is not there.

    Raises:
        OSError: the kernel refused.
    """
    delete_ovs_datapath("ovs-system")


def _check(result: int, what: str) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot {what}: {os.strerror(code)} (it needs CAP_SYS_ADMIN)")
