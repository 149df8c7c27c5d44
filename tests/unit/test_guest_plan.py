"""Plans: applying one to a model of the kernel gives what was wanted, and then there is nothing left to do."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network

from hypothesis import given
from hypothesis import strategies as st

from agent_guest import plan
from agent_guest.spec import InterfaceSpec, RouteSpec
from agent_guest.state import AddressState, IpInterface, LinkState, RouteState


def spec(number: int, **changes: object) -> InterfaceSpec:
    values: dict[str, object] = {
        "endpoint_id": f"ep{number}",
        "name": f"eth{number}",
        "mac": f"02:42:ac:12:00:{number:02x}",
        "addresses": (ip_interface(f"172.{18 + number}.0.2/16"),),
        "gateways": (ip_address(f"172.{18 + number}.0.1"),),
        "priority": 0,
        "routes": (),
        "mtu": 1500,
        "network_name": f"net{number}",
        "dns_servers": (ip_address(f"169.254.64.{number + 1}"),),
        **changes,
    }
    return InterfaceSpec(**values)  # type: ignore[arg-type]


class Model:
    """Addresses and routes as the kernel would have them after steps."""

    def __init__(self, addresses: list[AddressState], routes: list[RouteState]) -> None:
        self.addresses = list(addresses)
        self.routes = list(routes)

    def run(self, steps: list[plan.Step]) -> None:
        for step in steps:
            match step:
                case plan.AddAddress(address):
                    assert all(
                        address.address.version == 4 or other.address.ip != address.address.ip
                        for other in self.addresses
                        if other.index == address.index
                    )
                    self.addresses.append(address)
                case plan.RemoveAddress(address):
                    self.addresses.remove(address)
                case plan.ReplaceRoute(route):
                    for index, other in enumerate(self.routes):
                        if (other.destination, other.metric) == (route.destination, route.metric):
                            self.routes[index] = route
                            break
                    else:
                        self.routes.append(route)
                case plan.RemoveRoute(route):
                    if route in self.routes:  # the kernel says ESRCH, which is success
                        self.routes.remove(route)
                case plan.SetLink():
                    raise AssertionError(step)


address_texts = st.sampled_from(
    ["172.18.0.2/16", "172.18.0.2/24", "172.18.0.3/16", "fd00::2/64", "fd00::2/80", "fd00::3/64"]
)
interfaces = st.lists(address_texts, unique_by=lambda text: text.split("/")[0], max_size=4).map(
    lambda texts: tuple(ip_interface(text) for text in texts)
)


@given(interfaces, interfaces, st.booleans())
def test_addresses_become_those_wanted_and_nothing_right_is_touched(
    wanted: tuple[IpInterface, ...], current: tuple[IpInterface, ...], failed: bool
) -> None:
    described = spec(0, addresses=wanted)
    states = [AddressState(7, address, failed=failed and address.version == 6) for address in current]
    foreign = AddressState(8, ip_interface("10.0.0.1/8"))
    model = Model([*states, foreign], [])
    steps = plan.plan_addresses(described, 7, model.addresses)
    for step in steps:
        if isinstance(step, plan.RemoveAddress):
            assert step.address.failed or step.address.address not in plan.wanted_addresses(described)
    model.run(steps)
    assert foreign in model.addresses
    mine = {state.address for state in model.addresses if state.index == 7}
    assert mine == set(plan.wanted_addresses(described))
    assert plan.plan_addresses(described, 7, model.addresses) == []


def test_additions_come_before_removals() -> None:
    steps = plan.plan_addresses(
        spec(0, addresses=(ip_interface("172.18.0.9/16"),)), 7, [AddressState(7, ip_interface("172.18.0.2/16"))]
    )
    assert [type(step) for step in steps] == [plan.AddAddress, plan.RemoveAddress]


def test_repair_leaves_additional_addresses() -> None:
    states = [AddressState(7, ip_interface("10.9.9.9/32"))]
    steps = plan.plan_addresses(spec(0), 7, states, remove_others=False)
    assert [str(step) for step in steps] == ["address 172.18.0.2/16 added"]


def test_the_link_local_address_is_that_of_the_mac() -> None:
    assert str(plan.link_local("02:42:ac:12:00:02")) == "fe80::42:acff:fe12:2/64"


def test_a_link_is_changed_only_where_it_differs() -> None:
    right = LinkState(7, "eth0", "02:42:ac:12:00:00", 1500, up=True, alias="taploom:ep0")
    assert plan.plan_link(spec(0), right, "taploom:ep0") == []
    wrong = LinkState(7, "eth0", "02:42:ac:12:00:00", 1400, up=False, alias="taploom:ep0")
    assert plan.plan_link(spec(0), wrong, "taploom:ep0") == [plan.SetLink(7, mtu=1500, up=True)]


@st.composite
def networks(draw: st.DrawFn) -> dict[int, InterfaceSpec]:
    found = {}
    for number in draw(st.lists(st.integers(0, 5), unique=True, max_size=4)):
        gateways = [ip_address(f"172.{18 + number}.0.1"), ip_address(f"fd00:{number}::1")]
        found[10 + number] = spec(
            number,
            addresses=(ip_interface(f"172.{18 + number}.0.2/16"), ip_interface(f"fd00:{number}::2/64")),
            gateways=tuple(draw(st.lists(st.sampled_from(gateways), unique=True))),
            priority=draw(st.integers(-1, 1)),
            routes=draw(st.sampled_from([(), (RouteSpec(ip_network(f"10.{number}.0.0/16"), None),)])),
            network_name=draw(st.sampled_from(["a", "b", "Z", "ä"])),
        )
    return found


def defaults(routes: list[RouteState], version: int) -> list[RouteState]:
    return [route for route in routes if route.destination == plan.DEFAULT_DESTINATION[version]]


@given(st.lists(networks(), min_size=1, max_size=4))
def test_routes_follow_the_networks_with_one_default_each_family(history: list[dict[int, InterfaceSpec]]) -> None:
    users = RouteState(ip_network("192.0.2.0/24"), ip_address("172.18.0.7"), 10, 0, plan.PROTOCOL_BOOT)
    model = Model([], [users])
    for specs in history:
        gone = [route for route in model.routes if route.index not in specs and route is not users]
        steps = plan.plan_routes(specs, model.routes)
        model.run(steps)
        model.routes = [route for route in model.routes if route not in gone]
        assert plan.plan_routes(specs, model.routes) == []
        assert users in model.routes
        for version in (4, 6):
            found = defaults(model.routes, version)
            order = plan.route_order(specs.values(), version)
            assert len(found) == bool(order)
            if order:
                assert specs[found[0].index] is order[0]
                best = max(s.priority for s in specs.values() if s.gateway(version))
                assert order[0].priority == best


@given(networks().filter(bool), st.data())
def test_what_one_change_needs_is_seen_on_few_links(wanted: dict[int, InterfaceSpec], data: st.DataObject) -> None:
    """Interfaces come, change and go one by one; only the routes over the links in question are read."""
    specs: dict[int, InterfaceSpec] = {}
    model = Model([], [])
    for _ in range(6):
        index = data.draw(st.sampled_from(sorted(wanted)))
        if index in specs and data.draw(st.booleans()):
            del specs[index]
            changed: set[int] = set()
        else:
            specs[index] = replace(wanted[index], priority=data.draw(st.integers(-1, 1)))
            changed = {index}
        over = (plan.default_links(specs) | changed) & specs.keys()
        model.run(plan.plan_routes(specs, [route for route in model.routes if route.index in over], over))
        model.routes = [route for route in model.routes if route.index in specs]
        assert plan.plan_routes(specs, model.routes) == []


@given(networks(), networks())
def test_the_default_route_is_replaced_never_removed_first(
    before: dict[int, InterfaceSpec], after: dict[int, InterfaceSpec]
) -> None:
    model = Model([], [])
    model.run(plan.plan_routes(before, model.routes))
    for version in (4, 6):
        if not defaults(model.routes, version) or not plan.route_order(after.values(), version):
            continue
        trial = Model([], model.routes)
        for step in plan.plan_routes({**{i: s for i, s in before.items() if i in after}, **after}, model.routes):
            trial.run([step])
            assert defaults(trial.routes, version)


def test_ties_go_by_the_networks_name_in_byte_order() -> None:
    order = plan.route_order([spec(0, network_name="a"), spec(1, network_name="Z"), spec(2, network_name="ä")], 4)
    assert [s.network_name for s in order] == ["Z", "a", "ä"]


def test_names_are_asked_in_gateway_order_with_internal_networks_last() -> None:
    order = plan.name_order(
        [
            spec(0, network_name="a", gateways=()),
            spec(1, network_name="b"),
            spec(2, network_name="c", priority=1, gateways=()),
        ]
    )
    assert [s.network_name for s in order] == ["c", "b", "a"]


def test_a_link_local_server_needs_no_route() -> None:
    assert plan.wanted_routes({7: spec(0, gateways=(), dns_servers=(ip_address("fe80::53"),))}) == []
