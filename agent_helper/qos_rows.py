"""What limits and marks are in OVN's northbound database: rows of QoS at the endpoint's switch (ovn-nb(5), QoS).

Each function is run in a transaction and makes the rows be as described, whatever was there. Where nothing is limited
or marked there are no such rows.
"""

from __future__ import annotations

from collections.abc import Iterable

from agent_helper.ovsdb import Row, Txn
from agent_helper.qos import QosRuleSpec
from agent_helper.spec import EndpointSpec

KEY = "taploom-qos"
_IN, _OUT = "in", "out"
_PRIORITY = 1000


def ensure_endpoints(txn: Txn, endpoints: Iterable[tuple[EndpointSpec, Row, str]]) -> None:
    """Makes the rows of these endpoints be as they say; those of others stay.

    Args:
        endpoints: each with the row of its switch and the name of its port.
    """
    known: dict[object, dict[str, Row]] = {}
    for spec, switch, port in endpoints:
        there = known.get(switch.uuid)
        if there is None:
            there = known[switch.uuid] = _rows_of(switch)
        wanted = {rule_key(spec.endpoint_id, rule.incoming): _values(spec, port, rule) for rule in spec.qos.rules}
        for incoming in (True, False):
            key = rule_key(spec.endpoint_id, incoming)
            row, values = there.get(key), wanted.get(key)
            if values is None:
                if row is not None:
                    _remove(txn, switch, row)
                    del there[key]
            elif row is None:
                there[key] = txn.insert("QoS", **{name: value for name, value in values.items() if value})
                switch.addvalue("qos_rules", there[key])
            else:
                txn.set(row, **values)


def remove_endpoint(txn: Txn, switch: Row, endpoint_id: str) -> None:
    """Removes the rows of an endpoint; nothing when there are none."""
    for row in list(getattr(switch, "qos_rules", ())):
        if endpoint_of(row)[0] == endpoint_id and not txn.is_deleted("QoS", row):
            _remove(txn, switch, row)


def remove_strangers(txn: Txn, switch: Row, endpoint_ids: Iterable[str]) -> None:
    """Removes from a switch all rows but those of these endpoints."""
    kept = set(endpoint_ids)
    for row in list(getattr(switch, "qos_rules", ())):
        if endpoint_of(row)[0] not in kept:
            _remove(txn, switch, row)


def limits_of(txn: Txn) -> dict[tuple[str, bool], str]:
    """The uuids of the rows that limit a rate, by endpoint and whether it is of what comes in."""
    return {endpoint_of(row): str(row.uuid) for row in txn.rows("QoS") if row.bandwidth and KEY in row.external_ids}


def rule_key(endpoint_id: str, incoming: bool) -> str:
    """What a row is known by."""
    return f"{_IN if incoming else _OUT}/{endpoint_id}"


def endpoint_of(row: Row) -> tuple[str, bool]:
    """Whose row it is, and whether it is of what comes in."""
    direction, _, endpoint_id = row.external_ids.get(KEY, "").partition("/")
    return endpoint_id, direction == _IN


def _rows_of(switch: Row) -> dict[str, Row]:
    return {row.external_ids.get(KEY, ""): row for row in getattr(switch, "qos_rules", ())}


def _remove(txn: Txn, switch: Row, row: Row) -> None:
    switch.delvalue("qos_rules", row)
    txn.delete("QoS", row)


def _values(spec: EndpointSpec, port: str, rule: QosRuleSpec) -> dict[str, object]:
    # ovn-controller makes a meter for each logical flow, so for each row: nobody shares what is said of an endpoint.
    return {
        "priority": _PRIORITY,
        "direction": "to-lport" if rule.incoming else "from-lport",
        "match": f'{"outport" if rule.incoming else "inport"} == "{port}"',
        "action": {} if rule.dscp is None else {"dscp": rule.dscp},
        "bandwidth": {"rate": rule.rate, "burst": rule.burst} if rule.rate else {},
        "external_ids": {KEY: rule_key(spec.endpoint_id, rule.incoming)},
    }
