"""What the helper changes of the kernel's links, addresses, routes, rules and neighbours (rtnetlink(7)).

Messages are as in linux/rtnetlink.h, linux/if_link.h, linux/veth.h, linux/if_addr.h, linux/neighbour.h,
linux/fib_rules.h, linux/genetlink.h and linux/openvswitch.h.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from dataclasses import dataclass

from taploom.netlink import (
    HEADER,
    NETLINK_GENERIC,
    NETLINK_ROUTE,
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    NetlinkError,
    NetlinkSocket,
    attribute,
    attributes,
    number_attribute,
    read_number,
    read_text,
    text_attribute,
)

__all__ = ["Link", "NetlinkError", "Rtnetlink", "delete_ovs_datapath", "has_ovs"]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

_RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK, _RTM_SETLINK = 16, 17, 18, 19
_RTM_NEWADDR, _RTM_GETADDR = 20, 22
_RTM_NEWROUTE, _RTM_DELROUTE, _RTM_GETROUTE = 24, 25, 26
_RTM_NEWNEIGH, _RTM_DELNEIGH = 28, 29
_RTM_NEWRULE, _RTM_DELRULE = 32, 33
_IFF_UP, _ARPHRD_ETHER = 0x1, 1
_IFLA_MASTER = 10
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINKINFO, _IFLA_IFALIAS, _IFLA_NET_NS_FD = 1, 3, 4, 18, 20, 28
_IFLA_INFO_KIND, _IFLA_INFO_DATA, _VETH_INFO_PEER = 1, 2, 1
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS, _IFA_F_NODAD = 1, 2, 8, 0x02
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_METRICS, _RTA_TABLE, _RTAX_MTU = 1, 4, 5, 8, 15, 2
_RT_TABLE_MAIN, _RTPROT_STATIC, _RTN_UNICAST, _RTN_LOCAL = 254, 4, 1, 2
_RT_SCOPE_UNIVERSE, _RT_SCOPE_LINK, _RT_SCOPE_HOST, _RT_SCOPE_NOWHERE = 0, 253, 254, 255
_NDA_DST, _NDA_LLADDR, _NUD_PERMANENT = 1, 2, 0x80
_FRA_IIFNAME, _FRA_PRIORITY, _FRA_FWMARK, _FRA_TABLE, _FR_ACT_TO_TBL = 3, 6, 10, 15, 1

_IFINFOMSG = struct.Struct("=BxHiII")  # family, type, index, flags, change
_IFADDRMSG = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_RTMSG = struct.Struct("=BBBBBBBBI")  # family, dst_len, src_len, tos, table, protocol, scope, type, flags
_NDMSG = struct.Struct("=BxxxiHBB")  # family, index, state, flags, type
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}

# linux/genetlink.h, linux/openvswitch.h
_GENL_ID_CTRL, _CTRL_CMD_GETFAMILY, _CTRL_ATTR_FAMILY_ID, _CTRL_ATTR_FAMILY_NAME = 16, 3, 1, 2
_OVS_DATAPATH_FAMILY, _OVS_DP_CMD_DEL, _OVS_DP_ATTR_NAME, _OVS_DATAPATH_VERSION = "ovs_datapath", 2, 1, 2


@dataclass(frozen=True)
class Link:
    """An interface: its index, name, alias and MTU in bytes; what it is for the kernel ("" of devices), whether it has
    Ethernet frames, and the index of the interface that it is part of, or 0."""

    index: int
    name: str
    alias: str
    mtu: int
    kind: str = ""
    ethernet: bool = True
    master: int = 0


class Rtnetlink(NetlinkSocket):
    """Changes in the network namespace of the calling thread; each raises NetlinkError when the kernel refuses."""

    def __init__(self) -> None:
        super().__init__(NETLINK_ROUTE)

    def links(self) -> list[Link]:
        """All interfaces."""
        return self.dump(_IFINFOMSG.pack(0, 0, 0, 0, 0), _RTM_GETLINK, _read_link)

    def add_veth(self, name: str, peer: str, *, mtu: int, mac: str, namespace: int = -1) -> None:
        """Makes a veth pair, both ends down.

        Args:
            mtu: of both ends, in bytes.
            mac: the peer's MAC address; the other's is random.
            namespace: a file descriptor of the network namespace for the peer; -1: this one.
        """
        ends = _IFINFOMSG.pack(0, 0, 0, 0, 0)
        other = ends + text_attribute(_IFLA_IFNAME, peer) + number_attribute(_IFLA_MTU, mtu)
        other += attribute(_IFLA_ADDRESS, bytes.fromhex(mac.replace(":", "")))
        if namespace != -1:
            other += number_attribute(_IFLA_NET_NS_FD, namespace)
        info = text_attribute(_IFLA_INFO_KIND, "veth") + attribute(_IFLA_INFO_DATA, attribute(_VETH_INFO_PEER, other))
        body = ends + text_attribute(_IFLA_IFNAME, name) + number_attribute(_IFLA_MTU, mtu)
        self.request(body + attribute(_IFLA_LINKINFO, info), _RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL)

    def set_up(self, index: int) -> None:
        """Brings the interface up."""
        self.request(_IFINFOMSG.pack(0, 0, index, _IFF_UP, _IFF_UP), _RTM_SETLINK)

    def set_alias(self, index: int, alias: str) -> None:
        """Gives the interface a note (`ip link` shows it as alias)."""
        self.request(_IFINFOMSG.pack(0, 0, index, 0, 0) + text_attribute(_IFLA_IFALIAS, alias), _RTM_SETLINK)

    def delete_link(self, name: str) -> None:
        """Deletes the interface; ENODEV when it is not there."""
        self.request(_IFINFOMSG.pack(0, 0, 0, 0, 0) + text_attribute(_IFLA_IFNAME, name), _RTM_DELLINK)

    def add_address(self, index: int, address: Address, prefix: int) -> None:
        """Gives the interface an address, which is used at once (without duplicate address detection)."""
        body = _IFADDRMSG.pack(_FAMILY[address.version], prefix, 0, _RT_SCOPE_UNIVERSE, index)
        body += attribute(_IFA_LOCAL, address.packed) + attribute(_IFA_ADDRESS, address.packed)
        if address.version == 6:
            body += number_attribute(_IFA_FLAGS, _IFA_F_NODAD)
        self.request(body, _RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL)

    def addresses(self) -> list[tuple[int, Address]]:
        """All addresses, with the index of the interface that has them."""
        return self.dump(_IFADDRMSG.pack(0, 0, 0, 0, 0), _RTM_GETADDR, _read_address)

    def add_route(
        self, index: int, to: IPNetwork, *, via: Address | None = None, mtu: int = 0, replace: bool = False
    ) -> None:
        """Adds a unicast route to the main table.

        Args:
            via: the next hop; None: on the link.
            mtu: of the route, in bytes; 0: the interface's.
            replace: in the place of the one to the same destination; otherwise that is EEXIST.
        """
        flags = NLM_F_CREATE | (NLM_F_REPLACE if replace else NLM_F_EXCL)
        self.request(_route(index, to, via, mtu, delete=False), _RTM_NEWROUTE, flags)

    def delete_route(self, index: int, to: IPNetwork, *, via: Address | None = None, mtu: int = 0) -> None:
        """Deletes the route; ESRCH when it is not there."""
        self.request(_route(index, to, via, mtu, delete=True), _RTM_DELROUTE)

    def add_local_default(self, version: int, index: int, table: int) -> None:
        """In a table of its own: every destination is this machine's."""
        scope = _RT_SCOPE_HOST if version == 4 else _RT_SCOPE_UNIVERSE
        body = _RTMSG.pack(_FAMILY[version], 0, 0, 0, 0, _RTPROT_STATIC, scope, _RTN_LOCAL, 0)
        body += number_attribute(_RTA_OIF, index) + number_attribute(_RTA_TABLE, table)
        self.request(body, _RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL)

    def delete_local_default(self, version: int, table: int) -> None:
        """Deletes what `add_local_default` has added; ESRCH when it is not there."""
        body = _RTMSG.pack(_FAMILY[version], 0, 0, 0, 0, 0, _RT_SCOPE_NOWHERE, _RTN_LOCAL, 0)
        self.request(body + number_attribute(_RTA_TABLE, table), _RTM_DELROUTE)

    def default_route_interfaces(self, version: int) -> set[int]:
        """The interfaces of the main table's default routes, by index."""
        body = _RTMSG.pack(_FAMILY[version], 0, 0, 0, 0, 0, 0, 0, 0)
        return set(self.dump(body, _RTM_GETROUTE, _read_default_route))

    def add_rule(self, version: int, *, interface: str, mark: int, table: int, priority: int) -> None:
        """Has packets with this mark that come in by this interface routed by a table (ip-rule(8))."""
        body = _RTMSG.pack(_FAMILY[version], 0, 0, 0, 0, 0, 0, _FR_ACT_TO_TBL, 0)
        body += number_attribute(_FRA_PRIORITY, priority) + number_attribute(_FRA_TABLE, table)
        body += number_attribute(_FRA_FWMARK, mark) + text_attribute(_FRA_IIFNAME, interface)
        self.request(body, _RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL)

    def delete_rule(self, version: int, priority: int) -> None:
        """Deletes one rule of this priority; ENOENT when there is none."""
        body = _RTMSG.pack(_FAMILY[version], 0, 0, 0, 0, 0, 0, 0, 0)
        self.request(body + number_attribute(_FRA_PRIORITY, priority), _RTM_DELRULE)

    def set_neighbour(self, index: int, address: Address, mac: str) -> None:
        """Enters a neighbour for good, in the place of what is known of it."""
        body = _NDMSG.pack(_FAMILY[address.version], index, _NUD_PERMANENT, 0, 0) + attribute(_NDA_DST, address.packed)
        body += attribute(_NDA_LLADDR, bytes.fromhex(mac.replace(":", "")))
        self.request(body, _RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE)

    def delete_neighbour(self, index: int, address: Address) -> None:
        """Forgets a neighbour; ENOENT when it is not known."""
        body = _NDMSG.pack(_FAMILY[address.version], index, 0, 0, 0) + attribute(_NDA_DST, address.packed)
        self.request(body, _RTM_DELNEIGH)


def _route(index: int, to: IPNetwork, via: Address | None, mtu: int, *, delete: bool) -> bytes:
    scope = _RT_SCOPE_LINK if via is None and to.version == 4 else _RT_SCOPE_UNIVERSE
    if delete:
        scope = _RT_SCOPE_NOWHERE  # any
    family = _FAMILY[to.version]
    protocol = 0 if delete else _RTPROT_STATIC
    kind = 0 if delete else _RTN_UNICAST
    body = _RTMSG.pack(family, to.prefixlen, 0, 0, _RT_TABLE_MAIN, protocol, scope, kind, 0)
    body += attribute(_RTA_DST, to.network_address.packed) + number_attribute(_RTA_OIF, index)
    if via is not None:
        body += attribute(_RTA_GATEWAY, via.packed)
    if mtu:
        body += attribute(_RTA_METRICS, number_attribute(_RTAX_MTU, mtu))
    return body


def _read_link(message: bytes) -> Link | None:
    if len(message) < HEADER.size + _IFINFOMSG.size:
        return None
    _, kind, index, _, _ = _IFINFOMSG.unpack_from(message, HEADER.size)
    found = attributes(message, HEADER.size + _IFINFOMSG.size)
    info = attributes(found.get(_IFLA_LINKINFO, b""), 0)
    return Link(
        index,
        read_text(found.get(_IFLA_IFNAME)),
        read_text(found.get(_IFLA_IFALIAS)),
        read_number(found.get(_IFLA_MTU)) or 0,
        read_text(info.get(_IFLA_INFO_KIND)),
        kind == _ARPHRD_ETHER,
        read_number(found.get(_IFLA_MASTER)) or 0,
    )


def _read_address(message: bytes) -> tuple[int, Address] | None:
    if len(message) < HEADER.size + _IFADDRMSG.size:
        return None
    index: int = _IFADDRMSG.unpack_from(message, HEADER.size)[4]
    found = attributes(message, HEADER.size + _IFADDRMSG.size)
    # Of an interface between two points, IFA_ADDRESS is the other's.
    packed = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS)
    return (index, ipaddress.ip_address(packed)) if packed and len(packed) in (4, 16) else None


def _read_default_route(message: bytes) -> int | None:
    if len(message) < HEADER.size + _RTMSG.size:
        return None
    _, length, _, _, table, _, _, kind, _ = _RTMSG.unpack_from(message, HEADER.size)
    found = attributes(message, HEADER.size + _RTMSG.size)
    table = read_number(found.get(_RTA_TABLE)) or table
    return read_number(found.get(_RTA_OIF)) if (length, table, kind) == (0, _RT_TABLE_MAIN, _RTN_UNICAST) else None


def _ovs_family(sock: NetlinkSocket) -> int | None:
    """The number of generic netlink's family of Open vSwitch; asking for it loads the kernel's module."""
    body = struct.pack("=BBH", _CTRL_CMD_GETFAMILY, 1, 0) + text_attribute(_CTRL_ATTR_FAMILY_NAME, _OVS_DATAPATH_FAMILY)
    try:
        answer = sock.request(body, _GENL_ID_CTRL)
    except NetlinkError as exc:
        if exc.errno == errno.ENOENT:
            return None
        raise
    (number,) = struct.unpack("=H", attributes(answer, HEADER.size + 4)[_CTRL_ATTR_FAMILY_ID])
    return int(number)


def has_ovs() -> bool:
    """Whether the kernel has Open vSwitch's data path."""
    with NetlinkSocket(NETLINK_GENERIC) as sock:
        return _ovs_family(sock) is not None


def delete_ovs_datapath(name: str) -> None:
    """Removes a data path of the kernel's with all its ports, as `ovs-dpctl del-dp`; nothing when it is not there.

    Raises:
        NetlinkError: the kernel refused.
    """
    with NetlinkSocket(NETLINK_GENERIC) as sock:
        family = _ovs_family(sock)
        if family is None:
            return
        # struct genlmsghdr, struct ovs_header (the data path's interface, 0: by name)
        body = struct.pack("=BBHi", _OVS_DP_CMD_DEL, _OVS_DATAPATH_VERSION, 0, 0)
        try:
            sock.request(body + text_attribute(_OVS_DP_ATTR_NAME, name), family)
        except NetlinkError as exc:
            if exc.errno != errno.ENODEV:
                raise
