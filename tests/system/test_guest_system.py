"""The guest agent joined to networks that stand in for the fabric: a TAP, a gateway and a real dnsmasq each."""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import dns.flags
import dns.message
import dns.query
import dns.rcode
import dns.rdatatype
import pytest
import trio

sys.path.append(str(Path(__file__).parents[1] / "protocol"))

from test_guest_rig import Guest, interface, namespace, run_in, running_guest, until

from agent_guest.resolver.hostsfile import LOCALHOST
from taploom.contracts.taploom.guest.v1 import (
    ApplyInterfaceRequest,
    ApplyResolverRequest,
    AuthorizeLinkRequest,
    DeleteInterfaceRequest,
    HostEntry,
    Interface,
    InterfaceState,
    ListInterfacesRequest,
    NameLink,
    Resolver,
    SyncRequest,
)
from taploom.contracts.taploom.link.v1 import LinkFeature
from taploom.link import Dataplane, Tap, dial_link, new_secret, open_dataplane

pytestmark = pytest.mark.system

CLONE_NEWNET = 0x40000000
FEATURES = [LinkFeature.VNET_HDR, LinkFeature.TSO]


@contextlib.contextmanager
def inside(netns: str) -> Iterator[None]:
    """The calling thread is in the namespace meanwhile."""
    libc = ctypes.CDLL(None, use_errno=True)

    def enter(fd: int) -> None:
        if libc.setns(fd, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    with Path("/proc/thread-self/ns/net").open() as home, Path(f"/run/netns/{netns}").open() as there:
        enter(there.fileno())
        try:
            yield
        finally:
            enter(home.fileno())


class Network:
    """A network with its gateway and its dnsmasq in a namespace, and the host's part of the guest's link to it."""

    def __init__(self, number: int, netns: str, directory: Path, dataplane: Dataplane) -> None:
        self.number = number
        self.netns = netns
        self.directory = directory
        self.dns_server = f"169.254.64.{number + 1}"
        self._dataplane = dataplane
        self._dnsmasq: subprocess.Popen[bytes] | None = None
        self.downs: list[str] = []
        with inside(netns):
            self.tap = Tap.open("fab0")
        for command in (
            f"addr add 172.{18 + number}.0.1/16 dev fab0",
            f"addr add {self.dns_server}/32 dev fab0",
            f"-6 addr add fd00:{number}::1/64 dev fab0 nodad",
            "link set fab0 up",
            "link set lo up",
        ):
            run_in(netns, "ip", *command.split())
        (directory / "hosts").mkdir(parents=True)

    def interface(self, **changes: object) -> Interface:
        return interface(
            self.number,
            **{
                "addresses": [f"172.{18 + self.number}.0.2/16", f"fd00:{self.number}::2/64"],
                "gateways": [f"172.{18 + self.number}.0.1", f"fd00:{self.number}::1"],
                **changes,
            },
        )

    def names(self, *lines: str) -> None:
        temporary = self.directory / "hosts" / ".new"
        temporary.write_text("".join(line + "\n" for line in lines))
        temporary.rename(self.directory / "hosts" / "all")

    async def start_dnsmasq(self) -> None:
        arguments = "--keep-in-foreground --conf-file=/dev/null --pid-file= --log-facility=- --user=root --group=root"
        arguments += " --local=/#/ --no-resolv --no-hosts --no-poll --bind-interfaces"
        command = ["dnsmasq", *arguments.split(), f"--hostsdir={self.directory}/hosts"]
        command += [f"--listen-address={self.dns_server}"]
        with (self.directory / "dnsmasq.log").open("ab") as log:
            self._dnsmasq = subprocess.Popen(["ip", "netns", "exec", self.netns, *command], stdout=log, stderr=log)
        await until(lambda: f"{self.dns_server}:53" in run_in(self.netns, "ss", "-Hlun"), "dnsmasq listens")

    def stop_dnsmasq(self) -> None:
        if self._dnsmasq is not None:
            self._dnsmasq.kill()
            self._dnsmasq.wait()
            self._dnsmasq = None

    async def link(self, guest: Guest) -> None:
        """Dials the guest's data port and joins it with the network."""
        secret = new_secret()
        endpoint_id = f"ep{self.number}"
        async with guest.client() as client:
            await client.authorize_link(AuthorizeLinkRequest(endpoint_id=endpoint_id, secret=secret))
        stream, agreed = await dial_link(guest.data, endpoint_id=endpoint_id, secret=secret, features=FEATURES)
        await self._dataplane.stop(self.netns)
        self.tap.set_offloads(agreed)
        self._dataplane.attach_pump(self.netns, self.tap.fileno(), stream, agreed, self.downs.append)
        self.tap.set_carrier(True)
        with trio.fail_after(60):
            async with guest.client() as client:
                while True:
                    listed = (await client.list_interfaces(ListInterfacesRequest())).interfaces
                    if any(
                        status.state == InterfaceState.UP
                        for status in listed
                        if status.interface and status.interface.endpoint_id == endpoint_id
                    ):
                        return
                    await trio.sleep(0.002)

    async def unlink(self) -> None:
        await self._dataplane.stop(self.netns)

    async def close(self) -> None:
        self.stop_dnsmasq()
        await self._dataplane.detach(self.netns)
        self.tap.close()


@contextlib.asynccontextmanager
async def network(number: int, directory: Path, dataplane: Dataplane) -> AsyncIterator[Network]:
    with namespace() as netns:
        found = Network(number, netns, directory / f"net{number}", dataplane)
        try:
            await found.start_dnsmasq()
            yield found
        finally:
            await found.close()


class Rig:
    def __init__(self, guest: Guest, one: Network, two: Network) -> None:
        self.guest = guest
        self.one = one
        self.two = two

    async def join(self, *networks: Network) -> None:
        async with self.guest.client() as client:
            for network in networks:
                await client.apply_interface(ApplyInterfaceRequest(interface=network.interface()))
        for network in networks:
            await network.link(self.guest)

    async def resolver(self, **values: object) -> None:
        resolver = Resolver(**{"enabled": True, "hostname": "web", **values})  # type: ignore[arg-type]
        async with self.guest.client() as client:
            await client.apply_resolver(ApplyResolverRequest(resolver=resolver))

    def ping(self, address: str, *arguments: str) -> None:
        run_in(self.guest.netns, "ping", "-c", "1", "-W", "5", *arguments, address)

    async def ask(self, name: str, qtype: str = "A", **options: object) -> dns.message.Message:
        """The resolver's answer to a query out of the guest's namespace."""
        tcp = bool(options.pop("tcp", False))
        query = dns.message.make_query(name, qtype, **options)  # type: ignore[arg-type]

        def exchange() -> dns.message.Message:
            with inside(self.guest.netns):
                if tcp:
                    return dns.query.tcp(query, "127.0.0.11", timeout=20)
                return dns.query.udp(query, "127.0.0.11", timeout=20)

        return await trio.to_thread.run_sync(exchange)

    async def found(self, name: str, qtype: str = "A", **options: object) -> list[str]:
        reply = await self.ask(name, qtype, **options)
        return sorted(item.to_text() for rrset in reply.answer for item in rrset)

    async def wait_for(self, name: str) -> None:
        with trio.fail_after(60):
            while not await self.found(name):
                await trio.sleep(0.02)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with (
        open_dataplane() as dataplane,
        running_guest(tmp_path / "guest") as guest,
        network(0, tmp_path, dataplane) as one,
        network(1, tmp_path, dataplane) as two,
    ):
        yield Rig(guest, one, two)


@contextlib.contextmanager
def server(
    netns: str, address: str, port: int, reply: Callable[[bytes, bool], bytes | None]
) -> Iterator[list[tuple[bytes, tuple[str, int], bool]]]:
    """A DNS server of the test's own over UDP and TCP in a namespace; yields what it was asked, from where."""
    import threading

    asked: list[tuple[bytes, tuple[str, int], bool]] = []
    with inside(netns):
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    udp.bind((address, port))
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    tcp.bind((address, port))
    tcp.listen()

    def serve_udp() -> None:
        while True:
            try:
                data, peer = udp.recvfrom(65535)
            except OSError:
                return
            if not data:
                return
            asked.append((data, peer, False))
            answer = reply(data, False)
            if answer is not None:
                udp.sendto(answer, peer)

    def serve_tcp() -> None:
        while True:
            try:
                connection, peer = tcp.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                length = int.from_bytes(connection.recv(2, socket.MSG_WAITALL), "big")
                data = connection.recv(length, socket.MSG_WAITALL)
                asked.append((data, peer, True))
                answer = reply(data, True)
                if answer is not None:
                    connection.sendall(len(answer).to_bytes(2, "big") + answer)

    threads = [threading.Thread(target=serve_udp), threading.Thread(target=serve_tcp)]
    for thread in threads:
        thread.start()
    try:
        yield asked
    finally:
        tcp.shutdown(socket.SHUT_RDWR)
        with inside(netns), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as poke:
            poke.sendto(b"", (address, port))
        for thread in threads:
            thread.join()
        udp.close()
        tcp.close()


def answer_with(*addresses: str, rcode: dns.rcode.Rcode = dns.rcode.NOERROR) -> Callable[[bytes, bool], bytes]:
    def reply(data: bytes, tcp: bool) -> bytes:
        query = dns.message.from_wire(data)
        response = dns.message.make_response(query, recursion_available=True)
        response.set_rcode(rcode)
        for address in addresses:
            response.find_rrset(
                response.answer, query.question[0].name, dns.rdataclass.IN, dns.rdatatype.A, create=True
            ).add(dns.rdata.from_text("IN", "A", address), 300)
        return response.to_wire()

    return reply


async def test_frames_flow_and_networks_come_and_go_without_a_lost_packet(rig: Rig) -> None:
    await rig.join(rig.one)
    rig.ping("172.18.0.1")
    rig.ping("fd00:0::1", "-6")
    with subprocess.Popen(
        ["ip", "netns", "exec", rig.guest.netns, "ping", "-i", "0.01", "-c", "300", "-W", "5", "172.18.0.1"],
        stdout=subprocess.PIPE,
        text=True,
    ) as pinging:
        try:
            while pinging.poll() is None:
                await rig.join(rig.two)
                rig.ping("172.19.0.1")
                async with rig.guest.client() as client:
                    await client.delete_interface(DeleteInterfaceRequest(endpoint_id="ep1"))
                await rig.two.unlink()
            assert pinging.stdout is not None
            assert " 0% packet loss" in pinging.stdout.read()
        finally:
            pinging.kill()


async def test_a_connection_survives_the_agents_death(rig: Rig) -> None:
    await rig.join(rig.one, rig.two)
    wanted = [rig.one.interface(), rig.two.interface()]
    with inside(rig.one.netns):
        listener = socket.create_server(("172.18.0.1", 7000))
    with inside(rig.guest.netns):
        client = socket.socket()
    with listener, client:
        await trio.to_thread.run_sync(client.connect, ("172.18.0.1", 7000))
        peer, _ = listener.accept()
        with peer:
            peer.settimeout(20)
            index = json.loads(rig.guest.ip("-j", "link", "show", "dev", "eth0"))[0]["ifindex"]
            await rig.guest.stop(signal.SIGKILL)
            await until(lambda: len(rig.one.downs) == 1, "the host has seen the link break")
            assert "172.18.0.2/16" in rig.guest.ip("addr", "show", "dev", "eth0")
            assert "default via 172.18.0.1 dev eth0" in rig.guest.ip("route")
            client.sendall(b"sent while the link is down")
            await rig.guest.start()
            async with rig.guest.client() as control:
                done = await control.sync(SyncRequest(interfaces=wanted))
                assert done.removed_endpoint_ids == [] and done.failures == []
            await rig.one.link(rig.guest)
            assert await trio.to_thread.run_sync(peer.recv, 100) == b"sent while the link is down"
            assert json.loads(rig.guest.ip("-j", "link", "show", "dev", "eth0"))[0]["ifindex"] == index


async def test_carrier_loss_keeps_addresses_and_routes_of_both_families(rig: Rig) -> None:
    await rig.join(rig.one)

    def snapshot() -> list[object]:
        addresses = json.loads(rig.guest.ip("-j", "addr", "show", "dev", "eth0"))[0]["addr_info"]
        routes = [*json.loads(rig.guest.ip("-j", "route")), *json.loads(rig.guest.ip("-j", "-6", "route"))]
        return [addresses, sorted((route["dst"], route["dev"], route.get("gateway")) for route in routes)]

    def state() -> str:
        return str(json.loads(rig.guest.ip("-j", "link", "show", "dev", "eth0"))[0]["operstate"])

    await until(lambda: state() == "UP", "the carrier is on")
    before = snapshot()
    for _ in range(2):
        await rig.one.unlink()
        await until(lambda: state() == "DOWN", "the carrier is off")
        assert snapshot() == before
        await rig.one.link(rig.guest)
        await until(lambda: state() == "UP", "the carrier is back")
        assert snapshot() == before
        rig.ping("172.18.0.1")
        rig.ping("fd00:0::1", "-6")


async def test_neighbours_hear_of_a_link_that_comes_up(rig: Rig) -> None:
    with inside(rig.one.netns):
        listening = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0806))
    with listening:
        listening.bind(("fab0", 0x0806))
        listening.settimeout(30)
        async with rig.guest.client() as client:
            await client.apply_interface(ApplyInterfaceRequest(interface=rig.one.interface()))
        for _ in range(2):
            await rig.one.link(rig.guest)
            while True:
                frame = await trio.to_thread.run_sync(listening.recv, 2000)
                sender, target = frame[28:32], frame[38:42]
                if sender == target == socket.inet_aton("172.18.0.2"):
                    break
            assert frame[6:12].hex(":") == "02:42:ac:12:00:02"
            await rig.one.unlink()
            listening.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while listening.recv(2000):
                    pass
            listening.settimeout(30)


async def test_names_of_containers(rig: Rig) -> None:
    rig.one.names(
        "172.18.0.3 db.net0 db postgres postgres.net0",
        "fd00:0::3 db.net0 db postgres postgres.net0",
        "172.18.0.4 only4.net0 only4",
        "fd00:0::5 only6.net0 only6",
        "172.18.0.6 both",
        "172.18.0.8 api.example.com",
    )
    rig.two.names("172.19.0.3 cache.net1 cache", "172.19.0.6 both")
    await rig.join(rig.one, rig.two)
    await rig.resolver()
    await rig.wait_for("api.example.com")
    await rig.wait_for("cache")

    for tcp in (False, True):
        for name in ("db", "DB", "dB.NeT0", "postgres", "postgres.net0", "db."):
            assert await rig.found(name, tcp=tcp) == ["172.18.0.3"]
        assert await rig.found("db", "AAAA", tcp=tcp) == ["fd00::3"]
    assert await rig.found("cache.net1") == ["172.19.0.3"]
    reply = await rig.ask("pOsTgReS", use_edns=0, payload=1232)
    assert reply.answer[0].name.labels[0] == b"pOsTgReS" and reply.answer[0].ttl == 600 and reply.edns == 0
    assert reply.flags & dns.flags.RA

    # Known in another form: empty, and no error.
    for name, qtype in (("only4", "AAAA"), ("only6", "A"), ("db", "MX"), ("db", "TXT"), ("db", "SRV"), ("db", "HTTPS")):
        reply = await rig.ask(name, qtype)
        assert reply.rcode() == dns.rcode.NOERROR and not reply.answer, name
    # Unknown, and without upstreams nobody to ask. A parent of a known name is not known.
    for name in ("nobody", "nobody.net0", "www.example.com", "example.com", "net0"):
        assert (await rig.ask(name)).rcode() == dns.rcode.NXDOMAIN, name
        assert (await rig.ask(name, "MX")).rcode() == dns.rcode.NXDOMAIN, name
    # Reverse.
    for address, name in (("172.18.0.3", "db.net0."), ("fd00:0::3", "db.net0."), ("172.19.0.3", "cache.net1.")):
        assert await rig.found(ipaddress.ip_address(address).reverse_pointer, "PTR") == [name]
    assert (await rig.ask("9.0.18.172.in-addr.arpa", "PTR")).rcode() == dns.rcode.NXDOMAIN
    # The first network in gateway order wins; the order follows the priority.
    assert await rig.found("both") == ["172.18.0.6"]
    async with rig.guest.client() as client:
        await client.apply_interface(ApplyInterfaceRequest(interface=rig.two.interface(gateway_priority=1)))
    assert await rig.found("both") == ["172.19.0.6"]
    # Its own name.
    assert await rig.found("web") == ["172.18.0.2", "172.19.0.2"]
    assert await rig.found("WEB.net1", "AAAA") == ["fd00:1::2"]
    # A name that comes and goes is seen at once.
    rig.two.names("172.19.0.9 late")
    await rig.wait_for("late")


async def test_many_addresses_are_shuffled_and_go_over_tcp_when_they_must(rig: Rig) -> None:
    many = [f"172.18.1.{number}" for number in range(1, 61)]
    rig.one.names(*(f"{address} many" for address in many), "172.18.2.1 few", "172.18.2.2 few", "172.18.2.3 few")
    await rig.join(rig.one)
    await rig.resolver()
    await rig.wait_for("few")
    short = await rig.ask("many")
    assert short.flags & dns.flags.TC and len(short.to_wire()) <= 512
    assert sorted(await rig.found("many", tcp=True)) == sorted(many)
    assert sorted(await rig.found("many", use_edns=0, payload=4096)) == sorted(many)
    orders = set()
    with trio.fail_after(60):
        while len(orders) < 3:
            reply = await rig.ask("few")
            orders.add(tuple(item.to_text() for rrset in reply.answer for item in rrset))


async def test_a_dead_network_does_not_hold_up_the_others(rig: Rig) -> None:
    rig.two.names("172.19.0.3 cache")
    await rig.join(rig.one, rig.two)
    await rig.resolver()
    await rig.wait_for("cache")
    rig.one.stop_dnsmasq()
    assert await rig.found("cache") == ["172.19.0.3"]
    # What the dead network may know is not denied; what it cannot know is.
    assert (await rig.ask("db")).rcode() == dns.rcode.SERVFAIL
    assert (await rig.ask("www.example.com")).rcode() == dns.rcode.NXDOMAIN
    await rig.one.unlink()
    assert await rig.found("cache") == ["172.19.0.3"]
    rig.one.names("172.18.0.3 db")
    await rig.one.start_dnsmasq()
    await rig.one.link(rig.guest)
    await rig.wait_for("db")


async def test_unknown_names_are_forwarded_as_they_are(rig: Rig) -> None:
    await rig.join(rig.one)
    blob = b"\x00\xffbinary\x01"

    def upstream(data: bytes, tcp: bool) -> bytes:
        query = dns.message.from_wire(data)
        response = dns.message.make_response(query, recursion_available=True)
        name = query.question[0].name
        if name.labels[0] == b"big" and not tcp:
            response.flags |= dns.flags.TC
        elif name.labels[0] == b"missing":
            response.set_rcode(dns.rcode.NXDOMAIN)
        else:
            rdata = dns.rdata.from_text("IN", "TYPE65400", f"\\# {len(blob)} {blob.hex()}")
            response.find_rrset(
                response.answer, name, dns.rdataclass.IN, dns.rdatatype.from_text("TYPE65400"), create=True
            ).add(rdata, 77)
        return response.to_wire()

    with server(rig.one.netns, "172.18.0.1", 53, upstream) as asked:
        await rig.resolver(upstreams=["172.18.0.1"])
        reply = await rig.ask("Some.Example.Org", "TYPE65400", use_edns=0, payload=1400, want_dnssec=True)
        assert reply.answer[0][0].to_wire() == blob and reply.answer[0].ttl == 77
        assert reply.question[0].name.to_text() == "Some.Example.Org."
        assert (await rig.ask("single", "TYPE65400")).answer
        assert (await rig.ask("missing.example")).rcode() == dns.rcode.NXDOMAIN
        assert (await rig.ask("big.example", "TYPE65400")).flags & dns.flags.TC
        assert (await rig.ask("big.example", "TYPE65400", tcp=True)).answer
        forwarded = dns.message.from_wire(asked[0][0])
        assert forwarded.edns == 0 and forwarded.payload == 1400 and forwarded.ednsflags & dns.flags.DO
        assert [entry[2] for entry in asked] == [False, False, False, False, True]
        ports = set()
        idents = set()
        for number in range(20):
            await rig.ask(f"n{number}.example", "TYPE65400")
        for data, peer, _ in asked:
            ports.add(peer[1])
            idents.add(data[:2])
        assert len(ports) > 10 and len(idents) > 10


async def test_upstreams_in_turn(rig: Rig) -> None:
    await rig.join(rig.one)
    run_in(rig.one.netns, "ip", "addr", "add", "172.18.0.11/16", "dev", "fab0")
    run_in(rig.one.netns, "ip", "addr", "add", "172.18.0.12/16", "dev", "fab0")
    forged: list[bytes] = []

    def silent_or_forged(data: bytes, tcp: bool) -> bytes:
        forged.append(data)
        wrong_id = (int.from_bytes(data[:2], "big") ^ 1).to_bytes(2, "big")
        return wrong_id + answer_with("6.6.6.6")(data, tcp)[2:]

    refusing = answer_with(rcode=dns.rcode.REFUSED)
    with (
        server(rig.one.netns, "172.18.0.11", 53, silent_or_forged),
        server(rig.one.netns, "172.18.0.1", 53, refusing) as refused,
        server(rig.one.netns, "172.18.0.12", 5353, answer_with("192.0.2.7")),
    ):
        await rig.resolver(upstreams=["172.18.0.1", "172.18.0.12:5353"])
        assert await rig.found("example.com") == ["192.0.2.7"]
        assert len(refused) == 1
        # One that does not answer with this id has not answered: after its 4 s the next is asked.
        await rig.resolver(upstreams=["172.18.0.11", "172.18.0.12:5353"])
        assert await rig.found("example.com") == ["192.0.2.7"]
        assert forged
        await rig.resolver(upstreams=["172.18.0.1", "172.18.0.99:1"])
        assert (await rig.ask("example.com", tcp=True)).rcode() == dns.rcode.SERVFAIL


async def test_malformed_queries_and_tcp_clients_of_all_manners(rig: Rig) -> None:
    rig.one.names("172.18.0.3 db")
    await rig.join(rig.one)
    await rig.resolver()
    await rig.wait_for("db")
    query = dns.message.make_query("db", "A").to_wire()

    def run() -> None:
        with inside(rig.guest.netns):
            udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            tcp = [socket.socket() for _ in range(40)]
        with udp:
            udp.settimeout(20)
            udp.connect(("127.0.0.11", 53))
            for data in (b"", b"x", query[:11], query[:2] + b"\x80" + query[3:], os.urandom(500)):
                udp.send(data)
            udp.send(query[:-2])
            while True:
                reply = udp.recv(1000)
                if reply[:2] == query[:2]:
                    break
            assert reply[3] & 15 == dns.rcode.FORMERR
        framed = len(query).to_bytes(2, "big") + query
        for connection in tcp[:30]:
            connection.settimeout(20)
            connection.connect(("127.0.0.11", 53))
        # Pipelined, in small pieces, and closed for sending before the answers.
        first = tcp[0]
        for position in range(len(framed)):
            first.sendall(framed[position : position + 1])
        first.sendall(framed * 9)
        first.shutdown(socket.SHUT_WR)
        data = b""
        while piece := first.recv(4096):
            data += piece
        count = 0
        while data:
            length = int.from_bytes(data[:2], "big")
            assert dns.message.from_wire(data[2 : 2 + length]).answer
            data = data[2 + length :]
            count += 1
        assert count == 10
        tcp[1].sendall(b"\0\0")
        assert tcp[1].recv(10) == b""
        tcp[2].sendall(b"\xff\xff" + os.urandom(1000))
        tcp[3].sendall(b"\0\5short")
        tcp[4].sendall(framed)
        length = int.from_bytes(tcp[4].recv(2, socket.MSG_WAITALL), "big")
        assert dns.message.from_wire(tcp[4].recv(length, socket.MSG_WAITALL)).answer
        for connection in tcp:
            connection.close()

    await trio.to_thread.run_sync(run)
    assert await rig.found("db") == ["172.18.0.3"]
    assert "Traceback" not in rig.guest.log.read_text()


async def test_resolv_conf_and_the_port(rig: Rig) -> None:
    path = rig.guest.resolv_conf
    original = path.read_bytes()
    with inside(rig.guest.netns):
        taken = [socket.socket(socket.AF_INET, kind) for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM)]
    rig.guest.ip("link", "set", "lo", "up")
    for sock in taken:  # a program that serves names itself keeps its port
        sock.bind(("0.0.0.0", 53))
    await rig.resolver()
    for tcp in (False, True):
        assert (await rig.ask("nobody", tcp=tcp)).rcode() == dns.rcode.NXDOMAIN
    await rig.resolver(enabled=False)
    for sock in taken:
        sock.close()
    assert path.read_bytes() == original
    assert "taploom" not in run_in(rig.guest.netns, "nft", "list", "ruleset")
    rig.guest.ip("link", "set", "lo", "down")
    await rig.resolver(search=["a.example", "b"], options=["timeout:1"])
    assert path.read_text().splitlines()[1:] == [
        "search a.example b",
        "nameserver 127.0.0.11",
        "options timeout:1 ndots:0",
    ]
    assert (await rig.ask("nobody")).rcode() == dns.rcode.NXDOMAIN
    await rig.guest.stop(signal.SIGKILL)
    await rig.guest.start()
    # The next agent has the port before it is told anything: a query waits for the configuration.
    answers: list[dns.message.Message] = []

    async def ask() -> None:
        answers.append(await rig.ask("web"))

    async with trio.open_nursery() as nursery:
        await until(lambda: "127.0.0.11:" in run_in(rig.guest.netns, "ss", "-Hlun"), "the port is bound")
        nursery.start_soon(ask)
        await until(
            lambda: any(line.split()[1] != "0" for line in run_in(rig.guest.netns, "ss", "-Hlun").splitlines()),
            "the query has arrived",
        )
        assert not answers
        await rig.resolver()
    assert answers[0].rcode() == dns.rcode.NOERROR
    assert "nameserver 127.0.0.11" in path.read_text()
    for stopped_by_host in (True, False):
        await rig.guest.stop(signal.SIGKILL)
        await rig.guest.start()
        if stopped_by_host:
            async with rig.guest.client() as client:
                await client.sync(SyncRequest())
        else:
            await rig.guest.stop()
        assert path.read_bytes() == original
        if not stopped_by_host:
            await rig.guest.start()
        await rig.resolver()
    await rig.resolver(enabled=False)
    assert path.read_bytes() == original
    await rig.resolver()
    assert path.read_bytes() != original
    assert await rig.guest.stop() == 0
    assert path.read_bytes() == original


def test_the_port_itself_is_taken_where_nothing_can_be_redirected() -> None:
    script = "from agent_guest.resolver.server import *; s = ResolverServer(Resolver()); s.bind(); print(s.port)"
    taken = "import socket; t = socket.socket(type=socket.SOCK_DGRAM); t.bind(('0.0.0.0', 53)); "
    with namespace() as netns:
        run_in(netns, "ip", "link", "set", "lo", "up")
        powerless = ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", sys.executable, "-c")
        assert run_in(netns, *powerless, script) == "53\n"
        with pytest.raises(AssertionError, match="Address already in use"):
            run_in(netns, *powerless, taken + script)
        assert run_in(netns, "nft", "list", "ruleset") == ""


async def test_bind_mounted_files(tmp_path: Path) -> None:
    directory = tmp_path / "guest"
    directory.mkdir(mode=0o700)
    with contextlib.ExitStack() as stack:
        for name in ("resolv.conf", "hosts"):
            (tmp_path / name).write_text("192.0.2.1 before\n")
            (directory / name).touch()
            subprocess.run(["mount", "--bind", tmp_path / name, directory / name], check=True)
            stack.callback(subprocess.check_call, ["umount", directory / name])
        async with running_guest(directory) as guest:
            before = guest.resolv_conf.read_text()
            async with guest.client() as client:
                on = Resolver(enabled=True, manage_hosts=True)
                await client.apply_resolver(ApplyResolverRequest(resolver=on))
                assert "nameserver 127.0.0.11" in (tmp_path / "resolv.conf").read_text()
                assert (tmp_path / "hosts").read_text().startswith("127.0.0.1\tlocalhost\n")
                await client.apply_resolver(ApplyResolverRequest(resolver=Resolver()))
            assert (tmp_path / "resolv.conf").read_text() == guest.resolv_conf.read_text() == before
            assert (tmp_path / "hosts").read_text() == guest.hosts.read_text() == "192.0.2.1 before\n"


async def test_names_of_links(rig: Rig) -> None:
    rig.one.names("172.18.0.3 db", "172.18.0.4 cache")
    rig.two.names("172.19.0.3 redis redis.net1", "172.19.0.4 db")
    await rig.join(rig.one, rig.two)
    await rig.resolver()
    await rig.wait_for("redis")
    await rig.wait_for("db")
    assert await rig.found("Store") == []
    links = [NameLink(alias="Store", target="redis"), NameLink(alias="cache", target="db")]
    async with rig.guest.client() as client:
        await client.apply_interface(ApplyInterfaceRequest(interface=rig.two.interface(name_links=links)))
        listed = (await client.list_interfaces(ListInterfacesRequest())).interfaces
        assert [status.interface.name_links for status in listed if status.interface] == [[], links]
    for name in ("Store", "STORE", "store.net1"):
        assert await rig.found(name) == ["172.19.0.3"]
        assert await rig.found(name, tcp=True) == ["172.19.0.3"]
    assert (await rig.ask("store", "AAAA")).rcode() == dns.rcode.NOERROR
    assert (await rig.ask("store.net0")).rcode() == dns.rcode.NXDOMAIN
    assert await rig.found("cache") == ["172.19.0.4"]  # though the first network has a container of that name
    assert await rig.found("db") == ["172.18.0.3"]
    async with rig.guest.client() as client:
        await client.apply_interface(ApplyInterfaceRequest(interface=rig.two.interface()))
    assert await rig.found("store") == []
    assert await rig.found("cache") == ["172.18.0.4"]


async def test_unknown_single_labels_stay_inside_with_the_containers_own_ndots(rig: Rig) -> None:
    await rig.join(rig.one)

    def reply(query: bytes, tcp: bool) -> bytes:
        return dns.message.make_response(dns.message.from_wire(query)).to_wire()

    with server(rig.one.netns, "172.18.0.1", 53, reply) as asked:
        await rig.resolver(upstreams=["172.18.0.1"], options=["ndots:0"])
        for qtype in ("A", "AAAA"):
            assert (await rig.ask("nobody", qtype)).rcode() == dns.rcode.NOERROR
        assert not asked
        await rig.ask("nobody.example")
        await rig.resolver(upstreams=["172.18.0.1"])
        await rig.ask("nobody")
        assert len(asked) == 2


async def test_direct_and_back_while_it_runs(rig: Rig) -> None:
    path = rig.guest.resolv_conf
    original = path.read_bytes()
    await rig.join(rig.one)

    def listening() -> bool:
        return "127.0.0.11:" in run_in(rig.guest.netns, "ss", "-Hlun")

    values: dict[str, object] = {"upstreams": [f"192.0.2.{n}" for n in range(1, 5)], "search": ["a.example"]}
    for _ in range(3):
        await rig.resolver(direct=True, **values)
        assert path.read_text().splitlines()[1:] == [
            "search a.example",
            *(f"nameserver 192.0.2.{n}" for n in range(1, 5)),
        ]
        assert not listening()
        await rig.resolver(**values)
        assert path.read_text().splitlines()[1:] == [
            "search a.example",
            "nameserver 127.0.0.11",
            "options ndots:0",
        ]
        assert await rig.found("web") == ["172.18.0.2"]
    await rig.resolver(direct=True, **values)
    await rig.guest.stop(signal.SIGKILL)
    await rig.guest.start()
    await rig.resolver(direct=True, **values)
    assert not listening()
    assert await rig.guest.stop() == 0
    assert path.read_bytes() == original


async def test_the_hosts_file(rig: Rig) -> None:
    path = rig.guest.hosts
    path.write_text("192.0.2.9 before\n")
    inode = path.stat().st_ino
    await rig.resolver()
    assert path.read_text() == "192.0.2.9 before\n"
    lines = [HostEntry(address="2001:db8::1", names=["Extra"]), HostEntry(address="172.18.0.2", names=["w.x", "w"])]
    for _ in range(2):
        await rig.resolver(manage_hosts=True, hosts=lines)
        assert path.read_text().splitlines() == [*LOCALHOST, "2001:db8::1\tExtra", "172.18.0.2\tw.x w"]
        await rig.guest.stop(signal.SIGKILL)
        await rig.guest.start()
    with path.open("a") as file:
        file.write("192.0.2.8 by-hand\n")
    await rig.resolver(manage_hosts=True, hosts=lines[1:])
    assert path.read_text().splitlines() == [*LOCALHOST, "172.18.0.2\tw.x w", "192.0.2.8 by-hand"]
    path.write_text(path.read_text().replace("192.0.2.8 by-hand\n", ""))
    await rig.resolver(enabled=False, manage_hosts=True, hosts=lines)
    assert path.read_text().splitlines() == [*LOCALHOST, "2001:db8::1\tExtra", "172.18.0.2\tw.x w"]
    assert await rig.guest.stop() == 0
    assert path.read_text() == "192.0.2.9 before\n" and path.stat().st_ino == inode


async def test_nothing_is_left_of_networks_that_came_and_went(rig: Rig) -> None:
    await rig.join(rig.one)
    await rig.resolver()

    def open_files() -> int:
        return len(list(Path(f"/proc/{rig.guest.pid}/fd").iterdir()))

    before, files = rig.guest.ip("-br", "link"), open_files()
    async with rig.guest.client() as client:
        for _ in range(50):
            await client.apply_interface(ApplyInterfaceRequest(interface=rig.two.interface()))
            await rig.two.link(rig.guest)
            assert await rig.found("nobody") == []
            await client.delete_interface(DeleteInterfaceRequest(endpoint_id="ep1"))
            await rig.two.unlink()
    await until(lambda: open_files() <= files, "every descriptor is closed")
    assert rig.guest.ip("-br", "link") == before
    rig.ping("172.18.0.1")


async def test_memory_stays_within_the_budget_with_two_networks_and_names_in_use(rig: Rig) -> None:
    rig.one.names("172.18.0.3 db", "fd00:0::3 db")
    rig.two.names("172.19.0.3 cache")
    await rig.join(rig.one, rig.two)
    await rig.resolver()
    await rig.wait_for("db")
    await rig.wait_for("cache")
    for _ in range(50):
        for qtype in ("A", "AAAA", "MX"):
            await rig.ask("db", qtype)
            await rig.ask("cache", qtype, tcp=True)
    rig.ping("172.18.0.1", "-f", "-c", "2000")
    status = Path(f"/proc/{rig.guest.pid}/status").read_text()
    resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    print(f"guest agent: {resident} kB resident")
    assert resident < 35_000
