"""taploom.bridge.v1.MirrorService."""

from __future__ import annotations

from host_bridge.api import as_status
from host_bridge.errors import InvalidError, NotFoundError
from host_bridge.fabric import Fabric
from host_bridge.mirror.state import BOTH, IN, OUT, MirrorNotFoundError
from host_bridge.mirror.tables import MirrorRecord, Place
from taploom.contracts.taploom.bridge import v1 as bridge
from taploom.contracts.taploom.bridge.v1.rpc import MirrorServiceBase
from taploom.rpc import ServerContext

_DIRECTIONS = {IN: bridge.MirrorDirection.IN, OUT: bridge.MirrorDirection.OUT, BOTH: bridge.MirrorDirection.BOTH}
_NAMES = {bridge.MirrorDirection.UNSPECIFIED: BOTH, **{value: name for name, value in _DIRECTIONS.items()}}


class MirrorApi(MirrorServiceBase):
    """Copies of what guests send and receive."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric

    async def add_mirror(self, request: bridge.AddMirrorRequest, context: ServerContext) -> bridge.AddMirrorResponse:
        with as_status():
            mirror = request.mirror or bridge.Mirror()
            if mirror.direction not in _NAMES:
                raise InvalidError("this direction is not known: update the bridge")
            (source, source_label), (target, target_label) = self._place(mirror.source), self._place(mirror.target)
            record = MirrorRecord(source, target, _NAMES[mirror.direction])
            pending = await self._fabric.add_mirror(record, source_label, target_label)
        return bridge.AddMirrorResponse(mirror=self._message(record), pending=pending)

    async def list_mirrors(
        self, request: bridge.ListMirrorsRequest, context: ServerContext
    ) -> bridge.ListMirrorsResponse:
        mirrors = [self._message(record) for record in self._fabric.desired.mirrors.records()]
        mirrors.sort(key=lambda one: (_key(one.source), _key(one.target)))
        return bridge.ListMirrorsResponse(mirrors=mirrors, pending=self._fabric.mirrors_pending())

    async def remove_mirror(
        self, request: bridge.RemoveMirrorRequest, context: ServerContext
    ) -> bridge.RemoveMirrorResponse:
        with as_status():
            record = self._find(request.source or bridge.MirrorEnd(), request.target or bridge.MirrorEnd())
            pending = await self._fabric.remove_mirror(record, self._label(record))
        return bridge.RemoveMirrorResponse(pending=pending)

    def _place(self, end: bridge.MirrorEnd | None) -> tuple[Place, str]:
        if end is None or not end.guest:
            raise InvalidError("a mirror is from one guest to another: name both")
        network, guest_id, label = self._fabric.desired.find_place(end.network, end.guest)
        return (network.id, guest_id), label

    def _find(self, source: bridge.MirrorEnd, target: bridge.MirrorEnd) -> MirrorRecord:
        """The mirror that is meant, which may be of containers that do not run."""
        desired = self._fabric.desired
        guests = self._guest_id(source.guest), self._guest_id(target.guest)
        networks = [desired.find_network(end.network).id if end.network else "" for end in (source, target)]
        found = [
            one
            for one in desired.mirrors.records()
            if (one.source[1], one.target[1]) == guests
            and networks[0] in ("", one.source[0])
            and networks[1] in ("", one.target[0])
        ]
        if len(found) == 1:
            return found[0]
        if found:
            listed = ", ".join(sorted(map(self._label, found)))
            raise InvalidError(f"there are several mirrors that this may be ({listed}): name the networks")
        (_, source_label), (_, target_label) = self._place(source), self._place(target)
        raise MirrorNotFoundError(
            f"there is no mirror of {source_label} to {target_label}: 'taploom mirror ls' lists those there are"
        )

    def _guest_id(self, text: str) -> str:
        """The id of a guest, or of a container that does not run."""
        try:
            return self._fabric.desired.find_guest(text).id
        except NotFoundError:
            containers = self._fabric.desired.store.containers()
            ids = {one.id for one in containers if one.name == text} or {
                one.id for one in containers if text and one.id.startswith(text)
            }
            if len(ids) != 1:
                raise
            return ids.pop()

    def _label(self, record: MirrorRecord) -> str:
        source, target = self._end(record.source), self._end(record.target)
        return f"of {source.guest} on {source.network} to {target.guest} on {target.network}"

    def _message(self, record: MirrorRecord) -> bridge.Mirror:
        return bridge.Mirror(
            source=self._end(record.source), target=self._end(record.target), direction=_DIRECTIONS[record.direction]
        )

    def _end(self, place: Place) -> bridge.MirrorEnd:
        desired = self._fabric.desired
        return bridge.MirrorEnd(guest=desired.member_name(place[1]), network=desired.network_name(place[0]))


def _key(end: bridge.MirrorEnd | None) -> tuple[str, str]:
    return ("", "") if end is None else (end.guest, end.network)
