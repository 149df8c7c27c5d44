"""Has an agent do all that it can, in a root or in an image's tree, and says what it imported.

An image's `exercise.py` is run beside the agent by an interpreter with everything, in namespaces of their own; what
both images' exercises do alike is in `images/common/exercised.py`, which lies beside it there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import python
from .tools import BuildError, run

_SHARED = "/run/exercise"
# $1 the root with everything, $2 the root that the agent runs in, mounted below it, $3 the folder that both see as $4
# is here.
_NAMESPACES = """
mount -t proc proc "$1/proc"
mount --rbind /dev "$1/dev"
mount -t sysfs sysfs "$1/sys"
mkdir -p "$1$3" "$1/image"
mount --bind "$4" "$1$3"
if [ "$2" != "$1" ]; then
	mount --bind "$2" "$1/image"
	mount -t tmpfs tmpfs "$1/image/run"
	mkdir -p "$1/image$3"
	mount --bind "$4" "$1/image$3"
	mount -t proc proc "$1/image/proc"
	mount -t sysfs sysfs "$1/image/sys"
	mount --rbind /dev "$1/image/dev"
fi
root=$1
shift 4
exec chroot "$root" /usr/bin/busybox sh -c 'busybox ip link set lo up; exec "$@"' sh "$@"
"""


@dataclass(frozen=True)
class Exercise:
    """An agent and what is done with it.

    Attributes:
        script: the image's exercise.py.
        interpreter: the interpreter's path in both roots.
        folder: where the agent's modules and their libraries are there.
        program: the agent's package.
        options: of the agent, beside its two addresses; {shared} is the folder that both roots see.
        later: modules that no exercise reaches, imported by name.
    """

    script: Path
    interpreter: str
    folder: str
    program: str
    later: Iterable[str] = ()
    options: Sequence[str] = ()

    def modules(self, start: str, full: Path, root: Path) -> set[str]:
        """The files that the agent imports (`used_modules`).

        Args:
            start: the path in the root of what starts the agent (images/common/start.py).
            full: the root with everything.
            root: the one that the agent runs in, which may be the same.

        Raises:
            BuildError: not root, or the agent fails.
        """
        if os.geteuid():
            raise BuildError("tracing the agent needs root: it makes namespaces and TAP devices")
        shared = full / "exercise"
        shutil.rmtree(shared, ignore_errors=True)
        shared.mkdir()
        for file in (self.script, Path(__file__).with_name("exercised.py"), python.TRACER):
            shutil.copy(file, shared)
        enter = [] if root == full else ["/usr/bin/busybox", "chroot", "/image"]
        agent = [
            *(self.interpreter, "-I", "-S", "-B", f"{_SHARED}/tracer.py"),
            *("--report", f"{_SHARED}/report", "--path", self.folder),
            *(part for name in self.later for part in ("--import", name)),
            *(start, self.program, "--control", f"unix:{_SHARED}/control.sock"),
            *("--data", f"unix:{_SHARED}/data.sock"),
            *(option.format(shared=_SHARED) for option in self.options),
        ]
        run(
            [
                *("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--uts"),
                *("sh", "-ec", _NAMESPACES, "sh", full, root, _SHARED, shared),
                *(self.interpreter, "-B", f"{_SHARED}/{self.script.name}", _SHARED, *enter, *agent),
            ],
            env={"PYTHONPATH": self.folder, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/"},
        )
        return python.used_modules([shared / "report"])
