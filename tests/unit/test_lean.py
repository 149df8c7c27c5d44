"""What the agents leave out is not there, and what they need of it is right."""

from __future__ import annotations

import subprocess
import sys

import pytest

LEFT_OUT = {
    "_ssl",
    "_hashlib",
    "email",
    "zipfile",
    "zoneinfo",
    "asyncio",
    "multiprocessing",
    "sqlite3",
    "grpc",
    "pyroute2",
}


@pytest.mark.parametrize("agent", ["agent_guest", "agent_helper"])
def test_an_agent_starts_without_what_it_never_uses(agent: str) -> None:
    script = f"""
import importlib.util, sys
from taploom.lean import without_unused
without_unused()
import {agent}.cli
import betterproto2
print(betterproto2.__version__)
print(*sorted(name for name, module in sys.modules.items() if getattr(module, "__spec__", None)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    version, modules = done.stdout.splitlines()
    assert version.split(".")[0].isdigit()
    assert not LEFT_OUT & set(modules.split())


def test_versions_are_those_that_the_package_tools_have_recorded() -> None:
    from importlib.metadata import PackageNotFoundError, version

    from taploom.lean import installed_version

    for name in ("betterproto2", "ovsdbapp", "trio", "typing-extensions", "typing_extensions"):
        assert installed_version(name) == version(name)
    with pytest.raises(ImportError):
        installed_version("no-such-package")
    assert issubclass(PackageNotFoundError, ImportError)


def test_what_stands_for_a_module_cannot_be_used() -> None:
    script = """
from taploom.lean import without_unused
without_unused()
import ssl, dateutil.parser
for use in (lambda: ssl.SSLContext(), lambda: dateutil.parser.isoparse("2026-01-01")):
    try:
        use()
    except RuntimeError as exc:
        assert "taploom.lean" in str(exc)
    else:
        raise SystemExit("used")
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_what_is_made_in_a_shorter_way_works_the_same() -> None:
    script = """
from __future__ import annotations
from taploom.lean import without_unused
without_unused()
import attrs, dataclasses, socket, sys, typing, trio

with socket.socketpair()[0] as one:
    assert one.family == socket.AF_UNIX and one.type == socket.SOCK_STREAM
assert socket.AddressFamily.AF_INET == socket.AF_INET == 2
assert trio.Event.__name__ == "Event" and not any(type(f).__name__ == "_PublicNames" for f in sys.meta_path)

@attrs.define
class Base:
    a: int
    b: list[int] = attrs.Factory(list)

@attrs.define
class Derived(Base):
    c: int = attrs.field(default=3, kw_only=True)

assert repr(Derived(1)) == "Derived(a=1, b=[], c=3)" and Derived(1) == Derived(1) != Derived(2)
assert [field.name for field in attrs.fields(Derived)] == ["a", "b", "c"]

@dataclasses.dataclass
class Data:
    a: int
    shared: typing.ClassVar[int] = 5
    only: dataclasses.InitVar[int] = 7
    _: dataclasses.KW_ONLY
    b: str = "x"

assert [field.name for field in dataclasses.fields(Data)] == ["a", "b"]
assert repr(Data(1, b="y")) == "Data(a=1, b='y')"
trio.run(trio.sleep, 0)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
