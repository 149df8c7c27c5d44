"""Cuts the interpreter in Buildroot's target directory to what the agent imports; post-build.sh runs it.

    python3 cut.py TARGET_DIR

It is run by Buildroot's own python3 for the build machine, which has the target's version: that one imports the whole
of the agent, and of each package in the target what was imported stays, compiled. Unlike the Debian builder it does not
run the agent (that needs root); so all modules of the agent itself count as imported, and those that image.toml names.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "images/guest-initfs")]

from guest_image.recipe import read_recipe  # noqa: E402 - the folders are on the path only now

from images.common import bundle  # noqa: E402
from images.common import python as pythons  # noqa: E402

_LATER = ("encodings.idna", "encodings.utf_8")
"""Codecs, which the interpreter imports when they are asked for."""


def main(target: Path) -> None:
    """The command."""
    recipe = read_recipe()
    library = target / f"usr/lib/python{sys.version_info.major}.{sys.version_info.minor}"
    folder = target / recipe.folder.lstrip("/")
    site = library / "site-packages"
    for entry in sorted(site.iterdir()):
        if not (folder / entry.name).exists():
            shutil.move(entry, folder / entry.name)
    shutil.rmtree(site)
    used = _imported(folder, recipe.lazy)
    kept = {f"/{path.relative_to(target)}": path for path in _matching(library, _stdlib(used))}
    kept |= {f"/{path.relative_to(target)}": path for path in _files(folder) if str(path) in used}
    for name in (bundle.START_PATH, f"/{library.relative_to(target)}/os.py"):
        kept[name] = target / name.lstrip("/")
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        pythons.compile_into(kept, Path(work), interpreter=[sys.executable])
        metadata = [path.name for path in folder.glob("*.dist-info")]
        for place in (library, folder):
            shutil.rmtree(place)
        shutil.copytree(work, target, dirs_exist_ok=True)
    for name in metadata:
        (folder / name).mkdir(exist_ok=True)
    print(f"cut.py: {len(kept)} modules of the interpreter and the agent stay")


def _imported(folder: Path, lazy: tuple[str, ...]) -> set[str]:
    """The files that this interpreter opens when it imports the whole agent."""
    names = []
    for package in ("agent_guest", "taploom/rpc", "taploom/link", "taploom/contracts/taploom/guest"):
        for path in sorted((folder / package).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    imports = [part for name in (*names, *lazy, *_LATER) for part in ("--import", name)]
    with tempfile.TemporaryDirectory() as work:
        report, program = Path(work) / "report", Path(work) / "program.py"
        program.write_text("")
        tracer = [sys.executable, "-s", "-S", "-B", str(pythons.TRACER), "--report", str(report)]
        # First of all: what it leaves out is not imported by what comes after it.
        prepare = f"import sys; sys.path.insert(0, {str(folder)!r}); import taploom.lean; taploom.lean.without_unused()"
        (Path(work) / "taploom_prepare.py").write_text(prepare + "\n")
        paths = ["--path", str(folder), "--path", work]
        subprocess.run(
            [*tracer, *paths, "--import", "taploom_prepare", *imports, str(program)],
            check=True,
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        return pythons.used_modules([report])


def _stdlib(used: set[str]) -> set[str]:
    """Of used files, those of this interpreter's own library, relative to it."""
    own = Path(os.__file__).parent
    return {str(Path(name).relative_to(own)) for name in used if Path(name).is_relative_to(own)}


def _matching(library: Path, names: set[str]) -> list[Path]:
    """The target's files of these names; extensions have another suffix on another architecture."""
    stems = {name.split(".")[0] for name in names if name.endswith(".so")}
    found = []
    for path in _files(library):
        name = str(path.relative_to(library))
        if name in names or (name.endswith(".so") and name.split(".", maxsplit=1)[0] in stems):
            found.append(path)
    return found


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
