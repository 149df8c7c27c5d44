"""The `taploom` command's side of the bridge's API: where the bridge is, and one call to it."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

if TYPE_CHECKING:
    from betterproto2 import Message

    from taploom.rpc import Channel

RUN_DIRECTORY = Path("/run/taploom")
DEFAULT_LAB = "default"
# A connect may take the bridge's whole deadline of 60 s; more than that and the bridge itself hangs.
CALL_TIMEOUT = 90.0

T = TypeVar("T")
M = TypeVar("M", bound="Message")


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


def unary(address: str, method: str, request: Message, response_type: type[M]) -> M:
    """Makes one call and returns its response.

    Args:
        address: the bridge's.
        method: such as `NetworkService/ListNetworks`.
        request, response_type: the method's.

    Raises:
        CommandError: no bridge answers there, or it refused; the message says what to do.
    """
    path = f"/taploom.bridge.v1.{method}"
    data = bytes(request)
    from host_bridge.quick import MAX_REQUEST, CallError, call_unary

    if address.startswith("unix:/") and len(data) <= MAX_REQUEST:
        try:
            return response_type.parse(call_unary(address.removeprefix("unix:"), path, data, CALL_TIMEOUT))
        except CallError as error:
            raise CommandError(str(error) or f"the bridge at {address} went away") from error
        except OSError as error:
            raise _unreachable(address, error) from error

    async def ask(channel: Channel) -> M:
        from taploom.rpc.service import Method

        shape = Method(path, type(request), response_type, client_streaming=False, server_streaming=False)
        return await channel.unary_unary(shape, request, timeout=CALL_TIMEOUT, metadata=None)

    return call(address, ask)


def call(address: str, function: Callable[[Channel], Awaitable[T]]) -> T:
    """Runs `function` on a channel to the bridge and returns its result.

    Raises:
        CommandError: no bridge answers there, or it refused; the message says what to do.
    """
    import trio

    from taploom.address import AddressError, connect, parse_address
    from taploom.rpc import RpcError, open_channel

    async def run() -> T:
        try:
            stream = await connect(parse_address(address))
        except OSError as error:
            raise _unreachable(address, error) from error
        async with open_channel(stream) as channel:
            return await function(channel)

    try:
        return trio.run(run)
    except AddressError as error:
        raise CommandError(f"bridge address: {error}") from error
    except RpcError as error:
        raise CommandError(error.message or f"the bridge answers {error.code.name}") from error


def _unreachable(address: str, error: OSError) -> CommandError:
    if isinstance(error, PermissionError):
        return CommandError(f"no permission for the bridge at {address}: run this as the user that runs it")
    if isinstance(error, TimeoutError):
        return CommandError(f"the bridge at {address} does not answer: see its log")
    return CommandError(f"no bridge answers at {address}; start one with 'taploom lab up' or give --bridge ADDRESS")
