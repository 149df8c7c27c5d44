"""Compiles images/init: PID 1 of the images, static against musl, for any architecture with Debian's compilers."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

from .cache import cached, inputs_hash
from .debian import Package, packages, unpack
from .tools import BuildError, debian_architecture, run

SOURCES = Path(__file__).parents[1] / "init"
_TRIPLETS = {"x86_64": "x86_64-linux", "arm64": "aarch64-linux"}
_FLAGS = (
    *("-std=c11", "-D_GNU_SOURCE", "-Os", "-Wall", "-Wextra", "-Werror"),
    *("-fno-stack-protector", "-fno-pie", "-no-pie", "-ffunction-sections", "-fdata-sections"),
)
_LINK = ("-nostdlib", "-static", "-s", "-Wl,--gc-sections", "-Wl,--build-id=none")


def compiler(arch: str) -> str:
    """The C compiler for an architecture: this machine's own, or Debian's cross compiler.

    Raises:
        BuildError: it is not installed; the message names its package.
    """
    debian_architecture(arch)
    triplet = _TRIPLETS[arch]
    native = platform.machine() == triplet.split("-", maxsplit=1)[0]
    name = "gcc" if native else f"{triplet}-gnu-gcc"
    if shutil.which(name) is None:
        package = "gcc" if native else f"gcc-{triplet.replace('_', '-')}-gnu"
        raise BuildError(f"{name} is not installed; scripts/vm-setup.sh installs it (Debian's package {package})")
    return name


def build_init(arch: str, *, cache: Path, update: bool = False) -> tuple[Path, Package]:
    """The compiled program, from the cache when it is there, and the libc's package that is linked into it.

    Args:
        arch: x86_64 or arm64.
        cache: the cache's root.
        update: look for a newer musl.
    """
    [musl] = packages("trixie", arch, ["musl-dev"], cache=cache, update=update, closure=False)
    gcc = compiler(arch)
    sources = [path for path in SOURCES.iterdir() if path.suffix in (".c", ".h")]
    texts = [arch, musl.sha256, run([gcc, "--version"]), *_FLAGS, *_LINK, Path(__file__).read_text()]

    def compile_all(place: Path) -> None:
        unpack([musl], place / "musl")
        triplet = f"{_TRIPLETS[arch]}-musl"
        library, headers = place / "musl/usr/lib" / triplet, place / "musl/usr/include" / triplet
        builtin = run([gcc, "-print-file-name=include"]).strip()
        support = run([gcc, "-print-libgcc-file-name"]).strip()
        # -nostdinc: nothing of this machine's own libc; its name in messages would be a path of the cache otherwise.
        includes: list[str | Path] = ["-nostdinc", "-isystem", headers, "-isystem", builtin]
        names = sorted(path.name for path in sources if path.suffix == ".c")
        begin = [library / "crt1.o", library / "crti.o"]
        end: list[str | Path] = [library / "libc.a", support, library / "crtn.o"]
        run([gcc, *_FLAGS, *includes, *_LINK, *begin, *names, *end, "-o", place / "taploom-init"], cwd=SOURCES)
        shutil.rmtree(place / "musl")

    place, _ = cached(cache, f"init/{arch}", inputs_hash(texts, sources, SOURCES), compile_all)
    return place / "taploom-init", musl
