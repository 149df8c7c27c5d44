"""The files that dnsmasq reads, and the questions that it is asked."""

from __future__ import annotations

import ipaddress
import struct

import dns.flags
import dns.message
import dns.rdatatype
import dns.rrset
from hypothesis import given
from hypothesis import strategies as st

from agent_helper import names

V4, V6 = ipaddress.ip_address("10.0.0.2"), ipaddress.ip_address("fd00::2")
label = st.from_regex(r"[a-zA-Z0-9_][a-zA-Z0-9_-]{0,20}", fullmatch=True)


def test_the_containers_name_comes_first_and_nothing_twice() -> None:
    content = names.hosts_file([V4, V6], ["web", "WWW", "Web", "www"], "app")
    assert content == "10.0.0.2 web.app web WWW WWW.app\nfd00::2 web.app web WWW WWW.app\n"
    assert names.hosts_file([V4], [], "app") == ""


def test_names_too_long_with_the_network_are_left_out() -> None:
    long = ".".join(["x" * 60] * 4)
    assert names.hosts_file([V4], [long], "network.name.that.is.long") == f"10.0.0.2 {long}\n"


def test_known_names_are_listed_without_their_parents() -> None:
    assert names.servers_file(["Web", "web", "a.b"], "app") == (
        "server=/a.b/\nserver=/a.b.app/\nserver=/web/\nserver=/web.app/\n"
    )


@given(st.lists(label, min_size=1, max_size=6), label)
def test_one_line_per_address(aliases: list[str], network: str) -> None:
    lines = names.hosts_file([V4, V6], aliases, network).splitlines()
    assert [line.split()[0] for line in lines] == [str(V4), str(V6)]
    found = {name.lower() for name in lines[0].split()[1:]}
    assert found == {a.lower() for a in aliases} | {f"{a}.{network}".lower() for a in aliases}


@given(st.integers(0, 65535), st.lists(label, min_size=1, max_size=4), st.sampled_from([4, 6]))
def test_a_query_is_what_others_read(message_id: int, labels: list[str], version: int) -> None:
    message = dns.message.from_wire(names.query(message_id, ".".join(labels), version))
    assert message.id == message_id
    (question,) = message.question
    assert question.name.to_text(omit_final_dot=True) == ".".join(labels)
    assert question.rdtype == (dns.rdatatype.A if version == 4 else dns.rdatatype.AAAA)
    assert names.answer_id(names.query(message_id, "x", version)) is None


@given(st.lists(st.ip_addresses(v=4).map(str), max_size=5), st.booleans())
def test_answers_are_read(addresses: list[str], compressed: bool) -> None:
    response = dns.message.make_response(dns.message.make_query("web.app", "A"))
    if addresses:
        response.answer.append(dns.rrset.from_text("web.app.", 600, "IN", "A", *addresses))
    data = response.to_wire()
    assert names.answer_id(data) == response.id
    assert names.rcode(data) == 0
    assert names.answers(data, 4) == {ipaddress.ip_address(address) for address in addresses}
    assert names.answers(data, 6) == set()


@given(st.binary(max_size=200))
def test_garbage_is_no_answer(data: bytes) -> None:
    names.answer_id(data)
    assert isinstance(names.answers(data, 4), set)
    header = struct.pack(">6H", 1, 0x8180, 1, 40, 0, 0)
    assert isinstance(names.answers(header + data, 6), set)
