"""The types of Docker's API that requests about containers carry: names and types as in Docker's own source."""

from __future__ import annotations

from typing import Any

from host_bridge.docker_api import gojson
from host_bridge.docker_api.endpoints import ENDPOINT_SETTINGS
from host_bridge.docker_api.errors import DockerError, bad_request
from host_bridge.docker_api.gojson import (
    ANY,
    BOOL,
    FLOAT,
    INT,
    INT64,
    STRING,
    UINT16,
    List,
    Map,
    Optional,
    Shape,
    Struct,
)
from host_bridge.docker_api.http import Request

_STRINGS = List(STRING)
_SET = Map(Struct("struct {}", {}))
_HEALTH = Struct(
    "container.HealthConfig",
    {
        "Test": _STRINGS,
        "Interval": INT64,
        "Timeout": INT64,
        "StartPeriod": INT64,
        "StartInterval": INT64,
        "Retries": INT,
    },
)

CONFIG: dict[str, Shape] = {
    "Hostname": STRING,
    "Domainname": STRING,
    "User": STRING,
    "AttachStdin": BOOL,
    "AttachStdout": BOOL,
    "AttachStderr": BOOL,
    "ExposedPorts": _SET,
    "Tty": BOOL,
    "OpenStdin": BOOL,
    "StdinOnce": BOOL,
    "Env": _STRINGS,
    # A list, or one string: see `arguments`.
    "Cmd": ANY,
    "Healthcheck": Optional(_HEALTH),
    "ArgsEscaped": BOOL,
    "Image": STRING,
    "Volumes": _SET,
    "WorkingDir": STRING,
    "Entrypoint": ANY,
    "NetworkDisabled": BOOL,
    "MacAddress": STRING,
    "OnBuild": _STRINGS,
    "Labels": Map(STRING),
    "StopSignal": STRING,
    "StopTimeout": Optional(INT),
    "Shell": ANY,
}

RESTART_POLICY = Struct("container.RestartPolicy", {"Name": STRING, "MaximumRetryCount": INT})
_BINDING = Struct("nat.PortBinding", {"HostIp": STRING, "HostPort": STRING})
_WEIGHT = Struct("blkiodev.WeightDevice", {"Path": STRING, "Weight": UINT16})
_RATE = Struct("blkiodev.ThrottleDevice", {"Path": STRING, "Rate": INT64})
_DEVICE = Struct(
    "container.DeviceMapping", {"PathOnHost": STRING, "PathInContainer": STRING, "CgroupPermissions": STRING}
)
_DEVICE_REQUEST = Struct(
    "container.DeviceRequest",
    {
        "Driver": STRING,
        "Count": INT,
        "DeviceIDs": _STRINGS,
        "Capabilities": List(_STRINGS),
        "Options": Map(STRING),
    },
)
_MOUNT = Struct(
    "mount.Mount",
    {
        "Type": STRING,
        "Source": STRING,
        "Target": STRING,
        "ReadOnly": BOOL,
        "Consistency": STRING,
        "BindOptions": Optional(
            Struct(
                "mount.BindOptions",
                {
                    "Propagation": STRING,
                    "NonRecursive": BOOL,
                    "CreateMountpoint": BOOL,
                    "ReadOnlyNonRecursive": BOOL,
                    "ReadOnlyForceRecursive": BOOL,
                },
            )
        ),
        "VolumeOptions": ANY,
        "TmpfsOptions": ANY,
    },
)
_ULIMIT = Struct("units.Ulimit", {"Name": STRING, "Hard": INT64, "Soft": INT64})

HOST_CONFIG: dict[str, Shape] = {
    "Binds": _STRINGS,
    "ContainerIDFile": STRING,
    "LogConfig": Struct("container.LogConfig", {"Type": STRING, "Config": Map(STRING)}),
    "NetworkMode": STRING,
    "PortBindings": Map(List(_BINDING)),
    "RestartPolicy": RESTART_POLICY,
    "AutoRemove": BOOL,
    "VolumeDriver": STRING,
    "VolumesFrom": _STRINGS,
    "ConsoleSize": List(INT64),
    "Annotations": Map(STRING),
    "CapAdd": _STRINGS,
    "CapDrop": _STRINGS,
    "CgroupnsMode": STRING,
    "Dns": _STRINGS,
    "DnsOptions": _STRINGS,
    "DnsSearch": _STRINGS,
    "ExtraHosts": _STRINGS,
    "GroupAdd": _STRINGS,
    "IpcMode": STRING,
    "Cgroup": STRING,
    "Links": _STRINGS,
    "OomScoreAdj": INT,
    "PidMode": STRING,
    "Privileged": BOOL,
    "PublishAllPorts": BOOL,
    "ReadonlyRootfs": BOOL,
    "SecurityOpt": _STRINGS,
    "StorageOpt": Map(STRING),
    "Tmpfs": Map(STRING),
    "UTSMode": STRING,
    "UsernsMode": STRING,
    "ShmSize": INT64,
    "Sysctls": Map(STRING),
    "Runtime": STRING,
    "Isolation": STRING,
    "CpuShares": INT64,
    "Memory": INT64,
    "NanoCpus": INT64,
    "CgroupParent": STRING,
    "BlkioWeight": UINT16,
    "BlkioWeightDevice": List(_WEIGHT),
    "BlkioDeviceReadBps": List(_RATE),
    "BlkioDeviceWriteBps": List(_RATE),
    "BlkioDeviceReadIOps": List(_RATE),
    "BlkioDeviceWriteIOps": List(_RATE),
    "CpuPeriod": INT64,
    "CpuQuota": INT64,
    "CpuRealtimePeriod": INT64,
    "CpuRealtimeRuntime": INT64,
    "CpusetCpus": STRING,
    "CpusetMems": STRING,
    "Devices": List(_DEVICE),
    "DeviceCgroupRules": _STRINGS,
    "DeviceRequests": List(_DEVICE_REQUEST),
    "KernelMemory": INT64,
    "KernelMemoryTCP": INT64,
    "MemoryReservation": INT64,
    "MemorySwap": INT64,
    "MemorySwappiness": Optional(INT64),
    "OomKillDisable": Optional(BOOL),
    "PidsLimit": Optional(INT64),
    "Ulimits": List(_ULIMIT),
    "CpuCount": INT64,
    "CpuPercent": INT64,
    "IOMaximumIOps": INT64,
    "IOMaximumBandwidth": INT64,
    "Mounts": List(_MOUNT),
    "MaskedPaths": _STRINGS,
    "ReadonlyPaths": _STRINGS,
    "Init": Optional(BOOL),
}
# Left out of what inspect shows while they are empty.
OMITTED_WHEN_EMPTY = frozenset({"Annotations", "StorageOpt", "Tmpfs", "Sysctls", "Mounts", "Init"})

_NETWORKING = Struct("network.NetworkingConfig", {"EndpointsConfig": Map(Optional(ENDPOINT_SETTINGS))})
_HOST = Struct("container.HostConfig", HOST_CONFIG)
CREATE = Struct(
    "runconfig.ContainerConfigWrapper",
    {**CONFIG, "HostConfig": Optional(_HOST), "NetworkingConfig": Optional(_NETWORKING)},
)
EXEC_CREATE = Struct(
    "types.ExecConfig",
    {
        "User": STRING,
        "Privileged": BOOL,
        "Tty": BOOL,
        "ConsoleSize": List(INT64),
        "AttachStdin": BOOL,
        "AttachStderr": BOOL,
        "AttachStdout": BOOL,
        "Detach": BOOL,
        "DetachKeys": STRING,
        "Env": _STRINGS,
        "WorkingDir": STRING,
        "Cmd": ANY,
    },
)
EXEC_START = Struct("types.ExecStartCheck", {"Detach": BOOL, "Tty": BOOL, "ConsoleSize": List(INT64)})
UPDATE = Struct("container.UpdateConfig", {"RestartPolicy": RESTART_POLICY, "Memory": INT64, "CpuShares": FLOAT})


async def create_body(request: Request) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Config, HostConfig and NetworkingConfig of a create request, with every field; raises DockerError 400."""
    request.check_json()
    if not request.has_body:
        raise bad_request("invalid JSON: got EOF while reading request body")
    body = await request.json(CREATE)
    host = body.pop("HostConfig")
    networking = body.pop("NetworkingConfig")
    if host is None and networking is None and not any(body.values()):
        raise bad_request("Config cannot be empty in order to create a container")
    for name in ("Cmd", "Entrypoint", "Shell"):
        body[name] = arguments(body[name], f"ContainerConfigWrapper.{name}")
    host = host if host is not None else gojson.zero(_HOST)
    size = [*(host["ConsoleSize"] or []), 0, 0][:2]
    host["ConsoleSize"] = [min(max(value, 0), 65535) for value in size]
    return body, host, networking or {"EndpointsConfig": None}


def arguments(value: Any, field: str) -> list[str] | None:
    """A command: a list of strings, or one string; `field` is what Go calls it."""
    if value is None or (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        return value
    if isinstance(value, str):
        return [value]
    what = "object" if isinstance(value, dict) else "array" if isinstance(value, list) else "number"
    raise bad_request(f"invalid JSON: json: cannot unmarshal {what} into Go struct field {field} of type string")


def number(request: Request, name: str, status: int = 400) -> int:
    """A number of the query; raises DockerError with Go's words."""
    text = request.first(name)
    try:
        if not text.isascii() or "_" in text or text != text.strip():
            raise ValueError(text)
        return int(text)
    except ValueError:
        raise DockerError(status, f'strconv.Atoi: parsing "{text}": invalid syntax') from None
