"""The steps, by what they are about."""

from __future__ import annotations

from script import Scenario

from steps import connect, containers, networks, ports

SCENARIOS: list[Scenario] = [
    *networks.SCENARIOS,
    *connect.SCENARIOS,
    *containers.SCENARIOS,
    *ports.SCENARIOS,
]
