"""Limits and marks that are wanted: changed in one transaction each, and what follows for each endpoint.

What is said of a guest on a network comes before what is said of the network, and what was said by SetQos before what
driver options say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from host_bridge.errors import InvalidError, NotFoundError
from host_bridge.model import EndpointRecord, NetworkRecord
from host_bridge.qos.model import DIRECTIONS, IN, NOTHING, Said, from_options
from host_bridge.store import Store
from taploom.contracts.taploom.helper import v1 as helper

_DIRECTIONS = {IN: helper.QosDirection.IN}


class QosNotFoundError(NotFoundError):
    """Nothing is said of what is named."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What is said of a guest on a network or, without a guest's id, of the network.

    `from_options`: the directions of which driver options say all or a part.
    """

    network_id: str
    guest_id: str
    said: Mapping[str, Said]
    from_options: frozenset[str]


class QosState:
    """The limits and marks in the database, and what they mean.

    Args:
        store: the database.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        # By network's id: options never change.
        self._network_options: dict[str, Mapping[str, Said]] = {}

    def set(self, network_id: str, guest_id: str, said: Mapping[str, Said]) -> Entry:
        """Changes what is said of directions; what is not given stays as it is.

        Args:
            guest_id: empty: the network's default.
        """
        with self._store.change():
            before = self._store.qos().get((network_id, guest_id), {})
            for direction, one in said.items():
                self._store.put_qos(network_id, guest_id, direction, one.over(before.get(direction, NOTHING)))
        return self._entry(network_id, guest_id)

    def remove(self, network_id: str, guest_id: str, direction: str, what: str) -> None:
        """Removes what `set` has said; of all directions when `direction` is empty.

        Args:
            what: what messages call it.

        Raises:
            NotFoundError, InvalidError: nothing was changed.
        """
        with self._store.change():
            said = self._store.qos().get((network_id, guest_id), {})
            if direction not in said and (direction or not said):
                entry = self._entry(network_id, guest_id)
                if entry.from_options and (not direction or direction in entry.from_options):
                    raise InvalidError(
                        f"what is said of {what} comes from its driver options, which do not change: set something "
                        "else, or create or connect it without them"
                    )
                raise QosNotFoundError(f"nothing is said of {what}: 'taploom qos ls' lists what is")
            self._store.delete_qos(network_id=network_id, guest_id=guest_id, direction=direction)

    def entries(self) -> list[Entry]:
        """All that is said, by networks and guests that there are."""
        keys = set(self._store.qos())
        keys |= {(network.id, "") for network in self._store.networks()}
        keys |= {(endpoint.network_id, endpoint.guest_id) for endpoint in self._store.endpoints()}
        return [entry for key in keys if (entry := self._entry(*key)).said]

    def default_of(self, network: NetworkRecord) -> dict[str, Said]:
        """What is said of a network."""
        return _merged(self._store.qos().get((network.id, ""), {}), self._options_of(network))

    def in_force(self, endpoint: EndpointRecord, network: NetworkRecord) -> dict[str, Said]:
        """What holds for an endpoint in each direction, whoever said it."""
        own = _merged(self._store.qos().get((network.id, endpoint.guest_id), {}), _options(endpoint.driver_options))
        return _merged(own, self.default_of(network))

    def message(self, endpoint: EndpointRecord, network: NetworkRecord) -> helper.Qos | None:
        """What the helper is told of an endpoint; None: nothing."""
        found = self.in_force(endpoint, network)
        if not found:
            return None
        return helper.Qos(
            rules=[
                helper.QosRule(
                    direction=_DIRECTIONS.get(direction, helper.QosDirection.OUT),
                    rate_bits_per_second=said.rate or 0,
                    burst_bytes=said.burst or 0,
                    dscp=said.dscp,
                )
                for direction, said in found.items()
            ]
        )

    def _entry(self, network_id: str, guest_id: str) -> Entry:
        network = self._store.network(network_id)
        options: Mapping[str, Said] = {}
        if not guest_id:
            options = self._options_of(network) if network is not None else {}
        elif (endpoint := self._store.endpoint_of(network_id, guest_id)) is not None:
            options = _options(endpoint.driver_options)
        said = self._store.qos().get((network_id, guest_id), {})
        merged = _merged(said, options)
        used = frozenset(d for d in options if merged[d] != said.get(d, NOTHING))
        return Entry(network_id, guest_id, merged, used)

    def _options_of(self, network: NetworkRecord) -> Mapping[str, Said]:
        known = self._network_options.get(network.id)
        if known is None:
            known = self._network_options[network.id] = _options(network.options)
        return known


def _merged(first: Mapping[str, Said], second: Mapping[str, Said]) -> dict[str, Said]:
    found = {one: first.get(one, NOTHING).over(second.get(one, NOTHING)) for one in DIRECTIONS}
    return {one: said for one, said in found.items() if said != NOTHING}


def _options(options: Mapping[str, str]) -> Mapping[str, Said]:
    try:
        return from_options(options)
    except InvalidError:  # of a database from before these options meant anything
        return {}
