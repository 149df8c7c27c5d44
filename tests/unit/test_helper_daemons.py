"""What the helper's daemons are started with."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent_helper import daemons


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    library = tmp_path / "libjemalloc.so.2"
    library.touch()
    monkeypatch.setattr(daemons, "_JEMALLOC", ("/nonexistent/libjemalloc.so.2", str(library)))
    return library


@pytest.mark.parametrize("name", ["ovs-vswitchd", "ovn-northd", "ovn-controller"])
def test_jemalloc_where_it_is_installed(name: str, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = daemons.environment(Path("/run/x"), name)
    assert found["LD_PRELOAD"] == str(library)
    assert "tcache_max" in found["MALLOC_CONF"]
    assert found["OVS_RUNDIR"] == "/run/x"
    monkeypatch.setenv("LD_PRELOAD", "/lib/theirs.so")
    assert daemons.environment(Path("/run/x"), name)["LD_PRELOAD"] == f"/lib/theirs.so:{library}"


def test_glibcs_settings_otherwise(library: Path) -> None:
    library.unlink()
    vswitchd = daemons.environment(Path("/run/x"), "ovs-vswitchd")
    assert "LD_PRELOAD" not in vswitchd
    assert "MALLOC_TOP_PAD_" in vswitchd
    assert "MALLOC_TOP_PAD_" not in daemons.environment(Path("/run/x"), "ovn-northd")


@pytest.mark.parametrize("name", ["", "ovsdb-server"])
def test_the_others_have_the_c_librarys(name: str, library: Path) -> None:
    found = daemons.environment(Path("/run/x"), name)
    assert "LD_PRELOAD" not in found
    assert "MALLOC_CONF" not in found
