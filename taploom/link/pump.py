"""The pump: frames between a TAP device and a stream.

Runs on the data-plane thread. Each wake-up drains what is there up to a bound, so that the other links get their turn,
and hands it on in one write. When the stream's peer is slow, this pump alone stops reading its TAP; the
kernel's queue for that interface then fills up and drops.
"""

from __future__ import annotations

import errno
import io
import os
import socket
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final

from taploom.address import write_limit
from taploom.contracts.taploom.link.v1 import LinkFeature
from taploom.link.frames import HEADER_SIZE, LENGTH_SIZE, MAX_FRAME, MIN_FRAME, FrameError, FrameScanner
from taploom.link.loop import CHUNK, READ, WRITE, Loop

__all__ = ["Counters", "Pump"]

_BATCH_BYTES: Final = 128 * 1024
_BATCH_FRAMES: Final = 64
_LENGTH: Final = struct.Struct(">I")
_NO_HEADER: Final = bytes(HEADER_SIZE)
# The TAP refuses a frame: EIO while the interface is down, EINVAL for a frame it cannot make sense of,
# ENOMEM/ENOBUFS when memory is short. The frame is dropped, as a NIC would.
_DROP_ERRORS: Final = frozenset({errno.EIO, errno.EINVAL, errno.ENOMEM, errno.ENOBUFS, errno.EMSGSIZE})


class Counters:
    """What a link has carried, over all its reconnects. Written by the data-plane thread, read by others."""

    __slots__ = ("reconnects", "rx_bytes", "rx_drops", "rx_frames", "tx_bytes", "tx_drops", "tx_frames")

    def __init__(self) -> None:
        self.tx_frames = 0
        self.tx_bytes = 0
        self.rx_frames = 0
        self.rx_bytes = 0
        self.rx_drops = 0
        self.tx_drops = 0
        self.reconnects = 0


class Pump:
    """Moves frames between ``tap_fd``, which stays its owner's, and ``sock``, which is closed with the pump."""

    def __init__(
        self,
        loop: Loop,
        *,
        tap_fd: int,
        sock: socket.socket,
        features: Iterable[LinkFeature],
        counters: Counters,
        on_end: Callable[[str], None],
    ) -> None:
        """``on_end(reason)`` is called, on the thread, when the link breaks by itself."""
        self._loop: Final = loop
        self._tap_fd: Final = tap_fd
        self._sock: Final = sock
        self._sock_fd: Final = sock.fileno()
        self._scanner: Final = FrameScanner(features)
        self._counters: Final = counters
        self._on_end: Final = on_end
        self._write_limit: Final = write_limit(sock)
        self._tap: Final = io.FileIO(tap_fd, "r+b", closefd=False)
        self._incomplete = b""  # of a frame from the stream
        self._unsent: memoryview | None = None  # of a batch to the stream
        self._header: Final = memoryview(bytearray(HEADER_SIZE))
        self._stopped = False
        self._from_tap = self._from_tap_vnet if self._scanner.vnet_hdr else self._from_tap_plain
        self._to_tap = self._to_tap_vnet if self._scanner.vnet_hdr else self._to_tap_plain

    def start(self) -> None:
        """Register with the loop."""
        self._loop.watch(self._sock_fd, READ, self._sock_ready)
        self._loop.watch(self._tap_fd, READ, self._tap_ready)

    def stop(self) -> None:
        """Leave the loop and close the socket; idempotent. The TAP's descriptor is not used any more."""
        if not self._stopped:
            self._stopped = True
            self._loop.watch(self._tap_fd, 0, self._tap_ready)
            self._loop.watch(self._sock_fd, 0, self._sock_ready)
            self._tap.close()
            self._sock.close()

    def _end(self, reason: str) -> None:
        if not self._stopped:
            self.stop()
            self._on_end(reason)

    # TAP to stream

    def _tap_ready(self, _mask: int) -> None:
        if self._stopped:
            return
        try:
            end = self._from_tap(self._loop.buffer)
        except OSError as error:
            # EBADFD: the interface was removed under us.
            self._end(f"the TAP device cannot be read: {error.strerror}")
            return
        if end:
            self._send(self._loop.buffer[:end])

    def _from_tap_vnet(self, buffer: memoryview) -> int:
        """Fill ``buffer`` with a batch of frames in wire format; return where it ends."""
        readinto = self._tap.readinto
        pack_into = _LENGTH.pack_into
        end = frames = 0
        for _ in range(_BATCH_FRAMES):
            size = readinto(buffer[end + 4 :])
            if size is None:
                break
            if not HEADER_SIZE + MIN_FRAME <= size <= HEADER_SIZE + MAX_FRAME:
                self._counters.tx_drops += 1
                continue
            pack_into(buffer, end, size)
            # The kernel does not write num_buffers: what is there may be another link's bytes.
            buffer[end + 14 : end + 16] = b"\0\0"
            end += size + 4
            frames += 1
            if end >= _BATCH_BYTES:
                break
        counters = self._counters
        counters.tx_frames += frames
        counters.tx_bytes += end - frames * (LENGTH_SIZE + HEADER_SIZE)
        return end

    def _from_tap_plain(self, buffer: memoryview) -> int:
        readv = os.readv
        fd = self._tap_fd
        header = self._header
        pack_into = _LENGTH.pack_into
        end = frames = 0
        for _ in range(_BATCH_FRAMES):
            try:
                size = readv(fd, (header, buffer[end + 4 :])) - HEADER_SIZE
            except BlockingIOError:
                break
            if not MIN_FRAME <= size <= MAX_FRAME:
                self._counters.tx_drops += 1
                continue
            pack_into(buffer, end, size)
            end += size + 4
            frames += 1
            if end >= _BATCH_BYTES:
                break
        counters = self._counters
        counters.tx_frames += frames
        counters.tx_bytes += end - frames * LENGTH_SIZE
        return end

    def _send(self, data: memoryview) -> bool:
        """Write ``data``; if the stream takes only a part, keep the rest and stop reading the TAP."""
        sent = 0
        size = len(data)
        limit = self._write_limit
        try:
            while sent < size:
                sent += self._sock.send(data[sent : sent + limit] if sent or size > limit else data)
        except BlockingIOError:
            pass
        except OSError as error:
            self._end(f"the stream broke: {error.strerror}")
            return False
        if sent == size:
            return True
        # A copy: the buffer is every link's. Bounded by one batch, as nothing is read before it is sent.
        blocked = self._unsent is not None
        self._unsent = memoryview(bytes(data[sent:])) if not blocked else data[sent:]
        if not blocked:
            self._loop.watch(self._tap_fd, 0, self._tap_ready)
            self._loop.watch(self._sock_fd, READ | WRITE, self._sock_ready)
        return False

    # stream to TAP

    def _sock_ready(self, mask: int) -> None:
        if self._stopped:
            return
        if mask & WRITE and self._unsent is not None and self._send(self._unsent):
            self._unsent = None
            self._loop.watch(self._sock_fd, READ, self._sock_ready)
            self._loop.watch(self._tap_fd, READ, self._tap_ready)
        if mask & READ and not self._stopped:
            self._receive()

    def _receive(self) -> None:
        buffer = self._loop.buffer
        kept = len(self._incomplete)
        if kept:
            buffer[:kept] = self._incomplete
        try:
            size = self._sock.recv_into(buffer[kept:], CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(f"the stream broke: {error.strerror}")
            return
        if not size:
            what = f"in the middle of a frame, after {kept} bytes" if kept else "between frames"
            self._end(f"the peer closed the stream {what}")
            return
        end = kept + size
        frames: list[memoryview] = []
        violation: FrameError | None = None
        consumed = end
        try:
            consumed = self._scanner.scan(buffer, 0, end, frames)
            if size == CHUNK and (missing := self._scanner.missing(buffer, consumed, end)):
                # In a bulk transfer the rest of a frame that the chunk cut in two is there already: reading it now
                # saves copying its beginning away and back. A chunk that is not full was all there is.
                with suppress(OSError):  # BlockingIOError mostly; anything else comes again
                    end += self._sock.recv_into(buffer[end:], missing)
                    consumed = self._scanner.scan(buffer, consumed, end, frames)
        except FrameError as error:
            violation = error
        if frames:
            try:
                self._to_tap(frames)
            except OSError as error:
                self._end(f"the TAP device cannot be written to: {error.strerror}")
                return
        if violation is not None:
            self._end(f"the peer broke the frame format: {violation}")
            return
        self._incomplete = bytes(buffer[consumed:end]) if consumed < end else b""

    def _to_tap_vnet(self, frames: list[memoryview]) -> None:
        write = self._tap.write
        done = size = drops = 0
        for frame in frames:
            try:
                written = write(frame)
            except OSError as error:
                if error.errno not in _DROP_ERRORS:
                    raise
                drops += 1
                continue
            if written is None:
                drops += 1
                continue
            done += 1
            size += written
        counters = self._counters
        counters.rx_frames += done
        counters.rx_bytes += size - done * HEADER_SIZE
        counters.rx_drops += drops

    def _to_tap_plain(self, frames: list[memoryview]) -> None:
        writev = os.writev
        fd = self._tap_fd
        done = size = drops = 0
        for frame in frames:
            try:
                size += writev(fd, (_NO_HEADER, frame))
            except OSError as error:
                if error.errno not in _DROP_ERRORS and error.errno != errno.EAGAIN:
                    raise
                drops += 1
                continue
            done += 1
        counters = self._counters
        counters.rx_frames += done
        counters.rx_bytes += size - done * HEADER_SIZE
        counters.rx_drops += drops
