"""The data links: one task per endpoint that dials both ends, watches the relay, and dials again.

A link is dialled as soon as guest and helper both have the endpoint. Each end accepts a dial that presents the secret
it was given over the control connection, once; the first secrets travel with the descriptions themselves, which saves
a round trip on connect. The first dial begins beside them, where the helper can have that: the guest's hello is what
waits until both have the endpoint, so its interface comes up when there is a path behind it.
"""

from __future__ import annotations

import datetime
import logging
from typing import Any

import trio

from host_bridge.guest_peer import GuestPeer
from host_bridge.helper_peer import HelperPeer
from host_bridge.names import clean_text
from host_bridge.peer import MOST_PATIENCE, Peer, rpc_reason
from host_bridge.waiting import Backoff, Signal
from taploom.contracts.taploom.link.v1 import LinkCounters, LinkFeature
from taploom.link import Dataplane, DataplaneError, FeatureMismatchError, LinkError, close_relay, new_secret, open_relay
from taploom.link.handshake import HandshakeError
from taploom.patience import Patience
from taploom.rpc import RpcError

logger = logging.getLogger("taploom.bridge.links")

# A link that broke sooner than this after it came up is dialled again with back-off, not at once.
STABLE_AFTER = 1.0
DIAL_TIMEOUT = 10.0  # of the first attempt, both handshakes included


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

    def __init__(
        self, endpoint_id: str, label: str, guest: GuestPeer, helper: HelperPeer, dataplane: Dataplane
    ) -> None:
        self.endpoint_id = endpoint_id
        self.label = label
        self.guest = guest
        self.helper = helper
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
        for peer in (self.guest, self.helper):
            if not peer.connected:
                return peer.problem
        for peer in (self.guest, self.helper):
            if peer.failure(self.endpoint_id) is not None:
                return peer.waits_for(self.endpoint_id)
        for peer in (self.guest, self.helper):
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
            await close_relay(self._dataplane, self.endpoint_id)

    def _ready(self) -> bool:
        return self.guest.has(self.endpoint_id) and self.helper.has(self.endpoint_id)

    def _may_be_early(self) -> bool:
        guest_knows = self.guest in self._sent or self.guest in self._secrets
        return self.helper.takes_early_links and self.helper in self._sent and guest_knows

    def _is_not_to_be(self) -> bool:
        """Whether an agent is gone or has refused the endpoint, so that a dial that began early leads nowhere."""
        return any(not p.connected or p.failure(self.endpoint_id) is not None for p in (self.guest, self.helper))

    async def _until_ready(self) -> None:
        await self.changes.until(lambda: self._ready() or self._is_not_to_be())
        if not self._ready():
            raise HandshakeError("an agent has not accepted the endpoint")

    async def _dial(self) -> None:
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
            for peer in (self.guest, self.helper):
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
        for peer in (self.guest, self.helper):
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
        where = {"guest": f" ({self.guest.data_address})", "helper": f" ({self.helper.data_address})"}
        return clean_text(f"cannot open the data link at {error.side}{where.get(error.side, '')}: {error.reason}")


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
