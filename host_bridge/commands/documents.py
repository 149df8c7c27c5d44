"""What commands that apply documents, and those that change what the helper makes, have in common."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from host_bridge.client import CommandError

T = TypeVar("T")


def read_document(path: str, read: Callable[[str], T]) -> tuple[str, T]:
    """What messages call a file (`-`: standard input), and what `read` makes of its text.

    Raises:
        CommandError: it cannot be read, or `read` raised DocumentError: with the line.
    """
    from host_bridge.documents import DocumentError

    name = "standard input" if path == "-" else path
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from error
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise CommandError(f"{name}:{line}: this is not UTF-8: save it as UTF-8") from error
    try:
        return name, read(text)
    except DocumentError as error:
        raise CommandError(f"{name}:{error.line}: {error}") from error


def check_in_force(pending: str) -> None:
    """Raises CommandError when what is recorded is not in force, with the reason."""
    if pending:
        raise CommandError(f"recorded, but not in force yet: {pending}")
