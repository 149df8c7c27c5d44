"""A physical network behind a card of a helper's: a trunk that carries VLANs, each with a router and a host in it.

The switch at the trunk's far end is this process's: not every kernel has VLAN interfaces.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from test_helper_rig import in_netns, sh

from taploom.contracts.taploom.link.v1 import LinkFeature
from taploom.link import Tap

ROUTER, HOST = 1, 9  # the last parts of their addresses
# packet(7), linux/if_packet.h
_SOL_PACKET, _PACKET_AUXDATA, _PACKET_VNET_HDR, _PACKET_IGNORE_OUTGOING = 263, 8, 15, 23
_VNET_HDR = struct.Struct("=BBHHHH")  # linux/virtio_net.h: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
_NEEDS_CSUM = 1
_AUXDATA = struct.Struct("=IIIHHHH")  # struct tpacket_auxdata: status, len, snaplen, mac, net, vlan_tci, vlan_tpid
_VLAN_VALID = 0x10  # TP_STATUS_VLAN_VALID


@dataclass(frozen=True)
class Frame:
    """A frame seen on the trunk: its VLAN tag (None: none), its type, and where it came from and went."""

    tag: int | None
    kind: int
    source: str
    destination: str
    payload: bytes


@dataclass
class Lan:
    """The far side of the card. `vlans` are namespaces by tag, each with two addresses per family."""

    trunk: str
    vlans: dict[int, str] = field(default_factory=dict)

    def run(self, tag: int, *args: str, check: bool = True) -> str:
        return sh("ip", "netns", "exec", self.vlans[tag], *args, check=check)

    def ping(self, tag: int, address: str, wait: int = 10) -> bool:
        return " 0% packet loss" in self.run(tag, "ping", "-n", "-c1", f"-W{wait}", address, check=False)

    def capture(self) -> socket.socket:
        """A socket that sees what comes over the trunk, with its tags."""

        def make() -> socket.socket:
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            sock.setsockopt(_SOL_PACKET, _PACKET_AUXDATA, 1)
            sock.bind(("trunk", 0))
            sock.setblocking(False)
            return sock

        return in_netns(self.trunk, make)


def _tag(ancillary: list[tuple[int, int, bytes]]) -> int | None:
    for level, name, value in ancillary:
        if (level, name) == (_SOL_PACKET, _PACKET_AUXDATA):
            status, _, _, _, _, tci, _ = _AUXDATA.unpack(value[: _AUXDATA.size])
            return tci & 0xFFF if status & _VLAN_VALID else None
    return None


class Switch(threading.Thread):
    """Carries frames between the trunk, where they are tagged, and the VLANs' interfaces, where they are not."""

    def __init__(self, trunk: socket.socket, taps: dict[int, Tap]) -> None:
        super().__init__(name="lan")
        self._trunk, self._taps = trunk, taps
        self._reader, self._writer = os.pipe()

    def run(self) -> None:
        tags = {tap.fileno(): tag for tag, tap in self._taps.items()}
        while True:
            ready, _, _ = select.select([self._reader, self._trunk, *tags], [], [])
            if self._reader in ready:
                return
            try:
                for one in ready:
                    with contextlib.suppress(BlockingIOError):
                        self._in() if one is self._trunk else self._out(one, tags[one])
            except OSError:  # the card is gone
                return

    def _in(self) -> None:
        data, ancillary, _, _ = self._trunk.recvmsg(70000, 256)
        tap = self._taps.get(_tag(ancillary) or 0)
        if tap is not None:  # with the count of buffers that a TAP has too
            os.write(tap.fileno(), data[:10] + b"\1\0" + data[10:])

    def _out(self, fd: int, tag: int) -> None:
        data = os.read(fd, 70000)
        flags, gso, length, size, start, offset = _VNET_HDR.unpack_from(data)
        if flags & _NEEDS_CSUM:
            start, length = start + 4, length + 4 if gso else 0
        header = _VNET_HDR.pack(flags, gso, length, size, start, offset)
        self._trunk.send(header + data[12:24] + b"\x81\0" + tag.to_bytes(2) + data[24:])

    def stop(self) -> None:
        os.write(self._writer, b"x")
        self.join()
        os.close(self._reader)
        os.close(self._writer)
        self._trunk.close()
        for tap in self._taps.values():
            tap.close()


def trunk_socket(interface: str) -> socket.socket:
    """Sends and receives whole frames on an interface of the calling thread's namespace, with their tags."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    for option in (_PACKET_VNET_HDR, _PACKET_AUXDATA, _PACKET_IGNORE_OUTGOING):
        sock.setsockopt(_SOL_PACKET, option, 1)
    sock.bind((interface, 0))
    sock.setblocking(False)
    return sock


def untagged(netns: str) -> Tap:
    """An interface `lan0` in a namespace, whose frames a `Switch` tags."""
    tap = in_netns(netns, partial(Tap.open, "lan0"))
    tap.set_offloads(frozenset({LinkFeature.VNET_HDR, LinkFeature.TSO}))
    tap.set_carrier(True)
    return tap


def frames(sock: socket.socket) -> list[Frame]:
    """What has come in at a capture since it was last asked."""
    found: list[Frame] = []
    while True:
        try:
            data, ancillary, _, sender = sock.recvmsg(70000, 256)
        except BlockingIOError:
            return found
        if sender[2] != socket.PACKET_OUTGOING:
            kind = int.from_bytes(data[12:14])
            found.append(Frame(_tag(ancillary), kind, data[6:12].hex(":"), data[:6].hex(":"), data[14:]))


@contextlib.contextmanager
def lan(helper: str, card: str, vlans: dict[int, int]) -> Iterator[Lan]:
    """A physical network behind a new card in the helper's namespace.

    Args:
        vlans: by tag, the number of the subnets there: 10.77.NUMBER.0/24 and fd00:77:NUMBER::/64.
    """
    suffix = secrets.token_hex(3)
    found, taps, switch = Lan(f"tltt{suffix}"), {}, None
    sh("ip", "netns", "add", found.trunk)
    try:
        sh("ip", "-n", helper, "link", "add", card, "type", "veth", "peer", "name", "trunk", "netns", found.trunk)
        sh("ip", "-n", found.trunk, "link", "set", "trunk", "up")
        sh("ip", "-n", helper, "link", "set", card, "up")
        for tag, number in vlans.items():
            name = f"tltv{tag}{suffix}"
            sh("ip", "netns", "add", name)
            found.vlans[tag] = name
            taps[tag] = untagged(name)
            for part in (ROUTER, HOST):
                sh("ip", "-n", name, "addr", "add", f"10.77.{number}.{part}/24", "dev", "lan0")
                sh("ip", "-n", name, "addr", "add", f"fd00:77:{number}::{part}/64", "dev", "lan0", "nodad")
            for interface in ("lo", "lan0"):
                sh("ip", "-n", name, "link", "set", interface, "up")
        switch = Switch(in_netns(found.trunk, partial(trunk_socket, "trunk")), taps)
        switch.start()
        yield found
    finally:
        if switch is not None:
            switch.stop()
        for name in (found.trunk, *found.vlans.values()):
            sh("ip", "netns", "del", name, check=False)
