"""What DHCP and router advertisements are in OVN's northbound database (ovn-nb(5), DHCP_Options and ipv6_ra_configs).

Each function is run in a transaction and makes the rows be as described, whatever was there. A network has its rows,
one per family, while an endpoint of it is given its addresses by DHCP; without one there are none. OVN answers with the
addresses of the port that asks, by flows of that port.
"""

from __future__ import annotations

from agent_helper.ovsdb import Row, Txn
from agent_helper.spec import Address, EndpointSpec, NetworkSpec
from taploom.contracts.taploom.helper.v1 import RouterAdvertisementMode, RouterPreference

NETWORK_KEY, FAMILY_KEY = "taploom-network", "taploom-family"
_TABLE = "DHCP_Options"
_COLUMNS = {4: "dhcpv4_options", 6: "dhcpv6_options"}
_ADDRESS_MODES = {
    RouterAdvertisementMode.SLAAC: "slaac",
    RouterAdvertisementMode.STATELESS: "dhcpv6_stateless",
    RouterAdvertisementMode.STATEFUL: "dhcpv6_stateful",
}
_PREFERENCES = {RouterPreference.LOW: "LOW", RouterPreference.UNSPECIFIED: "MEDIUM", RouterPreference.HIGH: "HIGH"}
_LEAST_MTU = 1280  # OVN leaves a smaller one out


def ensure_endpoint(txn: Txn, spec: EndpointSpec, network: NetworkSpec, port: Row, *, new: bool) -> None:
    """Has the port answered, or not, as the endpoint says, with the rows that this needs."""
    if not spec.dhcp:
        if new:
            return
        left = False
        for column in _COLUMNS.values():
            if getattr(port, column):
                setattr(port, column, [])
                left = True
        if left:
            remove_unused(txn)
        return
    rows = _rows(txn, network.network_id)
    for version, column in _COLUMNS.items():
        values: list[Row] = []
        if network.subnet(version) is not None and any(address.version == version for address in spec.addresses):
            row = rows.get(version)
            if row is None:
                row = txn.insert(_TABLE, **_values(network, version))
            values = [row]
        if not new:
            txn.set(port, **{column: values})
        elif values:
            setattr(port, column, values)
    _ensure_advertisements(txn, network, by_dhcp=True)


def update_network(txn: Txn, network: NetworkSpec) -> None:
    """Makes what is there for the network already be as it is described now, and the gateway say what it is to say."""
    rows = _rows(txn, network.network_id)
    for version, row in rows.items():
        if network.subnet(version) is not None:
            txn.set(row, **_values(network, version))
    _ensure_advertisements(txn, network, by_dhcp=bool(rows))


def remove_network(txn: Txn, network_id: str) -> None:
    """Removes the network's rows."""
    for row in _rows(txn, network_id).values():
        txn.delete(_TABLE, row)


def remove_unused(txn: Txn) -> None:
    """Removes the rows that no port needs any more, and what gateways said because of them."""
    present = [row for row in txn.rows(_TABLE) if NETWORK_KEY in getattr(row, "external_ids", {})]
    if not present:
        return
    used: set[object] = set()
    for switch in txn.rows("Logical_Switch"):
        # A switch's ports, not the table's: those of a switch that goes are not roots.
        for port in getattr(switch, "ports", ()):
            if not txn.is_deleted("Logical_Switch_Port", port):
                used |= {row.uuid for column in _COLUMNS.values() for row in getattr(port, column, ())}
    idle: set[str] = set()
    for row in present:
        if row.uuid not in used:
            idle.add(row.external_ids[NETWORK_KEY])
            txn.delete(_TABLE, row)
    for network_id in idle:
        port = txn.find("Logical_Router_Port", f"gwp-{network_id}")
        # A mode that was asked for stays.
        if port is not None and port.external_ids.get(_BY_DHCP) and not _rows(txn, network_id):
            txn.set(port, ipv6_ra_configs={}, external_ids={})


_BY_DHCP = "taploom-by-dhcp"


def _rows(txn: Txn, network_id: str) -> dict[int, Row]:
    """The network's rows by family."""
    found: dict[int, Row] = {}
    for row in txn.rows(_TABLE):
        ids = getattr(row, "external_ids", {})
        if ids.get(NETWORK_KEY) == network_id:
            found[int(ids[FAMILY_KEY])] = row
    return found


def _values(network: NetworkSpec, version: int) -> dict[str, object]:
    options = _options_v4(network) if version == 4 else _options_v6(network)
    return {
        "cidr": str(network.subnet(version)),
        "options": options,
        "external_ids": {NETWORK_KEY: network.network_id, FAMILY_KEY: str(version)},
    }


def _options_v4(network: NetworkSpec) -> dict[str, str]:
    """An answer of DHCPv4. The server is the gateway, which nobody else can be; where there is none, its address still.

    A client that knows classless routes looks at no others (RFC 3442), so the default route is among them. The
    network's DNS server is on the link and in no subnet: it has a route of its own.
    """
    gateway = network.gateway(4)
    server = next(address for address in network.gateways if address.version == 4)
    options = {
        "server_id": str(server),
        "server_mac": network.gateway_mac,
        "lease_time": str(network.dhcp.lease),
        "mtu": str(network.mtu),
        "domain_name": _quoted(network.dhcp.domain or network.name),
    }
    servers = _dns_servers(network, 4)
    if servers:
        options["dns_server"] = _set(servers)
    routes = [f"{address}/32,0.0.0.0" for address in servers if address in network.dns_servers]
    if gateway is not None and not network.internal:
        options["router"] = str(gateway)
        routes.append(f"0.0.0.0/0,{gateway}")
    if routes:
        options["classless_static_route"] = "{" + ", ".join(routes) + "}"
    return options


def _options_v6(network: NetworkSpec) -> dict[str, str]:
    """An answer of DHCPv6; who the router is, clients learn from its advertisements."""
    options = {
        "server_id": network.gateway_mac,
        "domain_search": _quoted(network.dhcp.domain or network.name),
    }
    servers = _dns_servers(network, 6)
    if servers:
        options["dns_server"] = _set(servers)
    if network.router.mode == RouterAdvertisementMode.STATELESS:
        options["dhcpv6_stateless"] = "true"
    return options


def _dns_servers(network: NetworkSpec, version: int) -> list[Address]:
    found = network.dhcp.dns_servers or network.dns_servers
    return [address for address in found if address.version == version]


def _set(addresses: list[Address]) -> str:
    return str(addresses[0]) if len(addresses) == 1 else "{" + ", ".join(map(str, addresses)) + "}"


def _quoted(text: str) -> str:
    """As OVN's options of type str want it; without the quotes it ignores the option, or all of them."""
    return f'"{text}"'


def _ensure_advertisements(txn: Txn, network: NetworkSpec, *, by_dhcp: bool) -> None:
    port = txn.find("Logical_Router_Port", f"gwp-{network.network_id}")
    if port is None:
        return
    mode, derived = network.router.mode, False
    if mode == RouterAdvertisementMode.UNSPECIFIED and by_dhcp:
        mode, derived = RouterAdvertisementMode.STATEFUL, True
    configs: dict[str, str] = {}
    if network.gateway(6) is not None and mode in _ADDRESS_MODES:
        configs = _advertisements(network, _ADDRESS_MODES[mode])
    wanted = {"ipv6_ra_configs": configs, "external_ids": {_BY_DHCP: "true"} if derived and configs else {}}
    if hasattr(port, "ipv6_ra_configs"):
        txn.set(port, **wanted)
    else:  # just inserted
        for column, value in wanted.items():
            if value:
                setattr(port, column, value)


def _advertisements(network: NetworkSpec, address_mode: str) -> dict[str, str]:
    router = network.router
    configs = {"address_mode": address_mode, "router_preference": _PREFERENCES[router.preference]}
    if network.mtu >= _LEAST_MTU:
        configs["mtu"] = str(network.mtu)
    if router.interval:
        configs |= {"send_periodic": "true", "max_interval": str(router.interval)}
        # OVN's least is 3 s, and at most three quarters of the other (RFC 4861, 6.2.1).
        configs["min_interval"] = str(max(3, router.interval // 3))
    if router.dns_server is not None:
        configs["rdnss"] = str(router.dns_server)
    if router.domain:
        configs["dnssl"] = router.domain
    return configs
