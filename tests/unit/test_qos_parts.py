"""Limits and marks: how they are written, what makes no sense, what comes before what, what the helper makes of it."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_helper.errors import InvalidSpecError
from agent_helper.qos import MAX_RATE, MIN_BURST, MIN_RATE, QosRuleSpec, parse_qos
from agent_helper.qos_counters import Limited, meters_of, parse_meters
from host_bridge.commands.qos import shown_burst, shown_rate
from host_bridge.desired import DesiredState
from host_bridge.errors import InvalidError
from host_bridge.model import EndpointOptions, NetworkOptions
from host_bridge.qos import model
from host_bridge.qos.model import IN, OUT, Said, checked, from_options, parse_burst, parse_dscp, parse_rate
from host_bridge.qos.state import QosNotFoundError
from host_bridge.store import Store
from taploom.contracts.taploom.helper.v1 import Qos, QosDirection, QosRule


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("10mbit", 10_000_000),
        ("1.5Gbit/s", 1_500_000_000),
        ("800000", 800_000),
        ("64 kbit", 64_000),
        ("10m", 10_000_000),
    ],
)
def test_rates(text: str, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    ("text", "burst"), [("200k", 200_000), ("64KiB", 65_536), ("1mb", 1_000_000), ("2mbit", 250_000), ("70000", 70_000)]
)
def test_bursts(text: str, burst: int) -> None:
    assert parse_burst(text) == burst


@pytest.mark.parametrize("text", ["", "fast", "-1mbit", "10mbps", "10 mbit extra", "1e6", "10tbit", "١mbit", "1kbyte"])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(InvalidError, match=r"rate .* is malformed"):
        parse_rate(text)


@given(st.text(max_size=12))
def test_any_text(text: str) -> None:
    for parse in (parse_rate, parse_burst, parse_dscp):
        try:
            assert parse(text) >= 0
        except InvalidError as error:
            assert str(error)


@given(st.integers(MIN_RATE, MAX_RATE))
def test_shown_as_given(rate: int) -> None:
    assert abs(parse_rate(shown_rate(rate)) - rate) <= rate * 1e-6
    burst = model.default_burst(rate)
    assert MIN_BURST <= burst <= model.MAX_BURST
    assert abs(parse_burst(shown_burst(burst)) - burst) <= 1


def test_both_ends_agree_on_ranges() -> None:
    assert (model.MIN_RATE, model.MAX_RATE, model.MIN_BURST) == (MIN_RATE, MAX_RATE, MIN_BURST)


def test_directions() -> None:
    both = checked("", rate=10_000_000, burst=None, dscp=46)
    assert both == {OUT: Said(10_000_000, 250_000, 46), IN: Said(10_000_000, 250_000, None)}
    assert checked("", rate=None, burst=None, dscp=0) == {OUT: Said(dscp=0)}
    assert checked(IN, rate=8_000, burst=66_000, dscp=None) == {IN: Said(8_000, 66_000)}


def test_options() -> None:
    options = {"taploom.qos.rate": "10mbit", "taploom.qos.in.rate": "20mbit", "taploom.qos.dscp": "46", "other": "x"}
    found = from_options(options)
    assert found == {OUT: Said(10_000_000, 250_000, 46), IN: Said(20_000_000, 500_000, None)}
    assert from_options({"com.docker.network.driver.mtu": "1400"}) == {}
    for key, value in (
        ("taploom.qos.color", "1"),
        ("taploom.qos.up.rate", "1mbit"),
        ("taploom.qos.burst", "100k"),
        ("taploom.qos.in.dscp", "1"),
        ("taploom.qos.rate", ""),
        ("taploom.qos.", "1"),
    ):
        with pytest.raises(InvalidError, match=r"taploom\.qos\."):
            from_options({key: value})


def test_what_comes_before_what(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        desired = DesiredState(store)
        network = desired.create_network("app", NetworkOptions(options={"taploom.qos.rate": "1mbit"}))
        desired.activate_network(network.id)
        guest = desired.register_guest("web", "vsock:3")
        endpoint = desired.connect("app", "web", EndpointOptions(driver_options={"taploom.qos.out.rate": "2mbit"}))
        desired.activate_endpoint(endpoint.id)

        def rates() -> tuple[int | None, int | None]:
            found = desired.qos.in_force(endpoint, network)
            return found[OUT].rate, found[IN].rate

        assert rates() == (2_000_000, 1_000_000)
        desired.qos.set(network.id, "", {OUT: Said(3_000_000, 80_000), IN: Said(3_000_000, 80_000)})
        assert rates() == (2_000_000, 3_000_000)
        desired.qos.set(network.id, guest.id, {OUT: Said(4_000_000, 80_000)})
        assert rates() == (4_000_000, 3_000_000)
        # What is not given stays.
        entry = desired.qos.set(network.id, guest.id, {OUT: Said(dscp=8)})
        assert (entry.said[OUT], entry.from_options) == (Said(4_000_000, 80_000, 8), frozenset())
        message = desired.qos.message(endpoint, network)
        assert message is not None
        assert [(rule.direction, rule.rate_bits_per_second, rule.dscp) for rule in message.rules] == [
            (QosDirection.OUT, 4_000_000, 8),
            (QosDirection.IN, 3_000_000, None),
        ]
        desired.qos.remove(network.id, guest.id, "", "web on app")
        assert rates() == (2_000_000, 3_000_000)
        with pytest.raises(InvalidError, match="comes from its driver options"):
            desired.qos.remove(network.id, guest.id, OUT, "web on app")
        with pytest.raises(QosNotFoundError, match="nothing is said of web on app"):
            desired.qos.remove(network.id, guest.id, IN, "web on app")
        # It goes with the connection.
        desired.qos.set(network.id, guest.id, {IN: Said(9_000_000, 80_000)})
        desired.disconnect("app", "web")
        assert (network.id, guest.id) not in store.qos()
        desired.delete_network("app")
        store.forget_qos()
        assert store.qos() == {}


def test_a_change_that_fails_is_undone(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        desired = DesiredState(store)
        network = desired.create_network("app")
        with pytest.raises(ZeroDivisionError), store.change():
            store.put_qos(network.id, "", OUT, Said(8_000, 66_000))
            assert store.qos()
            raise ZeroDivisionError
        assert store.qos() == {}


def rule(**fields: object) -> Qos:
    values: dict[str, object] = {
        "direction": QosDirection.OUT,
        "rate_bits_per_second": 10_000_000,
        "burst_bytes": 66_000,
    }
    return Qos(rules=[QosRule(**(values | fields))])  # type: ignore[arg-type]


def test_what_the_helper_takes() -> None:
    assert parse_qos(None).rules == ()
    assert parse_qos(rule(rate_bits_per_second=10_000_001, dscp=0)).rules == (QosRuleSpec(False, 10_001, 528, 0),)
    wrong = [
        rule(direction=QosDirection.UNSPECIFIED),
        rule(rate_bits_per_second=1),
        rule(rate_bits_per_second=MAX_RATE + 1),
        rule(burst_bytes=65_999),
        rule(rate_bits_per_second=0),
        rule(dscp=64),
        rule(dscp=1, direction=QosDirection.IN),
        rule(rate_bits_per_second=0, burst_bytes=0),
        Qos(rules=[*rule().rules, *rule().rules]),
    ]
    for one in wrong:
        with pytest.raises(InvalidSpecError, match=r"^qos: "):
            parse_qos(one)


def test_meters() -> None:
    flow = "c8b3d9a7-78ec-4ca6-827f-fd521ceeac6e"
    listed = f"__string: uuid {flow} kbps burst stats bands=type=drop rate=500000 burst_size=50000: 12\ntl_log__3f: 1\n"
    assert meters_of(listed) == {flow: 12}
    one = struct.pack("!IH6xIQQIIQQ", 12, 56, 1, 100, 150_000, 3, 4, 10, 14_000)
    assert parse_meters(one + one[:3] + b"\x0d" + one[4:]) == {
        12: Limited(90, 136_000, 10, 14_000),
        13: Limited(90, 136_000, 10, 14_000),
    }
    assert parse_meters(b"") == {}
    with pytest.raises(ValueError, match="malformed"):
        parse_meters(struct.pack("!IH6xIQQII", 1, 0, 0, 0, 0, 0, 0))
    with pytest.raises(struct.error):
        parse_meters(one[:-1])
