"""Captures: pcapng out and in, filters, and packets in a line."""

from __future__ import annotations

import struct
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_bridge.capture.filters import compile_filter
from host_bridge.capture.summary import summarise
from host_bridge.errors import InvalidError
from taploom import pcapng
from taploom.pcapng import Interface, Packet, PcapngError, Reader, Statistics

MACS = bytes.fromhex("0242ac120003 0242ac120002")


def capture(*packets: Packet) -> bytes:
    data = pcapng.section_header("test") + pcapng.interface_block(
        "web@app", snaplen=0, description="10.0.0.2", filter_text="icmp", mac=bytes(6)
    )
    for one in packets:
        data += pcapng.packet_block(one.interface, one.time_ns, one.data, one.length, one.direction)
    return data + pcapng.statistics_block(0, 2, started_ns=1, accepted=len(packets) + 5, dropped=5)


packets = st.builds(
    Packet,
    interface=st.just(0),
    time_ns=st.integers(0, 2**63),
    data=st.binary(max_size=200),
    length=st.integers(0, 2**32 - 1),
    direction=st.integers(0, 2),
)


@given(st.lists(packets, max_size=5), st.integers(1, 100))
def test_out_and_in(found: list[Packet], size: int) -> None:
    data = capture(*found)
    assert len(data) % 4 == 0
    reader = Reader()
    read = [block for start in range(0, len(data), size) for block in reader.feed(data[start : start + size])]
    assert read == [Interface("web@app", 0), *found, Statistics(0, len(found) + 5, 5)]
    assert pcapng.whole_blocks(data) == len(data)
    assert pcapng.whole_blocks(data[:-1]) == len(data) - struct.unpack("=I", data[-4:])[0]


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    for change in (data, capture()[:50] + data):
        try:
            list(Reader().feed(change))
        except PcapngError as error:
            assert str(error)


def test_others_can_read_it() -> None:
    frame = MACS + bytes.fromhex("0800 45000054000040004001e0a6ac120002ac120003 0800f7ff00010001") + bytes(56)
    data = capture(Packet(0, 1_700_000_000_123_456_789, frame, len(frame), pcapng.OUTBOUND))
    done = subprocess.run(
        ["tcpdump", "-n", "-tt", "--nano", "-r", "-"], input=data, capture_output=True, check=True, timeout=30
    )
    line = done.stdout.decode().strip()
    assert line.startswith("1700000000.123456789 IP 172.18.0.2 > 172.18.0.3: ICMP echo request, id 1, seq 1")


def test_filters() -> None:
    assert compile_filter("") == []
    assert compile_filter(" ", 96) == [(0x06, 0, 0, 96)]
    code = compile_filter("tcp port 80", 96)
    assert code[-2:] == [(0x06, 0, 0, 96), (0x06, 0, 0, 0)]
    assert compile_filter("icmp")[-2][3] == 262144
    for text in ("tcp prot 80", "port 70000", "inbound", "icmp\0", "x" * 5000):
        with pytest.raises(InvalidError, match="filter"):
            compile_filter(text)


@given(st.text(max_size=20))
def test_any_filter(text: str) -> None:
    # Words may be names, which would be looked up.
    numbers = "".join(c for c in text if not c.isalnum() and c not in ".-_")
    try:
        compile_filter(numbers)
    except InvalidError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (
            "0800 450000341c464000400600004a0a0002 0a000003 a8ca 0050 00000001 00000002 8012 01f6 0000 0000",
            "74.10.0.2:43210 > 10.0.0.3:80 tcp [S.] seq 1 ack 2 win 502, 0 bytes",
        ),
        (
            "0800 4500002000000000401100000a0000020a000003 0035 d431 000c0000",
            "10.0.0.2:53 > 10.0.0.3:54321 udp, 4 bytes",
        ),
        ("0800 4500002000000064401100000a0000020a000003 0000", "10.0.0.2 > 10.0.0.3 fragment at 800, 12 bytes"),
        ("0806 0001080006040001 0242ac120002 0a000002 000000000000 0a000003", "arp who-has 10.0.0.3 tell 10.0.0.2"),
        ("0806 0001080006040002 0242ac120002 0a000002 000000000000 0a000003", "arp 10.0.0.2 is-at 02:42:ac:12:00:02"),
        (
            "86dd 6000000000083a40 fd000000000000000000000000000002 fd000000000000000000000000000003 8000000000070001",
            "fd00::2 > fd00::3 icmp6 echo request id 7 seq 1, 8 bytes",
        ),
        (
            "86dd 6000000000100040 fd000000000000000000000000000002 ff020000000000000000000000000016"
            "3a00050200000000 8f00000000000000",
            "fd00::2 > ff02::16 icmp6 multicast listener report, 8 bytes",
        ),
        (
            "8100 0007 86dd 60000000000c1140 fd000000000000000000000000000002 fd000000000000000000000000000003"
            "0001000200000000",
            "vlan 7 [fd00::2]:1 > [fd00::3]:2 udp, 4 bytes",
        ),
        ("88cc 0000", "02:42:ac:12:00:02 > 02:42:ac:12:00:03 ethertype 0x88cc, 100 bytes"),
        ("0800 45", "cut off, 100 bytes"),
    ],
)
def test_lines(body: str, line: str) -> None:
    assert summarise(MACS + bytes.fromhex(body), 100) == line


@given(st.binary(max_size=120), st.sampled_from(["0800", "86dd", "0806", "8100"]))
def test_any_frame(data: bytes, kind: str) -> None:
    assert summarise(MACS + bytes.fromhex(kind) + data, 1500)
    assert summarise(data, len(data))
