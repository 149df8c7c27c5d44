"""Mirrors that are wanted: changed in one transaction each, and what the helper is told of them."""

from __future__ import annotations

from host_bridge.errors import InvalidError, NotFoundError, PreconditionError
from host_bridge.mirror.tables import MirrorRecord, Place
from host_bridge.store import Store
from taploom.contracts.taploom.helper import v1 as helper

IN, OUT, BOTH = "in", "out", "both"
_DIRECTIONS = {IN: helper.MirrorDirection.IN, OUT: helper.MirrorDirection.OUT}


class MirrorNotFoundError(NotFoundError):
    """There is no such mirror."""


class MirrorState:
    """The mirrors in the database.

    Args:
        store: the database.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def add(self, mirror: MirrorRecord, source_label: str, target_label: str) -> None:
        """Adds a mirror, or changes its direction.

        Args:
            source_label, target_label: what messages call the two.

        Raises:
            InvalidError, PreconditionError: nothing was changed.
        """
        if mirror.source == mirror.target:
            raise InvalidError(f"{source_label} cannot be mirrored to itself: name another guest or network")
        with self._store.change():
            for place, label in ((mirror.source, source_label), (mirror.target, target_label)):
                endpoint = self._store.endpoint_of(*place)
                if endpoint is not None and endpoint.carried is not None:
                    over = endpoint.carried.parent
                    raise PreconditionError(
                        f"{label} is {endpoint.carried}, without an interface of its own: name {over}, frames there "
                        "have the tag"
                    )
            present = self._store.mirrors()
            if any(one.target == mirror.source for one in present):
                raise PreconditionError(f"{source_label} receives copies, which would be copied again: choose another")
            if any(one.source == mirror.target for one in present):
                raise PreconditionError(f"{target_label} is mirrored itself, and copies would be too: choose another")
            self._store.put_mirror(mirror)

    def remove(self, source: Place, target: Place, label: str) -> None:
        """Removes a mirror; MirrorNotFoundError when there is none."""
        with self._store.change():
            if not any((one.source, one.target) == (source, target) for one in self._store.mirrors()):
                raise MirrorNotFoundError(f"there is no mirror {label}: 'taploom mirror ls' lists those there are")
            self._store.delete_mirror(source, target)

    def records(self) -> list[MirrorRecord]:
        """All mirrors, also of guests that do not run."""
        return self._store.mirrors()

    def message(self) -> helper.ApplyMirrorsRequest:
        """What the helper is told: the mirrors between endpoints that there are."""
        found = []
        for mirror in self._store.mirrors():
            source, target = self._store.endpoint_of(*mirror.source), self._store.endpoint_of(*mirror.target)
            if source is not None and target is not None:
                found.append(
                    helper.Mirror(
                        source_endpoint_id=source.id,
                        target_endpoint_id=target.id,
                        direction=_DIRECTIONS.get(mirror.direction, helper.MirrorDirection.UNSPECIFIED),
                    )
                )
        found.sort(key=lambda one: (one.source_endpoint_id, one.target_endpoint_id))
        return helper.ApplyMirrorsRequest(mirrors=helper.Mirrors(mirrors=found))
