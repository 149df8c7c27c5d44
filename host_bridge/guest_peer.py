"""A guest's agent, as a peer: `taploom.guest.v1`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any

from host_bridge.describe import guest_interface, guest_resolver
from host_bridge.model import EndpointRecord, GuestRecord
from host_bridge.names import clean_text
from host_bridge.peer import Event, LinkDownEvent, OtherEvent, Peer, PeerInfo, SyncResult, status_code
from host_bridge.store import Store
from taploom.address import parse_address
from taploom.contracts.taploom.guest.v1 import (
    ApplyInterfaceRequest,
    ApplyResolverRequest,
    AuthorizeLinkRequest,
    DeleteInterfaceRequest,
    GetInfoRequest,
    GuestFeature,
    Interface,
    InterfaceState,
    InterfaceStatus,
    ListInterfacesRequest,
    Resolver,
    SyncRequest,
    WatchEventsRequest,
    WatchEventsResponse,
)
from taploom.contracts.taploom.guest.v1.rpc import GuestServiceClient
from taploom.contracts.taploom.link.v1 import LinkFeature
from taploom.rpc import Channel, RpcError, StatusCode

_LINK_FEATURES = {
    GuestFeature.LINK_VNET_HDR: LinkFeature.VNET_HDR,
    GuestFeature.LINK_TSO: LinkFeature.TSO,
    GuestFeature.LINK_USO: LinkFeature.USO,
}
# The key of the resolver's configuration; endpoints' keys are their ids.
RESOLVER_KEY = "resolver"


class GuestPeer(Peer[Interface | Resolver]):
    """The agent in a guest's VM. Keys are endpoint ids and `RESOLVER_KEY`.

    Args:
        record: the guest.
        store: where what is wanted is read from.
        upstreams: the DNS servers for names that no network knows.
        options: see `Peer`.
    """

    def __init__(self, record: GuestRecord, store: Store, upstreams: Sequence[str], **options: Any) -> None:
        super().__init__(f"guest {record.name}", parse_address(record.address), **options)
        self.record = record
        self.data_address = parse_address(record.data_address)
        self._store = store
        self._upstreams = list(upstreams)
        self._client: GuestServiceClient | None = None

    @property
    def client(self) -> GuestServiceClient:
        """The stub. RpcError when there is no connection."""
        if self._client is None:
            raise RpcError(StatusCode.UNAVAILABLE, self.problem or f"{self.subject} is not connected")
        return self._client

    def bind(self, channel: Channel | None) -> None:
        self._client = None if channel is None else GuestServiceClient(channel)

    async def get_info(self, within: float) -> PeerInfo:
        info = await self.client.get_info(GetInfoRequest(), timeout=within)
        features = {int(feature) for feature in info.features}
        return PeerInfo(
            version=clean_text(info.version, 40),
            contract_versions=frozenset(info.contract_versions),
            link_features=frozenset(link for feature, link in _LINK_FEATURES.items() if feature in features),
            has_events=GuestFeature.EVENTS in features,
            instance_id=clean_text(info.instance_id, 80),
            features=frozenset(features),
        )

    def renamed(self, record: GuestRecord) -> None:
        """Says that the guest's name or settings are others now."""
        self.record = record
        self.subject = f"guest {record.name}"
        self.touch(RESOLVER_KEY)

    def wanted(self, key: str) -> Interface | Resolver | None:
        if key == RESOLVER_KEY:
            return self._resolver()
        endpoint = self._store.endpoint(key)
        if endpoint is None or endpoint.guest_id != self.record.id:
            return None
        carrier = self._store.carrier_of(endpoint)
        if endpoint.carried is not None and (carrier is None or not self._makes_vlans):
            return None
        network = self._store.network(endpoint.network_id)
        assert network is not None, "foreign key"
        return guest_interface(endpoint, network, carrier)

    def requires(self, description: Interface | Resolver) -> str | None:
        if isinstance(description, Interface) and description.trunk_child is not None:
            return description.trunk_child.parent_endpoint_id
        return None

    @property
    def _makes_vlans(self) -> bool:
        return self.info is not None and GuestFeature.VLAN in self.info.features

    def leaves(self, endpoint: EndpointRecord) -> str:
        """What the agent, as far as it has said what it can do, leaves of an endpoint to whoever uses the guest, and
        why; empty: nothing."""
        if endpoint.carried is None or self.info is None or self._makes_vlans:
            return ""
        carrier = self._store.carrier_of(endpoint)
        over = "INTERFACE" if carrier is None else carrier.interface_name
        name, tag = endpoint.interface_name, endpoint.carried.tag
        return (
            f"the agent (version {self.info.version}) makes no VLAN interfaces: it is too old, or its VM's kernel "
            f"has none (8021q); where it has, type there: ip link add link {over} name {name} type vlan id {tag}"
        )

    def _resolver(self) -> Resolver | None:
        features = self.info.features if self.info is not None else frozenset()
        if self._retiring or GuestFeature.RESOLVER not in features or self._store.guest(self.record.id) is None:
            return None
        return guest_resolver(self.record, self._store, self._upstreams, features)

    def wanted_keys(self) -> Iterable[str]:
        return [RESOLVER_KEY, *(endpoint.id for endpoint in self._store.endpoints(guest_id=self.record.id))]

    def claims(self, description: Interface | Resolver) -> frozenset[str]:
        if not isinstance(description, Interface):
            return frozenset()
        trunk = description.trunk_child
        tags = set() if trunk is None else {f"tag {trunk.tag} over {trunk.parent_endpoint_id}"}
        return frozenset({f"name {description.name}", *tags})

    def label(self, key: str) -> str:
        return "the resolver" if key == RESOLVER_KEY else super().label(key)

    async def sync(self, snapshot: Mapping[str, Interface | Resolver], within: float) -> SyncResult:
        resolver = snapshot.get(RESOLVER_KEY)
        request = SyncRequest(
            interfaces=[one for one in snapshot.values() if isinstance(one, Interface)],
            resolver=resolver if isinstance(resolver, Resolver) else Resolver(enabled=False),
        )
        response = await self.client.sync(request, timeout=within)
        return SyncResult(
            failures={f.endpoint_id: (status_code(f.code), f.message) for f in response.failures},
            links_down=_links_down(response.interfaces),
        )

    async def apply(self, key: str, description: Interface | Resolver, secret: bytes | None, within: float) -> None:
        if isinstance(description, Resolver):
            await self.client.apply_resolver(ApplyResolverRequest(resolver=description), timeout=within)
            return
        request = ApplyInterfaceRequest(interface=description, link_secret=secret or b"")
        await self.client.apply_interface(request, timeout=within)

    async def delete(self, key: str, within: float) -> None:
        if key == RESOLVER_KEY:
            await self.client.apply_resolver(ApplyResolverRequest(resolver=Resolver(enabled=False)), timeout=within)
            return
        await self.client.delete_interface(DeleteInterfaceRequest(endpoint_id=key), timeout=within)

    async def authorize(self, endpoint_id: str, secret: bytes, within: float) -> None:
        request = AuthorizeLinkRequest(endpoint_id=endpoint_id, secret=secret)
        await self.client.authorize_link(request, timeout=within)

    @contextlib.asynccontextmanager
    async def events(self) -> AsyncIterator[AsyncIterator[Event]]:
        async with self.client.watch_events(WatchEventsRequest()) as stream:
            yield (_event(message) async for message in stream)

    async def links_down(self, within: float) -> frozenset[str]:
        return _links_down(await self.interfaces(within))

    async def interfaces(self, within: float) -> list[InterfaceStatus]:
        """The agent's interfaces with their counters."""
        response = await self.client.list_interfaces(ListInterfacesRequest(), timeout=within)
        return response.interfaces


def _links_down(interfaces: Sequence[InterfaceStatus]) -> frozenset[str]:
    return frozenset(
        status.interface.endpoint_id
        for status in interfaces
        if status.interface is not None and status.state == InterfaceState.NO_LINK
    )


def _event(message: WatchEventsResponse) -> Event:
    if message.link_down is not None:
        return LinkDownEvent(message.link_down.endpoint_id, message.link_down.reason)
    if message.interface_repaired is not None:
        repaired = message.interface_repaired
        return OtherEvent(f"mended endpoint {repaired.endpoint_id[:12]}: {repaired.what}")
    return OtherEvent("")
