"""What the health checks of load balancers' backends say: rows of Service_Monitor (ovn-sb(5)), which ovn-northd makes
and ovn-controller keeps."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from agent_helper.balancer import TCP, Around, BalancerSpec, backends_of
from agent_helper.northbound import endpoint_id_of, endpoint_port
from agent_helper.ovsdb import Values
from taploom.contracts.taploom.helper.v1 import BackendChanged, BackendHealth, BackendStatus, BalancerProtocol

_HEALTH = {"online": BackendHealth.UP, "offline": BackendHealth.DOWN, "error": BackendHealth.DOWN}


def backend_statuses(
    balancers: Iterable[BalancerSpec], around: Around, monitors: Iterable[Values]
) -> list[BackendStatus]:
    """The backends that there are, each once for each port and address, in order."""
    health = {
        (row["logical_port"], ipaddress.ip_address(row["ip"]), row["port"], _one(row["protocol"])): _of(row)
        for row in monitors
    }
    found: dict[tuple[object, ...], BackendStatus] = {}
    for balancer in sorted(balancers, key=lambda one: one.balancer_id):
        for port in balancer.ports:
            for version in (4, 6):
                for backend in backends_of(balancer, port.target, version, around):
                    endpoint_id = backend.endpoint.endpoint_id
                    place = (endpoint_port(endpoint_id), backend.address, backend.target, port.protocol)
                    key = (balancer.balancer_id, endpoint_id, version, backend.target, port.protocol)
                    found[key] = BackendStatus(
                        balancer_id=balancer.balancer_id,
                        endpoint_id=endpoint_id,
                        protocol=protocol_message(port.protocol),
                        address=str(backend.address),
                        target_port=backend.target,
                        health=health.get(place, BackendHealth.UNSPECIFIED)
                        if balancer.health is not None
                        else BackendHealth.UNSPECIFIED,
                    )
    return [found[key] for key in sorted(found, key=str)]


def backend_changed(row: Values) -> BackendChanged | None:
    """What a row's change says of a backend; None: nothing that anybody knows yet."""
    health = _of(row)
    if health is BackendHealth.UNSPECIFIED:
        return None
    return BackendChanged(
        endpoint_id=endpoint_id_of(row["logical_port"]),
        protocol=protocol_message(_one(row["protocol"])),
        address=str(ipaddress.ip_address(row["ip"])),
        target_port=row["port"],
        health=health,
    )


def protocol_message(protocol: str) -> BalancerProtocol:
    """A protocol as the contract has it."""
    return BalancerProtocol.TCP if protocol == TCP else BalancerProtocol.UDP


def _of(row: Values) -> BackendHealth:
    return _HEALTH.get(_one(row["status"]), BackendHealth.UNSPECIFIED)


def _one(value: object) -> str:
    """An optional column: the library gives a list of at most one."""
    if isinstance(value, (list, tuple)):
        return str(value[0]) if value else ""
    return str(value)
