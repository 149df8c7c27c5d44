"""Which subnets and addresses are given out: pure functions, with properties that hold for any state."""

from __future__ import annotations

import ipaddress
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from host_bridge import ipam
from host_bridge.errors import (
    AddressTakenError,
    BridgeError,
    ExhaustedError,
    InvalidError,
    InvalidSubnetError,
    NoAddressLeftError,
    NoPoolLeftError,
    OutsideSubnetError,
    PreconditionError,
)

SMALL = ipaddress.ip_network("10.9.0.0/28")


def test_pools_are_dockers() -> None:
    pools = [str(pool) for pool in ipam.default_pools()]
    assert pools[0] == "172.17.0.0/16"
    assert pools[14] == "172.31.0.0/16"
    assert pools[15] == "192.168.0.0/20"
    assert pools[-1] == "192.168.240.0/20"
    assert len(pools) == 15 + 16


def test_next_pool_skips_what_overlaps() -> None:
    existing = [ipaddress.ip_network(n) for n in ("172.17.5.0/24", "172.18.0.0/16", "fd00::/64")]
    assert str(ipam.next_pool(existing)) == "172.19.0.0/16"
    assert str(ipam.next_pool([ipaddress.ip_network("172.16.0.0/12")])) == "192.168.0.0/20"


def test_pools_run_out() -> None:
    with pytest.raises(ExhaustedError, match="remove a network or give a --subnet"):
        ipam.next_pool(list(ipam.default_pools()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10.1.0.5/24", "subnet 10.1.0.5/24 has host bits set: use 10.1.0.0/24"),
        ("fd00:1::1/64", "subnet fd00:1::1/64 has host bits set: use fd00:1::/64"),
        ("10.1.0.0", "no prefix length"),
        ("10.1.0.0/33", "malformed"),
        ("10.1.0.0/255.255.255.0", "write it as 10.1.0.0/24"),
        ("10.1.0.0/-1", "malformed"),
        ("300.1.0.0/24", "malformed"),
        ("", "no prefix length"),
        ("/", "malformed"),
        ("10.1.0.0/31", "no room for a gateway and a guest: use /30"),
        ("10.1.0.0/32", "use /30"),
        ("fd00::/127", "use /126"),
        ("fd00::/128", "use /126"),
        ("0.0.0.0/0", "overlaps 0.0.0.0/8"),
        ("::/0", "overlaps ::/8"),
        ("127.0.0.0/24", "loopback"),
        ("169.254.1.0/24", "link-local"),
        ("224.0.0.0/24", "multicast"),
        ("240.0.0.0/8", "reserved"),
        ("fe80::/64", "link-local"),
        ("fe80::%eth0/64", "zone"),
        ("ff02::/64", "multicast"),
        ("::ffff:10.0.0.0/112", "reserved"),
        ("1" * 5000 + "/24", "malformed"),
    ],
)
def test_bad_subnets(text: str, message: str) -> None:
    with pytest.raises(InvalidError, match="subnet") as caught:
        ipam.check_special(ipam.parse_subnet(text))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 250


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_a_subnet_or_a_clear_refusal(text: str) -> None:
    try:
        subnet = ipam.parse_subnet(text)
    except InvalidError:
        return
    assert ipam.first_usable(subnet) < ipam.last_usable(subnet)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_an_address_or_a_clear_refusal(text: str) -> None:
    try:
        address = ipam.parse_address(text)
    except InvalidError:
        return
    assert ipaddress.ip_address(str(address)) == address


def test_overlap_is_per_family_and_names_the_network() -> None:
    existing = [(ipaddress.ip_network("10.0.0.0/8"), "app"), (ipaddress.ip_network("fd00::/48"), "six")]
    ipam.check_overlap(ipaddress.ip_network("11.0.0.0/8"), existing)
    ipam.check_overlap(ipaddress.ip_network("fd00:1::/64"), existing)
    with pytest.raises(PreconditionError, match=r"10\.1\.0\.0/16 overlaps 10\.0\.0\.0/8 of network app"):
        ipam.check_overlap(ipaddress.ip_network("10.1.0.0/16"), existing)
    with pytest.raises(PreconditionError, match="network six"):
        ipam.check_overlap(ipaddress.ip_network("fd00::/16"), existing)


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, 15)))
def test_lowest_free_is_the_lowest_free(offsets: set[int]) -> None:
    base = int(SMALL.network_address)
    taken = [ipaddress.IPv4Address(base + offset) for offset in offsets]
    free = [offset for offset in range(1, 15) if offset not in offsets]
    if not free:
        with pytest.raises(ExhaustedError, match="no address is left"):
            ipam.lowest_free(SMALL, taken)
    else:
        assert int(ipam.lowest_free(SMALL, taken)) == base + free[0]
        assert int(ipam.lowest_free_of(SMALL, map(str, taken))) == base + free[0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.none(), st.integers(0, 20)), max_size=80))
def test_no_address_has_two_holders_and_released_ones_are_reused(steps: list[int | None]) -> None:
    """None takes the lowest free address; a number releases the holder at that place."""
    held: list[ipam.Address] = []
    for step in steps:
        if step is None:
            try:
                address = ipam.lowest_free(SMALL, held)
            except ExhaustedError:
                assert len(held) == 14
                continue
            assert address not in held
            assert all(other in held for other in _between(SMALL, address))
            held.append(address)
        elif held:
            freed = held.pop(step % len(held))
            lower = [address for address in _between(SMALL, freed) if address not in held]
            assert ipam.lowest_free(SMALL, held) == (lower[0] if lower else freed)


def _between(subnet: ipam.Subnet, end: ipam.Address) -> list[ipam.Address]:
    return [address for address in subnet.hosts() if int(address) < int(end)]


def test_static_addresses() -> None:
    subnet = ipaddress.ip_network("10.1.0.0/24")
    assert str(ipam.check_static(subnet, ipaddress.ip_address("10.1.0.254"), "app")) == "10.1.0.254"
    for kind, address, what in (
        (AddressTakenError, "10.1.0.0", "network address"),
        (AddressTakenError, "10.1.0.255", "broadcast address"),
        (OutsideSubnetError, "10.2.0.1", "is not in 10.1.0.0/24: choose one of 10.1.0.1-10.1.0.254"),
        (OutsideSubnetError, "fd00::1", "is not in"),
    ):
        with pytest.raises(kind, match=what):
            ipam.check_static(subnet, ipaddress.ip_address(address), "app")
    six = ipaddress.ip_network("fd00::/64")
    assert ipam.check_static(six, ipaddress.ip_address("fd00::ffff:ffff:ffff:ffff"), "app")
    with pytest.raises(AddressTakenError, match="anycast"):
        ipam.check_static(six, ipaddress.ip_address("fd00::"), "app")


def test_ranges() -> None:
    subnet = ipaddress.ip_network("10.1.0.0/16")
    within = ipam.parse_range("10.1.5.0/24", subnet)
    # As dockerd: a range's own first address is one like any other.
    assert str(ipam.lowest_free(subnet, (), within)) == "10.1.5.0"
    assert str(ipam.lowest_free(subnet, [ipaddress.ip_address("10.1.5.0")], within)) == "10.1.5.1"
    assert str(ipam.lowest_free(subnet, (), ipam.parse_range("10.1.0.0/24", subnet))) == "10.1.0.1"
    assert str(ipam.lowest_free(subnet, (), ipam.parse_range("10.1.0.0/16", subnet))) == "10.1.0.1"
    one = ipam.parse_range("10.1.7.7/32", subnet)
    with pytest.raises(NoAddressLeftError, match=r"10\.1\.7\.7/32"):
        ipam.lowest_free(subnet, [ipaddress.ip_address("10.1.7.7")], one)
    for text, reason in (
        ("10.2.0.0/24", "outside"),
        ("10.0.0.0/8", "outside"),
        ("fd00::/64", "family"),
        ("10.1.5.7/24", "host-bits"),
        ("10.1.5.0", "malformed"),
        ("10.1.255.255/32", "reserved"),
        ("10.1.0.0/32", "reserved"),
    ):
        with pytest.raises(InvalidSubnetError, match="ip-range") as caught:
            ipam.parse_range(text, subnet)
        assert (caught.value.what, caught.value.reason, caught.value.value) == ("ip-range", reason, text)


@settings(max_examples=100, deadline=None)
@given(st.integers(24, 32), st.integers(0, 255), st.sets(st.integers(0, 255), max_size=40))
def test_lowest_free_of_a_range_is_in_the_range(prefix: int, base: int, offsets: set[int]) -> None:
    subnet = ipaddress.ip_network("10.1.0.0/24")
    within = ipaddress.ip_network(f"10.1.0.{base}/{prefix}", strict=False)
    taken = [subnet[offset] for offset in offsets]
    free = set(subnet.hosts()) - set(taken)
    usable = [address for address in within if address in free]
    if usable:
        assert ipam.lowest_free(subnet, taken, within) == usable[0]
        assert ipam.lowest_free_of(subnet, map(str, taken), within) == usable[0]
    else:
        with pytest.raises(NoAddressLeftError):
            ipam.lowest_free(subnet, taken, within)


def test_uplink_addresses() -> None:
    prefix = ipam.ula_prefix("host")
    ula = ipam.uplink_ula(prefix)
    subnets = list(prefix.subnets(new_prefix=64))
    assert ula == subnets[0xFFFF]
    assert ipam.uplink_kernel(prefix) == ("169.254.128.1/18", f"{ula[1]}/64")
    first = ipam.next_uplink(ipam.UPLINK_RANGE, [])
    assert first == "169.254.128.2/18"
    assert ipam.next_uplink(ipam.UPLINK_RANGE, [first, f"{ula[2]}/64", "169.254.128.4/18"]) == "169.254.128.3/18"
    assert ipam.next_uplink(ula, [first]) == f"{ula[2]}/64"
    # No network is given the uplink's own subnet.
    with pytest.raises(NoPoolLeftError):
        ipam.next_ula(prefix, [subnet for subnet in subnets if subnet != ula])


def test_smallest_subnets_hold_a_gateway_and_a_guest() -> None:
    for text, count in (("10.0.0.0/30", 2), ("fd00::/126", 3)):
        subnet = ipam.parse_subnet(text)
        held: list[ipam.Address] = []
        for _ in range(count):
            held.append(ipam.lowest_free(subnet, held))
        with pytest.raises(ExhaustedError):
            ipam.lowest_free(subnet, held)


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1))
def test_ula_prefix_is_stable_and_local(host_id: str) -> None:
    prefix = ipam.ula_prefix(host_id)
    assert prefix == ipam.ula_prefix(host_id)
    assert prefix.prefixlen == 48
    assert prefix.subnet_of(ipaddress.IPv6Network("fd00::/8"))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60))
def test_ula_subnets_are_cut_in_order(count: int) -> None:
    prefix = ipam.ula_prefix("host")
    taken: list[ipam.Subnet] = []
    for _ in range(count):
        taken.append(ipam.next_ula(prefix, taken))
    assert taken == list(itertools.islice(prefix.subnets(new_prefix=64), count))


def test_dns_servers_are_lowest_free() -> None:
    assert ipam.next_dns_server([]) == "169.254.64.1"
    assert ipam.next_dns_server(["169.254.64.1", "169.254.64.3"]) == "169.254.64.2"


def test_errors_name_a_status_code() -> None:
    def every(kind: type[BridgeError]) -> list[type[BridgeError]]:
        return [kind, *(deep for child in kind.__subclasses__() for deep in every(child))]

    codes = {"INTERNAL", "INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION"}
    codes |= {"RESOURCE_EXHAUSTED", "UNAVAILABLE", "ABORTED"}
    assert {kind.code for kind in every(BridgeError)} == codes
