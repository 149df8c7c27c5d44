"""Port specifications of Docker's API: `80/tcp`, host ports and ranges, and what of them is to be published."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from host_bridge.addressing import NAT, NAT_UNPROTECTED
from host_bridge.containers.errors import invalid
from host_bridge.model import NetworkRecord
from host_bridge.ports import PortBinding

_MAX_PORT = 65535
_RANGE = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")


def split_port(spec: str) -> tuple[str, str]:
    """The port's number as text and the protocol of `80/tcp`; the protocol is tcp unless given."""
    number, _, protocol = spec.partition("/")
    return number, protocol.lower() or "tcp"


def parse_range(text: str) -> tuple[int, int]:
    """First and last port of `80` or `80-90`; raises ContainerError with Docker's text."""
    found = _RANGE.fullmatch(text)
    if found is None:
        raise _bad(text)
    first = int(found[1])
    last = int(found[2] or first)
    if first > _MAX_PORT or last > _MAX_PORT or last < first:
        raise _bad(text)
    return first, last


def check_bindings(bindings: Mapping[str, Sequence[Mapping[str, str]] | None] | None) -> None:
    """Raises ContainerError when a container's or host's port is malformed."""
    for spec, hosts in (bindings or {}).items():
        number, _ = split_port(spec)
        if not number.isascii() or not number.isdecimal() or int(number) > _MAX_PORT:
            raise _bad(number)
        for host in hosts or ():
            text = host.get("HostPort", "")
            if text:
                parse_range(text)


def _bad(text: str) -> Exception:
    return invalid(f'invalid port specification: "{text}"')


def wanted(config: Mapping[str, Any], host: Mapping[str, Any], default_address: str) -> list[PortBinding]:
    """What a container publishes: bindings of exposed ports, and with PublishAllPorts all others at free ports.

    Args:
        config: the container's Config.
        host: its HostConfig.
        default_address: the host's address where none is given; empty: all.
    """
    result = []
    given = {_normal(spec): hosts for spec, hosts in (host.get("PortBindings") or {}).items()}
    for spec in exposed(config):
        number, _, protocol = spec.partition("/")
        hosts = given.get(spec) or ()
        if not hosts and host.get("PublishAllPorts"):
            hosts = ({"HostIp": "", "HostPort": ""},)
        for one in hosts:
            first, last = parse_range(one["HostPort"]) if one.get("HostPort") else (0, 0)
            result.append(
                PortBinding(
                    container_port=int(number),
                    protocol=_protocol(protocol),
                    host_ip=one.get("HostIp") or default_address,
                    host_port=first,
                    host_port_end=last,
                )
            )
    return result


def translated(bindings: Sequence[PortBinding], network: NetworkRecord) -> list[PortBinding]:
    """The bindings that the host serves: none of a family whose gateway mode does without address translation."""
    served = {family for family in (4, 6) if network.addressing.mode(family) in (NAT, NAT_UNPROTECTED)}
    if len(served) == 2:
        return list(bindings)
    any_address = {4: "0.0.0.0", 6: "::"}  # noqa: S104 - what publishing to all addresses of a family means
    found = []
    for binding in bindings:
        if binding.host_ip:
            found += [binding] if (6 if ":" in binding.host_ip else 4) in served else []
        else:
            found += [dataclasses.replace(binding, host_ip=any_address[family]) for family in sorted(served)]
    return found


def exposed(config: Mapping[str, Any]) -> list[str]:
    """A container's exposed ports as `80/tcp`, by number and protocol; what is no port is left out."""
    found = {_normal(spec) for spec in config.get("ExposedPorts") or {}}
    return sorted(
        (
            spec
            for spec in found
            if re.fullmatch(r"[0-9]{1,5}/[a-z]+", spec) and int(spec.partition("/")[0]) <= _MAX_PORT
        ),
        key=lambda spec: (int(spec.partition("/")[0]), spec.partition("/")[2]),
    )


def _normal(spec: str) -> str:
    number, protocol = split_port(spec)
    return f"{number}/{protocol}"


def _protocol(text: str) -> Any:
    if text not in ("tcp", "udp"):
        raise invalid(f"publishing {text} ports is not supported: only tcp and udp can be published")
    return text
