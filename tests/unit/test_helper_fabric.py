"""Pieces of the helper's fabric that need neither OVS nor OVN."""

from __future__ import annotations

import trio

from agent_helper.fabric import _time_left


async def test_a_caller_whose_time_is_over_is_told_so() -> None:
    """Not waited for, and no error of ours: the time that is left is none."""
    assert _time_left() > 0
    with trio.CancelScope(deadline=trio.current_time() + 10):
        assert 0 < _time_left() < 10
        await trio.lowlevel.checkpoint()
    with trio.CancelScope(deadline=trio.current_time() - 1):
        assert _time_left() == 0
        await trio.lowlevel.checkpoint()
