"""Running make: the configuration from symbols, and the kernel from the configuration."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from images.common.tools import BuildError
from taploom.kconfig import parse, render

from .fragments import lost
from .progress import Progress
from .recipe import TARGETS, make_variables

BOOTCONFIG = Path(__file__).resolve().parents[1] / "bootconfig"
"""Parameters that are built into the kernel."""

_STEP = re.compile(r"^\s+([A-Z][A-Z0-9_]*)(?: \[M\])?\s+(\S+)")
# What make and the compilers would take from the caller's environment.
_OUTSIDE = re.compile(
    r"^(MAKE\w*|MFLAGS|GNUMAKEFLAGS|K?BUILD_\w+|KBUILD\w*|C|CC|LD|AS|CFLAGS|CPPFLAGS|LDFLAGS|ARCH|"
    r"CROSS_COMPILE|INSTALL\w*|LOCALVERSION|O|V|W|SOURCE_DATE_EPOCH|GCC_\w+|CPATH|C_INCLUDE_PATH)$"
)


def clean_environment(outside: Mapping[str, str]) -> dict[str, str]:
    """The environment without what changes a build."""
    return {**{name: value for name, value in outside.items() if not _OUTSIDE.match(name)}, "LC_ALL": "C", "TZ": "UTC"}


def configure(arch: str, source: Path, objects: Path, requested: Mapping[str, str]) -> dict[str, str]:
    """Makes .config: everything off but what was requested and what that needs.

    The same as scripts/kconfig/merge_config.sh -n does with the fragments merged.

    Returns:
        The configuration's symbols.

    Raises:
        BuildError: requested symbols that did not survive, each by its name.
    """
    objects.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(BOOTCONFIG, objects / "taploom.bootconfig")  # CONFIG_BOOT_CONFIG_EMBED_FILE
    wanted = objects / "requested.config"
    wanted.write_text(render(dict(requested)))
    _make(arch, source, objects, [f"KCONFIG_ALLCONFIG={wanted}", "allnoconfig"])
    result = parse((objects / ".config").read_text())
    problems = lost(requested, result)
    if problems:
        raise BuildError(f"{len(problems)} requested symbols did not survive:\n  " + "\n  ".join(problems))
    return result


def kernel_release(arch: str, source: Path, objects: Path) -> str:
    """What `uname -r` will say."""
    return _make(arch, source, objects, ["-s", "kernelrelease"]).strip().splitlines()[-1]


def compile_kernel(arch: str, source: Path, objects: Path, *, jobs: int, log: Path, progress: Progress) -> int:
    """Compiles.

    Args:
        log: gets all that make says.

    Returns:
        How many steps it took.

    Raises:
        BuildError: a step failed; with what the compiler said.
    """
    target = TARGETS[arch]
    command = _command(arch, source, objects, [f"-j{jobs}", target.image])
    recent: deque[str] = deque(maxlen=60)
    steps = 0
    with log.open("w", buffering=1) as file:
        process = subprocess.Popen(
            command,
            env=clean_environment(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # A group, to be killed as one; in the caller's session, so that the priority which that has holds here too.
            process_group=0,
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                match = _STEP.match(line)
                if match:
                    steps += 1
                    progress.steps(steps, target.objects, f"{match[1]} {match[2]}")
                else:
                    recent.append(line)
            code = process.wait()
        except BaseException:
            # The compilers stop with us, before their files are removed.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    if code:
        raise BuildError(f"make failed with {code}; all of it is in {log}:\n{''.join(recent)}")
    return steps


def _command(arch: str, source: Path, objects: Path, arguments: list[str]) -> list[str]:
    variables = [f"{name}={value}" for name, value in make_variables(arch, source, objects).items()]
    return ["make", "--no-print-directory", "-C", str(source), *variables, *arguments]


def _make(arch: str, source: Path, objects: Path, arguments: list[str]) -> str:
    command = _command(arch, source, objects, arguments)
    done = subprocess.run(
        command,
        env=clean_environment(os.environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise BuildError(f"failed with {done.returncode}: {' '.join(command)}\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout
