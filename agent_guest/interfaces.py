"""The agent's interfaces: what they are to be, the TAPs held open for them, and their repair.

Every change runs under one lock and shielded from cancellation (a host that hangs up leaves no half-made interface);
the blocking part runs in a worker thread.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import math
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ParamSpec, Protocol, TypeVar

import trio

from taploom.contracts.taploom.guest.v1 import (
    Interface,
    InterfaceRepaired,
    InterfaceState,
    InterfaceStatus,
)
from taploom.contracts.taploom.link.v1 import LinkCounters
from taploom.link import LinkStatus, Tap, TapError
from taploom.netlink import NetlinkError

from . import neighbours, vlan
from .kernel import TEMPORARY, Kernel, NameTakenError, NoTrunkError
from .limiter import RepairLimiter
from .netlink import open_watch_socket
from .plan import Step
from .spec import InterfaceSpec, SpecError, TrunkSpec, check_against, check_trunk, trunk_message
from .state import KernelState, LinkState
from .watch import touched

logger = logging.getLogger("taploom.guest.interfaces")

_P = ParamSpec("_P")
_R = TypeVar("_R")

RETRY_DELAY = 1.0
QUIET, LATEST = 0.01, 0.1
"""Seconds without news after which the interfaces are looked at, and after which at any rate."""
_GONE_POLL = 0.0003
_AT_ONCE = 64  # notifications that are read before others have their turn
_REMOVED = "another program removed the interface"
APPLY_ERRORS = (SpecError, NameTakenError, NoTrunkError, TapError, NetlinkError)
"""What applying an interface raises when it cannot be done."""


class Links(Protocol):
    """What is needed of taploom.link.LinkServer."""

    def add(self, endpoint_id: str, tap: Tap) -> None: ...
    async def remove(self, endpoint_id: str) -> None: ...
    def authorize(self, endpoint_id: str, secret: bytes) -> None: ...
    def status(self, endpoint_id: str) -> LinkStatus: ...


class NotDescribedError(Exception):
    """The interface was adopted from an earlier agent; nobody has said yet what it is to be."""


@dataclass
class _Managed:
    endpoint_id: str
    tap: Tap | None
    """None: the interface has none (see `trunk`), or is not there."""
    index: int
    spec: InterfaceSpec | None
    adopted: Interface | None = None
    trunk: TrunkSpec | None = None
    """What carries it instead of a link of its own."""
    present: bool = True
    """False: another program has removed the interface, or what carries it has gone; it is not created again yet."""


class Interfaces:
    """All interfaces of the agent."""

    def __init__(
        self,
        kernel: Kernel,
        links: Links,
        *,
        on_repair: Callable[[InterfaceRepaired], None],
        on_change: Callable[[list[InterfaceSpec]], None],
    ) -> None:
        """``on_change`` is called with all described interfaces after each change of them."""
        self._kernel = kernel
        self._links = links
        self._on_repair = on_repair
        self._on_change = on_change
        self._managed: dict[str, _Managed] = {}
        self._lock = trio.Lock()
        self._thread = trio.CapacityLimiter(1)
        self._packets: socket.socket | None = None
        self._left: set[str] = set()
        """The endpoints of which an earlier agent left interfaces that could not be adopted."""
        self._nudge: trio.MemorySendChannel[None] | None = None
        self._due: set[int] = set()
        """The links that are to be looked at."""
        self._nursery: trio.Nursery | None = None

    # -- calls --------------------------------------------------------------------------------------------------

    async def adopt(self) -> None:
        """Takes over the interfaces of the agent that ran before, touching neither addresses nor routes."""
        async with self._lock:
            await self._adopt_all()

    async def _adopt_all(self) -> None:
        self._left.clear()
        for link in await self._run(self._kernel.adoptable):
            if link.endpoint_id not in self._managed:
                await self._adopt(link)
            if link.endpoint_id not in self._managed:
                self._left.add(link.endpoint_id)

    async def _adopt(self, link: LinkState) -> None:
        if link.kind == vlan.KIND:
            await self._adopt_child(link)
            return
        try:
            tap = await self._run(self._kernel.attach, link)
        except TapError as error:
            logger.warning("interface %s of endpoint %s is left alone: %s", link.name, link.endpoint_id, error.strerror)
            return
        state = await self._run(self._kernel.state)
        description = observed(link, state)
        self._managed[link.endpoint_id] = _Managed(link.endpoint_id, tap, link.index, None, description)
        self._links.add(link.endpoint_id, tap)
        logger.info("adopted interface %s of endpoint %s", link.name, link.endpoint_id)

    async def _adopt_child(self, link: LinkState) -> None:
        state = await self._run(self._kernel.state)
        over = state.links.get(link.over)
        trunk = TrunkSpec(over.endpoint_id, link.tag) if over is not None and over.endpoint_id and link.tag else None
        if trunk is None:
            logger.warning(
                "interface %s of endpoint %s is left alone: it is over none of ours", link.name, link.endpoint_id
            )
            return
        description = observed(link, state)
        description.trunk_child = trunk_message(trunk)
        self._managed[link.endpoint_id] = _Managed(link.endpoint_id, None, link.index, None, description, trunk)
        logger.info("adopted interface %s of endpoint %s", link.name, link.endpoint_id)

    async def apply(self, spec: InterfaceSpec, secret: bytes = b"") -> InterfaceStatus:
        """Creates the interface or makes it be as described; raises one of APPLY_ERRORS and leaves what was there."""
        async with self._exclusive():
            before = self._managed.get(spec.endpoint_id)
            described = before.spec if before is not None else None
            await self._apply(spec, self._specs())
            await self._settle_routes(spec.endpoint_id, described)
            self._changed()
            if secret:
                self._links.authorize(spec.endpoint_id, secret)
            return self._status(self._managed[spec.endpoint_id])

    async def delete(self, endpoint_id: str) -> None:
        """Removes the interface; the default route moves to the next one first."""
        async with self._exclusive():
            if endpoint_id not in self._managed:
                await self._adopt_all()  # it may be a TAP that could not be adopted at the start
            await self._remove([endpoint_id])
            self._changed()

    async def sync(
        self, specs: Iterable[InterfaceSpec], kept: frozenset[str] = frozenset()
    ) -> tuple[list[str], list[tuple[str, Exception]]]:
        """Makes the interfaces be these. ``kept``: endpoints to leave as they are (their description was refused).

        Returns the endpoints removed and, for those that could not be applied, why.
        """
        specs = list(specs)
        async with self._exclusive():
            await self._adopt_all()
            wanted = {spec.endpoint_id for spec in specs} | kept
            removed = [endpoint_id for endpoint_id in self._managed if endpoint_id not in wanted]
            await self._remove(removed)
            specs.sort(key=lambda spec: spec.trunk is not None)  # what carries others comes first
            await self._free_names(specs)
            failures: list[tuple[str, Exception]] = []
            done: list[InterfaceSpec] = [
                managed.spec for managed in self._managed.values() if managed.endpoint_id in kept and managed.spec
            ]
            for spec in specs:
                try:
                    await self._apply(spec, done)
                    done.append(spec)
                except APPLY_ERRORS as error:
                    failures.append((spec.endpoint_id, error))
            failures += await self._settle_all_routes()
            self._changed()
            return sorted(removed), failures

    def authorize(self, endpoint_id: str, secret: bytes) -> None:
        """Lets one link be opened. Raises KeyError for an unknown endpoint, NotDescribedError for an adopted one,
        SpecError for one that has no link of its own."""
        managed = self._managed[endpoint_id]
        if managed.trunk is not None:
            raise SpecError(f"endpoint {endpoint_id} has no link of its own: {managed.trunk.parent_id} carries it")
        if managed.tap is None:
            raise KeyError(endpoint_id)
        if managed.spec is None:
            raise NotDescribedError(endpoint_id)
        self._links.authorize(endpoint_id, secret)

    async def loopback_up(self) -> None:
        """Brings `lo` up, for whoever listens there. Raises NetlinkError."""
        await self._run(self._kernel.loopback_up)

    async def statuses(self) -> list[InterfaceStatus]:
        """Every interface, by name."""
        children = [
            managed.index for managed in self._managed.values() if managed.trunk is not None and managed.present
        ]
        counters: dict[int, LinkCounters] = {}
        if children:
            with contextlib.suppress(NetlinkError):  # what else there is to say is true without them
                counters = await self._run(self._kernel.counters, children)
        found = [self._status(managed, counters.get(managed.index)) for managed in self._managed.values()]
        return sorted(found, key=lambda status: status.interface.name if status.interface else "")

    async def close(self) -> None:
        """Ends the links and lets go of the TAPs; the interfaces and all that is on them stay."""
        async with self._lock:
            for managed in self._managed.values():
                if managed.tap is not None:
                    await self._links.remove(managed.endpoint_id)
                    managed.tap.close()
            self._managed.clear()
            if self._packets is not None:
                self._packets.close()

    # -- applying -----------------------------------------------------------------------------------------------

    async def _apply(self, spec: InterfaceSpec, others: list[InterfaceSpec]) -> None:
        others = [other for other in others if other.endpoint_id != spec.endpoint_id]
        check_against(spec, others)
        taken = [
            managed
            for managed in self._managed.values()
            if managed.endpoint_id != spec.endpoint_id and self._name(managed) == spec.name
        ]
        if taken:
            raise NameTakenError(
                f"interface name {spec.name} belongs to endpoint {taken[0].endpoint_id}; choose another name"
            )
        carrier = None if spec.trunk is None else self._trunk_of(spec.trunk).spec
        if carrier is not None:
            check_trunk(spec, carrier)
        managed = self._managed.get(spec.endpoint_id)
        if managed is not None and managed.trunk != spec.trunk:
            await self._remove([spec.endpoint_id])
            managed = None
        if managed is not None and not await self._run(self._kernel.exists, managed.index):
            await self._detach(managed)
        if managed is None or not managed.present:
            await self._create(spec)
            return
        before = managed.spec
        try:
            await self._run(self._kernel.converge_link, managed.index, self._fitted(spec))
        except APPLY_ERRORS:
            if before is not None:
                await self._try_restore(managed, before)
            raise
        managed.spec, managed.adopted = spec, None
        await self._settle_children(spec.endpoint_id)

    def _trunk_of(self, trunk: TrunkSpec) -> _Managed:
        """The interface that carries others so; raises NoTrunkError."""
        parent = self._managed.get(trunk.parent_id)
        if parent is None or not parent.present:
            raise NoTrunkError(
                f"endpoint {trunk.parent_id}, which is to carry it, has no interface here; apply it first"
            )
        return parent

    async def _create(self, spec: InterfaceSpec) -> None:
        tap: Tap | None = None
        # One that is made again may have come back meanwhile.
        left = spec.endpoint_id in self._left or spec.endpoint_id in self._managed
        if spec.trunk is None:
            tap, index = await self._run(self._kernel.create, spec, left=left)
        else:
            parent = self._trunk_of(spec.trunk)
            index = await self._run(self._kernel.create_child, self._fitted(spec), parent.index, left=left)
        self._managed[spec.endpoint_id] = _Managed(spec.endpoint_id, tap, index, spec, trunk=spec.trunk)
        if tap is not None:
            self._links.add(spec.endpoint_id, tap)
            await self._settle_children(spec.endpoint_id)
        elif self._is_up(self._managed[spec.endpoint_id]):
            self.greet(spec.endpoint_id)

    async def _settle_children(self, endpoint_id: str) -> None:
        """Makes what goes over an interface that was made or changed, or makes it fit; what fails is tried again."""
        for child in self._children(endpoint_id):
            try:
                if child.spec is None:
                    continue
                if child.present:
                    fitted = self._fitted(child.spec)
                    await self._run(self._kernel.converge_link, child.index, fitted, repair=True)
                else:
                    await self._create(child.spec)
            except APPLY_ERRORS as error:
                logger.warning("interface %s could not be made again: %s", self._name(child), error)
                self._look()

    async def _try_restore(self, managed: _Managed, spec: InterfaceSpec) -> None:
        try:
            await self._run(self._kernel.converge_link, managed.index, self._fitted(spec))
            await self._run(self._kernel.converge_routes, self._by_index())
        except APPLY_ERRORS as error:
            logger.warning("interface %s could not be put back as it was: %s", spec.name, error)

    async def _settle_routes(self, endpoint_id: str, before: InterfaceSpec | None) -> None:
        """Sets the routes after an endpoint was applied; when that fails the endpoint's change is taken back."""
        try:
            await self._run(self._kernel.converge_routes, self._by_index(), self._links_of(endpoint_id))
        except APPLY_ERRORS:
            self._look()
            if before is None:
                await self._remove([endpoint_id])
            else:
                managed = self._managed[endpoint_id]
                managed.spec = before
                await self._try_restore(managed, before)
            raise

    async def _settle_all_routes(self) -> list[tuple[str, Exception]]:
        try:
            await self._run(self._kernel.converge_routes, self._by_index())
        except APPLY_ERRORS as error:
            return [(managed.endpoint_id, error) for managed in self._managed.values() if managed.spec is not None]
        return []

    async def _remove(self, endpoint_ids: list[str]) -> None:
        doomed = [self._managed[endpoint_id] for endpoint_id in endpoint_ids if endpoint_id in self._managed]
        if not doomed:
            return
        going = {one.index for managed in doomed for one in (managed, *self._children(managed.endpoint_id))}
        staying = {index: spec for index, spec in self._by_index().items() if index not in going}
        try:
            # The default route moves before its interface goes, so that there is no moment without one.
            await self._run(self._kernel.converge_routes, staying, ())
        except APPLY_ERRORS as error:
            self._look()
            logger.warning("routes before the removal of %s: %s", ", ".join(endpoint_ids), error)
        doomed.sort(key=lambda managed: managed.trunk is None)
        for managed in doomed:
            tap, managed.tap = managed.tap, None
            if tap is not None:
                await self._links.remove(managed.endpoint_id)
                await self._take_away(tap, managed.index)
            # When this fails the endpoint stays known, so that the next try finds it.
            await self._run(self._kernel.remove, managed.index)
            del self._managed[managed.endpoint_id]
            for child in self._children(managed.endpoint_id):
                child.present = False  # the kernel has taken it away with what carried it

    async def _take_away(self, tap: Tap, index: int) -> None:
        """Removes a TAP's interface by closing the TAP.

        The kernel takes the interface away at once and then waits for some 15 ms until no CPU can still be using it
        (netdev_run_todo): nobody else has to wait for that.
        """
        with contextlib.suppress(OSError):
            tap.set_persist(False)
        if self._nursery is None:
            await trio.to_thread.run_sync(tap.close)
            return
        closed = trio.Event()
        self._nursery.start_soon(_close, tap, closed)
        while not closed.is_set() and self._kernel.exists(index):  # noqa: ASYNC110 - the kernel sets no event
            await trio.sleep(_GONE_POLL)

    async def _detach(self, managed: _Managed) -> None:
        """Lets go of the TAP of an interface that another program has removed."""
        managed.present = False
        if managed.tap is not None:
            await self._links.remove(managed.endpoint_id)
            with contextlib.suppress(OSError):
                managed.tap.set_persist(False)  # it may have gone to another namespace only
            managed.tap.close()
            managed.tap = None
        for child in self._children(managed.endpoint_id):
            child.present = child.present and await self._run(self._kernel.exists, child.index)

    async def _free_names(self, specs: list[InterfaceSpec]) -> None:
        """Gives interfaces that are to be renamed a name that nobody wants, so that names can be swapped."""
        for spec in specs:
            managed = self._managed.get(spec.endpoint_id)
            if managed is None or self._name(managed) == spec.name:
                continue
            if any(other.name == self._name(managed) for other in specs):
                temporary = f"{TEMPORARY}{managed.index}"
                try:
                    await self._run(self._kernel.rename, managed.index, temporary)
                except (NetlinkError, NameTakenError) as error:
                    logger.warning("interface %s keeps its name: %s", self._name(managed), error)
                    continue
                if managed.adopted is not None:
                    managed.adopted.name = temporary
                managed.spec = None if managed.spec is None else replace(managed.spec, name=temporary)

    # -- repair -------------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Mends the agent's interfaces when another program changes them; runs until cancelled."""
        limiter = RepairLimiter()
        changed, nudge = trio.open_memory_channel[None](1)
        self._nudge = changed
        with open_watch_socket() as notifications:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._listen, notifications)
                delay: float | None = None
                try:
                    while True:
                        with trio.move_on_after(math.inf if delay is None else delay):
                            await nudge.receive()
                            await _until_quiet(nudge)
                        delay = await self._mend(limiter)
                finally:
                    self._nursery = self._nudge = None

    async def _listen(self, notifications: socket.socket) -> None:
        while True:
            await trio.lowlevel.wait_readable(notifications)
            indexes = self._indexes()
            changed: set[int] = set()
            for data in itertools.islice(_pending(notifications), _AT_ONCE):
                # When some were lost: whatever they were, look.
                changed |= touched(data, indexes) if data else indexes
            if changed:
                self._look(changed)

    def _look(self, indexes: set[int] | None = None) -> None:
        """Has links, or all, looked at soon."""
        self._due |= self._indexes() if indexes is None else indexes
        if self._nudge is not None:
            with contextlib.suppress(trio.WouldBlock):  # one look is enough for all that came
                self._nudge.send_nowait(None)

    async def _mend(self, limiter: RepairLimiter) -> float | None:
        """One look at what is due; returns after how many seconds another look at everything is, if one is."""
        if not self._due:
            return None
        delay: float | None = None
        async with self._exclusive():
            due, self._due = self._due, set()
            specs = {
                managed.index: self._fitted(managed.spec)
                for managed in self._managed.values()
                if managed.spec is not None and (managed.present or not self._waits(managed))
            }
            try:
                wrong = await self._run(self._kernel.needs, specs, due)
            except NetlinkError as error:
                logger.warning("cannot look at the interfaces: %s", error)
                self._due |= self._indexes()
                return RETRY_DELAY
            # What carries others comes first: they are made again with it.
            for index, gone in sorted(wrong.items(), key=lambda item: specs[item[0]].trunk is not None):
                spec = specs[index]
                if self._managed[spec.endpoint_id].index != index:
                    continue
                wait = limiter.acquire(spec.endpoint_id, trio.current_time())
                if wait > 0:
                    delay = wait if delay is None else min(delay, wait)
                    continue
                try:
                    what = await self._mend_one(index, spec, gone)
                except APPLY_ERRORS as error:
                    logger.warning("interface %s could not be mended: %s", spec.name, error)
                    delay = RETRY_DELAY if delay is None else min(delay, RETRY_DELAY)
                    continue
                if what:
                    logger.warning("interface %s was changed by another program: %s", spec.name, what)
                    self._on_repair(InterfaceRepaired(endpoint_id=spec.endpoint_id, what=what))
            if delay is not None:
                self._due |= self._indexes()
        return delay

    async def _mend_one(self, index: int, spec: InterfaceSpec, gone: bool) -> str:
        steps: list[Step] = []
        if gone:
            managed = self._managed[spec.endpoint_id]
            await self._detach(managed)
            assert managed.spec is not None
            await self._create(managed.spec)
        else:
            steps = await self._run(lambda: self._kernel.converge_link(index, spec, repair=True))
        changed = self._links_of(spec.endpoint_id)
        steps += await self._run(self._kernel.converge_routes, self._by_index(), changed)
        return "interface created again" if gone else "; ".join(map(str, steps))

    @contextlib.asynccontextmanager
    async def _exclusive(self) -> AsyncIterator[None]:
        """One change at a time, each to its end whatever becomes of who asked for it."""
        async with self._lock:
            with trio.CancelScope(shield=True):
                yield

    def greet(self, endpoint_id: str) -> None:
        """To be called when an endpoint's link has come up: tells its neighbours. Failing is no harm: they will ask."""
        managed = self._managed.get(endpoint_id)
        for one in () if managed is None else (managed, *self._children(endpoint_id)):
            if one.spec is None or not one.present:
                continue
            try:
                if self._packets is None:
                    self._packets = neighbours.open_socket()
                neighbours.greet(self._packets, one.index, one.spec)
            except OSError as error:
                logger.debug("greeting the neighbours of %s: %s", one.spec.name, error)

    # -- helpers ------------------------------------------------------------------------------------------------

    def _specs(self) -> list[InterfaceSpec]:
        return [managed.spec for managed in self._managed.values() if managed.spec is not None]

    def _by_index(self) -> dict[int, InterfaceSpec]:
        return {
            managed.index: self._fitted(managed.spec)
            for managed in self._managed.values()
            if managed.spec is not None and managed.present
        }

    def _fitted(self, spec: InterfaceSpec) -> InterfaceSpec:
        """As the kernel is to have it."""
        parent = self._managed.get(spec.trunk.parent_id) if spec.trunk is not None else None
        return spec if parent is None else spec.carried_by(parent.spec)

    def _indexes(self) -> set[int]:
        return {managed.index for managed in self._managed.values()}

    def _links_of(self, endpoint_id: str) -> set[int]:
        """The links of an endpoint and of those that its carries."""
        return {managed.index for managed in (self._managed[endpoint_id], *self._children(endpoint_id))}

    def _children(self, endpoint_id: str) -> list[_Managed]:
        """The interfaces that an endpoint's carries."""
        return [one for one in self._managed.values() if one.trunk is not None and one.trunk.parent_id == endpoint_id]

    def _waits(self, managed: _Managed) -> bool:
        """Whether an interface waits for the one that is to carry it."""
        if managed.trunk is None:
            return False
        parent = self._managed.get(managed.trunk.parent_id)
        return parent is None or not parent.present

    def _changed(self) -> None:
        self._on_change(self._specs())

    @staticmethod
    def _name(managed: _Managed) -> str:
        if managed.spec is not None:
            return managed.spec.name
        return managed.adopted.name if managed.adopted is not None else ""

    def _is_up(self, managed: _Managed) -> bool:
        """Whether frames pass over the link of an interface, or of the one that carries it."""
        by = managed if managed.trunk is None else self._managed.get(managed.trunk.parent_id)
        return by is not None and by.tap is not None and self._links.status(by.endpoint_id).up

    def _status(self, managed: _Managed, carried: LinkCounters | None = None) -> InterfaceStatus:
        """How an interface is; `carried` is what one without a link of its own has carried, where that was asked."""
        description = managed.spec.to_message() if managed.spec is not None else managed.adopted
        if not managed.present:
            reason = "the interface that carries it is gone" if self._waits(managed) else _REMOVED
            return InterfaceStatus(interface=description, state=InterfaceState.NO_LINK, last_close_reason=reason)
        if managed.trunk is not None:
            state = InterfaceState.UP if self._is_up(managed) else InterfaceState.NO_LINK
            return InterfaceStatus(interface=description, state=state, counters=carried)
        link = self._links.status(managed.endpoint_id)
        return InterfaceStatus(
            interface=description,
            state=InterfaceState.UP if link.up else InterfaceState.NO_LINK,
            link_features=sorted(link.features),
            counters=link.counters,
            last_close_reason=link.last_close_reason,
        )

    async def _run(self, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        # The limiter lets one call in at a time: the kernel's netlink socket is not for two threads at once.
        return await trio.to_thread.run_sync(lambda: function(*args, **kwargs), limiter=self._thread)


def _pending(notifications: socket.socket) -> Iterator[bytes]:
    """The notifications that have come; an empty one in place of those that were lost."""
    while True:
        try:
            yield notifications.recv(65536)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            yield b""


async def _until_quiet(nudge: trio.MemoryReceiveChannel[None]) -> None:
    """One change, also one of the agent's own, is told in many notifications: one look does for all of them."""
    with trio.move_on_after(LATEST):
        while True:
            with trio.move_on_after(QUIET) as scope:
                await nudge.receive()
            if scope.cancelled_caught:
                return


async def _close(tap: Tap, closed: trio.Event) -> None:
    with trio.CancelScope(shield=True):
        await trio.to_thread.run_sync(tap.close)
    closed.set()


def observed(link: LinkState, state: KernelState) -> Interface:
    """A description of an adopted interface out of what the kernel has."""
    defaults = [route for route in state.routes if route.index == link.index and route.destination.prefixlen == 0]
    return Interface(
        endpoint_id=link.endpoint_id,
        name=link.name,
        mac_address=link.mac,
        addresses=[str(address.address) for address in state.addresses if address.index == link.index],
        gateways=[str(route.gateway) for route in defaults if route.gateway is not None],
        mtu=link.mtu,
    )
