"""VLAN interfaces as rtnetlink describes them (linux/if_link.h; net/8021q/vlan_netlink.c)."""

from __future__ import annotations

import errno
import struct

from taploom.contracts.taploom.link.v1 import LinkCounters
from taploom.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NetlinkError,
    NetlinkSocket,
    attribute,
    attributes,
    text_attribute,
)

_RTM_NEWLINK = 16  # linux/rtnetlink.h
IFLA_LINKINFO, IFLA_INFO_KIND, IFLA_INFO_DATA = 18, 1, 2
IFLA_VLAN_ID, IFLA_VLAN_PROTOCOL = 1, 5
KIND = "vlan"
_ETH_P_8021Q = b"\x81\x00"  # in network byte order
_TAG = struct.Struct("=H")
_STATISTICS = struct.Struct("=8Q")  # struct rtnl_link_stats64 begins with them
_ETHERNET_HEADER = 14
_NO_LINK = bytes(16)  # struct ifinfomsg that names none


def link_info(tag: int) -> bytes:
    """The attribute that makes a new link be one."""
    data = attribute(IFLA_VLAN_ID, _TAG.pack(tag))
    return attribute(IFLA_LINKINFO, text_attribute(IFLA_INFO_KIND, KIND) + attribute(IFLA_INFO_DATA, data))


def read_counters(data: bytes) -> LinkCounters | None:
    """What an interface has carried out of its IFLA_STATS64; None where the kernel says nothing of it."""
    if len(data) < _STATISTICS.size:
        return None
    rx_frames, tx_frames, rx_bytes, tx_bytes, _rx_errors, _tx_errors, rx_drops, tx_drops = _STATISTICS.unpack_from(data)
    return LinkCounters(
        tx_frames=tx_frames,
        tx_bytes=tx_bytes,
        rx_frames=rx_frames,
        # A VLAN interface counts what it receives without the Ethernet header, what it sends with it (net/8021q).
        rx_bytes=rx_bytes + rx_frames * _ETHERNET_HEADER,
        rx_drops=rx_drops,
        tx_drops=tx_drops,
    )


def read_tag(data: bytes) -> int:
    """The tag out of IFLA_INFO_DATA; 0 when it says none, or one that is not IEEE 802.1Q's."""
    found = attributes(data, 0)
    tag = found.get(IFLA_VLAN_ID, b"")
    if len(tag) != _TAG.size or found.get(IFLA_VLAN_PROTOCOL, _ETH_P_8021Q) != _ETH_P_8021Q:
        return 0
    return int(_TAG.unpack(tag)[0])


def is_possible() -> bool:
    """Whether this kernel has VLAN interfaces: it refuses one without a tag as such, or does not know the kind at all.

    Nothing is made by asking. A kernel that has them as a module loads it.
    """
    body = _NO_LINK + attribute(IFLA_LINKINFO, text_attribute(IFLA_INFO_KIND, KIND))
    try:
        with NetlinkSocket() as netlink:
            netlink.request(body, _RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL)
    except NetlinkError as error:
        return error.errno == errno.EINVAL
    return False
