"""What networks and endpoints are in OVN's northbound database (ovn-nb(5)). Each function is run in a transaction and
makes the rows be as described, whatever was there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from agent_helper import dhcp_rows, policy_rows, qos_rows
from agent_helper.daemons import CHASSIS
from agent_helper.errors import UnavailableError
from agent_helper.ovsdb import Row, Txn
from agent_helper.spec import EndpointSpec, Leg, NetworkSpec, UplinkSpec, legs

UPLINK_SWITCH = "uplink"
# In external_ids of rows that are load balancers' and not their network's: see `balancer_rows`.
BALANCER = "taploom-balancer"
KERNEL_PORT = "uplink-kernel"
# Routers speak with the kernel only. That each knows where every other one on the uplink is would be a flow for each
# pair of them and family, all of which ovn-northd goes through for each change (ovn-nb(5), "Logical_Router").
# Neither does one learn from what guests broadcast: it knows where they are from their ports, and what it learns has
# ovn-northd go through everything again.
_ROUTER = {"chassis": CHASSIS, "dynamic_neigh_routers": "true", "always_learn_from_arp_request": "false"}
_DEFAULT = {4: "0.0.0.0/0", 6: "::/0"}


def switch_name(network_id: str) -> str:
    return f"net-{network_id}"


def router_name(network_id: str) -> str:
    return f"gw-{network_id}"


def dns_port(network_id: str) -> str:
    return f"dns-{network_id}"


def gateway_port(network_id: str) -> str:
    return f"gwp-{network_id}"


def endpoint_port(endpoint_id: str) -> str:
    return f"ep-{endpoint_id}"


def uplink_port(network_id: str) -> str:
    """The port of the uplink's switch where a network's router is."""
    return f"to-up-{network_id}"


def vlan_port(network_id: str) -> str:
    """The port of a network's switch that leads to its VLAN."""
    return f"vlan-{network_id}"


def endpoint_id_of(port: str) -> str:
    """The endpoint whose port has this name."""
    return port.removeprefix("ep-")


def ensure_uplink(txn: Txn, uplink: UplinkSpec | None) -> None:
    """The switch on which the kernel and the networks' routers meet; without an uplink it is not there."""
    if uplink is None:
        switch = txn.find("Logical_Switch", UPLINK_SWITCH)
        if switch is not None:
            txn.delete("Logical_Switch", switch)
        return
    switch, _ = txn.ensure("Logical_Switch", UPLINK_SWITCH)
    addresses = [uplink.mac_address, *(str(a.ip) for a in uplink.addresses), *map(str, uplink.stand_ins)]
    _ensure_port(txn, switch, KERNEL_PORT, "", [" ".join(addresses)])
    # Routers speak with the kernel only. What is on its way from one to another has passed neither's rules.
    _ensure_rows(txn, switch, "acls", "ACL", _only_with(KERNEL_PORT))


def ensure_network(txn: Txn, spec: NetworkSpec, uplink: UplinkSpec | None) -> None:
    """The logical switch, its gateway router, the port of its DNS server and its way out."""
    switch, _ = txn.ensure("Logical_Switch", switch_name(spec.network_id))
    router, _ = txn.ensure("Logical_Router", router_name(spec.network_id), options=_ROUTER)
    _ensure_gateway(txn, switch, router, spec)
    dhcp_rows.update_network(txn, spec)
    if spec.dns_servers:
        addresses = " ".join([spec.dns_mac, *map(str, spec.dns_servers)])
        _ensure_port(txn, switch, dns_port(spec.network_id), "localport", [addresses], security=[addresses])
    else:
        _remove_port(txn, switch, dns_port(spec.network_id))
    _ensure_vlan(txn, switch, spec)
    _ensure_legs(txn, router, spec, legs(spec, uplink), uplink.mtu if uplink else 0)
    _ensure_isolation(txn, switch, router, spec)
    policy_rows.ensure_network(txn, spec, uplink)


def _ensure_gateway(txn: Txn, switch: Row, router: Row, spec: NetworkSpec) -> None:
    """The router's port on the switch; none where there is no gateway in any family."""
    inside, at_switch = gateway_port(spec.network_id), f"to-gw-{spec.network_id}"
    networks = spec.gateway_interfaces
    if not networks:
        _remove_port(txn, switch, at_switch)
        port = txn.find("Logical_Router_Port", inside)
        if port is not None:
            router.delvalue("ports", port)
            txn.delete("Logical_Router_Port", port)
        return
    router_port, new = txn.ensure("Logical_Router_Port", inside, mac=spec.gateway_mac, networks=networks)
    if new:
        router.addvalue("ports", router_port)
    _ensure_port(txn, switch, at_switch, "router", ["router"], options={"router-port": inside})


def _ensure_vlan(txn: Txn, switch: Row, spec: NetworkSpec) -> None:
    """The port of the physical network. Who is there is not known: the port is for all MAC addresses."""
    name = vlan_port(spec.network_id)
    if spec.vlan is None:
        _remove_port(txn, switch, name)
    else:
        options = {"network_name": spec.vlan.uplink}
        _ensure_port(txn, switch, name, "localnet", ["unknown"], options=options, tag=[spec.vlan.tag])


def _ensure_legs(txn: Txn, router: Row, spec: NetworkSpec, network_legs: tuple[Leg, ...], mtu: int) -> None:
    """The router's port on the uplink, its default routes and its address translation.

    - Connections to the outside leave with the router's address on the uplink, unless masquerading is off.
    - Connections that the kernel makes into the network come from the network's gateway, as docker-proxy's do.
    - What is for the gateway itself goes to the kernel, as for the stand-in. Echo requests do not get that far: the
      router answers them before it translates (ovn-northd(8), "Ingress Table 3: IP Input").
    - What is too large for the uplink is answered with the MTU that fits, but for TCP, whose segments may be on their
      way together; the kernel has told its peers what fits.
    """
    outside, at_switch = f"up-{spec.network_id}", uplink_port(spec.network_id)
    uplink = txn.find("Logical_Switch", UPLINK_SWITCH)
    routes: list[dict[str, object]] = []
    nat: list[dict[str, object]] = []
    if not network_legs or uplink is None:
        if uplink is not None:
            _remove_port(txn, uplink, at_switch)
        port = txn.find("Logical_Router_Port", outside)
        if port is not None:
            router.delvalue("ports", port)
            txn.delete("Logical_Router_Port", port)
    else:
        networks = [str(leg.address) for leg in network_legs]
        options = {"gateway_mtu": str(mtu), "gateway_mtu_bypass": "tcp"} if spec.mtu > mtu else {}
        port, new = txn.ensure("Logical_Router_Port", outside, mac=spec.uplink_mac, networks=networks, options=options)
        if new:
            router.addvalue("ports", port)
        _ensure_port(txn, uplink, at_switch, "router", ["router"], options={"router-port": outside})
        for leg in network_legs:
            routes.append({"ip_prefix": _DEFAULT[leg.subnet.version], "nexthop": str(leg.kernel)})
            if spec.masquerades(leg.subnet.version):
                nat.append({"type": "snat", "external_ip": str(leg.address.ip), "logical_ip": str(leg.subnet)})
            nat.append({"type": "snat", "external_ip": str(leg.gateway), "logical_ip": str(leg.kernel)})
            nat.append({"type": "dnat", "external_ip": str(leg.gateway), "logical_ip": str(leg.stand_in)})
    _ensure_rows(txn, router, "static_routes", "Logical_Router_Static_Route", routes)
    _ensure_rows(txn, router, "nat", "NAT", nat)


def _ensure_isolation(txn: Txn, switch: Row, router: Row, spec: NetworkSpec) -> None:
    """Endpoints that do not reach each other: neither on the switch nor by way of the router; a VLAN, which does not
    reach the DNS server."""
    acls: list[dict[str, object]] = []
    policies: list[dict[str, object]] = []
    way_out = f"to-gw-{spec.network_id}" if spec.vlan is None else vlan_port(spec.network_id)
    if spec.endpoints_isolated:
        acls = _only_with(way_out, *([dns_port(spec.network_id)] if spec.dns_servers else []))
    if spec.vlan is not None and spec.dns_servers:
        acls += [
            {"priority": 1002, "direction": "to-lport", "match": match, "action": "drop"}
            for one, other in ((way_out, dns_port(spec.network_id)), (dns_port(spec.network_id), way_out))
            for match in (f'inport == "{one}" && outport == "{other}"',)
        ]
    if spec.endpoints_isolated and spec.vlan is None:
        for subnet, gateway in zip(spec.subnets, spec.gateways, strict=True):
            ip = f"ip{subnet.version}"
            match = f'inport == "gwp-{spec.network_id}" && {ip}.dst == {subnet} && {ip}.src != {gateway}'
            policies.append({"priority": 1000, "match": match, "action": "drop"})
    _ensure_rows(txn, switch, "acls", "ACL", acls)
    _ensure_rows(txn, router, "policies", "Logical_Router_Policy", policies)


def _only_with(*ports: str) -> list[dict[str, object]]:
    """ACLs by which IP packets go only from and to these ports of a switch.

    ARP and neighbour discovery pass: OVN answers these itself, at the port that asks. (Expressions may say of a port
    only that it is this one, not that it is another: ovn-sb(5), "Logical_Flow".)
    """
    match = " || ".join(f'{side} == "{port}"' for side in ("inport", "outport") for port in ports)
    rules = (1001, match, "allow"), (1000, "ip", "drop")
    return [{"priority": p, "direction": "to-lport", "match": m, "action": a} for p, m, a in rules]


def remove_network(txn: Txn, network_id: str, uplink: UplinkSpec | None) -> None:
    """The switch and the router with all their ports; nothing when they are not there."""
    switch = txn.find("Logical_Switch", UPLINK_SWITCH)
    if switch is not None:
        _remove_port(txn, switch, uplink_port(network_id))
    for table, name in (
        ("Logical_Switch", switch_name(network_id)),
        ("Logical_Router", router_name(network_id)),
    ):
        row = txn.find(table, name)
        if row is not None:
            txn.delete(table, row)  # its ports are not roots: the server collects them
    dhcp_rows.remove_network(txn, network_id)
    policy_rows.ensure_addresses(txn, uplink)


def ensure_endpoint(txn: Txn, spec: EndpointSpec, network: NetworkSpec) -> tuple[Row, bool]:
    """The endpoint's port, which lets only its own MAC and IP addresses in; and whether it is new."""
    switch = txn.find("Logical_Switch", switch_name(spec.network_id))
    if switch is None:
        raise UnavailableError(f"network {spec.network_id} is just being restored in OVN's database; try again")
    addresses = [spec.port_addresses]
    carried: dict[str, Any] = {}
    if spec.child is not None:
        carried = {"parent_name": [endpoint_port(spec.child.parent_id)], "tag": [spec.child.tag]}
    name = endpoint_port(spec.endpoint_id)
    port, new = _ensure_port(txn, switch, name, "", addresses, security=addresses, **carried)
    if new:
        port.up = [False]  # what ovn-northd would write, and go through everything once more for
    dhcp_rows.ensure_endpoint(txn, spec, network, port, new=new)
    return port, new


def ensure_qos(txn: Txn, specs: Iterable[EndpointSpec]) -> None:
    """The limits and marks of endpoints whose ports are there."""
    found = []
    for spec in specs:
        switch = txn.find("Logical_Switch", switch_name(spec.network_id))
        if switch is not None and (spec.qos.rules or getattr(switch, "qos_rules", ())):
            found.append((spec, switch, endpoint_port(spec.endpoint_id)))
    qos_rows.ensure_endpoints(txn, found)


def remove_endpoints(txn: Txn, ports: Collection[tuple[str, str]]) -> None:
    """The ports of (network_id, endpoint_id); nothing for those that are not there."""
    for network_id, endpoint_id in ports:
        switch = txn.find("Logical_Switch", switch_name(network_id))
        if switch is not None:
            _remove_port(txn, switch, endpoint_port(endpoint_id))
            qos_rows.remove_endpoint(txn, switch, endpoint_id)
    dhcp_rows.remove_unused(txn)
    policy_rows.remove_unused(txn, {network_id for network_id, _ in ports})


def remove_strangers(txn: Txn, networks: Iterable[str], endpoints: Iterable[tuple[str, str]]) -> None:
    """All switches, routers and endpoints' ports, with what is for DHCP, but those of these networks and (network_id,
    endpoint_id).

    The uplink's switch stays; of its ports, those of these networks.
    """
    wanted = set(networks)
    keep = {UPLINK_SWITCH} | {switch_name(n) for n in wanted} | {router_name(n) for n in wanted}
    for table in ("Logical_Switch", "Logical_Router"):
        for row in txn.rows(table):
            if row.name not in keep:
                txn.delete(table, row)
    ports: dict[str, set[str]] = {}
    ids: dict[str, set[str]] = {}
    for network_id, endpoint_id in endpoints:
        ports.setdefault(switch_name(network_id), set()).add(endpoint_port(endpoint_id))
        ids.setdefault(switch_name(network_id), set()).add(endpoint_id)
    ports[UPLINK_SWITCH] = {KERNEL_PORT} | {f"to-up-{n}" for n in wanted}
    for switch in txn.rows("Logical_Switch"):
        for port in switch.ports:
            ours = port.name.startswith("ep-") or switch.name == UPLINK_SWITCH
            if ours and port.name not in ports.get(switch.name, ()):
                switch.delvalue("ports", port)
                txn.delete("Logical_Switch_Port", port)
        qos_rows.remove_strangers(txn, switch, ids.get(switch.name, ()))
    dhcp_rows.remove_unused(txn)


def _ensure_port(
    txn: Txn,
    switch: Row,
    name: str,
    kind: str,
    addresses: list[str],
    *,
    security: list[str] | None = None,
    options: dict[str, str] | None = None,
    **others: object,
) -> tuple[Row, bool]:
    port, new = txn.ensure(
        "Logical_Switch_Port",
        name,
        type=kind,
        addresses=addresses,
        port_security=security or [],
        options=options or {},
        **others,
    )
    if new:
        switch.addvalue("ports", port)
    return port, new


def _ensure_rows(txn: Txn, parent: Row, column: str, table: str, wanted: Iterable[Mapping[str, object]]) -> None:
    """Makes the rows that the parent's column lists be those with these values, apart from load balancers'."""
    missing = list(wanted)
    for row in list(getattr(parent, column, ())):  # a row just inserted has no columns but those set
        if BALANCER in getattr(row, "external_ids", ()):
            continue
        values = next((v for v in missing if all(getattr(row, key) == value for key, value in v.items())), None)
        if values is None:
            parent.delvalue(column, row)
            txn.delete(table, row)
        else:
            missing.remove(values)
    for values in missing:
        parent.addvalue(column, txn.insert(table, **values))


def _remove_port(txn: Txn, switch: Row, name: str) -> None:
    port = txn.find("Logical_Switch_Port", name)
    if port is not None:
        switch.delvalue("ports", port)
        txn.delete("Logical_Switch_Port", port)
