"""Policies as YAML: what is read, and what is refused, where and with which advice."""

from __future__ import annotations

import json
import string
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from host_bridge.documents import MAX_SIZE, DocumentError
from host_bridge.errors import InvalidError
from host_bridge.policy.check import MAX_ITEMS, check_defaults, check_together, checked_groups
from host_bridge.policy.document import read
from host_bridge.policy.messages import default_message, from_default, from_message, to_message
from host_bridge.policy.model import Group, Peer, Ports, Rule, from_json
from host_bridge.selectors import Selector
from host_bridge.sources import Source
from host_bridge.values import to_json
from taploom.contracts.taploom.bridge import v1 as bridge

EXAMPLE = """\
# A comment.
networks:
  app: deny
  back: deny-in

groups:
  web:
    members:
      - guest: web
      - {label: tier=front, network: app}
    in:
      - name: http
        protocol: tcp
        ports: [80, 8000-8010]
      - {from: {cidr: [10.0.0.0/8, 192.168.1.7]}, protocol: icmp, log: true}
    out:
      - {name: db, to: [{group: db}, host], protocol: tcp, ports: 5432, priority: 7}
  db:
    members: [{alias: postgres}, {group: more}]
    in: []
  more: {}
"""


def test_an_example() -> None:
    found = read(EXAMPLE)
    assert [(one.network, one.default, one.line) for one in found.networks] == [
        ("app", "deny", 3),
        ("back", "deny-in", 4),
    ]
    web, db, more = found.groups
    assert web.members == (Selector(guest="web"), Selector(label="tier=front", network="app"))
    assert web.incoming == (
        Rule("http", protocol="tcp", ports=(Ports(80, 80), Ports(8000, 8010))),
        Rule("", protocol="icmp", peers=(Peer(cidr="10.0.0.0/8"), Peer(cidr="192.168.1.7")), log=True),
    )
    assert web.outgoing == (
        Rule(
            "db",
            protocol="tcp",
            ports=(Ports(5432, 5432),),
            peers=(Peer(Selector(group="db")), Peer(host=True)),
            priority=7,
        ),
    )
    assert (db.incoming, db.outgoing, more.members) == ((), None, ())
    assert [web.line, db.line, more.line] == [7, 18, 21]
    assert web.incoming[0].ports[1].line == 14
    checked = checked_groups(Source(), found.groups)
    check_together(Source(), checked)
    rules = checked["web"].incoming
    assert rules is not None
    assert [rule.name for rule in rules] == ["http", "rule-2"]
    assert [peer.cidr for peer in rules[1].peers] == ["10.0.0.0/8", "192.168.1.7/32"]


# Each with the line and a part of the message.
WRONG = [
    ("", 1, "nothing in it"),
    ("groups: {a: {}\n", 2, "not YAML"),
    ("- a\n", 1, "a policy must be keys and values"),
    ("group: {}\n", 1, "'group' is not a key of a policy: use groups or networks"),
    ("groups:\n  a: {}\n  a: {}\n", 3, "'a' is given twice (first at line 2)"),
    ("groups: []\n", 1, "must be keys and values"),
    ("groups:\n  a:\n    members: {guest: x}\n", 3, "members must be a list"),
    ("groups:\n  a:\n    in:\n", 3, "write [] for none"),
    ("groups:\n  a:\n    in:\n      - {}\n", 4, "an empty rule"),
    ("groups:\n  a:\n    in:\n      - to: any\n", 4, "a rule of 'in' has 'from', not 'to'"),
    ("groups:\n  a:\n    in:\n      - form: any\n", 4, "'form' is not a key of a rule of 'in'"),
    ("groups:\n  a:\n    in:\n      - name: 12\n", 4, "name must be a text"),
    ("groups:\n  a:\n    in:\n      - name: ''\n", 4, "the rule's name is empty"),
    ("groups:\n  a:\n    in:\n      - action: deny\n", 4, "did you mean drop?"),
    ("groups:\n  a:\n    in:\n      - protocol: sctp\n", 4, "protocol cannot be 'sctp'"),
    ("groups:\n  a:\n    in:\n      - {protocol: tcp, ports: []}\n", 4, "leave it out for all ports"),
    ("groups:\n  a:\n    in:\n      - {protocol: tcp, ports: 22:22}\n", 4, "'22:22' is no port"),
    ("groups:\n  a:\n    in:\n      - {protocol: tcp, ports: [http]}\n", 4, "'http' is no port"),
    ("groups:\n  a:\n    in:\n      - {protocol: tcp, ports: -1}\n", 4, "'-1' is no port"),
    ("groups:\n  a:\n    in:\n      - {protocol: tcp, ports: {a: 1}}\n", 4, "must be a single value"),
    ("groups:\n  a:\n    in:\n      - from: everybody\n", 4, "'everybody' is nobody"),
    ("groups:\n  a:\n    in:\n      - from: []\n", 4, "has nobody"),
    ("groups:\n  a:\n    in:\n      - from: [any]\n", 4, "any stands by itself"),
    ("groups:\n  a:\n    in:\n      - from: {cidr: []}\n", 4, "has no subnet"),
    ("groups:\n  a:\n    in:\n      - from: {cidr: 10.0.0.0/8, group: a}\n", 4, "'group' is not a key of a peer"),
    ("groups:\n  a:\n    in:\n      - from: {guests: a}\n", 4, "'guests' is not a key"),
    ("groups:\n  a:\n    in:\n      - {priority: high}\n", 4, "priority must be a whole number"),
    ("groups:\n  a:\n    in:\n      - {priority: 1.5}\n", 4, "priority must be a whole number"),
    ("groups:\n  a:\n    in:\n      - {priority: -1}\n", 4, "priority must be a whole number"),
    ("groups:\n  a:\n    in:\n      - {log: yes}\n", 4, "log must be true or false"),
    ("groups:\n  a:\n    in:\n      - {log: 'true'}\n", 4, "log must be true or false"),
    ("groups:\n  a:\n    members:\n      - guest: ''\n", 4, "'guest' is empty"),
    ("groups:\n  a:\n    members:\n      - web\n", 4, "a member must be keys and values"),
    ("networks:\n  app: closed\n", 2, "cannot be 'closed': use allow, deny, deny-in or deny-out"),
    ("networks:\n  app: &x deny\n  back: *x\n", 2, "anchors and aliases"),
    ("networks: !!python/object:os.system {}\n", 1, "tag"),
    ("networks: {}\n---\ngroups: {}\n", 3, "a second document"),
    ("groups: {a: {in: [[" + "[" * 20 + "]" * 20 + "]]}}\n", 1, "levels"),
    ("groups:\n  a\x00: {}\n", 2, "is not allowed"),
    ("\n\ngroups:\n\t- a\n", 4, "not YAML"),
]


@pytest.mark.parametrize(("text", "line", "part"), WRONG, ids=[part for _, _, part in WRONG])
def test_refusals_of_the_text(text: str, line: int, part: str) -> None:
    with pytest.raises(DocumentError) as caught:
        read(text)
    assert part in str(caught.value)
    assert caught.value.line == line, str(caught.value)


BAD = [
    ("groups:\n  'a b': {}\n", 2, "group name 'a b' is not allowed"),
    ("groups:\n  a:\n    in:\n      - {name: a/b}\n", 4, "rule name 'a/b' is not allowed"),
    ("groups:\n  a:\n    in:\n      - {name: x}\n      - {name: x}\n", 5, "rule x is given twice"),
    ("groups:\n  a:\n    in:\n      - {ports: 80}\n", 4, "add 'protocol: tcp' or 'protocol: udp'"),
    ("groups:\n  a:\n    in:\n      - {protocol: icmp, ports: 80}\n", 4, "no protocol that has ports"),
    ("groups:\n  a:\n    in:\n      - {protocol: tcp, ports: 0}\n", 4, "out of range"),
    ("groups:\n  a:\n    in:\n      - {protocol: tcp, ports: 65536}\n", 4, "out of range"),
    ("groups:\n  a:\n    in:\n      - {protocol: tcp, ports: 90-80}\n", 4, "port range 90-80 is empty: write 80-90"),
    ("groups:\n  a:\n    in:\n      - protocol: udp\n        ports:\n          - 1-10\n          - 10\n", 7, "overlap"),
    ("groups:\n  a:\n    in:\n      - from: {cidr: 10.0.0.1/8}\n", 4, "write 10.0.0.0/8"),
    ("groups:\n  a:\n    in:\n      - from: {cidr: 10.0.0}\n", 4, "is not a subnet"),
    ("groups:\n  a:\n    in:\n      - from: {cidr: fe80::%1/64}\n", 4, "zone"),
    (
        "groups:\n  a:\n    in:\n      - from:\n          - cidr: 10.0.0.0/8\n          - cidr: fd00::/8\n",
        6,
        "mixes families",
    ),
    ("groups:\n  a:\n    in:\n      - {protocol: icmp, from: {cidr: fd00::/8}}\n", 4, "use icmpv6"),
    ("groups:\n  a:\n    in:\n      - {protocol: icmpv6, from: {cidr: 10.0.0.0/8}}\n", 4, "use icmp"),
    ("groups:\n  a:\n    in:\n      - {priority: 1001}\n", 4, "use 0 to 1000"),
    ("groups:\n  a:\n    in:\n      - from: {group: b}\n", 4, "names group 'b', which there is not"),
    ("groups:\n  a:\n    members:\n      - group: b\n", 4, "names group 'b', which there is not"),
    ("groups:\n  a:\n    members:\n      - {group: a, guest: x}\n", 4, "a group stands by itself: leave out guest"),
    ("groups:\n  a:\n    members:\n      - {}\n", 4, "selects nobody"),
    ("groups:\n  a:\n    members:\n      - label: =x\n", 4, "has no key"),
    ("groups:\n  a:\n    members: [{group: a}]\n", 3, "(a > a)"),
    (
        "groups:\n  a: {members: [{group: b}]}\n  b: {members: [{guest: x}, {group: c}]}\n"
        "  c:\n    members: [{group: a}]\n",
        5,
        "(a > b > c > a)",
    ),
    ("networks:\n  nowhere: deny\n", 2, "network 'nowhere' not found"),
]


@pytest.mark.parametrize(("text", "line", "part"), BAD, ids=[part for _, _, part in BAD])
def test_refusals_of_what_it_says(text: str, line: int, part: str) -> None:
    found = read(text)
    # By way of the contract, as the bridge has it.
    groups = [from_message(bridge.PolicyGroup.parse(bytes(to_message(group)))) for group in found.groups]
    source = Source("p.yaml")
    with pytest.raises(InvalidError) as caught:
        check_together(source, checked_groups(source, groups))
        check_defaults(source, [from_default(default_message(one)) for one in found.networks], ["app"])
    assert str(caught.value).startswith(f"p.yaml:{line}: "), str(caught.value)
    assert part in str(caught.value)


def test_limits() -> None:
    rules = tuple(Rule(f"r{n}") for n in range(5001))
    with pytest.raises(InvalidError, match="5001 rules are too many"):
        check_together(Source(), checked_groups(Source(), [Group("a", incoming=rules)]))
    members = tuple(Selector(guest=f"g{n}") for n in range(MAX_ITEMS + 1))
    with pytest.raises(InvalidError, match="use at most 256"):
        checked_groups(Source(), [Group("a", members)])
    with pytest.raises(DocumentError, match="characters"):
        read("#" * (MAX_SIZE + 1))


def test_a_long_chain_is_no_circle() -> None:
    chain = [Group(f"g{n}", (Selector(group=f"g{n + 1}"),)) for n in range(999)]
    check_together(Source(), checked_groups(Source(), [*chain, Group("g999")]))


NAMES = st.text(string.ascii_letters + string.digits, min_size=1, max_size=12).map(lambda text: "n" + text)
SELECTORS = st.builds(lambda key, value: {key: value}, st.sampled_from(("guest", "alias", "label", "network")), NAMES)
PEERS = st.one_of(SELECTORS, st.sampled_from([{"cidr": "10.0.0.0/8"}, {"cidr": "192.168.0.0/16"}, "host"]))


def _rules(side: str) -> st.SearchStrategy[list[dict[str, Any]]]:
    rule = st.fixed_dictionaries(
        {"protocol": st.sampled_from(("tcp", "udp"))},
        optional={
            "action": st.sampled_from(("allow", "drop", "reject")),
            "ports": st.lists(
                st.integers(0, 9).map(lambda n: f"{n * 100 + 1}-{n * 100 + 50}"), min_size=1, unique=True
            ),
            side: st.one_of(st.just("any"), st.lists(PEERS, min_size=1, max_size=4)),
            "priority": st.integers(0, 1000),
            "log": st.booleans(),
        },
    )
    return st.lists(rule, max_size=4)


DOCUMENTS = st.fixed_dictionaries(
    {
        "groups": st.dictionaries(
            NAMES,
            st.fixed_dictionaries(
                {"members": st.lists(SELECTORS, max_size=3)}, optional={"in": _rules("from"), "out": _rules("to")}
            ),
            max_size=4,
        )
    }
)


@given(DOCUMENTS)
@settings(max_examples=50, deadline=None)
def test_nothing_is_lost_on_the_way(value: dict[str, Any]) -> None:
    """Read, checked, sent over the contract, kept in the database: it is the same."""
    found = read(json.dumps(value, indent=1))
    assert [group.name for group in found.groups] == list(value["groups"])
    checked = checked_groups(Source(), found.groups)
    for name, group in checked.items():
        assert from_message(bridge.PolicyGroup.parse(bytes(to_message(group)))) == group
        assert from_json(name, to_json(group)) == group
        given_rules = value["groups"][name].get("in")
        assert (group.incoming is None) == (given_rules is None)
        for rule, text in zip(group.incoming or (), given_rules or (), strict=True):
            assert rule.action == text.get("action", "allow")
            assert [f"{p.first}-{p.last}" for p in rule.ports] == text.get("ports", [])
            assert rule.priority == text.get("priority", 100)
            assert rule.log is text.get("log", False)
            wanted = text.get("from", "any")
            assert len(rule.peers) == (0 if wanted == "any" else len(wanted))


@given(st.text(max_size=200))
@settings(max_examples=150, deadline=None)
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        read(text)
    except DocumentError as error:
        assert 1 <= error.line <= text.count("\n") + 2


@given(st.integers(0, len(EXAMPLE) - 1), st.text("{}[]:,-&*!|>'\"%@`# \nag0", min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_a_damaged_policy_is_read_or_refused(place: int, damage: str) -> None:
    try:
        groups = read(EXAMPLE[:place] + damage + EXAMPLE[place:]).groups
        check_together(Source(), checked_groups(Source(), groups))
    except (DocumentError, InvalidError):
        pass
