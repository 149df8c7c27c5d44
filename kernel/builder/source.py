"""Where the kernel's source comes from: Debian's package, through apt and so signed, or a tarball of known SHA-256."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from images.common import debian
from images.common.cache import file_sha256
from images.common.tools import BuildError, run

PACKAGE = "linux-source-6.12"
SUITE = "trixie"
KNOWN = Path(__file__).resolve().parents[1] / "sources.sha256"


@dataclass(frozen=True)
class Source:
    """Where a tarball of Linux is.

    Attributes:
        origin: "debian" or "tarball".
        version: of the package, or "" for a tarball, whose kernel says its version when it is built.
        sha256: of the file, in hex.
        path: a Debian package with the tarball in it, or the tarball.
    """

    origin: str
    version: str
    sha256: str
    path: Path


def in_cache(cache: Path) -> bool:
    """Whether Debian's package was fetched already."""
    return any((cache / "debian" / "archives").glob(f"{PACKAGE}_*.deb"))


def debian_source(cache: Path, *, update: bool = False) -> Source:
    """Debian 13's linux-source-6.12: the package in the cache, or the newest when there is none.

    Args:
        update: look for a newer one although one is in the cache.

    Raises:
        BuildError: no Debian archive, or no such package in it.
    """
    found = debian.packages(SUITE, "x86_64", [PACKAGE], cache=cache, update=update)
    package = next(one for one in found if one.name == PACKAGE)
    return Source("debian", package.version, package.sha256, package.path)


def tarball_source(path: Path, sha256: str = "", known: Path = KNOWN) -> Source:
    """A tarball of kernel.org's or Debian's.

    Args:
        sha256: what it must be, in hex; "" when it is one of those in kernel/sources.sha256.

    Raises:
        BuildError: there is no such file, or it is not the one that was meant.
    """
    if not path.is_file():
        raise BuildError(f"no file {path}: give a linux-*.tar.xz, or no --source for Debian's package")
    actual = file_sha256(path)
    if sha256:
        if actual != sha256.strip().lower():
            raise BuildError(f"{path} has SHA-256 {actual}, not {sha256.strip().lower()}: do not use it")
    elif actual not in known_sums(known):
        raise BuildError(
            f"{path} has SHA-256 {actual}, which is not known here: compare it with the signed sha256sums.asc beside "
            f"the tarball on kernel.org, and give it with --sha256 (or add it to {known})"
        )
    return Source("tarball", "", actual, path)


def known_sums(path: Path) -> set[str]:
    """The sums in a file of sha256sum's format; comments start with #."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return {line.split()[0].lower() for line in lines if line.strip() and not line.startswith("#")}


def unpack(source: Source, into: Path) -> None:
    """Unpacks the tarball's only folder as ``into``.

    Raises:
        BuildError: there is no Linux in it.
    """
    into.mkdir(parents=True)
    tarball = source.path
    if source.origin == "debian":
        package = into / "package"
        run(["dpkg-deb", "-x", source.path, package])
        tarball = package / "usr/src" / f"{PACKAGE}.tar.xz"
    if not tarball.is_file():
        raise BuildError(f"{PACKAGE} {source.version} has no usr/src/{PACKAGE}.tar.xz")
    run(["tar", "-xf", tarball, "-C", into, "--strip-components=1", "--no-same-owner"])
    shutil.rmtree(into / "package", ignore_errors=True)
    if not (into / "scripts/kconfig").is_dir():
        raise BuildError(f"{source.path} is not the source of a Linux kernel")
