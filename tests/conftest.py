"""For all tests."""

from __future__ import annotations

from hypothesis import settings

# How long an example takes on a busy machine says nothing.
settings.register_profile("taploom", deadline=None)
settings.load_profile("taploom")
