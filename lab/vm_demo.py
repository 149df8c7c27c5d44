"""`make vm-demo`: shows the fabric working between virtual machines, step by step, as a person would type it."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import time
from pathlib import Path

from lab.steps import Row, StepFailedError, Steps, console, print_rows, round_trip
from lab.vm import artefacts, tools
from lab.vm.accelerator import accelerator
from lab.vm.errors import MachineError

LAB = "vm-demo"
_BOOT_TIMEOUT = 600.0
_DOCKER_TIMEOUT = 240.0
_INIT = re.compile(r"taploom-init: init after ([\d.]+) s")
_AGENT = re.compile(r"taploom-init: agent answers after ([\d.]+) s")


def build() -> tuple[artefacts.Artefacts, float]:
    """What the VMs boot, and the seconds that it took.

    Raises:
        StepFailedError: something is missing, or a build failed.
    """
    console.print("[bold]kernel, guest image, helper image[/bold] (from the cache where they were built before)")
    began = time.monotonic()
    try:
        arch = tools.host_architecture()
        tools.qemu(arch)
        tools.vhost_device_vsock()
        built = artefacts.build(arch, say=lambda text: console.print(f"  {text}", style="dim", markup=False))
        accelerator(arch, built.kernel)  # finding out takes a while, once
    except MachineError as error:
        raise StepFailedError(str(error)) from error
    return built, time.monotonic() - began


def boot_times(name: str, console_log: Path) -> Row:
    """What a VM's own console says of its boot.

    Raises:
        StepFailedError: it does not say it.
    """
    said = console_log.read_text(errors="replace")
    init, agent = _INIT.search(said), _AGENT.search(said)
    if init is None or agent is None:
        raise StepFailedError(f"the console of {name} does not tell when init and agent were there")
    return Row(f"... {name}: from the kernel's start to init, to its agent", f"{init[1]} s", f"{agent[1]} s")


def show_networks(steps: Steps) -> list[Row]:
    """Networks between the VMs: names, hot connect and disconnect, throughput.

    Raises:
        StepFailedError: something did not work.
    """
    rows: list[Row] = []
    _, took = steps.run("network", "create", "app", "--ipv6")
    rows.append(Row("network app created (IPv4 and IPv6)", "ready", f"{took * 1000:.0f} ms"))
    steps.run("network", "create", "back")
    _, took = steps.run("network", "connect", "app", "web")
    rows.append(Row("running VM web connected to app", "eth0", f"{took * 1000:.0f} ms"))
    steps.run("network", "connect", "app", "db", "--alias", "postgres")
    steps.run("network", "connect", "back", "db")
    steps.in_guest("web", "ip", "-brief", "address")
    rows += steps.names(
        [
            ("db found by its name", ("ping", "-n", "-c3", "-i0.2", "db")),
            ("... by its alias", ("ping", "-n", "-c3", "-i0.2", "postgres")),
            ("... over IPv6", ("ping", "-6", "-n", "-c3", "-i0.2", "db")),
        ]
    )

    rows += steps.hot_plug(0.1)
    rate = steps.iperf3("db", "web")
    rows.append(Row("TCP from web to db (iperf3, MTU 1500)", f"{rate / 1e6:.0f} Mb/s", "3 s"))
    return rows


def show_docker(steps: Steps) -> list[Row]:
    """A container that is a VM, through Docker's own command.

    Raises:
        StepFailedError: something did not work.
    """
    page = "while :; do printf 'HTTP/1.0 200 OK\\r\\n\\r\\nhello\\n' | busybox nc -l -p 80; done"
    _, started = steps.docker(
        *("run", "-d", "--name", "api", "--network", "app", "-p", "127.0.0.1::80", "host", "sh", "-c", page),
        timeout=_DOCKER_TIMEOUT,
    )
    rows = [Row("docker run: a container with a VM of its own", "started", f"{started:.1f} s")]
    reply = steps.in_guest("web", "ping", "-n", "-c1", "-W5", "api")
    rows.append(Row("... pinged from web by its name", round_trip(reply)))
    kernel = steps.docker("exec", "api", "uname", "-r")[0].strip()
    rows.append(Row("... its kernel: docker exec api uname -r", kernel))
    published = steps.docker("port", "api", "80")[0].strip()
    rows.append(Row("... its published port, from the machine", steps.http(published, timeout=20, patience=60)))
    steps.docker("rm", "-f", "api")
    return rows


def show(steps: Steps, *, docker: bool) -> list[Row]:
    """Runs the demonstration.

    Raises:
        StepFailedError: something did not work.
    """
    built, took = build()
    rows = [Row(f"kernel and images for {built.arch} built, or found in the cache", "ready", f"{took:.1f} s")]
    _, took = steps.run("lab", "up", "--vm", "--guest", "web", "--guest", "db", timeout=_BOOT_TIMEOUT, live=True)
    accel = accelerator(built.arch, built.kernel)
    rows.append(Row(f"three VMs and the bridge started (QEMU, {accel}): helper, web, db", "ready", f"{took:.1f} s"))
    rows.append(boot_times("helper", steps.lab.helper_directory / "console.log"))
    rows.append(boot_times("web", steps.lab.guest_directory("web") / "console.log"))
    steps.in_guest("web", "uname", "-a")
    rows += show_networks(steps)
    if docker:
        rows += show_docker(steps)
    steps.run("status")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Shows the fabric working between virtual machines on this machine.",
        epilog="example: python -m lab.vm_demo --keep",
    )
    parser.add_argument("--keep", action="store_true", help="leave the lab up at the end")
    parser.add_argument("--no-docker", action="store_true", help="leave out the container that is a VM")
    arguments = parser.parse_args()
    steps = Steps(LAB)
    failure = ""
    rows: list[Row] = []
    began = time.monotonic()
    try:
        rows = show(steps, docker=not arguments.no_docker)
    except StepFailedError as error:
        failure = str(error)
        steps.show_logs()
    except KeyboardInterrupt:
        failure = "interrupted"
    finally:
        if not arguments.keep:
            with contextlib.suppress(StepFailedError):
                steps.run("lab", "down")
    if failure:
        console.print(f"\n[red]vm-demo: FAILED: {failure}[/red]")
        sys.exit(1)
    print_rows("taploom between virtual machines", rows)
    if arguments.keep:
        console.print("The lab is still up. Try: [bold]. .venv/bin/activate; export TAPLOOM_LAB=vm-demo[/bold], then")
        console.print("[bold]taploom lab exec web -- sh[/bold]; [bold]taploom lab down[/bold] ends it. For docker:")
        console.print(f"[bold]export DOCKER_HOST={steps.lab.docker_host}[/bold]")
    console.print(
        f"[green]vm-demo: everything worked, in {time.monotonic() - began:.0f} s; "
        + ("the lab is up[/green]" if arguments.keep else "nothing is left behind[/green]")
    )


if __name__ == "__main__":
    main()
