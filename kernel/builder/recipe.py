"""What determines the kernel's bytes beside source, symbols and tools. Its text is part of the cache's key."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Target:
    """How one architecture is built.

    Attributes:
        kbuild: what Linux calls it.
        machine: what uname and GNU call it.
        image: make's target.
        files: name in the output -> path below the object tree.
        objects: about how many steps make prints, for the progress.
    """

    kbuild: str
    machine: str
    image: str
    files: Mapping[str, str]
    objects: int


TARGETS = {
    "x86_64": Target("x86_64", "x86_64", "bzImage", {"vmlinuz": "arch/x86/boot/bzImage"}, 3000),
    # The plain image: Virtualization.framework, Cloud Hypervisor and Firecracker boot nothing else; QEMU boots it too.
    "arm64": Target("arm64", "aarch64", "Image", {"vmlinuz": "arch/arm64/boot/Image"}, 3000),
}

# The kernel tells when, by whom and where it was built; ours says the same each time.
STAMP = {
    "KBUILD_BUILD_TIMESTAMP": "Thu Jan  1 00:00:00 UTC 2026",
    "KBUILD_BUILD_USER": "taploom",
    "KBUILD_BUILD_HOST": "taploom",
    "KBUILD_BUILD_VERSION": "1",
}


def cross_prefix(arch: str) -> str:
    """The prefix of the compiler's name, empty on a machine of the architecture itself."""
    machine = TARGETS[arch].machine
    here = {"arm64": "aarch64", "amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
    return "" if here == machine else f"{machine}-linux-gnu-"


def make_variables(arch: str, source: Path, objects: Path) -> dict[str, str]:
    """Variables of every call of make.

    The build id is a hash over the debugging information too, and that names directories: they are mapped away. Of the
    debugging information BTF takes the types, not where variables live: leaving that out saves a fifth of the time.
    """
    mapped = f"-ffile-prefix-map={objects}=. -ffile-prefix-map={source}=."
    return {
        "ARCH": TARGETS[arch].kbuild,
        "CROSS_COMPILE": cross_prefix(arch),
        "O": str(objects),
        "KCFLAGS": f"{mapped} -fno-var-tracking",
        "KAFLAGS": mapped,
        "LOCALVERSION": "",
        **STAMP,
    }
