"""Wheels that a lock file pins, unpacked for an image: pure Python only, so that one set serves every architecture."""

from __future__ import annotations

import hashlib
import re
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .cache import cached, file_sha256
from .tools import BuildError, run

_PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^]]*\])?==([^\s;\\]+)")


@dataclass(frozen=True)
class Wheel:
    """One wheel: its project's name and version, the file's SHA-256 and where it is."""

    name: str
    version: str
    sha256: str
    path: Path


def normalized(name: str) -> str:
    """A project's name as PEP 503 normalizes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lock: Path) -> dict[str, str]:
    """What a pip-compile lock file pins: normalized name to its requirement with hashes, one string of lines."""
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in lock.read_text().splitlines():
        match = _PIN.match(line)
        if match:
            current = found.setdefault(normalized(match[1]), [])
            current.append(line)
        elif current is not None and line.lstrip().startswith("--hash="):
            current.append(line)
        else:
            current = None
    return {name: "\n".join(lines).rstrip("\\").rstrip() + "\n" for name, lines in found.items()}


def wheels(lock: Path, names: Iterable[str], *, python: str, cache: Path) -> list[Wheel]:
    """The wheels of these projects as ``lock`` pins them, downloaded and checked by pip, sorted by name.

    Args:
        python: the interpreter's version that they must fit, such as "3.13".
        cache: the cache's root; downloads are kept there by what was asked for.

    Raises:
        BuildError: a name that the lock file does not pin, or one that has no pure wheel.
    """
    pinned = pins(lock)
    wanted = sorted({normalized(name) for name in names})
    unknown = [name for name in wanted if name not in pinned]
    if unknown:
        raise BuildError(f"{lock} does not pin {', '.join(unknown)}")
    requirements = "".join(pinned[name] for name in wanted)
    key = hashlib.sha256(f"{python}\n{requirements}".encode()).hexdigest()

    def download(place: Path) -> None:
        listing = place / "requirements.txt"
        listing.write_text(requirements)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--require-hashes", "--no-deps", "--only-binary=:all:"]
        target = ["--platform", "any", "--implementation", "py", "--python-version", python]
        run([*pip, *target, "--dest", place, "-r", listing])

    place, _ = cached(cache, "wheels", key, download)
    found = []
    for path in place.glob("*.whl"):
        name, version, *_ = path.name.split("-")
        found.append(Wheel(normalized(name), version, file_sha256(path), path))
    if sorted(wheel.name for wheel in found) != wanted:
        raise BuildError(f"pip downloaded {sorted(w.name for w in found)} to {place}, asked for {wanted}")
    return sorted(found, key=lambda wheel: wheel.name)


def unpack(wheel: Wheel, root: Path) -> None:
    """Unpacks a wheel's modules into a folder of sys.path; of its metadata only the folder's name, with the version.

    Raises:
        BuildError: the wheel has compiled parts or names that leave the folder.
    """
    with zipfile.ZipFile(wheel.path) as archive:
        for member in archive.infolist():
            name = PurePosixPath(member.filename)
            if name.is_absolute() or ".." in name.parts:
                raise BuildError(f"{wheel.path}: {name} leaves its folder")
            if name.suffix == ".so":
                raise BuildError(f"{wheel.path} has compiled parts ({name}): only pure wheels go into images")
            if name.parts[0].endswith(".dist-info"):
                (root / name.parts[0]).mkdir(parents=True, exist_ok=True)
            if member.is_dir() or name.parts[0].endswith((".dist-info", ".data")):
                continue
            target = root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(member))
