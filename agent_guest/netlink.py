"""A small synchronous rtnetlink client: bytes in and out by ``struct``, no library (taploom/netlink.py).

The agent reads the kernel's state of what was changed after every change of it, and its memory counts: general message
classes cost a millisecond per dump and megabytes. Sources: netlink(7), rtnetlink(7), linux/netlink.h,
linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import socket
import struct
from collections.abc import Callable, Iterable
from typing import TypeVar

from taploom.contracts.taploom.link.v1 import LinkCounters
from taploom.netlink import (
    HEADER,
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    SOL_NETLINK,
    UINT32,
    NetlinkError,
    NetlinkSocket,
    attribute,
    attributes,
    read_number,
    read_text,
)

from .state import (
    MAIN_TABLE,
    NAMES_TABLE,
    AddressState,
    Ip,
    IpInterface,
    KernelState,
    LinkState,
    Network,
    RouteState,
    network,
    parse_interface,
    parse_ip,
)
from .vlan import IFLA_INFO_DATA, IFLA_INFO_KIND, IFLA_LINKINFO, KIND, link_info, read_counters, read_tag

# linux/rtnetlink.h
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTN_UNICAST = 1
RTM_NEWRULE, FR_ACT_TO_TBL, FRA_PRIORITY = 32, 1, 6  # linux/fib_rules.h
RULE_PREFERENCE = 32700  # just before the main table
RT_SCOPE_UNIVERSE, RT_SCOPE_LINK = 0, 253
RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE = 0x1, 0x10, 0x40
RTMGRP_IPV6_IFADDR, RTMGRP_IPV6_ROUTE = 0x100, 0x400
WATCHED_GROUPS = RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV4_ROUTE | RTMGRP_IPV6_IFADDR | RTMGRP_IPV6_ROUTE
# linux/if.h, linux/if_addr.h
IFF_UP, IFF_LOWER_UP = 0x1, 0x10000
IFA_F_NODAD, IFA_F_DADFAILED, IFA_F_TENTATIVE = 0x02, 0x08, 0x40

IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINK, IFLA_IFALIAS, IFLA_STATS64 = 1, 3, 4, 5, 20, 23
IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS = 29, 8
NETLINK_GET_STRICT_CHK = 12  # linux/netlink.h
IFA_ADDRESS, IFA_LOCAL, IFA_BROADCAST, IFA_FLAGS = 1, 2, 4, 8
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_TABLE = 1, 4, 5, 6, 15

_IFINFOMSG = struct.Struct("=BxHiII")  # family, type, index, flags, change
_IFADDRMSG = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_RTMSG = struct.Struct("=BBBBBBBBI")  # family, dst_len, src_len, tos, table, protocol, scope, type, flags
_WITHOUT_STATISTICS = attribute(IFLA_EXT_MASK, UINT32.pack(RTEXT_FILTER_SKIP_STATS))
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
_T = TypeVar("_T")
_ANY: dict[int, bytes] = {socket.AF_INET: bytes(4), socket.AF_INET6: bytes(16)}


class Netlink(NetlinkSocket):
    """One rtnetlink socket in the network namespace of the calling thread. Not for use by two threads at once."""

    def __init__(self) -> None:
        super().__init__()
        # The kernel then dumps only what is asked for. Kernels before 4.20 dump all.
        with contextlib.suppress(OSError):
            self._socket.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)

    # -- what is there ------------------------------------------------------------------------------------------

    def links(self) -> dict[int, LinkState]:
        """Every link of the namespace, by index."""
        body = _IFINFOMSG.pack(0, 0, 0, 0, 0) + _WITHOUT_STATISTICS
        return {link.index: link for link in self.dump(body, RTM_GETLINK, read_link)}

    def link(self, index: int) -> LinkState | None:
        """The link with this index, if there is one."""
        return self._link(_IFINFOMSG.pack(0, 0, index, 0, 0))

    def link_named(self, name: str) -> LinkState | None:
        """The link that has this name, or has it as an alternative one, if there is one."""
        return self._link(_IFINFOMSG.pack(0, 0, 0, 0, 0) + attribute(IFLA_IFNAME, name.encode() + b"\0"))

    def _link(self, which: bytes) -> LinkState | None:
        try:
            return read_link(self.request(which + _WITHOUT_STATISTICS, RTM_GETLINK))
        except NetlinkError as error:
            if error.errno in GONE:
                return None
            raise

    def counters(self, index: int) -> LinkCounters | None:
        """What the VLAN interface with this index has carried; None when there is none."""
        try:
            answer = self.request(_IFINFOMSG.pack(0, 0, index, 0, 0), RTM_GETLINK)
        except NetlinkError as error:
            if error.errno in GONE:
                return None
            raise
        return read_counters(attributes(answer, HEADER.size + _IFINFOMSG.size).get(IFLA_STATS64, b""))

    def addresses(self, index: int = 0) -> list[AddressState]:
        """Every address of a link, or of the namespace."""
        found = self._dump_of(index, _IFADDRMSG.pack(0, 0, 0, 0, index), RTM_GETADDR, read_address)
        return [address for address in found if index in (0, address.index)]

    def routes(self, index: int = 0) -> list[RouteState]:
        """The unicast routes over a link, or of the namespace, of the main and the names' table, both families, but not
        those with several next hops."""
        over = attribute(RTA_OIF, UINT32.pack(index)) if index else b""
        found = []
        for family in (socket.AF_INET, socket.AF_INET6):
            body = _RTMSG.pack(family, 0, 0, 0, 0, 0, 0, RTN_UNICAST, 0) + over
            found += self._dump_of(index, body, RTM_GETROUTE, read_route)
        return [route for route in found if index in (0, route.index)]

    def _dump_of(self, index: int, body: bytes, kind: int, read: Callable[[bytes], _T | None]) -> list[_T]:
        """A dump of what belongs to a link, if there is one with this index."""
        try:
            return self.dump(body, kind, read)
        except NetlinkError as error:
            if index and error.errno in GONE:
                return []
            raise

    def state(self, indexes: Iterable[int] | None = None) -> KernelState:
        """Some links, or all, with their addresses and routes; several requests, so not one instant."""
        if indexes is None:
            return KernelState(self.links(), self.addresses(), self.routes())
        links = {index: link for index in indexes if (link := self.link(index)) is not None}
        addresses = [address for index in links for address in self.addresses(index)]
        return KernelState(links, addresses, [route for index in links for route in self.routes(index)])

    # -- changes ------------------------------------------------------------------------------------------------

    def set_link(
        self,
        index: int,
        *,
        name: str | None = None,
        mac: str | None = None,
        mtu: int | None = None,
        alias: str | None = None,
        up: bool | None = None,
    ) -> None:
        """Changes what is given of a link."""
        body = _IFINFOMSG.pack(0, 0, index, IFF_UP if up else 0, 0 if up is None else IFF_UP)
        if name is not None:
            body += attribute(IFLA_IFNAME, name.encode() + b"\0")
        if mac is not None:
            body += attribute(IFLA_ADDRESS, bytes.fromhex(mac.replace(":", "")))
        if mtu is not None:
            body += attribute(IFLA_MTU, UINT32.pack(mtu))
        if alias is not None:
            body += attribute(IFLA_IFALIAS, alias.encode() + b"\0")
        self.request(body, RTM_SETLINK)

    def add_vlan(self, name: str, over: int, tag: int) -> None:
        """Makes a VLAN interface over a link. Raises EEXIST when the name or the tag there is taken."""
        body = _IFINFOMSG.pack(0, 0, 0, 0, 0) + attribute(IFLA_LINK, UINT32.pack(over))
        body += attribute(IFLA_IFNAME, name.encode() + b"\0") + link_info(tag)
        self.request(body, RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL)

    def delete_link(self, index: int) -> None:
        self.request(_IFINFOMSG.pack(0, 0, index, 0, 0), RTM_DELLINK)

    def add_address(self, address: AddressState) -> None:
        self.request(_address_message(address, nodad=True), RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL)

    def delete_address(self, address: AddressState) -> None:
        self.request(_address_message(address, nodad=False), RTM_DELADDR)

    def replace_route(self, route: RouteState) -> None:
        """Adds the route, in place of the one with the same destination and metric if there is one."""
        self.request(_route_message(route, create=True), RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE)

    def consult_names_table(self, version: int) -> None:
        """Has the names' table looked at before the main one. Raises EEXIST when it is so already."""
        body = _RTMSG.pack(_FAMILY[version], 0, 0, 0, NAMES_TABLE, 0, 0, FR_ACT_TO_TBL, 0)
        body += attribute(FRA_PRIORITY, UINT32.pack(RULE_PREFERENCE))
        self.request(body, RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL)

    def delete_route(self, route: RouteState) -> None:
        self.request(_route_message(route, create=False), RTM_DELROUTE)


def read_link(message: bytes) -> LinkState | None:
    """A link out of an RTM_NEWLINK message with its header; None when it is not one."""
    if len(message) < HEADER.size + _IFINFOMSG.size:
        return None
    _family, _kind, index, flags, _change = _IFINFOMSG.unpack_from(message, HEADER.size)
    found = attributes(message, HEADER.size + _IFINFOMSG.size)
    info = attributes(found.get(IFLA_LINKINFO, b""), 0)
    kind = read_text(info.get(IFLA_INFO_KIND))
    vlan = kind == KIND
    return LinkState(
        index=index,
        name=read_text(found.get(IFLA_IFNAME)),
        mac=found.get(IFLA_ADDRESS, b"").hex(":"),
        mtu=read_number(found.get(IFLA_MTU)) or 0,
        up=bool(flags & IFF_UP),
        carrier=bool(flags & IFF_LOWER_UP),
        alias=read_text(found.get(IFLA_IFALIAS)),
        kind=kind,
        over=(read_number(found.get(IFLA_LINK)) or 0) if vlan else 0,
        tag=read_tag(info.get(IFLA_INFO_DATA, b"")) if vlan else 0,
    )


def read_address(message: bytes) -> AddressState | None:
    """An address out of an RTM_NEWADDR message with its header; None when it is not one of IP."""
    if len(message) < HEADER.size + _IFADDRMSG.size:
        return None
    family, length, flags, _scope, index = _IFADDRMSG.unpack_from(message, HEADER.size)
    found = attributes(message, HEADER.size + _IFADDRMSG.size)
    # IFA_LOCAL is the address, IFA_ADDRESS the peer's; IPv6 without peer has IFA_ADDRESS only.
    ip = _ip(family, found.get(IFA_LOCAL, found.get(IFA_ADDRESS)))
    if ip is None or length > ip.max_prefixlen:
        return None
    more = read_number(found.get(IFA_FLAGS))
    failed = bool((flags if more is None else more) & IFA_F_DADFAILED)
    return AddressState(index=index, address=_interface(ip, length), failed=failed)


def read_route(message: bytes) -> RouteState | None:
    """A route out of an RTM_NEWROUTE message with its header; None unless it is unicast, in one of the agent's tables,
    with one next hop."""
    if len(message) < HEADER.size + _RTMSG.size:
        return None
    family, length, _src, _tos, table, protocol, _scope, kind, _flags = _RTMSG.unpack_from(message, HEADER.size)
    if kind != RTN_UNICAST:
        return None  # most are of the local table; those of local addresses are not unicast
    found = attributes(message, HEADER.size + _RTMSG.size)
    table = read_number(found.get(RTA_TABLE)) or table
    index = read_number(found.get(RTA_OIF))
    if table not in (MAIN_TABLE, NAMES_TABLE) or index is None:
        return None
    destination = _ip(family, found.get(RTA_DST, _ANY.get(family)))
    if destination is None:
        return None
    if length > destination.max_prefixlen:
        return None
    return RouteState(
        destination=_network(destination, length),
        gateway=_ip(family, found.get(RTA_GATEWAY)),
        index=index,
        metric=read_number(found.get(RTA_PRIORITY)) or 0,
        protocol=protocol,
        table=table,
    )


def _ip(family: int, value: bytes | None) -> Ip | None:
    if value is None or family not in _ANY or len(value) != len(_ANY[family]):
        return None
    return _parse_ip(value)


# The state is read again after each change, and nearly all of it is as it was: making these takes most of the time.
_parse_ip = functools.lru_cache(1024)(parse_ip)


@functools.lru_cache(1024)
def _interface(ip: Ip, length: int) -> IpInterface:
    return parse_interface((ip, length))


@functools.lru_cache(1024)
def _network(ip: Ip, length: int) -> Network:
    return network((ip, length), strict=False)


def _address_message(state: AddressState, *, nodad: bool) -> bytes:
    address = state.address
    scope = RT_SCOPE_LINK if address.ip.is_link_local else RT_SCOPE_UNIVERSE
    body = _IFADDRMSG.pack(_FAMILY[address.version], address.network.prefixlen, 0, scope, state.index)
    body += attribute(IFA_LOCAL, address.ip.packed) + attribute(IFA_ADDRESS, address.ip.packed)
    if address.version == 4 and address.network.prefixlen < 31:
        body += attribute(IFA_BROADCAST, address.network.broadcast_address.packed)
    if nodad and address.version == 6:
        body += attribute(IFA_FLAGS, UINT32.pack(IFA_F_NODAD))
    return body


def _route_message(route: RouteState, *, create: bool) -> bytes:
    destination: Network = route.destination
    if create:
        on_link = route.gateway is None and destination.version == 4
        scope = RT_SCOPE_LINK if on_link else RT_SCOPE_UNIVERSE
    else:
        scope = 255  # RT_SCOPE_NOWHERE: any scope matches
    family, length = _FAMILY[destination.version], destination.prefixlen
    body = _RTMSG.pack(family, length, 0, 0, route.table, route.protocol, scope, RTN_UNICAST, 0)
    body += attribute(RTA_OIF, UINT32.pack(route.index))
    if length:
        body += attribute(RTA_DST, destination.network_address.packed)
    if route.gateway is not None:
        body += attribute(RTA_GATEWAY, route.gateway.packed)
    if route.metric:
        body += attribute(RTA_PRIORITY, UINT32.pack(route.metric))
    return body


def open_watch_socket() -> socket.socket:
    """A non-blocking socket that gets a datagram whenever a link, an address or a route changes."""
    watch = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    watch.setblocking(False)
    watch.bind((0, WATCHED_GROUPS))
    return watch


GONE = frozenset({errno.ENODEV, errno.ESRCH, errno.EADDRNOTAVAIL, errno.ENOENT})
"""What deleting something that is already gone gives, by kind of thing."""
