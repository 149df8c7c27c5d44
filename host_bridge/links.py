"""The data links: one task per endpoint that dials both ends, watches the relay, and dials again.

A link is dialled as soon as guest and helper both have the endpoint. Each end accepts a dial that presents the secret
it was given over the control connection, once; the first secrets travel with the descriptions themselves, which saves
a round trip on connect. The first dial begins beside them, where the helper can have that: the guest's hello is what
waits until both have the endpoint, so its interface comes up when there is a path behind it.
"""

from __future__ import annotations

import datetime
import ipaddress
import logging
from typing import Any

import trio

from host_bridge.card import CardGuest
from host_bridge.guest_peer import GuestPeer
from host_bridge.helper_peer import HelperPeer
from host_bridge.names import clean_text
from host_bridge.peer import MOST_PATIENCE, Peer, rpc_reason
from host_bridge.waiting import Backoff, Signal
from taploom.address import AddressError
from taploom.contracts.taploom.helper.v1 import Endpoint
from taploom.contracts.taploom.link.v1 import LinkCounters, LinkFeature
from taploom.link import (
    Dataplane,
    DataplaneError,
    FeatureMismatchError,
    LinkError,
    close_relay,
    dial_link,
    new_secret,
    open_relay,
)
from taploom.link.frames import encode_frame
from taploom.link.handshake import HandshakeError, RefusedError
from taploom.neighbours import ALL_NODES, arp, discovery
from taploom.patience import Patience
from taploom.rpc import RpcError

logger = logging.getLogger("taploom.bridge.links")

# A link that broke sooner than this after it came up is dialled again with back-off, not at once.
STABLE_AFTER = 1.0
DIAL_TIMEOUT = 10.0  # of the first attempt, both handshakes included

AnyGuest = GuestPeer | CardGuest


class _NotToBeError(Exception):
    """A dial that began early has ended too early: the next one begins when both agents have the endpoint."""


class DataLink:
    """The link of one endpoint.

    Attributes:
        up: True while frames can pass.
        problem: why it is not up, for people.
        since: since when it is up, or not.
        generation: counts how often it has been up; 0 before the first time.
        changes: notified when any of these, or something that it waits for, changed.
    """

    def __init__(self, endpoint_id: str, label: str, guest: AnyGuest, helper: HelperPeer, dataplane: Dataplane) -> None:
        self.endpoint_id = endpoint_id
        self.label = label
        self.guest = guest
        self.helper = helper
        # The agents that have to do with it.
        self.peers: tuple[Peer[Any], ...] = (guest, helper) if isinstance(guest, GuestPeer) else (helper,)
        self.up = False
        self.removed = False
        self.problem = ""
        self.since = _now()
        self.generation = 0
        self.features: frozenset[LinkFeature] = frozenset()
        self.changes = Signal()
        self.scope = trio.CancelScope()
        self._dataplane = dataplane
        # Secrets that an agent has accepted and that no dial has used; those that are on their way to one; and those
        # that a dial has used meanwhile.
        self._secrets: dict[Peer[Any], bytes] = {}
        self._sent: dict[Peer[Any], bytes] = {}
        self._spent: set[bytes] = set()
        self._down: str | None = None
        self._common: frozenset[LinkFeature] | None = None
        self._patience = Patience(DIAL_TIMEOUT, MOST_PATIENCE * DIAL_TIMEOUT)

    def secret_accepted(self, peer: Peer[Any], secret: bytes) -> None:
        """Says that an agent accepted a secret along with the endpoint's description."""
        if self._sent.get(peer) == secret:
            del self._sent[peer]
        if secret in self._spent:
            self._spent.discard(secret)
        else:
            self._secrets[peer] = secret

    def secret_sent(self, peer: Peer[Any], secret: bytes) -> None:
        """Says that a secret is going to an agent along with the endpoint's description."""
        self._sent[peer] = secret
        self.changes.notify()

    def connection_changed(self, peer: Peer[Any]) -> None:
        """Says that a control connection came or went: what an agent accepted before it restarted is void."""
        if not peer.connected:
            self._secrets.pop(peer, None)
            self._sent.pop(peer, None)
        self.changes.notify()

    def bounce(self, reason: str, generation: int) -> None:
        """Dials again, unless the link of that generation is gone already."""
        if self.up and generation == self.generation:
            self._broken(generation, reason)

    def counters(self) -> LinkCounters | None:
        """What the relay has carried since the first dial: bytes only; None before."""
        try:
            return self._dataplane.counters(self.endpoint_id)
        except KeyError:
            return None

    def waits_for(self) -> str:
        """Why the link is not up, for people; empty when it is."""
        if self.up:
            return ""
        for peer in self.peers:
            if not peer.connected:
                return peer.problem
        for peer in self.peers:
            if peer.failure(self.endpoint_id) is not None:
                return peer.waits_for(self.endpoint_id)
        for peer in self.peers:
            if not peer.has(self.endpoint_id):
                return peer.waits_for(self.endpoint_id)
        return self.problem or "the link is being dialled"

    async def run(self) -> None:
        """Keeps the link up until the scope is cancelled."""
        backoff = Backoff(first=0.01, early_cap=0.2, cap=2.0)
        try:
            with self.scope:
                while True:
                    await self.changes.until(lambda: self._ready() or self._may_be_early())
                    try:
                        await self._dial()
                    except _NotToBeError:
                        continue
                    except RpcError as error:
                        self._failed(rpc_reason(error))
                    except LinkError as error:
                        self._failed(self._explained(error))
                        if isinstance(error, FeatureMismatchError):
                            self._common = error.common
                    except DataplaneError:
                        raise
                    except Exception:
                        # A bug that one link runs into must not end the others.
                        logger.exception("internal error with the link of %s", self.label)
                        self._failed("the bridge failed at this link: see its log")
                    else:
                        came_up = trio.current_time()
                        await self.changes.until(lambda: self._down is not None)
                        self._failed(self._down or "")
                        if trio.current_time() - came_up > STABLE_AFTER:
                            backoff.reset()
                            continue
                    await trio.sleep(backoff.next(trio.current_time()))
        finally:
            self.up = False
            self.changes.notify()
            await self._close()

    async def _close(self) -> None:
        await close_relay(self._dataplane, self.endpoint_id)

    @property
    def passes(self) -> bool:
        """True while frames can pass from end to end."""
        return self.up

    def _ready(self) -> bool:
        return all(peer.has(self.endpoint_id) for peer in self.peers)

    def _may_be_early(self) -> bool:
        assert isinstance(self.guest, GuestPeer)
        guest_knows = self.guest in self._sent or self.guest in self._secrets
        return self.helper.takes_early_links and self.helper in self._sent and guest_knows

    def _is_not_to_be(self) -> bool:
        """Whether an agent is gone or has refused the endpoint, so that a dial that began early leads nowhere."""
        return any(not p.connected or p.failure(self.endpoint_id) is not None for p in self.peers)

    async def _until_ready(self) -> None:
        await self.changes.until(lambda: self._ready() or self._is_not_to_be())
        if not self._ready():
            raise HandshakeError("an agent has not accepted the endpoint")

    async def _dial(self) -> None:
        assert isinstance(self.guest, GuestPeer)
        early = not self._ready()
        if early:
            secrets = self._secrets | self._sent
            self._secrets, self._sent, self._spent = {}, {}, set(secrets.values())
        else:
            secrets = await self._accepted_secrets()
        generation = self.generation + 1
        self._down = None
        try:
            with self._patience.attempt(LinkError) as within:
                self.features = await open_relay(
                    self._dataplane,
                    self.endpoint_id,
                    guest=self.guest.data_address,
                    helper=self.helper.data_address,
                    endpoint_id=self.endpoint_id,
                    guest_secret=secrets[self.guest],
                    helper_secret=secrets[self.helper],
                    features=self._wanted_features(),
                    on_down=lambda reason: self._broken(generation, reason),
                    when=self._until_ready if early else None,
                    timeout=within,
                )
        except LinkError as error:
            if early and not isinstance(error, FeatureMismatchError):
                raise _NotToBeError from error
            raise
        self._is_up(generation)

    def _is_up(self, generation: int) -> None:
        self.generation = generation
        self.up = True
        self.since = _now()
        self.problem = ""
        logger.info("link of %s is up", self.label)
        self.changes.notify()

    async def _accepted_secrets(self) -> dict[Peer[Any], bytes]:
        secrets: dict[Peer[Any], bytes] = {}
        errors: list[RpcError] = []
        async with trio.open_nursery() as nursery:
            for peer in self.peers:
                accepted = self._secrets.pop(peer, None)
                if accepted is not None:
                    secrets[peer] = accepted
                else:
                    nursery.start_soon(self._authorize, peer, secrets, errors)
        if errors:
            raise errors[0]
        return secrets

    async def _authorize(self, peer: Peer[Any], secrets: dict[Peer[Any], bytes], errors: list[RpcError]) -> None:
        secret = new_secret()
        try:
            await peer.authorize(self.endpoint_id, secret, peer.call_timeout)
        except RpcError as error:
            errors.append(error)
        else:
            secrets[peer] = secret

    def _wanted_features(self) -> frozenset[LinkFeature]:
        wanted = frozenset(LinkFeature)
        for peer in self.peers:
            wanted &= peer.info.link_features if peer.info is not None else frozenset()
        if self._common is not None:
            wanted &= self._common
        # TSO and USO describe fields of the header.
        return wanted if LinkFeature.VNET_HDR in wanted else frozenset()

    def _broken(self, generation: int, reason: str) -> None:
        # The relay may break between open_relay's return and the next lines of _dial; the generation is known here.
        self._down = reason
        self.up = False
        self.since = _now()
        self.problem = clean_text(reason)
        logger.warning("link of %s (generation %d) is down: %s", self.label, generation, self.problem)
        self.changes.notify()

    def _failed(self, reason: str) -> None:
        self.up = False
        if reason != self.problem:
            logger.warning("link of %s: %s", self.label, reason)
        self.problem = reason
        self.changes.notify()

    def _explained(self, error: LinkError) -> str:
        where = {"helper": f" ({self.helper.data_address})"}
        if isinstance(self.guest, GuestPeer):
            where["guest"] = f" ({self.guest.data_address})"
        return clean_text(f"cannot open the data link at {error.side}{where.get(error.side, '')}: {error.reason}")


class CardLink(DataLink):
    """The link of a guest without an agent: one to the helper, joined with the guest's network card.

    It is up, whether the card is plugged in or not: as a cable that is in the switch already.
    """

    def __init__(
        self, endpoint_id: str, label: str, guest: CardGuest, helper: HelperPeer, dataplane: Dataplane
    ) -> None:
        super().__init__(endpoint_id, label, guest, helper, dataplane)
        self._card = guest
        self._joined = 0

    @property
    def passes(self) -> bool:
        """True while frames can pass from end to end."""
        return self.up and self._card.connected

    def counters(self) -> LinkCounters | None:
        """The helper counts."""
        return None

    async def _close(self) -> None:
        self._card.part(self._joined)
        await trio.lowlevel.checkpoint()

    def _may_be_early(self) -> bool:
        return False

    async def _dial(self) -> None:
        secrets = await self._accepted_secrets()
        generation = self.generation + 1
        self._down = None
        try:
            with self._patience.attempt(LinkError) as within:
                stream = await self._dial_helper(secrets[self.helper], within)
        except (OSError, AddressError, HandshakeError, RefusedError, trio.BrokenResourceError) as error:
            raise LinkError("helper", str(error)) from error
        await self._announce(stream)
        self._joined = self._card.join(stream, lambda reason: self._broken(generation, reason))
        self._is_up(generation)

    async def _dial_helper(self, secret: bytes, within: float) -> trio.SocketStream:
        with trio.move_on_after(within):
            stream, self.features = await dial_link(
                self.helper.data_address, endpoint_id=self.endpoint_id, secret=secret, features=()
            )
            return stream
        raise LinkError("helper", f"no answer within {within:g} s")

    async def _announce(self, stream: trio.SocketStream) -> None:
        """Tells the network whose addresses these are now, as agents do for their guests: who knew another card under
        one of them would go on sending there."""
        endpoint = self.helper.wanted(self.endpoint_id)
        if not isinstance(endpoint, Endpoint):
            return
        mac = bytes.fromhex(endpoint.mac_address.replace(":", ""))
        frames = b""
        for text in endpoint.addresses:
            address = ipaddress.ip_address(text)
            if isinstance(address, ipaddress.IPv4Address):
                frames += encode_frame(arp(mac, address, address))
            else:
                frames += encode_frame(discovery(mac, address, ALL_NODES, address, advertise=True))
        try:
            await stream.send_all(frames)
        except trio.BrokenResourceError as error:
            raise LinkError("helper", str(error)) from error


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
