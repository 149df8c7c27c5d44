"""Options that the commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from host_bridge.client import find_bridge

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
