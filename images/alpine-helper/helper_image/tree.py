"""The image's files, taken out of a distribution's root."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from images.common import elf
from images.common.tools import BuildError
from images.common.wheels import Wheel

from . import interpreter
from .recipe import FILES, Program, Recipe

Say = Callable[[str], None]

_LIBRARY_SUFFIX = ".so"


def fill(
    root: Path,
    place: Path,
    tools_place: Path,
    recipe: Recipe,
    *,
    modules: set[str],
    found: Iterable[Wheel],
    interpreter_root: Path,
    init: Path,
    say: Say,
) -> set[str]:
    """Fills the image's tree out of a distribution's root, and another with the tools and what only they need.

    Args:
        modules: the interpreter's, as traced.
        found: the wheels that are in the root.
        interpreter_root: the root whose interpreter runs here; the same unless the image is for another architecture.
        init: PID 1.

    Returns:
        The files that were taken, as paths in the root.

    Raises:
        BuildError: something is not in the root, or is in the image and of no use.
    """
    lay_out(place)
    users = install_programs(root, place, recipe.programs)
    users += interpreter.install(
        root,
        place,
        recipe,
        modules=modules,
        versions={wheel.name: wheel.version for wheel in found},
        interpreter_root=interpreter_root,
    )
    copied = install_libraries(root, place, users, recipe)
    install_data(root, place, recipe)
    if interpreter_root is root:
        say("running the agent in the image, to see that nothing is missing and nothing is idle")
        interpreter.verify(root, place, recipe)
    shutil.copy(init, place / "init")
    (place / "usr/sbin/init").symlink_to("/init")
    tool_files = install_programs(root, tools_place, recipe.tools)
    for name in sorted(install_libraries(root, tools_place, tool_files, recipe, links=False) & copied):
        (tools_place / name).unlink(missing_ok=True)
    _prune(tools_place)
    taken = {str(user.relative_to(root)) for user in users + tool_files} | copied | set(recipe.data)
    return taken | {name.lstrip("/") for name in modules}


def _prune(place: Path) -> None:
    for path in sorted((p for p in place.rglob("*") if p.is_dir() and not p.is_symlink()), reverse=True):
        if not any(path.iterdir()):
            path.rmdir()


def lay_out(tree: Path) -> None:
    """The directories, and the links of a merged /usr."""
    for name in (
        "usr/bin",
        "usr/sbin",
        "usr/lib",
        "etc/taploom",
        "proc",
        "sys",
        "dev",
        "run",
        "tmp",
        "var",
        "root",
        "mnt",
    ):
        (tree / name).mkdir(parents=True, exist_ok=True)
    for name in ("bin", "sbin", "lib"):
        (tree / name).symlink_to(f"usr/{name}")
    for directory in (path for path in tree.rglob("*") if path.is_dir() and not path.is_symlink()):
        directory.chmod(0o755)
    (tree / "tmp").chmod(0o1777)
    (tree / "root").chmod(0o700)


def install_programs(root: Path, tree: Path, programs: Iterable[Program]) -> list[Path]:
    """Copies programs; returns their files in the root, whose libraries are needed too.

    Raises:
        BuildError: one is not in the packages.
    """
    taken = []
    for program in programs:
        source = root / program.source
        if not source.is_file():
            raise BuildError(f"none of the packages has /{program.source}")
        target = tree / program.path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        target.chmod(0o755)
        taken.append(source)
    return taken


def install_libraries(root: Path, tree: Path, users: Iterable[Path], recipe: Recipe, *, links: bool = True) -> set[str]:
    """Copies the libraries of these files, links to them included; returns their paths in the root.

    Args:
        links: whether the dynamic linker's well-known path is made, too, where it is not below /lib.
    """
    copied = set()
    root = root.resolve()
    for path in sorted(elf.libraries(root, [user.resolve() for user in users], folders=recipe.library_folders)):
        name = path.relative_to(root)
        target = tree / _merged(tree, name)
        copied.add(str(name))
        if target.is_symlink() or target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            target.symlink_to(path.readlink())
        else:
            shutil.copyfile(path, target)
            target.chmod(0o755)
    if links and (root / "lib64").exists() and any(path.parent.name == "lib64" for path in tree.glob("usr/lib64/*")):
        (tree / "lib64").symlink_to("usr/lib64")
    return copied


def _merged(tree: Path, name: Path) -> Path:
    """Alpine's /lib is a directory of its own; here it is a link to usr/lib."""
    return Path("usr") / name if (tree / name.parts[0]).is_symlink() else name


def install_data(root: Path, tree: Path, recipe: Recipe) -> None:
    """The schemas, our own settings, and busybox's links.

    Raises:
        BuildError: a file is in none of the packages.
    """
    for name in recipe.data:
        if not (root / name).is_file():
            raise BuildError(f"none of the packages has /{name}")
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, tree / name)
    for name, target in (
        ("init.conf", "etc/taploom/init.conf"),
        ("udhcpc", "usr/share/udhcpc/default.script"),
        *((name, f"etc/{name}") for name in ("passwd", "group", "protocols", "nsswitch.conf", "hosts")),
    ):
        (tree / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(FILES / name, tree / target)
        (tree / target).chmod(0o755 if name == "udhcpc" else 0o644)
    for applet in recipe.applets:
        link = tree / "usr/bin" / applet
        if not link.is_symlink() and not link.exists():
            link.symlink_to("busybox")
    for name in ("sbin/udhcpc", "sbin/ip"):
        link = tree / "usr" / name
        if not link.is_symlink():
            link.symlink_to("../bin/busybox")
