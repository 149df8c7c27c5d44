"""The steps, by what they are about."""

from __future__ import annotations

from script import Scenario

from steps import api, compose, connect, containers, names, networks, ports, reach

SCENARIOS: list[Scenario] = [
    *networks.SCENARIOS,
    *connect.SCENARIOS,
    *api.SCENARIOS,
    *containers.SCENARIOS,
    *names.SCENARIOS,
    *ports.SCENARIOS,
    *reach.SCENARIOS,
    *compose.SCENARIOS,
]
# What is slow is asked for last.
SCENARIOS.sort(key=lambda scenario: scenario.background)
