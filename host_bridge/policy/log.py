"""What rules with `log` have matched: remembered for a while, and handed to those who follow."""

from __future__ import annotations

import datetime
import logging
from collections import deque
from collections.abc import AsyncIterator

from host_bridge.names import clean_text
from host_bridge.policy.messages import action_message, shown_line
from host_bridge.policy.model import ALLOW, DROP, IN, OUT, REJECT
from host_bridge.policy.state import PolicyState
from host_bridge.store import Store
from host_bridge.waiting import Signal
from taploom.contracts.taploom.bridge import v1 as bridge
from taploom.contracts.taploom.helper import v1 as helper

logger = logging.getLogger("taploom.bridge.policy")

REMEMBERED = 1000
_ACTIONS = {helper.PolicyAction.ALLOW: ALLOW, helper.PolicyAction.DROP: DROP, helper.PolicyAction.REJECT: REJECT}
_DIRECTIONS = {helper.PolicyDirection.IN: IN, helper.PolicyDirection.OUT: OUT}


class PolicyLog:
    """The log of this bridge's run. A follower that is slow misses what is no longer remembered.

    Args:
        store: tells which guest has an address.
        policies: tells which rule a name is of.
    """

    def __init__(self, store: Store, policies: PolicyState) -> None:
        self._store = store
        self._policies = policies
        self._lines: deque[bridge.WatchPolicyLogResponse] = deque(maxlen=REMEMBERED)
        self._written = 0
        self._changed = Signal()

    def add(self, logged: helper.PolicyLogged) -> None:
        """Enters what the helper has told."""
        source, destination = clean_text(logged.source, 60), clean_text(logged.destination, 60)
        reference = self._policies.reference(logged.rule_name)
        line = bridge.WatchPolicyLogResponse(
            time=datetime.datetime.now(datetime.UTC),
            group=reference.group if reference else "",
            direction=reference.direction if reference else _DIRECTIONS.get(logged.direction, ""),
            # One that has just gone may still be heard of.
            rule=reference.rule if reference else clean_text(logged.rule_name, 63),
            action=action_message(_ACTIONS.get(logged.action, DROP)),
            protocol=clean_text(logged.protocol, 20),
            source=source,
            source_port=logged.source_port,
            source_guest=self._store.guest_at(source) or "",
            destination=destination,
            destination_port=logged.destination_port,
            destination_guest=self._store.guest_at(destination) or "",
        )
        self._lines.append(line)
        self._written += 1
        self._changed.notify()
        logger.info("%s", shown_line(line))

    async def follow(self, *, on: bool) -> AsyncIterator[bridge.WatchPolicyLogResponse]:
        """What is remembered and, if `on`, what comes."""
        seen = self._written - len(self._lines)
        while True:
            missed = max(0, self._written - len(self._lines) - seen)
            for line in list(self._lines)[len(self._lines) - (self._written - seen - missed) :]:
                yield line
                seen += 1
            seen += missed
            if not on:
                return
            if seen == self._written:
                await self._changed.wait()
