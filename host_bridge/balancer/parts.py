"""The short forms in which people write parts of load balancers: `80:8080/tcp`, `127.0.0.1:8080:80`, `10s`."""

from __future__ import annotations

import re

from host_bridge.balancer.model import TCP, Port, Publish

_PORT = re.compile(r"(?:([0-9]{1,9}):)?([0-9]{1,9})(?:/([a-z]+))?", re.ASCII)
_PUBLISH = re.compile(r"(?:(\[[0-9a-fA-F:.%]+\]|[0-9.]+):)?([0-9]{0,9}):([0-9]{1,9})(?:/([a-z]+))?", re.ASCII)
_SECONDS = re.compile(r"([0-9]{1,6})(s|m|h)?", re.ASCII)
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


def parse_port(text: str, line: int = 0) -> Port:
    """A port of a load balancer: `80`, `80:8080`, `53/udp`; raises ValueError with what to write."""
    found = _PORT.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no port: write 80, 80:8080 (where backends listen) or 80:8080/udp")
    target = int(found[2])
    return Port(int(found[1]) if found[1] else target, target, found[3] or TCP, line)


def parse_publish(text: str, line: int = 0) -> Publish:
    """A published port: `8080:80`, `127.0.0.1:8080:80`, `[::1]:53:53/udp`, `:80` (any that is free); raises ValueError
    with what to write."""
    found = _PUBLISH.fullmatch(text)
    if found is None:
        raise ValueError(
            f"{text!r} publishes nothing: write HOST:PORT, such as 8080:80, or ADDRESS:HOST:PORT; PORT is one of the "
            "load balancer's"
        )
    return Publish(int(found[2] or 0), int(found[3]), found[4] or TCP, (found[1] or "").strip("[]"), line)


def parse_seconds(text: str) -> int:
    """A time in seconds: `10`, `10s`, `1m`; raises ValueError with what to write."""
    found = _SECONDS.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no time: write whole seconds, such as 2s, or 1m")
    return int(found[1]) * _UNITS[found[2] or ""]
