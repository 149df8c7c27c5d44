"""From a create request to a container's configuration: Docker's checks, its defaults, and what the image adds.

The three parts of the request are dictionaries with every field of Docker's types (`docker_api/container_shapes.py`
decodes them). The order of the checks is dockerd's, because the first failure is what the client sees.
"""

from __future__ import annotations

import ipaddress
import platform
import posixpath
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from host_bridge.containers import ports
from host_bridge.containers.errors import ContainerError, invalid
from host_bridge.containers.signals import check_supported, parse_signal
from host_bridge.errors import BridgeError
from host_bridge.names import check_mac
from taploom.contracts.taploom.runtime import v1 as runtime

JSON = dict[str, Any]

DEFAULT_SHM_SIZE = 64 << 20
_MIN_MEMORY = 6 << 20
_MASKED_WORDS = (
    "/proc/asound /proc/acpi /proc/kcore /proc/keys /proc/latency_stats /proc/timer_list /proc/timer_stats "
    "/proc/sched_debug /proc/scsi /sys/firmware"
)
_MASKED = _MASKED_WORDS.split()
_READONLY_WORDS = "/proc/bus /proc/fs /proc/irq /proc/sys /proc/sysrq-trigger"
_READONLY = _READONLY_WORDS.split()
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# capabilities(7)
_CAPABILITY_WORDS = (
    "AUDIT_CONTROL AUDIT_READ AUDIT_WRITE BLOCK_SUSPEND BPF CHECKPOINT_RESTORE CHOWN DAC_OVERRIDE DAC_READ_SEARCH "
    "FOWNER FSETID IPC_LOCK IPC_OWNER KILL LEASE LINUX_IMMUTABLE MAC_ADMIN MAC_OVERRIDE MKNOD NET_ADMIN "
    "NET_BIND_SERVICE NET_BROADCAST NET_RAW PERFMON SETFCAP SETGID SETPCAP SETUID SYSLOG SYS_ADMIN SYS_BOOT "
    "SYS_CHROOT SYS_MODULE SYS_NICE SYS_PACCT SYS_PTRACE SYS_RAWIO SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG WAKE_ALARM"
)
_CAPABILITIES = frozenset(_CAPABILITY_WORDS.split())
_MODES = frozenset({"ro", "rw", "z", "Z", "nocopy", "private", "rprivate", "shared", "rshared", "slave", "rslave"})
_MODES |= {"consistent", "cached", "delegated"}


def prepare_host(host: JSON, config: JSON) -> list[str]:
    """Completes a HostConfig in place; returns warnings. Raises ContainerError."""
    if not host["NetworkMode"]:
        host["NetworkMode"] = "default"
    if not host["ShmSize"]:
        host["ShmSize"] = DEFAULT_SHM_SIZE
    if not host["IpcMode"]:
        host["IpcMode"] = "private"
    if not host["CgroupnsMode"]:
        host["CgroupnsMode"] = "host"
    if not host["Runtime"]:
        host["Runtime"] = "runc"
    if not host["LogConfig"]["Type"]:
        host["LogConfig"]["Type"] = "json-file"
    if host["LogConfig"]["Config"] is None:
        host["LogConfig"]["Config"] = {}
    if host["MemorySwappiness"] == -1:
        host["MemorySwappiness"] = None
    if host["PidsLimit"] is not None and host["PidsLimit"] <= 0:
        host["PidsLimit"] = None
    if host["OomKillDisable"] is None:
        host["OomKillDisable"] = False
    config["Volumes"] = config["Volumes"] or None
    privileged = host["Privileged"]
    for field, paths in (("MaskedPaths", _MASKED), ("ReadonlyPaths", _READONLY)):
        if host[field] is None and not privileged:
            host[field] = list(paths)
    for field in ("CapAdd", "CapDrop"):
        host[field] = _capabilities(field, host[field])
    warnings = []
    if host["NetworkMode"] == "host" and host["PortBindings"]:
        warnings.append("Published ports are discarded when using host network mode")
    return warnings


def check(config: JSON, host: JSON, version: tuple[int, ...]) -> None:
    """Raises ContainerError where dockerd would refuse before it looks for the image."""
    _check_mode(config, host)
    _check_config(config)
    if config["MacAddress"] and version >= (1, 44):
        _check_mac(config["MacAddress"])
    _check_host(host)


def _check_config(config: JSON) -> None:
    for variable in config["Env"] or ():
        if not variable.partition("=")[0]:
            raise invalid(f"invalid environment variable: {variable}")
    if config["StopSignal"]:
        try:
            number = parse_signal(config["StopSignal"])
            check_supported(number)
        except ContainerError:
            raise invalid(f"Invalid signal: {config['StopSignal']}") from None
    directory = config["WorkingDir"]
    if directory and not directory.startswith("/"):
        raise invalid(f"the working directory '{directory}' is invalid, it needs to be an absolute path")


def _check_mac(mac: str) -> None:
    try:
        check_mac(mac)
    except BridgeError:
        raise invalid(f"invalid MAC address: {mac}") from None


def _check_mode(config: JSON, host: JSON) -> None:
    mode = host["NetworkMode"]
    if mode.startswith("container:") and len(mode) == len("container:"):
        raise invalid("Invalid network mode: invalid container format container:<name|id>")
    shared = mode.startswith("container:")
    if (shared or mode == "host") and host["Links"]:
        kind = "container" if shared else "host"
        raise invalid(
            "conflicting options: "
            f"{kind} type networking can't be used with links. This would result in undefined behavior"
        )
    if shared:
        if config["Hostname"] or config["Domainname"]:
            raise invalid("conflicting options: hostname and the network mode")
        for field, what in (
            ("Dns", "dns and the network mode"),
            ("ExtraHosts", "custom host-to-IP mapping and the network mode"),
        ):
            if host[field]:
                raise invalid(f"conflicting options: {what}")
        if config["MacAddress"]:
            raise invalid("conflicting options: mac-address and the network mode")
        if host["PortBindings"] or host["PublishAllPorts"]:
            raise invalid("conflicting options: port publishing and the container type network mode")
        if config["ExposedPorts"]:
            raise invalid("conflicting options: port exposing and the container type network mode")


def _check_host(host: JSON) -> None:
    ports.check_bindings(host["PortBindings"])
    policy = host["RestartPolicy"]
    name, count = policy["Name"], policy["MaximumRetryCount"]
    if host["AutoRemove"] and name not in ("", "no"):
        raise invalid("can't create 'AutoRemove' container with restart policy")
    check_restart_policy(name, count)
    for extra in host["ExtraHosts"] or ():
        split_extra_host(extra)
    if 0 != host["Memory"] < _MIN_MEMORY:
        raise invalid("Minimum memory limit allowed is 6MB")
    if host["ShmSize"] < 0:
        raise invalid("SHM size can not be less than 0")
    if host["LogConfig"]["Type"] not in ("", "json-file", "local", "none"):
        kind = host["LogConfig"]["Type"]
        raise invalid(f'error looking up logging plugin {kind}: plugin "{kind}" not found')
    for path in host["Tmpfs"] or {}:
        if not path.startswith("/"):
            raise invalid(f"invalid mount path: '{path}' mount path must be absolute")


def check_restart_policy(name: str, count: int) -> None:
    """Raises ContainerError for a policy that is none."""
    if name in ("always", "unless-stopped", "no"):
        if count:
            raise invalid(f"maximum retry count cannot be used with restart policy '{name}'")
    elif name == "on-failure":
        if count < 0:
            raise invalid("maximum retry count cannot be negative")
    elif name:
        raise invalid(f"invalid restart policy '{name}'")


def split_extra_host(text: str) -> tuple[str, str]:
    """Name and address of `name:address` or `name=address`; the address may be `host-gateway`."""
    name, colon, address = text.partition(":")
    if "=" in name:
        name, colon, address = text.partition("=")
    if not colon or not name:
        raise invalid(f'bad format for add-host: "{text}"')
    address = address.removeprefix("[").removesuffix("]") if address.startswith("[") else address
    if address != "host-gateway":
        try:
            ipaddress.ip_address(address)
        except ValueError:
            raise invalid(f'invalid IP address in add-host: "{address}"') from None
    return name, address


def _capabilities(field: str, given: list[str] | None) -> list[str] | None:
    if not given:
        return given
    names = set()
    for text in given:
        name = text.upper()
        if name == "ALL":
            return ["ALL"]
        name = name.removeprefix("CAP_")
        if name not in _CAPABILITIES:
            raise invalid(f'invalid {field}: unknown capability: "CAP_{name}"')
        names.add(f"CAP_{name}")
    return sorted(names)


def merge_image(config: JSON, image: runtime.Image) -> None:
    """Completes a Config in place with its image's; raises ContainerError when there is nothing to run."""
    from_image = image.config or runtime.ImageConfig()
    if not config["User"]:
        config["User"] = from_image.user
    if from_image.exposed_ports:
        config["ExposedPorts"] = {**(config["ExposedPorts"] or {}), **{port: {} for port in from_image.exposed_ports}}
    own = {variable.partition("=")[0] for variable in config["Env"] or ()}
    inherited = [variable for variable in from_image.environment if variable.partition("=")[0] not in own]
    if inherited:
        config["Env"] = [*(config["Env"] or []), *inherited]
    config["Labels"] = {**from_image.labels, **(config["Labels"] or {})}
    if not config["Entrypoint"]:
        if not config["Cmd"]:
            config["Cmd"] = list(from_image.command) or None
        if config["Entrypoint"] is None:
            config["Entrypoint"] = list(from_image.entrypoint) or None
    if not config["WorkingDir"]:
        config["WorkingDir"] = from_image.working_directory
    if from_image.volumes:
        config["Volumes"] = {**(config["Volumes"] or {}), **{path: {} for path in from_image.volumes}}
    if not config["StopSignal"]:
        config["StopSignal"] = from_image.stop_signal
    if config["Entrypoint"] == [""]:
        config["Entrypoint"] = None
    if not config["Entrypoint"] and not config["Cmd"]:
        raise invalid("No command specified")


def command(config: JSON) -> list[str]:
    """The arguments that a container's main process is run with."""
    return [*(config["Entrypoint"] or ()), *(config["Cmd"] or ())]


def environment(config: JSON, hostname: str, further: list[str]) -> list[str]:
    """A container's environment: PATH, HOSTNAME, TERM on terminals, links, then what was asked for, each once."""
    variables = [f"PATH={DEFAULT_PATH}", f"HOSTNAME={hostname}"]
    if config["Tty"]:
        variables.append("TERM=xterm")
    return merged_environment([*variables, *further], config["Env"] or [])


def merged_environment(base: list[str], overrides: list[str]) -> list[str]:
    """`base` with variables set anew, added, or, without `=`, taken away."""
    result: dict[str, str] = {}
    for variable in [*base, *overrides]:
        name, equals, _ = variable.partition("=")
        if equals:
            result[name] = variable
        else:
            result.pop(name, None)
    return list(result.values())


def mounts(host: JSON) -> list[JSON]:
    """What a container mounts, as Docker's inspect lists it; raises ContainerError.

    Sources of binds that are missing are made when the container is started: see `make_source`.
    """
    found: dict[str, JSON] = {}

    def add(mount: JSON) -> None:
        if mount["Destination"] in found:
            raise invalid(f"Duplicate mount point: {mount['Destination']}")
        found[mount["Destination"]] = mount

    for text in host["Binds"] or ():
        add(_bind(text))
    for one in host["Mounts"] or ():
        add(_mount(one))
    for path in host["Tmpfs"] or {}:
        add(_described("tmpfs", "", posixpath.normpath(path), True, ""))
    return list(found.values())


def _described(kind: str, source: str, target: str, writable: bool, mode: str) -> JSON:
    propagation = "rprivate" if kind == "bind" else ""
    return {
        "Type": kind,
        "Source": source,
        "Destination": target,
        "Mode": mode,
        "RW": writable,
        "Propagation": propagation,
    }


def _bind(text: str) -> JSON:
    parts = text.split(":")
    if len(parts) > 3 or not all(parts):
        raise ContainerError(500, f"invalid volume specification: '{text}'")
    source, target = (parts[0], parts[1]) if len(parts) > 1 else ("", parts[0])
    mode = parts[2] if len(parts) > 2 else ""
    kind = "bind" if source.startswith("/") else "volume"
    options = mode.split(",") if mode else []
    if any(option not in _MODES for option in options):
        raise ContainerError(500, f"invalid mode: {mode}")
    if not target.startswith("/"):
        raise ContainerError(
            500,
            f"invalid volume specification: '{text}': invalid mount config for type \"{kind}\": "
            f"invalid mount path: '{target}' mount path must be absolute",
        )
    target = posixpath.normpath(target)
    if target == "/":
        raise ContainerError(
            500, f"invalid volume specification: '{text}': invalid mount config: destination can't be '/'"
        )
    if kind == "volume":
        raise _no_volumes(source or target)
    return _described("bind", posixpath.normpath(source), target, "ro" not in options, mode)


def make_source(mount: JSON) -> None:
    """Makes the directory that a bind mounts when it is not there, as dockerd does at a start."""
    source = mount["Source"]
    path = Path(source)
    try:
        if not path.exists():
            path.mkdir(parents=True)
    except OSError as error:
        raise ContainerError(500, f"error while creating mount source path '{source}': {error.strerror}") from error


def _mount(mount: JSON) -> JSON:
    kind, source, target = mount["Type"], mount["Source"], mount["Target"]

    def wrong(why: str) -> ContainerError:
        return invalid(f'invalid mount config for type "{kind}": {why}')

    if kind not in ("bind", "tmpfs", "volume", "npipe", "cluster", "image"):
        raise wrong("mount type unknown")
    if not target:
        raise wrong("field Target must not be empty")
    if not target.startswith("/"):
        raise wrong(f"invalid mount path: '{target}' mount path must be absolute")
    if kind == "tmpfs":
        if source:
            raise wrong("field Source must not be specified")
        return _described("tmpfs", "", posixpath.normpath(target), True, "")
    if kind != "bind":
        raise _no_volumes(source or target)
    if not source:
        raise wrong("field Source must not be empty")
    if not source.startswith("/"):
        raise wrong(f"invalid mount path: '{source}' mount path must be absolute")
    if not Path(source).exists():
        options = mount.get("BindOptions") or {}
        if not options.get("CreateMountpoint"):
            raise wrong(f"bind source path does not exist: {source}")
    return _described("bind", posixpath.normpath(source), posixpath.normpath(target), not mount["ReadOnly"], "")


def _no_volumes(name: str) -> ContainerError:
    return ContainerError(
        501, f"volume {name}: named volumes are not supported: mount a directory by its absolute path"
    )


def hostname(container_id: str, config: JSON, mode: str) -> str:
    """The host name of a container that was given none: its short id, or the machine's in host mode."""
    if config["Hostname"]:
        return str(config["Hostname"])
    return platform.node() if mode == "host" else container_id[:12]


def initial_networks(
    host: JSON, networking: JSON, version: tuple[int, ...], name_of: Callable[[str], str | None]
) -> JSON:
    """The networks that a container is to be on: Docker's EndpointSettings by the network's name.

    Args:
        version: the client's API version.
        name_of: the name of the network of a name or id, None when there is none: that shows only at the start.
    """
    mode = host["NetworkMode"]
    if mode.startswith("container:"):
        return {}
    given: Mapping[str, JSON] = networking["EndpointsConfig"] or {}
    if len(given) > 1 and version < (1, 44):
        raise invalid(f"Container cannot be connected to network endpoints: {', '.join(sorted(given))}")
    main = "bridge" if mode == "default" else name_of(mode) or mode
    result: JSON = {}
    for key, endpoint in given.items():
        name = "bridge" if key == "default" and mode == "default" else name_of(key) or key
        result[name] = wanted_endpoint(endpoint)
    if not result or (version >= (1, 44) and main not in result):
        # The network of the mode comes first: it gives the first interface.
        result = {main: wanted_endpoint({}), **result}
    elif main in result:
        result = {main: result[main], **result}
    if len(result) > 1:
        for single in ("host", "none"):
            if single in result:
                raise invalid(
                    "conflicting options: cannot attach both user-defined and non-user-defined network-modes"
                    if single == "none"
                    else "container cannot be connected to host network and others"
                )
    return result


def wanted_endpoint(endpoint: Mapping[str, Any]) -> JSON:
    """What of Docker's EndpointSettings says how an endpoint is to be."""
    ipam = endpoint.get("IPAMConfig")
    if ipam is not None:
        # What was sent is echoed, also when it says nothing.
        ipam = {key: value for key, value in ipam.items() if value}
    return {
        "IPAMConfig": ipam,
        "Links": endpoint.get("Links"),
        "Aliases": list(endpoint["Aliases"]) if endpoint.get("Aliases") is not None else None,
        "DriverOpts": endpoint.get("DriverOpts"),
        "MacAddress": endpoint.get("MacAddress") or "",
        "GwPriority": endpoint.get("GwPriority") or 0,
    }


def parse_link(text: str) -> tuple[str, str]:
    """The container and the alias of `container:alias`; raises ContainerError with Docker's texts."""
    if not text:
        raise ContainerError(500, "empty string specified for links")
    parts = text.split(":")
    if len(parts) > 2:
        raise ContainerError(500, f"bad format for links: {text}")
    name = parts[0]
    if len(parts) == 1:
        return name, name
    # A client may send a link as inspect shows it: /target:/holder/alias.
    alias = parts[1]
    if name.startswith("/"):
        alias = re.sub(r".*/", "", alias)
    return name, alias
