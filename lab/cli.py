"""`taploom lab`: the whole fabric on one Linux machine."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from lab.state import DEFAULT_LAB, Lab, LabError, check_guest_name, enter_guest

if TYPE_CHECKING:
    from taploom.contracts.taploom.bridge.v1 import Status

_READY_TIMEOUT = 60.0
# A VM that boots with an emulated processor, on a busy machine, may be silent for so long; or all of them together.
_VM_TIMEOUT = 180.0
_HOPELESS = 5  # restarts of a process before it is ready


def _lab_option(command: Callable[..., None]) -> Callable[..., None]:
    """Adds --lab, and makes LabError a one-line message."""

    @click.option("--lab", "lab_name", metavar="NAME", help="Which lab; several can run side by side.")
    @click.pass_context
    @functools.wraps(command)
    def wrapped(context: click.Context, /, lab_name: str | None, **arguments: Any) -> None:
        name = lab_name
        if name is None:  # `taploom --lab NAME lab up` says the same
            parent = context.find_root().params
            name = parent.get("lab") or os.environ.get("TAPLOOM_LAB") or DEFAULT_LAB
        try:
            if os.geteuid() != 0:
                raise LabError("a lab makes namespaces and TAPs: run this as root")
            command(Lab(name), **arguments)
        except LabError as error:
            click.echo(f"taploom: {error}", err=True)
            sys.exit(1)

    return wrapped


@click.group(short_help="Run the whole fabric on this machine.")
def lab() -> None:
    """Run the whole fabric on this machine: guests are namespaces with an agent each, and so is the helper.

    With 'up --vm' guests and helper are virtual machines, on vsock.

    \b
    Example:
        taploom lab up --guest web --guest db
        taploom network create app
        taploom network connect app web
        taploom network connect app db --alias postgres
        taploom lab exec web -- ping -c1 postgres
        eval "$(taploom lab up)"; docker run -d --network app --name cache host sleep 1000
        taploom lab down
    """


@lab.command()
@click.option("--guest", "guests", metavar="NAME", multiple=True, help="A guest to start; repeatable.")
@click.option("--vm", is_flag=True, help="Guests and helper are virtual machines; builds what is missing first.")
@click.option("--json", "as_json", is_flag=True, help="Print the lab's status as JSON when it is ready.")
@_lab_option
def up(lab: Lab, guests: tuple[str, ...], vm: bool, as_json: bool) -> None:
    """Start the lab, and guests in it; returns when all is ready.

    In a lab that is up already, guests that it does not have yet are added.

    \b
    Example:
        taploom lab up --guest web --guest db
        taploom lab --lab metal up --vm --guest web
    """
    names = [check_guest_name(name) for name in guests]
    with lab.commands_locked():
        if lab.exists() and lab.on_vms() != vm:
            if vm:
                raise LabError(
                    f"lab {lab.name!r} is up, and its guests are namespaces; end it with "
                    f"'taploom lab down{lab.option}', or start one on virtual machines beside it with --lab NAME"
                )
            vm = True  # what it is was said when it was started
        if vm:
            _prepare_vms(lab)
        else:
            _check_programs()
        began = time.monotonic()
        lab.create()
        known = lab.guests() if lab.exists() else []
        wanted = known + [name for name in dict.fromkeys(names) if name not in known]
        _apply(lab, wanted, vm=vm)
    _say(f"lab {lab.name} is up with {_guests(wanted)} after {time.monotonic() - began:.1f} s")
    if as_json:
        click.echo(json.dumps(_status(lab), indent=2))
    else:
        click.echo(f"export DOCKER_HOST={lab.docker_host}")


@lab.command()
@click.argument("name")
@_lab_option
def add(lab: Lab, name: str) -> None:
    """Start another guest; returns when it is ready.

    \b
    Example:
        taploom lab add cache
    """
    check_guest_name(name)
    with lab.commands_locked():
        guests = lab.guests()
        if name in guests:
            raise LabError(f"guest {name!r} is in lab {lab.name!r} already; choose another name")
        _apply(lab, [*guests, name], vm=lab.on_vms())
    _say(f"guest {name} is ready")


@lab.command()
@click.argument("name")
@_lab_option
def rm(lab: Lab, name: str) -> None:
    """Stop a guest and disconnect it from its networks.

    \b
    Example:
        taploom lab rm cache
    """
    with lab.commands_locked():
        _apply(lab, [guest for guest in lab.guests() if guest != _known(lab, name)], vm=lab.on_vms())
    _say(f"guest {name} is gone")


@lab.command(
    "exec",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    short_help="Run in a guest.",
    options_metavar="[OPTIONS]",
)
@click.option("--internet", is_flag=True, help="Run in the namespace that plays the internet; takes no NAME.")
@click.argument("words", metavar="NAME COMMAND...", nargs=-1, type=click.UNPROCESSED)
@_lab_option
def execute(lab: Lab, internet: bool, words: tuple[str, ...]) -> None:
    """Run a command in a guest, with this terminal; exits with the command's exit code.

    With --internet it runs where the lab's networks reach the outside: 198.51.100.1 and 2001:db8:1::1 are there.
    In a lab on virtual machines, the helper can be named like a guest.

    \b
    Example:
        taploom lab exec web -- ping -c1 db
        taploom lab exec --internet -- tcpdump -ni eth0
    """
    if internet:
        name, command = "", words
    else:
        if not words or words[0] == "--":
            raise click.UsageError("Missing argument 'NAME'.")
        name, command = words[0], words[1:]
    # click hands over the `--` that ends our own options.
    command = command[1:] if command[:1] == ("--",) else command
    if not command:
        raise click.UsageError("Missing argument 'COMMAND...'.")
    if internet:
        lab.guests()
        prefix = ["nsenter", f"--net=/run/netns/{lab.internet_netns}", "--"]
    elif lab.on_vms():
        sys.exit(_execute_in_vm(lab, _known_vm(lab, name), command))
    else:
        _known(lab, name)
        if not (lab.guest_directory(name) / "holder").exists():
            raise LabError(f"guest {name!r} is not running; see 'taploom lab status{lab.option}'")
        prefix = enter_guest(lab, name)
    argv = [*prefix, *command]
    sys.stdout.flush()
    os.execvpe(argv[0], argv, lab.environment())  # noqa: S606 -- the command is what was asked for


@lab.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_lab_option
def status(lab: Lab, as_json: bool) -> None:
    """Show the lab's processes and how the fabric is.

    \b
    Example:
        taploom lab status --json
    """
    lab.guests()
    report = _status(lab)
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    from lab.render import print_status

    print_status(report)


@lab.command()
@_lab_option
def down(lab: Lab) -> None:
    """Stop the lab and remove all of it, whatever state it is in.

    \b
    Example:
        taploom lab down
    """
    from lab import cleanup

    with lab.commands_locked():
        known = lab.path.exists() or cleanup.namespaces(lab) or cleanup.processes(lab)
        cleanup.stop(lab)
        cleanup.remove(lab)
    _say(f"lab {lab.name} is down" if known else f"lab {lab.name} was not up; there is nothing of it here")


def _prepare_vms(lab: Lab) -> None:
    """Builds what the lab's VMs boot, where it is missing.

    Raises:
        LabError: this machine lacks something; the message says what to do.
    """
    from lab.vm import artefacts, tools
    from lab.vm.accelerator import accelerator
    from lab.vm.errors import MachineError

    if lab.supervisor_pid() is not None:
        return  # its VMs boot what they were told to
    try:
        arch = tools.host_architecture()
        tools.qemu(arch)
        tools.vhost_device_vsock()
        built = artefacts.build(arch, say=_say)
        _say(f"VMs run with {accelerator(arch, built.kernel)}")  # finding out may take seconds
    except MachineError as error:
        raise LabError(str(error)) from error
    lab.create()
    built.save(lab.path / artefacts.FILE)


def _known_vm(lab: Lab, name: str) -> str:
    """The directory of a VM of the lab."""
    if name == "helper" and name not in lab.guests():
        return str(lab.helper_directory)
    return str(lab.guest_directory(_known(lab, name)))


def _execute_in_vm(lab: Lab, directory: str, command: tuple[str, ...]) -> int:
    from lab.vm.execute import execute as execute_in_vm
    from lab.vm.processes import PORT

    # Where OVS and OVN of the helper are, for ovs-appctl and the like.
    run = "/run/taploom-helper/run"
    environment = {"OVS_RUNDIR": run, "OVN_RUNDIR": run} if directory == str(lab.helper_directory) else {}
    return execute_in_vm(f"hybrid:{directory}/vsock.sock:{PORT}", command, environment)


def _known(lab: Lab, guest: str) -> str:
    guests = lab.guests()
    if guest not in guests:
        raise LabError(
            f"there is no guest {guest!r} in lab {lab.name!r}; it has {_guests(guests)}; "
            f"'taploom lab add {guest}{lab.option}' starts one"
        )
    return guest


def _guests(names: list[str]) -> str:
    return "no guests" if not names else f"{'guest' if len(names) == 1 else 'guests'} {', '.join(names)}"


def _say(text: str) -> None:
    click.echo(text, err=True)


def _check_programs() -> None:
    import shutil

    packages = {
        "ovsdb-server": "openvswitch-switch",
        "ovs-vswitchd": "openvswitch-switch",
        "ovn-northd": "ovn-central",
        "ovn-controller": "ovn-host",
        "dnsmasq": "dnsmasq-base",
        "ip": "iproute2",
        "nsenter": "util-linux",
        "crun": "crun",
    }
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = sorted({package for program, package in packages.items() if not shutil.which(program, path=path)})
    if missing:
        raise LabError(
            f"this machine lacks Debian packages: run 'make setup', or 'apt-get install {' '.join(missing)}'"
        )


def _apply(lab: Lab, guests: list[str], *, vm: bool) -> None:
    """Makes the lab have these guests and waits until everything is ready.

    Raises:
        LabError: it is not ready in time, or its supervisor ended.
    """
    import signal

    lab.ask_for(guests, vm=vm)
    pid = lab.supervisor_pid()
    if pid is None:
        _start_supervisor(lab)
    else:
        os.kill(pid, signal.SIGHUP)
    _wait_ready(lab, guests)


def _start_supervisor(lab: Lab) -> None:
    import subprocess

    from lab import cleanup

    cleanup.stop(lab)  # what a supervisor that was killed may have left
    for name in cleanup.namespaces(lab):
        cleanup.remove_netns(name)
    with (lab.logs / "supervisor.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "lab.supervisor", lab.name],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=lab.environment(),
            start_new_session=True,
            cwd="/",
        )
    deadline = time.monotonic() + 10
    while lab.supervisor_pid() is None:
        if process.poll() is not None or time.monotonic() > deadline:
            raise LabError(f"the lab's supervisor did not start; see {lab.logs}/supervisor.log")
        time.sleep(0.01)


def _wait_ready(lab: Lab, guests: list[str]) -> None:
    import trio

    trio.run(_until_vms_ready if lab.on_vms() else _until_ready, lab, guests)


async def _until_ready(lab: Lab, guests: list[str]) -> None:
    import trio

    with trio.move_on_after(_READY_TIMEOUT):
        while waiting := await _waiting(lab, guests):
            if sys.stderr.isatty():
                click.echo(f"\r\033[Kwaiting for {', '.join(waiting[:4])}", err=True, nl=False)
            await trio.sleep(0.05)
        if sys.stderr.isatty():
            click.echo("\r\033[K", err=True, nl=False)
        return
    raise LabError(
        f"not ready after {_READY_TIMEOUT:.0f} s; see 'taploom lab status{lab.option}' and the files in {lab.logs}"
    )


async def _until_vms_ready(lab: Lab, guests: list[str]) -> None:
    import trio

    from lab.vm.progress import BootProgress

    consoles = {
        "helper": lab.helper_directory / "console.log",
        **{name: lab.guest_directory(name) / "console.log" for name in guests},
    }
    progress = BootProgress(consoles)
    try:
        while True:
            waiting = await _waiting(lab, guests)
            silent = {name.removeprefix("guest/") for name in waiting}
            progress.update(set() if "bridge" in waiting else set(consoles) - silent)
            if not waiting:
                return
            if time.monotonic() - progress.changed_at > _VM_TIMEOUT:
                raise LabError(
                    f"nothing has happened for {_VM_TIMEOUT:.0f} s while waiting for {', '.join(waiting)}; "
                    f"see 'taploom lab status{lab.option}', the files in {lab.logs} and the VMs' console.log"
                )
            await trio.sleep(0.1)
    finally:
        progress.end()


async def _waiting(lab: Lab, guests: list[str]) -> list[str]:
    """What is not ready yet.

    Raises:
        LabError: it will not be.
    """
    waiting = [*_waiting_for(await _fabric(lab), guests), *await _silent(lab)]
    processes = _processes(lab)
    if not waiting:  # the bridge may know of a guest's end, or be told by a guest, before the supervisor's list says so
        listed = {"/".join(process["name"].split("/")[:2]) for process in processes}
        shown = {name for name in listed if name.startswith("guest/")}
        waiting = sorted(shown ^ {f"guest/{name}" for name in guests})
    if waiting:
        if lab.supervisor_pid() is None:
            raise LabError(f"the lab's supervisor ended; see {lab.logs}/supervisor.log")
        for process in processes:
            if process["restarts"] >= _HOPELESS and process["state"] != "running":
                raise LabError(f"{process['name']} {process['last_exit']} again and again; see the files in {lab.logs}")
    return waiting


def _waiting_for(status: Status | None, guests: list[str]) -> list[str]:
    from taploom.contracts.taploom.bridge.v1 import ComponentState

    if status is None:
        return ["bridge"]
    states = {component.name: component.state for component in status.components}
    wanted = ["helper", *(f"guest/{name}" for name in guests)]
    return [
        *(name for name in wanted if states.get(name) != ComponentState.OK),
        *(name for name in states if name.startswith("guest/") and name not in wanted),  # on its way out
    ]


async def _silent(lab: Lab) -> list[str]:
    """Those of the lab's further services that do not take connections yet."""
    import trio

    from taploom.address import connect, parse_address

    silent = []
    for name, address in (("containers", lab.runtime_address), ("Docker's API", lab.docker_socket)):
        try:
            await trio.aclose_forcefully(await connect(parse_address(address)))
        except OSError:
            silent.append(name)
    return silent


async def _containers(lab: Lab) -> list[dict[str, Any]]:
    """The containers that the runtime has, or had when it does not answer."""
    from taploom.address import connect, parse_address
    from taploom.contracts.taploom.runtime.v1 import ListContainersRequest
    from taploom.contracts.taploom.runtime.v1.rpc import RuntimeServiceClient
    from taploom.rpc import RpcError, open_channel

    rows = {}
    for path in sorted(lab.containers.glob("*/container.json")):
        try:
            record = json.loads(path.read_bytes())
        except FileNotFoundError:  # removed meanwhile
            continue
        rows[record["id"]] = {"id": record["id"], "name": record["name"], "state": "unknown", "pid": 0}
    try:
        stream = await connect(parse_address(lab.runtime_address))
        async with open_channel(stream) as channel:
            listed = (
                await RuntimeServiceClient(channel).list_containers(ListContainersRequest(), timeout=5)
            ).containers
    except (OSError, RpcError):
        return list(rows.values())
    for container in listed:
        if container.container_id in rows:
            rows[container.container_id].update(state=(container.state.name or "").lower(), pid=container.pid)
    return list(rows.values())


async def _fabric(lab: Lab) -> Status | None:
    """The bridge's status, or None when it does not answer."""
    from taploom.address import connect, parse_address
    from taploom.contracts.taploom.bridge.v1 import GetStatusRequest
    from taploom.contracts.taploom.bridge.v1.rpc import StatusServiceClient
    from taploom.rpc import RpcError, open_channel

    try:
        stream = await connect(parse_address(lab.bridge_address))
        async with open_channel(stream) as channel:
            return (await StatusServiceClient(channel).get_status(GetStatusRequest(), timeout=5)).status
    except (OSError, RpcError):
        return None


def _processes(lab: Lab) -> list[dict[str, Any]]:
    """What the supervisor has running."""
    try:
        return list(json.loads((lab.path / "status.json").read_bytes())["processes"])
    except FileNotFoundError:
        return []


def _status(lab: Lab) -> dict[str, Any]:
    """The lab's processes with the fabric's status, as `lab status --json` prints them."""
    import trio

    fabric = trio.run(_fabric, lab)
    return {
        "lab": lab.name,
        "state_directory": str(lab.path),
        "bridge": lab.bridge_address,
        "supervisor_pid": lab.supervisor_pid(),
        "docker_host": lab.docker_host,
        "runtime": lab.runtime_address,
        "vm": lab.on_vms(),
        "helper_netns": None if lab.on_vms() else lab.helper_netns,
        "internet_netns": lab.internet_netns,
        "helper": {"address": lab.helper_address, "directory": str(lab.helper_directory)},
        "guests": [
            {
                "name": name,
                "address": lab.guest_address(name),
                "netns": None if lab.on_vms() else lab.guest_netns(name),
                "directory": str(lab.guest_directory(name)),
            }
            for name in lab.guests()
        ],
        "containers": trio.run(_containers, lab),
        "processes": _processes(lab),
        "fabric": fabric.to_dict() if fabric is not None else None,
    }
