"""Addresses as streams: real sockets of this kernel, and a small VMM of our own."""

from __future__ import annotations

import logging
import os
import resource
import socket
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

import taploom.address
from taploom.address import (
    AddressError,
    CheckedListener,
    FdAddress,
    HybridAddress,
    UnixAddress,
    VsockAddress,
    close_stream,
    connect,
    open_listener,
    parse_address,
    peer_uid,
    set_buffers,
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "s"
    path.mkdir(mode=0o700)
    return path


async def exchange(client: trio.SocketStream, server: trio.SocketStream) -> None:
    await client.send_all(b"ping")
    assert await server.receive_some(4) == b"ping"
    await server.send_all(b"pong")
    assert await client.receive_some(4) == b"pong"


# Unix sockets


async def test_unix_stream_and_permissions(tmp_path: Path) -> None:
    address = UnixAddress(str(tmp_path / "new" / "x.sock"))
    async with await open_listener(address) as listener:
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
        assert stat.S_IMODE((tmp_path / "new" / "x.sock").stat().st_mode) == 0o600
        client = await connect(address)
        server = await listener.accept()
        assert peer_uid(server.socket) == os.geteuid()
        await exchange(client, server)
        await client.aclose()
        await server.aclose()
    assert not (tmp_path / "new" / "x.sock").exists()


async def test_socket_for_other_users_is_reachable_for_them(tmp_path: Path) -> None:
    address = UnixAddress(str(tmp_path / "shared" / "x.sock"))
    async with await open_listener(address, allowed_uids=frozenset({0, os.geteuid(), 12345})):
        assert stat.S_IMODE((tmp_path / "shared" / "x.sock").stat().st_mode) == 0o666


async def test_other_user_is_refused_and_the_listener_goes_on(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address = UnixAddress(str(directory / "x.sock"))
    async with await open_listener(address, allowed_uids=frozenset({os.geteuid() + 1})) as listener:
        refused = await connect(address)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.accept)
            assert await refused.receive_some(1) == b""
            nursery.cancel_scope.cancel()
        assert f"user id {os.geteuid()} is not among" in caplog.text
        await refused.aclose()


async def test_stale_socket_is_replaced_and_a_live_one_is_not(directory: Path) -> None:
    path = directory / "x.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
    address = UnixAddress(str(path))
    async with await open_listener(address) as listener:
        with pytest.raises(OSError, match="another process listens there"):
            await open_listener(address)
        client = await connect(address)
        await (await listener.accept()).aclose()  # the probe of the second open_listener
        await exchange(client, await listener.accept())
        await client.aclose()


async def test_path_that_is_no_socket_is_kept(directory: Path) -> None:
    (directory / "x.sock").write_text("precious")
    with pytest.raises(FileExistsError, match="not a socket"):
        await open_listener(UnixAddress(str(directory / "x.sock")))
    assert (directory / "x.sock").read_text() == "precious"


async def test_directory_that_others_write_to_is_refused(directory: Path) -> None:
    directory.chmod(0o777)
    with pytest.raises(AddressError, match="mode 0700"):
        await open_listener(UnixAddress(str(directory / "x.sock")))


async def test_closing_leaves_a_successors_socket(directory: Path) -> None:
    path = directory / "x.sock"
    listener = await open_listener(UnixAddress(str(path)))
    path.unlink()
    async with await open_listener(UnixAddress(str(path))):
        await listener.aclose()
        assert path.exists()


async def test_closed_listener_says_so(directory: Path) -> None:
    listener = await open_listener(UnixAddress(str(directory / "x.sock")))
    async with trio.open_nursery() as nursery:

        async def accept() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await listener.accept()

        nursery.start_soon(accept)
        await trio.testing.wait_all_tasks_blocked()
        await listener.aclose()


async def test_listener_survives_running_out_of_descriptors(
    directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taploom.address, "_ACCEPT_BACKOFF", 0.001)
    address = UnixAddress(str(directory / "x.sock"))
    async with await open_listener(address) as listener:
        client = await connect(address)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest = os.dup(0)
        os.close(lowest)
        seen = trio.Event()

        class Handler(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                seen.set()

        handler = Handler()
        logging.getLogger("taploom.address").addHandler(handler)
        accepted: list[trio.SocketStream] = []
        try:
            async with trio.open_nursery() as nursery:

                async def accept() -> None:
                    accepted.append(await listener.accept())

                resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
                nursery.start_soon(accept)
                await seen.wait()
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            logging.getLogger("taploom.address").removeHandler(handler)
        assert "Too many open files" in caplog.text
        await exchange(client, accepted[0])
        await client.aclose()
        await accepted[0].aclose()


async def test_nobody_there(directory: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot connect to unix:.*x\.sock"):
        await connect(UnixAddress(str(directory / "x.sock")))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(directory / "x.sock"))
    with pytest.raises(ConnectionRefusedError, match="cannot connect to"):
        await connect(UnixAddress(str(directory / "x.sock")))


# inherited descriptors


async def test_fd_listening_and_connected(directory: Path) -> None:
    inherited = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    inherited.bind(str(directory / "x.sock"))
    inherited.listen()
    async with await open_listener(FdAddress(inherited.detach())) as listener:
        ours, theirs = socket.socketpair()
        client = await connect(UnixAddress(str(directory / "x.sock")))
        server = await listener.accept()
        await exchange(client, server)
        one = await connect(FdAddress(ours.detach()))
        await exchange(one, trio.SocketStream(trio.socket.from_stdlib_socket(theirs)))
        for stream in (client, server, one):
            await stream.aclose()
    theirs.close()
    assert (directory / "x.sock").exists(), "an inherited socket's path belongs to who made it"


async def test_fd_of_the_wrong_kind(directory: Path) -> None:
    a, b = socket.socketpair()
    with a, b, pytest.raises(AddressError, match="not a listening socket"):
        await open_listener(FdAddress(a.fileno()))
    closed = os.dup(0)
    os.close(closed)
    with pytest.raises(AddressError, match="not an open socket"):
        await connect(FdAddress(closed))
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as inet:
        with pytest.raises(AddressError, match="AF_UNIX or AF_VSOCK"):
            await connect(FdAddress(inet.fileno()))
        os.fstat(inet.fileno())
    with (directory / "file").open("w") as file, pytest.raises(AddressError, match="not an open socket"):
        await open_listener(FdAddress(file.fileno()))
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(directory / "x.sock"))
    listening.listen()
    with pytest.raises(AddressError, match="a connected one is needed"):
        await connect(FdAddress(listening.detach()))


# vsock


async def open_vsock() -> CheckedListener:
    for port in range(40100, 40400):
        try:
            return await open_listener(VsockAddress(0xFFFFFFFF, port))
        except OSError:
            continue
    raise AssertionError("no free vsock port")


async def test_vsock_listens_on_every_cid() -> None:
    async with await open_vsock() as listener:
        assert isinstance(listener.address, VsockAddress)
        assert listener.socket.family == socket.AF_VSOCK
        assert listener.socket.getsockname() == (socket.VMADDR_CID_ANY, listener.address.port)
        assert listener.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        with pytest.raises(OSError, match=f"cannot listen on vsock:any:{listener.address.port}"):
            await open_listener(listener.address)
        # What socket activation would hand over.
        async with await open_listener(FdAddress(os.dup(listener.socket.fileno()))) as inherited:
            assert inherited.socket.family == socket.AF_VSOCK
            assert inherited._refusal(inherited.socket, (3, 1)) is not None


async def test_vsock_peers_other_than_the_host_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    """The accept path as it is, but for the connections, which only a VMM could make."""
    pairs = [socket.socketpair() for _ in range(3)]
    names = [(3, 5000), (1, 5000), (2, 5000)]

    async with await open_vsock() as listener:
        real = listener.socket

        class Accepting:
            family = real.family

            def __init__(self) -> None:
                self.queue = [
                    (trio.socket.from_stdlib_socket(pair[0]), name) for pair, name in zip(pairs, names, strict=True)
                ]

            async def accept(self) -> tuple[trio.socket.SocketType, object]:
                await trio.lowlevel.checkpoint()
                return self.queue.pop(0)

        listener.socket = Accepting()  # type: ignore[assignment]  # accept() is all that it needs
        stream = await listener.accept()
        listener.socket = real
        assert [pair[1].recv(1) for pair in pairs[:2]] == [b"", b""]
        await stream.send_all(b"x")
        assert pairs[2][1].recv(1) == b"x"
        assert "CID 3 is not the host" in caplog.text
        assert "CID 1 is not the host" in caplog.text
        await stream.aclose()
        for pair in pairs:
            pair[1].close()


async def test_cannot_connect_to_any_cid_nor_listen_on_hybrid() -> None:
    with pytest.raises(AddressError, match="only for listening"):
        await connect(parse_address("vsock:any:40000"))
    with pytest.raises(AddressError, match="can only be connected to"):
        await open_listener(parse_address("hybrid:/x:1"))


def test_buffers() -> None:
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as vsock:
        set_buffers(vsock)
        assert vsock.getsockopt(socket.AF_VSOCK, socket.SO_VM_SOCKETS_BUFFER_MAX_SIZE) == 8 << 20
        assert vsock.getsockopt(socket.AF_VSOCK, socket.SO_VM_SOCKETS_BUFFER_SIZE) == 8 << 20
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as unix:
        before = unix.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        set_buffers(unix)
        assert unix.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= before
        if os.geteuid() == 0:
            assert unix.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 8 << 20  # the kernel doubles it


def test_closing_with_something_unread_is_an_end_of_file() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.sendall(b"unread")
    ours.send(b"last words")
    close_stream(ours)
    assert theirs.recv(100) == b"last words"
    assert theirs.recv(100) == b""
    theirs.close()


# hybrid vsock

Script = Callable[[trio.SocketStream], Awaitable[None]]


async def with_vmm(directory: Path, script: Script, client: Callable[[HybridAddress], Awaitable[None]]) -> None:
    """A VMM's Unix socket that does ``script`` with its one connection."""
    path = str(directory / "v.sock")
    async with await open_listener(UnixAddress(path)) as listener, trio.open_nursery() as nursery:

        async def serve() -> None:
            async with await listener.accept() as stream:
                await script(stream)

        nursery.start_soon(serve)
        await client(HybridAddress(path, 5555))


async def read_connect(stream: trio.SocketStream) -> None:
    line = b""
    while not line.endswith(b"\n"):
        line += await stream.receive_some(1)
    assert line == b"CONNECT 5555\n"


@pytest.mark.parametrize("reply", [b"OK 1073741824\n", b"OK 1\r\n", b"OK\n"])
async def test_hybrid_connect_leaves_what_follows_in_the_stream(directory: Path, reply: bytes) -> None:
    async def vmm(stream: trio.SocketStream) -> None:
        await read_connect(stream)
        await stream.send_all(reply + b"pong")
        assert await stream.receive_some(4) == b"ping"

    async def client(address: HybridAddress) -> None:
        async with await connect(address) as stream:
            assert await stream.receive_some(100) == b"pong"
            await stream.send_all(b"ping")

    await with_vmm(directory, vmm, client)


async def test_hybrid_reply_in_single_bytes(directory: Path) -> None:
    async def vmm(stream: trio.SocketStream) -> None:
        await read_connect(stream)
        for byte in b"OK 12\n":
            await stream.send_all(bytes([byte]))
            await trio.testing.wait_all_tasks_blocked()

    async def client(address: HybridAddress) -> None:
        await (await connect(address)).aclose()

    await with_vmm(directory, vmm, client)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (b"", "nothing listens on port 5555"),
        (b"OK 1", "nothing listens on port 5555"),
        (b"ERR no such port\n", "instead of 'OK PORT'"),
        (b"OKAY 1\n", "instead of 'OK PORT'"),
        (b"OK -1\n", "instead of 'OK PORT'"),
        (b"\n", "instead of 'OK PORT'"),
        (b"OK " + b"1" * 100, "longer than 64 bytes"),
        (bytes(200), "longer than 64 bytes"),
    ],
)
async def test_hybrid_refusals(directory: Path, reply: bytes, message: str) -> None:
    async def vmm(stream: trio.SocketStream) -> None:
        await read_connect(stream)
        await stream.send_all(reply)

    async def client(address: HybridAddress) -> None:
        with pytest.raises(ConnectionRefusedError, match=message):
            await connect(address)

    await with_vmm(directory, vmm, client)


async def test_hybrid_request_outlives_who_asked(directory: Path) -> None:
    """A VMM may not bear that a request's socket is closed before its answer: the next one to ask takes it over."""
    gave_up = trio.Event()

    async def vmm(stream: trio.SocketStream) -> None:
        await read_connect(stream)
        await stream.send_all(b"OK ")
        await gave_up.wait()
        with trio.move_on_after(0.05) as scope:
            await stream.receive_some(1)
        assert scope.cancelled_caught, "the socket was closed, or asked again"
        await stream.send_all(b"12\npong")
        assert await stream.receive_some(4) == b"ping"

    async def client(address: HybridAddress) -> None:
        with pytest.raises(TimeoutError, match="did not answer within"):
            await connect(address, timeout=0.05)
        with trio.move_on_after(0.05):
            await connect(address)
        gave_up.set()
        async with await connect(address) as stream:
            assert await stream.receive_some(100) == b"pong"
            await stream.send_all(b"ping")

    await with_vmm(directory, vmm, client)


async def test_hybrid_answer_that_nobody_waited_for(directory: Path) -> None:
    """It is closed by the next one to connect, who asks anew."""
    path = str(directory / "v.sock")
    with trio.fail_after(5):
        async with await open_listener(UnixAddress(path)) as listener:
            with pytest.raises(TimeoutError):
                await connect(HybridAddress(path, 5555), timeout=0.01)
            first = await listener.accept()
            await read_connect(first)
            await first.send_all(b"OK 12\n")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connect, HybridAddress(path, 5555))
                second = await listener.accept()
                await read_connect(second)
                assert await first.receive_some(1) == b""
                await second.send_all(b"OK 13\n")
            await first.aclose()
            await second.aclose()


async def test_hybrid_without_vmm(directory: Path) -> None:
    with pytest.raises(FileNotFoundError, match="cannot connect to hybrid:"):
        await connect(HybridAddress(str(directory / "v.sock"), 1))
