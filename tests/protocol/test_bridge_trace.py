"""What the bridge tells of connections by what it knows itself, and with helpers that cannot or do not answer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from bridge_support import Rig, open_rig
from test_bridge_fabric import connect, create

from host_bridge.balancer.publishing import BalancerPorts
from host_bridge.errors import GuestNotFoundError, InvalidError, PreconditionError
from host_bridge.ports import PortPublisher
from host_bridge.trace.question import question
from host_bridge.trace.tracer import ConnectionTracer
from taploom.contracts.taploom.bridge.v1 import TraceVerdict
from taploom.contracts.taploom.helper import v1 as helper
from taploom.link import open_dataplane


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path, upstreams=("9.9.9.9",)) as rig:
        yield rig


@pytest.fixture
async def tracer(rig: Rig) -> AsyncIterator[ConnectionTracer]:
    async with open_dataplane() as dataplane:
        publisher = PortPublisher(rig.fabric.helper, dataplane, is_gateway=lambda _: False)
        yield ConnectionTracer(rig.fabric, publisher, BalancerPorts(publisher, lambda _: ()))


async def test_names_routes_and_links(rig: Rig, tracer: ConnectionTracer) -> None:
    await create(rig)
    for name in ("web", "db"):
        await rig.guest(name)

    async def told(source: str, target: str, port: int = 80) -> tuple[TraceVerdict, str]:
        found = await tracer.trace(question(source, target, "tcp", port, 0))
        return found.verdict, found.summary

    assert (await told("web", "db"))[1].endswith("web is on no network")
    web = await connect(rig, "app", "web")
    verdict, text = await told("web", "db")
    assert verdict == TraceVerdict.STOPS
    assert text.endswith("no network that web is on knows db (asked: app): guest db is on no network: NXDOMAIN")
    db = await connect(rig, "app", "db")
    verdict, text = await told("web", "elsewhere.example")
    assert verdict == TraceVerdict.UNSPECIFIED, "what an upstream server answers is not known here"
    assert "9.9.9.9 is asked for it" in text
    verdict, text = await told(web.addresses[0].partition("/")[0], web.addresses[0].partition("/")[0])
    assert verdict == TraceVerdict.PASSES, "its own"
    verdict, text = await told("web", "2001:db8::1")
    assert (verdict, text.rpartition(": ")[2]) == (TraceVerdict.STOPS, "it has no IPv6 address")
    # This helper says that it can, and does not.
    verdict, text = await told("web", "db")
    assert verdict == TraceVerdict.UNSPECIFIED
    assert "the helper cannot say what becomes of it" in text
    # An agent that goes takes its link with it.
    await rig.guests["web"].stop()
    await rig.until(lambda: not rig.link("web", "app").up and not rig.peer("web").connected)
    found = await tracer.trace(question("web", db.addresses[0].partition("/")[0], "tcp", 80, 0))
    assert found.verdict == TraceVerdict.STOPS
    assert "the link of web on app is down: " in found.summary
    assert found.steps[0].text.startswith("note: the agent of web does not answer (")


async def test_refusals(rig: Rig, tracer: ConnectionTracer) -> None:
    with pytest.raises(GuestNotFoundError):
        await tracer.trace(question("nosuch", "db", "", 80, 0))
    with pytest.raises(InvalidError, match=r"nobody has the address 10\.0\.0\.1"):
        await tracer.trace(question("10.0.0.1", "db", "", 80, 0))
    rig.helper.features.remove(helper.HelperFeature.TRACE)
    await rig.helper.stop()
    await rig.nursery.start(rig.helper.run)
    await rig.until(lambda: rig.fabric.helper.lacks(helper.HelperFeature.TRACE))
    with pytest.raises(PreconditionError, match="too old to follow packets"):
        await tracer.trace(question("host", "db", "", 80, 0))


async def test_from_outside(rig: Rig, tracer: ConnectionTracer) -> None:
    await create(rig)
    await rig.guest("web")
    await connect(rig, "app", "web")
    for target, protocol, why in (
        ("web", "tcp", "tcp 80 of web is not published (it has published nothing)"),
        ("localhost", "udp", "the host has not published udp 80 there"),
        ("nosuch", "tcp", "nosuch is no guest, no load balancer and no address of the host"),
    ):
        found = await tracer.trace(question("host", target, protocol, 80, 0))
        assert (found.verdict, why in found.summary) == (TraceVerdict.STOPS, True), found.summary
    found = await tracer.trace(question("outside", "web", "icmp", 0, 0))
    assert "nothing but published TCP and UDP ports is reached" in found.summary
