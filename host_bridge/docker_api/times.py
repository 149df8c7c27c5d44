"""Times in requests: what `--since`, `--until` and `until` filters take."""

from __future__ import annotations

import datetime
import re

_UNITS = {
    "ns": 1,
    "us": 1_000,
    "µs": 1_000,
    "μs": 1_000,
    "ms": 1_000_000,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
}
_TERM = re.compile(r"([0-9]*)(?:\.([0-9]*))?(ns|us|µs|μs|ms|s|m|h)", re.ASCII)
_UNIX = re.compile(r"[+-]?[0-9]{1,18}(?:\.[0-9]{1,18})?", re.ASCII)
_DATE = re.compile(
    r"(\d{4})-(\d{2})-(\d{2})(?:T(\d{2})(?::(\d{2})(?::(\d{2})(?:\.(\d{1,9}))?)?)?)?(Z|[+-]\d{2}:\d{2})?", re.ASCII
)


class TimeError(ValueError):
    """What Docker says of a time that is none."""


def parse_duration(text: str) -> int | None:
    """A duration as Go writes it, such as `1h30m`, in nanoseconds; None: it is none."""
    sign, rest = (-1, text[1:]) if text.startswith("-") else (1, text.removeprefix("+"))
    if rest == "0":
        return 0
    total, end = 0, 0
    while end < len(rest):
        found = _TERM.match(rest, end)
        if found is None or not (found[1] or found[2]):
            return None
        unit = _UNITS[found[3]]
        fraction = (found[2] or "0")[:18]
        total += int(found[1] or "0") * unit + int(fraction) * unit // 10 ** len(fraction)
        end = found.end()
    return sign * total if rest and total < 1 << 63 else None


def parse_moment(text: str, now_ns: int) -> int:
    """A moment in nanoseconds since the epoch: a duration back from now, a date, or seconds since the epoch.

    Raises:
        TimeError
    """
    duration = parse_duration(text)
    if duration is not None and text != "0":
        # Docker counts whole seconds here.
        return (now_ns - duration) // 10**9 * 10**9
    found = _DATE.fullmatch(text)
    if found is not None:
        return _moment_of(found, text)
    if "-" in text:
        raise TimeError(f'parsing time "{text}" as "2006-01-02": cannot parse "{text}" as "2006"')
    if not _UNIX.fullmatch(text):
        raise TimeError(f'failed to parse value as time or duration: "{text}"')
    seconds, _, fraction = text.partition(".")
    return int(seconds) * 10**9 + int(fraction[:9].ljust(9, "0"))


def _moment_of(found: re.Match[str], text: str) -> int:
    year, month, day, hour, minute, second = (int(part or 0) for part in found.groups()[:6])
    zone = datetime.UTC
    if found[8] not in (None, "Z"):
        offset = datetime.timedelta(hours=int(found[8][1:3]), minutes=int(found[8][4:6]))
        zone = datetime.timezone(-offset if found[8][0] == "-" else offset)
    for value, limits, what in (
        (month, range(1, 13), "month"),
        (day, range(1, 32), "day"),
        (hour, range(24), "hour"),
        (minute, range(60), "minute"),
        (second, range(60), "second"),
    ):
        if value not in limits:
            raise TimeError(f'parsing time "{text}": {what} out of range')
    try:
        moment = datetime.datetime(max(year, 1), month, day, hour, minute, second, tzinfo=zone)
    except ValueError:
        raise TimeError(f'parsing time "{text}": day out of range') from None
    seconds = (moment - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)) // datetime.timedelta(seconds=1)
    return seconds * 10**9 + int((found[7] or "0").ljust(9, "0"))
