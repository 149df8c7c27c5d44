"""The running fabric: desired state, peers and links together, and the changes that callers wait for.

A create or connect is a transaction over the database, the helper and a guest: it is committed as pending, told to both
agents at once, and only when frames can pass is it made active. If that does not happen in time, the rows go and the
agents converge back; a bridge that is killed in between removes pending rows when it starts. A delete or disconnect is
recorded first and always succeeds: an agent that is away learns of it from its next Sync.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import trio

from host_bridge.balancer.model import Balancer
from host_bridge.card import CardGuest
from host_bridge.describe import bridge_endpoint, bridge_guest, bridge_network
from host_bridge.desired import DesiredState
from host_bridge.errors import (
    AbortedError,
    ActiveEndpointsError,
    NetworkNotFoundError,
    PreconditionError,
    UnavailableError,
)
from host_bridge.events import EventBus, EventKind
from host_bridge.guest_peer import RESOLVER_KEY, GuestPeer
from host_bridge.helper_peer import BALANCERS_KEY, MIRRORS_KEY, POLICY_KEY, UPLINK_KEY, HelperPeer, network_key
from host_bridge.host_addresses import HostAddresses
from host_bridge.links import AnyGuest, CardLink, DataLink
from host_bridge.mirror.tables import MirrorRecord
from host_bridge.model import (
    EndpointOptions,
    EndpointRecord,
    GuestRecord,
    GuestSettings,
    NetworkOptions,
    NetworkRecord,
)
from host_bridge.peer import CALL_TIMEOUT, PERMANENT, Peer
from host_bridge.policy.log import PolicyLog
from host_bridge.policy.model import Group, NetworkDefault
from host_bridge.qos.messages import rules_message
from host_bridge.qos.model import Said
from host_bridge.qos.state import Entry
from host_bridge.sources import Changes
from taploom.address import Address
from taploom.contracts.taploom.bridge import v1 as bridge
from taploom.contracts.taploom.helper.v1 import HelperFeature, StreamWanted
from taploom.link import Dataplane, new_secret
from taploom.rpc import StatusCode

logger = logging.getLogger("taploom.bridge")

_MAX_RENAMES = 32
_AFTER_CRASH = 1.0


@dataclass(frozen=True, slots=True)
class Timing:
    """How long callers wait, in seconds.

    Attributes:
        deadline: until a create or connect is given up although the agents answer: they may be slow, and what they have
            done is undone then.
        grace: how long a peer that cannot even be dialled may take to come back before that.
        settle: how long a delete waits for peers that answer.
        call: how long one call to an agent may take.
    """

    deadline: float = 60.0
    grace: float = 3.0
    settle: float = 2.0
    call: float = CALL_TIMEOUT


class Fabric:
    """Everything that runs between the database and the agents. Start `run` before anything else.

    Args:
        desired: the desired state.
        dataplane: where the relays run.
        helper: the helper's control address.
        helper_data: the helper's data address.
        upstreams: DNS servers of the guests for names that no network knows.
        timing: how long callers wait.
        host_addresses: gives this machine's addresses, which guests reach it under; nobody: they reach it only under
            their gateways' addresses.

    Attributes:
        events: what happens, whoever asked for it.
        upstreams: DNS servers of guests that have none of their own.
        policy_log: what rules have matched that are to be told of.
        on_stream_wanted: joins the streams that containers open to the host; None: they are refused.
    """

    def __init__(
        self,
        desired: DesiredState,
        dataplane: Dataplane,
        helper: Address,
        helper_data: Address,
        *,
        upstreams: Sequence[str] = (),
        timing: Timing | None = None,
        host_addresses: HostAddresses | None = None,
    ) -> None:
        self.desired = desired
        self.timing = timing or Timing()
        self.events = EventBus()
        self.on_stream_wanted: Callable[[StreamWanted], None] | None = None
        self.policy_log = PolicyLog(desired.store, desired.policies)
        self.helper = HelperPeer(
            helper,
            helper_data,
            desired.store,
            host_addresses=host_addresses.current if host_addresses is not None else tuple,
            on_up=lambda: self.events.emit("helper-up"),
            on_stream_wanted=self._stream_wanted,
            policies=desired.policies,
            qos=desired.qos,
            on_policy_logged=self.policy_log.add,
            upstreams=upstreams,
            balancers=desired.balancers,
            mirrors=desired.mirrors,
            **self._callbacks(lambda: self.helper),
        )
        self.guests: dict[str, AnyGuest] = {}
        self.links: dict[str, DataLink] = {}
        self._host_addresses = host_addresses
        self._dataplane = dataplane
        self.upstreams = list(upstreams)
        self._scopes: dict[str, trio.CancelScope] = {}
        self._leaving: dict[str, trio.Event] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Removes what a killed bridge left pending, then keeps every peer and link until cancelled."""
        removed = self.desired.remove_pending()
        if removed:
            logger.info("removed %d unfinished networks and endpoints of an earlier run", removed)
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            if self._host_addresses is not None:
                await nursery.start(self._host_addresses.run, lambda: self.helper.touch(UPLINK_KEY))
            nursery.start_soon(_guarded, self.helper)
            for guest in self.desired.guests():
                self._add_guest(guest)
            for endpoint in self.desired.store.endpoints():
                if endpoint.carried is None:
                    self._add_link(endpoint)
            task_status.started()
            await trio.sleep_forever()

    # Networks

    async def create_network(self, name: str, options: NetworkOptions | None = None) -> NetworkRecord:
        """Creates a network and returns once the helper has it; arguments as `DesiredState.create_network`."""
        record = self.desired.create_network(name, options)
        key = network_key(record.id)
        try:
            if record.switched:
                self._check_helper_takes(key)
                self.helper.touch(key)
                await self._converge(
                    lambda condition: self.helper.changes.until(key, condition),
                    done=lambda: self.helper.has(key),
                    refused=lambda: _refusal(self.helper, key),
                    peers=(self.helper,),
                    explain=lambda: self.helper.waits_for(key),
                )
            if not self.desired.activate_network(record.id):
                raise AbortedError(f"network {name} was removed while it was being created")
        except BaseException:
            self.desired.cancel_network(record.id)
            self.helper.touch(key)
            raise
        logger.info("created network %s (%s)", name, ", ".join(subnet.subnet for subnet in record.subnets))
        created = self.desired.store.network(record.id)
        assert created is not None
        self.events.emit("network-create", network=created)
        return created

    async def delete_network(self, text: str) -> NetworkRecord:
        """Removes a network."""
        record = self.desired.delete_network(text)
        key = network_key(record.id)
        self.helper.touch(key)
        logger.info("removed network %s", record.name)
        self.events.emit("network-destroy", network=record)
        with trio.move_on_after(self.timing.settle):
            await self.helper.wait_gone(key)
        return record

    async def prune_networks(self, predicate: Callable[[NetworkRecord], bool]) -> list[NetworkRecord]:
        """Removes every network that nobody is on and that `predicate` is true for; returns what was removed.

        As with Docker, predefined networks and configurations stay, and a container that does not run holds none.
        """
        removed = []
        for network in self.desired.networks():
            if network.predefined or network.config_only or not predicate(network):
                continue
            # Somebody may have connected to it, or removed it, since the list was made.
            with contextlib.suppress(ActiveEndpointsError, NetworkNotFoundError):
                removed.append(await self.delete_network(network.id))
        return removed

    # Policies

    async def apply_policy(
        self, source: str, groups: Sequence[Group], defaults: Sequence[NetworkDefault], *, prune: bool = False
    ) -> tuple[Changes, str]:
        """Changes policies, arguments as `PolicyState.apply`; returns once the helper enforces them.

        Returns:
            What was done, and why it is not enforced yet, for people: the helper converges to it all the same.

        Raises:
            InvalidError, PreconditionError: nothing was changed.
        """
        self._check_helper_can(HelperFeature.POLICY)
        changes = self.desired.policies.apply(source, groups, defaults, prune=prune)
        logger.info(
            "policy: %d groups created, %d updated, %d removed, %d networks' defaults given",
            len(changes.created),
            len(changes.updated),
            len(changes.removed),
            len(defaults),
        )
        return changes, await self._until_enforced()

    async def remove_policy_groups(self, names: Sequence[str]) -> str:
        """Removes groups, as `PolicyState.remove`; returns why that is not so yet at the helper, for people."""
        self.desired.policies.remove(names)
        logger.info("policy: %d groups removed", len(names))
        return await self._until_enforced()

    async def _until_enforced(self) -> str:
        self.helper.touch(POLICY_KEY)
        return await self._until_helper_has(POLICY_KEY)

    async def _until_helper_has(self, key: str) -> str:
        """Waits until the helper has an object as it is wanted; returns why it does not, for people."""
        try:
            await self._converge(
                lambda condition: self.helper.changes.until(key, condition),
                done=lambda: self.helper.has(key),
                refused=lambda: _refusal(self.helper, key),
                peers=(self.helper,),
                explain=lambda: self.helper.waits_for(key),
            )
        except UnavailableError as error:
            return str(error)
        return ""

    def _check_helper_can(self, feature: HelperFeature) -> None:
        lack = self.helper.lack_of(feature)
        if lack:
            raise PreconditionError(lack)

    def _check_helper_takes(self, key: str) -> None:
        """Spares who asks the wait for a network or an endpoint that the helper is too old for."""
        lack = self.helper.lacking(key)
        if lack:
            raise PreconditionError(lack)

    def _pending(self, key: str, feature: HelperFeature) -> str:
        """Why the helper does not have an object as it is wanted, for people; empty when it has."""
        return self.helper.lack_of(feature) or ("" if self.helper.has(key) else self.helper.waits_for(key))

    def policy_pending(self) -> str:
        """Why the policies are not enforced yet, for people; empty when they are."""
        return self._pending(POLICY_KEY, HelperFeature.POLICY)

    # Limits

    async def set_qos(self, network: str, guest: str, said: Mapping[str, Said]) -> tuple[Entry, str]:
        """Changes how much a guest on a network, or by default each on it, may send and receive; returns once it is in
        force.

        Args:
            network: id, name or prefix; may be empty for a guest that is on one network only.
            guest: id, name or prefix; empty: the network's default.
            said: of each direction; what is not given stays as it is.

        Returns:
            What is said now, and why it is not in force yet, for people: the helper converges to it all the same.

        Raises:
            InvalidError, NotFoundError, PreconditionError: nothing was changed.
        """
        self._check_helper_can(HelperFeature.QOS)
        record, guest_id, label = self.desired.find_place(network, guest)
        entry = self.desired.qos.set(record.id, guest_id, said)
        logger.info("limits of %s: changed", label)
        return entry, await self._until_limited(record, guest_id)

    async def remove_qos(self, network: str, guest: str, direction: str) -> str:
        """Removes what `set_qos` has said; returns why the helper does not know yet, for people.

        Raises:
            InvalidError, NotFoundError, PreconditionError: nothing was changed.
        """
        record, guest_id, label = self.desired.find_place(network, guest)
        self.desired.qos.remove(record.id, guest_id, direction, label)
        logger.info("limits of %s: removed", label)
        return await self._until_limited(record, guest_id)

    async def _until_limited(self, network: NetworkRecord, guest_id: str) -> str:
        endpoints = self.desired.store.endpoints(network_id=network.id)
        ids = [endpoint.id for endpoint in endpoints if guest_id in ("", endpoint.guest_id)]
        for endpoint_id in ids:
            self.helper.touch(endpoint_id)
        for endpoint_id in ids:
            pending = await self._until_helper_has(endpoint_id)
            # One that went meanwhile is not waited for.
            if pending and self.desired.store.endpoint(endpoint_id) is not None:
                return pending
        return ""

    def qos_pending(self) -> str:
        """Why limits are not in force, for people; empty when they are."""
        return self.helper.lack_of(HelperFeature.QOS) if self.desired.qos.entries() else ""

    # Load balancers

    async def apply_balancers(
        self, source: str, balancers: Sequence[Balancer], *, prune: bool = False, create_only: bool = False
    ) -> tuple[Changes, str]:
        """Changes load balancers, arguments as `BalancerState.apply`; returns once they are in force.

        Returns:
            What was done, and why it is not in force yet, for people: the helper converges to it all the same.

        Raises:
            InvalidError, TakenError, PreconditionError, ExhaustedError: nothing was changed.
        """
        self._check_helper_can(HelperFeature.BALANCERS)
        changes = self.desired.balancers.apply(source, balancers, prune=prune, create_only=create_only)
        logger.info(
            "load balancers: %d created, %d updated, %d removed",
            *map(len, (changes.created, changes.updated, changes.removed)),
        )
        return changes, await self._until_balanced()

    async def remove_balancers(self, names: Sequence[str]) -> str:
        """Removes load balancers, as `BalancerState.remove`; returns why that is not so yet at the helper."""
        self.desired.balancers.remove(names)
        logger.info("load balancers: %d removed", len(names))
        return await self._until_balanced()

    async def _until_balanced(self) -> str:
        # Names of guests make way for those of load balancers, and come back.
        for endpoint in self.desired.store.endpoints():
            self.helper.touch(endpoint.id)
        self.helper.touch(BALANCERS_KEY)
        return await self._until_helper_has(BALANCERS_KEY)

    def balancers_pending(self) -> str:
        """Why the load balancers are not in force yet, for people; empty when they are."""
        return self._pending(BALANCERS_KEY, HelperFeature.BALANCERS)

    # Mirrors

    async def add_mirror(self, mirror: MirrorRecord, source_label: str, target_label: str) -> str:
        """Adds a mirror, as `MirrorState.add`; returns why it is not in force yet, for people.

        Raises:
            InvalidError, PreconditionError: nothing was changed.
        """
        self._check_helper_can(HelperFeature.MIRRORS)
        self.desired.mirrors.add(mirror, source_label, target_label)
        logger.info("mirror of %s to %s: %s", source_label, target_label, mirror.direction)
        return await self._until_mirrored()

    async def remove_mirror(self, mirror: MirrorRecord, label: str) -> str:
        """Removes a mirror, as `MirrorState.remove`; returns why that is not so yet at the helper, for people.

        Raises:
            MirrorNotFoundError: there is none.
        """
        self.desired.mirrors.remove(mirror.source, mirror.target, label)
        logger.info("mirror %s: removed", label)
        return "" if self.helper.lacks(HelperFeature.MIRRORS) else await self._until_mirrored()

    async def _until_mirrored(self) -> str:
        self.helper.touch(MIRRORS_KEY)
        return await self._until_helper_has(MIRRORS_KEY)

    def mirrors_pending(self) -> str:
        """Why the mirrors are not in force, for people; empty when they are."""
        return self._pending(MIRRORS_KEY, HelperFeature.MIRRORS) if self.desired.mirrors.records() else ""

    # Guests

    async def register_guest(
        self,
        name: str,
        address: str,
        data: str = "",
        *,
        mac_address: str = "",
        qmp: str = "",
        guest_id: str = "",
        settings: GuestSettings | None = None,
    ) -> GuestRecord:
        """Registers a guest; the bridge starts to dial it. Arguments as `DesiredState.register_guest`."""
        record = self.desired.register_guest(
            name, address, data, mac_address=mac_address, qmp=qmp, guest_id=guest_id, settings=settings
        )
        self._add_guest(record)
        logger.info("registered guest %s at %s", name, record.address)
        self.events.emit("guest-register", guest=record)
        await trio.lowlevel.checkpoint()
        return record

    async def rename_guest(self, text: str, name: str) -> GuestRecord:
        """Gives a guest, and the container that it is, another name, under which its networks know it at once."""
        before, record = self.desired.rename_guest(text, name)
        peer = self.guests.get(record.id)
        if peer is not None:
            peer.renamed(record)
        endpoints = self.desired.store.endpoints(guest_id=record.id)
        for endpoint in endpoints:
            link = self.links.get(endpoint.id)
            if link is not None:
                link.label = f"{record.name} on {self.desired.network_name(endpoint.network_id)}"
            self.helper.touch(endpoint.id)
            self._touch_others(endpoint)
        logger.info("guest %s is called %s now", before.name, record.name)
        self.events.emit("guest-rename", guest=record)
        with trio.move_on_after(self.timing.settle):
            for endpoint in endpoints:
                await self.helper.changes.until(endpoint.id, functools.partial(self.helper.settled, endpoint.id))
        return record

    async def update_guest_settings(self, guest_id: str, settings: GuestSettings) -> GuestRecord:
        """Replaces what a guest's names are resolved with, live."""
        record = self.desired.update_guest_settings(guest_id, settings)
        peer = self.guests.get(record.id)
        if peer is not None:
            peer.renamed(record)
        for endpoint in self.desired.store.endpoints(guest_id=record.id):
            self.helper.touch(endpoint.id)
            self._touch_others(endpoint)
        await trio.lowlevel.checkpoint()
        return record

    async def remove_guest(self, text: str) -> GuestRecord:
        """Removes a guest and disconnects it from its networks."""
        record, endpoints = self.desired.remove_guest(text)
        logger.info("removed guest %s", record.name)
        for endpoint in endpoints:
            self._drop_link(endpoint.id)
            self.helper.touch(endpoint.id)
            self._touch_others(endpoint)
            if endpoint.active:
                network = self.desired.store.network(endpoint.network_id)
                self.events.emit("endpoint-disconnect", network=network, guest=record, endpoint=endpoint)
        self.events.emit("guest-remove", guest=record)
        peer = self.guests.pop(record.id)
        left = self._leaving[record.address] = trio.Event()
        assert self._nursery is not None
        # Not in this call: its caller may give up, the guest is to be told all the same.
        self._nursery.start_soon(self._retire, peer, left)
        with trio.move_on_after(self.timing.settle):
            await left.wait()
            for endpoint in endpoints:
                await self.helper.wait_gone(endpoint.id)
        return record

    async def _retire(self, peer: AnyGuest, left: trio.Event) -> None:
        await peer.retire(self.timing.settle)
        self._scopes.pop(peer.record.id).cancel()
        if self._leaving.get(peer.record.address) is left:
            del self._leaving[peer.record.address]
        left.set()

    # Endpoints

    async def connect(self, network: str, guest: str, options: EndpointOptions | None = None) -> EndpointRecord:
        """Connects a guest to a network and returns once frames can pass and names are known; arguments as
        `DesiredState.connect`."""
        record = self.desired.connect(network, guest, options)
        try:
            self._check_helper_takes(record.id)
            link = self._add_link(record) if record.carried is None else None
            label = self.label(record)
            self.guests[record.guest_id].touch(record.id)
            self.guests[record.guest_id].touch(RESOLVER_KEY)
            self.helper.touch(record.id)
            self._touch_others(record)
            await (self._until_up(link) if link is not None else self._until_carried(record))
            if (link is not None and link.removed) or not self.desired.activate_endpoint(record.id):
                raise AbortedError(f"{label} was disconnected while it was being connected")
        except BaseException as error:
            self.desired.cancel_endpoint(record.id)
            self._forget_endpoint(record)
            if isinstance(error, Exception):
                await self._settle(record)
            raise
        logger.info("connected %s with %s", label, ", ".join(record.addresses))
        connected = self.desired.store.endpoint(record.id)
        assert connected is not None
        self._emit("endpoint-connect", connected)
        await self._rebalance()
        await self._mirror_again()
        return connected

    async def disconnect(self, network: str, guest: str) -> EndpointRecord:
        """Disconnects a guest from a network."""
        record = self.desired.disconnect(network, guest)
        link = self._forget_endpoint(record)
        if link is not None:
            logger.info("disconnected %s", link.label)
        if record.active:
            self._emit("endpoint-disconnect", record)
        await self._settle(record)
        return record

    async def _rebalance(self) -> None:
        """Has load balancers send connections to who is there now; waits a little for it."""
        if self.desired.balancers.balancers:
            self.helper.touch(BALANCERS_KEY)
            with trio.move_on_after(self.timing.settle):
                await self.helper.changes.until(BALANCERS_KEY, lambda: self.helper.settled(BALANCERS_KEY))

    async def _mirror_again(self) -> None:
        """Has who is there now be copied from and to; waits a little for it."""
        if self.desired.mirrors.records():
            with trio.move_on_after(self.timing.settle):
                await self.helper.changes.until(MIRRORS_KEY, lambda: self.helper.settled(MIRRORS_KEY))

    def _stream_wanted(self, wanted: StreamWanted) -> None:
        if self.on_stream_wanted is not None:
            self.on_stream_wanted(wanted)
            return
        assert self._nursery is not None
        self._nursery.start_soon(self.helper.refuse_stream, wanted.token)

    async def _settle(self, record: EndpointRecord) -> None:
        """Waits a little for the agents to let go of an endpoint; those that do not answer converge later."""
        peer = self.guests.get(record.guest_id)
        with trio.move_on_after(self.timing.settle):
            if peer is not None:
                await peer.wait_gone(record.id)
                await peer.changes.until(RESOLVER_KEY, lambda: peer.settled(RESOLVER_KEY))
            await self.helper.wait_gone(record.id)

    async def _until_carried(self, record: EndpointRecord) -> None:
        """Waits until the helper has an endpoint that goes over another's link, and the guest's agent, if it can."""
        await self._converge(
            lambda condition: self.helper.changes.until(record.id, condition),
            done=lambda: self.helper.has(record.id),
            refused=lambda: _refusal(self.helper, record.id),
            peers=(self.helper,),
            explain=lambda: self.helper.waits_for(record.id),
        )
        guest = self.guests[record.guest_id]
        if isinstance(guest, CardGuest):
            return
        await self._converge(
            lambda condition: guest.changes.until(record.id, condition),
            done=lambda: guest.connected and _told(guest, record.id),
            refused=lambda: _refusal(guest, record.id),
            peers=(guest,),
            explain=lambda: guest.waits_for(record.id),
        )
        left = guest.leaves(record)
        if left and self.desired.store.is_container(record.guest_id):
            # Nobody in a container could, or would.
            raise PreconditionError(f"{self.label(record)}: {left.partition(';')[0]}: connect it without a tag")
        if left:
            logger.warning("%s: %s", self.label(record), left)

    async def _until_up(self, link: DataLink) -> None:
        """Waits until the link is up, with another interface name where the guest has one of its own by that name."""
        refused_names: set[str] = set()
        while True:
            await self._converge(
                link.changes.until,
                done=lambda: link.up or link.removed,
                refused=lambda: self._link_refusal(link),
                peers=link.peers,
                explain=link.waits_for,
                retry=lambda: self._name_refused(link),
            )
            if link.up:
                await self._until_names_settled(link)
            if link.up or link.removed:
                return
            endpoint = self.desired.store.endpoint(link.endpoint_id)
            if endpoint is None:
                return
            refused_names.add(endpoint.interface_name)
            failure = link.guest.failure(link.endpoint_id)
            if failure is None:
                continue
            if len(refused_names) > _MAX_RENAMES:
                raise UnavailableError(f"{link.guest.subject} refuses every interface name: {failure.message}")
            link.guest.forgive(link.endpoint_id)
            name = self.desired.rename_interface(link.endpoint_id, refused_names)
            logger.info(
                "%s has an interface %s of its own: using %s", link.guest.subject, endpoint.interface_name, name
            )
            link.guest.touch(link.endpoint_id)

    async def _until_names_settled(self, link: DataLink) -> None:
        guest = link.guest
        await self._converge(
            lambda condition: guest.changes.until(RESOLVER_KEY, condition),
            done=lambda: guest.settled(RESOLVER_KEY),
            refused=lambda: None,
            peers=(),
            explain=lambda: guest.waits_for(RESOLVER_KEY),
        )

    @staticmethod
    def _name_refused(link: DataLink) -> bool:
        failure = link.guest.failure(link.endpoint_id)
        return failure is not None and failure.code is StatusCode.ALREADY_EXISTS

    def _link_refusal(self, link: DataLink) -> str | None:
        return _refusal(link.guest, link.endpoint_id) or _refusal(self.helper, link.endpoint_id)

    async def _converge(
        self,
        until: Callable[[Callable[[], bool]], Awaitable[None]],
        *,
        done: Callable[[], bool],
        refused: Callable[[], str | None],
        peers: Sequence[Peer[Any]],
        explain: Callable[[], str],
        retry: Callable[[], bool] = lambda: False,
    ) -> None:
        """Waits until `done` or `retry`; raises UnavailableError with the reason when that is not to be."""

        def settled() -> bool:
            return done() or retry() or refused() is not None

        def unreachable() -> str | None:
            return next((peer.problem for peer in peers if not peer.connected), None)

        with trio.move_on_after(self.timing.deadline):
            with trio.move_on_after(self.timing.grace):
                await until(settled)
            await until(lambda: settled() or unreachable() is not None)
        if done() or retry():
            return
        known = refused() or unreachable()
        raise UnavailableError(known or f"{explain()}; given up after {self.timing.deadline:g} s")

    # Peers and links

    def _add_guest(self, record: GuestRecord) -> None:
        peer: GuestPeer | None = None
        if record.card is not None:
            self._start_guest(CardGuest(record, self._dataplane, on_change=lambda: self._card_changed(record.id)))
            return

        def this() -> Peer[Any]:
            assert peer is not None
            return peer

        peer = GuestPeer(record, self.desired.store, self.upstreams, **self._callbacks(this))
        self._start_guest(peer)

    def _start_guest(self, peer: AnyGuest) -> None:
        self.guests[peer.record.id] = peer
        scope = self._scopes[peer.record.id] = trio.CancelScope()
        assert self._nursery is not None
        self._nursery.start_soon(self._run_guest, peer, scope)

    def _card_changed(self, guest_id: str) -> None:
        for link in self.links.values():
            if link.guest.record.id == guest_id:
                link.changes.notify()

    async def _run_guest(self, peer: AnyGuest, scope: trio.CancelScope) -> None:
        # The same agent under another registration is told to forget everything first.
        earlier = self._leaving.get(peer.record.address)
        with scope:
            if earlier is not None:
                await earlier.wait()
            await _guarded(peer)

    def _callbacks(self, this: Callable[[], Peer[Any]]) -> dict[str, Any]:
        def own(endpoint_id: str) -> DataLink | None:
            # What a guest says about an endpoint of another guest counts for nothing.
            link = self.links.get(endpoint_id)
            return link if link is not None and this() in (link.guest, link.helper) else None

        def generation(key: str) -> int:
            link = own(key)
            return link.generation if link is not None and link.up else 0

        def link_down(endpoint_id: str, reason: str, dead: int) -> None:
            link = own(endpoint_id)
            if link is not None:
                link.bounce(reason, dead)

        def secret(key: str) -> bytes | None:
            link = own(key)
            if link is None or link.up:
                return None
            fresh = new_secret()
            link.secret_sent(this(), fresh)
            return fresh

        def sent(key: str, value: bytes) -> None:
            link = own(key)
            if link is not None:
                link.secret_accepted(this(), value)

        def changed(key: str) -> None:
            peer = this()
            if key:
                link = self.links.get(key)
                if link is not None:
                    link.changes.notify()
                return
            for link in list(self.links.values()):
                if peer in (link.guest, link.helper):
                    link.connection_changed(peer)

        return {
            "on_change": changed,
            "on_link_down": link_down,
            "link_generation": generation,
            "link_secret": secret,
            "on_secret_sent": sent,
            "call_timeout": self.timing.call,
        }

    def _add_link(self, endpoint: EndpointRecord) -> DataLink:
        guest = self.guests[endpoint.guest_id]
        label = self.label(endpoint)
        if isinstance(guest, CardGuest):
            link: DataLink = CardLink(endpoint.id, label, guest, self.helper, self._dataplane)
        else:
            link = DataLink(endpoint.id, label, guest, self.helper, self._dataplane)
        self.links[endpoint.id] = link
        assert self._nursery is not None
        self._nursery.start_soon(link.run)
        return link

    def label(self, endpoint: EndpointRecord) -> str:
        """What messages call an endpoint."""
        return f"{self.desired.guest_name(endpoint.guest_id)} on {self.desired.network_name(endpoint.network_id)}"

    def _drop_link(self, endpoint_id: str) -> DataLink | None:
        link = self.links.pop(endpoint_id, None)
        if link is not None:
            link.removed = True
            link.scope.cancel()
            link.changes.notify()
        return link

    def _forget_endpoint(self, record: EndpointRecord) -> DataLink | None:
        link = self._drop_link(record.id)
        if record.guest_id in self.guests:
            self.guests[record.guest_id].touch(record.id)
            self.guests[record.guest_id].touch(RESOLVER_KEY)
        self.helper.touch(record.id)
        self._touch_others(record)
        return link

    def _touch_others(self, endpoint: EndpointRecord) -> None:
        """Tells who goes by this endpoint: load balancers, mirrors, what it carries, and the guests that have a link to
        it on the default bridge, whose /etc/hosts has its address."""
        self.helper.touch(BALANCERS_KEY)
        self.helper.touch(MIRRORS_KEY)
        for child_id in self.desired.store.carried_by(endpoint):
            self.helper.touch(child_id)
            if endpoint.guest_id in self.guests:
                self.guests[endpoint.guest_id].touch(child_id)
        network = self.desired.store.network(endpoint.network_id)
        if network is None or not network.default_bridge:
            return
        for guest_id in self.desired.store.guests_with_links(network.id):
            if guest_id in self.guests:
                self.guests[guest_id].touch(RESOLVER_KEY)

    def _emit(self, kind: EventKind, endpoint: EndpointRecord) -> None:
        network = self.desired.store.network(endpoint.network_id)
        guest = self.desired.store.guest(endpoint.guest_id)
        self.events.emit(kind, network=network, guest=guest, endpoint=endpoint)

    # What callers see

    def network_message(self, record: NetworkRecord) -> bridge.Network:
        """A network with its endpoints."""
        endpoints = self.desired.store.endpoints(network_id=record.id)
        messages = [self.endpoint_message(endpoint) for endpoint in endpoints if endpoint.active]
        return bridge_network(record, messages, rules_message(self.desired.qos.default_of(record)))

    def guest_message(self, record: GuestRecord) -> bridge.Guest:
        """A guest with its endpoints and connection."""
        endpoints = self.desired.store.endpoints(guest_id=record.id)
        peer = self.guests.get(record.id)
        return bridge_guest(
            record,
            [self.endpoint_message(endpoint) for endpoint in endpoints if endpoint.active],
            connected=peer is not None and peer.connected,
            problem="the guest has been removed" if peer is None else peer.problem,
        )

    def endpoint_message(self, record: EndpointRecord) -> bridge.Endpoint:
        """An endpoint and whether frames can pass."""
        network = self.desired.store.network(record.network_id)
        guest = self.desired.store.guest(record.guest_id)
        assert network is not None and guest is not None, "foreign keys"
        carrier = self.desired.store.carrier_of(record)
        link = self.links.get(record.id if carrier is None else carrier.id)
        if carrier is not None and self.missing_for(record) is not None:
            link = None
        peer = self.guests.get(record.guest_id)
        return bridge_endpoint(
            record,
            network,
            guest,
            link_up=link is not None and link.passes,
            qos=rules_message(self.desired.qos.in_force(record, network)),
            left_to_guest="" if peer is None else peer.leaves(record),
        )

    def missing_for(self, record: EndpointRecord) -> Peer[Any] | None:
        """Who does not have an endpoint that goes over another's link as it is to be: the helper, or the guest's agent
        as far as it answers; None: nobody."""
        if not self.helper.has(record.id):
            return self.helper
        peer = self.guests.get(record.guest_id)
        if isinstance(peer, GuestPeer) and peer.connected and not _told(peer, record.id):
            return peer
        return None


def _told(guest: GuestPeer, key: str) -> bool:
    """Whether a guest's agent has an endpoint, or is not to have it."""
    return guest.has(key) or (guest.settled(key) and guest.wanted(key) is None)


def _refusal(peer: Peer[Any] | CardGuest, key: str) -> str | None:
    failure = peer.failure(key)
    return peer.waits_for(key) if failure is not None and failure.code in PERMANENT else None


async def _guarded(peer: Peer[Any] | CardGuest) -> None:
    """Runs a peer; what one peer can provoke must not end the bridge for the others."""
    while True:
        try:
            await peer.run()
        except Exception:
            logger.exception("internal error with %s; dialling again", peer.subject)
            peer.crashed()
        await trio.sleep(_AFTER_CRASH)
