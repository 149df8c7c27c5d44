"""The data link's frame format: a sans-IO codec.

After the handshake both directions of a link carry frames, back to back and nothing else::

    length   4 bytes, big-endian: the size of all that follows in this frame
    header  12 bytes, only when the feature VNET_HDR is agreed: struct virtio_net_hdr_v1 (VIRTIO 1.2, 5.1.6),
            little-endian: u8 flags, u8 gso_type, u16 hdr_len, u16 gso_size, u16 csum_start, u16 csum_offset,
            u16 num_buffers
    frame   an Ethernet frame without its check sequence: 14 to 65553 bytes (header 14, one VLAN tag 4, payload
            65535)

Without VNET_HDR this is the framing of QEMU's ``-netdev stream`` and ``-netdev socket``. The length counts
the header: it is 14 to 65553 without and 26 to 65565 with VNET_HDR. A header may hold, and must otherwise be 0:

- ``flags``: NEEDS_CSUM (1) when TSO or USO is agreed, DATA_VALID (2) always;
- ``gso_type``: TCPV4 (1) and TCPV6 (4), with or without the ECN bit (0x80), when TSO is agreed; UDP_L4 (5) when USO
  is agreed; then NEEDS_CSUM is set and ``gso_size`` is 1 to the frame's size;
- ``hdr_len``: a hint, at most the frame's size;
- ``csum_start``, ``csum_offset``: with NEEDS_CSUM, the two checksum bytes lie within the frame, behind its 14-byte
  Ethernet header;
- ``num_buffers``: ignored, whatever it is; 0 is sent.

Everything that comes from the peer is hostile: a length or header outside these rules is a FrameError, and ends
the link.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final

from taploom.contracts.taploom.link.v1 import LinkFeature

__all__ = [
    "HEADER_SIZE",
    "LENGTH_SIZE",
    "MAX_FRAME",
    "MIN_FRAME",
    "FrameDecoder",
    "FrameError",
    "FrameScanner",
    "encode_frame",
]

LENGTH_SIZE: Final = 4
HEADER_SIZE: Final = 12
MIN_FRAME: Final = 14
MAX_FRAME: Final = 14 + 4 + 65535

NEEDS_CSUM: Final = 1
DATA_VALID: Final = 2
GSO_NONE: Final = 0
GSO_TCPV4: Final = 1
GSO_TCPV6: Final = 4
GSO_UDP_L4: Final = 5
GSO_ECN: Final = 0x80

_LENGTH: Final = struct.Struct(">I")
_LENGTH_AND_HEADER: Final = struct.Struct(">I12s")
_HEADER: Final = struct.Struct("<BBHHHHH")
_UNKNOWN: Final = 1 << 32
_KNOWN_HEADERS: Final = 256


class FrameError(ValueError):
    """What the peer sent breaks the frame format; the message says how."""


class FrameScanner:
    """Finds the complete frames in a buffer; holds the format that a link's features make.

    One scanner serves any number of links with the same features: it has no state of the stream.
    """

    def __init__(self, features: Iterable[LinkFeature]) -> None:
        """``features``: those agreed on. Raises ValueError when TSO or USO come without VNET_HDR."""
        agreed = frozenset(features)
        self.vnet_hdr: Final = LinkFeature.VNET_HDR in agreed
        if agreed - {LinkFeature.VNET_HDR} and not self.vnet_hdr:
            raise ValueError("the features TSO and USO need VNET_HDR")
        self.min_length: Final = MIN_FRAME + (HEADER_SIZE if self.vnet_hdr else 0)
        self.max_length: Final = MAX_FRAME + (HEADER_SIZE if self.vnet_hdr else 0)
        gso_types = set()
        if LinkFeature.TSO in agreed:
            gso_types |= {GSO_TCPV4, GSO_TCPV6, GSO_TCPV4 | GSO_ECN, GSO_TCPV6 | GSO_ECN}
        if LinkFeature.USO in agreed:
            gso_types.add(GSO_UDP_L4)
        self._gso_types: Final = frozenset(gso_types)
        self._flags: Final = DATA_VALID | (NEEDS_CSUM if gso_types else 0)
        # The headers that were right lately, with the length from which on they are: a connection has few, and looking
        # at each again is a good part of what an interpreter does for a frame.
        self._sizes: dict[bytes, int] = {}

    def scan(self, view: memoryview, start: int, end: int, frames: list[memoryview]) -> int:
        """Append every complete frame of ``view[start:end]`` to ``frames``; return where the rest begins.

        Frames are slices of ``view``: [header and] Ethernet frame, without the length. Raises FrameError at the first
        violation; the frames before it have been appended by then.
        """
        return (self._scan_vnet if self.vnet_hdr else self._scan_plain)(view, start, end, frames)

    def _scan_plain(self, view: memoryview, start: int, end: int, frames: list[memoryview]) -> int:
        unpack = _LENGTH.unpack_from
        append = frames.append
        while end - start >= LENGTH_SIZE:
            (length,) = unpack(view, start)
            if not MIN_FRAME <= length <= MAX_FRAME:
                raise self._length_error(length)
            body = start + LENGTH_SIZE
            if body + length > end:
                break
            start = body + length
            append(view[body:start])
        return start

    def _scan_vnet(self, view: memoryview, start: int, end: int, frames: list[memoryview]) -> int:
        unpack = _LENGTH_AND_HEADER.unpack_from
        append = frames.append
        sizes = self._sizes
        while end - start >= 16:
            length, header = unpack(view, start)
            if not 26 <= length <= 65565:
                raise self._length_error(length)
            body = start + 4
            # Checked as soon as it is there: a frame that will be refused is not waited for.
            if length < sizes.get(header, _UNKNOWN):
                self._learn(header, length - HEADER_SIZE)
            if body + length > end:
                return start
            start = body + length
            append(view[body:start])
        if end - start >= LENGTH_SIZE:
            (length,) = _LENGTH.unpack_from(view, start)
            if not 26 <= length <= 65565:
                raise self._length_error(length)
        return start

    def _learn(self, header: bytes, size: int) -> None:
        """Check a header before a frame of ``size`` bytes, and remember it if it is right. Raises FrameError."""
        self.check_header(header, size)
        _flags, _type, hdr_len, gso_size, csum_start, csum_offset, _num_buffers = _HEADER.unpack(header)
        if len(self._sizes) >= _KNOWN_HEADERS:
            self._sizes.clear()
        self._sizes[header] = HEADER_SIZE + max(MIN_FRAME, hdr_len, gso_size, csum_start + csum_offset + 2)

    @staticmethod
    def missing(view: memoryview, start: int, end: int) -> int:
        """How many bytes the frame that begins at ``start`` still lacks; 0 when its length is not there yet.

        ``start`` is what ``scan`` returned, so that the length has been checked.
        """
        return start + LENGTH_SIZE + _LENGTH.unpack_from(view, start)[0] - end if end - start >= LENGTH_SIZE else 0

    def _length_error(self, length: int) -> FrameError:
        return FrameError(f"frame length {length} is not in {self.min_length}..{self.max_length}")

    def check_header(self, header: bytes, size: int) -> None:
        """Check a virtio_net_hdr before a frame of ``size`` bytes (without the header). Raises FrameError."""
        flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, _num_buffers = _HEADER.unpack(header)
        if flags & ~self._flags:
            raise FrameError(f"virtio_net_hdr flags {flags:#x} are not agreed")
        if flags & NEEDS_CSUM:
            if csum_start < MIN_FRAME or csum_start + csum_offset + 2 > size:
                raise FrameError(
                    f"virtio_net_hdr checksum at {csum_start}+{csum_offset} is outside its frame of {size} bytes"
                )
        elif csum_start or csum_offset:
            raise FrameError("virtio_net_hdr has a checksum position without NEEDS_CSUM")
        if gso_type:
            if gso_type not in self._gso_types:
                raise FrameError(f"virtio_net_hdr gso_type {gso_type:#x} is not agreed")
            if not flags & NEEDS_CSUM:
                raise FrameError("virtio_net_hdr has a gso_type without NEEDS_CSUM")
            if not 0 < gso_size <= size:
                raise FrameError(f"virtio_net_hdr gso_size {gso_size} is not in 1..{size}")
        elif gso_size:
            raise FrameError("virtio_net_hdr has a gso_size without a gso_type")
        if hdr_len > size:
            raise FrameError(f"virtio_net_hdr hdr_len {hdr_len} is beyond its frame of {size} bytes")


class FrameDecoder:
    """Bytes in, frames out, for peers that need no more speed than copies give.

    >>> decoder = FrameDecoder(())
    >>> decoder.feed(b"\\0\\0\\0\\x0e" + bytes(13))
    []
    >>> decoder.feed(bytes(1))
    [b'\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00']
    """

    def __init__(self, features: Iterable[LinkFeature]) -> None:
        self.scanner: Final = FrameScanner(features)
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The frames that ``data`` completes, each [header and] Ethernet frame. Raises FrameError."""
        self._rest += data
        slices: list[memoryview] = []
        with memoryview(self._rest) as view:
            consumed = self.scanner.scan(view, 0, len(view), slices)
            frames = [bytes(piece) for piece in slices]
            for piece in slices:
                piece.release()
        del self._rest[:consumed]
        return frames

    @property
    def pending(self) -> int:
        """Bytes of an incomplete frame held back."""
        return len(self._rest)


def encode_frame(frame: bytes) -> bytes:
    """One frame ([header and] Ethernet frame) with its length before it."""
    return _LENGTH.pack(len(frame)) + frame
