"""Limits of the process."""

from __future__ import annotations

import resource
from contextlib import suppress
from typing import Final

__all__ = ["raise_descriptor_limit"]

# Not the hard limit itself, which may be a million: children inherit it, and some close that many descriptors one by
# one.
_DESCRIPTORS: Final = 16_384


def raise_descriptor_limit() -> None:
    """Let the process open 16,384 descriptors, or as many as its hard limit permits (setrlimit(2)): streams take two
    each.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
