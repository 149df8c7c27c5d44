"""Which ports of the host are taken, and what is said when they cannot be: dockerd 20.10's texts."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from host_bridge.errors import InvalidError
from host_bridge.ports import (
    AddressNotLocalError,
    NoPortLeftError,
    PortAllocatedError,
    PortAllocator,
    PortBinding,
    PortError,
    PortInUseError,
    ProtocolError,
)
from host_bridge.ports.allocator import BoundPort, ephemeral_range


class Ports:
    """An allocator whose sockets are closed at the end."""

    def __init__(self) -> None:
        self.allocator = PortAllocator()
        self.bound: list[BoundPort] = []

    def bind(self, *bindings: PortBinding) -> list[tuple[str, int]]:
        found = self.allocator.bind(bindings)
        self.bound += found
        return [(one.port.host_ip, one.port.host_port) for one in found]

    def free(self, host_port: int) -> None:
        for one in [one for one in self.bound if one.port.host_port == host_port]:
            self.allocator.free(one)
            self.bound.remove(one)

    def close(self) -> None:
        for one in self.bound:
            self.allocator.free(one)


@pytest.fixture
def ports() -> Iterator[Ports]:
    found = Ports()
    yield found
    found.close()


def free_ports(count: int) -> int:
    """The first of so many adjacent ports that nobody has, outside what the system gives out by itself."""
    for first in range(20_000, 30_000, count):
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                        sock = stack.enter_context(socket.socket(socket.AF_INET6, kind))
                        sock.bind(("::", port))
            except OSError:
                continue
            return first
    raise AssertionError("no port is free")


def test_both_families(ports: Ports) -> None:
    port = free_ports(1)
    assert ports.bind(PortBinding(80, host_port=port)) == [("0.0.0.0", port), ("::", port)]
    assert ports.bind(PortBinding(80, "udp", host_port=port)) == [("0.0.0.0", port), ("::", port)]
    for address in ("127.0.0.1", "::1"):
        socket.create_connection((address, port), 5).close()


def test_ephemeral_port_is_the_same_in_both_families(ports: Ports) -> None:
    first, last = ephemeral_range()
    (v4, port), (v6, again) = ports.bind(PortBinding(80))
    assert (v4, v6, again) == ("0.0.0.0", "::", port)
    assert first <= port <= last
    (_, following), _ = ports.bind(PortBinding(81))
    assert following > port
    # The next one, not the lowest: a port that was given back is not at once another container's.
    ports.free(port)
    (_, third), _ = ports.bind(PortBinding(82))
    assert third > following


def test_range(ports: Ports) -> None:
    first = free_ports(2)
    binding = PortBinding(80, host_port=first, host_port_end=first + 1)
    assert ports.bind(binding)[0][1] == first
    assert ports.bind(binding)[0][1] == first + 1
    with pytest.raises(NoPortLeftError, match=r"^all ports are allocated$"):
        ports.bind(binding)
    ports.free(first)
    assert ports.bind(binding)[0][1] == first


def test_range_skips_what_others_have(ports: Ports) -> None:
    first = free_ports(2)
    with socket.create_server(("", first)):
        assert ports.bind(PortBinding(80, host_port=first, host_port_end=first + 1))[0][1] == first + 1


def test_ours_already(ports: Ports) -> None:
    port = free_ports(1)
    ports.bind(PortBinding(80, host_port=port))
    with pytest.raises(PortAllocatedError) as caught:
        ports.bind(PortBinding(81, host_port=port))
    assert str(caught.value) == f"Bind for 0.0.0.0:{port} failed: port is already allocated"
    # On one address it is the system that refuses, as with dockerd.
    with pytest.raises(PortInUseError) as in_use:
        ports.bind(PortBinding(81, host_ip="127.0.0.1", host_port=port))
    assert str(in_use.value) == (
        f"Error starting userland proxy: listen tcp4 127.0.0.1:{port}: bind: address already in use"
    )
    ports.bind(PortBinding(81, "udp", host_port=port))


def test_ours_already_v6(ports: Ports) -> None:
    port = free_ports(1)
    ports.bind(PortBinding(80, host_ip="::1", host_port=port))
    with pytest.raises(PortAllocatedError, match=f"^Bind for ::1:{port} failed: port is already allocated$"):
        ports.bind(PortBinding(80, host_ip="0:0::1", host_port=port))


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_others_have_it(ports: Ports, protocol: str) -> None:
    port = free_ports(1)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM) as foreign:
        foreign.bind(("0.0.0.0", port))
        if protocol == "tcp":
            foreign.listen()
        with pytest.raises(PortInUseError) as caught:
            ports.bind(PortBinding(80, protocol, host_port=port))  # type: ignore[arg-type]
        assert str(caught.value) == (
            f"Error starting userland proxy: listen {protocol}4 0.0.0.0:{port}: bind: address already in use"
        )


def test_others_have_it_on_ipv6_only(ports: Ports) -> None:
    port = free_ports(1)
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as foreign:
        foreign.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        foreign.bind(("::", port))
        foreign.listen()
        with pytest.raises(PortInUseError, match=rf"listen tcp6 \[::\]:{port}: bind: address already in use"):
            ports.bind(PortBinding(80, host_port=port))
    # The IPv4 half was given back.
    ports.bind(PortBinding(80, host_ip="0.0.0.0", host_port=port))


@pytest.mark.parametrize(
    ("address", "shown"), [("192.0.2.1", "4 192.0.2.1:8080"), ("2001:db8::9", r"6 [2001:db8::9]:8080")]
)
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_not_our_address(ports: Ports, address: str, shown: str, protocol: str) -> None:
    with pytest.raises(AddressNotLocalError) as caught:
        ports.bind(PortBinding(80, protocol, host_ip=address, host_port=8080))  # type: ignore[arg-type]
    assert str(caught.value) == (
        f"Error starting userland proxy: listen {protocol}{shown}: bind: cannot assign requested address"
    )


def test_all_or_nothing(ports: Ports) -> None:
    first = free_ports(2)
    ports.bind(PortBinding(80, host_port=first + 1))
    with pytest.raises(PortAllocatedError):
        ports.bind(PortBinding(80, host_port=first), PortBinding(81, host_port=first + 1))
    ports.bind(PortBinding(80, host_port=first))
    with pytest.raises(PortAllocatedError):
        ports.bind(PortBinding(80, host_port=first + 2), PortBinding(81, host_port=first + 2))


def test_what_is_not_published(ports: Ports) -> None:
    with pytest.raises(ProtocolError, match="sctp"):
        ports.bind(PortBinding(80, "sctp", host_port=8080))  # type: ignore[arg-type]
    with pytest.raises(InvalidError):
        ports.bind(PortBinding(80, host_ip="localhost", host_port=8080))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_no_port_is_ever_given_twice_or_lost(data: st.DataObject) -> None:
    first = free_ports(8)
    ports = Ports()
    try:
        held: set[tuple[str, str, int]] = set()
        for _ in range(data.draw(st.integers(1, 30))):
            if ports.bound and data.draw(st.booleans()):
                one = data.draw(st.sampled_from(ports.bound))
                ports.allocator.free(one)
                ports.bound.remove(one)
                held.discard((one.port.host_ip, one.port.protocol, one.port.host_port))
                continue
            start = data.draw(st.integers(first, first + 7))
            binding = PortBinding(
                80,
                data.draw(st.sampled_from(["tcp", "udp"])),  # type: ignore[arg-type]
                data.draw(st.sampled_from(["", "127.0.0.1", "::1", "0.0.0.0"])),
                start,
                data.draw(st.integers(start, first + 7)),
            )
            before = len(ports.bound)
            try:
                ports.bind(binding)
            except PortError:
                assert len(ports.bound) == before
            for one in ports.bound[before:]:
                key = (one.port.host_ip, one.port.protocol, one.port.host_port)
                assert key not in held
                held.add(key)
        ports.close()
        ports.bound = []
        # Nothing is left of them: every port is free again.
        for port in range(first, first + 8):
            ports.bind(PortBinding(80, host_port=port), PortBinding(80, "udp", host_port=port))
    finally:
        ports.close()
