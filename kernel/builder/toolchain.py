"""The compiler and the tools around it: that they are there, and which versions they are."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass

from images.common.tools import BuildError, run

from .recipe import cross_prefix

_TOOLS = ("make", "flex", "bison", "bc", "gcc", "tar", "xz", "pahole", "lz4")
_ADVICE = "scripts/vm-setup.sh installs all that a build needs"


@dataclass(frozen=True)
class Toolchain:
    """The first line that each tool says of itself. They decide about the kernel's bytes."""

    compiler: str
    linker: str
    pahole: str
    lz4: str

    def lines(self) -> list[str]:
        """What goes into the cache's key."""
        return [f"{name}: {version}" for name, version in asdict(self).items()]


def toolchain(arch: str) -> Toolchain:
    """The tools for an architecture.

    Raises:
        BuildError: some are missing; all of them are named.
    """
    prefix = cross_prefix(arch)
    wanted = [*_TOOLS, f"{prefix}gcc", f"{prefix}ld"]
    missing = sorted({tool for tool in wanted if shutil.which(tool) is None})
    if missing:
        raise BuildError(f"not installed: {', '.join(missing)}; {_ADVICE}")
    return Toolchain(
        compiler=_first_line(f"{prefix}gcc", "--version"),
        linker=_first_line(f"{prefix}ld", "--version"),
        pahole=_first_line("pahole", "--version"),
        lz4=_first_line("lz4", "--version"),
    )


def _first_line(*command: str) -> str:
    return run(command).strip().splitlines()[0]
