"""What policies mean, said once more and as plainly as possible: the reference that the fabric is held against.

Nothing here is taken from the bridge or the helper. A policy is the document that a YAML file says, as Python values.
"""

from __future__ import annotations

import ipaddress
import random
from dataclasses import dataclass
from typing import Any

PORTS = (7001, 7002, 7003, 7004)


@dataclass(frozen=True)
class Place:
    """A guest on a network."""

    guest: str
    network: str
    aliases: tuple[str, ...]
    addresses: tuple[str, ...]


def members(policy: dict[str, Any], group: str, places: list[Place]) -> set[Place]:
    found: set[Place] = set()
    for selector in policy["groups"][group].get("members", []):
        found |= selected(policy, selector, places)
    return found


def selected(policy: dict[str, Any], selector: dict[str, str], places: list[Place]) -> set[Place]:
    if "group" in selector:
        return members(policy, selector["group"], places)
    return {
        place
        for place in places
        if selector.get("guest", place.guest) == place.guest
        and selector.get("network", place.network) == place.network
        and ("alias" not in selector or selector["alias"] in (place.guest, *place.aliases))
    }


def allowed(
    policy: dict[str, Any], places: list[Place], source: Place, target: Place, protocol: str, family: int, port: int
) -> bool:
    """Whether the target answers the source: it may go out there, and come in here."""
    return _passes(policy, places, source, target, "out", protocol, family, port) and _passes(
        policy, places, target, source, "in", protocol, family, port
    )


def _passes(
    policy: dict[str, Any],
    places: list[Place],
    own: Place,
    other: Place,
    direction: str,
    protocol: str,
    family: int,
    port: int,
) -> bool:
    denied = policy["networks"].get(own.network, "allow") in ("deny", f"deny-{direction}")
    best: tuple[int, bool] | None = None
    for name, group in policy["groups"].items():
        if direction not in group or own not in members(policy, name, places):
            continue
        denied = True
        for rule in group[direction]:
            if _matches(policy, places, rule, other, direction, protocol, family, port):
                refuses = rule.get("action", "allow") != "allow"
                best = max(best or (-1, False), (rule.get("priority", 100), refuses))
    return not best[1] if best is not None else not denied


def _matches(
    policy: dict[str, Any],
    places: list[Place],
    rule: dict[str, Any],
    other: Place,
    direction: str,
    protocol: str,
    family: int,
    port: int,
) -> bool:
    wanted = rule.get("protocol", "any")
    if wanted not in ("any", "icmpv6" if protocol == "icmp" and family == 6 else protocol):
        return False
    ports = rule.get("ports")
    if ports is not None and not any(_within(port, text) for text in ports):
        return False
    peers = rule.get("from" if direction == "in" else "to", "any")
    if peers == "any":
        return True
    address = next(ipaddress.ip_address(a) for a in other.addresses if (":" in a) == (family == 6))
    for peer in peers:
        if "cidr" in peer:
            if address in ipaddress.ip_network(peer["cidr"]):
                return True
        elif other in selected(policy, peer, places):
            return True
    return False


def _within(port: int, text: int | str) -> bool:
    first, _, last = str(text).partition("-")
    return int(first) <= port <= int(last or first)


def random_policy(rng: random.Random, places: list[Place]) -> dict[str, Any]:
    """A policy that says something about some of these places."""
    names = [f"g{number}" for number in range(rng.randint(1, 5))]
    networks = sorted({place.network for place in places})

    def selector(group_names: list[str]) -> dict[str, str]:
        place = rng.choice(places)
        kind = rng.randrange(5)
        if kind == 0 and group_names:
            return {"group": rng.choice(group_names)}
        if kind == 1:
            return {"alias": rng.choice(place.aliases or (place.guest,)), "network": place.network}
        if kind == 2:
            return {"network": place.network}
        if kind == 3:
            return {"alias": rng.choice((place.guest, *place.aliases))}
        return {"guest": place.guest}

    def peer(family: int) -> dict[str, str]:
        if rng.random() < 0.3:
            place = rng.choice(places)
            address = next(a for a in place.addresses if (":" in a) == (family == 6))
            length = rng.choice((32, 31, 30, 24) if family == 4 else (128, 127, 126, 64))
            return {"cidr": str(ipaddress.ip_network(f"{address}/{length}", strict=False))}
        return selector(names)

    def rule(number: int, direction: str) -> dict[str, Any]:
        found: dict[str, Any] = {"name": f"r{number}"}
        protocol = rng.choice(("any", "tcp", "tcp", "udp", "icmp", "icmpv6"))
        found["protocol"] = protocol
        if protocol in ("tcp", "udp") and rng.random() < 0.7:
            found["ports"] = [
                rng.choice(([7001], [7002, 7004], ["7002-7003"], ["7001-7002", 7004], ["1-65535"], ["7003-9000"]))
            ][0]
        if rng.random() < 0.75:
            family = 6 if protocol == "icmpv6" or (protocol != "icmp" and rng.random() < 0.5) else 4
            found["from" if direction == "in" else "to"] = [peer(family) for _ in range(rng.randint(1, 3))]
        if rng.random() < 0.25:
            found["action"] = rng.choice(("drop", "reject"))
        if rng.random() < 0.4:
            found["priority"] = rng.choice((0, 99, 100, 101, 1000))
        return found

    groups: dict[str, Any] = {}
    for number, name in enumerate(names):
        group: dict[str, Any] = {"members": [selector(names[:number]) for _ in range(rng.randint(0, 3))]}
        for direction in ("in", "out"):
            if rng.random() < 0.5:
                group[direction] = [rule(n, direction) for n in range(rng.randint(0, 4))]
        groups[name] = group
    defaults = {network: rng.choice(("allow", "deny", "deny-in", "deny-out")) for network in networks}
    return {"groups": groups, "networks": {n: d for n, d in defaults.items() if d != "allow" or rng.random() < 0.3}}
