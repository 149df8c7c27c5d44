"""The networks and endpoints that the host last described, and the making of them.

What is wanted is kept in memory only. Every change is made by functions that bring the databases, the kernel and
dnsmasq to what is described whatever was there, so the same functions repair what a lost database took with it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol, TypeVar

import trio

from agent_helper import (
    balancer_rows,
    links,
    mirrors,
    northbound,
    physical,
    policy_rows,
    qos_counters,
    qos_rows,
    vswitch,
)
from agent_helper.balancer import Around, BalancerSpec, parse_balancers
from agent_helper.balancer_health import backend_statuses
from agent_helper.cards import choose_card
from agent_helper.dns import DnsServer, NameSpec
from agent_helper.errors import HelperError, InvalidSpecError, NotFoundError, PreconditionError, UnavailableError
from agent_helper.ids import check_id
from agent_helper.locks import KeyedLocks, SharedLock
from agent_helper.mirrors import MirrorSpec, parse_mirrors
from agent_helper.ovsdb import Txn
from agent_helper.policy import MemberSpec, PolicySpec, parse_member, parse_policy
from agent_helper.policy_counters import read_counters
from agent_helper.spares import SpareTaps
from agent_helper.spec import (
    Address,
    EndpointSpec,
    NetworkSpec,
    UplinkSpec,
    check_in_network,
    parse_endpoint,
    parse_network,
    parse_uplink,
)
from agent_helper.stack import Stack
from agent_helper.uplink import KernelEnd, usable
from taploom.contracts.taploom.helper.v1 import (
    BackendStatus,
    Balancers,
    Endpoint,
    EndpointPolicy,
    Mirrors,
    Network,
    Policy,
    SyncRequest,
    Uplink,
)
from taploom.link import Tap
from taploom.supervise import SupervisedProcess

logger = logging.getLogger("taploom.helper.fabric")

M = TypeVar("M")
S = TypeVar("S")

_UP_TIMEOUT = 10.0  # s that a port may take to be programmed, daemons' restarts included, where its caller has no limit
_NAMES_TIMEOUT = 2.0  # s that dnsmasq may take to know a name
_UNPLUG_TIMEOUT = 3.0  # s that vswitchd may take to let go of a port
_POLICY, _BALANCERS, _MIRRORS = "policy", "balancers", "mirrors"  # what a failure of a Sync calls them
_OK: Mapping[str, Sequence[str]] = {"error": ()}
_MAX_TAP_MTU = 65521  # the kernel's for TAPs: 65535 less the Ethernet header


class LinkPorts(Protocol):
    """Of LinkServer, what the fabric needs."""

    def add(self, endpoint_id: str, tap: Tap) -> None: ...
    def prepare(self, tap: Tap) -> None: ...
    async def remove(self, endpoint_id: str) -> None: ...
    def authorize(self, endpoint_id: str, secret: bytes) -> None: ...


@dataclass
class Changes:
    """Of what is there already: how often what packets meet in OVN was changed, and how many of that are in force."""

    made: int = 0
    in_force: int = 0


@dataclass
class NetworkState:
    """A network as it is. `message` is the description last applied."""

    spec: NetworkSpec
    message: Network
    changes: Changes = field(default_factory=Changes)
    dns: DnsServer | None = None
    endpoints: dict[str, EndpointState] = field(default_factory=dict)
    holders: dict[str, str] = field(default_factory=dict)  # address or MAC -> endpoint_id
    joined: tuple[int, ...] = ()  # of a VLAN: the port of the integration bridge that leads to its card


@dataclass
class EndpointState:
    """An endpoint as it is. It has a TAP unless it is disabled, or another's carries it; `there`: it has its port."""

    spec: EndpointSpec
    message: Endpoint
    network: NetworkState
    changes: Changes = field(default_factory=Changes)
    tap: Tap | None = None
    fresh: bool = False  # vswitchd has not had its TAP before
    there: bool = False
    linked: bool = False  # known to the data links' server
    gone: trio.Event = field(default_factory=trio.Event)


@dataclass
class SyncOutcome:
    endpoints: list[EndpointState]
    removed: list[str]
    failures: list[tuple[str, HelperError]]


class Fabric:
    """Converges the helper to descriptions.

    Args:
        stack: the daemons.
        ports: the data links.
        on_dns: called with the network's id when a dnsmasq's state changed.
        on_lost: called with a reason when what was applied could not be restored.
    """

    def __init__(
        self,
        stack: Stack,
        ports: LinkPorts,
        *,
        on_dns: Callable[[str, SupervisedProcess], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self.networks: dict[str, NetworkState] = {}
        self.endpoints: dict[str, EndpointState] = {}
        self._stack = stack
        self._ports = ports
        self._on_dns = on_dns
        self._on_lost = on_lost
        self._numbers = itertools.count()  # of interfaces; a name is never used twice, see _open_tap
        self.uplink: UplinkSpec | None = None
        self.policy = PolicySpec()
        self._limit_flows: dict[str, list[str]] = {}
        self.balancers: tuple[BalancerSpec, ...] = ()
        self._backends: frozenset[str] = frozenset()
        self._balancer_changes = Changes()
        self.mirrors: tuple[MirrorSpec, ...] = ()
        self._mirror_rules = mirrors.NONE  # those that the kernel has
        self._mirror_lock = trio.Lock()
        self._uplink_changes = Changes()
        self._policy_changes = Changes()
        self.kernel = KernelEnd(stack.programs["nft"], self._numbers)
        self._gate = SharedLock()
        self._network_locks = KeyedLocks()
        self._endpoint_locks = KeyedLocks()
        self._nursery: trio.Nursery | None = None
        self._reread = trio.Event()
        self._to_unplug: set[str] = set()
        self._cards: frozenset[str] = frozenset()  # that VLANs have
        self._cards_lock = trio.Lock()
        self._tags: dict[tuple[str, int], str] = {}  # card and tag of VLANs -> network_id
        self._spares = SpareTaps(self._open_tap)

    async def clear(self) -> None:
        """Removes what a run before has left in the kernel; to be called before `run`.

        Its mirrors would come back to life with TAPs that have the names of those of then.
        """

        async def clear_mirrors() -> None:
            try:
                await trio.to_thread.run_sync(mirrors.load, self._stack.programs["nft"], mirrors.NONE)
            except (HelperError, OSError) as exc:  # a kernel that cannot have any; who applies one is told
                logger.debug("mirrors: %s", exc)

        await _together(self.kernel.clear, clear_mirrors)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Runs what keeps the fabric as described, until cancelled. Nothing of it is left then."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._keep_restored)
                nursery.start_soon(self._keep_spares)
                task_status.started()
        finally:
            self._nursery = None
            with trio.CancelScope(shield=True):
                await self._end()

    async def _end(self) -> None:
        self.mirrors = ()
        await self._keep_mirrors()
        for endpoint_id in self.endpoints:
            await self._ports.remove(endpoint_id)
        await _close_all([*(e.tap for e in self.endpoints.values() if e.tap is not None), *self._spares.clear()])
        for network in self.networks.values():
            if network.dns is not None:
                await network.dns.close()
        await self.kernel.close()

    # The uplink

    async def apply_uplink(self, message: Uplink) -> None:
        """Makes the way out of the networks be as described.

        Raises:
            InvalidSpecError: nothing was changed.
            UnavailableError, OSError: the next attempt completes it.
        """
        spec = parse_uplink(message)
        self._check_ready()
        async with self._gate.exclusive():
            with trio.CancelScope(shield=True):
                await self._apply_uplink(spec)
        await self._come_into_force(self._uplink_changes)

    async def _apply_uplink(self, spec: UplinkSpec | None) -> None:
        networks = [network.spec for network in self.networks.values()]
        if spec is not None:
            spec = await trio.to_thread.run_sync(usable, spec)
        if self.endpoints and not self.kernel.is_for(spec):
            self._uplink_changes.made += 1
        self.uplink = spec

        def in_nb(txn: Txn) -> None:
            northbound.ensure_uplink(txn, spec)
            for network in networks:
                northbound.ensure_network(txn, network, spec)
            policy_rows.ensure_addresses(txn, spec)
            ensure_balancers(txn)

        ensure_balancers = self._balancer_rows()
        await _together(partial(self._stack.nb.transact, in_nb), partial(self._apply_kernel_end, spec))

    async def _apply_kernel_end(self, spec: UplinkSpec | None) -> None:
        if self.kernel.outer and not self.kernel.is_for(spec):
            # Rare enough to be done from the start.
            await self._unplug([self.kernel.outer])
            await self.kernel.close()
        if spec is not None:
            await self.kernel.open(spec)
            plug = partial(vswitch.plug, interfaces={self.kernel.outer: northbound.KERNEL_PORT})
            await _together(partial(self._stack.conf.transact, plug), self.kernel.converge)
            await self._stack.enlarge_packet_sockets()

    # Networks

    async def apply_network(self, message: Network) -> None:
        """Creates the network or makes it be as described.

        Raises:
            InvalidSpecError, PreconditionError, UnavailableError: nothing was changed, or the next attempt completes
                it.
        """
        spec = parse_network(message)
        self._check_ready()
        async with self._gate.shared(), self._network_locks.exclusive(spec.network_id):
            with trio.CancelScope(shield=True):
                await self._apply_network(spec, message)
        network = self.networks.get(spec.network_id)
        if network is not None:
            await self._come_into_force(network.changes)

    async def _apply_network(self, spec: NetworkSpec, message: Network) -> None:
        network = self.networks.get(spec.network_id)
        spec = await self._on_card(spec)
        ensure = partial(northbound.ensure_network, spec=spec, uplink=self.uplink)
        if network is None:
            self.kernel.set_network(spec)
            network = NetworkState(spec, message)
            try:
                await _together(
                    partial(self._stack.nb.transact, ensure),
                    partial(self._open_dns, network, spec),
                    partial(self.kernel.converge, spec.network_id),
                )
            except BaseException:
                await self._drop_network(network)
                raise
            self.networks[spec.network_id] = network
            await self._rebalance(spec.network_id)
            return
        old = network.spec
        for endpoint in network.endpoints.values():
            try:
                check_in_network(endpoint.spec, spec)
            except InvalidSpecError as exc:
                raise PreconditionError(
                    f"endpoint {endpoint.spec.endpoint_id} stands in the way: {exc.message}"
                ) from exc
        self.kernel.set_network(spec)
        if spec != old and network.endpoints:
            network.changes.made += 1
        await _together(partial(self._stack.nb.transact, ensure), partial(self.kernel.converge, spec.network_id))
        if _dns_part(spec) != _dns_part(old) or (spec.dns_servers and network.dns is None):
            # Rare enough to be done from the start: a network's names are files, its server starts in milliseconds.
            await self._close_dns(network)
            await self._open_dns(network, spec)
        if spec.mtu != old.mtu:
            await trio.to_thread.run_sync(_set_mtus, [e.tap for e in network.endpoints.values()], spec.mtu)
        network.spec, network.message = spec, message
        if spec.vlan != old.vlan:
            network.joined = ()
            await self._free_card(spec.network_id)
        await self._rebalance(spec.network_id)

    async def delete_network(self, network_id: str) -> None:
        """Removes the network and its endpoints; nothing when it is not there."""
        check_id("network_id", network_id)
        async with self._gate.shared(), self._network_locks.exclusive(network_id):
            network = self.networks.get(network_id)
            if network is not None:
                self._check_ready()
                with trio.CancelScope(shield=True):
                    await self._remove_network(network)

    async def _remove_network(self, network: NetworkState) -> None:
        await self._remove_endpoints(list(network.endpoints.values()))
        await self._drop_network(network)

    async def _drop_network(self, network: NetworkState) -> None:
        network_id = network.spec.network_id
        self.kernel.remove_network(network_id)
        await _together(
            partial(
                self._stack.nb.transact,
                partial(northbound.remove_network, network_id=network_id, uplink=self.uplink),
            ),
            partial(self._close_dns, network),
            self.kernel.converge,
        )
        self.networks.pop(network_id, None)
        await self._free_card(network_id)
        await self._rebalance(network_id)

    # Cards that VLANs have

    async def _on_card(self, spec: NetworkSpec) -> NetworkSpec:
        """The network with the card that its VLAN is behind, which is Open vSwitch's then."""
        vlan, present = spec.vlan, self.networks.get(spec.network_id)
        if vlan is None:
            return spec
        async with self._cards_lock:
            before = present.spec.vlan if present is not None else None
            wanted = vlan.uplink or (before.uplink if before is not None else "")
            card = await trio.to_thread.run_sync(choose_card, wanted, self._cards, spec.mtu)
            holder = self._tags.get((card, vlan.tag), spec.network_id)
            if holder != spec.network_id:
                raise PreconditionError(f"vlan: tag {vlan.tag} of network card {card} is network {holder}'s")
            await self._use_cards(self._cards | {card})
            self._tags[card, vlan.tag] = spec.network_id
        return replace(spec, vlan=replace(vlan, uplink=card))

    async def _free_card(self, network_id: str) -> None:
        """Gives back what a network's VLAN has had and has no more."""
        network = self.networks.get(network_id)
        vlan = network.spec.vlan if network is not None else None
        async with self._cards_lock:
            for place in [place for place, holder in self._tags.items() if holder == network_id]:
                if vlan is None or (vlan.uplink, vlan.tag) != place:
                    del self._tags[place]
            await self._use_cards(frozenset(card for card, _ in self._tags))

    async def _use_cards(self, cards: frozenset[str]) -> None:
        """Makes these cards, and no others, be Open vSwitch's; returns once they are."""
        if cards == self._cards:
            return
        more = sorted(cards - self._cards)
        await trio.to_thread.run_sync(_harden_cards, more)
        ensure = partial(physical.ensure_cards, kernel_datapath=self._stack.kernel_datapath)
        _, wanted = await self._stack.conf.transact_counted(partial(ensure, cards=cards))
        await self._let_go(more, wanted)
        interfaces = self._stack.conf.mirrors["Interface"].rows
        errors = [error for card in more for error in interfaces.get(card, _OK)["error"]]
        if errors:
            await self._stack.conf.transact(partial(ensure, cards=self._cards))
            raise PreconditionError(f"vlan: Open vSwitch cannot use network card {' '.join(more)}: {'; '.join(errors)}")
        self._cards = self.kernel.cards = cards
        await trio.to_thread.run_sync(_mark_all, [physical.bridge_name(card) for card in more])
        await self.kernel.converge()

    async def _until_joined(self, network: NetworkState) -> None:
        """Returns once what a VLAN's guests send gets to its card. OVN joins the two when the first guest comes."""
        if network.spec.vlan is None:
            return
        name = physical.patch_name(northbound.vlan_port(network.spec.network_id))
        row = await self._stack.conf.mirrors["Interface"].wait(name, physical.is_joined)
        ports = tuple(row["ofport"]) if row is not None else ()
        if ports != network.joined:
            await self._stack.wait_in_force()
            network.joined = ports

    async def _open_dns(self, network: NetworkState, spec: NetworkSpec) -> None:
        if not spec.dns_servers:
            return
        assert self._nursery is not None
        outer = links.free_name("tldns", self._numbers)
        dns = DnsServer(
            spec,
            folder=self._stack.run_dir / "dns" / outer,
            outer=outer,
            program=self._stack.programs["dnsmasq"],
            log=self._stack.log_dir / f"dnsmasq-{spec.network_id}.log",
            env=self._stack.env,
            on_daemon=partial(self._on_dns, spec.network_id),
        )
        dns.set_names(e.spec for e in network.endpoints.values() if not e.spec.disabled)
        dns.set_names(self._balancer_names(spec.network_id))
        await dns.open()
        network.dns = dns
        plug = partial(vswitch.plug, interfaces={dns.outer: northbound.dns_port(spec.network_id)})
        await _together(partial(self._stack.conf.transact, plug), partial(self._nursery.start, dns.run))

    async def _close_dns(self, network: NetworkState) -> None:
        dns = network.dns
        if dns is not None:
            try:
                await self._unplug([dns.outer])
            finally:
                network.dns = None
                await dns.close()

    # Endpoints

    async def apply_endpoint(self, message: Endpoint, secret: bytes = b"") -> EndpointState:
        """Creates the endpoint or makes it be as described; returns once it is programmed and its name known.

        Raises:
            InvalidSpecError, PreconditionError, UnavailableError: nothing was changed, or the next attempt completes
                it.
        """
        spec = parse_endpoint(message)
        _check_secret(secret)
        self._check_ready()
        async with self._endpoint_locks.exclusive(spec.endpoint_id):
            async with self._gate.shared():
                await self._leave_other_network(spec)
                async with self._network_locks.shared(spec.network_id):
                    with trio.CancelScope(shield=True):
                        endpoint = self._claim(spec, message)
                        await self._realise([endpoint])
                    if secret and not spec.disabled and spec.child is None:
                        self._ports.authorize(spec.endpoint_id, secret)
            await self._settle(endpoint)
        self._spares.used()
        return endpoint

    async def _leave_other_network(self, spec: EndpointSpec) -> None:
        present = self.endpoints.get(spec.endpoint_id)
        if present is None or present.spec.network_id == spec.network_id:
            return
        network = self._network_of(spec)
        self._check_free(spec, network)
        async with self._network_locks.shared(present.spec.network_id):
            if self.endpoints.get(spec.endpoint_id) is present:
                with trio.CancelScope(shield=True):
                    await self._remove_endpoints([present])

    async def delete_endpoint(self, endpoint_id: str) -> None:
        """Removes the endpoint; nothing when it is not there."""
        check_id("endpoint_id", endpoint_id)
        async with self._endpoint_locks.exclusive(endpoint_id), self._gate.shared():
            endpoint = self.endpoints.get(endpoint_id)
            if endpoint is None:
                return
            self._check_ready()
            async with self._network_locks.shared(endpoint.spec.network_id):
                if self.endpoints.get(endpoint_id) is endpoint:
                    with trio.CancelScope(shield=True):
                        await self._remove_endpoints([endpoint])
        self._spares.used()

    def authorize(self, endpoint_id: str, secret: bytes) -> None:
        """Lets one data link with this secret be opened for the endpoint.

        Raises:
            InvalidSpecError: not a secret.
            NotFoundError: no such endpoint, or one that is disabled.
        """
        check_id("endpoint_id", endpoint_id)
        if not secret:
            raise InvalidSpecError("secret must be 16 to 64 bytes, not 0")
        _check_secret(secret)
        endpoint = self.endpoints.get(endpoint_id)
        if endpoint is None or endpoint.tap is None:
            raise NotFoundError(f"endpoint {endpoint_id} is not here; apply it first")
        self._ports.authorize(endpoint_id, secret)

    def is_up(self, endpoint: EndpointState) -> bool:
        """Whether the endpoint's port is programmed in the data path."""
        child = endpoint.spec.child
        if child is not None:
            parent = self.endpoints.get(child.parent_id)
            return endpoint.there and parent is not None and parent.spec.child is None and self.is_up(parent)
        if endpoint.tap is None:
            return False
        return self._stack.is_installed(endpoint.tap.name)

    def _network_of(self, spec: EndpointSpec) -> NetworkState:
        network = self.networks.get(spec.network_id)
        if network is None:
            raise PreconditionError(f"network {spec.network_id} is not here; apply it first")
        check_in_network(spec, network.spec)
        return network

    def _check_free(self, spec: EndpointSpec, network: NetworkState) -> None:
        for key in _keys(spec):
            holder = network.holders.get(key, spec.endpoint_id)
            if holder != spec.endpoint_id:
                raise InvalidSpecError(f"{key} is in use by endpoint {holder} of network {spec.network_id}")
        child, present = spec.child, self.endpoints.get(spec.endpoint_id)
        if present is not None and (present.spec.child is None) != (child is None):
            raise PreconditionError(f"endpoint {spec.endpoint_id} has a link of its own, or had none: delete it first")
        if child is not None:
            for other in self.endpoints.values():
                if other.spec.child == child and other is not present:
                    raise InvalidSpecError(
                        f"trunk_child: tag {child.tag} over {child.parent_id} is endpoint {other.spec.endpoint_id}'s"
                    )

    def _claim(self, spec: EndpointSpec, message: Endpoint) -> EndpointState:
        """Enters the endpoint into the books under its new description, which `_realise` then makes true."""
        network = self._network_of(spec)
        self._check_free(spec, network)
        endpoint = self.endpoints.get(spec.endpoint_id)
        if endpoint is None:
            endpoint = EndpointState(spec, message, network)
            self.endpoints[spec.endpoint_id] = endpoint
            network.endpoints[spec.endpoint_id] = endpoint
        if endpoint.there and _seen(endpoint.spec) != _seen(spec):
            endpoint.changes.made += 1
        for key in _keys(endpoint.spec):
            network.holders.pop(key, None)
        endpoint.spec, endpoint.message = spec, message
        for key in _keys(spec):
            network.holders[key] = spec.endpoint_id
        return endpoint

    async def _realise(self, endpoints: Sequence[EndpointState]) -> None:
        """Makes claimed endpoints be. On an error those that are new are gone again; others are completed by the next
        attempt."""
        new = [e for e in endpoints if not e.there]
        wanted = [e for e in endpoints if not e.spec.disabled]
        idle = [e for e in endpoints if e.spec.disabled and e.there]

        uplink = self.uplink

        def in_nb(txn: Txn) -> None:
            ports = [
                policy_rows.Port(e.spec, e.network.spec, *northbound.ensure_endpoint(txn, e.spec, e.network.spec))
                for e in wanted
            ]
            # In the same transaction: there is no moment in which they are reached by whom they must not be.
            policy_rows.ensure_members(txn, ports, uplink)
            northbound.ensure_qos(txn, [e.spec for e in wanted])
            if ensure_balancers is not None:
                ensure_balancers(txn)

        ensure_balancers = self._balancer_rows_with(wanted)

        async def plug() -> None:
            await self._give_taps([e for e in wanted if e.tap is None and e.spec.child is None])
            taps = {e.tap.name: northbound.endpoint_port(e.spec.endpoint_id) for e in wanted if e.tap is not None}
            await self._stack.conf.transact(partial(vswitch.plug, interfaces=taps))

        try:
            if idle:
                await self._unrealise(idle)
            if wanted:
                # dnsmasq takes its time to read them: before the others take theirs.
                for dns, group in _by_dns(wanted):
                    dns.set_names(e.spec for e in group)
                self.kernel.set_endpoints(e.spec for e in wanted)
                await _together(partial(self._stack.nb.transact, in_nb), plug, self.kernel.open_ports)
                await self._keep_mirrors()  # before anything passes
            for endpoint in wanted:
                if endpoint.spec.child is not None and not endpoint.there:
                    endpoint.changes.made += 1  # nothing else tells when it is programmed
                endpoint.there = True
                if not endpoint.linked and endpoint.tap is not None:
                    self._ports.add(endpoint.spec.endpoint_id, endpoint.tap)
                    endpoint.linked = True
        except BaseException:
            try:
                await self._remove_endpoints(new)
            except HelperError:
                # Not even that can be done now. Forgotten, they are strangers: they go when the databases answer.
                self._forget(new)
                await _close_all([e.tap for e in new if e.tap is not None])
                self._reread.set()
            raise

    async def _give_taps(self, endpoints: Sequence[EndpointState]) -> None:
        for endpoint in endpoints:
            endpoint.tap = self._spares.take(endpoint.network.spec.mtu)
            endpoint.fresh = endpoint.tap is None
        rest = [endpoint for endpoint in endpoints if endpoint.tap is None]
        if rest:
            await trio.to_thread.run_sync(self._open_taps, rest)

    def _open_taps(self, endpoints: Sequence[EndpointState]) -> None:
        for endpoint in endpoints:
            endpoint.tap = self._open_tap(endpoint.network.spec.mtu)

    async def _keep_spares(self) -> None:
        while True:
            wanted = await self._spares.wanted()
            try:
                async with self._gate.shared():
                    names = await self._add_spares(wanted)
                # Whoever gets one does not wait for that either.
                for name in names:
                    await self._stack.conf.mirrors["Interface"].wait(name, vswitch.is_port)
                await self._stack.enlarge_packet_sockets()
            except (HelperError, OSError) as exc:  # whoever needs a TAP will say what is wrong
                logger.debug("no spare TAPs: %s", exc)
                await self._spares.until_used()

    async def _add_spares(self, count: int) -> list[str]:
        taps = await trio.to_thread.run_sync(self._spares.open, count)
        names = [tap.name for tap in taps]
        with trio.CancelScope(shield=True):
            try:
                await self._stack.conf.transact(partial(vswitch.plug_spares, names=names))
            except BaseException:
                # Should they be plugged all the same, they are strangers, which go when the database answers.
                await _close_all(taps)
                raise
            self._spares.add(taps)
        return names

    def _open_tap(self, mtu: int) -> Tap:
        # A name is never used again: a port whose TAP went and came back under the same name stays dead in vswitchd.
        name = links.free_name("tl", self._numbers)
        tap = Tap.open(name)
        try:
            links.harden(name)
            links.set_mtu(name, min(mtu, _MAX_TAP_MTU))
            self._ports.prepare(tap)
            links.set_up(name)
        except BaseException:
            tap.close()
            raise
        return tap

    async def _remove_endpoints(self, endpoints: Sequence[EndpointState]) -> None:
        await self._unrealise(endpoints)
        self._forget(endpoints)

    def _forget(self, endpoints: Iterable[EndpointState]) -> None:
        for endpoint in endpoints:
            endpoint.gone.set()
            endpoint_id, network = endpoint.spec.endpoint_id, endpoint.network
            self.endpoints.pop(endpoint_id, None)
            network.endpoints.pop(endpoint_id, None)
            for key in _keys(endpoint.spec):
                if network.holders.get(key) == endpoint_id:
                    del network.holders[key]

    async def _unrealise(self, endpoints: Sequence[EndpointState]) -> None:
        if not endpoints:
            return
        ports = [(e.spec.network_id, e.spec.endpoint_id) for e in endpoints]
        taps = [e.tap for e in endpoints if e.tap is not None]
        for dns, group in _by_dns(endpoints):
            dns.remove_names(e.spec.endpoint_id for e in group)
        for endpoint in endpoints:
            await self._ports.remove(endpoint.spec.endpoint_id)
            endpoint.linked = False
        names, wanted = [tap.name for tap in taps], 0

        async def unplug() -> None:
            nonlocal wanted
            wanted = await self._take_out(names)

        self.kernel.remove_endpoints(e.spec.endpoint_id for e in endpoints)

        def in_nb(txn: Txn) -> None:
            northbound.remove_endpoints(txn, ports)
            if ensure_balancers is not None:
                ensure_balancers(txn)

        ensure_balancers = self._balancer_rows_with(endpoints, gone=True)
        await _together(partial(self._stack.nb.transact, in_nb), unplug, self.kernel.open_ports)
        for endpoint in endpoints:
            endpoint.tap, endpoint.there = None, False
        await self._keep_mirrors()

        async def clear_away() -> None:
            try:
                await self._let_go(names, wanted)
            finally:
                with trio.CancelScope(shield=True):
                    await _close_all(taps)

        # Nothing uses the TAPs any more. That vswitchd lets go of them, and then the kernel, takes its time, which is
        # nobody's who waits for the endpoint to be gone.
        if self._nursery is None:
            await clear_away()
        elif taps:
            self._nursery.start_soon(clear_away)

    async def _unplug(self, names: Sequence[str]) -> None:
        """Unplugs interfaces and waits until vswitchd has let go of them, so that they can be deleted."""
        if names:
            await self._let_go(names, await self._take_out(names))

    async def _take_out(self, names: Sequence[str]) -> int:
        """Takes interfaces out of vswitchd's database; returns the configuration's number that `_let_go` waits for."""
        if not names:
            return 0
        self._to_unplug.update(names)  # until it has succeeded: the next attempt takes along what this one left
        unplugged = sorted(self._to_unplug)
        _, wanted = await self._stack.conf.transact_counted(partial(vswitch.unplug, names=unplugged))
        self._to_unplug.difference_update(unplugged)
        return wanted

    async def _let_go(self, names: Sequence[str], wanted: int) -> None:
        mirror = self._stack.conf.mirrors["Open_vSwitch"]
        with trio.move_on_after(_UNPLUG_TIMEOUT) as scope:
            while not any(row["cur_cfg"] >= wanted for row in mirror.rows.values()):
                key = next(iter(mirror.rows), "")
                await mirror.wait(key, lambda row: row is None or row["cur_cfg"] >= wanted)
        if scope.cancelled_caught:  # it is restarting, or worse; it will find the port neither here nor in its database
            logger.warning("ovs-vswitchd has not confirmed within %.0f s that it let go of %s", _UNPLUG_TIMEOUT, names)

    async def _settle(self, endpoint: EndpointState) -> None:
        tap, dns = endpoint.tap, endpoint.network.dns
        if not endpoint.there:
            return
        within = _time_left()

        async def programmed() -> None:
            with trio.move_on_after(within) as scope:
                async with trio.open_nursery() as nursery:

                    async def until_gone() -> None:
                        await endpoint.gone.wait()
                        nursery.cancel_scope.cancel()

                    nursery.start_soon(until_gone)
                    if tap is not None:
                        await self._stack.until_installed(tap.name)
                    await self._until_joined(endpoint.network)
                    nursery.cancel_scope.cancel()
            if endpoint.gone.is_set():
                raise PreconditionError(f"endpoint {endpoint.spec.endpoint_id} was removed meanwhile")
            if scope.cancelled_caught:
                row = self._stack.conf.mirrors["Interface"].rows.get(tap.name if tap is not None else "", {})
                error = "".join(row.get("error", ())) or "no error is known"
                raise UnavailableError(
                    f"the port of endpoint {endpoint.spec.endpoint_id} was not programmed within {within:.1f} s "
                    f"({error}); look at GetHealth and apply it again"
                )
            await self._come_into_force(endpoint.changes)
            if endpoint.fresh and self._nursery is not None:  # for bursts: nobody has to wait for it
                self._nursery.start_soon(self._stack.enlarge_packet_sockets)

        async def known() -> None:
            if dns is not None and not await dns.knows(endpoint.spec, within=_NAMES_TIMEOUT):
                logger.error("dnsmasq of network %s does not know %s", endpoint.spec.network_id, endpoint.spec.names)

        await _together(programmed, known)

    # Policies

    async def apply_policy(self, message: Policy, members: Mapping[str, EndpointPolicy]) -> None:
        """Makes the rules, and what they mean to these endpoints, be as described; returns once they are enforced.

        Raises:
            InvalidSpecError: nothing was changed.
            UnavailableError: the next attempt completes it.
        """
        policy = parse_policy(message)
        for member in members.values():
            parse_member(member)
        self._check_ready()
        async with self._gate.exclusive():
            with trio.CancelScope(shield=True):
                self.policy = policy
                self._policy_changes.made += 1
                self._enter_members(members)
                await self._stack.nb.transact(self._policy_rows())
        await self._come_into_force(self._policy_changes)

    async def policy_counters(self, rule_ids: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Packets and bytes that rules have matched since they were programmed; none named: of all.

        Raises:
            UnavailableError: OVS or OVN does not answer.
        """
        self._check_ready()
        acls = await self._stack.nb.transact(policy_rows.rules_of)
        known = {rule.rule_id for rule in self.policy.rules}
        wanted = known & set(rule_ids) if rule_ids else known
        acls = {rule_id: uuid for rule_id, uuid in acls.items() if rule_id in wanted}
        return await read_counters(self._stack.socket, self._stack.mgmt, acls) if acls else {}

    async def qos_counters(self, endpoint_ids: Sequence[str]) -> dict[tuple[str, bool], qos_counters.Limited]:
        """What limits have done since they were programmed, by endpoint and whether it is of what comes in; no endpoint
        named: of all.

        Raises:
            UnavailableError: OVS or OVN does not answer.
        """
        self._check_ready()
        limits = await self._stack.nb.transact(qos_rows.limits_of)
        limits = {key: uuid for key, uuid in limits.items() if not endpoint_ids or key[0] in endpoint_ids}
        if not limits:
            return {}
        stack = self._stack
        return await qos_counters.read_counters(stack.socket, stack.mgmt, stack.list_meters, limits, self._limit_flows)

    def _enter_members(self, members: Mapping[str, EndpointPolicy | None]) -> None:
        for endpoint_id, member in members.items():
            endpoint = self.endpoints.get(endpoint_id)
            if endpoint is not None:
                with contextlib.suppress(InvalidSpecError):  # of a Sync: whoever applies that endpoint is told
                    endpoint.spec = replace(endpoint.spec, policy=parse_member(member))
                    endpoint.message = replace(endpoint.message, policy=member)

    def _policy_in_books(self) -> tuple[PolicySpec, dict[str, MemberSpec]]:
        return self.policy, {key: endpoint.spec.policy for key, endpoint in self.endpoints.items()}

    def _policy_rows(self) -> Callable[[Txn], None]:
        """Makes all groups, rules and memberships be as they are in the books now, for a transaction."""
        policy, uplink = self.policy, self.uplink
        specs = [(e.spec, e.network.spec) for e in self.endpoints.values() if not e.spec.disabled]

        def op(txn: Txn) -> None:
            ports: list[policy_rows.Port] = []
            for spec, network in specs:
                row = txn.find("Logical_Switch_Port", northbound.endpoint_port(spec.endpoint_id))
                if row is not None:
                    ports.append(policy_rows.Port(spec, network, row))
            policy_rows.ensure_policy(txn, policy, ports, uplink)

        return op

    # Load balancers

    async def apply_balancers(self, message: Balancers) -> None:
        """Makes the load balancers be as described; returns once they are in force.

        Raises:
            InvalidSpecError: nothing was changed.
            UnavailableError: the next attempt completes it.
        """
        balancers = parse_balancers(message)
        self._check_ready()
        async with self._gate.exclusive():
            with trio.CancelScope(shield=True):
                self._enter_balancers(balancers)
                await self._stack.nb.transact(self._balancer_rows())
        await self._come_into_force(self._balancer_changes)

    def is_balanced(self, network_id: str, address: Address) -> bool:
        """Whether a load balancer has the address on the network; the network's router answers for it."""
        return any(
            frontend.network_id == network_id and address in frontend.addresses
            for balancer in self.balancers
            for frontend in balancer.frontends
        )

    def backends(self, balancer_ids: Sequence[str]) -> list[BackendStatus]:
        """The backends that there are, of these load balancers or of all."""
        wanted = [one for one in self.balancers if not balancer_ids or one.balancer_id in balancer_ids]
        return backend_statuses(wanted, self._around(), self._stack.monitors())

    def _enter_balancers(self, balancers: tuple[BalancerSpec, ...]) -> None:
        """Enters load balancers into the books, and their names into the networks' DNS servers."""
        before = {network_id: self._balancer_names(network_id) for network_id in self.networks}
        if balancers != self.balancers:
            self._balancer_changes.made += 1
        self.balancers = balancers
        self._backends = frozenset(endpoint_id for one in balancers for endpoint_id, _ in one.backends)
        for network_id, network in self.networks.items():
            names = self._balancer_names(network_id)
            if network.dns is not None and names != before[network_id]:
                kept = {one.endpoint_id for one in names}
                network.dns.remove_names(one.endpoint_id for one in before[network_id] if one.endpoint_id not in kept)
                network.dns.set_names(names)

    def _balancer_names(self, network_id: str) -> list[NameSpec]:
        return [
            # No endpoint's id has a colon.
            NameSpec(f"balancer:{balancer.balancer_id}", frontend.addresses, frontend.names)
            for balancer in self.balancers
            for frontend in balancer.frontends
            if frontend.network_id == network_id
        ]

    async def _rebalance(self, network_id: str) -> None:
        """Completes the load balancers of a network that has come, gone or changed."""
        places = {frontend.network_id for one in self.balancers for frontend in one.frontends}
        if network_id in places | {one.network_id for one in self.balancers}:
            await self._stack.nb.transact(self._balancer_rows())

    def _balancer_rows_with(
        self, endpoints: Sequence[EndpointState], *, gone: bool = False
    ) -> Callable[[Txn], None] | None:
        """As `_balancer_rows` when these endpoints come or go; None: no load balancer speaks of them."""
        concerned = {e.spec.endpoint_id for e in endpoints} & self._backends
        return self._balancer_rows(concerned if gone else ()) if concerned else None

    def _balancer_rows(self, without: Collection[str] = ()) -> Callable[[Txn], None]:
        """Makes all load balancers be as they are in the books now but for these endpoints, for a transaction."""
        return partial(balancer_rows.ensure_balancers, balancers=self.balancers, around=self._around(without))

    def _around(self, without: Collection[str] = ()) -> Around:
        return Around(
            {network_id: network.spec for network_id, network in self.networks.items()},
            {key: self.endpoints[key].spec for key in self._backends & self.endpoints.keys() if key not in without},
            self.uplink,
        )

    # Mirrors

    async def apply_mirrors(self, message: Mirrors) -> None:
        """Makes the mirrors be as described; returns once they are in force.

        Raises:
            InvalidSpecError: nothing was changed.
            HelperError: the kernel refused; the next attempt completes it.
        """
        specs = parse_mirrors(message)
        with trio.CancelScope(shield=True):
            self.mirrors = specs
            await self._load_mirrors()

    async def _load_mirrors(self) -> None:
        """Has the kernel make the mirrors in the books between the endpoints that have TAPs now."""
        async with self._mirror_lock:
            taps = {key: endpoint.tap.name for key, endpoint in self.endpoints.items() if endpoint.tap is not None}
            rules = mirrors.ruleset(self.mirrors, taps)
            if rules != self._mirror_rules:
                await trio.to_thread.run_sync(mirrors.load, self._stack.programs["nft"], rules)
                self._mirror_rules = rules

    async def _keep_mirrors(self) -> None:
        """As `_load_mirrors`, where TAPs come or go: these must not fail because of a mirror."""
        if not self.mirrors and self._mirror_rules == mirrors.NONE:
            return
        try:
            await self._load_mirrors()
        except (HelperError, OSError) as exc:
            logger.warning("mirrors are not as they should be: %s", exc)

    async def _come_into_force(self, *changes: Changes) -> None:
        """Returns once no packet is treated any more as it was before the changes. Nothing that is new waits here: its
        flows come as a whole."""
        pending = [(one, one.made) for one in changes if one.in_force < one.made]
        if not pending:
            return
        within = _time_left()
        with trio.move_on_after(within) as scope:
            await self._stack.wait_in_force()
        if scope.cancelled_caught:
            raise UnavailableError(
                f"the change was not in force within {within:.1f} s; look at GetHealth and apply it again"
            )
        for one, made in pending:
            one.in_force = max(one.in_force, made)

    # The whole

    async def sync(self, request: SyncRequest) -> SyncOutcome:
        """Makes everything be as described and removes the rest.

        Raises:
            UnavailableError: OVS or OVN does not answer; what was done is completed by the next attempt.
        """
        uplink = parse_uplink(request.uplink or Uplink())
        self._check_ready()
        failures: list[tuple[str, HelperError]] = []

        def failed(key: str, exc: HelperError | OSError) -> None:
            failures.append((key, exc if isinstance(exc, HelperError) else HelperError(str(exc))))

        def parsed_or(present: S, key: str, parse: Callable[[], S]) -> S:
            # Of two that are not as described, the one that is there is the safer: it may have rules.
            try:
                return parse()
            except InvalidSpecError as exc:
                failed(key, exc)
                return present

        policy = parsed_or(self.policy, _POLICY, partial(parse_policy, request.policy))
        balancers = parsed_or(self.balancers, _BALANCERS, partial(parse_balancers, request.balancers))
        copied = parsed_or(self.mirrors, _MIRRORS, partial(parse_mirrors, request.mirrors))

        async def apply_network(spec: NetworkSpec, network: Network) -> None:
            try:
                await self._apply_network(spec, network)
            except (HelperError, OSError) as exc:
                failed(network.network_id, exc)

        async with self._gate.exclusive():
            with trio.CancelScope(shield=True):
                # Before endpoints come: nothing of theirs passes uncopied.
                self.mirrors = copied
                removed = await self._remove_others(request)
                await self._apply_uplink(uplink)
                async with trio.open_nursery() as nursery:
                    for spec, network in _parsed(request.networks, parse_network, _network_id, failures):
                        nursery.start_soon(apply_network, spec, network)
                # The rules together with what they mean to endpoints that are there; new ones come afterwards.
                before = self._policy_in_books()
                self.policy = policy
                self._enter_members({e.endpoint_id: e.policy for e in request.endpoints})
                if self._policy_in_books() != before:
                    self._policy_changes.made += 1
                await self._stack.nb.transact(self._policy_rows())
                self._enter_balancers(balancers)
                await self._stack.nb.transact(self._balancer_rows())
                endpoints = await self._apply_all(request.endpoints, failures)
                try:
                    await self._load_mirrors()
                except (HelperError, OSError) as exc:
                    failed(_MIRRORS, exc)

        async def settle(endpoint: EndpointState) -> None:
            try:
                await self._settle(endpoint)
            except HelperError as exc:
                failed(endpoint.spec.endpoint_id, exc)

        async with trio.open_nursery() as nursery:
            for endpoint in endpoints:
                nursery.start_soon(settle, endpoint)
        whole = (self._uplink_changes, self._policy_changes, self._balancer_changes)
        await self._come_into_force(*whole, *(network.changes for network in self.networks.values()))
        self._spares.used()
        return SyncOutcome(endpoints, removed, failures)

    async def _remove_others(self, request: SyncRequest) -> list[str]:
        networks = {network.network_id for network in request.networks}
        wanted = {endpoint.endpoint_id: endpoint.network_id for endpoint in request.endpoints}
        going = [e for key, e in self.endpoints.items() if key not in wanted]
        moving = [e for key, e in self.endpoints.items() if key in wanted and wanted[key] != e.spec.network_id]
        await self._remove_endpoints(going + moving)
        others = [network for key, network in self.networks.items() if key not in networks]
        await _together(*(partial(self._remove_network, network) for network in others))
        return [e.spec.endpoint_id for e in going] + [n.spec.network_id for n in others]

    async def _apply_all(
        self, messages: Iterable[Endpoint], failures: list[tuple[str, HelperError]]
    ) -> list[EndpointState]:
        claimed: list[EndpointState] = []
        parsed = list(_parsed(messages, parse_endpoint, _endpoint_id, failures))
        # Addresses may have changed hands: what is no longer wanted is let go before anything is claimed.
        for spec, _ in parsed:
            present = self.endpoints.get(spec.endpoint_id)
            if present is not None and _keys(present.spec) != _keys(spec):
                for key in _keys(present.spec):
                    present.network.holders.pop(key, None)
        for spec, message in parsed:
            try:
                claimed.append(self._claim(spec, message))
            except HelperError as exc:
                failures.append((spec.endpoint_id, exc))
        try:
            await self._realise(claimed)
        except UnavailableError:
            raise
        except Exception:
            logger.exception("endpoints cannot be applied together; trying one by one")
        else:
            return claimed
        done: list[EndpointState] = []
        for endpoint in claimed:
            try:
                again = self._claim(endpoint.spec, endpoint.message)
                await self._realise([again])
                done.append(again)
            except Exception as exc:
                error = exc if isinstance(exc, HelperError) else HelperError(str(exc))
                failures.append((endpoint.spec.endpoint_id, error))
        return done

    def database_read(self, name: str) -> None:
        """To be called when a database's content was read anew; what was lost is put back."""
        if self._stack.ready.is_set() and name in ("conf", "nb"):
            self._reread.set()

    async def _keep_restored(self) -> None:
        while True:
            await self._reread.wait()
            self._reread = trio.Event()
            try:
                async with self._gate.exclusive():
                    await self._restore()
            except UnavailableError as exc:  # the database calls again when it answers
                logger.warning("what was applied cannot be restored yet: %s", exc)
            except Exception as exc:
                logger.exception("what was applied cannot be restored")
                self._on_lost(f"the databases were read anew and cannot be completed: {exc}")

    async def _restore(self) -> None:
        networks = list(self.networks.values())
        endpoints = [e for e in self.endpoints.values() if e.there]
        uplink, policy, cards = self.uplink, self.policy, self._cards

        def in_nb(txn: Txn) -> None:
            there = [(e.spec.network_id, e.spec.endpoint_id) for e in endpoints]
            northbound.remove_strangers(txn, [n.spec.network_id for n in networks], there)
            northbound.ensure_uplink(txn, uplink)
            for network in networks:
                northbound.ensure_network(txn, network.spec, uplink)
            ports = [
                policy_rows.Port(e.spec, e.network.spec, northbound.ensure_endpoint(txn, e.spec, e.network.spec)[0])
                for e in endpoints
            ]
            policy_rows.ensure_policy(txn, policy, ports, uplink)
            northbound.ensure_qos(txn, [e.spec for e in endpoints])
            ensure_balancers(txn)

        ensure_balancers = self._balancer_rows()
        interfaces = {n.dns.outer: northbound.dns_port(n.spec.network_id) for n in networks if n.dns is not None}
        interfaces |= {e.tap.name: northbound.endpoint_port(e.spec.endpoint_id) for e in endpoints if e.tap is not None}
        if self.kernel.outer:
            interfaces[self.kernel.outer] = northbound.KERNEL_PORT

        spares = self._spares.names

        def plug(txn: Txn) -> None:
            left = vswitch.strangers(txn, [*interfaces, *spares])
            if left:
                vswitch.unplug(txn, left)
            vswitch.plug(txn, interfaces)
            vswitch.plug_spares(txn, spares)

        async def in_conf() -> None:
            await self._stack.ensure_conf()
            if cards:
                await self._stack.conf.transact(
                    partial(physical.ensure_cards, cards=cards, kernel_datapath=self._stack.kernel_datapath)
                )
            await self._stack.conf.transact(plug)

        await _together(partial(self._stack.nb.transact, in_nb), in_conf)

    def _check_ready(self) -> None:
        if not self._stack.ready.is_set():
            raise UnavailableError(f"waiting for {self._stack.waiting_for}; try again")


def _time_left() -> float:
    """The seconds that a caller may be kept waiting: somewhat less than it allows, so that it is told why.

    No fixed time is right for every machine: a caller that sees that it takes longer allows more.
    """
    left = trio.current_effective_deadline() - trio.current_time()
    # It may have run out already: whoever waits longer for the databases than that finds out here.
    return _UP_TIMEOUT if left == math.inf else max(0.0, 0.9 * left)


def _keys(spec: EndpointSpec) -> list[str]:
    return [spec.mac_address, *map(str, spec.addresses)]


def _seen(spec: EndpointSpec) -> tuple[object, ...]:
    """What of an endpoint packets meet in OVN."""
    return spec.port_addresses, spec.policy, spec.dhcp, spec.qos, spec.child


def _dns_part(spec: NetworkSpec) -> tuple[object, ...]:
    return spec.dns_servers, spec.dns_mac, spec.subnets, spec.name, spec.mtu


def _network_id(message: Network) -> str:
    return message.network_id


def _endpoint_id(message: Endpoint) -> str:
    return message.endpoint_id


def _parsed(
    messages: Iterable[M],
    parse: Callable[[M], S],
    identity: Callable[[M], str],
    failures: list[tuple[str, HelperError]],
) -> Iterator[tuple[S, M]]:
    """The messages that are right, with what they say; the others become failures."""
    seen: set[str] = set()
    for message in messages:
        key = identity(message)
        try:
            if key in seen:
                raise InvalidSpecError(f"{key} is described twice")
            seen.add(key)
            yield parse(message), message
        except HelperError as exc:
            failures.append((key, exc))


def _check_secret(secret: bytes) -> None:
    if secret and not 16 <= len(secret) <= 64:
        raise InvalidSpecError(f"the secret must be 16 to 64 bytes, not {len(secret)}")


def _set_mtus(taps: Iterable[Tap | None], mtu: int) -> None:
    for tap in taps:
        if tap is not None:
            links.set_mtu(tap.name, min(mtu, _MAX_TAP_MTU))


def _harden_cards(cards: Iterable[str]) -> None:
    for card in cards:
        links.harden(card)
        links.set_up(card)


def _mark_all(interfaces: Iterable[str]) -> None:
    for name in interfaces:
        links.mark(name)


def _by_dns(endpoints: Iterable[EndpointState]) -> list[tuple[DnsServer, list[EndpointState]]]:
    """The endpoints of each network that has a DNS server."""
    groups: dict[DnsServer, list[EndpointState]] = {}
    for endpoint in endpoints:
        if endpoint.network.dns is not None:
            groups.setdefault(endpoint.network.dns, []).append(endpoint)
    return list(groups.items())


async def _close_all(taps: Iterable[Tap]) -> None:
    # The kernel takes tens of milliseconds for each, nearly all of them waiting: for many at once as long as for one.
    limiter = trio.CapacityLimiter(16)
    async with trio.open_nursery() as nursery:
        for tap in taps:
            nursery.start_soon(partial(trio.to_thread.run_sync, tap.close, limiter=limiter))


async def _together(*functions: Callable[[], Awaitable[object]]) -> None:
    """Runs them beside one another to their ends, then raises the first error."""
    errors: list[Exception] = []

    async def run(function: Callable[[], Awaitable[object]]) -> None:
        try:
            await function()
        except Exception as exc:
            errors.append(exc)

    async with trio.open_nursery() as nursery:
        for function in functions:
            nursery.start_soon(run, function)
    if errors:
        raise errors[0]
