"""taploom.bridge.v1.QosService."""

from __future__ import annotations

from host_bridge.api import as_status
from host_bridge.fabric import Fabric
from host_bridge.qos.messages import direction_message, direction_of, rules_message
from host_bridge.qos.model import checked
from host_bridge.qos.state import Entry
from taploom.contracts.taploom.bridge import v1 as bridge
from taploom.contracts.taploom.bridge.v1.rpc import QosServiceBase
from taploom.rpc import ServerContext


class QosApi(QosServiceBase):
    """How much guests may send and receive."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric

    async def set_qos(self, request: bridge.SetQosRequest, context: ServerContext) -> bridge.SetQosResponse:
        with as_status():
            said = checked(
                direction_of(request.direction),
                rate=request.rate_bits_per_second,
                burst=request.burst_bytes,
                dscp=request.dscp,
            )
            entry, pending = await self._fabric.set_qos(request.network, request.guest, said)
        return bridge.SetQosResponse(entry=self._entry(entry), pending=pending)

    async def list_qos(self, request: bridge.ListQosRequest, context: ServerContext) -> bridge.ListQosResponse:
        entries = [self._entry(entry) for entry in self._fabric.desired.qos.entries()]
        entries.sort(key=lambda entry: (entry.network_name, entry.guest_name))
        return bridge.ListQosResponse(entries=entries, pending=self._fabric.qos_pending())

    async def remove_qos(self, request: bridge.RemoveQosRequest, context: ServerContext) -> bridge.RemoveQosResponse:
        with as_status():
            direction = direction_of(request.direction)
            pending = await self._fabric.remove_qos(request.network, request.guest, direction)
        return bridge.RemoveQosResponse(pending=pending)

    def _entry(self, entry: Entry) -> bridge.QosEntry:
        desired = self._fabric.desired
        return bridge.QosEntry(
            network_name=desired.network_name(entry.network_id),
            guest_name=desired.member_name(entry.guest_id) if entry.guest_id else "",
            rules=rules_message(entry.said),
            from_options=sorted(direction_message(direction) for direction in entry.from_options),
        )
