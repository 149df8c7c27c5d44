"""Validation of interface descriptions."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_guest.spec import InterfaceSpec, SpecError, TrunkSpec, check_against, check_trunk
from taploom.contracts.taploom.guest.v1 import Interface, NameLink, Route, TrunkChild


def message(**changes: object) -> Interface:
    base = Interface(
        endpoint_id="ep",
        name="eth0",
        mac_address="02:42:AC:12:00:02",
        addresses=["172.18.0.2/16", "fd00::2/64"],
        gateways=["172.18.0.1", "fd00::1"],
        routes=[Route(destination="10.0.0.0/8", gateway="172.18.0.9"), Route(destination="10.1.0.0/16")],
        mtu=1500,
        network_name="app",
        dns_servers=["169.254.64.1"],
        name_links=[NameLink(alias="Db", target="postgres")],
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def test_a_good_description_is_taken_in_canonical_spelling() -> None:
    spec = InterfaceSpec.parse(message())
    assert spec.mac == "02:42:ac:12:00:02"
    assert spec.wants_ipv6
    again = spec.to_message()
    assert InterfaceSpec.parse(again) == spec
    assert again == message(mac_address="02:42:ac:12:00:02")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"endpoint_id": ""}, "endpoint_id"),
        ({"name_links": [NameLink(alias="", target="b")]}, "alias is missing"),
        ({"name_links": [NameLink(alias="a", target="")]}, "target is missing"),
        ({"name_links": [NameLink(alias="a b", target="b")]}, "name_links"),
        ({"name_links": [NameLink(alias="a", target="x" * 254)]}, "name_links"),
        ({"name_links": [NameLink(alias="a", target="b")] * 257}, "256"),
        ({"endpoint_id": "a/b"}, "endpoint_id"),
        ({"trunk_child": TrunkChild(parent_endpoint_id="base")}, "tag 0 is not within 1 to 4094"),
        ({"trunk_child": TrunkChild(parent_endpoint_id="base", tag=4095)}, "tag 4095"),
        ({"trunk_child": TrunkChild(tag=20)}, "parent_endpoint_id"),
        ({"trunk_child": TrunkChild(parent_endpoint_id="a/b", tag=20)}, "parent_endpoint_id"),
        ({"trunk_child": TrunkChild(parent_endpoint_id="ep", tag=20)}, "cannot carry itself"),
        ({"endpoint_id": "x" * 65}, "64"),
        ({"name": ""}, "interface name"),
        ({"name": "x" * 16}, "15"),
        ({"name": "a/b"}, "interface name"),
        ({"name": "eth%d"}, "interface name"),
        ({"name": "lo"}, "interface name"),
        ({"name": "all"}, "interface name"),
        ({"name": ".."}, "interface name"),
        ({"name": "eth0\n"}, "interface name"),
        ({"mac_address": "02:42:ac:12:00"}, "aa:bb:cc:dd:ee:ff"),
        ({"mac_address": "01:42:ac:12:00:02"}, "multicast"),
        ({"mac_address": "00:00:00:00:00:00"}, "mac_address"),
        ({"addresses": ["172.18.0.2"]}, "prefix length"),
        ({"addresses": ["172.18.0.2/33"]}, "prefix length"),
        ({"addresses": ["172.18.0.2/255.255.0.0"]}, "prefix length"),
        ({"addresses": ["fe80::1%eth0/64"]}, "prefix length"),
        ({"addresses": ["172.18.0.2/16", "172.18.0.2/24"]}, "twice"),
        ({"addresses": ["172.18.0.0/16"]}, "network or broadcast"),
        ({"addresses": ["172.18.255.255/16"]}, "network or broadcast"),
        ({"addresses": ["127.0.0.1/8"]}, "cannot be"),
        ({"addresses": ["224.0.0.1/8"]}, "cannot be"),
        ({"gateways": ["172.19.0.1"]}, "not on the link"),
        ({"gateways": ["172.18.0.2"]}, "own address"),
        ({"gateways": ["172.18.0.1", "172.18.0.3"]}, "at most one per family"),
        ({"gateways": ["172.18.0.1/16"]}, "not an IP address"),
        ({"gateways": ["fd01::1"]}, "not on the link"),
        ({"mtu": 0}, "68"),
        ({"mtu": 65535}, "65521"),
        ({"mtu": 1279}, "1280"),
        ({"routes": [Route(destination="10.0.0.1/8")]}, "host bits"),
        ({"routes": [Route(destination="0.0.0.0/0", gateway="172.18.0.1")]}, "default route"),
        ({"routes": [Route(destination="172.18.0.0/16")]}, "own subnet"),
        ({"routes": [Route(destination="10.0.0.0/8", gateway="fd00::1")]}, "other family"),
        ({"routes": [Route(destination="10.0.0.0/8", gateway="10.0.0.1")]}, "not on the link"),
        ({"routes": [Route(destination="10.0.0.0/8")] * 2}, "twice"),
        ({"dns_servers": ["169.254.64.1", "169.254.64.1"]}, "twice"),
        ({"dns_servers": ["172.18.0.2"]}, "own address"),
        ({"dns_servers": ["127.0.0.11"]}, "cannot be a server"),
        ({"addresses": [f"10.1.{n // 250}.{n % 250 + 1}/16" for n in range(257)]}, "256"),
        ({"network_name": "a b"}, "network_name"),
        ({"network_name": "x" * 254}, "253"),
    ],
)
def test_each_bad_field_is_named(changes: dict[str, object], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        InterfaceSpec.parse(message(**changes))


def test_a_family_that_the_interface_does_not_have() -> None:
    only4 = {"addresses": ["172.18.0.2/16"], "gateways": [], "routes": []}
    with pytest.raises(SpecError, match="IPv6 address"):
        InterfaceSpec.parse(message(**only4, dns_servers=["fd00::53"]))
    with pytest.raises(SpecError, match="IPv6 address"):
        InterfaceSpec.parse(message(**{**only4, "routes": [Route(destination="fd09::/64")]}))
    assert InterfaceSpec.parse(message(**only4, mtu=68)).mtu == 68


def test_a_link_local_gateway_is_on_the_link() -> None:
    assert InterfaceSpec.parse(message(gateways=["fe80::1"])).gateway(6) is not None


def test_interfaces_must_not_share_what_only_one_can_have() -> None:
    first = InterfaceSpec.parse(message())
    other = {"endpoint_id": "other", "name": "eth1", "gateways": [], "routes": []}
    with pytest.raises(SpecError, match="dns_servers"):
        check_against(InterfaceSpec.parse(message(**other, addresses=["172.19.0.2/16"])), [first])
    with pytest.raises(SpecError, match="addresses"):
        check_against(InterfaceSpec.parse(message(**other, dns_servers=[])), [first])
    same_route = {**other, "routes": [Route(destination="10.1.0.0/16")]}
    with pytest.raises(SpecError, match="routes"):
        check_against(InterfaceSpec.parse(message(**same_route, addresses=["172.19.0.2/16"], dns_servers=[])), [first])
    check_against(InterfaceSpec.parse(message(**other, addresses=["172.19.0.2/16"], dns_servers=[])), [first])


text = st.text(max_size=30) | st.sampled_from(["172.18.0.2/16", "fd00::2/64", "172.18.0.1", "::/0", "10.0.0.0/8", "/"])


@given(
    st.builds(
        Interface,
        endpoint_id=text,
        name=text,
        mac_address=text | st.just("02:00:00:00:00:01"),
        addresses=st.lists(text, max_size=3),
        gateways=st.lists(text, max_size=3),
        routes=st.lists(st.builds(Route, destination=text, gateway=text), max_size=3),
        mtu=st.integers(0, 2**32 - 1),
        network_name=text,
        dns_servers=st.lists(text, max_size=3),
    )
)
def test_any_text_is_taken_or_refused_with_a_reason(interface: Interface) -> None:
    try:
        spec = InterfaceSpec.parse(interface)
    except SpecError as error:
        assert str(error)
    else:
        assert InterfaceSpec.parse(spec.to_message()) == spec


@given(text)
def test_any_address_text_is_taken_or_refused(value: str) -> None:
    for field in ("addresses", "gateways", "dns_servers"):
        try:
            InterfaceSpec.parse(message(**{field: [value]}))
        except SpecError as error:
            assert str(error)


def child(endpoint_id: str = "child", parent: str = "base", tag: int = 20, **changes: object) -> InterfaceSpec:
    trunk = TrunkChild(parent_endpoint_id=parent, tag=tag)
    return InterfaceSpec.parse(message(endpoint_id=endpoint_id, trunk_child=trunk, **changes))


def test_what_goes_over_another_interface() -> None:
    spec = child()
    assert spec.trunk == TrunkSpec("base", 20)
    assert InterfaceSpec.parse(spec.to_message()) == spec
    # No larger than what carries it; smaller, and itself again, as that changes.
    for mtu, wanted in ((9000, 1500), (1500, 1500), (1400, 1400)):
        assert spec.carried_by(InterfaceSpec.parse(message(mtu=mtu))).mtu == wanted
    assert spec.carried_by(None) == spec
    check_trunk(spec, InterfaceSpec.parse(message(mtu=1280)))
    small = {"addresses": ["10.9.0.2/16"], "gateways": [], "routes": [], "mtu": 576}
    with pytest.raises(SpecError, match="MTU of 576, too small for IPv6"):
        check_trunk(spec, InterfaceSpec.parse(message(**small)))
    check_trunk(child(**small), InterfaceSpec.parse(message(**small)))
    with pytest.raises(SpecError, match="not nested"):
        check_trunk(spec, child("base", "other"))


def test_one_interface_for_a_tag() -> None:
    elsewhere = {"addresses": ["10.9.0.2/16"], "gateways": [], "routes": [], "dns_servers": []}
    check_against(child(), [child("two", tag=21, **elsewhere), child("three", parent="other", **elsewhere)])
    with pytest.raises(SpecError, match="tag 20 is endpoint two's"):
        check_against(child(), [child("two", **elsewhere)])
