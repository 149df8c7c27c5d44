"""Which subnets and addresses may be given out: pure functions over what is taken.

The rules are Docker's (`docker network create` on a fresh Docker 28) where it has any.
"""

from __future__ import annotations

import functools
import hashlib
import ipaddress
import socket
from collections.abc import Iterable, Iterator, Set

from host_bridge.errors import (
    AddressTakenError,
    InvalidAddressError,
    InvalidSubnetError,
    NoAddressLeftError,
    NoPoolLeftError,
    OutsideSubnetError,
    PoolOverlapError,
)
from host_bridge.model import IPV4, IPV6
from host_bridge.names import shown

Subnet = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# The default bridge takes the first of these before anyone creates a network.
_LARGE_POOLS = tuple(ipaddress.IPv4Network(f"172.{second}.0.0/16") for second in range(17, 32))
_SMALL_POOLS = ipaddress.IPv4Network("192.168.0.0/16")
_SMALL_PREFIX = 20

# Each network's DNS server has one address of this range. It is link-local (RFC 3927) so that it never takes an
# address that a container would have had; 169.254.169.254 and its neighbours, where clouds serve metadata, are outside.
DNS_SERVER_RANGE = ipaddress.IPv4Network("169.254.64.0/18")
# Where the networks' routers and the helper's kernel meet; the kernel has the first address. In IPv6 it is the /64 of
# this number within the host's ULA prefix.
UPLINK_RANGE = ipaddress.IPv4Network("169.254.128.0/18")
UPLINK_ULA = 0xFFFF

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


# The same few texts are read for every network that is created.
network_of = functools.lru_cache(4096)(ipaddress.ip_network)
_interface_of = functools.lru_cache(4096)(ipaddress.ip_interface)


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
    """A subnet that a network may have, from CIDR form; raises InvalidSubnetError with the reason and the way out."""
    subnet = _parse_prefix("subnet", text)
    longest = _LONGEST_PREFIX[subnet.version]
    if subnet.prefixlen > longest:
        raise InvalidSubnetError(
            f"subnet {subnet} has no room for a gateway and a guest: use /{longest} or a shorter prefix",
            what="subnet",
            value=text,
            reason="prefix",
        )
    return subnet


def check_special(subnet: Subnet) -> Subnet:
    """Returns the subnet unless it overlaps a range with a meaning of its own; raises InvalidSubnetError."""
    for special, what in _SPECIAL:
        if overlaps(subnet, special):
            raise InvalidSubnetError(
                f"subnet {subnet} overlaps {special}, which is {what}: choose another",
                what="subnet",
                value=str(subnet),
                reason="special",
            )
    return subnet


def parse_range(text: str, subnet: Subnet) -> Subnet:
    """The part of a subnet that addresses are taken from, from CIDR form; raises InvalidSubnetError."""
    wanted = _parse_prefix("ip-range", text)
    if not contains(subnet, wanted.network_address) or wanted.prefixlen < subnet.prefixlen:
        family = wanted.version != subnet.version
        raise InvalidSubnetError(
            f"ip-range {wanted} is not in {subnet}: give a part of it",
            what="ip-range",
            value=text,
            reason="family" if family else "outside",
            subnet=str(subnet),
        )
    if int(wanted.network_address) > last_usable(subnet) or int(wanted.broadcast_address) < first_usable(subnet):
        raise InvalidSubnetError(
            f"ip-range {wanted} has no address that a guest may have: choose one of {usable_range(subnet)}",
            what="ip-range",
            value=text,
            reason="reserved",
            subnet=str(subnet),
        )
    return wanted


def _parse_prefix(what: str, text: str) -> Subnet:
    def refused(message: str, reason: str) -> InvalidSubnetError:
        return InvalidSubnetError(f"{what} {message}", what=what, value=text, reason=reason)

    if "/" not in text:
        raise refused(f"{shown(text)} has no prefix length: write it as 10.1.0.0/24 or fd00:1::/64", "malformed")
    if "%" in text:
        raise refused(f"{shown(text)} must not have a zone", "malformed")
    try:
        interface = ipaddress.ip_interface(text)
    except ValueError:
        raise refused(f"{shown(text)} is malformed: write it as 10.1.0.0/24 or fd00:1::/64", "malformed") from None
    prefix = interface.network
    length = text.rpartition("/")[2]
    if not (length.isascii() and length.isdecimal()):
        # ipaddress takes netmasks and hostmasks too; CIDR form is what the contract says.
        raise refused(f"{shown(text)} has a netmask: write it as {prefix}", "malformed")
    if interface.ip != prefix.network_address:
        raise refused(f"{text} has host bits set: use {prefix}", "host-bits")
    return prefix


def parse_address(text: str) -> Address:
    """An address without prefix length; raises InvalidAddressError."""
    try:
        if "%" in text:
            raise ValueError(text)
        return ipaddress.ip_address(text)
    except ValueError:
        raise InvalidAddressError(
            f"address {shown(text)} is malformed: write it as 10.1.0.5 or fd00:1::5, without a prefix length",
            address=text,
        ) from None


def is_address(text: str) -> bool:
    """True for an address without prefix length and zone."""
    try:
        parse_address(text)
    except InvalidAddressError:
        return False
    return True


def first_usable(subnet: Subnet) -> int:
    """The lowest address that may be given out. The first is the network's (IPv4) or the routers' anycast address
    (IPv6, RFC 4291 section 2.6.1)."""
    return int(subnet.network_address) + 1


def last_usable(subnet: Subnet) -> int:
    """The highest address that may be given out. IPv4's last is broadcast; IPv6 has none."""
    last = int(subnet.broadcast_address)
    return last - 1 if subnet.version == IPV4 else last


def lowest_free(subnet: Subnet, taken: Iterable[Address], within: Subnet | None = None) -> Address:
    """The lowest address of the subnet that is not taken, of its part `within` when that is given; raises
    NoAddressLeftError when there is none."""
    return _lowest(subnet, {int(address) for address in taken if contains(subnet, address)}, within)


def lowest_free_of(subnet: Subnet, taken: Iterable[str], within: Subnet | None = None) -> Address:
    """As `lowest_free`, of addresses of the subnet's family as texts: a network may have hundreds."""
    family = socket.AF_INET if subnet.version == IPV4 else socket.AF_INET6
    return _lowest(subnet, {int.from_bytes(socket.inet_pton(family, text), "big") for text in taken}, within)


def _lowest(subnet: Subnet, taken: Set[int], within: Subnet | None) -> Address:
    candidate, last = first_usable(subnet), last_usable(subnet)
    if within is not None:
        # Docker's: in a range that does not begin with the subnet, the range's own first address is like any other.
        candidate = max(candidate, int(within.network_address))
        last = min(last, int(within.broadcast_address))
    while candidate in taken:
        candidate += 1
    if candidate > last:
        raise NoAddressLeftError(str(within or subnet))
    return _address(subnet, candidate)


# How far into a subnet of IPv6 the bridge's own addresses begin, so that they are short.
_HIGHEST_IPV6 = 0xFFFF


def highest_free(subnet: Subnet, taken: Iterable[Address], within: Subnet | None = None) -> Address:
    """The highest address of the subnet that is not taken, of its part `within` when that is given; raises
    NoAddressLeftError when there is none. Who takes from this end never takes an address that a guest would have had.

    In IPv6 it is one of the first 65,535."""
    first, candidate = first_usable(subnet), last_usable(subnet)
    if within is not None:
        first = max(first, int(within.network_address))
        candidate = min(candidate, int(within.broadcast_address))
    if subnet.version == IPV6:
        candidate = min(candidate, int((within or subnet).network_address) + _HIGHEST_IPV6)
    holders = {int(address) for address in taken if contains(subnet, address)}
    while candidate in holders:
        candidate -= 1
    if candidate < first:
        raise NoAddressLeftError(str(within or subnet))
    return _address(subnet, candidate)


def unusable(subnet: Subnet, address: Address) -> tuple[str, str] | None:
    """Why nobody may have the address: (reason, message without its subject); None: somebody may.

    The reason is "family", "outside" or "reserved".
    """
    if address.version != subnet.version:
        return "family", f"is not in {subnet}: choose one of {usable_range(subnet)}"
    if not contains(subnet, address):
        return "outside", f"is not in {subnet}: choose one of {usable_range(subnet)}"
    if int(address) < first_usable(subnet):
        name = "network address" if subnet.version == IPV4 else "routers' anycast address"
        return "reserved", f"is the {name} of {subnet}: choose one of {usable_range(subnet)}"
    if int(address) > last_usable(subnet):
        return "reserved", f"is the broadcast address of {subnet}: choose one of {usable_range(subnet)}"
    return None


def check_part(subnet: Subnet, text: str, what: str) -> Address:
    """A gateway or auxiliary address of the subnet; raises InvalidSubnetError. `what` is "gateway" or "aux-address"."""
    try:
        address = parse_address(text)
    except InvalidAddressError as error:
        raise InvalidSubnetError(
            f"{what} {error}", what=what, value=text, reason="malformed", subnet=str(subnet)
        ) from None
    problem = unusable(subnet, address)
    if problem is not None:
        reason, message = problem
        raise InvalidSubnetError(
            f"{what} {address} {message}", what=what, value=text, reason=reason, subnet=str(subnet)
        )
    return address


def check_static(subnet: Subnet, address: Address, network: str) -> Address:
    """Returns the address when a guest may ask for it; raises OutsideSubnetError, or AddressTakenError for one that
    nobody may have."""
    problem = unusable(subnet, address)
    if problem is None:
        return address
    reason, message = problem
    if reason == "reserved":
        raise AddressTakenError(str(address), network, "nobody: it " + message.partition(":")[0])
    raise OutsideSubnetError(f"address {address} {message}", address=str(address), network=network)


def usable_range(subnet: Subnet) -> str:
    """The subnet's addresses that may be given out, for messages: first-last."""
    return f"{_address(subnet, first_usable(subnet))}-{_address(subnet, last_usable(subnet))}"


def check_overlap(subnet: Subnet, existing: Iterable[tuple[Subnet, str]]) -> None:
    """Raises PoolOverlapError when the subnet overlaps one of `existing` (subnet, network name)."""
    for other, name in existing:
        if overlaps(subnet, other):
            raise PoolOverlapError(str(subnet), str(other), name)


def default_pools() -> Iterator[ipaddress.IPv4Network]:
    """Docker's default address pools, in its order."""
    yield from _LARGE_POOLS
    yield from _SMALL_POOLS.subnets(new_prefix=_SMALL_PREFIX)


def next_pool(existing: Iterable[Subnet]) -> ipaddress.IPv4Network:
    """The first default pool that overlaps no existing subnet; raises NoPoolLeftError."""
    taken = [subnet for subnet in existing if subnet.version == IPV4]
    for pool in default_pools():
        if not any(overlaps(pool, subnet) for subnet in taken):
            return pool
    raise NoPoolLeftError("all default subnets are in use: remove a network or give a --subnet", family=IPV4)


def ula_prefix(host_id: str) -> ipaddress.IPv6Network:
    """The host's own /48: fd00::/8 and a 40-bit global id derived from the host's random id (RFC 4193)."""
    global_id = hashlib.sha256(host_id.encode()).digest()[:5]
    return ipaddress.IPv6Network((b"\xfd" + global_id + bytes(10), 48))


def next_ula(prefix: ipaddress.IPv6Network, existing: Iterable[Subnet]) -> ipaddress.IPv6Network:
    """The lowest /64 of the prefix that overlaps no existing subnet; raises NoPoolLeftError."""
    taken = [subnet for subnet in existing if isinstance(subnet, ipaddress.IPv6Network) and overlaps(subnet, prefix)]
    cut = {subnet if subnet.prefixlen < 64 else subnet.supernet(new_prefix=64) for subnet in taken}
    wide = [subnet for subnet in cut if subnet.prefixlen < 64]
    uplink = uplink_ula(prefix)
    for candidate in prefix.subnets(new_prefix=64):
        if candidate != uplink and candidate not in cut and not any(candidate.overlaps(subnet) for subnet in wide):
            return candidate
    raise NoPoolLeftError(
        f"all /64 subnets of {prefix} are in use: remove a network or give an IPv6 --subnet", family=IPV6
    )


def uplink_ula(prefix: ipaddress.IPv6Network) -> ipaddress.IPv6Network:
    """The /64 of the host's ULA prefix that is the uplink's."""
    return ipaddress.IPv6Network((int(prefix.network_address) + (UPLINK_ULA << 64), 64))


def uplink_kernel(prefix: ipaddress.IPv6Network) -> tuple[str, str]:
    """The addresses of the helper's kernel on the uplink, in CIDR form."""
    ula = uplink_ula(prefix)
    return f"{UPLINK_RANGE[1]}/{UPLINK_RANGE.prefixlen}", f"{ula[1]}/{ula.prefixlen}"


def next_uplink(subnet: Subnet, taken: Iterable[str]) -> str:
    """The lowest free router's address on the uplink, in CIDR form; raises NoAddressLeftError.

    Args:
        subnet: `UPLINK_RANGE` or `uplink_ula`.
        taken: the other routers' addresses, in CIDR form, of any family.
    """
    holders = [_interface_of(text).ip for text in taken]
    return f"{lowest_free(subnet, [*holders, subnet[1]])}/{subnet.prefixlen}"


def next_dns_server(taken: Iterable[str]) -> str:
    """The lowest free address for a network's DNS server; raises NoAddressLeftError."""
    return str(lowest_free(DNS_SERVER_RANGE, [_interface_of(address).ip for address in taken]))


def check_free(address: Address, holders: dict[str, str], network: str) -> None:
    """Raises AddressTakenError when `holders` (address -> who, for people) has the address."""
    holder = holders.get(str(address))
    if holder is not None:
        raise AddressTakenError(str(address), network, holder)


def _address(subnet: Subnet, value: int) -> Address:
    return ipaddress.IPv4Address(value) if subnet.version == IPV4 else ipaddress.IPv6Address(value)
