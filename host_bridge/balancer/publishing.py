"""Ports of the host that lead to load balancers: published as containers' are, with a virtual address as the target."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from host_bridge.balancer.model import UDP, Balancer, Publish
from host_bridge.errors import BridgeError, TakenError
from host_bridge.ports import PortBinding, PublishedPort
from host_bridge.ports import model as ports
from host_bridge.sources import Source

logger = logging.getLogger("taploom.bridge.balancer")


class Publisher(Protocol):
    """What is needed of `host_bridge.ports.PortPublisher`."""

    def publish(self, owner: str, bindings: Sequence[PortBinding]) -> tuple[PublishedPort, ...]:
        """Listens."""

    def set_target(self, owner: str, addresses: Sequence[str]) -> None:
        """Says where connections go."""

    def release(self, owner: str) -> None:
        """Listens no more."""

    def published(self, owner: str) -> tuple[PublishedPort, ...]:
        """What is listened on."""


class BalancerPorts:
    """Keeps published what load balancers publish.

    Args:
        publisher: what listens.
        addresses: gives a load balancer's addresses by its name.
    """

    def __init__(self, publisher: Publisher, addresses: Callable[[str], Sequence[str]]) -> None:
        self._publisher = publisher
        self._addresses = addresses
        self._held: dict[str, Publish] = {}  # by owner
        self._problems: dict[str, str] = {}

    def restore(self, balancers: Mapping[str, Balancer]) -> None:
        """Publishes everything at start; what cannot be is logged and told by `problem`."""
        for owner, (balancer, publish) in _wanted(balancers).items():
            try:
                self._publish(owner, publish)
            except BridgeError as error:
                logger.warning("balancer %s: %s", balancer.name, error)
                self._problems[owner] = str(error)
        self.retarget(balancers)

    def change(self, where: Source, balancers: Mapping[str, Balancer]) -> None:
        """Makes what is published be what these load balancers say; `retarget` follows once they have addresses.

        Raises:
            TakenError: a port cannot be published; it is as it was before.
        """
        wanted = _wanted(balancers)
        going = {owner: publish for owner, publish in self._held.items() if owner not in wanted}
        for owner in going:
            self._release(owner)
        new: list[str] = []
        try:
            for owner, (balancer, publish) in wanted.items():
                if owner in self._held:
                    continue
                try:
                    self._publish(owner, publish)
                except BridgeError as error:
                    text = f"balancer {balancer.name}: {error}"
                    raise TakenError(where.text(publish.line or balancer.line, text)) from error
                new.append(owner)
        except BaseException:
            for owner in new:
                self._release(owner)
            for owner, publish in going.items():
                self._publish(owner, publish)
            raise
        self._problems = {owner: text for owner, text in self._problems.items() if owner in wanted}

    def retarget(self, balancers: Mapping[str, Balancer]) -> None:
        """Leads connections to the addresses that load balancers have now."""
        for owner, (balancer, _) in _wanted(balancers).items():
            self._publisher.set_target(owner, self._addresses(balancer.name))

    def published(self, balancer: Balancer) -> list[Publish]:
        """What is listened on for a load balancer, with the ports that were chosen."""
        return [
            Publish(port.host_port, port.container_port, port.protocol, port.host_ip)
            for owner in _wanted({balancer.name: balancer})
            for port in self._publisher.published(owner)
        ]

    def problem(self, balancer: Balancer) -> str:
        """Why not all of it is listened on, for people; empty when it is."""
        found = [self._problems[owner] for owner in _wanted({balancer.name: balancer}) if owner in self._problems]
        return "; ".join(found)

    def _publish(self, owner: str, publish: Publish) -> None:
        protocol: ports.Protocol = "udp" if publish.protocol == UDP else "tcp"
        binding = PortBinding(publish.port, protocol, publish.host_ip, publish.host_port)
        self._publisher.publish(owner, [binding])
        self._held[owner] = publish
        self._problems.pop(owner, None)

    def _release(self, owner: str) -> None:
        self._publisher.release(owner)
        self._held.pop(owner, None)


def _wanted(balancers: Mapping[str, Balancer]) -> dict[str, tuple[Balancer, Publish]]:
    """What is to be published, by what the publisher calls its owner. No container's id has a slash."""
    return {
        f"lb/{balancer.name}/{one.host_ip}/{one.host_port}/{one.port}/{one.protocol}": (balancer, one)
        for balancer in balancers.values()
        for one in balancer.publish
    }
