"""The gate in front of h2: frame limits, floods, GOAWAY."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taploom.rpc.gate import (
    PREFACE,
    FloodLimits,
    FrameGate,
    GateError,
    GoAway,
    TokenBucket,
    goaway_frame,
)

DATA, HEADERS, RST, SETTINGS, PING, GOAWAY, WINDOW, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
LIMITS = FloodLimits(control_burst=5, control_rate=1, reset_burst=3, reset_rate=1, window_burst=4, window_rate=1)


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream_id: int = 0) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big") + payload


def opened(*, server: bool = False) -> FrameGate:
    gate = FrameGate(server=server, limits=LIMITS)
    start = (PREFACE if server else b"") + frame(SETTINGS)
    assert b"".join(item for item in gate.feed(start, 0.0) if isinstance(item, bytes)) == start
    return gate


def feed(gate: FrameGate, data: bytes, now: float = 0.0) -> list[bytes | GoAway]:
    return list(gate.feed(data, now))


FRAMES = st.lists(
    st.builds(frame, st.just(DATA), st.binary(min_size=1, max_size=40), st.just(0), st.just(1))
    | st.builds(frame, st.just(HEADERS), st.binary(max_size=40), st.just(4), st.just(1))
    | st.builds(goaway_frame, st.integers(0, 2**31 - 1), st.integers(0, 13), st.binary(max_size=20)),
    max_size=10,
)


@given(FRAMES, st.lists(st.integers(1, 30), min_size=1))
def test_frames_pass_in_any_segmentation_and_goaways_come_out(frames: list[bytes], sizes: list[int]) -> None:
    gate = FrameGate(server=True)
    data = PREFACE + frame(SETTINGS) + b"".join(frames)
    passed = b""
    goaways: list[GoAway] = []
    position = turn = 0
    while position < len(data):
        size = sizes[turn % len(sizes)]
        for item in gate.feed(data[position : position + size], 0.0):
            if isinstance(item, GoAway):
                goaways.append(item)
            else:
                passed += item
        position += size
        turn += 1
    expected = [item for item in frames if item[3] != GOAWAY]
    assert passed == PREFACE + frame(SETTINGS) + b"".join(expected)
    assert [goaway_frame(g.last_stream_id, g.error_code, g.debug_data) for g in goaways] == [
        item for item in frames if item[3] == GOAWAY
    ]


@given(st.binary(max_size=100), st.booleans())
def test_any_bytes_pass_or_raise_gate_error(data: bytes, server: bool) -> None:
    gate = FrameGate(server=server)
    try:
        feed(gate, data)
    except GateError:
        return


def test_a_wrong_preface_is_refused() -> None:
    with pytest.raises(GateError, match="preface"):
        feed(FrameGate(server=True), b"GET / HTTP/1.1\r\n")


def test_the_first_frame_must_be_settings() -> None:
    with pytest.raises(GateError, match="not SETTINGS"):
        feed(FrameGate(server=False), frame(PING, bytes(8)))
    with pytest.raises(GateError, match="not SETTINGS"):
        feed(FrameGate(server=False), frame(SETTINGS, flags=1))


def test_a_long_frame_is_refused_by_its_header() -> None:
    with pytest.raises(GateError, match="16385 bytes"):
        feed(opened(), frame(DATA, bytes(16_385))[:9])


def test_a_short_goaway_is_refused() -> None:
    with pytest.raises(GateError, match="GOAWAY"):
        feed(opened(), frame(GOAWAY, bytes(7)))


@pytest.mark.parametrize(
    ("item", "count", "reason"),
    [
        (frame(PING, bytes(8)), 5, "control"),
        (frame(SETTINGS), 5, "control"),
        (frame(DATA, b"", 0, 1), 5, "control"),
        (frame(DATA, b"\x00x", 8, 1), 5, "control"),
        (frame(0x55, b"?"), 5, "control"),
        (frame(RST, bytes(4), 0, 1), 3, "reset"),
        (frame(WINDOW, bytes(4), 0, 1), 4, "WINDOW_UPDATE"),
    ],
)
def test_floods_are_refused(item: bytes, count: int, reason: str) -> None:
    gate = FrameGate(server=False, limits=LIMITS)
    feed(gate, frame(SETTINGS))
    settings = 1 if reason == "control" else 0
    feed(gate, item * (count - settings))
    with pytest.raises(GateError, match=reason):
        feed(gate, item)


def test_what_floods_in_an_instant_is_fine_over_time() -> None:
    gate = opened()
    for second in range(100):
        feed(gate, frame(PING, bytes(8)), float(second))


def test_data_allows_for_pings_and_data_sent_for_window_updates() -> None:
    gate = opened()
    for _ in range(100):
        feed(gate, frame(DATA, b"x", 0, 1) + frame(PING, bytes(8)))
    for _ in range(100):
        gate.data_sent(1)
        feed(gate, frame(WINDOW, bytes(4)) * 4)


def test_a_long_header_block_is_refused() -> None:
    gate = FrameGate(server=False, max_header_block=1000)
    feed(gate, frame(SETTINGS) + frame(HEADERS, bytes(600), 0, 1))
    with pytest.raises(GateError, match="header block"):
        feed(gate, frame(CONTINUATION, bytes(600), 4, 1))


def test_refused_streams_count_as_resets() -> None:
    gate = opened()
    for _ in range(3):
        gate.stream_refused(0.0)
    with pytest.raises(GateError, match="reset"):
        gate.stream_refused(0.0)


def test_streams_that_we_open_may_be_reset() -> None:
    gate = opened()
    for _ in range(50):
        gate.stream_opened()
        feed(gate, frame(RST, bytes(4), 0, 1))


def test_informational_responses_count_as_control_frames() -> None:
    gate = opened()
    with pytest.raises(GateError, match="informational"):
        for _ in range(6):
            gate.informational_response(0.0)


def test_token_bucket() -> None:
    bucket = TokenBucket(2, 1)
    assert [bucket.take(0.0) for _ in range(3)] == [True, True, False]
    assert bucket.take(1.0)
    assert not bucket.take(1.0)
    bucket.give(10)
    assert [bucket.take(1.0) for _ in range(3)] == [True, True, False]
