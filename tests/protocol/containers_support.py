"""A runtime of containers for tests: the real contract over a real socket, guests with fake agents, and instead of
processes a few programs that do what their name says. It outlives bridges, as a runtime does."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import trio
from bridge_support import FakeGuest, FakeHelper
from docker_support import Client

from host_bridge.containers import ContainerManager, RuntimeClient
from host_bridge.desired import DesiredState
from host_bridge.docker_api import containers
from host_bridge.docker_api.app import DockerApi
from host_bridge.docker_api.server import serve_docker
from host_bridge.fabric import Fabric, Timing
from host_bridge.ports import PortPublisher
from host_bridge.store import Store
from taploom.address import UnixAddress, open_listener
from taploom.contracts.taploom.guest.v1 import GuestFeature
from taploom.contracts.taploom.runtime import v1 as runtime
from taploom.contracts.taploom.runtime.v1.rpc import RuntimeServiceBase
from taploom.link import open_dataplane
from taploom.rpc import ReceiveStream, RpcError, SendStream, Server, ServerContext, StatusCode

IMAGE = "sha256:" + "1b" * 32
_pids = itertools.count(1000)


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


@dataclass(eq=False)
class FakeProcess:
    """A process: sleep, exit N, echo WORDS, cat, or stubborn (only SIGKILL ends it)."""

    spec: runtime.ProcessSpec | None = None
    pid: int = 0
    running: bool = False
    exited: runtime.ProcessExited | None = None
    signals: list[int] = field(default_factory=list)
    watchers: set[trio.MemorySendChannel[runtime.AttachProcessResponse]] = field(default_factory=set)
    size: tuple[int, int] = (0, 0)


@dataclass(eq=False)
class FakeContainer:
    request: runtime.CreateContainerRequest
    guest: FakeGuest | None = None
    booted: runtime.BootContainerRequest | None = None
    log: list[runtime.ReadLogResponse] = field(default_factory=list)
    processes: dict[str, FakeProcess] = field(default_factory=dict)

    @property
    def main(self) -> FakeProcess:
        return self.processes.setdefault("", FakeProcess())


class FakeRuntime(RuntimeServiceBase):
    """The runtime.

    Attributes:
        calls: the names of the calls that change something, in order.
        fail: calls that fail, with the error.
        hold: calls that wait until the event is set.
        guests_without: what the agents of the containers' VMs cannot do.
    """

    def __init__(self, directory: Path, nursery: trio.Nursery) -> None:
        self.directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.socket = directory / "runtime.sock"
        self.containers: dict[str, FakeContainer] = {}
        self.references = ["box:latest"]
        self.calls: list[str] = []
        self.fail: dict[str, RpcError] = {}
        self.hold: dict[str, trio.Event] = {}
        self.guests_without: set[GuestFeature] = set()
        self.lost_events = False
        self._nursery = nursery
        self._watchers: set[trio.MemorySendChannel[runtime.WatchEventsResponse]] = set()
        self._scope: trio.CancelScope | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves until `stop`."""
        listener = await open_listener(UnixAddress(str(self.socket)))
        with trio.CancelScope() as scope:
            self._scope = scope
            task_status.started()
            await Server([self]).serve(listener)

    def hang_up(self) -> None:
        """Closes its socket and connections; what it runs goes on."""
        assert self._scope is not None
        self._scope.cancel()
        self.socket.unlink(missing_ok=True)

    def stop(self) -> None:
        """Ends as a runtime does that is killed: with all its containers' processes."""
        self.hang_up()
        for container in self.containers.values():
            for process in container.processes.values():
                process.running = False
            if container.guest is not None:
                self._nursery.start_soon(container.guest.stop)
                container.guest = None
            container.booted = None
            container.processes.clear()

    async def _called(self, name: str) -> None:
        self.calls.append(name)
        if name in self.hold:
            await self.hold[name].wait()
        if name in self.fail:
            raise self.fail[name]

    def _container(self, container_id: str) -> FakeContainer:
        if container_id not in self.containers:
            raise RpcError(StatusCode.NOT_FOUND, f"no container {container_id}")
        return self.containers[container_id]

    def named(self, name: str) -> FakeContainer:
        return next(one for one in self.containers.values() if one.request.name == name)

    # Images

    async def get_info(self, request: runtime.GetInfoRequest, context: ServerContext) -> runtime.GetInfoResponse:
        return runtime.GetInfoResponse(name="fake", version="1", contract_versions=[1], instance_id="one")

    def _image(self) -> runtime.Image:
        return runtime.Image(
            id=IMAGE,
            references=self.references,
            created_at=now(),
            size_bytes=7,
            config=runtime.ImageConfig(exposed_ports=["80/tcp"], labels={"from": "image"}, environment=["A=image"]),
            architecture="amd64",
        )

    async def list_images(
        self, request: runtime.ListImagesRequest, context: ServerContext
    ) -> runtime.ListImagesResponse:
        return runtime.ListImagesResponse(images=[self._image()])

    async def get_image(self, request: runtime.GetImageRequest, context: ServerContext) -> runtime.GetImageResponse:
        text = request.image if ":" in request.image else f"{request.image}:latest"
        if text not in (*self.references, IMAGE):
            raise RpcError(StatusCode.NOT_FOUND, "No such image")
        return runtime.GetImageResponse(image=self._image())

    async def import_image(
        self, requests: ReceiveStream[runtime.ImportImageRequest], context: ServerContext
    ) -> runtime.ImportImageResponse:
        first = await requests.receive()
        assert first is not None
        assert first.import_ is not None
        size = 0
        async for part in requests:
            size += len(part.data or b"")
        if size < 512:
            raise RpcError(StatusCode.INVALID_ARGUMENT, "Error processing tar file(exit status 1): unexpected EOF")
        self.references.append(first.import_.reference)
        return runtime.ImportImageResponse(image=self._image())

    async def tag_image(self, request: runtime.TagImageRequest, context: ServerContext) -> runtime.TagImageResponse:
        self.references.append(request.reference)
        return runtime.TagImageResponse()

    async def remove_image(
        self, request: runtime.RemoveImageRequest, context: ServerContext
    ) -> runtime.RemoveImageResponse:
        self.references.remove(request.image)
        return runtime.RemoveImageResponse(untagged=[request.image])

    # Containers

    async def create_container(
        self, request: runtime.CreateContainerRequest, context: ServerContext
    ) -> runtime.CreateContainerResponse:
        self.containers.setdefault(request.container_id, FakeContainer(request))
        await self._called("create")
        return runtime.CreateContainerResponse()

    async def boot_container(
        self, request: runtime.BootContainerRequest, context: ServerContext
    ) -> runtime.BootContainerResponse:
        container = self._container(request.container_id)
        await self._called("boot")
        container.booted = request
        if request.network_mode is runtime.NetworkMode.HOST:
            return runtime.BootContainerResponse()
        if container.guest is None:
            guest = FakeGuest(self.directory / request.container_id[:6])
            guest.features = [feature for feature in guest.features if feature not in self.guests_without]
            await self._nursery.start(guest.run)
            container.guest = guest
        return runtime.BootContainerResponse(
            guest_address=container.guest.control, guest_data_address=container.guest.data
        )

    async def start_process(
        self, request: runtime.StartProcessRequest, context: ServerContext
    ) -> runtime.StartProcessResponse:
        container = self._container(request.container_id)
        await self._called("start" if not request.process_id else "exec")
        spec = request.process
        assert spec is not None
        if container.booted is None:
            raise RpcError(StatusCode.FAILED_PRECONDITION, "not booted")
        program = spec.arguments[0]
        if program not in ("sleep", "exit", "echo", "cat", "stubborn", "ps"):
            raise RpcError(StatusCode.INVALID_ARGUMENT, f'exec: "{program}": executable file not found in $PATH')
        process = container.processes.setdefault(request.process_id, FakeProcess())
        process.spec, process.running, process.exited, process.pid = spec, True, None, next(_pids)
        if program in ("echo", "ps"):
            text = "PID CMD\n1 sleep\n" if program == "ps" else " ".join(spec.arguments[1:]) + "\n"
            self.output(container, request.process_id, text.encode())
        if program in ("exit", "echo", "ps"):
            code = int(spec.arguments[1]) if program == "exit" else 0
            self._nursery.start_soon(self._end_soon, container, request.process_id, code)
        return runtime.StartProcessResponse(pid=process.pid)

    async def _end_soon(self, container: FakeContainer, process_id: str, code: int) -> None:
        await trio.lowlevel.checkpoint()
        self.end(container, code, process_id)

    def output(self, container: FakeContainer, process_id: str, data: bytes, *, error: bool = False) -> None:
        """Something that a process says."""
        process = container.processes[process_id]
        if not process_id:
            stream = runtime.StandardStream.STDERR if error else runtime.StandardStream.STDOUT
            container.log.append(runtime.ReadLogResponse(time=now(), stream=stream, data=data))
        part = runtime.AttachProcessResponse(stderr=data) if error else runtime.AttachProcessResponse(stdout=data)
        for watcher in process.watchers:
            watcher.send_nowait(part)

    def end(self, container: FakeContainer, code: int, process_id: str = "") -> None:
        """The end of a process, told to whoever watches."""
        process = container.processes[process_id]
        if not process.running:
            return
        process.running = False
        process.exited = runtime.ProcessExited(
            container_id=container.request.container_id, process_id=process_id, exit_code=code, time=now()
        )
        for watcher in process.watchers:
            watcher.send_nowait(runtime.AttachProcessResponse(exited=process.exited))
        process.watchers.clear()
        if self.lost_events:
            return
        for events in self._watchers:
            events.send_nowait(runtime.WatchEventsResponse(time=process.exited.time, exited=process.exited))

    async def attach_process(
        self,
        requests: ReceiveStream[runtime.AttachProcessRequest],
        stream: SendStream[runtime.AttachProcessResponse],
        context: ServerContext,
    ) -> None:
        first = await requests.receive()
        assert first is not None
        assert first.attach is not None
        container = self._container(first.attach.container_id)
        process_id = first.attach.process_id
        process = container.processes.setdefault(process_id, FakeProcess())
        send, receive = trio.open_memory_channel[runtime.AttachProcessResponse](math.inf)
        process.watchers.add(send)
        await stream.send(runtime.AttachProcessResponse(attached=runtime.Attached()))

        async def take_input() -> None:
            async for request in requests:
                if process.running:
                    self.output(container, process_id, request.stdin or b"")
            if process.spec is not None and process.spec.arguments[0] == "cat":
                self.end(container, 0, process_id)

        async with trio.open_nursery() as nursery:
            if first.attach.stdin:
                nursery.start_soon(take_input)
            async for response in receive:
                await stream.send(response)
                if response.exited is not None:
                    break
            nursery.cancel_scope.cancel()

    async def signal_process(
        self, request: runtime.SignalProcessRequest, context: ServerContext
    ) -> runtime.SignalProcessResponse:
        container = self._container(request.container_id)
        process = container.processes.get(request.process_id)
        if process is None or not process.running:
            raise RpcError(StatusCode.FAILED_PRECONDITION, "it does not run")
        process.signals.append(request.signal)
        assert process.spec is not None
        if request.signal == 9 or (request.signal == 15 and process.spec.arguments[0] != "stubborn"):
            self.end(container, 128 + request.signal, request.process_id)
        return runtime.SignalProcessResponse()

    async def resize_process(
        self, request: runtime.ResizeProcessRequest, context: ServerContext
    ) -> runtime.ResizeProcessResponse:
        process = self._container(request.container_id).processes.get(request.process_id)
        if process is None:
            raise RpcError(StatusCode.NOT_FOUND, "no such process")
        process.size = (request.rows, request.columns)
        return runtime.ResizeProcessResponse()

    async def halt_container(
        self, request: runtime.HaltContainerRequest, context: ServerContext
    ) -> runtime.HaltContainerResponse:
        container = self.containers.get(request.container_id)
        self.calls.append("halt")
        if container is not None:
            for process_id in list(container.processes):
                self.end(container, 137, process_id)
            if container.guest is not None:
                await container.guest.stop()
            container.guest = container.booted = None
            container.processes.clear()
        return runtime.HaltContainerResponse()

    async def delete_container(
        self, request: runtime.DeleteContainerRequest, context: ServerContext
    ) -> runtime.DeleteContainerResponse:
        await self._called("delete")
        await self.halt_container(runtime.HaltContainerRequest(container_id=request.container_id), context)
        self.containers.pop(request.container_id, None)
        return runtime.DeleteContainerResponse()

    async def list_containers(
        self, request: runtime.ListContainersRequest, context: ServerContext
    ) -> runtime.ListContainersResponse:
        found = []
        for container_id, container in sorted(self.containers.items()):
            main = container.main
            status = runtime.ContainerStatus(container_id=container_id, state=runtime.ContainerState.CREATED)
            if container.booted is not None:
                status.state = runtime.ContainerState.BOOTED
            if main.running:
                status.state, status.pid = runtime.ContainerState.RUNNING, main.pid
                status.process_ids = [key for key, one in container.processes.items() if key and one.running]
            elif main.exited is not None:
                status.state = runtime.ContainerState.EXITED
                status.exit_code, status.finished_at = main.exited.exit_code, main.exited.time
            found.append(status)
        return runtime.ListContainersResponse(containers=found)

    async def read_log(
        self,
        request: runtime.ReadLogRequest,
        stream: SendStream[runtime.ReadLogResponse],
        context: ServerContext,
    ) -> None:
        entries = list(self._container(request.container_id).log)
        if request.tail is not None:
            entries = entries[-request.tail :] if request.tail else []
        for entry in entries:
            await stream.send(entry)

    async def watch_events(
        self,
        request: runtime.WatchEventsRequest,
        stream: SendStream[runtime.WatchEventsResponse],
        context: ServerContext,
    ) -> None:
        send, receive = trio.open_memory_channel[runtime.WatchEventsResponse](math.inf)
        self._watchers.add(send)
        try:
            await stream.send(runtime.WatchEventsResponse(started=runtime.WatchStarted()))
            async for event in receive:
                await stream.send(event)
        finally:
            self._watchers.discard(send)


class ContainerRig:
    """A bridge that can be killed and started again between a helper and a runtime that stay."""

    def __init__(self, directory: Path, nursery: trio.Nursery) -> None:
        self.directory = directory
        self.nursery = nursery
        self.helper = FakeHelper(directory / "helper")
        self.runtime = FakeRuntime(directory / "r", nursery)
        self.docker = Client(directory / "docker.sock")
        self.manager: ContainerManager
        self.fabric: Fabric
        self._scope: trio.CancelScope | None = None
        self._stopped = trio.Event()

    async def start_bridge(self) -> None:
        """Starts a bridge on the state that there is; it is ready when this returns."""
        await self.nursery.start(self._bridge)
        await self.connected()

    async def connected(self) -> None:
        """Waits until the bridge has found helper and runtime."""
        with trio.fail_after(60):
            while not (self.fabric.helper.connected and self.manager.runtime and self.manager.runtime.connected):
                await trio.sleep(0.005)

    async def kill_bridge(self) -> None:
        """Ends it at once: what it has not written is lost."""
        assert self._scope is not None
        self._scope.cancel()
        await self._stopped.wait()

    async def _bridge(self, *, task_status: trio.TaskStatus[None]) -> None:
        self._stopped = trio.Event()
        try:
            with trio.CancelScope() as self._scope:
                async with open_dataplane() as dataplane:
                    with Store(self.directory / "state") as store:
                        await self._serve(store, dataplane, task_status)
        finally:
            (self.directory / "docker.sock").unlink(missing_ok=True)
            self._stopped.set()

    async def _serve(self, store: Store, dataplane, task_status: trio.TaskStatus[None]) -> None:  # type: ignore[no-untyped-def]
        self.fabric = Fabric(
            DesiredState(store),
            dataplane,
            UnixAddress(f"{self.helper.directory}/control.sock"),
            UnixAddress(f"{self.helper.directory}/data.sock"),
            timing=Timing(deadline=10.0, grace=5.0, settle=1.0),
        )
        publisher = PortPublisher(self.fabric.helper, dataplane, is_gateway=lambda _: False)
        client = RuntimeClient(UnixAddress(str(self.runtime.socket)))
        self.manager = ContainerManager(self.fabric, publisher, client)
        self.publisher = publisher
        api = DockerApi(self.fabric, self.manager)
        containers.register(api, self.manager)
        listener = await open_listener(UnixAddress(f"{self.directory}/docker.sock"))
        async with trio.open_nursery() as nursery:
            await nursery.start(self.fabric.run)
            await nursery.start(publisher.run)
            await nursery.start(self.manager.run)
            await nursery.start(serve_docker, listener, api)
            task_status.started()

    async def until(self, condition) -> None:  # type: ignore[no-untyped-def]
        """Waits for a condition that nothing signals."""
        with trio.fail_after(60):
            while not condition():
                await trio.sleep(0.005)

    async def create(self, name: str, *command: str, **body: object) -> str:
        """Creates a container; returns its id."""
        wanted = {"Image": "box", "Cmd": list(command or ("sleep", "1000")), **body}
        answer = await self.docker("POST", f"/v1.41/containers/create?name={name}", wanted)
        assert answer.status == 201, answer.body
        return str(answer.value["Id"])

    async def run_container(self, name: str, *command: str, **body: object) -> str:
        """Creates and starts a container; returns its id."""
        container_id = await self.create(name, *command, **body)
        answer = await self.docker("POST", f"/v1.41/containers/{name}/start")
        assert answer.status == 204, answer.body
        return container_id

    async def inspect(self, name: str):  # type: ignore[no-untyped-def]
        answer = await self.docker("GET", f"/v1.41/containers/{name}/json")
        assert answer.status == 200, answer.body
        return answer.value


@contextlib.asynccontextmanager
async def open_container_rig(directory: Path) -> AsyncIterator[ContainerRig]:
    """A running bridge with a fake helper and a fake runtime."""
    async with trio.open_nursery() as nursery:
        rig = ContainerRig(directory, nursery)
        await nursery.start(rig.helper.run)
        await nursery.start(rig.runtime.run)
        await rig.start_bridge()
        yield rig
        nursery.cancel_scope.cancel()
