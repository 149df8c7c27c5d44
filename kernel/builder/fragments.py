"""The configuration by purpose: reading fragments, merging them, and seeing what became of each requested symbol."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from images.common.tools import BuildError
from taploom.kconfig import parse

FRAGMENTS = Path(__file__).resolve().parents[1] / "fragments"
ARCHITECTURES = ("x86_64", "arm64")


@dataclass(frozen=True)
class Fragment:
    """One file of symbols with one purpose. `symbols` are name (without CONFIG_) -> value ("n": must be off)."""

    name: str
    symbols: Mapping[str, str]


def read_fragments(arch: str, folder: Path = FRAGMENTS) -> list[Fragment]:
    """The fragments of an architecture: the common ones sorted by name, and then arch-ARCH.

    Raises:
        BuildError: no such architecture, or a line that is neither a symbol nor a comment.
    """
    own = folder / f"arch-{arch}.config"
    if arch not in ARCHITECTURES or not own.is_file():
        raise BuildError(f"no kernel is built for {arch!r}; known: {', '.join(ARCHITECTURES)}")
    common = sorted(path for path in folder.glob("*.config") if not path.name.startswith("arch-"))
    return [read_fragment(path) for path in (*common, own)]


def read_fragment(path: Path) -> Fragment:
    """One fragment.

    Raises:
        BuildError: a line that Kconfig would silently pass over, or a symbol that occurs twice.
    """
    symbols: dict[str, str] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        found = parse(line)
        if not found and (not line.startswith("#") or line.startswith("# CONFIG_")):
            raise BuildError(f"{path}:{number}: neither CONFIG_NAME=VALUE, '# CONFIG_NAME is not set' nor a comment")
        for name, value in found.items():
            if name in symbols:
                raise BuildError(f"{path}:{number}: CONFIG_{name} occurs twice")
            symbols[name] = value
    return Fragment(path.name, symbols)


def merge(fragments: Iterable[Fragment]) -> dict[str, str]:
    """All requested symbols.

    Raises:
        BuildError: two fragments want different values of a symbol.
    """
    merged: dict[str, str] = {}
    origin: dict[str, str] = {}
    for fragment in fragments:
        for name, value in fragment.symbols.items():
            if merged.setdefault(name, value) != value:
                raise BuildError(
                    f"CONFIG_{name} is {merged[name]} in {origin[name]} and {value} in {fragment.name}: decide for one"
                )
            origin.setdefault(name, fragment.name)
    return merged


def lost(requested: Mapping[str, str], result: Mapping[str, str]) -> list[str]:
    """What did not become of the requested symbols, a line each; empty when all survived.

    Args:
        requested: what the fragments want.
        result: the configuration that Kconfig made of it. A symbol that it does not mention is off.
    """
    lines = []
    for name, value in sorted(requested.items()):
        if value == "n":
            if result.get(name, "n") != "n":
                lines.append(f"CONFIG_{name} must be off and is {result[name]}: another symbol selects it")
        elif name not in result:
            lines.append(
                f"CONFIG_{name}={value} is not there: this source does not have it, or what it depends on is off"
            )
        elif result[name] != value:
            lines.append(f"CONFIG_{name}={value} became {result[name]}: what it depends on is off")
    return lines
