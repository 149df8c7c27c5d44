"""How names are resolved, validated."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address

from taploom.contracts.taploom.guest.v1 import HostEntry, Resolver

from .hostsfile import Host

MAX_UPSTREAMS = 3
"""As many as are asked, as with Docker."""
MAX_HOSTS = 4096
RESOLVER_ADDRESS = "127.0.0.11"

_LABEL = r"[a-zA-Z0-9_]([a-zA-Z0-9_-]{0,61}[a-zA-Z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*\.?")
_OPTION = re.compile(r"[a-zA-Z0-9_-]+(:[a-zA-Z0-9._-]+)?")
_UPSTREAM = re.compile(r"\[(?P<v6>[^\]]+)\](:(?P<port6>[0-9]{1,5}))?|(?P<v4>[0-9.]+)(:(?P<port4>[0-9]{1,5}))?")
_HOST = re.compile(r"[^\s#\x00-\x1f\x7f-\x9f]{1,255}")
"""A name in /etc/hosts; more than DNS allows, as Docker takes what the user gives."""
_SCOPE = re.compile(r"[a-zA-Z0-9_.-]{1,15}")


class ConfigError(ValueError):
    """The description cannot be applied; the message says which field and what is allowed."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """A DNS server outside; ``host`` may have an IPv6 scope (fe80::1%eth0)."""

    host: str
    port: int = 53

    @property
    def is_ipv6(self) -> bool:
        return ":" in self.host

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if self.is_ipv6 else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class ResolverConfig:
    """The resolver as it is to be."""

    enabled: bool = False
    upstreams: tuple[Upstream, ...] = ()
    search: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    hostname: str = ""
    direct: bool = False
    """The container asks the upstreams itself."""
    hosts: tuple[Host, ...] | None = None
    """The lines of /etc/hosts; None: it is left alone."""

    @property
    def serves(self) -> bool:
        """Whether DNS is answered."""
        return self.enabled and not self.direct

    @property
    def has_ndots(self) -> bool:
        """Whether the container's options say what a qualified name is."""
        return any(option.startswith("ndots:") for option in self.options)

    @classmethod
    def parse(cls, message: Resolver) -> ResolverConfig:
        """Checks every field; raises ConfigError."""
        upstreams = tuple(parse_upstream(text) for text in message.upstreams)
        for domain in message.search:
            if domain != "." and (len(domain) > 253 or not _NAME.fullmatch(domain)):
                raise ConfigError(f"search: {domain[:80]!r} is not a domain name")
        for option in message.options:
            if not _OPTION.fullmatch(option):
                raise ConfigError(f"options: {option[:80]!r} is not a resolv.conf option, such as ndots:1")
        hostname = message.hostname.rstrip(".")
        if hostname and (len(hostname) > 253 or not _NAME.fullmatch(hostname)):
            raise ConfigError(f"hostname: {message.hostname[:80]!r} is not a host name")
        return cls(
            enabled=message.enabled,
            upstreams=upstreams,
            search=tuple(message.search),
            options=tuple(message.options),
            hostname=hostname,
            direct=message.direct,
            hosts=_hosts(message.hosts) if message.manage_hosts else None,
        )


def _hosts(entries: list[HostEntry]) -> tuple[Host, ...]:
    if len(entries) > MAX_HOSTS:
        raise ConfigError(f"hosts has {len(entries)} entries; at most {MAX_HOSTS} are allowed")
    return tuple(_host(entry) for entry in entries)


def _host(entry: HostEntry) -> Host:
    try:
        ip_address(entry.address)
    except ValueError:
        raise ConfigError(f"hosts: {entry.address[:80]!r} is not an IP address") from None
    if any(not _HOST.fullmatch(name) for name in entry.names) or any(c.isspace() for c in entry.address):
        raise ConfigError(f"hosts: the names of {entry.address} must be without spaces, control characters and #")
    if not entry.names:
        raise ConfigError(f"hosts: {entry.address} has no name")
    return Host(entry.address, tuple(entry.names))


def parse_upstream(text: str) -> Upstream:
    """Parses 192.0.2.1, 192.0.2.1:5353, 2001:db8::1, [2001:db8::1]:53; raises ConfigError."""
    wanted = f"upstreams: {text[:80]!r} is not an address or address with port (192.0.2.1, [2001:db8::1]:53)"
    match = _UPSTREAM.fullmatch(text)
    host, port_text = text, None
    if match is not None:
        host = match["v6"] or match["v4"]
        port_text = match["port6"] or match["port4"]
    try:
        address = ip_address(host)
    except ValueError:
        raise ConfigError(wanted) from None
    if match is not None and bool(match["v6"]) != (address.version == 6):
        raise ConfigError(wanted)
    port = 53 if port_text is None else int(port_text)
    if not 0 < port < 65536:
        raise ConfigError(f"{wanted}: the port must be within 1 to 65535")
    if isinstance(address, IPv6Address) and address.scope_id is not None and not _SCOPE.fullmatch(address.scope_id):
        raise ConfigError(wanted)
    if str(address) == RESOLVER_ADDRESS and port == 53:
        raise ConfigError(f"upstreams: {text} is this resolver itself; queries would run in a circle")
    if address.is_multicast or address.is_unspecified:
        raise ConfigError(f"upstreams: {text} cannot be a server")
    return Upstream(str(address), port)
