"""Which of QEMU's accelerators really runs our kernels here.

/dev/kvm alone says little: some hosts have one that runs no stock kernel. So the kernel is booted with it once, without
any root file system: a kernel that gets as far as missing it has run. What was found is remembered until the host
boots again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lab.vm import tools
from lab.vm.errors import MachineError

ACCELERATORS = ("kvm", "hvf", "tcg")
_FIRST_OUTPUT = 5.0  # a kernel under KVM says something within a second
_WHOLE_BOOT = 20.0
_MISSES_ROOT = b"Unable to mount root fs"


def accelerator(arch: str, kernel: Path | None = None) -> str:
    """kvm, hvf or tcg. TAPLOOM_ACCEL in the environment decides where it is set.

    Args:
        arch: what is to run.
        kernel: what hardware acceleration is tried with; without one, tcg is taken where nothing is remembered.

    Raises:
        MachineError: TAPLOOM_ACCEL is none of them.
    """
    chosen = os.environ.get("TAPLOOM_ACCEL", "")
    if chosen:
        if chosen not in ACCELERATORS:
            raise MachineError(f"TAPLOOM_ACCEL is {chosen!r}; use {', '.join(ACCELERATORS)}, or unset it")
        return chosen
    candidate = _candidate(arch)
    if candidate is None:
        return "tcg"
    memory = tools.cache() / f"accelerator-{arch}.json"
    boot = _boot_id()
    try:
        known = json.loads(memory.read_bytes())
        if known["boot"] == boot and known["accelerator"] in ACCELERATORS:
            return str(known["accelerator"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if kernel is None:
        return "tcg"
    found = candidate if _boots(arch, candidate, kernel) else "tcg"
    memory.parent.mkdir(parents=True, exist_ok=True)
    temporary = memory.with_name(f".{memory.name}.{os.getpid()}")
    temporary.write_text(json.dumps({"boot": boot, "accelerator": found}) + "\n")
    temporary.replace(memory)
    return found


def _candidate(arch: str) -> str | None:
    """What the host may have for this architecture."""
    if arch != tools.host_architecture():
        return None
    if sys.platform == "darwin":
        return "hvf"
    return "kvm" if os.access("/dev/kvm", os.R_OK | os.W_OK) else None


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except FileNotFoundError:  # macOS
        return subprocess.run(
            ["sysctl", "-n", "kern.bootsessionuuid"], capture_output=True, text=True, check=True
        ).stdout.strip()


def _boots(arch: str, candidate: str, kernel: Path) -> bool:
    """Whether the kernel runs with it."""
    with tempfile.TemporaryDirectory(prefix="taploom-accelerator-") as directory:
        console = Path(directory, "console")
        process = subprocess.Popen(
            [
                *(tools.qemu(arch), "-accel", candidate, "-cpu", "host"),
                *("-machine", machine_type(arch), "-m", "256M", "-smp", "1"),
                *("-nodefaults", "-no-user-config", "-nic", "none", "-display", "none", "-no-reboot"),
                *("-chardev", f"file,id=console,path={console}", "-serial", "chardev:console"),
                *("-kernel", str(kernel), "-append", f"console={console_device(arch)} panic=-1"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            began = time.monotonic()
            while time.monotonic() - began < _WHOLE_BOOT:
                try:
                    process.wait(0.1)
                except subprocess.TimeoutExpired:
                    if time.monotonic() - began < _FIRST_OUTPUT or _size(console):
                        continue
                return process.poll() == 0 and _MISSES_ROOT in console.read_bytes()
            return False
        finally:
            process.kill()
            process.wait()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def machine_type(arch: str) -> str:
    """What QEMU calls the machine."""
    return "q35" if arch == "x86_64" else "virt"


def console_device(arch: str) -> str:
    """What Linux calls the first serial port there."""
    return "ttyS0" if arch == "x86_64" else "ttyAMA0"
