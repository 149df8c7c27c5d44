"""Networks that are VLANs of the physical network behind a network card of the helper's, and endpoints that are tagged
frames over another's interface.

Both are driver options, of the network and of the endpoint; here they are read and checked. docs/vlan.md has what they
may be.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from host_bridge.addressing import OPTION_GATEWAY_MODES, OPTION_RA
from host_bridge.errors import EndpointOptionError, InvalidError, NetworkOptionError, VlanTakenError

OPTION_TAG: Final = "taploom.vlan.tag"
OPTION_UPLINK: Final = "taploom.vlan.uplink"
# Of an endpoint: the network over whose endpoint it goes. Its tag there is OPTION_TAG.
OPTION_PARENT: Final = "taploom.vlan.parent"
_PREFIX: Final = "taploom.vlan."
_TAGS: Final = range(1, 4095)
_NUMBER: Final = re.compile(r"[0-9]{1,5}", re.ASCII)
# What the kernel takes, but for what would need quoting in Open vSwitch's settings.
_CARD: Final = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9_.@-]{0,14}", re.ASCII)
_FAMILIES: Final = {4: "IPv4", 6: "IPv6"}


@dataclass(frozen=True, slots=True)
class VlanPlace:
    """Where a network is on the wire: its tag, and the helper's network card; "": the only one that it can be."""

    tag: int
    uplink: str

    def __str__(self) -> str:
        return f"VLAN {self.tag} on {self.uplink or 'the only card'}"

    def meets(self, other: VlanPlace) -> bool:
        """Whether both are, or may be, the same VLAN."""
        return self.tag == other.tag and (self.uplink == other.uplink or not (self.uplink and other.uplink))


@dataclass(frozen=True, slots=True)
class Carried:
    """What carries an endpoint: frames with that tag over the guest's interface on another network."""

    parent: str
    tag: int

    def __str__(self) -> str:
        return f"tag {self.tag} over {self.parent}"


def _is_tag(text: str) -> bool:
    return bool(_NUMBER.fullmatch(text)) and int(text) in _TAGS


def is_carried(options: Mapping[str, str]) -> bool:
    """Whether an endpoint with these options goes over another's link."""
    return OPTION_PARENT in options


def carried_of(options: Mapping[str, str]) -> Carried | None:
    """What carries an endpoint with these options; None: a link of its own.

    Raises:
        EndpointOptionError
    """
    for key, value in options.items():
        if key.startswith(_PREFIX) and key not in (OPTION_TAG, OPTION_PARENT):
            raise EndpointOptionError(key, value, "there is no such option")
    parent, tag = options.get(OPTION_PARENT), options.get(OPTION_TAG)
    if tag is not None and not _is_tag(tag):
        raise EndpointOptionError(OPTION_TAG, tag, "use 1 to 4094")
    if (parent is None) != (tag is None):
        key, missing = (OPTION_PARENT, OPTION_TAG) if tag is None else (OPTION_TAG, OPTION_PARENT)
        raise EndpointOptionError(key, options[key], f"give {missing} too")
    return None if parent is None or tag is None else Carried(parent, int(tag))


def place_of(options: Mapping[str, str]) -> VlanPlace | None:
    """Where a network with these options, which have been checked, is on the wire; None: nowhere."""
    tag = options.get(OPTION_TAG)
    return None if tag is None else VlanPlace(int(tag), options.get(OPTION_UPLINK, ""))


def check_options(options: Mapping[str, str]) -> None:
    """Checks the options by themselves.

    Raises:
        NetworkOptionError
    """
    for key, value in options.items():
        if key.startswith(_PREFIX) and key not in (OPTION_TAG, OPTION_UPLINK):
            raise NetworkOptionError(key, value, "unknown")
    tag, uplink = options.get(OPTION_TAG), options.get(OPTION_UPLINK)
    if tag is not None and not _is_tag(tag):
        raise NetworkOptionError(OPTION_TAG, tag, "vlan-tag")
    if uplink is not None and not _CARD.fullmatch(uplink):
        raise NetworkOptionError(OPTION_UPLINK, uplink, "vlan-uplink")
    if uplink is not None and tag is None:
        raise NetworkOptionError(OPTION_UPLINK, uplink, "vlan-no-tag")
    if tag is None:
        return
    for key in (*OPTION_GATEWAY_MODES.values(), *(key for key in options if key.startswith(OPTION_RA))):
        if key in options:
            raise NetworkOptionError(key, options[key], "vlan-gateway")


def check_network(
    name: str,
    options: Mapping[str, str],
    *,
    internal: bool,
    gateways: Mapping[int, tuple[bool, bool]],
    others: Iterable[tuple[str, VlanPlace]],
) -> None:
    """Checks what a network on a VLAN must have; nothing for one that is on none.

    Args:
        gateways: by family that it has, whether its subnet, and a gateway in it, were given.
        others: the networks that are on VLANs, by name.

    Raises:
        InvalidError: a subnet or a gateway is missing: they are what the VLAN has, and nobody here could know.
        VlanTakenError: another network is this VLAN.
    """
    place = place_of(options)
    if place is None:
        return
    for family, (subnet, gateway) in gateways.items():
        if not subnet:
            raise InvalidError(
                f"network {name} is a VLAN: give its {_FAMILIES[family]} subnet, and with --ip-range the part of it "
                "that nobody else there gives addresses out of"
            )
        if not gateway and not internal:
            raise InvalidError(
                f"network {name} is a VLAN: give the {_FAMILIES[family]} address of the router there as its gateway, "
                "or make it internal: then guests have no default route there"
            )
    for other, taken in others:
        if place.meets(taken):
            raise VlanTakenError(place.tag, str(taken), other)
