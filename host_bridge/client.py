"""The `taploom` command's side of the bridge's API: where the bridge is, and one call to it."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

if TYPE_CHECKING:
    from taploom.rpc import Channel

RUN_DIRECTORY = Path("/run/taploom")
DEFAULT_LAB = "default"
# A connect may take the bridge's whole deadline of 10 s; more than that and the bridge itself hangs.
CALL_TIMEOUT = 30.0

T = TypeVar("T")


class CommandError(click.ClickException):
    """The command failed: one line, exit code 1."""

    exit_code = 1


def find_bridge(bridge: str | None = None, lab: str | None = None) -> str:
    """The bridge's address: what the command line names, else the environment, else its usual places.

    In order: --bridge, --lab, $TAPLOOM_BRIDGE, $TAPLOOM_LAB, /run/taploom/bridge.sock (a host's service) when it is
    there, and the default lab's.
    """
    if bridge:
        return bridge
    if lab:
        return _lab_address(lab)
    if address := os.environ.get("TAPLOOM_BRIDGE"):
        return address
    if name := os.environ.get("TAPLOOM_LAB"):
        return _lab_address(name)
    service = RUN_DIRECTORY / "bridge.sock"
    if service.exists():
        return f"unix:{service}"
    return _lab_address(DEFAULT_LAB)


def _lab_address(name: str) -> str:
    if "/" in name or name in (".", ".."):
        raise CommandError(f"lab name {name!r} is not allowed: use letters, digits, '_' and '-'")
    return f"unix:{RUN_DIRECTORY / name / 'bridge.sock'}"


def call(address: str, function: Callable[[Channel], Awaitable[T]]) -> T:
    """Runs `function` on a channel to the bridge and returns its result.

    Raises:
        CommandError: no bridge answers there, or it refused; the message says what to do.
    """
    import trio

    from taploom.address import AddressError, connect, parse_address
    from taploom.rpc import RpcError, StatusCode, open_channel

    async def run() -> T:
        stream = await connect(parse_address(address))
        async with open_channel(stream) as channel:
            return await function(channel)

    try:
        return trio.run(run)
    except AddressError as error:
        raise CommandError(f"bridge address: {error}") from error
    except PermissionError as error:
        raise CommandError(f"no permission for the bridge at {address}: run this as the user that runs it") from error
    except OSError as error:
        raise CommandError(
            f"no bridge answers at {address}; start one with 'taploom lab up' or give --bridge ADDRESS"
        ) from error
    except RpcError as error:
        if error.code is StatusCode.UNAVAILABLE and not error.message:
            raise CommandError(f"the bridge at {address} went away") from error
        raise CommandError(error.message or f"the bridge answers {error.code.name}") from error
