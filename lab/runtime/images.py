"""The lab's images: root file systems below one directory.

    index.json        the images; only ever replaced as a whole
    layers/DIGEST/    a root file system; DIGEST is the sha256 of the plain tar that it came as
    new-XXXX/         one on its way

Images of the same tar share their root file system. The image `host` is the machine's own and has no files here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import platform
import secrets
import shutil
import sys
from collections.abc import AsyncIterable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import trio

from lab.runtime import children
from lab.runtime.changes import ChangeError, ImageConfig, apply_changes
from lab.runtime.errors import InvalidFailure, NotFoundFailure, StateFailure
from lab.runtime.references import ReferenceFormatError, is_id, normalise
from lab.state import replace_json

logger = logging.getLogger("taploom.runtime")

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
HOST_REFERENCE = "host:latest"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}


@dataclass(frozen=True)
class Image:
    """An image; `layer` is empty for the machine's own root file system."""

    id: str
    references: tuple[str, ...]
    created_at: datetime
    size: int
    config: ImageConfig
    comment: str
    layer: str

    @property
    def host(self) -> bool:
        return not self.layer


class ImageStore:
    """The images below a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._layers = directory / "layers"
        self._layers.mkdir(mode=0o700, parents=True, exist_ok=True)
        for leftover in directory.glob("new-*"):
            shutil.rmtree(leftover)
        self._images = {image.id: image for image in (_host_image(), *self._load())}

    def all(self) -> list[Image]:
        """All images, newest first."""
        return sorted(self._images.values(), key=lambda image: image.created_at, reverse=True)

    def get(self, text: str) -> Image:
        """The image of a reference, an id, or a unique beginning of an id.

        Raises:
            NotFoundFailure, InvalidFailure: there is none, or several.
        """
        if not text:
            raise InvalidFailure("the image's name is missing")
        by_reference = self._by_reference(text)
        if by_reference is not None:
            return by_reference
        if is_id(text):
            prefix = "sha256:" + text.removeprefix("sha256:")
            found = [image for image in self._images.values() if image.id.startswith(prefix)]
            if len(found) > 1:
                raise InvalidFailure(f"ambiguous image id: {text} is the beginning of {len(found)} ids")
            if found:
                return found[0]
        raise NotFoundFailure(f"No such image: {_shown(text)}")

    def root(self, layer: str) -> Path:
        """Where a root file system is."""
        return self._layers / layer if layer else Path("/")

    async def add(self, tar: AsyncIterable[bytes], *, reference: str, comment: str, changes: Collection[str]) -> Image:
        """Makes an image of a tar stream, plain or compressed.

        Raises:
            InvalidFailure: it is no tar, a change is malformed, or the reference cannot be one; nothing is kept.
        """
        try:
            references = (normalise(reference),) if reference else ()
            config = apply_changes(ImageConfig(), changes)
        except (ReferenceFormatError, ChangeError) as error:
            raise InvalidFailure(str(error)) from error
        if HOST_REFERENCE in references:
            raise InvalidFailure("the image host is the machine's own root file system: choose another name")
        new = self._directory / f"new-{secrets.token_hex(8)}"
        new.mkdir(mode=0o755)
        try:
            unpacked = await _unpack(tar, new)
            if "error" in unpacked:
                raise InvalidFailure(str(unpacked["error"]))
            layer = str(unpacked["digest"])
            if not (self._layers / layer).exists():
                new.rename(self._layers / layer)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(shutil.rmtree, new, True)
        created_at = datetime.now(UTC)
        content = {"created": created_at.isoformat(), "config": _to_json(config), "comment": comment, "layer": layer}
        image = Image(
            id="sha256:" + hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
            references=(),
            created_at=created_at,
            size=int(unpacked["size"]),
            config=config,
            comment=comment,
            layer=layer,
        )
        self._images[image.id] = image
        for name in references:
            self._give(image.id, name)
        self._save()
        return self._images[image.id]

    def tag(self, text: str, reference: str) -> None:
        """Gives an image a further reference, taking it from another that had it.

        Raises:
            NotFoundFailure, InvalidFailure: no such image, or the reference cannot be one.
        """
        image = self.get(text)
        try:
            name = normalise(reference)
        except ReferenceFormatError as error:
            raise InvalidFailure(str(error)) from error
        if name == HOST_REFERENCE:
            raise InvalidFailure("the image host is the machine's own root file system: choose another name")
        self._give(image.id, name)
        self._save()

    def remove(self, text: str, *, force: bool, used: Collection[str]) -> tuple[list[str], str]:
        """Removes a reference, and the image with its last one; returns the references and the id that are gone.

        An id removes the image with all its references.

        Args:
            used: the ids of the images that containers were made of.

        Raises:
            NotFoundFailure, InvalidFailure: there is none, or several.
            StateFailure: it is the machine's own, or in use and not `force`.
        """
        image = self.get(text)
        by_reference = self._by_reference(text) is not None
        if image.host and (not by_reference or normalise(text) == HOST_REFERENCE):
            raise StateFailure("the image host is the machine's own root file system and cannot be removed")
        gone = [normalise(text)] if by_reference else list(image.references)
        last = not by_reference or len(image.references) == 1
        if last and image.id in used and not force:
            raise StateFailure(f"image {text} is being used by a container: remove the container first")
        if last and not image.host:
            del self._images[image.id]
        else:
            kept = tuple(name for name in image.references if name not in gone)
            self._images[image.id] = dataclasses.replace(image, references=kept)
        self._save()
        return gone, image.id if image.id not in self._images else ""

    async def remove_unused_layers(self, used: Collection[str]) -> None:
        """Removes the root file systems of no image, but for those that containers have, `used`."""
        wanted = {image.layer for image in self._images.values()}.union(used)
        for path in list(self._layers.iterdir()):
            if path.name not in wanted:
                # Renamed first: an import of the same tar meanwhile makes it anew.
                gone = self._directory / f"new-{secrets.token_hex(8)}"
                path.rename(gone)
                await trio.to_thread.run_sync(shutil.rmtree, gone, True)

    def _by_reference(self, text: str) -> Image | None:
        try:
            name = normalise(text)
        except ReferenceFormatError:
            return None
        return next((image for image in self._images.values() if name in image.references), None)

    def _give(self, image_id: str, name: str) -> None:
        for image in list(self._images.values()):
            if name in image.references and image.id != image_id:
                kept = tuple(reference for reference in image.references if reference != name)
                self._images[image.id] = dataclasses.replace(image, references=kept)
        image = self._images[image_id]
        if name not in image.references:
            self._images[image_id] = dataclasses.replace(image, references=(*image.references, name))

    def _save(self) -> None:
        images = [
            {
                **{name: getattr(image, name) for name in ("id", "references", "size", "comment", "layer")},
                "created_at": image.created_at.isoformat(),
                "config": _to_json(image.config),
            }
            for image in self._images.values()
        ]
        replace_json(self._directory / "index.json", images)

    def _load(self) -> list[Image]:
        try:
            documents = json.loads((self._directory / "index.json").read_bytes())
        except FileNotFoundError:
            return []
        return [_from_json(document) for document in documents if document["layer"]]


def architecture() -> str:
    """The machine's, in Go's words."""
    return _ARCHITECTURES.get(platform.machine(), platform.machine())


def _shown(text: str) -> str:
    try:
        return text if is_id(text) and text.startswith("sha256:") else normalise(text)
    except ReferenceFormatError:
        return text


def _host_image() -> Image:
    shell = next((path for path in ("/bin/bash", "/bin/sh") if os.access(path, os.X_OK)), "/bin/sh")
    release = Path("/etc/os-release")
    made = release.stat().st_mtime if release.exists() else 0.0
    return Image(
        id="sha256:" + hashlib.sha256(b"the root file system of the machine that the lab runs on").hexdigest(),
        references=(HOST_REFERENCE,),
        created_at=datetime.fromtimestamp(made, UTC),
        size=0,
        config=ImageConfig(command=(shell,), environment=(f"PATH={DEFAULT_PATH}",)),
        comment="the machine's own root file system",
        layer="",
    )


def _to_json(config: ImageConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)


def _from_json(document: dict[str, Any]) -> Image:
    config: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in document["config"].items()
    }
    return Image(
        id=document["id"],
        references=tuple(document["references"]),
        created_at=datetime.fromisoformat(document["created_at"]),
        size=document["size"],
        config=ImageConfig(**config),
        comment=document["comment"],
        layer=document["layer"],
    )


async def _unpack(tar: AsyncIterable[bytes], directory: Path) -> dict[str, str | int]:
    """Feeds a tar to the process that unpacks it; returns what that says."""
    stdin, feed = os.pipe()
    result, stdout = os.pipe()
    codes: list[int] = []

    async def feeding() -> None:
        async with trio.lowlevel.FdStream(feed) as stream:
            try:
                async for data in tar:
                    await stream.send_all(data)
            except trio.BrokenResourceError:
                pass  # it has seen enough; the rest of the stream need not be read

    async def unpacking() -> None:
        try:
            codes.append(
                await children.run(
                    [sys.executable, "-m", "lab.runtime.unpack", str(directory)], stdin=stdin, stdout=stdout, stderr=2
                )
            )
        finally:
            os.close(stdin)
            os.close(stdout)
        nursery.cancel_scope.cancel()

    text = b""
    try:
        async with trio.lowlevel.FdStream(result) as stream:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(feeding)
                nursery.start_soon(unpacking)
            async for part in stream:
                text += part
    except BaseExceptionGroup as group:  # the caller's stream failed
        if len(group.exceptions) == 1:
            raise group.exceptions[0] from None
        raise
    if codes != [0] or not text:
        raise OSError(f"unpacking ended with exit code {codes}; see the runtime's log")
    return dict(json.loads(text))
