"""Addresses as text."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taploom.address import (
    Address,
    AddressError,
    FdAddress,
    HybridAddress,
    UnixAddress,
    VsockAddress,
    data_address,
    parse_address,
    refuse_cid,
    refuse_uid,
)

ports = st.integers(0, 0xFFFFFFFE)
paths = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=25).map(lambda t: "/" + t)
addresses = st.one_of(
    st.builds(VsockAddress, st.integers(0, 0xFFFFFFFF), ports),
    st.builds(HybridAddress, paths, ports),
    st.builds(UnixAddress, paths),
    st.builds(FdAddress, st.integers(0, 0x7FFFFFFF)),
)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("vsock:3:5555", VsockAddress(3, 5555)),
        ("vsock:any:5555", VsockAddress(0xFFFFFFFF, 5555)),
        ("hybrid:/run/vm/v.sock:5555", HybridAddress("/run/vm/v.sock", 5555)),
        ("hybrid:/run/a:b/v.sock:0", HybridAddress("/run/a:b/v.sock", 0)),
        ("unix:/run/taploom/control.sock", UnixAddress("/run/taploom/control.sock")),
        ("unix:/a:1", UnixAddress("/a:1")),
        ("fd:3", FdAddress(3)),
    ],
)
def test_parses_and_prints(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert str(address) == text


@given(addresses)
def test_round_trip(address: Address) -> None:
    assert parse_address(str(address)) == address


@given(st.text(max_size=40), st.one_of(st.none(), ports))
def test_any_text_parses_or_raises_address_error(text: str, port: int | None) -> None:
    try:
        address = parse_address(text, default_port=port)
    except AddressError as error:
        assert str(error)
    else:
        assert parse_address(str(address)) == address


@given(st.sampled_from(["vsock:", "hybrid:", "unix:", "fd:"]), st.text("/0123456789:any-+ .é\0", max_size=30))
def test_any_text_after_a_scheme_parses_or_raises_address_error(scheme: str, rest: str) -> None:
    try:
        address = parse_address(scheme + rest)
    except AddressError:
        return
    assert str(address) == scheme + rest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not one of vsock:CID:PORT"),
        ("/run/x.sock", "is not one of"),
        ("tcp:1:2", "is not one of"),
        ("vsock", "is not one of"),
        ("vsock:3", "needs a port"),
        ("vsock::5", "CID"),
        ("vsock:-1:5", "decimal"),
        ("vsock:03:5", "decimal"),
        ("vsock:4294967295:5", "write 'any'"),
        ("vsock:3:4294967295", "port"),
        ("vsock:3:5:6", "decimal"),
        ("vsock:3:٣", "decimal"),
        ("hybrid:/run/v.sock", "needs a port"),
        ("hybrid:v.sock:1", "absolute"),
        ("hybrid:/run/v.sock:x", "decimal"),
        ("unix:", "absolute"),
        ("unix:relative", "absolute"),
        ("unix:/a\0b", "NUL"),
        ("unix:/" + "x" * 107, "108 bytes"),
        ("fd:", "decimal"),
        ("fd:-1", "decimal"),
        ("fd:9999999999", "2147483647"),
    ],
)
def test_bad_addresses_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(AddressError, match=message):
        parse_address(text)


def test_default_port() -> None:
    assert parse_address("vsock:3", default_port=6000) == VsockAddress(3, 6000)
    assert parse_address("vsock:3:1", default_port=6000) == VsockAddress(3, 1)
    assert parse_address("hybrid:/v.sock", default_port=6000) == HybridAddress("/v.sock", 6000)
    assert parse_address("hybrid:/a:b", default_port=6000) == HybridAddress("/a:b", 6000)
    assert parse_address("hybrid:/v.sock:1", default_port=6000) == HybridAddress("/v.sock", 1)


def test_data_address() -> None:
    assert str(data_address(parse_address("unix:/run/x/control.sock"))) == "unix:/run/x/data.sock"
    assert str(data_address(parse_address("vsock:any:5555"))) == "vsock:any:5556"
    assert str(data_address(parse_address("hybrid:/v:6000"))) == "hybrid:/v:6001"
    with pytest.raises(AddressError, match="no default data address"):
        data_address(FdAddress(3))


def test_only_the_host_may_connect_on_vsock() -> None:
    assert refuse_cid((2, 1023)) is None
    for name in [(1, 5), (3, 5), (0xFFFFFFFF, 5), (0, 5)]:
        assert "not the host" in (refuse_cid(name) or "")
    for name in ["", b"", None, (2,), ("2", 3)]:
        assert refuse_cid(name) is not None


def test_only_allowed_users_may_connect() -> None:
    assert refuse_uid(0, frozenset({0, 7})) is None
    assert "user id 8" in (refuse_uid(8, frozenset({0, 7})) or "")


def test_imports_where_there_is_no_af_vsock() -> None:
    code = (
        "import socket\n"
        "for n in [n for n in vars(socket) if 'VSOCK' in n or 'VM_' in n or 'VMADDR' in n]: delattr(socket, n)\n"
        "socket.__all__ = [n for n in socket.__all__ if hasattr(socket, n)]\n"
        "import sys; sys.modules['pyroute2'] = None\n"
        "import taploom.address as a, taploom.link\n"
        "try: a._vsock_family()\n"
        "except a.AddressError as e: print(e)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "no AF_VSOCK" in result.stdout
