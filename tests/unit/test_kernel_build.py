"""kernel/build without a build: sources that are refused, the cache's key, what is kept out of the environment."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from images.common.tools import BuildError
from kernel.builder.cli import ROOT, cache_key
from kernel.builder.compilation import clean_environment
from kernel.builder.progress import Progress, clock
from kernel.builder.recipe import TARGETS, cross_prefix, make_variables
from kernel.builder.source import KNOWN, Source, known_sums, tarball_source, unpack
from kernel.builder.toolchain import Toolchain

TOOLS = Toolchain("gcc 12", "ld 2.40", "pahole 1.24", "lz4 1.9")
SOURCE = Source("tarball", "", "0" * 64, Path("/nowhere/linux.tar.xz"))


def test_a_tarball_must_be_known_or_given_with_its_sum(tmp_path: Path) -> None:
    path = tmp_path / "linux-6.12.tar"
    path.write_bytes(b"not linux")
    sum_ = hashlib.sha256(b"not linux").hexdigest()
    with pytest.raises(BuildError, match=r"not known here.*--sha256"):
        tarball_source(path)
    with pytest.raises(BuildError, match="do not use it"):
        tarball_source(path, "0" * 64)
    assert tarball_source(path, sum_.upper()).sha256 == sum_
    known = tmp_path / "sums"
    known.write_text(f"# ours\n{sum_}  linux-6.12.tar\n")
    assert tarball_source(path, known=known).sha256 == sum_
    with pytest.raises(BuildError, match="no file"):
        tarball_source(tmp_path / "missing.tar.xz")


def test_the_known_sums_are_sums() -> None:
    sums = known_sums(KNOWN)
    assert sums
    assert all(len(one) == 64 and set(one) <= set("0123456789abcdef") for one in sums)


def test_a_tarball_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.tar"
    with tarfile.open(path, "w") as archive:
        entry = tarfile.TarInfo("other-1.0/README")
        entry.size = 2
        archive.addfile(entry, io.BytesIO(b"hi"))
    with pytest.raises(BuildError, match="not the source of a Linux kernel"):
        unpack(replace(SOURCE, path=path), tmp_path / "tree")
    assert (tmp_path / "tree/README").read_text() == "hi"


def test_the_key_changes_with_all_that_decides() -> None:
    symbols = {"NET": "y", "NR_CPUS": "64"}
    keys = {
        cache_key("x86_64", SOURCE, symbols, TOOLS),
        cache_key("arm64", SOURCE, symbols, TOOLS),
        cache_key("x86_64", replace(SOURCE, sha256="1" * 64), symbols, TOOLS),
        cache_key("x86_64", SOURCE, symbols | {"NET": "n"}, TOOLS),
        cache_key("x86_64", SOURCE, symbols | {"INET": "y"}, TOOLS),
        cache_key("x86_64", SOURCE, symbols, replace(TOOLS, compiler="gcc 14")),
        cache_key("x86_64", SOURCE, symbols, replace(TOOLS, pahole="1.30")),
    }
    assert len(keys) == 7
    again = cache_key("x86_64", replace(SOURCE, path=Path("/elsewhere")), dict(reversed(symbols.items())), TOOLS)
    assert again in keys


def test_the_callers_environment_changes_no_build() -> None:
    outside = {
        "PATH": "/usr/bin",
        "HOME": "/root",
        "CFLAGS": "-O0",
        "MAKEFLAGS": "-j99",
        "KBUILD_BUILD_USER": "me",
        "ARCH": "mips",
        "LC_ALL": "de_DE.UTF-8",
        "SOURCE_DATE_EPOCH": "1",
    }
    assert clean_environment(outside) == {"PATH": "/usr/bin", "HOME": "/root", "LC_ALL": "C", "TZ": "UTC"}


@pytest.mark.parametrize("arch", TARGETS)
def test_variables_hide_directories_and_times(arch: str) -> None:
    variables = make_variables(arch, Path("/src"), Path("/obj"))
    assert "-ffile-prefix-map=/src=." in variables["KCFLAGS"]
    assert "-ffile-prefix-map=/obj=." in variables["KCFLAGS"]
    assert variables["KBUILD_BUILD_TIMESTAMP"].endswith("2026")
    assert cross_prefix(arch) in {"", "aarch64-linux-gnu-", "x86_64-linux-gnu-"}


def test_progress_is_a_line_now_and_then() -> None:
    stream = io.StringIO()
    progress = Progress("kernel x86_64", stream)
    progress.steps(30, 100, "CC x.o")
    progress.steps(31, 100, "CC y.o")
    progress.steps(500, 100, "CC z.o")
    progress.say("done")
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("kernel x86_64: 30%, 30 of about 100, 0.")
    assert lines[1:] == ["kernel x86_64: done"]
    assert clock(5.25) == "5.2 s"
    assert clock(125) == "2 min 05 s"


def test_the_command_explains_itself() -> None:
    shown = subprocess.run([ROOT / "kernel/build", "--help"], capture_output=True, text=True, check=True)
    assert "example:" in shown.stdout
    assert "--sha256" in shown.stdout
    wrong = subprocess.run([ROOT / "kernel/build", "--arch", "vax"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2


def test_a_wrong_source_fails_with_one_line(tmp_path: Path) -> None:
    command = [
        sys.executable, ROOT / "kernel/build", "--arch", "x86_64", "--source", tmp_path / "none.tar.xz",
        "--cache", tmp_path / "cache", "--output", tmp_path / "out",
    ]  # fmt: skip
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith("kernel/build: ")
    assert not (tmp_path / "out").exists()
