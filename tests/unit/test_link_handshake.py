"""The handshake's messages."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from taploom.contracts.taploom.link.v1 import (
    LinkFeature,
    LinkHello,
    LinkReady,
    LinkRefusal,
    LinkRefused,
    LinkReply,
    StreamProtocol,
    StreamTarget,
)
from taploom.link.handshake import (
    MAX_MESSAGE,
    HandshakeError,
    RefusedError,
    check_hello,
    check_reply,
    decode_length,
    decode_message,
    encode_message,
    negotiate,
    ready,
    receive_message,
    refused,
)

VNET, TSO, USO = LinkFeature.VNET_HDR, LinkFeature.TSO, LinkFeature.USO
SECRET = bytes(range(16))
HELLO = LinkHello(version=1, endpoint_id="e1", secret=SECRET, features=[VNET, TSO])


def test_bytes_on_the_wire() -> None:
    """The example of protos/README.md."""
    assert encode_message(HELLO) == bytes.fromhex(
        "0000001c 0801 12026531 1a10 000102030405060708090a0b0c0d0e0f 22020102"
    )
    assert ready(1, {TSO, VNET}) == bytes.fromhex("00000008 0a06 0801 12020102")


def test_bytes_of_a_stream_on_the_wire() -> None:
    """The example of protos/README.md."""
    target = StreamTarget(protocol=StreamProtocol.TCP, address="172.18.0.2", port=80)
    assert encode_message(LinkHello(version=1, secret=SECRET, stream=target)) == bytes.fromhex(
        "00000026 0801 1a10 000102030405060708090a0b0c0d0e0f 2a10 0801 120a 3137322e31382e302e32 1850"
    )


@pytest.mark.parametrize(
    "target",
    [
        StreamTarget(protocol=StreamProtocol.TCP, address="172.18.0.2", port=80),
        StreamTarget(protocol=StreamProtocol.UDP, address="fd00::2", port=65535),
        StreamTarget(protocol=StreamProtocol.UDP, token=SECRET),
    ],
)
def test_valid_streams(target: StreamTarget) -> None:
    check_hello(LinkHello(version=1, secret=SECRET, stream=target))


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        ({"endpoint_id": "e1"}, LinkRefusal.MALFORMED),
        ({"features": [VNET]}, LinkRefusal.MALFORMED),
        ({"secret": b"short"}, LinkRefusal.MALFORMED),
        ({"version": 0}, LinkRefusal.VERSION),
        ({"stream": StreamTarget()}, LinkRefusal.MALFORMED),
        ({"stream": StreamTarget(address="10.0.0.1", port=80)}, LinkRefusal.MALFORMED),
    ],
)
def test_streams_that_are_not_valid(fields: dict[str, Any], refusal: LinkRefusal) -> None:
    target = StreamTarget(protocol=StreamProtocol.TCP, address="10.0.0.1", port=80)
    with pytest.raises(HandshakeError) as caught:
        check_hello(LinkHello(**({"version": 1, "secret": SECRET, "stream": target} | fields)))
    assert caught.value.refusal == refusal


@pytest.mark.parametrize(
    "fields",
    [
        {"address": "", "port": 80},
        {"address": "10.0.0.1", "port": 0},
        {"address": "10.0.0.1", "port": 65536},
        {"address": "10.0.0.1/24", "port": 80},
        {"address": "localhost", "port": 80},
        {"address": "0.0.0.0", "port": 80},
        {"address": "::", "port": 80},
        {"address": "224.0.0.1", "port": 80},
        {"address": "fe80::1%eth0", "port": 80},
        {"address": "10.0.0.1", "port": 80, "token": SECRET},
        {"token": b"short"},
        {"token": bytes(65)},
        {"token": SECRET, "port": 80},
    ],
)
def test_targets_that_are_not_valid(fields: dict[str, Any]) -> None:
    target = StreamTarget(protocol=StreamProtocol.TCP, **fields)
    with pytest.raises(HandshakeError) as caught:
        check_hello(LinkHello(version=1, secret=SECRET, stream=target))
    assert caught.value.refusal == LinkRefusal.MALFORMED


def test_protocol_of_a_newer_host() -> None:
    hello = decode_message(
        LinkHello,
        bytes.fromhex("0801 1a10 000102030405060708090a0b0c0d0e0f 2a10 0804 120a")
        + b"172.18.0.2"
        + bytes.fromhex("1850"),
    )
    with pytest.raises(HandshakeError, match="protocol 4") as caught:
        check_hello(hello)
    assert caught.value.refusal == LinkRefusal.UNAVAILABLE


@given(st.text(max_size=50), st.integers(0, 2**32 - 1), st.binary(max_size=70), st.integers(0, 3))
def test_any_target_is_valid_or_refused(address: str, port: int, token: bytes, protocol: int) -> None:
    target = StreamTarget(protocol=StreamProtocol(protocol), address=address, port=port, token=token)
    try:
        check_hello(LinkHello(version=1, secret=SECRET, stream=target))
    except HandshakeError as error:
        assert str(error)
    else:
        assert bool(address) != bool(token)
        assert protocol


@given(st.binary(max_size=200))
def test_any_bytes_are_a_hello_or_a_handshake_error(data: bytes) -> None:
    try:
        check_hello(decode_message(LinkHello, data))
    except HandshakeError as error:
        assert str(error)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_reply_or_an_error(data: bytes) -> None:
    try:
        check_reply(decode_message(LinkReply, data), {VNET, TSO, USO})
    except (HandshakeError, RefusedError) as error:
        assert str(error)


@given(st.integers(0, len(bytes(HELLO)) - 1), st.integers(0, 255))
def test_damaged_hellos_are_refused_or_still_valid(position: int, byte: int) -> None:
    data = bytearray(bytes(HELLO))
    data[position] = byte
    try:
        check_hello(decode_message(LinkHello, bytes(data)))
    except HandshakeError:
        return


@given(st.integers(1, len(bytes(HELLO)) - 1))
def test_truncated_hello_is_refused(size: int) -> None:
    data = bytes(HELLO)[:size]
    try:
        hello = decode_message(LinkHello, data)
    except HandshakeError:
        return
    # Cut between two fields: the missing ones have their defaults.
    assert bytes(HELLO).startswith(bytes(hello))


@pytest.mark.parametrize("length", [0, MAX_MESSAGE + 1, 0xFFFFFFFF])
def test_lengths_beyond_the_limits(length: int) -> None:
    with pytest.raises(HandshakeError, match="1 to 4096"):
        decode_length(struct.pack(">I", length))


def test_message_that_is_too_large_is_not_sent() -> None:
    with pytest.raises(ValueError, match="1 to 4096"):
        encode_message(LinkHello(secret=bytes(MAX_MESSAGE)))


@pytest.mark.parametrize(
    ("hello", "refusal"),
    [
        (LinkHello(version=0, endpoint_id="e", secret=SECRET), LinkRefusal.VERSION),
        (LinkHello(version=1, endpoint_id="", secret=SECRET), LinkRefusal.MALFORMED),
        (LinkHello(version=1, endpoint_id="e" * 65, secret=SECRET), LinkRefusal.MALFORMED),
        (LinkHello(version=1, endpoint_id="a/b", secret=SECRET), LinkRefusal.MALFORMED),
        (LinkHello(version=1, endpoint_id="e\n", secret=SECRET), LinkRefusal.MALFORMED),
        (LinkHello(version=1, endpoint_id="e", secret=SECRET[:15]), LinkRefusal.MALFORMED),
        (LinkHello(version=1, endpoint_id="e", secret=bytes(65)), LinkRefusal.MALFORMED),
        (LinkHello(version=1, endpoint_id="e", secret=SECRET, features=[VNET] * 65), LinkRefusal.MALFORMED),
    ],
)
def test_hellos_that_are_refused(hello: LinkHello, refusal: LinkRefusal) -> None:
    with pytest.raises(HandshakeError) as caught:
        check_hello(hello)
    assert caught.value.refusal == refusal


def test_newer_dialler_and_unknown_features_are_welcome() -> None:
    sent = LinkHello(version=7, endpoint_id="e1", secret=SECRET, features=[VNET, LinkFeature(99)])
    hello = decode_message(LinkHello, bytes(sent))
    check_hello(hello)
    assert negotiate(hello.features, {VNET, TSO}) == {VNET}


def test_negotiation() -> None:
    assert negotiate([VNET, TSO, USO], {VNET, TSO}) == {VNET, TSO}
    assert negotiate([TSO], {VNET, TSO}) == frozenset()
    assert negotiate([VNET, TSO], {TSO}) == frozenset()
    assert negotiate([], {VNET, TSO}) == frozenset()
    assert negotiate([VNET, VNET], {VNET}) == {VNET}


def test_replies() -> None:
    accepted = decode_message(LinkReply, ready(1, {VNET})[4:])
    assert check_reply(accepted, {VNET, TSO}) == {VNET}
    with pytest.raises(RefusedError, match=r"UNAUTHORIZED.*no\?entry") as caught:
        check_reply(decode_message(LinkReply, refused(LinkRefusal.UNAUTHORIZED, "no\nentry")[4:]), ())
    assert caught.value.refusal == LinkRefusal.UNAUTHORIZED
    long = decode_message(LinkReply, refused(LinkRefusal.UNAVAILABLE, "x" * 5000)[4:])
    assert long.refused is not None
    assert len(long.refused.message) == 200


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (LinkReply(), "neither ready nor refused"),
        (LinkReply(ready=LinkReady(version=0)), "link version 0"),
        (LinkReply(ready=LinkReady(version=2)), "link version 2"),
        (LinkReply(ready=LinkReady(version=1, features=[VNET, TSO])), "not asked for"),
        (LinkReply(ready=LinkReady(version=1, features=[USO])), "without VNET_HDR"),
    ],
)
def test_replies_that_are_refused(reply: LinkReply, message: str) -> None:
    with pytest.raises(HandshakeError, match=message):
        check_reply(reply, {VNET, USO})


def test_unknown_refusal_reason() -> None:
    with pytest.raises(RefusedError, match="link refused"):
        check_reply(decode_message(LinkReply, bytes(LinkReply(refused=LinkRefused(reason=LinkRefusal(77))))), ())


async def test_receiving_leaves_the_next_byte_in_the_stream() -> None:
    a, b = trio.testing.memory_stream_pair()
    await a.send_all(encode_message(HELLO) + b"frame")
    hello = await receive_message(b, LinkHello)
    assert (hello.endpoint_id, hello.secret, hello.features) == ("e1", SECRET, [VNET, TSO])
    assert await b.receive_some() == b"frame"


@pytest.mark.parametrize("size", [0, 3, 4, 10])
async def test_stream_that_ends_early(size: int) -> None:
    a, b = trio.testing.memory_stream_pair()
    await a.send_all(encode_message(HELLO)[:size])
    await a.aclose()
    with pytest.raises(HandshakeError, match="closed the stream"):
        await receive_message(b, LinkHello)
