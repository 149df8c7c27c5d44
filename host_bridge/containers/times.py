"""Times as Docker's API has them: RFC 3339 with nanoseconds, and durations for people."""

from __future__ import annotations

import datetime
import time

ZERO = "0001-01-01T00:00:00Z"


def now() -> str:
    """This moment."""
    return from_ns(time.time_ns())


def from_ns(nanoseconds: int) -> str:
    """Nanoseconds since the epoch as Go's RFC3339Nano writes them: no zeros at the end of the fraction."""
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    fraction = f"{rest:09}".rstrip("0")
    return f"{text}.{fraction}Z" if fraction else f"{text}Z"


def fixed(moment: datetime.datetime) -> str:
    """A time as logs have it: nine digits of fraction always."""
    return moment.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%f") + "000Z"


def from_datetime(moment: datetime.datetime | None) -> str:
    """A time of a message; None gives Docker's zero time."""
    if moment is None:
        return ZERO
    microseconds = round((moment - _EPOCH) / datetime.timedelta(microseconds=1))
    return from_ns(microseconds * 1000)


def to_ns(text: str) -> int:
    """Nanoseconds since the epoch of a time that `from_ns` wrote; 0 for the zero time."""
    if text == ZERO:
        return 0
    whole, _, fraction = text.rstrip("Z").partition(".")
    moment = datetime.datetime.fromisoformat(whole).replace(tzinfo=datetime.UTC)
    return int(moment.timestamp()) * 1_000_000_000 + int((fraction or "0").ljust(9, "0")[:9])


def ago_seconds(text: str) -> float:
    """Seconds since a time."""
    return (time.time_ns() - to_ns(text)) / 1e9


def human(seconds: float) -> str:
    """A duration in Docker's words, such as `About a minute`."""
    whole = int(seconds)
    if whole < 1:
        return "Less than a second"
    if whole == 1:
        return "1 second"
    if whole < 60:
        return f"{whole} seconds"
    minutes = whole // 60
    if minutes == 1:
        return "About a minute"
    if minutes < 60:
        return f"{minutes} minutes"
    hours = int(seconds / 3600 + 0.5)
    if hours == 1:
        return "About an hour"
    if hours < 48:
        return f"{hours} hours"
    if hours < 24 * 7 * 2:
        return f"{hours // 24} days"
    if hours < 24 * 30 * 2:
        return f"{hours // 24 // 7} weeks"
    if hours < 24 * 365 * 2:
        return f"{hours // 24 // 30} months"
    return f"{int(seconds / 3600) // 24 // 365} years"


_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
