"""Ping, version and info."""

from __future__ import annotations

import collections
import datetime
import functools
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from host_bridge.docker_api import container_views, images
from host_bridge.docker_api.errors import bad_request
from host_bridge.docker_api.http import Request, Response, json_response
from host_bridge.errors import BridgeError
from taploom.contracts.taploom.runtime.v1 import Image
from taploom.rpc import RpcError

if TYPE_CHECKING:
    from host_bridge.containers.manager import Found
    from host_bridge.docker_api.app import DockerApi


def register(api: DockerApi) -> None:
    """Adds the routes."""
    routes = System(api)
    for method in ("GET", "HEAD"):
        api.router.add(method, "/_ping", routes.ping)
    api.router.add("GET", "/version", routes.version)
    api.router.add("GET", "/info", routes.info)
    api.router.add("GET", "/system/df", routes.disk_usage)
    api.router.add("GET", "/events", api.events.stream)
    api.router.add("OPTIONS", "/{any:.*}", routes.options)


class System:
    """What the bridge is."""

    def __init__(self, api: DockerApi) -> None:
        self._api = api

    async def ping(self, request: Request) -> Response:
        """GET and HEAD /_ping."""
        headers = [
            ("Builder-Version", "1"),
            ("Cache-Control", "no-cache, no-store, must-revalidate"),
            ("Pragma", "no-cache"),
            ("Swarm", "inactive"),
        ]
        await trio.lowlevel.checkpoint()
        return Response(200, b"" if request.method == "HEAD" else b"OK", headers, "text/plain; charset=utf-8")

    async def options(self, request: Request) -> Response:
        """OPTIONS of anything."""
        await trio.lowlevel.checkpoint()
        return Response()

    async def version(self, request: Request) -> Response:
        """GET /version."""
        info = self._api.version
        kernel = platform.release()
        await trio.lowlevel.checkpoint()
        return json_response(
            {
                "Platform": {"Name": "taploom"},
                "Components": [
                    {
                        "Name": "Engine",
                        "Version": info.version,
                        "Details": {
                            "ApiVersion": info.api,
                            "Arch": info.arch,
                            "BuildTime": "",
                            "Experimental": "false",
                            "GitCommit": "",
                            "GoVersion": _LANGUAGE,
                            "KernelVersion": kernel,
                            "MinAPIVersion": info.min_api,
                            "Os": info.os,
                        },
                    }
                ],
                "Version": info.version,
                "ApiVersion": info.api,
                "MinAPIVersion": info.min_api,
                "GitCommit": "",
                "GoVersion": _LANGUAGE,
                "Os": info.os,
                "Arch": info.arch,
                "KernelVersion": kernel,
                "BuildTime": "",
            }
        )

    async def info(self, request: Request) -> Response:
        """GET /info: what is true here; what a bridge has nothing of is empty."""
        api = self._api
        states = collections.Counter(self._states())
        value: dict[str, Any] = {
            "ID": api.fabric.desired.store.host_id(),
            "Containers": states.total(),
            "ContainersRunning": states["running"],
            "ContainersPaused": states["paused"],
            "ContainersStopped": states.total() - states["running"] - states["paused"],
            "Images": len(await self._images()),
            "Driver": "taploom",
            "DriverStatus": [],
            "Plugins": {
                "Volume": [],
                "Network": ["bridge", "host", "null"],
                "Authorization": None,
                "Log": ["json-file"],
            },
            "MemoryLimit": False,
            "SwapLimit": False,
            "CpuCfsPeriod": False,
            "CpuCfsQuota": False,
            "CPUShares": False,
            "CPUSet": False,
            "PidsLimit": False,
            "IPv4Forwarding": True,
            "Debug": False,
            "NFd": _open_files(),
            "OomKillDisable": False,
            "NGoroutines": 0,
            "SystemTime": timestamp(datetime.datetime.now(datetime.UTC)),
            "LoggingDriver": "json-file",
            "CgroupDriver": "none",
            "NEventsListener": api.events.listeners,
            "KernelVersion": platform.release(),
            "OperatingSystem": _operating_system(),
            "OSVersion": "",
            "OSType": api.version.os,
            "Architecture": platform.machine(),
            "IndexServerAddress": "",
            "RegistryConfig": {"InsecureRegistryCIDRs": [], "IndexConfigs": {}, "Mirrors": None},
            "NCPU": os.cpu_count() or 1,
            "MemTotal": _memory(),
            "GenericResources": None,
            "DockerRootDir": "/",
            "HttpProxy": "",
            "HttpsProxy": "",
            "NoProxy": "",
            "Name": platform.node(),
            "Labels": [],
            "ExperimentalBuild": False,
            "ServerVersion": api.version.version,
            "Runtimes": {},
            "DefaultRuntime": "",
            "Swarm": {
                "NodeID": "",
                "NodeAddr": "",
                "LocalNodeState": "inactive",
                "ControlAvailable": False,
                "Error": "",
                "RemoteManagers": None,
            },
            "LiveRestoreEnabled": True,
            "Isolation": "",
            "InitBinary": "",
            "ContainerdCommit": {"ID": ""},
            "RuncCommit": {"ID": ""},
            "InitCommit": {"ID": ""},
            "SecurityOptions": [],
            "Warnings": None,
        }
        if request.version < (1, 49):
            for commit in ("ContainerdCommit", "RuncCommit", "InitCommit"):
                value[commit]["Expected"] = ""
        if request.version < (1, 50):
            value |= {"BridgeNfIptables": False, "BridgeNfIp6tables": False}
        return json_response(value)

    def _states(self) -> list[str]:
        """The state of every container; guests of other runtimes are containers that run."""
        manager = self._api.manager
        if manager is None:
            return ["running"] * len(self._api.fabric.desired.guests())
        return [one.status for one in manager.containers()] + ["running"] * len(manager.guests())

    async def disk_usage(self, request: Request) -> Response:
        """GET /system/df: containers and images; there are no volumes and no build caches."""
        kinds = request.query.get("type") if request.version >= (1, 42) else None
        for kind in kinds or ():
            if kind not in _DISK_KINDS:
                raise bad_request(f"unknown object type: {kind}")
        value: dict[str, Any] = {"LayersSize": 0, "Images": None, "Containers": None, "Volumes": None}
        value |= {"BuildCache": None, "BuilderSize": 0}
        manager = self._api.manager
        for kind in kinds or _DISK_KINDS:
            value[_DISK_KINDS[kind]] = []
        if value["Containers"] is not None and manager is not None:
            linked = manager.linked_names()
            everyone: list[Found] = [*manager.containers(), *manager.guests()]
            value["Containers"] = [
                container_views.summary(manager, one, request.version, linked, size=True) for one in everyone
            ]
        if value["Images"] is not None:
            users = collections.Counter(one.config["Image"] for one in manager.containers()) if manager else {}
            value["Images"] = [
                images.summary(image, list(image.references), request.version)
                | {"Containers": users.get(image.id, 0), "SharedSize": 0}
                for image in await self._images()
            ]
            value["LayersSize"] = sum(image["Size"] for image in value["Images"])
        await trio.lowlevel.checkpoint()
        return json_response(value)

    async def _images(self) -> list[Image]:
        """The runtime's images; none when it cannot be asked."""
        manager = self._api.manager
        try:
            if manager is None or manager.runtime is None or not manager.runtime.connected:
                await trio.lowlevel.checkpoint()
                return []
            return await manager.runtime.images()
        except (BridgeError, RpcError):
            return []


_DISK_KINDS = {"container": "Containers", "image": "Images", "volume": "Volumes", "build-cache": "BuildCache"}
# Clients show it; what it is called follows Go's own builds.
_LANGUAGE = f"python{platform.python_version()}"


def timestamp(moment: datetime.datetime) -> str:
    """A time as Go's RFC3339Nano: UTC, as many digits of the second as there are."""
    text = moment.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{text}.{moment.microsecond:06d}".rstrip("0").rstrip(".") + "Z"


def _open_files() -> int:
    try:
        return sum(1 for _ in Path("/dev/fd").iterdir())
    except OSError:
        return 0


def _memory() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


@functools.cache
def _operating_system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.platform(terse=True)
