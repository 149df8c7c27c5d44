"""The image from Debian's packages."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from images.common import cpio, debian, elf, wheels
from images.common.cache import cached, file_sha256, inputs_hash
from images.common.init import build_init
from images.common.manifest import build_manifest, write_manifest
from images.common.tools import BuildError, debian_architecture, run
from taploom import __version__

from . import interpreter
from .apple import write_init_image
from .recipe import CHECKOUT, FOLDER, LOCK, Recipe

INITFS = "guest-initfs.cpio.zst"
_INIT = "usr/sbin/taploom-init"
_POWER = ("poweroff", "reboot", "halt", "shutdown")
_COMMON = CHECKOUT / "images/common"
_OWN = ("recipe", "interpreter", "exercise", "debian_builder", "apple")
# What else decides about the bytes; a README or the other builder does not.
_PARTS = [FOLDER / "image.toml", FOLDER / "files", _COMMON, *(FOLDER / f"guest_image/{name}.py" for name in _OWN)]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Inputs:
    """All that decides about the image's bytes."""

    arch: str
    packages: list[debian.Package]
    native: list[debian.Package]
    wheels: list[wheels.Wheel]
    init: Path
    musl: debian.Package
    vminit: Path | None = None

    @property
    def key(self) -> str:
        """The hash of it all."""
        sums = [package.sha256 for package in (*self.packages, *self.native, self.musl)]
        sums += [wheel.sha256 for wheel in self.wheels]
        if self.vminit is not None:
            sums.append(file_sha256(self.vminit / "index.json"))
        texts = [self.arch, run(["zstd", "--version"]), *sums]
        return inputs_hash(texts, [*_PARTS, *_code()], CHECKOUT)


def gather(recipe: Recipe, arch: str, *, cache: Path, update: bool, vminit: Path | None, say: Say) -> Inputs:
    """Finds and downloads what the image is made of."""
    debian_architecture(arch)
    native = interpreter.native_arch()
    say("packages")
    found = {
        each: debian.packages(recipe.suite, each, recipe.packages, cache=cache, update=update, closure=False)
        for each in {arch, native}
    }
    say("wheels")
    pinned = wheels.wheels(LOCK, recipe.wheels, python=recipe.python, cache=cache)
    say("init")
    init, musl = build_init(arch, cache=cache, update=update)
    return Inputs(arch, found[arch], found[native], pinned, init, musl, vminit)


def build(recipe: Recipe, inputs: Inputs, *, cache: Path, say: Say) -> tuple[Path, bool]:
    """The directory with the outputs, from the cache when the inputs were built before; and whether they were."""

    def fill(place: Path) -> None:
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=".work-") as work:
            _build(recipe, inputs, Path(work), place, cache=cache, say=say)

    return cached(cache, f"guest-initfs/{inputs.arch}", inputs.key, fill)


def _build(recipe: Recipe, inputs: Inputs, work: Path, place: Path, *, cache: Path, say: Say) -> None:
    began = time.monotonic()
    native = interpreter.native_arch()
    full, native_full = work / "full", work / "native"
    say("unpacking")
    interpreter.full_root(recipe, inputs.native, inputs.wheels, native_full)
    if inputs.arch == native:
        full = native_full
    else:
        interpreter.full_root(recipe, inputs.packages, inputs.wheels, full)
    say("running the agent to see what it imports")
    traced = _trace(recipe, inputs, native_full, cache)
    say(f"putting together {len(traced.modules)} modules")
    root = work / "root"
    _skeleton(recipe, inputs, full, root, _applets(native_full))
    interpreter.put_modules(recipe, inputs.arch, traced, full=full, root=root, interpreter=native_full)
    interpreter.put_bundle(recipe, traced, root, native_full)
    _libraries(recipe, full, root)
    if inputs.arch == native:
        say("running the agent in the image to see that nothing is missing or idle")
        interpreter.verify(recipe, native_full, root)
    else:
        interpreter.check_names(recipe, inputs.arch, traced, root)
    for path in (root / "run", root / "tmp"):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
    say("packing")
    archive = work / "guest-initfs.cpio"
    cpio.write_newc(root, archive, devices=cpio.CONSOLE)
    cpio.compress(archive, place / INITFS)
    size = (place / INITFS).stat().st_size
    if size > recipe.max_compressed:
        raise BuildError(f"the image has {size:,} bytes compressed; more than {recipe.max_compressed:,} are not wanted")
    (work / "oci").mkdir()
    write_init_image(root, inputs.arch, work / "oci", place / "oci", vminit=inputs.vminit, version=__version__)
    content = build_manifest(
        image=recipe.name,
        arch=inputs.arch,
        builder="debian",
        version=__version__,
        inputs=inputs.key,
        packages=[*inputs.packages, inputs.musl],
        wheels=inputs.wheels,
        root=root,
        outputs=[place / INITFS],
        extra={"modules": len(traced.modules)},
    )
    write_manifest(content, place / "manifest.json")
    (place / "seconds").write_text(f"{time.monotonic() - began:.1f}\n")


def _trace(recipe: Recipe, inputs: Inputs, full: Path, cache: Path) -> interpreter.Trace:
    """Traced once for all architectures."""
    sums = [package.sha256 for package in inputs.native] + [wheel.sha256 for wheel in inputs.wheels]
    key = inputs_hash(sums, [*_PARTS, *_code()], CHECKOUT)
    place, _ = cached(
        cache, "guest-trace", key, lambda new: interpreter.trace(recipe, full).write(new / "modules.json")
    )
    return interpreter.Trace.read(place / "modules.json")


def _code() -> list[Path]:
    return [CHECKOUT / "agent_guest", CHECKOUT / "taploom"]


def _applets(full: Path) -> list[str]:
    return run([full / "usr/bin/busybox", "--list"]).split()


def _skeleton(recipe: Recipe, inputs: Inputs, full: Path, root: Path, applets: list[str]) -> None:
    """Folders, our files but for Python sources, busybox and init with their names."""
    for name in ("usr/bin", "usr/sbin", "usr/lib", "proc", "sys", "dev", "run", "tmp", "root", "etc", "mnt", "sysroot"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in ("bin", "sbin", "lib"):
        (root / name).symlink_to(f"usr/{name}")
    shutil.copytree(FOLDER / "files", root, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for program in recipe.programs:
        _copy(full / program.lstrip("/"), root / program.lstrip("/"))
    for metadata in (full / recipe.folder.lstrip("/")).glob("*.dist-info"):
        # Its name says the version (taploom.lean).
        (root / recipe.folder.lstrip("/") / metadata.name).mkdir(parents=True)
    (root / "usr/bin/python3").symlink_to(f"python{recipe.python}")
    _copy(inputs.init, root / _INIT)
    (root / "init").symlink_to(_INIT)
    (root / "usr/sbin/init").symlink_to("taploom-init")
    for name in _POWER:
        (root / "usr/sbin" / name).symlink_to("taploom-init")
    taken = {path.name for folder in ("usr/bin", "usr/sbin") for path in (root / folder).iterdir()}
    for name in applets:
        if name not in taken:
            (root / "usr/bin" / name).symlink_to("busybox")


def _libraries(recipe: Recipe, full: Path, root: Path) -> None:
    """The shared libraries and the loader that the programs and extension modules need."""
    files = [full / program.lstrip("/") for program in recipe.programs]
    files += [full / path.relative_to(root) for path in root.rglob("*.so")]
    for library in elf.libraries(full, files):
        target = root / library.relative_to(full)
        target.parent.mkdir(parents=True, exist_ok=True)
        if library.is_symlink():
            target.symlink_to(library.readlink())
        else:
            _copy(library, target)
    if (root / "usr/lib64").is_dir():
        (root / "lib64").symlink_to("usr/lib64")


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o755)
