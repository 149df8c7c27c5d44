"""taploom.helper.v1.BalancerService over a fabric."""

from __future__ import annotations

from agent_helper.errors import InvalidSpecError
from agent_helper.fabric import Fabric
from agent_helper.service import as_status
from taploom.contracts.taploom.helper.v1 import (
    ApplyBalancersRequest,
    ApplyBalancersResponse,
    ListBackendsRequest,
    ListBackendsResponse,
)
from taploom.contracts.taploom.helper.v1.rpc import BalancerServiceBase
from taploom.rpc import ServerContext


class BalancerService(BalancerServiceBase):
    """Serves the fabric's load balancers to the host."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric

    async def apply_balancers(self, request: ApplyBalancersRequest, context: ServerContext) -> ApplyBalancersResponse:
        with as_status():
            if request.balancers is None:
                raise InvalidSpecError("balancers is missing")
            await self._fabric.apply_balancers(request.balancers)
        return ApplyBalancersResponse()

    async def list_backends(self, request: ListBackendsRequest, context: ServerContext) -> ListBackendsResponse:
        return ListBackendsResponse(backends=self._fabric.backends(request.balancer_ids))
