"""An interpreter cut to what a program imports: traced, compiled, and checked to hold nothing more.

The way of a builder: unpack the interpreter and the program with sources into a root; run the program there by
`images/common/tracer.py`, once or in several runs that reach all it does; `used_modules` reads the reports;
`compile_into` puts those files, compiled, into the image's tree; run the program in that tree by the tracer again and
let `check` compare. Modules that a run cannot reach are declared by name and imported by the tracer (`--import`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from .tools import BuildError, run

TRACER = Path(__file__).with_name("tracer.py")
"""To be run in a root; copy it there."""

_COMPILE = """
import importlib._bootstrap_external as bootstrap, importlib.util, marshal, pathlib, sys
optimize = int(sys.argv[1])
for line in sys.stdin.read().splitlines():
    source, shown, target = line.split("\\t")
    data = pathlib.Path(source).read_bytes()
    code = bootstrap.SourceFileLoader("module", shown).source_to_code(data, shown, _optimize=optimize)
    # PEP 552, flags 0b01: a hash that the interpreter does not check.
    pathlib.Path(target).write_bytes(
        bootstrap._code_to_hash_pyc(code, importlib.util.source_hash(data), checked=False)
    )
"""


def used_modules(reports: Iterable[Path], *, below: Path | None = None) -> set[str]:
    """The files that traced runs imported, as paths in the root that they ran in ("/usr/lib/python3.13/abc.py").

    Args:
        below: where the root was mounted for a run outside it; taken off the paths' beginning.

    Files in __pycache__ stand for their sources.
    """
    found = set()
    for report in reports:
        for line in report.read_text().splitlines():
            path = Path(line)
            if path.parent.name == "__pycache__":
                path = path.parent.parent / f"{path.name.split('.')[0]}.py"
            if below is not None and path.is_relative_to(below):
                path = Path("/") / path.relative_to(below)
            found.add(str(path))
    return found


def compile_into(
    modules: Mapping[str, Path], root: Path, *, interpreter: Iterable[str | Path], optimize: int = 2
) -> None:
    """Puts modules into an image's tree: sources compiled to sourceless .pyc, extensions as they are.

    Args:
        modules: path in the image ("/usr/lib/taploom/trio/__init__.py") to the source's or extension's file here.
        root: the image's tree.
        interpreter: the command that runs an interpreter of the image's version here: .pyc files fit that version only,
            but any architecture.
        optimize: 0 keeps all, 1 drops assertions, 2 docstrings too.

    Tracebacks have lines, but no columns within them: that halves what the interpreter reads at start.

    Raises:
        BuildError: a source that the interpreter cannot compile.
    """
    lines = []
    for name, source in sorted(modules.items()):
        target = root / name.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".py":
            compiled = target.with_suffix(".pyc")
            lines.append(f"{source}\t{name}\t{compiled}")
        else:
            shutil.copyfile(source, target)
            target.chmod(0o644)
    # A fixed hash seed and one order: marshal writes sets, and references to shared objects, as it finds them.
    run(
        [*interpreter, "-I", "-S", "-B", "-X", "no_debug_ranges", "-c", _COMPILE, str(optimize)],
        env={"PYTHONHASHSEED": "0"},
        stdin="\n".join(lines) + "\n",
    )


def module_files(root: Path, folders: Iterable[str]) -> set[str]:
    """The paths in the image of all modules' files below these folders of its tree."""
    found = set()
    for folder in folders:
        for path in (root / folder.lstrip("/")).rglob("*"):
            if path.is_file():
                found.add(f"/{path.relative_to(root)}")
    return found


def check(present: set[str], used: set[str], *, landmarks: Iterable[str] = ()) -> None:
    """Compares what an image's interpreter tree holds with what traced runs in that very tree imported.

    Args:
        landmarks: files that are there for another reason, such as the one by which the interpreter finds its library.

    Raises:
        BuildError: names every file that nothing imports.
    """
    idle = sorted(present - used - set(landmarks))
    if idle:
        listing = "\n  ".join(idle)
        raise BuildError(f"nothing imports these files of the image's interpreter tree; leave them out:\n  {listing}")
