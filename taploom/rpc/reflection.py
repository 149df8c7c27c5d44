"""Server reflection: grpc.reflection.v1 and v1alpha, which are the same messages under two names.

Source: https://github.com/grpc/grpc/blob/master/doc/server-reflection.md and grpc/reflection/v1/reflection.proto. The
descriptors come from ``taploom/contracts/descriptors.binpb`` (tools/gen_protos.py writes it), which is read at the
first question. Messages and descriptors are taken apart by hand: a protobuf runtime would cost the guest agent more
memory than all of gRPC here.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Self

from .service import Handler, Method, ReceiveStream, SendStream, ServerContext, Service
from .status import StatusCode
from .wire import LENGTH_DELIMITED, WireError, encode_bytes, encode_varint_field, fields

_VERSIONS = ("grpc.reflection.v1", "grpc.reflection.v1alpha")

# Fields of ServerReflectionRequest.
_HOST = 1
_FILE_BY_FILENAME = 3
_FILE_CONTAINING_SYMBOL = 4
_FILE_CONTAINING_EXTENSION = 5
_ALL_EXTENSION_NUMBERS = 6
_LIST_SERVICES = 7


@dataclass(frozen=True)
class ReflectionRequest:
    """ServerReflectionRequest: one question."""

    raw: bytes
    """As it came: the response repeats it."""
    host: str = ""
    kind: int = 0
    """The number of the field of the oneof that is set; 0: none."""
    argument: str = ""
    """Its value; for an extension the containing type."""

    def __bytes__(self) -> bytes:
        return self.raw

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """The request from its bytes; WireError when they are not one."""
        host, kind, argument = "", 0, ""
        for number, wire_type, value in fields(data):
            if number == _HOST:
                host = _text(wire_type, value)
            elif _FILE_BY_FILENAME <= number <= _LIST_SERVICES:
                kind = number
                is_message = number == _FILE_CONTAINING_EXTENSION
                argument = _first_text(value) if is_message else _text(wire_type, value)
        return cls(bytes(data), host, kind, argument)


@dataclass(frozen=True)
class ReflectionResponse:
    """ServerReflectionResponse, serialized."""

    raw: bytes

    def __bytes__(self) -> bytes:
        return self.raw

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """The response from its bytes, which are not looked at."""
        return cls(bytes(data))


def _text(wire_type: int, value: int | bytes) -> str:
    if wire_type != LENGTH_DELIMITED or not isinstance(value, bytes):
        raise WireError("a field of ServerReflectionRequest is not a string")
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise WireError("a field of ServerReflectionRequest is not UTF-8") from None


def _first_text(value: int | bytes) -> str:
    """Field 1 of a submessage."""
    if not isinstance(value, bytes):
        raise WireError("a field of ServerReflectionRequest is not a message")
    return next((_text(wire_type, content) for number, wire_type, content in fields(value) if number == 1), "")


@dataclass(frozen=True)
class _File:
    """A FileDescriptorProto, serialized, and what of it is looked up."""

    name: str
    data: bytes
    dependencies: tuple[str, ...]
    symbols: frozenset[str]
    messages: frozenset[str]


def _strings(data: bytes, number: int) -> Iterator[str]:
    for field, wire_type, value in fields(data):
        if field == number and wire_type == LENGTH_DELIMITED and isinstance(value, bytes):
            yield value.decode()


def _submessages(data: bytes, number: int) -> Iterator[bytes]:
    for field, wire_type, value in fields(data):
        if field == number and wire_type == LENGTH_DELIMITED and isinstance(value, bytes):
            yield value


def _message_symbols(data: bytes, scope: str) -> Iterator[tuple[str, bool]]:
    """The full names of a DescriptorProto and all within it, and whether each is a message."""
    full = f"{scope}{next(_strings(data, 1), '')}"
    yield full, True
    for number in (2, 6, 8):  # fields, extensions, oneofs
        for member in _submessages(data, number):
            yield f"{full}.{next(_strings(member, 1), '')}", False
    for nested in _submessages(data, 3):
        yield from _message_symbols(nested, f"{full}.")
    for enum in _submessages(data, 4):
        yield from _enum_symbols(enum, f"{full}.")


def _enum_symbols(data: bytes, scope: str) -> Iterator[tuple[str, bool]]:
    """The full names of an EnumDescriptorProto and its values, which live beside the enum, not in it."""
    yield f"{scope}{next(_strings(data, 1), '')}", False
    for value in _submessages(data, 2):
        yield f"{scope}{next(_strings(value, 1), '')}", False


def _service_symbols(data: bytes, scope: str) -> Iterator[tuple[str, bool]]:
    full = f"{scope}{next(_strings(data, 1), '')}"
    yield full, False
    for method in _submessages(data, 2):
        yield f"{full}.{next(_strings(method, 1), '')}", False


def _parse_file(data: bytes) -> _File:
    """A FileDescriptorProto (google/protobuf/descriptor.proto)."""
    package = next(_strings(data, 2), "")
    scope = f"{package}." if package else ""
    symbols: list[tuple[str, bool]] = []
    for message in _submessages(data, 4):
        symbols += _message_symbols(message, scope)
    for enum in _submessages(data, 5):
        symbols += _enum_symbols(enum, scope)
    for service in _submessages(data, 6):
        symbols += _service_symbols(service, scope)
    for extension in _submessages(data, 7):
        symbols.append((scope + next(_strings(extension, 1), ""), False))
    return _File(
        next(_strings(data, 1), ""),
        data,
        tuple(_strings(data, 3)),
        frozenset(name for name, _ in symbols),
        frozenset(name for name, is_message in symbols if is_message),
    )


def contract_descriptors() -> bytes:
    """The serialized FileDescriptorSet of all contracts and of what they import."""
    return (importlib.resources.files("taploom.contracts") / "descriptors.binpb").read_bytes()


class DescriptorIndex:
    """Answers reflection's questions for a set of services and the files that those need."""

    def __init__(self, services: Iterable[str], descriptor_sets: Iterable[bytes]) -> None:
        self._services = sorted(services)
        known: dict[str, _File] = {}
        for descriptor_set in descriptor_sets:
            for data in _submessages(descriptor_set, 1):
                file = _parse_file(data)
                known.setdefault(file.name, file)
        self._files: dict[str, _File] = {}
        wanted = set(self._services)
        for file in known.values():
            if wanted & file.symbols:
                self._add(file, known)
        self._by_symbol = {symbol: file for file in self._files.values() for symbol in file.symbols}
        self._messages = frozenset(name for file in self._files.values() for name in file.messages)

    def _add(self, file: _File, known: dict[str, _File]) -> None:
        if file.name in self._files:
            return
        self._files[file.name] = file
        for name in file.dependencies:
            if name in known:
                self._add(known[name], known)

    def answer(self, request: ReflectionRequest) -> bytes:
        """The serialized ServerReflectionResponse."""
        head = (encode_bytes(1, request.host.encode()) if request.host else b"") + encode_bytes(2, request.raw)
        return head + self._answer(request)

    def _answer(self, request: ReflectionRequest) -> bytes:
        if request.kind == _LIST_SERVICES:
            listed = b"".join(encode_bytes(1, encode_bytes(1, name.encode())) for name in self._services)
            return encode_bytes(6, listed)
        if request.kind == _FILE_BY_FILENAME:
            return self._descriptors(self._files.get(request.argument), f"no file {request.argument[:200]!r}")
        if request.kind == _FILE_CONTAINING_SYMBOL:
            file = self._by_symbol.get(request.argument.removeprefix("."))
            return self._descriptors(file, f"no symbol {request.argument[:200]!r}")
        if request.kind == _ALL_EXTENSION_NUMBERS and request.argument in self._messages:
            return encode_bytes(5, encode_bytes(1, request.argument.encode()))  # proto3: there are no extensions
        if request.kind in (_FILE_CONTAINING_EXTENSION, _ALL_EXTENSION_NUMBERS):
            return _error(StatusCode.NOT_FOUND, f"no extension of {request.argument[:200]!r}")
        return _error(StatusCode.INVALID_ARGUMENT, "the reflection request asks for nothing that is known here")

    def _descriptors(self, file: _File | None, missing: str) -> bytes:
        """The file and all that it imports, the imports last."""
        if file is None:
            return _error(StatusCode.NOT_FOUND, missing)
        order: list[_File] = []

        def visit(current: _File) -> None:
            if current not in order:
                order.append(current)
                for name in current.dependencies:
                    if name in self._files:
                        visit(self._files[name])

        visit(file)
        return encode_bytes(4, b"".join(encode_bytes(1, entry.data) for entry in order))


def _error(code: StatusCode, message: str) -> bytes:
    return encode_bytes(7, encode_varint_field(1, code) + encode_bytes(2, message.encode()))


class Reflection(Service):
    """One version of the reflection service."""

    infrastructure = True

    def __init__(self, package: str, index: Callable[[], DescriptorIndex]) -> None:
        self.service_name = f"{package}.ServerReflection"
        self._index = index
        self._method = Method(
            f"/{self.service_name}/ServerReflectionInfo",
            ReflectionRequest,
            ReflectionResponse,
            client_streaming=True,
            server_streaming=True,
        )

    async def answer(
        self,
        requests: ReceiveStream[ReflectionRequest],
        responses: SendStream[ReflectionResponse],
        context: ServerContext,
    ) -> None:
        """Answers each question in turn."""
        async for request in requests:
            await responses.send(ReflectionResponse(self._index().answer(request)))

    def handlers(self) -> tuple[Handler, ...]:
        """The service's method, for the server."""
        return (Handler(self._method, self.answer),)


def reflection_services(services: Iterable[str], descriptor_sets: Iterable[bytes] = ()) -> list[Service]:
    """Both versions of reflection for the named services and for themselves.

    `descriptor_sets` are serialized FileDescriptorSets of services that are not among the contracts.
    """
    names = [*services, *(f"{package}.ServerReflection" for package in _VERSIONS)]
    extra = tuple(descriptor_sets)
    cached: list[DescriptorIndex] = []

    def index() -> DescriptorIndex:
        if not cached:
            cached.append(DescriptorIndex(names, [contract_descriptors(), *extra]))
        return cached[0]

    return [Reflection(package, index) for package in _VERSIONS]
