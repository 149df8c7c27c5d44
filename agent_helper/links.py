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

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

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

    `probe` is a UDP socket in it: a socket belongs to the namespace that it was opened in, for good.
    """

    def __init__(self) -> None:
        self.fd = -1
        with _own_namespace_kept():
            _check(_libc.unshare(_CLONE_NEWNET), "make a network namespace")
            self.fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            self.probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
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
        self.probe.close()
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
) -> None:
    """Creates a veth pair, `outer` here and `inner` in the namespace with these addresses and on-link routes.

    Raises:
        OSError: the kernel refused; nothing is left.
    """
    # An IPRoute has an event loop per thread that uses it: each is opened, used and closed in one.
    try:
        with IPRoute() as here:
            peer = {"ifname": inner, "net_ns_fd": namespace.fd, "address": mac, "mtu": mtu}
            here.link("add", ifname=outer, kind="veth", mtu=mtu, peer=peer)
            harden(outer)
            here.link("set", ifname=outer, state="up")
        with namespace.entered(), IPRoute() as there:
            there.link("set", ifname="lo", state="up")
            index = there.link_lookup(ifname=inner)[0]
            there.link("set", index=index, state="up")
            for address in addresses:
                flags = {"flags": 0x02} if address.version == 6 else {}  # IFA_F_NODAD: it answers at once
                there.addr("add", index=index, address=str(address), prefixlen=address.max_prefixlen, **flags)
            for route in routes:
                if any(address.version == route.version for address in addresses):
                    there.route("add", dst=str(route), oif=index, scope="link" if route.version == 4 else "universe")
    except NetlinkError as exc:
        delete_link(outer)
        raise OSError(exc.code, f"cannot set up the DNS server's interface {outer}: {os.strerror(exc.code)}") from exc


def delete_link(name: str) -> None:
    """Deletes an interface; nothing when it is not there."""
    with IPRoute() as ipr:
        try:
            ipr.link("del", ifname=name)
        except NetlinkError as exc:
            if exc.code != errno.ENODEV:
                raise OSError(exc.code, f"cannot delete {name}: {os.strerror(exc.code)}") from exc


def mark(name: str) -> None:
    """Marks an interface that outlives its maker as ours; nothing when it is not there."""
    with IPRoute() as ipr:
        for index in ipr.link_lookup(ifname=name):
            ipr.link("set", index=index, ifalias=_MARK)


def marked() -> list[str]:
    """The interfaces here that are marked as ours."""
    with IPRoute() as ipr:
        return [link.get_attr("IFLA_IFNAME") for link in ipr.get_links() if link.get_attr("IFLA_IFALIAS") == _MARK]


def free_name(prefix: str, numbers: Iterator[int]) -> str:
    """The prefix with the next number that no interface here has."""
    while True:
        name = f"{prefix}{next(numbers)}"
        try:
            socket.if_nametoindex(name)
        except OSError:
            return name


def has_kernel_datapath() -> bool:
    """Whether the kernel has Open vSwitch: asks generic netlink for its family, which also loads the module."""
    name = b"ovs_datapath\0"
    # struct nlmsghdr, struct genlmsghdr {CTRL_CMD_GETFAMILY, 1}, struct nlattr {CTRL_ATTR_FAMILY_NAME}: genetlink.h
    attribute = struct.pack("=HH", 4 + len(name), 2) + name.ljust((len(name) + 3) & ~3, b"\0")
    payload = struct.pack("=BBH", 3, 1, 0) + attribute
    message = struct.pack("=IHHII", 16 + len(payload), 0x10, 0x1, 1, 0) + payload
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 16) as sock:  # NETLINK_GENERIC
        sock.settimeout(5.0)
        sock.bind((0, 0))
        sock.send(message)
        answer = sock.recv(8192)
    return int(struct.unpack_from("=IHHII", answer)[1]) != 0x2  # NLMSG_ERROR


def _check(result: int, what: str) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot {what}: {os.strerror(code)} (it needs CAP_SYS_ADMIN)")
