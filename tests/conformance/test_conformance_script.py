"""Several hundred steps of docker's CLI, of raw API calls and of looks from inside containers, against dockerd and
taploom in one run. Whatever differs and is not listed in differences.py fails."""

from __future__ import annotations

import pytest
from comparison import Pair
from script import Scenario
from steps import SCENARIOS

pytestmark = pytest.mark.system


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name.replace(" ", "-"))
def test_scenario(pair: Pair, scenario: Scenario) -> None:
    findings = pair.compare(scenario)
    assert not findings, f"{len(findings)} differences:\n" + "\n".join(map(str, findings))


def test_every_listed_difference_is_there(pair: Pair) -> None:
    """An entry that nothing matches any more is out of date."""
    if pair.tally.scenarios != {scenario.name for scenario in SCENARIOS}:
        return  # only some scenarios were asked for
    assert not [f"{entry.reason}: {entry}" for entry in pair.unused()]
