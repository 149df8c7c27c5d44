"""What networks and endpoints are in OVN's northbound database (ovn-nb(5)). Each function is run in a transaction and
makes the rows be as described, whatever was there."""

from __future__ import annotations

from collections.abc import Iterable

from agent_helper.errors import UnavailableError
from agent_helper.ovsdb import Row, Txn
from agent_helper.spec import EndpointSpec, NetworkSpec
from agent_helper.stack import CHASSIS


def switch_name(network_id: str) -> str:
    return f"net-{network_id}"


def router_name(network_id: str) -> str:
    return f"gw-{network_id}"


def dns_port(network_id: str) -> str:
    return f"dns-{network_id}"


def endpoint_port(endpoint_id: str) -> str:
    return f"ep-{endpoint_id}"


def ensure_network(txn: Txn, spec: NetworkSpec) -> None:
    """The logical switch, its gateway router and the port of its DNS server."""
    switch, _ = txn.ensure("Logical_Switch", switch_name(spec.network_id))
    router, _ = txn.ensure("Logical_Router", router_name(spec.network_id), options={"chassis": CHASSIS})
    inside = f"gwp-{spec.network_id}"
    router_port, new = txn.ensure("Logical_Router_Port", inside, mac=spec.gateway_mac, networks=spec.gateway_interfaces)
    if new:
        router.addvalue("ports", router_port)
    _ensure_port(txn, switch, f"to-gw-{spec.network_id}", "router", ["router"], options={"router-port": inside})
    if spec.dns_servers:
        addresses = " ".join([spec.dns_mac, *map(str, spec.dns_servers)])
        _ensure_port(txn, switch, dns_port(spec.network_id), "localport", [addresses], security=[addresses])
    else:
        _remove_port(txn, switch, dns_port(spec.network_id))


def remove_network(txn: Txn, network_id: str) -> None:
    """The switch and the router with all their ports; nothing when they are not there."""
    for table, name in (
        ("Logical_Switch", switch_name(network_id)),
        ("Logical_Router", router_name(network_id)),
    ):
        row = txn.find(table, name)
        if row is not None:
            txn.delete(table, row)  # its ports are not roots: the server collects them


def ensure_endpoint(txn: Txn, spec: EndpointSpec) -> None:
    """The endpoint's port, which lets only its own MAC and IP addresses in."""
    switch = txn.find("Logical_Switch", switch_name(spec.network_id))
    if switch is None:
        raise UnavailableError(f"network {spec.network_id} is just being restored in OVN's database; try again")
    addresses = [spec.port_addresses]
    _ensure_port(txn, switch, endpoint_port(spec.endpoint_id), "", addresses, security=addresses)


def remove_endpoints(txn: Txn, ports: Iterable[tuple[str, str]]) -> None:
    """The ports of (network_id, endpoint_id); nothing for those that are not there."""
    for network_id, endpoint_id in ports:
        switch = txn.find("Logical_Switch", switch_name(network_id))
        if switch is not None:
            _remove_port(txn, switch, endpoint_port(endpoint_id))


def remove_strangers(txn: Txn, networks: Iterable[str], endpoints: Iterable[tuple[str, str]]) -> None:
    """All switches, routers and endpoints' ports but those of these networks and (network_id, endpoint_id)."""
    wanted = set(networks)
    keep = {switch_name(n) for n in wanted} | {router_name(n) for n in wanted}
    for table in ("Logical_Switch", "Logical_Router"):
        for row in txn.rows(table):
            if row.name not in keep:
                txn.delete(table, row)
    ports: dict[str, set[str]] = {}
    for network_id, endpoint_id in endpoints:
        ports.setdefault(switch_name(network_id), set()).add(endpoint_port(endpoint_id))
    for switch in txn.rows("Logical_Switch"):
        for port in switch.ports:
            if port.name.startswith("ep-") and port.name not in ports.get(switch.name, ()):
                switch.delvalue("ports", port)
                txn.delete("Logical_Switch_Port", port)


def _ensure_port(
    txn: Txn,
    switch: Row,
    name: str,
    kind: str,
    addresses: list[str],
    *,
    security: list[str] | None = None,
    options: dict[str, str] | None = None,
) -> None:
    port, new = txn.ensure(
        "Logical_Switch_Port",
        name,
        type=kind,
        addresses=addresses,
        port_security=security or [],
        options=options or {},
    )
    if new:
        switch.addvalue("ports", port)


def _remove_port(txn: Txn, switch: Row, name: str) -> None:
    port = txn.find("Logical_Switch_Port", name)
    if port is not None:
        switch.delvalue("ports", port)
        txn.delete("Logical_Switch_Port", port)
