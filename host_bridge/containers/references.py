"""Image references: `busybox`, `busybox:1.36`, `sha256:…`, as Docker reads and shortens them."""

from __future__ import annotations

import re

from host_bridge.containers.errors import invalid

_COMPONENT = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_DOMAIN = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])(?:\.[a-zA-Z0-9-]+)*(?::[0-9]+)?"
_REFERENCE = re.compile(
    rf"(?P<name>(?:(?:{_DOMAIN})/)?{_COMPONENT}(?:/{_COMPONENT})*)(?::(?P<tag>[\w][\w.-]{{0,127}}))?"
    r"(?:@(?P<digest>[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,}))?",
    re.ASCII,
)
_ID = re.compile(r"(?:sha256:)?[0-9a-f]{64}")
_MAX_NAME = 255
_OFFICIAL = ("docker.io/library/", "index.docker.io/library/", "docker.io/", "index.docker.io/")


def parse(text: str) -> tuple[str, str]:
    """The short name and the tag (empty: none) of a reference; raises ContainerError with Docker's texts.

    An image's whole id is no name: `is_id` tells.
    """
    found = _REFERENCE.fullmatch(text) if text else None
    if found is None or (_ID.fullmatch(text) and not text.startswith("sha256:")):
        if text and _REFERENCE.fullmatch(text.lower()):
            raise invalid("invalid reference format: repository name must be lowercase")
        raise invalid("invalid reference format")
    name = found["name"]
    for prefix in _OFFICIAL:
        if name.startswith(prefix) and len(name) > len(prefix):
            name = name[len(prefix) :]
            break
    if len(name) > _MAX_NAME:
        raise invalid(f"repository name must not be more than {_MAX_NAME} characters")
    return name, found["tag"] or ""


def is_id(text: str) -> bool:
    """True when the text names an image by its id: whole, or after `sha256:` also a part of it."""
    return _ID.fullmatch(text) is not None or re.fullmatch(r"sha256:[0-9a-f]+", text) is not None


def with_tag(text: str) -> str:
    """The reference with its tag, `latest` unless given; ids stay as they are."""
    if is_id(text):
        return text
    name, tag = parse(text)
    return f"{name}:{tag or 'latest'}"
