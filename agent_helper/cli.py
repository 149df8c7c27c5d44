"""The agent in the helper VM: its command line, and its parts put together."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import trio

from agent_helper import links
from agent_helper.balancer_health import backend_changed
from agent_helper.balancer_service import BalancerService
from agent_helper.capture import CaptureService
from agent_helper.door import Door
from agent_helper.early import PLAIN, Early
from agent_helper.errors import SetupError
from agent_helper.events import Events
from agent_helper.fabric import Fabric
from agent_helper.firewall import Redirect
from agent_helper.mirror_service import MirrorService
from agent_helper.outside import Outside, keep_outside, parse_outside
from agent_helper.ovsdb import Values
from agent_helper.qos_service import QosService
from agent_helper.service import HelperService, daemon_message
from agent_helper.stack import Stack, find_programs, new_instance_id
from agent_helper.streams import MAX_HANDSHAKES, Streams
from agent_helper.trace import Tracer
from agent_helper.trace_service import TraceService
from taploom import __version__
from taploom.address import Address, AddressError, open_listener, parse_address
from taploom.arguments import plain_options
from taploom.contracts.taploom.helper.v1 import (
    LinkDown,
    LinkUp,
    PolicyLogged,
    ResyncNeeded,
    StreamWanted,
    WatchEventsResponse,
)
from taploom.contracts.taploom.link.v1 import LinkFeature
from taploom.link import LinkServer, open_dataplane, probe_features
from taploom.log import LEVELS, setup_logging
from taploom.notify import notify_ready
from taploom.rpc import Server
from taploom.supervise import SupervisedProcess

logger = logging.getLogger("taploom.helper")

_SERVICES = ("taploom.helper.v1.HelperService", "taploom.helper.v1.BalancerService")
_DRAIN = 1.0
_NET, _LOG_LEVEL = "none", "info"


def _arguments(argv: Sequence[str]) -> argparse.Namespace | SimpleNamespace:
    """What `_parse` would find; without a parser for a command line such as the image's."""
    found = plain_options(argv, PLAIN)
    if found is None or not {"--control", "--data", "--state-dir"} <= found.keys():
        return _parse(argv)
    level = found.get("--log-level", _LOG_LEVEL)
    try:
        control, data = parse_address(found["--control"]), parse_address(found["--data"])
    except AddressError:
        return _parse(argv)
    if level not in LEVELS:
        return _parse(argv)
    return SimpleNamespace(
        control=control,
        data=data,
        state_dir=Path(found["--state-dir"]),
        net=found.get("--net", _NET),
        log_level=level,
    )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m agent_helper",
        description="Switches the guests' networks with OVS and OVN, as the host bridge describes them. Needs root.",
        epilog="example: python -m agent_helper --control vsock:any:6000 --data vsock:any:6001 --state-dir /run/helper",
    )

    def address(text: str) -> Address:
        try:
            return parse_address(text)
        except AddressError as exc:
            raise argparse.ArgumentTypeError(str(exc)) from exc

    parser.add_argument(
        "--control", required=True, type=address, metavar="ADDR", help="where the host's gRPC calls come in"
    )
    parser.add_argument(
        "--data", required=True, type=address, metavar="ADDR", help="where the host's data links come in"
    )
    parser.add_argument(
        "--state-dir",
        required=True,
        type=Path,
        metavar="DIR",
        help="for sockets, databases and logs; nothing in it is kept",
    )
    parser.add_argument(
        "--net",
        default=_NET,
        metavar="WAY",
        help="the way out of the machine: none (something else configures it), dhcp[,INTERFACE], "
        "ADDRESS/PREFIX[,GATEWAY][,INTERFACE], or kernel: taploom.net=WAY of the kernel's command line, else dhcp "
        "(%(default)s)",
    )
    parser.add_argument("--log-level", default=_LOG_LEVEL, choices=LEVELS)
    parser.add_argument("--version", action="version", version=f"agent_helper {__version__}")
    return parser.parse_args(argv)


@contextlib.contextmanager
def _locked(state_dir: Path, early: Early | None) -> Iterator[None]:
    """Holds the state directory: two agents would take one another's databases away."""
    if early is not None:
        try:
            yield
        finally:
            os.close(early.lock)
        return
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise SetupError(f"cannot use --state-dir {state_dir}: {exc.strerror}") from exc
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise SetupError(f"--state-dir {state_dir} is in use by another agent_helper") from exc
        yield
    finally:
        os.close(fd)


async def _serve(control: Address, data: Address, state_dir: Path, outside: Outside, early: Early | None) -> None:
    events = Events()
    instance_id = new_instance_id()
    programs = find_programs()
    links.set_up("lo")
    features = await trio.to_thread.run_sync(probe_features)

    def on_daemon(process: SupervisedProcess) -> None:
        logger.info("%s: %s %s", process.name, process.state, process.last_exit if process.state == "down" else "")
        stack.daemon_changed()
        events.publish(WatchEventsResponse(daemon_changed=daemon_message(process)))

    def on_dns(network_id: str, process: SupervisedProcess) -> None:
        events.publish(WatchEventsResponse(daemon_changed=daemon_message(process, network_id)))

    def on_lost(reason: str) -> None:
        events.publish(WatchEventsResponse(resync_needed=ResyncNeeded(reason=reason)))

    def on_up(endpoint_id: str, agreed: frozenset[LinkFeature]) -> None:
        events.publish(WatchEventsResponse(link_up=LinkUp(endpoint_id=endpoint_id, features=sorted(agreed))))

    def on_down(endpoint_id: str, reason: str) -> None:
        events.publish(WatchEventsResponse(link_down=LinkDown(endpoint_id=endpoint_id, reason=reason)))

    def want(wanted: StreamWanted) -> bool:
        if events.watched:
            events.publish(WatchEventsResponse(stream_wanted=wanted))
        return events.watched

    def on_content(name: str) -> None:
        fabric.database_read(name)

    def on_logged(logged: PolicyLogged) -> None:
        events.publish(WatchEventsResponse(policy_logged=logged))

    def on_monitor(values: Values | None) -> None:
        changed = None if values is None else backend_changed(values)
        if changed is not None:
            events.publish(WatchEventsResponse(backend_changed=changed))

    stack = Stack(state_dir, programs, on_daemon=on_daemon, on_content=on_content, early=early)
    stack.on_logged = on_logged
    stack.on_monitor = on_monitor
    await stack.probe()
    if not stack.kernel_datapath:
        # The userspace data path carries TCP segments (userspace-tso-enable); it has nothing for UDP segments.
        features -= {LinkFeature.USO}
    async with open_dataplane() as dataplane, trio.open_nursery() as nursery:
        streams = Streams(dataplane, want)
        link_server = LinkServer(
            dataplane,
            features=features,
            on_up=on_up,
            on_down=on_down,
            on_stream=streams.handle,
            max_handshakes=MAX_HANDSHAKES,
        )
        fabric = Fabric(stack, link_server, on_dns=on_dns, on_lost=on_lost)
        service = HelperService(
            fabric, stack, link_server, events, streams, link_features=features, instance_id=instance_id
        )
        services = [QosService(fabric), BalancerService(fabric), TraceService(Tracer(fabric, stack))]
        services += [CaptureService(fabric), MirrorService(fabric)]
        server = Server([service, *services])
        for name in _SERVICES:
            server.health.set(name, False)
        control_listener, data_listener = await open_listener(control), await open_listener(data)
        nursery.start_soon(_until_signal, nursery.cancel_scope, server)
        nursery.start_soon(keep_outside, outside, stack.log_dir / "udhcpc.log")
        nursery.start_soon(server.serve, control_listener)
        nursery.start_soon(link_server.serve, data_listener)
        began = datetime.now(UTC)
        await nursery.start(streams.run)
        streams.network_of = fabric.kernel.network_of
        door = Door(fabric.kernel.origin, streams.knock)
        await nursery.start(door.run)
        fabric.kernel.set_redirect(Redirect(streams.redirect_ports.tcp, streams.redirect_ports.udp), door)
        await nursery.start(stack.run, fabric.clear)
        await nursery.start(fabric.run)
        for name in _SERVICES:
            server.health.set(name, True)
        notify_ready()
        logger.info(
            "ready after %.2f s: OVS %s, OVN %s, %s data path, control %s, data %s",
            (datetime.now(UTC) - began).total_seconds(),
            stack.ovs_version,
            stack.ovn_version,
            "kernel" if stack.kernel_datapath else "userspace",
            control,
            data,
        )


async def _until_signal(scope: trio.CancelScope, server: Server) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
        async for signum in received:
            logger.info("%s: ending", signal.Signals(signum).name)
            await server.drain(_DRAIN)
            scope.cancel()
            return


def run(argv: Sequence[str], early: Early | None = None) -> int:
    """Runs the agent until SIGTERM or SIGINT; returns its exit status.

    Args:
        early: the daemons that have been started for this command line.
    """
    # What has been imported stays: a full collection that walked it would stop frames for some 10 ms each time.
    gc.freeze()
    gc.enable()
    arguments = _arguments(argv)
    setup_logging("agent_helper", arguments.log_level)
    if arguments.log_level != "debug":
        for name in ("ovsdbapp",):
            logging.getLogger(name).setLevel(logging.ERROR)
    try:
        if os.geteuid():
            raise SetupError("it must run as root: it creates TAP devices and network namespaces")
        with _locked(arguments.state_dir.absolute(), early):
            outside = parse_outside(arguments.net)
            serve = partial(_serve, arguments.control, arguments.data, arguments.state_dir.absolute(), outside, early)
            trio.run(serve, strict_exception_groups=True)
    except* (SetupError, AddressError, OSError) as group:
        print(f"agent_helper: {_first(group)}", file=sys.stderr)  # noqa: T201 -- the one line for people
        sys.exit(1)  # out of an except* nothing can be returned
    return 0


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    exc: BaseException = group
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return exc
