"""One lookup, sans-IO: a query goes in, what to ask comes out, results go in, the answer comes out.

Docker's rules: the container's own names for others first, then its own name; then the networks in gateway order, where
the first that knows the name wins and a name known only in another form is an empty answer; then the upstreams, where
NXDOMAIN is final and a failure means the next one. Single labels stay inside where the container has its own ndots:
its C library tries them with the search domains anyway.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import dns.name

from . import wire
from .wire import Ip, Query, Record


@dataclass(frozen=True, slots=True)
class NetworkView:
    """A network to ask: its name, the interface that leads there, its servers, the container's addresses on it.

    ``links``: what to ask it instead of a name that only this container knows (see name_links).
    """

    name: str
    interface: str
    servers: tuple[str, ...] = ()
    addresses: tuple[Ip, ...] = ()
    links: Mapping[dns.name.Name, dns.name.Name] = field(default_factory=dict)


class Known(enum.Enum):
    """What a network says of a name."""

    YES = "yes"
    NO = "no"
    SILENT = "silent"


@dataclass(frozen=True, slots=True)
class NetworkResult:
    """A network's answer: whether it knows the name, and the records of the asked type."""

    known: Known
    records: tuple[Record, ...] = ()


UNKNOWN = NetworkResult(Known.NO)
SILENT = NetworkResult(Known.SILENT)


class Next(enum.Enum):
    """What a lookup needs."""

    NETWORKS = "networks"
    UPSTREAM = "upstream"
    DONE = "done"


@dataclass
class Lookup:
    """Follow ``next``: ask all of ``networks`` at once, then upstream after upstream, until it is DONE."""

    query: Query
    networks: Sequence[NetworkView]
    hostname: str
    upstreams: int
    unqualified_stay: bool = False
    """Single labels that no network knows are answered empty, not forwarded."""
    shuffle: Callable[[list[Record]], None] = random.shuffle
    next: Next = field(init=False, default=Next.NETWORKS)
    upstream: int = field(init=False, default=0)
    """Which upstream to ask, when ``next`` is UPSTREAM."""
    names: list[dns.name.Name] = field(init=False)
    """What each network is asked for."""
    _results: list[NetworkResult | None] = field(init=False)
    _order: list[int] = field(init=False)
    _rcode: int = field(init=False, default=wire.SERVFAIL)
    _records: tuple[Record, ...] = field(init=False, default=())
    _forwarded: bytes | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._results = [None if view.servers else UNKNOWN for view in self.networks]
        query = self.query
        linked = [view.links.get(query.name) for view in self.networks]
        self.names = [query.name if name is None else name for name in linked]
        # sorted() is stable: networks where the name is a link come first, and else all stay in gateway order.
        self._order = sorted(range(len(linked)), key=lambda index: linked[index] is None)
        if query.qtype in (wire.AXFR, wire.IXFR):
            self._finish(wire.REFUSED)
        elif query.qclass != wire.CLASS_IN or query.name == dns.name.root:
            self._start_forwarding()
        elif not any(linked) and (own := self._own_addresses()) is not None:
            version = {wire.A: 4, wire.AAAA: 6}.get(query.qtype)
            self._finish(wire.NOERROR, tuple(address for address in own if address.version == version))
        else:
            self._evaluate()

    @property
    def network_qtype(self) -> int:
        """What networks are asked: addresses tell whether a name is known, whatever the client wants of it."""
        qtype = self.query.qtype
        if qtype == wire.AAAA or (qtype == wire.PTR and wire.reverse_address(self.query.name) is not None):
            return qtype
        return wire.A

    def unanswered(self) -> list[int]:
        """The networks that have not answered yet."""
        return [index for index, result in enumerate(self._results) if result is None]

    def held_up(self) -> bool:
        """Whether a network that comes later knows the name, and only silent ones are in between."""
        return any(result is not None and result.known is Known.YES for result in self._results)

    def network_result(self, index: int, result: NetworkResult) -> None:
        """A network's answer, or SILENT."""
        if self.next is Next.NETWORKS and self._results[index] is None:
            self._results[index] = result
            self._evaluate()

    def upstream_result(self, reply: bytes | None) -> None:
        """The reply of the upstream that was to be asked, already checked to be one to the query; None: no reply."""
        if reply is not None and wire.rcode_of(reply) not in (wire.SERVFAIL, wire.REFUSED):
            if wire.rcode_of(reply) == wire.NXDOMAIN and self._may_be_silent_networks():
                self._finish(wire.SERVFAIL)
                return
            self._forwarded = wire.with_id(reply, self.query.id)
            self.next = Next.DONE
            return
        self.upstream += 1
        if self.upstream >= self.upstreams:
            self._finish(wire.SERVFAIL)

    def answer(self, limit: int = wire.MESSAGE_MAX) -> bytes:
        """The reply to the client, of at most ``limit`` bytes. Only when DONE."""
        assert self.next is Next.DONE
        if self._forwarded is not None:
            return wire.fit(self.query, self._forwarded, limit)
        return wire.answer(self.query, self._rcode, self._records, limit=limit)

    def _evaluate(self) -> None:
        for index in self._order:
            result = self._results[index]
            if result is None:
                return
            if result.known is Known.YES:
                wanted = result.records if self.network_qtype == self.query.qtype else ()
                self._finish(wire.NOERROR, wanted)
                return
        self._start_forwarding()

    def _start_forwarding(self) -> None:
        unqualified = self.query.qtype in (wire.A, wire.AAAA) and len(self.query.name.labels) == 2
        if self.unqualified_stay and unqualified and not self._may_be_silent_networks():
            self._finish(wire.NOERROR)
        elif self.upstreams:
            self.next = Next.UPSTREAM
        else:
            # "No such name" would be kept by whoever asked; a network that is silent for a moment may well know it.
            self._finish(wire.SERVFAIL if self._may_be_silent_networks() else wire.NXDOMAIN)

    def _finish(self, rcode: int, records: tuple[Record, ...] = ()) -> None:
        self._rcode = rcode
        shuffled = list(records)
        self.shuffle(shuffled)
        self._records = tuple(shuffled)
        self.next = Next.DONE

    def _may_be_silent_networks(self) -> bool:
        """Whether a network that did not answer is the likely owner of the name: a single label, or below its name."""
        for view, result in zip(self.networks, self._results, strict=True):
            if result is None or result.known is not Known.SILENT:
                continue
            labels = self.query.name.labels
            if len(labels) == 2 or (view.name and self.query.name.is_subdomain(_name(view.name))):
                return True
        return False

    def _own_addresses(self) -> list[Ip] | None:
        if not self.hostname:
            return None
        own = _name(self.hostname)
        if self.query.name == own:
            return [address for view in self.networks for address in view.addresses]
        for view in self.networks:
            if view.name and self.query.name == _name(f"{self.hostname}.{view.name}"):
                return list(view.addresses)
        return None


def read_network_reply(reply: bytes, qtype: int) -> NetworkResult:
    """What a network's server says: NOERROR means known, REFUSED and NXDOMAIN not, anything else is no answer.

    NOERROR without records wants a second look: see needs_confirmation.
    """
    rcode = wire.rcode_of(reply)
    if rcode in (wire.REFUSED, wire.NXDOMAIN):
        return UNKNOWN
    if rcode != wire.NOERROR:
        return SILENT
    try:
        return NetworkResult(Known.YES, wire.read_records(reply, qtype))
    except wire.MalformedError:
        return SILENT


def needs_confirmation(result: NetworkResult, qtype: int) -> int | None:
    """The type to ask for next, to tell an empty answer for a known name from one for a name that only has children.

    dnsmasq answers NOERROR for example.com when it knows api.example.com (RFC 8020); a container's alias must not hide
    the rest of a domain.
    """
    if result.known is not Known.YES or result.records:
        return None
    return {wire.A: wire.AAAA, wire.AAAA: wire.A}.get(qtype)


def confirmed(other: NetworkResult) -> NetworkResult:
    """The result, given that of the other type: known without records of the first, or not known."""
    if other.known is Known.YES:
        return NetworkResult(Known.YES) if other.records else UNKNOWN
    return other


def name_links(network_name: str, pairs: Iterable[tuple[str, str]]) -> dict[dns.name.Name, dns.name.Name]:
    """NetworkView.links of (alias, target) pairs: an alias is known alone and as ``alias.network``, in any case."""
    links: dict[dns.name.Name, dns.name.Name] = {}
    for alias, target in pairs:
        for text in (alias, f"{alias}.{network_name}") if network_name else (alias,):
            links[_name(text)] = _name(target)
    links.pop(_IMPOSSIBLE, None)
    return links


def _name(text: str) -> dns.name.Name:
    """The absolute name; one that DNS cannot express equals none that is ever asked."""
    try:
        return dns.name.Name([*text.rstrip(".").encode().split(b"."), b""])
    except dns.name.LabelTooLong:
        return _IMPOSSIBLE
    except (dns.name.NameTooLong, dns.name.EmptyLabel):
        return _IMPOSSIBLE


_IMPOSSIBLE = dns.name.Name([b"\0", b"invalid", b""])
