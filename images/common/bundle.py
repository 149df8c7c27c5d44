"""The file that an image's interpreter starts from: its modules' code, and what else it would make each time.

`collect` runs the image's interpreter to see what the program's import compiles, `write` puts the compiled modules of
an image's tree and that into one file, `START` is the program in the image that reads it; it says in what form.
"""

from __future__ import annotations

import marshal
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from .tools import BuildError, run

START = Path(__file__).with_name("start.py")
"""The program in the image: START_PATH there."""
START_PATH = "/usr/lib/taploom/start.py"
BUNDLE_PATH = "/usr/lib/taploom/modules.bundle"
OWN = (BUNDLE_PATH, f"{START_PATH}c")
"""Our files among an image's modules."""
_FOLDER = Path("/usr/lib/taploom")
_COLLECT = Path(__file__).with_name("collect.py")
_FORM = 2
# What the interpreter imports before it starts a program; by os.pyc it finds its library (Modules/getpath.py).
_EARLY = ("os", "encodings", "encodings.aliases", "encodings.utf_8")


def collect(
    program: str,
    folder: Path,
    modules: Iterable[str],
    *,
    interpreter: Sequence[str | Path],
    optimize: int,
    out: Path,
) -> None:
    """Notes what importing the program compiles.

    Args:
        program: a package whose `__main__` has `load`.
        folder: where it is with its libraries, with sources.
        modules: the files that it imports, as paths in the image; those of its own packages are imported, too.
        interpreter: the command that runs the image's interpreter here.
        optimize: as for `compile_into`.
        out: for `write`.
    """
    options = ["-s", "-S", "-B", *(["-O"] * optimize), "-X", "no_debug_ranges"]
    with tempfile.TemporaryDirectory() as work:
        earlier, listed = Path(work) / "earlier", Path(work) / "names"
        listed.write_text("".join(f"{name}\n" for name in sorted(_own(program, modules))))
        command = [*interpreter, *options, _COLLECT, folder, program, listed]
        run([*command, earlier], env={"PYTHONHASHSEED": "1"})
        run([*command, out, earlier], env={"PYTHONHASHSEED": "0"})


def write(root: Path, library: str, folder: str, *, collected: Path) -> None:
    """Moves the compiled modules of an image's tree into one file there, with what `collect` has found.

    Files that the interpreter needs before it starts a program stay.

    Args:
        root: the image's tree.
        library: where the interpreter's own modules are in the image ("/usr/lib/python3.13").
        folder: where all others are.
        collected: what `collect` wrote.
    """
    modules: dict[str, tuple[str, bool, int, int]] = {}
    code = bytearray()
    for place in (library, folder):
        top = root / place.lstrip("/")
        for path in sorted(top.rglob("*.pyc")):
            name = _name(path.relative_to(top))
            shown = f"/{path.relative_to(root)}"
            if name in _EARLY or shown == f"{START_PATH}c":
                continue
            if name in modules:
                raise BuildError(f"module {name} is there twice: {modules[name][0]} and {shown}")
            data = path.read_bytes()[16:]
            modules[name] = (shown, path.name == "__init__.pyc", len(code), len(data))
            code += data
            path.unlink()
        _prune(top)
    found = marshal.loads(collected.read_bytes())  # noqa: S302 - our own
    texts = {}
    for text, data in found["texts"].items():
        texts[text] = (len(code), len(data))
        code += data
    index = marshal.dumps({"modules": modules, "texts": texts, "patterns": found["patterns"]}, _FORM)
    (root / BUNDLE_PATH.lstrip("/")).write_bytes(len(index).to_bytes(8, "little") + index + code)


def modules(root: Path) -> dict[str, int]:
    """The modules in a tree's bundle: their path, and their code's size in bytes."""
    data = (root / BUNDLE_PATH.lstrip("/")).read_bytes()
    size = int.from_bytes(data[:8], "little")
    index = marshal.loads(data[8 : 8 + size])  # noqa: S302 - our own
    return {file: length for file, _, _, length in index["modules"].values()}


def _own(program: str, modules: Iterable[str]) -> Iterable[str]:
    for module in modules:
        path = Path(module)
        for top in (program, "taploom"):
            if path.is_relative_to(_FOLDER / top) and path.suffix == ".py" and path.name != "__main__.py":
                yield _name(path.relative_to(_FOLDER))


def _name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _prune(top: Path) -> None:
    for path in sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True):
        # A distribution's folder says its version by its name (taploom.lean).
        if path.suffix != ".dist-info" and not any(path.iterdir()):
            path.rmdir()
