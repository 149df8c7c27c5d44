"""`taploom.runtime.v1` over the lab's images and containers."""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trio

from lab.runtime.bundle import MountSpec, ProcessSpec
from lab.runtime.containers import Container, Containers, Process, Record
from lab.runtime.errors import InvalidFailure, NotFoundFailure, RuntimeFailure, StateFailure
from lab.runtime.images import Image, ImageStore, architecture
from lab.runtime.streams import STDERR, STDOUT, Attachment, Stream
from taploom import __version__
from taploom.contracts.taploom.runtime import v1
from taploom.contracts.taploom.runtime.v1.rpc import RuntimeServiceBase
from taploom.rpc import ReceiveStream, RpcError, SendStream, ServerContext, StatusCode

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_STATES = {
    "created": v1.ContainerState.CREATED,
    "booted": v1.ContainerState.BOOTED,
    "running": v1.ContainerState.RUNNING,
    "exited": v1.ContainerState.EXITED,
}
_CODES = {
    NotFoundFailure: StatusCode.NOT_FOUND,
    InvalidFailure: StatusCode.INVALID_ARGUMENT,
    StateFailure: StatusCode.FAILED_PRECONDITION,
}
# Events that wait for a watcher that does not read; it has to start over after that.
_MAX_EVENTS = 10_000


@contextlib.contextmanager
def _statuses() -> Iterator[None]:
    """Failures as gRPC statuses."""
    try:
        yield
    except RuntimeFailure as error:
        raise RpcError(_CODES[type(error)], str(error)) from error
    except OSError as error:
        raise RpcError(StatusCode.UNAVAILABLE, str(error)) from error
    except BaseExceptionGroup as group:
        cause: BaseException = group
        while isinstance(cause, BaseExceptionGroup) and len(cause.exceptions) == 1:
            cause = cause.exceptions[0]
        if isinstance(cause, OSError):
            raise RpcError(StatusCode.UNAVAILABLE, str(cause)) from group
        raise


class RuntimeService(RuntimeServiceBase):
    """The service. `containers` is set before it is served."""

    containers: Containers

    def __init__(self, images: ImageStore) -> None:
        self._images = images
        self._instance_id = secrets.token_hex(8)
        self._watchers: set[trio.MemorySendChannel[v1.WatchEventsResponse]] = set()

    def process_ended(self, process: Process) -> None:
        """Tells who watches."""
        exited = _exited(process)
        for watcher in list(self._watchers):
            try:
                watcher.send_nowait(v1.WatchEventsResponse(time=exited.time, exited=exited))
            except trio.WouldBlock:
                watcher.close()
                self._watchers.discard(watcher)

    async def get_info(self, request: v1.GetInfoRequest, context: ServerContext) -> v1.GetInfoResponse:
        return v1.GetInfoResponse(
            name="lab",
            version=__version__,
            contract_versions=[1],
            features=[
                v1.RuntimeFeature.TERMINAL,
                *([v1.RuntimeFeature.HOST_NETWORK] if self.containers.host_network else []),
                v1.RuntimeFeature.IMAGES,
            ],
            instance_id=self._instance_id,
            kernel_version=platform.release(),
            architecture=platform.machine(),
            operating_system=_operating_system(),
            cpus=os.cpu_count() or 1,
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        )

    async def import_image(
        self, requests: ReceiveStream[v1.ImportImageRequest], context: ServerContext
    ) -> v1.ImportImageResponse:
        first = await requests.receive()
        wanted = first.import_ if first is not None else None
        if wanted is None:
            raise RpcError(StatusCode.INVALID_ARGUMENT, "the first message says what the image is to be")
        with _statuses():
            image = await self._images.add(
                _data(requests), reference=wanted.reference, comment=wanted.comment, changes=wanted.changes
            )
        return v1.ImportImageResponse(image=_image(image))

    async def list_images(self, request: v1.ListImagesRequest, context: ServerContext) -> v1.ListImagesResponse:
        return v1.ListImagesResponse(images=[_image(image) for image in self._images.all()])

    async def get_image(self, request: v1.GetImageRequest, context: ServerContext) -> v1.GetImageResponse:
        with _statuses():
            return v1.GetImageResponse(image=_image(self._images.get(request.image)))

    async def tag_image(self, request: v1.TagImageRequest, context: ServerContext) -> v1.TagImageResponse:
        with _statuses():
            self._images.tag(request.image, request.reference)
        return v1.TagImageResponse()

    async def remove_image(self, request: v1.RemoveImageRequest, context: ServerContext) -> v1.RemoveImageResponse:
        used = {container.record.image_id for container in self.containers.all()}
        with _statuses():
            untagged, deleted = self._images.remove(request.image, force=request.force, used=used)
            await self._remove_unused_layers()
        return v1.RemoveImageResponse(untagged=untagged, deleted_id=deleted)

    async def _remove_unused_layers(self) -> None:
        await self._images.remove_unused_layers({container.record.layer for container in self.containers.all()})

    async def create_container(
        self, request: v1.CreateContainerRequest, context: ServerContext
    ) -> v1.CreateContainerResponse:
        with _statuses():
            image = self._images.get(request.image_id)
            self.containers.create(
                Record(
                    id=request.container_id,
                    name=request.name,
                    image_id=image.id,
                    layer=image.layer,
                    writable=request.writable,
                    mounts=tuple(MountSpec(mount.source, mount.target, mount.read_only) for mount in request.mounts),
                )
            )
        return v1.CreateContainerResponse()

    async def boot_container(
        self, request: v1.BootContainerRequest, context: ServerContext
    ) -> v1.BootContainerResponse:
        with _statuses():
            container = self.containers.get(request.container_id)
            await self.containers.boot(
                container,
                hostname=request.hostname,
                domainname=request.domainname,
                own_network=request.network_mode != v1.NetworkMode.HOST,
            )
        guest = container.guest
        return v1.BootContainerResponse(
            guest_address=guest.control if guest else "", guest_data_address=guest.data if guest else ""
        )

    async def start_process(self, request: v1.StartProcessRequest, context: ServerContext) -> v1.StartProcessResponse:
        if request.process is None:
            raise RpcError(StatusCode.INVALID_ARGUMENT, "the process is missing")
        with _statuses():
            container = self.containers.get(request.container_id)
            pid = await self.containers.start(container, request.process_id, _spec(request.process))
        return v1.StartProcessResponse(pid=pid)

    async def attach_process(
        self,
        requests: ReceiveStream[v1.AttachProcessRequest],
        responses: SendStream[v1.AttachProcessResponse],
        context: ServerContext,
    ) -> None:
        first = await requests.receive()
        wanted = first.attach if first is not None else None
        if wanted is None:
            raise RpcError(StatusCode.INVALID_ARGUMENT, "the first message says what to attach to")
        with _statuses():
            container = self.containers.get(wanted.container_id)
        process = container.attachable(wanted.process_id)
        streams: set[Stream] = set()
        if wanted.stdout:
            streams.add(STDOUT)
        if wanted.stderr:
            streams.add(STDERR)
        attachment = process.streams.attach(frozenset(streams))
        try:
            await responses.send(v1.AttachProcessResponse(attached=v1.Attached()))
            async with trio.open_nursery() as nursery:
                if wanted.stdin:
                    nursery.start_soon(_carry_input, requests, process)
                await _send_output(attachment, process, responses)
                nursery.cancel_scope.cancel()
        finally:
            process.streams.detach(attachment)
            if wanted.process_id and not process.started and not process.streams.attached:
                container.processes.pop(wanted.process_id, None)

    async def signal_process(
        self, request: v1.SignalProcessRequest, context: ServerContext
    ) -> v1.SignalProcessResponse:
        with _statuses():
            container = self.containers.get(request.container_id)
            self.containers.signal(container, request.process_id, request.signal)
        return v1.SignalProcessResponse()

    async def resize_process(
        self, request: v1.ResizeProcessRequest, context: ServerContext
    ) -> v1.ResizeProcessResponse:
        with _statuses():
            process = self.containers.get(request.container_id).process(request.process_id)
            if not process.streams.has_terminal:
                raise StateFailure("the process has no terminal, or does not run")
            if not (0 <= request.columns < 1 << 16 and 0 <= request.rows < 1 << 16):
                raise InvalidFailure("a terminal has less than 65536 lines of less than 65536 characters")
            process.streams.resize(request.rows, request.columns)
        return v1.ResizeProcessResponse()

    async def halt_container(
        self, request: v1.HaltContainerRequest, context: ServerContext
    ) -> v1.HaltContainerResponse:
        with _statuses():
            await self.containers.halt(self.containers.get(request.container_id))
        return v1.HaltContainerResponse()

    async def delete_container(
        self, request: v1.DeleteContainerRequest, context: ServerContext
    ) -> v1.DeleteContainerResponse:
        try:
            container = self.containers.get(request.container_id)
        except NotFoundFailure:
            return v1.DeleteContainerResponse()
        with _statuses():
            await self.containers.delete(container)
            await self._remove_unused_layers()
        return v1.DeleteContainerResponse()

    async def list_containers(
        self, request: v1.ListContainersRequest, context: ServerContext
    ) -> v1.ListContainersResponse:
        return v1.ListContainersResponse(containers=[self._status(container) for container in self.containers.all()])

    def _status(self, container: Container) -> v1.ContainerStatus:
        record, guest = container.record, container.guest
        return v1.ContainerStatus(
            container_id=record.id,
            state=_STATES[container.state],
            pid=self.containers.pid(container),
            exit_code=container.main.ended.exit_code
            if container.main is not None and container.main.ended is not None
            else record.exit_code,
            started_at=datetime.fromisoformat(record.started_at) if record.started_at else None,
            finished_at=datetime.fromisoformat(record.finished_at) if record.finished_at else None,
            guest_address=guest.control if guest else "",
            guest_data_address=guest.data if guest else "",
            process_ids=sorted(process.id for process in container.processes.values() if process.running),
        )

    async def read_log(
        self, request: v1.ReadLogRequest, responses: SendStream[v1.ReadLogResponse], context: ServerContext
    ) -> None:
        with _statuses():
            log = self.containers.get(request.container_id).log
        since = _nanoseconds(request.since) if request.since is not None else 0
        until = _nanoseconds(request.until) if request.until is not None else None
        with trio.CancelScope() as scope:
            if until is not None:
                scope.deadline = trio.current_time() + max(until / 1e9 - datetime.now(UTC).timestamp(), 0) + 1.0
            async for entry in log.read(follow=request.follow, tail=request.tail):
                if until is not None and entry.time > until:
                    return
                if entry.time >= since:
                    message = v1.ReadLogResponse(
                        time=_EPOCH + timedelta(microseconds=entry.time // 1000),
                        stream=v1.StandardStream(entry.stream),
                        data=entry.data,
                    )
                    await responses.send(message)

    async def watch_events(
        self, request: v1.WatchEventsRequest, responses: SendStream[v1.WatchEventsResponse], context: ServerContext
    ) -> None:
        sender, receiver = trio.open_memory_channel[v1.WatchEventsResponse](_MAX_EVENTS)
        self._watchers.add(sender)
        try:
            await responses.send(v1.WatchEventsResponse(time=datetime.now(UTC), started=v1.WatchStarted()))
            async for event in receiver:
                await responses.send(event)
            raise RpcError(StatusCode.RESOURCE_EXHAUSTED, "too many events wait: watch anew and list the containers")
        finally:
            self._watchers.discard(sender)


async def _carry_input(requests: ReceiveStream[v1.AttachProcessRequest], process: Process) -> None:
    try:
        async for request in requests:
            if request.stdin:
                await process.streams.write(request.stdin)
    except RpcError as error:
        if error.code is not StatusCode.CANCELLED:  # it detached; the call itself is being ended
            raise
    finally:
        # Also when the other side is gone: a process that reads to the end of its input is not to wait for ever.
        with trio.CancelScope(shield=True):
            if process.started and process.stdin_once:
                await process.streams.close_input()


async def _send_output(
    attachment: Attachment, process: Process, responses: SendStream[v1.AttachProcessResponse]
) -> None:
    while (output := await attachment.get()) is not None:
        stream, data = output
        if stream == STDOUT:
            await responses.send(v1.AttachProcessResponse(stdout=data))
        else:
            await responses.send(v1.AttachProcessResponse(stderr=data))
    if process.failure:
        raise RpcError(StatusCode.FAILED_PRECONDITION, process.failure)
    await process.exited.wait()  # it may have closed its streams before
    await responses.send(v1.AttachProcessResponse(exited=_exited(process)))


async def _data(requests: ReceiveStream[v1.ImportImageRequest]) -> AsyncIterator[bytes]:
    async for request in requests:
        if request.import_ is not None:
            raise InvalidFailure("only the first message says what the image is to be")
        if request.data:
            yield request.data


def _exited(process: Process) -> v1.ProcessExited:
    assert process.ended is not None
    return v1.ProcessExited(
        container_id=process.container_id,
        process_id=process.id,
        exit_code=process.ended.exit_code,
        time=process.ended.time,
    )


def _spec(process: v1.ProcessSpec) -> ProcessSpec:
    for text in (*process.arguments, *process.environment, process.working_directory, process.user):
        if "\0" in text:
            raise InvalidFailure("a process's arguments and environment cannot have NUL bytes")
    return ProcessSpec(
        arguments=tuple(process.arguments),
        environment=tuple(process.environment),
        working_directory=process.working_directory,
        user=process.user,
        terminal=process.terminal,
        stdin=process.stdin,
        stdin_once=process.stdin_once,
        privileged=process.privileged,
        add_capabilities=tuple(process.add_capabilities),
        drop_capabilities=tuple(process.drop_capabilities),
        columns=process.columns,
        rows=process.rows,
    )


def _image(image: Image) -> v1.Image:
    config = image.config
    return v1.Image(
        id=image.id,
        references=list(image.references),
        created_at=image.created_at,
        size_bytes=image.size,
        config=v1.ImageConfig(
            command=list(config.command),
            entrypoint=list(config.entrypoint),
            environment=list(config.environment),
            working_directory=config.working_directory,
            user=config.user,
            labels=dict(config.labels),
            exposed_ports=list(config.exposed_ports),
            volumes=list(config.volumes),
            stop_signal=config.stop_signal,
        ),
        architecture=architecture(),
        comment=image.comment,
        host=image.host,
    )


def _nanoseconds(time: datetime) -> int:
    return (time - _EPOCH) // timedelta(microseconds=1) * 1000


def _operating_system() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/etc/os-release").read_text().splitlines():
            name, _, value = line.partition("=")
            if name == "PRETTY_NAME":
                return value.strip('"')
    return platform.system()
