"""The host bridge's process."""

from __future__ import annotations

import argparse
import grp
import logging
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from host_bridge.api import GuestApi, NetworkApi, StatusApi
from host_bridge.balancer.api import BalancerApi
from host_bridge.balancer.publishing import BalancerPorts
from host_bridge.capture.api import CaptureApi
from host_bridge.containers import ContainerManager, RuntimeClient
from host_bridge.desired import DesiredState
from host_bridge.docker_api import containers
from host_bridge.docker_api.app import DockerApi
from host_bridge.docker_api.server import serve_docker
from host_bridge.errors import InvalidError, StateError
from host_bridge.fabric import Fabric
from host_bridge.host_addresses import HostAddresses, host_networks
from host_bridge.ipam import parse_address as parse_ip
from host_bridge.mirror.api import MirrorApi
from host_bridge.policy.api import PolicyApi
from host_bridge.ports import PortPublisher
from host_bridge.qos.api import QosApi
from host_bridge.store import Store
from host_bridge.trace.api import TraceApi
from host_bridge.trace.tracer import ConnectionTracer
from taploom import __version__
from taploom.address import Address, AddressError, CheckedListener, data_address, open_listener, parse_address
from taploom.link import open_dataplane
from taploom.log import LEVELS, setup_logging
from taploom.notify import notify_ready
from taploom.rpc import Server

logger = logging.getLogger("taploom.bridge")

HELPER_CONTROL_PORT = 6000
_DRAIN = 3.0
_MAX_UPSTREAMS = 3

_EXAMPLE = """\
example:
  python -m host_bridge --socket unix:/run/taploom/bridge.sock \\
      --state-dir /var/lib/taploom --helper hybrid:/run/taploom/helper/v.sock:6000

The taploom command finds the bridge by --bridge ADDRESS, $TAPLOOM_BRIDGE, or at the socket's usual places.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="taploom-bridge",
        description="Keeps the networks of a host's container VMs: desired state, relay and API.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--socket", required=True, metavar="ADDR", help="where to serve the API: unix:PATH or fd:N")
    parser.add_argument("--state-dir", required=True, metavar="DIR", type=Path, help="where to keep the state")
    parser.add_argument("--helper", required=True, metavar="ADDR", help="the helper agent's control port")
    parser.add_argument("--helper-data", metavar="ADDR", help="its data port; default: beside the control port")
    parser.add_argument(
        "--dns",
        action="append",
        default=[],
        metavar="IP",
        help="where guests ask for names that no network knows; up to three; default: nowhere",
    )
    parser.add_argument(
        "--docker-socket", metavar="ADDR", help="where to serve Docker's API: unix:PATH or fd:N; default: nowhere"
    )
    parser.add_argument(
        "--docker-group", metavar="GROUP", help="whose members may use it too; they can do what the bridge can"
    )
    parser.add_argument(
        "--runtime",
        metavar="ADDR",
        help="what runs containers for Docker's API: a process that serves taploom.runtime.v1; default: nothing",
    )
    parser.add_argument("--log-level", default="info", choices=LEVELS, help="default: info")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the bridge until SIGTERM or SIGINT; returns the exit code."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        socket = _address(arguments.socket)
        helper = _address(arguments.helper, HELPER_CONTROL_PORT)
        helper_data = _address(arguments.helper_data) if arguments.helper_data else data_address(helper)
        docker = _docker(arguments.docker_socket, arguments.docker_group)
        runtime = _address(arguments.runtime) if arguments.runtime else None
        upstreams = [_upstream(text) for text in arguments.dns]
        if len(upstreams) > _MAX_UPSTREAMS:
            raise ValueError(f"{len(upstreams)} DNS servers are too many: give at most {_MAX_UPSTREAMS}")
    except ValueError as error:
        parser.error(str(error))
    setup_logging("host_bridge", arguments.log_level)
    try:
        with Store(arguments.state_dir) as store:
            trio.run(partial(serve, docker=docker, runtime=runtime), store, socket, helper, helper_data, upstreams)
    except (StateError, ListenError) as error:
        print(f"taploom-bridge: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


class ListenError(Exception):
    """The API's socket cannot be opened."""


@dataclass(frozen=True, slots=True)
class DockerSocket:
    """Where Docker's API is served, and the group whose members may use it; None: nobody but root and ourselves."""

    address: Address
    gid: int | None = None


async def serve(
    store: Store,
    socket: Address,
    helper: Address,
    helper_data: Address,
    upstreams: Sequence[str],
    *,
    docker: DockerSocket | None = None,
    runtime: Address | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT, then lets calls under way finish.

    Raises:
        ListenError: the socket cannot be opened.
    """
    # First: whoever sees the socket may already send SIGTERM.
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with open_dataplane() as dataplane:
            fabric = Fabric(
                DesiredState(store, host_networks=host_networks),
                dataplane,
                helper,
                helper_data,
                upstreams=upstreams,
                host_addresses=HostAddresses(),
            )
            listener = await _listen(socket)
            docker_listener = None if docker is None else await _listen(docker.address, docker.gid)
            publisher = PortPublisher(fabric.helper, dataplane, is_gateway=partial(_is_gateway, fabric.desired))
            fabric.on_stream_wanted = publisher.stream_wanted
            manager = ContainerManager(fabric, publisher, None if runtime is None else RuntimeClient(runtime))
            docker_api = DockerApi(fabric, manager)
            containers.register(docker_api, manager)
            services = [NetworkApi(fabric), GuestApi(fabric), StatusApi(fabric), PolicyApi(fabric), QosApi(fabric)]
            balancer_ports = _balancer_ports(fabric.desired, publisher)
            services.append(BalancerApi(fabric, balancer_ports))
            services.append(TraceApi(ConnectionTracer(fabric, publisher, balancer_ports)))
            services += [CaptureApi(fabric), MirrorApi(fabric)]
            server = Server(services)
            async with trio.open_nursery() as nursery:
                await nursery.start(fabric.run)
                await nursery.start(publisher.run)
                await nursery.start(manager.run)
                await nursery.start(server.serve, listener)
                if docker_listener is not None:
                    await nursery.start(serve_docker, docker_listener, docker_api)
                    logger.info("serving Docker's API at %s", docker_listener.address)
                for service in services:
                    server.health.set(service.service_name, serving=True)
                notify_ready()
                logger.info("serving at %s, helper at %s, version %s", socket, helper, __version__)
                async for number in signals:
                    logger.info("%s: ending", signal.Signals(number).name)
                    break
                async with trio.open_nursery() as draining:
                    draining.start_soon(server.drain, _DRAIN)
                    draining.start_soon(docker_api.drain, _DRAIN)
                nursery.cancel_scope.cancel()


def _balancer_ports(desired: DesiredState, publisher: PortPublisher) -> BalancerPorts:
    """Has published what load balancers publish, now and whenever they are changed."""
    state = desired.balancers
    ports = BalancerPorts(publisher, lambda name: [place.address for place in state.addresses(name)])
    state.before_commit = ports.change
    state.after_commit = ports.retarget
    ports.restore(state.balancers)
    return ports


def _is_gateway(desired: DesiredState, address: str) -> bool:
    networks = [network for network in desired.networks() if network.vlan is None]
    return any(subnet.gateway == address for network in networks for subnet in network.subnets)


async def _listen(address: Address, gid: int | None = None) -> CheckedListener:
    try:
        return await open_listener(address, allowed_gid=gid)
    except (OSError, AddressError) as error:
        raise ListenError(f"cannot serve at {address}: {error}") from error


def _docker(socket: str | None, group: str | None) -> DockerSocket | None:
    if socket is None:
        if group is not None:
            raise ValueError("--docker-group is of no use without --docker-socket")
        return None
    if group is None:
        return DockerSocket(_address(socket))
    try:
        return DockerSocket(_address(socket), int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid)
    except KeyError:
        raise ValueError(f"there is no group {group!r}: create it, or leave --docker-group out") from None


def _address(text: str, default_port: int | None = None) -> Address:
    return parse_address(text, default_port=default_port)


def _upstream(text: str) -> str:
    """An upstream DNS server as the guest contract has it: address, address:port or [address]:port."""
    host, colon, port = text.rpartition(":")
    if colon and port.isdecimal() and (":" not in host or (host.startswith("[") and host.endswith("]"))):
        if not 0 < int(port) < 1 << 16:
            raise ValueError(f"DNS server {text!r} has an impossible port")
        host = host.strip("[]")
    else:
        host = text
    try:
        parse_ip(host)
    except InvalidError as error:
        raise ValueError(f"DNS server: {error}") from error
    return text


if __name__ == "__main__":
    sys.exit(main())
