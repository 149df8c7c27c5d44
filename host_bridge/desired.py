"""The desired state: every decision about names, subnets, addresses and MACs, in one place.

Each public method that changes something is one transaction on the `Store`: it either does all that it says or raises a
`BridgeError` and leaves the database as it was. Nothing here talks to a guest or to the helper.
"""

from __future__ import annotations

import datetime
import ipaddress
import secrets
from collections.abc import Collection, Sequence
from typing import TypeVar

from host_bridge import ipam
from host_bridge.errors import (
    ExhaustedError,
    InvalidError,
    NotFoundError,
    PreconditionError,
    TakenError,
)
from host_bridge.model import IPV4, IPV6, EndpointRecord, GuestRecord, NetworkRecord, SubnetRecord
from host_bridge.names import check_aliases, check_mac, check_mtu, check_name, shown
from host_bridge.store import Store
from taploom.address import VMADDR_CID_ANY, Address, AddressError, FdAddress, VsockAddress, data_address, parse_address

GUEST_CONTROL_PORT = 5555
MAX_INTERFACES = 256
_SHORT_ID = 12
_INT32 = range(-(2**31), 2**31)

Record = TypeVar("Record", NetworkRecord, GuestRecord)


class DesiredState:
    """What is wanted, on top of a `Store`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @property
    def store(self) -> Store:
        """The database underneath."""
        return self._store

    # Networks

    def create_network(
        self,
        name: str,
        *,
        subnets: Sequence[str] = (),
        gateways: Sequence[str] = (),
        internal: bool = False,
        mtu: int = 0,
        enable_ipv6: bool = False,
    ) -> NetworkRecord:
        """Reserves a network as pending and returns it.

        Args:
            name: see `names.check_name`.
            subnets: at most one per family, CIDR form. No IPv4 one: the next free default pool.
            gateways: each in one of the subnets. None for a subnet: its lowest address.
            internal: no way out of the network.
            mtu: bytes; 0 is 1500.
            enable_ipv6: give it IPv6 even when no IPv6 subnet is named.

        Raises:
            InvalidError, TakenError, PreconditionError, ExhaustedError: see the contract's CreateNetwork.
        """
        check_name("network", name)
        chosen = _one_per_family("subnet", [ipam.parse_subnet(text) for text in subnets])
        ipv6 = enable_ipv6 or IPV6 in chosen
        mtu = check_mtu(mtu, ipv6=ipv6)
        addresses = _one_per_family("gateway", [ipam.parse_address(text) for text in gateways])

        with self._store.change(durable=False):
            existing = self._store.networks()
            for network in existing:
                if network.name == name:
                    raise TakenError(f"network with name {name} already exists")
            taken = [
                (ipaddress.ip_network(subnet.subnet), network.name)
                for network in existing
                for subnet in network.subnets
            ]
            for subnet in chosen.values():
                ipam.check_overlap(subnet, taken)
            if IPV4 not in chosen:
                chosen[IPV4] = ipam.next_pool([subnet for subnet, _ in taken])
            if ipv6 and IPV6 not in chosen:
                prefix = ipam.ula_prefix(self._store.host_id())
                chosen[IPV6] = ipam.next_ula(prefix, [subnet for subnet, _ in taken])

            records = []
            for family in sorted(chosen):
                subnet, gateway = chosen[family], addresses.pop(family, None)
                if gateway is None:
                    gateway = ipam.lowest_free(subnet, ())
                ipam.check_static(subnet, gateway, "gateway")
                records.append(SubnetRecord(family, str(subnet), str(gateway)))
            for family, gateway in addresses.items():
                raise InvalidError(f"gateway {gateway}: network {name} has no IPv{family} subnet; give one too")

            macs = set(self._store.taken_macs())
            gateway_mac = _new_mac(macs)
            record = NetworkRecord(
                id=_new_id(),
                name=name,
                internal=internal,
                mtu=mtu,
                created_at=_now(),
                active=False,
                dns_server=ipam.next_dns_server(network.dns_server for network in existing),
                gateway_mac=gateway_mac,
                dns_mac=_new_mac(macs | {gateway_mac}),
                subnets=tuple(records),
            )
            self._store.insert_network(record)
        return record

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
        """Removes a network; returns what it was. PreconditionError names the guests that are on it."""
        with self._store.change():
            network = self.find_network(text)
            endpoints = self._store.endpoints(network_id=network.id)
            if endpoints:
                names = [self.guest_name(endpoint.guest_id) for endpoint in endpoints]
                listed = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
                noun = "guest" if len(names) == 1 else "guests"
                raise PreconditionError(
                    f"network {network.name} is in use by {noun} {listed}: disconnect first, "
                    f"with 'taploom network disconnect {network.name} GUEST'"
                )
            self._store.delete_network(network.id)
        return network

    def networks(self) -> list[NetworkRecord]:
        """The networks that are created, in order of their names."""
        return [network for network in self._store.networks() if network.active]

    def find_network(self, text: str) -> NetworkRecord:
        """The network of a full id, a name or a unique prefix of an id, tried in this order."""
        return _find("network", text, self.networks())

    # Guests

    def register_guest(self, name: str, address: str, data: str = "") -> GuestRecord:
        """Registers a guest.

        Args:
            name: see `names.check_name`; at least two characters, as container names have.
            address: where its agent's control port is (see `taploom.address`); port 5555 unless given.
            data: where its data port is. Empty: see `taploom.address.data_address`.

        Raises:
            InvalidError, TakenError
        """
        check_name("guest", name, shortest=2)
        control = _dialled("guest address", address, GUEST_CONTROL_PORT)
        try:
            their_data = _dialled("data address", data, None) if data else data_address(control)
        except AddressError as error:
            raise InvalidError(f"guest address {shown(address)}: {error}") from error
        if control == their_data:
            raise InvalidError(f"control and data address are both {control}: they are two ports of the agent")
        with self._store.change():
            for guest in self._store.guests():
                if guest.name == name:
                    raise TakenError(f"guest with name {name} already exists: remove it first, or choose another name")
                theirs = {guest.address, guest.data_address}
                for mine in (control, their_data):
                    if str(mine) in theirs:
                        raise TakenError(f"address {mine} is the one of guest {guest.name}")
            record = GuestRecord(_new_id(), name, str(control), str(their_data), _now())
            self._store.insert_guest(record)
        return record

    def remove_guest(self, text: str) -> tuple[GuestRecord, list[EndpointRecord]]:
        """Removes a guest and its endpoints; returns what they were."""
        with self._store.change():
            guest = self.find_guest(text)
            endpoints = self._store.endpoints(guest_id=guest.id)
            self._store.delete_guest(guest.id)
        return guest, endpoints

    def guests(self) -> list[GuestRecord]:
        """The guests in order of their names."""
        return self._store.guests()

    def find_guest(self, text: str) -> GuestRecord:
        """The guest of a full id, a name or a unique prefix of an id, tried in this order."""
        return _find("guest", text, self.guests())

    def guest_name(self, guest_id: str) -> str:
        """The guest's name, or its short id when it is gone."""
        guest = self._store.guest(guest_id)
        return guest_id[:_SHORT_ID] if guest is None else guest.name

    def network_name(self, network_id: str) -> str:
        """The network's name, or its short id when it is gone."""
        network = self._store.network(network_id)
        return network_id[:_SHORT_ID] if network is None else network.name

    # Endpoints

    def connect(
        self,
        network_text: str,
        guest_text: str,
        *,
        addresses: Sequence[str] = (),
        aliases: Sequence[str] = (),
        gateway_priority: int = 0,
        mac_address: str = "",
    ) -> EndpointRecord:
        """Reserves a guest's place on a network as pending and returns it.

        Args:
            network_text, guest_text: id, name or unique prefix of an id.
            addresses: at most one per family. None for a family that the network has: the lowest free one.
            aliases: see `names.check_aliases`.
            gateway_priority: the highest of a guest's networks has the default route.
            mac_address: empty: one that follows from the address.

        Raises:
            InvalidError, NotFoundError, TakenError, ExhaustedError: see the contract's ConnectGuest.
        """
        if gateway_priority not in _INT32:
            raise InvalidError(f"gateway priority {gateway_priority} is out of range: use -2147483648 to 2147483647")
        checked_aliases = check_aliases(list(aliases))
        wanted = _one_per_family("address", [ipam.parse_address(text) for text in addresses])
        mac = check_mac(mac_address) if mac_address else ""

        with self._store.change(durable=False):
            network = self.find_network(network_text)
            guest = self.find_guest(guest_text)
            if self._store.endpoint_of(network.id, guest.id) is not None:
                raise TakenError(f"guest {guest.name} is already connected to network {network.name}")
            holders = self._store.taken_addresses(network.id)
            chosen: list[str] = []
            for record in network.subnets:
                subnet = ipaddress.ip_network(record.subnet)
                address = wanted.pop(record.family, None)
                if address is None:
                    address = ipam.lowest_free(subnet, [ipaddress.ip_address(a) for a in holders])
                else:
                    ipam.check_static(subnet, address)
                    ipam.check_free(address, holders, network.name)
                chosen.append(str(address))
            for family, address in wanted.items():
                raise InvalidError(f"address {address}: network {network.name} has no IPv{family} subnet")
            macs = self._store.taken_macs()
            if mac in macs:
                raise TakenError(f"MAC address {mac} is taken by {macs[mac]}: choose another")
            endpoint = EndpointRecord(
                id=_new_id(),
                network_id=network.id,
                guest_id=guest.id,
                interface_name=self._free_interface(guest, ()),
                mac_address=mac or _mac_of(chosen, set(macs)),
                gateway_priority=gateway_priority,
                created_at=_now(),
                active=False,
                addresses=tuple(chosen),
                aliases=checked_aliases,
            )
            self._store.insert_endpoint(endpoint)
        return endpoint

    def rename_interface(self, endpoint_id: str, refused: set[str]) -> str | None:
        """Gives a pending endpoint the lowest free interface name that is not in `refused`; None: it is gone.

        A VM may have interfaces that its runtime gave it at boot; only its agent knows their names.
        """
        with self._store.change(durable=False):
            endpoint = self._store.endpoint(endpoint_id)
            guest = None if endpoint is None else self._store.guest(endpoint.guest_id)
            if endpoint is None or guest is None:
                return None
            name = self._free_interface(guest, refused)
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
                raise PreconditionError(f"guest {guest.name} is not connected to network {network.name}")
            self._store.delete_endpoint(endpoint.id)
        return endpoint

    def remove_pending(self) -> int:
        """Removes networks and endpoints that a bridge that was killed had not finished; returns how many."""
        networks, endpoints = self._store.remove_pending()
        return len(networks) + len(endpoints)

    def _free_interface(self, guest: GuestRecord, refused: set[str] | tuple[()]) -> str:
        taken = {endpoint.interface_name for endpoint in self._store.endpoints(guest_id=guest.id)}
        for number in range(MAX_INTERFACES):
            name = f"eth{number}"
            if name not in taken and name not in refused:
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


def _find(kind: str, text: str, records: list[Record]) -> Record:
    if not text:
        raise InvalidError(f"name a {kind}: its id, its name or a unique prefix of its id")
    for record in records:
        if record.id == text:
            return record
    for record in records:
        if record.name == text:
            return record
    # Prefixes are hexadecimal; an upper-case one is somebody's misspelt name.
    matches = [record for record in records if record.id.startswith(text)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        names = ", ".join(record.name for record in matches[:10])
        raise InvalidError(f"id prefix {shown(text)} is ambiguous: it fits {kind}s {names}; give more characters")
    raise NotFoundError(f"{kind} {shown(text)[1:-1]} not found: 'taploom {kind} ls' lists those there are")


Versioned = TypeVar("Versioned", ipam.Subnet, ipam.Address)


def _one_per_family(what: str, values: list[Versioned]) -> dict[int, Versioned]:
    chosen: dict[int, Versioned] = {}
    for value in values:
        if value.version in chosen:
            raise InvalidError(
                f"two IPv{value.version} {what}{'es' if what == 'address' else 's'}: give one per family"
            )
        chosen[value.version] = value
    return chosen


def _new_id() -> str:
    return secrets.token_hex(32)


def _new_mac(taken: Collection[str]) -> str:
    """A random locally administered unicast MAC address (IEEE 802: second bit of the first octet set, first clear)."""
    while True:
        mac = (b"\x02" + secrets.token_bytes(5)).hex(":")
        if mac not in taken:
            return mac


def _mac_of(addresses: Sequence[str], taken: Collection[str]) -> str:
    """The MAC address that goes with an endpoint's addresses, as Docker makes it: 02:42 and the IPv4 address.

    An address that is given out again, perhaps a second later, so has the MAC under which its peers may still know it.
    """
    for text in addresses:
        address = ipaddress.ip_address(text)
        if address.version == 4:
            mac = (b"\x02\x42" + address.packed).hex(":")
            if mac not in taken:
                return mac
    return _new_mac(taken)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
