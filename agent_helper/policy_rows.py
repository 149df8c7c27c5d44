"""What policies are in OVN's northbound database: a port group for each group, its ACLs, and sets of addresses.

Each function is run in a transaction and makes the rows be as described, whatever was there. While no policy is in use
there are no such rows: a switch whose ports have no ACL does without connection tracking.

Those to whom something is denied are in a group of their network, by direction, whose ACLs speak of that network's
addresses only. With one such group for all networks, each network would have flows for every other one's addresses, and
ovn-controller would make those of all networks anew for each endpoint that comes to one of them.

Of the ACLs that match a packet, OVN goes by the one with the highest priority (ovn-nb(5), ACL):

    30000         out: DHCP, questions to the network's DNS server, pings of the gateway, answers to health checks
    4000 to 6001  rules: twice the rule's priority, and one more for those that do not allow, so that these win
    3000          in: connections from the gateway, which are those to published ports
    2000          the rest, where it is denied
    1000          out: what would pass anyway, where nothing else asks for answers to come in

Neighbour discovery and, for it is no IP, ARP pass in any case (ovn-northd(8), "from-lport ACL evaluation").
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from agent_helper.ovsdb import Row, Txn
from agent_helper.policy import PolicySpec, RuleSpec
from agent_helper.spec import Address, EndpointSpec, NetworkSpec, UplinkSpec
from taploom.contracts.taploom.helper.v1 import PolicyAction, PolicyProtocol

_DENY_IN, _DENY_OUT = "tl_deny_in_", "tl_deny_out_"
_GROUP = "tlg_"
_GATEWAYS, _HOSTS = "tl_gateways", "tl_hosts"
_METER = "tl_log"
RULE_KEY = "taploom-rule"

_ESSENTIAL = 30000
_FIRST_RULE = 4000
_GATEWAY = 3000
_REST = 2000
_ANSWERS = 1000
# Log lines per second of one rule: what a person can still make use of.
_LOG_RATE = 20

_ACTIONS = {PolicyAction.ALLOW: "allow-related", PolicyAction.DROP: "drop", PolicyAction.REJECT: "reject"}
_PROTOCOLS = {
    PolicyProtocol.UNSPECIFIED: "ip",
    PolicyProtocol.TCP: "tcp",
    PolicyProtocol.UDP: "udp",
    PolicyProtocol.ICMP: "icmp4",
    PolicyProtocol.ICMPV6: "icmp6",
}


class Port(NamedTuple):
    """An endpoint's port.

    Attributes:
        row: of Logical_Switch_Port.
        new: whether it was made in this transaction.
    """

    spec: EndpointSpec
    network: NetworkSpec
    row: Row
    new: bool = False


def group_name(group_id: str) -> str:
    """The name of a group's port group; OVN adds _ip4 and _ip6 for the sets of its ports' addresses."""
    return f"{_GROUP}{group_id}"


def ensure_policy(txn: Txn, policy: PolicySpec, ports: Iterable[Port], uplink: UplinkSpec | None) -> None:
    """Makes all groups, rules and memberships be these.

    Args:
        ports: of all endpoints that have one.
    """
    members: dict[str, list[Row]] = {group_name(group_id): [] for group_id in policy.groups}
    rules: dict[str, list[dict[str, object]]] = {name: [] for name in members}
    for port in ports:
        for name in _groups(port.spec):
            if name in members:
                members[name].append(port.row)
        for name in _denials(port.spec):
            members.setdefault(name, []).append(port.row)
            if name not in rules:
                rules[name] = denial(name, port.network)
    for rule in policy.rules:
        rules[group_name(rule.group_id)].append(_acl(rule))
    for row in list(txn.rows("Port_Group")):
        if row.name not in members:
            txn.delete("Port_Group", row)  # its ACLs are no roots: the server collects them
    _ensure_meter(txn, any(rule.log for rule in policy.rules))
    for name, rows in members.items():
        row, new = txn.ensure("Port_Group", name)
        if new:
            row.ports = rows
        else:
            txn.set(row, ports=rows)
        _ensure_acls(txn, row, rules[name], new=new)
    ensure_addresses(txn, uplink)


def ensure_members(txn: Txn, ports: Sequence[Port], uplink: UplinkSpec | None) -> None:
    """Puts endpoints' ports in the groups that they are to be in, of those that there are, and in no others."""
    joined: dict[object, set[str]] = {}
    if not all(port.new for port in ports):
        for group in txn.rows("Port_Group"):
            for row in getattr(group, "ports", ()):
                joined.setdefault(row.uuid, set()).add(group.name)
    left = False
    for port in ports:
        denials, present = _denials(port.spec), joined.get(port.row.uuid, set())
        wanted = _groups(port.spec) | denials
        for name in present - wanted:
            txn.find("Port_Group", name).delvalue("ports", port.row)
            left = True
        for name in wanted - present:
            group = txn.find("Port_Group", name)
            if group is not None:
                group.addvalue("ports", port.row)
            elif name in denials:
                group = txn.insert("Port_Group", name=name, ports=[port.row])
                _ensure_acls(txn, group, denial(name, port.network), new=True)
                ensure_addresses(txn, uplink)
    if left:
        remove_unused(txn, {port.spec.network_id for port in ports})


def ensure_network(txn: Txn, spec: NetworkSpec, uplink: UplinkSpec | None) -> None:
    """Makes what speaks of a network's addresses be right, of what there is."""
    for name in denial_groups(spec.network_id):
        group = txn.find("Port_Group", name)
        if group is not None:
            _ensure_acls(txn, group, denial(name, spec), new=False)
    ensure_addresses(txn, uplink)


def remove_unused(txn: Txn, network_ids: Iterable[str]) -> None:
    """Removes what denies on these networks when nobody is left there to whom it does."""
    for network_id in network_ids:
        for name in denial_groups(network_id):
            row = txn.find("Port_Group", name)
            if row is not None and all(txn.is_deleted("Logical_Switch_Port", port) for port in row.ports):
                txn.delete("Port_Group", row)
    if not any(True for _ in txn.rows("Port_Group")):
        _remove_addresses(txn)


def _remove_addresses(txn: Txn) -> None:
    for row in list(txn.rows("Address_Set")):
        if row.name.startswith((_GATEWAYS, _HOSTS)):
            txn.delete("Address_Set", row)


def ensure_addresses(txn: Txn, uplink: UplinkSpec | None) -> None:
    """Makes the sets of addresses be those of the networks that the database has; none while no group needs them."""
    if not any(True for _ in txn.rows("Port_Group")):
        _remove_addresses(txn)
        return
    gateways: set[str] = set()
    for router in txn.rows("Logical_Router"):
        for port in getattr(router, "ports", ()):
            if port.name.startswith("gwp-"):
                gateways |= {text.partition("/")[0] for text in port.networks}
    hosts = gateways | {str(address) for address in uplink.host_addresses} if uplink else gateways
    for name, addresses in ((_GATEWAYS, gateways), (_HOSTS, hosts)):
        for family in ("4", "6"):
            found = sorted(address for address in addresses if (":" in address) == (family == "6"))
            txn.ensure("Address_Set", f"{name}_{family}", addresses=found)


def rules_of(txn: Txn) -> dict[str, str]:
    """The uuids of the rules' ACLs, by the rules' ids."""
    return {row.external_ids[RULE_KEY]: str(row.uuid) for row in txn.rows("ACL") if RULE_KEY in row.external_ids}


def _groups(spec: EndpointSpec) -> set[str]:
    return {group_name(group_id) for group_id in spec.policy.groups}


def _denials(spec: EndpointSpec) -> set[str]:
    incoming, outgoing = denial_groups(spec.network_id)
    return ({incoming} if spec.policy.deny_in else set()) | ({outgoing} if spec.policy.deny_out else set())


def denial_groups(network_id: str) -> tuple[str, str]:
    """The groups of those on a network to whom something is denied: coming in, and going out."""
    # No hyphen may be in a port group's name; two networks have different ones in any case.
    suffix = network_id.replace("_", "__").replace("-", "_.")
    return _DENY_IN + suffix, _DENY_OUT + suffix


def _ensure_meter(txn: Txn, wanted: bool) -> None:
    row = txn.find("Meter", _METER)
    if wanted and row is None:
        band = txn.insert("Meter_Band", action="drop", rate=_LOG_RATE, burst_size=_LOG_RATE)
        # Fair: each ACL has its own allowance.
        txn.insert("Meter", name=_METER, unit="pktps", bands=[band], fair=True)
    elif row is not None and not wanted:
        txn.delete("Meter", row)


def _ensure_acls(txn: Txn, group: Row, wanted: Iterable[Mapping[str, object]], *, new: bool) -> None:
    inserted: list[Row] = []
    there = {} if new else {row.external_ids.get(RULE_KEY, row.name): row for row in group.acls}
    for values in wanted:
        key = _key(values)
        row = there.pop(key, None)
        if row is None:
            # Each column costs; what is empty needs not be said.
            inserted.append(txn.insert("ACL", **{name: value for name, value in values.items() if value or value == 0}))
        else:
            txn.set(row, **values)
    if new:
        group.acls = inserted
    else:
        for row in inserted:
            group.addvalue("acls", row)
    for row in there.values():
        group.delvalue("acls", row)
        txn.delete("ACL", row)


def _key(values: Mapping[str, object]) -> object:
    ids = values["external_ids"]
    assert isinstance(ids, dict)
    return ids[RULE_KEY]


def _acl(rule: RuleSpec) -> dict[str, object]:
    priority = _FIRST_RULE + 2 * rule.priority + (rule.action != PolicyAction.ALLOW)
    values = _values(rule.rule_id, priority, rule.incoming, match_of(rule), _ACTIONS[rule.action])
    values["name"] = rule.name
    if rule.log:
        values |= {"log": True, "severity": "info", "meter": _METER}
    return values


def _values(key: str, priority: int, incoming: bool, match: str, action: str) -> dict[str, object]:
    return {
        "priority": priority,
        "direction": "to-lport" if incoming else "from-lport",
        "match": match,
        "action": action,
        "name": [],
        "log": False,
        "severity": [],
        "meter": [],
        # What goes out is looked at once a load balancer has chosen who gets it: rules are about guests.
        "options": {} if incoming else {"apply-after-lb": "true"},
        "external_ids": {RULE_KEY: key},
    }


def match_of(rule: RuleSpec) -> str:
    """The packets that a rule is about, in OVN's language (ovn-sb(5), "Logical_Flow", expressions)."""
    port, side = ("outport", "src") if rule.incoming else ("inport", "dst")
    protocol = _PROTOCOLS[rule.protocol]
    parts = [f"{port} == @{group_name(rule.group_id)}", protocol]
    if rule.ports:
        single = [str(first) for first, last in rule.ports if first == last]
        ranges = [(first, last) for first, last in rule.ports if first != last]
        terms = [f"{protocol}.dst == {{{', '.join(single)}}}"] if single else []
        terms += [f"({protocol}.dst >= {first} && {protocol}.dst <= {last})" for first, last in ranges]
        parts.append(_any(terms))
    if rule.cidrs or rule.groups or rule.host:
        terms = []
        for family in (4, 6):
            values = [str(cidr) for cidr in rule.cidrs if cidr.version == family]
            values += [f"${group_name(group_id)}_ip{family}" for group_id in rule.groups]
            values += [f"${_GATEWAYS if rule.incoming else _HOSTS}_{family}"] if rule.host else []
            if values:
                terms.append(f"ip{family}.{side} == {{{', '.join(values)}}}")
        parts.append(_any(terms))
    return " && ".join(parts)


def _any(terms: list[str]) -> str:
    return terms[0] if len(terms) == 1 else f"({' || '.join(terms)})"


def denial(group: str, network: NetworkSpec) -> list[dict[str, object]]:
    """What holds on a network for everybody to whom something is denied in one direction, whatever the rules.

    Args:
        group: of `denial_groups`.
    """
    gateways = [ipaddress.ip_interface(text).ip for text in network.gateway_interfaces]
    if group.startswith(_DENY_IN):
        to = f"outport == @{group}"
        acls = [_values("rest-in", _REST, True, f"{to} && ip", "drop")]
        if gateways:
            acls.append(_values("gateway", _GATEWAY, True, f"{to} && {_is('src', gateways)}", "allow-related"))
        else:
            # A switch keeps track of connections, and lets answers in, where one of its ACLs says allow-related.
            acls.append(_values("answers", _ANSWERS, False, f"inport == @{group} && ip", "allow-related"))
        return acls

    def essential(key: str, match: str) -> dict[str, object]:
        return _values(key, _ESSENTIAL, False, f"inport == @{group} && {match}", "allow-related")

    acls = [
        essential("dhcp", "((ip4 && udp.src == 68 && udp.dst == 67) || (ip6 && udp.src == 546 && udp.dst == 547))"),
        # Answers to load balancers' health checks; OVN knows their MAC address by that name.
        essential("checks", "eth.dst == $svc_monitor_mac"),
        _values("rest-out", _REST, False, f"inport == @{group} && ip", "drop"),
    ]
    if network.dns_servers:
        servers = _is("dst", network.dns_servers)
        acls.append(essential("dns", f"(udp.dst == 53 || tcp.dst == 53) && {servers}"))
    if gateways:
        acls.append(essential("ping", f"(icmp4.type == 8 || icmp6.type == 128) && {_is('dst', gateways)}"))
    return acls


def _is(side: str, addresses: Iterable[Address]) -> str:
    """Packets from ("src") or to ("dst") one of the addresses."""
    terms = []
    for family in (4, 6):
        values = [str(address) for address in addresses if address.version == family]
        if values:
            terms.append(f"ip{family}.{side} == {{{', '.join(values)}}}")
    return _any(terms)
