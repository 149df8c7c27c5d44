"""What the helper's kernel lets through between the uplink, its own services and the machine's other interfaces.

All of it is one nftables table of ours, given to nft(8) as a whole and replaced in one transaction; other tables, which
the machine may have for itself, are not touched.
"""

from __future__ import annotations

import ipaddress
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agent_helper.errors import HelperError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

TABLE = "taploom"
REFUSED_MARK = 0x746C0002  # of SYNs that are refused
# Source MAC addresses of SYNs that come a second time, with the host's answer (see door.py).
LET_IN, REFUSED = bytes.fromhex("02746c000001"), bytes.fromhex("02746c000002")
_ONLY_SYN = "tcp flags & (fin | syn | rst | ack) == syn"
_IP = {4: "ip", 6: "ip6"}
_ECHO = {4: "icmp type echo-request", 6: "icmpv6 type echo-request"}
MARK = 0x746C0001  # of packets that a local listener takes, whatever their destination


@dataclass(frozen=True)
class Redirect:
    """The ports of the transparent listeners, on both 127.0.0.1 and ::1, that take what is for the host."""

    tcp: int
    udp: int


@dataclass(frozen=True)
class Opened:
    """What is let in from outside, by who has a route there.

    Attributes:
        ports: (address, tcp or udp, port).
        routed: subnets whose addresses can be pinged.
        unprotected: subnets that are open as a whole.
    """

    ports: frozenset[tuple[Address, str, int]] = frozenset()
    routed: tuple[IPNetwork, ...] = ()
    unprotected: tuple[IPNetwork, ...] = ()


@dataclass(frozen=True)
class Rules:
    """What the ruleset is made of.

    Attributes:
        interface: the kernel's end of the uplink.
        deaf: interfaces of the data path, as nft patterns (`tl*`): the kernel sees their frames and must not.
        mtu: the uplink's: TCP segments through it are made to fit.
        subnets: the uplink's own, one per family: what leaves with such a source is masqueraded.
        own: for what networks' routers have sent to the stand-in: by source, the gateway that it was meant for.
        stand_ins: the stand-ins, one per family.
        taken: gateways and addresses of the host: TCP and UDP to them goes to the listeners.
        redirect: the listeners, or None while there are none.
        opened: what is let in from outside.
    """

    interface: str
    deaf: tuple[str, ...]
    mtu: int
    subnets: tuple[IPNetwork, ...]
    own: Mapping[IPNetwork, Address]
    stand_ins: tuple[Address, ...]
    taken: frozenset[Address]
    redirect: Redirect | None
    opened: Opened = Opened()


def ruleset(rules: Rules) -> str:
    """The table as nft(8) reads it, replacing the one that is there."""
    uplink = f'"{rules.interface}"'
    lines = [
        f"table inet {TABLE}",
        f"delete table inet {TABLE}",
        f"table inet {TABLE} {{",
        *(line for version in (4, 6) for line in _taken_set(rules, version)),
        *(line for version in (4, 6) for line in _own_map(rules, version)),
        *(line for version in (4, 6) for line in _opened_set(rules, version)),
        # Before defragmentation (-400) and connection tracking (-200): the frames are none of this kernel's business.
        *_chain(
            "deaf",
            "filter hook prerouting priority -450",
            *_hold_back(rules, uplink),
            f"iifname {uplink} accept",
            *(f'iifname "{pattern}" drop' for pattern in rules.deaf),
        ),
        *_chain(
            "own",
            "nat hook prerouting priority dstnat",
            *(
                f"iifname {uplink} {ip} daddr {address} dnat {ip} to {ip} saddr map @own{address.version}"
                for address in rules.stand_ins
                for ip in (_IP[address.version],)
            ),
            f"iifname {uplink} ip daddr @taken4 icmp type echo-request redirect",
            f"iifname {uplink} ip6 daddr @taken6 icmpv6 type echo-request redirect",
        ),
        *_chain("take", "filter hook prerouting priority dstnat + 5", *_take(rules, uplink)),
        *_chain(
            "input",
            "filter hook input priority filter",
            f"iifname != {uplink} accept",
            f"meta mark {MARK:#x} accept",
            "ct state established,related accept",
            "icmp type echo-request ct status dnat accept",
            "icmpv6 type echo-request ct status dnat accept",
            "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } ip6 hoplimit 255 accept",
            "drop",
        ),
        *_chain(
            "forward",
            "filter hook forward priority filter",
            f"iifname {uplink} oifname {uplink} drop",
            f"oifname {uplink} ct state established,related accept",
            *_let_in(rules, uplink),
            f"oifname {uplink} drop",
        ),
        *_chain(
            "fit",
            "filter hook forward priority mangle",
            *(
                f"meta nfproto ipv{version} {side}ifname {uplink} tcp flags syn tcp option maxseg size > {fits} "
                f"tcp option maxseg size set {fits}"
                for version, fits in ((4, rules.mtu - 40), (6, rules.mtu - 60))
                for side in "io"
            ),
        ),
        # The kernel takes a packet that returns where it came from for a wrong turn of the sender's.
        *_chain(
            "output",
            "filter hook output priority filter",
            f"oifname {uplink} icmp type redirect drop",
            f"oifname {uplink} icmpv6 type nd-redirect drop",
        ),
        *_chain(
            "leave",
            "nat hook postrouting priority srcnat",
            *(f"oifname != {uplink} {_IP[subnet.version]} saddr {subnet} masquerade" for subnet in rules.subnets),
        ),
        "}",
    ]
    return "\n".join(lines) + "\n"


def _hold_back(rules: Rules, uplink: str) -> list[str]:
    """Connections to the host wait for its answer; not for long do they leave a trace in connection tracking."""
    if rules.redirect is None:
        return []
    return [
        f"iifname {uplink} ether saddr {LET_IN.hex(':')} accept",
        f"iifname {uplink} ether saddr {REFUSED.hex(':')} meta mark set {REFUSED_MARK:#x} accept",
        *(f"iifname {uplink} {_IP[v]} daddr @taken{v} {_ONLY_SYN} drop" for v in (4, 6)),
        *(f"iifname {uplink} {_IP[a.version]} daddr {a} {_ONLY_SYN} drop" for a in rules.stand_ins),
    ]


def _take(rules: Rules, uplink: str) -> list[str]:
    if rules.redirect is None:
        return []
    return [
        f"meta mark {REFUSED_MARK:#x} reject with tcp reset",
    ] + [
        f"iifname {uplink} {_IP[version]} daddr @taken{version} meta l4proto {protocol} "
        f"tproxy {_IP[version]} to {target}:{port} meta mark set {MARK:#x} accept"
        for version, target in ((4, "127.0.0.1"), (6, "[::1]"))
        for protocol, port in (("tcp", rules.redirect.tcp), ("udp", rules.redirect.udp))
    ]


def _let_in(rules: Rules, uplink: str) -> list[str]:
    opened = rules.opened
    return [
        *(
            f"oifname {uplink} {_IP[version]} daddr . meta l4proto . th dport @opened{version} accept"
            for version in (4, 6)
            if opened.ports
        ),
        *(
            f"oifname {uplink} {_IP[subnet.version]} daddr {subnet} {_ECHO[subnet.version]} accept"
            for subnet in opened.routed
        ),
        *(f"oifname {uplink} {_IP[subnet.version]} daddr {subnet} accept" for subnet in opened.unprotected),
    ]


def _opened_set(rules: Rules, version: int) -> list[str]:
    listed = sorted(f"{a} . {protocol} . {port}" for a, protocol, port in rules.opened.ports if a.version == version)
    kind = f"type ipv{version}_addr . inet_proto . inet_service"
    return _block(f"set opened{version}", kind, *_elements(listed)) if rules.opened.ports else []


def _taken_set(rules: Rules, version: int) -> list[str]:
    listed = sorted(str(address) for address in rules.taken if address.version == version)
    return _block(f"set taken{version}", f"type ipv{version}_addr", *_elements(listed))


def _own_map(rules: Rules, version: int) -> list[str]:
    kind = f"ipv{version}_addr"
    listed = sorted(f"{source} : {gateway}" for source, gateway in rules.own.items() if source.version == version)
    return _block(f"map own{version}", f"type {kind} : {kind}", "flags interval", *_elements(listed))


def _chain(name: str, hook: str, *rules: str) -> list[str]:
    return _block(f"chain {name}", f"type {hook}; policy accept", *rules)


def _elements(listed: Sequence[str]) -> list[str]:
    return [f"elements = {{ {', '.join(listed)} }}"] if listed else []


def _block(head: str, *lines: str) -> list[str]:
    return [f"  {head} {{", *(f"    {line}" for line in lines), "  }"]


def load(nft: str, text: str, *, needs: str = "nf_tables, nf_nat, tproxy") -> None:
    """Has nft(8) take the ruleset, in the calling thread's network namespace. Blocks for some milliseconds.

    Args:
        needs: what of the kernel the ruleset uses, for the error.

    Raises:
        HelperError: it refused; nothing was changed.
    """
    done = subprocess.run([nft, "-f", "-"], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HelperError(f"nft refused the rules (does the kernel have {needs}?): {done.stderr}")


def remove(nft: str) -> None:
    """Removes the table; nothing when it is not there.

    Raises:
        HelperError: nft refused.
    """
    load(nft, f"table inet {TABLE}\ndelete table inet {TABLE}\n")
