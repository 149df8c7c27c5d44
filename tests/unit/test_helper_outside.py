"""The helper VM's own way out, as the command line has it."""

from __future__ import annotations

import pytest

from agent_helper.errors import SetupError
from agent_helper.outside import parse_outside


def test_an_address_with_its_gateways() -> None:
    found = parse_outside("192.0.2.2/24,192.0.2.1,2001:db8::2/64,2001:db8::1,eth1")
    assert [str(address) for address in found.addresses] == ["192.0.2.2/24", "2001:db8::2/64"]
    assert [str(gateway) for gateway in found.gateways] == ["192.0.2.1", "2001:db8::1"]
    assert (found.interface, found.dhcp) == ("eth1", False)


def test_dhcp_and_nothing() -> None:
    assert parse_outside("dhcp").dhcp
    assert parse_outside("dhcp,eth1").interface == "eth1"
    assert not parse_outside("none").dhcp
    assert parse_outside("kernel").dhcp  # no kernel that runs this has taploom.net=


@pytest.mark.parametrize(
    "text",
    ["", "192.0.2.2", "192.0.2.2/99", "dhcp,192.0.2.2/24", "dhcp,192.0.2.1", "192.0.2.2/24,192.0.2.1,192.0.2.3", "?"],
)
def test_what_is_wrong_is_said(text: str) -> None:
    with pytest.raises(SetupError, match="way out"):
        parse_outside(text)
