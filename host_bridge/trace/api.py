"""taploom.bridge.v1.TraceService."""

from __future__ import annotations

from host_bridge.api import as_status
from host_bridge.trace.question import question
from host_bridge.trace.tracer import ConnectionTracer
from taploom.contracts.taploom.bridge import v1 as bridge
from taploom.contracts.taploom.bridge.v1.rpc import TraceServiceBase
from taploom.rpc import ServerContext


class TraceApi(TraceServiceBase):
    """Whether and why a connection would pass."""

    def __init__(self, tracer: ConnectionTracer) -> None:
        self._tracer = tracer

    async def trace(self, request: bridge.TraceRequest, context: ServerContext) -> bridge.TraceResponse:
        with as_status():
            asked = question(request.source, request.target, request.protocol, request.port, request.family)
            return await self._tracer.trace(asked)
