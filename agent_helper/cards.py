"""The machine's network cards: which of them VLANs may have.

A card that VLANs have is Open vSwitch's as a whole. What the helper needs for itself, its own address and its default
route, therefore stays on a card of its own: were it moved onto the switch, the helper's way out would hang on Open
vSwitch's being up, and be lost with a kill -9.

Blocking functions of a millisecond: call them in a worker thread.
"""

from __future__ import annotations

from agent_helper.errors import PreconditionError
from agent_helper.rtnetlink import Link, Rtnetlink

# Interfaces of ours, and of the data path; the kernel's own that are Ethernet but no card.
_OURS = ("tl", "br-int", "ovs-")
_CARDS = ("", "veth")


def choose_card(wanted: str, taken: frozenset[str], mtu: int) -> str:
    """The card that a VLAN is to have.

    Args:
        wanted: its name; "": the only one that is free or VLANs' already.
        taken: the cards that VLANs have.
        mtu: what it must carry, in bytes.

    Raises:
        PreconditionError: there is none, or VLANs must not have it; says what to do.
    """
    with Rtnetlink() as kernel:
        links = [link for link in kernel.links() if link.ethernet and not link.name.startswith(_OURS)]
        addresses: dict[int, list[str]] = {}
        for index, address in kernel.addresses():
            if not address.is_link_local or address.version == 4:
                addresses.setdefault(index, []).append(str(address))
        routes = {index for version in (4, 6) for index in kernel.default_route_interfaces(version)}
    names = {link.index: link.name for link in links}
    reasons = {link.name: _reason(link, addresses.get(link.index, []), routes, names, taken) for link in links}
    listed = ", ".join(sorted(link.name for link in links)) or "none"
    if not wanted:
        free = sorted(link.name for link in links if link.kind in _CARDS and not reasons[link.name])
        if len(free) != 1:
            why = (
                f"{', '.join(free)} are: name the one that is meant" if free else f"give it one more (it has: {listed})"
            )
            raise PreconditionError(f"vlan: no network card of the helper's is free for VLANs alone; {why}")
        wanted = free[0]
    card = next((link for link in links if link.name == wanted), None)
    if card is None:
        raise PreconditionError(f"vlan: the helper has no network card {wanted}; it has: {listed}")
    if reasons[wanted]:
        raise PreconditionError(f"vlan: network card {wanted} {reasons[wanted]}")
    if mtu > card.mtu:
        raise PreconditionError(
            f"vlan: the network's MTU of {mtu} is more than the {card.mtu} of network card {wanted}"
        )
    return wanted


def _reason(link: Link, own: list[str], routes: set[int], names: dict[int, str], taken: frozenset[str]) -> str:
    """Why VLANs must not have the card; empty: they may."""
    if link.name in taken:
        return ""
    if own or link.index in routes:
        what = f"has the helper's own address {own[0]}" if own else "has the helper's default route"
        return f"{what}: VLANs take a card as a whole, so give the helper's machine a second one and name that"
    if link.master:
        return f"is part of {names.get(link.master, 'another interface')}: name that, or another card"
    return ""
