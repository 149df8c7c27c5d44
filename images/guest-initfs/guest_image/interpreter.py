"""The interpreter in the image: cut to what the agent imports, by running it, and checked by running it again."""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from images.common import bundle, debian, wheels
from images.common import python as pythons
from images.common.exercise import Exercise
from images.common.tools import BuildError

from .recipe import CHECKOUT, FILES, Recipe

_NATIVE = {"x86_64": "x86_64", "aarch64": "arm64"}
_TRIPLETS = {"x86_64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}
_LOADERS = ("usr/lib64/ld-linux-*.so.*", "usr/lib/ld-linux-*.so.*", "usr/lib/*/ld-linux-*.so.*")
_OPTIMIZE = 2
_EXERCISE = Path(__file__).with_name("exercise.py")


def native_arch() -> str:
    """The architecture whose interpreter runs on this machine.

    Raises:
        BuildError: none of ours does.
    """
    arch = _NATIVE.get(platform.machine(), "") if platform.system() == "Linux" else ""
    if not arch:
        raise BuildError("the image's interpreter must run to be traced: build on Linux, x86_64 or arm64")
    return arch


@dataclass(frozen=True)
class Trace:
    """What the agent imports: paths in the image; extensions' names have TRIPLET for the architecture's."""

    modules: tuple[str, ...]

    def paths(self, arch: str) -> tuple[str, ...]:
        """The paths for an architecture."""
        return tuple(name.replace("TRIPLET", _TRIPLETS[arch]) for name in self.modules)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.modules, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Trace:
        return cls(tuple(json.loads(path.read_text())))


def full_root(recipe: Recipe, packages: list[debian.Package], found: list[wheels.Wheel], root: Path) -> None:
    """Everything that may be needed, with sources: Debian's packages, the wheels and the checkout's modules."""
    debian.unpack(packages, root)
    folder = root / recipe.folder.lstrip("/")
    for wheel in found:
        wheels.unpack(wheel, folder)
    ignore = shutil.ignore_patterns("__pycache__", "*.binpb")
    for name in ("taploom", recipe.module):
        shutil.copytree(CHECKOUT / name, folder / name, ignore=ignore)
    shutil.copytree(FILES, root, dirs_exist_ok=True)
    shutil.copy(bundle.START, root / bundle.START_PATH.lstrip("/"))
    for name in ("proc", "sys", "dev", "run", "tmp", "root"):
        (root / name).mkdir(exist_ok=True)


def host_command(root: Path) -> list[str | Path]:
    """The command that runs a root's interpreter from outside it, with that root's libraries."""
    loader = next(path for pattern in _LOADERS for path in sorted(root.glob(pattern)))
    libraries = ":".join(str(path) for path in sorted(root.glob("usr/lib/*-linux-gnu")))
    return [loader, "--library-path", libraries, next(root.glob("usr/bin/python3.*"))]


def trace(recipe: Recipe, root: Path) -> Trace:
    """Exercises the agent in the root with everything, and says which modules' files it imported."""
    used = _exercise(recipe).modules(bundle.START_PATH, root, root)
    triplet = _TRIPLETS[native_arch()]
    return Trace(tuple(sorted(name.replace(triplet, "TRIPLET") for name in used if _is_module(recipe, name))))


def put_modules(recipe: Recipe, arch: str, traced: Trace, *, full: Path, root: Path, interpreter: Path) -> None:
    """Puts the traced modules into the image's tree, compiled; ``interpreter`` is a root whose python runs here."""
    modules: dict[str, Path] = {bundle.START_PATH: bundle.START}
    for name in traced.paths(arch):
        source = full / name.lstrip("/")
        if not source.is_file():
            raise BuildError(f"the {arch} packages have no {name}, which the agent imports")
        modules[name] = source
    for landmark in recipe.landmarks:
        name = landmark.removesuffix("c")
        if not name.endswith(".py"):
            continue
        modules.setdefault(name, full / name.lstrip("/"))
    pythons.compile_into(modules, root, interpreter=host_command(interpreter), optimize=_OPTIMIZE)


def put_bundle(recipe: Recipe, traced: Trace, root: Path, interpreter: Path) -> None:
    """Puts the modules into one file; ``interpreter`` is a root with everything whose python runs here."""
    folder = interpreter / recipe.folder.lstrip("/")
    with tempfile.TemporaryDirectory() as work:
        collected = Path(work) / "collected"
        bundle.collect(
            recipe.module,
            folder,
            traced.modules,
            interpreter=host_command(interpreter),
            optimize=_OPTIMIZE,
            out=collected,
        )
        bundle.write(root, recipe.library, recipe.folder, collected=collected)


def verify(recipe: Recipe, full: Path, root: Path) -> None:
    """Exercises the agent in the image's own tree and compares what it imported with what is there.

    Raises:
        BuildError: something fails there, or files that nothing imports; each is named.
    """
    used = _exercise(recipe).modules(f"{bundle.START_PATH}c", full, root)
    pythons.check(_present(recipe, root), used, landmarks=_landmarks(recipe))


def check_names(recipe: Recipe, arch: str, traced: Trace, root: Path) -> None:
    """That a tree that cannot run here has exactly the traced modules.

    Raises:
        BuildError: names the files that nothing imports.
    """
    wanted = {name.removesuffix(".py") + ".pyc" if name.endswith(".py") else name for name in traced.paths(arch)}
    pythons.check(_present(recipe, root), wanted, landmarks=_landmarks(recipe))


def _present(recipe: Recipe, root: Path) -> set[str]:
    return pythons.module_files(root, _folders(recipe)) | bundle.modules(root).keys()


def _landmarks(recipe: Recipe) -> tuple[str, ...]:
    return (*recipe.landmarks, *bundle.OWN)


def _folders(recipe: Recipe) -> tuple[str, ...]:
    return recipe.library, recipe.folder


def _is_module(recipe: Recipe, name: str) -> bool:
    return any(name.startswith(f"{folder}/") for folder in _folders(recipe)) and name != bundle.START_PATH


def _exercise(recipe: Recipe) -> Exercise:
    return Exercise(_EXERCISE, recipe.interpreter, recipe.folder, recipe.module, later=recipe.lazy)
