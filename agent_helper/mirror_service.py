"""taploom.helper.v1.MirrorService over a fabric."""

from __future__ import annotations

from agent_helper.errors import InvalidSpecError
from agent_helper.fabric import Fabric
from agent_helper.service import as_status
from taploom.contracts.taploom.helper.v1 import ApplyMirrorsRequest, ApplyMirrorsResponse
from taploom.contracts.taploom.helper.v1.rpc import MirrorServiceBase
from taploom.rpc import ServerContext


class MirrorService(MirrorServiceBase):
    """Copies of what endpoints send and receive."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric

    async def apply_mirrors(self, request: ApplyMirrorsRequest, context: ServerContext) -> ApplyMirrorsResponse:
        with as_status():
            if request.mirrors is None:
                raise InvalidSpecError("mirrors is missing")
            await self._fabric.apply_mirrors(request.mirrors)
        return ApplyMirrorsResponse()
