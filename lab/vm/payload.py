"""What the lab adds to the images: the process server, an OCI runtime for containers, and tools.

It is an initramfs archive that is joined to an image's: the image itself stays as it is built for everyone.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from images.common import cpio, debian, elf
from images.common.cache import cached, file_sha256, inputs_hash, publish
from images.common.tools import run
from lab.vm import tools

_SOURCES = Path(__file__).parent / "guest"
SUITE = "trixie"
_COMPILERS = {"x86_64": "gcc", "arm64": "aarch64-linux-gnu-gcc"}
# The programs, by the package that has them. Those that busybox has, too, are the real ones: with all their options.
_PROGRAMS = {
    "crun": ("usr/bin/crun",),
    "iperf3": ("usr/bin/iperf3",),
    "iproute2": ("usr/bin/ip", "usr/bin/ss", "usr/sbin/tc"),
    "iputils-ping": ("usr/bin/ping",),
    "libc-bin": ("usr/bin/getent",),
    "ldnsutils": ("usr/bin/drill",),
}
# Opened by libc when they are wanted: names where they are not part of it, and threads that are cancelled (iperf3's).
_OPENED = ("libnss_files.so.2", "libnss_dns.so.2", "libgcc_s.so.1")
# Files of ours: name here, place in the VM, mode.
_FILES = (
    ("lab.conf", "etc/taploom/services.d/lab.conf", 0o644),
    ("container.sh", "usr/libexec/taploom-lab/container", 0o755),
)


def build(arch: str, *, cache: Path, say: Callable[[str], None]) -> Path:
    """Makes the archive of what the lab adds; returns its path in the cache.

    Args:
        arch: x86_64 or arm64.
        cache: where what was built stays.
        say: is told what is being done.

    Raises:
        images.common.tools.BuildError: a compiler or package is missing.
    """
    found = debian.packages(SUITE, arch, _PROGRAMS, cache=cache)
    texts = [arch, *(f"{package.name} {package.version} {package.sha256}" for package in found)]
    key = inputs_hash(texts, [*_SOURCES.iterdir(), Path(__file__)], tools.CHECKOUT)

    def make(directory: Path) -> None:
        say("building what the lab adds to the images: its process server, crun, iperf3 and other tools")
        with tempfile.TemporaryDirectory(prefix="taploom-payload-") as work:
            _make(arch, found, Path(work), directory / "payload.cpio")

    return cached(cache, f"lab-payload/{arch}", key, make)[0] / "payload.cpio"


def join(name: str, arch: str, images: Sequence[Path], payload: Path, output: Path, *, cache: Path) -> Path:
    """Makes the initramfs of a lab's VMs: image and payload, neither compressed; output/NAME/NAME.cpio.

    The host unpacks the image once; every boot with an emulated processor would take longer over it.

    Args:
        images: archives, each compressed with zstd; the first is the image.
    """
    key = inputs_hash([file_sha256(path) for path in (*images, payload)], [], Path("/"))

    def make(directory: Path) -> None:
        raw = [directory / f"{number}.cpio" for number in range(len(images))]
        for image, place in zip(images, raw, strict=True):
            run(["zstd", "-q", "-d", image, "-o", place])
        cpio.concatenate([*raw, payload], directory / f"{name}.cpio")
        for place in raw:
            place.unlink()

    built, _ = cached(cache, f"lab-{name}/{arch}", key, make)
    publish(built, output / name)
    return output / name / f"{name}.cpio"


def _make(arch: str, found: list[debian.Package], work: Path, out: Path) -> None:
    unpacked, root = work / "unpacked", work / "root"
    debian.unpack(found, unpacked)
    programs = [unpacked / path for paths in _PROGRAMS.values() for path in paths]
    names = [path for name in _OPENED for path in unpacked.rglob(name)]
    for path in sorted({*programs, *names, *elf.libraries(unpacked, [*programs, *names])}):
        target = root / path.relative_to(unpacked)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target, follow_symlinks=False)
    # An image may have busybox's there, which comes first in PATH.
    (root / "usr/sbin").mkdir(parents=True, exist_ok=True)
    (root / "usr/sbin/ip").symlink_to("../bin/ip")
    server = root / "usr/libexec/taploom-lab/server"
    server.parent.mkdir(parents=True)
    compiler = os.environ.get("TAPLOOM_CC_" + arch.upper(), _COMPILERS[arch])
    run(
        [
            compiler,
            "-static",
            "-Os",
            "-s",
            "-std=gnu11",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-o",
            server,
            _SOURCES / "server.c",
        ]
    )
    for name, where, mode in _FILES:
        place = root / where
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_SOURCES / name, place)
        place.chmod(mode)
    (root / "etc/nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files dns\n")
    cpio.write_newc(root, out)
