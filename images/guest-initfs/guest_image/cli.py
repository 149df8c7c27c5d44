"""images/guest-initfs/build: what the command line says."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from images.common.cache import DEFAULT_CACHE, publish
from images.common.tools import ARCHITECTURES, BuildError

from . import buildroot, debian_builder
from .recipe import CHECKOUT, Recipe, read_recipe

_EXAMPLE = """\
example:
  images/guest-initfs/build --arch x86_64
  images/guest-initfs/build --arch arm64 --json
  images/guest-initfs/build --builder buildroot --buildroot ~/buildroot-2026.08 --check
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Builds the image, or takes it from the cache. Returns 0, or 1 when it failed."""
    arguments = _parser().parse_args(argv)
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"guest-initfs {arguments.arch}: {time.monotonic() - began:5.1f} s  {text}", file=sys.stderr, flush=True)

    try:
        recipe = read_recipe()
        if arguments.builder == "buildroot":
            return _buildroot(recipe, arguments, say)
        inputs = debian_builder.gather(
            recipe, arguments.arch, cache=arguments.cache, update=arguments.update, vminit=arguments.vminit, say=say
        )
        place, hit = debian_builder.build(recipe, inputs, cache=arguments.cache, say=say)
        output = arguments.output or CHECKOUT / "build/images/guest-initfs" / arguments.arch
        publish(place, output)
    except BuildError as error:
        print(f"images/guest-initfs/build: {error}", file=sys.stderr)
        return 1
    say("from the cache" if hit else "built")
    manifest = json.loads((output / "manifest.json").read_text())
    result = {
        "arch": arguments.arch,
        "output": str(output),
        "from_cache": hit,
        "modules": manifest["modules"],
        "unpacked_bytes": manifest["unpacked_bytes"],
        "outputs": manifest["outputs"],
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(result, indent=1) if arguments.json else _summary(result))
    return 0


def _buildroot(recipe: Recipe, arguments: argparse.Namespace, say: debian_builder.Say) -> int:
    """Checks, or says how to build."""
    folder = buildroot.prepare(recipe, cache=arguments.cache)
    tree = arguments.buildroot or Path("BUILDROOT")
    if not arguments.check:
        names = " or ".join(path.name for path in buildroot.defconfigs())
        print(f"{folder} has the wheels. Build with Buildroot {recipe.buildroot_release}, which downloads all sources:")
        print(f"  make -C {tree} O=OUTPUT BR2_EXTERNAL={buildroot.EXTERNAL} DEFCONFIG && make -C OUTPUT")
        print(f"DEFCONFIG is {names}; the image is OUTPUT/images/rootfs.cpio.zst.")
        return 0
    if arguments.buildroot is None:
        raise BuildError("--check needs a Buildroot tree: --buildroot DIR")
    found = buildroot.check(recipe, arguments.buildroot.absolute(), say)
    if arguments.json:
        print(json.dumps([asdict(entry) for entry in found], indent=1))
    else:
        for entry in found:
            print(f"{entry.name}: {entry.requested} symbols requested, none dropped; {len(entry.packages)} packages")
    return 0


def _summary(result: dict[str, object]) -> str:
    lines = [f"{result['output']}: {result['modules']} modules, {_mib(result['unpacked_bytes'])} unpacked"]
    outputs = result["outputs"]
    assert isinstance(outputs, dict)
    lines += [f"  {name}  {_mib(entry['bytes'])}  sha256 {entry['sha256']}" for name, entry in outputs.items()]
    return "\n".join(lines)


def _mib(size: object) -> str:
    assert isinstance(size, int)
    return f"{size / (1 << 20):.2f} MiB"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="images/guest-initfs/build",
        description="Builds the image that the guest agent is baked into: an initramfs and an OCI image layout.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", choices=sorted(ARCHITECTURES), default="x86_64", help="default: %(default)s")
    parser.add_argument("--builder", choices=("debian", "buildroot"), default="debian", help="default: %(default)s")
    parser.add_argument("--buildroot", type=Path, metavar="DIR", help="a Buildroot tree, for --builder buildroot")
    parser.add_argument("--check", action="store_true", help="only resolve the defconfigs with that tree")
    parser.add_argument("--output", type=Path, help="default: build/images/guest-initfs/ARCH in the checkout")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="default: $TAPLOOM_CACHE, or %(default)s")
    parser.add_argument("--update", action="store_true", help="ask Debian's archive for newer packages")
    parser.add_argument("--vminit", type=Path, metavar="LAYOUT", help="Apple's vminit image, for the OCI layout")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser
