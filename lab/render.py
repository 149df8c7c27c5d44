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
    if report["containers"]:
        containers = Table("container", "name", "pid", "state", box=None, header_style="dim")
        for container in report["containers"]:
            state = container["state"]
            containers.add_row(
                container["id"][:12],
                container["name"],
                str(container["pid"] or "-"),
                f"[{_COLOURS.get(state, 'white')}]{state}[/]",
            )
        console.print(containers)
    console.print(f"for docker: export DOCKER_HOST={report['docker_host']}", soft_wrap=True)
    fabric = report["fabric"]
    if fabric is None:
        console.print("[red]the bridge does not answer[/red]")
        return
    for pending in fabric.get("pending", []):
        console.print(f"[yellow]not converged:[/yellow] {pending['subject']}: {pending['reason']}")
    if fabric.get("converged"):
        console.print("[green]everything has converged[/green]; 'taploom status' shows components and links")
