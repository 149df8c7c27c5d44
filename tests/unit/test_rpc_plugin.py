"""The protoc plugin on descriptors made here, and the comparison of generated with committed code."""

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf.compiler.plugin_pb2 import CodeGeneratorRequest
from google.protobuf.descriptor_pb2 import FileDescriptorProto

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


plugin = load("protoc_gen_taploom")
gen_protos = load("gen_protos")


@pytest.fixture
def request_() -> CodeGeneratorRequest:
    """A file whose service uses a nested message and a message of another package."""
    other = FileDescriptorProto(name="other/thing.proto", package="other.things.v1", syntax="proto3")
    other.message_type.add(name="Empty")
    file = FileDescriptorProto(name="a/b.proto", package="a.b.v1", syntax="proto3")
    file.dependency.append("other/thing.proto")
    outer = file.message_type.add(name="Outer")
    outer.nested_type.add(name="Inner")
    service = file.service.add(name="ThingService")
    service.method.add(name="GetHTTPThing", input_type=".a.b.v1.Outer.Inner", output_type=".other.things.v1.Empty")
    service.method.add(
        name="Chat",
        input_type=".a.b.v1.Outer",
        output_type=".a.b.v1.Outer",
        client_streaming=True,
        server_streaming=True,
    )
    comment = file.source_code_info.location.add(leading_comments=' Says """hello\\".\n\n And more"\n')
    comment.path.extend([6, 0, 2, 0])
    comment.span.extend([0, 0, 0])
    return CodeGeneratorRequest(file_to_generate=["a/b.proto"], proto_file=[other, file])


def test_the_module(request_: CodeGeneratorRequest) -> None:
    response = plugin.generate(request_)
    assert [file.name for file in response.file] == ["a/b/v1/rpc.py"]
    source = response.file[0].content
    tree = ast.parse(source)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    assert set(classes) == {"ThingServiceClient", "ThingServiceBase"}
    methods = {node.name: node for node in classes["ThingServiceBase"].body if isinstance(node, ast.AsyncFunctionDef)}
    assert set(methods) == {"get_http_thing", "chat"}
    assert ast.get_docstring(methods["get_http_thing"]) == 'Says """hello\\".\n\nAnd more"'
    assert "request: OuterInner" in source
    assert "from ....other.things import v1 as _other_things_v1" in source
    assert "-> _other_things_v1.Empty:" in source
    assert "requests: ReceiveStream[Outer]" in source
    assert "responses: SendStream[Outer]" in source
    assert "-> BidiCall[Outer, Outer]:" in source
    assert plugin.generate(request_) == response


def test_files_without_services_give_nothing(request_: CodeGeneratorRequest) -> None:
    request_.file_to_generate[:] = ["other/thing.proto"]
    assert not plugin.generate(request_).file


@pytest.mark.parametrize(
    ("name", "expected"),
    [("GetInfo", "get_info"), ("GetHTTPInfo", "get_http_info"), ("A", "a"), ("IPv4List", "i_pv4_list")],
)
def test_snake_case(name: str, expected: str) -> None:
    assert plugin.snake_case(name) == expected


def test_differences_are_found(tmp_path: Path) -> None:
    committed, fresh = tmp_path / "committed", tmp_path / "fresh"
    for directory in (committed, fresh):
        (directory / "sub").mkdir(parents=True)
        (directory / "sub" / "same.py").write_text("same\n")
    assert gen_protos._difference(committed, fresh, "x") == []
    (committed / "changed.py").write_text("old\n")
    (fresh / "changed.py").write_text("new\n")
    (committed / "gone.py").write_text("")
    (fresh / "added.py").write_text("")
    (committed / "d.binpb").write_bytes(b"\x00")
    (fresh / "d.binpb").write_bytes(b"\x01")
    text = "".join(gen_protos._difference(committed, fresh, "x"))
    assert "x/added.py is missing\n" in text
    assert "x/gone.py is not generated any more\n" in text
    assert "x/d.binpb differs\n" in text
    assert "-old\n+new\n" in text
    gen_protos._replace(committed, fresh)
    assert gen_protos._difference(committed, fresh, "x") == []
    assert not (committed / "gone.py").exists()
