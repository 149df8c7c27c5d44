"""The listening side: accepts data links and joins each with its endpoint's TAP."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Final

import trio

from taploom.contracts.taploom.link.v1 import LinkCounters, LinkFeature, LinkHello, LinkRefusal
from taploom.link.authorization import Authorizations
from taploom.link.dataplane import Dataplane
from taploom.link.handshake import (
    HELLO_TIMEOUT,
    LINK_VERSION,
    MAX_SECRET,
    MIN_SECRET,
    HandshakeError,
    check_hello,
    decode_message,
    negotiate,
    ready,
    receive_encoded,
    refused,
)
from taploom.link.tap import Tap, TapError

__all__ = ["LinkServer", "LinkStatus", "StreamHandler", "UnknownEndpointError"]

logger = logging.getLogger("taploom.link.server")

_MAX_HANDSHAKES: Final = 64
_KNOWN_HELLOS: Final = 256
_SERIAL: Final = itertools.count()

StreamHandler = Callable[[LinkHello, trio.SocketStream], Awaitable[None]]
"""Serves a stream whose hello is well formed: checks the secret, answers, and takes the stream over. Raises
HandshakeError to refuse. A stream that is still open when it returns is closed."""


class UnknownEndpointError(KeyError):
    """No endpoint of this id is here: add it first."""

    def __str__(self) -> str:
        return f"unknown endpoint {self.args[0]}"


@dataclass(frozen=True, slots=True)
class LinkStatus:
    """An endpoint's link: whether it is up, with which features, what it has carried, and why it last ended."""

    up: bool
    features: frozenset[LinkFeature]
    counters: LinkCounters
    last_close_reason: str


class _Endpoint:
    def __init__(self, endpoint_id: str, tap: Tap) -> None:
        self.id: Final = endpoint_id
        self.tap: Final = tap
        # One of its own: what a removed endpoint's link does is never taken for its successor's.
        self.link_id: Final = f"{endpoint_id}#{next(_SERIAL)}"
        self.up = False
        self.removed = False
        self.features: frozenset[LinkFeature] = frozenset()
        self.last_close_reason = ""
        # Held while the link is set up, replaced or removed.
        self.lock: Final = trio.Lock()


class LinkServer:
    """Endpoints by id, each with a TAP and at most one link.

    A broken link turns the TAP's carrier off and nothing else: the interface waits for the next link. Callbacks run in
    trio's thread, between a checkpoint and the next; they must not block.
    """

    def __init__(
        self,
        dataplane: Dataplane,
        *,
        features: Iterable[LinkFeature],
        on_up: Callable[[str, frozenset[LinkFeature]], None],
        on_down: Callable[[str, str], None],
        on_stream: StreamHandler | None = None,
        hello_timeout: float = HELLO_TIMEOUT,
        max_handshakes: int = _MAX_HANDSHAKES,
    ) -> None:
        """``features``: those that links may have here. ``on_up(endpoint_id, features)`` when a link is up, also one
        that replaces another; ``on_down(endpoint_id, reason)`` when it breaks, but not when ``remove`` ends it.
        ``on_stream``: serves streams; without it they are refused.
        """
        self._dataplane: Final = dataplane
        self._features: Final = frozenset(features)
        self._on_up: Final = on_up
        self._on_down: Final = on_down
        self._on_stream: Final = on_stream
        self._hello_timeout: Final = hello_timeout
        self._max_handshakes: Final = max_handshakes
        self._endpoints: dict[str, _Endpoint] = {}
        self._authorizations: Final = Authorizations(trio.current_time)
        self._authorized = trio.Event()
        self._handshakes = 0
        self._known_hellos: dict[bytes, LinkHello] = {}

    def prepare(self, tap: Tap) -> None:
        """Make a new TAP such that a link with all features finds nothing to be changed. Raises TapError.

        Its carrier is on then: each change of an interface is a message to all who listen, and a virtual switch may
        have a lot to do for each. What is queued before its first link comes is thrown away by then.
        """
        _prepare(tap, self._features)

    def add(self, endpoint_id: str, tap: Tap) -> None:
        """Serve links for ``endpoint_id`` with ``tap``, which stays the caller's. Raises ValueError for a known id."""
        if endpoint_id in self._endpoints:
            raise ValueError(f"endpoint {endpoint_id} is there already: remove it first")
        self._endpoints[endpoint_id] = _Endpoint(endpoint_id, tap)

    async def remove(self, endpoint_id: str) -> None:
        """End the endpoint's link and forget the endpoint; unknown ones are no error.

        On return nothing uses the TAP any more: the caller closes it. Not cut short by cancellation.
        """
        endpoint = self._endpoints.pop(endpoint_id, None)
        if endpoint is None:
            return
        endpoint.removed = True
        self._authorizations.drop(endpoint_id)
        with trio.CancelScope(shield=True):
            async with endpoint.lock:
                await self._dataplane.detach(endpoint.link_id)
                endpoint.up = False
        _carrier_off(endpoint.tap)

    def authorize(self, endpoint_id: str, secret: bytes) -> None:
        """Let ``secret`` (16 to 64 bytes) open one link of the endpoint within 60 s; an earlier one is void.

        Raises UnknownEndpointError, or ValueError for a secret of another size.
        """
        if endpoint_id not in self._endpoints:
            raise UnknownEndpointError(endpoint_id)
        if not MIN_SECRET <= len(secret) <= MAX_SECRET:
            raise ValueError(f"a link secret has {MIN_SECRET} to {MAX_SECRET} bytes, not {len(secret)}")
        self._authorizations.put(endpoint_id, secret)
        self._authorized.set()
        self._authorized = trio.Event()

    def status(self, endpoint_id: str) -> LinkStatus:
        """The endpoint's link as it is now. Raises UnknownEndpointError."""
        endpoint = self._endpoints.get(endpoint_id)
        if endpoint is None:
            raise UnknownEndpointError(endpoint_id)
        try:
            counters = self._dataplane.counters(endpoint.link_id)
        except KeyError:
            counters = LinkCounters()
        counters.tx_drops += endpoint.tap.tx_drops()
        return LinkStatus(endpoint.up, endpoint.features, counters, endpoint.last_close_reason)

    async def serve(
        self,
        listener: trio.abc.Listener[trio.SocketStream],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept data links until cancelled; closes the listener. A peer that misbehaves loses its connection only."""
        async with listener, trio.open_nursery() as nursery:
            task_status.started()
            while True:
                stream = await listener.accept()
                if self._handshakes >= self._max_handshakes:
                    logger.warning("data link refused: %d others are in their handshake already", self._handshakes)
                    await trio.aclose_forcefully(stream)
                    continue
                self._handshakes += 1
                nursery.start_soon(self._handle, stream)

    async def _handle(self, stream: trio.SocketStream) -> None:
        hello: LinkHello | None = None
        try:
            try:
                with trio.move_on_after(self._hello_timeout) as scope:
                    hello = self._read_hello(await receive_encoded(stream))
                    if hello.stream is None:
                        await self._handshake(stream, hello)
            finally:
                self._handshakes -= 1
            if scope.cancelled_caught:
                logger.warning("data link closed: no complete hello within %g s", self._hello_timeout)
            elif hello is not None and hello.stream is not None:
                # No handshake any more: connecting to the target takes its own time.
                if self._on_stream is None:
                    raise HandshakeError("streams are not served here", LinkRefusal.UNAVAILABLE)
                await self._on_stream(hello, stream)
        except HandshakeError as error:
            # That a target refuses is not news here; whoever wanted it says so.
            level = logging.DEBUG if error.refusal == LinkRefusal.UNREACHABLE else logging.WARNING
            logger.log(level, "data link refused: %s", error)
            # The peer may not be reading; its socket's buffer has room for this.
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                with trio.move_on_after(self._hello_timeout):
                    await stream.send_all(refused(error.refusal, str(error)))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            logger.warning("data link closed during its handshake: %s", error)
        finally:
            if stream.socket.fileno() != -1:
                await trio.aclose_forcefully(stream)

    def _read_hello(self, data: bytes) -> LinkHello:
        """The checked hello. Raises HandshakeError."""
        hello = self._known_hellos.get(data)
        if hello is None:
            hello = decode_message(LinkHello, data)
            check_hello(hello)
            if hello.stream is not None and not hello.stream.token:
                # Connections come by the hundred to one target, and parsing takes longer than all the rest.
                if len(self._known_hellos) >= _KNOWN_HELLOS:
                    self._known_hellos.clear()
                self._known_hellos[data] = hello
        return hello

    async def _handshake(self, stream: trio.SocketStream, hello: LinkHello) -> None:
        while hello.early and not self._authorizations.has(hello.endpoint_id):
            await self._authorized.wait()
        # First, so that a secret is used up whatever comes of the link.
        authorized = self._authorizations.take(hello.endpoint_id, hello.secret)
        endpoint = self._endpoints.get(hello.endpoint_id)
        if not authorized or endpoint is None:
            logger.warning("data link for endpoint %s: wrong, used or expired secret", hello.endpoint_id)
            raise HandshakeError("unknown endpoint or wrong secret", LinkRefusal.UNAUTHORIZED)
        features = negotiate(hello.features, self._features)
        async with endpoint.lock:
            if endpoint.removed:
                raise HandshakeError("unknown endpoint or wrong secret", LinkRefusal.UNAUTHORIZED)
            await self._set_up(endpoint, stream, features, min(hello.version, LINK_VERSION))

    async def _set_up(
        self, endpoint: _Endpoint, stream: trio.SocketStream, features: frozenset[LinkFeature], version: int
    ) -> None:
        """Replace whatever link the endpoint has by ``stream``; with the endpoint's lock held.

        Until the dialler has its answer, the link before goes on. Where there is none, the carrier is on by then, so
        that what is sent the moment that somebody hears of the link is queued and not lost.
        """
        tap = endpoint.tap
        if not tap.is_alive():
            raise HandshakeError(f"interface {tap.name} is gone", LinkRefusal.UNAVAILABLE)
        prepared = not endpoint.up
        try:
            if prepared:
                if tap.carrier:  # and nobody has read what came
                    tap.discard_queue()
                _prepare(tap, features)
            await stream.send_all(ready(version, features))
        except TapError as error:
            raise HandshakeError(str(error), LinkRefusal.UNAVAILABLE) from error
        except BaseException:
            if prepared:
                _carrier_off(tap)
            raise
        # From here on the endpoint is in an ordered state whatever happens: nothing waits for the peer.
        with trio.CancelScope(shield=True):
            await self._dataplane.stop(endpoint.link_id)
        if endpoint.up:
            endpoint.last_close_reason = "replaced by a new link"
            logger.info("link of endpoint %s: replaced by a new one", endpoint.id)
        try:
            if not prepared:
                _prepare(tap, features)
            self._dataplane.attach_pump(
                endpoint.link_id, tap.fileno(), stream, features, lambda reason: self._broken(endpoint, reason)
            )
        except TapError as error:
            await self._dataplane.stop(endpoint.link_id)
            self._broken(endpoint, str(error))
            return
        endpoint.up = True
        endpoint.features = features
        logger.info("link of endpoint %s: up, features %s", endpoint.id, _names(features))
        self._on_up(endpoint.id, features)

    def _broken(self, endpoint: _Endpoint, reason: str) -> None:
        endpoint.up = False
        endpoint.features = frozenset()
        endpoint.last_close_reason = reason
        _carrier_off(endpoint.tap)
        logger.warning("link of endpoint %s: down: %s", endpoint.id, reason)
        self._on_down(endpoint.id, reason)


def _prepare(tap: Tap, features: frozenset[LinkFeature]) -> None:
    if tap.offloads != features:
        # With the carrier off nothing is queued while the offloads change.
        tap.set_carrier(False)
        tap.set_offloads(features)
    tap.set_carrier(True)


def _carrier_off(tap: Tap) -> None:
    with contextlib.suppress(TapError):  # the interface itself may be gone
        tap.set_carrier(False)


def _names(features: Iterable[LinkFeature]) -> str:
    return ", ".join(feature.name or str(int(feature)) for feature in sorted(features)) or "none"
