"""A VM's commands, its accelerator, and how far it has booted."""

from __future__ import annotations

import itertools
import json
import platform
from pathlib import Path

import pytest

from lab.vm import accelerator as accelerators
from lab.vm import tools
from lab.vm.accelerator import accelerator
from lab.vm.artefacts import Artefacts
from lab.vm.errors import MachineError
from lab.vm.machine import Drive, Machine, Share
from lab.vm.progress import BootProgress, stage
from lab.vm.timestamp import timestamp_khz


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of programs that are named like the ones a VM needs, first in PATH, and an empty cache."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for name in ("qemu-system-x86_64", "qemu-system-aarch64", "vhost-device-vsock"):
        (directory / name).write_text("#!/bin/sh\n")
        (directory / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(directory))
    monkeypatch.setenv("TAPLOOM_CACHE", str(tmp_path / "cache"))
    return directory


def options(command: list[str], name: str) -> list[str]:
    return [value for option, value in itertools.pairwise(command) if option == name]


def machine(tmp_path: Path, **more: object) -> Machine:
    return Machine("web", tmp_path / "web", Path("/k/vmlinuz"), accelerator="tcg", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("khz", "clock"), [(2100001, "clocksource=tsc tsc=reliable tsc_early_khz=2100001"), (None, "clocksource=hpet")]
)
def test_qemu_is_given_no_network_of_its_own_and_memory_that_the_vsock_shares(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, khz: int | None, clock: str
) -> None:
    monkeypatch.setattr("lab.vm.machine.timestamp_khz", lambda: khz)
    command = machine(tmp_path, initrd=Path("/i"), append="quiet", memory_mib=300, cpus=2).qemu_command()
    assert command[0] == str(programs / "qemu-system-x86_64")
    assert "-nodefaults" in command and options(command, "-nic") == ["none"] and options(command, "-netdev") == []
    assert options(command, "-object") == ["memory-backend-memfd,id=mem0,size=300M,share=on"]
    assert options(command, "-m") == ["300M"] and options(command, "-smp") == ["2"]
    assert options(command, "-initrd") == ["/i"]
    assert options(command, "-append") == [
        f"console=ttyS0 panic=-1 no_timer_check {clock} noreplace-smp initcall_blacklist=jent_mod_init "
        "mitigations=off sysctl.net.ipv4.tcp_tso_rtt_log=14 quiet"
    ]
    assert "vhost-user-vsock-pci,id=vsockdev0,chardev=vsock0,bus=vsockport" in options(command, "-device")


def test_the_timestamp_counter_is_measured_where_it_runs_steadily() -> None:
    khz = timestamp_khz()
    steady = platform.machine() == "x86_64" and " constant_tsc " in Path("/proc/cpuinfo").read_text()
    assert (khz is not None and 100_000 < khz < 10_000_000) if steady else khz is None


def test_an_arm_machine(programs: Path, tmp_path: Path) -> None:
    command = machine(tmp_path, arch="arm64", vsock=False).qemu_command()
    assert command[0] == str(programs / "qemu-system-aarch64")
    assert options(command, "-machine") == ["virt,memory-backend=mem0"]
    assert options(command, "-append") == ["console=ttyAMA0 panic=-1"]
    assert options(command, "-device") == []


def test_shares_drives_and_a_tap(programs: Path, tmp_path: Path) -> None:
    command = machine(
        tmp_path,
        shares=(Share("root", Path("/a,b")), Share("more", Path("/c"), read_only=True)),
        drives=(Drive(Path("/d.img")), Drive(Path("/e.img"), read_only=False)),
        tap="tap7",
    ).qemu_command()
    assert options(command, "-fsdev") == [
        "local,id=fs0,path=/a,,b,security_model=passthrough,multidevs=remap",
        "local,id=fs1,path=/c,security_model=passthrough,multidevs=remap,readonly=on",
    ]
    assert options(command, "-drive") == [
        "if=none,id=drive0,format=raw,readonly=on,file=/d.img",
        "if=none,id=drive1,format=raw,readonly=off,file=/e.img",
    ]
    assert options(command, "-netdev") == ["tap,id=net0,ifname=tap7,script=no,downscript=no"]


def test_the_vsock_of_a_machine_is_a_hybrid_address(programs: Path, tmp_path: Path) -> None:
    made = machine(tmp_path)
    assert made.address(5555) == f"hybrid:{tmp_path}/web/vsock.sock:5555"
    command = made.vsock_command()
    assert command[0] == str(programs / "vhost-device-vsock")
    # Who dials the address must not reach the device before the VM's driver serves it.
    assert options(command, "--uds-path") == [f"{tmp_path}/web/device.sock"]


def test_missing_programs_are_named_with_what_mends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TAPLOOM_CACHE", str(tmp_path))
    with pytest.raises(MachineError, match="qemu-system-x86_64 is not installed: run 'make vm-setup'"):
        tools.qemu("x86_64")
    with pytest.raises(MachineError, match="vhost-device-vsock is not installed"):
        tools.vhost_device_vsock()
    with pytest.raises(MachineError, match="'riscv64' is not an architecture; use x86_64 or arm64"):
        tools.qemu("riscv64")


def test_the_accelerator_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAPLOOM_ACCEL", "kvm")
    assert accelerator("x86_64") == "kvm"
    monkeypatch.setenv("TAPLOOM_ACCEL", "fast")
    with pytest.raises(MachineError, match="TAPLOOM_ACCEL is 'fast'; use kvm, hvf, tcg, or unset it"):
        accelerator("x86_64")


def test_the_accelerator_is_remembered_for_this_boot_of_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TAPLOOM_ACCEL", raising=False)
    monkeypatch.setenv("TAPLOOM_CACHE", str(tmp_path))
    monkeypatch.setattr(accelerators, "_candidate", lambda arch: "kvm")
    monkeypatch.setattr(accelerators, "_boot_id", lambda: "this")
    memory = tmp_path / "accelerator-x86_64.json"
    memory.write_text(json.dumps({"boot": "this", "accelerator": "kvm"}))
    assert accelerator("x86_64") == "kvm"
    for stale in (json.dumps({"boot": "the last", "accelerator": "kvm"}), "{", json.dumps({"boot": "this"})):
        memory.write_text(stale)
        assert accelerator("x86_64") == "tcg"  # nothing to try it with


def test_an_architecture_that_is_not_the_hosts_is_emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TAPLOOM_ACCEL", raising=False)
    monkeypatch.setenv("TAPLOOM_CACHE", str(tmp_path))
    other = "arm64" if tools.host_architecture() == "x86_64" else "x86_64"
    assert accelerator(other, Path("/no/kernel")) == "tcg"


def test_artefacts_are_written_down_and_read(tmp_path: Path) -> None:
    wanted = Artefacts("arm64", Path("/k"), Path("/g"), Path("/h"))
    wanted.save(tmp_path / "vm.json")
    assert Artefacts.load(tmp_path / "vm.json") == wanted


def test_the_console_tells_how_far_a_vm_is(tmp_path: Path) -> None:
    console = tmp_path / "console.log"
    assert stage(console) == ""
    for said, expected in (
        ("", "kernel"),
        ("taploom-init: init after 1.204 s\n", "init"),
        ("taploom-init: agent answers after 2.500 s\n", "agent"),
    ):
        with console.open("a") as file:
            file.write(said)
        assert stage(console) == expected


def test_progress_has_a_line_for_each_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    consoles = {name: tmp_path / name for name in ("helper", "web")}
    progress = BootProgress(consoles)
    progress.update(set())
    consoles["web"].write_text("taploom-init: init after 1.2 s\n")
    progress.update(set())
    progress.update({"web"})
    progress.update({"web"})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" after ")[0] for line in lines] == ["web: init", "web: ready"]
