"""Root file systems of booted containers: an overlay of what the container wrote over its image."""

from __future__ import annotations

import errno
from pathlib import Path

from lab.runtime import kernel
from lab.runtime.containers import Container

_HOSTS = """\
127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
fe00::0\tip6-localnet
ff00::0\tip6-mcastprefix
ff02::1\tip6-allnodes
ff02::2\tip6-allrouters
"""
_FILES = ("resolv.conf", "hosts", "hostname")


def mount(container: Container, layer: Path) -> None:
    """Mounts the root file system. OSError when the machine does not do it."""
    directory = container.directory
    if any(character in str(layer) for character in ":,\\"):
        raise OSError(errno.EINVAL, f"{layer}: no ':', ',' or backslash may be in a lab's path")
    kernel.mount(
        "overlay",
        directory / "root",
        "overlay",
        # No devices: nothing but the container's own /dev is to lead to the machine's.
        kernel.MS_NODEV,
        f"lowerdir={layer},upperdir={directory / 'upper'},workdir={directory / 'work'}",
    )


def write_files(container: Container, *, own_network: bool) -> list[str]:
    """Writes the container's own hostname, hosts and resolv.conf into its directory; returns their names."""
    resolv_conf = Path("/etc/resolv.conf").read_text() if Path("/etc/resolv.conf").exists() else ""
    files = {"hostname": f"{container.hostname}\n", "hosts": _HOSTS, "resolv.conf": resolv_conf}
    if not own_network:
        files["hosts"] = Path("/etc/hosts").read_text() if Path("/etc/hosts").exists() else _HOSTS
    for name, text in files.items():
        path = container.directory / name
        path.write_text(text)
        path.chmod(0o644)
    return list(files)


def unmount(container: Container) -> None:
    """Undoes `mount`, and takes away what was bound over the files."""
    for name in ("root", *_FILES):
        kernel.unmount(container.directory / name)
