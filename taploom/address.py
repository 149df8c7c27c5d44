"""Where a peer is, and how to get a byte stream to it.

Four kinds of address, all of which give a plain byte stream:

=============================  =====================================================================
``vsock:CID:PORT``             AF_VSOCK (vsock(7)): a KVM host, or inside a VM. ``any`` as CID listens on every CID.
``hybrid:/run/vm/v.sock:PORT`` a VMM's Unix socket: we send ``CONNECT PORT\\n`` and read ``OK n\\n`` (Firecracker,
                               Cloud Hypervisor, vhost-device-vsock, Apple Containerization on Linux)
``unix:/path``                 Unix stream socket
``fd:N``                       a socket inherited from launchd, systemd or a parent process
=============================  =====================================================================

Listeners check who is there: on vsock only the host (CID 2) may connect, on Unix sockets only the
permitted user ids. No AF_VSOCK constant is touched at import, so the module also loads on macOS.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import socket
import stat
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio
from trio.abc import Listener

__all__ = [
    "Address",
    "AddressError",
    "CheckedListener",
    "FdAddress",
    "HybridAddress",
    "UnixAddress",
    "VsockAddress",
    "close_stream",
    "connect",
    "data_address",
    "open_listener",
    "parse_address",
    "send_all",
    "set_buffers",
    "write_limit",
]

logger = logging.getLogger("taploom.address")

VMADDR_CID_ANY: Final = 0xFFFFFFFF
"""Listen on every CID (linux/vm_sockets.h)."""
VMADDR_CID_HOST: Final = 2
"""The host, as a guest sees it (linux/vm_sockets.h)."""
_MAX_PORT: Final = 0xFFFFFFFE  # 0xFFFFFFFF is VMADDR_PORT_ANY
_SO_VM_SOCKETS_BUFFER_SIZE: Final = 0
_SO_VM_SOCKETS_BUFFER_MAX_SIZE: Final = 2
_SO_SNDBUFFORCE: Final = 32  # asm-generic/socket.h; the socket module does not name them
_SO_RCVBUFFORCE: Final = 33
_SO_PEERGROUPS: Final = 59
_MAX_OPTION: Final = 1024  # the socket module takes no more
_VSOCK_BUFFER: Final = 8 << 20
_VSOCK_WRITE: Final = 28 * 1024
_UNIX_BUFFER: Final = 4 << 20
# sun_path holds 108 bytes on Linux and 104 on macOS, the final NUL included.
_MAX_PATH: Final = 103 if sys.platform == "darwin" else 107
_BACKLOG: Final = 256
_DECIMAL: Final = re.compile(r"0|[1-9][0-9]{0,9}")
_RETRY_ACCEPT: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_FATAL_ACCEPT: Final = frozenset({errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EOPNOTSUPP, errno.EFAULT})
_ACCEPT_BACKOFF: Final = 0.1


class AddressError(ValueError):
    """An address that cannot be used; the message says what is allowed."""


@dataclass(frozen=True, slots=True)
class VsockAddress:
    """AF_VSOCK: context id (``VMADDR_CID_ANY`` to listen) and port, both 32 bits."""

    cid: int
    port: int

    def __post_init__(self) -> None:
        if not 0 <= self.cid <= VMADDR_CID_ANY:
            raise AddressError(f"vsock CID {self.cid} is not in 0..4294967294 nor 'any'")
        _check_port(self.port)

    def __str__(self) -> str:
        return f"vsock:{'any' if self.cid == VMADDR_CID_ANY else self.cid}:{self.port}"


@dataclass(frozen=True, slots=True)
class HybridAddress:
    """A vsock port behind a VMM's Unix socket (hybrid vsock)."""

    path: str
    port: int

    def __post_init__(self) -> None:
        _check_path(self.path)
        _check_port(self.port)

    def __str__(self) -> str:
        return f"hybrid:{self.path}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A Unix stream socket's absolute path."""

    path: str

    def __post_init__(self) -> None:
        _check_path(self.path)

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class FdAddress:
    """An inherited file descriptor: connected for ``connect``, listening for ``open_listener``."""

    fd: int

    def __post_init__(self) -> None:
        if not 0 <= self.fd <= 0x7FFFFFFF:
            raise AddressError(f"file descriptor {self.fd} is not in 0..2147483647")

    def __str__(self) -> str:
        return f"fd:{self.fd}"


Address = VsockAddress | HybridAddress | UnixAddress | FdAddress


def _check_port(port: int) -> None:
    if not 0 <= port <= _MAX_PORT:
        raise AddressError(f"vsock port {port} is not in 0..{_MAX_PORT}")


def _check_path(path: str) -> None:
    if not path.startswith("/"):
        raise AddressError(f"socket path {path!r} is not absolute: it must start with '/'")
    if "\0" in path:
        raise AddressError(f"socket path {path!r} contains a NUL byte")
    try:
        length = len(os.fsencode(path))
    except UnicodeEncodeError:
        raise AddressError(f"socket path {path!r} cannot be encoded as a file name") from None
    if length > _MAX_PATH:
        raise AddressError(f"socket path {path!r} has {length} bytes; the system allows {_MAX_PATH}")


def _number(text: str, what: str, address: str) -> int:
    if not _DECIMAL.fullmatch(text):
        raise AddressError(f"{what} {text!r} in address {address!r} is not a decimal number")
    return int(text)


def parse_address(text: str, *, default_port: int | None = None) -> Address:
    """Parse an address as the module's table gives them.

    ``default_port`` stands in where a ``vsock:`` or ``hybrid:`` address names no port.
    Raises AddressError. ``str()`` of the result is ``text`` with the port filled in.
    """
    scheme, colon, rest = text.partition(":")
    if not colon:
        scheme = ""
    match scheme:
        case "vsock":
            cid_text, colon, port_text = rest.partition(":")
            if cid_text == "any":
                cid = VMADDR_CID_ANY
            else:
                cid = _number(cid_text, "CID", text)
                if cid >= VMADDR_CID_ANY:
                    raise AddressError(f"CID {cid} in address {text!r} is not in 0..4294967294; write 'any'")
            return VsockAddress(cid, _port(port_text if colon else None, default_port, text))
        case "hybrid":
            path, colon, port_text = rest.rpartition(":")
            # A path without a port may hold colons itself: only digits after the last one are a port.
            if not colon or (default_port is not None and not _DECIMAL.fullmatch(port_text)):
                return HybridAddress(rest, _port(None, default_port, text))
            return HybridAddress(path, _port(port_text, default_port, text))
        case "unix":
            return UnixAddress(rest)
        case "fd":
            return FdAddress(_number(rest, "file descriptor", text))
    raise AddressError(f"address {text!r} is not one of vsock:CID:PORT, hybrid:/path:PORT, unix:/path, fd:N")


def _port(text: str | None, default: int | None, address: str) -> int:
    if text is not None:
        return _number(text, "port", address)
    if default is None:
        raise AddressError(f"address {address!r} needs a port at its end, such as {address}:5555")
    return default


def data_address(control: Address) -> Address:
    """The data port that belongs to a control address by default.

    The next port for ``vsock:`` and ``hybrid:``, ``data.sock`` in the same directory for ``unix:``.
    Raises AddressError for ``fd:``, which has no neighbour.
    """
    match control:
        case VsockAddress(cid, port):
            return VsockAddress(cid, port + 1)
        case HybridAddress(path, port):
            return HybridAddress(path, port + 1)
        case UnixAddress(path):
            return UnixAddress(str(Path(path).parent / "data.sock"))
        case FdAddress(fd):
            raise AddressError(f"fd:{fd} has no default data address: give one")


def _vsock_family() -> int:
    family: int | None = getattr(socket, "AF_VSOCK", None)
    if family is None:
        raise AddressError("this system has no AF_VSOCK: use hybrid:/path:PORT or unix:/path")
    return family


def set_buffers(sock: socket.socket | trio.socket.SocketType) -> None:
    """Give a data socket large kernel buffers: 8 MiB on vsock, 4 MiB on Unix sockets.

    On vsock the maximum has to be raised before the size, and 8 MiB also lifts the receiver's limit on
    queued packets (kernels >= 6.12.92 reset streams of many small packets beyond it). What the system does
    not permit stays as it is: buffers are about speed only.
    """
    if sock.family == getattr(socket, "AF_VSOCK", None):
        for option in (_SO_VM_SOCKETS_BUFFER_MAX_SIZE, _SO_VM_SOCKETS_BUFFER_SIZE):
            with contextlib.suppress(OSError):
                sock.setsockopt(_vsock_family(), option, _VSOCK_BUFFER)
        return
    for force, plain in ((_SO_SNDBUFFORCE, socket.SO_SNDBUF), (_SO_RCVBUFFORCE, socket.SO_RCVBUF)):
        if sys.platform == "linux":
            try:
                sock.setsockopt(socket.SOL_SOCKET, force, _UNIX_BUFFER)
                continue
            except PermissionError:
                pass
        size = _UNIX_BUFFER
        while size >= 1 << 16:  # macOS refuses sizes beyond its limit instead of clamping them
            try:
                sock.setsockopt(socket.SOL_SOCKET, plain, size)
                break
            except OSError:
                size //= 2


def write_limit(sock: socket.socket | trio.socket.SocketType) -> int:
    """Bytes that one write to ``sock`` may have: 28 KiB on vsock, else no limit worth the name.

    A guest's kernel makes one packet of each write, up to 64 KiB. Kernels from 6.17 on, and the stable ones that have
    it too (6.12.117 is one), put what does not fit into an allocation of 32 KiB, with 44 bytes of header and the
    kernel's own 320, into several fragments: a chain of three descriptors and more. Devices that follow the rust-vmm
    crate virtio-vsock (vhost-device-vsock 0.3.0 among them) take two at most and drop such a packet without a word:
    the bytes are missing from the stream, their credit never comes back, and the connection stalls. Between 32,404
    and 32,768 bytes it depends on how fragmented the guest's memory is.
    """
    return _VSOCK_WRITE if sock.family == getattr(socket, "AF_VSOCK", None) else 1 << 30


def close_stream(sock: socket.socket) -> None:
    """Close a socket that does not block so that its peer reads what was sent and then the end, and no error.

    A Unix socket that is closed with something unread in it resets its peer. vhost-device-vsock (0.3.0) does not tell
    the guest of that, where the connection then seems to live on, and stalls.
    """
    if sock.family == socket.AF_UNIX:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)  # from here on nothing is added
            while sock.recv(1 << 16):
                pass
    sock.close()


async def send_all(stream: trio.abc.SendStream, data: bytes | bytearray | memoryview) -> None:
    """``stream.send_all(data)`` in writes that any stream of ``connect`` and of a listener can take (write_limit)."""
    if len(data) <= _VSOCK_WRITE:
        await stream.send_all(data)
        return
    with memoryview(data) as view:
        for start in range(0, len(view), _VSOCK_WRITE):
            with view[start : start + _VSOCK_WRITE] as piece:
                await stream.send_all(piece)


async def connect(
    address: Address,
    *,
    timeout: float = 5.0,  # noqa: ASYNC109 - part of what the error says
) -> trio.SocketStream:
    """Connect to ``address`` within ``timeout`` seconds, a hybrid address's CONNECT included.

    Raises OSError (TimeoutError among them) when the peer cannot be reached or refuses, and AddressError when
    the address cannot be connected to. An ``fd:`` address is taken over: its descriptor belongs to the stream.
    """
    with trio.move_on_after(timeout):
        match address:
            case VsockAddress(cid, port):
                if cid == VMADDR_CID_ANY:
                    raise AddressError(f"{address} is only for listening: name the peer's CID")
                return await _connect_socket(_vsock_family(), (cid, port), address)
            case UnixAddress(path):
                return await _connect_socket(socket.AF_UNIX, path, address)
            case HybridAddress(path, port):
                from taploom.hybrid import connect_hybrid

                return await connect_hybrid(path, port, lambda: _connect_socket(socket.AF_UNIX, path, address))
            case FdAddress():
                sock = _adopt(address)
                if _is_listening(sock):
                    sock.close()
                    raise AddressError(f"{address} is a listening socket; a connected one is needed")
                await trio.lowlevel.checkpoint()
                return trio.SocketStream(trio.socket.from_stdlib_socket(sock))
    raise TimeoutError(errno.ETIMEDOUT, f"{address} did not answer within {timeout:g} s")


async def _connect_socket(family: int, target: str | tuple[int, int], address: Address) -> trio.SocketStream:
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        await sock.connect(target)
    except OSError as error:
        sock.close()
        raise _with_address(error, address) from error
    except BaseException:
        sock.close()
        raise
    return trio.SocketStream(sock)


def _with_address(error: OSError, address: Address) -> OSError:
    # OSError picks the subclass (ConnectionRefusedError, ...) from the number.
    number = error.errno or errno.EIO
    return OSError(number, f"cannot connect to {address}: {os.strerror(number)}")


def _adopt(address: FdAddress) -> socket.socket:
    try:
        sock = socket.socket(fileno=address.fd)
    except OSError as error:
        raise AddressError(f"{address} is not an open socket: {os.strerror(error.errno or 0)}") from error
    if sock.family not in (socket.AF_UNIX, getattr(socket, "AF_VSOCK", None)) or sock.type != socket.SOCK_STREAM:
        sock.detach()  # not ours: leave it as it was
        raise AddressError(f"{address} is not a stream socket of the families AF_UNIX or AF_VSOCK")
    os.set_inheritable(address.fd, False)
    return sock


def _is_listening(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


async def open_listener(
    address: Address, *, allowed_uids: frozenset[int] | None = None, allowed_gid: int | None = None
) -> CheckedListener:
    """Listen on ``address`` for the peers that may connect.

    On vsock that is the host (CID 2). On Unix sockets it is the user ids in ``allowed_uids``, by default our own
    effective one and root; the socket is 0600 (0666 when others are allowed, the check still holds), in a
    directory that is made 0700 if it is missing, and that nobody else may write to. With ``allowed_gid`` the
    group's members may connect too: the socket is 0660 and the group's. A socket that a dead process left is
    replaced. Raises OSError (EADDRINUSE when another process listens there) or AddressError.
    """
    await trio.lowlevel.checkpoint()
    uids = frozenset({os.geteuid(), 0}) if allowed_uids is None else allowed_uids
    unlink: Path | None = None
    match address:
        case VsockAddress(cid, port):
            sock = socket.socket(_vsock_family(), socket.SOCK_STREAM)
            try:
                sock.bind((cid, port))
            except OSError as error:
                sock.close()
                number = error.errno or errno.EIO
                raise OSError(number, f"cannot listen on {address}: {os.strerror(number)}") from error
        case UnixAddress(path):
            unlink = Path(path)
            sock = _bind_unix(address, unlink, shared=not uids <= {os.geteuid(), 0}, gid=allowed_gid)
        case FdAddress():
            sock = _adopt(address)
            if not _is_listening(sock):
                sock.detach()
                raise AddressError(f"{address} is not a listening socket")
        case HybridAddress():
            raise AddressError(f"{address} can only be connected to: listen on vsock:any:PORT inside the VM")
    try:
        sock.listen(_BACKLOG)
        return CheckedListener(sock, address, uids, unlink, allowed_gid=allowed_gid)
    except BaseException:
        sock.close()
        raise


def _bind_unix(address: UnixAddress, path: Path, *, shared: bool, gid: int | None = None) -> socket.socket:
    directory = path.parent
    directory.mkdir(mode=0o755 if shared or gid is not None else 0o700, parents=True, exist_ok=True)
    info = directory.stat()
    if info.st_uid not in (os.geteuid(), 0) or (info.st_mode & 0o022 and not info.st_mode & stat.S_ISVTX):
        raise AddressError(
            f"{directory} can be written to by other users, who could replace {address}: "
            f"use a directory of your own with mode 0700"
        )
    _remove_stale(address, path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(str(path))
        # Before listen(): until then nobody can connect, so there is no moment with wider permissions.
        if gid is not None:
            os.chown(path, -1, gid)
        path.chmod(0o666 if shared else 0o600 if gid is None else 0o660)
    except OSError as error:
        sock.close()
        number = error.errno or errno.EIO
        raise OSError(number, f"cannot listen on {address}: {os.strerror(number)}") from error
    return sock


def _remove_stale(address: UnixAddress, path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(errno.EEXIST, f"cannot listen on {address}: the path is not a socket; remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            pass  # its backlog is full: alive
    raise OSError(errno.EADDRINUSE, f"cannot listen on {address}: another process listens there")


class CheckedListener(Listener[trio.SocketStream]):
    """A listener that hands out only peers that may connect; the others are logged and closed.

    Running out of descriptors or memory does not end it: it tries again when the back-off is over.
    """

    def __init__(
        self,
        sock: socket.socket,
        address: Address,
        allowed_uids: frozenset[int],
        unlink: Path | None,
        *,
        allowed_gid: int | None = None,
    ) -> None:
        sock.setblocking(False)
        self.address = address
        self.socket = trio.socket.from_stdlib_socket(sock)
        self._unlink: tuple[Path, int, int] | None = None
        if unlink is not None:
            info = unlink.lstat()
            self._unlink = (unlink, info.st_dev, info.st_ino)
        self._refusal: Callable[[trio.socket.SocketType, object], str | None]
        if self.socket.family == socket.AF_UNIX:
            self._refusal = lambda peer, _name: (
                None
                if allowed_gid is not None and allowed_gid in peer_groups(peer)
                else refuse_uid(peer_uid(peer), allowed_uids)
            )
        else:
            self._refusal = lambda _peer, name: refuse_cid(name)

    async def accept(self) -> trio.SocketStream:
        """Wait for the next permitted peer. Raises trio.ClosedResourceError once the listener is closed."""
        while True:
            try:
                peer, name = await self.socket.accept()
            except OSError as error:
                number = error.errno or 0
                if self.socket.fileno() == -1 or number in _FATAL_ACCEPT:
                    raise trio.ClosedResourceError(f"the listener on {self.address} is closed") from error
                logger.warning("%s: cannot accept a connection: %s", self.address, os.strerror(number))
                if number in _RETRY_ACCEPT:
                    await trio.sleep(_ACCEPT_BACKOFF)
                continue
            try:
                refusal = self._refusal(peer, name)
            except OSError as error:
                refusal = f"who the peer is cannot be told: {error}"
            if refusal is None:
                return trio.SocketStream(peer)
            logger.warning("%s: connection refused: %s", self.address, refusal)
            peer.close()

    async def aclose(self) -> None:
        """Close the socket and remove its path, unless another process has put its own there."""
        self.socket.close()
        if self._unlink is not None:
            path, device, inode = self._unlink
            self._unlink = None
            with contextlib.suppress(FileNotFoundError):
                info = path.lstat()
                if (info.st_dev, info.st_ino) == (device, inode):
                    path.unlink()
        await trio.lowlevel.checkpoint()


def refuse_cid(name: object) -> str | None:
    """Why the vsock peer ``name`` (CID, port) may not connect, or None when it is the host."""
    match name:
        case (int(cid), int()) if cid == VMADDR_CID_HOST:
            return None
        case (int(cid), int()):
            return f"CID {cid} is not the host (CID {VMADDR_CID_HOST})"
    return f"{name!r} is not a vsock address"


def refuse_uid(uid: int, allowed: frozenset[int]) -> str | None:
    """Why a Unix socket's peer of this user id may not connect, or None when it may."""
    return None if uid in allowed else f"user id {uid} is not among {sorted(allowed)}"


def peer_uid(sock: socket.socket | trio.socket.SocketType) -> int:
    """The user id of the process at the other end of a Unix socket, as of its connect.

    SO_PEERCRED on Linux (unix(7)), LOCAL_PEERCRED with struct xucred on macOS (sys/un.h, sys/ucred.h).
    """
    if sys.platform == "darwin":
        _version, uid = struct.unpack_from("=II", sock.getsockopt(0, 1, 76))
        return int(uid)
    _pid, uid, _gid = struct.unpack("=iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)


def peer_groups(sock: socket.socket | trio.socket.SocketType) -> frozenset[int]:
    """The group ids, the supplementary ones included, of the process at the other end, as of its connect.

    SO_PEERCRED and SO_PEERGROUPS on Linux (unix(7), Linux 4.13), struct xucred on macOS (sys/ucred.h).
    """
    if sys.platform == "darwin":
        _version, _uid, count = struct.unpack_from("=IIh", sock.getsockopt(0, 1, 76))
        return frozenset(struct.unpack_from(f"={count}I", sock.getsockopt(0, 1, 76), 12))
    _pid, _uid, gid = struct.unpack("=iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        further = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MAX_OPTION)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        further = b""  # in more groups than Python can be told of
    return frozenset({gid, *struct.unpack(f"={len(further) // 4}I", further)})
