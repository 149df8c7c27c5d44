"""taploom.guest.v1.GuestService: messages to calls, exceptions to gRPC status codes."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from taploom.contracts.taploom.guest.v1 import (
    ApplyInterfaceRequest,
    ApplyInterfaceResponse,
    ApplyResolverRequest,
    ApplyResolverResponse,
    AuthorizeLinkRequest,
    AuthorizeLinkResponse,
    DeleteInterfaceRequest,
    DeleteInterfaceResponse,
    GuestFeature,
    InterfaceFailure,
    ListInterfacesRequest,
    ListInterfacesResponse,
    Resolver,
    SyncRequest,
    SyncResponse,
    WatchEventsRequest,
    WatchEventsResponse,
    WatchStarted,
)
from taploom.rpc import RpcError, SendStream, ServerContext, StatusCode

from .events import EventHub, SlowWatcherError, stamped
from .interfaces import APPLY_ERRORS, Interfaces, NotDescribedError
from .kernel import NameTakenError, NoTrunkError
from .names import Names, NamesError
from .resolver.config import ConfigError, ResolverConfig
from .spec import InterfaceSpec, SpecError, check_endpoint_id

SECRET_MIN, SECRET_MAX = 16, 64


class GuestService:
    """The agent's control interface, but for GetInfo (`agent_guest.front`)."""

    def __init__(
        self,
        interfaces: Interfaces,
        names: Names,
        events: EventHub,
        features: frozenset[GuestFeature],
    ) -> None:
        self._interfaces = interfaces
        self._names = names
        self._events = events
        self._features = features

    async def apply_interface(self, request: ApplyInterfaceRequest, context: ServerContext) -> ApplyInterfaceResponse:
        if request.interface is None:
            raise RpcError(StatusCode.INVALID_ARGUMENT, "interface is missing")
        if request.link_secret:
            _check_secret(request.link_secret, "link_secret")
            if request.interface.trunk_child is not None:
                raise RpcError(StatusCode.INVALID_ARGUMENT, "link_secret: a trunk child has no link of its own")
        try:
            spec = self._known(InterfaceSpec.parse(request.interface))
            status = await self._interfaces.apply(spec, request.link_secret)
        except APPLY_ERRORS as error:
            raise _apply_error(error) from error
        return ApplyInterfaceResponse(status=status)

    async def delete_interface(
        self, request: DeleteInterfaceRequest, context: ServerContext
    ) -> DeleteInterfaceResponse:
        _check_endpoint_id(request.endpoint_id)
        try:
            await self._interfaces.delete(request.endpoint_id)
        except APPLY_ERRORS as error:
            raise _apply_error(error) from error
        return DeleteInterfaceResponse()

    async def list_interfaces(self, request: ListInterfacesRequest, context: ServerContext) -> ListInterfacesResponse:
        return ListInterfacesResponse(interfaces=await self._interfaces.statuses())

    async def apply_resolver(self, request: ApplyResolverRequest, context: ServerContext) -> ApplyResolverResponse:
        if request.resolver is None:
            raise RpcError(StatusCode.INVALID_ARGUMENT, "resolver is missing")
        await self._apply_resolver(request.resolver)
        return ApplyResolverResponse()

    async def authorize_link(self, request: AuthorizeLinkRequest, context: ServerContext) -> AuthorizeLinkResponse:
        _check_endpoint_id(request.endpoint_id)
        _check_secret(request.secret, "secret")
        try:
            self._interfaces.authorize(request.endpoint_id, request.secret)
        except KeyError:
            raise RpcError(
                StatusCode.NOT_FOUND, f"endpoint {request.endpoint_id} has no interface here; apply it first"
            ) from None
        except NotDescribedError:
            raise RpcError(
                StatusCode.FAILED_PRECONDITION,
                f"the interface of endpoint {request.endpoint_id} was taken over from an earlier agent;"
                " describe it with Sync or ApplyInterface first",
            ) from None
        except SpecError as error:
            raise RpcError(StatusCode.INVALID_ARGUMENT, str(error)) from None
        return AuthorizeLinkResponse()

    async def sync(self, request: SyncRequest, context: ServerContext) -> SyncResponse:
        specs, failures, kept = _parse_snapshot(request, self._known)
        resolver = _resolver_config(request.resolver or Resolver())
        try:
            removed, refused = await self._interfaces.sync(specs, kept)
        except APPLY_ERRORS as error:
            raise _apply_error(error) from error
        for endpoint_id, reason in refused:
            failures.append(_failure(endpoint_id, reason))
        await self._set_names(resolver)
        return SyncResponse(
            interfaces=await self._interfaces.statuses(), removed_endpoint_ids=removed, failures=failures
        )

    async def watch_events(
        self, request: WatchEventsRequest, stream: SendStream[WatchEventsResponse], context: ServerContext
    ) -> None:
        if GuestFeature.EVENTS not in self._features:
            raise RpcError(StatusCode.UNIMPLEMENTED, "this agent does not serve events")
        with self._events.watch() as watcher:
            await stream.send(stamped(WatchStarted()))
            try:
                async for event in watcher:
                    await stream.send(event)
            except SlowWatcherError:
                raise RpcError(
                    StatusCode.RESOURCE_EXHAUSTED,
                    "events were not read fast enough and some are lost; watch again and call ListInterfaces",
                ) from None

    def _known(self, spec: InterfaceSpec) -> InterfaceSpec:
        if spec.trunk is not None and GuestFeature.VLAN not in self._features:
            raise SpecError("trunk_child: this agent makes no VLAN interfaces, or this VM's kernel has none (8021q)")
        return spec if GuestFeature.HOSTS in self._features else replace(spec, name_links=())

    async def _apply_resolver(self, message: Resolver) -> None:
        await self._set_names(_resolver_config(message))

    async def _set_names(self, config: ResolverConfig) -> None:
        if GuestFeature.RESOLVER not in self._features and config.enabled:
            raise RpcError(StatusCode.UNIMPLEMENTED, "this agent has no resolver")
        # What an agent without the feature does with these fields: it does not know them.
        if GuestFeature.HOSTS not in self._features:
            config = replace(config, hosts=None)
        if GuestFeature.DIRECT_DNS not in self._features:
            config = replace(config, direct=False)
        try:
            await self._names.apply(config)
        except NamesError as error:
            raise RpcError(StatusCode.FAILED_PRECONDITION, str(error)) from error


def _resolver_config(message: Resolver) -> ResolverConfig:
    try:
        return ResolverConfig.parse(message)
    except ConfigError as error:
        raise RpcError(StatusCode.INVALID_ARGUMENT, f"resolver: {error}") from error


def _parse_snapshot(
    request: SyncRequest, known: Callable[[InterfaceSpec], InterfaceSpec]
) -> tuple[list[InterfaceSpec], list[InterfaceFailure], frozenset[str]]:
    """The interfaces that can be tried, what is wrong with the others, and the endpoints of the others."""
    specs: list[InterfaceSpec] = []
    failures: list[InterfaceFailure] = []
    seen: Counter[str] = Counter()
    for message in request.interfaces:
        seen[message.endpoint_id] += 1
        try:
            if seen[message.endpoint_id] > 1:
                raise SpecError("the snapshot has this endpoint twice")
            specs.append(known(InterfaceSpec.parse(message)))
        except SpecError as error:
            failures.append(_failure(message.endpoint_id, error))
    parsed = {spec.endpoint_id for spec in specs}
    return specs, failures, frozenset(endpoint_id for endpoint_id in seen if endpoint_id not in parsed)


def _failure(endpoint_id: str, error: Exception) -> InterfaceFailure:
    status = _apply_error(error)
    return InterfaceFailure(endpoint_id=endpoint_id, code=int(status.code), message=status.message)


def _apply_error(error: Exception) -> RpcError:
    if isinstance(error, SpecError):
        return RpcError(StatusCode.INVALID_ARGUMENT, str(error))
    if isinstance(error, NameTakenError):
        return RpcError(StatusCode.ALREADY_EXISTS, str(error))
    if isinstance(error, NoTrunkError):
        return RpcError(StatusCode.FAILED_PRECONDITION, str(error))
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, OSError) and error.errno in (errno.EPERM, errno.EACCES):
        return RpcError(StatusCode.FAILED_PRECONDITION, f"{text}: the agent needs CAP_NET_ADMIN")
    if isinstance(error, OSError) and error.errno in (errno.EBUSY, errno.ENOENT):
        return RpcError(StatusCode.FAILED_PRECONDITION, text)
    return RpcError(StatusCode.INTERNAL, text)


def _check_endpoint_id(text: str) -> None:
    try:
        check_endpoint_id(text)
    except SpecError as error:
        raise RpcError(StatusCode.INVALID_ARGUMENT, str(error)) from None


def _check_secret(secret: bytes, field: str) -> None:
    if not SECRET_MIN <= len(secret) <= SECRET_MAX:
        raise RpcError(
            StatusCode.INVALID_ARGUMENT, f"{field} has {len(secret)} bytes; {SECRET_MIN} to {SECRET_MAX} are allowed"
        )
