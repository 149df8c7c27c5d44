"""taploom.helper.v1.HelperService over a fabric."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from agent_helper.errors import HelperError, InvalidSpecError
from agent_helper.events import Events, LaggingError
from agent_helper.fabric import EndpointState, Fabric
from agent_helper.stack import TRACE_PROGRAM, Stack
from agent_helper.streams import Streams
from taploom import __version__
from taploom.contracts.taploom.helper.v1 import (
    ApplyEndpointRequest,
    ApplyEndpointResponse,
    ApplyNetworkRequest,
    ApplyNetworkResponse,
    ApplyPolicyRequest,
    ApplyPolicyResponse,
    ApplyUplinkRequest,
    ApplyUplinkResponse,
    AuthorizeLinkRequest,
    AuthorizeLinkResponse,
    AuthorizeStreamsRequest,
    AuthorizeStreamsResponse,
    Daemon,
    DaemonState,
    DeleteEndpointRequest,
    DeleteEndpointResponse,
    DeleteNetworkRequest,
    DeleteNetworkResponse,
    EndpointStatus,
    GetHealthRequest,
    GetHealthResponse,
    GetInfoRequest,
    GetInfoResponse,
    HelperFeature,
    ListEndpointsRequest,
    ListEndpointsResponse,
    ListNetworksRequest,
    ListNetworksResponse,
    ListPolicyCountersRequest,
    ListPolicyCountersResponse,
    PolicyCounters,
    RefuseStreamRequest,
    RefuseStreamResponse,
    SyncFailure,
    SyncRequest,
    SyncResponse,
    WatchEventsRequest,
    WatchEventsResponse,
    WatchStarted,
)
from taploom.contracts.taploom.helper.v1.rpc import HelperServiceBase
from taploom.contracts.taploom.link.v1 import LinkFeature
from taploom.link import LinkServer, UnknownEndpointError
from taploom.rpc import RpcError, SendStream, ServerContext, StatusCode
from taploom.supervise import SupervisedProcess

logger = logging.getLogger("taploom.helper.service")

_STATES = {"starting": DaemonState.STARTING, "running": DaemonState.RUNNING, "down": DaemonState.DOWN}
_LINK_FEATURES = {
    LinkFeature.VNET_HDR: HelperFeature.LINK_VNET_HDR,
    LinkFeature.TSO: HelperFeature.LINK_TSO,
    LinkFeature.USO: HelperFeature.LINK_USO,
}


def daemon_message(process: SupervisedProcess, network_id: str = "") -> Daemon:
    """A daemon's state as the contract has it."""
    return Daemon(
        name=process.name,
        network_id=network_id,
        state=_STATES[process.state],
        pid=process.pid,
        restarts=process.restarts,
        last_exit=process.last_exit,
        started_at=process.started_at,
    )


class HelperService(HelperServiceBase):
    """Serves the fabric to the host.

    Args:
        link_features: those that data links may have here.
        instance_id: new for each start of the agent.
    """

    def __init__(
        self,
        fabric: Fabric,
        stack: Stack,
        link_server: LinkServer,
        events: Events,
        streams: Streams,
        *,
        link_features: frozenset[LinkFeature],
        instance_id: str,
    ) -> None:
        self._fabric = fabric
        self._stack = stack
        self._links = link_server
        self._events = events
        self._streams = streams
        self._link_features = link_features
        self._instance_id = instance_id

    async def get_info(self, request: GetInfoRequest, context: ServerContext) -> GetInfoResponse:
        features = [_LINK_FEATURES[feature] for feature in sorted(self._link_features)]
        features += [HelperFeature.EVENTS, HelperFeature.EGRESS, HelperFeature.STREAMS, HelperFeature.EARLY_LINKS]
        features.append(HelperFeature.STREAM_RECORDS)
        features += [HelperFeature.POLICY, HelperFeature.DHCP, HelperFeature.IPV6, HelperFeature.QOS]
        if TRACE_PROGRAM in self._stack.programs:
            features.append(HelperFeature.TRACE)
        features += [HelperFeature.BALANCERS, HelperFeature.CAPTURE, HelperFeature.MIRRORS, HelperFeature.VLAN]
        if self._stack.kernel_datapath:
            features.append(HelperFeature.KERNEL_DATAPATH)
        return GetInfoResponse(
            version=__version__,
            contract_versions=[1],
            features=features,
            ovs_version=self._stack.ovs_version,
            ovn_version=self._stack.ovn_version,
            instance_id=self._instance_id,
        )

    async def get_health(self, request: GetHealthRequest, context: ServerContext) -> GetHealthResponse:
        daemons = [daemon_message(process) for process in self._stack.daemons.values()]
        for network_id, network in sorted(self._fabric.networks.items()):
            if network.dns is not None and network.dns.process is not None:
                daemons.append(daemon_message(network.dns.process, network_id))
        reason = ""
        if not self._stack.ready.is_set():
            reason = f"waiting for {self._stack.waiting_for}"
        else:
            down = [d.name for d in daemons if not d.network_id and d.state != DaemonState.RUNNING]
            if down:
                reason = f"{', '.join(down)} not running"
        return GetHealthResponse(ready=not reason, reason=reason, daemons=daemons)

    async def apply_network(self, request: ApplyNetworkRequest, context: ServerContext) -> ApplyNetworkResponse:
        with as_status():
            if request.network is None:
                raise InvalidSpecError("network is missing")
            await self._fabric.apply_network(request.network)
        return ApplyNetworkResponse()

    async def delete_network(self, request: DeleteNetworkRequest, context: ServerContext) -> DeleteNetworkResponse:
        with as_status():
            await self._fabric.delete_network(request.network_id)
        return DeleteNetworkResponse()

    async def apply_endpoint(self, request: ApplyEndpointRequest, context: ServerContext) -> ApplyEndpointResponse:
        with as_status():
            if request.endpoint is None:
                raise InvalidSpecError("endpoint is missing")
            endpoint = await self._fabric.apply_endpoint(request.endpoint, request.link_secret)
            return ApplyEndpointResponse(status=self._status(endpoint))

    async def delete_endpoint(self, request: DeleteEndpointRequest, context: ServerContext) -> DeleteEndpointResponse:
        with as_status():
            await self._fabric.delete_endpoint(request.endpoint_id)
        return DeleteEndpointResponse()

    async def list_endpoints(self, request: ListEndpointsRequest, context: ServerContext) -> ListEndpointsResponse:
        endpoints = [endpoint for _, endpoint in sorted(self._fabric.endpoints.items())]
        return ListEndpointsResponse(endpoints=[self._status(endpoint) for endpoint in endpoints])

    async def list_networks(self, request: ListNetworksRequest, context: ServerContext) -> ListNetworksResponse:
        networks = [network for _, network in sorted(self._fabric.networks.items())]
        return ListNetworksResponse(networks=[network.message for network in networks])

    async def authorize_link(self, request: AuthorizeLinkRequest, context: ServerContext) -> AuthorizeLinkResponse:
        with as_status():
            self._fabric.authorize(request.endpoint_id, request.secret)
        return AuthorizeLinkResponse()

    async def apply_uplink(self, request: ApplyUplinkRequest, context: ServerContext) -> ApplyUplinkResponse:
        with as_status():
            if request.uplink is None:
                raise InvalidSpecError("uplink is missing")
            await self._fabric.apply_uplink(request.uplink)
        return ApplyUplinkResponse()

    async def authorize_streams(
        self, request: AuthorizeStreamsRequest, context: ServerContext
    ) -> AuthorizeStreamsResponse:
        with as_status():
            self._streams.authorize(request.secret)
        return AuthorizeStreamsResponse()

    async def refuse_stream(self, request: RefuseStreamRequest, context: ServerContext) -> RefuseStreamResponse:
        self._streams.refuse(request.token)
        return RefuseStreamResponse()

    async def apply_policy(self, request: ApplyPolicyRequest, context: ServerContext) -> ApplyPolicyResponse:
        with as_status():
            if request.policy is None:
                raise InvalidSpecError("policy is missing")
            await self._fabric.apply_policy(request.policy, request.endpoints)
        return ApplyPolicyResponse()

    async def list_policy_counters(
        self, request: ListPolicyCountersRequest, context: ServerContext
    ) -> ListPolicyCountersResponse:
        with as_status():
            counted = await self._fabric.policy_counters(request.rule_ids)
        return ListPolicyCountersResponse(
            counters=[
                PolicyCounters(rule_id=rule_id, packets=packets, bytes=octets)
                for rule_id, (packets, octets) in sorted(counted.items())
            ]
        )

    async def sync(self, request: SyncRequest, context: ServerContext) -> SyncResponse:
        with as_status():
            outcome = await self._fabric.sync(request)
            return SyncResponse(
                endpoints=[self._status(endpoint) for endpoint in outcome.endpoints],
                removed_ids=outcome.removed,
                failures=[
                    SyncFailure(id=key, code=StatusCode[error.status], message=error.message)
                    for key, error in outcome.failures
                ],
            )

    async def watch_events(
        self, request: WatchEventsRequest, stream: SendStream[WatchEventsResponse], context: ServerContext
    ) -> None:
        async with self._events.watch() as events:
            await stream.send(WatchEventsResponse(started=WatchStarted()))
            try:
                async for event in events:
                    await stream.send(event)
            except LaggingError as exc:
                raise RpcError(StatusCode.RESOURCE_EXHAUSTED, f"events were missed: {exc}; watch again") from exc

    def _status(self, endpoint: EndpointState) -> EndpointStatus:
        status = EndpointStatus(endpoint=endpoint.message, port_up=self._fabric.is_up(endpoint))
        if endpoint.tap is None:
            return status
        status.tap = endpoint.tap.name
        with contextlib.suppress(UnknownEndpointError):
            link = self._links.status(endpoint.spec.endpoint_id)
            status.link_up = link.up
            status.link_features = sorted(link.features) if link.up else []
            status.counters = link.counters
            status.last_close_reason = link.last_close_reason
        return status


@contextlib.contextmanager
def as_status() -> Iterator[None]:
    """Errors of ours become the call's status."""
    try:
        yield
    except HelperError as exc:
        raise RpcError(StatusCode[exc.status], exc.message) from exc
    except OSError as exc:
        logger.exception("a call failed")
        raise RpcError(StatusCode.INTERNAL, f"the kernel refused: {exc}") from exc
