"""What load balancers are in OVN's northbound database. It is run in a transaction and makes the rows be as described,
whatever was there.

A load balancer is one row of OVN's for each protocol and network that it is reached on. The row hangs on the network's
switch, which sends connections of its own guests to backends before any rule of a policy sees them, and on its gateway
router, which answers ARP and neighbour solicitations for the address (ovn-northd(8), "Ingress Table 3: IP Input") and
balances what the kernel sends there, for published ports. What the switch has sent to a backend of the same network has
the router's MAC address and so passes the router once; its source address must stay what it is there, so the network's
address translation excepts what goes to the network itself.

Where it is reached on a network other than its backends', that network has a way to them and no further (`Way`):
routes from router to router over the uplink, which the uplink's rules let pass for backends' ports only; and rules on
its switch that drop what is for a backend before the switch has chosen it, and what comes from one and is no answer.
Sources stay what they are there too, so backends' rules see who it is.

All rows have `BALANCER` in their external_ids (but address sets, which go by their names), so that they can be told
from those that a network has in any case.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from agent_helper.balancer import Around, BalancerSpec, FrontendSpec, backends_of, socket_text
from agent_helper.balancer_ways import Way, leads_to, ways_of
from agent_helper.northbound import BALANCER, UPLINK_SWITCH, endpoint_port, router_name, switch_name
from agent_helper.ovsdb import Row, Txn

SETS = "tlb_"


def ensure_balancers(txn: Txn, balancers: Iterable[BalancerSpec], around: Around) -> None:
    """Makes all load balancers be these, as far as their networks are there."""
    balancers = tuple(balancers)
    wanted: dict[str, tuple[str, dict[str, object], dict[str, dict[str, str]]]] = {}
    using: set[str] = set()
    for balancer in balancers:
        for frontend in balancer.frontends:
            if frontend.network_id not in around.networks or balancer.network_id not in around.networks:
                continue
            using.add(frontend.network_id)
            for protocol in sorted({port.protocol for port in balancer.ports}):
                name = f"lb-{balancer.balancer_id}-{frontend.network_id}-{protocol}"
                wanted[name] = (frontend.network_id, *_row(balancer, frontend, protocol, around))
    rows = {row.name: row for row in txn.rows("Load_Balancer") if BALANCER in getattr(row, "external_ids", {})}
    for name, row in rows.items():
        if name not in wanted:
            txn.delete("Load_Balancer", row)
    there: dict[str, list[Row]] = {}
    for name, (network_id, values, checks) in wanted.items():
        row = rows.get(name)
        if row is None:
            row = txn.insert("Load_Balancer", name=name, external_ids={BALANCER: network_id}, **values)
        else:
            txn.set(row, **values)
        _ensure_checks(txn, row, checks)
        there.setdefault(network_id, []).append(row)
    for network_id in around.networks:
        for table, name in (
            ("Logical_Switch", switch_name(network_id)),
            ("Logical_Router", router_name(network_id)),
        ):
            parent = txn.find(table, name)
            if parent is not None:
                _hang(txn, parent, there.get(network_id, []))
    ways = ways_of(balancers, around)
    _ensure_exceptions(txn, _exceptions(using, ways, around), around)
    _ensure_ways(txn, ways, around)


def _row(
    balancer: BalancerSpec, frontend: FrontendSpec, protocol: str, around: Around
) -> tuple[dict[str, object], dict[str, dict[str, str]]]:
    vips: dict[str, str] = {}
    mappings: dict[str, str] = {}
    checks: dict[str, dict[str, str]] = {}
    health = balancer.health
    for address in frontend.addresses:
        source = next((one for one in health.sources if one.version == address.version), None) if health else None
        for port in balancer.ports:
            if port.protocol != protocol:
                continue
            led = leads_to(frontend.network_id, balancer.network_id, address.version, around)
            found = backends_of(balancer, port.target, address.version, around) if led else []
            vip = socket_text(address, port.port)
            vips[vip] = ",".join(backend.place for backend in found)
            if health is None or source is None or not found:
                continue
            checks[vip] = {
                "interval": str(health.interval),
                "timeout": str(health.timeout),
                "success_count": str(health.successes),
                "failure_count": str(health.failures),
            }
            for backend in found:
                key, at = (f"[{one}]" if one.version == 6 else str(one) for one in (backend.address, source))
                mappings[key] = f"{endpoint_port(backend.endpoint.endpoint_id)}:{at}"
    # Nobody is left alone: a connection to no backend is refused at once, and one to a backend that is gone is cut
    # (by itself before OVN 23.06).
    values: dict[str, object] = {
        "vips": vips,
        "protocol": protocol,
        "options": {"reject": "true", "ct_flush": "true"},
        # Not `affinity_timeout`: that loses the packet that each client's first connection begins with.
        "selection_fields": ["ip_src"] if balancer.affinity else [],
        "ip_port_mappings": mappings,
    }
    return values, checks


def _ensure_checks(txn: Txn, row: Row, wanted: Mapping[str, Mapping[str, str]]) -> None:
    missing = dict(wanted)
    for check in list(getattr(row, "health_check", ())):
        options = missing.pop(check.vip, None)
        if options is None:
            row.delvalue("health_check", check)
            txn.delete("Load_Balancer_Health_Check", check)
        else:
            txn.set(check, options=options)
    for vip, options in missing.items():
        row.addvalue("health_check", txn.insert("Load_Balancer_Health_Check", vip=vip, options=options))


def _hang(txn: Txn, parent: Row, wanted: Sequence[Row]) -> None:
    present = list(getattr(parent, "load_balancer", ()))
    uuids = {row.uuid for row in wanted}
    for row in present:
        if row.uuid not in uuids:
            parent.delvalue("load_balancer", row)
    for row in wanted:
        if row.uuid not in {one.uuid for one in present}:
            parent.addvalue("load_balancer", row)


def _exceptions(using: Iterable[str], ways: Iterable[Way], around: Around) -> dict[str, list[str]]:
    """What networks' address translation leaves alone, by the sets' names: the network itself, and ways' other ends."""
    found: dict[str, set[str]] = {}
    for network_id in using:
        for subnet in around.networks[network_id].subnets:
            found[_set_name(network_id, subnet.version)] = {str(subnet)}
    for way in ways:
        found.setdefault(_set_name(way.far, way.version), set()).update(map(str, way.addresses))
        found.setdefault(_set_name(way.home, way.version), set()).add(str(way.far_leg.subnet))
    return {name: sorted(addresses) for name, addresses in found.items()}


def _ensure_exceptions(txn: Txn, sets: Mapping[str, list[str]], around: Around) -> None:
    """Has the networks' address translation leave alone what goes to addresses in their sets."""
    for name, addresses in sets.items():
        txn.ensure("Address_Set", name, addresses=addresses)
    for network_id, network in around.networks.items():
        router = txn.find("Logical_Router", router_name(network_id))
        if router is None:
            continue
        subnets = {str(subnet): subnet.version for subnet in network.subnets}
        for nat in getattr(router, "nat", ()):
            if nat.type != "snat" or nat.logical_ip not in subnets:
                continue
            name = _set_name(network_id, subnets[nat.logical_ip])
            excepted = [txn.find("Address_Set", name)] if name in sets else []
            if [row.uuid for row in getattr(nat, "exempted_ext_ips", ())] != [row.uuid for row in excepted]:
                nat.exempted_ext_ips = excepted
    # Now that nothing refers to them.
    for row in list(txn.rows("Address_Set")):
        if row.name.startswith(SETS) and row.name not in sets:
            txn.delete("Address_Set", row)


def _set_name(network_id: str, version: int) -> str:
    """Its characters are those of OVN's expressions, which a network's id need not have."""
    return f"{SETS}{hashlib.sha256(network_id.encode()).hexdigest()[:20]}_{version}"


def _ensure_ways(txn: Txn, ways: Sequence[Way], around: Around) -> None:
    """Makes routes and rules be those that the ways need."""
    for network_id in around.networks:
        router = txn.find("Logical_Router", router_name(network_id))
        if router is not None:
            routes = [route for way in ways for route in way.routes(network_id)]
            _ensure_marked(txn, router, "static_routes", "Logical_Router_Static_Route", routes)
        switch = txn.find("Logical_Switch", switch_name(network_id))
        if switch is not None:
            acls = [acl for way in ways if way.far == network_id for acl in way.inside()]
            _ensure_marked(txn, switch, "acls", "ACL", acls)
    uplink = txn.find("Logical_Switch", UPLINK_SWITCH)
    if uplink is not None:
        _ensure_marked(txn, uplink, "acls", "ACL", [acl for way in ways for acl in way.outside()])


def _ensure_marked(txn: Txn, parent: Row, column: str, table: str, wanted: Iterable[Mapping[str, object]]) -> None:
    """Makes the rows of ours that the parent's column lists be those with these values."""
    missing: list[Mapping[str, object]] = []
    for values in wanted:
        if values not in missing:
            missing.append(values)
    for row in list(getattr(parent, column, ())):
        if BALANCER not in getattr(row, "external_ids", ()):
            continue
        same = next((v for v in missing if all(getattr(row, key) == value for key, value in v.items())), None)
        if same is None:
            parent.delvalue(column, row)
            txn.delete(table, row)
        else:
            missing.remove(same)
    for values in missing:
        parent.addvalue(column, txn.insert(table, external_ids={BALANCER: "way"}, **values))
