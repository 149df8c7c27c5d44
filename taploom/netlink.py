"""The netlink protocol, synchronous and small: requests with their acknowledgements, dumps, attributes. Linux only.

The agents read and change the kernel's state while others wait, and start inside VM images, where each module imported
takes its time: general message classes cost milliseconds per dump, megabytes, and hundreds of modules. Sources:
netlink(7), linux/netlink.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self, TypeVar

_T = TypeVar("_T")

# linux/netlink.h
NETLINK_ROUTE, NETLINK_GENERIC = 0, 16
NLM_F_REQUEST, NLM_F_MULTI, NLM_F_ACK, NLM_F_DUMP_INTR = 0x1, 0x2, 0x4, 0x10
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE, NLM_F_DUMP = 0x100, 0x200, 0x400, 0x300
NLM_F_CAPPED, NLM_F_ACK_TLVS = 0x100, 0x200
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLMSGERR_ATTR_MSG = 1
SOL_NETLINK, NETLINK_EXT_ACK = 270, 11
NLA_TYPE_MASK, NLA_F_NESTED = 0x3FFF, 0x8000

HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_ATTRIBUTE = struct.Struct("=HH")
UINT32 = struct.Struct("=I")
_REQUEST_TIMEOUT = 5.0
_DUMP_ATTEMPTS = 8


class NetlinkError(OSError):
    """The kernel refused a request: ``errno`` as in OSError, the message is the kernel's own when it gave one."""


class NetlinkSocket:
    """One netlink socket in the network namespace of the calling thread. Not for use by two threads at once.

    Args:
        protocol: NETLINK_ROUTE, say.
    """

    def __init__(self, protocol: int = NETLINK_ROUTE) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._socket.bind((0, 0))
        self._socket.settimeout(_REQUEST_TIMEOUT)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
        self._sequence = 0

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def request(self, body: bytes, kind: int, flags: int = 0) -> bytes:
        """Sends a request and waits until the kernel has done it.

        Args:
            body: what follows the header.
            kind: the message's type.
            flags: beside NLM_F_REQUEST and NLM_F_ACK.

        Returns:
            The message that was the answer, with its header; empty when there was an acknowledgement only.

        Raises:
            NetlinkError: it refused, or did not answer.
        """
        sequence = self._send(body, kind, flags | NLM_F_ACK)
        answer = b""
        for reply, reply_flags, data in self._replies(sequence):
            if reply == NLMSG_ERROR:
                raise_error(reply_flags, data)
                break
            answer = data
        return answer

    def dump(self, body: bytes, kind: int, read: Callable[[bytes], _T | None]) -> list[_T]:
        """What `read` makes of each message of a dump, but for those of which it makes None.

        Raises:
            NetlinkError: the kernel refused, or did not answer.
        """
        for _ in range(_DUMP_ATTEMPTS):
            sequence = self._send(body, kind, NLM_F_DUMP)
            found, interrupted = [], False
            for reply, reply_flags, data in self._replies(sequence):
                interrupted |= bool(reply_flags & NLM_F_DUMP_INTR)
                if reply == NLMSG_ERROR:
                    raise_error(reply_flags, data)
                if reply == NLMSG_DONE:
                    break
                item = read(data)
                if item is not None:
                    found.append(item)
            if not interrupted:
                return found
        return found

    def _send(self, body: bytes, kind: int, flags: int) -> int:
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        header = HEADER.pack(HEADER.size + len(body), kind, NLM_F_REQUEST | flags, self._sequence, 0)
        self._socket.sendto(header + body, (0, 0))
        return self._sequence

    def _replies(self, sequence: int) -> Iterator[tuple[int, int, bytes]]:
        """(type, flags, whole message) of each reply to the request; ends only by its consumer."""
        while True:
            for kind, flags, reply_to, message in split_messages(self._receive()):
                if reply_to == sequence:  # others are what is left of a request that was given up
                    yield kind, flags, message

    def _receive(self) -> bytes:
        try:
            # MSG_TRUNC tells the datagram's whole size: no dump is ever cut.
            size = self._socket.recv_into(bytearray(1), 1, socket.MSG_PEEK | socket.MSG_TRUNC)
            return self._socket.recv(max(size, 32768))
        except TimeoutError:
            raise NetlinkError(
                errno.ETIMEDOUT, f"the kernel has not answered a netlink request within {_REQUEST_TIMEOUT:g} s"
            ) from None
        except OSError as error:
            raise NetlinkError(error.errno, f"netlink: {error.strerror}") from error


def split_messages(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """Cuts a netlink datagram into (type, flags, sequence number, message with header); a cut last one is left out."""
    messages, offset = [], 0
    while offset + HEADER.size <= len(data):
        length, kind, flags, sequence, _pid = HEADER.unpack_from(data, offset)
        if length < HEADER.size or offset + length > len(data):
            break
        messages.append((kind, flags, sequence, data[offset : offset + length]))
        offset += (length + 3) & ~3
    return messages


def raise_error(flags: int, data: bytes) -> None:
    """Raises NetlinkError for an NLMSG_ERROR message, unless it is an acknowledgement (error 0)."""
    (negative,) = struct.unpack_from("=i", data, HEADER.size)
    if negative == 0:
        return
    text = os.strerror(-negative)
    if flags & NLM_F_ACK_TLVS:
        # The request follows the error, whole or (capped) its header only; then come the extended-ack attributes.
        offset = HEADER.size + 4
        (inner,) = struct.unpack_from("=I", data, offset)
        offset += HEADER.size if flags & NLM_F_CAPPED else (inner + 3) & ~3
        while offset + 4 <= len(data):
            length, kind = struct.unpack_from("=HH", data, offset)
            if length < 4:
                break
            if kind & NLA_TYPE_MASK == NLMSGERR_ATTR_MSG:
                text = data[offset + 4 : offset + length].rstrip(b"\0").decode("utf-8", "replace")
            offset += (length + 3) & ~3
    raise NetlinkError(-negative, text)


def attributes(data: bytes, offset: int) -> dict[int, bytes]:
    """The attributes (struct nlattr) from an offset on, by type; what is cut or malformed ends them."""
    found = {}
    while offset + 4 <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < 4 or offset + length > len(data):
            break
        found[kind & NLA_TYPE_MASK] = data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found


def attribute(kind: int, value: bytes) -> bytes:
    """An attribute with its header, padded."""
    return _ATTRIBUTE.pack(4 + len(value), kind) + value + bytes(-len(value) % 4)


def text_attribute(kind: int, value: str) -> bytes:
    """A string, with the null byte that ends it."""
    return attribute(kind, value.encode() + b"\0")


def number_attribute(kind: int, value: int) -> bytes:
    """An unsigned number of 32 bits, in the machine's byte order."""
    return attribute(kind, UINT32.pack(value))


def read_text(value: bytes | None) -> str:
    """A string attribute's value; "" when there is none."""
    return "" if value is None else value.split(b"\0", 1)[0].decode("utf-8", "replace")


def read_number(value: bytes | None) -> int | None:
    """A 32-bit attribute's value; None when it is not one."""
    return None if value is None or len(value) != 4 else int(UINT32.unpack(value)[0])
