"""The dialling side: the host opens both ends of a link and relays between them."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

import trio

from taploom.address import Address, AddressError, connect
from taploom.contracts.taploom.link.v1 import LinkFeature, LinkHello, LinkRefusal, LinkReply
from taploom.link.dataplane import Dataplane
from taploom.link.handshake import (
    LINK_VERSION,
    HandshakeError,
    RefusedError,
    check_reply,
    encode_message,
    negotiate,
    receive_message,
)

__all__ = ["FeatureMismatchError", "LinkError", "close_relay", "dial_link", "open_relay"]

logger = logging.getLogger("taploom.link.dial")


class LinkError(Exception):
    """A link cannot be opened.

    ``side``: "guest", "helper" or "both"; ``refusal``: the listener's reason, if it gave one.
    """

    def __init__(self, side: str, reason: str, refusal: LinkRefusal | None = None) -> None:
        super().__init__(f"{side}: {reason}")
        self.side: Final = side
        self.reason: Final = reason
        self.refusal: Final = refusal


class FeatureMismatchError(LinkError):
    """The two sides granted different features. ``common``: what to ask for in the next try, with new secrets."""

    def __init__(self, guest: frozenset[LinkFeature], helper: frozenset[LinkFeature]) -> None:
        super().__init__("both", f"the guest grants the features {_names(guest)}, the helper {_names(helper)}")
        self.common: Final = negotiate(guest, helper)


async def dial_link(
    address: Address,
    *,
    endpoint_id: str,
    secret: bytes,
    features: Iterable[LinkFeature],
    early: bool = False,
    when: Callable[[], Awaitable[None]] | None = None,
) -> tuple[trio.SocketStream, frozenset[LinkFeature]]:
    """Connect to a data port and do the handshake; the stream's next byte in either direction is a frame's first.

    ``early``: the listener may not have been told of the link yet. ``when``: awaited between connecting and the hello.
    Raises OSError, AddressError, HandshakeError, RefusedError or trio.BrokenResourceError.
    """
    wanted = frozenset(features)
    stream = await connect(address)
    try:
        if when is not None:
            await when()
        hello = LinkHello(
            version=LINK_VERSION, endpoint_id=endpoint_id, secret=secret, features=sorted(wanted), early=early
        )
        await stream.send_all(encode_message(hello))
        return stream, check_reply(await receive_message(stream, LinkReply), wanted)
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise


async def open_relay(
    dataplane: Dataplane,
    link_id: str,
    *,
    guest: Address,
    helper: Address,
    endpoint_id: str,
    guest_secret: bytes,
    helper_secret: bytes,
    features: Iterable[LinkFeature],
    on_down: Callable[[str], None],
    when: Callable[[], Awaitable[None]] | None = None,
    timeout: float = 10.0,  # noqa: ASYNC109 - part of what the LinkError says
) -> frozenset[LinkFeature]:
    """Dial both data ports at once, do both handshakes, and relay between the two streams.

    With ``when``, which is awaited before the guest's handshake, the helper need not have been told of the link yet:
    all that does not wait for the path behind the helper is done meanwhile, and the guest's interface comes up, and
    greets its neighbours, once that path is there.

    A relay of the same id is replaced and its counters go on. ``on_down(reason)`` is called in trio's thread when
    the relay breaks, not after ``close_relay``. Returns the features of the link. Raises LinkError when a side
    cannot be reached within ``timeout`` seconds or refuses, and FeatureMismatchError, which says what both granted,
    when they differ: ask for the features that both sides' GetInfo names.
    """
    wanted = frozenset(features)
    results: dict[str, tuple[trio.SocketStream, frozenset[LinkFeature]]] = {}
    errors: list[LinkError] = []
    done = False
    try:
        with trio.move_on_after(timeout):
            async with trio.open_nursery() as nursery:

                async def dial(side: str, address: Address, secret: bytes) -> None:
                    early = when is not None and side == "helper"
                    try:
                        results[side] = await dial_link(
                            address,
                            endpoint_id=endpoint_id,
                            secret=secret,
                            features=wanted,
                            early=early,
                            when=None if early else when,
                        )
                    except (OSError, AddressError, HandshakeError, trio.BrokenResourceError) as error:
                        errors.append(LinkError(side, str(error)))
                    except RefusedError as error:
                        errors.append(LinkError(side, str(error), error.refusal))
                    if errors:
                        nursery.cancel_scope.cancel()

                nursery.start_soon(dial, "guest", guest, guest_secret)
                nursery.start_soon(dial, "helper", helper, helper_secret)
        if errors:
            raise errors[0]
        missing = [side for side in ("guest", "helper") if side not in results]
        if missing:
            side = missing[0] if len(missing) == 1 else "both"
            raise LinkError(side, f"no answer within {timeout:g} s")
        (guest_stream, guest_features), (helper_stream, helper_features) = results["guest"], results["helper"]
        if guest_features != helper_features:
            raise FeatureMismatchError(guest_features, helper_features)
        await dataplane.stop(link_id)
        dataplane.attach_relay(link_id, guest_stream, helper_stream, on_down)
        done = True
        return guest_features
    finally:
        if not done:
            for stream, _ in results.values():
                await trio.aclose_forcefully(stream)


async def close_relay(dataplane: Dataplane, link_id: str) -> None:
    """End the relay and forget its counters; unknown ids are no error."""
    await dataplane.detach(link_id)


def _names(features: Iterable[LinkFeature]) -> str:
    return ", ".join(feature.name or str(int(feature)) for feature in sorted(features)) or "none"
