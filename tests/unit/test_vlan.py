"""VLANs: options of networks, what the helper is told, and what both refuse."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_helper.errors import InvalidSpecError
from agent_helper.physical import bridge_name
from agent_helper.vlan import ChildSpec, VlanSpec, parse_child, parse_vlan
from host_bridge.describe import guest_interface, helper_network, needs_of_network
from host_bridge.desired import DesiredState
from host_bridge.errors import (
    EndpointOptionError,
    InvalidError,
    NetworkNotFoundError,
    NetworkOptionError,
    NotConnectedError,
    PreconditionError,
    TakenError,
    VlanTakenError,
)
from host_bridge.model import EndpointOptions, NetworkOptions, NetworkRecord, SubnetOptions
from host_bridge.store import Store
from host_bridge.vlan import (
    OPTION_PARENT,
    OPTION_TAG,
    OPTION_UPLINK,
    Carried,
    VlanPlace,
    carried_of,
    check_options,
    place_of,
)
from taploom.contracts.taploom.helper.v1 import HelperFeature, TrunkChild, Vlan


@pytest.fixture
def desired(tmp_path: Path) -> Iterator[DesiredState]:
    with Store(tmp_path / "state") as store:
        yield DesiredState(store)


def subnet(number: int, gateway: str = "1", ip_range: str = "") -> SubnetOptions:
    prefix = f"10.{number}.0."
    return SubnetOptions(subnet=f"{prefix}0/24", gateway=gateway and prefix + gateway, ip_range=ip_range)


def create(desired: DesiredState, number: int, tag: str, uplink: str = "", **options: Any) -> NetworkRecord:
    given = {OPTION_TAG: tag} | ({OPTION_UPLINK: uplink} if uplink else {})
    values: dict[str, Any] = {"subnets": [subnet(number)], "options": given | options.pop("more", {})}
    return desired.create_network(f"n{number}", NetworkOptions(**(values | options)))


def test_what_the_agents_are_told(desired: DesiredState) -> None:
    record = create(desired, 120, "120", "eth1", subnets=[subnet(120, ip_range="10.120.0.192/26")])
    assert record.vlan == VlanPlace(120, "eth1")
    assert str(record.vlan) == "VLAN 120 on eth1"
    assert not record.has_router
    assert (record.uplink_addresses, record.uplink_mac) == ((), "")
    told = helper_network(record)
    assert told.vlan == Vlan(tag=120, uplink="eth1")
    assert HelperFeature.VLAN in needs_of_network(record)
    guest = desired.register_guest("web", "unix:/run/web.sock")
    endpoint = desired.connect("n120", guest.id) if desired.activate_network(record.id) else None
    assert endpoint is not None
    assert endpoint.addresses == ("10.120.0.192",), "out of the range"
    assert guest_interface(endpoint, record).gateways == ["10.120.0.1"], "the router there"


def test_a_network_of_an_older_database_stays_without_uplink(tmp_path: Path) -> None:
    with Store(tmp_path / "state") as store:
        record = create(DesiredState(store), 5, "5")
    with Store(tmp_path / "state") as store:
        DesiredState(store)
        found = store.network(record.id)
        assert found is not None
        assert found.uplink_addresses == ()


@pytest.mark.parametrize("tag", ["0", "4095", "-1", "1.5", "", "x", "0x10", "99999", "١"])
def test_tags_that_are_none(desired: DesiredState, tag: str) -> None:
    before = desired.store.dump()
    with pytest.raises(NetworkOptionError, match="1 to 4094"):
        create(desired, 1, tag)
    assert desired.store.dump() == before


@pytest.mark.parametrize("uplink", ["eth1:0", "a b", "", "x" * 16, "a,b", ".eth", "a/b"])
def test_cards_that_are_none(desired: DesiredState, uplink: str) -> None:
    with pytest.raises(NetworkOptionError, match="network card"):
        create(desired, 1, "1", more={OPTION_UPLINK: uplink})


def test_overlapping_tags_are_refused(desired: DesiredState) -> None:
    create(desired, 1, "120", "eth1")
    before = desired.store.dump()
    for uplink in ("eth1", ""):
        with pytest.raises(VlanTakenError, match="n1"):
            create(desired, 2, "120", uplink)
    assert desired.store.dump() == before
    create(desired, 3, "120", "eth2")
    create(desired, 4, "121", "eth1")
    create(desired, 5, "7")
    with pytest.raises(VlanTakenError, match="n5"):
        create(desired, 6, "7", "eth9")


def test_what_only_the_user_knows_must_be_given(desired: DesiredState) -> None:
    before = desired.store.dump()
    for options in (
        {"subnets": []},
        {"subnets": [subnet(1, gateway="")]},
        {"enable_ipv6": True},
        {"subnets": [subnet(1), SubnetOptions(subnet="fd00:1::/64")], "enable_ipv6": True},
    ):
        with pytest.raises(InvalidError, match="is a VLAN: give"):
            create(desired, 1, "1", **options)
    for more, reason in (
        ({"com.docker.network.bridge.gateway_mode_ipv4": "routed"}, "router of its own"),
        ({"taploom.vlan.colour": "red"}, "no such option"),
    ):
        with pytest.raises(NetworkOptionError, match=reason):
            create(desired, 1, "1", more=more)
    with pytest.raises(NetworkOptionError, match=r"give taploom\.vlan\.tag too"):
        desired.create_network("n1", NetworkOptions(options={OPTION_UPLINK: "eth1"}))
    assert desired.store.dump() == before
    internal = create(desired, 1, "1", subnets=[subnet(1, gateway="")], internal=True)
    assert internal.vlan == VlanPlace(1, "")


@given(st.dictionaries(st.sampled_from([OPTION_TAG, OPTION_UPLINK, "taploom.vlan.x", "other"]), st.text(max_size=20)))
def test_options_are_read_or_refused(options: dict[str, str]) -> None:
    try:
        check_options(options)
    except NetworkOptionError:
        return
    place = place_of(options)
    if place is None:
        assert not any(key.startswith("taploom.vlan") for key in options)
    else:
        # What passes here passes at the helper, and the other way round.
        assert parse_vlan(Vlan(tag=place.tag, uplink=place.uplink)) == VlanSpec(place.tag, place.uplink)


@given(st.integers(0, 2**32 - 1), st.text(max_size=20))
def test_the_helper_reads_or_refuses(tag: int, uplink: str) -> None:
    try:
        spec = parse_vlan(Vlan(tag=tag, uplink=uplink))
    except InvalidSpecError:
        return
    assert spec == VlanSpec(tag, uplink)
    check_options({OPTION_TAG: str(tag)} | ({OPTION_UPLINK: uplink} if uplink else {}))


def test_names_of_bridges_are_the_kernels(tmp_path: Path) -> None:
    names = {bridge_name(card) for card in ("eth1", "eth2", "enp0s31f6.longer")}
    assert len(names) == 3
    assert all(len(name) <= 15 and name.startswith("tlv") for name in names)


def carried(parent: str = "base", tag: str = "20", **options: Any) -> EndpointOptions:
    return EndpointOptions(driver_options={OPTION_PARENT: parent, OPTION_TAG: tag}, **options)


def test_endpoints_over_another(desired: DesiredState) -> None:
    for name in ("base", "inner", "third"):
        desired.activate_network(desired.create_network(name).id)
    guest = desired.register_guest("vm", "unix:/run/vm.sock")
    with pytest.raises(NotConnectedError):
        desired.connect("inner", "vm", carried())
    base = desired.connect("base", "vm")
    before = desired.store.dump()
    for network, options, error in (
        ("inner", carried(tag="0"), EndpointOptionError),
        ("inner", carried(tag="4095"), EndpointOptionError),
        ("inner", carried("nowhere"), NetworkNotFoundError),
        ("inner", carried("inner"), InvalidError),
        ("inner", EndpointOptions(driver_options={OPTION_PARENT: "base"}), EndpointOptionError),
        ("inner", EndpointOptions(driver_options={OPTION_TAG: "20"}), EndpointOptionError),
        ("inner", EndpointOptions(driver_options={"taploom.vlan.x": "20"}), EndpointOptionError),
    ):
        with pytest.raises(error):
            desired.connect(network, "vm", options)
    assert desired.store.dump() == before
    # Named by its id, it is known by its name from then on.
    inner = desired.connect("inner", "vm", carried(base.network_id[:12]))
    assert inner.carried == Carried("base", 20)
    assert inner.interface_name == f"{base.interface_name}.20"
    assert inner.mac_address == base.mac_address
    assert desired.store.carrier_of(inner) == base
    assert desired.store.carrier_of(base) is None
    with pytest.raises(TakenError, match="inner"):
        desired.connect("third", "vm", carried())
    with pytest.raises(PreconditionError, match="not nested"):
        desired.connect("third", "vm", carried("inner", "21"))
    mac = "02:00:00:00:00:77"
    third = desired.connect("third", "vm", carried(tag="21", mac_address=mac))
    assert third.mac_address == mac
    assert set(desired.store.carried_by(base)) == {inner.id, third.id}
    assert desired.store.carried_by(inner) == []
    desired.disconnect("base", "vm")
    assert set(desired.store.carried_by(base)) == {inner.id, third.id}
    assert desired.store.carrier_of(inner) is None
    assert desired.store.carrier_of(third) is None
    again = desired.connect("base", "vm")
    assert desired.store.carrier_of(inner) == again
    desired.remove_guest(guest.id)
    assert desired.store.endpoints() == []


def test_a_card_carries_several_networks(desired: DesiredState) -> None:
    for name in ("base", "inner"):
        desired.activate_network(desired.create_network(name).id)
    guest = desired.register_guest("vm", "qemu:/run/vm.sock")
    desired.connect("base", "vm")
    with pytest.raises(PreconditionError, match="one network card"):
        desired.connect("inner", "vm")
    inner = desired.connect("inner", "vm", carried())
    assert inner.mac_address == guest.settings.card_mac


@given(st.integers(0, 2**32 - 1), st.text(max_size=70))
def test_the_helper_reads_or_refuses_children(tag: int, parent: str) -> None:
    try:
        spec = parse_child(TrunkChild(parent_endpoint_id=parent, tag=tag))
    except InvalidSpecError:
        return
    assert spec == ChildSpec(parent, tag)
    assert carried_of({OPTION_PARENT: "base", OPTION_TAG: str(tag)}) == Carried("base", tag)
