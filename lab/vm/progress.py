"""How far the VMs of a lab have booted, for the person who waits."""

from __future__ import annotations

import sys
import time
from pathlib import Path

_INIT = "taploom-init: init after"
_AGENT = "taploom-init: agent answers"
_STAGES = ("", "kernel", "init", "agent", "ready")


def stage(console: Path) -> str:
    """kernel, init or agent: what runs, as the console tells it; "" when nothing does yet."""
    try:
        said = console.read_text(errors="replace")
    except OSError:
        return ""
    return "agent" if _AGENT in said else "init" if _INIT in said else "kernel"


class BootProgress:
    """Prints how VMs boot: on a terminal one line that changes, elsewhere a line for each stage that one has reached.

    Args:
        consoles: each VM's console, by the VM's name.
    """

    def __init__(self, consoles: dict[str, Path]) -> None:
        self._consoles = consoles
        self._reached = dict.fromkeys(consoles, "")
        self._began = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._drawn = 0
        self.changed_at = self._began

    def update(self, ready: set[str]) -> None:
        """Prints what is new.

        Args:
            ready: the VMs that the bridge says are there.
        """
        news = False
        for name, console in self._consoles.items():
            now = "ready" if name in ready else stage(console)
            before = self._reached[name]
            if _STAGES.index(now) == _STAGES.index(before):
                continue
            self._reached[name] = now
            news = True
            if not self._terminal and now:
                # A VM that boots anew goes back.
                self._print(f"{name}: {now} after {time.monotonic() - self._began:.1f} s")
        if news:
            self.changed_at = time.monotonic()
        if self._terminal:
            self._draw()

    def end(self) -> None:
        """Leaves what was printed last."""
        self._drawn = 0

    def _draw(self) -> None:
        width = max((len(name) for name in self._consoles), default=0)
        lines = []
        for name, reached in self._reached.items():
            marks = [mark if _STAGES.index(mark) <= _STAGES.index(reached) else "·" * len(mark) for mark in _STAGES[1:]]
            lines.append(f"  {name:<{width}}  {'  '.join(marks)}")
        lines.append(f"  {time.monotonic() - self._began:.0f} s")
        up = f"\033[{self._drawn}A" if self._drawn else ""
        sys.stderr.write(up + "".join(f"\r\033[K{line}\n" for line in lines))
        sys.stderr.flush()
        self._drawn = len(lines)

    def _print(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)
