"""Mirrors by the kernel that this is run on: what a receiving TAP hands out is what its source had, bit for bit."""

from __future__ import annotations

import os
import select
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator

import pytest
from fabric import until

from agent_helper import links, mirrors
from agent_helper.mirrors import MirrorSpec
from taploom.contracts.taploom.link.v1 import LinkFeature
from taploom.link import Tap
from taploom.link.frames import HEADER_SIZE

pytestmark = pytest.mark.system

_ETH_P_ALL, _SOL_PACKET, _PACKET_VNET_HDR = 3, 263, 15
_MACS = bytes.fromhex("02aabbccddee021122334455")
_NEEDS_CSUM, _GSO_TCPV4 = 1, 1


class Rig:
    """A source, a receiver that takes large segments, and one that does not, in a namespace of their own. `switch` is
    what OVS has of the source."""

    def __init__(self) -> None:
        whole = {LinkFeature.VNET_HDR, LinkFeature.TSO}
        self.source, self.receiver = self._tap("tl0", whole), self._tap("tl1", whole)
        self.plain = self._tap("tl2", {LinkFeature.VNET_HDR})
        self.switch = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        self.switch.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        self.switch.bind(("tl0", _ETH_P_ALL))
        self.nft = shutil.which("nft") or "/usr/sbin/nft"

    @staticmethod
    def _tap(name: str, features: set[LinkFeature]) -> Tap:
        tap = Tap.open(name)
        links.harden(name)
        links.set_mtu(name, 1500)
        links.set_up(name)
        tap.set_offloads(features)
        tap.set_carrier(True)
        return tap

    def mirror(self, *, incoming: bool, outgoing: bool) -> None:
        specs = [MirrorSpec("source", target, incoming, outgoing) for target in ("receiver", "plain")]
        taps = {"source": "tl0", "receiver": "tl1", "plain": "tl2"}
        mirrors.load(self.nft, mirrors.ruleset(specs if incoming or outgoing else [], taps))

    def send(self, frame: bytes, *, outgoing: bool) -> None:
        """Has the source's guest send a frame, or receive it."""
        if outgoing:
            assert os.write(self.source.fileno(), frame) == len(frame)
        else:  # a packet socket's header has no num_buffers
            self.switch.send(frame[:10] + frame[HEADER_SIZE:])

    def close(self) -> None:
        for one in (self.switch, self.source, self.receiver, self.plain):
            one.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    space = links.Namespace()
    with space.entered():
        rig = Rig()
        yield rig
        rig.close()
    space.close()


def read(tap: Tap) -> list[bytes]:
    """All that waits in a TAP."""
    found = []
    while select.select([tap.fileno()], [], [], 0)[0]:
        found.append(os.read(tap.fileno(), 70_000))
    return found


def tcp(size: int, segment: int) -> bytes:
    """A TCP frame without its checksum, behind its header; `segment`: the size of what it is to be cut to; 0: not."""
    payload = os.urandom(size)
    addresses = bytes([10, 0, 0, 1, 10, 0, 0, 2])
    head = struct.pack("!BBHHHBBH", 0x45, 0, 40 + size, 1, 0, 64, socket.IPPROTO_TCP, 0) + addresses
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    pseudo = addresses + struct.pack("!HH", socket.IPPROTO_TCP, 20 + size)
    rest = struct.pack("!HHIIBBHHH", 1000, 80, 7, 9, 0x50, 0x18, 1000, 0xFFFF & ~checksum(pseudo), 0)
    gso = (_GSO_TCPV4, 54, segment) if segment else (0, 0, 0)
    header = struct.pack("<BBHHHHH", _NEEDS_CSUM, *gso, 34, 16, 0)
    return header + _MACS + b"\x08\x00" + head + rest + payload


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF & ~total


FRAMES: dict[str, Callable[[], bytes]] = {
    "tcp": lambda: tcp(1000, 0),
    "a large segment": lambda: tcp(60_000, 1448),
    "tagged": lambda: bytes(HEADER_SIZE) + _MACS + bytes.fromhex("8100006f88b5") + os.urandom(100),
    "double tagged": lambda: bytes(HEADER_SIZE) + _MACS + bytes.fromhex("88a8006f8100007788b5") + os.urandom(100),
    "no protocol's": lambda: bytes(HEADER_SIZE) + _MACS + b"\x88\xb5" + os.urandom(1486),
    "short": lambda: bytes(HEADER_SIZE) + b"\xff" * 6 + _MACS[6:] + b"\x88\xb5",
}


@pytest.mark.parametrize("kind", FRAMES)
@pytest.mark.parametrize("outgoing", [True, False], ids=["sent", "received"])
def test_bit_for_bit(rig: Rig, kind: str, outgoing: bool) -> None:
    frame = FRAMES[kind]()
    last = bytes(HEADER_SIZE) + _MACS + b"\x88\xb6" + bytes(46)
    for wanted in (True, False):
        # The other direction, and then none, is not copied.
        rig.mirror(incoming=wanted != outgoing, outgoing=wanted == outgoing)
        copies: dict[Tap, list[bytes]] = {rig.source: [], rig.receiver: [], rig.plain: []}
        rig.send(frame, outgoing=outgoing)
        # When what is copied afterwards is there, all before it is.
        rig.mirror(incoming=True, outgoing=True)
        rig.send(last, outgoing=outgoing)

        def all_there(copies: dict[Tap, list[bytes]] = copies) -> bool:
            for tap in copies:
                copies[tap] += read(tap)
            return all(last in got for got in (copies[rig.receiver], copies[rig.plain]))

        until(all_there, "the copies arrive")
        for got in (copies[rig.receiver], copies[rig.plain]):
            assert got.pop() == last
        assert copies[rig.receiver] == ([frame] if wanted else [])
        assert bool(copies[rig.plain]) is wanted
        if kind != "a large segment" or not wanted:
            assert len(copies[rig.plain]) <= 1
            continue
        # A receiver that cannot take it has it as the wire has: cut, the bytes of it in order and once.
        assert len(copies[rig.plain]) == -(-60_000 // 1448)
        assert b"".join(one[HEADER_SIZE + 54 :] for one in copies[rig.plain]) == frame[HEADER_SIZE + 54 :]


def test_what_is_left(rig: Rig) -> None:
    rig.mirror(incoming=True, outgoing=True)

    def listed() -> str:
        return subprocess.run(
            [rig.nft, "list", "ruleset"], capture_output=True, text=True, check=True, env={"LC_ALL": "C"}
        ).stdout

    assert listed().count("dup to") == 4
    rig.mirror(incoming=False, outgoing=False)
    assert listed() == ""
