"""The image from Buildroot: prepares what its external tree needs, and checks the configurations with a real tree."""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from images.common import wheels
from images.common.tools import BuildError, run

from .debian_builder import Say
from .recipe import CHECKOUT, FOLDER, LOCK, Recipe

EXTERNAL = FOLDER / "buildroot"
WHEELS = CHECKOUT / "build/images/guest-initfs/wheels"
_LACKING = ("betterproto2",)
"""Wheels that Buildroot has no package for: the external tree has one, and takes them from us."""


@dataclass(frozen=True)
class Resolved:
    """What a defconfig became."""

    name: str
    requested: int
    packages: tuple[str, ...]


def prepare(recipe: Recipe, *, cache: Path) -> Path:
    """Unpacks the wheels that Buildroot lacks, by requirements.lock's hashes, to where external.mk looks for them."""
    for wheel in wheels.wheels(LOCK, _LACKING, python=recipe.python, cache=cache):
        target = WHEELS / wheel.name
        shutil.rmtree(target, ignore_errors=True)
        wheels.unpack(wheel, target)
    return WHEELS


def defconfigs() -> list[Path]:
    """The external tree's, sorted."""
    return sorted((EXTERNAL / "configs").glob("*_defconfig"))


def check(recipe: Recipe, tree: Path, say: Say) -> list[Resolved]:
    """Resolves every defconfig with a Buildroot tree.

    Raises:
        BuildError: the tree is of another release, a requested symbol was dropped, or a package of the image is not in
            the configuration; each is named.
    """
    makefile = tree / "Makefile"
    version = re.search(
        r"^export BR2_VERSION := (\S+)$", makefile.read_text() if makefile.is_file() else "", re.MULTILINE
    )
    if version is None:
        raise BuildError(f"{tree} is no Buildroot tree")
    if not version[1].startswith(recipe.buildroot_release):
        raise BuildError(f"{tree} is Buildroot {version[1]}; the defconfigs are for {recipe.buildroot_release}")
    found = []
    for defconfig in defconfigs():
        say(f"Buildroot {version[1]}: {defconfig.name}")
        with tempfile.TemporaryDirectory() as output:
            run(["make", "-s", "-C", tree, f"O={output}", f"BR2_EXTERNAL={EXTERNAL}", defconfig.name])
            found.append(_compare(recipe, defconfig, (Path(output) / ".config").read_text().splitlines()))
    return found


def _compare(recipe: Recipe, defconfig: Path, config: list[str]) -> Resolved:
    requested = [line for line in defconfig.read_text().splitlines() if line.strip()]
    wanted = [*requested, *(f"BR2_PACKAGE_PYTHON_{name.upper().replace('-', '_')}=y" for name in _names(recipe))]
    dropped = [line for line in wanted if line not in config]
    if dropped:
        raise BuildError(f"{defconfig.name}: Buildroot dropped {', '.join(dropped)}")
    packages = sorted(match[1] for line in config if (match := re.fullmatch(r"BR2_PACKAGE_([A-Z0-9_]+)=y", line)))
    return Resolved(defconfig.name, len(requested), tuple(packages))


def _names(recipe: Recipe) -> list[str]:
    """Buildroot's names of the wheels."""
    return [name.removeprefix("python-") for name in recipe.wheels]
