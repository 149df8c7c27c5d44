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
