"""The Debian builder: the image's files from Debian's packages, for any architecture."""

from __future__ import annotations

import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path

from images.common import debian, init, wheels
from images.common.tools import BuildError, run

from . import interpreter, tree
from .recipe import CHECKOUT, Recipe

_HERE = {"x86_64": "x86_64", "aarch64": "arm64"}


@dataclass(frozen=True)
class Inputs:
    """All that comes from elsewhere; what the image is made of besides our own files."""

    packages: tuple[debian.Package, ...]
    here: tuple[debian.Package, ...]  # for an interpreter that runs on this machine, if the image's does not
    wheels: tuple[wheels.Wheel, ...]
    init: Path
    init_package: debian.Package

    def texts(self) -> list[str]:
        """What the inputs' hash is made of."""
        listed = [*self.packages, *self.here, self.init_package]
        return [f"{p.name} {p.version} {p.sha256}" for p in listed] + [f"{w.name} {w.sha256}" for w in self.wheels]


def inputs(recipe: Recipe, arch: str, *, cache: Path, update: bool) -> Inputs:
    """Finds and downloads what the image is made of."""
    suite, names = recipe.builder["suite"], recipe.builder["packages"]
    machine = _HERE.get(platform.machine(), "")
    here: list[debian.Package] = []
    if arch != machine:
        if not machine:
            raise BuildError(f"no interpreter of Debian {suite} is known to run on this machine ({platform.machine()})")
        here = debian.packages(suite, machine, names, cache=cache, update=update)
    program, package = init.build_init(arch, cache=cache, update=update)
    return Inputs(
        packages=tuple(debian.packages(suite, arch, names, cache=cache, update=update)),
        here=tuple(here),
        wheels=tuple(wheels.wheels(CHECKOUT / "requirements.lock", recipe.wheels, python=recipe.python, cache=cache)),
        init=program,
        init_package=package,
    )


def build_trees(
    found: Inputs, recipe: Recipe, place: Path, tools_place: Path, *, say: tree.Say
) -> list[debian.Package]:
    """Fills the image's tree, and another with the tools and what only they need.

    Returns:
        The packages of which the image has files.
    """
    with tempfile.TemporaryDirectory(prefix="helper-image-") as folder:
        work = Path(folder)
        root = work / "root"
        root.mkdir()
        debian.unpack(found.packages, root)
        _complete(root)
        interpreter.install_sources(root, recipe, found.wheels)
        here = root
        if found.here:
            here = work / "here"
            here.mkdir()
            debian.unpack(found.here, here)
            _complete(here)
            interpreter.install_sources(here, recipe, found.wheels)
        say("running the agent, to see what it imports")
        modules = interpreter.trace(here, recipe)

        taken = tree.fill(
            root,
            place,
            tools_place,
            recipe,
            modules=modules,
            found=found.wheels,
            interpreter_root=here,
            init=found.init,
            say=say,
        )
        used = [package for package in found.packages if _files(package) & taken]
    return [*used, found.init_package]


def _complete(root: Path) -> None:
    interpreter.prepare(root)
    # What the package's maintainer script has update-alternatives do.
    (root / "usr/sbin/ovs-vswitchd").symlink_to("../lib/openvswitch-switch/ovs-vswitchd")


def _files(package: debian.Package) -> set[str]:
    """The paths of a package's files, as they are where /bin, /sbin and /lib are links to /usr."""
    found = set()
    for line in run(["dpkg-deb", "-c", package.path]).splitlines():
        name = line.split(maxsplit=5)[5].split(" -> ")[0].split(" link to ")[0].removeprefix("./").rstrip("/")
        found |= {name, f"usr/{name}"}
    return found
