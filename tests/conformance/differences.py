"""Where taploom differs from the dockerd that it is compared with, and why. docs/docker.md says the same for people.

Everything else that differs fails the build, and so does an entry that nothing matches any more.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from normalise import ABSENT

Kind = Literal["newer", "deliberate"]


@dataclass(frozen=True)
class Difference:
    """One listed difference. The patterns are searched; real and ours in the values' repr."""

    kind: Kind  # newer: later versions of Docker do as taploom does
    reason: str
    path: str  # where in the answer, such as json.EnableIPv4
    step: str = ""
    scenario: str = ""
    real: str | None = None
    ours: str | None = None

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str], ...]:
        return tuple(re.compile(pattern, re.DOTALL) for pattern in (self.scenario, self.step, self.path))

    def explains(self, scenario: str, step: str, path: str, real: Any, ours: Any) -> bool:
        """True when this is the difference that was found."""
        by_place = all(p.search(text) for p, text in zip(self._patterns, (scenario, step, path), strict=True))
        return by_place and _matches(self.real, real) and _matches(self.ours, ours)


def _matches(pattern: str | None, value: Any) -> bool:
    if pattern is None:
        return True
    return re.search(pattern, "ABSENT" if value is ABSENT else str(value), re.DOTALL) is not None


DIFFERENCES: list[Difference] = []
