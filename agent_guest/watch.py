"""What rtnetlink notifications tell of the agent's links: bytes in, links out (rtnetlink(7))."""

from __future__ import annotations

import struct
from collections.abc import Collection

from taploom.netlink import NLM_F_REPLACE, split_messages

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


def touched(data: bytes, indexes: Collection[int]) -> set[int]:
    """The links, of these, of which a datagram tells that they, their addresses or routes have changed.

    All of them when it tells of a route of others that may have taken the place of one of theirs. Malformed messages do
    not count.
    """
    found: set[int] = set()
    for kind, flags, _sequence, message in split_messages(data):
        if kind in (RTM_NEWLINK, RTM_DELLINK, RTM_NEWADDR, RTM_DELADDR):
            # struct ifinfomsg and struct ifaddrmsg both have the link's index in their second word.
            if len(message) >= _BODY + 8:
                found.add(struct.unpack_from("=i", message, _BODY + 4)[0])
        elif kind in (RTM_NEWROUTE, RTM_DELROUTE) and len(message) >= _BODY + 12:
            link = _route_link(message)
            is_default = message[_BODY + 1] == 0  # rtm_dst_len
            if link in indexes:
                found.add(link)
            elif is_default or flags & NLM_F_REPLACE:
                return set(indexes)
    return found.intersection(indexes)


def _route_link(message: bytes) -> int:
    """Of a route with several next hops, or none: 0, which is no link."""
    offset = _BODY + 12  # struct rtmsg
    while offset + 4 <= len(message):
        length, kind = struct.unpack_from("=HH", message, offset)
        if length < 4 or offset + length > len(message):
            return 0
        if kind == _RTA_OIF and length >= 8:
            return int(struct.unpack_from("=I", message, offset + 4)[0])
        offset += (length + 3) & ~3
    return 0
