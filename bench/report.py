"""The figures as tables: for people at a terminal, as Markdown, and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.measure import HotResult, LinkResult, PublishedResult, Results, hot_median

GUEST_AGENT_BYTES = 35_000_000


@dataclass(frozen=True)
class Wanted:
    """A figure that taploom is to reach; `reached` is None when it could not be measured in this run."""

    what: str
    wanted: str
    measured: str
    reached: bool | None


@dataclass(frozen=True)
class Grid:
    """A table without any formatting."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least `share` (0 to 1) of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def wanted(results: Results) -> list[Wanted]:
    """What was wanted beside what was measured, reached or not."""
    mine, peer = _tcp(results, "taploom"), _tcp(results, "gvproxy")
    rows = [
        _ratio("TCP at MTU 1500 against gvproxy at MTU 1500", 4.0, mine.get(1500), peer.get(1500)),
        _ratio(
            "TCP at its best MTU against gvproxy at its best MTU",
            2.0,
            max(mine.values(), default=None),
            max(peer.values(), default=None),
        ),
    ]
    own = next((link for link in results.links if link.path == "taploom"), None)
    for name, samples in (
        ("UDP", own.udp_rtt_ms if own else []),
        ("ICMP", own.icmp_rtt_ms if own else []),
    ):
        rows.append(_at_most(f"round trip p50, {name}", 1.0, statistics.median(samples) if samples else None, "ms"))
    for how in ("API", "CLI"):
        hot = next((hot for hot in results.hot if hot.path == "taploom" and hot.how == how), None)
        value = hot_median(hot) if hot and hot.returned_ms else None
        rows.append(_at_most(f"hot connect to the first reply, by {how}, median", 150.0, value, "ms"))
    agents = [
        row.rss
        for row in results.memory
        if row.path == "taploom" and row.process.startswith("guest/") and row.process.count("/") == 1
    ]
    largest = max(agents, default=None)
    rows.append(
        _at_most(
            "guest agent's RSS after the load, the larger of two",
            GUEST_AGENT_BYTES / 1e6,
            None if largest is None else largest / 1e6,
            "MB",
        )
    )
    return rows


def _tcp(results: Results, path: str) -> dict[int, float]:
    """The path's median Gb/s by MTU."""
    return {link.mtu: statistics.median(link.tcp_gbps) for link in results.links if link.path == path and link.tcp_gbps}


def _ratio(what: str, least: float, mine: float | None, peer: float | None) -> Wanted:
    if mine is None or peer is None:
        return Wanted(what, f"at least {least:.0f}x", "not measured", None)
    measured = f"{mine / peer:.2f}x ({mine:.2f} / {peer:.2f} Gb/s)"
    return Wanted(what, f"at least {least:.0f}x", measured, mine / peer >= least)


def _at_most(what: str, most: float, value: float | None, unit: str) -> Wanted:
    if value is None:
        return Wanted(what, f"at most {most:g} {unit}", "not measured", None)
    measured = f"{value:.3g} {unit}" if math.isfinite(value) else "no reply in half of the connects or more"
    return Wanted(what, f"at most {most:g} {unit}", measured, value <= most)


def grids(machine: dict[str, str], results: Results) -> list[Grid]:
    """Every table of the report, in order."""
    machine = {
        **machine,
        "busy between measurements, all paths up": f"{statistics.mean(results.idle_cpus):.2f} CPUs",
        "stolen": f"{results.stolen:.1%}",
        "duration": f"{results.seconds:.0f} s",
    }
    return [
        Grid("Machine", ("what", "value"), list(machine.items())),
        Grid(
            "Guest to guest: median (least to most)",
            (
                "path",
                "MTU",
                "TCP Gb/s",
                "CPU-s per GB",
                "UDP 64 B kpps, < 1 % loss",
                "kpps arriving in a flood",
                "UDP round trip p50 / p99 ms",
                "ICMP p50 / p99 ms",
            ),
            [_link_row(link) for link in results.links],
        ),
        Grid(
            "Hot connect, ms: median (least to most)",
            ("path", "by", "call to first reply", "call to return", "times", "no reply in 10 s"),
            [_hot_row(hot) for hot in results.hot],
        ),
        Grid(
            "Published port, from the host's loopback (Docker's is carried by docker-proxy): median (least to most)",
            ("path", "TCP Gb/s in", "TCP Gb/s out", "connections/s", "failed"),
            [_published_row(published) for published in results.published],
        ),
        Grid(
            "Memory after the load, MB (10^6 bytes)",
            ("path", "process", "RSS", "PSS", "most RSS"),
            [
                (row.path, row.process, f"{row.rss / 1e6:.1f}", f"{row.pss / 1e6:.1f}", f"{row.peak / 1e6:.1f}")
                for row in results.memory
            ],
        ),
        Grid("Failures", ("what",), [(failure,) for failure in results.failures]),
        Grid(
            "Wanted",
            ("what", "wanted", "measured", "reached"),
            [(row.what, row.wanted, row.measured, _reached(row)) for row in wanted(results)],
        ),
    ]


def _reached(row: Wanted) -> str:
    return {True: "reached", False: "NOT reached", None: "not measured"}[row.reached]


def _spread(values: list[float], digits: int, scale: float = 1.0) -> str:
    if not values:
        return "-"
    middle, least, most = (value * scale for value in (statistics.median(values), min(values), max(values)))
    return f"{middle:.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"


def _round_trip(samples: list[float]) -> str:
    return f"{percentile(samples, 0.5):.3f} / {percentile(samples, 0.99):.3f}" if samples else "-"


def _link_row(link: LinkResult) -> tuple[str, ...]:
    return (
        link.path,
        str(link.mtu),
        _spread(link.tcp_gbps, 2),
        _spread(link.cpu_s_per_gb, 2),
        _spread(link.udp_pps, 1, 1e-3),
        _spread(link.udp_flood_pps, 1, 1e-3),
        _round_trip(link.udp_rtt_ms),
        _round_trip(link.icmp_rtt_ms),
    )


def _hot_row(hot: HotResult) -> tuple[str, ...]:
    return (
        hot.path,
        hot.how,
        _spread(hot.first_reply_ms, 0),
        _spread(hot.returned_ms, 0),
        str(len(hot.returned_ms)),
        str(hot.unanswered),
    )


def _published_row(published: PublishedResult) -> tuple[str, ...]:
    return (
        published.path,
        _spread(published.tcp_gbps, 2),
        _spread(published.reverse_gbps, 2),
        _spread(published.connections, 0),
        str(published.failed),
    )


def publish(document: dict[str, Any], tables: list[Grid], *, as_json: bool, output: Path | None, name: str) -> None:
    """Writes NAME.json and NAME.md, each whole or not at all, and prints one of the two.

    Args:
        output: the directory; None: nothing is written.
    """
    text = json.dumps(document, indent=2) + "\n"
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        for file, content in ((f"{name}.json", text), (f"{name}.md", markdown(tables))):
            temporary = output / f"{file}.tmp"
            temporary.write_text(content)
            temporary.replace(output / file)
    if as_json:
        print(text, end="")
        return
    # A pipe or a file has no width of its own: the tables are not to be folded to 80 columns there.
    print_tables(Console(width=None if sys.stdout.isatty() else 160), tables)
    if output is not None:
        print(f"written to {output}/{name}.md and {name}.json")


def print_tables(console: Console, tables: list[Grid]) -> None:
    """Prints the tables."""
    for grid in tables:
        if not grid.rows:
            continue
        table = Table(title=grid.title, title_justify="left", box=box.SIMPLE_HEAD)
        for column in grid.columns:
            table.add_column(column, overflow="fold")
        for row in grid.rows:
            style = {"reached": "green", "NOT reached": "bold red"}.get(row[-1], "")
            table.add_row(*row, style=style)
        console.print(table)


def markdown(tables: list[Grid]) -> str:
    """The tables as Markdown."""
    lines = ["# Benchmark", ""]
    for grid in tables:
        if not grid.rows:
            continue
        lines += [f"## {grid.title}", "", f"| {' | '.join(grid.columns)} |", f"|{' --- |' * len(grid.columns)}"]
        lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in grid.rows]
        lines.append("")
    return "\n".join(lines)


def as_json(machine: dict[str, str], settings: dict[str, Any], results: Results) -> dict[str, Any]:
    """The figures and every sample behind them, for programs."""
    links = []
    for link in results.links:
        row = dataclasses.asdict(link)
        for key in ("udp_rtt_ms", "icmp_rtt_ms"):
            samples: list[float] = row.pop(key)
            row[key] = _summary(samples)
        links.append(row)
    return {
        "machine": machine,
        "settings": settings,
        "seconds": results.seconds,
        "stolen": results.stolen,
        "idle_cpus": results.idle_cpus,
        "links": links,
        "published": [dataclasses.asdict(published) for published in results.published],
        "hot_connect": [dataclasses.asdict(hot) for hot in results.hot],
        "failures": results.failures,
        "memory": [dataclasses.asdict(row) for row in results.memory],
        "wanted": [dataclasses.asdict(row) for row in wanted(results)],
    }


def _summary(samples: list[float]) -> dict[str, float] | None:
    """Round trips, of which there are thousands, as percentiles."""
    if not samples:
        return None
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}
    return {
        "count": len(samples),
        "min": min(samples),
        **{name: percentile(samples, share) for name, share in shares.items()},
        "max": max(samples),
    }
