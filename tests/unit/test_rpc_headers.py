"""Metadata, time-outs and statuses as header fields."""

import base64
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taploom.rpc import status
from taploom.rpc.metadata import (
    decode_binary,
    decode_metadata,
    decode_timeout,
    encode_metadata,
    encode_timeout,
)
from taploom.rpc.status import RpcError, StatusCode
from taploom.rpc.wire import WireError, encode_varint, fields, read_varint

KEYS = st.from_regex(r"[a-z][a-z0-9_.-]{0,10}", fullmatch=True).filter(
    lambda key: (
        not key.endswith("-bin") and not key.startswith("grpc-") and key not in {"te", "host", "connection", "upgrade"}
    )
)
VALUES = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=20)
PAIRS = st.lists(st.tuples(KEYS, VALUES) | st.tuples(KEYS.map(lambda key: key + "-bin"), st.binary(max_size=20)))


@given(PAIRS)
def test_metadata_survives(pairs: list[tuple[str, str | bytes]]) -> None:
    assert decode_metadata(encode_metadata(pairs)) == tuple(pairs)


def test_metadata_of_the_protocol_is_left_out() -> None:
    headers = [
        (b":path", b"/a/b"),
        (b"te", b"trailers"),
        (b"grpc-timeout", b"1S"),
        (b"content-type", b"x"),
        (b"k", b"v"),
    ]
    assert decode_metadata(headers) == (("k", "v"),)


def test_binary_metadata_may_be_padded_or_joined() -> None:
    joined = base64.b64encode(b"one") + b"," + base64.b64encode(b"four").rstrip(b"=")
    assert decode_metadata([(b"k-bin", joined)]) == (("k-bin", b"one"), ("k-bin", b"four"))
    assert decode_metadata([(b"k-bin", b"!!"), (b"l", b"v")]) == (("l", "v"),)


@pytest.mark.parametrize(
    "key", ["", "Upper", "sp ace", "grpc-status", "te", "content-type", "k\n", "connection", ":path"]
)
def test_illegal_keys_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="metadata key"):
        encode_metadata({key: "value"})


def test_illegal_values_are_refused() -> None:
    with pytest.raises(ValueError, match="printable"):
        encode_metadata({"key": "line\nline"})
    with pytest.raises(ValueError, match="printable"):
        encode_metadata({"key": "ü"})
    with pytest.raises(TypeError, match="bytes"):
        encode_metadata({"key-bin": "text"})
    with pytest.raises(TypeError, match="-bin"):
        encode_metadata({"key": b"bytes"})


@given(st.binary())
def test_base64_is_decoded_or_refused(data: bytes) -> None:
    try:
        decode_binary(data)
    except ValueError:
        return


@given(st.floats(0, 1e15))
def test_a_timeout_is_never_shortened(seconds: float) -> None:
    encoded = encode_timeout(seconds)
    assert len(encoded) <= 9
    if seconds < 99_999_999 * 3600:
        decoded = decode_timeout(encoded)
        assert decoded >= seconds * (1 - 1e-12)
        assert decoded <= seconds * 1.001 + 1e-8


def test_timeouts() -> None:
    assert decode_timeout(b"10m") == 0.01
    assert decode_timeout(b"2H") == 7200
    assert encode_timeout(math.inf) == b"99999999H"
    assert encode_timeout(-1) == b"0n"
    with pytest.raises(ValueError, match="number"):
        encode_timeout(math.nan)
    for malformed in (b"", b"S", b"1", b"1s", b"123456789S", b"-1S", b"1.5S", b"1S ", b"1S\n"):
        with pytest.raises(ValueError, match="grpc-timeout"):
            decode_timeout(malformed)


@given(st.text())
def test_status_messages_survive(text: str) -> None:
    encoded = status.encode_message(text)
    assert all(" " <= character <= "~" for character in encoded)
    assert status.decode_message(encoded) == text.encode("utf-8", "replace").decode()


@given(st.text(st.characters(max_codepoint=0x7E)))
def test_any_status_message_is_decoded(text: str) -> None:
    status.decode_message(text)


def test_badly_encoded_status_messages_stay() -> None:
    assert status.decode_message("100% %zz %4") == "100% %zz %4"
    assert status.decode_message("%C3%BC%41") == "üA"


@given(st.binary())
def test_status_details_of_any_bytes(data: bytes) -> None:
    status.decode_status_details(data)


def test_status_details_survive() -> None:
    details = (status.pack_any("type.googleapis.com/x.Y", b"\x08\x01"), status.pack_any("t", b""))
    encoded = status.encode_status(StatusCode.NOT_FOUND, "no", details)
    assert status.decode_status_details(encoded) == details
    assert status.unpack_any(details[0]) == ("type.googleapis.com/x.Y", b"\x08\x01")
    with pytest.raises(WireError):
        status.unpack_any(b"\x0a\x05a")


def test_an_error_cannot_be_ok() -> None:
    with pytest.raises(ValueError, match="OK"):
        RpcError(StatusCode.OK)
    assert str(RpcError(StatusCode.NOT_FOUND, "no such network")) == "NOT_FOUND: no such network"


@given(st.integers(0, 2**64 - 1))
def test_varints_survive(value: int) -> None:
    encoded = encode_varint(value)
    assert read_varint(encoded, 0) == (value, len(encoded))


@given(st.binary())
def test_fields_of_any_bytes(data: bytes) -> None:
    try:
        list(fields(data))
    except WireError:
        return
