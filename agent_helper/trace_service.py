"""taploom.helper.v1.TraceService."""

from __future__ import annotations

from agent_helper.service import as_status
from agent_helper.trace import Tracer
from taploom.contracts.taploom.helper.v1 import TracePacketRequest, TracePacketResponse
from taploom.contracts.taploom.helper.v1.rpc import TraceServiceBase
from taploom.rpc import ServerContext


class TraceService(TraceServiceBase):
    """Follows packets through a fabric."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    async def trace_packet(self, request: TracePacketRequest, context: ServerContext) -> TracePacketResponse:
        with as_status():
            return await self._tracer.trace(request)
