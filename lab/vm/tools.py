"""Where the programs are that VMs need, and what to do when one is missing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lab.vm.errors import MachineError

CHECKOUT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("x86_64", "arm64")
_QEMU = {"x86_64": "qemu-system-x86_64", "arm64": "qemu-system-aarch64"}


def cache() -> Path:
    """Where what is slow to get is kept between runs."""
    return Path(os.environ.get("TAPLOOM_CACHE", "/var/cache/taploom"))


def host_architecture() -> str:
    """x86_64 or arm64.

    Raises:
        MachineError: it is neither.
    """
    machine = os.uname().machine
    found = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "arm64", "arm64": "arm64"}.get(machine)
    if found is None:
        raise MachineError(f"there are no kernel and images for {machine}; there are for {' and '.join(ARCHITECTURES)}")
    return found


def qemu(arch: str) -> str:
    """QEMU's path.

    Raises:
        MachineError: it is not installed, or the architecture is not known.
    """
    try:
        name = _QEMU[arch]
    except KeyError:
        raise MachineError(f"{arch!r} is not an architecture; use {' or '.join(ARCHITECTURES)}") from None
    path = shutil.which(name)
    if path is None:
        raise MachineError(f"{name} is not installed: run 'make vm-setup'")
    return path


def vhost_device_vsock() -> str:
    """The path of vhost-device-vsock: what `scripts/vm-setup.sh` unpacked, or one that is installed.

    Raises:
        MachineError: it is not there.
    """
    ours = cache() / "vhost-device-vsock/usr/bin/vhost-device-vsock"
    if ours.exists():
        return str(ours)
    path = shutil.which("vhost-device-vsock")
    if path is None:
        raise MachineError(f"vhost-device-vsock is not installed, nor is it {ours}: run 'make vm-setup'")
    return path
