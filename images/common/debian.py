"""Debian packages for a root file system: found, downloaded and unpacked without touching this machine's own.

apt resolves and fetches with a configuration, lists and an empty package database of its own, for any architecture,
from the archive that this machine's apt uses; it checks the archive's signatures, and each file's SHA-256 is checked
again here. A resolution is remembered, so that builds repeat and need no network; `update=True` makes a new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import unquote

from .cache import file_sha256, locked
from .tools import BuildError, debian_architecture, run

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_URI_LINE = re.compile(r"^'([^']+)' (\S+)_(\S+)_(\S+)\.deb (\d+) SHA256:([0-9a-f]{64})$")


@dataclass(frozen=True)
class Package:
    """One binary package: what the archive calls it, and where its file is."""

    name: str
    version: str
    architecture: str
    sha256: str
    path: Path


def mirror(label: str = "Debian") -> str:
    """The URI of the Debian archive that this machine's apt uses, or "" when it has none of that label.

    TAPLOOM_DEBIAN_MIRROR overrides it for the label "Debian".
    """
    override = os.environ.get("TAPLOOM_DEBIAN_MIRROR", "")
    if override and label == "Debian":
        return override
    wanted = ["Created-By: Packages", "Origin: Debian", f"Label: {label}"]
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", *wanted]
    found = sorted(set(run(command).split()))
    if not found and os.geteuid() == 0:
        run(["apt-get", "update", "-q"])  # a new machine has no lists, and apt names no targets then
        found = sorted(set(run(command).split()))
    return found[0] if found else ""


def packages(
    suite: str, arch: str, names: Iterable[str], *, cache: Path, update: bool = False, closure: bool = True
) -> list[Package]:
    """The packages of these names, and all that they depend on, downloaded, sorted by name.

    Args:
        suite: a release's code name, such as "trixie"; its -updates and, where this machine knows that archive, its
            -security suite are used, too.
        arch: x86_64 or arm64.
        names: packages' names, or name=version.
        cache: the cache's root.
        update: ask the archive again although these names were resolved before.
        closure: with all that they depend on; otherwise these packages alone.

    Raises:
        BuildError: no archive, a package that does not exist, or a file that is not what the archive says.
    """
    wanted = sorted(set(names))
    home = cache / "debian" / f"{suite}-{arch}"
    store = cache / "debian" / "archives"
    key = hashlib.sha256("\n".join([f"closure={closure}", *wanted]).encode()).hexdigest()
    remembered = home / "resolved" / f"{key}.json"
    with locked(home / "lock"):
        if update or not remembered.is_file():
            found = _resolve(suite, arch, wanted, home, closure)
            remembered.parent.mkdir(parents=True, exist_ok=True)
            remembered.write_text(json.dumps([{**asdict(p), "path": p.path.name} for p in found], indent=1))
        listed = [Package(**entry) for entry in json.loads(remembered.read_text())]
        listed = [replace(package, path=store / package.path) for package in listed]
        missing = [package for package in listed if not package.path.is_file()]
        if missing:
            _fetch(suite, arch, missing, home, store)
    for package in listed:
        if file_sha256(package.path) != package.sha256:
            package.path.unlink()
            raise BuildError(f"{package.path} was not what the archive says, and is removed: run the build again")
    return listed


def unpack(found: Iterable[Package], root: Path) -> None:
    """Unpacks packages into a root with merged /usr, as Debian has it since 12; no maintainer script runs."""
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
        if not (root / name).is_symlink():
            (root / name).symlink_to(f"usr/{name}")
    for package in found:
        run(["dpkg-deb", "-x", package.path, root])
    if not any((root / "usr/lib64").iterdir()):
        (root / "usr/lib64").rmdir()
        (root / "lib64").unlink()


def _resolve(suite: str, arch: str, wanted: Sequence[str], home: Path, closure: bool) -> list[Package]:
    options = _configure(suite, arch, home)
    run(["apt-get", *options, "update", "-q"])
    with tempfile.TemporaryDirectory() as empty:
        (Path(empty) / "partial").mkdir()
        archives = ["-o", f"Dir::Cache::archives={empty}"]
        action = "install" if closure else "download"
        output = run(["apt-get", *options, *archives, action, "--print-uris", "-qq", "-y", *wanted])
    found = []
    for line in output.splitlines():
        match = _URI_LINE.match(line)
        if match is None:
            raise BuildError(f"apt-get printed a line that is no package's: {line!r}")
        _, name, version, architecture, _, sha256 = match.groups()
        path = Path(f"{name}_{version}_{architecture}.deb")
        found.append(Package(name, unquote(version), architecture, sha256, path))
    return sorted(found, key=lambda package: package.name)


def _fetch(suite: str, arch: str, missing: Sequence[Package], home: Path, store: Path) -> None:
    options = _configure(suite, arch, home)
    if not any((home / "lists").glob("*_Packages*")):
        run(["apt-get", *options, "update", "-q"])
    store.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=store, prefix=".new-") as work:
        exact = [f"{package.name}={package.version}" for package in missing]
        try:
            run(["apt-get", *options, "download", "-qq", *exact], cwd=Path(work))
        except BuildError as error:
            raise BuildError(f"{error}\nthe archive may have newer versions by now: build with --update") from None
        for package in missing:
            source = Path(work) / package.path.name
            if not source.is_file():
                raise BuildError(f"apt-get downloaded no {package.path.name}")
            shutil.move(source, package.path)


def _configure(suite: str, arch: str, home: Path) -> list[str]:
    """Options that give apt its own files below ``home`` and the architecture."""
    uri = mirror()
    if not uri:
        raise BuildError("no Debian archive among this machine's apt sources; set TAPLOOM_DEBIAN_MIRROR")
    if not KEYRING.is_file():
        raise BuildError(f"{KEYRING} is missing: install debian-archive-keyring")
    sources = [f"deb [signed-by={KEYRING}] {uri} {name} main" for name in (suite, f"{suite}-updates")]
    security = mirror("Debian-Security")
    if security:
        sources.append(f"deb [signed-by={KEYRING}] {security} {suite}-security main")
    for folder in ("lists/partial", "cache/archives/partial"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    (home / "sources.list").write_text("\n".join(sources) + "\n")
    (home / "status").write_text("")
    architecture = debian_architecture(arch)
    settings = {
        "APT::Architecture": architecture,
        "APT::Architectures": architecture,
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "",
        "Acquire::ForceHash": "sha256",
        "Acquire::Languages": "none",
        "Dir::Etc::sourcelist": home / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::Etc::preferences": "-",
        "Dir::Etc::preferencesparts": "-",
        "Dir::State": home,
        "Dir::State::lists": home / "lists",
        "Dir::State::status": home / "status",
        "Dir::State::extended_states": home / "extended",
        "Dir::Cache": home / "cache",
        "Debug::NoLocking": "true",
    }
    return [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]
