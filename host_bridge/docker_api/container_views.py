"""Containers as Docker's clients see them: inspect and list."""

from __future__ import annotations

import hashlib
import ipaddress
from typing import Any

from host_bridge.containers import create, ports, times
from host_bridge.containers.manager import ContainerManager, Found
from host_bridge.containers.model import Container
from host_bridge.docker_api.container_shapes import OMITTED_WHEN_EMPTY
from host_bridge.docker_api.http import Version
from host_bridge.model import EndpointRecord, GuestRecord, NetworkRecord

JSON = dict[str, Any]

_NO_ALIASES_OF_ID = (1, 45)
_DNS_NAMES = (1, 44)
_GATEWAY_PRIORITY = (1, 48)
_NO_KERNEL_MEMORY = (1, 42)
_ANNOTATIONS = (1, 43)
_OPTIONAL_CONFIG = (
    "ExposedPorts",
    "Healthcheck",
    "ArgsEscaped",
    "NetworkDisabled",
    "MacAddress",
    "StopSignal",
    "StopTimeout",
    "Shell",
)


def inspect(manager: ContainerManager, found: Found, version: Version, *, size: bool = False) -> JSON:
    """What GET /containers/ID/json answers."""
    if isinstance(found, GuestRecord):
        return _inspect_guest(manager, found, version)
    container = found
    state = container.state
    arguments = create.command(container.docker)
    result: JSON = {
        "Id": container.id,
        "Created": container.config["Created"],
        "Path": arguments[0],
        "Args": arguments[1:],
        "State": {
            "Status": container.status,
            "Running": container.running,
            "Paused": False,
            "Restarting": container.restarting,
            "OOMKilled": state["OOMKilled"],
            "Dead": state["Dead"],
            "Pid": state["Pid"],
            "ExitCode": state["ExitCode"],
            "Error": state["Error"],
            "StartedAt": state["StartedAt"],
            "FinishedAt": state["FinishedAt"],
        },
        "Image": container.config["Image"],
        "ResolvConfPath": "",
        "HostnamePath": "",
        "HostsPath": "",
        "LogPath": "",
        "Name": f"/{container.name}",
        "RestartCount": state["RestartCount"],
        "Driver": "overlay2",
        "Platform": "linux",
        "MountLabel": "",
        "ProcessLabel": "",
        "AppArmorProfile": "",
        "ExecIDs": manager.execs.of(container),
        "HostConfig": host_config(container, version),
        "GraphDriver": {"Data": None, "Name": "overlay2"},
        "Mounts": [_mount(mount) for mount in container.config["Mounts"] if mount["Type"] != "tmpfs"],
        "Config": config(container),
        "NetworkSettings": _network_settings(manager, container, version),
    }
    if size:
        result |= {"SizeRw": 0, "SizeRootFs": 0}
    return result


def config(container: Container) -> JSON:
    """Docker's Config as inspect shows it."""
    return {
        key: value
        for key, value in container.docker.items()
        if value not in (None, "", False) or key not in _OPTIONAL_CONFIG
    }


def host_config(container: Container, version: Version) -> JSON:
    """Docker's HostConfig as inspect shows it."""
    host = {key: value for key, value in container.host.items() if value is not None or key not in OMITTED_WHEN_EMPTY}
    for key in ("StorageOpt", "Tmpfs", "Sysctls", "Mounts", "Annotations"):
        if key in host and not host[key]:
            del host[key]
    if version >= _NO_KERNEL_MEMORY:
        host.pop("KernelMemory", None)
        host.pop("KernelMemoryTCP", None)
    if version < _ANNOTATIONS:
        host.pop("Annotations", None)
    links = []
    for text in container.host["Links"] or ():
        target, alias = create.parse_link(text)
        links.append(f"/{target.removeprefix('/')}:/{container.name}/{alias}")
    host["Links"] = links or None
    return host


def _mount(mount: JSON) -> JSON:
    return {key: mount[key] for key in ("Type", "Source", "Destination", "Mode", "RW", "Propagation")}


def _network_settings(manager: ContainerManager, container: Container, version: Version) -> JSON:
    networks = endpoints(manager, container, version)
    leading = networks.get("bridge", _EMPTY)
    sandbox = container.state["SandboxID"]
    key = "" if not sandbox else "/var/run/docker/netns/" + ("default" if container.mode == "host" else sandbox[:12])
    return {
        "Bridge": "",
        "SandboxID": sandbox,
        "HairpinMode": False,
        "LinkLocalIPv6Address": "",
        "LinkLocalIPv6PrefixLen": 0,
        "Ports": port_map(manager, container),
        "SandboxKey": key,
        "SecondaryIPAddresses": None,
        "SecondaryIPv6Addresses": None,
        **{field: leading[field] for field in _LEGACY},
        "Networks": networks,
    }


_LEGACY = (
    "EndpointID",
    "Gateway",
    "GlobalIPv6Address",
    "GlobalIPv6PrefixLen",
    "IPAddress",
    "IPPrefixLen",
    "IPv6Gateway",
    "MacAddress",
)
_EMPTY: JSON = {
    "EndpointID": "",
    "Gateway": "",
    "IPAddress": "",
    "IPPrefixLen": 0,
    "IPv6Gateway": "",
    "GlobalIPv6Address": "",
    "GlobalIPv6PrefixLen": 0,
    "MacAddress": "",
}


def port_map(manager: ContainerManager, container: Container) -> JSON:
    """Docker's NetworkSettings.Ports: published ones with where, exposed ones with null."""
    if not container.alive or manager.networks.gateway(container.id) is None:
        return {}
    result: JSON = dict.fromkeys(ports.exposed(container.docker))
    for spec, address, number in container.state["Published"]:
        result[spec] = [*(result.get(spec) or []), {"HostIp": address, "HostPort": str(number)}]
    return result


def endpoints(manager: ContainerManager, container: Container, version: Version, *, summary: bool = False) -> JSON:
    """Docker's NetworkSettings.Networks.

    Args:
        summary: as the list has them, which shows no names.
    """
    live = {network.name: (network, endpoint) for network, endpoint in manager.networks.endpoints(container.id)}
    result: JSON = {}
    for name in sorted(container.networks):
        wanted = container.networks[name]
        result[name] = endpoint_settings(
            (container.id[:12], container.docker["Hostname"]), name, wanted, live.get(name), version
        )
        network = None if name in live else manager.networks.network(name)
        if container.alive and network is not None and not network.switched:
            result[name] |= {"NetworkID": network.id, "EndpointID": endpoint_id(container, name)}
        elif not container.running and network is not None and container.state["SandboxID"] and wanted.get("Named"):
            result[name]["NetworkID"] = network.id
        if version >= _DNS_NAMES and not summary:
            user_defined = name not in ("bridge", "host", "none")
            result[name]["DNSNames"] = _dns_names(container, wanted) if user_defined and wanted.get("Named") else None
        if summary:
            result[name] |= {"Aliases": None}
    return result


def endpoint_id(container: Container, name: str) -> str:
    """An id for a place that has no endpoint: in the networks host and none."""
    return hashlib.sha256(f"{container.state['SandboxID']} {name}".encode()).hexdigest()


def _dns_names(container: Container, wanted: JSON) -> list[str]:
    names = [container.name, *(wanted["Aliases"] or ()), container.id[:12]]
    hostname = container.docker["Hostname"]
    return list(dict.fromkeys([*names, hostname]))


def endpoint_settings(
    own_names: tuple[str, ...],
    name: str,
    wanted: JSON,
    live: tuple[NetworkRecord, EndpointRecord] | None,
    version: Version,
) -> JSON:
    """Docker's EndpointSettings; `own_names` are the short id and the hostname."""
    aliases = list(wanted["Aliases"] or ())
    user_defined = name not in ("bridge", "host", "none")
    if user_defined and wanted.get("Named") and version < _NO_ALIASES_OF_ID:
        aliases += [text for text in dict.fromkeys(own_names) if text and text not in aliases]
    result = {
        "IPAMConfig": wanted["IPAMConfig"],
        "Links": wanted["Links"],
        "Aliases": aliases or wanted["Aliases"],
        "NetworkID": "",
        **_EMPTY,
        "DriverOpts": wanted["DriverOpts"],
    }
    if version >= _GATEWAY_PRIORITY:
        result["GwPriority"] = wanted.get("GwPriority") or 0
    if live is not None:
        result |= _live(*live)
    return result


def _live(network: NetworkRecord, endpoint: EndpointRecord) -> JSON:
    result: JSON = {"NetworkID": network.id, "EndpointID": endpoint.id, "MacAddress": endpoint.mac_address}
    for address in endpoint.addresses:
        family = ipaddress.ip_address(address).version
        subnet = network.subnet(family)
        if subnet is None:
            continue
        length = ipaddress.ip_network(subnet.subnet).prefixlen
        if family == 4:
            result |= {"IPAddress": address, "IPPrefixLen": length, "Gateway": subnet.gateway}
        else:
            result |= {"GlobalIPv6Address": address, "GlobalIPv6PrefixLen": length, "IPv6Gateway": subnet.gateway}
    return result


def summary(
    manager: ContainerManager, found: Found, version: Version, linked: dict[str, list[str]], *, size: bool = False
) -> JSON:
    """An entry of GET /containers/json."""
    if isinstance(found, GuestRecord):
        return _summarize_guest(manager, found, version)
    container = found
    arguments = create.command(container.docker)
    result: JSON = {
        "Id": container.id,
        "Names": [*linked.get(container.id, ()), f"/{container.name}"],
        "Image": container.docker["Image"],
        "ImageID": container.config["Image"],
        "Command": " ".join([arguments[0], *(_shown(argument) for argument in arguments[1:])]),
        "Created": times.to_ns(container.config["Created"]) // 1_000_000_000,
        "Ports": port_list(manager, container),
        "Labels": container.docker["Labels"] or {},
        "State": container.status,
        "Status": container.status_text(),
        "HostConfig": {"NetworkMode": container.mode},
        "NetworkSettings": {"Networks": endpoints(manager, container, version, summary=True)},
        "Mounts": [_mount(mount) for mount in container.config["Mounts"] if mount["Type"] != "tmpfs"],
    }
    if size:
        result |= {"SizeRw": 0, "SizeRootFs": 0}
    return result


def _shown(argument: str) -> str:
    return f"'{argument}'" if " " in argument else argument


def port_list(manager: ContainerManager, container: Container) -> list[JSON]:
    """Docker's list of ports: published ones once per host address, exposed ones without."""
    result = []
    for spec, bindings in port_map(manager, container).items():
        number, _, protocol = spec.partition("/")
        if not bindings:
            result.append({"PrivatePort": int(number), "Type": protocol})
        for binding in bindings or ():
            result.append(
                {
                    "IP": binding["HostIp"],
                    "PrivatePort": int(number),
                    "PublicPort": int(binding["HostPort"]),
                    "Type": protocol,
                }
            )
    return result


def _guest_networks(manager: ContainerManager, guest: GuestRecord, version: Version, *, names: bool) -> JSON:
    result: JSON = {}
    for network, endpoint in manager.networks.endpoints(guest.id):
        ipam: JSON = {}
        for address in endpoint.static_addresses:
            ipam["IPv6Address" if ":" in address else "IPv4Address"] = address
        wanted = create.wanted_endpoint(
            {
                "IPAMConfig": ipam or None,
                "Aliases": endpoint.aliases if names else None,
                "Links": [f"{target}:{alias}" for alias, target in endpoint.links] or None,
                "DriverOpts": dict(endpoint.driver_options) or None,
                "GwPriority": endpoint.gateway_priority,
            }
        ) | {"Named": names}
        result[network.name] = endpoint_settings((guest.id[:12],), network.name, wanted, (network, endpoint), version)
        if version >= _DNS_NAMES and names:
            result[network.name]["DNSNames"] = list(dict.fromkeys([guest.name, *endpoint.aliases, guest.id[:12]]))
    return result


def _created_ns(guest: GuestRecord) -> int:
    return int(guest.created_at.timestamp() * 1_000_000) * 1000


def _inspect_guest(manager: ContainerManager, guest: GuestRecord, version: Version) -> JSON:
    created = times.from_ns(_created_ns(guest))
    networks = _guest_networks(manager, guest, version, names=True)
    leading = networks.get("bridge", _EMPTY)
    return {
        "Id": guest.id,
        "Created": created,
        "Path": "",
        "Args": [],
        "State": {
            "Status": "running",
            "Running": True,
            "Paused": False,
            "Restarting": False,
            "OOMKilled": False,
            "Dead": False,
            "Pid": 0,
            "ExitCode": 0,
            "Error": "",
            "StartedAt": created,
            "FinishedAt": times.ZERO,
        },
        "Image": "",
        "ResolvConfPath": "",
        "HostnamePath": "",
        "HostsPath": "",
        "LogPath": "",
        "Name": f"/{guest.name}",
        "RestartCount": 0,
        "Driver": "",
        "Platform": "linux",
        "MountLabel": "",
        "ProcessLabel": "",
        "AppArmorProfile": "",
        "ExecIDs": None,
        "HostConfig": {
            "NetworkMode": "default",
            "PortBindings": {},
            "RestartPolicy": {"Name": "no", "MaximumRetryCount": 0},
            "AutoRemove": False,
            "Dns": list(guest.settings.dns),
            "DnsOptions": list(guest.settings.dns_options),
            "DnsSearch": list(guest.settings.dns_search),
            "ExtraHosts": [f"{name}:{address}" for name, address in guest.settings.extra_hosts] or None,
            "LogConfig": {"Type": "none", "Config": {}},
        },
        "GraphDriver": {"Data": None, "Name": ""},
        "Mounts": [],
        "Config": {
            "Hostname": guest.settings.hostname or guest.name,
            "Domainname": guest.settings.domainname,
            "User": "",
            "AttachStdin": False,
            "AttachStdout": False,
            "AttachStderr": False,
            "Tty": False,
            "OpenStdin": False,
            "StdinOnce": False,
            "Env": [],
            "Cmd": None,
            "Image": "<none>",
            "Volumes": None,
            "WorkingDir": "",
            "Entrypoint": None,
            "OnBuild": None,
            "Labels": {},
        },
        "NetworkSettings": {
            "Bridge": "",
            "SandboxID": guest.id,
            "HairpinMode": False,
            "LinkLocalIPv6Address": "",
            "LinkLocalIPv6PrefixLen": 0,
            "Ports": {},
            "SandboxKey": "",
            "SecondaryIPAddresses": None,
            "SecondaryIPv6Addresses": None,
            **{field: leading[field] for field in _LEGACY},
            "Networks": networks,
        },
    }


def _summarize_guest(manager: ContainerManager, guest: GuestRecord, version: Version) -> JSON:
    created = _created_ns(guest)
    return {
        "Id": guest.id,
        "Names": [f"/{guest.name}"],
        "Image": "<none>",
        "ImageID": "",
        "Command": "",
        "Created": created // 1_000_000_000,
        "Ports": [],
        "Labels": {},
        "State": "running",
        "Status": f"Up {times.human(times.ago_seconds(times.from_ns(created)))}",
        "HostConfig": {"NetworkMode": "default"},
        "NetworkSettings": {"Networks": _guest_networks(manager, guest, version, names=False)},
        "Mounts": [],
    }
