"""image.toml: what is in the image, read and checked once for all builders."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from images.common.tools import BuildError

FOLDER = Path(__file__).resolve().parents[1]
CHECKOUT = FOLDER.parents[1]
LOCK = CHECKOUT / "requirements.lock"
FILES = FOLDER / "files"
"""Files that go into the image as they are; Python sources among them compiled."""


@dataclass(frozen=True)
class Recipe:
    """image.toml."""

    name: str
    max_compressed: int
    python: str
    module: str
    folder: str
    wheels: tuple[str, ...]
    lazy: tuple[str, ...]
    landmarks: tuple[str, ...]
    suite: str
    packages: tuple[str, ...]
    programs: tuple[str, ...]
    buildroot_release: str

    @property
    def library(self) -> str:
        """Where the interpreter's own modules are in the image."""
        return f"/usr/lib/python{self.python}"

    @property
    def interpreter(self) -> str:
        """The interpreter's path in the image."""
        return f"/usr/bin/python{self.python}"


def read_recipe(path: Path = FOLDER / "image.toml") -> Recipe:
    """Reads the file.

    Raises:
        BuildError: something is missing, too much or of another type; the message names it.
    """
    content = tomllib.loads(path.read_text())
    python, debian, buildroot = (_table(content, name, path) for name in ("python", "debian", "buildroot"))
    recipe = Recipe(
        name=_take(content, "name", str, path),
        max_compressed=_take(content, "max_compressed_mib", int, path) << 20,
        python=_take(python, "version", str, path),
        module=_take(python, "module", str, path),
        folder=_take(python, "folder", str, path),
        wheels=_strings(python, "wheels", path),
        lazy=_strings(python, "lazy", path),
        landmarks=_strings(python, "landmarks", path),
        suite=_take(debian, "suite", str, path),
        packages=_strings(debian, "packages", path),
        programs=_strings(debian, "programs", path),
        buildroot_release=_take(buildroot, "release", str, path),
    )
    left = [*content, *python, *debian, *buildroot]
    if left:
        raise BuildError(f"{path}: nothing is called {', '.join(left)}")
    return recipe


def _take(table: dict[str, Any], key: str, kind: type, path: Path) -> Any:
    value = table.pop(key, None)
    if not isinstance(value, kind):
        raise BuildError(f"{path}: {key} must be there, of type {kind.__name__}")
    return value


def _table(content: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    found: dict[str, Any] = _take(content, key, dict, path)
    return found


def _strings(table: dict[str, Any], key: str, path: Path) -> tuple[str, ...]:
    found = _take(table, key, list, path)
    if not all(isinstance(entry, str) for entry in found):
        raise BuildError(f"{path}: {key} must be a list of strings")
    return tuple(found)
