"""`python -m agent_helper`."""

from __future__ import annotations

import sys


def main() -> None:
    """The command taploom-helper-agent."""
    from taploom.lean import without_unused

    without_unused()  # before the imports below
    from .cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
