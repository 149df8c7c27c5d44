"""Connection attempts of containers to the host are answered as the host answers them.

A listener that takes connections for any port has accepted before it can ask whether anybody is there: everything would
look open. So the rules drop the SYN of each such connection, of which this has a copy from a packet socket; once the
host has answered, the SYN is given to the kernel again with a source MAC address by which the rules know the answer:
let it in, or refuse it. The frames come from routers whose MAC addresses are given; no container can send these.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from agent_helper.firewall import LET_IN, REFUSED
from agent_helper.unreachable import checksum

logger = logging.getLogger("taploom.helper.door")

Knock = Callable[[tuple[str, int], tuple[str, int], str, Callable[[bool], None]], Awaitable[None]]
Origin = Callable[[str, str], tuple[str, str] | None]

MAX_FRAME: Final = 2048
_ETH_P = {4: 0x0800, 6: 0x86DD}  # if_ether.h
_SO_ATTACH_FILTER: Final = 26
_TCP: Final = 6
_ETHERNET: Final = 14
# Of the TCP header: FIN, SYN, RST and ACK, of which only SYN may be set.
_FLAGS, _SYN = 0x17, 0x02
# linux/bpf_common.h: (code, if true, if false, constant); the packet starts with its Ethernet header.
_FILTERS = {
    4: (
        (0x30, 0, 0, _ETHERNET + 9),  # ldb: protocol
        (0x15, 0, 7, _TCP),
        (0x28, 0, 0, _ETHERNET + 6),  # ldh: fragment offset
        (0x45, 5, 0, 0x1FFF),
        (0xB1, 0, 0, _ETHERNET),  # ldxb: header length
        (0x50, 0, 0, _ETHERNET + 13),  # ldb [x + ...]
        (0x54, 0, 0, _FLAGS),
        (0x15, 0, 1, _SYN),
        (0x06, 0, 0, MAX_FRAME),
        (0x06, 0, 0, 0),
    ),
    6: (
        (0x30, 0, 0, _ETHERNET + 6),  # ldb: next header
        (0x15, 0, 4, _TCP),
        (0x30, 0, 0, _ETHERNET + 40 + 13),
        (0x54, 0, 0, _FLAGS),
        (0x15, 0, 1, _SYN),
        (0x06, 0, 0, MAX_FRAME),
        (0x06, 0, 0, 0),
    ),
}


class Door:
    """Holds back connections to the host until the host has answered.

    Args:
        origin: from the source and destination of a packet on the uplink, the network that it came from and the address
            of the host's that it was sent to; None when it is not for the host.
        knock: asks the host; gets (source, port), (destination, port), the network's id and what to call with the
            answer. It may go on after the answer.
    """

    def __init__(self, origin: Origin, knock: Knock) -> None:
        self._origin = origin
        self._knock = knock
        self._listening: list[trio.socket.SocketType] = []
        self._back: socket.socket | None = None
        self._opened = trio.Event()
        self._waiting: set[bytes] = set()

    def open(self, interface: str, outer: str) -> None:
        """Starts to listen on the kernel's end of the uplink; SYNs are given back by way of its other end.

        Raises:
            OSError: no such interface, or no CAP_NET_RAW.
        """
        with contextlib.ExitStack() as cleanup:
            socks = []
            for version, program in _FILTERS.items():
                # Bound to one protocol, it gets what comes in and not what goes out (packet(7)).
                sock = cleanup.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
                sock.setblocking(False)
                _attach(sock, program)
                sock.bind((interface, _ETH_P[version]))
                socks.append(sock)
            back = cleanup.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
            back.setblocking(False)
            back.bind((outer, 0))
            cleanup.pop_all()
        self._listening = [trio.socket.from_stdlib_socket(sock) for sock in socks]
        self._back = back
        self._opened.set()

    def close(self) -> None:
        """Stops to listen; nothing when it does not."""
        for sock in self._listening:
            sock.close()
        if self._back is not None:
            self._back.close()
        self._listening, self._back, self._opened = [], None, trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answers, until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    await self._opened.wait()
                    async with trio.open_nursery() as listeners:
                        for sock in self._listening:
                            listeners.start_soon(self._listen, sock, nursery)
        finally:
            self.close()

    async def _listen(self, sock: trio.socket.SocketType, nursery: trio.Nursery) -> None:
        while True:
            try:
                frame = await sock.recv(MAX_FRAME)
            except trio.ClosedResourceError:
                return
            except OSError as exc:
                logger.debug("the uplink: %s", exc)
                if sock.fileno() < 0:
                    return
                continue
            if frame[6:12] not in (LET_IN, REFUSED):
                self._came(frame, nursery)

    def _came(self, frame: bytes, nursery: trio.Nursery) -> None:
        try:
            source, destination = endpoints(frame)
        except (struct.error, ValueError):  # cut short
            return
        origin = self._origin(source[0], destination[0])
        key = frame[_ETHERNET:]
        if origin is None or key in self._waiting:  # sent again while the host is asked
            return
        network_id, address = origin
        self._waiting.add(key)

        def answer(let_in: bool) -> None:
            if key in self._waiting:
                self._waiting.discard(key)
                self._give_back(frame, LET_IN if let_in else REFUSED)

        async def knock() -> None:
            try:
                await self._knock(source, (address, destination[1]), network_id, answer)
            finally:
                self._waiting.discard(key)

        nursery.start_soon(knock)

    def _give_back(self, frame: bytes, mac: bytes) -> None:
        if self._back is not None:
            with contextlib.suppress(OSError):  # the container sends it again
                self._back.send(frame[:6] + mac + with_checksum(frame)[12:])


def _attach(sock: socket.socket, program: tuple[tuple[int, int, int, int], ...]) -> None:
    """Attaches a classic BPF program (socket(7))."""
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: unsigned short, padding, pointer
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(program), ctypes.addressof(buffer)))


def _tcp_at(frame: bytes) -> int:
    if frame[_ETHERNET] >> 4 == 6:
        return _ETHERNET + 40
    return _ETHERNET + 4 * (frame[_ETHERNET] & 0xF)


def endpoints(frame: bytes) -> tuple[tuple[str, int], tuple[str, int]]:
    """Source and destination, address and port, of a frame with TCP in IPv4 or IPv6 without extension headers.

    Raises:
        struct.error, ValueError: it is too short.
    """
    if len(frame) < _ETHERNET + 20:
        raise ValueError("too short")
    source_port, destination_port = struct.unpack_from(">HH", frame, _tcp_at(frame))
    if frame[_ETHERNET] >> 4 == 6:
        family, first, middle, last = socket.AF_INET6, 22, 38, 54
    else:
        family, first, middle, last = socket.AF_INET, 26, 30, 34
    source = socket.inet_ntop(family, frame[first:middle])
    return (source, source_port), (socket.inet_ntop(family, frame[middle:last]), destination_port)


def with_checksum(frame: bytes) -> bytes:
    """The frame with its TCP checksum, which the sender may have left to the hardware (RFC 9293, 3.1)."""
    at = _tcp_at(frame)
    if frame[_ETHERNET] >> 4 == 6:
        end = _ETHERNET + 40 + int.from_bytes(frame[_ETHERNET + 4 : _ETHERNET + 6], "big")
        addresses = frame[22:54]
    else:
        end = _ETHERNET + int.from_bytes(frame[_ETHERNET + 2 : _ETHERNET + 4], "big")
        addresses = frame[26:34]
    segment = frame[at : at + 16] + b"\0\0" + frame[at + 18 : end]
    data = addresses + struct.pack(">II", len(segment), _TCP) + segment
    return frame[: at + 16] + struct.pack(">H", checksum(data)) + frame[at + 18 :]
