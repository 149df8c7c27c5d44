"""The image as a custom init image of Apple's `container` (`container run --init-image`).

There the VM's kernel starts /sbin/vminitd from the image; apple/container's how-to wraps it: the wrapper is called
/sbin/vminitd, Apple's own program /sbin/vminitd.real. Our init is the wrapper; with `exec` it hands over to the other.
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

from images.common import oci
from images.common.tools import BuildError, debian_architecture

REAL = "/sbin/vminitd.real"
_CONF = f"""
# As Apple's custom init image: the agent is started, then PID 1 becomes Apple's init.
exec = {REAL}
writable = /etc
"""


def write_init_image(root: Path, arch: str, work: Path, out: Path, *, vminit: Path | None, version: str) -> None:
    """Writes the OCI layout.

    Args:
        root: the image's tree, which is not changed.
        work: an empty folder for a copy.
        vminit: an OCI layout of Apple's vminit image (`container image save`, unpacked), whose /sbin goes into ours.
            Without one the image has no /sbin/vminitd.real yet: add it with the Containerfile in README.md.

    Raises:
        BuildError: ``vminit`` has no vminitd for this architecture.
    """
    tree = work / "tree"
    shutil.copytree(root, tree, symlinks=True)
    (tree / "usr/sbin/vminitd").symlink_to("taploom-init")
    with (tree / "etc/taploom/init.conf").open("a") as conf:
        conf.write(_CONF)
    if vminit is not None:
        add_vminit(vminit, debian_architecture(arch), tree / "usr/sbin")
    image = oci.Image(
        debian_architecture(arch),
        [tree],
        {"Entrypoint": ["/sbin/vminitd"], "WorkingDir": "/"},
        variant="v8" if arch == "arm64" else "",
        created_by="images/guest-initfs/build",
    )
    annotations = {"org.opencontainers.image.title": "taploom guest init", "org.opencontainers.image.version": version}
    oci.write_layout([image], out, name=f"taploom-guest-init:{version}", annotations=annotations)
    oci.check_layout(out)


def add_vminit(layout: Path, architecture: str, folder: Path) -> None:
    """Puts what an image has in /sbin into a folder, its vminitd as vminitd.real; names that are taken stay ours."""
    found = set()
    for data in _layers(layout, architecture):
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for entry in archive:
                name = entry.name.removeprefix("./").removeprefix("/")
                if not entry.isfile() or Path(name).parent not in (Path("sbin"), Path("usr/sbin")):
                    continue
                base = Path(name).name
                target = folder / (Path(REAL).name if base == "vminitd" else base)
                if target.is_symlink() or (target.exists() and base not in found):
                    continue
                content = archive.extractfile(entry)
                assert content is not None
                target.write_bytes(content.read())
                target.chmod(0o755)
                found.add(base)
    if "vminitd" not in found:
        raise BuildError(
            f"{layout} has no /sbin/vminitd for {architecture}: give the OCI layout of Apple's vminit image"
        )


def _layers(layout: Path, architecture: str) -> list[bytes]:
    def get(descriptor: dict[str, Any]) -> bytes:
        digest: str = descriptor["digest"]
        return (layout / "blobs" / digest.replace(":", "/")).read_bytes()

    pending = json.loads((layout / "index.json").read_text())["manifests"]
    while pending:
        document = json.loads(get(pending.pop()))
        pending += document.get("manifests", [])
        if "layers" not in document or json.loads(get(document["config"]))["architecture"] != architecture:
            continue
        layers = [get(layer) for layer in document["layers"]]
        plain: list[bytes] = [gzip.decompress(layer) if layer[:2] == b"\x1f\x8b" else layer for layer in layers]
        return plain
    return []
