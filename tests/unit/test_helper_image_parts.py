"""The helper image's manifest, and what its builders say that they need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "images/alpine-helper"))

from helper_image import alpine, interpreter, recipe, tree  # noqa: E402 -- found by the path above

from agent_helper import daemons, stack  # noqa: E402


@pytest.mark.parametrize("builder", ["debian", "alpine"])
@pytest.mark.parametrize("arch", ["x86_64", "arm64"])
def test_the_manifest_has_what_the_agent_looks_for(builder: str, arch: str) -> None:
    found = recipe.read_recipe(builder, arch)
    assert set(stack._PROGRAMS) <= {Path(program.path).name for program in found.programs}
    assert {f"usr/share/{file}" for file, _ in daemons.SCHEMAS.values()} == set(found.data)
    assert {"taploom", "agent_helper"} == set(found.python_modules)
    assert not any("{" in folder for folder in found.library_folders)


def test_wheels_are_pinned() -> None:
    from images.common.wheels import pins

    assert set(recipe.read_recipe("debian", "x86_64").wheels) <= set(pins(ROOT / "requirements.lock"))


def test_the_alpine_builder_says_all_that_it_needs(tmp_path: Path) -> None:
    found = recipe.read_recipe("alpine", "x86_64")
    missing = "\n".join(alpine.needs(found, alpine.Options(), "x86_64"))
    for what in ("--apk", "--mirror", "--keys"):
        assert what in missing
    mirror = str(tmp_path)
    missing = "\n".join(alpine.needs(found, alpine.Options(mirror=mirror), "x86_64"))
    assert f"{mirror}/v3.22/main/x86_64/APKINDEX.tar.gz" in missing
    for line in alpine.repositories(found, alpine.Options(mirror=mirror)):
        index = Path(line.split()[-1]) / "x86_64/APKINDEX.tar.gz"
        index.parent.mkdir(parents=True)
        index.touch()
    assert "APKINDEX" not in "\n".join(alpine.needs(found, alpine.Options(mirror=mirror), "x86_64"))


def test_a_whole_alpine_root_needs_nothing_more(tmp_path: Path) -> None:
    found = recipe.read_recipe("alpine", "x86_64")
    for name in [program.source for program in found.programs] + list(found.data):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert alpine.is_complete(tmp_path, found)
    assert not [what for what in alpine.needs(found, alpine.Options(root=tmp_path), "x86_64") if "root:" not in what]


def test_alpines_installed_packages_are_listed(tmp_path: Path) -> None:
    database = tmp_path / "lib/apk/db/installed"
    database.parent.mkdir(parents=True)
    database.write_text(
        "C:Q1abc=\nP:musl\nV:1.2.5-r10\nA:x86_64\nF:lib\nR:ld-musl-x86_64.so.1\n\nC:Q1def=\nP:ovn\nV:25.09.0-r0\n\n"
    )
    found = alpine.installed(tmp_path, "x86_64")
    assert [(p.name, p.version, p.sha256) for p in found] == [
        ("musl", "1.2.5-r10", "Q1abc="),
        ("ovn", "25.09.0-r0", "Q1def="),
    ]


def test_sources_from_outside_are_what_the_manifest_pins(tmp_path: Path) -> None:
    place = tmp_path / "sources" / f"{'0' * 64}-a.tar.xz"
    place.parent.mkdir()
    place.write_bytes(b"something else")
    with pytest.raises(Exception, match=r"is not what image\.toml pins"):
        alpine.fetch("file:///nowhere/a.tar.xz", "0" * 64, tmp_path)
    assert not place.exists()


def test_extensions_have_their_architectures_name(tmp_path: Path) -> None:
    folder = tmp_path / "usr/lib/python3.13/lib-dynload"
    folder.mkdir(parents=True)
    (folder / "_ctypes.cpython-313-aarch64-linux-gnu.so").touch()
    name = "/usr/lib/python3.13/lib-dynload/_ctypes.cpython-313-x86_64-linux-gnu.so"
    assert interpreter._extension(tmp_path, name) == folder / "_ctypes.cpython-313-aarch64-linux-gnu.so"


def test_the_tree_has_a_merged_usr(tmp_path: Path) -> None:
    tree.lay_out(tmp_path)
    assert [str((tmp_path / name).readlink()) for name in ("bin", "sbin", "lib")] == ["usr/bin", "usr/sbin", "usr/lib"]
    assert (tmp_path / "tmp").stat().st_mode & 0o7777 == 0o1777


def test_the_command_has_help_with_an_example() -> None:
    command = [str(ROOT / "images/alpine-helper/build"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "example: images/alpine-helper/build --arch x86_64" in shown
    assert "--mirror" in shown
