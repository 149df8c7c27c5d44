"""The command `images/alpine-helper/build`."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from images.common import cache, manifest
from images.common.tools import ARCHITECTURES, BuildError

from . import debian, outputs
from .recipe import CHECKOUT, HERE, Recipe, read_recipe

_LIMIT = 60_000_000  # bytes of compressed initramfs


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="images/alpine-helper/build",
        description="Builds the helper VM's image: OVS, OVN, dnsmasq and agent_helper, as initramfs, as read-only root "
        "file system and as OCI image layout. Needs root, to run the image's interpreter in its own root.",
        epilog="example: images/alpine-helper/build --arch x86_64",
    )
    parser.add_argument("--arch", choices=sorted(ARCHITECTURES), default="x86_64")
    parser.add_argument("--builder", choices=("debian", "alpine"), default="debian", help="whose packages (debian)")
    parser.add_argument("--cache", type=Path, default=cache.DEFAULT_CACHE, metavar="DIR", help="(%(default)s)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="(build/images/alpine-helper/ARCH in the checkout)")
    parser.add_argument("--update", action="store_true", help="look for newer packages than those found before")
    parser.add_argument("--force", action="store_true", help="build although the cache has it")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = _arguments(argv)
    try:
        result = _build(arguments)
    except BuildError as exc:
        print(f"build: {exc}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        sizes = result["outputs"]
        assert isinstance(sizes, dict)
        for name, size in sizes.items():
            print(f"{result['output']}/{name}: {size / 1e6:.1f} MB")
        print(f"{'from the cache' if result['cached'] else 'built'} in {result['seconds']:.1f} s")
    return 0


def _say(text: str) -> None:
    print(f"build: {text}", file=sys.stderr, flush=True)


def _build(arguments: argparse.Namespace) -> dict[str, object]:
    began = time.monotonic()
    arch: str = arguments.arch
    recipe = read_recipe(arguments.builder, arch)
    found = debian.inputs(recipe, arch, cache=arguments.cache, update=arguments.update)
    ours = [HERE, CHECKOUT / "images/common", CHECKOUT / "images/init", *(CHECKOUT / m for m in recipe.python_modules)]
    key = cache.inputs_hash([arguments.builder, arch, str(found.init.parent.name), *found.texts()], ours, CHECKOUT)
    if arguments.force:
        key += f"-{time.time_ns()}"

    def build(place: Path) -> None:
        _write(place, found, recipe, arch, key)

    built, cached = cache.cached(arguments.cache, f"alpine-helper/{arch}", key, build)
    output = arguments.output or CHECKOUT / "build/images/alpine-helper" / arch
    cache.publish(built, output)
    sizes = {path.name: path.stat().st_size for path in sorted(output.iterdir()) if path.is_file()}
    return {"output": str(output), "cached": cached, "seconds": time.monotonic() - began, "outputs": sizes}


def _write(place: Path, found: debian.Inputs, recipe: Recipe, arch: str, key: str) -> None:
    tree, tools = place / "tree", place / "tools"
    tree.mkdir()
    tools.mkdir()
    _say("taking files out of packages")
    packages = debian.build_trees(found, recipe, tree, tools)
    _say("packing the initramfs")
    outputs.write_initramfs(tree, place / outputs.INITRAMFS)
    outputs.write_tools(tools, place / outputs.TOOLS)
    _say("packing the root file system and the OCI layout")
    outputs.write_root(tree, tools, place / outputs.ROOT)
    version = _version()
    outputs.write_oci(tree, tools, place / "oci", arch, version)
    size = (place / outputs.INITRAMFS).stat().st_size
    if size > _LIMIT:
        raise BuildError(f"the initramfs is larger than {_LIMIT / 1e6:.0f} MB: {size / 1e6:.1f} MB")
    content = manifest.build_manifest(
        image=recipe.name,
        arch=arch,
        builder="debian",
        version=version,
        inputs=key.partition("-")[0],
        packages=packages,
        wheels=found.wheels,
        root=tree,
        outputs=[place / name for name in (outputs.INITRAMFS, outputs.TOOLS, outputs.ROOT)],
        extra={"tools": sorted(f"/{p.relative_to(tools)}" for p in tools.rglob("*") if not p.is_dir())},
    )
    manifest.write_manifest(content, place / "manifest.json")
    for folder in (tree, tools):
        shutil.rmtree(folder)


def _version() -> str:
    found = re.search(r'__version__ = "([^"]+)"', (CHECKOUT / "taploom/__init__.py").read_text())
    if found is None:
        raise BuildError("taploom/__init__.py has no __version__")
    return found[1]
