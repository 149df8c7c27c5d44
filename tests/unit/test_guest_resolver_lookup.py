"""Docker's rules of name resolution, without a socket."""

from __future__ import annotations

import ipaddress
from dataclasses import replace

import dns.message
import dns.name
import dns.rcode
from hypothesis import given
from hypothesis import strategies as st

from agent_guest.resolver import wire
from agent_guest.resolver.lookup import (
    SILENT,
    UNKNOWN,
    Known,
    Lookup,
    NetworkResult,
    NetworkView,
    Next,
    confirmed,
    name_links,
    needs_confirmation,
    read_network_reply,
)

NETWORKS = (
    NetworkView(
        "app", "eth0", ("169.254.64.1",), (ipaddress.ip_address("172.18.0.2"), ipaddress.ip_address("fd00::2"))
    ),
    NetworkView("back", "eth1", ("169.254.64.2",), (ipaddress.ip_address("172.19.0.2"),)),
)
ONE, TWO = ipaddress.ip_address("172.18.0.3"), ipaddress.ip_address("172.19.0.3")


def start(name: str, qtype: str = "A", *, upstreams: int = 0, hostname: str = "", rdclass: str = "IN") -> Lookup:
    query = wire.parse_query(dns.message.make_query(name, qtype, rdclass=rdclass).to_wire())
    return Lookup(query, NETWORKS, hostname, upstreams, shuffle=lambda records: None)


def reply(lookup: Lookup) -> dns.message.Message:
    assert lookup.next is Next.DONE
    return dns.message.from_wire(lookup.answer())


def found(lookup: Lookup) -> list[str]:
    return [item.to_text() for rrset in reply(lookup).answer for item in rrset]


def known(*records: wire.Record) -> NetworkResult:
    return NetworkResult(Known.YES, records)


def test_the_first_network_that_knows_the_name_wins_whoever_answers_first() -> None:
    lookup = start("db")
    lookup.network_result(1, known(TWO))
    assert lookup.next is Next.NETWORKS and lookup.held_up() and lookup.unanswered() == [0]
    lookup.network_result(0, known(ONE))
    assert found(lookup) == ["172.18.0.3"]


def test_the_first_network_does_not_wait_for_the_others() -> None:
    lookup = start("db")
    lookup.network_result(0, known(ONE))
    assert found(lookup) == ["172.18.0.3"]


def test_a_silent_network_is_passed_over() -> None:
    lookup = start("db")
    lookup.network_result(1, known(TWO))
    lookup.network_result(0, SILENT)
    assert found(lookup) == ["172.19.0.3"]


def test_a_name_known_without_the_asked_family_is_an_empty_answer() -> None:
    lookup = start("db", "AAAA", upstreams=1)
    lookup.network_result(0, known())
    assert reply(lookup).rcode() == dns.rcode.NOERROR and found(lookup) == []


def test_other_types_of_a_known_name_are_empty_and_of_an_unknown_one_forwarded() -> None:
    for qtype in ("MX", "TXT", "SRV", "HTTPS", "ANY", "PTR"):
        lookup = start("db", qtype, upstreams=1)
        assert lookup.network_qtype == wire.A
        lookup.network_result(0, known(ONE))
        assert reply(lookup).rcode() == dns.rcode.NOERROR and found(lookup) == []
        lookup = start("db", qtype, upstreams=1)
        lookup.network_result(0, UNKNOWN)
        lookup.network_result(1, UNKNOWN)
        assert lookup.next is Next.UPSTREAM


def test_reverse_names_are_asked_as_such() -> None:
    lookup = start("3.0.18.172.in-addr.arpa", "PTR")
    assert lookup.network_qtype == wire.PTR
    lookup.network_result(0, known(dns.name.from_text("db.app")))
    assert found(lookup) == ["db.app."]


def test_unknown_names_without_upstream_do_not_exist() -> None:
    lookup = start("nobody")
    lookup.network_result(0, UNKNOWN)
    lookup.network_result(1, UNKNOWN)
    assert reply(lookup).rcode() == dns.rcode.NXDOMAIN


def test_a_silent_network_may_know_the_name_so_its_absence_is_not_claimed() -> None:
    for name, rcode in (("db", "SERVFAIL"), ("db.app", "SERVFAIL"), ("www.example.com", "NXDOMAIN")):
        lookup = start(name)
        lookup.network_result(0, SILENT)
        lookup.network_result(1, UNKNOWN)
        assert dns.rcode.to_text(reply(lookup).rcode()) == rcode
        lookup = start(name, upstreams=1)
        lookup.network_result(0, SILENT)
        lookup.network_result(1, UNKNOWN)
        lookup.upstream_result(wire.answer(lookup.query, wire.NXDOMAIN))
        assert dns.rcode.to_text(reply(lookup).rcode()) == rcode


def test_upstreams_are_asked_in_turn_until_one_answers() -> None:
    lookup = start("example.com", upstreams=3)
    lookup.network_result(0, UNKNOWN)
    lookup.network_result(1, UNKNOWN)
    asked = []
    for result in (None, wire.answer(lookup.query, wire.REFUSED), wire.answer(lookup.query, wire.NOERROR, (ONE,))):
        assert lookup.next is Next.UPSTREAM
        asked.append(lookup.upstream)
        lookup.upstream_result(result)
    assert asked == [0, 1, 2] and found(lookup) == ["172.18.0.3"]


def test_nxdomain_of_an_upstream_is_final_and_failure_of_all_is_servfail() -> None:
    lookup = start("single", upstreams=2)
    lookup.network_result(0, UNKNOWN)
    lookup.network_result(1, UNKNOWN)
    lookup.upstream_result(wire.answer(lookup.query, wire.NXDOMAIN))
    assert reply(lookup).rcode() == dns.rcode.NXDOMAIN
    lookup = start("single", upstreams=2)
    lookup.network_result(0, UNKNOWN)
    lookup.network_result(1, UNKNOWN)
    lookup.upstream_result(wire.answer(lookup.query, wire.SERVFAIL))
    lookup.upstream_result(None)
    assert reply(lookup).rcode() == dns.rcode.SERVFAIL


def test_the_containers_own_name() -> None:
    assert found(start("WEB", hostname="web")) == ["172.18.0.2", "172.19.0.2"]
    assert found(start("web", "AAAA", hostname="web")) == ["fd00::2"]
    assert found(start("web.back", hostname="web")) == ["172.19.0.2"]
    empty = start("web", "TXT", hostname="web")
    assert reply(empty).rcode() == dns.rcode.NOERROR and found(empty) == []
    assert start("web.other", hostname="web").next is Next.NETWORKS


def test_what_is_no_name_of_a_network_goes_upstream_or_nowhere() -> None:
    assert start(".", "NS", upstreams=1).next is Next.UPSTREAM
    assert start("version.bind", "TXT", rdclass="CH", upstreams=1).next is Next.UPSTREAM
    assert reply(start("app", "AXFR", upstreams=1)).rcode() == dns.rcode.REFUSED


def test_the_answer_is_shuffled() -> None:
    query = wire.parse_query(dns.message.make_query("many", "A").to_wire())
    lookup = Lookup(query, NETWORKS, "", 0, shuffle=lambda records: records.reverse())
    lookup.network_result(0, known(ONE, TWO))
    assert found(lookup) == ["172.19.0.3", "172.18.0.3"]


def test_what_networks_servers_say() -> None:
    asked = wire.parse_query(wire.ask(1, dns.name.from_text("db"), wire.A))
    assert read_network_reply(wire.answer(asked, wire.NOERROR, (ONE,)), wire.A) == known(ONE)
    assert read_network_reply(wire.answer(asked, wire.NOERROR), wire.A) == known()
    assert read_network_reply(wire.answer(asked, wire.REFUSED), wire.A) is UNKNOWN
    assert read_network_reply(wire.answer(asked, wire.NXDOMAIN), wire.A) is UNKNOWN
    assert read_network_reply(wire.answer(asked, wire.SERVFAIL), wire.A) is SILENT
    assert read_network_reply(wire.answer(asked, wire.NOERROR, (ONE,))[:-13], wire.A) is SILENT


def test_an_empty_answer_counts_only_when_the_other_family_has_addresses() -> None:
    assert needs_confirmation(known(), wire.A) == wire.AAAA
    assert needs_confirmation(known(), wire.AAAA) == wire.A
    assert needs_confirmation(known(), wire.PTR) is None
    assert needs_confirmation(known(ONE), wire.A) is None
    assert needs_confirmation(UNKNOWN, wire.A) is None
    assert confirmed(known(ONE)) == known()
    assert confirmed(known()) is UNKNOWN
    assert confirmed(SILENT) is SILENT
    assert confirmed(UNKNOWN) is UNKNOWN


results = st.sampled_from([UNKNOWN, SILENT, known(), known(ONE), known(TWO)])
upstream_rcodes = st.sampled_from([None, wire.NOERROR, wire.NXDOMAIN, wire.SERVFAIL, wire.REFUSED, wire.NOTIMP])


@given(
    st.tuples(results, results),
    st.permutations([0, 1]),
    st.lists(upstream_rcodes, max_size=3),
    st.sampled_from(["A", "AAAA", "MX"]),
    st.sampled_from(["db", "db.app", "www.example.com"]),
)
def test_every_lookup_ends_with_the_answer_that_the_rules_give(
    answers: tuple[NetworkResult, NetworkResult], order: list[int], upstreams: list[int | None], qtype: str, name: str
) -> None:
    lookup = start(name, qtype, upstreams=len(upstreams))
    for index in order:
        lookup.network_result(index, answers[index])
    asked = 0
    while lookup.next is Next.UPSTREAM:
        rcode = upstreams[lookup.upstream]
        asked += 1
        lookup.upstream_result(None if rcode is None else wire.answer(lookup.query, rcode))
    result = reply(lookup)
    first = next((answer for answer in answers if answer.known is Known.YES), None)
    if first is not None:
        assert asked == 0 and result.rcode() == dns.rcode.NOERROR
        assert len(found(lookup)) == (len(first.records) if qtype != "MX" else 0)
        return
    definite = [rcode for rcode in upstreams if rcode not in (None, wire.SERVFAIL, wire.REFUSED)]
    expected = definite[0] if definite else (wire.SERVFAIL if upstreams else wire.NXDOMAIN)
    if expected == wire.NXDOMAIN and name != "www.example.com":
        mine = [
            answer is SILENT
            for answer, view in zip(answers, NETWORKS, strict=True)
            if name in ("db", f"db.{view.name}")
        ]
        expected = wire.SERVFAIL if any(mine) else expected
    assert result.rcode() == expected


LINKED = (NETWORKS[0], replace(NETWORKS[1], links=name_links("back", [("Cache", "redis"), ("db", "mysql")])))


def start_linked(name: str, qtype: str = "A", *, hostname: str = "", unqualified_stay: bool = False) -> Lookup:
    query = wire.parse_query(dns.message.make_query(name, qtype).to_wire())
    return Lookup(query, LINKED, hostname, 1, unqualified_stay, shuffle=lambda records: None)


def test_a_link_is_asked_for_by_its_target() -> None:
    for name in ("cache", "CACHE", "cache.back", "Cache.Back."):
        lookup = start_linked(name)
        asked = dns.name.from_text(name)
        assert lookup.names == [asked, dns.name.from_text("redis")]
        lookup.network_result(1, known(TWO))  # before the network that comes first has answered
        assert found(lookup) == ["172.19.0.3"]
        assert reply(lookup).answer[0].name == asked
    assert start_linked("cache.app").names == [dns.name.from_text("cache.app")] * 2
    assert start_linked("redis").names == [dns.name.from_text("redis")] * 2


def test_a_link_hides_the_name_and_the_containers_own() -> None:
    lookup = start_linked("db", hostname="db")
    lookup.network_result(0, known(ONE))
    assert lookup.next is Next.NETWORKS
    lookup.network_result(1, known(TWO))
    assert found(lookup) == ["172.19.0.3"]
    lookup = start_linked("db")  # the target is gone, another network has a container of the alias's name
    lookup.network_result(1, UNKNOWN)
    assert lookup.next is Next.NETWORKS
    lookup.network_result(0, known(ONE))
    assert found(lookup) == ["172.18.0.3"]


def test_aliases_that_dns_cannot_express_are_left_out() -> None:
    assert name_links("n", [("a..b", "x"), ("x" * 64, "x")]) == {}
    assert list(name_links("", [("a", "b")])) == [dns.name.from_text("a")]
    assert len(name_links("x" * 64, [("a", "b")])) == 1


@given(st.text(max_size=80), st.lists(st.tuples(st.text(max_size=80), st.text(max_size=80)), max_size=5))
def test_any_links_are_taken(network: str, pairs: list[tuple[str, str]]) -> None:
    assert len(name_links(network, pairs)) <= 2 * len(pairs)


def test_single_labels_stay_inside_where_the_container_has_its_own_ndots() -> None:
    for qtype, name, upstream in (("A", "x", False), ("AAAA", "x", False), ("MX", "x", True), ("A", "x.y", True)):
        lookup = start_linked(name, qtype, unqualified_stay=True)
        lookup.network_result(0, UNKNOWN)
        lookup.network_result(1, UNKNOWN)
        assert (lookup.next is Next.UPSTREAM) is upstream
        if not upstream:
            assert reply(lookup).rcode() == dns.rcode.NOERROR and not reply(lookup).answer
    lookup = start_linked("x", unqualified_stay=True)
    lookup.network_result(0, SILENT)
    lookup.network_result(1, UNKNOWN)
    assert lookup.next is Next.UPSTREAM
