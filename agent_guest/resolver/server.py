"""The resolver's sockets: takes clients' queries over UDP and TCP, runs their lookups, sends the answers."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket as stdlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import dns.name
import trio

from . import redirect, wire
from .config import RESOLVER_ADDRESS, Upstream
from .exchange import ask_network, exchange_tcp, exchange_udp, receive_framed
from .lookup import (
    SILENT,
    Lookup,
    NetworkResult,
    NetworkView,
    Next,
    confirmed,
    needs_confirmation,
    read_network_reply,
)

logger = logging.getLogger("taploom.guest.resolver")

UPSTREAM_TIMEOUT = 4.0
"""Seconds for one upstream, as with Docker."""
NETWORK_TIMEOUT = 1.0
"""Seconds for a network to answer a name that no other network knows."""
NETWORK_GRACE = 0.2
"""Seconds that a silent network holds up the answer of another one."""
SUSPECT_TIMEOUT, SUSPECT_GRACE, SUSPECT_PERIOD = 0.1, 0.02, 5.0
"""A network that was silent gets less time for a while, so that a dead one does not slow every name."""
MAX_UDP_QUERIES, MAX_UPSTREAM_QUERIES = 256, 128
MAX_CONNECTIONS, MAX_PIPELINED = 32, 16
_PORT_ATTEMPTS = 8
IDLE_TIMEOUT, WRITE_TIMEOUT = 10.0, 10.0
"""Seconds that a TCP client may be idle (RFC 7766, 6.2.3), or may take to read an answer."""


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What lookups go by; replaced as a whole when it changes."""

    networks: tuple[NetworkView, ...] = ()
    upstreams: tuple[Upstream, ...] = ()
    hostname: str = ""
    unqualified_stay: bool = False


@dataclass
class Resolver:
    """Answers one query at a time or many; has no sockets of its own."""

    knowledge: Knowledge = field(default_factory=Knowledge)
    _suspects: dict[str, float] = field(default_factory=dict)
    _forwarding: int = 0

    def learn(self, knowledge: Knowledge) -> None:
        """What lookups go by from now on; networks that were silent get another chance."""
        self.knowledge = knowledge
        self._suspects.clear()

    async def resolve(self, message: bytes, *, tcp: bool) -> bytes | None:
        """The reply to a client's message; None where the client gets none."""
        try:
            query = wire.parse_query(message)
        except wire.MalformedError as error:
            logger.debug("malformed query: %s", error)
            return error.reply
        knowledge = self.knowledge
        lookup = Lookup(
            query, knowledge.networks, knowledge.hostname, len(knowledge.upstreams), knowledge.unqualified_stay
        )
        if lookup.next is Next.NETWORKS:
            await self._ask_networks(lookup, knowledge.networks)
        if lookup.next is Next.UPSTREAM:
            if self._forwarding >= MAX_UPSTREAM_QUERIES:
                return wire.answer(query, wire.SERVFAIL)
            self._forwarding += 1
            try:
                while lookup.next is Next.UPSTREAM:
                    lookup.upstream_result(await self._forward(message, knowledge.upstreams[lookup.upstream], tcp))
            finally:
                self._forwarding -= 1
        return lookup.answer(wire.MESSAGE_MAX if tcp else query.udp_payload)

    async def _ask_networks(self, lookup: Lookup, networks: Sequence[NetworkView]) -> None:
        """Asks all networks at once; on return the lookup is past them."""
        start = trio.current_time()

        async def ask(index: int, view: NetworkView) -> None:
            timeout = SUSPECT_TIMEOUT if self._is_suspect(view, start) else NETWORK_TIMEOUT
            with trio.move_on_at(start + timeout) as scopes[index]:
                result = await self._ask_network(lookup.names[index], lookup.network_qtype, view)
                self._suspects.pop(view.interface, None)
                lookup.network_result(index, result)
            if index in lookup.unanswered():
                self._suspects[view.interface] = trio.current_time() + SUSPECT_PERIOD
                lookup.network_result(index, SILENT)
            if lookup.next is not Next.NETWORKS:
                nursery.cancel_scope.cancel()
            elif lookup.held_up():
                for other, scope in scopes.items():
                    grace = SUSPECT_GRACE if self._is_suspect(networks[other], start) else NETWORK_GRACE
                    scope.deadline = min(scope.deadline, start + grace)

        scopes: dict[int, trio.CancelScope] = {}
        async with trio.open_nursery() as nursery:
            for index in lookup.unanswered():
                nursery.start_soon(ask, index, networks[index])

    def _is_suspect(self, view: NetworkView, now: float) -> bool:
        return self._suspects.get(view.interface, 0.0) > now

    async def _ask_network(self, name: dns.name.Name, qtype: int, view: NetworkView) -> NetworkResult:
        """What one network says, once it says something."""
        reply = await ask_network(wire.ask(0, name, qtype), view.servers, view.interface)
        result = read_network_reply(reply, qtype)
        confirming = needs_confirmation(result, qtype)
        if confirming is None:
            return result
        reply = await ask_network(wire.ask(0, name, confirming), view.servers, view.interface)
        return confirmed(read_network_reply(reply, confirming))

    async def _forward(self, message: bytes, upstream: Upstream, tcp: bool) -> bytes | None:
        with trio.move_on_after(UPSTREAM_TIMEOUT):
            exchange = exchange_tcp if tcp else exchange_udp
            return await exchange(message, (upstream.host, upstream.port))
        return None


class ResolverServer:
    """The resolver on 127.0.0.11:53.

    Where the kernel can redirect, it has another port in truth: port 53 is the container's own then (see redirect).
    """

    def __init__(self, resolver: Resolver, address: str = RESOLVER_ADDRESS, port: int = 53) -> None:
        self._resolver = resolver
        self._address = (address, port)
        self._udp: stdlib.socket | None = None
        self._tcp: stdlib.socket | None = None
        self._redirected = False

    def bind(self) -> None:
        """Opens the sockets. Raises OSError, such as EADDRINUSE."""
        self.close()
        address, port = self._address
        if port:
            try:
                self._open_any_port()
                redirect.install(address, port, self.port)
                self._redirected = True
                return
            except OSError as error:
                self.close()
                logger.info("names are served on port %d itself, no redirection: %s", port, error.strerror)
        self._open(port)

    def _open_any_port(self) -> None:
        for attempt in range(_PORT_ATTEMPTS):
            try:
                self._open(0)
                return
            except OSError as error:  # free for UDP, but not for TCP
                if error.errno != errno.EADDRINUSE or attempt == _PORT_ATTEMPTS - 1:
                    raise

    def _open(self, port: int) -> None:
        try:
            self._udp = stdlib.socket(stdlib.AF_INET, stdlib.SOCK_DGRAM | stdlib.SOCK_CLOEXEC)
            self._udp.bind((self._address[0], port))
            self._tcp = stdlib.socket(stdlib.AF_INET, stdlib.SOCK_STREAM | stdlib.SOCK_CLOEXEC)
            self._tcp.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_REUSEADDR, 1)
            self._tcp.bind(self._udp.getsockname())
            self._tcp.listen(MAX_CONNECTIONS)
        except BaseException:
            self.close()
            raise

    @property
    def is_bound(self) -> bool:
        """Whether the sockets are open; the kernel keeps queries for them, served or not."""
        return self._udp is not None

    @property
    def port(self) -> int:
        """The port that both sockets are bound to."""
        assert self._udp is not None
        return int(self._udp.getsockname()[1])

    def close(self) -> None:
        """Closes the sockets; serve must have ended."""
        if self._redirected:
            self._redirected = False
            with contextlib.suppress(OSError):
                redirect.remove()
        for socket in (self._udp, self._tcp):
            if socket is not None:
                socket.close()
        self._udp = self._tcp = None

    async def serve(self) -> None:
        """Answers until cancelled, or until a socket breaks (OSError)."""
        assert self._udp is not None and self._tcp is not None
        self._udp.setblocking(False)
        self._tcp.setblocking(False)
        udp = trio.socket.from_stdlib_socket(self._udp.dup())
        tcp = trio.socket.from_stdlib_socket(self._tcp.dup())
        with udp, tcp:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._serve_udp, udp)
                nursery.start_soon(self._serve_tcp, tcp)

    async def _serve_udp(self, socket: trio.socket.SocketType) -> None:
        running = 0

        async def answer(message: bytes, client: tuple[object, ...]) -> None:
            nonlocal running
            try:
                reply = await self._guarded(message, tcp=False)
                if reply is not None:
                    await socket.sendto(reply, client)
            except OSError as error:
                logger.debug("cannot answer %s: %s", client, error)
            finally:
                running -= 1

        async with trio.open_nursery() as nursery:
            while True:
                try:
                    message, client = await socket.recvfrom(wire.MESSAGE_MAX)
                except OSError as error:
                    if error.errno in (errno.ECONNREFUSED, errno.ENOBUFS, errno.ENOMEM, errno.EINTR):
                        continue  # what an earlier answer met, or a moment's shortage
                    raise
                if running >= MAX_UDP_QUERIES:
                    continue  # the client asks again; remembering it would only make the overload last
                running += 1
                nursery.start_soon(answer, message, client)

    async def _serve_tcp(self, listener: trio.socket.SocketType) -> None:
        free = trio.Semaphore(MAX_CONNECTIONS)

        async def serve(socket: trio.socket.SocketType) -> None:
            try:
                await self._serve_connection(trio.SocketStream(socket))
            except (OSError, trio.BrokenResourceError) as error:
                logger.debug("TCP client: %s", error)
            finally:
                socket.close()
                free.release()

        async with trio.open_nursery() as nursery:
            while True:
                await free.acquire()
                try:
                    socket, _ = await listener.accept()
                except OSError as error:
                    free.release()
                    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                        await trio.sleep(0.1)  # until descriptors are closed elsewhere
                        continue
                    if error.errno in (errno.ECONNABORTED, errno.EPROTO, errno.EINTR):
                        continue
                    raise
                nursery.start_soon(serve, socket)

    async def _serve_connection(self, stream: trio.SocketStream) -> None:
        sending = trio.Lock()
        free = trio.CapacityLimiter(MAX_PIPELINED)
        buffer = bytearray()

        async def answer(message: bytes, token: object) -> None:
            try:
                reply = await self._guarded(message, tcp=True)
                if reply is not None:
                    async with sending:
                        with trio.fail_after(WRITE_TIMEOUT):
                            await stream.send_all(len(reply).to_bytes(2, "big") + reply)
            except (OSError, trio.BrokenResourceError, trio.TooSlowError):
                nursery.cancel_scope.cancel()
            finally:
                free.release_on_behalf_of(token)

        async with trio.open_nursery() as nursery:
            while True:
                token = object()
                await free.acquire_on_behalf_of(token)
                message = None
                with trio.move_on_after(IDLE_TIMEOUT):
                    message = await receive_framed(stream, buffer)
                if not message:
                    break  # the end, too long idle, or a message without content
                nursery.start_soon(answer, message, token)
            # A client that has sent all its queries may have closed its side only: answers still go out.

    async def _guarded(self, message: bytes, *, tcp: bool) -> bytes | None:
        """Never fails: whatever one query runs into is that query's problem."""
        try:
            return await self._resolver.resolve(message, tcp=tcp)
        except Exception:
            logger.exception("a query could not be answered")
            try:
                return wire.answer(wire.parse_query(message), wire.SERVFAIL)
            except wire.MalformedError:
                return None
