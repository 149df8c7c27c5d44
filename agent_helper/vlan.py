"""Descriptions of VLANs, checked."""

from __future__ import annotations

import re
from dataclasses import dataclass

from agent_helper.errors import InvalidSpecError
from agent_helper.ids import check_id
from taploom.contracts.taploom.helper.v1 import TrunkChild, Vlan

TAGS = range(1, 4095)  # IEEE 802.1Q: 0 is no VLAN, 4095 is reserved
# What the kernel takes, but for what would need quoting in the map of physical networks.
_CARD = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9_.@-]{0,14}", re.ASCII)


@dataclass(frozen=True)
class VlanSpec:
    """A VLAN: its tag and the card of the helper's that it is behind; "" while that is not chosen."""

    tag: int
    uplink: str


@dataclass(frozen=True)
class ChildSpec:
    """What carries an endpoint: tagged frames over the interface of another."""

    parent_id: str
    tag: int


def parse_child(message: TrunkChild | None) -> ChildSpec | None:
    """Checks what carries an endpoint.

    Raises:
        InvalidSpecError: says what is wrong and what it must be.
    """
    if message is None:
        return None
    parent_id = check_id("trunk_child: parent_endpoint_id", message.parent_endpoint_id)
    if message.tag not in TAGS:
        raise InvalidSpecError(f"trunk_child: tag {message.tag} must be 1 to 4094")
    return ChildSpec(parent_id, message.tag)


def parse_vlan(message: Vlan | None) -> VlanSpec | None:
    """Checks a VLAN.

    Raises:
        InvalidSpecError: says what is wrong and what it must be.
    """
    if message is None:
        return None
    if message.tag not in TAGS:
        raise InvalidSpecError(f"vlan: tag {message.tag} must be 1 to 4094")
    if message.uplink and not _CARD.fullmatch(message.uplink):
        raise InvalidSpecError(f"vlan: uplink {message.uplink[:40]!r} is not the name of a network card")
    return VlanSpec(message.tag, message.uplink)
