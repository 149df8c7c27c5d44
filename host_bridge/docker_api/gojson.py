"""JSON as Go's encoding/json decodes it into a struct, with its errors' texts.

Docker's clients see these texts, and Docker's leniency: keys in any case, `null` for everything, unknown keys ignored,
a repeated key's last value. A shape says what the struct is; what comes out has every field, so that handlers never
meet a missing key or a wrong type.

Behaviour and texts were compared with dockerd's (tests/unit/test_docker_gojson.py has what it answered).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from host_bridge.docker_api.errors import bad_request

# encoding/json's own limit.
_MAX_DEPTH = 10_000


@dataclass(frozen=True, slots=True)
class Scalar:
    """A string, bool, int or float; Go's name of the type."""

    name: str


STRING, BOOL, ANY = Scalar("string"), Scalar("bool"), Scalar("interface {}")
INT, INT64, UINT16, UINT64 = Scalar("int"), Scalar("int64"), Scalar("uint16"), Scalar("uint64")
FLOAT = Scalar("float64")
_INTEGERS = {
    "int": range(-(1 << 63), 1 << 63),
    "int64": range(-(1 << 63), 1 << 63),
    "uint16": range(1 << 16),
    "uint64": range(1 << 64),
}


@dataclass(frozen=True, slots=True)
class List:
    """A slice; None when absent or null."""

    element: Shape

    @property
    def name(self) -> str:
        return f"[]{self.element.name}"


@dataclass(frozen=True, slots=True)
class Map:
    """A map with string keys; None when absent or null."""

    element: Shape

    @property
    def name(self) -> str:
        return f"map[string]{self.element.name}"


@dataclass(frozen=True, slots=True)
class Optional:
    """A pointer: None when absent or null."""

    element: Shape

    @property
    def name(self) -> str:
        return self.element.name if isinstance(self.element, Struct) else f"*{self.element.name}"


@dataclass(frozen=True, slots=True)
class Struct:
    """A struct.

    Attributes:
        name: as Go prints the type, with its package: `network.IPAM`.
        fields: shape by JSON key.
        embedded: an embedded struct whose fields some of the keys are: its name, which errors tell, and the keys.
    """

    name: str
    fields: Mapping[str, Shape] = field(hash=False)
    embedded: tuple[str, frozenset[str]] = ("", frozenset())

    @property
    def short_name(self) -> str:
        return self.name.rpartition(".")[2]


Shape = Scalar | List | Map | Optional | Struct


class GoJsonError(ValueError):
    """What Go would say."""


class EmptyError(GoJsonError):
    """There is nothing but white space."""


def zero(shape: Struct) -> dict[str, Any]:
    """The struct with nothing set."""
    return {key: _zero(element) for key, element in shape.fields.items()}


def _zero(shape: Shape) -> Any:
    match shape:
        case Struct():
            return zero(shape)
        case Scalar("string"):
            return ""
        case Scalar("bool"):
            return False
        case Scalar("interface {}"):
            return None
        case Scalar():
            return 0
        case _:
            return None


def decode_body(data: bytes, shape: Struct) -> dict[str, Any]:
    """A request's body; raises DockerError 400 with Docker's words."""
    try:
        value, end = _Scanner(data, truncated="unexpected EOF").first()
        decoded = _decode(value, shape, ())
    except EmptyError:
        raise bad_request("invalid JSON: got EOF while reading request body") from None
    except GoJsonError as error:
        raise bad_request(f"invalid JSON: {error}") from None
    # Go's Decoder.More: anything but a closing bracket counts as more.
    rest = data[end:].lstrip(b" \t\r\n")
    if rest and rest[0] not in b"]}":
        raise bad_request("unexpected content after JSON")
    assert isinstance(decoded, dict)
    return decoded


def decode(data: bytes, shape: Shape) -> Any:
    """A whole text, as Go's Unmarshal; raises GoJsonError."""
    scanner = _Scanner(data, truncated="unexpected end of JSON input")
    value, end = scanner.first()
    end = scanner.skip_space(end)
    if end < len(data):
        raise GoJsonError(f"invalid character {_quoted(data[end])} after top-level value")
    return _decode(value, shape, ())


@dataclass(slots=True)
class _Errors:
    """Go decodes on after a value of a wrong type and reports the first."""

    first: str | None = None


@dataclass(frozen=True, slots=True)
class _Number:
    text: str


@dataclass(frozen=True, slots=True)
class _Object:
    """Members in their order, repeated ones included."""

    members: tuple[tuple[str, Any], ...]


def _decode(value: Any, shape: Shape, path: tuple[str, ...]) -> Any:
    errors = _Errors()
    decoded = _into(value, shape, _zero(shape), _Context("", path), errors)
    if errors.first is not None:
        raise GoJsonError(errors.first)
    return decoded


@dataclass(frozen=True, slots=True)
class _Context:
    struct: str
    path: tuple[str, ...]


def _into(value: Any, shape: Shape, current: Any, context: _Context, errors: _Errors) -> Any:
    """`value` decoded over `current`."""
    if isinstance(shape, Optional):
        if value is None:
            return None
        inner = _zero(shape.element) if current is None else current
        failed = errors.first
        decoded = _into(value, shape.element, inner, context, errors)
        # Go has allocated the pointer by then; who looks sees the error first.
        return decoded if failed == errors.first else current
    if value is None:
        return None if isinstance(shape, List | Map) else current
    match shape:
        case Struct():
            if isinstance(value, _Object):
                return _struct(value, shape, current, context, errors)
        case Map():
            if isinstance(value, _Object):
                result = dict(current or {})
                for key, member in value.members:
                    result[key] = _into(member, shape.element, _zero(shape.element), context, errors)
                return result
        case List():
            if isinstance(value, list):
                return [_into(item, shape.element, _zero(shape.element), context, errors) for item in value]
        case Scalar():
            if _fits(value, shape):
                return _scalar(value, shape)
    _mismatch(value, shape, context, errors)
    return current


def _struct(value: _Object, shape: Struct, current: dict[str, Any], context: _Context, errors: _Errors) -> Any:
    result = dict(current)
    folded = {key.casefold(): key for key in reversed(list(shape.fields))}
    for name, member in value.members:
        key = name if name in shape.fields else folded.get(name.casefold())
        if key is None:
            continue
        owner, keys = shape.embedded
        inner = _Context(shape.short_name, (*context.path, owner, key) if key in keys else (*context.path, key))
        result[key] = _into(member, shape.fields[key], result[key], inner, errors)
    return result


def _fits(value: Any, shape: Scalar) -> bool:
    match shape.name:
        case "string":
            return isinstance(value, str)
        case "bool":
            return isinstance(value, bool)
        case "interface {}":
            return True
        case "float64":
            return isinstance(value, _Number)
    if not isinstance(value, _Number) or not re.fullmatch(r"-?[0-9]+", value.text) or len(value.text) > 20:
        return False
    return int(value.text) in _INTEGERS[shape.name]


def _scalar(value: Any, shape: Scalar) -> Any:
    if shape is ANY:
        return _plain(value)
    if isinstance(value, _Number):
        return float(value.text) if shape is FLOAT else int(value.text)
    return value


def _plain(value: Any) -> Any:
    match value:
        case _Number(text):
            return int(text) if re.fullmatch(r"-?[0-9]{1,15}", text) else float(text)
        case _Object(members):
            return {key: _plain(member) for key, member in members}
        case list():
            return [_plain(item) for item in value]
    return value


def _mismatch(value: Any, shape: Shape, context: _Context, errors: _Errors) -> None:
    if errors.first is not None:
        return
    match value:
        case bool():
            what = "bool"
        case str():
            what = "string"
        case _Number(text):
            # Where a number is wanted, Go says which one does not fit.
            what = f"number {text}" if isinstance(shape, Scalar) and shape.name in _INTEGERS else "number"
        case list():
            what = "array"
        case _:
            what = "object"
    where = f"Go struct field {context.struct}.{'.'.join(context.path)}" if context.path else "Go value"
    errors.first = f"json: cannot unmarshal {what} into {where} of type {shape.name}"


_SPACE = b" \t\r\n"
_STRING_END = re.compile(rb'["\\\x00-\x1f]')
_NUMBER = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_ESCAPES = {b'"': '"', b"\\": "\\", b"/": "/", b"b": "\b", b"f": "\f", b"n": "\n", b"r": "\r", b"t": "\t"}
_LITERALS: dict[int, tuple[bytes, Any]] = {
    ord("t"): (b"true", True),
    ord("f"): (b"false", False),
    ord("n"): (b"null", None),
}
_HEX = frozenset(b"0123456789abcdefABCDEF")


class _Scanner:
    """One value of a text, without recursion: what is nested too deep is Go's error, not Python's."""

    def __init__(self, data: bytes, *, truncated: str) -> None:
        self._data = data
        self._truncated = truncated

    def first(self) -> tuple[Any, int]:
        """The first value and where it ends."""
        start = self.skip_space(0)
        if start == len(self._data):
            if self._truncated == "unexpected EOF":
                raise EmptyError
            raise GoJsonError(self._truncated)
        return self._value(start)

    def skip_space(self, at: int) -> int:
        data = self._data
        while at < len(data) and data[at] in _SPACE:
            at += 1
        return at

    def _byte(self, at: int) -> int:
        if at >= len(self._data):
            raise GoJsonError(self._truncated)
        return self._data[at]

    def _wrong(self, at: int, context: str) -> GoJsonError:
        return GoJsonError(f"invalid character {_quoted(self._byte(at))} {context}")

    def _value(self, at: int) -> tuple[Any, int]:
        # Open containers: a list, or a list of members with the key that waits for its value.
        stack: list[tuple[list[Any], str | None]] = []
        while True:
            at = self.skip_space(at)
            byte = self._byte(at)
            value: Any
            if byte in b"{[" and len(stack) >= _MAX_DEPTH:
                raise GoJsonError("exceeded max depth")
            if byte == ord("{"):
                at = self.skip_space(at + 1)
                if self._byte(at) == ord("}"):
                    value, at = _Object(()), at + 1
                else:
                    key, at = self._key(at)
                    stack.append(([], key))
                    continue
            elif byte == ord("["):
                at = self.skip_space(at + 1)
                if self._byte(at) == ord("]"):
                    value, at = [], at + 1
                else:
                    stack.append(([], None))
                    continue
            else:
                value, at = self._scalar(at, byte)
            # The value ends here: give it to what is open, and close what ends with it.
            while stack:
                items, waiting = stack[-1]
                items.append(value if waiting is None else (waiting, value))
                at = self.skip_space(at)
                byte = self._byte(at)
                if waiting is None:
                    if byte == ord(","):
                        at += 1
                        break
                    if byte != ord("]"):
                        raise self._wrong(at, "after array element")
                    value = items
                else:
                    if byte == ord(","):
                        key, at = self._key(self.skip_space(at + 1))
                        stack[-1] = (items, key)
                        break
                    if byte != ord("}"):
                        raise self._wrong(at, "after object key:value pair")
                    value = _Object(tuple(items))
                at += 1
                stack.pop()
            else:
                return value, at

    def _key(self, at: int) -> tuple[str, int]:
        if self._byte(at) != ord('"'):
            raise self._wrong(at, "looking for beginning of object key string")
        key, at = self._string(at + 1)
        at = self.skip_space(at)
        if self._byte(at) != ord(":"):
            raise self._wrong(at, "after object key")
        return key, at + 1

    def _scalar(self, at: int, byte: int) -> tuple[Any, int]:
        if byte == ord('"'):
            return self._string(at + 1)
        if byte in _LITERALS:
            word, value = _LITERALS[byte]
            for offset in range(1, len(word)):
                if self._byte(at + offset) != word[offset]:
                    expected = chr(word[offset])
                    raise self._wrong(at + offset, f"in literal {word.decode()} (expecting '{expected}')")
            return value, at + len(word)
        if byte == ord("-") or ord("0") <= byte <= ord("9"):
            return self._number(at)
        raise self._wrong(at, "looking for beginning of value")

    def _number(self, at: int) -> tuple[_Number, int]:
        found = _NUMBER.match(self._data, at)
        if found is None:  # a minus sign alone
            raise self._wrong(at + 1, "in numeric literal")
        end = found.end()
        following = self._data[end : end + 1]
        if following == b"." and not re.search(rb"[.eE]", found[0]):
            raise self._wrong(end + 1, "after decimal point in numeric literal")
        if following in (b"e", b"E") and not re.search(rb"[eE]", found[0]):
            sign = self._data[end + 1 : end + 2] in (b"+", b"-")
            raise self._wrong(end + 1 + sign, "in exponent of numeric literal")
        return _Number(found[0].decode()), end

    def _string(self, at: int) -> tuple[str, int]:
        parts: list[str] = []
        data = self._data
        while True:
            found = _STRING_END.search(data, at)
            if found is None:
                raise GoJsonError(self._truncated)
            parts.append(data[at : found.start()].decode("utf-8", "replace"))
            at = found.start()
            byte = data[at]
            if byte == ord('"'):
                return _joined(parts), at + 1
            if byte != ord("\\"):
                raise self._wrong(at, "in string literal")
            escape = bytes([self._byte(at + 1)])
            if escape == b"u":
                for offset in range(2, 6):
                    if self._byte(at + offset) not in _HEX:
                        raise self._wrong(at + offset, "in \\u hexadecimal character escape")
                parts.append(chr(int(data[at + 2 : at + 6], 16)))
                at += 6
            elif escape in _ESCAPES:
                parts.append(_ESCAPES[escape])
                at += 2
            else:
                raise self._wrong(at + 1, "in string escape code")


def _joined(parts: list[str]) -> str:
    """The parts as one text; two halves of a surrogate pair become one character, lone ones U+FFFD, as with Go."""
    text = "".join(parts)
    if any("\ud800" <= character <= "\udfff" for character in text):
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _quoted(byte: int) -> str:
    """A byte as Go's messages quote it."""
    if byte == ord("'"):
        return r"'\''"
    if byte == ord('"'):
        return "'\"'"
    named = {7: "\\a", 8: "\\b", 9: "\\t", 10: "\\n", 11: "\\v", 12: "\\f", 13: "\\r", 92: "\\\\"}
    if byte in named:
        return f"'{named[byte]}'"
    character = chr(byte)
    if character.isprintable():
        return f"'{character}'"
    return f"'\\x{byte:02x}'" if byte < 0x80 else f"'\\u{byte:04x}'"
