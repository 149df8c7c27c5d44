"""How everything is: components, links with counters, and what has not converged and why.

Counters live in the agents and are asked for when somebody looks, from all agents at once and with a short time-out: an
agent that does not answer costs the caller that time-out at most, and its last figures are shown.
"""

from __future__ import annotations

import datetime
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

import trio

from host_bridge.card import CardGuest
from host_bridge.fabric import Fabric
from host_bridge.guest_peer import RESOLVER_KEY, GuestPeer
from host_bridge.helper_peer import BALANCERS_KEY, MIRRORS_KEY, POLICY_KEY, STREAMS_KEY, UPLINK_KEY, network_key
from host_bridge.links import AnyGuest, DataLink
from host_bridge.model import EndpointRecord
from host_bridge.names import clean_text
from host_bridge.peer import Peer, PeerState
from host_bridge.qos.rates import Measured, QosRates
from taploom import __version__
from taploom.contracts.taploom.bridge.v1 import Component, ComponentState, Link, LinkQos, Pending, QosRule, Status
from taploom.contracts.taploom.guest.v1 import InterfaceStatus
from taploom.contracts.taploom.helper.v1 import DaemonState, EndpointStatus, GetHealthResponse, HelperFeature
from taploom.contracts.taploom.link.v1 import LinkCounters
from taploom.rpc import RpcError

POLL_TIMEOUT = 0.5
# Several watchers share one round of questions.
MAX_AGE = 0.1
# A hostile or broken agent could name any number of daemons.
MAX_DAEMONS = 1000

_STATES = {
    PeerState.OK: ComponentState.OK,
    PeerState.STARTING: ComponentState.STARTING,
    PeerState.DOWN: ComponentState.DOWN,
}
_DAEMON_STATES = {
    DaemonState.RUNNING: ComponentState.OK,
    DaemonState.STARTING: ComponentState.STARTING,
    DaemonState.DOWN: ComponentState.DOWN,
}

# What a peer is given besides networks and endpoints.
_OF_THE_WHOLE = frozenset({RESOLVER_KEY, UPLINK_KEY, STREAMS_KEY, POLICY_KEY, BALANCERS_KEY, MIRRORS_KEY})

T = TypeVar("T")


class _Polled(Generic[T]):
    """The last answer to a question, asked again when it is old; one question at a time."""

    def __init__(self, ask: Callable[[float], Awaitable[T]]) -> None:
        self._ask = ask
        self._asked_at = float("-inf")
        self._lock = trio.Lock()
        self.answer: T | None = None
        self.silent = False

    async def refresh(self) -> None:
        """Asks unless the answer is fresh; keeps the old answer when there is none in time."""
        with trio.move_on_after(POLL_TIMEOUT) as scope:
            async with self._lock:
                if trio.current_time() - self._asked_at < MAX_AGE:
                    return
                try:
                    self.answer = await self._ask(POLL_TIMEOUT)
                    self.silent = False
                except RpcError:
                    self.silent = True
                self._asked_at = trio.current_time()
        self.silent = self.silent or scope.cancelled_caught

    def forget(self) -> None:
        """Drops an answer that an agent gave before it went away."""
        self.answer = None


class StatusReader:
    """Reads the status of a fabric."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric
        self._started = datetime.datetime.now(datetime.UTC)
        self._health: _Polled[GetHealthResponse] = _Polled(fabric.helper.health)
        self._endpoints: _Polled[list[EndpointStatus]] = _Polled(fabric.helper.endpoints)
        self._rates = QosRates(fabric.helper.qos_counters)
        self._interfaces: dict[str, tuple[GuestPeer, _Polled[list[InterfaceStatus]]]] = {}

    async def read(self) -> Status:
        """The status now. Takes at most `POLL_TIMEOUT` seconds, whatever agents do; some seconds at most where limits
        are in force whose rates a slow helper has to tell."""
        await self._poll()
        components = [
            Component(name="bridge", state=ComponentState.OK, version=__version__, since=self._started),
            *self._helper(),
            *(self._guest(peer) for peer in sorted(self._fabric.guests.values(), key=lambda p: p.record.name)),
        ]
        links = self._links()
        pending = self._pending()
        return Status(
            time=datetime.datetime.now(datetime.UTC),
            components=components,
            links=links,
            pending=pending,
            converged=not pending and all(component.state == ComponentState.OK for component in components),
        )

    async def _poll(self) -> None:
        fabric = self._fabric
        for gone in self._interfaces.keys() - fabric.guests.keys():
            del self._interfaces[gone]
        for guest_id, peer in fabric.guests.items():
            if isinstance(peer, GuestPeer) and guest_id not in self._interfaces:
                self._interfaces[guest_id] = (peer, _Polled(peer.interfaces))
        async with trio.open_nursery() as nursery:
            if fabric.helper.connected:
                nursery.start_soon(self._health.refresh)
                nursery.start_soon(self._endpoints.refresh)
                if any(self._limits(endpoint) for endpoint in fabric.desired.store.endpoints()):
                    nursery.start_soon(self._rates.measure)
            else:
                self._health.forget()
                self._endpoints.forget()
                self._rates.forget()
            for peer, polled in self._interfaces.values():
                if peer.connected:
                    nursery.start_soon(polled.refresh)
                else:
                    polled.forget()

    def _helper(self) -> list[Component]:
        helper = self._fabric.helper
        health = self._health.answer
        state, problem = _STATES[helper.state], helper.problem
        if health is not None and not health.ready and state == ComponentState.OK:
            state, problem = ComponentState.STARTING, f"the helper waits: {clean_text(health.reason)}"
        components = [_component("helper", helper, state, problem)]
        for daemon in () if health is None else health.daemons[:MAX_DAEMONS]:
            name = clean_text(daemon.name, 40)
            if daemon.network_id:
                name += f"@{clean_text(self._fabric.desired.network_name(daemon.network_id), 63)}"
            daemon_state = _DAEMON_STATES.get(daemon.state, ComponentState.UNSPECIFIED)
            why = ""
            if daemon_state != ComponentState.OK:
                why = "starting" if daemon_state == ComponentState.STARTING else "not running"
                if daemon.last_exit:
                    why += f"; last: {clean_text(daemon.last_exit)}"
            components.append(
                Component(
                    name=f"helper/{name}",
                    state=daemon_state,
                    problem=why,
                    restarts=daemon.restarts,
                    since=daemon.started_at,
                )
            )
        return components

    def _guest(self, peer: AnyGuest) -> Component:
        state, problem = _STATES[peer.state], peer.problem
        polled = self._interfaces.get(peer.record.id)
        if state == ComponentState.OK and polled is not None and polled[1].silent:
            state, problem = ComponentState.STARTING, f"{peer.subject} does not answer ListInterfaces in time"
        return _component(f"guest/{peer.record.name}", peer, state, problem)

    def _links(self) -> list[Link]:
        theirs = {
            status.endpoint.endpoint_id: status.counters
            for status in self._endpoints.answer or ()
            if status.endpoint is not None
        }
        links = []
        for record in self._fabric.desired.store.endpoints():
            carrier = self._fabric.desired.store.carrier_of(record)
            link = self._fabric.links.get(record.id if carrier is None else carrier.id)
            if link is None or not record.active:
                continue
            _, polled = self._interfaces.get(record.guest_id, (None, None))
            ours = next(
                (
                    status.counters
                    for status in (polled.answer if polled is not None else None) or ()
                    if status.interface is not None and status.interface.endpoint_id == record.id
                ),
                None,
            )
            if carrier is None:
                links.append(self._link(link, ours, theirs.get(record.id)))
            elif ours is not None:
                links.append(self._carried(link, record, ours))
            else:
                continue  # an agent that makes no such interfaces, or does not count them
            links[-1].endpoint = self._fabric.endpoint_message(record)
            links[-1].qos = [self._link_qos(record.id, rule) for rule in links[-1].endpoint.qos]
        return links

    def _limits(self, endpoint: EndpointRecord) -> bool:
        network = self._fabric.desired.store.network(endpoint.network_id)
        assert network is not None, "foreign keys"
        return any(said.rate is not None for said in self._fabric.desired.qos.in_force(endpoint, network).values())

    def _link_qos(self, endpoint_id: str, rule: QosRule) -> LinkQos:
        # The directions have the same numbers in both contracts.
        found: Measured | None = None
        if rule.rate_bits_per_second:
            found = self._rates.measured.get((endpoint_id, int(rule.direction)))
        if found is None:
            return LinkQos(rule=rule)
        return LinkQos(
            rule=rule,
            passed_bits_per_second=found.passed,
            dropped_bits_per_second=found.dropped,
            dropped_bytes=found.dropped_bytes,
        )

    @staticmethod
    def _link(link: DataLink, guest: LinkCounters | None, helper: LinkCounters | None) -> Link:
        relay = link.counters()
        message = Link(up=link.up, problem=link.waits_for(), reconnects=0 if relay is None else relay.reconnects)
        if guest is not None:
            message.tx_frames, message.tx_bytes = guest.tx_frames, guest.tx_bytes
            message.rx_frames, message.rx_bytes = guest.rx_frames, guest.rx_bytes
        elif helper is not None:
            # The helper's link seen from its TAP: what it sends goes to the guest.
            message.tx_frames, message.tx_bytes = helper.rx_frames, helper.rx_bytes
            message.rx_frames, message.rx_bytes = helper.tx_frames, helper.tx_bytes
        elif relay is not None:
            # Headers included: better than nothing while neither agent answers.
            message.tx_bytes, message.rx_bytes = relay.tx_bytes, relay.rx_bytes
        for counters in (guest, helper):
            if counters is not None:
                message.drops += counters.rx_drops + counters.tx_drops
                # The agents remember across restarts of the bridge, the bridge across theirs.
                message.reconnects = max(message.reconnects, counters.reconnects)
        return message

    def _carried(self, link: DataLink, record: EndpointRecord, counters: LinkCounters) -> Link:
        """Of an endpoint that another's link carries, whose frames that link counts too."""
        lacking = self._fabric.missing_for(record)
        return Link(
            up=link.up and lacking is None,
            problem=link.waits_for() if lacking is None else lacking.waits_for(record.id),
            tx_frames=counters.tx_frames,
            tx_bytes=counters.tx_bytes,
            rx_frames=counters.rx_frames,
            rx_bytes=counters.rx_bytes,
            drops=counters.rx_drops + counters.tx_drops,
        )

    def _pending(self) -> list[Pending]:
        fabric = self._fabric
        pending: list[Pending] = []
        for network in fabric.desired.store.networks():
            if not network.switched:
                continue
            key = network_key(network.id)
            if not network.active or not fabric.helper.has(key):
                failure = fabric.helper.failure(key)
                since = network.created_at if not network.active else failure.since if failure else fabric.helper.since
                pending.append(
                    Pending(subject=f"network {network.name}", reason=fabric.helper.waits_for(key), since=since)
                )
        for endpoint in fabric.desired.store.endpoints():
            link = fabric.links.get(endpoint.id)
            lacking = fabric.missing_for(endpoint) if endpoint.carried is not None else None
            if lacking is not None:
                failure = lacking.failure(endpoint.id)
                since = failure.since if failure else lacking.since
                reason = lacking.waits_for(endpoint.id)
                pending.append(Pending(subject=f"endpoint {fabric.label(endpoint)}", reason=reason, since=since))
            if link is None or (endpoint.active and link.up):
                continue
            since = link.since if endpoint.active else endpoint.created_at
            pending.append(Pending(subject=f"endpoint {link.label}", reason=link.waits_for(), since=since))
        desired = fabric.desired
        for subject, feature, found in (
            ("the policy", HelperFeature.POLICY, lambda: desired.policies.groups),
            ("the load balancers", HelperFeature.BALANCERS, lambda: desired.balancers.balancers),
            ("the mirrors", HelperFeature.MIRRORS, desired.mirrors.records),
            ("the limits", HelperFeature.QOS, desired.qos.entries),
        ):
            lack = fabric.helper.lack_of(feature)
            if lack and found():
                pending.append(Pending(subject=subject, reason=lack, since=fabric.helper.since))
        agents = (peer for peer in fabric.guests.values() if isinstance(peer, GuestPeer))
        peers: list[Peer[Any]] = [fabric.helper, *agents]
        for peer in peers:
            if isinstance(peer, GuestPeer) and peer.state is not PeerState.OK:
                pending.append(Pending(subject=peer.subject, reason=peer.problem, since=peer.since))
            for key, failure in peer.failures().items():
                if peer.wanted(key) is None:
                    what = f"removal of {peer.label(key)} from {peer.subject}"
                    pending.append(Pending(subject=what, reason=failure.message, since=failure.since))
                elif key in _OF_THE_WHOLE:
                    what = f"{peer.label(key)} of {peer.subject}"
                    pending.append(Pending(subject=what, reason=peer.waits_for(key), since=failure.since))
        return pending


def _component(name: str, peer: Peer[Any] | CardGuest, state: ComponentState, problem: str) -> Component:
    return Component(
        name=name,
        state=state,
        version="" if peer.info is None else peer.info.version,
        problem="" if state == ComponentState.OK else problem,
        restarts=max(0, peer.instances - 1),
        since=peer.since,
    )
