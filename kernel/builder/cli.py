"""kernel/build: what the command line says, and the way from source to output."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from images.common.cache import DEFAULT_CACHE, cached, file_sha256, inputs_hash, publish
from images.common.tools import BuildError

from . import compilation, recipe
from .fragments import ARCHITECTURES, Fragment, merge, read_fragments
from .progress import Progress, clock
from .source import PACKAGE, SUITE, Source, debian_source, in_cache, tarball_source, unpack
from .toolchain import Toolchain, toolchain

ROOT = Path(__file__).resolve().parents[2]
_EXAMPLE = """\
example:
  kernel/build --arch x86_64
  kernel/build --arch arm64 --jobs 4 --json
  kernel/build --arch x86_64 --source linux-6.12.60.tar.xz --sha256 SUM
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Builds, or takes the kernel from the cache. Returns 0, or 1 when it failed."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _stop)
    progress = Progress(f"kernel {arguments.arch}")
    try:
        manifest, output = build(arguments, progress)
    except BuildError as error:
        print(f"kernel/build: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nkernel/build: interrupted; nothing half-done is left", file=sys.stderr)
        return 130
    if arguments.json:
        print(json.dumps({**manifest, "output": str(output)}, indent=2))
    else:
        print(_summary(manifest, output))
    return 0


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def build(arguments: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], Path]:
    """The kernel in the output directory.

    Returns:
        The manifest and the directory.

    Raises:
        BuildError: with what to do.
    """
    arch, cache = arguments.arch, arguments.cache.absolute()
    output = (arguments.output or ROOT / "build" / "kernel" / arch).absolute()
    fragments = read_fragments(arch)
    requested = merge(fragments)
    tools = toolchain(arch)
    if arguments.source is not None:
        source = tarball_source(arguments.source, arguments.sha256)
    else:
        if arguments.update or not in_cache(cache):
            progress.say(f"fetching {PACKAGE} of Debian {SUITE}")
        source = debian_source(cache, update=arguments.update)
    key = cache_key(arch, source, requested, tools)

    def fill(place: Path) -> None:
        started = time.monotonic()
        # One path for all builds of an architecture (the lock of its cache is held): what a killed one left goes here.
        work = cache / "kernel" / f"work-{arch}"
        stamp = "\n".join([source.sha256, *tools.lines()])
        if not (arguments.keep and _stamped(work, stamp)):
            shutil.rmtree(work, ignore_errors=True)
        try:
            manifest = _build(
                arch,
                source,
                fragments=fragments,
                tools=tools,
                work=work,
                stamp=stamp,
                place=place,
                jobs=arguments.jobs,
                progress=progress,
            )
        finally:
            if not arguments.keep:
                shutil.rmtree(work, ignore_errors=True)
        manifest["key"] = key
        manifest["seconds"]["all"] = round(time.monotonic() - started, 1)
        manifest["cpu_seconds"]["all"] = round(sum(manifest["cpu_seconds"].values()), 1)
        (place / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")

    place, hit = cached(cache, f"kernel/{arch}", key, fill)
    manifest = json.loads((place / "manifest.json").read_text())
    for name, entry in manifest["outputs"].items():
        if not (place / name).is_file() or file_sha256(place / name) != entry["sha256"]:
            raise BuildError(f"{place / name} is not what its manifest says: remove {place} and build again")
    publish(place, output)
    progress.say(f"{'from the cache' if hit else 'built'}: {place}")
    return manifest, output


def cache_key(arch: str, source: Source, requested: dict[str, str], tools: Toolchain) -> str:
    """The hash of all that decides about the kernel's bytes."""
    symbols = [f"{name}={value}" for name, value in sorted(requested.items())]
    files = [Path(recipe.__file__), compilation.BOOTCONFIG]
    return inputs_hash([arch, source.sha256, *tools.lines(), *symbols], files, ROOT)


def _build(
    arch: str,
    source: Source,
    *,
    fragments: Sequence[Fragment],
    tools: Toolchain,
    work: Path,
    stamp: str,
    place: Path,
    jobs: int,
    progress: Progress,
) -> dict[str, Any]:
    tree, objects = work / "source", work / "objects"
    seconds: dict[str, float] = {}
    cpu_seconds: dict[str, float] = {}
    last, last_cpu = time.monotonic(), _cpu_seconds()

    def lap(name: str) -> None:
        nonlocal last, last_cpu
        now, now_cpu = time.monotonic(), _cpu_seconds()
        seconds[name] = round(now - last, 1)
        cpu_seconds[name] = round(now_cpu - last_cpu, 1)
        last, last_cpu = now, now_cpu

    if not _stamped(work, stamp):
        progress.say(f"unpacking {source.path.name}")
        unpack(source, tree)
        (work / "stamp").write_text(stamp)
    lap("unpack")
    requested = merge(fragments)
    result = compilation.configure(arch, tree, objects, requested)
    release = compilation.kernel_release(arch, tree, objects)
    built_in = sum(value == "y" for value in result.values())
    lap("configure")
    progress.say(f"compiling Linux {release}, {built_in} symbols on, {jobs} jobs")
    log = work.with_name(f"log-{arch}.txt")
    steps = compilation.compile_kernel(arch, tree, objects, jobs=jobs, log=log, progress=progress)
    lap("compile")
    target = recipe.TARGETS[arch]
    for name, path in target.files.items():
        shutil.copyfile(objects / path, place / name)
    shutil.copyfile(objects / ".config", place / "config")
    names = [*target.files, "config"]
    return {
        "name": "taploom kernel",
        "arch": arch,
        "release": release,
        "source": {
            "origin": source.origin,
            "version": source.version or release,
            "file": source.path.name,
            "sha256": source.sha256,
        },
        "tools": dict(line.split(": ", 1) for line in tools.lines()),
        "fragments": {fragment.name: len(fragment.symbols) for fragment in fragments},
        "symbols": {"requested": len(requested), "on": built_in},
        "outputs": {
            name: {"bytes": (place / name).stat().st_size, "sha256": file_sha256(place / name)} for name in names
        },
        "steps": steps,
        "jobs": jobs,
        "cpus": os.cpu_count(),
        "host": platform.machine(),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
    }


def _cpu_seconds() -> float:
    """Seconds of processor time of all commands that were run so far, and of what they ran."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _stamped(work: Path, stamp: str) -> bool:
    """Whether trees that were kept are of this source and these tools."""
    note = work / "stamp"
    return note.is_file() and note.read_text() == stamp


def _summary(manifest: dict[str, Any], output: Path) -> str:
    vmlinuz = manifest["outputs"]["vmlinuz"]
    return (
        f"Linux {manifest['release']} for {manifest['arch']}: {output}/vmlinuz, {vmlinuz['bytes'] / 1e6:.1f} MB, "
        f"SHA-256 {vmlinuz['sha256'][:16]}; {manifest['symbols']['on']} symbols on; "
        f"built in {clock(manifest['seconds']['all'])} with {manifest['jobs']} jobs"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kernel/build",
        description="Build the kernel of taploom's virtual machines from kernel/fragments, or take it from the cache.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", required=True, choices=ARCHITECTURES, help="the machines' architecture")
    parser.add_argument(
        "--source", type=Path, metavar="TARBALL", help="a linux-*.tar.xz; default: Debian's linux-source-6.12"
    )
    parser.add_argument(
        "--sha256", default="", metavar="SUM", help="the tarball's SHA-256, where it is not a known one"
    )
    parser.add_argument("--update", action="store_true", help="ask Debian for a newer source than the cache has")
    parser.add_argument(
        "--cache", type=Path, default=DEFAULT_CACHE, metavar="DIR", help=f"default: {DEFAULT_CACHE} ($TAPLOOM_CACHE)"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: build/kernel/ARCH of the checkout")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="default: one per CPU")
    parser.add_argument("--keep", action="store_true", help="keep the source and object trees, and build on from them")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")
    return parser
