"""taploom.guest.v1.GuestService as it is served from the first moment: what the agent is, and then all the rest."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import trio

from taploom import __version__
from taploom.contracts.taploom.guest.v1 import (
    ApplyInterfaceRequest,
    ApplyInterfaceResponse,
    ApplyResolverRequest,
    ApplyResolverResponse,
    AuthorizeLinkRequest,
    AuthorizeLinkResponse,
    DeleteInterfaceRequest,
    DeleteInterfaceResponse,
    GetInfoRequest,
    GetInfoResponse,
    GuestFeature,
    ListInterfacesRequest,
    ListInterfacesResponse,
    SyncRequest,
    SyncResponse,
    WatchEventsRequest,
    WatchEventsResponse,
)
from taploom.contracts.taploom.guest.v1.rpc import GuestServiceBase
from taploom.rpc import SendStream, ServerContext

if TYPE_CHECKING:
    from .service import GuestService

CONTRACT_VERSIONS = [1]


class Front(GuestServiceBase):
    """Answers GetInfo at once; all other calls wait for `open`."""

    def __init__(self, features: frozenset[GuestFeature], instance_id: str) -> None:
        self._features = features
        self._instance_id = instance_id
        self._service: GuestService | None = None
        self._opened = trio.Event()

    def open(self, service: GuestService) -> None:
        """Has the service do the calls from now on."""
        self._service = service
        self._opened.set()

    async def _open_service(self) -> GuestService:
        await self._opened.wait()
        assert self._service is not None
        return self._service

    async def get_info(self, request: GetInfoRequest, context: ServerContext) -> GetInfoResponse:
        return GetInfoResponse(
            version=__version__,
            contract_versions=list(CONTRACT_VERSIONS),
            features=sorted(self._features),
            hostname=os.uname().nodename,
            instance_id=self._instance_id,
        )

    async def apply_interface(self, request: ApplyInterfaceRequest, context: ServerContext) -> ApplyInterfaceResponse:
        return await (await self._open_service()).apply_interface(request, context)

    async def delete_interface(
        self, request: DeleteInterfaceRequest, context: ServerContext
    ) -> DeleteInterfaceResponse:
        return await (await self._open_service()).delete_interface(request, context)

    async def list_interfaces(self, request: ListInterfacesRequest, context: ServerContext) -> ListInterfacesResponse:
        return await (await self._open_service()).list_interfaces(request, context)

    async def apply_resolver(self, request: ApplyResolverRequest, context: ServerContext) -> ApplyResolverResponse:
        return await (await self._open_service()).apply_resolver(request, context)

    async def authorize_link(self, request: AuthorizeLinkRequest, context: ServerContext) -> AuthorizeLinkResponse:
        return await (await self._open_service()).authorize_link(request, context)

    async def sync(self, request: SyncRequest, context: ServerContext) -> SyncResponse:
        return await (await self._open_service()).sync(request, context)

    async def watch_events(
        self, request: WatchEventsRequest, stream: SendStream[WatchEventsResponse], context: ServerContext
    ) -> None:
        await (await self._open_service()).watch_events(request, stream, context)
