"""Signals by name or number, as Docker takes them."""

from __future__ import annotations

from host_bridge.containers.errors import ContainerError, invalid

SIGKILL = 9
SIGTERM = 15
_REALTIME_MIN, _REALTIME_MAX = 34, 64

# Linux numbers them alike on all machines that run containers (signal(7)); the bridge may run on macOS, where
# Python's own numbers differ.
_WORDS = (
    "HUP INT QUIT ILL TRAP ABRT BUS FPE KILL USR1 SEGV USR2 PIPE ALRM TERM STKFLT CHLD CONT STOP TSTP TTIN TTOU URG "
    "XCPU XFSZ VTALRM PROF WINCH IO PWR SYS"
)
_NUMBERS = {name: number for number, name in enumerate(_WORDS.split(), 1)} | {
    "IOT": 6,
    "CLD": 17,
    "POLL": 29,
    "UNUSED": 31,
    "RTMIN": _REALTIME_MIN,
    "RTMAX": _REALTIME_MAX,
}
_NUMBERS |= {f"RTMIN+{offset}": _REALTIME_MIN + offset for offset in range(1, 16)}
_NUMBERS |= {f"RTMAX-{offset}": _REALTIME_MAX - offset for offset in range(1, 15)}


def parse_signal(text: str) -> int:
    """The number of `KILL`, `SIGKILL`, `sigkill` or `9`; raises ContainerError with Docker's text."""
    try:
        number = int(text)
    except ValueError:
        number = _NUMBERS.get(text.upper().removeprefix("SIG"), 0)
    if number == 0:
        raise invalid(f"Invalid signal: {text}")
    return number


def check_supported(number: int) -> None:
    """Raises ContainerError when Linux has no such signal."""
    if number not in range(1, _REALTIME_MAX + 1) or number in (32, 33):
        raise ContainerError(500, f"The linux daemon does not support signal {number}")
