"""Small agents for the bridge's tests: they speak the real contracts over real Unix sockets, with real data ports, and
keep what they are told in dictionaries instead of a kernel. Knobs make them slow, silent, old, new or hostile."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import math
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import trio

from host_bridge.api import GuestApi, NetworkApi, StatusApi
from host_bridge.balancer.api import BalancerApi
from host_bridge.balancer.publishing import BalancerPorts
from host_bridge.capture.api import CaptureApi
from host_bridge.desired import DesiredState
from host_bridge.fabric import Fabric, Timing
from host_bridge.host_addresses import HostAddresses
from host_bridge.mirror.api import MirrorApi
from host_bridge.policy.api import PolicyApi
from host_bridge.ports import PortPublisher
from host_bridge.qos.api import QosApi
from host_bridge.store import Store
from taploom.address import UnixAddress, connect, open_listener
from taploom.contracts.taploom.bridge.v1.rpc import (
    BalancerServiceClient,
    CaptureServiceClient,
    MirrorServiceClient,
    NetworkServiceClient,
    PolicyServiceClient,
    QosServiceClient,
    StatusServiceClient,
)
from taploom.contracts.taploom.bridge.v1.rpc import GuestServiceClient as GuestApiClient
from taploom.contracts.taploom.guest import v1 as guest
from taploom.contracts.taploom.guest.v1.rpc import GuestServiceBase
from taploom.contracts.taploom.helper import v1 as helper
from taploom.contracts.taploom.helper.v1.rpc import BalancerServiceBase as HelperBalancerServiceBase
from taploom.contracts.taploom.helper.v1.rpc import CaptureServiceBase as HelperCaptureServiceBase
from taploom.contracts.taploom.helper.v1.rpc import HelperServiceBase
from taploom.contracts.taploom.helper.v1.rpc import MirrorServiceBase as HelperMirrorServiceBase
from taploom.contracts.taploom.link.v1 import LinkCounters, LinkFeature, LinkHello, LinkRefusal, StreamTarget
from taploom.link import open_dataplane
from taploom.link.handshake import HandshakeError, negotiate, ready, receive_message, refused
from taploom.rpc import ReceiveStream, RpcError, SendStream, Server, ServerContext, StatusCode, open_channel

_instances = itertools.count(1)
ALL_LINK_FEATURES = frozenset({LinkFeature.VNET_HDR, LinkFeature.TSO, LinkFeature.USO})


class FakeAgent:
    """What both agents have: two sockets, single-use secrets, links, events, and knobs.

    Attributes:
        directory: where control.sock and data.sock are.
        calls: the names of the methods called, in order.
        hang: methods that never answer.
        slow: methods that take so many seconds, each call anew, with what they do.
        fail: methods that fail, with the error.
        before: called before each method answers, with its name.
        links: the open data links by endpoint.
        refuse_links: why every hello is refused; None: they are not.
    """

    service_names: tuple[str, ...] = ()

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory = directory
        self.calls: list[str] = []
        self.hang: set[str] = set()
        self.slow: dict[str, float] = {}
        self.fail: dict[str, RpcError] = {}
        self.links: dict[str, trio.SocketStream] = {}
        self.hellos: list[LinkHello] = []
        self.link_features = ALL_LINK_FEATURES
        self.refuse_links: str | None = None
        self.instance_id = f"instance-{next(_instances)}"
        self.version = "0.1.0"
        self.contract_versions = [1]
        self.further_fields = b""
        self.services: list[Any] = []
        self.changed = trio.lowlevel.ParkingLot()
        self._secrets: dict[str, bytes] = {}
        self._watchers: set[trio.MemorySendChannel[Any]] = set()
        self._scope: trio.CancelScope | None = None
        self._stopped = trio.Event()

    @property
    def control(self) -> str:
        return f"unix:{self.directory}/control.sock"

    @property
    def data(self) -> str:
        return f"unix:{self.directory}/data.sock"

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves until `stop`."""
        control = await open_listener(UnixAddress(f"{self.directory}/control.sock"))
        data = await open_listener(UnixAddress(f"{self.directory}/data.sock"))
        self._stopped = trio.Event()
        server = Server([self, *self.services])  # type: ignore[list-item]
        try:
            async with trio.open_nursery() as nursery:
                self._scope = nursery.cancel_scope
                await nursery.start(server.serve, control)
                nursery.start_soon(self._serve_data, data, nursery)
                task_status.started()
        finally:
            for endpoint_id in list(self.links):
                self.break_link(endpoint_id)
            self._secrets.clear()
            self._stopped.set()

    async def stop(self) -> None:
        """Ends as a process does that is killed: every stream is closed, nothing is kept but what is durable."""
        assert self._scope is not None
        self._scope.cancel()
        await self._stopped.wait()
        for name in ("control.sock", "data.sock"):
            (self.directory / name).unlink(missing_ok=True)
        self.instance_id = f"instance-{next(_instances)}"

    async def _called(self, name: str) -> None:
        self.calls.append(name)
        self.changed.unpark_all()
        if name in self.hang:
            await trio.sleep_forever()
        if name in self.slow:
            await trio.sleep(self.slow[name])
        if name in self.fail:
            raise self.fail[name]

    def authorize(self, endpoint_id: str, secret: bytes) -> None:
        if secret:
            self._secrets[endpoint_id] = secret

    def known(self, endpoint_id: str) -> bool:
        raise NotImplementedError

    async def _serve_data(self, listener: trio.abc.Listener[trio.SocketStream], nursery: trio.Nursery) -> None:
        async with listener:
            while True:
                nursery.start_soon(self._link, await listener.accept())

    async def _link(self, stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError, HandshakeError):
            hello = await receive_message(stream, LinkHello)
            self.hellos.append(hello)
            if hello.stream is not None:
                await self.carry(stream, hello)
                return
            secret = self._secrets.pop(hello.endpoint_id, None)
            if self.refuse_links is not None:
                await stream.send_all(refused(LinkRefusal.UNAVAILABLE, self.refuse_links))
            elif secret != hello.secret or not self.known(hello.endpoint_id):
                await stream.send_all(refused(LinkRefusal.UNAUTHORIZED, "wrong secret"))
            else:
                await stream.send_all(ready(1, negotiate(hello.features, self.link_features)))
                self.links[hello.endpoint_id] = stream
                self.changed.unpark_all()
                return
        await trio.aclose_forcefully(stream)

    async def carry(self, stream: trio.SocketStream, hello: LinkHello) -> None:
        """Serves a stream."""
        await stream.send_all(refused(LinkRefusal.UNAVAILABLE, "no streams here"))
        await trio.aclose_forcefully(stream)

    def break_link(self, endpoint_id: str) -> None:
        """Closes the endpoint's data link."""
        stream = self.links.pop(endpoint_id)
        stream.socket.close()

    def close_links_of_removed(self) -> None:
        """Closes the links of endpoints that are not here any more."""
        for endpoint_id in [one for one in self.links if not self.known(one)]:
            self.break_link(endpoint_id)

    def tell(self, event: Any) -> None:
        """Sends an event to whoever watches."""
        for watcher in self._watchers:
            watcher.send_nowait(event)

    async def watch(self, started: Any, stream: SendStream[Any]) -> None:
        send, receive = trio.open_memory_channel[Any](math.inf)
        self._watchers.add(send)
        try:
            await stream.send(started)
            async for event in receive:
                await stream.send(event)
        finally:
            self._watchers.discard(send)

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self.changed.park()


class FakeGuest(FakeAgent, GuestServiceBase):
    """A guest's agent: interfaces in a dictionary."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.interfaces: dict[str, guest.Interface] = {}
        self.resolver: guest.Resolver | None = None
        self.own_interfaces: set[str] = set()
        self.features: list[Any] = [f for f in guest.GuestFeature if f]

    def known(self, endpoint_id: str) -> bool:
        return endpoint_id in self.interfaces

    async def get_info(self, request: guest.GetInfoRequest, context: ServerContext) -> guest.GetInfoResponse:
        await self._called("GetInfo")
        info = guest.GetInfoResponse(
            version=self.version,
            contract_versions=self.contract_versions,
            features=self.features,
            hostname="vm",
            instance_id=self.instance_id,
        )
        return guest.GetInfoResponse.parse(bytes(info) + self.further_fields)

    async def apply_interface(
        self, request: guest.ApplyInterfaceRequest, context: ServerContext
    ) -> guest.ApplyInterfaceResponse:
        await self._called("ApplyInterface")
        assert request.interface is not None
        self._check(request.interface)
        self.interfaces[request.interface.endpoint_id] = request.interface
        self.authorize(request.interface.endpoint_id, request.link_secret)
        return guest.ApplyInterfaceResponse(status=self._status(request.interface))

    def _check(self, interface: guest.Interface) -> None:
        others = {one.name for key, one in self.interfaces.items() if key != interface.endpoint_id}
        if interface.name in self.own_interfaces | others:
            raise RpcError(StatusCode.ALREADY_EXISTS, f"interface {interface.name} is not mine")
        trunk = interface.trunk_child
        if trunk is not None and trunk.parent_endpoint_id not in self.interfaces:
            raise RpcError(StatusCode.FAILED_PRECONDITION, f"endpoint {trunk.parent_endpoint_id} is not here")

    def _status(self, interface: guest.Interface) -> guest.InterfaceStatus:
        up = interface.endpoint_id in self.links
        return guest.InterfaceStatus(
            interface=interface,
            state=guest.InterfaceState.UP if up else guest.InterfaceState.NO_LINK,
            counters=LinkCounters(tx_frames=1, tx_bytes=100, rx_frames=2, rx_bytes=200, tx_drops=3),
        )

    async def delete_interface(
        self, request: guest.DeleteInterfaceRequest, context: ServerContext
    ) -> guest.DeleteInterfaceResponse:
        await self._called("DeleteInterface")
        self.interfaces.pop(request.endpoint_id, None)
        self.close_links_of_removed()
        self.changed.unpark_all()
        return guest.DeleteInterfaceResponse()

    async def list_interfaces(
        self, request: guest.ListInterfacesRequest, context: ServerContext
    ) -> guest.ListInterfacesResponse:
        await self._called("ListInterfaces")
        return guest.ListInterfacesResponse(interfaces=[self._status(one) for one in self.interfaces.values()])

    async def apply_resolver(
        self, request: guest.ApplyResolverRequest, context: ServerContext
    ) -> guest.ApplyResolverResponse:
        await self._called("ApplyResolver")
        self.resolver = request.resolver
        return guest.ApplyResolverResponse()

    async def authorize_link(
        self, request: guest.AuthorizeLinkRequest, context: ServerContext
    ) -> guest.AuthorizeLinkResponse:
        await self._called("AuthorizeLink")
        if not self.known(request.endpoint_id):
            raise RpcError(StatusCode.NOT_FOUND, "no such endpoint")
        self.authorize(request.endpoint_id, request.secret)
        return guest.AuthorizeLinkResponse()

    async def sync(self, request: guest.SyncRequest, context: ServerContext) -> guest.SyncResponse:
        await self._called("Sync")
        wanted = {one.endpoint_id: one for one in request.interfaces}
        removed = sorted(self.interfaces.keys() - wanted.keys())
        for endpoint_id in removed:
            del self.interfaces[endpoint_id]
        failures = []
        for endpoint_id, interface in sorted(wanted.items(), key=lambda item: item[1].trunk_child is not None):
            try:
                self._check(interface)
                self.interfaces[endpoint_id] = interface
            except RpcError as error:
                failures.append(
                    guest.InterfaceFailure(endpoint_id=endpoint_id, code=int(error.code), message=error.message)
                )
        self.resolver = request.resolver
        self.close_links_of_removed()
        self.changed.unpark_all()
        return guest.SyncResponse(
            interfaces=[self._status(one) for one in self.interfaces.values()],
            removed_endpoint_ids=removed,
            failures=failures,
        )

    async def watch_events(
        self, request: guest.WatchEventsRequest, stream: SendStream[guest.WatchEventsResponse], context: ServerContext
    ) -> None:
        await self._called("WatchEvents")
        await self.watch(guest.WatchEventsResponse(started=guest.WatchStarted()), stream)


class FakeBalancers(HelperBalancerServiceBase):
    """The helper's load balancers."""

    def __init__(self, agent: FakeHelper) -> None:
        self._agent = agent

    async def apply_balancers(
        self, request: helper.ApplyBalancersRequest, context: ServerContext
    ) -> helper.ApplyBalancersResponse:
        await self._agent._called("ApplyBalancers")
        assert request.balancers is not None
        self._agent.balancers = request.balancers
        return helper.ApplyBalancersResponse()

    async def list_backends(
        self, request: helper.ListBackendsRequest, context: ServerContext
    ) -> helper.ListBackendsResponse:
        statuses = [
            helper.BackendStatus(
                balancer_id=balancer.balancer_id,
                endpoint_id=backend.endpoint_id,
                protocol=port.protocol,
                address=address,
                target_port=backend.target_port or port.target_port,
                health=helper.BackendHealth.DOWN,
            )
            for balancer in self._agent.balancers.balancers
            for backend in balancer.backends
            for port in balancer.ports
            for address in self._agent.endpoints[backend.endpoint_id].addresses
        ]
        return helper.ListBackendsResponse(backends=statuses)


class FakeMirrors(HelperMirrorServiceBase):
    """The helper's mirrors."""

    def __init__(self, agent: FakeHelper) -> None:
        self._agent = agent

    async def apply_mirrors(
        self, request: helper.ApplyMirrorsRequest, context: ServerContext
    ) -> helper.ApplyMirrorsResponse:
        await self._agent._called("ApplyMirrors")
        assert request.mirrors is not None
        self._agent.mirrors = request.mirrors
        self._agent.changed.unpark_all()
        return helper.ApplyMirrorsResponse()


class FakeCaptures(HelperCaptureServiceBase):
    """The helper's captures: one part of data, and what else the test has it say."""

    def __init__(self, agent: FakeHelper) -> None:
        self._agent = agent

    async def capture(
        self,
        requests: ReceiveStream[helper.CaptureRequest],
        responses: SendStream[helper.CaptureResponse],
        context: ServerContext,
    ) -> None:
        await self._agent._called("Capture")
        self._agent.capture = await requests.receive()
        await responses.send(helper.CaptureResponse(data=b"packets"))
        end = self._agent.capture_end
        if end is helper.CaptureEnd.STOPPED:
            assert await requests.receive() is None
        await responses.send(helper.CaptureResponse(data=b" and more", end=end))


class FakeHelper(FakeAgent, HelperServiceBase):
    """The helper's agent: networks and endpoints in dictionaries."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.networks: dict[str, helper.Network] = {}
        self.endpoints: dict[str, helper.Endpoint] = {}
        self.features: list[Any] = [f for f in helper.HelperFeature if f]
        self.ready = True
        self.uplink: helper.Uplink | None = None
        self.stream_secret = b""
        self.streams: list[StreamTarget] = []
        self.refused_streams: list[bytes] = []
        self.policy = helper.Policy()
        self.counters: dict[str, tuple[int, int]] = {}
        self.balancers = helper.Balancers()
        self.mirrors = helper.Mirrors()
        self.capture: helper.CaptureRequest | None = None
        self.capture_end = helper.CaptureEnd.STOPPED
        self.services = [FakeBalancers(self), FakeMirrors(self), FakeCaptures(self)]

    @property
    def created(self) -> dict[str, helper.Network]:
        """The networks that somebody created: all but the default bridge."""
        return {key: network for key, network in self.networks.items() if network.name != "bridge"}

    def known(self, endpoint_id: str) -> bool:
        return endpoint_id in self.endpoints

    async def carry(self, stream: trio.SocketStream, hello: LinkHello) -> None:
        """Whatever its target is, it echoes."""
        assert hello.stream is not None
        async with stream:
            if not self.stream_secret or hello.secret != self.stream_secret:
                await stream.send_all(refused(LinkRefusal.UNAUTHORIZED, "wrong secret"))
                return
            self.streams.append(hello.stream)
            await stream.send_all(ready(1, ()))
            async for data in stream:
                await stream.send_all(data)

    def _check_ready(self) -> None:
        if not self.ready:
            raise RpcError(StatusCode.UNAVAILABLE, "waiting for ovn-northd")

    async def get_info(self, request: helper.GetInfoRequest, context: ServerContext) -> helper.GetInfoResponse:
        await self._called("GetInfo")
        return helper.GetInfoResponse(
            version=self.version,
            contract_versions=self.contract_versions,
            features=self.features,
            instance_id=self.instance_id,
        )

    async def get_health(self, request: helper.GetHealthRequest, context: ServerContext) -> helper.GetHealthResponse:
        await self._called("GetHealth")
        daemon = helper.Daemon(
            name="ovs-vswitchd",
            state=helper.DaemonState.RUNNING,
            pid=1,
            restarts=4,
            started_at=datetime.datetime.now(datetime.UTC),
        )
        reason = "" if self.ready else "waiting for ovn-northd"
        return helper.GetHealthResponse(ready=self.ready, reason=reason, daemons=[daemon])

    async def apply_network(
        self, request: helper.ApplyNetworkRequest, context: ServerContext
    ) -> helper.ApplyNetworkResponse:
        await self._called("ApplyNetwork")
        self._check_ready()
        assert request.network is not None
        self.networks[request.network.network_id] = request.network
        return helper.ApplyNetworkResponse()

    async def delete_network(
        self, request: helper.DeleteNetworkRequest, context: ServerContext
    ) -> helper.DeleteNetworkResponse:
        await self._called("DeleteNetwork")
        self.networks.pop(request.network_id, None)
        return helper.DeleteNetworkResponse()

    async def apply_endpoint(
        self, request: helper.ApplyEndpointRequest, context: ServerContext
    ) -> helper.ApplyEndpointResponse:
        await self._called("ApplyEndpoint")
        self._check_ready()
        assert request.endpoint is not None
        if request.endpoint.network_id not in self.networks:
            raise RpcError(StatusCode.FAILED_PRECONDITION, "no such network")
        for other in self.endpoints.values():
            if other.endpoint_id != request.endpoint.endpoint_id and other.network_id == request.endpoint.network_id:
                assert not set(other.addresses) & set(request.endpoint.addresses), "an address has two holders"
        self.endpoints[request.endpoint.endpoint_id] = request.endpoint
        self.authorize(request.endpoint.endpoint_id, request.link_secret)
        return helper.ApplyEndpointResponse(status=self._status(request.endpoint))

    def _status(self, endpoint: helper.Endpoint) -> helper.EndpointStatus:
        up = endpoint.endpoint_id in self.links
        return helper.EndpointStatus(endpoint=endpoint, port_up=True, link_up=up, counters=LinkCounters(rx_drops=1))

    async def delete_endpoint(
        self, request: helper.DeleteEndpointRequest, context: ServerContext
    ) -> helper.DeleteEndpointResponse:
        await self._called("DeleteEndpoint")
        self.endpoints.pop(request.endpoint_id, None)
        self.close_links_of_removed()
        self.changed.unpark_all()
        return helper.DeleteEndpointResponse()

    async def list_endpoints(
        self, request: helper.ListEndpointsRequest, context: ServerContext
    ) -> helper.ListEndpointsResponse:
        await self._called("ListEndpoints")
        return helper.ListEndpointsResponse(endpoints=[self._status(one) for one in self.endpoints.values()])

    async def list_networks(
        self, request: helper.ListNetworksRequest, context: ServerContext
    ) -> helper.ListNetworksResponse:
        await self._called("ListNetworks")
        return helper.ListNetworksResponse(networks=list(self.networks.values()))

    async def authorize_link(
        self, request: helper.AuthorizeLinkRequest, context: ServerContext
    ) -> helper.AuthorizeLinkResponse:
        await self._called("AuthorizeLink")
        if not self.known(request.endpoint_id):
            raise RpcError(StatusCode.NOT_FOUND, "no such endpoint")
        self.authorize(request.endpoint_id, request.secret)
        return helper.AuthorizeLinkResponse()

    async def apply_uplink(
        self, request: helper.ApplyUplinkRequest, context: ServerContext
    ) -> helper.ApplyUplinkResponse:
        await self._called("ApplyUplink")
        self.uplink = request.uplink
        return helper.ApplyUplinkResponse()

    async def authorize_streams(
        self, request: helper.AuthorizeStreamsRequest, context: ServerContext
    ) -> helper.AuthorizeStreamsResponse:
        await self._called("AuthorizeStreams")
        self.stream_secret = request.secret
        return helper.AuthorizeStreamsResponse()

    async def apply_policy(
        self, request: helper.ApplyPolicyRequest, context: ServerContext
    ) -> helper.ApplyPolicyResponse:
        await self._called("ApplyPolicy")
        self._check_ready()
        assert request.policy is not None
        self.policy = request.policy
        for endpoint_id, member in request.endpoints.items():
            if endpoint_id in self.endpoints:
                self.endpoints[endpoint_id].policy = member
        return helper.ApplyPolicyResponse()

    async def list_policy_counters(
        self, request: helper.ListPolicyCountersRequest, context: ServerContext
    ) -> helper.ListPolicyCountersResponse:
        await self._called("ListPolicyCounters")
        return helper.ListPolicyCountersResponse(
            counters=[
                helper.PolicyCounters(rule_id=rule_id, packets=packets, bytes=octets)
                for rule_id, (packets, octets) in self.counters.items()
                if not request.rule_ids or rule_id in request.rule_ids
            ]
        )

    async def refuse_stream(
        self, request: helper.RefuseStreamRequest, context: ServerContext
    ) -> helper.RefuseStreamResponse:
        await self._called("RefuseStream")
        self.refused_streams.append(request.token)
        self.changed.unpark_all()
        return helper.RefuseStreamResponse()

    async def sync(self, request: helper.SyncRequest, context: ServerContext) -> helper.SyncResponse:
        await self._called("Sync")
        self._check_ready()
        wanted = {one.endpoint_id: one for one in request.endpoints}
        networks = {one.network_id: one for one in request.networks}
        removed = sorted((self.endpoints.keys() - wanted.keys()) | (self.networks.keys() - networks.keys()))
        self.endpoints, self.networks, self.uplink = wanted, networks, request.uplink
        self.policy = request.policy or helper.Policy()
        self.balancers = request.balancers or helper.Balancers()
        self.mirrors = request.mirrors or helper.Mirrors()
        self.close_links_of_removed()
        self.changed.unpark_all()
        return helper.SyncResponse(
            endpoints=[self._status(one) for one in self.endpoints.values()], removed_ids=removed
        )

    async def watch_events(
        self,
        request: helper.WatchEventsRequest,
        stream: SendStream[helper.WatchEventsResponse],
        context: ServerContext,
    ) -> None:
        await self._called("WatchEvents")
        await self.watch(helper.WatchEventsResponse(started=helper.WatchStarted()), stream)


class Rig:
    """A bridge in this process with fake agents around it, and its API's clients."""

    def __init__(self, directory: Path, nursery: trio.Nursery, store: Store) -> None:
        self.directory = directory
        self.nursery = nursery
        self.store = store
        self.helper = FakeHelper(directory / "helper")
        self.guests: dict[str, FakeGuest] = {}
        self.fabric: Fabric
        self.networks: NetworkServiceClient
        self.guest_api: GuestApiClient
        self.status_api: StatusServiceClient
        self.policies: PolicyServiceClient
        self.balancers: BalancerServiceClient
        self.qos: QosServiceClient
        self.mirrors: MirrorServiceClient
        self.captures: CaptureServiceClient

    async def guest(self, name: str, *, register: bool = True, run: bool = True) -> FakeGuest:
        """Another guest; registered, and connected when this returns, unless said otherwise."""
        agent = FakeGuest(self.directory / "guests" / name)
        self.guests[name] = agent
        if run:
            await self.nursery.start(agent.run)
        if register:
            await self.fabric.register_guest(name, agent.control)
            if run:
                await self.until(lambda: self.peer(name).connected and "Sync" in agent.calls)
        return agent

    def peer(self, name: str) -> Any:
        return next(peer for peer in self.fabric.guests.values() if peer.record.name == name)

    def link(self, name: str, network: str) -> Any:
        return next(link for link in self.fabric.links.values() if link.label == f"{name} on {network}")

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for a condition that nothing signals."""
        with trio.fail_after(60):
            while not condition():
                await trio.sleep(0.005)


@contextlib.asynccontextmanager
async def open_rig(
    directory: Path,
    *,
    timing: Timing | None = None,
    run_helper: bool = True,
    upstreams: tuple[str, ...] = (),
    host_addresses: HostAddresses | None = None,
) -> AsyncIterator[Rig]:
    """A running bridge with a fake helper, its API on a Unix socket, and connected clients."""
    async with open_dataplane() as dataplane:
        with Store(directory / "state") as store:
            async with trio.open_nursery() as nursery:
                rig = Rig(directory, nursery, store)
                if run_helper:
                    await nursery.start(rig.helper.run)
                rig.fabric = Fabric(
                    DesiredState(store),
                    dataplane,
                    UnixAddress(f"{rig.helper.directory}/control.sock"),
                    UnixAddress(f"{rig.helper.directory}/data.sock"),
                    timing=timing or Timing(deadline=5.0, grace=0.2, settle=1.0),
                    upstreams=upstreams,
                    host_addresses=host_addresses,
                )
                socket = UnixAddress(f"{directory}/bridge/api.sock")
                apis = (NetworkApi, GuestApi, StatusApi, PolicyApi, QosApi, MirrorApi, CaptureApi)
                publisher = PortPublisher(rig.fabric.helper, dataplane, is_gateway=lambda _address: False)
                balancers = BalancerApi(rig.fabric, BalancerPorts(publisher, lambda _name: ()))
                server = Server([*(api(rig.fabric) for api in apis), balancers])
                await nursery.start(rig.fabric.run)
                await nursery.start(server.serve, await open_listener(socket))
                async with open_channel(await connect(socket)) as channel:
                    rig.networks = NetworkServiceClient(channel)
                    rig.guest_api = GuestApiClient(channel)
                    rig.status_api = StatusServiceClient(channel)
                    rig.policies = PolicyServiceClient(channel)
                    rig.balancers = BalancerServiceClient(channel)
                    rig.qos = QosServiceClient(channel)
                    rig.mirrors = MirrorServiceClient(channel)
                    rig.captures = CaptureServiceClient(channel)
                    if run_helper:
                        await rig.until(lambda: rig.fabric.helper.connected and "Sync" in rig.helper.calls)
                    yield rig
                nursery.cancel_scope.cancel()


@contextlib.contextmanager
def unchanged(rig: Rig) -> Iterator[None]:
    """Fails when the block changes the database."""
    before = rig.store.dump()
    yield
    assert rig.store.dump() == before
