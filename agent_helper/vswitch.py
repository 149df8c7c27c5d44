"""What plugged interfaces are in Open vSwitch's database (ovs-vswitchd.conf.db(5)). Run in a transaction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from agent_helper.daemons import BRIDGE
from agent_helper.errors import UnavailableError
from agent_helper.ovsdb import Txn, Values


def plug(txn: Txn, interfaces: Mapping[str, str]) -> None:
    """Plugs the interfaces into the integration bridge, each for the logical port that it maps to."""
    bridge = txn.find("Bridge", BRIDGE)
    if bridge is None:
        raise UnavailableError(f"bridge {BRIDGE} is just being restored in Open vSwitch's database; try again")
    for name, logical_port in interfaces.items():
        interface = txn.find("Interface", name)
        if interface is not None:
            if interface.external_ids.get("iface-id") != logical_port:
                txn.set(interface, external_ids={"iface-id": logical_port})
            continue
        interface = txn.insert("Interface", name=name, external_ids={"iface-id": logical_port})
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
    return [row.name for row in txn.rows("Interface") if row.name not in keep and "iface-id" in row.external_ids]


def is_installed(interface: Values | None) -> bool:
    """Whether ovn-controller has programmed all flows of the interface's logical port."""
    return interface is not None and interface["external_ids"].get("ovn-installed") == "true"
