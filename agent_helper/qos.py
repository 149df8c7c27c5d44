"""Descriptions of limits and marks, checked."""

from __future__ import annotations

from dataclasses import dataclass

from agent_helper.errors import InvalidSpecError
from taploom.contracts.taploom.helper.v1 import Qos, QosDirection

MIN_RATE, MAX_RATE = 8_000, 400_000_000_000  # bits/s
# A frame with several TCP segments is metered as a whole: one that is larger than the burst would never pass.
MIN_BURST, MAX_BURST = 66_000, 500_000_000  # bytes
MAX_DSCP = 63


@dataclass(frozen=True)
class QosRuleSpec:
    """What holds in one direction. `rate` in kbit/s and `burst` in kbit, as OVN has them; 0: no limit."""

    incoming: bool
    rate: int
    burst: int
    dscp: int | None


@dataclass(frozen=True)
class QosSpec:
    """What holds for an endpoint; without rules, everything passes as it is."""

    rules: tuple[QosRuleSpec, ...] = ()


def parse_qos(message: Qos | None) -> QosSpec:
    """Checks what is to hold for an endpoint.

    Raises:
        InvalidSpecError: says what is wrong and what it must be.
    """
    if message is None:
        return QosSpec()
    found: dict[bool, QosRuleSpec] = {}
    for rule in message.rules:
        if rule.direction not in (QosDirection.IN, QosDirection.OUT):
            raise InvalidSpecError("qos: direction must be IN or OUT")
        incoming = rule.direction == QosDirection.IN
        what = f"qos: direction {'IN' if incoming else 'OUT'}"
        if incoming in found:
            raise InvalidSpecError(f"{what} is described twice")
        rate, burst = rule.rate_bits_per_second, rule.burst_bytes
        if rate and not MIN_RATE <= rate <= MAX_RATE:
            raise InvalidSpecError(f"{what}: rate_bits_per_second {rate} must be {MIN_RATE} to {MAX_RATE}")
        if rate and not MIN_BURST <= burst <= MAX_BURST:
            raise InvalidSpecError(f"{what}: burst_bytes {burst} must be {MIN_BURST} to {MAX_BURST}")
        if burst and not rate:
            raise InvalidSpecError(f"{what}: a burst is of a rate; give one too")
        if rule.dscp is not None and incoming:
            raise InvalidSpecError(f"{what}: only what an endpoint sends is marked")
        if rule.dscp is not None and rule.dscp > MAX_DSCP:
            raise InvalidSpecError(f"{what}: dscp {rule.dscp} must be 0 to {MAX_DSCP}")
        if not rate and rule.dscp is None:
            raise InvalidSpecError(f"{what}: it says nothing; give a rate or a mark, or leave it out")
        found[incoming] = QosRuleSpec(incoming, -(-rate // 1000), -(-burst * 8 // 1000), rule.dscp)
    return QosSpec(tuple(found[incoming] for incoming in sorted(found)))
