"""The agent's command line."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import trio

from taploom import __version__
from taploom.address import Address, AddressError, UnixAddress, parse_address
from taploom.arguments import plain_options
from taploom.log import LEVELS, setup_logging

from .agent import run_agent
from .options import OPTIONAL_FEATURES, Options

STATE_DIR = Path("/run/taploom-guest")
RESOLV_CONF = Path("/etc/resolv.conf")
LOG_LEVEL = "info"
_PATHS = {"resolv_conf": "--resolv-conf", "hosts": "--hosts", "state_dir": "--state-dir"}
_PLAIN = {"--control", "--data", "--log-level", *_PATHS.values()}
EXAMPLE = """example:
  taploom-guest-agent --control vsock:any:5555 --data vsock:any:5556
  taploom-guest-agent --control unix:/run/guest/control.sock --data unix:/run/guest/data.sock --resolv-conf /tmp/r
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser, for the command and for its tests."""
    parser = argparse.ArgumentParser(
        prog="taploom-guest-agent",
        description="The agent in a container's VM: gives it Docker's networks while it runs.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--control", required=True, metavar="ADDR", help="where to serve gRPC (taploom.guest.v1)")
    parser.add_argument("--data", required=True, metavar="ADDR", help="where to accept data links")
    parser.add_argument("--resolv-conf", type=Path, default=RESOLV_CONF, metavar="PATH", help="default: %(default)s")
    parser.add_argument(
        "--hosts", type=Path, metavar="PATH", help="default: the file hosts beside resolv.conf, that is /etc/hosts"
    )
    parser.add_argument(
        "--state-dir",
        type=Path,
        metavar="DIR",
        help="where the original resolv.conf and hosts are kept (default: the folder of the control socket, or"
        f" {STATE_DIR} where that is no Unix socket)",
    )
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        choices=sorted(OPTIONAL_FEATURES),
        help="do not offer this feature, as an older agent or kernel would not; may be repeated",
    )
    parser.add_argument("--log-level", choices=LEVELS, default=LOG_LEVEL)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return parser


def read_arguments(argv: Sequence[str]) -> argparse.Namespace | SimpleNamespace:
    """What `build_parser` would find; without it for a command line such as the images'."""
    found = plain_options(argv, _PLAIN)
    if found is None or not {"--control", "--data"} <= found.keys():
        return build_parser().parse_args(argv)
    level = found.get("--log-level", LOG_LEVEL)
    if level not in LEVELS:
        return build_parser().parse_args(argv)
    paths = {name: Path(found[option]) for name, option in _PATHS.items() if option in found}
    return SimpleNamespace(
        **{"resolv_conf": RESOLV_CONF, "hosts": None, "state_dir": None, **paths},
        control=found["--control"],
        data=found["--data"],
        without=[],
        log_level=level,
    )


def run(argv: Sequence[str]) -> int:
    """Runs the agent until it is told to stop; returns the exit status."""
    arguments = read_arguments(argv)
    try:
        control = parse_address(arguments.control)
        options = Options(
            control=control,
            data=parse_address(arguments.data),
            resolv_conf=arguments.resolv_conf,
            hosts=arguments.hosts or arguments.resolv_conf.with_name("hosts"),
            state_dir=arguments.state_dir or default_state_dir(control),
            without=frozenset(arguments.without),
        )
    except AddressError as error:
        print(f"taploom-guest-agent: {error}", file=sys.stderr)  # noqa: T201 - the command's own message
        return 2
    setup_logging("agent_guest", arguments.log_level)
    logging.getLogger("hpack").setLevel(logging.INFO)  # its debug lines are one per header field
    try:
        trio.run(run_agent, options)
    except (OSError, AddressError) as error:
        return _failed([error])
    except BaseExceptionGroup as group:
        expected, other = group.split((OSError, AddressError))
        if other is not None or expected is None:
            raise
        return _failed(_leaves(expected))
    return 0


def default_state_dir(control: Address) -> Path:
    """Where state is kept when nobody says where: with the control socket, which is the agent's own place."""
    return Path(control.path).parent if isinstance(control, UnixAddress) else STATE_DIR


def _failed(errors: list[BaseException]) -> int:
    for error in errors:
        print(f"taploom-guest-agent: {error}", file=sys.stderr)  # noqa: T201 - the command's own message
    return 1


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found
