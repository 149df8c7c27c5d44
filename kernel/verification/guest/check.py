"""What a check is, how it fails, and how it says where it is."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


class CheckError(Exception):
    """A feature does not work; the message says what was seen."""


@dataclass(frozen=True)
class Check:
    """One feature of the kernel and the function that uses it.

    The function returns what it saw, in a few words, and raises when the feature does not work.
    """

    name: str
    group: str
    does: str
    run: Callable[[], str | None]
    seconds: float
    alone: bool


CHECKS: dict[str, Check] = {}


def check(
    name: str, group: str, does: str, *, seconds: float = 240, alone: bool = False
) -> Callable[[Callable[[], str | None]], Callable[[], str | None]]:
    """Registers a check.

    Args:
        name: what `--only` selects it by.
        group: heading in the table.
        does: what is done to prove the feature, for the table.
        seconds: after which it counts as hung.
        alone: it sees the whole machine (no other check runs meanwhile) and stays in the first namespaces.
    """

    def register(function: Callable[[], str | None]) -> Callable[[], str | None]:
        if name in CHECKS:
            raise ValueError(f"two checks are called {name}")
        CHECKS[name] = Check(name, group, does, function, seconds, alone)
        return function

    return register


_step_fd = -1


def report_steps_to(fd: int) -> None:
    """Has `step` write to a pipe, from which a hung check is named."""
    global _step_fd  # noqa: PLW0603 - one pipe per process, set once after the fork
    _step_fd = fd


def step(text: str) -> None:
    """Says what is being done now."""
    if _step_fd >= 0:
        os.write(_step_fd, b"S" + text.replace("\n", "; ").encode()[:300] + b"\n")


def expect(condition: object, message: str) -> None:
    """Raises CheckError with the message unless the condition holds."""
    if not condition:
        raise CheckError(message)


def run(
    *command: str,
    stdin: str | None = None,
    env: dict[str, str] | None = None,
    timeout: float = 90,
    ok: Sequence[int] = (0,),
) -> str:
    """Runs a command in the calling thread's namespaces and returns what it printed.

    Raises:
        CheckError: it failed; the message has what it said.
    """
    step(" ".join(command) + (f" <<< {stdin}" if stdin else ""))
    try:
        done = subprocess.run(
            command, input=stdin, env=env, capture_output=True, text=True, timeout=timeout, check=False
        )
    except FileNotFoundError:
        raise CheckError(f"{command[0]} is not in the image") from None
    except subprocess.TimeoutExpired:
        raise CheckError(f"{' '.join(command)}: no end after {timeout:g} s") from None
    if done.returncode not in ok:
        said = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        raise CheckError(f"{' '.join(command)}: {said}")
    return done.stdout


def wait_for(what: str, condition: Callable[[], object], timeout: float = 10) -> None:
    """Waits until a condition holds.

    Raises:
        CheckError: it does not within `timeout` seconds.
    """
    step(f"waiting for {what}")
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise CheckError(f"{what}: not within {timeout:g} s")
        time.sleep(0.02)
