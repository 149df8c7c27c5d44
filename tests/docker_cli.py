"""Which docker command the tests run, and where what they fetch is kept: outside the checkout, by version."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

CACHE = Path(os.environ.get("TAPLOOM_CACHE", "/var/cache/taploom")) / "conformance"
# The newest client: what is in front of the distribution's in PATH, or that of Debian 13.
_FOUND = shutil.which("docker")
CLI = _FOUND if _FOUND not in (None, "/usr/bin/docker") else f"{CACHE}/trixie/usr/bin/docker"
