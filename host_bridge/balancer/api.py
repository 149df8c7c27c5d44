"""taploom.bridge.v1.BalancerService."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from host_bridge.api import as_status
from host_bridge.balancer.messages import address_message, from_message, publish_message, to_message
from host_bridge.balancer.model import TCP, Balancer
from host_bridge.balancer.publishing import BalancerPorts
from host_bridge.fabric import Fabric
from taploom.contracts.taploom.bridge import v1 as bridge
from taploom.contracts.taploom.bridge.v1.rpc import BalancerServiceBase
from taploom.contracts.taploom.helper import v1 as helper
from taploom.rpc import RpcError, ServerContext

_HEALTH = {
    helper.BackendHealth.UNSPECIFIED: bridge.BackendHealth.UNSPECIFIED,
    helper.BackendHealth.UP: bridge.BackendHealth.UP,
    helper.BackendHealth.DOWN: bridge.BackendHealth.DOWN,
}
# (endpoint's id, protocol, address, port) -> how it is.
_Known = Mapping[tuple[str, str, str, int], bridge.BackendHealth]


class BalancerApi(BalancerServiceBase):
    """Load balancers.

    Args:
        ports: what they publish.
    """

    def __init__(self, fabric: Fabric, ports: BalancerPorts) -> None:
        self._fabric = fabric
        self._ports = ports
        self._balancers = fabric.desired.balancers

    async def apply_balancers(
        self, request: bridge.ApplyBalancersRequest, context: ServerContext
    ) -> bridge.ApplyBalancersResponse:
        with as_status():
            changes, pending = await self._fabric.apply_balancers(
                request.source,
                [from_message(one) for one in request.balancers],
                prune=request.prune,
                create_only=request.create_only,
            )
        return bridge.ApplyBalancersResponse(
            created=list(changes.created),
            updated=list(changes.updated),
            unchanged=list(changes.unchanged),
            removed=list(changes.removed),
            pending=pending,
        )

    async def list_balancers(
        self, request: bridge.ListBalancersRequest, context: ServerContext
    ) -> bridge.ListBalancersResponse:
        known = await self._known([])
        return bridge.ListBalancersResponse(
            balancers=[self._status(one, known) for one in self._balancers.balancers.values()],
            missing=self._balancers.unknown_labels(),
            pending=self._fabric.balancers_pending(),
        )

    async def get_balancer(
        self, request: bridge.GetBalancerRequest, context: ServerContext
    ) -> bridge.GetBalancerResponse:
        with as_status():
            balancer = self._balancers.get(request.name)
        known = await self._known([balancer.name])
        return bridge.GetBalancerResponse(
            balancer=self._status(balancer, known), pending=self._fabric.balancers_pending()
        )

    async def remove_balancers(
        self, request: bridge.RemoveBalancersRequest, context: ServerContext
    ) -> bridge.RemoveBalancersResponse:
        with as_status():
            pending = await self._fabric.remove_balancers(request.names)
        return bridge.RemoveBalancersResponse(pending=pending)

    async def _known(self, names: Sequence[str]) -> dict[str, _Known]:
        """What the helper says of backends, by load balancer; nothing when it does not answer."""
        found: dict[str, dict[tuple[str, str, str, int], bridge.BackendHealth]] = {}
        try:
            statuses = await self._fabric.helper.backends(names)
        except RpcError:
            return {}
        for one in statuses:
            protocol = "tcp" if one.protocol == helper.BalancerProtocol.TCP else "udp"
            key = (one.endpoint_id, protocol, one.address, one.target_port)
            health = _HEALTH.get(one.health, bridge.BackendHealth.UNSPECIFIED)
            found.setdefault(one.balancer_id, {})[key] = health
        return dict(found)

    def _status(self, balancer: Balancer, known: Mapping[str, _Known]) -> bridge.BalancerStatus:
        created, updated = self._balancers.times(balancer.name)
        addresses = self._balancers.addresses(balancer.name)
        families = {6 if ":" in place.address else 4 for place in addresses}
        here = known.get(balancer.name, {})
        states: dict[tuple[str, str, str, int], bridge.BackendState] = {}
        for member in self._balancers.members(balancer):
            for port in balancer.ports:
                for address in member.endpoint.addresses:
                    if (6 if ":" in address else 4) not in families:
                        continue
                    target = member.target or port.target
                    protocol = "tcp" if port.protocol == TCP else "udp"
                    key = (member.endpoint.id, protocol, address, target)
                    states[key] = bridge.BackendState(
                        guest_name=member.guest,
                        address=address,
                        target_port=target,
                        protocol=protocol,
                        health=here.get(key, bridge.BackendHealth.ABSENT),
                    )
        return bridge.BalancerStatus(
            balancer=to_message(balancer),
            addresses=[address_message(place) for place in addresses],
            backends=list(states.values()),
            published=[publish_message(one) for one in self._ports.published(balancer)],
            publish_problem=self._ports.problem(balancer),
            created_at=created,
            updated_at=updated,
        )
