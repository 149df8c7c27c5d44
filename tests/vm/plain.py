"""A virtual machine without an agent: a kernel, busybox and udhcpc, its one card plugged into the bridge by QEMU."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from conftest import ARCH, CONSOLE_LINES
from system.fabric import Fabric
from vmlab import until

from images.common.cpio import CONSOLE, write_newc
from lab.vm.accelerator import accelerator, console_device, machine_type

# What the machine does, told by its console. It is switched off by the test.
_INIT = """#!/bin/sh
/bin/busybox mkdir -p /proc /sys /bin /etc
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
ip link set lo up
ip link set eth0 up
peer=$(sed -n 's/.*tlt_peer=\\([^ ]*\\).*/\\1/p' /proc/cmdline)
while true; do
    echo "CARRIER $(cat /sys/class/net/eth0/carrier)"
    if udhcpc -q -n -i eth0 -s /script -O staticroutes -O mtu >/dev/null 2>&1; then
        . /told
        echo "TOLD $ip $dns $domain"
        ping -c1 -W5 "$peer" >/dev/null 2>&1 && echo "PING $ip"
        nslookup "web.$domain" "$dns" 2>/dev/null | sed -n 's/^Address: */NAME /p'
    fi
    sleep 1
done
"""
_SCRIPT = """#!/bin/sh
[ "$1" = bound ] || [ "$1" = renew ] || exit 0
ip address flush dev "$interface"
ip address add "$ip/$mask" dev "$interface"
set -- $staticroutes
while [ $# -ge 2 ]; do
    if [ "$2" = 0.0.0.0 ]; then ip route add "$1" dev "$interface"; else ip route add "$1" via "$2"; fi
    shift 2
done
echo "ip=$ip dns=${dns%% *} domain=$domain" >/told
"""


def plain_initfs(folder: Path) -> Path:
    """Makes the machine's initramfs in a folder; returns its path."""
    root = folder / "root"
    for name in ("bin", "dev", "proc", "sys"):
        (root / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin/busybox")
    shutil.copy("/bin/busybox", root / "bin/sh")
    for name, text in (("init", _INIT), ("script", _SCRIPT)):
        (root / name).write_text(text)
        (root / name).chmod(0o755)
    target = folder / "plain.cpio"
    write_newc(root, target, devices=CONSOLE, mtime=0)
    return target


@dataclass
class Plain:
    """The machine, as its console shows it."""

    console: Path

    def lines(self) -> list[str]:
        return self.console.read_text(errors="replace").splitlines() if self.console.exists() else []

    def until_says(self, lab: Fabric, *wanted: str, after: int = 0) -> None:
        def said() -> bool:
            return all(any(line.strip() == text for line in self.lines()[after:]) for text in wanted)

        until(said, lambda: f"the machine says {wanted}\n" + "\n".join(self.lines()[-CONSOLE_LINES:]) + lab.logs())


@contextlib.contextmanager
def switched_on(kernel: Path, initfs: Path, folder: Path, arguments: list[str], peer: str) -> Iterator[Plain]:
    """QEMU, with what `taploom guest register` says."""
    folder.mkdir(parents=True, exist_ok=True)
    console = folder / "console.log"
    argv = [
        *("qemu-system-x86_64" if ARCH == "x86_64" else "qemu-system-aarch64", "-nodefaults", "-no-user-config"),
        *("-machine", machine_type(ARCH), "-accel", accelerator(ARCH, kernel), "-m", "256", "-nic", "none"),
        *("-display", "none", "-serial", f"file:{console}", "-no-reboot", "-kernel", str(kernel)),
        *("-initrd", str(initfs), "-append", f"console={console_device(ARCH)} quiet tlt_peer={peer}", *arguments),
    ]
    with (folder / "qemu.log").open("wb") as log:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield Plain(console)
        assert process.poll() is None, (folder / "qemu.log").read_text()
    finally:
        process.kill()
        process.wait()
