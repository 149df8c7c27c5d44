"""`taploom topology`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from host_bridge.client import CommandError, call
from host_bridge.commands.options import bridge_options, json_option
from host_bridge.output import print_json

if TYPE_CHECKING:
    from host_bridge.view.topology import Topology
    from taploom.rpc import Channel


@click.command()
@click.option("--html", "page", metavar="FILE", help="Write a page for a browser; -: to standard output.")
@click.option("--svg", "drawing", metavar="FILE", help="Write a drawing; -: to standard output.")
@click.option("-o", "--output", metavar="FILE", help="Write FILE, a page or, if its name ends in .svg, a drawing.")
@click.option(
    "--measure",
    metavar="SECONDS",
    type=click.FloatRange(0, 60),
    default=0.5,
    help="How long to measure rates; 0: not at all; default: 0.5.",
)
@json_option
@bridge_options
def topology(
    *, bridge: str, page: str | None, drawing: str | None, output: str | None, measure: float, as_json: bool
) -> None:
    """Show the fabric: networks, gateways, who is on them, how they are and what they carry.

    As a tree, or as a page or drawing that needs nothing but itself: no network, no other file.

    \b
    Example:
        taploom topology
        taploom topology --html fabric.html
        taploom topology -o - > fabric.html
    """
    from host_bridge.view.topology import gather

    wanted = [(path, kind) for path, kind in ((page, "html"), (drawing, "svg")) if path is not None]
    if output is not None:
        wanted.append((output, "svg" if output.endswith(".svg") else "html"))
    if sum(path == "-" for path, _ in wanted) + as_json > 1:
        raise click.UsageError("Only one thing can go to standard output.")
    if any(not path for path, _ in wanted):
        raise click.UsageError("A file needs a name; - is standard output.")

    async def ask(channel: Channel) -> Topology:
        return await gather(channel, measure)

    found = call(bridge, ask)
    for path, kind in wanted:
        _write(path, _rendered(found, kind))
    if as_json:
        print_json(found)
    elif not wanted:
        from rich.console import Console

        from host_bridge.view.tree import tree

        Console(highlight=False, soft_wrap=True).print(tree(found))


def _rendered(found: Topology, kind: str) -> str:
    if kind == "svg":
        from host_bridge.view.drawing import to_svg

        return to_svg(found)
    from host_bridge.view.page import to_page

    return to_page(found)


def _write(path: str, text: str) -> None:
    if path == "-":
        click.echo(text, nl=False)
        return
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from error
    click.echo(f"{path} written", err=True)
