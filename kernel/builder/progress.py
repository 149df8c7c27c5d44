"""Progress on standard error: one line that is rewritten on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_EVERY = 20.0


def clock(seconds: float) -> str:
    """Seconds as people read them: 12.3 s, 4 min 05 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


class Progress:
    """Says what a build does. Times are since the start of the build.

    Args:
        label: stands before each line.
        stream: where to; standard error by default.
    """

    def __init__(self, label: str, stream: TextIO | None = None) -> None:
        self._label = label
        self._stream = stream if stream is not None else sys.stderr
        self._terminal = self._stream.isatty()
        self._start = time.monotonic()
        self._last = 0.0
        self._open = False

    def say(self, text: str) -> None:
        """A line of its own."""
        self._end_line()
        print(f"{self._label}: {text}", file=self._stream, flush=True)

    def steps(self, done: int, expected: int, what: str) -> None:
        """So many steps of about so many are done, the last one is `what`; shown as often as is useful."""
        now = time.monotonic()
        if now - self._last < (0.2 if self._terminal else _EVERY):
            return
        self._last = now
        percent = min(99, 100 * done // max(1, expected))
        text = f"{self._label}: {percent:2d}%, {done} of about {max(done, expected)}, {clock(now - self._start)}"
        if self._terminal:
            print(f"\r\x1b[K{text}  {what[:60]}", end="", file=self._stream, flush=True)
            self._open = True
        else:
            print(text, file=self._stream, flush=True)

    def _end_line(self) -> None:
        if self._open:
            print("\r\x1b[K", end="", file=self._stream)
            self._open = False
