"""Packet filters: NAT by nftables and by iptables (nft and legacy), connection tracking, what services are made of."""

from __future__ import annotations

import contextlib
import functools
import json
import socket
import struct
from collections.abc import Callable

from ..check import CheckError, check, expect, run, step, wait_for
from ..netns import Namespace, linked, routed, veth
from ..traffic import PATIENCE, Seen, accept, connect, connected, exchange, listening, talk, tcp, udp, unreachable

GROUP = "netfilter"
_IP_TRANSPARENT = 19


def _nft(namespace: Namespace, rules: str) -> None:
    namespace.run("nft", "-f", "-", stdin=rules)


def _counter(namespace: Namespace, name: str, table: str = "t", family: str = "ip") -> int:
    """The packets of a named counter of nftables."""
    answer = json.loads(namespace.run("nft", "-j", "list", "counter", family, table, name))
    return int(next(entry["counter"]["packets"] for entry in answer["nftables"] if "counter" in entry))


# The same four kinds of NAT in each language. Every entry: commands to be run on the router (or, redirect, the server).
_NFT_NAT = {
    "dnat": "table ip t { chain c { type nat hook prerouting priority dstnat;"
    " ip daddr 10.1.0.1 tcp dport 80 dnat to 10.2.0.2:7000; }; }",
    "masquerade": "table ip t { chain c { type nat hook postrouting priority srcnat; oifname right masquerade; }; }",
    "redirect": "table ip t { chain c { type nat hook prerouting priority dstnat; tcp dport 80 redirect to :7000; }; }",
    "tproxy": "table ip t { chain c { type filter hook prerouting priority mangle;"
    " socket transparent 1 meta mark set 1 accept;"
    " tcp dport 80 tproxy to :7000 meta mark set 1 accept; }; }",
}
_IPTABLES_NAT = {
    "dnat": ["-t nat -A PREROUTING -d 10.1.0.1 -p tcp --dport 80 -j DNAT --to-destination 10.2.0.2:7000"],
    "masquerade": ["-t nat -A POSTROUTING -o right -j MASQUERADE"],
    "redirect": ["-t nat -A PREROUTING -p tcp --dport 80 -j REDIRECT --to-ports 7000"],
    "tproxy": [
        "-t mangle -A PREROUTING -p tcp -m socket --transparent -j MARK --set-mark 1",
        "-t mangle -A PREROUTING -p tcp --dport 80 -j TPROXY --on-port 7000 --tproxy-mark 1",
    ],
}


def _set_up(namespace: Namespace, language: str, kind: str) -> None:
    if language == "nft":
        _nft(namespace, _NFT_NAT[kind])
        return
    for rule in _IPTABLES_NAT[kind]:
        namespace.run(language, "-w", *rule.split())


def _dnat(language: str) -> str:
    client, router, server = routed()
    _set_up(router, language, "dnat")
    seen = tcp(client, server, "10.2.0.2", to=("10.1.0.1", 80))
    expect(seen == Seen("10.1.0.2", "10.1.0.1"), f"the server saw {seen.client}, the client {seen.server}")
    return "10.1.0.1:80 is 10.2.0.2:7000"


def _masquerade(language: str) -> str:
    client, router, server = routed()
    server.ip("route del default")
    _set_up(router, language, "masquerade")
    for speak in (udp, tcp):
        seen = speak(client, server, "10.2.0.2")
        expect(seen.client == "10.2.0.1", f"the server saw {seen.client} instead of the router")
    return "seen as 10.2.0.1"


def _redirect(language: str) -> str:
    client, _, server = routed()
    _set_up(server, language, "redirect")
    tcp(client, server, "10.2.0.2", to=("10.2.0.2", 80))
    return "port 80 is 7000"


def _tproxy(language: str) -> str:
    client, router, _ = routed()
    router.ip("rule add fwmark 1 lookup 100", "route add local default dev lo table 100")
    _set_up(router, language, "tproxy")
    with router, socket.socket() as listener:
        listener.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
        listener.bind(("0.0.0.0", 7000))  # noqa: S104 - in a namespace of its own
        listener.listen()
        listener.settimeout(PATIENCE)
        with connect(client, "10.2.0.2", 80) as sock, accept(listener, router.name) as accepted:
            local = accepted.getsockname()
            expect(local == ("10.2.0.2", 80), f"the proxy's socket has the address {local}")
            exchange(sock, accepted)
    return "accepted as 10.2.0.2:80"


_KINDS: dict[str, tuple[Callable[[str], str], str]] = {
    "dnat": (_dnat, "a router forwards its port 80 to a server; the client sees the router's address"),
    "masquerade": (_masquerade, "a server without a route back is reached, and sees the router's address"),
    "redirect": (_redirect, "connections to port 80 are taken by a listener on 7000"),
    "tproxy": (_tproxy, "a proxy on the router accepts connections with the server's address as its own"),
}
_LANGUAGES = {"nft": "", "iptables-nft": "by iptables on nf_tables: ", "iptables-legacy": "by iptables' own tables: "}
for _language, _how in _LANGUAGES.items():
    for _kind, (_function, _does) in _KINDS.items():
        check(f"{_language}-{_kind}", GROUP, _how + _does)(functools.partial(_function, _language))


@check("nat-ipv6", GROUP, "DNAT and masquerade of IPv6 by nftables")
def nat_ipv6() -> str:
    client, router, server = routed()
    client.ip("address add fd01::2/64 dev eth0 nodad", "route add default via fd01::1")
    server.ip("address add fd02::2/64 dev eth0 nodad")
    router.ip("address add fd01::1/64 dev left nodad", "address add fd02::1/64 dev right nodad")
    router.sysctl("net/ipv6/conf/all/forwarding", 1)
    _nft(
        router,
        "table ip6 t { chain d { type nat hook prerouting priority dstnat;"
        " ip6 daddr fd01::1 tcp dport 80 dnat to [fd02::2]:7000; };"
        " chain s { type nat hook postrouting priority srcnat; oifname right masquerade; }; }",
    )
    seen = tcp(client, server, "fd02::2", to=("fd01::1", 80))
    expect(seen.client == "fd02::1", f"the server saw {seen.client}")
    return "seen as fd02::1"


@check(
    "nft-services",
    GROUP,
    "services as kube-proxy writes them: a map of address and port, verdict maps, numgen, fib, sets with time-outs",
)
def nft_services() -> str:
    client, router, server = routed()
    server.ip("address add 10.2.0.3/24 dev eth0")
    _nft(
        router,
        """table ip t {
            counter first {}
            counter second {}
            set recent { type ipv4_addr; flags dynamic, timeout; timeout 1m; size 1000; }
            set ranges { type ipv4_addr . inet_service; flags interval; elements = { 10.1.0.0/24 . 1-1024 }; }
            map services { type ipv4_addr . inet_proto . inet_service : verdict;
                           elements = { 10.96.0.10 . tcp . 80 : goto balance }; }
            chain first { meta l4proto tcp counter name first dnat to 10.2.0.2:7000; }
            chain second { meta l4proto tcp counter name second dnat to 10.2.0.3:7000; }
            chain balance { update @recent { ip saddr }; numgen inc mod 2 vmap { 0 : goto first, 1 : goto second }; }
            chain c { type nat hook prerouting priority dstnat;
                      fib daddr type local accept;
                      ip daddr . meta l4proto . th dport vmap @services; }
            chain f { type filter hook forward priority filter; policy accept;
                      ip saddr . tcp dport @ranges reject with tcp reset;
                      ct state new limit rate over 1000/second drop; }
        }""",
    )
    for _ in range(4):
        tcp(client, server, "0.0.0.0", to=("10.96.0.10", 80))  # noqa: S104 - any of the server's
    hits = [_counter(router, name) for name in ("first", "second")]
    expect(hits == [2, 2], f"the two backends got {hits} of four connections")
    expect("10.1.0.2" in router.run("nft", "list", "set", "ip", "t", "recent"), "the set did not learn the client")
    try:
        connect(client, "10.2.0.2", 1000)
    except CheckError as error:
        expect("reset" in str(error) or "refused" in str(error), f"not rejected by a reset: {error}")
    return "2 + 2 connections"


@check("nft-flowtable", GROUP, "established connections take the fast path of a flowtable (OFFLOAD in conntrack)")
def nft_flowtable() -> str:
    client, router, server = routed()
    _nft(
        router,
        """table ip t {
            counter slow {}
            flowtable f { hook ingress priority 0; devices = { left, right }; }
            chain c { type filter hook forward priority filter; ct state established flow add @f; counter name slow; }
        }""",
    )
    with connected(client, server, "10.2.0.2") as (sock, accepted):
        for _ in range(4):
            exchange(sock, accepted)
        listed = router.run("conntrack", "-L", "-p", "tcp")
        expect("OFFLOAD" in listed, f"conntrack shows no offloaded connection: {listed.strip()}")
        before = _counter(router, "slow")
        for _ in range(4):
            exchange(sock, accepted)
        slow = _counter(router, "slow") - before
    expect(slow <= 2, f"{slow} packets of an offloaded connection took the slow path")
    return "OFFLOAD"


@check(
    "nft-families",
    GROUP,
    "hooks of netdev (ingress, egress), bridge and inet tables drop and count; log and quota load",
)
def nft_families() -> str:
    a, b = Namespace("a"), Namespace("b")
    switch = Namespace("switch")
    switch.ip("link add br0 type bridge", "link set br0 up")
    for number, namespace in ((1, a), (2, b)):
        lines = [f"address add 10.1.0.{number}/24 dev eth0"], [f"link set p{number} master br0"]
        veth(namespace, switch, "eth0", f"p{number}", then_a=lines[0], then_b=lines[1])
    _nft(
        switch,
        """table bridge t { counter hits {}
            chain c { type filter hook forward priority 0; ether type ip tcp dport 7010 counter name hits drop; }; }
        table netdev t { counter hits {}
            chain c { type filter hook ingress device p1 priority 0; tcp dport 7011 counter name hits drop; }
            chain e { type filter hook egress device p2 priority 0; tcp dport 7012 counter name hits drop; }
        }
        """,
    )
    _nft(
        b,
        """table inet t {
            counter hits {}
            quota q { over 100 mbytes }
            chain c { type filter hook input priority 0; tcp dport 7013 log prefix "taploom " group 1;
                      tcp dport 7013 counter name hits drop; quota name q drop; }
        }""",
    )
    with b, contextlib.ExitStack() as stack:
        for port in (7010, 7011, 7012, 7013):
            stack.enter_context(listening(b, port))
        for port in (7010, 7011, 7012, 7013):
            unreachable(a, "10.1.0.2", port, timeout=0.3)
    talk(a, b, "10.1.0.2")
    for namespace, family, wanted in ((switch, "bridge", 1), (switch, "netdev", 2), (b, "inet", 1)):
        hits = _counter(namespace, "hits", family=family)
        expect(hits >= wanted, f"the {family} table dropped {hits} packets")
    return "bridge, netdev, inet"


@check(
    "conntrack",
    GROUP,
    "packets counted as new, established, related (an ICMP error) and invalid; marks, zones, listing, events",
)
def conntrack() -> str:
    client, router, server = routed()
    _nft(
        router,
        """table ip t {
            counter new {}; counter established {}; counter related {}; counter invalid {}; counter marked {};
            chain raw { type filter hook prerouting priority raw; tcp dport 7002 ct zone set 7;
                        tcp sport 7002 ct zone set 7; }
            chain c { type filter hook forward priority filter;
                ct state new ct mark set 0x2a;
                ct mark 0x2a counter name marked;
                ct state vmap { new : jump n, established : jump e, related : jump r, invalid : jump i };
            }
            chain n { counter name new; }
            chain e { counter name established; }
            chain r { counter name related; }
            chain i { counter name invalid drop; }
        }""",
    )
    router.sysctl("net/netfilter/nf_conntrack_tcp_loose", 0)
    with router:
        events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)  # NETLINK_NETFILTER
    events.bind((0, 0))
    events.setsockopt(270, 1, 1)  # SOL_NETLINK, NETLINK_ADD_MEMBERSHIP: NFNLGRP_CONNTRACK_NEW
    events.settimeout(PATIENCE)
    talk(client, server, "10.2.0.2")
    step("UDP to a closed port: an ICMP error")
    with client, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(("10.2.0.2", 9))
        sock.send(b"taploom")
        with contextlib.suppress(ConnectionRefusedError):
            sock.recv(10)
            raise CheckError("no ICMP error came back")
    step("a TCP segment of no connection")
    with client, socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
        raw.sendto(struct.pack("!HHIIBBHHH", 1, 2, 3, 4, 5 << 4, 0x10, 1000, 0, 0), ("10.2.0.2", 0))
    names = ("new", "established", "related", "invalid", "marked")
    wait_for("every state to be counted", lambda: all(_counter(router, name) for name in names))
    tcp(client, server, "10.2.0.2", 7002)
    listed = router.run("conntrack", "-L", "-o", "extended")
    for word in ("10.1.0.2", "mark=42", "zone=7"):
        expect(word in listed.replace("zone-orig", "zone"), f"conntrack lists no {word}")
    try:
        expect(len(events.recv(65536)) > 16, "an empty event")
    except TimeoutError:
        raise CheckError("no event told of the new connections") from None
    return ", ".join(f"{name} {_counter(router, name)}" for name in names)


@check(
    "bridge-netfilter",
    GROUP,
    "bridge-nf-call-iptables: bridged frames pass the IP tables (Docker's isolation stands on it)",
)
def bridge_netfilter() -> str:
    a, b, switch = Namespace("a"), Namespace("b"), Namespace("switch")
    switch.ip("link add br0 type bridge", "link set br0 up")
    for number, namespace in ((1, a), (2, b)):
        lines = [f"address add 10.1.0.{number}/24 dev eth0"], [f"link set p{number} master br0"]
        veth(namespace, switch, "eth0", f"p{number}", then_a=lines[0], then_b=lines[1])
    switch.sysctl("net/bridge/bridge-nf-call-iptables", 1)
    switch.line("iptables-nft -w -A FORWARD -m physdev --physdev-is-bridged -p tcp --dport 7000 -j DROP")
    udp(a, b, "10.1.0.2")
    with listening(b):
        unreachable(a, "10.1.0.2")
    switch.sysctl("net/bridge/bridge-nf-call-iptables", 0)
    tcp(a, b, "10.1.0.2")
    return "on: dropped, off: passes"


# What Docker, kube-proxy, Cilium and the CNI plugins write: matches and targets, by table.
_EXTENSIONS = {
    "filter": """-m addrtype --dst-type LOCAL -j RETURN
        -m comment --comment taploom -j RETURN
        -m connbytes --connbytes 10: --connbytes-dir both --connbytes-mode packets -j RETURN
        -p tcp -m connlimit --connlimit-above 100 -j RETURN
        -m connmark --mark 1 -j RETURN
        -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
        -m conntrack --ctstate NEW --ctorigdst 10.0.0.1 -j RETURN
        -m hashlimit --hashlimit-above 100/sec --hashlimit-name t -j RETURN
        -m iprange --src-range 10.0.0.1-10.0.0.9 -j RETURN
        -m length --length 100:200 -j RETURN
        -m limit --limit 5/min -j RETURN
        -m mac --mac-source 02:00:00:00:00:01 -j RETURN
        -m mark --mark 0x4000/0x4000 -j RETURN
        -p tcp -m multiport --dports 80,443 -j RETURN
        -m physdev --physdev-is-bridged -j RETURN
        -m pkttype --pkt-type unicast -j RETURN
        -m policy --dir in --pol ipsec -j RETURN
        -m quota --quota 1000 -j RETURN
        -m recent --name t --set -j RETURN
        -m state --state NEW -j RETURN
        -m statistic --mode random --probability 0.5 -j RETURN
        -m string --string taploom --algo bm -j RETURN
        -p tcp -m tcpmss --mss 1000:1500 -j RETURN
        -m u32 --u32 0=1 -j RETURN
        -m time --timestart 10:00 -j RETURN
        -j LOG --log-prefix taploom
        -j NFLOG --nflog-group 1
        -p tcp -j REJECT --reject-with tcp-reset
        -j REJECT""",
    "mangle": """-j CLASSIFY --set-class 1:1
        -j CONNMARK --save-mark
        -j DSCP --set-dscp 1
        -j MARK --set-xmark 0x4000/0x4000
        -p udp -j CHECKSUM --checksum-fill
        -p tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu""",
    "raw": "-j CT --notrack\n-j TRACE",
    "nat": "-j SNAT --to-source 10.0.0.1 --random-fully\n-j MASQUERADE --random-fully\n-j NETMAP --to 10.0.0.0/24",
}
_EXTENSION_CHAINS = {"filter": "FORWARD", "mangle": "POSTROUTING", "raw": "PREROUTING", "nat": "POSTROUTING"}


@check(
    "iptables-extensions",
    GROUP,
    "every match and target that Docker, kube-proxy, Cilium and the CNI plugins write is taken by the kernel",
)
def iptables_extensions() -> str:
    missing = []
    count = 0
    for command in ("iptables-nft", "iptables-legacy"):
        for table, rules in _EXTENSIONS.items():
            lines = [f"-A {_EXTENSION_CHAINS[table]} {rule.strip()}" for rule in rules.splitlines()]
            count += len(lines)
            try:
                run(f"{command}-restore", "-w", stdin="\n".join([f"*{table}", *lines, "COMMIT", ""]))
            except CheckError:
                missing += [f"{command} {line}" for line in lines if not _accepted(command, table, line)]
    expect(not missing, f"not taken: {'; '.join(missing)}")
    return f"{count} rules, nft and legacy"


def _accepted(command: str, table: str, rule: str) -> bool:
    try:
        run(command, "-w", "-t", table, *rule.split())
    except CheckError:
        return False
    return True


@check("ipset", GROUP, "sets of addresses, networks and ports; iptables matches against one (Cilium, firewalls)")
def ipset() -> str:
    a, b = linked()
    b.run(
        *("ipset", "restore"),
        stdin="create n hash:net\nadd n 10.1.0.0/24\n"
        "create i hash:ip timeout 60\nadd i 10.1.0.9\n"
        "create p hash:ip,port\nadd p 10.1.0.1,tcp:7000\n"
        "create m bitmap:port range 1-1000\ncreate l list:set\nadd l n\n",
    )
    b.line("iptables-nft -w -A INPUT -p tcp -m set --match-set n src -j DROP")
    udp(a, b, "10.1.0.2")
    with listening(b):
        unreachable(a, "10.1.0.2")
    b.run("ipset", "del", "n", "10.1.0.0/24")
    tcp(a, b, "10.1.0.2")
    return "matched, then not"


@check(
    "ipvs",
    GROUP,
    "a virtual service with two backends, round robin with NAT (Docker's ingress, kube-proxy's ipvs mode)",
)
def ipvs() -> str:
    client, router, server = routed()
    server.ip("address add 10.2.0.3/24 dev eth0")
    router.ip("address add 10.96.0.10/32 dev lo")
    router.run("ipvsadm", "-A", "-t", "10.96.0.10:80", "-s", "rr")
    for backend in ("10.2.0.2", "10.2.0.3"):
        router.run("ipvsadm", "-a", "-t", "10.96.0.10:80", "-r", f"{backend}:7000", "-m")
    reached = set()
    for _ in range(2):
        reached.add(_local_address(client, server))
    expect(reached == {"10.2.0.2", "10.2.0.3"}, f"only {reached} was reached")
    return "both backends"


def _local_address(client: Namespace, server: Namespace) -> str:
    with connected(client, server, "10.96.0.10", to=("10.96.0.10", 80)) as (sock, accepted):
        exchange(sock, accepted)
        return str(accepted.getsockname()[0])
