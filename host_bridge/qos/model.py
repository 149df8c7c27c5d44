"""Limits and marks as values: what may be said, how it is written, and what follows when several say something."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from host_bridge.errors import InvalidError
from host_bridge.names import shown

IN, OUT = "in", "out"
DIRECTIONS = (OUT, IN)

MIN_RATE, MAX_RATE = 8_000, 400_000_000_000  # bits/s
# TCP segments of up to 64 KiB travel as one frame, which passes as a whole or not at all.
MIN_BURST, MAX_BURST = 66_000, 500_000_000  # bytes
MAX_DSCP = 63
# Without a burst, what passes in this many seconds: with less, TCP, which slows down at each loss, stays well below the
# rate; with more, a short transfer knows no limit.
_BURST_TIME = 0.2
_LEAST_DEFAULT_BURST, _LARGEST_DEFAULT_BURST = 80_000, 4_000_000

# Driver options of networks and endpoints: `taploom.qos.rate`, or `taploom.qos.out.rate` for one direction.
OPTION_PREFIX = "taploom.qos."
_WHAT = ("rate", "burst", "dscp")

_NUMBER = re.compile(r"(\d{1,15}(?:\.\d{1,6})?)\s*([a-zA-Z/]*)", re.ASCII)
_BITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_BYTES = {**_BITS, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@dataclass(frozen=True, slots=True)
class Said:
    """What is said of one direction: a rate (bits/s) with its burst (bytes), a mark, or both; None: nothing."""

    rate: int | None = None
    burst: int | None = None
    dscp: int | None = None

    def over(self, other: Said) -> Said:
        """This, and what the other says where this says nothing. A burst belongs to its rate."""
        rate, burst = (other.rate, other.burst) if self.rate is None else (self.rate, self.burst)
        return Said(rate, burst, other.dscp if self.dscp is None else self.dscp)


NOTHING = Said()


def default_burst(rate: int) -> int:
    """The burst, in bytes, of a rate (bits/s) that is given without one."""
    return min(max(round(rate / 8 * _BURST_TIME), _LEAST_DEFAULT_BURST), _LARGEST_DEFAULT_BURST)


def checked(direction: str, *, rate: int | None, burst: int | None, dscp: int | None) -> dict[str, Said]:
    """What is said of each direction.

    Args:
        direction: IN, OUT, or empty: both; a mark is then on what goes out.

    Raises:
        InvalidError: a value makes no sense, or nothing is said.
    """
    if rate is None and burst is not None:
        raise InvalidError("a burst is of a rate: give the rate too")
    if rate is None and dscp is None:
        raise InvalidError("nothing is said: give a rate or a DSCP")
    if rate == 0:
        raise InvalidError("rate 0 would let nothing pass: disconnect the guest for that, or remove the limit")
    if rate is not None and not MIN_RATE <= rate <= MAX_RATE:
        raise InvalidError(f"rate {rate} bit/s is out of range: use 8kbit to 400gbit")
    if burst is not None and not MIN_BURST <= burst <= MAX_BURST:
        raise InvalidError(
            f"burst {burst} bytes is out of range: use 66k to 500m (a TCP segment of up to 64 KiB passes as one frame)"
        )
    if dscp is not None and dscp > MAX_DSCP:
        raise InvalidError(f"DSCP {dscp} is out of range: use 0 to {MAX_DSCP}")
    if dscp is not None and direction == IN:
        raise InvalidError("what a guest receives is not marked: give the DSCP for direction out")
    if rate is not None and burst is None:
        burst = default_burst(rate)
    found = {one: Said(rate, burst, dscp if one == OUT else None) for one in DIRECTIONS if direction in (one, "")}
    return {one: said for one, said in found.items() if said != NOTHING}


def parse_rate(text: str) -> int:
    """A rate such as 10mbit, 1.5Gbit/s or 800000, in bits per second; raises InvalidError."""
    number, unit = _split("rate", text, "10mbit, 500kbit or 1gbit")
    unit = unit.removesuffix("/s")
    if unit not in {*_BITS, *(f"{prefix}bit" for prefix in _BITS)}:
        raise InvalidError(f"rate {shown(text)} is malformed: write it as 10mbit, 500kbit or 1gbit")
    return round(number * _BITS[unit.removesuffix("bit")])


def parse_burst(text: str) -> int:
    """A burst such as 200k, 64KiB or 2mbit, in bytes (k is 1000); raises InvalidError."""
    number, unit = _split("burst", text, "200k, 1m or 256KiB (bytes)")
    if unit.endswith("bit") and unit.removesuffix("bit") in _BITS:
        return round(number * _BITS[unit.removesuffix("bit")] / 8)
    if unit.removesuffix("b") not in _BYTES:
        raise InvalidError(f"burst {shown(text)} is malformed: write it as 200k, 1m or 256KiB (bytes)")
    return round(number * _BYTES[unit.removesuffix("b")])


def parse_dscp(text: str) -> int:
    """A DSCP: a number; raises InvalidError."""
    if not re.fullmatch(r"[0-9]{1,4}", text, re.ASCII):
        raise InvalidError(f"DSCP {shown(text)} is malformed: use a number, 0 to {MAX_DSCP}")
    return int(text)


def _split(what: str, text: str, example: str) -> tuple[float, str]:
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        raise InvalidError(f"{what} {shown(text)} is malformed: write it as {example}")
    return float(match[1]), match[2].lower()


def from_options(options: Mapping[str, str]) -> dict[str, Said]:
    """What driver options say of each direction.

    Raises:
        InvalidError: one is not known or its value makes no sense.
    """
    given: dict[str, dict[str, str]] = {}
    for key, value in options.items():
        if not key.startswith(OPTION_PREFIX):
            continue
        head, _, tail = key.removeprefix(OPTION_PREFIX).rpartition(".")
        if head not in ("", *DIRECTIONS) or tail not in _WHAT:
            raise InvalidError(
                f"option {shown(key)} is not known: use {OPTION_PREFIX}rate, burst or dscp, or {OPTION_PREFIX}in.rate, "
                f"{OPTION_PREFIX}out.rate and so on"
            )
        given.setdefault(head, {})[tail] = value
    found: dict[str, Said] = {}
    for head in ("", *DIRECTIONS):  # what is said of one direction comes before what is said of both
        if head not in given:
            continue
        said = given[head]
        try:
            values = checked(
                head,
                rate=parse_rate(said["rate"]) if "rate" in said else None,
                burst=parse_burst(said["burst"]) if "burst" in said else None,
                dscp=parse_dscp(said["dscp"]) if "dscp" in said else None,
            )
        except InvalidError as error:
            raise InvalidError(f"options {OPTION_PREFIX}{head + '.' if head else ''}*: {error}") from error
        found |= {direction: one.over(found.get(direction, NOTHING)) for direction, one in values.items()}
    return found
