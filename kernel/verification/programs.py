"""Compiles the eBPF programs (bpf/*.bpf.c) with clang."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from images.common.cache import cached, inputs_hash
from images.common.tools import BuildError, run

ROOT = Path(__file__).resolve().parents[2]
SOURCES = Path(__file__).parent / "bpf"
_TARGETS = {"x86_64": ("x86", "x86_64-linux-gnu"), "arm64": ("arm64", "aarch64-linux-gnu")}


def build(arch: str, cache: Path, say: Callable[[str], None]) -> Path:
    """A directory with NAME.o for every bpf/NAME.bpf.c, from the cache when nothing has changed.

    Args:
        arch: x86_64 or arm64.
        cache: the cache's root.
        say: called with what is being done.

    Raises:
        BuildError: clang or libbpf's headers are missing, or a program does not compile.
    """
    target, triplet = _TARGETS[arch]

    def compile_all(directory: Path) -> None:
        say("compiling the eBPF programs")
        if not shutil.which("clang"):
            raise BuildError("clang is not installed; scripts/vm-setup.sh installs all that the builds need")
        for source in sorted(SOURCES.glob("*.bpf.c")):
            output = directory / f"{source.name.removesuffix('.bpf.c')}.o"
            # -mcpu=v3: 32-bit jumps and sub-registers, which kernels have since 5.1.
            options = ["-target", "bpf", "-mcpu=v3", "-O2", "-g", f"-D__TARGET_ARCH_{target}", "-Wall", "-Werror"]
            # The kernel's types in the form of any Linux: sizes are those of BPF, whichever machine's headers are here.
            headers = [f"-I{path}" for name in {triplet, *_here()} if (path := Path("/usr/include") / name).is_dir()]
            run(["clang", *options, *headers, "-c", source, "-o", output])

    key = inputs_hash([arch], [Path(__file__), SOURCES], ROOT)
    return cached(cache, f"kernel-verify/bpf-{arch}", key, compile_all)[0]


def _here() -> list[str]:
    return [triplet for _, triplet in _TARGETS.values()]
