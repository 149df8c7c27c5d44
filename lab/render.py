"""How a lab's status looks to a person."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

_COLOURS = {"running": "green", "starting": "yellow", "down": "red"}


def print_status(report: dict[str, Any]) -> None:
    """Prints what `lab status --json` gives, as tables."""
    console = Console()
    console.print(f"lab [bold]{report['lab']}[/bold] in {report['state_directory']}, API at {report['bridge']}")
    if report["supervisor_pid"] is None:
        console.print("[red]its supervisor is not running; 'taploom lab up' starts it again[/red]")
    table = Table("process", "pid", "state", "restarts", "last ended", box=None, header_style="dim")
    for process in report["processes"]:
        state = process["state"]
        table.add_row(
            process["name"],
            str(process["pid"] or "-"),
            f"[{_COLOURS.get(state, 'white')}]{state}[/]",
            str(process["restarts"]),
            process["last_exit"] or "-",
        )
    console.print(table)
    fabric = report["fabric"]
    if fabric is None:
        console.print("[red]the bridge does not answer[/red]")
        return
    for pending in fabric.get("pending", []):
        console.print(f"[yellow]not converged:[/yellow] {pending['subject']}: {pending['reason']}")
    if fabric.get("converged"):
        console.print("[green]everything has converged[/green]; 'taploom status' shows components and links")
