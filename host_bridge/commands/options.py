"""Options that the commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from host_bridge.client import CommandError, find_bridge, unary

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def bridge_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds --bridge and --lab, which may also stand before the command's name. The command gets `bridge`."""

    @click.option("--bridge", "bridge_", metavar="ADDRESS", help="Where the bridge is, such as unix:/path.")
    @click.option("--lab", "lab_", metavar="NAME", help="The lab whose bridge to use.")
    @click.pass_context
    @functools.wraps(command)
    def wrapped(context: click.Context, /, bridge_: str | None, lab_: str | None, **arguments: Any) -> None:
        root = context.find_root().params
        if bridge_ is None and lab_ is None:
            bridge_, lab_ = root.get("bridge"), root.get("lab")
        command(bridge=find_bridge(bridge_, lab_), **arguments)

    return wrapped


class Pairs(click.ParamType[tuple[str, str]]):
    """KEY=VALUE; the command gets (key, value).

    Args:
        metavar: how to call it in the help.
        lone: whether KEY alone is KEY with an empty value, as with Docker's labels.
    """

    name = "pair"

    def __init__(self, metavar: str, *, lone: bool = False) -> None:
        self._metavar = metavar
        self._lone = lone

    def get_metavar(self, *_args: Any, **_options: Any) -> str:
        return self._metavar

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        key, equals, content = str(value).partition("=")
        if not key or not (equals or self._lone):
            self.fail(f"{value!r} is malformed: write it as {self._metavar}", param, ctx)
        return key, content


def complete_network(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """The networks' names, for the shell."""
    from taploom.contracts.taploom.bridge.v1 import ListNetworksRequest, ListNetworksResponse

    try:
        found = unary(_bridge_of(context), "NetworkService/ListNetworks", ListNetworksRequest(), ListNetworksResponse)
    except CommandError:
        return []
    return [network.name for network in found.networks if network.name.startswith(incomplete)]


def complete_guest(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """The guests' names, for the shell."""
    from taploom.contracts.taploom.bridge.v1 import ListGuestsRequest, ListGuestsResponse

    try:
        found = unary(_bridge_of(context), "GuestService/ListGuests", ListGuestsRequest(), ListGuestsResponse)
    except CommandError:
        return []
    return [guest.name for guest in found.guests if guest.name.startswith(incomplete)]


def _bridge_of(context: click.Context) -> str:
    root = context.find_root().params
    bridge, lab = context.params.get("bridge_"), context.params.get("lab_")
    return find_bridge(*((bridge, lab) if bridge or lab else (root.get("bridge"), root.get("lab"))))
