"""Checks of names, aliases, MAC addresses and MTUs that users give."""

from __future__ import annotations

import re
from collections.abc import Sequence

from host_bridge.errors import InvalidAliasError, InvalidError, InvalidMacError, InvalidNameError

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*", re.ASCII)
_LABEL = re.compile(r"[a-zA-Z0-9_]([a-zA-Z0-9_-]*[a-zA-Z0-9_])?", re.ASCII)
_PART = re.compile(r"[a-zA-Z0-9_-]+", re.ASCII)
_MAC = re.compile(r"[0-9a-fA-F]{2}([:-][0-9a-fA-F]{2}){5}", re.ASCII)

MAX_NAME = 63
# Of networks and containers that come from Docker, which has no limit.
MAX_LONG_NAME = 255
MAX_ALIAS = 253
MAX_ALIASES = 128
DEFAULT_MTU = 1500
# RFC 791: every IPv4 module must forward 68 bytes; RFC 8200 section 5: every IPv6 link must carry 1280.
MIN_MTU = 68
MIN_MTU_IPV6 = 1280
MAX_MTU = 65535


def shown(text: str, limit: int = 80) -> str:
    """User input as it may stand in a message: quoted, printable, short."""
    cut = text if len(text) <= limit else text[:limit] + "..."
    return repr(cut)


def clean_text(text: str, limit: int = 300) -> str:
    """What a peer said, safe for a log line or a terminal: one line, printable characters, at most `limit` of them.

    A guest's text is hostile: it could otherwise carry terminal escape sequences or forge log lines.
    """
    head = "".join(c if c.isprintable() else "?" for c in text[: limit + 1])
    return head if len(head) <= limit else head[:limit] + "..."


def check_name(kind: str, name: str, *, shortest: int = 1, longest: int = MAX_NAME) -> str:
    """Returns `name` when it may name a network or guest; raises InvalidNameError otherwise."""
    message = ""
    if not name:
        message = f"a {kind} needs a name"
    elif len(name) > longest:
        message = f"{kind} name {shown(name, 20)} has {len(name)} characters: use at most {longest}"
    elif len(name) < shortest:
        message = f"{kind} name {shown(name)} is too short: use at least {shortest} characters"
    elif not _NAME.fullmatch(name):
        message = (
            f"{kind} name {shown(name)} is not allowed: use letters, digits, '_', '.' and '-', "
            "the first one a letter or digit"
        )
    if message:
        raise InvalidNameError(message, kind=kind, name=name)
    return name


def check_any_name(kind: str, name: str) -> str:
    """Returns `name` when Docker lets a network have it: any text that is not blank, here one that can be printed."""
    message = ""
    if not name.strip():
        message = f"a {kind} needs a name"
    elif len(name) > MAX_LONG_NAME:
        message = f"{kind} name {shown(name, 20)} has {len(name)} characters: use at most {MAX_LONG_NAME}"
    elif not name.isprintable():
        message = f"{kind} name {shown(name)} is not allowed: use printable characters"
    if message:
        raise InvalidNameError(message, kind=kind, name=name)
    return name


def dns_name(name: str) -> bool:
    """True when DNS can carry the name (RFC 1035 section 2.3.4; `_` is allowed as in container names)."""
    return len(name) <= MAX_ALIAS and all(len(part) <= MAX_NAME and _PART.fullmatch(part) for part in name.split("."))


def check_aliases(aliases: list[str]) -> tuple[str, ...]:
    """Returns the aliases without repetitions (names are case-insensitive, RFC 4343); raises InvalidError.

    An alias is one or more labels of at most 63 characters, 253 in all (RFC 1035 section 2.3.4); `_` is allowed as in
    container names.
    """
    if len(aliases) > MAX_ALIASES:
        raise InvalidError(f"{len(aliases)} aliases are too many: use at most {MAX_ALIASES}")
    kept: dict[str, str] = {}
    for alias in aliases:
        if not alias:
            raise InvalidAliasError("an alias must not be empty", alias=alias)
        if len(alias) > MAX_ALIAS:
            raise InvalidAliasError(
                f"alias {shown(alias, 20)} has {len(alias)} characters: use at most {MAX_ALIAS}", alias=alias
            )
        for label in alias.split("."):
            if len(label) > MAX_NAME:
                raise InvalidAliasError(
                    f"alias {shown(alias, 20)} has a label of {len(label)} characters: use at most {MAX_NAME}",
                    alias=alias,
                )
            if not _LABEL.fullmatch(label):
                raise InvalidAliasError(
                    f"alias {shown(alias)} is not a DNS name: use letters, digits, '-' and '_', "
                    "with dots between labels",
                    alias=alias,
                )
        kept.setdefault(alias.lower(), alias)
    return tuple(kept.values())


def host_name(name: str) -> bool:
    """True for labels of letters, digits, '-' and '_', with dots between, none of which begins or ends with '-'."""
    return dns_name(name) and all(_LABEL.fullmatch(part) for part in name.split("."))


def any_aliases(aliases: Sequence[str]) -> tuple[str, ...]:
    """The aliases without repetitions and empty ones. Docker takes any text; what DNS cannot carry is no name then.

    Raises:
        InvalidAliasError: one cannot be printed, or is longer than any name.
        InvalidError: there are too many.
    """
    if len(aliases) > MAX_ALIASES:
        raise InvalidError(f"{len(aliases)} aliases are too many: use at most {MAX_ALIASES}")
    kept: dict[str, str] = {}
    for alias in aliases:
        if len(alias) > MAX_LONG_NAME:
            message = f"alias {shown(alias, 20)} has {len(alias)} characters: use at most {MAX_LONG_NAME}"
            raise InvalidAliasError(message, alias=alias)
        if not alias.isprintable():
            raise InvalidAliasError(f"alias {shown(alias)} is not allowed: use printable characters", alias=alias)
        if alias:
            kept.setdefault(alias.lower(), alias)
    return tuple(kept.values())


def any_links(links: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """The links (alias, other guest's name), each alias once: of several, the last. Raises as `any_aliases`."""
    any_aliases([target for _, target in links])
    targets = {alias.lower(): target for alias, target in links}
    return tuple((alias, targets[alias.lower()]) for alias in any_aliases([alias for alias, _ in links]))


def check_mac(mac: str) -> str:
    """Returns the MAC address as aa:bb:cc:dd:ee:ff; raises InvalidMacError when malformed or not unicast."""
    if not _MAC.fullmatch(mac):
        raise InvalidMacError(f"MAC address {shown(mac)} is malformed: write it as 02:42:ac:12:00:02", mac=mac)
    octets = bytes.fromhex(mac.replace(":", "").replace("-", ""))
    if octets[0] & 1:
        raise InvalidMacError(f"MAC address {mac} is a multicast address: the first octet must be even", mac=mac)
    if not any(octets):
        raise InvalidMacError("MAC address 00:00:00:00:00:00 cannot be used", mac=mac)
    return octets.hex(":")


def check_mtu(mtu: int, *, ipv6: bool) -> int:
    """Returns the MTU in bytes, 1500 for 0; raises InvalidError when no link can have it."""
    if mtu == 0:
        return DEFAULT_MTU
    if not MIN_MTU <= mtu <= MAX_MTU:
        raise InvalidError(f"MTU {mtu} is out of range: use {MIN_MTU} to {MAX_MTU} bytes")
    if ipv6 and mtu < MIN_MTU_IPV6:
        raise InvalidError(f"MTU {mtu} is too small for IPv6: use at least {MIN_MTU_IPV6} bytes (RFC 8200)")
    return mtu
