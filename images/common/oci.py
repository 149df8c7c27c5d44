"""OCI image layouts (opencontainers/image-spec v1.1, image-layout.md), written reproducibly."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import stat
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cpio import Device
from .tools import BuildError, source_date_epoch

_INDEX = "application/vnd.oci.image.index.v1+json"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


@dataclass(frozen=True)
class Image:
    """One platform's image.

    Args:
        architecture: OCI's name: amd64 or arm64.
        layers: directory trees or tar files, lowest first.
        config: the image config's "config" object: Entrypoint, Cmd, Env, Labels …
        variant: the architecture's, such as "v8".
    """

    architecture: str
    layers: Sequence[Path]
    config: Mapping[str, Any] = field(default_factory=dict)
    variant: str = ""
    created_by: str = "taploom"

    @property
    def platform(self) -> dict[str, str]:
        """The descriptor's "platform" object."""
        found = {"architecture": self.architecture, "os": "linux"}
        return {**found, "variant": self.variant} if self.variant else found


def write_tar(root: Path, out: Path, *, devices: Sequence[Device] = (), mtime: int | None = None) -> None:
    """Packs a directory tree as a tar file: sorted, owned by 0:0, one time stamp (default SOURCE_DATE_EPOCH or 0)."""
    when = source_date_epoch() if mtime is None else mtime
    inodes: dict[tuple[int, int], str] = {}
    nodes = {device.name: device for device in devices}
    found = {
        os.path.relpath(Path(folder) / name, root) for folder, dirs, files in os.walk(root) for name in dirs + files
    }
    with tarfile.open(out, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in sorted(found | set(nodes)):
            entry = tarfile.TarInfo(name)
            entry.mtime = when
            content: io.BufferedIOBase | None = None
            if name in nodes:
                node = nodes[name]
                entry.type = tarfile.CHRTYPE if node.kind == "c" else tarfile.BLKTYPE
                entry.mode, entry.devmajor, entry.devminor = node.mode, node.major, node.minor
                archive.addfile(entry)
                continue
            path = root / name
            status = path.lstat()
            entry.mode = stat.S_IMODE(status.st_mode)
            if stat.S_ISDIR(status.st_mode):
                entry.type = tarfile.DIRTYPE
            elif stat.S_ISLNK(status.st_mode):
                entry.type, entry.mode, entry.linkname = tarfile.SYMTYPE, 0o777, str(path.readlink())
            elif stat.S_ISREG(status.st_mode):
                first = inodes.setdefault((status.st_dev, status.st_ino), name)
                if first == name:
                    entry.size = status.st_size
                    content = io.BytesIO(path.read_bytes())
                else:
                    entry.type, entry.linkname = tarfile.LNKTYPE, first
            else:
                raise BuildError(f"{path}: neither a file, a folder nor a symbolic link")
            archive.addfile(entry, content)


def write_layout(
    images: Sequence[Image], out: Path, *, name: str = "", annotations: Mapping[str, str] | None = None
) -> str:
    """Writes an image layout with one image, or one image index over several platforms.

    Args:
        out: the layout's directory, which must not exist or be empty.
        name: the reference by which tools list it (annotation org.opencontainers.image.ref.name).
        annotations: of each image's manifest.

    Returns:
        The digest that index.json points to, "sha256:…".
    """
    blobs = out / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    when = source_date_epoch()
    created = _rfc3339(when)

    def put(data: bytes, media_type: str) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    manifests = []
    for image in images:
        layers, plain = [], []
        for number, layer in enumerate(image.layers):
            data = _tar_bytes(layer, out, number)
            plain.append(f"sha256:{hashlib.sha256(data).hexdigest()}")
            layers.append(put(gzip.compress(data, 9, mtime=0), _LAYER))
        config = {
            "created": created,
            **image.platform,
            "config": dict(image.config),
            "rootfs": {"type": "layers", "diff_ids": plain},
            "history": [{"created": created, "created_by": image.created_by} for _ in plain],
        }
        manifest: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": put(_json(config), _CONFIG),
            "layers": layers,
        }
        if annotations:
            manifest["annotations"] = dict(sorted(annotations.items()))
        manifests.append({**put(_json(manifest), _MANIFEST), "platform": image.platform})
    if len(manifests) == 1:
        top = manifests[0]
    else:
        top = put(_json({"schemaVersion": 2, "mediaType": _INDEX, "manifests": manifests}), _INDEX)
    if name:
        top = {**top, "annotations": {"org.opencontainers.image.ref.name": name}}
    (out / "oci-layout").write_bytes(_json({"imageLayoutVersion": "1.0.0"}))
    (out / "index.json").write_bytes(_json({"schemaVersion": 2, "mediaType": _INDEX, "manifests": [top]}))
    return str(top["digest"])


def check_layout(layout: Path) -> list[dict[str, Any]]:
    """Reads a layout whole: every digest, size and diff id is recomputed.

    Returns:
        The image configs in it, one per platform.

    Raises:
        BuildError: something in it is not what it is called.
    """
    if json.loads((layout / "oci-layout").read_text()) != {"imageLayoutVersion": "1.0.0"}:
        raise BuildError(f"{layout}/oci-layout: not version 1.0.0")
    seen: set[str] = set()
    configs = []

    def get(descriptor: Mapping[str, Any]) -> bytes:
        algorithm, digest = str(descriptor["digest"]).split(":")
        data = (layout / "blobs" / algorithm / digest).read_bytes()
        if algorithm != "sha256" or hashlib.sha256(data).hexdigest() != digest or len(data) != descriptor["size"]:
            raise BuildError(f"{layout}: the blob {descriptor['digest']} is not what its descriptor says")
        seen.add(digest)
        return data

    pending = list(json.loads((layout / "index.json").read_text())["manifests"])
    while pending:
        descriptor = pending.pop()
        document = json.loads(get(descriptor))
        if descriptor["mediaType"] == _INDEX:
            pending += document["manifests"]
            continue
        config = json.loads(get(document["config"]))
        plain = [f"sha256:{hashlib.sha256(gzip.decompress(get(layer))).hexdigest()}" for layer in document["layers"]]
        if config["rootfs"]["diff_ids"] != plain:
            raise BuildError(f"{layout}: the layers are not those that the config {document['config']['digest']} names")
        configs.append(config)
    stray = {path.name for path in (layout / "blobs/sha256").iterdir()} - seen
    if stray:
        raise BuildError(f"{layout}: nothing refers to the blobs {', '.join(sorted(stray))}")
    return configs


def _tar_bytes(layer: Path, out: Path, number: int) -> bytes:
    if layer.is_file():
        return layer.read_bytes()
    work = out / f".layer-{number}.tar"
    write_tar(layer, work)
    data = work.read_bytes()
    work.unlink()
    return data


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _rfc3339(seconds: int) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
