"""`python -m agent_helper`."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence


def load() -> Callable[[Sequence[str]], int]:
    """Returns what runs the agent: it starts the daemons, and imports the rest of the agent beside them."""
    gc.disable()  # until all is imported (cli.py): collections would find nothing, and take a tenth of the time
    from taploom.lean import without_unused

    without_unused()  # before the imports below
    from .early import start_daemons

    def run(argv: Sequence[str]) -> int:
        early = start_daemons(argv)
        from .cli import run as serve

        return serve(argv, early)

    return run


def main() -> None:
    """The command taploom-helper-agent."""
    sys.exit(load()(sys.argv[1:]))


if __name__ == "__main__":
    main()
