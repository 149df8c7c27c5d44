"""The lab's container runtime, through its contract: images, processes, logs, and that nothing is left."""

from __future__ import annotations

import gzip
import io
import os
import signal
import tarfile
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
from fabric import until
from runtime_client import Runtime, add_file, busybox_tar, open_runtime, runtime_process

from taploom.contracts.taploom.runtime import v1
from taploom.rpc import RpcError, StatusCode

pytestmark = pytest.mark.system

SLEEP = ("sleep", "1000")


@pytest.fixture(scope="module")
def path() -> Iterator[Path]:
    with runtime_process() as process:

        async def prepare() -> None:
            async with open_runtime(process.path) as runtime:
                await runtime.add_image(busybox_tar(), "box")

        trio.run(prepare)
        yield process.path


@pytest.fixture
async def runtime(path: Path) -> AsyncIterator[Runtime]:
    async with open_runtime(path) as runtime:
        yield runtime


async def refused(call: Callable[[], object], code: StatusCode) -> str:
    """Awaits a call that must fail with the code; returns the message."""
    with pytest.raises(RpcError) as caught:
        await call()  # type: ignore[misc]
    assert caught.value.code == code, caught.value
    return caught.value.message


async def test_info(runtime: Runtime) -> None:
    info = await runtime.client.get_info(v1.GetInfoRequest())
    assert (info.name, info.contract_versions) == ("lab", [1])
    assert set(info.features) == {
        v1.RuntimeFeature.TERMINAL,
        v1.RuntimeFeature.HOST_NETWORK,
        v1.RuntimeFeature.IMAGES,
    }
    assert info.kernel_version == os.uname().release
    assert info.memory_bytes > 0
    assert info.cpus > 0


async def test_images(runtime: Runtime) -> None:
    changes = ['CMD ["sh"]', 'ENV A=1 B="2 3"', "EXPOSE 80 53/udp", "LABEL who=me", "WORKDIR /srv", "USER web"]
    image = await runtime.add_image(gzip.compress(busybox_tar()), "docker.io/library/tool:1", changes)
    assert image.references == ["tool:1"]
    assert image.config is not None
    assert image.config.command == ["sh"]
    assert image.config.environment == ["A=1", "B=2 3"]
    assert image.config.exposed_ports == ["80/tcp", "53/udp"]
    assert (image.config.labels, image.config.working_directory, image.config.user) == ({"who": "me"}, "/srv", "web")
    assert image.size_bytes > Path("/bin/busybox").stat().st_size
    for name in ("tool:1", "docker.io/library/tool:1", image.id, image.id[7:19]):
        assert (await runtime.image(name)).id == image.id
    assert await refused(lambda: runtime.image("tool"), StatusCode.NOT_FOUND) == "No such image: tool:latest"
    listed = [entry.id for entry in (await runtime.client.list_images(v1.ListImagesRequest())).images]
    assert listed[0] == image.id
    await runtime.client.tag_image(v1.TagImageRequest(image="tool:1", reference="tool"))
    removed = await runtime.client.remove_image(v1.RemoveImageRequest(image="tool:1"))
    assert (removed.untagged, removed.deleted_id) == (["tool:1"], "")
    container = await runtime.create("tool")
    await refused(
        lambda: runtime.client.remove_image(v1.RemoveImageRequest(image="tool")), StatusCode.FAILED_PRECONDITION
    )
    removed = await runtime.client.remove_image(v1.RemoveImageRequest(image="tool", force=True))
    assert (removed.untagged, removed.deleted_id) == (["tool:latest"], image.id)
    await runtime.boot(container)  # it has what it was made of
    assert (await runtime.follow(container, "echo", "there")).stdout == b"there\n"
    host = await runtime.image("host")
    assert host.host
    await refused(
        lambda: runtime.client.remove_image(v1.RemoveImageRequest(image="host")), StatusCode.FAILED_PRECONDITION
    )


async def test_images_that_are_none(runtime: Runtime, path: Path) -> None:
    whole = busybox_tar()

    def packed(name: str, link: str = "", kind: bytes = tarfile.REGTYPE) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, link
            archive.addfile(member)
            add_file(archive, "after", b"x")
        return buffer.getvalue()

    before = len((await runtime.client.list_images(v1.ListImagesRequest())).images)
    for data, reason in (
        (b"\1" * 4096, "archive/tar: invalid tar header"),
        (whole[:20000], "unexpected EOF"),
        (gzip.compress(whole)[:20000], "unexpected EOF"),
        (packed("../escape"), "outside"),
        (packed("etc/x", "../../../etc/passwd", tarfile.SYMTYPE), "outside"),
        (packed("etc/x", "../../etc/passwd", tarfile.LNKTYPE), "outside"),
    ):
        message = await refused(lambda data=data: runtime.add_image(data, "bad"), StatusCode.INVALID_ARGUMENT)  # type: ignore[misc]
        assert reason in message
    assert "valid change" in await refused(lambda: runtime.add_image(whole, "", ["RUN x"]), StatusCode.INVALID_ARGUMENT)
    assert "lowercase" in await refused(lambda: runtime.add_image(whole, "Bad"), StatusCode.INVALID_ARGUMENT)
    assert len((await runtime.client.list_images(v1.ListImagesRequest())).images) == before
    assert not list((path / "images").glob("new-*"))


async def test_links_of_an_image_lead_nowhere_else(runtime: Runtime, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        link = tarfile.TarInfo("out")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        archive.addfile(link)
        add_file(archive, "out/file", b"x")
    with pytest.raises(RpcError):  # there is no such directory in the image
        await runtime.add_image(buffer.getvalue())
    assert not list(tmp_path.iterdir())


async def test_a_main_process(runtime: Runtime) -> None:
    script = "echo $$ $A $HOME; hostname; pwd; id -u; id -G; cat /proc/sys/kernel/domainname; echo oops >&2; exit 3"
    result = await runtime.run(
        "box",
        *("sh", "-c", script),
        boot={"hostname": "web1", "domainname": "example.org"},
        environment=["A=b c"],
        user="web",
        working_directory="/new/place",
    )
    assert result.stdout.decode().split("\n") == [
        *("1 b c /srv", "web1", "/new/place", "33", "33 44", "example.org", ""),
    ]
    assert (result.stderr, result.exit_code) == (b"oops\n", 3)


async def test_what_cannot_be_started(runtime: Runtime) -> None:
    container = await runtime.create("box")
    await refused(lambda: runtime.start(container, *SLEEP), StatusCode.FAILED_PRECONDITION)  # not booted
    await runtime.boot(container)
    texts = {
        ("nosuch",): 'exec: "nosuch": executable file not found in $PATH',
        ("/nosuch",): 'exec: "/nosuch": stat /nosuch: no such file or directory',
        ("/etc",): 'exec: "/etc": permission denied',
        ("/etc/passwd",): 'exec: "/etc/passwd": permission denied',
    }
    for arguments, text in texts.items():
        assert await refused(lambda a=arguments: runtime.start(container, *a), StatusCode.INVALID_ARGUMENT) == text  # type: ignore[misc]
    message = await refused(lambda: runtime.start(container, "sh", user="nobody2"), StatusCode.INVALID_ARGUMENT)
    assert message == "unable to find user nobody2: no matching entries in passwd file"
    await refused(lambda: runtime.start(container, "sh", process="e"), StatusCode.FAILED_PRECONDITION)
    await runtime.start(container, *SLEEP)
    await refused(lambda: runtime.start(container, *SLEEP), StatusCode.FAILED_PRECONDITION)
    for arguments, text in texts.items():
        message = await refused(
            lambda a=arguments: runtime.start(container, *a, process="e"), StatusCode.INVALID_ARGUMENT
        )  # type: ignore[misc]
        assert message == text
    message = await refused(
        lambda: runtime.start(container, "ls", process="e", working_directory="/nosuch"), StatusCode.INVALID_ARGUMENT
    )
    assert message == 'chdir to cwd ("/nosuch") set in config.json failed: no such file or directory'
    await refused(lambda: runtime.start("0" * 64, "sh"), StatusCode.NOT_FOUND)
    await refused(lambda: runtime.boot("0" * 64), StatusCode.NOT_FOUND)


async def test_programs_that_the_kernel_does_not_execute(runtime: Runtime) -> None:
    for program, reason in (("garbage", b"Exec format error"), ("lost", b"No such file or directory")):
        result = await runtime.run("box", program)
        assert result.exit_code == 1
        assert reason in result.stderr
        assert program.encode() in result.stderr


async def test_further_processes(runtime: Runtime) -> None:
    container = await runtime.create("box")
    await runtime.boot(container)
    pid = await runtime.start(container, *SLEEP)
    with trio.fail_after(60):
        while cmdline(pid) != b"sleep\x001000\0":  # the pid is the machine's
            await trio.sleep(0.01)
    result = await runtime.execute(container, "sh", "-c", "echo out; echo err >&2; exit 7", user="33:44")
    assert (result.stdout, result.stderr, result.exit_code) == (b"out\n", b"err\n", 7)
    assert (await runtime.execute(container, "id", "-u", "-G", user="33:44")).exit_code is not None
    assert b"sleep" in (await runtime.execute(container, "ps")).stdout
    assert await runtime.log(container) == []
    await runtime.start(container, *SLEEP, process="long")
    assert (await runtime.status(container)).process_ids == ["long"]
    await runtime.signal(container, signal.SIGKILL, "long")
    with trio.fail_after(60):
        while (await runtime.status(container)).process_ids:
            await trio.sleep(0.01)
    await refused(lambda: runtime.signal(container, 15, "long"), StatusCode.NOT_FOUND)


async def test_input(runtime: Runtime) -> None:
    data = os.urandom(3 << 20)
    result = await runtime.run("box", "cat", stdin_data=data)
    assert result.stdout == data
    assert result.exit_code == 0
    container = await runtime.create("box")
    await runtime.boot(container)
    await runtime.start(container, *SLEEP)
    assert (await runtime.execute(container, "wc", "-c", stdin_data=data)).stdout.strip() == str(len(data)).encode()
    # Without stdin_once it stays open for the next who attaches.
    other = await runtime.create("box")
    await runtime.boot(other)
    await runtime.start(other, "sh", "-c", "read a; echo got $a; read b; echo got $b", stdin=True)
    for line in (b"one\n", b"two\n"):
        async with runtime.client.attach_process() as call:
            attach = v1.AttachProcess(container_id=other, stdout=True, stdin=True)
            await call.send(v1.AttachProcessRequest(attach=attach))
            await call.receive()
            await call.send(v1.AttachProcessRequest(stdin=line))
            await call.done_writing()
            message = await call.receive()
            assert message is not None
            assert message.stdout == b"got " + line
    await runtime.until(other, v1.ContainerState.EXITED)
    assert (await runtime.run("box", "cat")).exit_code == 0  # no input: /dev/null
    closed = await runtime.run("box", "sh", "-c", "exec >&- 2>&-; read a; exit $a", stdin_data=b"7\n")
    assert closed.exit_code == 7


async def test_a_terminal(runtime: Runtime) -> None:
    result = await runtime.run("box", "sh", "-c", "tty; stty size; echo err >&2", terminal=True, columns=100, rows=30)
    assert (result.stdout, result.stderr) == (b"/dev/pts/0\r\n30 100\r\nerr\r\n", b"")
    container = await runtime.create("box")
    await runtime.boot(container)
    await runtime.start(container, "sh", terminal=True, stdin=True)
    async with runtime.client.attach_process() as call:
        attach = v1.AttachProcess(container_id=container, stdout=True, stdin=True)
        await call.send(v1.AttachProcessRequest(attach=attach))
        await call.receive()
        await runtime.client.resize_process(v1.ResizeProcessRequest(container_id=container, columns=77, rows=11))
        await call.send(v1.AttachProcessRequest(stdin=b"stty size; exit 4\n"))
        output = b""
        exit_code = None
        async for message in call:
            output += message.stdout or b""
            if message.exited is not None:
                exit_code = message.exited.exit_code
        assert b"11 77\r\n" in output
        assert exit_code == 4
    await refused(
        lambda: runtime.client.resize_process(v1.ResizeProcessRequest(container_id=container, columns=7, rows=1)),
        StatusCode.FAILED_PRECONDITION,
    )


async def test_signals_and_exit_codes(runtime: Runtime) -> None:
    for signum, script, code in (
        (signal.SIGKILL, "echo ready; sleep 1000", 137),
        (signal.SIGTERM, "trap 'exit 5' TERM; echo ready; sleep 1000 & wait", 5),
        (signal.SIGUSR1, "trap 'kill -TERM $$; trap - TERM' USR1; echo ready; sleep 1000 & wait; exit 9", 9),
    ):
        container = await runtime.create("box")
        await runtime.boot(container)
        await runtime.start(container, "sh", "-c", script)
        async with runtime.client.read_log(v1.ReadLogRequest(container_id=container, follow=True)) as log:
            assert (await log.receive()) is not None
        await runtime.signal(container, signum)
        status = await runtime.until(container, v1.ContainerState.EXITED)
        assert status.exit_code == code
        await refused(lambda c=container: runtime.signal(c, 15), StatusCode.FAILED_PRECONDITION)  # type: ignore[misc]


async def test_life_of_a_container(runtime: Runtime) -> None:
    container = await runtime.create("box")
    assert (await runtime.status(container)).state == v1.ContainerState.CREATED
    booted = await runtime.boot(container)
    assert booted == await runtime.boot(container)
    assert Path(booted.guest_address.removeprefix("unix:")).is_socket()
    assert (await runtime.status(container)).state == v1.ContainerState.BOOTED
    result = await runtime.follow(container, "sh", "-c", "echo first; echo kept > /kept; touch /tmp/x")
    assert result.exit_code == 0
    status = await runtime.status(container)
    assert (status.state, status.exit_code, status.pid) == (v1.ContainerState.EXITED, 0, 0)
    assert status.started_at is not None and status.finished_at is not None
    assert status.started_at <= status.finished_at
    await runtime.halt(container)
    await runtime.halt(container)
    status = await runtime.status(container)
    assert (status.state, status.guest_address) == (v1.ContainerState.EXITED, "")
    await runtime.boot(container)
    result = await runtime.follow(container, "sh", "-c", "cat /kept; exit 2")
    assert (result.stdout, result.exit_code) == (b"kept\n", 2)
    assert [entry.data for entry in await runtime.log(container)] == [b"first\n", b"kept\n"]
    directory = Path(booted.guest_address.removeprefix("unix:")).parent
    await runtime.delete(container)
    await runtime.delete(container)
    assert not directory.exists()
    await refused(lambda: runtime.boot(container), StatusCode.NOT_FOUND)


async def test_logs(runtime: Runtime) -> None:
    container = await runtime.create("box")
    await runtime.boot(container)
    began = datetime.now(UTC)
    long = 16384 * 2 + 5
    script = f"seq 3; echo err >&2; head -c {long} /dev/zero; echo; echo -n end; read x"
    await runtime.start(container, "sh", "-c", script, stdin=True, stdin_once=True)
    entries: list[v1.ReadLogResponse] = []
    async with runtime.client.read_log(v1.ReadLogRequest(container_id=container, follow=True)) as log:
        async for entry in log:
            entries.append(entry)
            if len(entries) == 7:  # all but what has no line's end yet
                async with runtime.client.attach_process() as call:
                    attach = v1.AttachProcess(container_id=container, stdin=True)
                    await call.send(v1.AttachProcessRequest(attach=attach))
                    await call.receive()
                    await call.done_writing()
                    assert (await call.receive()).exited is not None  # type: ignore[union-attr]
    out = [entry.data for entry in entries if entry.stream == v1.StandardStream.STDOUT]
    assert out == [b"1\n", b"2\n", b"3\n", bytes(16384), bytes(16384), bytes(5) + b"\n", b"end"]
    assert [entry.data for entry in entries if entry.stream == v1.StandardStream.STDERR] == [b"err\n"]
    times = [entry.time for entry in entries if entry.time is not None]
    assert times == sorted(times)
    assert began <= times[0] <= datetime.now(UTC)
    assert await runtime.log(container) == entries
    assert await runtime.log(container, tail=2) == entries[-2:]
    assert await runtime.log(container, tail=0) == []
    assert await runtime.log(container, tail=100, follow=True) == entries
    assert await runtime.log(container, since=datetime.now(UTC)) == []
    assert await runtime.log(container, since=times[-1]) == entries[times.index(times[-1]) :]
    assert await runtime.log(container, until=began - timedelta(seconds=1)) == []


async def test_events(runtime: Runtime) -> None:
    async with runtime.client.watch_events(v1.WatchEventsRequest()) as events:
        assert (await events.receive()).started is not None  # type: ignore[union-attr]
        container = await runtime.create("box")
        await runtime.boot(container)
        await runtime.start(container, *SLEEP)
        await runtime.start(container, "false", process="e1")
        exited = (await events.receive()).exited  # type: ignore[union-attr]
        assert exited is not None
        assert (exited.container_id, exited.process_id, exited.exit_code) == (container, "e1", 1)
        await runtime.halt(container)
        exited = (await events.receive()).exited  # type: ignore[union-attr]
        assert exited is not None
        assert (exited.container_id, exited.process_id, exited.exit_code) == (container, "", 137)


async def test_file_systems(runtime: Runtime, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "file").write_text("mine")
    mounts = [
        v1.Mount(source=str(tmp_path / "shared"), target="/data"),
        v1.Mount(source=str(tmp_path / "file"), target="/etc/mine", read_only=True),
        v1.Mount(source="", target="/scratch"),
    ]
    container = await runtime.create("box", writable=False, mounts=mounts)
    await runtime.boot(container)
    script = (
        "echo 1 > /data/new; echo 2 > /scratch/x && cat /scratch/x; cat /etc/mine; touch /no; echo > /etc/mine; true"
    )
    result = await runtime.follow(container, "sh", "-c", script)
    assert result.stdout == b"2\nmine"
    assert result.stderr.count(b"Read-only file system") == 2
    assert (tmp_path / "shared/new").read_text() == "1\n"
    await runtime.delete(container)
    assert (tmp_path / "shared/new").exists()


async def test_what_a_container_may(runtime: Runtime) -> None:
    read = ("grep", "CapEff", "/proc/self/status")
    assert (await runtime.run("box", *read)).stdout.split()[1] == b"00000000a80425fb"
    assert (await runtime.run("box", *read, drop_capabilities=["ALL"])).stdout.split()[1] == b"0" * 16
    added = await runtime.run("box", *read, drop_capabilities=["ALL"], add_capabilities=["NET_ADMIN"])
    assert int(added.stdout.split()[1], 16) == 1 << 12
    everything = await runtime.run("box", *read, privileged=True)
    ours = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapBnd"))
    assert everything.stdout.split()[1].decode() == ours.split()[1]
    written = await runtime.run("box", "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward || echo no; ls /proc/scsi")
    assert written.stdout == b"no\n"
    device = await runtime.run("box", "sh", "-c", "mknod /disk b 254 0 && head -c1 /disk")
    assert device.exit_code != 0  # a device on the root file system leads nowhere


async def test_the_machine_as_an_image(runtime: Runtime) -> None:
    mark = Path(f"/etc/tlt-{os.getpid()}")
    result = await runtime.run("host", "sh", "-c", f"echo x > {mark}; cat {mark}; ls /run; cat /etc/hostname")
    assert result.stdout == b"x\nbox\n"
    assert not mark.exists()


async def test_the_machines_network(runtime: Runtime) -> None:
    container = await runtime.create("box")
    booted = await runtime.boot(container, host=True)
    assert booted.guest_address == ""
    result = await runtime.follow(container, "readlink", "/proc/self/ns/net")
    assert result.stdout.decode().strip() == str(Path("/proc/self/ns/net").readlink())
    own = await runtime.run(
        "box", "sh", "-c", "readlink /proc/self/ns/net; cat /sys/class/net/lo/operstate; ls /sys/class/net"
    )
    assert own.stdout.split()[0] != result.stdout.strip()
    assert own.stdout.split()[-1] == b"lo"


async def test_many_at_once(runtime: Runtime) -> None:
    addresses: set[str] = set()
    pids: set[int] = set()
    limiter = trio.CapacityLimiter(8)

    async def one() -> None:
        async with limiter:
            container = await runtime.create("box")
            addresses.add((await runtime.boot(container)).guest_address)
            pids.add(await runtime.start(container, *SLEEP))

    async with trio.open_nursery() as nursery:
        for _ in range(24):
            nursery.start_soon(one)
    assert len(addresses) == len(pids) == 24
    async with trio.open_nursery() as nursery:
        for container in runtime.created:
            nursery.start_soon(runtime.delete, container)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


async def test_an_agent_that_is_killed_comes_back(runtime: Runtime) -> None:
    container = await runtime.create("box")
    booted = await runtime.boot(container)
    await runtime.start(container, *SLEEP)
    control = Path(booted.guest_address.removeprefix("unix:"))
    control.unlink()
    agents = [pid for pid in in_namespace_of((await runtime.status(container)).pid) if b"python" in cmdline(pid)]
    assert len(agents) == 1
    os.kill(agents[0], signal.SIGKILL)
    with trio.fail_after(60):
        while not control.exists():
            await trio.sleep(0.01)
    assert (await runtime.status(container)).state == v1.ContainerState.RUNNING


async def test_the_process_that_agents_are_forked_from_comes_back(runtime: Runtime) -> None:
    container = await runtime.create("box")
    booted = await runtime.boot(container)
    pid = await runtime.start(container, *SLEEP)
    control = Path(booted.guest_address.removeprefix("unix:"))
    control.unlink()
    agent = next(pid for pid in in_namespace_of(pid) if b"python" in cmdline(pid))
    zygote = int(Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[1])
    assert b"zygote" in cmdline(zygote)
    os.kill(zygote, signal.SIGKILL)
    with trio.fail_after(60):
        while not control.exists():
            await trio.sleep(0.01)
    assert (await runtime.status(container)).pid == pid
    await runtime.boot(await runtime.create("box"))


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def in_namespace_of(pid: int) -> list[int]:
    """The processes in a process's network namespace."""
    namespace = Path(f"/proc/{pid}/ns/net").readlink()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "ns/net").readlink() == namespace:
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def test_a_runtime_that_is_killed() -> None:
    async def start(path: Path) -> tuple[str, int]:
        async with open_runtime(path) as runtime:
            await runtime.add_image(busybox_tar(), "box")
            container = await runtime.create("box")
            await runtime.boot(container)
            pid = await runtime.start(container, "sh", "-c", "sleep 1000 & echo out; sleep 1000")
            await runtime.start(container, *SLEEP, process="e")
            async with runtime.client.read_log(v1.ReadLogRequest(container_id=container, follow=True)) as log:
                assert (await log.receive()) is not None
            runtime.created = []
            return container, pid

    async def again(path: Path, container: str) -> None:
        async with open_runtime(path) as runtime:
            status = await runtime.status(container)
            assert (status.state, status.exit_code) == (v1.ContainerState.EXITED, 137)
            await runtime.boot(container)
            assert (await runtime.follow(container, "echo", "back")).stdout == b"back\n"
            assert [entry.data for entry in await runtime.log(container)] == [b"out\n", b"back\n"]

    with runtime_process() as process:
        container, pid = trio.run(start, process.path)
        inside = in_namespace_of(pid)
        assert len(inside) >= 4  # what sleeps, and the agent
        process.end(kill=True)
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in inside), "everything in the container is gone")
        process.start()
        trio.run(again, process.path, container)
