"""The /images family: root file systems that were imported, and the host's own. There is no registry to pull from."""

from __future__ import annotations

import fnmatch
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import trio

from host_bridge.containers import times
from host_bridge.containers.errors import ContainerError, invalid, no_runtime
from host_bridge.containers.manager import ContainerManager
from host_bridge.containers.references import is_id, parse, with_tag
from host_bridge.containers.runtime import RuntimeClient
from host_bridge.docker_api import attach
from host_bridge.docker_api.errors import DockerError, bad_request, not_implemented
from host_bridge.docker_api.filters import Filters
from host_bridge.docker_api.http import Answer, Request, Response, json_line, json_response
from taploom.contracts.taploom.runtime import v1 as runtime
from taploom.rpc import RpcError, StatusCode

JSON = dict[str, Any]
EventLog = Callable[[str, str, str, Mapping[str, str]], None]

_FILTERS = frozenset({"before", "dangling", "label", "reference", "since", "until"})
_NO_VIRTUAL_SIZE = (1, 44)


def register(add: attach.Add, manager: ContainerManager, log: EventLog) -> None:
    """Adds the routes."""
    routes = _Images(manager, log)
    add("GET", "/images/json", routes.list)
    add("POST", "/images/create", routes.create)
    add("POST", "/images/prune", routes.prune)
    add("GET", "/images/{name:.+?}/json", routes.inspect)
    add("GET", "/images/{name:.+?}/history", routes.history)
    add("POST", "/images/{name:.+?}/tag", routes.tag)
    add("POST", "/images/{name:.+?}/push", routes.push)
    add("DELETE", "/images/{name:.+}", routes.remove)


class _Images:
    def __init__(self, manager: ContainerManager, log: EventLog) -> None:
        self._manager = manager
        self._log = log

    @property
    def _runtime(self) -> RuntimeClient:
        if self._manager.runtime is None:
            raise no_runtime()
        return self._manager.runtime

    async def list(self, request: Request) -> Answer:
        filters = Filters.parse(request.first("filters"))
        filters.check_keys(_FILTERS)
        if self._manager.runtime is None:
            await trio.lowlevel.checkpoint()
            return json_response([])
        images = await self._runtime.images()
        dangling = filters.boolean("dangling") if "dangling" in filters else None
        result = []
        for image in images:
            labels = dict(image.config.labels) if image.config is not None else {}
            references = [
                text
                for text in image.references
                if not filters.get("reference") or any(_fits(text, wanted) for wanted in filters.get("reference"))
            ]
            if (filters.get("reference") and not references) or not filters.labels("label", labels):
                continue
            if dangling is not None and dangling == bool(image.references):
                continue
            result.append(summary(image, references, request.version))
        return json_response(result)

    async def _found(self, name: str, prefix: str = "") -> runtime.Image:
        reference = with_tag(name)
        image = await self._runtime.image(name)
        if image is None:
            raise ContainerError(404, f"{prefix}No such image: {reference}")
        return image

    async def inspect(self, request: Request) -> Answer:
        name = request.params["name"]
        image = await self._found(name, f"no such image: {name}: ")
        return json_response(_inspect(image, request.version))

    async def history(self, request: Request) -> Answer:
        image = await self._found(request.params["name"])
        return json_response(
            [
                {
                    "Comment": image.comment,
                    "Created": _seconds(image),
                    "CreatedBy": "",
                    "Id": image.id,
                    "Size": image.size_bytes,
                    "Tags": list(image.references) or None,
                }
            ]
        )

    async def tag(self, request: Request) -> Answer:
        name, repository, tag = request.params["name"], request.first("repo"), request.first("tag")
        reference = _reference(repository, tag)
        image = await self._found(name)
        await self._runtime.tag_image(image.id, reference)
        self._log("image", "tag", image.id, {"name": reference})
        return Response(201)

    async def push(self, request: Request) -> Answer:
        await self._found(request.params["name"])
        raise not_implemented("there is no registry to push to: copy the image's root file system instead")

    async def prune(self, request: Request) -> Answer:
        """Removes the images that no container uses: those without a reference, or all with dangling=false."""
        filters = Filters.parse(request.first("filters"))
        filters.check_keys({"dangling", "label", "label!", "until"})
        if filters.get("until"):
            raise not_implemented("pruning by age is not supported")
        dangling = filters.boolean("dangling", default=True)
        images = [] if self._manager.runtime is None else await self._runtime.images()
        used = {one.config["Image"] for one in self._manager.containers()}
        deleted: list[JSON] = []
        reclaimed = 0
        for image in images:
            labels = dict(image.config.labels) if image.config is not None else {}
            if image.host or image.id in used or (dangling and image.references) or not filters.prunes(labels):
                continue
            try:
                removed = await self._runtime.remove_image(image.id, force=False)
            except RpcError as error:
                if error.code in (StatusCode.NOT_FOUND, StatusCode.FAILED_PRECONDITION):
                    continue  # it is gone, or a container of it has just been made
                raise
            deleted += self._removed(image, removed)
            reclaimed += image.size_bytes if removed.deleted_id else 0
        await trio.lowlevel.checkpoint()
        return json_response({"ImagesDeleted": deleted or None, "SpaceReclaimed": reclaimed})

    async def remove(self, request: Request) -> Answer:
        name, force = request.params["name"], request.flag("force")
        image = await self._found(name)
        if image.host:
            raise ContainerError(
                409,
                f'conflict: unable to remove image "{name}" (cannot be forced) - it is the host root file system',
            )
        by_id = _names_id(name, image)
        users = [one for one in self._manager.containers() if one.config["Image"] == image.id]
        last = by_id or len(image.references) <= 1
        if users and last:
            short = image.id.removeprefix("sha256:")[:12]
            user = next((one for one in users if one.running), users[0])
            if user.running and by_id:
                raise ContainerError(
                    409,
                    f"conflict: unable to delete {short} (cannot be forced) - image is being used by running "
                    f"container {user.id[:12]}",
                )
            if not force:
                if by_id:
                    raise ContainerError(
                        409,
                        f"conflict: unable to delete {short} (must be forced) - image is being used by stopped "
                        f"container {user.id[:12]}",
                    )
                raise ContainerError(
                    409,
                    f'conflict: unable to remove repository reference "{name}" (must force) - container '
                    f"{user.id[:12]} is using its referenced image {short}",
                )
        if by_id and len(image.references) > 1 and not force:
            short = image.id.removeprefix("sha256:")[:12]
            raise ContainerError(
                409,
                f"conflict: unable to delete {short} (must be forced) - image is referenced in multiple repositories",
            )
        try:
            removed = await self._runtime.remove_image(image.id if by_id else with_tag(name), force=force)
        except RpcError as error:
            if error.code is StatusCode.FAILED_PRECONDITION:
                raise ContainerError(409, f"conflict: {error.message}") from error
            raise
        return json_response(self._removed(image, removed))

    def _removed(self, image: runtime.Image, removed: runtime.RemoveImageResponse) -> Sequence[JSON]:
        """What was removed as Docker lists it; its events are told."""
        result: list[JSON] = [{"Untagged": text} for text in removed.untagged]
        for text in removed.untagged:
            self._log("image", "untag", image.id, {"name": text})
        if removed.deleted_id:
            result.append({"Deleted": removed.deleted_id})
            self._log("image", "delete", removed.deleted_id, {"name": removed.deleted_id})
        return result

    async def create(self, request: Request) -> Answer:
        if request.first("fromSrc"):
            return await self._import(request)
        name = request.first("fromImage")
        await trio.lowlevel.checkpoint()
        if not name:
            parse(name)
        reference = _reference(name, request.first("tag")) if not is_id(name) else name
        if self._manager.runtime is not None and await self._runtime.image(reference) is not None:
            # Whoever pulls before each run, as Compose and CI scripts do, has what is wanted.
            return Response(200, _lines({"status": f"Status: Image is up to date for {reference}"}), (), _JSON)
        raise ContainerError(
            404,
            f"pull access denied for {parse(name)[0]}: there is no registry here, import a root file system instead: "
            f"docker import ROOTFS.tar {reference}",
        )

    async def _import(self, request: Request) -> Answer:
        source, repository = request.first("fromSrc"), request.first("repo")
        reference = _reference(repository, request.first("tag")) if repository else ""
        if source != "-":
            raise not_implemented("images are imported from a file or from standard input, not from a URL")
        parameters = runtime.ImportImage(
            reference=reference,
            comment=request.first("message") or f"Imported from {source}",
            changes=list(request.query.get("changes", ())),
        )
        if request.first("platform") not in ("", "linux") and not request.first("platform").startswith("linux/"):
            raise invalid(f"operating system is not supported: {request.first('platform')}")
        _check_changes(parameters.changes)
        try:
            image = await self._runtime.import_image(parameters, request.chunks())
        except RpcError as error:
            if error.code is StatusCode.INVALID_ARGUMENT:
                raise DockerError(500, error.message) from error
            raise
        self._log("image", "import", image.id, {"name": image.id})
        return Response(200, _lines({"status": image.id}), (), _JSON)


_JSON = "application/json"
_INSTRUCTIONS_WORDS = "CMD ENTRYPOINT ENV EXPOSE LABEL ONBUILD STOPSIGNAL USER VOLUME WORKDIR HEALTHCHECK"
_INSTRUCTIONS = frozenset(_INSTRUCTIONS_WORDS.split())
_KNOWN = _INSTRUCTIONS | frozenset(["ADD", "ARG", "COPY", "FROM", "MAINTAINER", "RUN", "SHELL"])


def _check_changes(changes: list[str]) -> None:
    for change in changes:
        word = change.split(None, 1)[0] if change.split() else ""
        if not word:
            raise bad_request("file with no instructions")
        if word.upper() not in _KNOWN:
            raise bad_request(f"unknown instruction: {word.upper()}")
        if word.upper() not in _INSTRUCTIONS:
            raise bad_request(f"{word.upper()} is not a valid change command")


async def _lines(*values: JSON) -> AsyncIterator[bytes]:
    await trio.lowlevel.checkpoint()
    for value in values:
        # Clients read progress as one JSON object per line, ended as HTTP does.
        yield json_line(value).rstrip(b"\n") + b"\r\n"


def _reference(repository: str, tag: str) -> str:
    if is_id(repository):
        raise invalid("refusing to create an ambiguous tag using digest algorithm as name")
    name, own = parse(repository)
    if tag:
        parse(f"{name}:{tag}")
        return f"{name}:{tag}"
    return f"{name}:{own or 'latest'}"


def _names_id(text: str, image: runtime.Image) -> bool:
    """True when the text is the image's id or a part of it, and none of its references."""
    if is_id(text):
        return True
    return with_tag(text) not in image.references and image.id.removeprefix("sha256:").startswith(text)


def _fits(reference: str, wanted: str) -> bool:
    name, _, _ = reference.rpartition(":")
    return fnmatch.fnmatchcase(reference, wanted) or fnmatch.fnmatchcase(name, wanted)


def _seconds(image: runtime.Image) -> int:
    return 0 if image.created_at is None else int(image.created_at.timestamp())


def summary(image: runtime.Image, references: list[str], version: tuple[int, ...]) -> JSON:
    labels = dict(image.config.labels) if image.config is not None else {}
    result: JSON = {
        "Containers": -1,
        "Created": _seconds(image),
        "Id": image.id,
        "Labels": labels or None,
        "ParentId": "",
        "RepoDigests": None if references else ["<none>@<none>"],
        "RepoTags": references or ["<none>:<none>"],
        "SharedSize": -1,
        "Size": image.size_bytes,
    }
    if version < _NO_VIRTUAL_SIZE:
        result["VirtualSize"] = image.size_bytes
    elif not references:
        result |= {"RepoDigests": [], "RepoTags": []}
    return result


def _inspect(image: runtime.Image, version: tuple[int, ...]) -> JSON:
    config = image.config or runtime.ImageConfig()
    result: JSON = {
        "Id": image.id,
        "RepoTags": list(image.references),
        "RepoDigests": [],
        "Parent": "",
        "Comment": image.comment,
        "Created": times.from_datetime(image.created_at),
        "DockerVersion": "",
        "Author": "",
        "Config": _config(config),
        "Architecture": image.architecture,
        "Os": "linux",
        "Size": image.size_bytes,
        "GraphDriver": {"Data": None, "Name": "overlay2"},
        "RootFS": {"Type": "layers", "Layers": [image.id]},
        "Metadata": {"LastTagTime": times.ZERO},
    }
    if version < _NO_VIRTUAL_SIZE:
        result |= {"VirtualSize": image.size_bytes}
    if version < (1, 45):
        result |= {"Container": "", "ContainerConfig": _config(runtime.ImageConfig())}
    return result


def _config(config: runtime.ImageConfig) -> JSON:
    result: JSON = {
        "Hostname": "",
        "Domainname": "",
        "User": config.user,
        "AttachStdin": False,
        "AttachStdout": False,
        "AttachStderr": False,
        "Tty": False,
        "OpenStdin": False,
        "StdinOnce": False,
        "Env": list(config.environment) or None,
        "Cmd": list(config.command) or None,
        "Image": "",
        "Volumes": {path: {} for path in config.volumes} or None,
        "WorkingDir": config.working_directory,
        "Entrypoint": list(config.entrypoint) or None,
        "OnBuild": None,
        "Labels": dict(config.labels) or None,
    }
    if config.exposed_ports:
        result["ExposedPorts"] = {port: {} for port in config.exposed_ports}
    if config.stop_signal:
        result["StopSignal"] = config.stop_signal
    return result
