"""The image's Python: the modules that the agent imports, compiled, and nothing else."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from images.common import python, wheels
from images.common.tools import BuildError, run

from .recipe import CHECKOUT, Recipe

SITE = "usr/lib/taploom"
_EXTENSION = re.compile(r"\.cpython-\d+-[\w-]+\.so$")


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


def trace(root: Path, recipe: Recipe) -> set[str]:
    """The files that the program imports in this root, as paths in it; runs the interpreter of the root in it.

    Raises:
        BuildError: not root, or the program cannot be imported.
    """
    shutil.copy(python.TRACER, root / "tracer.py")
    report = root / "traced"
    report.unlink(missing_ok=True)
    # The agent leaves modules out before it imports anything, and so must this.
    interpreter = f"/usr/bin/python{recipe.python}"
    options = ["-I", "-S", "-B", "/tracer.py", "--report", "/traced", "--path", f"/{SITE}"]
    later = [name for name in recipe.python_later if name != "taploom.lean"]
    (root / SITE / "_traced.py").write_text(
        "from taploom.lean import without_unused\nwithout_unused()\n"
        f"import importlib\nfor name in {[recipe.python_program, *later]!r}:\n    importlib.import_module(name)\n"
    )
    run(["chroot", root, interpreter, *options, "_traced"])
    used = python.used_modules([report])
    for name in ("tracer.py", "traced", f"{SITE}/_traced.py"):
        (root / name).unlink()
    return {path for path in used if path not in {"/tracer.py", f"/{SITE}/_traced.py"}}


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
    for name in (f"/usr/lib/python{recipe.python}/os.py", *modules):
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
    folders = ":".join(str(interpreter_root / folder) for folder in recipe.library_folders)
    command: list[str | Path] = [linker, "--library-path", folders, interpreter_root / binary]
    python.compile_into(sources, tree, interpreter=command, optimize=1)
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
