"""`taploom kernel`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from host_bridge.client import CommandError
from host_bridge.commands.options import json_option
from host_bridge.kernel.needs import CONSUMERS, by_key
from host_bridge.output import print_json, print_table

if TYPE_CHECKING:
    from host_bridge.kernel.check import Verdict
    from host_bridge.kernel.source import Configuration


@click.group()
def kernel() -> None:
    """The Linux kernel of guests and helper.

    \b
    Example:
        taploom kernel check
    """


@kernel.command()
@click.option(
    "--config",
    "file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="A kernel's configuration: text or gzip, or an uncompressed kernel that has it built in.",
)
@click.option("--running", is_flag=True, help="The running kernel; default without --config.")
@click.option(
    "--for",
    "wanted",
    metavar="CONSUMER",
    type=click.Choice([consumer.key for consumer in CONSUMERS]),
    multiple=True,
    help=f"Only for this one; repeatable. One of {', '.join(consumer.key for consumer in CONSUMERS)}.",
)
@click.option("--missing", is_flag=True, help="Show only what is missing.")
@click.option("--builtin", is_flag=True, help="Modules count as missing, as in images that load none.")
@json_option
@click.pass_context
def check(
    context: click.Context,
    *,
    file: Path | None,
    running: bool,
    wanted: tuple[str, ...],
    missing: bool,
    builtin: bool,
    as_json: bool,
) -> None:
    """Show what each consumer needs of a kernel, what is there, and what is lost without it.

    Exits with 0 when every consumer (or those of --for) has all that it requires, with 3 when one has not, and with 1
    when there is nothing to check.

    \b
    Example:
        taploom kernel check
        taploom kernel check --config /boot/config-6.1.0-37-amd64 --missing
        taploom kernel check --config build/kernel/x86_64/config --for cilium --json
    """
    from host_bridge.kernel import source
    from host_bridge.kernel.check import judge

    if file is not None and running:
        raise click.UsageError("--config and --running exclude each other.")
    try:
        found = source.from_file(file) if file is not None else source.running()
    except source.SourceError as error:
        raise CommandError(str(error)) from None
    chosen = [by_key()[key] for key in dict.fromkeys(wanted)] or list(CONSUMERS)
    verdicts = [judge(consumer, found.symbols, complete=found.complete, builtin=builtin) for consumer in chosen]
    if as_json:
        print_json(
            {
                "config": found.origin,
                "complete": found.complete,
                "fit": all(verdict.answer == "yes" for verdict in verdicts),
                "consumers": [verdict.as_json() for verdict in verdicts],
            }
        )
    else:
        _show(found, verdicts, missing)
    if any(verdict.answer != "yes" for verdict in verdicts):
        context.exit(3)


def _show(found: Configuration, verdicts: list[Verdict], missing: bool) -> None:
    click.echo(f"Kernel: {found.origin}\n")
    for verdict in verdicts:
        rows = [
            ("" if finding.good else "!", finding.level.value, finding.state, finding.symbol, finding.loss)
            for finding in verdict.findings
            if not (missing and finding.good)
        ]
        if not rows:
            continue
        click.echo(f"{verdict.consumer.title} ({verdict.consumer.key})")
        print_table(("", "NEED", "THERE", "SYMBOL", "LOST WITHOUT IT"), rows)
        click.echo()
    print_table(
        ("CONSUMER", "FIT", "REQUIRED", "USEFUL", "REMARK"),
        [
            (
                verdict.consumer.title,
                verdict.answer,
                _share(verdict, useful=False),
                _share(verdict, useful=True),
                _remark(verdict),
            )
            for verdict in verdicts
        ],
    )
    if not found.complete:
        click.echo("\n? = could not be found out: no configuration file; give one with --config FILE.")


def _share(verdict: Verdict, *, useful: bool) -> str:
    from host_bridge.kernel.needs import Level

    chosen = [finding for finding in verdict.findings if (finding.level is Level.USEFUL) == useful]
    return f"{sum(finding.good is True for finding in chosen)} of {len(chosen)}"


def _remark(verdict: Verdict) -> str:
    parts = []
    if verdict.bad:
        from host_bridge.kernel.needs import Level

        missing = [finding.symbol for finding in verdict.bad if finding.level is Level.REQUIRED]
        present = [finding.symbol for finding in verdict.bad if finding.level is Level.FORBIDDEN]
        parts += [f"missing: {_some(missing)}"] if missing else []
        parts += [f"must be off: {_some(present)}"] if present else []
    if verdict.unknown:
        parts.append(f"unknown: {_some([finding.symbol for finding in verdict.unknown])}")
    if verdict.modules:
        parts.append(f"{len(verdict.modules)} as modules")
    return "; ".join(parts)


def _some(symbols: list[str]) -> str:
    rest = f" and {len(symbols) - 4} more" if len(symbols) > 4 else ""
    return ", ".join(symbols[:4]) + rest
