"""DNS messages of the guest's resolver, checked with dnspython as the other side."""

from __future__ import annotations

import contextlib
import ipaddress

import dns.edns
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_guest.resolver import wire

labels = st.binary(min_size=1, max_size=63)
names = st.lists(labels, max_size=3).map(lambda parts: dns.name.Name([*parts, b""]))
ipv4s = st.ip_addresses(v=4)
ipv6s = st.ip_addresses(v=6)


def query(name: str = "WeB.App", qtype: str = "A", **options: object) -> bytes:
    return dns.message.make_query(name, qtype, **options).to_wire()  # type: ignore[arg-type]


def test_a_query_is_read() -> None:
    parsed = wire.parse_query(query(use_edns=0, payload=1400, want_dnssec=True))
    assert str(parsed.name) == "WeB.App."
    assert (parsed.qtype, parsed.qclass, parsed.edns, parsed.dnssec_ok, parsed.udp_payload) == (1, 1, True, True, 1400)
    assert wire.parse_query(query()).udp_payload == 512
    assert wire.parse_query(query(use_edns=0, payload=100)).udp_payload == 512
    assert wire.parse_query(query(use_edns=0, payload=65000)).udp_payload == wire.UDP_MAX


@pytest.mark.parametrize(
    ("mangle", "rcode"),
    [
        (lambda data: data[:11], None),
        (lambda data: b"", None),
        (lambda data: data[:2] + b"\x81\x80" + data[4:], None),
        (lambda data: data[:2] + b"\x28\x00" + data[4:], dns.rcode.NOTIMP),
        (lambda data: data[:4] + b"\0\2" + data[6:], dns.rcode.FORMERR),
        (lambda data: data[:4] + b"\0\0" + data[6:12], dns.rcode.FORMERR),
        (lambda data: data[:-1], dns.rcode.FORMERR),
        (lambda data: data[:12] + b"\xc0\x0c\0\1\0\1", dns.rcode.FORMERR),
        (lambda data: data[:12] + b"\x80a\0\0\1\0\1", dns.rcode.FORMERR),
        (lambda data: data[:10] + b"\0\2" + data[12:] + b"\0\0\x29\x10\0\0\0\0\0\0\0" * 2, dns.rcode.FORMERR),
        (lambda data: data[:10] + b"\0\1" + data[12:] + b"\0\0\x29\x10\0\0\0\0\0\0\x09", dns.rcode.FORMERR),
        (lambda data: data[:10] + b"\0\1" + data[12:] + b"\0\0\x29\x10\0\0\1\0\0\0\0", dns.rcode.BADVERS),
    ],
)
def test_bad_messages_are_refused_or_dropped(mangle: object, rcode: dns.rcode.Rcode | None) -> None:
    data = mangle(query())  # type: ignore[operator]
    with pytest.raises(wire.MalformedError) as caught:
        wire.parse_query(data)
    if rcode is None:
        assert caught.value.reply is None
    else:
        assert caught.value.reply is not None
        reply = dns.message.from_wire(caught.value.reply)
        assert reply.rcode() == rcode
        assert reply.flags & dns.flags.QR
        assert reply.id == int.from_bytes(data[:2], "big")


@given(st.binary(max_size=300))
def test_any_bytes_can_be_a_query(data: bytes) -> None:
    try:
        parsed = wire.parse_query(data)
    except wire.MalformedError as error:
        assert error.reply is None or len(error.reply) >= 12
    else:
        assert dns.message.from_wire(wire.answer(parsed, 0)).id == parsed.id


@given(st.data(), names, st.integers(0, 65535))
def test_a_mangled_query_never_raises_anything_else(data: st.DataObject, name: dns.name.Name, ident: int) -> None:
    good = bytearray(wire.ask(ident, name, wire.A))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(good[: data.draw(st.integers(0, len(good)))])
    for variant in (bytes(good), cut):
        with contextlib.suppress(wire.MalformedError):
            wire.parse_query(variant)
        wire.answers_to(wire.ask(ident, name, wire.A), variant)
        if len(variant) >= 12:
            for qtype in (wire.A, wire.AAAA, wire.PTR):
                with contextlib.suppress(wire.MalformedError):
                    wire.read_records(variant, qtype)


@given(names, st.lists(ipv4s, max_size=60), st.booleans(), st.integers(512, 2000), st.integers(0, 65535))
def test_answers_repeat_the_question_and_fit(
    name: dns.name.Name, addresses: list[ipaddress.IPv4Address], edns: bool, limit: int, ident: int
) -> None:
    request = dns.message.make_query(name, "A", use_edns=0 if edns else None, id=ident)
    parsed = wire.parse_query(request.to_wire())
    data = wire.answer(parsed, wire.NOERROR, tuple(addresses), limit=limit)
    assert len(data) <= max(limit, len(request.to_wire()))
    reply = dns.message.from_wire(data, one_rr_per_rrset=True)
    assert request.is_response(reply) and reply.id == ident
    assert reply.question[0].name.labels == name.labels
    assert reply.flags & dns.flags.RA and bool(reply.flags & dns.flags.RD)
    assert (reply.edns == 0) is edns
    found = [rrset[0].address for rrset in reply.answer]
    assert found == [str(address) for address in addresses[: len(found)]]
    assert bool(reply.flags & dns.flags.TC) is (len(found) < len(addresses))
    assert all(rrset.ttl == 600 and rrset.name == name for rrset in reply.answer)
    assert wire.read_records(data, wire.A) == tuple(addresses[: len(found)])


@given(ipv6s, names)
def test_other_record_types(address: ipaddress.IPv6Address, name: dns.name.Name) -> None:
    parsed = wire.parse_query(query("x", "AAAA"))
    reply = dns.message.from_wire(wire.answer(parsed, 0, (address,)))
    assert ipaddress.ip_address(reply.answer[0][0].address) == address
    pointer = wire.answer(wire.parse_query(query("2.0.18.172.in-addr.arpa", "PTR")), 0, (name,))
    assert dns.message.from_wire(pointer).answer[0][0].target == name
    assert wire.read_records(pointer, wire.PTR) == (name,)


@given(ipv4s | ipv6s)
def test_reverse_names(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    name = dns.name.from_text(address.reverse_pointer)
    assert wire.reverse_address(name) == address
    assert wire.reverse_address(dns.name.from_text(address.reverse_pointer.upper())) == address
    assert wire.reverse_address(name.parent()) is None
    assert wire.reverse_address(dns.name.Name([b"x", *name.labels])) is None


def test_only_the_reply_to_the_query_counts() -> None:
    sent = wire.ask(4711, dns.name.from_text("web"), wire.A)
    good = bytearray(wire.answer(wire.parse_query(sent), wire.NOERROR, (ipaddress.IPv4Address("10.0.0.1"),)))
    assert wire.answers_to(sent, bytes(good))
    assert wire.answers_to(sent, bytes(good).replace(b"\x03web", b"\x03WEB"))
    assert not wire.answers_to(sent, bytes(good).replace(b"\x03web", b"\x03wob"))
    assert not wire.answers_to(sent, wire.with_id(bytes(good), 4712))
    assert not wire.answers_to(sent, sent)
    other = wire.answer(wire.parse_query(wire.ask(4711, dns.name.from_text("web"), wire.AAAA)), 0)
    assert not wire.answers_to(sent, other)
    assert wire.answers_to(sent, wire.error_header(4711, 0, wire.FORMERR))
    assert not wire.answers_to(sent, wire.error_header(4711, 0, wire.NOERROR))


def test_a_forwarded_reply_that_is_too_long_sends_the_client_to_tcp() -> None:
    parsed = wire.parse_query(query())
    many = tuple(ipaddress.IPv4Address(number) for number in range(100))
    long = wire.answer(parsed, 0, many)
    assert wire.fit(parsed, long, 65535) is long
    reply = dns.message.from_wire(wire.fit(parsed, long, 512))
    assert reply.flags & dns.flags.TC and not reply.answer and dns.message.from_wire(parsed.wire).is_response(reply)
