"""`python -m agent_guest`."""

from __future__ import annotations

import sys


def main() -> None:
    """The command taploom-guest-agent."""
    from taploom.lean import without_unused

    without_unused()  # before the imports below
    from .cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
