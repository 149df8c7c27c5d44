"""What generated service code is made of, and what handlers are given."""

from __future__ import annotations

import abc
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

from .metadata import Metadata, MetadataLike


class Message(Protocol):
    """A message type: betterproto2's, or anything that serializes and parses like it."""

    def __bytes__(self) -> bytes:
        """The serialized message."""
        ...

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """The message from its bytes."""
        ...


RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)
SentT_contra = TypeVar("SentT_contra", contravariant=True)
ReceivedT_co = TypeVar("ReceivedT_co", covariant=True)


@dataclass(frozen=True)
class Method(Generic[RequestT, ResponseT]):
    """One RPC of a contract."""

    path: str
    """``/package.Service/Method``."""
    request_type: type[RequestT]
    response_type: type[ResponseT]
    client_streaming: bool
    server_streaming: bool


@dataclass(frozen=True)
class Handler:
    """A method and the coroutine function that serves it; its parameters depend on the method's shape."""

    method: Method[Any, Any]
    function: Callable[..., Awaitable[Any]]


class Service(abc.ABC):
    """Base of the generated ``XServiceBase`` classes."""

    service_name: str
    """``package.Service``."""

    infrastructure = False
    """Whether calls may be cut off when the server drains (health checks and reflection, not an application's)."""

    @abc.abstractmethod
    def handlers(self) -> tuple[Handler, ...]:
        """The service's methods, for the server."""


class SendStream(Protocol[SentT_contra]):
    """Where a handler sends its responses."""

    async def send(self, message: SentT_contra) -> None:
        """Sends a message; waits while the peer is slow. RpcError when the call is over."""
        ...


class ReceiveStream(Protocol[ReceivedT_co]):
    """Messages of the peer, in order: ``async for message in stream``."""

    async def receive(self) -> ReceivedT_co | None:
        """The next message; None at the end. RpcError when the call failed."""
        ...

    def __aiter__(self) -> Self:
        """The stream itself."""
        ...

    async def __anext__(self) -> ReceivedT_co:
        """The next message."""
        ...


class ServerContext(Protocol):
    """What a handler can know about its call and say besides its messages."""

    @property
    def method(self) -> str:
        """``/package.Service/Method``."""
        ...

    @property
    def peer(self) -> str:
        """Who calls, for log messages."""
        ...

    @property
    def metadata(self) -> Metadata:
        """The caller's metadata."""
        ...

    @property
    def deadline(self) -> float:
        """When the caller gives up, in `trio.current_time`; infinite when it set no time-out."""
        ...

    def send_initial_metadata(self, metadata: MetadataLike) -> None:
        """Sends the response's headers now, with this metadata; RuntimeError when they have been sent."""
        ...

    def set_trailing_metadata(self, metadata: MetadataLike) -> None:
        """The metadata to send with the status."""
        ...
