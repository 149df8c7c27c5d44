"""The image builders' shared library: archives that real tools read, and the same bytes each time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from images.common import bundle, cache, cpio, elf, manifest, oci, wheels
from images.common import python as interpreter
from images.common.debian import Package
from images.common.tools import BuildError, run

names = st.text(st.characters(codec="utf-8", exclude_characters="/\0\n\r\\"), min_size=1, max_size=40).filter(
    lambda name: name not in (".", "..", "TRAILER!!!") and len(name.encode()) < 200
)
contents = st.binary(max_size=9)
trees = st.recursive(
    st.tuples(st.just("file"), contents, st.sampled_from([0o644, 0o755, 0o4755, 0o600]))
    | st.tuples(st.just("link"), st.sampled_from(["a", "/etc/x", "../../y z"]), st.just(0)),
    lambda children: st.tuples(st.just("folder"), st.dictionaries(names, children, max_size=4), st.just(0o755)),
    max_leaves=12,
)


def make(tree: object, at: Path) -> None:
    kind, what, mode = tree  # type: ignore[misc]
    if kind == "file":
        at.write_bytes(what)
        at.chmod(mode)
    elif kind == "link":
        at.symlink_to(what)
    else:
        at.mkdir()
        for name, child in what.items():
            make(child, at / name)
        at.chmod(mode)


def listing(root: Path) -> dict[str, tuple[int, bytes]]:
    found = {}
    for path in root.rglob("*"):
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            content = os.fsencode(path.readlink())
        else:
            content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        found[str(path.relative_to(root))] = (status.st_mode, content)
    return found


def unpack_with_cpio(archive: Path, into: Path) -> None:
    into.mkdir()
    with archive.open("rb") as file:
        subprocess.run(
            ["cpio", "--extract", "--quiet", "--preserve-modification-time", "--no-absolute-filenames"],
            stdin=file,
            cwd=into,
            check=True,
            capture_output=True,
        )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=st.dictionaries(names, trees, max_size=4))
def test_cpio_reads_what_we_write(tree: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> None:
    work = tmp_path_factory.mktemp("cpio")
    make(("folder", tree, 0o755), work / "root")
    cpio.write_newc(work / "root", work / "archive", mtime=1_700_000_000)
    unpack_with_cpio(work / "archive", work / "unpacked")
    assert listing(work / "unpacked") == listing(work / "root")
    files = [path for path in (work / "unpacked").rglob("*") if path.is_file() and not path.is_symlink()]
    assert {path.stat().st_mtime for path in files} <= {1_700_000_000}
    assert (work / "archive").stat().st_size % 512 == 0


def test_cpio_keeps_hard_links_and_adds_devices(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    (root / "bin/busybox").write_bytes(b"program" * 1000)
    for applet in ("ls", "sh", "awk"):
        (root / "bin" / applet).hardlink_to(root / "bin/busybox")
    (tmp_path / "outside").hardlink_to(root / "bin/busybox")
    cpio.write_newc(root, tmp_path / "archive", devices=cpio.CONSOLE)
    assert (tmp_path / "archive").stat().st_size < 2 * 7000
    shown = subprocess.run(
        ["cpio", "--list", "--verbose", "--numeric-uid-gid", "--quiet"],
        stdin=(tmp_path / "archive").open("rb"),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LC_ALL": "C", "TZ": "UTC"},
    ).stdout
    assert "crw-------   1 0        0          5,   1 Jan  1  1970 dev/console" in shown
    assert "crw-rw-rw-   1 0        0          1,   3 Jan  1  1970 dev/null" in shown
    if os.geteuid() == 0:
        unpack_with_cpio(tmp_path / "archive", tmp_path / "unpacked")
        one = (tmp_path / "unpacked/bin/busybox").stat()
        assert one.st_size == 7000
        assert one.st_nlink == 4
        assert (tmp_path / "unpacked/bin/awk").stat().st_ino == one.st_ino


def test_cpio_is_the_same_whatever_the_order_of_creation(tmp_path: Path) -> None:
    for number, order in enumerate((("a", "b", "c"), ("c", "a", "b"))):
        root = tmp_path / str(number)
        root.mkdir()
        for name in order:
            (root / name).write_text(name)
        cpio.write_newc(root, tmp_path / f"{number}.cpio")
        cpio.compress(tmp_path / f"{number}.cpio", tmp_path / f"{number}.zst")
    assert (tmp_path / "0.cpio").read_bytes() == (tmp_path / "1.cpio").read_bytes()
    assert (tmp_path / "0.zst").read_bytes() == (tmp_path / "1.zst").read_bytes()


def test_cpio_refuses_sockets_and_pipes(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    os.mkfifo(tmp_path / "root/pipe")
    with pytest.raises(BuildError, match="pipe: neither a file"):
        cpio.write_newc(tmp_path / "root", tmp_path / "archive")


def test_joined_archives_start_at_multiples_of_four(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"x" * 5)
    (tmp_path / "two").write_bytes(b"070701")
    cpio.concatenate([tmp_path / "one", tmp_path / "two"], tmp_path / "joined")
    assert (tmp_path / "joined").read_bytes() == b"xxxxx" + b"\0" * 3 + b"070701"


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "sbin").mkdir(parents=True)
    (root / "sbin/init").write_text("#!/bin/sh\n")
    (root / "sbin/init").chmod(0o755)
    (root / "sbin/poweroff").symlink_to("init")
    (root / "sbin/again").hardlink_to(root / "sbin/init")
    images = [oci.Image(arch, [root], {"Entrypoint": ["/sbin/init"]}) for arch in ("amd64", "arm64")]
    oci.write_layout(images, tmp_path / "layout", name="taploom:test", annotations={"b": "2", "a": "1"})
    return tmp_path / "layout"


def test_an_oci_layout_is_whole_and_says_what_it_was_given(layout: Path) -> None:
    configs = oci.check_layout(layout)
    assert sorted(config["architecture"] for config in configs) == ["amd64", "arm64"]
    assert all(config["config"]["Entrypoint"] == ["/sbin/init"] for config in configs)
    top = json.loads((layout / "index.json").read_text())["manifests"]
    assert [entry["annotations"] for entry in top] == [{"org.opencontainers.image.ref.name": "taploom:test"}]


def test_an_oci_layout_is_reproducible(layout: Path, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "root", tmp_path / "copy", symlinks=True)
    (tmp_path / "copy/sbin/again").unlink()
    (tmp_path / "copy/sbin/again").hardlink_to(tmp_path / "copy/sbin/init")
    images = [oci.Image(arch, [tmp_path / "copy"], {"Entrypoint": ["/sbin/init"]}) for arch in ("amd64", "arm64")]
    oci.write_layout(images, tmp_path / "again", name="taploom:test", annotations={"a": "1", "b": "2"})
    assert listing(tmp_path / "again") == listing(layout)


def test_a_damaged_or_padded_layout_is_found_out(layout: Path) -> None:
    (layout / "blobs/sha256" / ("0" * 64)).write_text("stray")
    with pytest.raises(BuildError, match="nothing refers"):
        oci.check_layout(layout)
    (layout / "blobs/sha256" / ("0" * 64)).unlink()
    largest = max((layout / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"?")
    with pytest.raises(BuildError, match="not what its descriptor says"):
        oci.check_layout(layout)


def test_layers_hold_links_owners_and_modes(layout: Path, tmp_path: Path) -> None:
    oci.write_tar(tmp_path / "root", tmp_path / "layer.tar")
    with tarfile.open(tmp_path / "layer.tar") as archive:
        entries = {entry.name: entry for entry in archive.getmembers()}
    assert list(entries) == sorted(entries)
    assert entries["sbin/init"].islnk() and entries["sbin/init"].linkname == "sbin/again"
    assert entries["sbin/poweroff"].issym()
    assert {(entry.uid, entry.gid, entry.mtime) for entry in entries.values()} == {(0, 0, 0)}
    assert entries["sbin/again"].mode == 0o755


def test_the_cache_builds_once_and_keeps_nothing_of_a_failure(tmp_path: Path) -> None:
    built: list[str] = []

    def build(fail: bool) -> Callable[[Path], None]:
        def fill(place: Path) -> None:
            built.append(place.name)
            (place / "file").write_text("content")
            if fail:
                raise BuildError("no")

        return fill

    with pytest.raises(BuildError):
        cache.cached(tmp_path, "kind/arch", "k" * 64, build(True))
    assert not list((tmp_path / "kind/arch").iterdir())
    place, hit = cache.cached(tmp_path, "kind/arch", "k" * 64, build(False))
    assert not hit and (place / "file").read_text() == "content"
    assert cache.cached(tmp_path, "kind/arch", "k" * 64, build(False)) == (place, True)
    assert len(built) == 2
    for number in range(8):
        cache.cached(tmp_path, "kind/arch", f"{number}" * 64, build(False))
    assert len(list((tmp_path / "kind/arch").iterdir())) == 4


def test_what_is_published_replaces_and_removes_but_does_not_touch_the_same(tmp_path: Path) -> None:
    built, output = tmp_path / "built", tmp_path / "output"
    (built / "deep").mkdir(parents=True)
    (built / "deep/same").write_text("same")
    (built / "changed").write_text("new one")
    cache.publish(built, output)
    inode = (output / "deep/same").stat().st_ino
    (output / "changed").write_text("old one")
    (output / "stale").mkdir()
    (output / "stale/file").write_text("")
    cache.publish(built, output)
    assert listing(output) == listing(built)
    assert (output / "deep/same").stat().st_ino == inode


def test_many_publish_to_one_place_at_once(tmp_path: Path) -> None:
    built, output = tmp_path / "built", tmp_path / "output"
    (built / "deep").mkdir(parents=True)
    for number in range(20):
        (built / "deep" / str(number)).write_text("content" * number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _number: cache.publish(built, output), range(16)))
    assert listing(output) == listing(built)


def test_inputs_differ_by_content_name_mode_and_text(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")

    def now(*texts: str) -> str:
        return cache.inputs_hash(texts, [tmp_path], tmp_path)

    seen = [now("t"), now("t", ""), now("T")]
    (tmp_path / "a").chmod(0o755)
    seen.append(now("t"))
    (tmp_path / "a").rename(tmp_path / "b")
    seen.append(now("t"))
    (tmp_path / "b").write_text("2")
    seen.append(now("t"))
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__/b.pyc").write_text("")
    assert now("t") == seen[-1]
    assert len(set(seen)) == len(seen)


def test_pins_are_read_as_pip_compile_writes_them(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text(
        "# comment\nBetter_Proto.2==0.10.0 \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\n    # via taploom\n"
        "h2[x]==4.1 \\\n    --hash=sha256:cc\n"
    )
    assert wheels.pins(lock) == {
        "better-proto-2": "Better_Proto.2==0.10.0 \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\n",
        "h2": "h2[x]==4.1 \\\n    --hash=sha256:cc\n",
    }
    with pytest.raises(BuildError, match="does not pin trio"):
        wheels.wheels(lock, ["trio"], python="3.13", cache=tmp_path)


def test_the_projects_own_lock_file_pins_wheels_that_pip_finds(tmp_path: Path) -> None:
    lock = Path(__file__).parents[2] / "requirements.lock"
    [wheel] = wheels.wheels(lock, ["hpack"], python="3.13", cache=tmp_path)
    assert wheel.sha256 == hashlib.sha256(wheel.path.read_bytes()).hexdigest()
    assert f"--hash=sha256:{wheel.sha256}" in wheels.pins(lock)["hpack"]
    wheels.unpack(wheel, tmp_path / "root")
    assert (tmp_path / "root/hpack/__init__.py").is_file()
    assert sorted(path.name for path in (tmp_path / "root").iterdir()) == ["hpack", f"hpack-{wheel.version}.dist-info"]
    assert not any((tmp_path / f"root/hpack-{wheel.version}.dist-info").iterdir())


@pytest.mark.parametrize("member", ["pkg/_native.so", "../outside.py"])
def test_a_wheel_that_is_not_pure_or_leaves_its_folder_is_refused(tmp_path: Path, member: str) -> None:
    path = tmp_path / "pkg-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, "")
    with pytest.raises(BuildError):
        wheels.unpack(wheels.Wheel("pkg", "1.0", "", path), tmp_path / "root")
    assert not (tmp_path / "outside.py").exists()


def test_libraries_of_a_program_as_the_loader_sees_them(tmp_path: Path) -> None:
    program = Path(sys.executable).resolve()
    loaded = set()
    for line in run(["ldd", program]).splitlines():
        path = next((word for word in line.split() if word.startswith("/")), "")
        loaded |= {Path(path).name} if path else set()
    assert {path.name for path in elf.libraries(Path("/"), [program])} >= loaded
    (tmp_path / "program").write_bytes(program.read_bytes())
    with pytest.raises(BuildError, match="which no package of the image has"):
        elf.libraries(tmp_path, [tmp_path / "program"])
    (tmp_path / "script").write_text("#!/bin/sh")
    assert elf.needed(tmp_path / "script") == []


PROGRAM = """
import colorsys
def main():
    import sndlib.lazy
if __name__ == "__main__":
    main()
"""


def test_tracing_compiling_and_checking_an_interpreters_tree(tmp_path: Path) -> None:
    modules = tmp_path / "lib"
    (modules / "sndlib").mkdir(parents=True)
    (modules / "program.py").write_text(PROGRAM)
    for name in ("__init__", "lazy", "declared", "idle"):
        (modules / "sndlib" / f"{name}.py").write_text(f'"""Docs."""\nassert {name!r}\n')

    def traced(folder: Path, report: Path) -> set[str]:
        command = [sys.executable, "-I", "-B", interpreter.TRACER, "--report", report, "--path", folder]
        run([*command, "--import", "sndlib.declared", "program"])
        return interpreter.used_modules([report])

    used = {name for name in traced(modules, tmp_path / "report") if name.startswith(str(modules))}
    assert {Path(name).name for name in used} == {"program.py", "__init__.py", "lazy.py", "declared.py"}
    root = tmp_path / "image"
    image_paths = {f"/app/{Path(name).relative_to(modules)}": Path(name) for name in used}
    interpreter.compile_into(image_paths, root, interpreter=[sys.executable])
    present = interpreter.module_files(root, ["/app"])
    assert present == {
        "/app/program.pyc",
        "/app/sndlib/__init__.pyc",
        "/app/sndlib/lazy.pyc",
        "/app/sndlib/declared.pyc",
    }
    assert b"Docs." not in (root / "app/sndlib/lazy.pyc").read_bytes()
    again = (
        interpreter.used_modules([tmp_path / "report2"], below=root)
        if traced(root / "app", tmp_path / "report2")
        else set()
    )
    interpreter.check(present, again)
    interpreter.compile_into({"/app/sndlib/idle.py": modules / "sndlib/idle.py"}, root, interpreter=[sys.executable])
    present = interpreter.module_files(root, ["/app"])
    with pytest.raises(BuildError, match=r"nothing imports[^/]*\n  /app/sndlib/idle.pyc$"):
        interpreter.check(present, again)
    interpreter.check(present, again, landmarks=["/app/sndlib/idle.pyc"])
    second = tmp_path / "second"
    interpreter.compile_into(image_paths, second, interpreter=[sys.executable])
    (root / "app/sndlib/idle.pyc").unlink()
    assert listing(second) == listing(root)


def test_a_manifest_names_packages_files_and_outputs(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root/init").write_text("12345")
    (tmp_path / "out").write_text("abc")
    package = Package("zlib1g", "1:1.3", "amd64", "ff", tmp_path / "z.deb")
    content = manifest.build_manifest(
        image="test",
        arch="x86_64",
        builder="debian",
        version="1.0",
        inputs="00",
        packages=[package],
        wheels=[],
        root=tmp_path / "root",
        outputs=[tmp_path / "out"],
    )
    manifest.write_manifest(content, tmp_path / "manifest.json")
    read = json.loads((tmp_path / "manifest.json").read_text())
    assert read["packages"] == [{"name": "zlib1g", "version": "1:1.3", "architecture": "amd64", "sha256": "ff"}]
    assert read["files"] == {"/init": 5} and read["unpacked_bytes"] == 5
    assert read["outputs"]["out"] == {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}


BUNDLED = """
import re
from dataclasses import dataclass

def load():
    from bundled import later
    return run

@dataclass(frozen=True)
class Point:
    x: int

def run(argv):
    namespace = {}
    exec("here = 1", namespace)
    exec("there = 2")
    print(Point(1), hash(Point(1)) == hash(Point(1)), re.fullmatch(r"(?P<n>a+)b", "aab")["n"], argv, namespace["here"])
    return 0
"""


def test_a_program_starts_from_its_bundle_alone(tmp_path: Path) -> None:
    site = tmp_path / "full/usr/lib/taploom"
    (site / "bundled").mkdir(parents=True)
    (site / "bundled/__init__.py").write_text("")
    (site / "bundled/__main__.py").write_text(BUNDLED)
    (site / "bundled/later.py").write_text("import re\nre.compile('late')\n")
    folder = f"{bundle.START_PATH.rpartition('/')[0]}"
    names = ["bundled/__init__.py", "bundled/__main__.py", "bundled/later.py"]
    made = []
    for number in ("1", "2"):
        root = tmp_path / number
        sources = {f"{folder}/{name}": site / name for name in names} | {bundle.START_PATH: bundle.START}
        interpreter.compile_into(sources, root, interpreter=[sys.executable])
        collected = tmp_path / f"collected{number}"
        bundle.collect("bundled", site, sources, interpreter=[sys.executable], optimize=2, out=collected)
        (root / "usr/lib/python").mkdir()
        bundle.write(root, "/usr/lib/python", folder, collected=collected)
        made.append((root / bundle.BUNDLE_PATH.lstrip("/")).read_bytes())
    assert made[0] == made[1]
    assert bundle.modules(tmp_path / "1").keys() == {f"{folder}/{name}c" for name in names}
    assert interpreter.module_files(tmp_path / "1", [folder]) == set(bundle.OWN)
    start = tmp_path / "start.py"
    start.write_text(bundle.START.read_text().replace(folder, f"{tmp_path}/1{folder}"))

    said = run([sys.executable, "-I", "-S", "-B", start, "bundled", "an", "argument"])
    assert said == "Point(x=1) True aa ['an', 'argument'] 1\n"
