"""The bridge's gRPC API (`taploom.bridge.v1`): contract messages in, fabric calls, contract messages out."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Iterator, Sequence

import trio

from host_bridge.desired import RESERVED
from host_bridge.errors import BridgeError, InvalidError, MultipleSubnetsError
from host_bridge.fabric import Fabric
from host_bridge.ipam import parse_address, parse_subnet
from host_bridge.model import IPV4, IPV6, EndpointOptions, NetworkOptions, SubnetOptions
from host_bridge.names import check_aliases, check_name
from host_bridge.status import StatusReader
from taploom.contracts.taploom.bridge import v1 as bridge
from taploom.contracts.taploom.bridge.v1.rpc import GuestServiceBase, NetworkServiceBase, StatusServiceBase
from taploom.rpc import RpcError, SendStream, ServerContext, StatusCode

logger = logging.getLogger("taploom.bridge.api")

_DEFAULT_INTERVAL_MS = 1000
_INTERVALS_MS = range(100, 60_001)


@contextlib.contextmanager
def as_status() -> Iterator[None]:
    """Errors of the bridge's become the call's status."""
    try:
        yield
    except BridgeError as error:
        raise RpcError(StatusCode[error.code], str(error)) from error
    except sqlite3.Error as error:
        # A full disk, most of all: the transaction was rolled back.
        logger.error("cannot write the state: %s", error)
        raise RpcError(
            StatusCode.UNAVAILABLE, f"the bridge cannot write its state: {error}; nothing was changed"
        ) from error


def network_options(request: bridge.CreateNetworkRequest) -> NetworkOptions:
    """What CreateNetwork asks for; raises InvalidError when its lists do not fit together."""
    if request.name not in RESERVED:
        check_name("network", request.name)
    subnets: dict[int, str] = {}
    for text in request.subnets:
        family = parse_subnet(text).version
        if family in subnets:
            raise MultipleSubnetsError(family)
        subnets[family] = text

    def owner(what: str, text: str, address: str) -> int:
        family = parse_address(address).version
        if family not in subnets:
            raise InvalidError(f"{what} {text}: network {request.name} has no IPv{family} subnet; give one too")
        return family

    def one_each(what: str, texts: Sequence[str]) -> dict[int, str]:
        chosen: dict[int, str] = {}
        for text in texts:
            family = owner(what, text, text.partition("/")[0])
            if family in chosen:
                raise InvalidError(f"two IPv{family} {what}s: give one per subnet")
            chosen[family] = text
        return chosen

    gateways, ranges = one_each("gateway", request.gateways), one_each("ip-range", request.ip_ranges)
    auxiliary: dict[int, dict[str, str]] = {family: {} for family in subnets}
    for name, address in request.auxiliary_addresses.items():
        auxiliary[owner("auxiliary address", address, address)][name] = address
    if request.disable_ipv4 and IPV4 in subnets:
        raise InvalidError(f"network {request.name} has an IPv4 subnet: give none, or do not disable IPv4")
    return NetworkOptions(
        subnets=[
            SubnetOptions(
                subnet=text,
                gateway=gateways.get(family, ""),
                ip_range=ranges.get(family, ""),
                auxiliary=auxiliary[family],
            )
            for family, text in subnets.items()
        ],
        internal=request.internal,
        mtu=request.mtu,
        enable_ipv4=not request.disable_ipv4,
        enable_ipv6=request.enable_ipv6 or IPV6 in subnets,
        labels=request.labels,
        options=request.options,
    )


class NetworkApi(NetworkServiceBase):
    """Networks and who is on them."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric

    async def create_network(
        self, request: bridge.CreateNetworkRequest, context: ServerContext
    ) -> bridge.CreateNetworkResponse:
        with as_status():
            record = await self._fabric.create_network(request.name, network_options(request))
        return bridge.CreateNetworkResponse(network=self._fabric.network_message(record))

    async def list_networks(
        self, request: bridge.ListNetworksRequest, context: ServerContext
    ) -> bridge.ListNetworksResponse:
        networks = self._fabric.desired.networks()
        return bridge.ListNetworksResponse(networks=[self._fabric.network_message(record) for record in networks])

    async def get_network(self, request: bridge.GetNetworkRequest, context: ServerContext) -> bridge.GetNetworkResponse:
        with as_status():
            record = self._fabric.desired.find_network(request.network)
        return bridge.GetNetworkResponse(network=self._fabric.network_message(record))

    async def delete_network(
        self, request: bridge.DeleteNetworkRequest, context: ServerContext
    ) -> bridge.DeleteNetworkResponse:
        with as_status():
            record = await self._fabric.delete_network(request.network)
        return bridge.DeleteNetworkResponse(id=record.id)

    async def connect_guest(
        self, request: bridge.ConnectGuestRequest, context: ServerContext
    ) -> bridge.ConnectGuestResponse:
        with as_status():
            record = await self._fabric.connect(
                request.network,
                request.guest,
                EndpointOptions(
                    addresses=request.addresses,
                    aliases=check_aliases(request.aliases),
                    gateway_priority=request.gateway_priority,
                    mac_address=request.mac_address,
                    links=[(check_aliases([alias])[0], target) for alias, target in request.links.items()],
                    driver_options=request.driver_options,
                ),
            )
        return bridge.ConnectGuestResponse(endpoint=self._fabric.endpoint_message(record))

    async def disconnect_guest(
        self, request: bridge.DisconnectGuestRequest, context: ServerContext
    ) -> bridge.DisconnectGuestResponse:
        with as_status():
            await self._fabric.disconnect(request.network, request.guest)
        return bridge.DisconnectGuestResponse()


class GuestApi(GuestServiceBase):
    """Guests."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric

    async def register_guest(
        self, request: bridge.RegisterGuestRequest, context: ServerContext
    ) -> bridge.RegisterGuestResponse:
        with as_status():
            record = await self._fabric.register_guest(
                request.name,
                request.address,
                request.data_address,
                mac_address=request.mac_address,
                qmp=request.qmp,
            )
        return bridge.RegisterGuestResponse(guest=self._fabric.guest_message(record))

    async def list_guests(self, request: bridge.ListGuestsRequest, context: ServerContext) -> bridge.ListGuestsResponse:
        guests = self._fabric.desired.guests()
        return bridge.ListGuestsResponse(guests=[self._fabric.guest_message(record) for record in guests])

    async def get_guest(self, request: bridge.GetGuestRequest, context: ServerContext) -> bridge.GetGuestResponse:
        with as_status():
            record = self._fabric.desired.find_guest(request.guest)
        return bridge.GetGuestResponse(guest=self._fabric.guest_message(record))

    async def remove_guest(
        self, request: bridge.RemoveGuestRequest, context: ServerContext
    ) -> bridge.RemoveGuestResponse:
        with as_status():
            record = await self._fabric.remove_guest(request.guest)
        return bridge.RemoveGuestResponse(id=record.id)


class StatusApi(StatusServiceBase):
    """How everything is."""

    def __init__(self, fabric: Fabric) -> None:
        self._reader = StatusReader(fabric)

    async def get_status(self, request: bridge.GetStatusRequest, context: ServerContext) -> bridge.GetStatusResponse:
        return bridge.GetStatusResponse(status=await self._reader.read())

    async def watch_status(
        self,
        request: bridge.WatchStatusRequest,
        stream: SendStream[bridge.WatchStatusResponse],
        context: ServerContext,
    ) -> None:
        interval_ms = request.interval_ms or _DEFAULT_INTERVAL_MS
        if interval_ms not in _INTERVALS_MS:
            raise RpcError(
                StatusCode.INVALID_ARGUMENT, f"interval {interval_ms} ms is out of range: use 100 to 60000, or 0"
            )
        due = trio.current_time()
        while True:
            await stream.send(bridge.WatchStatusResponse(status=await self._reader.read()))
            due = max(due + interval_ms / 1000, trio.current_time())
            await trio.sleep_until(due)
