"""The bridge's side of `taploom.runtime.v1`: one connection that is kept, and calls that wait for it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

import trio

from host_bridge.errors import UnavailableError
from host_bridge.waiting import Backoff, Signal
from taploom.address import Address, AddressError, connect
from taploom.contracts.taploom.runtime import v1 as runtime
from taploom.contracts.taploom.runtime.v1.rpc import RuntimeServiceClient
from taploom.rpc import RpcError, StatusCode, open_channel

logger = logging.getLogger("taploom.bridge.runtime")

_CONNECT_TIMEOUT = 5.0
_CALL_TIMEOUT = 30.0
_BOOT_TIMEOUT = 300.0  # of a container's VM, which may be emulated on a busy machine
# A call made while the runtime is being started again waits so long for it.
_PATIENCE = 5.0

Connected = Callable[[runtime.GetInfoResponse, list[runtime.ContainerStatus]], Awaitable[None]]
Happened = Callable[[runtime.WatchEventsResponse], None]


class RuntimeClient:
    """A runtime that the bridge dials, and dials again when it goes away.

    Args:
        address: where it serves.

    Attributes:
        info: what the runtime said that it is; None while it has never answered.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self.info: runtime.GetInfoResponse | None = None
        self._client: RuntimeServiceClient | None = None
        self._problem = f"the container runtime at {address} has not answered yet"
        self._changed = Signal()

    @property
    def connected(self) -> bool:
        """True while the runtime answers."""
        return self._client is not None

    async def run(self, connected: Connected, happened: Happened) -> None:
        """Keeps the connection until cancelled.

        Args:
            connected: awaited on every connection, with what there is, before calls are let through and before the
                first event.
            happened: told each event.
        """
        backoff = Backoff()
        while True:
            started = trio.current_time()
            try:
                with trio.fail_after(_CONNECT_TIMEOUT):
                    stream = await connect(self.address)
                async with open_channel(stream) as channel:
                    await self._serve(RuntimeServiceClient(channel), connected, happened)
            except trio.TooSlowError:
                self._problem = f"the container runtime does not answer at {self.address}"
            except (OSError, AddressError) as error:
                self._problem = f"the container runtime does not answer at {self.address}: {error}"
            except RpcError as error:
                self._problem = f"the container runtime at {self.address} is gone: {error.message or error.code.name}"
            finally:
                if self._client is not None:
                    logger.warning("%s", self._problem)
                self._client = None
                self._changed.notify()
            if trio.current_time() - started > 1.0:
                backoff.reset()
            await trio.sleep(backoff.next(trio.current_time()))

    async def _serve(self, client: RuntimeServiceClient, connected: Connected, happened: Happened) -> None:
        info = await client.get_info(runtime.GetInfoRequest(), timeout=_CALL_TIMEOUT)
        async with client.watch_events(runtime.WatchEventsRequest()) as events:
            with trio.fail_after(_CALL_TIMEOUT):
                first = await events.receive()
            if first is None or first.started is None:
                raise RpcError(StatusCode.INTERNAL, "its stream of events does not start as it should")
            # After the stream's start: what happens between the two is told by both.
            listed = await client.list_containers(runtime.ListContainersRequest(), timeout=_CALL_TIMEOUT)
            self.info = info
            self._client = client
            try:
                await connected(info, listed.containers)
                logger.info("container runtime %s %s at %s", info.name, info.version, self.address)
                self._problem = f"the container runtime at {self.address} has closed the connection"
                self._changed.notify()
                async for event in events:
                    happened(event)
            finally:
                self._problem = f"the container runtime at {self.address} went away"

    async def client(self) -> RuntimeServiceClient:
        """The stub; waits a little for a runtime that is being started again. Raises UnavailableError."""
        if self._client is None:
            with trio.move_on_after(_PATIENCE):
                await self._changed.until(lambda: self._client is not None)
        if self._client is None:
            raise UnavailableError(self._problem)
        return self._client

    # Images

    async def images(self) -> list[runtime.Image]:
        """All images, newest first."""
        client = await self.client()
        return (await client.list_images(runtime.ListImagesRequest(), timeout=_CALL_TIMEOUT)).images

    async def image(self, text: str) -> runtime.Image | None:
        """The image of a reference or id; None: there is none."""
        client = await self.client()
        try:
            response = await client.get_image(runtime.GetImageRequest(image=text), timeout=_CALL_TIMEOUT)
        except RpcError as error:
            if error.code is StatusCode.NOT_FOUND:
                return None
            raise
        return response.image

    async def import_image(self, parameters: runtime.ImportImage, chunks: AsyncIterator[bytes]) -> runtime.Image:
        """Makes an image of a tar stream; raises RpcError INVALID_ARGUMENT for what is none."""
        client = await self.client()
        async with client.import_image() as call:
            # The runtime may refuse before it has read everything: its reason is then what `finish` raises.
            with contextlib.suppress(RpcError):
                await call.send(runtime.ImportImageRequest(import_=parameters))
                async for chunk in chunks:
                    for start in range(0, len(chunk), _PIECE):
                        await call.send(runtime.ImportImageRequest(data=chunk[start : start + _PIECE]))
            response = await call.finish()
        assert response.image is not None
        return response.image

    async def tag_image(self, image: str, reference: str) -> None:
        """Gives an image a further reference."""
        client = await self.client()
        await client.tag_image(runtime.TagImageRequest(image=image, reference=reference), timeout=_CALL_TIMEOUT)

    async def remove_image(self, image: str, *, force: bool) -> runtime.RemoveImageResponse:
        """Removes a reference or an image."""
        client = await self.client()
        return await client.remove_image(runtime.RemoveImageRequest(image=image, force=force), timeout=_CALL_TIMEOUT)

    # Containers

    async def create(self, request: runtime.CreateContainerRequest) -> None:
        """Prepares a container's root file system."""
        client = await self.client()
        await client.create_container(request, timeout=_BOOT_TIMEOUT)

    async def boot(self, request: runtime.BootContainerRequest) -> runtime.BootContainerResponse:
        """Boots a container's VM."""
        client = await self.client()
        return await client.boot_container(request, timeout=_BOOT_TIMEOUT)

    async def start(self, container_id: str, process_id: str, process: runtime.ProcessSpec) -> int:
        """Starts a process; returns its pid, 0 when the host sees none."""
        client = await self.client()
        request = runtime.StartProcessRequest(container_id=container_id, process_id=process_id, process=process)
        return (await client.start_process(request, timeout=_CALL_TIMEOUT)).pid

    async def signal(self, container_id: str, number: int, process_id: str = "") -> None:
        """Sends a signal to a process."""
        client = await self.client()
        request = runtime.SignalProcessRequest(container_id=container_id, process_id=process_id, signal=number)
        await client.signal_process(request, timeout=_CALL_TIMEOUT)

    async def resize(self, container_id: str, columns: int, rows: int, process_id: str = "") -> None:
        """Sets the size of a process's terminal."""
        client = await self.client()
        await client.resize_process(
            runtime.ResizeProcessRequest(container_id=container_id, process_id=process_id, columns=columns, rows=rows),
            timeout=_CALL_TIMEOUT,
        )

    async def halt(self, container_id: str) -> None:
        """Ends a container's VM at once."""
        client = await self.client()
        await client.halt_container(runtime.HaltContainerRequest(container_id=container_id), timeout=_CALL_TIMEOUT)

    async def delete(self, container_id: str) -> None:
        """Removes a container with its root file system."""
        client = await self.client()
        await client.delete_container(runtime.DeleteContainerRequest(container_id=container_id), timeout=_BOOT_TIMEOUT)


# The largest piece of a tar stream in one message, well below gRPC's usual limit of 4 MiB.
_PIECE = 256 << 10
