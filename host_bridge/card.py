"""A guest without an agent: a VM whose one network card QEMU carries over a Unix socket (`-netdev stream`).

Nobody in it can be told anything: its endpoint is made at the helper, DHCP tells it its addresses, and the frames of
its card are handed on to the endpoint's link while it has one. The card's stream stays while networks come and go.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable, Iterable

import trio

from host_bridge import qmp
from host_bridge.model import CardPlace, EndpointRecord, GuestRecord
from host_bridge.names import clean_text
from host_bridge.peer import Failure, PeerInfo, PeerState
from host_bridge.waiting import Backoff, KeyedSignal, Signal
from taploom.address import AddressError, UnixAddress, connect, open_listener, set_buffers
from taploom.link import Attachment, Dataplane
from taploom.link.plug import CARD, LINK, Plug
from taploom.link.splice import plain_socket

logger = logging.getLogger("taploom.bridge.card")

_CONNECT_TIMEOUT = 5.0
NETDEV = "net0"
"""The id of QEMU's -netdev, by which its carrier is set."""


class CardGuest:
    """The network card of a guest without an agent.

    It answers what a guest's agent is asked (`Peer`), as one that has whatever it is to have: there is nothing to tell.

    Args:
        record: the guest.
        dataplane: what carries its frames.
        on_change: called when the card was plugged in or out.
    """

    def __init__(self, record: GuestRecord, dataplane: Dataplane, *, on_change: Callable[[], None]) -> None:
        place = record.card
        assert place is not None, "a guest without an agent"
        self.record = record
        self.place: CardPlace = place
        self.subject = f"guest {record.name}"
        self.state = PeerState.DOWN
        self.problem = self._unplugged()
        self.since = _now()
        self.instances = 0  # how often it was plugged in
        self.info: PeerInfo | None = None
        self.changes = KeyedSignal()
        self._on_change = on_change
        self._dataplane = dataplane
        self._plug: Plug | None = None
        self._attachment: Attachment | None = None
        self._serial = 0
        self._card = 0  # the serial of the card's stream; 0: unplugged
        self._links: dict[int, Callable[[str], None]] = {}  # by serial: what is told of its end
        self._changed = Signal()
        self._told: tuple[int, bool] | None = None  # what QEMU was told of the carrier, of which stream of the card

    # What an agent would answer

    @property
    def connected(self) -> bool:
        """True while the card is plugged in."""
        return self.state is PeerState.OK

    def touch(self, key: str) -> None:
        """Nothing is to be told."""

    def has(self, key: str) -> bool:
        """Whatever it is to have."""
        return True

    def settled(self, key: str) -> bool:
        """At once."""
        return True

    def failure(self, key: str) -> Failure | None:
        """It refuses nothing."""
        return None

    def failures(self) -> dict[str, Failure]:
        """It refuses nothing."""
        return {}

    def wanted_keys(self) -> Iterable[str]:
        """Nothing is to be told."""
        return ()

    def forgive(self, key: str) -> None:
        """It has refused nothing."""

    def waits_for(self, key: str) -> str:
        """For nothing."""
        return ""

    def leaves(self, endpoint: EndpointRecord) -> str:
        """All of it: that is known of a guest without an agent."""
        return ""

    async def wait_gone(self, key: str) -> None:
        """Nothing of it is in the VM."""
        await trio.lowlevel.checkpoint()

    async def retire(self, within: float) -> None:
        """There is nobody to tell."""
        await trio.lowlevel.checkpoint()

    def renamed(self, record: GuestRecord) -> None:
        """Says that the guest's name is another now."""
        self.record = record
        self.subject = f"guest {record.name}"

    # The card

    async def run(self) -> None:
        """Offers the place where the card is plugged in, or looks for it there, until cancelled."""
        token = trio.lowlevel.current_trio_token()

        def lost(side: int, serial: int, reason: str) -> None:
            token.run_sync_soon(self._lost, side, serial, reason)

        def make(loop: object, _end: Callable[[str], None]) -> Plug:
            self._plug = Plug(loop, lost)  # type: ignore[arg-type]  # it is the data plane's loop
            return self._plug

        self._attachment = self._dataplane.attach(make, lambda _reason: None)
        try:
            async with trio.open_nursery() as nursery:
                if self.record.settings.card_qmp:
                    nursery.start_soon(self._keep_carrier)
                await (self._dial() if self.place.qemu_listens else self._listen())
        finally:
            self._dataplane.end_attachment(self._attachment)
            self._card, self._links = 0, {}
            self._set_state(PeerState.DOWN, self._unplugged())

    async def _keep_carrier(self) -> None:
        """Has QEMU show the machine a carrier while its card is on a network."""
        path = self.record.settings.card_qmp
        backoff = Backoff()
        while True:
            await self._changed.until(lambda: bool(self._card) and self._told != (self._card, bool(self._links)))
            card, up = self._card, bool(self._links)
            try:
                await qmp.execute(path, "set_link", name=NETDEV, up=up)
            except qmp.QmpError as error:
                logger.warning("%s: the carrier of its network card cannot be set: %s", self.subject, error)
                await trio.sleep(backoff.next(trio.current_time()))
            else:
                self._told = (card, up)
                backoff.reset()

    async def _listen(self) -> None:
        backoff = Backoff()
        while True:
            try:
                listener = await open_listener(UnixAddress(self.place.path))
            except (OSError, AddressError) as error:
                text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                self._set_state(PeerState.DOWN, f"{self.subject} has no place for its network card: {text}")
                await trio.sleep(backoff.next(trio.current_time()))
                continue
            self._set_state(PeerState.DOWN, self._unplugged())
            async with listener:
                while True:
                    # In place of one that is there: it may be about to be seen to have ended.
                    self._plugged(await listener.accept())

    async def _dial(self) -> None:
        backoff = Backoff()
        while True:
            try:
                stream = await connect(UnixAddress(self.place.path), timeout=_CONNECT_TIMEOUT)
            except (OSError, AddressError) as error:
                text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                self._set_state(PeerState.DOWN, f"{self._unplugged()}: {text}")
            else:
                self._plugged(stream)
                since = trio.current_time()
                await self._changed.until(lambda: not self._card)
                if trio.current_time() - since > 1.0:
                    backoff.reset()
            await trio.sleep(backoff.next(trio.current_time()))

    def _plugged(self, stream: trio.SocketStream) -> None:
        self._card = self._put(CARD, stream)
        self.instances += 1
        logger.info("%s has its network card plugged in at %s", self.subject, self.place)
        self._set_state(PeerState.OK, "")

    def _put(self, side: int, stream: trio.SocketStream) -> int:
        sock = plain_socket(stream.socket)
        set_buffers(sock)
        self._serial += 1
        serial = self._serial

        def put() -> None:
            assert self._plug is not None, "the data plane runs calls in turn"
            self._plug.set(side, sock, serial)

        self._dataplane.call(put)
        return serial

    def join(self, stream: trio.SocketStream, on_down: Callable[[str], None]) -> int:
        """Hands frames on between the card and a data link, which is taken over; returns what `part` is told.

        ``on_down(reason)`` is called when it breaks by itself; a link before it is closed without being told.
        """
        self._links.clear()
        serial = self._put(LINK, stream)
        self._links[serial] = on_down
        self._changed.notify()
        return serial

    def part(self, serial: int) -> None:
        """Closes the data link, if it is still the one that `join` returned this for."""
        if self._links.pop(serial, None) is not None:
            self._dataplane.call(lambda: self._plug.clear(LINK, serial) if self._plug is not None else None)
            self._changed.notify()

    def _lost(self, side: int, serial: int, reason: str) -> None:
        if side == LINK:
            on_down = self._links.pop(serial, None)
            if on_down is not None:
                self._changed.notify()
                on_down(reason)
        elif serial == self._card:
            self._card = 0
            logger.info("%s: %s", self.subject, reason)
            self._set_state(PeerState.DOWN, self._unplugged())

    def _unplugged(self) -> str:
        who = "QEMU does not listen" if self.place.qemu_listens else "QEMU is not connected"
        return f"{who} at {self.place.path}"

    def crashed(self) -> None:
        """Says that `run` has ended by an internal error."""
        self._set_state(PeerState.DOWN, f"the bridge failed at {self.subject}: see its log")

    def _set_state(self, state: PeerState, problem: str) -> None:
        if state is not self.state:
            self.since = _now()
        self.state, self.problem = state, clean_text(problem)
        self._changed.notify()
        self.changes.notify_all()
        self._on_change()


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
