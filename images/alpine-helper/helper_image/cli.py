"""The command `images/alpine-helper/build`."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from images.common import cache, manifest
from images.common.debian import Package
from images.common.tools import ARCHITECTURES, BuildError
from images.common.wheels import Wheel

from . import alpine, debian, outputs
from .recipe import CHECKOUT, HERE, Recipe, read_recipe

_Maker = Callable[[Path, Path], tuple[Sequence[Package], Sequence[Wheel]]]
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
    group = parser.add_argument_group("the alpine builder")
    group.add_argument("--mirror", default="", metavar="URL", help="a mirror of Alpine, or a directory like one")
    group.add_argument("--apk", type=Path, metavar="FILE", help="a static apk; without it, that of --root")
    group.add_argument("--root", type=Path, metavar="DIR", help="an Alpine root with apk, or with all packages already")
    group.add_argument("--keys", type=Path, metavar="DIR", help="the keys of the packages; without it, those of --root")
    group.add_argument("--ovn", choices=("package", "source"), default="package", help="where OVN is from (package)")
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
    maker, texts = _debian(arguments, recipe) if arguments.builder == "debian" else _alpine(arguments, recipe)
    ours = [HERE, CHECKOUT / "images/common", CHECKOUT / "images/init", *(CHECKOUT / m for m in recipe.python_modules)]
    key = cache.inputs_hash([arguments.builder, arch, *texts], ours, CHECKOUT)
    place_key = f"{key}-{time.time_ns()}" if arguments.force else key

    def build(place: Path) -> None:
        _write(place, maker, recipe, arguments, key)

    built, cached = cache.cached(arguments.cache, f"{recipe.name}/{arguments.builder}-{arch}", place_key, build)
    output = arguments.output or CHECKOUT / "build/images" / recipe.name / arch
    cache.publish(built, output)
    sizes = {path.name: path.stat().st_size for path in sorted(output.iterdir()) if path.is_file()}
    return {"output": str(output), "cached": cached, "seconds": time.monotonic() - began, "outputs": sizes}


def _debian(arguments: argparse.Namespace, recipe: Recipe) -> tuple[_Maker, list[str]]:
    found = debian.inputs(recipe, arguments.arch, cache=arguments.cache, update=arguments.update)

    def make(tree: Path, tools: Path) -> tuple[Sequence[Package], Sequence[Wheel]]:
        return debian.build_trees(found, recipe, tree, tools, say=_say), found.wheels

    return make, [found.init.parent.name, *found.texts()]


def _alpine(arguments: argparse.Namespace, recipe: Recipe) -> tuple[_Maker, list[str]]:
    options = alpine.Options(arguments.mirror, arguments.apk, arguments.root, arguments.keys, arguments.ovn)

    def make(tree: Path, tools: Path) -> tuple[Sequence[Package], Sequence[Wheel]]:
        return alpine.build_trees(recipe, options, arguments.arch, tree, tools, cache=arguments.cache, say=_say)

    return make, [str(options), str(time.time_ns())]  # what apk will find is not known beforehand


def _write(place: Path, maker: _Maker, recipe: Recipe, arguments: argparse.Namespace, key: str) -> None:
    tree, tools = place / "tree", place / "tools"
    tree.mkdir()
    tools.mkdir()
    _say("taking files out of packages")
    packages, wheels = maker(tree, tools)
    _say("packing the initramfs")
    outputs.write_initramfs(tree, place / outputs.INITRAMFS)
    outputs.write_tools(tools, place / outputs.TOOLS)
    _say("packing the root file system and the OCI layout")
    outputs.write_root(tree, tools, place / outputs.ROOT)
    version = _version()
    outputs.write_oci(tree, tools, place / "oci", arguments.arch, version)
    size = (place / outputs.INITRAMFS).stat().st_size
    if size > _LIMIT:
        raise BuildError(f"the initramfs is larger than {_LIMIT / 1e6:.0f} MB: {size / 1e6:.1f} MB")
    content = manifest.build_manifest(
        image=recipe.name,
        arch=arguments.arch,
        builder=arguments.builder,
        version=version,
        inputs=key,
        packages=packages,
        wheels=wheels,
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
