"""The way out of the networks: address translation, both families, and who does not have it."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest
from test_helper_rig import Guest, Rig, endpoint, helper, network, sh

from taploom.contracts.taploom.helper.v1 import ApplyUplinkRequest, GetInfoRequest, HelperFeature, Network, Uplink

pytestmark = pytest.mark.system

UPLINK = Uplink(addresses=["169.254.128.1/18", "fd00:0:0:ffff::1/64"], mac_address="02:00:00:00:ff:01")
INSIDE, INSIDE6 = "198.51.100.1", "2001:db8:1::1"  # a server of the internet's
OUTER, OUTER6 = "192.0.2.2", "2001:db8::2"  # the helper's own address there


@dataclass
class Internet:
    """A namespace beside the helper's, which has its default routes there."""

    netns: str
    helper: str

    def run(self, *args: str, check: bool = True) -> str:
        return sh("ip", "netns", "exec", self.netns, *args, check=check)


@contextlib.contextmanager
def internet(rig: Rig) -> Iterator[Internet]:
    """An internet for the helper: INSIDE and INSIDE6 on the far side of a link on which the helper is OUTER."""
    name = f"tlti{secrets.token_hex(4)}"
    sh("ip", "netns", "add", name)
    try:
        peer = ("peer", "name", "up0", "netns", name)
        sh("ip", "-n", rig.netns, "link", "add", "nic0", "type", "veth", *peer)
        for netns, interface, v4, v6 in (
            (rig.netns, "nic0", OUTER, OUTER6),
            (name, "up0", "192.0.2.1", "2001:db8::1"),
            (name, "lo", INSIDE, INSIDE6),
        ):
            wide = interface != "lo"
            sh("ip", "-n", netns, "addr", "add", f"{v4}/{24 if wide else 32}", "dev", interface)
            sh("ip", "-n", netns, "addr", "add", f"{v6}/{64 if wide else 128}", "dev", interface, "nodad")
            sh("ip", "-n", netns, "link", "set", interface, "up")
        sh("ip", "-n", rig.netns, "route", "add", "default", "via", "192.0.2.1")
        sh("ip", "-n", rig.netns, "route", "add", "default", "via", "2001:db8::1")
        yield Internet(name, rig.netns)
    finally:
        sh("ip", "netns", "del", name, check=False)


def outgoing(number: int, **fields: object) -> Network:
    """Network `n<number>` of both families, with a leg on the uplink."""
    values: dict[str, object] = {
        "uplink_addresses": [f"169.254.128.{number + 1}/18", f"fd00:0:0:ffff::{number + 1:x}/64"],
        "uplink_mac": f"02:00:00:00:ff:{number + 1:02x}",
    }
    return network(number, ipv6=True, **(values | fields))


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[tuple[Rig, Internet]]:
    async with helper() as rig:
        with internet(rig) as net:
            await rig.client.apply_uplink(ApplyUplinkRequest(uplink=UPLINK), timeout=20)
            yield rig, net


async def join(rig: Rig, number: int, host: int, *names: str, **fields: object) -> Guest:
    """A guest with default routes to its gateways."""
    guest = await rig.guest(
        endpoint(number, host, *names, ipv6=True), gateway=f"10.77.{number}.1", dns=f"169.254.64.{number}", **fields
    )
    guest.run("ip", "route", "add", "default", "via", f"fd00:77:{number}::1")
    return guest


async def test_a_guest_reaches_the_internet_with_the_helpers_address() -> None:
    async with connected() as (rig, _):
        assert HelperFeature.EGRESS in (await rig.client.get_info(GetInfoRequest())).features
        await rig.apply(outgoing(1))
        guest = await join(rig, 1, 2, "web")
        assert guest.ping(INSIDE), rig.log()
        assert guest.ping(INSIDE6)
        assert guest.ping("10.77.1.1")
