"""One agent, guest or helper: connected, told everything, then kept up to date.

A `Peer` holds no list of changes. It knows which keys (a network, an endpoint) may differ from what is wanted, and for
each it compares the description that is wanted now with the one that the agent last confirmed. However many changes
come while a peer is away or slow, the work that is left is at most one call per object, and a `Sync` on each new
connection puts everything right that this process does not know about.

A failure of one object is that object's alone: it is tried again with back-off while the others go on.
"""

from __future__ import annotations

import abc
import contextlib
import datetime
import enum
import errno
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import betterproto2
import trio

from host_bridge.claims import Claims
from host_bridge.names import clean_text
from host_bridge.waiting import Backoff, KeyedSignal, Signal
from taploom.address import Address, AddressError, connect
from taploom.contracts.taploom.link.v1 import LinkFeature
from taploom.patience import Patience
from taploom.rpc import Channel, ConnectionConfig, RpcError, StatusCode, open_channel

logger = logging.getLogger("taploom.bridge.peer")

CONTRACT_VERSIONS = frozenset({1})
# How long a first attempt may take, and how many times as long one may that follows others which took too long.
CONNECT_TIMEOUT = 5.0
CALL_TIMEOUT = 10.0
LIFE_TIMEOUT = 10.0  # of HTTP/2's greeting and of the answer to a PING
MOST_PATIENCE = 8
# What each object of a snapshot may add to the time that a Sync takes.
SYNC_TIME_PER_OBJECT = 0.05
KEEPALIVE = 5.0
POLL_INTERVAL = 1.0
# A session shorter than this does not reset the back-off, or a peer that always fails after Sync would be asked in a
# tight loop.
STABLE_AFTER = 2.0
MAX_CONCURRENT_CALLS = 16

# Refusals that asking again will not change. They are asked again all the same, for what is wanted is still wanted.
PERMANENT = frozenset(
    {
        StatusCode.INVALID_ARGUMENT,
        StatusCode.NOT_FOUND,
        StatusCode.ALREADY_EXISTS,
        StatusCode.PERMISSION_DENIED,
        StatusCode.FAILED_PRECONDITION,
        StatusCode.OUT_OF_RANGE,
        StatusCode.UNIMPLEMENTED,
        StatusCode.INTERNAL,
        StatusCode.DATA_LOSS,
        StatusCode.UNAUTHENTICATED,
    }
)

Description = betterproto2.Message


class PeerState(enum.Enum):
    """How a peer is."""

    DOWN = "down"
    STARTING = "starting"
    OK = "ok"


class SessionError(Exception):
    """The connection to a peer is of no use; the message says why."""


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """What an agent said that it is."""

    version: str
    contract_versions: frozenset[int]
    link_features: frozenset[LinkFeature]
    has_events: bool
    instance_id: str
    # The agent's own numbers of all that it can do.
    features: frozenset[int] = frozenset()


@dataclass(slots=True)
class Failure:
    """An object that the agent did not accept, and why."""

    code: StatusCode
    message: str
    since: datetime.datetime
    attempts: int = 1


@dataclass(frozen=True, slots=True)
class SyncResult:
    """What a Sync did: what could not be applied (key -> code, message), and which endpoints' links are down there."""

    failures: Mapping[str, tuple[StatusCode, str]] = field(default_factory=dict)
    links_down: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class LinkDownEvent:
    """The peer says that an endpoint's link went down."""

    endpoint_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class ResyncEvent:
    """The peer asks for a Sync."""

    reason: str


@dataclass(frozen=True, slots=True)
class OtherEvent:
    """Something worth a log line at most; an empty text is worth none."""

    text: str


Event = LinkDownEvent | ResyncEvent | OtherEvent
D = TypeVar("D", bound=Description)


class Peer(abc.ABC, Generic[D]):
    """An agent that the bridge dials; subclasses speak its contract.

    Args:
        subject: what to call it in messages, such as `guest web`.
        address: its control port.
        on_change: called with an object's key when the peer has or no longer has it, or refused it; with "" when the
            connection changed, which may concern every object.
        on_link_down: called with an endpoint's id and a reason when the peer says that its link is down.
        link_generation: tells the generation of an endpoint's link while it is up, else 0, so that a peer's late news
            about an earlier link does not break the present one.
        link_secret: gives the secret to send along with an endpoint's description, or None.
        on_secret_sent: called when the agent has accepted that secret.
    """

    # Events that the peer may send at once and per second; beyond, it is throttled by back-pressure.
    event_burst = 500.0
    event_rate = 100.0

    def __init__(
        self,
        subject: str,
        address: Address,
        *,
        on_change: Callable[[str], None],
        on_link_down: Callable[[str, str, int], None],
        link_generation: Callable[[str], int],
        link_secret: Callable[[str], bytes | None],
        on_secret_sent: Callable[[str, bytes], None],
        call_timeout: float = CALL_TIMEOUT,
    ) -> None:
        self.subject = subject
        self.address = address
        self.state = PeerState.DOWN
        self.problem = f"{subject} has not been dialled yet"
        self.since = _now()
        self.info: PeerInfo | None = None
        # How many instances of the agent have answered: one more each time it was started again.
        self.instances = 0
        self._instance_id = ""
        self.changes = KeyedSignal()
        self._on_change = on_change
        self._on_link_down = on_link_down
        self._link_generation = link_generation
        self._link_secret = link_secret
        self._on_secret_sent = on_secret_sent
        self.call_timeout = call_timeout
        # One each: that a slow agent's machine takes a connection at once says nothing of the agent.
        steps = ("dial", "GetInfo", "WatchEvents")
        self._dial_patience = {step: Patience(CONNECT_TIMEOUT, MOST_PATIENCE * CONNECT_TIMEOUT) for step in steps}
        self._life_patience = Patience(LIFE_TIMEOUT, MOST_PATIENCE * LIFE_TIMEOUT)
        self._sync_patience = Patience(call_timeout, MOST_PATIENCE * call_timeout)
        self._synced = False
        self._applied: dict[str, bytes] = {}
        self._claims = Claims()
        # An Apply that failed may have been applied all the same: such an object is deleted when it is not wanted.
        self._unsure: set[str] = set()
        self._dirty: set[str] = set()
        self._busy: set[str] = set()
        self._failures: dict[str, Failure] = {}
        self._wake = Signal()
        self._resync: str | None = None
        self._retiring = False

    # What a subclass speaks

    @abc.abstractmethod
    def bind(self, channel: Channel | None) -> None:
        """Makes or drops the stub for a connection."""

    @abc.abstractmethod
    async def get_info(self, within: float) -> PeerInfo:
        """Asks the agent what it is."""

    @abc.abstractmethod
    def wanted(self, key: str) -> D | None:
        """The description of an object that is wanted now; None: it is not."""

    @abc.abstractmethod
    def wanted_keys(self) -> Iterable[str]:
        """The keys of all objects that are wanted now."""

    @abc.abstractmethod
    async def sync(self, snapshot: Mapping[str, D], within: float) -> SyncResult:
        """Sends a whole snapshot."""

    @abc.abstractmethod
    async def apply(self, key: str, description: D, secret: bytes | None, within: float) -> None:
        """Sends one object."""

    @abc.abstractmethod
    async def delete(self, key: str, within: float) -> None:
        """Removes one object."""

    @abc.abstractmethod
    async def authorize(self, endpoint_id: str, secret: bytes, within: float) -> None:
        """Lets one data link be dialled."""

    @abc.abstractmethod
    def events(self) -> contextlib.AbstractAsyncContextManager[AsyncIterator[Event]]:
        """Streams what happens at the peer. The first event stands for the stream's start."""

    @abc.abstractmethod
    async def links_down(self, within: float) -> frozenset[str]:
        """Asks which endpoints' links are down there."""

    @abc.abstractmethod
    def claims(self, description: D) -> frozenset[str]:
        """What at most one object of this peer can have at a time (a name, an address): it is applied only after
        another that had it is gone."""

    def requires(self, description: D) -> str | None:
        """The key of the object that must be applied before this one, or None."""
        return None

    def in_snapshot(self, key: str) -> bool:
        """False for an object that Sync does not carry: it is applied by itself after each Sync."""
        return True

    def label(self, key: str) -> str:
        """What to call an object in the log."""
        return f"endpoint {key[:12]}"

    # What others ask

    @property
    def connected(self) -> bool:
        """True while the agent answers on a control connection."""
        return self.state is not PeerState.DOWN

    def has(self, key: str) -> bool:
        """True when the agent has confirmed the object as it is wanted now, on the present connection."""
        return self._synced and key in self._applied and key not in self._dirty and key not in self._busy

    def failure(self, key: str) -> Failure | None:
        """Why the object is not applied, when the agent refused it."""
        return self._failures.get(key)

    def waits_for(self, key: str) -> str:
        """Why the object is not as it is wanted there, for people; empty when it is."""
        if self.has(key):
            return ""
        failure = self._failures.get(key)
        if failure is not None:
            verb = "refuses it" if failure.code in PERMANENT else "cannot apply it yet"
            return f"{self.subject} {verb}: {failure.message}"
        return self.problem or f"{self.subject} is applying it"

    def settled(self, key: str) -> bool:
        """True when nothing is to be waited for: the object is as it is wanted, or it cannot be so now."""
        if self._synced and key not in self._dirty and key not in self._busy:
            return True
        return key in self._failures or not self.connected

    def failures(self) -> dict[str, Failure]:
        """All objects that the agent refused."""
        return dict(self._failures)

    def touch(self, key: str) -> None:
        """Says that what is wanted of the object may have changed."""
        self._dirty.add(key)
        self._wake.notify()

    def request_resync(self, reason: str) -> None:
        """Has the whole snapshot sent again."""
        self._resync = reason
        self._wake.notify()

    def forgive(self, key: str) -> None:
        """Forgets that the agent refused the object: what is wanted has changed."""
        self._failures.pop(key, None)

    def crashed(self) -> None:
        """Says that `run` has ended by an internal error."""
        self.bind(None)
        self._lost(f"the bridge failed at {self.subject}: see its log")

    async def wait_gone(self, key: str) -> None:
        """Waits until the object is not at the peer as far as known, or the peer is away: it converges later."""

        def gone() -> bool:
            if not self._synced:
                return self.state is PeerState.DOWN
            return key not in self._applied and key not in self._unsure and key not in self._busy

        await self.changes.until(key, gone)

    async def retire(self, within: float) -> None:
        """Takes everything from the peer, as far as it answers within the time; its `run` is to be cancelled after."""
        self._retiring = True
        if self._synced:
            with trio.move_on_after(within), contextlib.suppress(RpcError):
                await self.sync({}, within)

    # The connection

    async def run(self) -> None:
        """Keeps the peer connected and up to date until cancelled."""
        backoff = Backoff()
        while True:
            started = trio.current_time()
            try:
                reason = await self._connect_once()
            except AddressError as error:
                reason = f"{self.subject} cannot be dialled: {error}"
            except OSError as error:
                reason = f"{self.subject} does not answer at {self.address}: {_os_reason(error, self.address)}"
            self._lost(clean_text(reason))
            if trio.current_time() - started > STABLE_AFTER + self._dial_patience["dial"].seconds:
                backoff.reset()
            await trio.sleep(backoff.next(trio.current_time()))

    async def _connect_once(self) -> str:
        """One connection from dialling to its end; returns why it ended."""
        with self._dial_patience["dial"].attempt(OSError) as within:
            stream = await connect(self.address, timeout=within)
        life = self._life_patience.seconds
        config = ConnectionConfig(keepalive=KEEPALIVE, keepalive_timeout=life, handshake_timeout=life)
        opening = trio.current_time()
        channel = None
        try:
            async with open_channel(stream, config=config) as channel:
                self.bind(channel)
                try:
                    await self._session(channel)
                finally:
                    self.bind(None)
                    if channel.timed_out:
                        self._life_patience.failed(life, life)
                    else:
                        self._life_patience.succeeded(0)
        except RpcError as error:
            if channel is None:
                self._life_patience.failed(life, trio.current_time() - opening)
            return f"{self.subject} at {self.address} is of no use: {rpc_reason(error)}"
        except SessionError as error:
            return str(error)
        except BaseExceptionGroup as group:
            known, others = group.split((RpcError, SessionError, OSError))
            if others is not None or known is None:
                raise
            return f"{self.subject} at {self.address} is of no use: {_first_leaf(known)}"
        return f"{self.subject} closed the connection at {self.address}"

    def _lost(self, reason: str) -> None:
        if self.state is not PeerState.DOWN or self.problem != reason:
            logger.warning("%s", reason)
        self._applied.clear()
        self._claims.clear()
        self._unsure.clear()
        self._failures.clear()
        self._synced = False
        self._set_state(PeerState.DOWN, reason)

    def _set_state(self, state: PeerState, problem: str) -> None:
        if state is not self.state:
            self.since = _now()
        self.state = state
        self.problem = problem
        self.changes.notify_all()
        self._on_change("")

    async def _session(self, channel: Channel) -> None:
        with _translated(self.subject, "GetInfo"), self._dial_patience["GetInfo"].attempt(RpcError) as within:
            self.info = await self.get_info(within)
        if not self.info.contract_versions & CONTRACT_VERSIONS:
            theirs = ", ".join(map(str, sorted(self.info.contract_versions)[:10])) or "none"
            ours = ", ".join(map(str, sorted(CONTRACT_VERSIONS)))
            behind = max(self.info.contract_versions, default=0) < min(CONTRACT_VERSIONS)
            raise SessionError(
                f"{self.subject} speaks contract versions {theirs}, this bridge speaks {ours}: "
                f"update {self.subject if behind else 'the bridge'}"
            )
        if self.info.instance_id != self._instance_id or not self._instance_id:
            self.instances += 1
            self._instance_id = self.info.instance_id
        self._set_state(PeerState.STARTING, f"{self.subject} is being told its state")
        logger.info("%s answers at %s: version %s", self.subject, self.address, self.info.version)

        ended = ""
        async with trio.open_nursery() as nursery:

            def end(reason: str) -> None:
                nonlocal ended
                ended = ended or reason
                nursery.cancel_scope.cancel()

            async def watch_channel() -> None:
                await channel.wait_closed()
                end(f"{self.subject} closed the connection at {self.address}")

            nursery.start_soon(watch_channel)
            # Events first: what happens during Sync must not be missed.
            try:
                with self._dial_patience["WatchEvents"].attempt(trio.TooSlowError) as within, trio.fail_after(within):
                    await nursery.start(self._follow, end)
            except trio.TooSlowError:
                end(f"{self.subject} does not answer WatchEvents")
            while True:
                await self._sync_until_done()
                self._set_state(PeerState.OK, "")
                async with trio.open_nursery() as workers:
                    await self._converge(workers)
                    workers.cancel_scope.cancel()
        raise SessionError(ended)

    # Snapshot and changes

    async def _sync_until_done(self) -> None:
        backoff = Backoff(first=0.02, early_cap=0.2, cap=2.0)
        while True:
            self._resync = None
            self._dirty.clear()
            snapshot = {} if self._retiring else self._snapshot()
            generations = {key: self._link_generation(key) for key in snapshot}
            try:
                with self._sync_patience.attempt(RpcError) as within:
                    result = await self.sync(snapshot, within + SYNC_TIME_PER_OBJECT * len(snapshot))
                break
            except RpcError as error:
                if error.code is StatusCode.UNIMPLEMENTED:
                    raise
                reason = f"{self.subject} is not ready: {rpc_reason(error)}"
                if self.problem != reason:
                    logger.info("%s", reason)
                self._synced = False
                self._set_state(PeerState.STARTING, reason)
            await trio.sleep(backoff.next(trio.current_time()))
        self._unsure = set(result.failures)
        self._busy.clear()
        self._applied = {key: bytes(d) for key, d in snapshot.items() if key not in result.failures}
        self._claims.clear()
        for key, description in snapshot.items():
            self._claims.put(key, self.claims(description))
        before = self._failures
        self._failures = {}
        for key, (code, message) in result.failures.items():
            if key in snapshot:
                self._failures[key] = before.get(key) or Failure(code, clean_text(message), _now())
                logger.warning("%s did not take %s: %s", self.subject, self.label(key), clean_text(message))
        self._dirty |= set(self._failures) | {key for key in self.wanted_keys() if key not in self._applied}
        self._dirty |= {key for key in self._applied if self.wanted(key) is None}
        self._synced = True
        for endpoint_id in result.links_down:
            generation = generations.get(endpoint_id, 0)
            if generation:
                self._on_link_down(endpoint_id, f"{self.subject} has no link", generation)

    def _snapshot(self) -> dict[str, D]:
        snapshot = {}
        for key in self.wanted_keys():
            description = self.wanted(key) if self.in_snapshot(key) else None
            if description is not None:
                snapshot[key] = description
        return snapshot

    async def _converge(self, workers: trio.Nursery) -> None:
        """Starts a worker for each object that may differ; returns when a Sync is needed."""
        limit = trio.CapacityLimiter(MAX_CONCURRENT_CALLS)
        while self._resync is None:
            for key in list(self._dirty - self._busy):
                self._busy.add(key)
                workers.start_soon(self._work, key, limit)
            await self._wake.wait()

    async def _work(self, key: str, limit: trio.CapacityLimiter) -> None:
        """Makes one object be as wanted, however often that changes meanwhile."""
        backoff = Backoff(first=0.05, early_cap=0.5, cap=5.0)
        patience = Patience(self.call_timeout, MOST_PATIENCE * self.call_timeout)
        if key in self._failures:
            # Sync has just been refused this object.
            await self._pause(key, backoff)
        while True:
            self._dirty.discard(key)
            description = self.wanted(key)
            if not self._differs(key, description):
                break
            if description is not None and not await self._may_apply(key, description):
                continue
            try:
                async with limit:
                    with patience.attempt(RpcError) as within:
                        await self._call(key, description, within)
            except RpcError as error:
                self._refused(key, error)
                await self._pause(key, backoff)
            else:
                self._failures.pop(key, None)
        self._busy.discard(key)
        self._failures.pop(key, None)
        self.changes.notify(key)
        self._on_change(key)
        self._wake.notify()

    def _differs(self, key: str, description: D | None) -> bool:
        if description is None:
            return key in self._applied or key in self._unsure
        return self._applied.get(key) != bytes(description)

    async def _may_apply(self, key: str, description: D) -> bool:
        """Waits until what the object requires is there and what it replaces is gone; False: it changed meanwhile."""
        required = self.requires(description)
        claims = self.claims(description)

        def ready() -> bool:
            if required is not None and required not in self._applied:
                return False
            return not any(
                other != key and (other in self._applied or other in self._unsure) and self.wanted(other) is None
                for claim in claims
                for other in self._claims.holders(claim)
            )

        while not ready():
            if key in self._dirty:
                return False
            await self._wake.wait()
        return True

    async def _call(self, key: str, description: D | None, within: float) -> None:
        if description is None:
            await self.delete(key, within)
            self._applied.pop(key, None)
            self._claims.put(key, frozenset())
            self._unsure.discard(key)
        else:
            secret = self._link_secret(key)
            self._unsure.add(key)
            self._claims.put(key, self.claims(description))
            await self.apply(key, description, secret, within)
            self._applied[key] = bytes(description)
            self._unsure.discard(key)
            if secret is not None:
                self._on_secret_sent(key, secret)
        self._wake.notify()

    def _refused(self, key: str, error: RpcError) -> None:
        message = rpc_reason(error)
        known = self._failures.get(key)
        if known is None or known.message != message:
            logger.warning("%s did not take %s: %s", self.subject, self.label(key), message)
        if known is None:
            self._failures[key] = Failure(error.code, message, _now())
        else:
            known.code, known.message, known.attempts = error.code, message, known.attempts + 1
        if self._applied.pop(key, None) is not None:
            self._unsure.add(key)
        self.changes.notify(key)
        self._on_change(key)

    async def _pause(self, key: str, backoff: Backoff) -> None:
        """Waits for the back-off, or until what is wanted of the object changes."""
        with trio.move_on_after(backoff.next(trio.current_time())):
            await self._wake.until(lambda: key in self._dirty)

    # Events

    async def _follow(
        self, end: Callable[[str], None], task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Follows the peer's events, or asks every second when it is too old to tell."""
        assert self.info is not None
        if not self.info.has_events:
            task_status.started()
            await self._poll(end)
        budget, filled = self.event_burst, trio.current_time()
        started = False
        try:
            async with self.events() as events:
                async for event in events:
                    if not started:
                        started = True
                        task_status.started()
                    now = trio.current_time()
                    budget = min(self.event_burst, budget + (now - filled) * self.event_rate) - 1
                    filled = now
                    if budget < 0:
                        await trio.sleep(-budget / self.event_rate)
                    await self._happened(event)
            reason = f"{self.subject} ended the stream of events"
        except RpcError as error:
            reason = f"{self.subject} stopped telling events: {rpc_reason(error)}"
        if not started:
            task_status.started()
        end(reason)

    async def _happened(self, event: Event) -> None:
        match event:
            case ResyncEvent(reason):
                logger.info("%s asks for its state again: %s", self.subject, clean_text(reason))
                self.request_resync(reason)
            case LinkDownEvent(endpoint_id):
                # Usually the data plane has seen it first and the link is being dialled, or is up, again.
                generation = self._link_generation(endpoint_id)
                if generation and endpoint_id in await self._ask_links_down():
                    self._on_link_down(endpoint_id, f"{self.subject}: {clean_text(event.reason)}", generation)
            case OtherEvent(text):
                if text:
                    logger.info("%s: %s", self.subject, clean_text(text))

    async def _ask_links_down(self) -> frozenset[str]:
        try:
            return await self.links_down(self.call_timeout)
        except RpcError:
            return frozenset()

    async def _poll(self, end: Callable[[str], None]) -> None:
        while True:
            await trio.sleep(POLL_INTERVAL)
            if not self._synced:
                continue
            generations = {key: self._link_generation(key) for key in self._applied}
            try:
                down = await self.links_down(self.call_timeout)
            except RpcError as error:
                end(f"{self.subject} does not answer: {rpc_reason(error)}")
                return
            for endpoint_id in down:
                if generations.get(endpoint_id, 0):
                    self._on_link_down(endpoint_id, f"{self.subject} has no link", generations[endpoint_id])


def status_code(number: int) -> StatusCode:
    """A status code that a peer sent in a message; UNKNOWN when it is none (a newer peer, or a hostile one)."""
    try:
        code = StatusCode(number)
    except ValueError:
        return StatusCode.UNKNOWN
    return StatusCode.UNKNOWN if code is StatusCode.OK else code


def rpc_reason(error: RpcError) -> str:
    """A status for people, safe to print: the peer's text is hostile."""
    if error.code is StatusCode.DEADLINE_EXCEEDED:
        return "no answer in time"
    return clean_text(error.message or error.code.name)


@contextlib.contextmanager
def _translated(subject: str, call: str) -> Iterator[None]:
    try:
        yield
    except RpcError as error:
        raise SessionError(f"{subject} does not answer {call}: {rpc_reason(error)}") from error


def _os_reason(error: OSError, address: Address) -> str:
    refused = error.errno in (errno.ECONNREFUSED, errno.ENOENT, errno.ENODEV, errno.ECONNRESET)
    text = error.strerror or str(error)
    text = text.removeprefix(f"cannot connect to {address}: ").removeprefix(f"{address}: ")
    if error.errno is not None and text == os.strerror(error.errno):
        text = text.lower()
    return f"{text}; is its agent running?" if refused else text


def _first_leaf(group: BaseExceptionGroup[BaseException]) -> str:
    leaf: BaseException = group
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]
    return rpc_reason(leaf) if isinstance(leaf, RpcError) else str(leaf)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
