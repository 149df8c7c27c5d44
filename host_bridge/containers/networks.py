"""A container's place in the fabric: its endpoints, its settings, and where its published ports lead."""

from __future__ import annotations

import ipaddress
import logging
import secrets
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import trio

from host_bridge.containers import create, ports, resolvconf
from host_bridge.containers.errors import ContainerError, conflict, invalid
from host_bridge.containers.model import JSON, Container
from host_bridge.errors import BridgeError, NetworkNotFoundError, NotConnectedError
from host_bridge.fabric import Fabric
from host_bridge.model import EndpointOptions, EndpointRecord, GuestSettings, NetworkRecord
from host_bridge.ports import PortBinding, PublishedPort
from host_bridge.vlan import is_carried

logger = logging.getLogger("taploom.bridge.containers")

DEFAULT_NETWORK = "bridge"


class Publisher(Protocol):
    """What is used of `host_bridge.ports.PortPublisher`."""

    def publish(self, owner: str, bindings: list[PortBinding]) -> tuple[PublishedPort, ...]:
        """Listens for all bindings, or for none and raises."""
        ...

    def set_target(self, owner: str, addresses: tuple[str, ...]) -> None:
        """Where connections are led; (): they are refused."""
        ...

    def release(self, owner: str) -> None:
        """Stops listening; of an owner that has nothing is success."""
        ...


class ContainerNetworks:
    """Puts containers on networks and takes them off. The callers hold the container's lock.

    Args:
        fabric: guests, networks, endpoints.
        publisher: published ports.
        container_name: the name of the container of a name or id, for links; None: there is none.
        note: writes a container's record without waiting for the disk. The fabric's own commit that follows makes it
            durable: the log of the database is written in order.
    """

    def __init__(
        self,
        fabric: Fabric,
        publisher: Publisher,
        container_name: Callable[[str], str | None],
        note: Callable[[Container], None],
    ) -> None:
        self._fabric = fabric
        self._publisher = publisher
        self._container_name = container_name
        self._note = note

    # What is there

    def network(self, text: str) -> NetworkRecord | None:
        """The network of a name or id; None: there is none."""
        try:
            return self._fabric.desired.find_network(text)
        except NetworkNotFoundError:
            return None

    def endpoints(self, container_id: str) -> list[tuple[NetworkRecord, EndpointRecord]]:
        """The endpoints of a guest with their networks, in order of the networks' names."""
        store = self._fabric.desired.store
        found = [
            (network, endpoint)
            for endpoint in store.endpoints(guest_id=container_id)
            if (network := store.network(endpoint.network_id)) is not None
        ]
        return sorted(found, key=lambda pair: pair[0].name)

    def gateway(self, container_id: str) -> tuple[NetworkRecord, EndpointRecord] | None:
        """The endpoint that published ports lead over: of those on networks that the helper routes, the one that a
        default route would; None: there is none."""
        usable = [pair for pair in self.endpoints(container_id) if pair[0].has_router and pair[1].active]
        return min(
            usable,
            key=lambda pair: (-pair[1].gateway_priority, -len(pair[1].addresses), pair[0].name.encode()),
            default=None,
        )

    # Starting

    def check(self, container: Container) -> None:
        """Raises, as dockerd at a start, when a wanted network is not there or an endpoint on it cannot be."""
        for name, wanted in container.networks.items():
            network = self.network(name)
            if network is None:
                raise NetworkNotFoundError(name)
            self._check_wanted(network, wanted)

    def _check_wanted(self, network: NetworkRecord, wanted: JSON) -> None:
        addresses = _addresses(wanted)
        user_defined = not network.predefined
        if addresses and not user_defined:
            raise invalid("user specified IP address is supported on user defined networks only")
        if wanted["Aliases"] and not user_defined:
            raise invalid("network-scoped alias is supported only for containers in user defined networks")
        for address in addresses:
            try:
                subnet = network.subnet(ipaddress.ip_address(address).version)
            except ValueError:
                raise invalid(f"invalid IP address: {address}") from None
            if subnet is None or not subnet.configured:
                raise invalid(
                    "user specified IP address is supported only when connecting to networks with user configured "
                    "subnets"
                )

    def publish(self, container: Container, published: list[list[Any]] | None = None) -> None:
        """Listens for the ports of a container that is about to be on its networks, or is on them.

        Args:
            container: its state then says what was published.
            published: ports to publish again as they were; None: as the configuration says.
        """
        if container.mode == "host" or container.mode.startswith("container:"):
            return
        network = self._leading(container)
        if network is None:
            return
        if published:
            bindings = [_again(entry) for entry in published]
        else:
            # The default bridge says 0.0.0.0 and means what it means with Docker: every address of both families.
            default = "" if network.host_binding == "0.0.0.0" else network.host_binding  # noqa: S104
            bindings = ports.translated(ports.wanted(container.docker, container.host, default), network)
        if not bindings:
            return
        try:
            found = self._publisher.publish(container.id, bindings)
        except BridgeError as error:
            if isinstance(error, ContainerError):
                raise
            raise publishing_failed(container, str(error)) from error
        except OSError as error:
            raise publishing_failed(container, error.strerror or str(error)) from error
        container.state["Published"] = [
            [f"{one.container_port}/{one.protocol}", one.host_ip, one.host_port] for one in found
        ]

    def _leading(self, container: Container) -> NetworkRecord | None:
        """The network that published ports lead over, of those that the container is or will be on."""
        pair = self.gateway(container.id)
        if pair is not None:
            return pair[0]
        wanted = [
            (network, settings.get("GwPriority") or 0)
            for name, settings in container.networks.items()
            if (network := self.network(name)) is not None and network.has_router
        ]
        return min(
            wanted, key=lambda pair: (-pair[1], -len(pair[0].subnets), pair[0].name.encode()), default=(None, 0)
        )[0]

    def target(self, container: Container) -> None:
        """Leads the published ports over the endpoint that has the default route now."""
        pair = self.gateway(container.id)
        if pair is None:
            self.release(container)
            return
        if not container.state["Published"]:
            self.publish(container)
        if container.state["Published"]:
            self._publisher.set_target(container.id, pair[1].addresses)

    def release(self, container: Container) -> None:
        """Stops listening for the container's ports."""
        self._publisher.release(container.id)
        container.state["Published"] = []

    def settings(self, container: Container) -> GuestSettings:
        """What the container's names are resolved with, its links on the default bridge included."""
        host, machine = container.host, resolvconf.read()
        search = host["DnsSearch"] or machine.search
        return GuestSettings(
            hostname=container.docker["Hostname"],
            domainname=container.docker["Domainname"],
            # What the bridge was told to ask comes before what its host asks.
            dns=tuple(host["Dns"] or (() if self._fabric.upstreams else machine.servers)),
            # As with Docker, a dot alone says that there is nothing to search.
            dns_search=() if list(search) == ["."] else tuple(search),
            dns_options=tuple(host["DnsOptions"] or machine.options),
            extra_hosts=tuple(self._extra_hosts(container)),
        )

    def _extra_hosts(self, container: Container) -> list[tuple[str, str]]:
        result = []
        for text in container.host["ExtraHosts"] or ():
            name, address = create.split_extra_host(text)
            if address == "host-gateway":
                bridge = self.network(DEFAULT_NETWORK)
                subnet = None if bridge is None else bridge.subnet(4)
                if subnet is None:
                    raise ContainerError(500, "unable to derive the IP value for host-gateway")
                address = subnet.gateway
            result.append((name, address))
        return result

    async def connect_all(self, container: Container) -> None:
        """Connects the container's guest to every network that it is to be on; the network of its mode gets eth0."""
        names = [name for name in container.networks if self._switched(name)]
        # What goes over the interface on another network comes after that.
        names.sort(key=lambda name: is_carried(container.networks[name]["DriverOpts"] or {}))
        turns = [trio.Event() for _ in names]
        failures: list[BaseException] = []

        async def one(position: int, scope: trio.CancelScope) -> None:
            if position:
                # The interfaces are named in the order in which the endpoints are made, which is when connect begins.
                await turns[position - 1].wait()
            turns[position].set()
            try:
                await self._connect_guest(container, names[position])
            except Exception as error:
                failures.append(error)
                scope.cancel()

        async with trio.open_nursery() as nursery:
            for position in range(len(names)):
                nursery.start_soon(one, position, nursery.cancel_scope)
        if failures:
            raise failures[0]

    def _switched(self, name: str) -> bool:
        network = self.network(name)
        if network is None:
            raise NetworkNotFoundError(name)
        return network.switched or network.config_only

    async def _connect_guest(self, container: Container, name: str) -> EndpointRecord:
        network = self.network(name)
        if network is None:
            raise NetworkNotFoundError(name)
        wanted = container.networks[name]
        wanted["Named"] = True
        return await self._fabric.connect(network.id, container.id, self._options(container, network, wanted))

    def _options(self, container: Container, network: NetworkRecord, wanted: JSON) -> EndpointOptions:
        mac = wanted["MacAddress"]
        main = container.mode in (network.name, network.id) or (container.mode == "default" and network.default_bridge)
        if not mac and main:
            mac = container.docker["MacAddress"]
        links = []
        for text in wanted["Links"] or ():
            target, alias = create.parse_link(text)
            links.append((alias, self._container_name(target) or target))
        return EndpointOptions(
            addresses=_addresses(wanted),
            aliases=tuple(wanted["Aliases"] or ()),
            gateway_priority=wanted["GwPriority"],
            mac_address=mac or "",
            links=tuple(links),
            driver_options=dict(wanted["DriverOpts"] or {}),
        )

    # Changes of a container that is there

    async def connect(
        self, container: Container, text: str, options: EndpointOptions, settings: Mapping[str, Any] | None = None
    ) -> bool:
        """Puts the container on a network: its guest while it runs, else its record only; False: it was there.

        Raises:
            ContainerError, BridgeError: with nothing changed.
        """
        network = self.network(text)
        wanted = _wanted(options, settings)
        if not container.running:
            if network is None:
                # dockerd looks for the network when the container is started.
                container.networks.setdefault(text, wanted)
                return True
            self._check_mode(container, network)
            self._check_wanted(network, wanted)
            if network.name in container.networks:
                return False
            wanted["Named"] = True
            container.networks[network.name] = wanted
            return True
        if network is None:
            raise NetworkNotFoundError(text)
        if container.restarting:
            raise conflict(f"Container {container.id} is restarting, wait until the container is running")
        self._check_mode(container, network)
        self._check_wanted(network, wanted)
        before = container.networks.get(network.name)
        if before is not None:
            raise ContainerError(403, f"endpoint with name {container.name} already exists in network {network.name}")
        container.networks[network.name] = wanted
        wanted["Named"] = True
        self._note(container)
        try:
            await self._connect_guest(container, network.name)
            try:
                self.target(container)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self._fabric.disconnect(network.id, container.id)
                raise
        except BaseException:
            container.networks.pop(network.name, None)
            self._note(container)
            raise
        return True

    def _check_mode(self, container: Container, network: NetworkRecord) -> None:
        if container.mode == "host" or container.mode.startswith("container:"):
            raise invalid(
                "container sharing network namespace with another container or host cannot be connected to any other "
                "network"
            )
        if network.driver == "host":
            raise invalid("container cannot be disconnected from host network or connected to host network")
        others = [name for name in container.networks if name != network.name and self.network(name) is not None]
        if others and (network.driver == "null" or "none" in others):
            raise invalid(
                "container cannot be connected to multiple networks with one of the networks in private (none) mode"
            )

    async def disconnect(self, container: Container, text: str, *, force: bool) -> NetworkRecord | None:
        """Takes the container off a network; returns it, None when it is not there any more."""
        network = self.network(text)
        if not container.running or (network is None and force):
            name = text if network is None else network.name
            if name not in container.networks:
                raise ContainerError(500, f"container {container.id} is not connected to the network {name}")
            del container.networks[name]
            if network is not None:
                self._fabric.desired.forget_connection(network.id, container.id)
            return network
        if network is None:
            raise NetworkNotFoundError(text)
        if container.mode == "host" and network.driver == "host":
            raise invalid("container cannot be disconnected from host network or connected to host network")
        if network.name not in container.networks:
            raise ContainerError(500, f"container {container.id} is not connected to network {network.name}")
        wanted = container.networks.pop(network.name)
        if network.switched and not container.restarting:
            self._note(container)
            try:
                await self._fabric.disconnect(network.id, container.id)
            except NotConnectedError:
                logger.debug("container %s was taken off %s meanwhile", container.name, network.name)
            except BridgeError:
                container.networks[network.name] = wanted
                self._note(container)
                raise
        self.target(container)
        return network

    def align(self, container: Container) -> bool:
        """Has the record of a container that runs say what its endpoints are; True when it did not.

        A bridge that is killed may have written the one and not the other, and endpoints come and go by the bridge's
        own API too.
        """
        if container.mode == "host" or container.mode.startswith("container:"):
            return False
        live = {network.name: endpoint for network, endpoint in self.endpoints(container.id)}
        lost = [
            name
            for name in container.networks
            if name not in live and (network := self.network(name)) is not None and network.switched
        ]
        for name in lost:
            del container.networks[name]
        found = [name for name in live if name not in container.networks]
        for name in found:
            container.networks[name] = _wanted_of(live[name])
        return bool(lost or found)


def _wanted_of(endpoint: EndpointRecord) -> JSON:
    """What an endpoint that is there was asked to be."""
    options = EndpointOptions(
        addresses=endpoint.static_addresses,
        aliases=endpoint.aliases,
        gateway_priority=endpoint.gateway_priority,
        mac_address=endpoint.mac_address if endpoint.static_mac else "",
        links=endpoint.links,
        driver_options=endpoint.driver_options,
    )
    return _wanted(options, None) | {"Named": True}


def publishing_failed(container: Container, reason: str) -> ContainerError:
    """dockerd's error for ports that cannot be published, with the id of an endpoint that was not to be."""
    endpoint_id = secrets.token_hex(32)
    return ContainerError(
        500, f"driver failed programming external connectivity on endpoint {container.name} ({endpoint_id}): {reason}"
    )


def _again(entry: list[Any]) -> PortBinding:
    number, _, protocol = entry[0].partition("/")
    return PortBinding(
        container_port=int(number),
        protocol=protocol,
        host_ip=entry[1],
        host_port=entry[2],
        host_port_end=entry[2],
    )


def _addresses(wanted: JSON) -> tuple[str, ...]:
    ipam = wanted["IPAMConfig"] or {}
    return tuple(ipam[key] for key in ("IPv4Address", "IPv6Address") if ipam.get(key))


def _wanted(options: EndpointOptions, settings: Mapping[str, Any] | None) -> JSON:
    """Options as Docker's EndpointSettings has them; `settings` as they were sent, when they were."""
    if settings is not None:
        return create.wanted_endpoint(settings) | {"MacAddress": options.mac_address}
    ipam: JSON = {}
    for text in options.addresses:
        ipam["IPv6Address" if ":" in text else "IPv4Address"] = text
    return {
        "IPAMConfig": ipam or None,
        "Links": [f"{target}:{alias}" for alias, target in options.links] or None,
        "Aliases": list(options.aliases) or None,
        "DriverOpts": dict(options.driver_options) or None,
        "MacAddress": options.mac_address,
        "GwPriority": options.gateway_priority,
    }
