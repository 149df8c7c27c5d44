"""What plugged interfaces are in Open vSwitch's database (ovs-vswitchd.conf.db(5)). Run in a transaction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from agent_helper.daemons import BRIDGE
from agent_helper.errors import UnavailableError
from agent_helper.ovsdb import Txn, Values

_LOGICAL_PORT = "iface-id"  # ovn-controller(8)
_SPARE = "taploom-spare"


def plug(txn: Txn, interfaces: Mapping[str, str]) -> None:
    """Plugs the interfaces into the integration bridge, each for the logical port that it maps to."""
    _plug(txn, {name: {_LOGICAL_PORT: logical_port} for name, logical_port in interfaces.items()})


def plug_spares(txn: Txn, names: Iterable[str]) -> None:
    """Plugs the interfaces into the integration bridge for nobody yet."""
    _plug(txn, {name: {_SPARE: "true"} for name in names})


def _plug(txn: Txn, interfaces: Mapping[str, Mapping[str, str]]) -> None:
    bridge = txn.find("Bridge", BRIDGE)
    if bridge is None:
        raise UnavailableError(f"bridge {BRIDGE} is just being restored in Open vSwitch's database; try again")
    for name, ids in interfaces.items():
        interface = txn.find("Interface", name)
        if interface is not None:
            # ovn-controller adds its own to what is said of a logical port.
            if any(interface.external_ids.get(key) != value for key, value in ids.items()):
                txn.set(interface, external_ids=dict(ids))
            continue
        interface = txn.insert("Interface", name=name, external_ids=dict(ids))
        bridge.addvalue("ports", txn.insert("Port", name=name, interfaces=[interface]))


def unplug(txn: Txn, names: Iterable[str]) -> None:
    """Unplugs the interfaces and asks vswitchd to say when it has done so (`cur_cfg`)."""
    bridge = txn.find("Bridge", BRIDGE)
    for name in names:
        port, interface = txn.find("Port", name), txn.find("Interface", name)
        if port is not None:
            if bridge is not None:
                bridge.delvalue("ports", port)
            txn.delete("Port", port)
        if interface is not None:
            txn.delete("Interface", interface)
    root = txn.only("Open_vSwitch")
    if root is not None:
        txn.increment(root, "next_cfg")


def strangers(txn: Txn, wanted: Iterable[str]) -> list[str]:
    """The plugged interfaces other than these."""
    keep = {BRIDGE, *wanted}
    ours = {_LOGICAL_PORT, _SPARE}
    return [row.name for row in txn.rows("Interface") if row.name not in keep and ours & row.external_ids.keys()]


def is_port(interface: Values | None) -> bool:
    """Whether vswitchd has the interface as a port, or will not have it: it is not plugged, or cannot be."""
    return interface is None or bool(interface["ofport"])


def is_installed(interface: Values | None) -> bool:
    """Whether ovn-controller has programmed all flows of the interface's logical port."""
    return interface is not None and interface["external_ids"].get("ovn-installed") == "true"
