"""`taploom lb`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

import click

from host_bridge.client import CommandError, unary
from host_bridge.commands.documents import check_in_force, read_document
from host_bridge.commands.options import Pairs, bridge_options, complete_network, json_option
from host_bridge.output import plain, print_fields, print_json, print_table

if TYPE_CHECKING:
    from host_bridge.balancer.model import Balancer as BalancerValue
    from host_bridge.balancer.model import HealthCheck as HealthCheckValue
    from taploom.contracts.taploom.bridge.v1 import (
        ApplyBalancersResponse,
        Balancer,
        BalancerBackend,
        BalancerPort,
        BalancerPublish,
        BalancerStatus,
        HealthCheck,
    )

T = TypeVar("T")


@click.group()
def lb() -> None:
    """Load balancers: an address and a name in front of several guests.

    \b
    Example:
        taploom lb create shop --network app --port 80:8080 --backend alias=web --health-check
        taploom lb show shop
    """


@lb.command()
@click.option("-f", "--file", "path", metavar="FILE", required=True, help="In YAML; - is standard input.")
@click.option("--prune", is_flag=True, help="Remove balancers that FILE does not have.")
@json_option
@bridge_options
def apply(bridge: str, path: str, prune: bool, as_json: bool) -> None:
    """Create or replace the load balancers in FILE; when anything is wrong, change nothing.

    Returns once they are in force. Connections to backends that stay go on; those to others are cut.

    \b
    Example:
        taploom lb apply -f lb.yaml
        taploom lb apply -f - <<END
        balancers:
          shop:
            network: app
            ports: [80:8080]
            backends: [{alias: web}]
            health: {interval: 2s, timeout: 1s, failures: 3}
        END
    """
    from host_bridge.balancer.document import read

    name, found = read_document(path, read)
    done = _apply(bridge, name, found, prune=prune)
    if as_json:
        print_json(done)
    else:
        for what in ("created", "updated", "unchanged", "removed"):
            for balancer in getattr(done, what):
                click.echo(f"balancer {balancer} {what}")
    check_in_force(done.pending)


def _apply(
    bridge: str, source: str, balancers: Iterable[BalancerValue], *, prune: bool = False, create_only: bool = False
) -> ApplyBalancersResponse:
    from host_bridge.balancer.messages import to_message
    from taploom.contracts.taploom.bridge.v1 import ApplyBalancersRequest, ApplyBalancersResponse

    request = ApplyBalancersRequest(
        source=source, balancers=[to_message(one) for one in balancers], prune=prune, create_only=create_only
    )
    return unary(bridge, "BalancerService/ApplyBalancers", request, ApplyBalancersResponse)


@lb.command()
@click.argument("name")
@click.option(
    "--network", required=True, metavar="NETWORK", shell_complete=complete_network, help="Where its backends are."
)
@click.option("--port", "ports", multiple=True, required=True, metavar="PORT[:TARGET][/PROTO]", help="A port.")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=Pairs("KIND=NAME"),
    help="Who takes a share: guest=NAME, alias=NAME or label=KEY[=VALUE].",
)
@click.option("--address", "addresses", multiple=True, metavar="IP", help="Its address, one per family.")
@click.option("--name", "dns_name", metavar="NAME", default="", help="What DNS calls it. Default: NAME.")
@click.option("--affinity", is_flag=True, help="A client's connections go to the same backend.")
@click.option(
    "--health-check",
    "health",
    is_flag=False,
    flag_value="",
    metavar="[KEY=VALUE,...]",
    help="Leave out backends that do not answer: interval=5s,timeout=2s,failures=3,successes=1.",
)
@click.option(
    "--also",
    multiple=True,
    metavar="NETWORK",
    shell_complete=complete_network,
    help="Another network whose guests reach it, at an address there.",
)
@click.option("--publish", multiple=True, metavar="[IP:]HOST:PORT[/PROTO]", help="Lead a port of the host to it.")
@json_option
@bridge_options
def create(
    bridge: str,
    *,
    name: str,
    network: str,
    ports: Sequence[str],
    backends: Sequence[tuple[str, str]],
    addresses: Sequence[str],
    dns_name: str,
    affinity: bool,
    health: str | None,
    also: Sequence[str],
    publish: Sequence[str],
    as_json: bool,
) -> None:
    """Create a load balancer; prints its addresses.

    \b
    Example:
        taploom lb create shop --network app --port 80:8080 --backend alias=web --publish 8080:80
        taploom lb create dns --network app --port 53/udp --backend label=role=dns --affinity \\
            --health-check interval=2s,timeout=1s,failures=3
    """
    from host_bridge.balancer.model import Backend, Balancer, Place
    from host_bridge.balancer.parts import parse_port, parse_publish
    from host_bridge.selectors import Selector

    selectors = []
    for kind, value in backends:
        if kind not in ("guest", "alias", "label") or not value:
            raise CommandError(f"--backend {kind}={value}: write guest=NAME, alias=NAME or label=KEY[=VALUE]")
        given = {kind: value}
        selectors.append(Backend(Selector(given.get("guest", ""), given.get("alias", ""), given.get("label", ""))))
    balancer = Balancer(
        name,
        network,
        tuple(_part("--port", parse_port, text) for text in ports),
        tuple(selectors),
        tuple(Place(network, address) for address in addresses),
        dns_name,
        affinity,
        None if health is None else _health(health),
        tuple(_part("--publish", parse_publish, text) for text in publish),
        tuple(Place(other) for other in also),
    )
    done = _apply(bridge, "", [balancer], create_only=True)
    status = _status(bridge, name)
    if as_json:
        print_json(status)
    else:
        for one in status.addresses:
            click.echo(one.address)
    check_in_force(done.pending)


def _part(option: str, parse: Callable[[str], T], text: str) -> T:
    try:
        return parse(text)
    except ValueError as error:
        raise CommandError(f"{option}: {error}") from error


def _health(text: str) -> HealthCheckValue:
    from host_bridge.balancer.model import HealthCheck
    from host_bridge.balancer.parts import parse_seconds

    values: dict[str, int] = {}
    for part in text.split(",") if text else ():
        key, equals, value = part.partition("=")
        if key not in ("interval", "timeout", "failures", "successes") or not equals or key in values:
            raise CommandError(
                f"--health-check: {part!r} is malformed: write interval=5s,timeout=2s,failures=3,successes=1, or some "
                "of it"
            )
        values[key] = _part(f"--health-check {key}", parse_seconds if key in ("interval", "timeout") else _count, value)
    return HealthCheck(**values)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise ValueError(f"{text!r} is no whole number")
    return int(text)


def _status(bridge: str, name: str) -> BalancerStatus:
    from taploom.contracts.taploom.bridge.v1 import BalancerStatus, GetBalancerRequest, GetBalancerResponse

    found = unary(bridge, "BalancerService/GetBalancer", GetBalancerRequest(name=name), GetBalancerResponse)
    return found.balancer or BalancerStatus()


@lb.command("ls")
@json_option
@bridge_options
def list_(bridge: str, as_json: bool) -> None:
    """List the load balancers, their addresses, and how many of their backends are used.

    \b
    Example:
        taploom lb ls
    """
    from taploom.contracts.taploom.bridge.v1 import ListBalancersRequest, ListBalancersResponse

    found = unary(bridge, "BalancerService/ListBalancers", ListBalancersRequest(), ListBalancersResponse)
    if as_json:
        print_json(found)
        return
    rows = [
        (
            one.balancer.name,
            one.balancer.network,
            " ".join(place.address for place in one.addresses),
            " ".join(_port(port) for port in one.balancer.ports),
            _used(one),
        )
        for one in found.balancers
        if one.balancer is not None
    ]
    rows += [(f"{name} (not defined)", "-", "-", "-", "-") for name in found.missing]
    print_table(("BALANCER", "NETWORK", "ADDRESSES", "PORTS", "BACKENDS"), rows)
    if found.pending:
        click.echo(f"\nnot in force yet: {found.pending}")


def _used(status: BalancerStatus) -> str:
    """How many guests are used, of how many there are: used is who answers on some port and family."""
    guests = {one.guest_name for one in status.backends}
    up = {one.guest_name for one in status.backends if plain(one.health) in ("unspecified", "up")}
    return f"{len(up)} of {len(guests)}" if guests else "none"


@lb.command()
@click.argument("name")
@json_option
@bridge_options
def show(bridge: str, name: str, as_json: bool) -> None:
    """Show a load balancer and its backends as they are now.

    \b
    Example:
        taploom lb show shop
    """
    from taploom.contracts.taploom.bridge.v1 import BalancerStatus, GetBalancerRequest, GetBalancerResponse

    found = unary(bridge, "BalancerService/GetBalancer", GetBalancerRequest(name=name), GetBalancerResponse)
    if as_json:
        print_json(found)
        return
    status = found.balancer or BalancerStatus()
    assert status.balancer is not None
    balancer = status.balancer
    fields = [("Name", balancer.name), ("Network", balancer.network)]
    for place in status.addresses:
        other = "" if place.network == balancer.network else f" on {place.network}"
        fields.append(("Address", place.address + other))
    fields.append(("Known as", balancer.dns_name or balancer.name))
    fields.append(("Ports", ", ".join(_port(port) for port in balancer.ports)))
    fields += [("Selects", _selected(backend)) for backend in balancer.backends]
    fields.append(("Affinity", "by the client's address" if balancer.affinity else "none"))
    fields.append(("Checked", _checked(balancer.health_check)))
    fields += [("Published", _published(one)) for one in status.published]
    if status.publish_problem:
        fields.append(("Problem", status.publish_problem))
    print_fields(fields)
    click.echo()
    print_table(
        ("BACKEND", "ADDRESS", "PORT", "HEALTH"),
        [
            (
                one.guest_name,
                one.address,
                f"{one.target_port}/{one.protocol}",
                _shown_health(plain(one.health), balancer),
            )
            for one in status.backends
        ],
    )
    if found.pending:
        click.echo(f"\nnot in force yet: {found.pending}")


def _port(port: BalancerPort) -> str:
    target = f" > {port.target_port}" if port.target_port != port.port else ""
    return f"{port.port}{target}/{port.protocol}"


def _selected(backend: BalancerBackend) -> str:
    found = backend.selector
    given = [(key, getattr(found, key)) for key in ("guest", "alias", "label") if found and getattr(found, key)]
    return " and ".join(f"{key} {value}" for key, value in given) + (
        f", at port {backend.target_port}" if backend.target_port else ""
    )


def _checked(check: HealthCheck | None) -> str:
    if check is None:
        return "no"
    return (
        f"every {check.interval_seconds} s, answers within {check.timeout_seconds} s, left out after {check.failures} "
        f"failures, used again after {check.successes} success{'es' if check.successes > 1 else ''}"
    )


def _published(one: BalancerPublish) -> str:
    host = f"[{one.host_ip}]" if ":" in one.host_ip else one.host_ip
    return f"{host}:{one.host_port} > {one.port}/{one.protocol}"


def _shown_health(health: str, balancer: Balancer) -> str:
    if health == "unspecified":
        return "not checked yet" if balancer.health_check is not None else "not checked"
    return {"up": "up", "down": "down"}.get(health, "not at the helper yet")


@lb.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@bridge_options
def rm(bridge: str, names: Sequence[str]) -> None:
    """Remove load balancers; connections through them are cut.

    \b
    Example:
        taploom lb rm shop
    """
    from taploom.contracts.taploom.bridge.v1 import RemoveBalancersRequest, RemoveBalancersResponse

    request = RemoveBalancersRequest(names=list(names))
    done = unary(bridge, "BalancerService/RemoveBalancers", request, RemoveBalancersResponse)
    for name in names:
        click.echo(name)
    check_in_force(done.pending)
