"""The Alpine builder: the same image from Alpine's packages, put into a root of its own by apk(8).

What it needs that Debian does not: apk (a static one, --apk, or that of an Alpine root, --root), a mirror of Alpine's
packages (--mirror), and OVN, which Alpine has in its testing repository only: from there, or built from source in the
Alpine root. Each stage says what is missing before it begins.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from images.common import debian, init, wheels
from images.common.debian import Package
from images.common.tools import BuildError, run

from . import interpreter, tree
from .recipe import CHECKOUT, Recipe

_ARCHITECTURES = {"x86_64": "x86_64", "arm64": "aarch64"}


@dataclass(frozen=True)
class Options:
    """What the command was told.

    Attributes:
        mirror: a mirror's URL, or a directory with the same layout (BRANCH/REPOSITORY/ARCH/APKINDEX.tar.gz).
        apk: a static apk; None: that of `root`.
        root: an Alpine root that has all packages already, or an apk to install them with; None: a new one.
        keys: a directory with the keys that packages are signed with; None: those in `root`.
        ovn: where OVN comes from.
    """

    mirror: str = ""
    apk: Path | None = None
    root: Path | None = None
    keys: Path | None = None
    ovn: Literal["package", "source"] = "package"


def repositories(recipe: Recipe, options: Options) -> list[str]:
    """The lines of /etc/apk/repositories."""
    base = options.mirror.rstrip("/")
    own = recipe.builder
    lines = [f"{base}/{own['branch']}/{name}" for name in own["repositories"]]
    if options.ovn == "package":
        lines += [f"@ovn {base}/{own['ovn-branch']}/{name}" for name in own["ovn-repositories"]]
    return lines


def packages(recipe: Recipe, options: Options) -> list[str]:
    """What apk is asked to add."""
    ovn = [f"{name}@ovn" for name in recipe.builder["ovn-packages"]]
    build = recipe.builder["source"]["build-packages"] if options.ovn == "source" else ovn
    return [*recipe.builder["packages"], *build]


def needs(recipe: Recipe, options: Options, arch: str) -> list[str]:
    """What is missing, in words that say how to get it; empty when the builder can begin."""
    missing: list[str] = []
    if os.geteuid():
        missing.append("root: apk runs in a root of its own (chroot)")
    if options.root is not None and is_complete(options.root, recipe):
        return missing
    if options.apk is None and (options.root is None or _apk_of(options.root) is None):
        missing.append("apk: --apk FILE (static: Alpine's package apk-tools-static), or --root DIR with /sbin/apk")
    if not options.mirror:
        missing.append("a mirror of Alpine's packages: --mirror URL, or a directory of the same layout")
    else:
        for line in repositories(recipe, options):
            index = f"{line.split()[-1]}/{_ARCHITECTURES[arch]}/APKINDEX.tar.gz"
            if not _reachable(index):
                missing.append(f"{index}, which cannot be read")
    if options.keys is None and (options.root is None or not any((options.root / "etc/apk/keys").glob("*.pub"))):
        missing.append("the keys that packages are signed with: --keys DIR (Alpine's package alpine-keys)")
    return missing


def is_complete(root: Path, recipe: Recipe) -> bool:
    """Whether a root has all programs already, so that nothing needs to be installed."""
    return all((root / program.source).is_file() for program in recipe.programs) and all(
        (root / name).is_file() for name in recipe.data
    )


def _apk_of(root: Path) -> Path | None:
    places = (root / folder / "apk" for folder in ("sbin", "usr/sbin", "usr/bin"))
    return next((path for path in places if path.exists()), None)


def _reachable(url: str) -> bool:
    if not url.startswith(("http://", "https://")):
        return Path(url).is_file()
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:  # noqa: S310 -- http(s), as checked above
            return bool(answer.read(2))
    except (urllib.error.URLError, OSError):
        return False


def install(recipe: Recipe, options: Options, arch: str, root: Path) -> None:
    """Has apk put the packages into the root, which may be empty.

    Raises:
        BuildError: apk failed; with what it said.
    """
    (root / "etc/apk").mkdir(parents=True, exist_ok=True)
    file = root / "etc/apk/repositories.helper"
    file.write_text("\n".join(repositories(recipe, options)) + "\n")
    known = _apk_of(options.root) if options.root is not None else None
    apk = options.apk or known
    assert apk is not None  # `needs` has said so before
    keys = options.keys or (options.root or root) / "etc/apk/keys"
    places: list[str | Path] = ["--root", root, "--keys-dir", keys.absolute(), "--repositories-file", file]
    run([apk, "--arch", _ARCHITECTURES[arch], *places, "--initdb", "--no-scripts", "add", *packages(recipe, options)])


def build_ovn(recipe: Recipe, root: Path, cache: Path, say: tree.Say) -> None:
    """Builds Open vSwitch and OVN in the root from the pinned sources, and installs them there.

    Raises:
        BuildError: a source cannot be had or is another than the pinned one, or does not build.
    """
    work = root / "build"
    work.mkdir(exist_ok=True)
    for source in recipe.builder["source"]["archives"]:
        archive = fetch(f"{debian.mirror().rstrip('/')}/{source['path']}", source["sha256"], cache)
        say(f"building {source['name']} {source['version']}")
        run(["tar", "-xf", archive, "-C", work])
        folder = f"/build/{source['folder']}"
        for step in source["steps"]:
            run(["chroot", root, "/bin/sh", "-ec", f"cd {folder} && {step}"])


def fetch(url: str, sha256: str, cache: Path) -> Path:
    """A file by its checksum, from the cache when it is there.

    Raises:
        BuildError: it cannot be had, or is another.
    """
    place = cache / "sources" / f"{sha256}-{url.rsplit('/', 1)[-1]}"
    if not place.is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_suffix(".part")
        try:
            with urllib.request.urlopen(url, timeout=60) as answer, partial.open("wb") as file:  # noqa: S310 -- pinned
                shutil.copyfileobj(answer, file)
        except (urllib.error.URLError, OSError) as exc:
            raise BuildError(f"{url} cannot be had ({exc}); put it at {place}") from exc
        partial.rename(place)
    if hashlib.sha256(place.read_bytes()).hexdigest() != sha256:
        place.unlink()
        raise BuildError(f"{url} is not what image.toml pins ({sha256}); removed")
    return place


def build_trees(
    recipe: Recipe, options: Options, arch: str, place: Path, tools_place: Path, *, cache: Path, say: tree.Say
) -> tuple[list[Package], list[wheels.Wheel]]:
    """Fills the image's tree, and another with the tools and what only they need.

    Returns:
        The packages that apk knows in the root, and the wheels.

    Raises:
        BuildError: something is missing; the message names all of it.
    """
    missing = needs(recipe, options, arch)
    if missing:
        raise BuildError("the Alpine builder needs\n" + "\n".join(f"- {what}" for what in missing))
    found = wheels.wheels(CHECKOUT / "requirements.lock", recipe.wheels, python=recipe.python, cache=cache)
    program, musl = init.build_init(arch, cache=cache)
    with tempfile.TemporaryDirectory(prefix="helper-image-") as folder:
        root = Path(folder) / "root"
        if options.root is not None:
            say(f"copying {options.root}")
            shutil.copytree(options.root, root, symlinks=True, ignore_dangling_symlinks=True)
        if options.root is None or not is_complete(options.root, recipe):
            say("installing packages with apk")
            install(recipe, options, arch, root)
            if options.ovn == "source":
                build_ovn(recipe, root, cache, say)
        say("taking files")
        interpreter.prepare(root)
        interpreter.install_sources(root, recipe, found)
        modules = interpreter.trace(root, recipe)
        tree.fill(
            root, place, tools_place, recipe, modules=modules, found=found, interpreter_root=root, init=program, say=say
        )
        return [*installed(root, arch), musl], found


def installed(root: Path, arch: str) -> list[Package]:
    """The packages of an Alpine root, from apk's database (apk-package(5)): C: is the checksum of a package's control
    data, which apk verifies each file against."""
    database = root / "lib/apk/db/installed"
    if not database.exists():
        return []
    found = []
    for block in database.read_text().strip().split("\n\n"):
        fields = dict(line.split(":", 1) for line in block.splitlines() if line[:2] in {"P:", "V:", "C:", "A:"})
        digest = fields.get("C", "")
        found.append(Package(fields["P"], fields["V"], fields.get("A", arch), digest, database))
    return found
