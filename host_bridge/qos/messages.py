"""Limits and marks as contract messages (`taploom.bridge.v1`)."""

from __future__ import annotations

from collections.abc import Mapping

from host_bridge.errors import InvalidError
from host_bridge.qos.model import IN, OUT, Said
from taploom.contracts.taploom.bridge import v1 as bridge

_DIRECTIONS = {IN: bridge.QosDirection.IN, OUT: bridge.QosDirection.OUT}
_NAMES = {bridge.QosDirection.UNSPECIFIED: ""} | {value: name for name, value in _DIRECTIONS.items()}


def direction_message(direction: str) -> bridge.QosDirection:
    """A direction; empty: both."""
    return _DIRECTIONS.get(direction, bridge.QosDirection.UNSPECIFIED)


def direction_of(message: bridge.QosDirection) -> str:
    """A direction, empty for both; raises InvalidError."""
    if message not in _NAMES:
        raise InvalidError(f"direction {int(message)} is not known: update the bridge")
    return _NAMES[message]


def rules_message(said: Mapping[str, Said]) -> list[bridge.QosRule]:
    """What is said of each direction."""
    return [
        bridge.QosRule(
            direction=direction_message(direction),
            rate_bits_per_second=one.rate or 0,
            burst_bytes=one.burst or 0,
            dscp=one.dscp,
        )
        for direction, one in said.items()
    ]
