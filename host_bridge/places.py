"""Guests' places on networks as selectors see them: by guest, alias, label and network, as these are now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from host_bridge.describe import endpoint_names
from host_bridge.model import EndpointRecord, GuestRecord, NetworkRecord
from host_bridge.selectors import Selector
from host_bridge.store import Store

_MAX_LABELS = 4096


@dataclass(frozen=True, slots=True)
class Place:
    """An endpoint: its guest's name, the names that the network knows it by (lower case), its container's labels."""

    guest: str
    names: frozenset[str]
    labels: Mapping[str, str]
    network: str


class Places:
    """What the database says of endpoints."""

    def __init__(self, store: Store) -> None:
        self._store = store
        # Of containers, by id: theirs never change.
        self._labels: dict[str, Mapping[str, str]] = {}

    def of(self, endpoint: EndpointRecord, guest: GuestRecord, network: NetworkRecord) -> Place:
        """The place of an endpoint."""
        names = {name.lower() for name in (guest.name, *endpoint_names(endpoint, guest, network))}
        return Place(guest.name, frozenset(names), self._labels_of(guest.id), network.name)

    def _labels_of(self, guest_id: str) -> Mapping[str, str]:
        known = self._labels.get(guest_id)
        if known is not None:
            return known
        container = self._store.container(guest_id)
        if container is None:
            return {}
        if len(self._labels) >= _MAX_LABELS:
            self._labels.clear()
        found = self._labels[guest_id] = dict(container.config.get("Config", {}).get("Labels") or {})
        return found


def fits(selector: Selector, place: Place) -> bool:
    """Whether all that the selector gives is true of the place. Membership in a group is not looked at here."""
    if selector.group:
        return False
    key, equals, value = selector.label.partition("=")
    return (
        (not selector.guest or selector.guest == place.guest)
        and (not selector.alias or selector.alias.lower() in place.names)
        and (not selector.network or selector.network == place.network)
        and (not key or (key in place.labels and (not equals or place.labels[key] == value)))
    )
