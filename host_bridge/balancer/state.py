"""Load balancers that are wanted: changed in one transaction each, and compiled to what the helper is told."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from host_bridge import ipam
from host_bridge.addressing import ISOLATED
from host_bridge.balancer.check import checked_balancers
from host_bridge.balancer.model import LABEL, TCP, Balancer, Place, Port
from host_bridge.errors import BridgeError, ExhaustedError, NotFoundError, TakenError
from host_bridge.model import EndpointRecord, NetworkRecord
from host_bridge.names import shown
from host_bridge.places import Places, fits
from host_bridge.sources import Changes, Source
from host_bridge.store import Store
from taploom.contracts.taploom.helper import v1 as helper


class BalancerNotFoundError(NotFoundError):
    """No load balancer has this name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"balancer {shown(name)} not found: 'taploom lb ls' lists those there are")
        self.name = name


@dataclass(frozen=True, slots=True)
class Member:
    """A guest that takes a share; it listens at `target` instead of the ports' own unless it is 0."""

    endpoint: EndpointRecord
    guest: str
    target: int


@dataclass(slots=True)
class _Known:
    """What the database has, read once."""

    balancers: dict[str, Balancer]
    times: dict[str, tuple[int, int]]
    # By load balancer: its addresses by network's id. By None: where health checks come from.
    addresses: dict[str | None, dict[str, list[str]]] = field(default_factory=dict)


class BalancerState:
    """The load balancers in the database, and what they mean.

    Args:
        store: the database. Load balancers are changed by this object only.

    Attributes:
        before_commit: called with all load balancers as they are to be, within the transaction: what it raises undoes
            it.
        after_commit: called with them when they are so.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._places = Places(store)
        self._known: _Known | None = None
        self.before_commit: Callable[[Source, Mapping[str, Balancer]], None] | None = None
        self.after_commit: Callable[[Mapping[str, Balancer]], None] | None = None

    # Changes

    def apply(
        self, source: str, balancers: Iterable[Balancer], *, prune: bool = False, create_only: bool = False
    ) -> Changes:
        """Creates or replaces load balancers.

        Args:
            source: what messages call what is applied.
            prune: removes those that are not given.
            create_only: refuses those that are there.

        Raises:
            InvalidError, TakenError, ExhaustedError: nothing was changed.
        """
        where = Source(source)
        given = checked_balancers(where, balancers)
        present = dict(self.balancers)
        if create_only:
            for balancer in given.values():
                if balancer.name in present:
                    raise TakenError(f"balancer {balancer.name} exists: 'taploom lb apply' replaces it")
        wanted = given if prune else {**present, **given}
        networks = {network.name: network for network in self._store.networks() if network.active}
        for balancer in given.values():
            _check_networks(where, balancer, networks)
        _check_names(where, wanted, networks)
        removed = tuple(sorted(present.keys() - wanted.keys()))
        different = {name: one for name, one in given.items() if present.get(name) != one}
        self._change(where, removed, different, wanted, networks)
        return Changes(
            created=tuple(sorted(different.keys() - present.keys())),
            updated=tuple(sorted(different.keys() & present.keys())),
            unchanged=tuple(sorted(given.keys() - different.keys())),
            removed=removed,
        )

    def remove(self, names: Iterable[str]) -> None:
        """Removes load balancers.

        Raises:
            NotFoundError: nothing was changed.
        """
        going = sorted(set(names))
        for name in going:
            if name not in self.balancers:
                raise BalancerNotFoundError(name)
        wanted = {name: one for name, one in self.balancers.items() if name not in going}
        networks = {network.name: network for network in self._store.networks() if network.active}
        self._change(Source(), going, {}, wanted, networks)

    def _change(
        self,
        where: Source,
        removed: Iterable[str],
        different: Mapping[str, Balancer],
        wanted: Mapping[str, Balancer],
        networks: Mapping[str, NetworkRecord],
    ) -> None:
        now_us = round(datetime.datetime.now(datetime.UTC).timestamp() * 1_000_000)
        before = self.balancers
        told = False
        try:
            with self._store.change():
                for name in removed:
                    self._store.delete_balancer(name)
                for balancer in different.values():
                    self._store.put_balancer(balancer, now_us)
                self._place(where, different, networks)
                self._place_checks(wanted, networks)
                if self.before_commit is not None:
                    self.before_commit(where, wanted)
                    told = True
        except BaseException:
            if told and self.before_commit is not None:  # the disk is full, say
                self.before_commit(where, before)
            raise
        finally:
            self._known = None
        if self.after_commit is not None:
            self.after_commit(self.balancers)

    def _place(self, where: Source, different: Mapping[str, Balancer], networks: Mapping[str, NetworkRecord]) -> None:
        """Gives load balancers the addresses that they ask for, and lets them keep or have others."""
        store = self._store
        asked = {
            (balancer.name, networks[place.network].id, ipaddress.ip_address(place.address).version): place
            for balancer in different.values()
            for place in balancer.addresses
        }
        kept: set[tuple[str, str, int]] = set()
        for network_id, address, holder in store.balancer_addresses():
            if holder is None or holder not in different:
                continue
            key = (holder, network_id, ipaddress.ip_address(address).version)
            on = {networks[name].id for name in different[holder].networks}
            if network_id in on and (key not in asked or asked[key].address == address):
                kept.add(key)
            else:
                store.free_balancer_address(network_id, address)
        # What is asked for comes before what is chosen.
        for key, place in asked.items():
            if key not in kept:
                holder = store.taken_addresses(key[1], place.address).get(place.address)
                if holder is not None:
                    raise TakenError(
                        where.text(
                            place.line or different[key[0]].line,
                            f"balancer {key[0]}: address {place.address} of network {place.network} is in use by "
                            f"{holder}: choose another, or leave it out",
                        )
                    )
                store.hold_balancer_address(key[1], place.address, key[0])
                kept.add(key)
        for balancer in different.values():
            for name in balancer.networks:
                network = networks[name]
                for family in _families(network, networks[balancer.network]):
                    if (balancer.name, network.id, family) not in kept:
                        try:
                            free = self._free_address(network, family)
                        except ExhaustedError as error:
                            message = where.text(balancer.line, f"balancer {balancer.name}: {error}")
                            raise ExhaustedError(message) from error
                        store.hold_balancer_address(network.id, free, balancer.name)

    def _place_checks(self, wanted: Mapping[str, Balancer], networks: Mapping[str, NetworkRecord]) -> None:
        """Reserves the addresses that health checks come from on the networks whose backends are checked."""
        needed = {
            (networks[one.network].id, subnet.family): networks[one.network]
            for one in wanted.values()
            if one.health is not None
            for subnet in networks[one.network].subnets
        }
        for network_id, address, holder in self._store.balancer_addresses():
            if holder is None:
                key = (network_id, ipaddress.ip_address(address).version)
                if needed.pop(key, None) is None:
                    self._store.free_balancer_address(network_id, address)
        for (network_id, family), network in needed.items():
            self._store.hold_balancer_address(network_id, self._free_address(network, family), None)

    def _free_address(self, network: NetworkRecord, family: int) -> str:
        subnet = network.subnet(family)
        assert subnet is not None
        taken = [ipaddress.ip_address(one) for one in self._store.addresses_in(network.id, family)]
        within = ipam.network_of(subnet.ip_range) if subnet.ip_range else None
        return str(ipam.highest_free(ipam.network_of(subnet.subnet), taken, within))

    # What there is

    @property
    def balancers(self) -> Mapping[str, Balancer]:
        """The load balancers by name, in order."""
        return self._now().balancers

    def get(self, name: str) -> Balancer:
        """A load balancer; raises BalancerNotFoundError."""
        balancer = self.balancers.get(name)
        if balancer is None:
            raise BalancerNotFoundError(name)
        return balancer

    def times(self, name: str) -> tuple[datetime.datetime, datetime.datetime]:
        """When a load balancer was applied first and when it was last changed."""
        created, updated = self._now().times[name]
        return _moment(created), _moment(updated)

    def addresses(self, name: str) -> list[Place]:
        """The addresses of a load balancer, those of its own network first."""
        balancer, found = self.get(name), self._now().addresses.get(name, {})
        by_name = {network.name: network.id for network in self._store.networks()}
        return [
            Place(network, address)
            for network in balancer.networks
            for address in found.get(by_name.get(network, ""), ())
        ]

    def names_on(self, network_id: str) -> frozenset[str]:
        """What load balancers are called on a network, in lower case: nobody else is called so there."""
        known = self._now()
        return frozenset(
            balancer.known_as.lower()
            for name, balancer in known.balancers.items()
            if network_id in known.addresses.get(name, {})
        )

    def members(self, balancer: Balancer) -> list[Member]:
        """Who takes a share now, in order of the guests' names."""
        return self._members([balancer])[balancer.name]

    def unknown_labels(self) -> list[str]:
        """Load balancers that there are not and that containers name in their labels, in order."""
        return sorted(
            {
                label.removeprefix(LABEL)
                for container in self._store.containers()
                for label in container.config.get("Config", {}).get("Labels") or {}
                if label.startswith(LABEL) and label.removeprefix(LABEL) not in self.balancers
            }
        )

    def _members(self, balancers: Sequence[Balancer]) -> dict[str, list[Member]]:
        found: dict[str, list[Member]] = {balancer.name: [] for balancer in balancers}
        guests = {guest.id: guest for guest in self._store.guests()}
        for network_name in sorted({balancer.network for balancer in balancers}):
            network_id = self._store.network_id_of(network_name)
            network = self._store.network(network_id) if network_id is not None else None
            if network is None:
                continue
            here = [balancer for balancer in balancers if balancer.network == network_name]
            for endpoint in self._store.endpoints(network_id=network.id):
                guest = guests.get(endpoint.guest_id)
                if guest is None or not endpoint.active:
                    continue
                place = self._places.of(endpoint, guest, network)
                for balancer in here:
                    target = _target(balancer, place.labels.get(LABEL + balancer.name))
                    if target is None:
                        fitting = [one.target for one in balancer.backends if fits(one.selector, place)]
                        target = fitting[0] if fitting else None
                    if target is not None:
                        found[balancer.name].append(Member(endpoint, guest.name, target))
        return found

    # What the helper is told

    @property
    def message(self) -> helper.Balancers:
        """All load balancers with who takes a share now."""
        known = self._now()
        if not known.balancers:
            return helper.Balancers()
        members = self._members(list(known.balancers.values()))
        ids = {network.name: network.id for network in self._store.networks()}
        messages = []
        for name, balancer in known.balancers.items():
            health = balancer.health
            messages.append(
                helper.Balancer(
                    balancer_id=name,
                    network_id=ids[balancer.network],
                    frontends=[
                        helper.BalancerFrontend(
                            network_id=ids[network],
                            addresses=known.addresses.get(name, {}).get(ids[network], []),
                            names=[balancer.known_as],
                        )
                        for network in balancer.networks
                    ],
                    ports=[_port_message(port) for port in balancer.ports],
                    backends=[
                        helper.BalancerBackend(endpoint_id=member.endpoint.id, target_port=member.target)
                        for member in members[name]
                    ],
                    affinity=balancer.affinity,
                    health_check=None
                    if health is None
                    else helper.BalancerHealthCheck(
                        interval_seconds=health.interval,
                        timeout_seconds=health.timeout,
                        failures=health.failures,
                        successes=health.successes,
                        source_addresses=known.addresses.get(None, {}).get(ids[balancer.network], []),
                    ),
                )
            )
        return helper.Balancers(balancers=messages)

    def _now(self) -> _Known:
        if self._known is None:
            rows = self._store.balancers()
            known = _Known(
                {balancer.name: balancer for balancer, _, _ in rows},
                {balancer.name: (created, updated) for balancer, created, updated in rows},
            )
            for network_id, address, holder in self._store.balancer_addresses():
                known.addresses.setdefault(holder, {}).setdefault(network_id, []).append(address)
            self._known = known
        return self._known


def _check_networks(where: Source, balancer: Balancer, networks: Mapping[str, NetworkRecord]) -> None:
    places = [Place(balancer.network, line=balancer.line), *balancer.also, *balancer.addresses]
    for place in places:
        line = place.line or balancer.line
        network = networks.get(place.network)
        if network is None:
            raise where.wrong(
                line,
                f"balancer {balancer.name}: network {shown(place.network)} not found: create it first with "
                "'taploom network create', or see 'taploom network ls'",
            )
        if not network.switched:
            raise where.wrong(line, f"balancer {balancer.name}: network {network.name} has no guests to balance")
        if balancer.also and network.internal:
            raise where.wrong(
                line,
                f"balancer {balancer.name}: network {network.name} is internal, so nothing leads from it to another: "
                "leave 'also' out, or use other networks",
            )
        families = _families(network, networks[balancer.network])
        if not families:
            raise where.wrong(
                line,
                f"balancer {balancer.name}: it can have no address on network {network.name}: that has no gateway, or "
                "not the backends' IP version",
            )
        if place.address:
            _check_address(where, line, balancer, network, place.address)
            version = ipaddress.ip_address(place.address).version
            if version not in families:
                raise where.wrong(
                    line,
                    f"balancer {balancer.name}: there is no way from {place.address} to its backends: network "
                    f"{network.name} has no gateway for IPv{version}, or they have no IPv{version}",
                )


def _families(network: NetworkRecord, home: NetworkRecord) -> list[int]:
    """The families in which a load balancer has an address on a network: those that its backends have, and in which
    there is a gateway of the helper's, which answers for its address."""
    return [
        subnet.family
        for subnet in network.subnets
        if home.subnet(subnet.family) is not None
        and network.vlan is None
        and network.addressing.mode(subnet.family) != ISOLATED
    ]


def _check_address(where: Source, line: int, balancer: Balancer, network: NetworkRecord, text: str) -> None:
    address = ipaddress.ip_address(text)
    subnet = network.subnet(address.version)
    if subnet is None:
        raise where.wrong(
            line, f"balancer {balancer.name}: network {network.name} has no IPv{address.version} subnet for {address}"
        )
    try:
        ipam.check_static(ipam.network_of(subnet.subnet), address, network.name)
    except BridgeError as error:
        raise where.wrong(line, f"balancer {balancer.name}: {error}") from error


def _check_names(where: Source, wanted: Mapping[str, Balancer], networks: Mapping[str, NetworkRecord]) -> None:
    taken: dict[tuple[str, str], str] = {}
    for balancer in wanted.values():
        for network in balancer.networks:
            if networks[network].default_bridge:
                continue  # nobody has a name there
            other = taken.setdefault((network, balancer.known_as.lower()), balancer.name)
            if other != balancer.name:
                raise where.wrong(
                    balancer.line,
                    f"balancers {other} and {balancer.name} are both called {balancer.known_as} on network {network}: "
                    "give one another 'name'",
                )


def _target(balancer: Balancer, label: str | None) -> int | None:
    """Where a container with this label listens, 0: at the ports' own; None: it has none, or one that says nothing."""
    if label is None:
        return None
    text = label.strip()
    if not text:
        return 0
    if text.isascii() and text.isdecimal() and len(text) <= 5 and 1 <= int(text) <= 65535:
        return int(text)
    return None


def _port_message(port: Port) -> helper.BalancerPort:
    protocol = helper.BalancerProtocol.TCP if port.protocol == TCP else helper.BalancerProtocol.UDP
    return helper.BalancerPort(protocol=protocol, port=port.port, target_port=port.target)


def _moment(us: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(us / 1_000_000, tz=datetime.UTC)
