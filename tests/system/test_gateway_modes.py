"""What a network's gateway does in each family: whose addresses leave, and what comes in from outside, live."""

from __future__ import annotations

import contextlib
from functools import partial

import pytest
from test_helper_egress import INSIDE, INSIDE6, OUTER, OUTER6, answers, connected, join, listen, outgoing, peer_seen
from test_helper_rig import answered, endpoint, eventually
from test_policy_helper import rows

from taploom.contracts.taploom.helper.v1 import GatewayMode, OpenPort, PortProtocol

pytestmark = pytest.mark.system

WEB = [OpenPort(protocol=PortProtocol.TCP, port=80)]


async def test_routed_in_one_family_translated_in_the_other() -> None:
    async with connected() as (rig, net):
        net.run("ip", "route", "add", "10.77.0.0/16", "via", OUTER)
        net.run("ip", "route", "add", "fd00:77::/32", "via", OUTER6)
        before = rows(rig)
        routed = outgoing(1, gateway_mode_ipv6=GatewayMode.ROUTED)
        await rig.apply(routed, outgoing(2, gateway_mode_ipv6=GatewayMode.ROUTED))
        guest = await join(rig, 1, 2, "web")
        other = await join(rig, 2, 2)
        there = ("10.77.1.2", "fd00:77:1::2")
        with contextlib.ExitStack() as servers:
            for address in there:
                for port in (80, 81):
                    servers.enter_context(listen(guest.netns, address, port))
            for address, seen in ((INSIDE, OUTER), (INSIDE6, there[1])):
                with listen(net.netns, address, 80) as server:
                    assert peer_seen(server, guest.netns, address) == seen
            doors = [partial(answers, net.netns, address, port) for address in there for port in (80, 81)]
            assert await answered(*doors) == [False, False, False, False]
            # What is published is open where nothing is translated, and only that.
            await rig.apply(endpoint(1, 2, "web", ipv6=True, open_ports=WEB))
            assert await answered(*doors) == [False, False, True, False]
            assert net.run("ping", "-n", "-c1", "-W5", there[1])
            # Not from another network, which is routed too.
            assert not answers(other.netns, there[1], 80)
            await rig.apply(endpoint(1, 2, "web", ipv6=True))
            assert await answered(*doors) == [False, False, False, False]

            await rig.apply(outgoing(1, gateway_mode_ipv4=GatewayMode.NAT_UNPROTECTED))
            assert await answered(*doors) == [True, True, False, False]
            with listen(net.netns, INSIDE, 80) as server:
                assert peer_seen(server, guest.netns, INSIDE) == OUTER
            await rig.apply(outgoing(1))
            assert await answered(*doors) == [False, False, False, False]
        for number in (1, 2):
            await rig.delete_network(f"n{number}")
        assert rows(rig) == before


async def test_without_a_gateway() -> None:
    async with connected() as (rig, _):
        both = {"gateway_mode_ipv4": GatewayMode.ISOLATED, "gateway_mode_ipv6": GatewayMode.ISOLATED}
        inside = outgoing(1, internal=True, **both)
        await rig.apply(inside)
        guest = await join(rig, 1, 2)
        await join(rig, 1, 3, "db")
        assert guest.ping("10.77.1.3")
        assert guest.ping("fd00:77:1::3")
        assert not guest.ping("10.77.1.1", wait=1)
        assert not guest.ping("fd00:77:1::1", wait=1)
        assert guest.dig("169.254.64.1", "+short", "db.net1") == "10.77.1.3"
        # One family has it again; then both.
        await rig.apply(outgoing(1, internal=True, gateway_mode_ipv6=GatewayMode.ISOLATED))
        # The guest may still be asking for the address that nobody had.
        await eventually(lambda: guest.ping("10.77.1.1", wait=1))
        assert not guest.ping("fd00:77:1::1", wait=1)
        await rig.apply(outgoing(1, internal=True))
        await eventually(lambda: guest.ping("fd00:77:1::1", wait=1))
