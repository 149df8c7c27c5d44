"""Following connections: what ovn-trace prints as values, names and routes as guests have them, questions, words."""

from __future__ import annotations

import datetime

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_helper.ovn_trace import Flow, NoFlow, Output, Pipeline, Translation, backends, parse
from host_bridge.commands.trace import split_target
from host_bridge.errors import InvalidError
from host_bridge.model import EndpointRecord, GuestRecord, GuestSettings, NetworkRecord, SubnetRecord
from host_bridge.policy.state import RuleRef
from host_bridge.trace.question import conclude, question
from host_bridge.trace.ways import Place, name_order, resolve, route
from host_bridge.trace.words import PASSES, STOPS, UNKNOWN, Teller, step
from taploom.contracts.taploom.bridge.v1 import TracePath, TraceResponse, TraceTopic
from taploom.contracts.taploom.helper import v1 as helper

NOW = datetime.datetime(2026, 11, 22, tzinfo=datetime.UTC)

# Of OVN 23.03, cut.
TEXT = """\
# tcp,reg14=0x3,vlan_tci=0x0000,dl_src=02:42:ac:12:00:02,dl_dst=02:42:ac:12:00:03,nw_src=172.18.0.2,tp_dst=5432

ingress(dp="net-a", inport="ep-1")
----------------------------------
 0. ls_in_check_port_sec (northd.c:8432): 1, priority 50, uuid 8e28113e
    reg0[15] = check_in_port_sec();
    next;
 6. ls_in_pre_stateful (northd.c:6140): reg0[0] == 1, priority 100, uuid 56787d09
    ct_next;

ct_next(ct_state=new|trk)
-------------------------
 8. ls_in_acl (northd.c:6365): (reg0[9] == 1) && inport == @tlg_g7 && tcp.dst == {1}, priority 5201, uuid dc337b77
    reg0 = 0;
    reject { outport <-> inport; next(pipeline=ingress, table=25); };

egress(dp="net-a", inport="ep-1", outport="to-gw-a")
----------------------------------------------------
 9. ls_out_apply_port_sec (northd.c:5777): 1, priority 0, uuid d494315c
    output;
    /* output to "to-gw-a", type "l3gateway" */

ct_snat(ip4.src=169.254.128.3)
------------------------------
ct_dnat(ip6.dst=fd00::7)
------------------------
12. lr_in_ip_routing: no match (implicit drop)
 7. lr_in_dnat (northd.c:1): ct.new && ip4, priority 120, uuid 01234567
    flags.force_snat_for_lb = 1;
    ct_lb_mark(backends=10.0.0.2:80,10.0.0.3:80; hash_fields="ip_dst,ip_src");
"""


def test_what_ovn_trace_prints() -> None:
    events = parse(TEXT)
    assert [type(event) for event in events] == [
        *(Pipeline, Flow, Flow, Flow, Pipeline, Flow, Output, Translation, Translation, NoFlow, Flow),
    ]
    assert events[0] == Pipeline(True, "net-a", "ep-1")
    acl = events[3]
    assert isinstance(acl, Flow)
    assert (acl.stage, acl.uuid) == ("ls_in_acl", "dc337b77")
    assert acl.actions[1].startswith("reject {")
    assert events[4] == Pipeline(False, "net-a", "ep-1", "to-gw-a")
    assert events[6] == Output("to-gw-a", "l3gateway")
    assert events[7:10] == [
        Translation(False, "169.254.128.3"),
        Translation(True, "fd00::7"),
        NoFlow("lr_in_ip_routing"),
    ]
    balancer = events[10]
    assert isinstance(balancer, Flow)
    assert backends(balancer.actions) == ["10.0.0.2:80", "10.0.0.3:80"]
    assert backends(acl.actions) == []


@given(st.text())
def test_any_text_is_parsed(text: str) -> None:
    parse(text)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("db:5432", "db", 5432),
        ("db", "db", 0),
        ("10.0.0.1:80", "10.0.0.1", 80),
        ("fd00::1", "fd00::1", 0),
        ("[fd00::1]", "fd00::1", 0),
        ("[fd00::1]:80", "fd00::1", 80),
        ("host:65535", "host", 65535),
    ],
)
def test_a_target(text: str, host: str, port: int) -> None:
    assert split_target(text) == (host, port)


@pytest.mark.parametrize(
    "text", ["", ":80", "db:", "db:x", "db:0", "db:65536", "db:-1", "[fd00::1", "[fd00::1]80", "[]:1"]
)
def test_no_target(text: str) -> None:
    with pytest.raises(click.UsageError):
        split_target(text)


@given(st.text())
def test_any_target(text: str) -> None:
    try:
        host, port = split_target(text)
    except click.UsageError:
        return
    assert host
    assert 0 <= port < 1 << 16


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("web", "db", "sctp", 1, 0), "use tcp, udp or icmp"),
        (("web", "db", "icmp", 1, 0), "no ports"),
        (("web", "db", "udp", 0, 0), "udp needs a port"),
        (("web", "db", "tcp", 70000, 0), "from 1 to 65535"),
        (("web", "db", "", 1, 5), "use 4 or 6"),
        (("", "db", "", 1, 0), "source '' is neither"),
        (("web", "a b", "", 1, 0), "target 'a b' is neither"),
        (("web", "x" * 256, "", 1, 0), "is neither"),
        (("web", "d\nb", "", 1, 0), "is neither"),
        (("web", "::1", "", 1, 4), "::1 is no IPv4 address"),
    ],
)
def test_a_wrong_question(arguments: tuple[str, str, str, int, int], why: str) -> None:
    with pytest.raises(InvalidError, match=why.replace("'", ".")):
        question(*arguments)


def test_what_is_meant_without_a_protocol() -> None:
    assert question("web", "db", "", 80, 0).service == "tcp 80"
    assert question("web", "db", "", 0, 0).service == "icmp"


def network(name: str, number: int, *, six: bool = False, internal: bool = False, dns: bool = True) -> NetworkRecord:
    subnets = [SubnetRecord(4, f"10.0.{number}.0/24", f"10.0.{number}.1")]
    if six:
        subnets.append(SubnetRecord(6, f"fd00:{number}::/64", f"fd00:{number}::1"))
    return NetworkRecord(
        id=name * 8,
        name=name,
        internal=internal,
        mtu=1500,
        created_at=NOW,
        active=True,
        dns_server="169.254.1.1" if dns else "",
        gateway_mac="02:00:00:00:00:01",
        dns_mac="02:00:00:00:00:02",
        subnets=tuple(subnets),
    )


def guest(name: str, **settings: object) -> GuestRecord:
    return GuestRecord(name * 8, name, "unix:/x", "unix:/y", NOW, GuestSettings(**settings))  # type: ignore[arg-type]


def place(who: GuestRecord, where: NetworkRecord, host: int, **more: object) -> Place:
    addresses = tuple(subnet.gateway[:-1] + str(host) for subnet in where.subnets)
    endpoint = EndpointRecord(
        id=f"{who.name}-{where.name}",
        network_id=where.id,
        guest_id=who.id,
        interface_name="eth0",
        mac_address="02:00:00:00:00:09",
        gateway_priority=int(more.pop("priority", 0)),  # type: ignore[call-overload]
        created_at=NOW,
        active=True,
        addresses=addresses,
        **more,  # type: ignore[arg-type]
    )
    return Place(endpoint, who, where)


def test_names() -> None:
    app, back, bridge = network("app", 1, six=True), network("back", 2, internal=True), network("zz", 3, dns=False)
    web = guest("web", hostname="web-host", extra_hosts=(("out there", "192.0.2.9"),))
    db, other = guest("db"), guest("other")
    own = [
        place(web, back, 2),
        place(web, app, 2, links=(("store", "db"),)),
        place(web, bridge, 2),
    ]
    everybody = [
        *own,
        place(db, app, 3, aliases=("Postgres", "shared")),
        place(other, back, 3, aliases=("shared", "db")),
        place(other, bridge, 3),
    ]
    assert [one.network.name for one in name_order(own)] == ["app", "zz", "back"]

    def found(name: str) -> tuple[tuple[str, ...], str] | None:
        resolved = resolve(name, web, own, everybody)
        return None if resolved is None else (resolved.addresses, resolved.how)

    both = ("10.0.1.3", "fd00:1::3")
    assert found("db") == (both, "network app knows it as the name of the guest")
    assert found("DB.app.") == (both, "network app knows it as the name of the guest")
    assert found("postgres") == (both, "network app knows it as an alias of db")
    assert found("shared") == (both, "network app knows it as an alias of db")
    assert found("db.back") == (("10.0.2.3",), "network back knows it as an alias of other")
    assert found("other") == (("10.0.2.3",), "network back knows it as the name of the guest")
    assert found("store") == (both, "a link of web on network app to db")
    assert found("there") == (("192.0.2.9",), "its /etc/hosts has 192.0.2.9 for there")
    assert found("web-host") == (("10.0.2.2", "10.0.1.2", "fd00:1::2", "10.0.3.2"), "it is its own host name")
    assert found("nosuch") is None
    assert found("other.zz") is None


def test_routes() -> None:
    app, back, far = network("app", 1, six=True), network("back", 2, internal=True), network("far", 3)
    web = guest("web")
    own = [place(web, back, 2, priority=100), place(web, far, 2), place(web, app, 2)]
    direct = route("10.0.2.77", own)
    assert direct is not None
    assert (direct.place.network.name, direct.direct) == ("back", True)
    assert direct.why == "10.0.2.77 is in its subnet 10.0.2.0/24"
    out = route("192.0.2.1", own)
    assert out is not None
    assert (out.place.network.name, out.direct) == ("app", False)
    assert (
        out.why == "of those with the highest gateway priority it has both families: the default route is by 10.0.1.1"
    )
    six = route("2001:db8::1", own)
    assert six is not None
    assert six.why == "it has the only way out, by fd00:1::1"
    own[1] = place(web, far, 2, priority=1)
    higher = route("192.0.2.1", own)
    assert higher is not None
    assert higher.place.network.name == "far"
    assert higher.why == "its gateway priority 1 is the highest: the default route is by 10.0.3.1"
    assert route("192.0.2.1", own[:1]) is None
    assert route("fd00:1::9", own[:2]) is None


def told(*hops: helper.TraceHop, outcome: helper.TraceOutcome) -> list[tuple[str, str, bool]]:
    """What is said of hops: topic, text, and whether it goes on."""
    app = network("app", 1)
    path = TracePath()
    teller = Teller(
        path,
        place(guest("web"), app, 2),
        place(guest("db"), app, 3),
        network_name=lambda network_id: {"n": "app"}.get(network_id, "?"),
        rule=lambda rule_id: RuleRef("g", "in", "r") if rule_id == "known" else None,
        denied_by=lambda who, direction: [f"{who.guest.name} {direction} is denied"],
    )
    teller.tell(helper.TracePacketResponse(hops=list(hops), outcome=outcome))
    return [((one.topic.name or "").lower(), one.text, one.verdict == PASSES) for one in path.steps]


def rule(rule_id: str, action: helper.PolicyAction, *, incoming: bool = True) -> helper.TraceHop:
    direction = helper.PolicyDirection.IN if incoming else helper.PolicyDirection.OUT
    return helper.TraceHop(rule=helper.TraceRule(rule_id=rule_id, direction=direction, action=action))


def test_words() -> None:
    actions, outcomes = helper.PolicyAction, helper.TraceOutcome
    assert told(outcome=outcomes.DELIVERED) == [
        ("policy", "out of web: no policy restricts it", True),
        ("policy", "into db: no policy restricts it", True),
    ]
    assert told(rule("known", actions.REJECT), outcome=outcomes.REJECTED)[1:] == [
        ("policy", "into db: rule r of group g rejects it", False)
    ]
    assert told(rule("rest-out", actions.DROP, incoming=False), outcome=outcomes.DROPPED) == [
        ("policy", "out of web: no rule allows it, and web out is denied", False)
    ]
    assert told(rule("gateway", actions.ALLOW), outcome=outcomes.DELIVERED)[1][1].startswith("into db: what comes from")
    assert told(rule("gone", actions.ALLOW), outcome=outcomes.DELIVERED)[1][1].endswith("just gone lets it pass")
    hops = [
        helper.TraceHop(router_of="n"),
        helper.TraceHop(translation=helper.TraceTranslation(address="192.0.2.1")),
        helper.TraceHop(backend=helper.TraceBackend(virtual_address="10.0.0.9:80", backend="10.0.0.2:80")),
        helper.TraceHop(isolated_network_id="n"),
    ]
    assert told(*hops, outcome=outcomes.DROPPED)[1:] == [
        ("route", "the gateway of app routes it", True),
        ("nat", "its source becomes 192.0.2.1", True),
        ("load_balancer", "the load balancer at 10.0.0.9:80 hands it to 10.0.0.2:80", True),
        ("isolation", "guests of app do not reach each other (enable_icc=false)", False),
    ]
    assert told(helper.TraceHop(end="no route"), outcome=outcomes.DROPPED)[1] == (
        *("isolation", "the gateway of app leads nowhere: the network has no way out", False),
    )
    # What a helper says is text of one line.
    assert "\n" not in told(helper.TraceHop(end="a\nb\x1b"), outcome=outcomes.DROPPED)[1][1]


def test_the_verdict() -> None:
    def verdict(*paths: list[object], steps: tuple[object, ...] = ()) -> tuple[object, str]:
        def said(number: int, what: object) -> object:
            return step(TraceTopic.LINK, f"reason {number}", what)  # type: ignore[arg-type]

        response = TraceResponse(
            steps=[said(9, one) for one in steps],  # type: ignore[misc]
            paths=[
                TracePath(destination_address=f"10.0.0.{number}", steps=[said(number, one) for one in path])  # type: ignore[misc]
                for number, path in enumerate(paths)
            ],
        )
        conclude(question("web", "db", "tcp", 80, 0), response)
        return response.verdict, response.summary

    assert verdict([PASSES], [STOPS]) == (PASSES, "tcp 80 from web to db passes (10.0.0.0)")
    assert verdict([PASSES, STOPS], [STOPS]) == (STOPS, "tcp 80 from web to db does not pass: reason 0")
    assert verdict([PASSES, UNKNOWN], [STOPS]) == (UNKNOWN, "tcp 80 from web to db cannot be told: reason 0")
    assert verdict(steps=(STOPS,)) == (STOPS, "tcp 80 from web to db does not pass: reason 9")
    assert verdict(steps=(UNKNOWN,)) == (UNKNOWN, "tcp 80 from web to db cannot be told: reason 9")
