"""What happened, for `docker events`: the last events are kept, and whoever listens is told the next."""

from __future__ import annotations

import collections
import dataclasses
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

import trio

from host_bridge.docker_api.errors import DockerError, bad_request
from host_bridge.docker_api.filters import Filters
from host_bridge.docker_api.http import Request, Response, json_line

# As many as dockerd keeps.
_KEPT = 256
# A listener that reads nothing loses what comes when so many wait for it.
_WAITING = 4096
_TIMESTAMP = re.compile(r"([+-]?[0-9]{1,18})(?:\.([0-9]+))?")
_NAMED = ("daemon", "container", "plugin", "volume", "network", "service", "node", "secret", "config")
_FUZZY_ACTIONS = frozenset({"health_status", "exec_create", "exec_start"})


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened.

    Attributes:
        kind: `network`, `container`, `image`, …
        action: `create`, `connect`, `die`, …
        actor: the id of what it happened to.
        attributes: what else there is to know; `name` among them.
        time_ns: nanoseconds since the epoch.
        scope: `local`.
    """

    kind: str
    action: str
    actor: str
    attributes: Mapping[str, str]
    time_ns: int
    scope: str = "local"

    def json(self) -> dict[str, object]:
        """As Docker tells it, the fields that it keeps for old clients included."""
        value: dict[str, object] = {}
        if self.kind in ("container", "image"):
            value = {"status": self.action, "id": self.actor}
        if self.kind == "container" and self.attributes.get("image"):
            value["from"] = self.attributes["image"]
        return value | {
            "Type": self.kind,
            "Action": self.action,
            "Actor": {"ID": self.actor, "Attributes": dict(sorted(self.attributes.items()))},
            "scope": self.scope,
            "time": self.time_ns // 1_000_000_000,
            "timeNano": self.time_ns,
        }


@dataclass(slots=True, eq=False)
class _Listener:
    wants: Callable[[Event], bool]
    send: trio.MemorySendChannel[Event]


@dataclass(slots=True)
class EventLog:
    """The events of this process's life, the last of them in a ring."""

    _kept: collections.deque[Event] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=_KEPT))
    _listeners: list[_Listener] = dataclasses.field(default_factory=list)

    @property
    def listeners(self) -> int:
        """How many listen."""
        return len(self._listeners)

    def log(self, kind: str, action: str, actor: str, attributes: Mapping[str, str] | None = None) -> None:
        """Tells that something has happened just now."""
        event = Event(kind, action, actor, dict(attributes or {}), time.time_ns())
        self._kept.append(event)
        for listener in self._listeners:
            if listener.wants(event):
                try:
                    listener.send.send_nowait(event)
                except trio.WouldBlock:
                    continue  # it does not read; Docker drops too

    async def stream(self, request: Request) -> Response:
        """GET /events."""
        since, until = _moment(request, "since"), _moment(request, "until")
        now = time.time_ns()
        if until is not None and since is not None and until < since:
            raise bad_request(
                f"`since` time ({request.first('since')}) cannot be after `until` time ({request.first('until')})"
            )
        filters = Filters.parse(request.first("filters"))
        await trio.lowlevel.checkpoint()

        def wants(event: Event) -> bool:
            return _included(event, filters) and not (
                request.version < (1, 46) and (event.kind, event.action) == ("image", "create")
            )

        past: list[Event] = []
        if since is not None or until is not None:
            past = [
                event
                for event in self._kept
                if event.time_ns >= (since or 0) and (until is None or event.time_ns <= until) and wants(event)
            ]
        remaining = None if until is None else (until - now) / 1e9
        if remaining is not None and remaining <= 0:
            return Response(200, _told(past), content_type="application/json")
        deadline = float("inf") if remaining is None else trio.current_time() + remaining
        subscription = _Subscription(self, wants, past, deadline)
        self._listeners.append(subscription.listener)
        return Response(200, subscription, content_type="application/json")

    def forget(self, listener: _Listener) -> None:
        """Tells this listener no more."""
        if listener in self._listeners:
            self._listeners.remove(listener)


class _Subscription:
    """What one listener is told; `aclose` ends it, also before it began."""

    def __init__(self, log: EventLog, wants: Callable[[Event], bool], past: list[Event], deadline: float) -> None:
        # From here on nothing is missed, whenever the answer's first byte leaves.
        send, self._receive = trio.open_memory_channel[Event](_WAITING)
        self.listener = _Listener(wants, send)
        self._log = log
        self._past = past
        self._deadline = deadline

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self._past:
            await trio.lowlevel.checkpoint()
            told, self._past = self._past, []
            return b"".join(json_line(event.json()) for event in told)
        with trio.move_on_at(self._deadline):
            return json_line((await self._receive.receive()).json())
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Listens no more."""
        self._log.forget(self.listener)
        await trio.lowlevel.checkpoint()


async def _told(events: list[Event]) -> AsyncIterator[bytes]:
    await trio.lowlevel.checkpoint()
    for event in events:
        yield json_line(event.json())


def _moment(request: Request, name: str) -> int | None:
    """A time of the query, seconds and perhaps nanoseconds since the epoch, in nanoseconds; None: not given."""
    text = request.first(name)
    if not text:
        return None
    found = _TIMESTAMP.fullmatch(text)
    if found is None:
        # Docker's answer to a time that it cannot parse: strconv's words, and no better status.
        seconds, _, fraction = text.partition(".")
        wrong = fraction if _TIMESTAMP.fullmatch(seconds) else seconds
        raise DockerError(500, f'strconv.ParseInt: parsing "{wrong}": invalid syntax')
    nanoseconds = int((found[2] or "0")[:9].ljust(9, "0"))
    return int(found[1]) * 1_000_000_000 + nanoseconds


def _included(event: Event, filters: Filters) -> bool:
    if not filters:
        return True
    if _FUZZY_ACTIONS & set(filters.get("event")):
        action = filters.fuzzy("event", event.action)
    else:
        action = filters.exact("event", event.action)
    name = event.attributes.get("name", "")
    return (
        action
        and filters.exact("type", event.kind)
        and filters.exact("scope", event.scope)
        and all(filters.fuzzy(kind, event.actor) or filters.fuzzy(kind, name) for kind in _NAMED)
        and _image(event, filters)
        and filters.labels("label", event.attributes)
    )


def _image(event: Event, filters: Filters) -> bool:
    name = event.attributes.get("name" if event.kind == "image" else "image", "")
    return any(
        filters.exact("image", text) for text in (event.actor, name, _without_tag(event.actor), _without_tag(name))
    )


def _without_tag(reference: str) -> str:
    head, _, last = reference.partition("@")[0].rpartition("/")
    last = last.partition(":")[0]
    return f"{head}/{last}" if head else last
