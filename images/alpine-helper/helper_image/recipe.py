"""image.toml: what is in the image, for whichever builder."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from images.common.tools import BuildError

HERE = Path(__file__).parents[1]
CHECKOUT = HERE.parents[1]
FILES = HERE / "files"
_TRIPLETS = {"x86_64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}


@dataclass(frozen=True)
class Program:
    """A file of a distribution: where it is in the image, and where in the distribution's root."""

    path: str
    source: str


@dataclass(frozen=True)
class Recipe:
    """The manifest as one builder reads it.

    Attributes:
        builder: its own table of the manifest: suite or branch, packages …
        programs, tools: executables; tools are left out of the initramfs.
        data: further files.
        applets: busybox's links.
        python: the interpreter's version, such as "3.13".
        library_folders: where the dynamic linker looks, in order.
    """

    name: str
    builder: Mapping[str, Any]
    programs: tuple[Program, ...]
    tools: tuple[Program, ...]
    data: tuple[str, ...]
    applets: tuple[str, ...]
    python: str
    library_folders: tuple[str, ...]
    python_program: str
    python_modules: tuple[str, ...]
    python_later: tuple[str, ...]
    wheels: tuple[str, ...]
    recorded: tuple[str, ...]


def read_recipe(builder: str, arch: str, file: Path = HERE / "image.toml") -> Recipe:
    """The manifest for a builder ("debian" or "alpine").

    Raises:
        BuildError: something is missing in it.
    """
    content = tomllib.loads(file.read_text())

    def programs(entries: list[dict[str, str]]) -> tuple[Program, ...]:
        return tuple(Program(entry["path"], entry.get(builder, entry["path"])) for entry in entries)

    try:
        own, python = content[builder], content["python"]
        return Recipe(
            name=content["image"]["name"],
            builder=own,
            programs=programs(content["programs"]),
            tools=programs(content["tools"]),
            data=tuple(content["data"]["files"]),
            applets=tuple(content["busybox"]["applets"]),
            python=own["python"],
            library_folders=tuple(folder.format(triplet=_TRIPLETS[arch]) for folder in own["library-folders"]),
            python_program=python["program"],
            python_modules=tuple(python["modules"]),
            python_later=tuple(python["later"]),
            wheels=tuple(python["wheels"]),
            recorded=tuple(python["recorded"]),
        )
    except KeyError as exc:
        raise BuildError(f"{file} has no {exc} for the {builder} builder on {arch}") from exc
