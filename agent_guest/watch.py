"""Which rtnetlink notifications concern the agent: bytes in, yes or no out (rtnetlink(7))."""

from __future__ import annotations

import struct
from collections.abc import Collection

from taploom.netlink import split_messages

from .netlink import (
    RTM_DELADDR,
    RTM_DELLINK,
    RTM_DELROUTE,
    RTM_NEWADDR,
    RTM_NEWLINK,
    RTM_NEWROUTE,
)

_RTA_OIF = 4
_BODY = 16  # nlmsghdr


def touches(data: bytes, indexes: Collection[int]) -> bool:
    """Whether a datagram tells of a change of one of these links, of their addresses or routes, or of a default route.

    Malformed messages do not count.
    """
    return any(_touches(kind, message, indexes) for kind, _flags, _sequence, message in split_messages(data))


def _touches(kind: int, message: bytes, indexes: Collection[int]) -> bool:
    if kind in (RTM_NEWLINK, RTM_DELLINK, RTM_NEWADDR, RTM_DELADDR):
        # struct ifinfomsg and struct ifaddrmsg both have the link's index in their second word.
        return len(message) >= _BODY + 8 and struct.unpack_from("=i", message, _BODY + 4)[0] in indexes
    if kind in (RTM_NEWROUTE, RTM_DELROUTE):
        if len(message) < _BODY + 12:
            return False
        if message[_BODY + 1] == 0:  # rtm_dst_len: a default route, whoever's
            return True
        return _route_link(message) in indexes
    return False


def _route_link(message: bytes) -> int | None:
    offset = _BODY + 12  # struct rtmsg
    while offset + 4 <= len(message):
        length, kind = struct.unpack_from("=HH", message, offset)
        if length < 4 or offset + length > len(message):
            return None
        if kind == _RTA_OIF and length >= 8:
            return int(struct.unpack_from("=I", message, offset + 4)[0])
        offset += (length + 3) & ~3
    return None
