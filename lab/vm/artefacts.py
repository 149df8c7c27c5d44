"""Kernel and images of a VM lab: built when they are missing."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lab.vm import tools
from lab.vm.errors import MachineError

FILE = "vm.json"
"""Where a lab writes down what it boots, in its directory."""

# What makes each, and what it leaves below build/.
_BUILDS = (
    ("kernel", "kernel/build", "kernel/{arch}/vmlinuz"),
    ("guest image", "images/guest-initfs/build", "images/guest-initfs/{arch}/guest-initfs.cpio.zst"),
    ("helper image", "images/alpine-helper/build", "images/alpine-helper/{arch}/helper.cpio.zst"),
)


@dataclass(frozen=True)
class Artefacts:
    """What the VMs of a lab boot."""

    arch: str
    kernel: Path
    guest: Path
    helper: Path

    def save(self, path: Path) -> None:
        """Writes them down for other processes of the lab."""
        path.write_text(json.dumps({name: str(value) for name, value in vars(self).items()}, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Artefacts:
        """What `save` wrote."""
        known = json.loads(path.read_bytes())
        return cls(known["arch"], Path(known["kernel"]), Path(known["guest"]), Path(known["helper"]))


def build(arch: str, *, say: Callable[[str], None]) -> Artefacts:
    """Everything that a VM lab boots, current with the sources; what is slow comes from the cache where it can.

    TAPLOOM_KERNEL in the environment names a kernel to take instead of ours.

    Args:
        arch: x86_64 or arm64.
        say: is told what is being done; the builders write their own progress to standard error.

    Raises:
        MachineError: a builder failed.
    """
    made: list[Path] = []
    own_kernel = os.environ.get("TAPLOOM_KERNEL", "")
    for what, program, result in _BUILDS:
        if what == "kernel" and own_kernel:
            if not Path(own_kernel).is_file():
                raise MachineError(f"TAPLOOM_KERNEL is {own_kernel}, which is no file")
            made.append(Path(own_kernel).absolute())
            continue
        made.append(_run_builder(what, program, tools.CHECKOUT / "build" / result.format(arch=arch), arch))
    kernel, guest, helper = made
    # ovs-appctl and the like, for who looks: the image itself is without.
    more = helper.with_name("helper-tools.cpio.zst")
    with _checkout_importable():
        from images.common.tools import BuildError
        from lab.vm import payload

        output = tools.CHECKOUT / "build/lab" / arch
        try:
            added = payload.build(arch, cache=tools.cache(), say=say)
            return Artefacts(
                arch,
                kernel,
                payload.join("guest", arch, [guest], added, output, cache=tools.cache()),
                payload.join(
                    "helper", arch, [helper, *([more] if more.exists() else [])], added, output, cache=tools.cache()
                ),
            )
        except BuildError as error:
            raise MachineError(str(error)) from error


def _run_builder(what: str, program: str, result: Path, arch: str) -> Path:
    path = tools.CHECKOUT / program
    if not path.is_file():
        raise MachineError(f"the {what} cannot be built: {path} is missing; VM labs run from a checkout of taploom")
    # Its result, on standard output, is for who runs it by hand.
    done = subprocess.run(
        [sys.executable, str(path), "--arch", arch], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        raise MachineError(
            f"the {what} was not built: '{program} --arch {arch}' ended with {done.returncode}; see above"
        )
    if not result.is_file():
        raise MachineError(f"'{program} --arch {arch}' left no {result}")
    return result


@contextlib.contextmanager
def _checkout_importable():  # type: ignore[no-untyped-def]  # a context manager of nothing
    root = str(tools.CHECKOUT)
    added = root not in sys.path
    if added:
        sys.path.insert(0, root)
    try:
        yield
    finally:
        if added:
            sys.path.remove(root)
