"""Descriptions of load balancers, checked."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from agent_helper.errors import InvalidSpecError
from agent_helper.ids import check_id
from agent_helper.spec import Address, EndpointSpec, NetworkSpec, UplinkSpec
from taploom.contracts.taploom.helper.v1 import Balancer, BalancerHealthCheck, BalancerPort, BalancerProtocol, Balancers

TCP, UDP = "tcp", "udp"
_PROTOCOLS = {BalancerProtocol.TCP: TCP, BalancerProtocol.UDP: UDP}
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,63}(\.[a-zA-Z0-9_-]{1,63})*", re.ASCII)
# ovn-nb(5): the rows' options take more, but nobody waits that long.
_MAX_SECONDS = 86_400


@dataclass(frozen=True)
class PortSpec:
    """A port that is connected to, and where backends listen."""

    protocol: str
    port: int
    target: int


@dataclass(frozen=True)
class FrontendSpec:
    """Where a load balancer is reached."""

    network_id: str
    addresses: tuple[Address, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class HealthSpec:
    """How backends are checked; times are in seconds."""

    interval: int
    timeout: int
    failures: int
    successes: int
    sources: tuple[Address, ...]


@dataclass(frozen=True)
class BalancerSpec:
    """A load balancer. `backends` are endpoints' ids and the port that they listen at instead, or 0."""

    balancer_id: str
    network_id: str
    frontends: tuple[FrontendSpec, ...]
    ports: tuple[PortSpec, ...]
    backends: tuple[tuple[str, int], ...]
    affinity: bool
    health: HealthSpec | None


@dataclass(frozen=True)
class Backend:
    """A backend of one port and family."""

    endpoint: EndpointSpec
    address: Address
    target: int

    @property
    def place(self) -> str:
        return socket_text(self.address, self.target)


@dataclass(frozen=True)
class Around:
    """What load balancers are made in: what the helper has now, by id."""

    networks: Mapping[str, NetworkSpec]
    endpoints: Mapping[str, EndpointSpec]
    uplink: UplinkSpec | None


def backends_of(balancer: BalancerSpec, target: int, version: int, around: Around) -> list[Backend]:
    """Those of its backends that there are in a family, for a port."""
    found: list[Backend] = []
    for endpoint_id, own in balancer.backends:
        endpoint = around.endpoints.get(endpoint_id)
        if endpoint is None or endpoint.disabled or endpoint.network_id != balancer.network_id:
            continue
        found += [
            Backend(endpoint, address, own or target) for address in endpoint.addresses if address.version == version
        ]
    return found


def socket_text(address: Address, port: int) -> str:
    """An address and a port as OVN has them: `10.0.0.1:80`, `[fd00::1]:80`."""
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def parse_balancers(message: Balancers | None) -> tuple[BalancerSpec, ...]:
    """Checks load balancers.

    Raises:
        InvalidSpecError: says which one is wrong and what it must be.
    """
    found: dict[str, BalancerSpec] = {}
    taken: dict[tuple[str, Address], str] = {}
    for one in message.balancers if message is not None else ():
        spec = _balancer(one)
        if spec.balancer_id in found:
            raise InvalidSpecError(f"balancer {spec.balancer_id} is described twice")
        found[spec.balancer_id] = spec
        for frontend in spec.frontends:
            for address in frontend.addresses:
                holder = taken.setdefault((frontend.network_id, address), spec.balancer_id)
                if holder != spec.balancer_id:
                    raise InvalidSpecError(f"balancer {spec.balancer_id}: {address} is balancer {holder}'s")
    return tuple(found.values())


def _balancer(message: Balancer) -> BalancerSpec:
    balancer_id = check_id("balancer_id", message.balancer_id)
    try:
        frontends = tuple(
            FrontendSpec(
                check_id("network_id", one.network_id),
                _addresses("addresses", one.addresses),
                tuple(_name(name) for name in one.names),
            )
            for one in message.frontends
        )
        if len({frontend.network_id for frontend in frontends}) < len(frontends):
            raise InvalidSpecError("frontends must be at most one per network")
        ports = tuple(_port(port) for port in message.ports)
        if len({(port.protocol, port.port) for port in ports}) < len(ports):
            raise InvalidSpecError("ports must be different ones")
        backends = {check_id("endpoint_id", one.endpoint_id): _number(one.target_port, 0) for one in message.backends}
        return BalancerSpec(
            balancer_id,
            check_id("network_id", message.network_id),
            frontends,
            ports,
            tuple(sorted(backends.items())),
            message.affinity,
            None if message.health_check is None else _health(message.health_check),
        )
    except InvalidSpecError as exc:
        raise InvalidSpecError(f"balancer {balancer_id}: {exc.message}") from exc


def _port(message: BalancerPort) -> PortSpec:
    protocol = _PROTOCOLS.get(message.protocol)
    if protocol is None:
        raise InvalidSpecError(f"protocol {int(message.protocol)} is not known")
    return PortSpec(protocol, _number(message.port, 1), _number(message.target_port, 1))


def _number(value: int, least: int) -> int:
    if not least <= value <= 65535:
        raise InvalidSpecError(f"port {value} must be {least} to 65535")
    return value


def _seconds(what: str, value: int) -> int:
    if not 1 <= value <= _MAX_SECONDS:
        raise InvalidSpecError(f"{what} {value} must be 1 to {_MAX_SECONDS}")
    return value


def _health(message: BalancerHealthCheck) -> HealthSpec:
    for what, value in (("failures", message.failures), ("successes", message.successes)):
        if not 1 <= value <= 1000:
            raise InvalidSpecError(f"{what} {value} must be 1 to 1000")
    return HealthSpec(
        _seconds("interval_seconds", message.interval_seconds),
        _seconds("timeout_seconds", message.timeout_seconds),
        message.failures,
        message.successes,
        _addresses("source_addresses", message.source_addresses),
    )


def _addresses(what: str, texts: Iterable[str]) -> tuple[Address, ...]:
    found: list[Address] = []
    for text in texts:
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            raise InvalidSpecError(f"{what} {text[:80]!r} is not an IP address without prefix length") from None
        if isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None:
            raise InvalidSpecError(f"{what} {text[:80]!r} must not have a zone")
        found.append(address)
    if len({address.version for address in found}) < len(found):
        raise InvalidSpecError(f"{what} must be at most one per family")
    return tuple(found)


def _name(name: str) -> str:
    if len(name) > 253 or not _NAME.fullmatch(name):
        raise InvalidSpecError(f"names: {name[:80]!r} must be labels of 1 to 63 characters of [a-zA-Z0-9_-]")
    return name
