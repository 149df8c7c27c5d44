"""What the cards that VLANs have are in Open vSwitch's database: for each a bridge with the card in it, and its name as
that of a physical network (ovn-controller(8), "ovn-bridge-mappings"). OVN joins the bridge with the integration bridge
for each network whose switch has a port there. Run in a transaction."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

from agent_helper.daemons import BRIDGE, datapath_type
from agent_helper.errors import UnavailableError
from agent_helper.ovsdb import Txn, Values

_PREFIX = "tlv"
_MAPPINGS = "ovn-bridge-mappings"


def bridge_name(card: str) -> str:
    """The card's bridge; its name is an interface's, of which the kernel takes 15 characters."""
    return _PREFIX + hashlib.sha256(card.encode()).hexdigest()[:8]


def patch_name(localnet: str) -> str:
    """The interface that OVN makes on the integration bridge for a port that leads to a physical network."""
    return f"patch-{BRIDGE}-to-{localnet}"


def is_joined(interface: Values | None) -> bool:
    """Whether vswitchd has the interface."""
    return interface is not None and any(port > 0 for port in interface["ofport"])


def ensure_cards(txn: Txn, cards: Collection[str], *, kernel_datapath: bool) -> None:
    """Makes the cards' bridges be there, and no others, and asks vswitchd to say when they are (`cur_cfg`)."""
    root = txn.only("Open_vSwitch")
    if root is None:
        raise UnavailableError("Open vSwitch's database is just being restored; try again")
    bridges = {bridge_name(card): card for card in cards}
    for row in txn.rows("Bridge"):
        if row.name.startswith(_PREFIX) and row.name not in bridges:
            root.delvalue("bridges", row)
            for port in row.ports:
                for interface in port.interfaces:
                    txn.delete("Interface", interface)
                txn.delete("Port", port)
            txn.delete("Bridge", row)
    for name, card in bridges.items():
        if txn.find("Bridge", name) is not None:
            continue
        own = txn.insert("Port", name=name, interfaces=[txn.insert("Interface", name=name, type="internal")])
        out = txn.insert("Port", name=card, interfaces=[txn.insert("Interface", name=card)])
        bridge = txn.insert(
            "Bridge",
            name=name,
            datapath_type=datapath_type(kernel_datapath),
            fail_mode="standalone",
            other_config={"disable-in-band": "true"},
            ports=[own, out],
        )
        root.addvalue("bridges", bridge)
    ids = {key: value for key, value in root.external_ids.items() if key != _MAPPINGS}
    if bridges:
        ids[_MAPPINGS] = ",".join(f"{card}:{name}" for name, card in sorted(bridges.items()))
    txn.set(root, external_ids=ids)
    txn.increment(root, "next_cfg")
