"""The helper VM's agent, as a peer: `taploom.helper.v1`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from host_bridge.balancer.state import BalancerState
from host_bridge.describe import (
    has_dhcp,
    helper_endpoint,
    helper_network,
    helper_uplink,
    is_routed,
    needs_of_network,
    published_ports,
)
from host_bridge.mirror.state import MirrorState
from host_bridge.model import EndpointRecord, NetworkRecord
from host_bridge.names import clean_text
from host_bridge.peer import (
    SYNC_TIME_PER_OBJECT,
    Event,
    LinkDownEvent,
    OtherEvent,
    Peer,
    PeerInfo,
    ResyncEvent,
    SyncResult,
    status_code,
)
from host_bridge.policy.state import PolicyState
from host_bridge.qos.state import QosState
from host_bridge.store import Store
from taploom.address import Address, HybridAddress
from taploom.contracts.taploom.helper.v1 import (
    ApplyBalancersRequest,
    ApplyEndpointRequest,
    ApplyMirrorsRequest,
    ApplyNetworkRequest,
    ApplyPolicyRequest,
    ApplyUplinkRequest,
    AuthorizeLinkRequest,
    AuthorizeStreamsRequest,
    BackendChanged,
    BackendHealth,
    BackendStatus,
    DaemonState,
    DeleteEndpointRequest,
    DeleteNetworkRequest,
    Endpoint,
    EndpointPolicy,
    EndpointStatus,
    GetHealthRequest,
    GetHealthResponse,
    GetInfoRequest,
    HelperFeature,
    ListBackendsRequest,
    ListEndpointsRequest,
    ListPolicyCountersRequest,
    ListQosCountersRequest,
    Network,
    PolicyLogged,
    QosCounters,
    RefuseStreamRequest,
    StreamWanted,
    SyncRequest,
    TracePacketRequest,
    TracePacketResponse,
    TrunkChild,
    Uplink,
    WatchEventsRequest,
    WatchEventsResponse,
)
from taploom.contracts.taploom.helper.v1.rpc import (
    BalancerServiceClient,
    HelperServiceClient,
    MirrorServiceClient,
    QosServiceClient,
    TraceServiceClient,
)
from taploom.contracts.taploom.link.v1 import LinkFeature, StreamProtocol
from taploom.link import new_secret
from taploom.rpc import Channel, RpcError, StatusCode

_LINK_FEATURES = {
    HelperFeature.LINK_VNET_HDR: LinkFeature.VNET_HDR,
    HelperFeature.LINK_TSO: LinkFeature.TSO,
    HelperFeature.LINK_USO: LinkFeature.USO,
}
_NETWORK = "network:"
UPLINK_KEY = "uplink"
STREAMS_KEY = "streams"
POLICY_KEY = "policy"
BALANCERS_KEY = "balancers"
MIRRORS_KEY = "mirrors"

# What an agent that lacks a feature is too old for.
_TOO_OLD = {
    HelperFeature.POLICY: "to enforce policies",
    HelperFeature.BALANCERS: "for load balancers",
    HelperFeature.QOS: "to limit rates",
    HelperFeature.MIRRORS: "to copy what guests send and receive",
    HelperFeature.CAPTURE: "to capture packets",
}

# Objects that are wanted for as long as the agent can do them.
_LABELS = {
    UPLINK_KEY: "the uplink",
    STREAMS_KEY: "the secret of streams",
    POLICY_KEY: "the policy",
    BALANCERS_KEY: "the load balancers",
    MIRRORS_KEY: "the mirrors",
}

C = TypeVar("C")

HelperObject = (
    Network
    | Endpoint
    | Uplink
    | AuthorizeStreamsRequest
    | ApplyPolicyRequest
    | ApplyBalancersRequest
    | ApplyMirrorsRequest
)


def network_key(network_id: str) -> str:
    """The key of a network at the helper; endpoints' keys are their ids."""
    return _NETWORK + network_id


class HelperPeer(Peer[HelperObject]):
    """The agent in the helper VM. Keys are endpoint ids, `network_key`s, and those of what there is once.

    Args:
        address: its control port.
        data_address: its data port.
        store: where what is wanted is read from.
        host_addresses: gives the host's addresses, without prefix length.
        on_up: called when the helper has been told everything after it was away.
        on_stream_wanted: called when a container opens a stream to the host.
        policies: which connections may pass.
        qos: how much guests may send and receive.
        on_policy_logged: called when a rule that is to be told of has matched.
        balancers: the load balancers.
        mirrors: copies of what guests send and receive.
        upstreams: DNS servers for names that no network knows, as DHCP tells them.
        options: see `Peer`.

    Attributes:
        stream_secret: what streams on the data port are opened with; None while the helper has not accepted one on the
            present connection.
    """

    # It tells of every link of every guest, and is ours.
    event_burst = 20_000.0
    event_rate = 5_000.0

    def __init__(
        self,
        address: Address,
        data_address: Address,
        store: Store,
        *,
        host_addresses: Callable[[], Sequence[str]],
        on_up: Callable[[], None],
        on_stream_wanted: Callable[[StreamWanted], None],
        policies: PolicyState,
        qos: QosState,
        on_policy_logged: Callable[[PolicyLogged], None],
        balancers: BalancerState,
        mirrors: MirrorState,
        upstreams: Sequence[str] = (),
        **options: Any,
    ) -> None:
        super().__init__("the helper", address, **options)
        self.data_address = data_address
        self.stream_secret: bytes | None = None
        self._next_secret = b""
        self._store = store
        self._host_addresses = host_addresses
        self._on_up = on_up
        self._on_stream_wanted = on_stream_wanted
        self._upstreams = tuple(upstreams)
        self._policies = policies
        self._qos = qos
        self._on_policy_logged = on_policy_logged
        self._balancers = balancers
        self._mirrors = mirrors
        self._client: HelperServiceClient | None = None
        self._channel: Channel | None = None

    @property
    def client(self) -> HelperServiceClient:
        """The stub. RpcError when there is no connection."""
        if self._client is None:
            raise RpcError(StatusCode.UNAVAILABLE, self.problem or "the helper is not connected")
        return self._client

    def bind(self, channel: Channel | None) -> None:
        self._client = None if channel is None else HelperServiceClient(channel)
        self._channel = channel
        self.stream_secret = None
        self._next_secret = new_secret()

    async def get_info(self, within: float) -> PeerInfo:
        info = await self.client.get_info(GetInfoRequest(), timeout=within)
        features = {int(feature) for feature in info.features}
        return PeerInfo(
            version=clean_text(info.version, 40),
            contract_versions=frozenset(info.contract_versions),
            link_features=frozenset(link for feature, link in _LINK_FEATURES.items() if feature in features),
            has_events=HelperFeature.EVENTS in features,
            instance_id=clean_text(info.instance_id, 80),
            features=frozenset(features),
        )

    @property
    def takes_early_links(self) -> bool:
        """Whether a link may be dialled before the helper has its endpoint."""
        return self._can(HelperFeature.EARLY_LINKS)

    def lacks(self, feature: HelperFeature) -> bool:
        """Whether the agent answers and cannot do that."""
        return self.connected and self.info is not None and not self._can(feature)

    def lack_of(self, feature: HelperFeature) -> str:
        """What to do about an agent that answers and lacks a feature of `_TOO_OLD`; empty when it does not."""
        return self._too_old(_TOO_OLD[feature]) if self.lacks(feature) else ""

    def _too_old(self, what: str) -> str:
        version = self.info.version if self.info is not None else "unknown"
        return f"{self.subject} (version {version}) is too old {what}: update it"

    def _stub(self, kind: Callable[[Channel], C]) -> C:
        """The stub of a service of its own. RpcError when there is no connection."""
        if self._channel is None:
            raise RpcError(StatusCode.UNAVAILABLE, self.problem or "the helper is not connected")
        return kind(self._channel)

    @property
    def balancer_client(self) -> BalancerServiceClient:
        """The stub of what load balancers need. RpcError when there is no connection, or no such service."""
        stub = self._stub(BalancerServiceClient)
        lack = self.lack_of(HelperFeature.BALANCERS)
        if lack:
            raise RpcError(StatusCode.UNIMPLEMENTED, lack)
        return stub

    @property
    def tcp_protocol(self) -> StreamProtocol:
        """What TCP streams are opened with, into the networks and out of them."""
        # Few VMMs hand the end of one direction on through their Unix sockets.
        records = isinstance(self.data_address, HybridAddress) and self._can(HelperFeature.STREAM_RECORDS)
        return StreamProtocol.TCP_RECORDS if records else StreamProtocol.TCP

    def _can(self, feature: HelperFeature) -> bool:
        return self.info is not None and feature in self.info.features

    def wanted(self, key: str) -> HelperObject | None:
        if key == UPLINK_KEY:
            if not self._can(HelperFeature.EGRESS):
                return None
            return helper_uplink(self._store.host_id(), self._host_addresses())
        if key == STREAMS_KEY:
            return AuthorizeStreamsRequest(secret=self._next_secret) if self._can(HelperFeature.STREAMS) else None
        if key == POLICY_KEY:
            return self._wanted_policy() if self._can(HelperFeature.POLICY) else None
        if key == BALANCERS_KEY:
            if not self._can(HelperFeature.BALANCERS):
                return None
            return ApplyBalancersRequest(balancers=self._balancers.message)
        if key == MIRRORS_KEY:
            return self._mirrors.message() if self._can(HelperFeature.MIRRORS) else None
        if key.startswith(_NETWORK):
            network = self._store.network(key.removeprefix(_NETWORK))
            if network is None or not network.switched or self.lacking(key):
                return None
            return helper_network(network, self._features, self._upstreams)
        endpoint = self._store.endpoint(key)
        if endpoint is None:
            return None
        carrier = self._store.carrier_of(endpoint)
        if endpoint.carried is not None and carrier is None:
            return None
        guest = self._store.guest(endpoint.guest_id)
        network = self._store.network(endpoint.network_id)
        assert guest is not None and network is not None, "foreign keys"
        policy = self._policies.endpoint_policy(endpoint, guest, network)
        if policy is not None and (policy.deny_in or policy.deny_out) and self.lacks(HelperFeature.POLICY):
            return None  # it would be open: see `waits_for`
        if self.lacking(key):
            return None
        qos = self._qos.message(endpoint, network) if self._can(HelperFeature.QOS) else None
        described = helper_endpoint(
            endpoint, guest, network, policy, open_ports=self._open_ports(endpoint, network), qos=qos
        )
        if endpoint.carried is not None and carrier is not None:
            described.trunk_child = TrunkChild(parent_endpoint_id=carrier.id, tag=endpoint.carried.tag)
        taken = self._balancers.names_on(network.id)
        if taken:
            described.names = [name for name in described.names if name.lower() not in taken]
        return described

    def _open_ports(self, endpoint: EndpointRecord, network: NetworkRecord) -> list[tuple[str, int]]:
        """What the endpoint's container publishes, if it is one and the network is routed."""
        container = self._store.container(endpoint.guest_id) if is_routed(network) else None
        return [] if container is None else published_ports(container.config)

    def lacking(self, key: str) -> str:
        """What a helper that answers is too old for, of a network or an endpoint; empty: nothing."""
        if not self.connected or self.info is None:
            return ""
        endpoint = None if key.startswith(_NETWORK) else self._store.endpoint(key)
        network = self._store.network(key.removeprefix(_NETWORK) if endpoint is None else endpoint.network_id)
        if network is None:
            return ""
        tagged = network.vlan is not None or (endpoint is not None and endpoint.carried is not None)
        if tagged and not self._can(HelperFeature.VLAN):
            return self._too_old("for VLANs")
        if not needs_of_network(network) <= self._features:
            return self._too_old(f"for what network {network.name} is to do with IPv6 and its gateway")
        guest = None if endpoint is None else self._store.guest(endpoint.guest_id)
        if guest is not None and has_dhcp(guest, network) and not self._can(HelperFeature.DHCP):
            return self._too_old("to give addresses by DHCP")
        return ""

    @property
    def _features(self) -> frozenset[int]:
        return self.info.features if self.info is not None else frozenset()

    def _wanted_policy(self) -> ApplyPolicyRequest:
        """All rules, and what they mean to everybody, so that nothing is between two states."""
        guests = {guest.id: guest for guest in self._store.guests()}
        members = {}
        for endpoint in self._store.endpoints():
            network = self._store.network(endpoint.network_id)
            assert network is not None, "foreign keys"
            found = self._policies.endpoint_policy(endpoint, guests[endpoint.guest_id], network)
            members[endpoint.id] = found or EndpointPolicy()
        return ApplyPolicyRequest(policy=self._policies.message, endpoints=dict(sorted(members.items())))

    def waits_for(self, key: str) -> str:
        lack = self.lack_of(HelperFeature.POLICY)
        if lack and self.wanted(key) is None and self._store.endpoint(key) is not None:
            return lack
        return self.lacking(key) or self._lost_carrier(key) or super().waits_for(key)

    def _lost_carrier(self, key: str) -> str:
        """Which network a guest is no longer on over whose interface this endpoint of its goes; empty: it is there."""
        endpoint = self._store.endpoint(key)
        if endpoint is None or endpoint.carried is None or self._store.carrier_of(endpoint) is not None:
            return ""
        return f"it goes over the interface on {endpoint.carried.parent}, which the guest is not on: connect it there"

    def wanted_keys(self) -> Iterable[str]:
        networks = [network_key(network.id) for network in self._store.networks()]
        endpoints = [endpoint.id for endpoint in self._store.endpoints()]
        return [STREAMS_KEY, UPLINK_KEY, POLICY_KEY, BALANCERS_KEY, MIRRORS_KEY, *networks, *endpoints]

    def in_snapshot(self, key: str) -> bool:
        return key != STREAMS_KEY

    def claims(self, description: HelperObject) -> frozenset[str]:
        if isinstance(description, Network):
            own = {*description.subnets, *description.dns_servers, *description.uplink_addresses}
            return frozenset({*own, f"name {description.name}"})
        if isinstance(description, Endpoint):
            own = {*description.addresses, description.mac_address}
            return frozenset(f"{description.network_id} {one}" for one in own)
        return frozenset()

    def requires(self, description: HelperObject) -> str | None:
        return network_key(description.network_id) if isinstance(description, Endpoint) else None

    def label(self, key: str) -> str:
        if key in _LABELS:
            return _LABELS[key]
        if not key.startswith(_NETWORK):
            return super().label(key)
        network = self._store.network(key.removeprefix(_NETWORK))
        return f"network {key.removeprefix(_NETWORK)[:12] if network is None else network.name}"

    async def sync(self, snapshot: Mapping[str, HelperObject], within: float) -> SyncResult:
        uplink = snapshot.get(UPLINK_KEY)
        policy = snapshot.get(POLICY_KEY)
        balancers = snapshot.get(BALANCERS_KEY)
        mirrors = snapshot.get(MIRRORS_KEY)
        request = SyncRequest(
            uplink=uplink if isinstance(uplink, Uplink) else None,
            policy=policy.policy if isinstance(policy, ApplyPolicyRequest) else None,
            balancers=balancers.balancers if isinstance(balancers, ApplyBalancersRequest) else None,
            mirrors=mirrors.mirrors if isinstance(mirrors, ApplyMirrorsRequest) else None,
            networks=[one for one in snapshot.values() if isinstance(one, Network)],
            endpoints=[one for one in snapshot.values() if isinstance(one, Endpoint)],
        )
        response = await self.client.sync(request, timeout=within)
        failures = {}
        for failure in response.failures:
            key = failure.id if failure.id in snapshot else network_key(failure.id)
            failures[key] = (status_code(failure.code), failure.message)
        if not self._synced:
            self._on_up()
        return SyncResult(failures=failures, links_down=_links_down(response.endpoints))

    async def apply(self, key: str, description: HelperObject, secret: bytes | None, within: float) -> None:
        if isinstance(description, Network):
            await self.client.apply_network(ApplyNetworkRequest(network=description), timeout=within)
        elif isinstance(description, Uplink):
            await self.client.apply_uplink(ApplyUplinkRequest(uplink=description), timeout=within)
        elif isinstance(description, AuthorizeStreamsRequest):
            await self.client.authorize_streams(description, timeout=within)
            if description.secret == self._next_secret:
                self.stream_secret = description.secret
        elif isinstance(description, ApplyPolicyRequest):
            await self._apply_policy(description, within)
        elif isinstance(description, ApplyBalancersRequest):
            await self.balancer_client.apply_balancers(description, timeout=within)
        elif isinstance(description, ApplyMirrorsRequest):
            await self._stub(MirrorServiceClient).apply_mirrors(description, timeout=within)
        else:
            request = ApplyEndpointRequest(endpoint=description, link_secret=secret or b"")
            await self.client.apply_endpoint(request, timeout=within)

    async def _apply_policy(self, request: ApplyPolicyRequest, within: float) -> None:
        # An endpoint that is being applied meanwhile may have got there before or after.
        before = {key: self._applied.get(key) for key in request.endpoints if key not in self._busy}
        await self.client.apply_policy(request, timeout=within + SYNC_TIME_PER_OBJECT * len(request.endpoints))
        for key, member in request.endpoints.items():
            was = before.get(key)
            if was is None or key in self._busy or self._applied.get(key) is not was:
                self.touch(key)
                continue
            endpoint = Endpoint.parse(was)
            endpoint.policy = member if bytes(member) else None
            self._applied[key] = bytes(endpoint)

    async def policy_counters(self, rule_ids: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Packets and bytes of rules."""
        request = ListPolicyCountersRequest(rule_ids=list(rule_ids))
        response = await self.client.list_policy_counters(request, timeout=self.call_timeout)
        return {one.rule_id: (one.packets, one.bytes) for one in response.counters}

    async def qos_counters(self, within: float) -> list[QosCounters]:
        """What the limits have done."""
        if self._channel is None or not self._can(HelperFeature.QOS):
            return []
        response = await QosServiceClient(self._channel).list_qos_counters(ListQosCountersRequest(), timeout=within)
        return response.counters

    async def trace(self, request: TracePacketRequest, within: float) -> TracePacketResponse:
        """What would become of a packet.

        Raises:
            RpcError: it cannot be said.
        """
        return await self._stub(TraceServiceClient).trace_packet(request, timeout=within)

    async def backends(self, balancers: Sequence[str]) -> list[BackendStatus]:
        """The backends that the agent has, of these load balancers or of all."""
        request = ListBackendsRequest(balancer_ids=list(balancers))
        return (await self.balancer_client.list_backends(request, timeout=self.call_timeout)).backends

    async def delete(self, key: str, within: float) -> None:
        if key in _LABELS:
            return
        if key.startswith(_NETWORK):
            request = DeleteNetworkRequest(network_id=key.removeprefix(_NETWORK))
            await self.client.delete_network(request, timeout=within)
        else:
            await self.client.delete_endpoint(DeleteEndpointRequest(endpoint_id=key), timeout=within)

    async def authorize(self, endpoint_id: str, secret: bytes, within: float) -> None:
        request = AuthorizeLinkRequest(endpoint_id=endpoint_id, secret=secret)
        await self.client.authorize_link(request, timeout=within)

    @contextlib.asynccontextmanager
    async def events(self) -> AsyncIterator[AsyncIterator[Event]]:
        async with self.client.watch_events(WatchEventsRequest()) as stream:
            yield (self._event(message) async for message in stream)

    def _event(self, message: WatchEventsResponse) -> Event:
        if message.stream_wanted is not None:
            self._on_stream_wanted(message.stream_wanted)
            return OtherEvent("")
        if message.policy_logged is not None:
            self._on_policy_logged(message.policy_logged)
            return OtherEvent("")
        if message.backend_changed is not None:
            return OtherEvent(self._backend_text(message.backend_changed))
        return _event(message)

    def _backend_text(self, changed: BackendChanged) -> str:
        endpoint = self._store.endpoint(changed.endpoint_id)
        guest = None if endpoint is None else self._store.guest(endpoint.guest_id)
        if guest is None:
            return ""
        health = "does not answer" if changed.health == BackendHealth.DOWN else "answers"
        return f"backend {guest.name} {health} health checks at {clean_text(changed.address, 50)} {changed.target_port}"

    async def streams_ready(self) -> None:
        """Returns once there is a stream secret."""
        await self.changes.until(STREAMS_KEY, lambda: self.stream_secret is not None)

    async def refuse_stream(self, token: bytes) -> None:
        """Tells the helper that nothing answers a stream that a container opened; one that is away has reset it."""
        with contextlib.suppress(RpcError):
            await self.client.refuse_stream(RefuseStreamRequest(token=token), timeout=self.call_timeout)

    async def links_down(self, within: float) -> frozenset[str]:
        return _links_down(await self.endpoints(within))

    async def endpoints(self, within: float) -> list[EndpointStatus]:
        """The agent's endpoints with their counters."""
        response = await self.client.list_endpoints(ListEndpointsRequest(), timeout=within)
        return response.endpoints

    async def health(self, within: float) -> GetHealthResponse:
        """How the agent and its daemons are."""
        return await self.client.get_health(GetHealthRequest(), timeout=within)


def _links_down(endpoints: Sequence[EndpointStatus]) -> frozenset[str]:
    return frozenset(
        status.endpoint.endpoint_id for status in endpoints if status.endpoint is not None and not status.link_up
    )


def _event(message: WatchEventsResponse) -> Event:
    if message.link_down is not None:
        return LinkDownEvent(message.link_down.endpoint_id, message.link_down.reason)
    if message.resync_needed is not None:
        return ResyncEvent(message.resync_needed.reason)
    daemon = message.daemon_changed
    if daemon is not None and daemon.state == DaemonState.DOWN:
        return OtherEvent(f"{daemon.name} ended: {daemon.last_exit}")
    return OtherEvent("")
