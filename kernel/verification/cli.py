"""The command kernel/verify."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio

from images.common.cache import DEFAULT_CACHE
from images.common.tools import BuildError
from kernel.verification import boot, image
from kernel.verification.guest.check import Check
from kernel.verification.report import Report, select, table
from lab.vm.accelerator import accelerator
from lab.vm.errors import MachineError
from lab.vm.machine import Machine
from lab.vm.tools import ARCHITECTURES, host_architecture

ROOT = Path(__file__).resolve().parents[2]
_EXAMPLES = """examples:
  kernel/verify                          the kernel of build/kernel/ARCH, everything
  kernel/verify --only vxlan geneve cni  some checks, or whole groups
  kernel/verify --arch arm64 --json      as JSON
  kernel/verify --kernel /boot/vmlinuz-6.12.48 --only ebpf

exit status: 0 all is well, 1 something FAILED, 2 it could not be run
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; its exit status."""
    options = _parse(arguments)
    try:
        checks = select(options.only)
    except ValueError as error:
        return _fail(str(error))
    if options.list:
        _list(checks, options.json)
        return 0
    kernel = options.kernel or ROOT / "build" / "kernel" / options.arch / "vmlinuz"
    if not kernel.is_file():
        return _fail(f"there is no kernel at {kernel}; build it with kernel/build --arch {options.arch}")
    progress = _Progress(len(checks))
    try:
        initrd = image.build(options.arch, options.cache, progress.say)
        return _run(options, kernel, initrd, checks, progress)
    except (BuildError, MachineError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130


def _run(options: argparse.Namespace, kernel: Path, initrd: Path, checks: Sequence[Check], progress: _Progress) -> int:
    report = Report(checks)
    jobs = options.jobs
    append = f"quiet loglevel=4 verify.jobs={jobs} {options.append}".strip()
    if options.only:
        append += f" verify.only={','.join(check.name for check in checks)}"
    start = time.monotonic()
    with boot.directory(options.directory) as directory:
        machine = Machine(
            name=f"kernel-verify-{options.arch}",
            directory=directory,
            kernel=kernel,
            initrd=initrd,
            append=append,
            arch=options.arch,
            memory_mib=boot.MEMORY_MIB,
            cpus=jobs,
            accelerator=accelerator(options.arch, kernel),
        )
        progress.say(f"booting {kernel} ({machine.accelerator})")
        silence = max((check.seconds for check in checks), default=0) + 180
        why = trio.run(lambda: boot.follow(machine, report, progress.heard, silence=silence, limit=options.limit))
        if why and machine.console.exists():
            console = machine.console
            if options.directory is None:
                sys.stderr.write(console.read_text(errors="replace")[-3000:] + "\n")
                console = Path(tempfile.mkdtemp(prefix="taploom-verify-")) / console.name
                shutil.copy(machine.console, console)
            why += f" (its console: {console})"
    rows = report.rows(why or "the machine powered off")
    good = not why and all(row["ok"] for row in rows)
    answer = {
        "ok": good,
        "arch": options.arch,
        "kernel": report.kernel,
        "kernel_sha256": hashlib.sha256(kernel.read_bytes()).hexdigest(),
        "accelerator": machine.accelerator,
        "boot_seconds": report.boot_seconds,
        "seconds": round(time.monotonic() - start, 1),
        "why_not_whole": why,
        "checks": rows,
    }
    progress.done()
    if options.json:
        print(json.dumps(answer, indent=1))
    else:
        _show(answer)
    return 0 if good else 1


def _show(answer: dict[str, Any]) -> None:
    rows = answer["checks"]
    bad = [row["name"] for row in rows if not row["ok"]]
    print(table(rows))
    print()
    if answer["why_not_whole"]:
        print(f"kernel/verify: {answer['why_not_whole']}")
    ending = f"FAILED: {' '.join(bad)}" if bad else "everything works"
    print(
        f"kernel/verify: {answer['kernel'] or 'no kernel answered'} ({answer['accelerator']}): "
        f"{len(rows) - len(bad)} of {len(rows)} ok in {answer['seconds']} s; {ending}"
    )


def _list(checks: Sequence[Check], as_json: bool) -> None:
    if as_json:
        print(json.dumps([{"name": one.name, "group": one.group, "does": one.does} for one in checks], indent=1))
        return
    width = max(len(check.name) for check in checks)
    group = ""
    for check in checks:
        if check.group != group:
            group = check.group
            print(group)
        print(f"  {check.name:{width}}  {check.does}")


class _Progress:
    """What is being done, on stderr: one line that changes on a terminal, a line per result elsewhere."""

    def __init__(self, total: int) -> None:
        self._total = total + 1
        self._ended = 0
        self._running: list[str] = []
        self._live = sys.stderr.isatty()

    def say(self, text: str) -> None:
        self._write(f"kernel/verify: {text} …", passing=True)

    def heard(self, message: dict[str, Any]) -> None:
        kind, name = message["kind"], message.get("name", "")
        if kind == "boot":
            self._write(
                f"kernel/verify: Linux {message['kernel']} runs after {message['seconds']:.1f} s", passing=False
            )
        elif kind == "start":
            self._running.append(name)
        elif kind == "result":
            self._ended += 1
            if name in self._running:
                self._running.remove(name)
            word = "ok" if message["ok"] else f"FAILED: {message['detail']}"
            line = f"[{self._ended:2}/{self._total}] {name}: {word} ({message['seconds']:.1f} s)"
            self._write(line, passing=message["ok"])
        if self._live and self._running:
            self._write(f"[{self._ended:2}/{self._total}] {', '.join(self._running)} …", passing=True)

    def done(self) -> None:
        if self._live:
            sys.stderr.write("\r\033[K")

    def _write(self, line: str, *, passing: bool) -> None:
        if self._live:
            sys.stderr.write(f"\r\033[K{line}" + ("" if passing else "\n"))
        else:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kernel/verify",
        description="Boots a kernel in QEMU and proves the features that taploom's users need, by using each.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", choices=ARCHITECTURES, default=host_architecture(), help="default: this machine's")
    parser.add_argument("--kernel", type=Path, metavar="FILE", help="default: build/kernel/ARCH/vmlinuz")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these checks or groups")
    parser.add_argument("--list", action="store_true", help="list the checks and end")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--jobs", type=int, default=2, help="processors, and checks at once (default 2)")
    parser.add_argument("--limit", type=float, default=1800, metavar="SECONDS", help="give up after (default 1800)")
    parser.add_argument("--append", default="", metavar="WORDS", help="added to the kernel's command line")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="keep the machine's console and logs there")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, metavar="DIR", help=f"default {DEFAULT_CACHE}")
    return parser.parse_args(arguments)


def _fail(message: str) -> int:
    print(f"kernel/verify: {message}", file=sys.stderr)
    return 2
