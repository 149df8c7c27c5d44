"""The topology as a tree for the terminal."""

from __future__ import annotations

from rich.text import Text
from rich.tree import Tree

from host_bridge.view.rates import bits
from host_bridge.view.topology import Net, Place, Shared, Topology

_USUAL_MTU = 1500
_AS = {"nat": "with the helper's address", "routed": "with the guests' own addresses"}


def tree(found: Topology) -> Tree:
    """The fabric: its networks, their gateways, who is on them."""
    state = ("converged", "green") if found.converged else ("not converged", "bold yellow")
    root = Tree(
        Text.assemble(
            ("fabric", "bold"),
            f"  {count(len(found.networks), 'network')}, {count(len(found.guests), 'guest')}, ",
            state,
        ),
        guide_style="dim",
    )
    for network in found.networks:
        _network(root, network)
    if found.unconnected:
        branch = root.add(Text("on no network", "dim"))
        for name in found.unconnected:
            branch.add(Text.assemble(_dot(up=name not in found.down), " ", name))
    if found.ailing:
        branch = root.add(Text("not well", "bold yellow"))
        for part in found.ailing:
            branch.add(Text.assemble((part.name, "bold"), f"  {part.state}: {part.problem}"))
    if found.pending:
        branch = root.add(Text("not converged", "bold yellow"))
        for subject, reason in found.pending:
            branch.add(Text.assemble((subject, "bold"), f"  {reason}"))
    return root


def _network(root: Tree, network: Net) -> None:
    branch = root.add(Text.assemble((network.name, "bold cyan"), f"  {' '.join(network.subnets)}", *_traits(network)))
    branch.add(Text.assemble(("gateway", "dim"), f"  {' '.join(network.gateways)}  ", (way_out(network), "dim")))
    for balancer in network.balancers:
        branch.add(Text.assemble(("load balancer", "dim"), "  ", (balancer.name, "bold"), f"  {shares(balancer)}"))
    for place in network.places:
        branch.add(_place(place))


def _traits(network: Net) -> list[tuple[str, str]]:
    return [(f"  {trait}", "yellow") for trait in traits(network)]


def traits(network: Net) -> list[str]:
    """What is special about a network."""
    return [
        *(["internal"] if network.internal else []),
        *(["isolated"] if network.isolated else []),
        *([f"policy {network.policy}"] if network.policy != "allow" else []),
        *([f"MTU {network.mtu}"] if network.mtu != _USUAL_MTU else []),
    ]


def way_out(network: Net) -> str:
    """What its gateway leads to."""
    if network.vlan:
        return f"{network.vlan}, no default route" if network.internal else f"a router of {network.vlan}"
    kinds = set(network.ways_out.values())
    if not kinds:
        return "nowhere: no way out" if network.internal else "nowhere: the helper has no uplink"
    if len(kinds) > 1:
        return "to the outside, " + ", ".join(f"IPv{f} {_AS[kind]}" for f, kind in sorted(network.ways_out.items()))
    return f"to the outside, {_AS[kinds.pop()]}"


def _place(place: Place) -> Text:
    parts: list[str | tuple[str, str]] = [_dot(up=place.up), " ", (place.guest, "bold"), f"  {place.interface} "]
    parts.append(" ".join(place.addresses))
    if place.aliases:
        parts += [("  also ", "dim"), ", ".join(place.aliases)]
    if place.groups:
        parts += [("  in ", "dim"), (", ".join(place.groups), "magenta")]
    if place.sent_limit or place.received_limit:
        parts.append((f"  {limits(place)}", "yellow"))
    if not place.up:
        parts.append((f"  {place.problem}", "red"))
    elif place.rates is not None and place.rates.bits:
        parts.append((f"  ↑ {bits(place.rates.sent_bits)} ↓ {bits(place.rates.received_bits)}", "green"))
    return Text.assemble(*parts)


def shares(balancer: Shared) -> str:
    """Where a load balancer is reached, and who takes a share."""
    who = [f"{name} (down)" if name in balancer.down else name for name in balancer.backends]
    published = f", from the host at {' '.join(balancer.published)}" if balancer.published else ""
    return f"{' '.join(balancer.addresses)} port {' '.join(balancer.ports)}{published}, to {', '.join(who) or 'nobody'}"


def limits(place: Place) -> str:
    """What it may carry at most."""
    ways = (("↑", place.sent_limit), ("↓", place.received_limit))
    return "at most " + " ".join(f"{arrow} {bits(limit)}" for arrow, limit in ways if limit)


def _dot(*, up: bool) -> tuple[str, str]:
    return ("●", "green") if up else ("○", "red")


def count(number: int, what: str) -> str:
    """Such as `1 guest`, `2 guests`."""
    return f"{number} {what}{'' if number == 1 else 's'}"
