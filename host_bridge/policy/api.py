"""taploom.bridge.v1.PolicyService."""

from __future__ import annotations

from collections.abc import Sequence

from host_bridge.api import as_status
from host_bridge.fabric import Fabric
from host_bridge.model import EndpointRecord
from host_bridge.policy.messages import default_message, from_default, from_message, to_message
from host_bridge.policy.model import ALLOW, IN, Group, NetworkDefault
from host_bridge.policy.state import PolicyGroupNotFoundError, RuleRef
from taploom.contracts.taploom.bridge import v1 as bridge
from taploom.contracts.taploom.bridge.v1.rpc import PolicyServiceBase
from taploom.rpc import RpcError, SendStream, ServerContext


class PolicyApi(PolicyServiceBase):
    """Which connections may pass."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric
        self._policies = fabric.desired.policies

    async def apply_policy(
        self, request: bridge.ApplyPolicyRequest, context: ServerContext
    ) -> bridge.ApplyPolicyResponse:
        with as_status():
            changes, pending = await self._fabric.apply_policy(
                request.source,
                [from_message(group) for group in request.groups],
                [from_default(network) for network in request.networks],
                prune=request.prune,
            )
        return bridge.ApplyPolicyResponse(
            created=list(changes.created),
            updated=list(changes.updated),
            unchanged=list(changes.unchanged),
            removed=list(changes.removed),
            pending=pending,
        )

    async def list_policy(self, request: bridge.ListPolicyRequest, context: ServerContext) -> bridge.ListPolicyResponse:
        members = self._policies.members()
        defaults = [
            NetworkDefault(network.name, default)
            for network in self._fabric.desired.networks()
            if network.switched and (default := self._policies.default_of(network)) != ALLOW
        ]
        return bridge.ListPolicyResponse(
            groups=[self._summary(name, members[name]) for name in sorted(members)],
            networks=[default_message(one) for one in defaults],
            pending=self._fabric.policy_pending(),
        )

    def _summary(self, name: str, members: Sequence[EndpointRecord]) -> bridge.PolicyGroupSummary:
        group = self._policies.groups.get(name)
        summary = bridge.PolicyGroupSummary(name=name, missing=group is None)
        desired = self._fabric.desired
        summary.members = [f"{desired.guest_name(e.guest_id)}@{desired.network_name(e.network_id)}" for e in members]
        if group is not None:
            summary.incoming_rules = None if group.incoming is None else len(group.incoming)
            summary.outgoing_rules = None if group.outgoing is None else len(group.outgoing)
        return summary

    async def get_policy_group(
        self, request: bridge.GetPolicyGroupRequest, context: ServerContext
    ) -> bridge.GetPolicyGroupResponse:
        with as_status():
            group = self._policies.groups.get(request.name)
            if group is None:
                raise PolicyGroupNotFoundError(request.name)
            created, updated = self._policies.times(request.name)
        desired = self._fabric.desired
        response = bridge.GetPolicyGroupResponse(
            group=to_message(group),
            members=[
                bridge.PolicyMember(
                    guest_name=desired.guest_name(endpoint.guest_id),
                    network_name=desired.network_name(endpoint.network_id),
                    addresses=list(endpoint.addresses),
                )
                for endpoint in self._policies.members()[group.name]
            ],
            created_at=created,
            updated_at=updated,
        )
        await self._count(group, response)
        return response

    async def _count(self, group: Group, response: bridge.GetPolicyGroupResponse) -> None:
        ids = {reference: self._policies.rule_id(reference) for reference in _references(group)}
        counted: dict[str, tuple[int, int]] = {}
        if ids:
            try:
                counted = await self._fabric.helper.policy_counters(list(ids.values()))
            except RpcError:
                return
        response.counted = True
        for reference, rule_id in ids.items():
            packets, octets = counted.get(rule_id, (0, 0))
            found = response.incoming if reference.direction == IN else response.outgoing
            found.append(bridge.RuleCounters(packets=packets, bytes=octets))

    async def remove_policy_groups(
        self, request: bridge.RemovePolicyGroupsRequest, context: ServerContext
    ) -> bridge.RemovePolicyGroupsResponse:
        with as_status():
            pending = await self._fabric.remove_policy_groups(request.names)
        return bridge.RemovePolicyGroupsResponse(pending=pending)

    async def watch_policy_log(
        self,
        request: bridge.WatchPolicyLogRequest,
        stream: SendStream[bridge.WatchPolicyLogResponse],
        context: ServerContext,
    ) -> None:
        async for line in self._fabric.policy_log.follow(on=request.follow):
            await stream.send(line)


def _references(group: Group) -> list[RuleRef]:
    return [RuleRef(group.name, direction, rule.name) for direction, rule in group.all_rules()]
