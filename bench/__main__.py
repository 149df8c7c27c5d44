"""`python -m bench`: measures and reports."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path as FilePath

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import report
from bench.machine import describe
from bench.measure import FULL, QUICK, Bench, Results
from bench.paths import Path
from bench.processes import busy_cpus
from bench.run import BenchError, Run, open_run

RESULTS = FilePath(__file__).parent / "results"
PATHS = ("taploom", "veth", "gvproxy", "docker")
MTUS = [1500, 65520]
QUIET = 0.1  # CPUs; above it, the figures are of a machine that does something else too


def _parse_only(context: click.Context, option: click.Parameter, value: str | None) -> tuple[str, ...]:
    del context, option
    names = tuple(name.strip() for name in value.split(",")) if value else PATHS
    for name in names:
        if name not in PATHS:
            raise click.BadParameter(f"{name!r} is not a path; there are {', '.join(PATHS)}")
    return tuple(dict.fromkeys(names))


@click.command(help="Measure taploom beside veth, gvproxy and Docker in one run on this machine (root).")
@click.option("--quick", is_flag=True, help="Half a minute with few samples: shows that it works, not how fast it is.")
@click.option("--only", metavar="PATH,...", callback=_parse_only, help=f"Only these of {', '.join(PATHS)}.")
@click.option("--vm", is_flag=True, help="Guest VM to guest VM, beside the limit of the same VMs' vsock; nothing else.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=FilePath),
    default=RESULTS,
    show_default=True,
    help="Where latest.json and latest.md (with --vm: vm.json and vm.md) are written.",
)
def main(quick: bool, only: tuple[str, ...], vm: bool, as_json: bool, output: FilePath) -> None:
    """Measures, prints and writes the figures."""
    if vm:
        _measure_vms(quick, as_json, output)
        return
    plan = QUICK if quick else FULL
    messages = Console(stderr=True)
    machine = describe()
    try:
        with open_run() as run:
            busy = busy_cpus(plan.idle_seconds)
            machine["busy before"] = f"{busy:.2f} CPUs{' (NOT a quiet machine)' if busy > QUIET else ''}"
            paths = [_build(run, name, messages) for name in only]
            for path in paths:
                machine |= path.versions
            results = _measure(run, paths, quick, messages)
    except BenchError as error:
        messages.print(f"bench: {error}", style="bold red", markup=False)
        sys.exit(1)
    settings = {"quick": quick, "paths": list(only), "mtus": MTUS, **dataclasses.asdict(plan)}
    document = report.as_json(machine, settings, results)
    tables = report.grids({**machine, "kind": "quick: not a measurement" if quick else "full"}, results)
    report.publish(document, tables, as_json=as_json, output=output, name="latest")


def _measure_vms(quick: bool, as_json: bool, output: FilePath) -> None:
    from bench import vm

    messages = Console(stderr=True)
    try:
        with open_run() as run:
            machine, figures = vm.measure(run, quick=quick, say=lambda text: messages.print(text, highlight=False))
    except BenchError as error:
        messages.print(f"bench: {error}", style="bold red", markup=False)
        sys.exit(1)
    machine["kind"] = "quick: not a measurement" if quick else "full"
    document = {"machine": machine, **dataclasses.asdict(figures)}
    report.publish(document, vm.grids(machine, figures), as_json=as_json, output=output, name="vm")


def _build(run: Run, name: str, messages: Console) -> Path:
    messages.print(f"bringing up {name}", highlight=False)
    build: Callable[[Run, list[int]], Path] = import_module(f"bench.paths.{name}").build
    return build(run, MTUS)


def _measure(run: Run, paths: list[Path], quick: bool, messages: Console) -> Results:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=messages, transient=True, refresh_per_second=2) as progress:

        def show(step: str, outcome: str) -> None:
            if outcome:
                progress.console.print(f"{step}: {outcome}", highlight=False)
                progress.advance(task)
            else:
                progress.update(task, description=step)

        bench = Bench(run, QUICK if quick else FULL, paths, show)
        task = progress.add_task("", total=bench.steps)
        return bench.measure()


if __name__ == "__main__":
    main()
