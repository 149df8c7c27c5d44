"""Who has what only one can have."""

from __future__ import annotations

from collections.abc import Set


class Claims:
    """What objects, by key, have a claim to. There may be several for a while: who gives it up, and who comes next."""

    def __init__(self) -> None:
        self._of: dict[str, frozenset[str]] = {}
        self._holders: dict[str, set[str]] = {}

    def clear(self) -> None:
        """Nobody has anything."""
        self._of.clear()
        self._holders.clear()

    def put(self, key: str, claims: frozenset[str]) -> None:
        """Says all that an object has now."""
        for claim in self._of.pop(key, frozenset()):
            holders = self._holders[claim]
            holders.discard(key)
            if not holders:
                del self._holders[claim]
        for claim in claims:
            self._holders.setdefault(claim, set()).add(key)
        if claims:
            self._of[key] = claims

    def holders(self, claim: str) -> Set[str]:
        """Who has it."""
        return self._holders.get(claim, frozenset())
