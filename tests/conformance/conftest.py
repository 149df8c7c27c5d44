"""The two sides, once per process of pytest. TAPLOOM_CONFORMANCE_SUMMARY names a file for the summary."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from comparison import Pair
from script import Scenario
from setup_cache import conformance_setup


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest of all begins first; others run beside it (scripts/test.sh)."""
    items.sort(key=lambda item: item.path.name != "test_conformance_script.py")


@pytest.fixture(scope="session")
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    conformance_setup()
    sides = Pair()
    try:
        wanted = [item.callspec.params.get("scenario") for item in request.session.items if hasattr(item, "callspec")]
        sides.start(scenario for scenario in wanted if isinstance(scenario, Scenario))
        yield sides
    finally:
        sides.close()
        summary = os.environ.get("TAPLOOM_CONFORMANCE_SUMMARY")
        if summary and sides.tally.steps:
            Path(summary).write_text(f"{sides.tally}\n")
        reporter = request.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None and sides.tally.steps:
            reporter.write_line(f"\n{sides.tally}")
