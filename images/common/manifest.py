"""manifest.json: what is in an image and what it was made from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .cache import file_sha256
from .debian import Package
from .wheels import Wheel


def build_manifest(
    *,
    image: str,
    arch: str,
    builder: str,
    version: str,
    inputs: str,
    packages: Iterable[Package],
    wheels: Iterable[Wheel],
    root: Path,
    outputs: Iterable[Path],
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The manifest's content; the same inputs give the same one (no times, no host names).

    Args:
        inputs: the hash of all that went in, `cache.inputs_hash`.
        packages: Debian packages of which files are in the image.
        root: the image's tree: each file is listed with its size, its total unpacked.
        outputs: the files made; listed by name with size and SHA-256.
        extra: further top-level members.
    """
    files = {
        f"/{path.relative_to(root)}": path.lstat().st_size
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }
    return {
        "image": image,
        "arch": arch,
        "builder": builder,
        "version": version,
        "inputs_sha256": inputs,
        "packages": [
            {"name": p.name, "version": p.version, "architecture": p.architecture, "sha256": p.sha256}
            for p in sorted(packages, key=lambda package: package.name)
        ],
        "wheels": [
            {"name": w.name, "version": w.version, "file": w.path.name, "sha256": w.sha256}
            for w in sorted(wheels, key=lambda wheel: wheel.name)
        ],
        "outputs": {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in outputs},
        "unpacked_bytes": sum(files.values()),
        "files": files,
        **(extra or {}),
    }


def write_manifest(content: Mapping[str, Any], out: Path) -> None:
    """Writes it as JSON, indented for readers and stable for comparisons."""
    out.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
