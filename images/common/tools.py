"""Running the tools that the builders need, with errors that say what to do."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ARCHITECTURES = {"x86_64": "amd64", "arm64": "arm64"}
"""Our names of architectures and Debian's; OCI uses Debian's."""


class BuildError(Exception):
    """Something that a build cannot go on without; the message says what to do about it."""


def run(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str = "",
) -> str:
    """Runs a command to its end and returns its standard output.

    Args:
        env: variables to set besides the environment, which loses its locale: output is read by programs here.

    Raises:
        BuildError: the command is not installed, or failed; with the end of what it said.
    """
    command = [str(part) for part in argv]
    variables = {**os.environ, "LC_ALL": "C", **(env or {})}
    try:
        done = subprocess.run(command, env=variables, cwd=cwd, input=stdin.encode(), capture_output=True, check=False)
    except FileNotFoundError:
        raise BuildError(
            f"{command[0]} is not installed; scripts/vm-setup.sh installs all that the builds need"
        ) from None
    if done.returncode:
        said = (done.stderr + done.stdout).decode(errors="replace").strip()
        raise BuildError(f"failed with {done.returncode}: {' '.join(command)}\n{said[-4000:]}")
    return done.stdout.decode()


def debian_architecture(arch: str) -> str:
    """Debian's name of an architecture.

    Raises:
        BuildError: it is not one that images are built for.
    """
    try:
        return ARCHITECTURES[arch]
    except KeyError:
        raise BuildError(f"no images are built for {arch!r}; known: {', '.join(ARCHITECTURES)}") from None


def source_date_epoch() -> int:
    """The time that files in images bear, in seconds since 1970: SOURCE_DATE_EPOCH (reproducible-builds.org) or 0.

    Raises:
        BuildError: the variable is set to no number.
    """
    text = os.environ.get("SOURCE_DATE_EPOCH", "0")
    if not text.isdecimal():
        raise BuildError(f"SOURCE_DATE_EPOCH must be seconds since 1970, not {text!r}")
    return int(text)
