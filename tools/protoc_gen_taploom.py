"""A protoc plugin that writes typed service stubs for ``taploom.rpc`` beside betterproto2's messages.

For every package that has services it writes ``<package path>/rpc.py`` with, per service ``X``, the client
``XServiceClient`` and the abstract server base ``XServiceBase``. protoc talks to it over standard input and output
(CodeGeneratorRequest and CodeGeneratorResponse, see google/protobuf/compiler/plugin.proto); run it with
``tools/gen_protos.py``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from google.protobuf.compiler import plugin_pb2
from google.protobuf.descriptor_pb2 import FileDescriptorProto

# Field numbers in FileDescriptorProto and ServiceDescriptorProto: they make up the paths of SourceCodeInfo.
_FILE_SERVICE = 6
_SERVICE_METHOD = 2


@dataclass
class Method:
    """One RPC."""

    name: str
    input: str
    output: str
    client_streaming: bool
    server_streaming: bool
    comment: str

    @property
    def python_name(self) -> str:
        return snake_case(self.name)

    @property
    def constant(self) -> str:
        return self.python_name.upper()


@dataclass
class Service:
    """One service of a package."""

    name: str
    full_name: str
    comment: str
    methods: list[Method] = field(default_factory=list)

    @property
    def stem(self) -> str:
        return self.name.removesuffix("Service") or self.name


@dataclass
class Package:
    """All services of a proto package, over all of its files."""

    name: str
    sources: list[str] = field(default_factory=list)
    services: list[Service] = field(default_factory=list)


def snake_case(name: str) -> str:
    """``GetInfo`` -> ``get_info``, ``GetHTTPInfo`` -> ``get_http_info``."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()


def comments(file: FileDescriptorProto) -> dict[tuple[int, ...], str]:
    """The leading comment of every element, by SourceCodeInfo path."""
    return {
        tuple(location.path): location.leading_comments.strip("\n")
        for location in file.source_code_info.location
        if location.leading_comments
    }


def message_index(files: list[FileDescriptorProto]) -> dict[str, tuple[str, str]]:
    """``.pkg.Outer.Inner`` -> (``pkg``, ``OuterInner``): betterproto2 flattens nested messages."""
    index: dict[str, tuple[str, str]] = {}

    def add(package: str, scope: str, prefix: str, messages: object) -> None:
        for message in messages:  # type: ignore[attr-defined]  # a repeated container
            full = f"{scope}.{message.name}"
            index[full] = (package, prefix + message.name)
            add(package, full, prefix + message.name, message.nested_type)

    for file in files:
        scope = f".{file.package}" if file.package else ""
        add(file.package, scope, "", file.message_type)
    return index


def packages(request: plugin_pb2.CodeGeneratorRequest) -> list[Package]:
    """The packages to generate, in order of their names."""
    wanted = set(request.file_to_generate)
    found: dict[str, Package] = {}
    for file in sorted(request.proto_file, key=lambda file: file.name):
        if file.name not in wanted or not file.service:
            continue
        notes = comments(file)
        package = found.setdefault(file.package, Package(file.package))
        package.sources.append(file.name)
        for number, descriptor in enumerate(file.service):
            path = (_FILE_SERVICE, number)
            service = Service(descriptor.name, f"{file.package}.{descriptor.name}".lstrip("."), notes.get(path, ""))
            for index, method in enumerate(descriptor.method):
                service.methods.append(
                    Method(
                        method.name,
                        method.input_type,
                        method.output_type,
                        method.client_streaming,
                        method.server_streaming,
                        notes.get((*path, _SERVICE_METHOD, index), ""),
                    )
                )
            package.services.append(service)
    return [found[name] for name in sorted(found)]


def docstring(comment: str, indent: str, fallback: str) -> Iterator[str]:
    """A comment as a docstring; one space after ``//`` is not part of the text."""
    lines = [line.removeprefix(" ").rstrip() for line in comment.splitlines()] or [fallback]
    lines = [line.replace("\\", "\\\\").replace('"""', '\\"\\"\\"') for line in lines]
    if len(lines) == 1:
        if lines[0].endswith('"'):
            lines[0] += " "
        yield f'{indent}"""{lines[0]}"""'
        return
    yield f'{indent}"""{lines[0]}'
    for line in lines[1:]:
        yield f"{indent}{line}" if line else ""
    yield f'{indent}"""'


class Writer:
    """Writes the module of one package."""

    def __init__(self, package: Package, index: dict[str, tuple[str, str]]) -> None:
        self._package = package
        self._index = index
        self._imports: set[str] = set()
        self._foreign: dict[str, str] = {}

    def _type(self, proto_name: str) -> str:
        """The Python expression for a message type; notes what has to be imported for it."""
        package, name = self._index[proto_name]
        if package == self._package.name:
            self._imports.add(name)
            return name
        alias = "_" + package.replace(".", "_")
        self._foreign[package] = alias
        return f"{alias}.{name}"

    def _foreign_import(self, package: str, alias: str) -> str:
        depth = self._package.name.count(".") + 2
        parent, _, leaf = package.rpartition(".")
        return f"from {'.' * depth}{parent} import {leaf} as {alias}"

    def _constants(self, service: Service) -> Iterator[str]:
        for method in service.methods:
            yield f"_{service.stem.upper()}_{method.constant} = Method("
            yield f'    "/{service.full_name}/{method.name}",'
            yield f"    {self._type(method.input)},"
            yield f"    {self._type(method.output)},"
            yield f"    client_streaming={method.client_streaming},"
            yield f"    server_streaming={method.server_streaming},"
            yield ")"

    def _client(self, service: Service) -> Iterator[str]:
        yield f"class {service.stem}ServiceClient:"
        yield from docstring(service.comment, "    ", f"Client of {service.full_name}.")
        yield ""
        yield "    def __init__(self, channel: Channel) -> None:"
        yield '        """Calls go over `channel`; they fail with UNAVAILABLE once it is closed."""'
        yield "        self._channel = channel"
        for method in service.methods:
            request, response = self._type(method.input), self._type(method.output)
            shape = _shape(method)
            result = {
                "unary_unary": response,
                "unary_stream": f"ServerStreamCall[{request}, {response}]",
                "stream_unary": f"ClientStreamCall[{request}, {response}]",
                "stream_stream": f"BidiCall[{request}, {response}]",
            }[shape]
            keyword = "async def" if shape == "unary_unary" else "def"
            wait = "await " if shape == "unary_unary" else ""
            argument = "" if method.client_streaming else "request, "
            yield ""
            yield f"    {keyword} {method.python_name}("
            yield "        self,"
            if not method.client_streaming:
                yield f"        request: {request},"
            yield "        *,"
            yield "        timeout: float | None = None,"
            yield "        metadata: MetadataLike | None = None,"
            yield f"    ) -> {result}:"
            yield from docstring(method.comment, "        ", f"Calls {service.full_name}.{method.name}.")
            yield f"        return {wait}self._channel.{shape}("
            constant = f"_{service.stem.upper()}_{method.constant}"
            yield f"            {constant}, {argument}timeout=timeout, metadata=metadata"
            yield "        )"

    def _base(self, service: Service) -> Iterator[str]:
        yield f"class {service.stem}ServiceBase(Service):"
        yield from docstring(service.comment, "    ", f"Server side of {service.full_name}.")
        yield ""
        yield f'    service_name = "{service.full_name}"'
        for method in service.methods:
            request, response = self._type(method.input), self._type(method.output)
            first = f"requests: ReceiveStream[{request}]" if method.client_streaming else f"request: {request}"
            yield ""
            yield "    @abc.abstractmethod"
            yield f"    async def {method.python_name}("
            yield "        self,"
            yield f"        {first},"
            if method.server_streaming:
                name = "responses" if method.client_streaming else "stream"
                yield f"        {name}: SendStream[{response}],"
            yield "        context: ServerContext,"
            yield f"    ) -> {'None' if method.server_streaming else response}:"
            yield from docstring(method.comment, "        ", f"Serves {service.full_name}.{method.name}.")
        yield ""
        yield "    def handlers(self) -> tuple[Handler, ...]:"
        yield '        """The service\'s methods, for the server."""'
        yield "        return ("
        for method in service.methods:
            constant = f"_{service.stem.upper()}_{method.constant}"
            yield f"            Handler({constant}, self.{method.python_name}),"
        yield "        )"

    def module(self) -> str:
        """The source of the module."""
        body: list[str] = []
        for service in self._package.services:
            body += [*self._constants(service), "", "", *self._client(service), "", "", *self._base(service)]
            body += ["", ""]
        streaming = [method for service in self._package.services for method in service.methods]
        shapes = {_shape(method) for method in streaming}
        service_imports = ["Handler", "Method", "Service", "ServerContext"]
        if shapes & {"stream_unary", "stream_stream"}:
            service_imports.append("ReceiveStream")
        if shapes & {"unary_stream", "stream_stream"}:
            service_imports.append("SendStream")
        channel_imports = ["Channel"]
        channel_imports += ["BidiCall"] if "stream_stream" in shapes else []
        channel_imports += ["ClientStreamCall"] if "stream_unary" in shapes else []
        channel_imports += ["ServerStreamCall"] if "unary_stream" in shapes else []
        names = [f"{service.stem}Service{side}" for service in self._package.services for side in ("Base", "Client")]
        head = [
            "# Generated by tools/protoc_gen_taploom.py. Do not edit: run tools/gen_protos.py.",
            f"# sources: {', '.join(self._package.sources)}",
            f'"""Typed gRPC clients and server bases of {self._package.name}."""',
            "",
            "from __future__ import annotations",
            "",
            "import abc",
            "from typing import TYPE_CHECKING",
            "",
            "from taploom.rpc.service import Handler, Method, Service",
            "",
            "from . import (",
            *(f"    {name}," for name in sorted(self._imports)),
            ")",
            *(self._foreign_import(package, alias) for package, alias in sorted(self._foreign.items())),
            "",
            "if TYPE_CHECKING:",
            f"    from taploom.rpc.channel import {', '.join(sorted(channel_imports))}",
            "    from taploom.rpc.metadata import MetadataLike",
            "    from taploom.rpc.service import "
            + ", ".join(sorted(set(service_imports) - {"Handler", "Method", "Service"})),
            "",
            "__all__ = (",
            *(f'    "{name}",' for name in sorted(names)),
            ")",
            "",
        ]
        return "\n".join([*head, *body]).rstrip("\n") + "\n"


def _shape(method: Method) -> str:
    return f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"


def generate(request: plugin_pb2.CodeGeneratorRequest) -> plugin_pb2.CodeGeneratorResponse:
    """The response to protoc: one module per package with services."""
    response = plugin_pb2.CodeGeneratorResponse()
    response.supported_features = plugin_pb2.CodeGeneratorResponse.FEATURE_PROTO3_OPTIONAL
    index = message_index(list(request.proto_file))
    for package in packages(request):
        output = response.file.add()
        output.name = "/".join([*package.name.split("."), "rpc.py"])
        output.content = Writer(package, index).module()
    return response


def main() -> None:
    """Reads protoc's request, writes the response."""
    request = plugin_pb2.CodeGeneratorRequest.FromString(sys.stdin.buffer.read())
    sys.stdout.buffer.write(generate(request).SerializeToString())


if __name__ == "__main__":
    main()
