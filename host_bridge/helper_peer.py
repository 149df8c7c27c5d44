"""The helper VM's agent, as a peer: `taploom.helper.v1`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any

from host_bridge.describe import helper_endpoint, helper_network
from host_bridge.names import clean_text
from host_bridge.peer import Event, LinkDownEvent, OtherEvent, Peer, PeerInfo, ResyncEvent, SyncResult, status_code
from host_bridge.store import Store
from taploom.address import Address
from taploom.contracts.taploom.helper.v1 import (
    ApplyEndpointRequest,
    ApplyNetworkRequest,
    AuthorizeLinkRequest,
    DaemonState,
    DeleteEndpointRequest,
    DeleteNetworkRequest,
    Endpoint,
    EndpointStatus,
    GetHealthRequest,
    GetHealthResponse,
    GetInfoRequest,
    HelperFeature,
    ListEndpointsRequest,
    Network,
    SyncRequest,
    WatchEventsRequest,
    WatchEventsResponse,
)
from taploom.contracts.taploom.helper.v1.rpc import HelperServiceClient
from taploom.contracts.taploom.link.v1 import LinkFeature
from taploom.rpc import Channel, RpcError, StatusCode

_LINK_FEATURES = {
    HelperFeature.LINK_VNET_HDR: LinkFeature.VNET_HDR,
    HelperFeature.LINK_TSO: LinkFeature.TSO,
    HelperFeature.LINK_USO: LinkFeature.USO,
}
_NETWORK = "network:"


def network_key(network_id: str) -> str:
    """The key of a network at the helper; endpoints' keys are their ids."""
    return _NETWORK + network_id


class HelperPeer(Peer[Network | Endpoint]):
    """The agent in the helper VM. Keys are endpoint ids and `network_key`s.

    Args:
        address: its control port.
        data_address: its data port.
        store: where what is wanted is read from.
        options: see `Peer`.
    """

    # It tells of every link of every guest, and is ours.
    event_burst = 20_000.0
    event_rate = 5_000.0

    def __init__(
        self,
        address: Address,
        data_address: Address,
        store: Store,
        **options: Any,
    ) -> None:
        super().__init__("the helper", address, **options)
        self.data_address = data_address
        self._store = store
        self._client: HelperServiceClient | None = None

    @property
    def client(self) -> HelperServiceClient:
        """The stub. RpcError when there is no connection."""
        if self._client is None:
            raise RpcError(StatusCode.UNAVAILABLE, self.problem or "the helper is not connected")
        return self._client

    def bind(self, channel: Channel | None) -> None:
        self._client = None if channel is None else HelperServiceClient(channel)

    async def get_info(self, within: float) -> PeerInfo:
        info = await self.client.get_info(GetInfoRequest(), timeout=within)
        features = {int(feature) for feature in info.features}
        return PeerInfo(
            version=clean_text(info.version, 40),
            contract_versions=frozenset(info.contract_versions),
            link_features=frozenset(link for feature, link in _LINK_FEATURES.items() if feature in features),
            has_events=HelperFeature.EVENTS in features,
            instance_id=clean_text(info.instance_id, 80),
        )

    def wanted(self, key: str) -> Network | Endpoint | None:
        if key.startswith(_NETWORK):
            network = self._store.network(key.removeprefix(_NETWORK))
            return None if network is None else helper_network(network)
        endpoint = self._store.endpoint(key)
        if endpoint is None:
            return None
        guest = self._store.guest(endpoint.guest_id)
        assert guest is not None, "foreign key"
        return helper_endpoint(endpoint, guest)

    def wanted_keys(self) -> Iterable[str]:
        networks = [network_key(network.id) for network in self._store.networks()]
        return networks + [endpoint.id for endpoint in self._store.endpoints()]

    def claims(self, description: Network | Endpoint) -> frozenset[str]:
        if isinstance(description, Network):
            return frozenset({*description.subnets, *description.dns_servers, f"name {description.name}"})
        return frozenset({f"{description.network_id} {address}" for address in description.addresses}) | {
            description.mac_address
        }

    def requires(self, description: Network | Endpoint) -> str | None:
        return network_key(description.network_id) if isinstance(description, Endpoint) else None

    def label(self, key: str) -> str:
        if not key.startswith(_NETWORK):
            return super().label(key)
        network = self._store.network(key.removeprefix(_NETWORK))
        return f"network {key.removeprefix(_NETWORK)[:12] if network is None else network.name}"

    async def sync(self, snapshot: Mapping[str, Network | Endpoint], within: float) -> SyncResult:
        request = SyncRequest(
            networks=[one for one in snapshot.values() if isinstance(one, Network)],
            endpoints=[one for one in snapshot.values() if isinstance(one, Endpoint)],
        )
        response = await self.client.sync(request, timeout=within)
        failures = {}
        for failure in response.failures:
            key = failure.id if failure.id in snapshot else network_key(failure.id)
            failures[key] = (status_code(failure.code), failure.message)
        return SyncResult(failures=failures, links_down=_links_down(response.endpoints))

    async def apply(self, key: str, description: Network | Endpoint, secret: bytes | None, within: float) -> None:
        if isinstance(description, Network):
            await self.client.apply_network(ApplyNetworkRequest(network=description), timeout=within)
        else:
            request = ApplyEndpointRequest(endpoint=description, link_secret=secret or b"")
            await self.client.apply_endpoint(request, timeout=within)

    async def delete(self, key: str, within: float) -> None:
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
            yield (_event(message) async for message in stream)

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
