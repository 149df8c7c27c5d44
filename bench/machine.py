"""What the figures were measured on."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

_ROOT = Path(__file__).parent.parent


def describe() -> dict[str, str]:
    """The machine, the date and the versions that matter for every path."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "CPU": model[1] if model else platform.machine(),
        "cores": str(os.cpu_count()),
        "memory": f"{int(memory[1]) / 2**20:.1f} GiB" if memory else "unknown",
        "kernel": platform.release(),
        "OS": platform.freedesktop_os_release().get("PRETTY_NAME", "unknown"),
        "load before": f"{os.getloadavg()[0]:.2f}",
        "commit": version_of("git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--exclude", "*"),
        "Python": platform.python_version(),
        "iperf3": version_of("iperf3", "--version"),
        "Open vSwitch": version_of("ovs-vswitchd", "--version"),
        "OVN": version_of("ovn-northd", "--version"),
    }


def version_of(*argv: str) -> str:
    """The version that a program says it is, or the first line of what it prints; `none` when it is not there."""
    try:
        output = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return "none"
    line = output.strip().splitlines()[0] if output.strip() else "none"
    # "ovs-vswitchd (Open vSwitch) 3.1.0", "iperf 3.12 (cJSON 1.7.15)"
    version = re.search(r"\d+\.\d+(\.\d+)*", line)
    return version[0] if version and " " in line else line
