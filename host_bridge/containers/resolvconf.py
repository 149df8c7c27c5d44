"""The host's DNS configuration, which containers have where they were given none of their own; resolv.conf(5)."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

_PATH = Path("/etc/resolv.conf")
# Where systemd-resolved says what it asks itself; /etc/resolv.conf then has its own address, on the loopback interface.
_RESOLVED = Path("/run/systemd/resolve/resolv.conf")
_MAX_SERVERS = 3


@dataclass(frozen=True, slots=True)
class HostResolver:
    """Servers that containers can ask too (none on the loopback interface), search domains and options."""

    servers: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


def read() -> HostResolver:
    """What the host has now; empty when it cannot be read."""
    found = parse(_text(_PATH))
    if not found.servers and (behind := parse(_text(_RESOLVED))).servers:
        return behind
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def parse(text: str) -> HostResolver:
    """The configuration in a file's text; the last search line counts."""
    servers: list[str] = []
    search: list[str] = []
    options: list[str] = []
    for line in text.splitlines():
        words = line.split()
        if not words or words[0].startswith(("#", ";")):
            continue
        match words[0], words[1:]:
            case "nameserver", [address, *_]:
                if _usable(address):
                    servers.append(address)
            case (("search" | "domain"), domains):
                search = [domain for domain in domains if domain != "."]
            case "options", given:
                options += given
    return HostResolver(tuple(servers[:_MAX_SERVERS]), tuple(search), tuple(options))


def _usable(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        # A scope (fe80::1%eth0) is one of the host's interfaces.
        return False
    return not parsed.is_loopback and not parsed.is_link_local and not parsed.is_unspecified
