"""The generated code is what the generators make of the .proto files."""

import abc
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = [
    "taploom.contracts.taploom.guest.v1.rpc",
    "taploom.contracts.taploom.helper.v1.rpc",
    "taploom.contracts.taploom.bridge.v1.rpc",
    "rpc_testing.taploomtest.echo.v1.rpc",
]


def test_the_committed_code_is_current() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "gen_protos.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", MODULES)
def test_clients_and_bases_are_documented_and_complete(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__all__
    for public in module.__all__:
        cls = getattr(module, public)
        assert inspect.getdoc(cls)
        methods = [member for key, member in vars(cls).items() if inspect.isfunction(member) and key[0] != "_"]
        assert methods
        for method in methods:
            assert inspect.getdoc(method)
        if public.endswith("Base"):
            assert issubclass(cls, abc.ABC)
            assert len(cls.__abstractmethods__) == len(methods) - 1  # all but `handlers`
            assert cls.service_name.count(".") >= 3


def test_what_the_server_imports_is_light() -> None:
    """No protobuf wheel, no grpcio, no descriptors before somebody asks for them."""
    code = (
        "import sys, taploom.rpc, taploom.contracts.taploom.guest.v1.rpc\n"
        "heavy = {'google.protobuf', 'grpc', 'asyncio', 'taploom.rpc.reflection'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
