"""Fetches what the tests here take from package registries."""

from __future__ import annotations

from pathlib import Path

from machine import check

_SETUP = Path(__file__).parents[2] / "scripts/conformance-setup.sh"


def conformance_setup() -> None:
    """Fetches what is missing; does nothing where it has been done."""
    check(str(_SETUP), timeout=300)
