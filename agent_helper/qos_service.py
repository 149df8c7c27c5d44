"""taploom.helper.v1.QosService over a fabric."""

from __future__ import annotations

from agent_helper.fabric import Fabric
from agent_helper.service import as_status
from taploom.contracts.taploom.helper.v1 import (
    ListQosCountersRequest,
    ListQosCountersResponse,
    QosCounters,
    QosDirection,
)
from taploom.contracts.taploom.helper.v1.rpc import QosServiceBase
from taploom.rpc import ServerContext


class QosService(QosServiceBase):
    """What limits do."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric

    async def list_qos_counters(
        self, request: ListQosCountersRequest, context: ServerContext
    ) -> ListQosCountersResponse:
        with as_status():
            counted = await self._fabric.qos_counters(request.endpoint_ids)
        return ListQosCountersResponse(
            counters=[
                QosCounters(
                    endpoint_id=endpoint_id,
                    direction=QosDirection.IN if incoming else QosDirection.OUT,
                    passed_frames=one.passed_frames,
                    passed_bytes=one.passed_bytes,
                    dropped_frames=one.dropped_frames,
                    dropped_bytes=one.dropped_bytes,
                )
                for (endpoint_id, incoming), one in sorted(counted.items())
            ]
        )
