"""`python -m bench.starts`: how long the images take until their agent answers, beside the kernel's own time to init.

One virtual machine at a time is started on a machine that does nothing else, the guest's image and the helper's in
turn. Both times are read by the image's init from the clock of the VM, which begins with it.
"""

from __future__ import annotations

import dataclasses
import os
import re
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click
import trio
from rich.console import Console

from bench import report
from bench.machine import describe
from bench.run import BenchError
from lab.vm.errors import MachineError
from lab.vm.machine import Machine, running
from lab.vm.tools import host_architecture

BUILD = Path(__file__).parents[1] / "build"
HERE = host_architecture()
_TIMEOUT = 600.0  # s
_SAID = re.compile(r"taploom-init: (init|agent answers) after (\d+\.\d+) s")


@dataclass
class Image:
    """An image, what is wanted of it, and what was measured: seconds since the VM's start, one value a boot."""

    name: str
    answers: str
    wanted: float
    path: Path
    memory_mib: int
    init_s: list[float] = field(default_factory=list)
    ready_s: list[float] = field(default_factory=list)

    def ratio(self) -> float:
        """The median of the boots' ratios."""
        return statistics.median(ready / init for init, ready in zip(self.init_s, self.ready_s, strict=True))


@click.command(
    help="Measure how long the images take until their agent answers (root). Example: python -m bench.starts --boots 5"
)
@click.option("--arch", default=HERE, show_default=True, type=click.Choice(["x86_64", "arm64"]))
@click.option("--boots", default=3, show_default=True, type=click.IntRange(min=1), help="How often each is started.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--table", type=click.Path(dir_okay=False, path_type=Path), help="Add lines to make test-vm's table.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where starts.json and starts.md are written; nowhere without.",
)
def main(*, arch: str, boots: int, as_json: bool, table: Path | None, output: Path | None) -> None:
    """Measures, prints and writes the figures."""
    messages = Console(stderr=True)
    machine = describe()
    images = [
        Image("guest", "its agent", 2.0, BUILD / "images/guest-initfs" / arch / "guest-initfs.cpio.zst", 512),
        Image("helper", "OVS and OVN", 4.0, BUILD / "images/alpine-helper" / arch / "helper.cpio.zst", 1024),
    ]
    try:
        trio.run(_measure, arch, images, boots, messages.print)
    except (BenchError, MachineError, trio.TooSlowError) as error:
        why = str(error) or f"a VM did not answer within {_TIMEOUT:.0f} s"
        messages.print(f"bench: {why}", style="bold red", markup=False)
        raise SystemExit(1) from error
    document = {"machine": machine, "images": [{**dataclasses.asdict(one), "path": str(one.path)} for one in images]}
    tables = _grids(machine, images)
    if table is not None:
        with table.open("a") as lines:
            for name, *_, measured, wanted, reached in tables[1].rows:
                lines.write(f"start: {name}, {boots} boots, median\t{measured}\t{wanted}: {reached}\n")
    report.publish(document, tables, as_json=as_json, output=output, name="starts")


async def _measure(arch: str, images: list[Image], boots: int, say: Callable[[str], None]) -> None:
    kernel = BUILD / "kernel" / arch / "vmlinuz"
    for path in (kernel, *(image.path for image in images)):
        if not path.exists():
            raise BenchError(f"{path} is missing: make test-vm{'' if arch == HERE else f' ARCH={arch}'} builds it")
    for number in range(boots):
        for image in images:
            with tempfile.TemporaryDirectory(prefix="tls-", dir="/run") as base:
                machine = Machine(
                    image.name,
                    Path(base) / image.name,
                    kernel,
                    image.path,
                    arch=arch,
                    append="taploom.net=none" if image.name == "helper" else "",
                    memory_mib=image.memory_mib,
                )
                with trio.fail_after(_TIMEOUT):
                    async with running(machine) as vm:
                        found = dict(_SAID.findall(await vm.wait_console("agent answers after")))
            init, ready = float(found["init"]), float(found["agent answers"])
            image.init_s.append(init)
            image.ready_s.append(ready)
            times = f"init {init:.2f} s, answer {ready:.2f} s: {ready / init:.2f}x"
            say(f"boot {number + 1}, {image.name}: {times} (load {os.getloadavg()[0]:.1f})")


def _grids(machine: dict[str, str], images: list[Image]) -> list[report.Grid]:
    def spread(values: list[float]) -> str:
        return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    rows: list[tuple[str, ...]] = [
        (
            f"{one.name} VM, {one.answers}",
            spread(one.init_s),
            spread(one.ready_s),
            f"{one.ratio():.2f}x",
            f"at most {one.wanted:.0f}x",
            "reached" if one.ratio() <= one.wanted else "NOT reached",
        )
        for one in images
    ]
    columns = ("what answers", "kernel's init, s", "answer, s", "ratio", "wanted", "reached")
    return [
        report.Grid("Machine", ("what", "value"), list(machine.items())),
        report.Grid("Start: median (least to most)", columns, rows),
    ]


if __name__ == "__main__":
    main()
