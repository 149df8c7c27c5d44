"""Names of images, as Docker writes them: [DOMAIN/]PATH[:TAG].

Source: the grammar of github.com/distribution/reference (reference.go), and its rules for familiar names.
"""

from __future__ import annotations

import re

DEFAULT_TAG = "latest"

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_DOMAIN_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_DOMAIN = rf"(?:{_DOMAIN_LABEL}(?:\.{_DOMAIN_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?"
_NAME = rf"(?:{_DOMAIN}/)?{_COMPONENT}(?:/{_COMPONENT})*"
_TAG = r"[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127}"
_REFERENCE = re.compile(rf"(?P<name>{_NAME})(?::(?P<tag>{_TAG}))?")
_MAX_NAME = 255
_ID = re.compile(r"(?:sha256:)?[0-9a-f]{1,64}")


class ReferenceFormatError(ValueError):
    """Not the name of an image; the message is Docker's."""


def normalise(text: str) -> str:
    """The name as it is shown, with its tag: docker.io/library/busybox is busybox:latest.

    Raises:
        ReferenceFormatError: it cannot be a name.
    """
    if "@" in text:
        raise ReferenceFormatError("cannot import digest reference")
    match = _REFERENCE.fullmatch(text)
    if match is None:
        name = text.partition(":")[0] if "/" not in text else text
        if name != name.lower() and _REFERENCE.fullmatch(text.lower()):
            shown = name if "/" in name else f"library/{name}"
            raise ReferenceFormatError(f"invalid reference format: repository name ({shown}) must be lowercase")
        raise ReferenceFormatError("invalid reference format")
    name = _familiar(match["name"])
    if len(name) > _MAX_NAME:
        raise ReferenceFormatError("repository name must not be more than 255 characters")
    if re.fullmatch(r"[0-9a-f]{64}", name):
        raise ReferenceFormatError(f"invalid repository name ({name}), cannot specify 64-byte hexadecimal strings")
    return f"{name}:{match['tag'] or DEFAULT_TAG}"


def _familiar(name: str) -> str:
    """Without what stands for Docker Hub."""
    for prefix in ("docker.io/", "index.docker.io/"):
        name = name.removeprefix(prefix)
    return name.removeprefix("library/") if name.count("/") == 1 else name


def is_id(text: str) -> bool:
    """Whether this may be an image's id or the beginning of one."""
    return _ID.fullmatch(text) is not None
