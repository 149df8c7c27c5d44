"""Random policies: what the reference says, the wire does; at least 2,000 answers with real packets, both families."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fabric import Fabric, camel, fabric
from policy_model import PORTS, Place, allowed, random_policy

pytestmark = pytest.mark.system

GUESTS = {"ann": ("red",), "bob": ("red", "blue"), "cat": ("red", "blue"), "dan": ("red",), "eve": ("blue",)}
ALIASES = {"bob": ("www", "shared"), "cat": ("db", "shared"), "dan": ("db",)}
ENOUGH = 2000


class Prober:
    """What listens and asks in one guest."""

    def __init__(self, lab: Fabric, guest: str) -> None:
        script = str(Path(__file__).with_name("policy_probe.py"))
        self._process = lab.start_in_guest(
            guest, sys.executable, script, json.dumps(PORTS), stdin=subprocess.PIPE, stderr=None
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def ask(self, probes: list[tuple[str, str, int]]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(probes) + "\n")
        self._process.stdin.flush()

    def answers(self) -> list[bool]:
        assert self._process.stdout is not None
        found: list[bool] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def lab() -> Iterator[Fabric]:
    with fabric(*GUESTS) as lab:
        for network in ("red", "blue"):
            lab.run("network", "create", network, "--ipv6")
        for guest, networks in GUESTS.items():
            for network in networks:
                aliases = [part for alias in ALIASES.get(guest, ()) for part in ("--alias", alias)]
                lab.run("network", "connect", network, guest, *aliases)
        yield lab


def places_of(lab: Fabric) -> list[Place]:
    return [
        Place(
            camel(endpoint, "guest_name"),
            network,
            ALIASES.get(camel(endpoint, "guest_name"), ()),
            tuple(address.partition("/")[0] for address in endpoint["addresses"]),
        )
        for network in ("red", "blue")
        for endpoint in lab.json("network", "inspect", network)["endpoints"]
    ]


def apply(lab: Fabric, policy: dict[str, Any]) -> None:
    path = lab.path / "random-policy.yaml"
    path.write_text(json.dumps(policy))  # JSON is YAML
    lab.run("policy", "apply", "--prune", "-f", str(path))


def test_random_policies_against_the_reference(lab: Fabric) -> None:
    seed = int(os.environ.get("TAPLOOM_SEED", time.time_ns() % 1_000_000))
    rng = random.Random(seed)
    print(f"seed {seed}")
    places = places_of(lab)
    assert len(places) == 7
    probers = {guest: Prober(lab, guest) for guest in GUESTS}
    # Who has two networks asks from the one that the target is on: the route is connected.
    cases = [
        (source, target, protocol, family, port)
        for source in places
        for target in places
        if source.guest != target.guest and source.network == target.network
        for family in (4, 6)
        for protocol, port in [("icmp", 0), *((p, n) for p in ("tcp", "udp") for n in PORTS)]
    ]
    checked = passed = rounds = 0
    try:
        # Policies at random may allow little: until both answers have been had often.
        while checked < ENOUGH or not 0.05 * ENOUGH <= passed <= checked - 0.05 * ENOUGH:
            assert rounds < 20 or checked >= ENOUGH
            policy = random_policy(rng, places)
            apply(lab, policy)
            rounds += 1
            by_guest: dict[str, list[Any]] = {guest: [] for guest in GUESTS}
            for case in cases:
                by_guest[case[0].guest].append(case)
            for guest, mine in by_guest.items():
                probers[guest].ask(
                    [
                        (protocol, next(a for a in target.addresses if (":" in a) == (family == 6)), port)
                        for _, target, protocol, family, port in mine
                    ]
                )
            for guest, mine in by_guest.items():
                for case, answer in zip(mine, probers[guest].answers(), strict=True):
                    source, target, protocol, family, port = case
                    wanted = allowed(policy, places, source, target, protocol, family, port)
                    assert answer is wanted, (
                        f"seed {seed}, round {rounds}: {source.guest} to {target.guest} on {target.network}, "
                        f"{protocol} {port} over IPv{family}: {answer}, not {wanted}, by\n{json.dumps(policy)}\n"
                    )
                    checked += 1
                    passed += answer
    finally:
        for prober in probers.values():
            prober.close()
    print(f"{checked} answers in {rounds} policies, {passed} of them yes (seed {seed})")
