"""`python -m agent_guest`."""

from __future__ import annotations

import sys


def main() -> None:
    """The command taploom-guest-agent."""
    from .lean import without_openssl

    without_openssl()  # before the imports below
    from .cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
