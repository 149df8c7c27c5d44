"""A small synchronous rtnetlink client on pyroute2's message classes.

Importing ``pyroute2`` itself loads every protocol that it knows and asyncio: 300 modules, 12 MB of resident memory
and, on an emulated CPU, seconds of start-up. The agent needs three message classes, so it imports those below the
package's ``__init__`` (7 modules, 0.6 MB) and brings its own socket, which also suits a worker thread better than
an event loop would. Sources: netlink(7), rtnetlink(7), linux/netlink.h, linux/rtnetlink.h.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import socket
import struct
import sys
from collections.abc import Iterator
from typing import Any

from .state import AddressState, KernelState, LinkState, Network, RouteState, network, parse_interface, parse_ip


def _pyroute2() -> tuple[Any, Any, Any, Any]:
    """pyroute2's (nlmsg, nla, ifaddrmsg, rtmsg) classes, without running ``pyroute2/__init__.py``."""
    bare = "pyroute2" not in sys.modules
    if bare:
        spec = importlib.util.find_spec("pyroute2")
        if spec is None:
            raise ModuleNotFoundError("pyroute2 is not installed; install taploom[guest]", name="pyroute2")
        sys.modules["pyroute2"] = importlib.util.module_from_spec(spec)
    try:
        from pyroute2.netlink import nla, nlmsg
        from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
        from pyroute2.netlink.rtnl.rtmsg import rtmsg
    finally:
        if bare:
            # A later `import pyroute2` by anyone else in this process gets the real, whole package.
            del sys.modules["pyroute2"]
    return nlmsg, nla, ifaddrmsg, rtmsg


nlmsg, nla, ifaddrmsg, rtmsg = _pyroute2()


class ifinfmsg(nlmsg):  # type: ignore[misc,valid-type]  # noqa: N801, RUF100 - struct ifinfomsg, as pyroute2 calls it
    """struct ifinfomsg (rtnetlink(7)) with the attributes that are used here.

    pyroute2's own class knows the options of every kind of link, and loads `multiprocessing` and 25 other modules.
    """

    fields = (("family", "B"), ("_align", "B"), ("ifi_type", "H"), ("index", "i"), ("flags", "I"), ("change", "I"))
    nla_map = (
        (1, "IFLA_ADDRESS", "l2addr"),
        (3, "IFLA_IFNAME", "asciiz"),
        (4, "IFLA_MTU", "uint32"),
        (18, "IFLA_LINKINFO", "linkinfo"),
        (20, "IFLA_IFALIAS", "asciiz"),
    )

    class linkinfo(nla):  # type: ignore[misc,valid-type]  # noqa: N801, RUF100
        """IFLA_LINKINFO's first attribute: what kind of link it is."""

        nla_map = ((1, "IFLA_INFO_KIND", "asciiz"),)


# linux/netlink.h
NLM_F_REQUEST, NLM_F_MULTI, NLM_F_ACK, NLM_F_DUMP_INTR = 0x1, 0x2, 0x4, 0x10
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE, NLM_F_DUMP = 0x100, 0x200, 0x400, 0x300
NLM_F_CAPPED, NLM_F_ACK_TLVS = 0x100, 0x200
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLMSGERR_ATTR_MSG = 1
SOL_NETLINK, NETLINK_EXT_ACK = 270, 11
# linux/rtnetlink.h
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RT_TABLE_MAIN, RTN_UNICAST = 254, 1
RT_SCOPE_UNIVERSE, RT_SCOPE_LINK = 0, 253
RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE = 0x1, 0x10, 0x40
RTMGRP_IPV6_IFADDR, RTMGRP_IPV6_ROUTE = 0x100, 0x400
WATCHED_GROUPS = RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV4_ROUTE | RTMGRP_IPV6_IFADDR | RTMGRP_IPV6_ROUTE
# linux/if.h, linux/if_addr.h
IFF_UP, IFF_LOWER_UP = 0x1, 0x10000
IFA_F_NODAD, IFA_F_DADFAILED, IFA_F_TENTATIVE = 0x02, 0x08, 0x40

_HEADER = struct.Struct("=IHHII")
_REQUEST_TIMEOUT = 5.0
_DUMP_ATTEMPTS = 8


class NetlinkError(OSError):
    """The kernel refused a request: ``errno`` as in OSError, the message is the kernel's own when it gave one."""


class Netlink:
    """One rtnetlink socket in the network namespace of the calling thread. Not for use by two threads at once."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.bind((0, 0))
        self._socket.settimeout(_REQUEST_TIMEOUT)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    # -- what is there ------------------------------------------------------------------------------------------

    def links(self) -> dict[int, LinkState]:
        """Every link of the namespace, by index."""
        links = {}
        for message in self._dump(ifinfmsg(), RTM_GETLINK, ifinfmsg):
            mac = message.get_attr("IFLA_ADDRESS") or ""
            info = message.get_attr("IFLA_LINKINFO")
            links[message["index"]] = LinkState(
                index=message["index"],
                name=message.get_attr("IFLA_IFNAME"),
                mac=mac.lower(),
                mtu=message.get_attr("IFLA_MTU") or 0,
                up=bool(message["flags"] & IFF_UP),
                carrier=bool(message["flags"] & IFF_LOWER_UP),
                alias=message.get_attr("IFLA_IFALIAS") or "",
                kind=(info.get_attr("IFLA_INFO_KIND") or "") if info else "",
            )
        return links

    def addresses(self) -> list[AddressState]:
        """Every address of the namespace."""
        found = []
        for message in self._dump(ifaddrmsg(), RTM_GETADDR, ifaddrmsg):
            if message["family"] not in (socket.AF_INET, socket.AF_INET6):
                continue
            # IFA_LOCAL is the address, IFA_ADDRESS the peer's; IPv6 without peer has IFA_ADDRESS only.
            text = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
            flags = message.get_attr("IFA_FLAGS")
            found.append(
                AddressState(
                    index=message["index"],
                    address=parse_interface(f"{text}/{message['prefixlen']}"),
                    failed=bool((flags if flags is not None else message["flags"]) & IFA_F_DADFAILED),
                )
            )
        return found

    def routes(self) -> list[RouteState]:
        """The unicast routes of the main table, both families; routes with several next hops are left out."""
        found = []
        for family in (socket.AF_INET, socket.AF_INET6):
            request = rtmsg()
            request["family"] = family
            for message in self._dump(request, RTM_GETROUTE, rtmsg):
                if message["family"] != family or message["type"] != RTN_UNICAST:
                    continue
                table = message.get_attr("RTA_TABLE") or message["table"]
                oif = message.get_attr("RTA_OIF")
                if table != RT_TABLE_MAIN or oif is None:
                    continue
                any_address = "0.0.0.0" if family == socket.AF_INET else "::"  # noqa: S104 - not a bind
                destination = message.get_attr("RTA_DST") or any_address
                gateway = message.get_attr("RTA_GATEWAY")
                found.append(
                    RouteState(
                        destination=network(f"{destination}/{message['dst_len']}"),
                        gateway=parse_ip(gateway) if gateway else None,
                        index=oif,
                        metric=message.get_attr("RTA_PRIORITY") or 0,
                        protocol=message["proto"],
                    )
                )
        return found

    def state(self) -> KernelState:
        """Links, addresses and routes; three dumps, so not one instant."""
        return KernelState(self.links(), self.addresses(), self.routes())

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
        message = ifinfmsg()
        message["index"] = index
        if up is not None:
            message["change"] = IFF_UP
            message["flags"] = IFF_UP if up else 0
        attributes: list[tuple[str, object]] = []
        if name is not None:
            attributes.append(("IFLA_IFNAME", name))
        if mac is not None:
            attributes.append(("IFLA_ADDRESS", mac))
        if mtu is not None:
            attributes.append(("IFLA_MTU", mtu))
        if alias is not None:
            attributes.append(("IFLA_IFALIAS", alias))
        message["attrs"] = attributes
        self._request(message, RTM_SETLINK)

    def delete_link(self, index: int) -> None:
        message = ifinfmsg()
        message["index"] = index
        self._request(message, RTM_DELLINK)

    def add_address(self, address: AddressState) -> None:
        self._request(_address_message(address, nodad=True), RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL)

    def delete_address(self, address: AddressState) -> None:
        self._request(_address_message(address, nodad=False), RTM_DELADDR)

    def replace_route(self, route: RouteState) -> None:
        """Adds the route, in place of the one with the same destination and metric if there is one."""
        self._request(_route_message(route, create=True), RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE)

    def delete_route(self, route: RouteState) -> None:
        self._request(_route_message(route, create=False), RTM_DELROUTE)

    # -- the protocol -------------------------------------------------------------------------------------------

    def _send(self, message: Any, kind: int, flags: int) -> int:
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        message["header"]["type"] = kind
        message["header"]["flags"] = NLM_F_REQUEST | flags
        message["header"]["sequence_number"] = self._sequence
        message.encode()
        self._socket.sendto(bytes(message.data), (0, 0))
        return self._sequence

    def _replies(self, sequence: int) -> Iterator[tuple[int, int, bytes]]:
        """(type, flags, whole message) of each reply to the request; ends only by its consumer."""
        while True:
            for kind, flags, reply_to, message in split_messages(self._receive()):
                if reply_to == sequence:  # others are what is left of a request that was given up
                    yield kind, flags, message

    def _receive(self) -> bytes:
        try:
            # MSG_TRUNC tells the datagram's whole size: no dump is ever cut.
            size = self._socket.recv_into(bytearray(1), 1, socket.MSG_PEEK | socket.MSG_TRUNC)
            return self._socket.recv(max(size, 32768))
        except TimeoutError:
            raise NetlinkError(
                errno.ETIMEDOUT, f"the kernel has not answered a netlink request within {_REQUEST_TIMEOUT:g} s"
            ) from None
        except OSError as error:
            raise NetlinkError(error.errno, f"netlink: {error.strerror}") from error

    def _request(self, message: Any, kind: int, flags: int = 0) -> None:
        sequence = self._send(message, kind, flags | NLM_F_ACK)
        for reply, reply_flags, data in self._replies(sequence):
            if reply == NLMSG_ERROR:
                raise_error(reply_flags, data)
                return

    def _dump(self, message: Any, kind: int, reply_class: Any) -> list[Any]:
        for _ in range(_DUMP_ATTEMPTS):
            sequence = self._send(message, kind, NLM_F_DUMP)
            found, interrupted = [], False
            for reply, reply_flags, data in self._replies(sequence):
                interrupted |= bool(reply_flags & NLM_F_DUMP_INTR)
                if reply == NLMSG_ERROR:
                    raise_error(reply_flags, data)
                if reply == NLMSG_DONE:
                    break
                decoded = reply_class(data)
                decoded.decode()
                found.append(decoded)
            if not interrupted:
                return found
        return found


def split_messages(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """Cuts a netlink datagram into (type, flags, sequence number, message with header); a cut last one is left out."""
    messages, offset = [], 0
    while offset + _HEADER.size <= len(data):
        length, kind, flags, sequence, _pid = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size or offset + length > len(data):
            break
        messages.append((kind, flags, sequence, data[offset : offset + length]))
        offset += (length + 3) & ~3
    return messages


def raise_error(flags: int, data: bytes) -> None:
    """Raises NetlinkError for an NLMSG_ERROR message, unless it is an acknowledgement (error 0)."""
    (negative,) = struct.unpack_from("=i", data, _HEADER.size)
    if negative == 0:
        return
    text = os.strerror(-negative)
    if flags & NLM_F_ACK_TLVS:
        # The request follows the error, whole or (capped) its header only; then come the extended-ack attributes.
        offset = _HEADER.size + 4
        (inner,) = struct.unpack_from("=I", data, offset)
        offset += _HEADER.size if flags & NLM_F_CAPPED else (inner + 3) & ~3
        while offset + 4 <= len(data):
            length, kind = struct.unpack_from("=HH", data, offset)
            if length < 4:
                break
            if kind & 0x3FFF == NLMSGERR_ATTR_MSG:
                text = data[offset + 4 : offset + length].rstrip(b"\0").decode("utf-8", "replace")
            offset += (length + 3) & ~3
    raise NetlinkError(-negative, text)


def _address_message(state: AddressState, *, nodad: bool) -> Any:
    address = state.address
    message = ifaddrmsg()
    message["family"] = socket.AF_INET if address.version == 4 else socket.AF_INET6
    message["prefixlen"] = address.network.prefixlen
    message["index"] = state.index
    attributes: list[tuple[str, object]] = [("IFA_LOCAL", str(address.ip)), ("IFA_ADDRESS", str(address.ip))]
    if address.version == 4 and address.network.prefixlen < 31:
        attributes.append(("IFA_BROADCAST", str(address.network.broadcast_address)))
    if address.ip.is_link_local:
        message["scope"] = RT_SCOPE_LINK
    if nodad and address.version == 6:
        attributes.append(("IFA_FLAGS", IFA_F_NODAD))
    message["attrs"] = attributes
    return message


def _route_message(route: RouteState, *, create: bool) -> Any:
    destination: Network = route.destination
    message = rtmsg()
    message["family"] = socket.AF_INET if destination.version == 4 else socket.AF_INET6
    message["dst_len"] = destination.prefixlen
    message["table"] = RT_TABLE_MAIN
    message["type"] = RTN_UNICAST
    message["proto"] = route.protocol
    if create:
        on_link = route.gateway is None and destination.version == 4
        message["scope"] = RT_SCOPE_LINK if on_link else RT_SCOPE_UNIVERSE
    else:
        message["scope"] = 255  # RT_SCOPE_NOWHERE: any scope matches
    attributes: list[tuple[str, object]] = [("RTA_OIF", route.index)]
    if destination.prefixlen:
        attributes.append(("RTA_DST", str(destination.network_address)))
    if route.gateway is not None:
        attributes.append(("RTA_GATEWAY", str(route.gateway)))
    if route.metric:
        attributes.append(("RTA_PRIORITY", route.metric))
    message["attrs"] = attributes
    return message


def open_watch_socket() -> socket.socket:
    """A non-blocking socket that gets a datagram whenever a link, an address or a route changes."""
    watch = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    watch.setblocking(False)
    watch.bind((0, WATCHED_GROUPS))
    return watch


GONE = frozenset({errno.ENODEV, errno.ESRCH, errno.EADDRNOTAVAIL, errno.ENOENT})
"""What deleting something that is already gone gives, by kind of thing."""
