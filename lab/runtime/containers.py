"""The lab's containers: each a directory below one directory.

ID[:32]/
    container.json   what it was created with, and how its main process ended; only ever replaced as a whole
    upper/ work/     what it wrote (overlayfs)
    root/            its root file system, mounted while it is booted
    log              of its main process
    resolv.conf hosts hostname     bound over its own; the agent writes the first two
    control.sock data.sock         of its agent
    config.json      what crun is told
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import trio

from lab.runtime.bundle import MountSpec, ProcessSpec, container_config, process_config
from lab.runtime.engine import Child, Engine, Guest
from lab.runtime.errors import InvalidFailure, NotFoundFailure, StateFailure
from lab.runtime.log import Log
from lab.runtime.streams import DRAIN_TIMEOUT, Streams
from lab.runtime.users import find_user
from lab.state import replace_json

logger = logging.getLogger("taploom.runtime")

State = Literal["created", "booted", "running", "exited"]

_KILLED = 128 + signal.SIGKILL


@dataclass(frozen=True)
class Record:
    """What is kept of a container."""

    id: str
    name: str
    image_id: str
    layer: str
    writable: bool
    mounts: tuple[MountSpec, ...]
    started_at: str = ""
    finished_at: str = ""
    exit_code: int = 0


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    exit_code: int
    time: datetime


class Process:
    """A process of a container, from when somebody first names it."""

    def __init__(self, container_id: str, process_id: str, log: Log | None) -> None:
        self.container_id = container_id
        self.id = process_id
        self.streams = Streams(log)
        self.stdin_once = False
        self.ended: Ended | None = None
        self.exited = trio.Event()
        self.failure = ""
        self._child: Child | None = None

    @property
    def started(self) -> bool:
        return self._child is not None or self.ended is not None

    @property
    def running(self) -> bool:
        return self._child is not None and self.ended is None

    @property
    def child(self) -> Child | None:
        """It while it runs."""
        return self._child if self.ended is None else None

    def start(self, child: Child) -> None:
        """It runs."""
        self._child = child

    def end(self, exit_code: int) -> None:
        """It has ended."""
        self.ended = Ended(exit_code, datetime.now(UTC))
        self._child = None
        self.exited.set()

    def fail(self, reason: str) -> None:
        """It could not be started."""
        self.failure = reason
        self.streams.close()

    async def run(self, on_exit: Callable[[Process], None]) -> None:
        """Sees it to its end; `on_exit` is called once, when its output is in the log."""
        child = self._child
        assert child is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.streams.carry)
            code = await child.wait()
            self.end(code if code >= 0 else 128 - code)
            self.streams.exited()
            # Whoever is attached and reads slowly does not hold up the news.
            with trio.move_on_after(DRAIN_TIMEOUT + 0.5):
                await self.streams.ended.wait()
            on_exit(self)


class Container:
    """One container."""

    def __init__(self, record: Record, directory: Path) -> None:
        self.record = record
        self.directory = directory
        self.lock = trio.Lock()
        self.log = Log(directory / "log")
        self.main: Process | None = None
        self.next_main = Process(record.id, "", self.log)
        self.processes: dict[str, Process] = {}
        self.guest: Guest | None = None
        self.hostname = ""
        self.domainname = ""
        self.booted = False
        self.deleted = False

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def name(self) -> str:
        """What crun calls it: its directory's name."""
        return self.directory.name

    @property
    def state(self) -> State:
        if self.main is not None:
            return "running" if self.main.ended is None else "exited"
        if self.booted:
            return "booted"
        return "exited" if self.record.started_at else "created"

    def process(self, process_id: str) -> Process:
        """A process that was started.

        Raises:
            NotFoundFailure: there is none.
        """
        process = self.processes.get(process_id) if process_id else self.main
        if process is None or not process.started:
            what = f"process {process_id}" if process_id else "main process"
            raise NotFoundFailure(f"container {self.id} has no {what}")
        return process

    def attachable(self, process_id: str) -> Process:
        """The process, started or not."""
        if process_id:
            return self.processes.setdefault(process_id, Process(self.id, process_id, None))
        return self.main if self.main is not None else self.next_main

    def save(self, **changes: object) -> None:
        """Keeps the record, changed."""
        self.record = replace(self.record, **changes)  # type: ignore[arg-type]  # the fields' names and types are ours
        if not self.deleted:
            replace_json(self.directory / "container.json", asdict(self.record))


class Containers:
    """All containers of the lab.

    Args:
        directory: where theirs are.
        engine: what they run on.
        nursery: where what belongs to them runs.
        on_exit: called when a process has ended and its output is in the log.
    """

    def __init__(
        self,
        directory: Path,
        *,
        engine: Engine,
        nursery: trio.Nursery,
        on_exit: Callable[[Process], None],
    ) -> None:
        self._directory = directory
        self._engine = engine
        self._nursery = nursery
        self._on_exit = on_exit
        self._containers: dict[str, Container] = {}
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._load()

    def _load(self) -> None:
        for path in self._directory.iterdir():
            try:
                document = json.loads((path / "container.json").read_bytes())
            except FileNotFoundError:  # its creation or removal was cut short
                shutil.rmtree(path, ignore_errors=True)
                continue
            mounts = tuple(MountSpec(**mount) for mount in document.pop("mounts"))
            container = Container(Record(**document, mounts=mounts), path)
            if container.record.started_at and not container.record.finished_at:
                # It ran when the runtime was killed, and the kernel took it along.
                container.save(exit_code=_KILLED, finished_at=datetime.now(UTC).isoformat())
            self._containers[container.id] = container

    @property
    def host_network(self) -> bool:
        """Whether a container can have the host's network."""
        return self._engine.host_network

    def all(self) -> list[Container]:
        """In order of their ids."""
        return [self._containers[key] for key in sorted(self._containers)]

    def get(self, container_id: str) -> Container:
        """NotFoundFailure when there is none."""
        try:
            return self._containers[container_id]
        except KeyError:
            raise NotFoundFailure(f"No such container: {container_id}") from None

    def create(self, record: Record) -> None:
        """Prepares a container; one that is there already stays as it is.

        Raises:
            InvalidFailure: its id or a mount cannot be one.
        """
        if record.id in self._containers:
            return
        if len(record.id) != 64 or not set(record.id) <= set("0123456789abcdef"):
            raise InvalidFailure("a container's id is 64 hexadecimal characters")
        for mount in record.mounts:
            if not mount.target.startswith("/") or "\0" in mount.target + mount.source:
                raise InvalidFailure(f"invalid mount path: '{mount.target}' mount path must be absolute")
        directory = self._directory / record.id[:32]
        try:
            directory.mkdir(mode=0o700)
        except FileExistsError:
            raise InvalidFailure(f"container id {record.id} begins like another's") from None
        for name in ("upper", "work", "root"):
            (directory / name).mkdir(mode=0o755)
        container = Container(record, directory)
        container.save()
        self._containers[record.id] = container

    async def boot(self, container: Container, *, hostname: str, domainname: str, own_network: bool) -> None:
        """Makes the root file system be there, and the agent answer when it has a network of its own.

        Raises:
            NotFoundFailure: it was removed meanwhile.
            OSError: the machine does not do it.
        """
        async with container.lock:
            self._check_there(container)
            if container.booted:
                return
            container.hostname, container.domainname = hostname, domainname
            try:
                container.guest = await self._engine.boot(container, own_network=own_network)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self._unboot(container)
                raise
            container.main = None
            container.booted = True

    async def start(self, container: Container, process_id: str, spec: ProcessSpec) -> int:
        """Starts a process; returns its pid as the machine sees it.

        Raises:
            NotFoundFailure, StateFailure: the container is not there, or not in a state for this.
            InvalidFailure: the program cannot be executed, with Docker's text.
        """
        async with container.lock:
            self._check_there(container)
            if not container.booted:
                raise StateFailure(f"container {container.id} is not booted")
            if not spec.arguments:
                raise InvalidFailure("No command specified")
            process = self._process_to_start(container, process_id)
            try:
                return await self._start(container, process, spec)
            except BaseException as error:
                process.fail(str(error))
                if process_id:
                    container.processes.pop(process_id, None)
                else:
                    container.next_main = Process(container.id, "", container.log)
                raise

    def _process_to_start(self, container: Container, process_id: str) -> Process:
        if not process_id:
            if container.main is not None:
                raise StateFailure(f"the main process of container {container.id} was started")
            return container.next_main
        if container.main is None or container.main.ended is not None:
            raise StateFailure(f"container {container.id} is not running")
        process = container.attachable(process_id)
        if process.started:
            raise StateFailure(f"process {process_id} was started")
        return process

    async def _start(self, container: Container, process: Process, spec: ProcessSpec) -> int:
        root = container.directory / "root"
        user = find_user(root, spec.user)
        process.stdin_once = spec.stdin_once
        config = process_config(spec, user)
        if not process.id:
            config = self._container_config(container, config, privileged=spec.privileged)
        child = await self._engine.start(container, process, config, spec)
        self._started(container, process)
        pid = self._engine.pid(child)
        self._nursery.start_soon(self._run, container, process)
        return pid

    async def _run(self, container: Container, process: Process) -> None:
        try:
            await process.run(lambda ended: self._ended(container, ended))
        except Exception:  # such as a full disk under its log: no other container is to suffer from that
            logger.exception("a process of container %s has no one to carry its output any more", container.id)

    def _container_config(self, container: Container, process: dict[str, Any], *, privileged: bool) -> dict[str, Any]:
        layout = self._engine.layout(container)
        return container_config(
            process,
            root=layout.root,
            writable=container.record.writable,
            hostname=container.hostname,
            domainname=container.domainname,
            files=layout.files,
            mounts=layout.mounts,
            netns=layout.netns,
            privileged=privileged,
            fresh_run=not container.record.layer,
        )

    def _started(self, container: Container, process: Process) -> None:
        if process.id:
            return
        container.main = process
        container.next_main = Process(container.id, "", container.log)
        container.save(started_at=datetime.now(UTC).isoformat(), finished_at="", exit_code=0)

    def _ended(self, container: Container, process: Process) -> None:
        assert process.ended is not None
        if process.id:
            container.processes.pop(process.id, None)
        else:
            container.save(finished_at=process.ended.time.isoformat(), exit_code=process.ended.exit_code)
        self._on_exit(process)

    async def halt(self, container: Container) -> None:
        """Ends everything in the container; its root file system and log stay."""
        async with container.lock:
            with trio.CancelScope(shield=True):
                await self._halt(container)

    async def _halt(self, container: Container) -> None:
        if not container.booted:
            return
        main = container.main
        if main is not None:
            # The first process of a PID namespace takes all others along (pid_namespaces(7)).
            if main.child is not None:
                main.child.kill()
                await main.exited.wait()
            await self._engine.end(container)
        await self._unboot(container)
        container.main = None
        container.booted = False

    async def _unboot(self, container: Container) -> None:
        await self._engine.halt(container)
        container.guest = None

    async def delete(self, container: Container) -> None:
        """Halts the container and removes what there is of it."""
        async with container.lock:
            if container.deleted:
                return
            with trio.CancelScope(shield=True):
                await self._halt(container)
                container.deleted = True
                container.next_main.fail("the container was removed")
                for process in list(container.processes.values()):
                    if not process.started:
                        process.fail("the container was removed")
                await trio.to_thread.run_sync(shutil.rmtree, container.directory)
                self._containers.pop(container.id, None)

    def _check_there(self, container: Container) -> None:
        if container.deleted:
            raise NotFoundFailure(f"No such container: {container.id}")

    def signal(self, container: Container, process_id: str, signum: int) -> None:
        """Sends a signal to a process.

        Raises:
            NotFoundFailure, InvalidFailure, StateFailure: no such process or signal, or it does not run.
        """
        process = container.process(process_id)
        if not 0 < signum <= signal.SIGRTMAX:
            raise InvalidFailure(f"there is no signal {signum}")
        if process.child is None or not process.child.kill(signum):
            raise StateFailure("the process does not run")

    def pid(self, container: Container) -> int:
        """The main process's pid as the machine sees it; 0 when there is none."""
        child = container.main.child if container.main is not None else None
        return self._engine.pid(child) if child is not None else 0
