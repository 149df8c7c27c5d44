"""What the tests here take from package registries: kept outside the checkout, by version."""

from __future__ import annotations

import os
from pathlib import Path

from machine import check

CACHE = Path(os.environ.get("TAPLOOM_CACHE", "/var/cache/taploom")) / "conformance"
_SETUP = Path(__file__).parents[2] / "scripts/conformance-setup.sh"


def conformance_setup() -> None:
    """Fetches what is missing; does nothing where it has been done."""
    check(str(_SETUP), timeout=300)
