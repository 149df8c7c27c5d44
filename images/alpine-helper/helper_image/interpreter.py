"""The image's Python: the modules that the agent imports, compiled into one file, and nothing else."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from images.common import bundle, python, wheels
from images.common.exercise import Exercise
from images.common.tools import BuildError

from .recipe import CHECKOUT, FILES, Recipe

SITE = "usr/lib/taploom"
_OPTIMIZE = 2
_EXTENSION = re.compile(r"\.cpython-\d+-[\w-]+\.so$")


def prepare(root: Path) -> None:
    """What programs need to run in a root of unpacked packages, and no maintainer script has made."""
    for name in ("proc", "sys", "dev", "run", "tmp", "etc"):
        (root / name).mkdir(exist_ok=True)
    for name in ("passwd", "group", "protocols", "nsswitch.conf", "hosts"):
        shutil.copy(FILES / name, root / "etc" / name)
    # Links to files that only maintainer scripts or the machine would have.
    for path in [path for path in root.rglob("*") if path.is_symlink()]:
        target = str(path.readlink())
        if target.startswith("/") and not (root / target[1:]).exists():
            path.unlink()


def install_sources(root: Path, recipe: Recipe, found: Iterable[wheels.Wheel]) -> None:
    """Puts our modules and their libraries, with sources, into a distribution's root."""
    site = root / SITE
    site.mkdir(parents=True)
    for wheel in found:
        wheels.unpack(wheel, site)
    for name in recipe.python_modules:
        ignored = shutil.ignore_patterns("__pycache__", "*.binpb")
        shutil.copytree(CHECKOUT / name, site / name, ignore=ignored)
    # Open vSwitch's own library, where the distribution has it; its C extension is for its distribution's Python only.
    packaged = [path for path in root.glob("usr/lib/python3*/*-packages/ovs") if path.is_dir()]
    if not packaged:
        raise BuildError("the packages have no Python library of Open vSwitch (python3-openvswitch, py3-openvswitch)")
    shutil.copytree(packaged[0], site / "ovs", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(bundle.START, root / bundle.START_PATH.lstrip("/"))


def trace(root: Path, recipe: Recipe) -> set[str]:
    """The files that the agent imports when it does all that it can, in this root; as paths in it, sources.

    Raises:
        BuildError: not root, or the agent fails.
    """
    used = _exercise(recipe).modules(bundle.START_PATH, root, root)
    return {name for name in used if _is_module(name, recipe)}


def verify(root: Path, tree: Path, recipe: Recipe) -> None:
    """Has the agent do all that it can in the image's own tree.

    Raises:
        BuildError: something is missing there, or nothing imports a file; each is named.
    """
    present = python.module_files(tree, _folders(recipe)) | bundle.modules(tree).keys()
    landmark = f"{_library(recipe)}/os.pyc"
    used = _exercise(recipe).modules(f"{bundle.START_PATH}c", root, tree)
    python.check(present, used, landmarks=[landmark, *bundle.OWN])


def _library(recipe: Recipe) -> str:
    return f"/usr/lib/python{recipe.python}"


def _folders(recipe: Recipe) -> tuple[str, str]:
    return _library(recipe), f"/{SITE}"


def _is_module(name: str, recipe: Recipe) -> bool:
    return any(name.startswith(f"{folder}/") for folder in _folders(recipe)) and name != bundle.START_PATH


def _exercise(recipe: Recipe) -> Exercise:
    return Exercise(
        Path(__file__).with_name("exercise.py"),
        f"/usr/bin/python{recipe.python}",
        f"/{SITE}",
        recipe.python_program,
        later=recipe.python_later,
        options=("--state-dir", "{shared}/state", "--net", "kernel"),
    )


def install(
    root: Path,
    tree: Path,
    recipe: Recipe,
    *,
    modules: set[str],
    versions: Mapping[str, str],
    interpreter_root: Path,
) -> list[Path]:
    """Puts the interpreter and these modules into the image's tree, compiled.

    Args:
        root: the distribution's root for the image's architecture.
        modules: as traced, maybe in a root of another architecture.
        versions: of the wheels, by name.
        interpreter_root: the root whose interpreter runs here.

    Returns:
        The files in `root` that were taken and may need libraries.
    """
    binary = f"usr/bin/python{recipe.python}"
    taken = [root / binary]
    (tree / "usr/bin").mkdir(parents=True, exist_ok=True)
    shutil.copy(root / binary, tree / binary)
    (tree / "usr/bin/python3").symlink_to(f"python{recipe.python}")
    sources: dict[str, Path] = {}
    # By os.pyc the interpreter knows its library's folder (Modules/getpath.py), and reads the module from itself.
    for name in (f"{_library(recipe)}/os.py", bundle.START_PATH, *modules):
        source = root / name.lstrip("/")
        if _EXTENSION.search(name):
            source = _extension(root, name)
            taken.append(source)
            name = f"/{source.relative_to(root)}"  # noqa: PLW2901 -- the name that it has on this architecture
        sources[name] = source
    missing = sorted(name for name, source in sources.items() if not source.is_file())
    if missing:
        raise BuildError(f"traced, but not in the image's packages: {', '.join(missing)}")
    # By way of its dynamic linker: this machine's libc may be older than the interpreter's.
    linker = _linker(interpreter_root)
    folders = ":".join(map(str, _library_folders(interpreter_root, recipe)))
    command: list[str | Path] = [linker, "--library-path", folders, interpreter_root / binary]
    python.compile_into(sources, tree, interpreter=command, optimize=_OPTIMIZE)
    with tempfile.TemporaryDirectory() as work:
        collected = Path(work) / "collected"
        bundle.collect(
            recipe.python_program,
            interpreter_root / SITE,
            modules,
            interpreter=command,
            optimize=_OPTIMIZE,
            out=collected,
        )
        bundle.write(tree, _library(recipe), f"/{SITE}", collected=collected)
    for name in recipe.recorded:
        (tree / SITE / f"{name}-{versions[name]}.dist-info").mkdir(parents=True)
    return taken


def _extension(root: Path, name: str) -> Path:
    """The extension module in this root, whatever its architecture is called in the file's name."""
    traced = Path(name.lstrip("/"))
    stem = _EXTENSION.sub("", traced.name)
    found = sorted((root / traced.parent).glob(f"{stem}.cpython-*.so"))
    if not found:
        raise BuildError(f"{name} was traced, but {root} has no {stem} for its architecture")
    return found[0]


def _library_folders(root: Path, recipe: Recipe) -> list[Path]:
    """Where a root has its libraries; it may be of another architecture than the image, and Debian's name that."""
    return [*sorted(root.glob("usr/lib/*-linux-gnu")), *(root / folder for folder in recipe.library_folders)]


def _linker(root: Path) -> Path:
    for pattern in (
        "lib64/ld-linux-*.so.*",
        "usr/lib64/ld-linux-*.so.*",
        "usr/lib/ld-linux-*.so.*",
        "lib/ld-musl-*.so.1",
    ):
        for path in sorted(root.glob(pattern)):
            return path
    raise BuildError(f"{root} has no dynamic linker")
