"""The forms in which the image is delivered, each the same bytes for the same files."""

from __future__ import annotations

import shutil
from pathlib import Path

from images.common import cpio, oci
from images.common.tools import debian_architecture, run, source_date_epoch

INITRAMFS, TOOLS, ROOT = "helper.cpio.zst", "helper-tools.cpio.zst", "helper.squashfs"


def write_initramfs(tree: Path, out: Path) -> None:
    """An archive that the kernel unpacks into a RAM disk, compressed."""
    plain = out.with_suffix(".plain")
    cpio.write_newc(tree, plain, devices=cpio.CONSOLE)
    cpio.compress(plain, out)
    plain.unlink()


def write_tools(tree: Path, out: Path) -> None:
    """The tools alone, to be appended to the initramfs (`cat`): a later archive adds its files to the earlier one's."""
    plain = out.with_suffix(".plain")
    cpio.write_newc(tree, plain)
    cpio.compress(plain, out)
    plain.unlink()


def write_root(tree: Path, tools: Path, out: Path) -> None:
    """A read-only file system, with the tools, for a virtio disk (root=/dev/vda ro)."""
    whole = out.with_suffix(".tree")
    shutil.copytree(tree, whole, symlinks=True)
    shutil.copytree(tools, whole, symlinks=True, dirs_exist_ok=True)
    when = str(source_date_epoch())
    out.unlink(missing_ok=True)
    same = ("-all-root", "-no-xattrs", "-no-exports", "-all-time", when, "-mkfs-time", when, "-processors", "1")
    zstd = ("-comp", "zstd", "-Xcompression-level", str(cpio.ZSTD_LEVEL))
    form = (*zstd, "-b", "128K", "-noappend", "-no-progress", "-quiet")
    # mksquashfs refuses to be told the time twice.
    run(["env", "-u", "SOURCE_DATE_EPOCH", "mksquashfs", whole, out, *form, *same])
    shutil.rmtree(whole)


def write_oci(tree: Path, tools: Path, out: Path, arch: str, version: str) -> None:
    """An OCI image layout, for runtimes whose helper VM has an image of that kind as its root."""
    labels = {"org.opencontainers.image.title": "taploom helper", "org.opencontainers.image.version": version}
    image = oci.Image(
        architecture=debian_architecture(arch), layers=[tree, tools], config={"Entrypoint": ["/init"], "Labels": labels}
    )
    oci.write_layout([image], out)
