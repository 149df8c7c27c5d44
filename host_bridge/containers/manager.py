"""Containers from creation to removal: the record, the guest, the ports and the runtime kept in step.

Every change of one container is made under its lock, so calls about one container are serial and calls about others are
not held up. A change is in the database before it is acknowledged. What takes several steps (creation, start, removal)
is marked in the record before its first step; a bridge that was killed in between takes it back, or finishes it, when
it has the runtime's list of containers again.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import trio

from host_bridge.containers import create, links, times
from host_bridge.containers.errors import (
    ContainerError,
    NoSuchContainerError,
    NotModifiedError,
    conflict,
    foreign,
    invalid,
    no_runtime,
    not_running,
)
from host_bridge.containers.execs import Exec, Execs, capabilities
from host_bridge.containers.model import CREATING, JSON, REMOVING, STARTING, Container, new_state
from host_bridge.containers.names import check_name, random_name
from host_bridge.containers.networks import ContainerNetworks, Publisher
from host_bridge.containers.references import is_id, with_tag
from host_bridge.containers.runtime import RuntimeClient
from host_bridge.containers.signals import SIGKILL, SIGTERM, check_supported, parse_signal
from host_bridge.errors import BridgeError, GuestNotFoundError, NameInUseError, UnavailableError
from host_bridge.events import FabricEvent
from host_bridge.fabric import Fabric
from host_bridge.model import EndpointOptions, GuestRecord, GuestSettings
from taploom.contracts.taploom.runtime import v1 as runtime
from taploom.contracts.taploom.runtime.v1.rpc import RuntimeServiceClient
from taploom.rpc import RpcError, StatusCode

logger = logging.getLogger("taploom.bridge.containers")

DEFAULT_STOP_TIMEOUT = 10
# How long a process that was killed may take to be reported gone before its VM is halted.
_KILL_PATIENCE = 10.0
_UNDO_TIMEOUT = 20.0
# dockerd's back-off between restarts, in seconds; it starts anew after a run of this length.
_FIRST_RESTART, _LAST_RESTART, _GOOD_RUN = 0.1, 60.0, 10.0
GONE_EXIT_CODE = 137

Found = Container | GuestRecord
EventSink = Callable[[str, str, str, Mapping[str, str]], None]


class ContainerManager:
    """All containers. Start `run` before anything else.

    Args:
        fabric: guests, networks and endpoints; it runs already.
        publisher: published ports.
        runtime: what runs containers; None: they can be listed, nothing else.

    Attributes:
        execs: further processes in containers.
        networks: their places in the fabric.
        on_event: told what happened, as Docker's events: type, action, id, attributes.
        explain: HTTP status and Docker's text for an error of the fabric; what a failed start leaves in the record.
    """

    def __init__(self, fabric: Fabric, publisher: Publisher, runtime: RuntimeClient | None) -> None:
        self.fabric = fabric
        self.runtime = runtime
        self.execs = Execs()
        self.on_event: EventSink = lambda kind, action, actor, attributes: None
        self.explain: Callable[[BridgeError], tuple[int, str]] = lambda error: (500, str(error))
        self.networks = ContainerNetworks(fabric, publisher, self._name_of, self._note)
        self._store = fabric.desired.store
        self._containers = {record.id: Container.of(record) for record in self._store.containers()}
        self._nursery: trio.Nursery | None = None

    # Running

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Publishes the ports of what runs, then follows the runtime until cancelled."""
        for container in list(self._containers.values()):
            if container.state["Phase"] == CREATING:
                # Nobody was told of it. What the runtime has of it goes when it is there: nobody knows it then.
                logger.info("forgetting container %s, which was not created to its end", container.name)
                self._forget(container)
            elif container.alive and not container.state["Phase"]:
                if self.networks.align(container):
                    self._save(container)
                self._publish_again(container)
        unsubscribe = self.fabric.events.subscribe(self._fabric_event)
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                if self.runtime is not None:
                    nursery.start_soon(self.runtime.run, self._connected, self._happened)
                task_status.started()
                await trio.sleep_forever()
        finally:
            unsubscribe()

    def _publish_again(self, container: Container) -> None:
        published = container.state["Published"]
        if not published:
            return
        try:
            self.networks.publish(container, published)
            self.networks.target(container)
        except BridgeError as error:
            logger.error("container %s runs, but its ports are not published: %s", container.name, error)

    def _spawn(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Does something that outlives the call at hand; what goes wrong is logged."""

        async def guarded() -> None:
            try:
                await function(*arguments)
            except (BridgeError, RpcError) as error:
                logger.error("%s", error)
            except Exception:
                logger.exception("following the containers failed")

        assert self._nursery is not None
        self._nursery.start_soon(guarded)

    async def _connected(self, info: runtime.GetInfoResponse, statuses: list[runtime.ContainerStatus]) -> None:
        assert self._nursery is not None
        listed = {status.container_id: status for status in statuses}
        for container in list(self._containers.values()):
            await self._nursery.start(self._reconcile, container, listed.pop(container.id, None))
        for container_id in listed:
            logger.warning("removing container %s from the runtime: there is no record of it", container_id[:12])
            self._spawn(self._runtime.delete, container_id)

    async def _reconcile(
        self,
        container: Container,
        status: runtime.ContainerStatus | None,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        if container.lock.locked():
            # Something is under way here: it finds out by itself what the runtime still knows.
            task_status.started()
            return
        async with container.lock:
            task_status.started()
            try:
                await self._settle(container, status)
            except (BridgeError, RpcError) as error:
                logger.error("container %s: %s", container.name, error)
            except Exception:
                logger.exception("taking up container %s failed", container.name)

    async def _settle(self, container: Container, status: runtime.ContainerStatus | None) -> None:
        """Brings the record and what the runtime has together; the lock is held."""
        phase = container.state["Phase"]
        state = runtime.ContainerState.UNSPECIFIED if status is None else status.state
        if container.removed:
            return
        if phase == REMOVING:
            await self._remove_rest(container)
        elif phase == STARTING:
            logger.info("container %s was not started to its end: taking it back", container.name)
            await self._take_down(container)
            container.state |= {"Phase": "", "Running": False, "Pid": 0}
            self._save(container)
        elif container.alive:
            if state is runtime.ContainerState.RUNNING:
                assert status is not None
                container.state["Pid"] = status.pid
                for one in self.execs.running_in(container):
                    if one.started and one.id not in status.process_ids:
                        self.exec_ended(one.id, GONE_EXIT_CODE)
                return
            code, moment = GONE_EXIT_CODE, None
            if status is not None and state is runtime.ContainerState.EXITED:
                code, moment = status.exit_code, status.finished_at
            logger.info("container %s has ended while nobody looked, with exit code %d", container.name, code)
            await self._ended(container, code, False, moment)
        else:
            if state not in (runtime.ContainerState.UNSPECIFIED, runtime.ContainerState.CREATED):
                await self._take_down(container)
            elif self._has_guest(container):
                await self._remove_guest(container)
            if container.restarting and container.restart_scope is None:
                self._spawn(self._restart_later, container)
            elif container.host["AutoRemove"] and container.status == "exited":
                # The bridge was killed between its end and its removal.
                self._spawn(self._auto_remove, container)

    def _happened(self, event: runtime.WatchEventsResponse) -> None:
        if event.exited is not None:
            gone = event.exited
            container = self._containers.get(gone.container_id)
            if container is None:
                return
            if gone.process_id:
                self.exec_ended(gone.process_id, gone.exit_code)
            else:
                self._spawn(self._exited, container, gone.exit_code, gone.out_of_memory, gone.time)
        elif event.halted is not None:
            container = self._containers.get(event.halted.container_id)
            if container is not None:
                logger.warning("the VM of container %s has ended: %s", container.name, event.halted.reason)
                self._spawn(self._halted, container)

    def exec_ended(self, exec_id: str, code: int) -> None:
        """Notes how a further process ended; told twice, the first counts."""
        one = self.execs.find(exec_id)
        if one is None or not one.running:
            return
        one.ended(code)
        if not one.quiet:
            self.tell(one.container, "exec_die", execID=one.id, exitCode=str(code))

    async def _exited(
        self, container: Container, code: int, out_of_memory: bool, moment: datetime.datetime | None
    ) -> None:
        async with container.lock:
            seen = container.exit_seen
            if not container.alive or (seen is not None and moment is not None and moment <= seen):
                return
            await self._ended(container, code, out_of_memory, moment)

    async def _halted(self, container: Container) -> None:
        """A VM that ended says so after its process's end; without that, it is the end."""
        await trio.lowlevel.checkpoint()
        async with container.lock:
            if container.alive:
                listed = await (await self._runtime.client()).list_containers(runtime.ListContainersRequest())
                for status in listed.containers:
                    if status.container_id == container.id and status.state is runtime.ContainerState.RUNNING:
                        return
                await self._ended(container, GONE_EXIT_CODE, False, None)

    def _fabric_event(self, event: FabricEvent) -> None:
        """Endpoints that come and go by the bridge's own API are a container's networks too."""
        if (
            event.endpoint is None
            or event.network is None
            or event.kind
            not in (
                "endpoint-connect",
                "endpoint-disconnect",
            )
        ):
            return
        container = self._containers.get(event.endpoint.guest_id)
        if container is None or container.lock.locked() or not container.alive:
            return
        self._spawn(self._retarget, container)

    async def _retarget(self, container: Container) -> None:
        async with container.lock:
            if container.alive:
                self.networks.align(container)
                self.networks.target(container)
                self._save(container)

    # Looking

    @property
    def _runtime(self) -> RuntimeClient:
        if self.runtime is None:
            raise no_runtime()
        return self.runtime

    async def runtime_client(self) -> RuntimeServiceClient:
        """The runtime's stub, for streams; raises ContainerError 501, or UnavailableError."""
        return await self._runtime.client()

    def containers(self) -> list[Container]:
        """All containers that have been created, newest first."""
        found = [one for one in self._containers.values() if one.state["Phase"] != CREATING]
        return sorted(found, key=lambda one: one.created_at, reverse=True)

    def guests(self) -> list[GuestRecord]:
        """The guests that are no containers, newest first."""
        found = [one for one in self.fabric.desired.guests() if one.id not in self._containers]
        return sorted(found, key=lambda one: one.created_at, reverse=True)

    def find(self, text: str) -> Found:
        """The container or plain guest of a full id, a name, or a unique prefix of an id, tried in this order.

        Raises:
            ContainerError: 404, or 500 as dockerd's when the prefix fits several.
        """
        everyone: list[Found] = [*self.containers(), *self.guests()]
        for one in everyone:
            if one.id == text:
                return one
        name = text.removeprefix("/")
        for one in everyone:
            if one.name == name:
                return one
        linked = self._by_link(name)
        if linked is not None:
            return linked
        matches = [one for one in everyone if text and one.id.startswith(text)]
        if len(matches) > 1:
            raise ContainerError(500, f"Multiple IDs found with provided prefix: {text}")
        if not matches:
            raise NoSuchContainerError(text)
        return matches[0]

    def container(self, text: str) -> Container:
        """As `find`, and refuses guests that some other runtime runs."""
        found = self.find(text)
        if isinstance(found, GuestRecord):
            raise foreign(found.name)
        return found

    def _name_of(self, text: str) -> str | None:
        try:
            return self.find(text).name
        except ContainerError:
            return None

    def _by_link(self, path: str) -> Container | None:
        """The container that another one knows as holder/alias."""
        holder, slash, alias = path.partition("/")
        if not slash:
            return None
        for target, names in self.linked_names().items():
            if f"/{holder}/{alias}" in names:
                return self._containers.get(target)
        return None

    def linked_names(self) -> dict[str, list[str]]:
        """Names that containers have by others' links on the default bridge, such as /web/db, by container id."""
        result: dict[str, list[str]] = {}
        for container in self.containers():
            for text, target in container.config["Links"].items():
                _, alias = create.parse_link(text)
                result.setdefault(target, []).append(f"/{container.name}/{alias}")
        return result

    # Creating and removing

    async def create(
        self, name: str | None, config: JSON, host: JSON, networking: JSON, version: tuple[int, ...]
    ) -> tuple[Container, list[str]]:
        """Creates a container; returns it and warnings.

        Args:
            name: as the client gave it, None or "" for one of ours.
            config, host, networking: Docker's Config, HostConfig and NetworkingConfig, with every field.
            version: the client's API version.

        Raises:
            ContainerError, BridgeError: with nothing changed.
        """
        container_id = secrets.token_hex(32)
        if name:
            name = check_name(name)
        create.check(config, host, version)
        warnings = create.prepare_host(host, config)
        image = await self._image(config["Image"])
        create.merge_image(config, image)
        targets = self._link_targets(host)
        mounts = create.mounts(host)
        wanted = create.initial_networks(host, networking, version, self._network_name)
        config["Hostname"] = create.hostname(container_id, config, host["NetworkMode"])
        if host["NetworkMode"] not in ("default", "bridge", "host", "none") and not host["NetworkMode"].startswith(
            "container:"
        ):
            host["Links"] = None if not host["Links"] else host["Links"]
        container = Container(
            container_id,
            name or random_name(lambda text: self._store.holder_of_name(text) is not None),
            datetime.datetime.now(datetime.UTC),
            {
                "Config": config,
                "HostConfig": host,
                "Image": image.id,
                "Networks": wanted,
                "Mounts": mounts,
                "Links": {text: target.id for text, target in targets.items()},
                "Created": times.now(),
            },
            new_state(),
        )
        async with container.lock:
            self._insert(container)
            try:
                await self._prepare(container)
                container.state["Phase"] = ""
                self._save(container)
            except BaseException:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + _UNDO_TIMEOUT):
                    try:
                        await self._runtime.delete(container.id)
                    except (BridgeError, RpcError) as error:
                        logger.warning("container %s is left in the runtime: %s", container.name, error)
                    else:
                        self._forget(container)
                raise
        self.tell(container, "create")
        return container, warnings

    async def _image(self, text: str) -> runtime.Image:
        if not text:
            raise invalid("no image was named: give Image a reference or an id")
        reference = with_tag(text)
        image = await self._runtime.image(text)
        if image is None:
            raise ContainerError(404, f"No such image: {reference if not is_id(text) else text}")
        return image

    def _link_targets(self, host: JSON) -> dict[str, Container]:
        result = {}
        for text in host["Links"] or ():
            name, _ = create.parse_link(text)
            try:
                result[text] = self.container(name)
            except NoSuchContainerError as error:
                raise invalid(f"could not get container for {name}: {error}") from error
        return result

    def _network_name(self, text: str) -> str | None:
        network = self.networks.network(text)
        return None if network is None else network.name

    async def _prepare(self, container: Container) -> None:
        """Has the runtime make the root file system."""
        mounts = [
            runtime.Mount(source=mount["Source"], target=mount["Destination"], read_only=not mount["RW"])
            for mount in container.config["Mounts"]
        ]
        request = runtime.CreateContainerRequest(
            container_id=container.id,
            name=container.name,
            image_id=container.config["Image"],
            writable=not container.host["ReadonlyRootfs"],
            mounts=mounts,
        )
        try:
            await self._runtime.create(request)
        except RpcError as error:
            if error.code is StatusCode.NOT_FOUND:
                raise ContainerError(404, f"No such image: {container.config['Image']}") from error
            raise _runtime_failed(error) from error

    def _insert(self, container: Container) -> None:
        try:
            with self._store.change():
                self._store.insert_container(container.record())
        except NameInUseError as error:
            raise _name_conflict(error) from error
        self._containers[container.id] = container

    def _save(self, container: Container, *, durable: bool = True) -> None:
        with self._store.change(durable=durable):
            self._store.update_container(container.record())
        container.changed.notify()

    def _note(self, container: Container) -> None:
        self._save(container, durable=False)

    def _forget(self, container: Container) -> None:
        with self._store.change():
            self._store.delete_container(container.id)
        self._containers.pop(container.id, None)
        self.execs.forget(container)
        container.removed = True
        container.changed.notify()

    async def remove(self, text: str, *, force: bool = False) -> None:
        """Removes a container, with `force` also a running one."""
        container = self.container(text)
        if container.removing and container.lock.locked():
            raise conflict(f"removal of container {container.name} is already in progress")
        if container.running:
            if not force:
                if container.restarting:
                    raise conflict(
                        f"You cannot remove a restarting container {container.id}. "
                        "Stop the container before attempting removal or force remove"
                    )
                raise conflict(
                    f"You cannot remove a running container {container.id}. "
                    "Stop the container before attempting removal or force remove"
                )
            await self._end(container, SIGKILL, timeout=0)
        await self._remove(container)

    async def _remove(self, container: Container) -> None:
        async with container.lock:
            if container.removed:
                return
            if container.running:
                raise conflict(
                    f"You cannot remove a running container {container.id}. "
                    "Stop the container before attempting removal or force remove"
                )
            container.state["Phase"] = REMOVING
            self._save(container)
            # From here on the removal is finished, if not by this call then after the next start.
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _UNDO_TIMEOUT):
                await self._remove_rest(container)
                return
            raise ContainerError(500, f"container {container.name} is being removed: the runtime is slow")

    async def _remove_rest(self, container: Container) -> None:
        if self._has_guest(container):
            await self._remove_guest(container)
        try:
            await self._runtime.delete(container.id)
        except RpcError as error:
            raise _runtime_failed(error) from error
        self._forget(container)
        self.tell(container, "destroy")

    async def rename(self, text: str, name: str) -> None:
        """Gives a container another name."""
        found = self.find(text)
        if not name:
            raise invalid("Neither old nor new names may be empty")
        new = name.removeprefix("/")
        if new == found.name:
            raise invalid("Renaming a container with the same name as its current name")
        try:
            new = check_name("/" + new)
        except ContainerError as error:
            raise invalid(f"Error when allocating new name: {error}") from error
        if isinstance(found, GuestRecord):
            raise foreign(found.name)
        async with found.lock:
            before = found.name
            if found.removing or found.removed:
                raise NoSuchContainerError(text)
            try:
                if self._has_guest(found):
                    # Renames the record too, in the same transaction.
                    await self.fabric.rename_guest(found.id, new)
                    found.name = new
                else:
                    found.name = new
                    self._save(found)
            except NameInUseError as error:
                found.name = before
                raise conflict(f"Error when allocating new name: {_name_conflict(error)}") from error
            except BaseException:
                found.name = before
                raise
            found.changed.notify()
        self.tell(found, "rename", oldName=f"/{before}")

    # Starting

    async def start(self, text: str) -> None:
        """Starts a container; NotModifiedError when it runs."""
        container = self.container(text)
        async with container.lock:
            if container.removed:
                raise NoSuchContainerError(text)
            if container.removing:
                raise conflict("container is marked for removal and cannot be started")
            if container.running:
                raise NotModifiedError
            container.state["ManuallyStopped"] = False
            container.state["RestartCount"] = 0
            container.restart_delay = 0.0
            try:
                await self._start(container)
            except BaseException:
                if container.host["AutoRemove"]:
                    with trio.CancelScope(shield=True, deadline=trio.current_time() + _UNDO_TIMEOUT):
                        await self._remove_failed(container)
                raise
        self.tell(container, "start")

    async def _remove_failed(self, container: Container) -> None:
        """Removes a container that was not started and is to be removed when it ends; the lock is held."""
        try:
            container.state["Phase"] = REMOVING
            self._save(container)
            await self._remove_rest(container)
        except (BridgeError, RpcError) as error:
            logger.error("container %s is not removed: %s", container.name, error)

    async def _start(self, container: Container) -> None:
        """Starts the container, or leaves it as it was with the error in its state; the lock is held."""
        try:
            await self._try_start(container)
        except BaseException as error:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _UNDO_TIMEOUT):
                await self._take_back(container)
            code, message = 128, "the start was cancelled"
            if isinstance(error, ContainerError):
                message = error.message
                code = {400: _exec_code(message)}.get(error.status, 128)
            elif isinstance(error, BridgeError):
                message = self.explain(error)[1]
            container.state |= {
                "Phase": "",
                "Running": False,
                "Restarting": False,
                "Pid": 0,
                "ExitCode": code,
                "Error": message,
            }
            container.exits += 1
            self._save(container)
            raise

    async def _try_start(self, container: Container) -> None:
        if container.mode.startswith("container:"):
            self.find(container.mode.removeprefix("container:"))
            raise ContainerError(501, "the network mode container:… is not supported: give each container its networks")
        self.networks.check(container)
        if container.state["Phase"] == STARTING or self._has_guest(container):
            # What a bridge that was killed left of an earlier start.
            await self._take_down(container)
        hosts, variables = self._resolve_links(container)
        settings = self.networks.settings(container)
        if hosts:
            settings = _with_hosts(settings, hosts)
        for mount in container.config["Mounts"]:
            if mount["Type"] == "bind":
                create.make_source(mount)
        # Ports first: what is taken is an error before anything is changed.
        self.networks.publish(container)
        container.state["Phase"] = STARTING
        container.state["Error"] = ""
        container.state["SandboxID"] = secrets.token_hex(32)
        # Not told to anyone yet; start-up looks at the runtime's list too.
        self._save(container, durable=False)
        guest = container.mode != "host"
        booted = await self._boot(container)
        if guest:
            await self.fabric.register_guest(
                container.name,
                booted.guest_address,
                booted.guest_data_address,
                guest_id=container.id,
                settings=settings,
            )
            await self.networks.connect_all(container)
            self.networks.target(container)
        pid = await self._start_main(container, variables)
        container.state |= {
            "Phase": "",
            "Running": True,
            "Restarting": False,
            "OOMKilled": False,
            "Dead": False,
            "Pid": pid,
            "ExitCode": 0,
            "Error": "",
            "StartedAt": times.now(),
        }
        self._save(container)
        logger.info("started container %s", container.name)

    def _resolve_links(self, container: Container) -> tuple[list[tuple[str, str]], list[str]]:
        if container.mode not in ("default", "bridge"):
            return [], []
        targets = {}
        for text, target_id in container.config["Links"].items():
            target = self._containers.get(target_id)
            if target is None:
                raise ContainerError(500, f"Cannot link to {create.parse_link(text)[0]}: it was removed")
            targets[text] = target
        return links.resolve(container, targets, self.networks)

    async def _boot(self, container: Container) -> runtime.BootContainerResponse:
        request = runtime.BootContainerRequest(
            container_id=container.id,
            hostname=container.docker["Hostname"],
            domainname=container.docker["Domainname"],
            network_mode=runtime.NetworkMode.HOST if container.mode == "host" else runtime.NetworkMode.GUEST,
        )
        try:
            try:
                return await self._runtime.boot(request)
            except RpcError as error:
                if error.code is not StatusCode.NOT_FOUND:
                    raise
            # A runtime that lost its disk: the container starts from its image again.
            await self._prepare(container)
            return await self._runtime.boot(request)
        except RpcError as error:
            raise _runtime_failed(error) from error

    async def _start_main(self, container: Container, variables: list[str]) -> int:
        config, host = container.docker, container.host
        spec = runtime.ProcessSpec(
            arguments=create.command(config),
            environment=create.environment(config, config["Hostname"], variables),
            working_directory=config["WorkingDir"],
            user=config["User"],
            terminal=config["Tty"],
            stdin=config["OpenStdin"],
            privileged=host["Privileged"],
            add_capabilities=capabilities(host["CapAdd"]),
            drop_capabilities=capabilities(host["CapDrop"]),
            stdin_once=config["StdinOnce"],
            columns=host["ConsoleSize"][1],
            rows=host["ConsoleSize"][0],
        )
        container.config["Environment"] = list(spec.environment)
        try:
            return await self._runtime.start(container.id, "", spec)
        except RpcError as error:
            if error.code is StatusCode.INVALID_ARGUMENT:
                raise _not_executable(error.message) from error
            raise _runtime_failed(error) from error

    def _has_guest(self, container: Container) -> bool:
        return self._store.guest(container.id) is not None

    async def _remove_guest(self, container: Container) -> None:
        try:
            await self.fabric.remove_guest(container.id)
        except GuestNotFoundError:
            logger.debug("container %s has no guest any more", container.name)

    async def _take_down(self, container: Container) -> None:
        """Takes ports, guest and VM away. The guest first: its agent lets go of its links while it is there."""
        self.networks.release(container)
        if self._has_guest(container):
            await self._remove_guest(container)
        try:
            await self._runtime.halt(container.id)
        except RpcError as error:
            if error.code is not StatusCode.NOT_FOUND:
                logger.error("the VM of container %s cannot be halted: %s", container.name, error)
        except UnavailableError as error:
            # It is halted when the runtime is back: its list says that it runs.
            logger.warning("the VM of container %s is not halted yet: %s", container.name, error)
        # The news of what was halted may come when the container runs again.
        container.exit_seen = datetime.datetime.now(datetime.UTC)

    async def _take_back(self, container: Container) -> None:
        try:
            await self._take_down(container)
        except (BridgeError, RpcError) as error:
            logger.error("taking back the start of container %s: %s", container.name, error)

    # Ending

    async def _ended(
        self, container: Container, code: int, out_of_memory: bool, moment: datetime.datetime | None
    ) -> None:
        """The main process is gone: what it had is given back, and the restart policy decides; the lock is held."""
        state = container.state
        container.exit_seen = moment or container.exit_seen
        duration = times.ago_seconds(state["StartedAt"])
        again = self._restarts(container, code)
        state |= {
            "Running": again,
            "Restarting": again,
            "Pid": 0,
            "ExitCode": code,
            "OOMKilled": out_of_memory,
            "FinishedAt": times.from_datetime(moment) if moment is not None else times.now(),
        }
        if again:
            state["RestartCount"] += 1
        removed = not again and container.host["AutoRemove"]
        with self._store.change():
            self._store.update_container(container.record())
        for one in self.execs.running_in(container):
            self.exec_ended(one.id, GONE_EXIT_CODE)
        self.tell(container, "die", exitCode=str(code))
        await self._take_down(container)
        container.exits += 1
        self._save(container, durable=False)
        logger.info("container %s ended with exit code %d", container.name, code)
        if again:
            previous = 0.0 if duration >= _GOOD_RUN else container.restart_delay
            container.restart_delay = min(max(_FIRST_RESTART, previous * 2), _LAST_RESTART)
            self._spawn(self._restart_later, container)
        elif removed:
            self._spawn(self._auto_remove, container)

    @staticmethod
    def _restarts(container: Container, code: int) -> bool:
        if container.state["ManuallyStopped"] or container.removing:
            return False
        policy = container.host["RestartPolicy"]
        if policy["Name"] in ("always", "unless-stopped"):
            return True
        if policy["Name"] != "on-failure" or code == 0:
            return False
        limit = policy["MaximumRetryCount"]
        return bool(limit == 0 or container.state["RestartCount"] < limit)

    async def _restart_later(self, container: Container) -> None:
        with trio.CancelScope() as scope:
            container.restart_scope = scope
            await trio.sleep(container.restart_delay or _FIRST_RESTART)
        if container.restart_scope is scope:
            container.restart_scope = None
        if scope.cancelled_caught:
            return
        async with container.lock:
            if container.removed or not container.restarting or container.state["ManuallyStopped"]:
                return
            try:
                await self._start(container)
            except UnavailableError as error:
                logger.warning("container %s is not started again yet: %s", container.name, error)
                container.state |= {"Running": True, "Restarting": True}
                self._save(container)
                container.restart_delay = min(max(_FIRST_RESTART, container.restart_delay * 2), _LAST_RESTART)
                self._spawn(self._restart_later, container)
                return
        self.tell(container, "start")

    async def _auto_remove(self, container: Container) -> None:
        try:
            await self._remove(container)
        except ContainerError as error:
            if not container.removed and not container.removing:
                logger.error("container %s is not removed: %s", container.name, error)

    def _give_up_restart(self, container: Container) -> bool:
        """Ends a container that waits for its restart; False: it does not."""
        if not container.restarting:
            return False
        if container.restart_scope is not None:
            container.restart_scope.cancel()
            container.restart_scope = None
        container.state |= {"Running": False, "Restarting": False, "ManuallyStopped": True}
        container.exits += 1
        self._save(container)
        if container.host["AutoRemove"]:
            self._spawn(self._auto_remove, container)
        return True

    async def _end(self, container: Container, number: int, timeout: float | None) -> None:  # noqa: ASYNC109
        """Sends a signal, and SIGKILL when the container is not gone after `timeout` seconds; waits until it is.

        Args:
            timeout: None: as long as it takes.
        """
        if self._give_up_restart(container):
            return
        before = container.exits
        container.state["ManuallyStopped"] = True
        self._save(container)

        def gone() -> bool:
            return container.exits != before or container.removed

        async def wait(seconds: float | None) -> bool:
            with trio.move_on_after(float("inf") if seconds is None else seconds):
                await container.changed.until(gone)
            return gone()

        if number != SIGKILL:
            await self._signal(container, number, wait_for_end=True)
            if await wait(timeout):
                return
        await self._signal(container, SIGKILL, wait_for_end=True)
        if await wait(_KILL_PATIENCE):
            return
        logger.error("container %s does not end: halting its VM", container.name)
        async with container.lock:
            if container.alive:
                await self._ended(container, GONE_EXIT_CODE, False, None)

    async def _signal(self, container: Container, number: int, *, wait_for_end: bool = False) -> None:
        try:
            await self._runtime.signal(container.id, number)
        except RpcError as error:
            if error.code in (StatusCode.NOT_FOUND, StatusCode.FAILED_PRECONDITION):
                # It has just ended; its exit is on the way.
                if wait_for_end:
                    return
                raise not_running(container.id) from error
            raise _runtime_failed(error) from error
        self.tell(container, "kill", signal=str(number))

    def _stop_signal(self, container: Container, text: str = "") -> int:
        chosen = text or container.docker["StopSignal"]
        if not chosen:
            return SIGTERM
        return parse_signal(chosen)

    def _stop_timeout(self, container: Container, seconds: int | None) -> float | None:
        if seconds is None:
            configured = container.docker["StopTimeout"]
            seconds = DEFAULT_STOP_TIMEOUT if configured is None else configured
        return None if seconds < 0 else float(seconds)

    async def stop(self, text: str, *, seconds: int | None = None, signal: str = "") -> None:
        """Ends a container; NotModifiedError when it does not run."""
        container = self.container(text)
        if not container.running:
            raise NotModifiedError
        number = self._stop_signal(container, signal)
        await self._end(container, number, self._stop_timeout(container, seconds))
        self.tell(container, "stop")

    async def restart(self, text: str, *, seconds: int | None = None, signal: str = "") -> None:
        """Ends a container, if it runs, and starts it."""
        container = self.container(text)
        if container.running:
            auto_remove = container.host["AutoRemove"]
            container.host["AutoRemove"] = False
            try:
                number = self._stop_signal(container, signal)
                await self._end(container, number, self._stop_timeout(container, seconds))
                self.tell(container, "stop")
            finally:
                container.host["AutoRemove"] = auto_remove
        try:
            await self.start(container.id)
        except NotModifiedError:
            logger.debug("container %s was started by another request", container.name)
        self.tell(container, "restart")

    async def kill(self, text: str, signal: str = "") -> None:
        """Sends a signal to a container's main process; with SIGKILL returns once it has ended."""
        number = parse_signal(signal) if signal else SIGKILL
        prefix = f"Cannot kill container: {text}"
        try:
            container = self.container(text)
            check_supported(number)
            if not container.running:
                raise not_running(container.id)
            if number == SIGKILL:
                await self._end(container, SIGKILL, timeout=0)
                return
            if self._give_up_restart(container):
                return
            container.state["ManuallyStopped"] = True
            self._save(container)
            await self._signal(container, number)
        except ContainerError as error:
            if error.status == 501:
                raise
            raise ContainerError(error.status, f"{prefix}: {error}") from error

    def waiter(self, text: str, condition: str) -> Callable[[], Any]:
        """What waits until a container does not run, has ended once more, or is gone; awaited, it gives the exit code.

        What counts as the next exit is decided now, not when the result is awaited.

        Args:
            condition: "next-exit", "removed", or anything else for "not-running".
        """
        container = self.container(text)
        exits = container.exits
        known = {"code": container.state["ExitCode"]}

        async def wait() -> int:
            if condition == "next-exit":
                await container.changed.until(lambda: container.exits != exits or container.removed)
            elif condition == "removed":
                await container.changed.until(lambda: container.removed)
            else:
                await container.changed.until(lambda: not container.running or container.removed)
            known["code"] = container.state["ExitCode"]
            return int(known["code"])

        return wait

    # Networks

    async def connect(
        self, network: str, text: str, options: EndpointOptions, settings: Mapping[str, Any] | None = None
    ) -> None:
        """Puts a container or plain guest on a network.

        Args:
            network: its name or id.
            text: the container.
            options: how it is to be connected.
            settings: the same as Docker's client sent it; inspect echoes it.
        """
        found = self.find(text)
        if isinstance(found, GuestRecord):
            record = self.fabric.desired.find_network(network)
            await self.fabric.connect(record.id, found.id, options)
            return
        async with found.lock:
            self._check_there(found, text)
            published = list(found.state["Published"])
            if await self.networks.connect(found, network, options, settings) and (
                not found.running or published != found.state["Published"]
            ):
                self._save(found)

    async def disconnect(self, network: str, text: str, *, force: bool = False) -> None:
        """Takes a container or plain guest off a network."""
        found = self.find(text)
        if isinstance(found, GuestRecord):
            record = self.fabric.desired.find_network(network)
            await self.fabric.disconnect(record.id, found.id)
            return
        async with found.lock:
            self._check_there(found, text)
            running, published = found.alive, list(found.state["Published"])
            record_or_none = await self.networks.disconnect(found, network, force=force)
            switched = record_or_none is not None and record_or_none.switched
            if not (running and switched) or published != found.state["Published"]:
                self._save(found)
        if record_or_none is not None and not (running and record_or_none.switched):
            attributes = {
                "container": found.id,
                "name": record_or_none.name,
                "type": record_or_none.driver,
            }
            self.on_event("network", "disconnect", record_or_none.id, attributes)

    @staticmethod
    def _check_there(container: Container, text: str) -> None:
        if container.removed:
            raise NoSuchContainerError(text)
        if container.removing:
            raise ContainerError(
                403,
                f"Container {container.id} is marked for removal and cannot be connected or disconnected to the "
                "network",
            )

    def users_of(self, network_name: str) -> Iterator[Container]:
        """Containers that are to be on a network, running or not."""
        return (one for one in self.containers() if network_name in one.networks)

    # Processes

    def exec_create(self, text: str, config: JSON) -> Exec:
        """A process to be started in a running container."""
        container = self.container(text)
        self._check_alive(container)
        environment = create.merged_environment(container.config.get("Environment") or [], config["Env"] or [])
        if config["Tty"] and not any(variable.startswith("TERM=") for variable in environment):
            environment.append("TERM=xterm")
        one = self.execs.add(container, config, environment)
        self.tell(container, f"exec_create: {one.command}", execID=one.id)
        return one

    @staticmethod
    def _check_alive(container: Container) -> None:
        if container.restarting:
            raise conflict(f"Container {container.id} is restarting, wait until the container is running")
        if not container.running:
            raise not_running(container.id)

    def exec_claim(self, exec_id: str) -> Exec:
        """The process, if it may be started now."""
        one = self.execs.get(exec_id)
        container = one.container
        if not container.alive:
            raise ContainerError(500, f"Container {container.id} is not running: {container.status_text()}")
        self.execs.use(one)
        self.tell(container, f"exec_start: {one.command}", execID=one.id)
        return one

    async def exec_start(self, one: Exec, *, terminal: bool) -> None:
        """Starts a claimed process."""
        one.running = True
        try:
            one.pid = await self._runtime.start(one.container.id, one.id, one.spec(terminal=terminal))
        except BaseException as error:
            code = 126
            one.ended(code)
            if isinstance(error, RpcError):
                if error.code is StatusCode.INVALID_ARGUMENT:
                    raise invalid(_exec_failed(error.message)) from error
                if error.code in (StatusCode.NOT_FOUND, StatusCode.FAILED_PRECONDITION):
                    raise not_running(one.container.id) from error
                raise _runtime_failed(error) from error
            raise
        one.started = True
        one.changed.notify()

    async def exec_resize(self, exec_id: str, columns: int, rows: int) -> None:
        """Sets the size of a further process's terminal, also of one that is about to start."""
        one = self.execs.get(exec_id)
        one.columns, one.rows = columns, rows
        if one.running:
            # It may be on its way with the size that it had.
            await one.changed.until(lambda: one.started or not one.running)
        if one.running:
            await self._resize(one.container, columns, rows, one.id)

    async def resize(self, text: str, columns: int, rows: int) -> None:
        """Sets the size of a container's terminal."""
        container = self.container(text)
        self._check_alive(container)
        await self._resize(container, columns, rows, "")
        self.tell(container, "resize", height=str(rows), width=str(columns))

    async def _resize(self, container: Container, columns: int, rows: int, process_id: str) -> None:
        try:
            await self._runtime.resize(container.id, columns, rows, process_id)
        except RpcError as error:
            if error.code is StatusCode.NOT_FOUND:
                raise not_running(container.id) from error
            # dockerd sets the size of what has no terminal without a word.
            if error.code is not StatusCode.FAILED_PRECONDITION:
                raise _runtime_failed(error) from error

    async def update_restart_policy(self, text: str, policy: JSON) -> None:
        """Changes a container's restart policy."""
        container = self.container(text)
        create.check_restart_policy(policy["Name"], policy["MaximumRetryCount"])
        if policy["Name"] not in ("", "no") and container.host["AutoRemove"]:
            raise conflict("Restart policy cannot be updated because AutoRemove is enabled for the container")
        async with container.lock:
            self._check_there(container, text)
            container.host["RestartPolicy"] = copy.deepcopy(policy)
            self._save(container)
        self.tell(container, "update")

    async def prune(self, wanted: Callable[[Container], bool]) -> list[str]:
        """Removes the containers that do not run, of those that are wanted; returns their ids."""
        removed = []
        for container in self.containers():
            if not container.running and wanted(container):
                try:
                    await self._remove(container)
                except (ContainerError, UnavailableError) as error:
                    logger.warning("container %s is not pruned: %s", container.name, error)
                else:
                    removed.append(container.id)
        return removed

    def tell(self, container: Container, action: str, **attributes: str) -> None:
        """Tells an event of a container."""
        about = {
            **(container.docker["Labels"] or {}),
            "image": container.docker["Image"],
            "name": container.name,
            **attributes,
        }
        self.on_event("container", action, container.id, about)


def _with_hosts(settings: GuestSettings, hosts: Sequence[tuple[str, str]]) -> GuestSettings:
    return dataclasses.replace(settings, extra_hosts=(*settings.extra_hosts, *hosts))


def _name_conflict(error: NameInUseError) -> ContainerError:
    return conflict(
        f'Conflict. The container name "/{error.name}" is already in use by container "{error.id}". You have to remove '
        "(or rename) that container to be able to reuse that name."
    )


def _runtime_failed(error: RpcError) -> BridgeError:
    if error.code in (StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED):
        return UnavailableError(f"the container runtime does not answer: {error.message}")
    return ContainerError(500, error.message or str(error))


def _not_executable(reason: str) -> ContainerError:
    if reason.startswith("unable to find "):
        return ContainerError(500, reason)
    return invalid(
        "failed to create shim task: OCI runtime create failed: runc create failed: unable to start container process: "
        f"{reason}: unknown"
    )


def _exec_failed(reason: str) -> str:
    if reason.startswith("unable to find "):
        return reason
    return f"OCI runtime exec failed: exec failed: unable to start container process: {reason}: unknown"


def _exec_code(message: str) -> int:
    """The exit code of a container whose command cannot be run, by dockerd's rules."""
    if "executable file not found" in message or "no such file or directory" in message:
        return 127
    if "permission denied" in message or "is a directory" in message:
        return 126
    return 128
