"""Dockerfile instructions that set an image's configuration (`docker import --change`).

Sources: the Dockerfile reference for the syntax; error texts as dockerd 20.10 gives them.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace


class ChangeError(ValueError):
    """An instruction that cannot be applied; the message is Docker's."""


@dataclass(frozen=True)
class ImageConfig:
    """What containers of an image start with."""

    command: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    working_directory: str = ""
    user: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    exposed_ports: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    stop_signal: str = ""


def apply_changes(config: ImageConfig, changes: Iterable[str]) -> ImageConfig:
    """The configuration after the instructions.

    Raises:
        ChangeError: one is malformed, or is none that sets a configuration.
    """
    for change in changes:
        for line in _logical_lines(change):
            word, _, rest = line.partition(" ") if "\t" not in line.split(" ")[0] else line.partition("\t")
            instruction = _INSTRUCTIONS.get(word.upper())
            if instruction is None:
                raise ChangeError(f"{word.lower()} is not a valid change command")
            config = instruction(config, rest.strip())
    return config


def _logical_lines(text: str) -> list[str]:
    """Instructions; comments and empty lines are left out, a backslash at a line's end continues it."""
    lines, current = [], ""
    for raw in text.splitlines():
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        if line.endswith("\\"):
            current += line[:-1]
            continue
        lines.append((current + line).strip())
        current = ""
    if current.strip():
        lines.append(current.strip())
    return lines


def _json_list(text: str) -> tuple[str, ...] | None:
    """The strings of a JSON array, or None when it is not one."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        return None
    return tuple(value)


def _arguments(text: str) -> tuple[str, ...]:
    """The exec form as it is, the shell form as a command for the shell."""
    if not text:
        return ()
    listed = _json_list(text)
    return ("/bin/sh", "-c", text) if listed is None else listed


def _cmd(config: ImageConfig, text: str) -> ImageConfig:
    return replace(config, command=_arguments(text))


def _entrypoint(config: ImageConfig, text: str) -> ImageConfig:
    return replace(config, entrypoint=_arguments(text))


def split_words(text: str) -> list[str]:
    """Words as the Dockerfile parser splits them: blanks end a word outside quotes, a backslash takes what follows.

    Quotes and backslashes stay in the words: `unquote` takes them out.
    """
    words, word, quote, escaped, inside = [], "", "", False, False
    for character in text:
        if escaped:
            word, escaped = word + character, False
        elif character == "\\" and quote != "'":
            word, escaped, inside = word + character, True, True
        elif quote:
            word += character
            if character == quote:
                quote = ""
        elif character in "\"'":
            word, quote, inside = word + character, character, True
        elif character.isspace():
            if inside:
                words.append(word)
            word, inside = "", False
        else:
            word, inside = word + character, True
    if inside:
        words.append(word)
    return words


def unquote(word: str) -> str:
    """A word without its quotes and the backslashes that protect what follows them."""
    result, quote, index = "", "", 0
    while index < len(word):
        character = word[index]
        if character == "\\" and quote != "'" and index + 1 < len(word):
            following = word[index + 1]
            # Within double quotes a backslash protects what is special there, and stays otherwise.
            result += following if not quote or following in '"$\\' else character + following
            index += 1
        elif quote:
            if character == quote:
                quote = ""
            else:
                result += character
        elif character in "\"'":
            quote = character
        else:
            result += character
        index += 1
    return result


def _pairs(name: str, text: str) -> list[tuple[str, str]]:
    """NAME=value words, or the older form with one name and the rest of the line as its value."""
    words = split_words(text)
    if not words:
        raise ChangeError(f"{name} requires at least one argument")
    if "=" not in words[0]:
        parts = re.split(r"\s+", text, maxsplit=1)
        if len(parts) < 2:
            raise ChangeError(f"{name} must have two arguments")
        return [(unquote(parts[0]), unquote(parts[1]))]
    pairs = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ChangeError(f"Syntax error - can't find = in {json.dumps(word)}. Must be of the form: name=value")
        if not key:
            raise ChangeError(f"{name} names can not be blank")
        pairs.append((unquote(key), unquote(value)))
    return pairs


def _env(config: ImageConfig, text: str) -> ImageConfig:
    environment = dict(entry.partition("=")[::2] for entry in config.environment)
    environment.update(_pairs("ENV", text))
    return replace(config, environment=tuple(f"{key}={value}" for key, value in environment.items()))


def _label(config: ImageConfig, text: str) -> ImageConfig:
    return replace(config, labels={**config.labels, **dict(_pairs("LABEL", text))})


def _expose(config: ImageConfig, text: str) -> ImageConfig:
    words = [unquote(word) for word in split_words(text)]
    if not words:
        raise ChangeError("EXPOSE requires at least one argument")
    ports = list(config.exposed_ports)
    for word in words:
        ports += [port for port in parse_ports(word) if port not in ports]
    return replace(config, exposed_ports=tuple(ports))


def parse_ports(text: str) -> list[str]:
    """PORT[-PORT][/PROTOCOL] as PORT/PROTOCOL each.

    Raises:
        ChangeError: it is not that.
    """
    ports, slash, protocol = text.partition("/")
    protocol = protocol.lower() if slash else "tcp"
    first, dash, last = ports.partition("-")
    numbers = (first, last if dash else first)
    if not all(number.isascii() and number.isdigit() and 0 <= int(number) < 1 << 16 for number in numbers):
        raise ChangeError(f"Invalid containerPort: {ports}")
    low, high = (int(number) for number in numbers)
    if low > high:
        raise ChangeError(f"Invalid containerPort: {ports}")
    if protocol not in ("tcp", "udp", "sctp"):
        raise ChangeError(f"Invalid proto: {protocol}")
    return [f"{port}/{protocol}" for port in range(low, high + 1)]


def _stop_signal(config: ImageConfig, text: str) -> ImageConfig:
    return replace(config, stop_signal=_one("STOPSIGNAL", text))


def _user(config: ImageConfig, text: str) -> ImageConfig:
    return replace(config, user=_one("USER", text))


def _work_dir(config: ImageConfig, text: str) -> ImageConfig:
    return replace(
        config,
        working_directory=posixpath.normpath(
            posixpath.join("/", config.working_directory, unquote(_one("WORKDIR", text)))
        ),
    )


def _volume(config: ImageConfig, text: str) -> ImageConfig:
    listed = _json_list(text)
    volumes = list(listed) if listed is not None else [unquote(word) for word in split_words(text)]
    if not volumes:
        raise ChangeError("VOLUME requires at least one argument")
    if not all(volume.strip() for volume in volumes):
        raise ChangeError("VOLUME specified can not be an empty string")
    return replace(config, volumes=tuple(dict.fromkeys((*config.volumes, *volumes))))


def _one(name: str, text: str) -> str:
    if not text:
        raise ChangeError(f"{name} requires exactly one argument")
    return text


_INSTRUCTIONS = {
    "CMD": _cmd,
    "ENTRYPOINT": _entrypoint,
    "ENV": _env,
    "EXPOSE": _expose,
    "LABEL": _label,
    "STOPSIGNAL": _stop_signal,
    "USER": _user,
    "VOLUME": _volume,
    "WORKDIR": _work_dir,
}
