"""The host-initiated connect of hybrid vsock: ``CONNECT PORT\\n`` to a VMM's Unix socket, ``OK n\\n`` from it.

Firecracker has defined it (docs/vsock.md in its repository); Cloud Hypervisor and vhost-device-vsock do the same.

A request is never abandoned: vhost-device-vsock (0.3.0) dies when the guest answers one whose socket is closed by then,
and with it every connection of that VM, for good; one that is closed before it is read keeps it busy for ever. Whoever
has no more time leaves the request here, open, and the next one who wants that port takes it over where it is. So a
slow or paused VM has as many open requests as there were waiting at one time, and no more.
"""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import trio

__all__ = ["connect_hybrid"]

_MAX_REPLY: Final = 64
_OK: Final = re.compile(rb"OK( [0-9]{1,10})?\r?\n")


class _Request:
    """A port that was asked for, and what has been read of the answer. The socket does not block."""

    __slots__ = ("reply", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.reply = bytearray()


_left: dict[tuple[str, int], list[_Request]] = {}


async def connect_hybrid(path: str, port: int, dial: Callable[[], Awaitable[trio.SocketStream]]) -> trio.SocketStream:
    """A stream to ``port`` in the VM behind the Unix socket ``path``, to which ``dial`` connects.

    Raises what ``dial`` raises, ConnectionRefusedError and ConnectionResetError.
    """
    name = f"hybrid:{path}:{port}"
    _close_answered()
    requests = _left.get((path, port))
    if requests:
        request = requests.pop()
    else:
        request = _Request(_plain(await dial()))
        try:
            # Not awaited: a socket that was closed before it said anything is no better than one that did.
            request.sock.send(b"CONNECT %d\n" % port)
        except OSError as error:
            request.sock.close()
            raise ConnectionResetError(errno.ECONNRESET, f"{name}: the VMM reset the connection") from error
    try:
        await _read_reply(request, name, port)
    except OSError:
        request.sock.close()
        raise
    except BaseException:
        _left.setdefault((path, port), []).append(request)
        raise
    return trio.SocketStream(trio.socket.from_stdlib_socket(request.sock))


def _close_answered() -> None:
    """Close the requests that were answered meanwhile: the peer in the guest may have lost its patience with them."""
    for key, requests in list(_left.items()):
        for request in list(requests):
            try:
                # All of it: a socket that is closed with something unread in it is reset.
                request.sock.recv(4096)
            except BlockingIOError:
                continue
            except OSError:
                pass
            requests.remove(request)
            request.sock.close()
        if not requests:
            del _left[key]


async def _read_reply(request: _Request, name: str, port: int) -> None:
    """Byte by byte: what follows the newline belongs to the peer in the guest."""
    reply = request.reply
    while not reply.endswith(b"\n"):
        if len(reply) >= _MAX_REPLY:
            raise ConnectionRefusedError(
                errno.ECONNREFUSED, f"{name}: the VMM's answer {bytes(reply)!r} is longer than {_MAX_REPLY} bytes"
            )
        await trio.lowlevel.wait_readable(request.sock)
        with suppress(BlockingIOError):
            try:
                byte = request.sock.recv(1)
            except ConnectionError as error:
                raise ConnectionResetError(errno.ECONNRESET, f"{name}: the VMM reset the connection") from error
            if not byte:
                raise ConnectionRefusedError(
                    errno.ECONNREFUSED,
                    f"{name}: the VMM closed the connection: nothing listens on port {port} in the VM",
                )
            reply += byte
    if not _OK.fullmatch(reply):
        raise ConnectionRefusedError(
            errno.ECONNREFUSED, f"{name}: the VMM answered {bytes(reply)!r} instead of 'OK PORT'"
        )


def _plain(stream: trio.SocketStream) -> socket.socket:
    plain = socket.socket(fileno=stream.socket.detach())
    plain.setblocking(False)
    return plain
