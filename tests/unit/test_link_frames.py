"""The frame codec."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taploom.contracts.taploom.link.v1 import LinkFeature
from taploom.link.frames import FrameDecoder, FrameError, FrameScanner, encode_frame

VNET, TSO, USO = LinkFeature.VNET_HDR, LinkFeature.TSO, LinkFeature.USO
ALL = frozenset({VNET, TSO, USO})
feature_sets = st.sampled_from([frozenset(), frozenset({VNET}), frozenset({VNET, TSO}), frozenset({VNET, USO}), ALL])
sizes = st.one_of(st.integers(14, 100), st.sampled_from([1514, 65550, 65553]))


def header(
    flags: int = 0,
    gso_type: int = 0,
    hdr_len: int = 0,
    gso_size: int = 0,
    csum_start: int = 0,
    csum_offset: int = 0,
    num_buffers: int = 0,
) -> bytes:
    return struct.pack("<BBHHHHH", flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers)


@given(st.data(), feature_sets)
def test_frames_survive_any_cutting(data: st.DataObject, features: frozenset[LinkFeature]) -> None:
    prefix = bytes(12) if VNET in features else b""
    frames = [prefix + bytes([size % 251]) * size for size in data.draw(st.lists(sizes, max_size=8))]
    stream = b"".join(map(encode_frame, frames))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=30)))
    decoder = FrameDecoder(features)
    got = []
    for start, end in itertools.pairwise([0, *cuts, len(stream)]):
        got += decoder.feed(stream[start:end])
    assert got == frames
    assert decoder.pending == 0


@given(st.lists(st.binary(max_size=200), max_size=10), feature_sets)
def test_any_bytes_give_frames_or_frame_error(chunks: list[bytes], features: frozenset[LinkFeature]) -> None:
    decoder = FrameDecoder(features)
    try:
        for chunk in chunks:
            for frame in decoder.feed(chunk):
                assert decoder.scanner.min_length <= len(frame) <= decoder.scanner.max_length
    except FrameError as error:
        assert str(error)
    else:
        assert decoder.pending < 4 + decoder.scanner.max_length


@given(st.binary(min_size=12, max_size=12), sizes, feature_sets)
def test_accepted_headers_point_into_their_frame(raw: bytes, size: int, features: frozenset[LinkFeature]) -> None:
    if VNET not in features:
        return
    try:
        FrameScanner(features).check_header(raw, size)
    except FrameError:
        return
    flags, gso_type, hdr_len, gso_size, start, offset, _ = struct.unpack("<BBHHHHH", raw)
    assert hdr_len <= size
    assert flags <= 3
    if flags & 1:
        assert features & {TSO, USO}
        assert start >= 14
        assert start + offset + 2 <= size
    if gso_type:
        assert flags & 1
        assert 1 <= gso_size <= size
        assert gso_type == 5 if gso_type & 0x7F == 5 else TSO in features


@pytest.mark.parametrize(
    ("features", "low", "high"), [(frozenset(), 14, 65553), (frozenset({VNET}), 26, 65565), (ALL, 26, 65565)]
)
def test_length_limits(features: frozenset[LinkFeature], low: int, high: int) -> None:
    for length in (low, high):
        assert FrameDecoder(features).feed(struct.pack(">I", length) + bytes(length)) == [bytes(length)]
    for length in (0, 1, low - 1, high + 1, 0x7FFFFFFF, 0xFFFFFFFF):
        with pytest.raises(FrameError, match=rf"frame length {length} is not in {low}\.\.{high}"):
            FrameDecoder(features).feed(struct.pack(">I", length))


def test_frames_in_single_bytes() -> None:
    frames = [bytes(12) + bytes([n]) * (14 + n) for n in range(20)]
    decoder = FrameDecoder(ALL)
    assert [frame for byte in b"".join(map(encode_frame, frames)) for frame in decoder.feed(bytes([byte]))] == frames


def test_frames_before_a_violation_are_found() -> None:
    data = encode_frame(bytes(60)) + encode_frame(bytes(61)) + b"\xff\xff\xff\xff"
    frames: list[memoryview] = []
    with pytest.raises(FrameError):
        FrameScanner(()).scan(memoryview(data), 0, len(data), frames)
    assert [len(frame) for frame in frames] == [60, 61]


GOOD = [
    ({VNET}, header()),
    ({VNET}, header(flags=2)),
    ({VNET}, header(hdr_len=100)),
    ({VNET}, header(num_buffers=77)),
    ({VNET, TSO}, header(flags=1, csum_start=34, csum_offset=16)),
    ({VNET, TSO}, header(flags=1, gso_type=1, hdr_len=66, gso_size=40, csum_start=34, csum_offset=16)),
    ({VNET, TSO}, header(flags=1, gso_type=4, hdr_len=66, gso_size=40, csum_start=54, csum_offset=16)),
    ({VNET, TSO}, header(flags=1, gso_type=0x81, hdr_len=66, gso_size=40, csum_start=34, csum_offset=16)),
    ({VNET, USO}, header(flags=1, gso_type=5, hdr_len=42, gso_size=20, csum_start=34, csum_offset=6)),
    ({VNET, TSO}, header(flags=1, csum_start=82, csum_offset=16)),  # ends with the frame
]
BAD = [
    ({VNET}, header(flags=1, csum_start=34, csum_offset=16), "flags"),
    (ALL, header(flags=4), "flags"),
    (ALL, header(flags=0x80), "flags"),
    ({VNET}, header(gso_type=1, gso_size=40), "gso_type 0x1 is not agreed"),
    ({VNET, TSO}, header(flags=1, gso_type=5, gso_size=40, csum_start=34, csum_offset=6), "gso_type 0x5"),
    ({VNET, USO}, header(flags=1, gso_type=1, gso_size=40, csum_start=34, csum_offset=6), "gso_type 0x1"),
    (ALL, header(flags=1, gso_type=3, gso_size=40, csum_start=34, csum_offset=6), "gso_type 0x3"),
    (ALL, header(flags=1, gso_type=2, gso_size=40, csum_start=34, csum_offset=6), "gso_type 0x2"),
    (ALL, header(flags=1, gso_type=0x80, gso_size=40, csum_start=34, csum_offset=6), "gso_type 0x80"),
    (ALL, header(flags=1, gso_type=0x85, gso_size=40, csum_start=34, csum_offset=6), "gso_type 0x85"),
    (ALL, header(gso_type=1, gso_size=40), "without NEEDS_CSUM"),
    (ALL, header(flags=1, gso_type=1, csum_start=34, csum_offset=16), "gso_size 0"),
    (ALL, header(flags=1, gso_type=1, gso_size=101, csum_start=34, csum_offset=16), "gso_size 101"),
    (ALL, header(gso_size=40), "gso_size without"),
    (ALL, header(flags=1, csum_start=83, csum_offset=16), "outside its frame"),
    (ALL, header(flags=1, csum_start=0xFFFF, csum_offset=0xFFFF), "outside its frame"),
    (ALL, header(flags=1, csum_start=13, csum_offset=16), "outside its frame"),
    (ALL, header(csum_start=34), "without NEEDS_CSUM"),
    (ALL, header(hdr_len=101), "hdr_len 101"),
]


@pytest.mark.parametrize(("features", "raw"), GOOD)
def test_good_headers(features: set[LinkFeature], raw: bytes) -> None:
    frame = raw + bytes(100)
    assert FrameDecoder(features).feed(encode_frame(frame)) == [frame]


@pytest.mark.parametrize(("features", "raw", "message"), BAD)
def test_bad_headers_are_refused_before_the_frame_is_complete(
    features: frozenset[LinkFeature], raw: bytes, message: str
) -> None:
    with pytest.raises(FrameError, match=message):
        FrameDecoder(features).feed(struct.pack(">I", 112) + raw)


@given(st.permutations([54, 60, 1514, 1515, 65550]), st.data())
def test_a_header_that_was_right_is_judged_by_each_frame(sizes: list[int], data: st.DataObject) -> None:
    raws = [
        header(flags=1, csum_start=34, csum_offset=16),
        header(flags=1, gso_type=1, hdr_len=54, gso_size=1448, csum_start=34, csum_offset=16),
        header(flags=1, gso_type=1, hdr_len=1515, gso_size=40, csum_start=34, csum_offset=16),
        header(flags=1, csum_start=1496, csum_offset=16),
    ]
    scanner = FrameScanner(ALL)
    for size in sizes:
        raw = data.draw(st.sampled_from(raws))
        try:
            FrameScanner(ALL).check_header(raw, size)
        except FrameError:
            expected = False
        else:
            expected = True
        stream = memoryview(encode_frame(raw + bytes(size)))
        if expected:
            assert scanner.scan(stream, 0, len(stream), []) == len(stream)
        else:
            with pytest.raises(FrameError):
                scanner.scan(stream, 0, len(stream), [])


def test_headers_that_are_remembered_are_few() -> None:
    scanner = FrameScanner(ALL)
    for number in range(5000):
        stream = memoryview(encode_frame(header(num_buffers=number) + bytes(60)))
        assert scanner.scan(stream, 0, len(stream), []) == len(stream)
    assert len(scanner._sizes) <= 256


def test_offload_features_need_the_header() -> None:
    for features in ({TSO}, {USO}, {TSO, USO}):
        with pytest.raises(ValueError, match="need VNET_HDR"):
            FrameScanner(features)


def test_qemu_framing_without_features() -> None:
    """QEMU's net/stream.c: a 32-bit big-endian length and the frame."""
    arp = bytes.fromhex("ffffffffffff525400123456080600010800060400015254001234560a0000010000000000000a000002")
    assert encode_frame(arp) == struct.pack(">I", 42) + arp
    assert FrameDecoder(()).feed(struct.pack(">I", 42) + arp) == [arp]


@given(frames=st.lists(st.binary(min_size=14, max_size=200), min_size=1, max_size=5), data=st.data())
def test_what_is_missing_completes_the_frame(frames: list[bytes], data: st.DataObject) -> None:
    stream = memoryview(b"".join(encode_frame(frame) for frame in frames))
    cut = data.draw(st.integers(0, len(stream)))
    scanner = FrameScanner(())
    found: list[memoryview] = []
    rest = scanner.scan(stream, 0, cut, found)
    missing = scanner.missing(stream, rest, cut)
    assert (missing > 0) == (cut - rest >= 4)
    if missing:
        assert scanner.scan(stream, rest, cut + missing, found) == cut + missing
        assert [bytes(frame) for frame in found] == frames[: len(found)]
