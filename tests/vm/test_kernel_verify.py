"""kernel/verify on the kernel that was built: it tells what works from what does not, and never waits for ever.

The whole of it is a step of its own in scripts/test-vm.sh; here are a few checks, and what goes wrong on purpose.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def verify(kernel: Path, *arguments: str, timeout: float = 600) -> tuple[int, dict[str, Any], str]:
    """The command's exit status, its JSON, and its standard error."""
    command = [sys.executable, str(ROOT / "kernel" / "verify"), "--kernel", str(kernel), "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


def test_features_that_work_are_said_to_work(kernel: Path) -> None:
    status, answer, progress = verify(kernel, "--only", "vsock-host", "vxlan", "bpf-socket-lb")
    rows = {row["name"]: row for row in answer["checks"]}
    assert status == 0, rows
    assert answer["ok"]
    assert list(rows) == ["vsock-host", "vxlan", "bpf-socket-lb", "kernel-log"]
    assert rows["vxlan"]["detail"].endswith("packets of UDP 4789")
    assert answer["kernel_sha256"] == hashlib.sha256(kernel.read_bytes()).hexdigest()
    assert 0 < answer["boot_seconds"] < answer["seconds"]
    assert "vxlan: ok" in progress


def test_a_feature_that_is_not_there_fails_by_its_name(kernel: Path) -> None:
    """Each is taken away by the kernel's command line; what stands beside it works."""
    status, answer, _ = verify(
        kernel, "--append", "cgroup_disable=memory ipv6.disable=1", "--only", "cgroup-memory", "nat-ipv6", "cgroup-pids"
    )
    rows = {row["name"]: row for row in answer["checks"]}
    assert status == 1
    assert not answer["ok"]
    assert {name for name, row in rows.items() if not row["ok"]} == {"cgroup-memory", "nat-ipv6"}
    assert "memory" in rows["cgroup-memory"]["detail"]


def test_a_kernel_that_does_not_come_up_is_given_up(kernel: Path) -> None:
    """Without its initramfs's first program the kernel panics: the machine ends, and every check says so."""
    status, answer, progress = verify(kernel, "--append", "rdinit=/nothing root=/dev/nothing", "--only", "veth")
    assert status == 1
    assert "the machine ended by itself" in answer["why_not_whole"]
    assert answer["checks"][0]["detail"].startswith("not reached: the machine ended by itself")
    assert "Kernel panic" in progress


def test_a_run_that_takes_too_long_is_ended(kernel: Path) -> None:
    status, answer, _ = verify(kernel, "--limit", "2", "--only", "veth", timeout=120)
    assert status == 1
    assert "more than 2 s, the limit" in answer["why_not_whole"]


def test_no_kernel_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "kernel" / "verify"), "--kernel", str(tmp_path / "vmlinuz")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "kernel/build" in done.stderr


@pytest.mark.parametrize("arch", ["x86_64", "arm64"])
def test_the_ebpf_programs_compile_for_both_architectures(arch: str, tmp_path: Path) -> None:
    from kernel.verification import programs

    objects = programs.build(arch, tmp_path, print)
    sources = {source.name.removesuffix(".bpf.c") for source in programs.SOURCES.glob("*.bpf.c")}
    assert {path.stem for path in objects.glob("*.o")} == sources
    assert programs.build(arch, tmp_path, print) == objects
