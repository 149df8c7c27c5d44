"""Which subnets and addresses may be given out: pure functions over what is taken.

The rules are Docker's (`docker network create` on a fresh Docker 28) where it has any.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Iterator

from host_bridge.errors import ExhaustedError, InvalidError, PreconditionError, TakenError
from host_bridge.model import IPV4, IPV6
from host_bridge.names import shown

Subnet = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Docker gives 172.17.0.0/16 to its default bridge before anyone creates a network, so the first network that a user
# creates there has 172.18.0.0/16. It is so here too: 172.17.0.0/16 is not among the pools, for a network named bridge.
_LARGE_POOLS = tuple(ipaddress.IPv4Network(f"172.{second}.0.0/16") for second in range(18, 32))
_SMALL_POOLS = ipaddress.IPv4Network("192.168.0.0/16")
_SMALL_PREFIX = 20

# Each network's DNS server has one address of this range. It is link-local (RFC 3927) so that it never takes an
# address that a container would have had; 169.254.169.254 and its neighbours, where clouds serve metadata, are outside.
DNS_SERVER_RANGE = ipaddress.IPv4Network("169.254.64.0/18")

_SPECIAL: tuple[tuple[Subnet, str], ...] = (
    (ipaddress.IPv4Network("0.0.0.0/8"), "this host (RFC 1122)"),
    (ipaddress.IPv4Network("127.0.0.0/8"), "loopback"),
    (ipaddress.IPv4Network("169.254.0.0/16"), "link-local (RFC 3927)"),
    (ipaddress.IPv4Network("224.0.0.0/4"), "multicast"),
    (ipaddress.IPv4Network("240.0.0.0/4"), "reserved (RFC 1112)"),
    (ipaddress.IPv6Network("::/8"), "reserved (RFC 4291: unspecified, loopback, IPv4-mapped)"),
    (ipaddress.IPv6Network("fe80::/10"), "link-local"),
    (ipaddress.IPv6Network("ff00::/8"), "multicast"),
)

_LONGEST_PREFIX = {IPV4: 30, IPV6: 126}


def overlaps(one: Subnet, other: Subnet) -> bool:
    """True when both are of one family and share an address."""
    if isinstance(one, ipaddress.IPv4Network) and isinstance(other, ipaddress.IPv4Network):
        return one.overlaps(other)
    if isinstance(one, ipaddress.IPv6Network) and isinstance(other, ipaddress.IPv6Network):
        return one.overlaps(other)
    return False


def contains(subnet: Subnet, address: Address) -> bool:
    """True when the address is of the subnet's family and inside it."""
    return subnet.version == address.version and address in subnet


def parse_subnet(text: str) -> Subnet:
    """A subnet that a network may have, from CIDR form; raises InvalidError with the reason and the way out."""
    if "/" not in text:
        raise InvalidError(f"subnet {shown(text)} has no prefix length: write it as 10.1.0.0/24 or fd00:1::/64")
    if "%" in text:
        raise InvalidError(f"subnet {shown(text)} must not have a zone")
    try:
        interface = ipaddress.ip_interface(text)
    except ValueError:
        raise InvalidError(f"subnet {shown(text)} is malformed: write it as 10.1.0.0/24 or fd00:1::/64") from None
    subnet = interface.network
    if not text.rpartition("/")[2].isdecimal():
        # ipaddress takes netmasks and hostmasks too; CIDR form is what the contract says.
        raise InvalidError(f"subnet {shown(text)} has a netmask: write it as {subnet}")
    if interface.ip != subnet.network_address:
        raise InvalidError(f"subnet {text} has host bits set: use {subnet}")
    longest = _LONGEST_PREFIX[subnet.version]
    if subnet.prefixlen > longest:
        raise InvalidError(f"subnet {subnet} has no room for a gateway and a guest: use /{longest} or a shorter prefix")
    for special, what in _SPECIAL:
        if overlaps(subnet, special):
            raise InvalidError(f"subnet {subnet} overlaps {special}, which is {what}: choose another")
    return subnet


def parse_address(text: str) -> Address:
    """An address without prefix length; raises InvalidError."""
    try:
        if "%" in text:
            raise ValueError(text)
        return ipaddress.ip_address(text)
    except ValueError:
        raise InvalidError(
            f"address {shown(text)} is malformed: write it as 10.1.0.5 or fd00:1::5, without a prefix length"
        ) from None


def first_usable(subnet: Subnet) -> int:
    """The lowest address that may be given out. The first is the network's (IPv4) or the routers' anycast address
    (IPv6, RFC 4291 section 2.6.1)."""
    return int(subnet.network_address) + 1


def last_usable(subnet: Subnet) -> int:
    """The highest address that may be given out. IPv4's last is broadcast; IPv6 has none."""
    last = int(subnet.broadcast_address)
    return last - 1 if subnet.version == IPV4 else last


def lowest_free(subnet: Subnet, taken: Iterable[Address]) -> Address:
    """The lowest address of the subnet that is not taken; raises ExhaustedError when there is none."""
    candidate = first_usable(subnet)
    for value in sorted({int(address) for address in taken if contains(subnet, address)}):
        if value > candidate:
            break
        if value == candidate:
            candidate += 1
    if candidate > last_usable(subnet):
        raise ExhaustedError(f"no address is left in {subnet}: disconnect a guest or create a larger network")
    return _address(subnet, candidate)


def check_static(subnet: Subnet, address: Address, what: str = "address") -> Address:
    """Returns the address when a guest or gateway may have it; raises InvalidError otherwise."""
    if not contains(subnet, address):
        raise InvalidError(f"{what} {address} is not in {subnet}: choose one of {usable_range(subnet)}")
    if int(address) < first_usable(subnet):
        name = "network address" if subnet.version == IPV4 else "routers' anycast address"
        raise InvalidError(f"{what} {address} is the {name} of {subnet}: choose one of {usable_range(subnet)}")
    if int(address) > last_usable(subnet):
        raise InvalidError(
            f"{what} {address} is the broadcast address of {subnet}: choose one of {usable_range(subnet)}"
        )
    return address


def usable_range(subnet: Subnet) -> str:
    """The subnet's addresses that may be given out, for messages: first-last."""
    return f"{_address(subnet, first_usable(subnet))}-{_address(subnet, last_usable(subnet))}"


def check_overlap(subnet: Subnet, existing: Iterable[tuple[Subnet, str]]) -> None:
    """Raises PreconditionError when the subnet overlaps one of `existing` (subnet, network name)."""
    for other, name in existing:
        if overlaps(subnet, other):
            raise PreconditionError(f"subnet {subnet} overlaps {other} of network {name}: choose another")


def default_pools() -> Iterator[ipaddress.IPv4Network]:
    """Docker's default address pools, in its order."""
    yield from _LARGE_POOLS
    yield from _SMALL_POOLS.subnets(new_prefix=_SMALL_PREFIX)


def next_pool(existing: Iterable[Subnet]) -> ipaddress.IPv4Network:
    """The first default pool that overlaps no existing subnet; raises ExhaustedError."""
    taken = [subnet for subnet in existing if subnet.version == IPV4]
    for pool in default_pools():
        if not any(overlaps(pool, subnet) for subnet in taken):
            return pool
    raise ExhaustedError("all default subnets are in use: remove a network or give a --subnet")


def ula_prefix(host_id: str) -> ipaddress.IPv6Network:
    """The host's own /48: fd00::/8 and a 40-bit global id derived from the host's random id (RFC 4193)."""
    global_id = hashlib.sha256(host_id.encode()).digest()[:5]
    return ipaddress.IPv6Network((b"\xfd" + global_id + bytes(10), 48))


def next_ula(prefix: ipaddress.IPv6Network, existing: Iterable[Subnet]) -> ipaddress.IPv6Network:
    """The lowest /64 of the prefix that overlaps no existing subnet; raises ExhaustedError."""
    taken = [subnet for subnet in existing if isinstance(subnet, ipaddress.IPv6Network) and overlaps(subnet, prefix)]
    cut = {subnet if subnet.prefixlen < 64 else subnet.supernet(new_prefix=64) for subnet in taken}
    wide = [subnet for subnet in cut if subnet.prefixlen < 64]
    for candidate in prefix.subnets(new_prefix=64):
        if candidate not in cut and not any(candidate.overlaps(subnet) for subnet in wide):
            return candidate
    raise ExhaustedError(f"all /64 subnets of {prefix} are in use: remove a network or give an IPv6 --subnet")


def next_dns_server(taken: Iterable[str]) -> str:
    """The lowest free address for a network's DNS server; raises ExhaustedError."""
    return str(lowest_free(DNS_SERVER_RANGE, [ipaddress.IPv4Address(address) for address in taken]))


def check_free(address: Address, holders: dict[str, str], network: str) -> None:
    """Raises TakenError when `holders` (address -> who, for people) has the address."""
    holder = holders.get(str(address))
    if holder is not None:
        raise TakenError(f"address {address} of network {network} is taken by {holder}: choose another")


def _address(subnet: Subnet, value: int) -> Address:
    return ipaddress.IPv4Address(value) if subnet.version == IPV4 else ipaddress.IPv6Address(value)
