"""Runs scenarios on both sides at once and says where they differ."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from differences import DIFFERENCES, Difference
from engines import Dockerd, Engine, TaploomLab
from normalise import differences, normalise
from script import Performer, Scenario

_SIDES: dict[str, Callable[[], Engine]] = {"dockerd": Dockerd, "taploom": TaploomLab}


@dataclass
class Finding:
    """One place in one step's answer where the sides differ and no listed difference explains it."""

    scenario: str
    step: str
    path: str
    real: Any
    ours: Any

    def __str__(self) -> str:
        return f"{self.step}\n    {self.path}\n      dockerd: {self.real!r}\n      taploom: {self.ours!r}"


@dataclass
class Tally:
    """What a run of scenarios amounted to."""

    steps: int = 0
    equal: int = 0
    listed: int = 0  # steps that differ only as listed
    used: set[int] = field(default_factory=set)  # positions in DIFFERENCES
    scenarios: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        wrong = self.steps - self.equal - self.listed
        return (
            f"conformance: {self.steps} steps against dockerd and taploom: {self.equal} equal, {self.listed} with "
            f"listed differences ({len(self.used)} of {len(DIFFERENCES)} entries), {wrong} differ"
        )


class Pair:
    """The two sides. TAPLOOM_CONFORMANCE_SIDES names others, for work on the script itself: dockerd,dockerd."""

    def __init__(self) -> None:
        names = os.environ.get("TAPLOOM_CONFORMANCE_SIDES", "dockerd,taploom").split(",")
        self.tally = Tally()
        self.stack = ExitStack()
        self._pool = self.stack.enter_context(ThreadPoolExecutor(4))
        try:
            starting = [self._pool.submit(_SIDES[name]) for name in names]
            for future in starting:
                self.stack.callback(lambda future=future: future.exception() or future.result().close())
            self.real, self.ours = (future.result() for future in starting)
        except BaseException:
            self.stack.close()
            raise

    def both(self, do: Callable[[Engine], Any]) -> tuple[Any, Any]:
        """Does the same on both sides at once."""
        first, second = (self._pool.submit(do, engine) for engine in (self.real, self.ours))
        return first.result(), second.result()

    def start(self, scenarios: Iterable[Scenario]) -> None:
        """Starts those that run beside the others."""
        self._background = {
            scenario.name: [
                self._pool.submit(perform, engine, scenario, clean=False) for engine in (self.real, self.ours)
            ]
            for scenario in scenarios
            if scenario.background
        }

    def compare(self, scenario: Scenario) -> list[Finding]:
        """Runs the scenario; returns what differs and is not listed."""
        if scenario.background:
            real, ours = (future.result() for future in self._background[scenario.name])
        else:
            real, ours = self.both(lambda engine: perform(engine, scenario))
        findings: list[Finding] = []
        self.tally.scenarios.add(scenario.name)
        report = os.environ.get("TAPLOOM_CONFORMANCE_REPORT")
        for number, (step, first, second) in enumerate(zip(scenario.steps, real, ours, strict=True), 1):
            if report:
                with Path(report).open("a") as file:
                    line = {"scenario": scenario.name, "number": number, "step": step.title}
                    file.write(json.dumps({**line, "real": first, "ours": second}) + "\n")
            if step.kind in ("mark", "serve") or step.ignored:
                continue
            self.tally.steps += 1
            found = differences(first, second)
            unexplained = [item for item in found if not self._explained(scenario.name, step.title, *item)]
            self.tally.equal += not found
            self.tally.listed += bool(found) and not unexplained
            findings += [Finding(scenario.name, f"{number}. {step.title}", *item) for item in unexplained]
        return findings

    def _explained(self, scenario: str, step: str, path: str, real: Any, ours: Any) -> bool:
        explaining = [
            number for number, entry in enumerate(DIFFERENCES) if entry.explains(scenario, step, path, real, ours)
        ]
        self.tally.used.update(explaining)
        return bool(explaining)

    def unused(self) -> Iterator[Difference]:
        """Listed differences that nothing matched, of those that are there in every run."""
        return (entry for number, entry in enumerate(DIFFERENCES) if number not in self.tally.used and not entry.varies)

    def close(self) -> None:
        self.stack.close()


def perform(engine: Engine, scenario: Scenario, clean: bool = True) -> list[Any]:
    """Runs the scenario on one side and removes what it made; returns the normalised answers."""
    performer = Performer(engine)
    answers = []
    try:
        for step in scenario.steps:
            began = time.monotonic()
            result = performer.perform(step)
            took = time.monotonic() - began
            if took > 3 and os.environ.get("TAPLOOM_CONFORMANCE_REPORT"):
                print(f"{engine.label}: {took:.1f} s: {scenario.name}: {step.title}")
            answers.append(normalise(step, result, performer.symbols))
    finally:
        performer.close()
        if clean:
            engine.clean()
    return answers
