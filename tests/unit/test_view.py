"""What people look at: rates, the topology put together, its drawing and page, and the table of rates."""

from __future__ import annotations

import datetime
import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from host_bridge.view.canvas import cut, rows, text_width
from host_bridge.view.drawing import summary, to_svg
from host_bridge.view.page import to_page
from host_bridge.view.rates import Rates, bits, octets, rates_between
from host_bridge.view.table import ORDERS, render
from host_bridge.view.table import rows as table_rows
from host_bridge.view.topology import Net, Place, Shared, Topology, topology
from host_bridge.view.tree import tree
from taploom.contracts.taploom.bridge import v1 as bridge

NOW = datetime.datetime(2026, 11, 22, 8, 0, tzinfo=datetime.UTC)
SVG = "{http://www.w3.org/2000/svg}"
EVIL = '"><script>alert(1)</script>&amp;]]>\x1b[31m\x00\u202e'


def endpoint(guest: str, network: str, number: int, **more: object) -> bridge.Endpoint:
    return bridge.Endpoint(
        id=f"{guest}-{network}".ljust(64, "0"),
        guest_name=guest,
        network_name=network,
        interface_name="eth0",
        mac_address="02:42:0a:00:00:02",
        addresses=[f"10.0.0.{number}/24"],
        link_up=True,
        **more,  # type: ignore[arg-type]
    )


def status(seconds: float, **carried: tuple[int, int, int]) -> bridge.Status:
    """Of endpoints on `app`: bytes sent, bytes received, drops. Frames are of 100 bytes."""
    return bridge.Status(
        time=NOW + datetime.timedelta(seconds=seconds),
        converged=True,
        links=[
            bridge.Link(
                endpoint=endpoint(guest, "app", 2),
                up=True,
                tx_bytes=sent,
                rx_bytes=received,
                tx_frames=sent // 100,
                rx_frames=received // 100,
                drops=drops,
            )
            for guest, (sent, received, drops) in carried.items()
        ],
    )


def printed(what: RenderableType, width: int = 160) -> str:
    console = Console(width=width, file=io.StringIO())
    with console.capture() as capture:
        console.print(what)
    return capture.get()


def test_rates() -> None:
    before, now = status(0, web=(1000, 0, 1), old=(500, 0, 0)), status(2, web=(3000, 400, 5), new=(9, 9, 9))
    assert list(rates_between(before, now).values()) == [Rates(8000, 1600, 10, 2, 2)]
    # Counters that started again are no negative rate; no time is no rate.
    assert rates_between(now, status(3, web=(0, 0, 0)))[endpoint("web", "app", 2).id] == Rates()
    assert rates_between(before, before) == {}


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 bit/s"), (999, "999 bit/s"), (1500, "1.5 kbit/s"), (2.5e9, "2.50 Gbit/s")]
)
def test_figures(number: float, text: str) -> None:
    assert bits(number) == text
    assert octets(1500) == "1.5 kB"
    assert octets(12) == "12 B"


def test_put_together() -> None:
    networks = [
        bridge.Network(
            id="n" * 64,
            name="app",
            subnets=["10.0.0.0/24"],
            gateways=["10.0.0.1"],
            driver="bridge",
            mtu=1500,
            uplink_addresses=["192.0.2.2/24"],
            options={"com.docker.network.bridge.enable_icc": "false"},
            endpoints=[endpoint("web", "app", 2), endpoint("db", "app", 3)],
        ),
        bridge.Network(id="i" * 64, name="back", internal=True, driver="bridge", mtu=9000),
        bridge.Network(
            id="r" * 64,
            name="routed",
            uplink_addresses=["192.0.2.3/24"],
            options={"com.docker.network.bridge.enable_ip_masquerade": "false"},
        ),
        bridge.Network(
            id="m" * 64,
            name="mixed",
            uplink_addresses=["192.0.2.4/24", "2001:db8::4/64"],
            options={"com.docker.network.bridge.gateway_mode_ipv6": "routed"},
        ),
        bridge.Network(id="h" * 64, name="host", driver="host"),
    ]
    networks[0].endpoints[1].link_up = False
    networks[0].endpoints[1].qos = [
        bridge.QosRule(direction=bridge.QosDirection.OUT, rate_bits_per_second=1_500_000),
        bridge.QosRule(direction=bridge.QosDirection.IN, dscp=4),
    ]
    now, before = status(1, web=(1250, 0, 0), db=(0, 0, 0)), status(0, web=(0, 0, 0))
    now.links[1].problem = "the agent of db does not answer"
    guests = [
        bridge.Guest(name="web", connected=True, endpoints=[endpoint("web", "app", 2)]),
        bridge.Guest(name="late", connected=False),
    ]
    policy = bridge.ListPolicyResponse(
        groups=[
            bridge.PolicyGroupSummary(name="front", members=["web@app"]),
            bridge.PolicyGroupSummary(name="all", members=["db@app", "web@app"]),
        ],
        networks=[bridge.NetworkPolicy(network="back", default=bridge.PolicyDefault.DENY_IN)],
    )
    balancer = bridge.BalancerStatus(
        balancer=bridge.Balancer(
            name="shop",
            ports=[bridge.BalancerPort(port=80, protocol="tcp"), bridge.BalancerPort(port=53, protocol="udp")],
        ),
        addresses=[
            bridge.BalancerAddress(network="app", address="10.0.0.254"),
            bridge.BalancerAddress(network="back", address="10.1.0.254"),
        ],
        backends=[
            bridge.BackendState(guest_name="web", health=bridge.BackendHealth.UP),
            bridge.BackendState(guest_name="db", health=bridge.BackendHealth.DOWN),
        ],
        published=[bridge.BalancerPublish(host_ip="::1", host_port=8080)],
    )
    found = topology(networks, guests, policy, now, before, balancers=[balancer])
    assert [(n.name, n.ways_out, n.isolated, n.internal, n.policy) for n in found.networks] == [
        ("app", {4: "nat"}, True, False, "allow"),
        ("back", {}, False, True, "deny-in"),
        ("mixed", {4: "nat", 6: "routed"}, False, False, "allow"),
        ("routed", {4: "routed"}, False, False, "allow"),
    ]
    assert "5.0 kbit/s switched" in summary(found)
    networks[0].endpoints[0].driver_options = {"taploom.vlan.parent": "back"}
    carried = topology(networks, guests, policy, now, before, balancers=[balancer])
    assert "switched" not in summary(carried), "what carries it has the same frames"
    web, db = found.networks[0].places
    assert (web.groups, web.rates, web.problem) == (("front", "all"), Rates(10000, 0, 12, 0, 0), "")
    assert (db.groups, db.up, db.problem) == (("all",), False, "the agent of db does not answer")
    assert (found.unconnected, found.down) == (("late",), ("late",))
    text = printed(tree(found), 200)
    assert re.search(r"app  10\.0\.0\.0/24  isolated\n.*gateway  10\.0\.0\.1  to the outside, with the helper's", text)
    assert "● web  eth0 10.0.0.2/24  in front, all  ↑ 10.0 kbit/s ↓ 0 bit/s" in text
    assert "○ db  eth0 10.0.0.3/24  in all  at most ↑ 1.5 Mbit/s  the agent of db does not answer" in text
    assert "○ late" in text
    shop = "load balancer  shop  10.0.0.254 port 80 53/udp, from the host at [::1]:8080, to db (down), web"
    assert shop in text
    assert "shop  10.1.0.254 port 80" in text
    assert "to the outside, IPv4 with the helper's address, IPv6 with the guests' own addresses" in text


def fabric(counts: list[int], name: str = "", lines: int = 1) -> Topology:
    """Networks with so many endpoints each; everything that users name is `name`, if given."""
    networks = []
    for number, count in enumerate(counts):
        places = [
            Place(
                id="e" * 64,
                guest=name or f"guest-{index}",
                interface=name or "eth0",
                mac_address="02:42:0a:00:00:02",
                addresses=("10.100.200.2/24", "fd85:c58:48e5:1234:5678:9abc:def0:1234/64")[:lines],
                aliases=(name,) if name else (),
                up=index % 3 > 0,
                problem="" if index % 3 else "its agent does not answer: connection refused; trying again",
                groups=(name, "others") if name else (),
                sent_limit=index * 1_000_000,
                rates=Rates(10.0**index, 1, 1, 1) if index % 2 else None,
            )
            for index in range(count)
        ]
        networks.append(
            Net(
                id="n" * 64,
                name=name or f"network-{number}",
                subnets=("10.100.200.0/24", "fd85:c58:48e5:1234::/64")[:lines],
                gateways=("10.100.200.1", "fd85:c58:48e5:1234::1")[:lines],
                ways_out=({4: "nat", 6: "routed"}, {}, {4: "routed"})[number % 3],
                internal=number % 2 == 1,
                isolated=number % 2 == 1,
                policy=("allow", "deny")[number % 2],
                mtu=1500 + number,
                labels={name: name} if name else {},
                places=tuple(places),
                balancers=tuple(
                    Shared(name or f"lb{n}", ("10.100.200.254",), ("80", "53/udp"), ("web", name or "db"), ("web",), ())
                    for n in range(number % 3)
                ),
            )
        )
    pending = ((name, name),) if name else ()
    return Topology(NOW, not pending, tuple(networks), (name or "alone", "other"), (), (), pending)


def boxes(element: ET.Element, x: float = 0, y: float = 0) -> Iterator[tuple[str, float, float, float, float]]:
    """Every line of text: itself, left, top, right, bottom."""
    moved = re.fullmatch(r"translate\(([\d.-]+) ([\d.-]+)\)", element.get("transform", ""))
    if moved:
        x, y = x + float(moved[1]), y + float(moved[2])
    if element.tag == f"{SVG}text":
        text, size = element.text or "", float(element.get("font-size", "0"))
        classes = element.get("class", "").split()
        width = text_width(text, size, mono="mono" in classes, bold="bold" in classes)
        left = x + float(element.get("x", "0"))
        left -= {"end": width, "middle": width / 2}.get(element.get("text-anchor", ""), 0)
        base = y + float(element.get("y", "0"))
        yield text, left, base - size * 0.75, left + width, base + size * 0.22
    for child in element:
        yield from boxes(child, x, y)


def assert_legible(found: Topology) -> None:
    root = ET.fromstring(to_svg(found))
    _, _, width, height = map(float, root.get("viewBox", "").split())
    texts = list(boxes(root))
    for number, (text, left, top, right, bottom) in enumerate(texts):
        assert left >= 0, text
        assert right <= width, text
        assert 0 <= top < bottom <= height, text
        for other, left2, top2, right2, bottom2 in texts[number + 1 :]:
            apart = right <= left2 or right2 <= left or bottom <= top2 or bottom2 <= top
            assert apart, f"{text!r} and {other!r} are drawn over one another"


@pytest.mark.parametrize("lines", [1, 2])
@pytest.mark.parametrize("counts", [[], [0], [1], [60], [4, 0, 1, 7], [1] * 12], ids=str)
def test_no_text_is_drawn_over_another(counts: list[int], lines: int) -> None:
    assert_legible(fabric(counts, lines=lines))


@settings(max_examples=25, deadline=None)
@given(st.text(min_size=1, max_size=300), st.lists(st.integers(0, 9), max_size=4), st.integers(1, 2))
def test_any_text(name: str, counts: list[int], lines: int) -> None:
    found = fabric(counts, name, lines)
    assert_legible(found)
    assert to_page(found).count("<script>") == 1


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [name for name, _ in attrs if name in ("src", "href", "xlink:href", "action", "data")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_hostile_names_are_text() -> None:
    found = fabric([2, 1], EVIL)
    shown = EVIL.replace("\x1b", "?").replace("\x00", "?").replace("\u202e", "?")
    root = ET.fromstring(to_svg(found))
    assert not list(root.iter(f"{SVG}script"))
    titles = [element.text or "" for element in root.iter(f"{SVG}title")]
    assert any(title.startswith(f"{shown}, ") for title in titles)
    page = _Page()
    page.feed(to_page(found))
    assert page.tags == {
        *("html", "head", "meta", "title", "style", "body", "header", "input", "button", "main", "div", "script"),
        *("svg", "g", "rect", "circle", "path", "text"),
    }
    # Nothing is loaded, nothing runs but the page's own script.
    assert (page.links, page.handlers) == ([], [])
    assert not any(ord(c) < 32 and c not in "\n" for text in page.texts for c in text)


def test_a_table_of_rates() -> None:
    before = status(0, a=(0, 0, 0), b=(0, 0, 7), c=(9000, 0, 0))
    now = status(1, a=(2000, 0, 0), b=(0, 3000, 7), c=(9000, 0, 0))
    first = {order: table_rows(before, now, order)[0].guest for order in ORDERS}
    assert first == {
        "rate": "b",
        "sent": "a",
        "received": "b",
        "frames": "b",
        "drops": "b",
        "total": "c",
        "name": "a",
    }
    lines = printed(render(table_rows(before, now, "sent"), "sent")).splitlines()
    assert lines[0] == "16.0 kbit/s from guests, 24.0 kbit/s to guests  3 endpoints, 0 down; sorted by sent"
    assert lines[3].split()[:6] == ["a", "app", "eth0", "up", "16.0", "kbit/s"]
    # What goes over another endpoint's link is in that one's figures too.
    for link in now.links:
        if link.endpoint is not None and link.endpoint.guest_name == "b":
            link.endpoint.driver_options = {"taploom.vlan.parent": "app"}
    heading = printed(render(table_rows(before, now, "sent"), "sent")).splitlines()[0]
    assert heading.startswith("16.0 kbit/s from guests, 0 bit/s to guests  3 endpoints")


@pytest.mark.parametrize("room", [6, 10, 24, 40, 70])
def test_a_table_fits_the_terminal(room: int) -> None:
    carried = {f"g{number}": (number, 0, 0) for number in range(60)}
    found = table_rows(status(0, **carried), status(1, **carried), "name")
    lines = printed(render(found, "name", room=room, hints=True)).splitlines()
    assert len(lines) <= room
    assert any(line.startswith("and ") for line in lines) == (room < 65)


@given(st.text(), st.floats(0, 300), st.floats(6, 20), st.booleans(), st.booleans())
def test_cut(text: str, width: float, size: float, mono: bool, bold: bool) -> None:
    found = cut(text, width, size, mono=mono, bold=bold)
    if text_width(text, size, mono=mono, bold=bold) <= width:
        assert found == text
    else:
        assert found == "…" or text_width(found, size, mono=mono, bold=bold) <= width


def test_rows() -> None:
    assert rows([("a", 4), ("b", 4), ("c", 4)], 10, 1) == [["a", "b"], ["c"]]
    assert rows([("a", 40), ("b", 4)], 10, 1) == [["a"], ["b"]]
