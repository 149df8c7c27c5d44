"""Which handler answers a path: Docker's version prefix and its patterns."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass

from host_bridge.docker_api.http import Handler, Version

_PLACEHOLDER = re.compile(r"\{([a-z]+)(?::([^{}]+))?\}")
_VERSION = re.compile(r"/v([0-9.]+)(/.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Match:
    """A route that fits: its handler and the path's named parts."""

    handler: Handler
    params: Mapping[str, str]


class Router:
    """Routes in the order in which they were added; the first that fits answers, as with Docker's own."""

    def __init__(self) -> None:
        self._routes: list[tuple[str, re.Pattern[str], Handler]] = []

    def add(self, method: str, pattern: str, handler: Handler) -> None:
        """Adds a route.

        Args:
            method: upper case.
            pattern: the path without a version, such as `/networks/{id:.+}`. `{id}` alone fits anything without a
                slash.
            handler: answers.
        """
        expression, end = "", 0
        for found in _PLACEHOLDER.finditer(pattern):
            expression += re.escape(pattern[end : found.start()])
            expression += f"(?P<{found[1]}>{found[2] or '[^/]+'})"
            end = found.end()
        expression += re.escape(pattern[end:])
        self._routes.append((method, re.compile(expression, re.DOTALL), handler))

    def find(self, method: str, path: str) -> Match | None:
        """The route of a path without version prefix; None: there is none."""
        for route_method, pattern, handler in self._routes:
            if route_method == method and (found := pattern.fullmatch(path)) is not None:
                return Match(handler, found.groupdict())
        return None


def split_version(path: str) -> tuple[str | None, str]:
    """The version that a path starts with, as text, and the rest. `/v1.41/networks` gives 1.41 and /networks."""
    found = _VERSION.fullmatch(path)
    return (None, path) if found is None else (found[1], found[2])


def parse_version(text: str) -> Version:
    """A version as Docker compares it: numbers between dots, what is no number counts as 0; at least two numbers."""
    numbers = [int(part) if part.isascii() and part.isdigit() and len(part) < 10 else 0 for part in text.split(".")]
    while len(numbers) > 2 and not numbers[-1]:
        numbers.pop()
    return tuple(numbers) if len(numbers) > 1 else (numbers[0], 0)


def clean_path(path: str) -> str:
    """The path without `//`, `.` and `..`; a slash at the end stays. Docker redirects to it."""
    if not path.startswith("/"):
        path = "/" + path
    cleaned = posixpath.normpath(path)
    # normpath keeps two leading slashes (POSIX gives them a meaning of their own).
    cleaned = "/" + cleaned.lstrip("/")
    return cleaned + "/" if path.endswith("/") and cleaned != "/" else cleaned
