"""A capture, in a process of its own: frames from packet sockets (packet(7)) to standard output, in pcapng.

What it costs, it costs here and not on the thread that moves frames. The kernel applies the filter and cuts frames off;
when nobody reads standard output, the kernel's queue fills up, and what does not fit there is dropped and counted. What
to capture is one line of JSON on standard input, whose end ends the capture. Standard error says why it ended, in one
line.
"""

from __future__ import annotations

import array
import contextlib
import errno
import gc
import json
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from taploom import __version__, pcapng

STOPPED, COMPLETE, GONE = "stopped", "complete", "gone"
WRONG_FILTER: Final = "the kernel refuses the filter"

# linux/if_packet.h and asm-generic/socket.h
_SOL_PACKET: Final = 263
_PACKET_STATISTICS: Final = 6
_PACKET_AUXDATA: Final = 8
_PACKET_IGNORE_OUTGOING: Final = 23
_PACKET_OUTGOING: Final = 4
_ETH_P_ALL: Final = 3
_SO_ATTACH_FILTER: Final = 26
_SO_RCVBUFFORCE: Final = 33
_SO_TIMESTAMPNS: Final = 35
_TP_STATUS_VLAN_VALID: Final = 1 << 4
_TP_STATUS_VLAN_TPID_VALID: Final = 1 << 6
_AUXDATA = struct.Struct("=IIIHHHH")
_TIMESPEC = struct.Struct("=qq")
_STATISTICS = struct.Struct("=II")
_INSTRUCTION = struct.Struct("=HBBI")
_PROGRAM = struct.Struct("@HP")
_ANCILLARY = 256

_MAX_FRAME = 262144
_RETURN = 0x06  # BPF_RET | BPF_K
# What the kernel keeps while nobody reads; 64 KiB frames take more than their size.
_RECEIVE_BUFFER = 16 << 20
_BATCH_FRAMES = 64
_BATCH_BYTES = 256 << 10
_STATISTICS_INTERVAL = 1.0  # s between blocks that tell of drops
_NICE = 5


class _GoneError(Exception):
    """The interface is not there any more."""


@dataclass
class _Source:
    number: int
    sock: socket.socket
    incoming_only: bool
    accepted: int = 0  # by the filter, dropped ones included
    dropped: int = 0
    taken: int = 0  # from the kernel's queue
    delivered: int = 0
    told: int = 0  # of `dropped`

    def count(self) -> None:
        """Add what the kernel has counted since it was asked before."""
        try:
            packets, drops = _STATISTICS.unpack(self.sock.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, _STATISTICS.size))
        except OSError:
            return
        self.accepted += packets
        self.dropped += drops

    def statistics(self, started_ns: int) -> bytes:
        self.told = self.dropped
        return pcapng.statistics_block(
            self.number,
            time.time_ns(),
            started_ns=started_ns,
            accepted=self.delivered + self.dropped,
            dropped=self.dropped,
        )


class _Worker:
    def __init__(self, config: dict[str, Any]) -> None:
        self._snaplen: int = config["snaplen"] or _MAX_FRAME
        self._left: float = config["max_packets"] or float("inf")
        duration = config["max_duration_ms"]
        self._deadline: float = time.monotonic() + duration / 1000 if duration else float("inf")
        program = [tuple(one) for one in config["filter"]] or [(_RETURN, 0, 0, self._snaplen)]
        self._buffer = memoryview(bytearray(_MAX_FRAME))
        self._started_ns = time.time_ns()
        blocks = [pcapng.section_header(f"taploom {__version__}")]
        self._sources: dict[int, _Source] = {}
        for number, one in enumerate(config["interfaces"]):
            sock = _open(one["tap"], program, config["direction"])
            self._sources[sock.fileno()] = _Source(number, sock, config["direction"] == "in")
            blocks.append(
                pcapng.interface_block(
                    one["name"],
                    snaplen=config["snaplen"],
                    description=one["description"],
                    filter_text=config["filter_text"],
                    mac=bytes.fromhex(one["mac"]),
                )
            )
        _write(blocks)

    def run(self) -> str:
        """Capture until it is over; returns why it is."""
        poller = select.poll()
        poller.register(0, select.POLLIN)
        poller.register(1, 0)  # errors: nobody reads any more
        for fd in self._sources:
            poller.register(fd, select.POLLIN)
        last: dict[int, bytes] = {}
        due = time.monotonic() + _STATISTICS_INTERVAL
        reason = ""
        while not reason:
            now = time.monotonic()
            if now >= due:
                due = now + _STATISTICS_INTERVAL
                self._tell_drops()
            wait = min(due, self._deadline) - now
            for fd, _ in poller.poll(max(0.0, wait) * 1000):
                if fd in (0, 1):
                    reason = STOPPED
                    continue
                source = self._sources[fd]
                try:
                    self._drain(source)
                except _GoneError:
                    poller.unregister(fd)
                    del self._sources[fd]
                    source.count()
                    last[source.number] = source.statistics(self._started_ns)
            if self._left <= 0 or time.monotonic() >= self._deadline:
                reason = reason or COMPLETE
            elif not self._sources:
                reason = reason or GONE
        for source in self._sources.values():
            source.count()
            self._finish(source)
            last[source.number] = source.statistics(self._started_ns)
        _write([last[number] for number in sorted(last)])
        return reason

    def _finish(self, source: _Source) -> None:
        """Write what the kernel had for us when it was over, and no more: there may be no end to it."""
        with contextlib.suppress(_GoneError):
            while self._left > 0 and (waiting := source.accepted - source.dropped - source.taken) > 0:
                if not self._drain(source, min(waiting, _BATCH_FRAMES)):
                    return

    def _tell_drops(self) -> None:
        blocks = []
        for source in self._sources.values():
            source.count()
            if source.dropped != source.told:
                blocks.append(source.statistics(self._started_ns))
        if blocks:
            _write(blocks)

    def _drain(self, source: _Source, most: int = _BATCH_FRAMES) -> int:
        """Write what is there, up to a bound; returns how many frames were there."""
        before = source.taken
        blocks: list[bytes] = []
        size = 0
        buffer, receive, number = self._buffer, source.sock.recvmsg_into, source.number
        for _ in range(most):
            if self._left <= 0 or size >= _BATCH_BYTES:
                break
            try:
                kept, ancillary, _, address = receive([buffer], _ANCILLARY, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    continue
                _write(blocks)
                raise _GoneError from error
            source.taken += 1
            outgoing = address[2] == _PACKET_OUTGOING
            if source.incoming_only and not outgoing:
                continue
            data: bytes | memoryview = buffer[:kept]
            length, time_ns = kept, 0
            for level, kind, value in ancillary:
                if level == _SOL_PACKET and kind == _PACKET_AUXDATA:
                    status, length, _, _, _, tci, tpid = _AUXDATA.unpack(value)
                    if status & _TP_STATUS_VLAN_VALID:  # the kernel has taken the tag out
                        tag = struct.pack("!HH", tpid if status & _TP_STATUS_VLAN_TPID_VALID else 0x8100, tci)
                        data, length = bytes(data[:12]) + tag + data[12:], length + 4
                elif level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS:
                    seconds, nanoseconds = _TIMESPEC.unpack(value)
                    time_ns = seconds * 10**9 + nanoseconds
            # What goes out of the TAP comes in at the guest.
            direction = pcapng.INBOUND if outgoing else pcapng.OUTBOUND
            blocks.append(pcapng.packet_block(number, time_ns or time.time_ns(), data, length, direction))
            size += kept
            source.delivered += 1
            self._left -= 1
        _write(blocks)
        return source.taken - before


def _open(tap: str, program: list[tuple[int, int, int, int]], direction: str) -> socket.socket:
    """A packet socket that sees nothing before its filter is there. Raises OSError."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    code = array.array("B", b"".join(_INSTRUCTION.pack(*one) for one in program))
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, _PROGRAM.pack(len(program), code.buffer_info()[0]))
    except OSError as error:
        raise OSError(error.errno, f"{WRONG_FILTER}: {error.strerror}") from error
    sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
    sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    sock.setsockopt(_SOL_PACKET, _PACKET_AUXDATA, 1)
    if direction == "out":
        sock.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    sock.bind((tap, _ETH_P_ALL))
    return sock


def _write(blocks: list[bytes]) -> None:
    data = memoryview(b"".join(blocks))
    while data:
        data = data[os.write(1, data) :]


def _read_config() -> dict[str, Any]:
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 1 << 20)
        if not part:
            raise OSError(errno.EINVAL, "nothing was said to capture")
        line += part
    config: dict[str, Any] = json.loads(line)
    return config


def main() -> int:
    """Capture; returns the exit status."""
    os.nice(_NICE)
    try:
        reason = _Worker(_read_config()).run()
    except BrokenPipeError:
        return 0
    except OSError as error:
        os.write(2, f"{error.strerror or error}\n".encode())
        return 1
    os.write(2, f"{reason}\n".encode())
    return 0


def load() -> Callable[[Sequence[str]], int]:
    """Returns what runs it, for an image's start (images/common/start.py)."""
    gc.enable()
    return lambda _: main()


if __name__ == "__main__":
    raise SystemExit(main())
