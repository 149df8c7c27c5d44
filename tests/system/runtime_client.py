"""A client of the lab's container runtime, and an image for it made from Debian's busybox-static."""

from __future__ import annotations

import io
import secrets
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from lab import cleanup
from lab.state import Lab
from taploom.address import connect, parse_address
from taploom.contracts.taploom.runtime import v1
from taploom.contracts.taploom.runtime.v1.rpc import RuntimeServiceClient
from taploom.rpc import open_channel

_APPLETS = (
    *(
        "sh",
        "cat",
        "echo",
        "sleep",
        "ls",
        "id",
        "hostname",
        "stty",
        "env",
        "mount",
        "touch",
        "ps",
        "test",
        "head",
        "kill",
    ),
    *("true", "false", "mkdir", "rm", "wc", "seq", "grep", "readlink", "dd", "tty", "mknod", "ping", "nc", "ip"),
)
PASSWD = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:33:web:/srv:/bin/sh\n"
GROUP = "root:x:0:\nweb:x:33:\nlogs:x:44:web\n"


def busybox_tar() -> bytes:
    """A root file system as a plain tar."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("bin", "etc", "root", "srv", "tmp"):
            directory = tarfile.TarInfo(name)
            directory.type, directory.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
            archive.addfile(directory)
        add_file(archive, "bin/busybox", Path("/bin/busybox").read_bytes(), 0o755)
        for applet in _APPLETS:
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(link)
        add_file(archive, "etc/passwd", PASSWD.encode())
        add_file(archive, "etc/group", GROUP.encode())
        add_file(archive, "bin/garbage", b"no program", 0o755)
        add_file(archive, "bin/lost", b"#!/nosuch\n", 0o755)
    return buffer.getvalue()


def add_file(archive: tarfile.TarFile, name: str, data: bytes, mode: int = 0o644) -> None:
    """Adds a regular file of root's."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), mode
    archive.addfile(member, io.BytesIO(data))


@dataclass
class Result:
    """What a process wrote, and how it ended."""

    stdout: bytes = b""
    stderr: bytes = b""
    exit_code: int | None = None


@dataclass
class Runtime:
    """The runtime's client, with shorthands. Containers that are made with it are deleted at the end."""

    client: RuntimeServiceClient
    created: list[str] = field(default_factory=list)

    async def add_image(
        self, tar: bytes, reference: str = "", changes: Sequence[str] = (), chunk: int = 65536
    ) -> v1.Image:
        """Imports an image."""
        async with self.client.import_image() as call:
            wanted = v1.ImportImage(reference=reference, changes=list(changes))
            await call.send(v1.ImportImageRequest(import_=wanted))
            for start in range(0, len(tar), chunk):
                await call.send(v1.ImportImageRequest(data=tar[start : start + chunk]))
            image = (await call.finish()).image
        assert image is not None
        return image

    async def image(self, name: str) -> v1.Image:
        image = (await self.client.get_image(v1.GetImageRequest(image=name))).image
        assert image is not None
        return image

    async def create(self, image: str, *, writable: bool = True, mounts: Sequence[v1.Mount] = ()) -> str:
        """Creates a container; returns its id."""
        container = secrets.token_hex(32)
        image_id = (await self.image(image)).id
        await self.client.create_container(
            v1.CreateContainerRequest(
                container_id=container, name="tlt", image_id=image_id, writable=writable, mounts=list(mounts)
            )
        )
        self.created.append(container)
        return container

    async def boot(
        self, container: str, *, hostname: str = "box", domainname: str = "", host: bool = False
    ) -> v1.BootContainerResponse:
        mode = v1.NetworkMode.HOST if host else v1.NetworkMode.GUEST
        return await self.client.boot_container(
            v1.BootContainerRequest(container_id=container, hostname=hostname, domainname=domainname, network_mode=mode)
        )

    async def start(self, container: str, *arguments: str, process: str = "", **spec: object) -> int:
        """Starts a process; returns its pid."""
        environment = ["PATH=/bin:/usr/bin", *spec.pop("environment", [])]  # type: ignore[misc]
        described = v1.ProcessSpec(arguments=list(arguments), environment=environment, **spec)  # type: ignore[arg-type]
        request = v1.StartProcessRequest(container_id=container, process_id=process, process=described)
        return (await self.client.start_process(request)).pid

    async def run(self, image: str, *arguments: str, boot: dict[str, object] | None = None, **spec: object) -> Result:
        """Runs a main process in a container of its own to its end."""
        container = await self.create(image)
        await self.boot(container, **(boot or {}))  # type: ignore[arg-type]
        return await self.follow(container, *arguments, **spec)

    async def execute(self, container: str, *arguments: str, **spec: object) -> Result:
        """Runs a further process to its end."""
        return await self.follow(container, *arguments, process=secrets.token_hex(32), **spec)

    async def follow(
        self, container: str, *arguments: str, process: str = "", stdin_data: bytes | None = None, **spec: object
    ) -> Result:
        """Attaches, starts, and collects everything."""
        result = Result()
        if stdin_data is not None:
            spec = {"stdin": True, "stdin_once": True, **spec}
        async with self.client.attach_process() as call:
            attach = v1.AttachProcess(
                container_id=container, process_id=process, stdout=True, stderr=True, stdin=stdin_data is not None
            )
            await call.send(v1.AttachProcessRequest(attach=attach))
            assert (await call.receive()).attached is not None  # type: ignore[union-attr]
            await self.start(container, *arguments, process=process, **spec)
            async with trio.open_nursery() as nursery:
                if stdin_data is not None:
                    nursery.start_soon(_feed, call, stdin_data)
                async for message in call:
                    result.stdout += message.stdout or b""
                    result.stderr += message.stderr or b""
                    if message.exited is not None:
                        result.exit_code = message.exited.exit_code
                nursery.cancel_scope.cancel()
        return result

    async def log(self, container: str, **request: object) -> list[v1.ReadLogResponse]:
        async with self.client.read_log(v1.ReadLogRequest(container_id=container, **request)) as call:  # type: ignore[arg-type]
            return [entry async for entry in call]

    async def status(self, container: str) -> v1.ContainerStatus:
        listed = (await self.client.list_containers(v1.ListContainersRequest())).containers
        return next(status for status in listed if status.container_id == container)

    async def signal(self, container: str, signum: int, process: str = "") -> None:
        await self.client.signal_process(
            v1.SignalProcessRequest(container_id=container, process_id=process, signal=signum)
        )

    async def halt(self, container: str) -> None:
        await self.client.halt_container(v1.HaltContainerRequest(container_id=container))

    async def delete(self, container: str) -> None:
        await self.client.delete_container(v1.DeleteContainerRequest(container_id=container))

    async def until(self, container: str, state: v1.ContainerState) -> v1.ContainerStatus:
        """Waits until the container is in a state."""
        with trio.fail_after(60):
            while True:
                status = await self.status(container)
                if status.state == state:
                    return status
                await trio.sleep(0.01)


async def _feed(call: object, data: bytes) -> None:
    for start in range(0, len(data), 1 << 16):
        await call.send(v1.AttachProcessRequest(stdin=data[start : start + (1 << 16)]))  # type: ignore[attr-defined]
    await call.done_writing()  # type: ignore[attr-defined]


class RuntimeProcess:
    """A runtime without the rest of a lab."""

    def __init__(self) -> None:
        self.lab = Lab("t" + secrets.token_hex(5))
        self.lab.create()
        self.start()

    @property
    def path(self) -> Path:
        """The lab's directory."""
        return self.lab.path

    def start(self) -> None:
        argv = [sys.executable, "-m", "lab.runtime", self.lab.name]
        self.process = subprocess.Popen(argv, env=self.lab.environment())

    def end(self, *, kill: bool = False) -> None:
        if kill:
            self.process.kill()
        else:
            self.process.terminate()
        self.process.wait(30)


@contextmanager
def runtime_process() -> Iterator[RuntimeProcess]:
    """A runtime that is ended, and removed, at the end."""
    process = RuntimeProcess()
    try:
        yield process
    finally:
        process.end()
        cleanup.remove(process.lab)


@asynccontextmanager
async def open_runtime(path: Path) -> AsyncIterator[Runtime]:
    """The runtime of the lab in that directory."""
    with trio.fail_after(60):
        while True:
            try:
                stream = await connect(parse_address(f"unix:{path}/runtime.sock"))
                break
            except OSError:
                await trio.sleep(0.02)
    async with open_channel(stream) as channel:
        runtime = Runtime(RuntimeServiceClient(channel))
        yield runtime
        for container in runtime.created:
            await runtime.delete(container)
