"""Judging a kernel's configuration by what consumers need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from host_bridge.kernel.needs import Consumer, Level, alternatives

UNKNOWN = "?"
MISSING = "missing"


@dataclass(frozen=True)
class Finding:
    """One symbol that a consumer needs, and what the kernel has.

    Attributes:
        symbol: without CONFIG_; "A|B" where either will do.
        state: "y", "m" (a module), "missing", "works" (found by use, built in or not), "?" (could not be found out).
        good: None where it could not be found out.
        loss: what one loses where it is not good.
    """

    symbol: str
    level: Level
    state: str
    good: bool | None
    loss: str


@dataclass(frozen=True)
class Verdict:
    """What a kernel is for one consumer."""

    consumer: Consumer
    findings: tuple[Finding, ...]

    @property
    def bad(self) -> tuple[Finding, ...]:
        """What makes it unfit: required and missing, or forbidden and there."""
        return tuple(f for f in self.findings if f.good is False and f.level is not Level.USEFUL)

    @property
    def lost(self) -> tuple[Finding, ...]:
        """Useful and missing."""
        return tuple(f for f in self.findings if f.good is False and f.level is Level.USEFUL)

    @property
    def unknown(self) -> tuple[Finding, ...]:
        """Required or forbidden, and not found out."""
        return tuple(f for f in self.findings if f.good is None and f.level is not Level.USEFUL)

    @property
    def modules(self) -> tuple[Finding, ...]:
        """There, if somebody loads modules."""
        return tuple(f for f in self.findings if f.state == "m" and f.level is not Level.FORBIDDEN)

    @property
    def answer(self) -> str:
        """ "yes", "no", or "unknown" where something required could not be found out."""
        if self.bad:
            return "no"
        return "unknown" if self.unknown else "yes"

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "consumer": self.consumer.key,
            "title": self.consumer.title,
            "answer": self.answer,
            "needs": [
                {"symbol": f.symbol, "level": f.level.value, "state": f.state, "good": f.good, "loss": f.loss}
                for f in self.findings
            ],
        }


def judge(consumer: Consumer, symbols: Mapping[str, str], *, complete: bool = True, builtin: bool = False) -> Verdict:
    """A consumer's verdict.

    Args:
        symbols: name -> "y", "m", "n", a value, or "works", as `taploom.kconfig.parse` or probing gives them.
        complete: what is not among the symbols is off; otherwise it is unknown.
        builtin: modules count as missing: nothing loads them.
    """
    findings = []
    for need in consumer.needs:
        for symbol in need.symbols:
            state = _best((symbols.get(name, "n" if complete else UNKNOWN) for name in alternatives(symbol)), builtin)
            there = None if state == UNKNOWN else state != MISSING
            good = there if need.level is not Level.FORBIDDEN or there is None else not there
            findings.append(Finding(symbol, need.level, state, good, need.loss))
    return Verdict(consumer, tuple(findings))


def _best(states: Iterable[str], builtin: bool) -> str:
    """The best of the states of alternatives."""
    order = {"y": 0, "works": 1, "m": 2 if not builtin else 9, UNKNOWN: 3, "n": 9, "": 9}
    best = min(states, key=lambda state: order.get(state, 0))
    rank = order.get(best, 0)
    return MISSING if rank == 9 else best if rank else "y"
