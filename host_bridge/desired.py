"""The desired state: every decision about names, subnets, addresses and MACs, in one place.

Each public method that changes something is one transaction on the `Store`: it either does all that it says or raises a
`BridgeError` and leaves the database as it was. Nothing here talks to a guest or to the helper.
"""

from __future__ import annotations

import dataclasses
import datetime
import ipaddress
import logging
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TypeVar

from host_bridge import addressing, ipam, vlan
from host_bridge.balancer.state import BalancerState
from host_bridge.errors import (
    ActiveEndpointsError,
    AliasOnDefaultError,
    AlreadyConnectedError,
    AmbiguousIdError,
    BalancedNetworkError,
    ConfigNetworkError,
    ExhaustedError,
    GuestNotFoundError,
    InvalidError,
    InvalidSubnetError,
    MacTakenError,
    MultipleSubnetsError,
    NameInUseError,
    NetworkNameTakenError,
    NetworkNotFoundError,
    NetworkOptionError,
    NoFamilyError,
    NotConnectedError,
    OutsideSubnetError,
    PreconditionError,
    PredefinedNetworkError,
    StaticAddressError,
    TakenError,
    UnsupportedDriverError,
)
from host_bridge.mirror.state import MirrorState
from host_bridge.model import (
    BRIDGE_DRIVER,
    DEFAULT_NETWORK,
    HOST_DRIVER,
    IPV4,
    IPV6,
    NULL_DRIVER,
    OPTION_HOST_BINDING,
    OPTION_ICC,
    OPTION_INTERFACE,
    OPTION_MASQUERADE,
    OPTION_MTU,
    OPTION_PREFIX,
    PREDEFINED,
    QEMU,
    QEMU_SERVER,
    EndpointOptions,
    EndpointRecord,
    GuestRecord,
    GuestSettings,
    NetworkOptions,
    NetworkRecord,
    SubnetOptions,
    SubnetRecord,
    parse_bool,
)
from host_bridge.names import (
    DEFAULT_MTU,
    MAX_LONG_NAME,
    MAX_MTU,
    MAX_NAME,
    MIN_MTU,
    MIN_MTU_IPV6,
    any_aliases,
    any_links,
    check_any_name,
    check_mac,
    check_mtu,
    check_name,
    shown,
)
from host_bridge.policy.model import ALLOW, DEFAULTS, OPTION_POLICY
from host_bridge.policy.state import PolicyState
from host_bridge.qos.model import from_options
from host_bridge.qos.state import QosState
from host_bridge.store import Store
from taploom.address import VMADDR_CID_ANY, Address, AddressError, FdAddress, VsockAddress, data_address, parse_address

logger = logging.getLogger("taploom.bridge")

GUEST_CONTROL_PORT = 5555
MAX_INTERFACES = 256
_SHORT_ID = 12
_INT32 = range(-(2**31), 2**31)
_GUEST_ID = re.compile(r"[0-9a-f]{64}", re.ASCII)
_INTERFACE = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,14}", re.ASCII)
# With three digits still a name that the kernel takes.
_INTERFACE_PREFIX = re.compile(r"[a-zA-Z_][a-zA-Z0-9_.-]{0,10}", re.ASCII)
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}", re.ASCII)
# `default` is what `--network default` says, so no network may be called that.
RESERVED = frozenset({*PREDEFINED, "default"})
# What `docker network inspect bridge` says of the default bridge; docker0 is its name for people only here.
_DEFAULT_OPTIONS = {
    "com.docker.network.bridge.default_bridge": "true",
    OPTION_ICC: "true",
    OPTION_MASQUERADE: "true",
    OPTION_HOST_BINDING: "0.0.0.0",  # noqa: S104 (Docker's text, nothing is bound)
    "com.docker.network.bridge.name": "docker0",
    OPTION_MTU: "1500",
}

Record = TypeVar("Record", NetworkRecord, GuestRecord)


def _no_networks() -> Iterable[ipam.Subnet]:
    return ()


class DesiredState:
    """What is wanted, on top of a `Store`. The predefined networks are there from the start.

    Args:
        store: the database.
        host_networks: the networks that this machine has an address in; default subnets avoid them, as Docker's do.

    Attributes:
        policies: which connections may pass.
        qos: how much guests may send and receive.
        balancers: the load balancers.
        mirrors: copies of what guests send and receive.
    """

    def __init__(self, store: Store, *, host_networks: Callable[[], Iterable[ipam.Subnet]] = _no_networks) -> None:
        self._store = store
        self.policies = PolicyState(store)
        self.qos = QosState(store)
        self.balancers = BalancerState(store)
        self.mirrors = MirrorState(store)
        self._host_networks = host_networks
        # The next number of a guest's interfaces, by prefix.
        self._interfaces: dict[str, dict[str, int]] = {}
        self._complete()

    @property
    def store(self) -> Store:
        """The database underneath."""
        return self._store

    def _complete(self) -> None:
        """Creates the predefined networks, and gives networks of older databases their place on the uplink."""
        existing = {network.name: network for network in self._store.networks()}
        with self._store.change():
            for name in PREDEFINED:
                network = existing.get(name)
                if network is not None and network.predefined:
                    continue
                if network is not None:
                    # Names were free before there were predefined networks.
                    other = next(new for n in range(1, 1000) if (new := f"{name}-{n}") not in existing)
                    logger.warning("network %s is called %s now: %s is a predefined network", name, other, name)
                    self._store.rename_network(network.id, other)
                self._store.insert_network(self._predefined(name))
            for network in self._store.networks():
                if network.has_router and not network.uplink_addresses:
                    families = [subnet.family for subnet in network.subnets]
                    mac = _new_mac(self._store.taken_macs())
                    self._store.insert_uplink(network.id, self._uplink(families), mac)

    def _predefined(self, name: str) -> NetworkRecord:
        if name == DEFAULT_NETWORK:
            options = NetworkOptions(options=_DEFAULT_OPTIONS)
            return self._described(name, options, predefined=True)
        return NetworkRecord(
            id=_new_id(),
            name=name,
            internal=False,
            mtu=DEFAULT_MTU,
            created_at=_now(),
            active=True,
            dns_server="",
            gateway_mac="",
            dns_mac="",
            driver=HOST_DRIVER if name == "host" else NULL_DRIVER,
            predefined=True,
            enable_ipv4=False,
        )

    # Networks

    def create_network(self, name: str, options: NetworkOptions | None = None) -> NetworkRecord:
        """Reserves a network as pending and returns it.

        Args:
            name: see `names.check_any_name`.
            options: see there.

        Raises:
            InvalidError, TakenError, PreconditionError, ExhaustedError: see the contract's CreateNetwork; of `errors`,
            those about networks.
        """
        options = options or NetworkOptions()
        if name in RESERVED:
            raise PredefinedNetworkError(name, "create")
        check_any_name("network", name)
        if options.driver != BRIDGE_DRIVER and not (options.config_only and options.driver == NULL_DRIVER):
            raise UnsupportedDriverError("network", options.driver)
        if options.ipam_driver != "default":
            raise UnsupportedDriverError("ipam", options.ipam_driver)
        with self._store.change(durable=False):
            holder = self._store.network_id_of(name)
            if holder is not None:
                raise NetworkNameTakenError(name, holder)
            if options.config_from:
                options = self._from_configuration(name, options)
            record = self._described(name, options)
            self._store.insert_network(record)
        return record

    def _from_configuration(self, name: str, options: NetworkOptions) -> NetworkOptions:
        """The options with what a configuration network says in them."""
        given = (options.subnets, options.enable_ipv6, options.labels, options.options, options.ipam_options)
        if options.config_only:
            raise ConfigNetworkError(name, "nested")
        if any(given) or options.mtu:
            raise ConfigNetworkError(options.config_from, "conflict")
        try:
            base = self.find_network(options.config_from)
        except (NetworkNotFoundError, AmbiguousIdError):
            raise ConfigNetworkError(options.config_from, "not-found") from None
        if not base.config_only:
            raise ConfigNetworkError(options.config_from, "not-config-only")
        return dataclasses.replace(
            options,
            subnets=[
                SubnetOptions(
                    subnet=subnet.subnet,
                    gateway=subnet.gateway,
                    ip_range=subnet.ip_range,
                    auxiliary=dict(subnet.auxiliary),
                )
                for subnet in base.idle_subnets
            ],
            enable_ipv4=base.enable_ipv4,
            enable_ipv6=base.enable_ipv6,
            labels=base.labels,
            options=base.options,
            ipam_options=base.ipam_options,
            config_from=base.name,
        )

    def _described(self, name: str, options: NetworkOptions, *, predefined: bool = False) -> NetworkRecord:
        """The record of a network that is to be inserted: every choice is made here."""
        if not options.enable_ipv4 and not options.enable_ipv6:
            raise NoFamilyError(name)
        mtu = _checked_options(options)
        given: dict[int, tuple[ipam.Subnet, SubnetOptions]] = {}
        for one in options.subnets:
            if not (one.subnet or one.gateway or one.ip_range or one.auxiliary):
                continue
            subnet = ipam.parse_subnet(one.subnet)
            if subnet.version in given:
                raise MultipleSubnetsError(subnet.version)
            given[subnet.version] = (subnet, one)
        record = NetworkRecord(
            id=_new_id(),
            name=name,
            internal=options.internal,
            mtu=mtu,
            created_at=_now(),
            active=predefined,
            dns_server="",
            gateway_mac="",
            dns_mac="",
            driver=options.driver,
            predefined=predefined,
            labels=dict(options.labels),
            options=dict(options.options),
            ipam_driver=options.ipam_driver,
            ipam_options=None if options.ipam_options is None else dict(options.ipam_options),
            attachable=options.attachable,
            ingress=options.ingress,
            config_only=options.config_only,
            config_from=options.config_from,
            enable_ipv4=options.enable_ipv4,
            enable_ipv6=options.enable_ipv6,
        )
        enabled = {family for family, on in ((IPV4, options.enable_ipv4), (IPV6, options.enable_ipv6)) if on}
        prefix = given[IPV6][0].prefixlen if IPV6 in given else 64
        addressing.check(options.options, internal=options.internal, ipv6=options.enable_ipv6, prefix=prefix)
        vlan.check_options(options.options)
        if options.config_only:
            if options.internal or options.attachable or options.ingress:
                raise ConfigNetworkError(name, "operator")
            enabled = set()
            record = dataclasses.replace(record, driver=NULL_DRIVER)
        idle = tuple(_echoed(*given.pop(family)) for family in sorted(given.keys() - enabled))
        record = dataclasses.replace(record, idle_subnets=idle)
        if options.config_only:
            return record

        existing = self._store.networks()
        vlan.check_network(
            name,
            options.options,
            internal=options.internal,
            gateways={f: (f in given, f in given and bool(given[f][1].gateway)) for f in enabled},
            others=[(network.name, network.vlan) for network in existing if network.vlan is not None],
        )
        taken = [(ipam.network_of(s.subnet), network.name) for network in existing for s in network.subnets]
        for subnet, _ in given.values():
            ipam.check_overlap(subnet, taken)
            ipam.check_special(subnet)
        avoided = [subnet for subnet, _ in taken]
        subnets = []
        for family in sorted(enabled):
            if family in given:
                subnets.append(_subnet_record(*given[family]))
                continue
            if family == IPV4:
                chosen: ipam.Subnet = ipam.next_pool([*avoided, *self._host_networks()])
            else:
                chosen = ipam.next_ula(ipam.ula_prefix(self._store.host_id()), avoided)
            subnets.append(dataclasses.replace(_subnet_record(chosen, SubnetOptions()), configured=False))
        macs = self._store.taken_macs()
        gateway_mac = _new_mac(macs)
        dns_mac = _new_mac(macs | {gateway_mac})
        return dataclasses.replace(
            record,
            # On the default bridge nobody has a name, so nobody answers for names.
            dns_server="" if predefined else ipam.next_dns_server(n.dns_server for n in existing if n.dns_server),
            gateway_mac=gateway_mac,
            dns_mac="" if predefined else dns_mac,
            subnets=tuple(subnets),
            uplink_addresses=self._uplink(sorted(enabled)) if record.has_router else (),
            uplink_mac=_new_mac(macs | {gateway_mac, dns_mac}) if record.has_router else "",
        )

    def _uplink(self, families: Iterable[int]) -> tuple[str, ...]:
        """Free addresses for a router on the uplink, one per family, in CIDR form."""
        taken = [address for network in self._store.networks() for address in network.uplink_addresses]
        ula = ipam.uplink_ula(ipam.ula_prefix(self._store.host_id()))
        return tuple(ipam.next_uplink(ipam.UPLINK_RANGE if family == IPV4 else ula, taken) for family in families)

    def activate_network(self, network_id: str) -> bool:
        """Marks a pending network as created. False: it is gone."""
        with self._store.change():
            self._store.activate_network(network_id)
        return self._store.network(network_id) is not None

    def cancel_network(self, network_id: str) -> None:
        """Undoes `create_network`."""
        with self._store.change(durable=False):
            self._store.delete_network(network_id)

    def delete_network(self, text: str) -> NetworkRecord:
        """Removes a network; returns what it was. ActiveEndpointsError names the guests that are on it."""
        with self._store.change():
            network = self.find_network(text)
            if network.predefined:
                raise PredefinedNetworkError(network.name, "remove")
            if network.config_only and any(one.config_from == network.name for one in self._store.networks()):
                raise ConfigNetworkError(network.name, "in-use")
            endpoints = self._store.endpoints(network_id=network.id)
            if endpoints:
                named = [(self.guest_name(endpoint.guest_id), endpoint.id) for endpoint in endpoints]
                raise ActiveEndpointsError(network.name, network.id, named)
            balancers = self._store.balancers_on(network.id)
            if balancers:
                raise BalancedNetworkError(network.name, network.id, balancers)
            self._store.delete_network(network.id)
        return network

    def networks(self) -> list[NetworkRecord]:
        """The networks that are created, in order of their names."""
        return [network for network in self._store.networks() if network.active]

    def find_network(self, text: str) -> NetworkRecord:
        """The network of a full id, a name or a unique prefix of an id, tried in this order."""
        return _only("network", text, self._store.find_networks(text))

    # Guests

    def register_guest(
        self,
        name: str,
        address: str,
        data: str = "",
        *,
        mac_address: str = "",
        qmp: str = "",
        guest_id: str = "",
        settings: GuestSettings | None = None,
    ) -> GuestRecord:
        """Registers a guest.

        Args:
            name: see `names.check_name`; at least two characters, as container names have.
            address: where its agent's control port is (see `taploom.address`); port 5555 unless given. Without an
                agent: where its network card is plugged in (see `CardPlace`).
            data: where its data port is. Empty: see `taploom.address.data_address`.
            mac_address: that of its network card, where it has no agent; empty: a new one.
            qmp: the path of the Unix socket at which the QEMU of a guest without an agent takes commands; empty: none.
            guest_id: the container's id, 64 hexadecimal characters; empty: a new one.
            settings: what its names are resolved with.

        Raises:
            InvalidError, TakenError
        """
        check_name("guest", name, shortest=2, longest=MAX_LONG_NAME if guest_id else MAX_NAME)
        if guest_id and not _GUEST_ID.fullmatch(guest_id):
            raise InvalidError(f"guest id {shown(guest_id)} is malformed: use 64 characters of 0-9 and a-f")
        if address.startswith((QEMU, QEMU_SERVER)):
            return self._register_card(name, address, data, mac_address, qmp)
        if mac_address or qmp:
            raise InvalidError(
                "only a guest without an agent has a MAC address of its own and a QMP socket: give its card's place"
            )
        control = _dialled("guest address", address, GUEST_CONTROL_PORT)
        try:
            their_data = _dialled("data address", data, None) if data else data_address(control)
        except AddressError as error:
            raise InvalidError(f"guest address {shown(address)}: {error}") from error
        if control == their_data:
            raise InvalidError(f"control and data address are both {control}: they are two ports of the agent")
        with self._store.change():
            holder = self._store.holder_of_name(name, guest_id)
            if holder is not None:
                raise NameInUseError(name, holder)
            for guest in self._store.guests():
                if guest.id == guest_id:
                    raise TakenError(f"guest {guest.name} is registered already")
                theirs = {guest.address, guest.data_address}
                for mine in (control, their_data):
                    if str(mine) in theirs:
                        raise TakenError(f"address {mine} is the one of guest {guest.name}")
            record = GuestRecord(
                guest_id or _new_id(), name, str(control), str(their_data), _now(), settings or GuestSettings()
            )
            self._store.insert_guest(record)
        return record

    def _register_card(self, name: str, address: str, data: str, mac_address: str, qmp: str) -> GuestRecord:
        """Registers a guest without an agent."""
        if data:
            raise InvalidError("a guest without an agent has no data address: leave it out")
        mac = check_mac(mac_address) if mac_address else ""
        prefix = QEMU if address.startswith(QEMU) else QEMU_SERVER
        path = address.removeprefix(prefix).removeprefix("unix:")
        qmp = qmp.removeprefix("unix:")
        try:
            place = parse_address(f"unix:{path}")
            if qmp and str(parse_address(f"unix:{qmp}")) == str(place):
                raise InvalidError(f"QMP socket {shown(qmp)} is that of the network card: they are two")
        except AddressError as error:
            raise InvalidError(f"guest address {shown(address)} is malformed: {error}") from error
        address = f"{prefix}{path}"
        with self._store.change():
            holder = self._store.holder_of_name(name)
            if holder is not None:
                raise NameInUseError(name, holder)
            cards = {guest.settings.card_mac for guest in self._store.guests()}
            for guest in self._store.guests():
                theirs = {guest.address, guest.data_address}
                if {str(place), f"{QEMU}{path}", f"{QEMU_SERVER}{path}"} & theirs:
                    raise TakenError(f"address {address} is the one of guest {guest.name}")
            settings = GuestSettings(card_mac=mac or _new_mac(cards | self._store.taken_macs()), card_qmp=qmp)
            record = GuestRecord(_new_id(), name, address, address, _now(), settings)
            self._store.insert_guest(record)
        return record

    def rename_guest(self, text: str, name: str) -> tuple[GuestRecord, GuestRecord]:
        """Gives a guest, and the container that it is, another name; returns what it was and what it is.

        Raises:
            InvalidError, NotFoundError, NameInUseError
        """
        check_name("guest", name, shortest=2, longest=MAX_LONG_NAME)
        with self._store.change():
            before = self.find_guest(text)
            holder = self._store.holder_of_name(name, before.id)
            if holder is not None:
                raise NameInUseError(name, holder)
            after = dataclasses.replace(before, name=name)
            self._store.update_guest(before.id, name=name, settings=before.settings)
            self._store.rename_container(before.id, name)
        return before, after

    def update_guest_settings(self, text: str, settings: GuestSettings) -> GuestRecord:
        """Replaces what a guest's names are resolved with."""
        with self._store.change():
            guest = self.find_guest(text)
            self._store.update_guest(guest.id, name=guest.name, settings=settings)
        return dataclasses.replace(guest, settings=settings)

    def remove_guest(self, text: str) -> tuple[GuestRecord, list[EndpointRecord]]:
        """Removes a guest and its endpoints; returns what they were."""
        with self._store.change():
            guest = self.find_guest(text)
            endpoints = self._store.endpoints(guest_id=guest.id)
            self._store.delete_guest(guest.id)
            if not self._store.is_container(guest.id):  # which only stops, and comes back with what is said of it
                self._store.delete_qos(guest_id=guest.id)
                self._store.delete_mirrors_of(guest.id)
        self._interfaces.pop(guest.id, None)
        return guest, endpoints

    def guests(self) -> list[GuestRecord]:
        """The guests in order of their names."""
        return self._store.guests()

    def find_guest(self, text: str) -> GuestRecord:
        """The guest of a full id, a name or a unique prefix of an id, tried in this order."""
        return _only("guest", text, self._store.find_guests(text))

    def guest_name(self, guest_id: str) -> str:
        """The guest's name, or its short id when it is gone."""
        guest = self._store.guest(guest_id)
        return guest_id[:_SHORT_ID] if guest is None else guest.name

    def member_name(self, guest_id: str) -> str:
        """As `guest_name`, of a container that may not run."""
        container = self._store.container(guest_id)
        return self.guest_name(guest_id) if container is None else container.name

    def network_name(self, network_id: str) -> str:
        """The network's name, or its short id when it is gone."""
        network = self._store.network(network_id)
        return network_id[:_SHORT_ID] if network is None else network.name

    # Endpoints

    def connect(self, network_text: str, guest_text: str, options: EndpointOptions | None = None) -> EndpointRecord:
        """Reserves a guest's place on a network as pending and returns it.

        Args:
            network_text, guest_text: id, name or unique prefix of an id.
            options: see there; see `names.any_aliases` too.

        Raises:
            InvalidError, NotFoundError, TakenError, ExhaustedError: see the contract's ConnectGuest; of `errors`, those
            about endpoints.
        """
        options = options or EndpointOptions()
        priority = options.gateway_priority
        if priority not in _INT32:
            raise InvalidError(f"gateway priority {priority} is out of range: use -2147483648 to 2147483647")
        wanted: dict[int, ipam.Address] = {}
        for text in options.addresses:
            address = ipam.parse_address(text)
            if address.version in wanted:
                raise InvalidError(f"two IPv{address.version} addresses: give one per family")
            wanted[address.version] = address
        mac = check_mac(options.mac_address) if options.mac_address else ""
        from_options(options.driver_options)
        aliases, names, links = any_aliases(options.aliases), any_aliases(options.names), any_links(options.links)

        with self._store.change(durable=False):
            network = self.find_network(network_text)
            guest = self.find_guest(guest_text)
            if not network.switched:
                if network.config_only:
                    raise ConfigNetworkError(network.name, "config-only")
                raise PredefinedNetworkError(network.name, "connect")
            carried = vlan.carried_of(options.driver_options)
            parent = None if carried is None else self._parent(network, guest, carried)
            if parent is not None and carried is not None:
                kept = dict(options.driver_options) | {vlan.OPTION_PARENT: self.network_name(parent.network_id)}
                options = dataclasses.replace(options, driver_options=kept)
                # A VLAN interface has the MAC address of the one that it is over.
                if not mac and self._store.holder_of_mac(network.id, parent.mac_address) is None:
                    mac = parent.mac_address
            elif guest.card is not None:
                mac = mac or guest.settings.card_mac
                for present in self._store.endpoints(guest_id=guest.id):
                    if present.network_id != network.id and present.carried is None:
                        where = self.network_name(present.network_id)
                        raise PreconditionError(
                            f"guest {guest.name} has one network card, which is on {where}: disconnect it there first"
                        )
            for address in wanted.values():
                _check_wanted(network, address)
            if network.default_bridge and aliases:
                raise AliasOnDefaultError(network.name)
            if self._store.endpoint_of(network.id, guest.id) is not None:
                raise AlreadyConnectedError(guest.name, network.name)
            mac_holder = self._store.holder_of_mac(network.id, mac)
            if mac_holder is not None:
                raise MacTakenError(mac, mac_holder)
            chosen: list[str] = []
            for record in network.subnets:
                asked = wanted.get(record.family)
                if asked is None and record.family == IPV6 and network.addressing.autonomous:
                    # What the guest makes of its MAC address, if it makes one itself.
                    mac = mac or self._mac_of(network.id, chosen)
                    asked = ipam.parse_address(addressing.slaac_address(record.subnet, mac))
                if asked is None:
                    within = ipam.network_of(record.ip_range) if record.ip_range else None
                    taken = self._store.addresses_in(network.id, record.family)
                    chosen.append(str(ipam.lowest_free_of(ipam.network_of(record.subnet), taken, within)))
                else:
                    ipam.check_free(asked, self._store.taken_addresses(network.id, str(asked)), network.name)
                    chosen.append(str(asked))
            endpoint = EndpointRecord(
                id=_new_id(),
                network_id=network.id,
                guest_id=guest.id,
                interface_name=self._child_name(guest, parent, carried.tag, options.driver_options)
                if parent is not None and carried is not None
                else self._interface_name(guest, network, options.driver_options),
                mac_address=mac or self._mac_of(network.id, chosen),
                gateway_priority=priority,
                created_at=_now(),
                active=False,
                addresses=tuple(chosen),
                aliases=aliases,
                static_addresses=tuple(str(wanted[family]) for family in sorted(wanted)),
                static_mac=bool(options.mac_address),
                links=links,
                driver_options=dict(options.driver_options),
                names=names,
            )
            self._store.insert_endpoint(endpoint)
        return endpoint

    def _mac_of(self, network_id: str, addresses: Sequence[str]) -> str:
        """The MAC address that goes with an endpoint's addresses, as Docker makes it: 02:42 and the IPv4 address.

        An address that is given out again, perhaps a second later, so has the MAC under which its peers may still know
        it.
        """
        for text in addresses:
            address = ipaddress.ip_address(text)
            if address.version == 4:
                mac = (b"\x02\x42" + address.packed).hex(":")
                if self._store.holder_of_mac(network_id, mac) is None:
                    return mac
        return _new_mac(self._store.taken_macs())

    def _parent(self, network: NetworkRecord, guest: GuestRecord, carried: vlan.Carried) -> EndpointRecord:
        """The endpoint that is to carry one of the guest's on a network.

        Raises:
            InvalidError, NotFoundError, PreconditionError, TakenError: it cannot.
        """
        over = self.find_network(carried.parent)
        if over.id == network.id:
            raise InvalidError(f"network {network.name} cannot go over itself: name another that {guest.name} is on")
        found = self._store.endpoint_of(over.id, guest.id)
        if found is None:
            raise NotConnectedError(guest.name, over.name, guest.id)
        if found.carried is not None:
            raise PreconditionError(
                f"{guest.name} is on {over.name} by tag {found.carried.tag} over {found.carried.parent}: name that, "
                "tags are not nested"
            )
        for other in self._store.endpoints(guest_id=guest.id):
            if other.carried == vlan.Carried(over.name, carried.tag) and other.network_id != network.id:
                where = self.network_name(other.network_id)
                raise TakenError(f"tag {carried.tag} over {over.name} is {where}'s in {guest.name}: choose another tag")
        return found

    def _child_name(self, guest: GuestRecord, parent: EndpointRecord, tag: int, options: Mapping[str, str]) -> str:
        """The name of a VLAN interface as people give it: eth0.20."""
        if options.get(OPTION_INTERFACE):
            network = self._store.network(parent.network_id)
            assert network is not None, "foreign key"
            return self._interface_name(guest, network, options)
        name = f"{parent.interface_name[: 14 - len(str(tag))]}.{tag}"
        if name in self._store.interface_names(guest.id):
            raise TakenError(f"guest {guest.name} has an interface {shown(name)} already: give another name")
        return name

    def find_place(self, network_text: str, guest_text: str) -> tuple[NetworkRecord, str, str]:
        """A network, the id of a guest on it (empty: none is named), and what messages call the two.

        Args:
            network_text: id, name or prefix; may be empty for a guest that is on one network only.
            guest_text: id, name or prefix; empty: the network alone is meant.

        Raises:
            InvalidError, NotFoundError, PreconditionError: there is no such place.
        """
        if not guest_text:
            network = self.find_network(network_text)
            if not network.switched:
                raise InvalidError(f"network {network.name} is a name only: nothing passes there")
            return network, "", f"network {network.name}"
        guest = self.find_guest(guest_text)
        if network_text:
            network = self.find_network(network_text)
            if self._store.endpoint_of(network.id, guest.id) is None:
                raise NotConnectedError(guest.name, network.name, guest.id)
            return network, guest.id, f"{guest.name} on {network.name}"
        networks = [self.network_name(endpoint.network_id) for endpoint in self._store.endpoints(guest_id=guest.id)]
        if len(networks) != 1:
            listed = f"on networks {', '.join(sorted(networks))}" if networks else "on no network"
            raise InvalidError(f"guest {guest.name} is {listed}: name the network that is meant")
        return self.find_network(networks[0]), guest.id, f"{guest.name} on {networks[0]}"

    def rename_interface(self, endpoint_id: str, refused: set[str]) -> str | None:
        """Gives a pending endpoint another interface name, none of `refused`; None: it is gone.

        A VM may have interfaces that its runtime gave it at boot; only its agent knows their names.
        """
        with self._store.change(durable=False):
            endpoint = self._store.endpoint(endpoint_id)
            guest = None if endpoint is None else self._store.guest(endpoint.guest_id)
            network = None if endpoint is None else self._store.network(endpoint.network_id)
            if endpoint is None or guest is None or network is None:
                return None
            name = self._interface_name(guest, network, endpoint.driver_options, refused)
            self._store.rename_interface(endpoint_id, name)
        return name

    def activate_endpoint(self, endpoint_id: str) -> bool:
        """Marks a pending endpoint as connected. False: it is gone."""
        with self._store.change():
            self._store.activate_endpoint(endpoint_id)
        return self._store.endpoint(endpoint_id) is not None

    def cancel_endpoint(self, endpoint_id: str) -> None:
        """Undoes `connect`."""
        with self._store.change(durable=False):
            self._store.delete_endpoint(endpoint_id)

    def disconnect(self, network_text: str, guest_text: str) -> EndpointRecord:
        """Takes a guest off a network; returns what the endpoint was."""
        with self._store.change():
            network = self.find_network(network_text)
            guest = self.find_guest(guest_text)
            endpoint = self._store.endpoint_of(network.id, guest.id)
            if endpoint is None:
                raise NotConnectedError(guest.name, network.name, guest.id)
            self._store.delete_endpoint(endpoint.id)
            self._store.delete_qos(network_id=network.id, guest_id=guest.id)
            self._store.delete_mirrors_of(guest.id, network.id)
        return endpoint

    def forget_connection(self, network_id: str, guest_id: str) -> None:
        """Forgets what is said of a container on a network that it was taken off while it did not run."""
        with self._store.change():
            self._store.delete_qos(network_id=network_id, guest_id=guest_id)
            self._store.delete_mirrors_of(guest_id, network_id)

    def remove_pending(self) -> int:
        """Removes networks and endpoints that a bridge that was killed had not finished; returns how many."""
        networks, endpoints = self._store.remove_pending()
        return len(networks) + len(endpoints)

    def _interface_name(
        self, guest: GuestRecord, network: NetworkRecord, options: Mapping[str, str], refused: Collection[str] = ()
    ) -> str:
        """The name of a new interface: the one that the driver option says, or the network's prefix and a number.

        A container's interfaces are counted as with Docker: what is connected again has the next number. Another guest,
        which may run for years, has the lowest free one.
        """
        taken = self._store.interface_names(guest.id)
        asked = options.get(OPTION_INTERFACE, "")
        if asked and not refused:
            if not _INTERFACE.fullmatch(asked):
                raise InvalidError(
                    f"interface name {shown(asked)} is not allowed: use 1 to 15 letters, digits, '_', '.' and '-'"
                )
            if asked in taken:
                raise TakenError(f"guest {guest.name} has an interface {shown(asked)} already: choose another name")
            return asked
        prefix = network.options.get(OPTION_PREFIX, "")
        if not _INTERFACE_PREFIX.fullmatch(prefix):
            prefix = "eth"
        first = 0
        if self._store.is_container(guest.id):
            first = self._interfaces.get(guest.id, {}).get(prefix, 0)
        for number in range(first, first + MAX_INTERFACES):
            name = f"{prefix}{number}"
            if name not in taken and name not in refused:
                self._interfaces.setdefault(guest.id, {})[prefix] = number + 1
                return name
        raise ExhaustedError(f"guest {guest.name} has {MAX_INTERFACES} interfaces: disconnect one first")


def _dialled(what: str, text: str, default_port: int | None) -> Address:
    """An address that the bridge can dial; raises InvalidError."""
    try:
        address = parse_address(text, default_port=default_port)
    except AddressError as error:
        raise InvalidError(f"{what} {shown(text)} is malformed: {error}") from error
    if isinstance(address, FdAddress):
        raise InvalidError(f"{what} {shown(text)} cannot be dialled: use vsock:CID:PORT, hybrid:PATH:PORT or unix:PATH")
    if isinstance(address, VsockAddress) and address.cid == VMADDR_CID_ANY:
        raise InvalidError(f"{what} {shown(text)} is only for listening: name the guest's CID")
    return address


def _only(kind: str, text: str, found: list[Record]) -> Record:
    if not text:
        raise InvalidError(f"name a {kind}: its id, its name or a unique prefix of its id")
    if len(found) == 1:
        return found[0]
    if found:
        raise AmbiguousIdError(kind, text, [record.name for record in found])
    raise NetworkNotFoundError(text) if kind == "network" else GuestNotFoundError(text)


def _checked_options(options: NetworkOptions) -> int:
    """Checks those of Docker's options that the fabric knows; returns the network's MTU.

    Raises:
        NetworkOptionError, InvalidError
    """
    values = options.options
    for key in (OPTION_ICC, OPTION_MASQUERADE):
        if key in values and parse_bool(values[key]) is None:
            raise NetworkOptionError(key, values[key], "bool")
    if values.get(OPTION_POLICY, ALLOW) not in DEFAULTS:
        raise NetworkOptionError(OPTION_POLICY, values[OPTION_POLICY], "policy")
    from_options(values)
    if OPTION_HOST_BINDING in values:
        try:
            ipaddress.ip_address(values[OPTION_HOST_BINDING])
        except ValueError:
            raise NetworkOptionError(OPTION_HOST_BINDING, values[OPTION_HOST_BINDING], "address") from None
    text = values.get(OPTION_MTU)
    if text is None or options.config_only:
        return check_mtu(options.mtu, ipv6=options.enable_ipv6)
    if not _INTEGER.fullmatch(text):
        raise NetworkOptionError(OPTION_MTU, text, "integer")
    mtu = int(text)
    if mtu < 0:
        raise NetworkOptionError(OPTION_MTU, text, "negative")
    if mtu and not (MIN_MTU_IPV6 if options.enable_ipv6 else MIN_MTU) <= mtu <= MAX_MTU:
        raise NetworkOptionError(OPTION_MTU, text, "range")
    if options.mtu not in (0, mtu):
        raise NetworkOptionError(OPTION_MTU, text, "range")
    return mtu or DEFAULT_MTU


def _subnet_record(subnet: ipam.Subnet, options: SubnetOptions) -> SubnetRecord:
    """A subnet with its gateway, in Docker's order: the gateway is chosen before auxiliary addresses are looked at."""
    within = ipam.parse_range(options.ip_range, subnet) if options.ip_range else None
    if options.gateway:
        gateway = ipam.check_part(subnet, options.gateway, "gateway")
    else:
        gateway = ipam.lowest_free(subnet, (), within)
    auxiliary: dict[str, str] = {}
    for name, text in options.auxiliary.items():
        address = ipam.check_part(subnet, text, "aux-address")
        if address == gateway or str(address) in auxiliary.values():
            holder = "the gateway" if address == gateway else "another auxiliary address"
            raise InvalidSubnetError(
                f"aux-address {shown(name)} {address} is {holder}: choose another",
                what="aux-address",
                value=text,
                reason="taken",
                subnet=str(subnet),
            )
        auxiliary[name] = str(address)
    return SubnetRecord(
        subnet.version,
        str(subnet),
        str(gateway),
        ip_range="" if within is None else str(within),
        auxiliary=tuple(auxiliary.items()),
        configured=True,
        gateway_given=bool(options.gateway),
    )


def _echoed(subnet: ipam.Subnet, options: SubnetOptions) -> SubnetRecord:
    """A subnet that nobody uses: checked and kept as it was given."""
    checked = _subnet_record(subnet, options)
    return checked if options.gateway else dataclasses.replace(checked, gateway="")


def _check_wanted(network: NetworkRecord, address: ipam.Address) -> None:
    """Raises StaticAddressError, OutsideSubnetError or AddressTakenError unless a guest may ask for the address."""
    subnet = network.subnet(address.version)
    if network.default_bridge or not any(one.configured for one in network.subnets):
        raise StaticAddressError(str(address), network.name, address.version)
    if subnet is None:
        raise OutsideSubnetError(
            f"address {address}: network {network.name} has no IPv{address.version} subnet",
            address=str(address),
            network=network.name,
        )
    if not subnet.configured:
        raise StaticAddressError(str(address), network.name, address.version)
    ipam.check_static(ipam.network_of(subnet.subnet), address, network.name)


def _new_id() -> str:
    return secrets.token_hex(32)


def _new_mac(taken: Collection[str]) -> str:
    """A random locally administered unicast MAC address (IEEE 802: second bit of the first octet set, first clear)."""
    while True:
        mac = (b"\x02" + secrets.token_bytes(5)).hex(":")
        if mac not in taken:
            return mac


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
