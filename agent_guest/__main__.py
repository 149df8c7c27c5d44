"""`python -m agent_guest`."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence


def load() -> Callable[[Sequence[str]], int]:
    """Imports the agent; returns what runs it."""
    gc.disable()  # until all is imported (agent.py): collections would find nothing, and take a tenth of the time
    from taploom.lean import without_unused

    without_unused()  # before the imports below
    from .cli import run

    return run


def main() -> None:
    """The command taploom-guest-agent."""
    sys.exit(load()(sys.argv[1:]))


if __name__ == "__main__":
    main()
