"""What root in a guest can try: no frame of it may reach another network, nor another guest under a false name."""

from __future__ import annotations

import socket
from functools import partial

import pytest
from scapy.layers.dns import DNS, DNSQR
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, ICMPv6ND_NA, ICMPv6ND_NS, ICMPv6NDOptDstLLAddr, IPv6
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw
from test_helper_rig import Guest, Rig, answered, endpoint, helper, network, received, sh

pytestmark = pytest.mark.system

ATTACKER, PEER, OTHER_PEER = "02:00:00:00:01:02", "02:00:00:00:01:03", "02:00:00:00:01:04"
VICTIM = "02:00:00:00:02:02"
BROADCAST = "ff:ff:ff:ff:ff:ff"
MARK = b"taploom-attack"


def marked(frame: Packet) -> bytes:
    return bytes(frame / Raw(MARK))


def across_networks() -> list[bytes]:
    """Frames from n1 that try to get at 10.77.2.2 (fd00:77:2::2, MAC ...02:02) in n2."""
    frames = []
    for source in (ATTACKER, PEER, VICTIM, "02:00:00:00:01:01", "02:00:00:00:02:01", "02:aa:bb:cc:dd:ee"):
        for target in (VICTIM, BROADCAST, "02:00:00:00:01:01", "02:00:00:00:02:01", "02:00:00:00:01:fd"):
            ether = Ether(src=source, dst=target)
            for address in ("10.77.1.2", "10.77.2.3", "10.77.2.1", "169.254.64.2", "0.0.0.0"):
                frames.append(marked(ether / IP(src=address, dst="10.77.2.2") / UDP(sport=1, dport=9)))
            frames.append(marked(ether / IP(src="10.77.1.2", dst="10.77.2.2") / ICMP()))
            frames.append(marked(ether / IP(src="10.77.1.2", dst="169.254.64.2") / UDP(sport=5, dport=53)))
            frames.append(marked(ether / IP(src="10.77.1.2", dst="255.255.255.255") / UDP(sport=1, dport=9)))
            for address in ("fd00:77:1::2", "fd00:77:2::3", "fe80::1"):
                frames.append(marked(ether / IPv6(src=address, dst="fd00:77:2::2") / ICMPv6EchoRequest()))
            frames.append(marked(ether / ARP(op=1, hwsrc=source, psrc="10.77.2.3", pdst="10.77.2.2")))
            frames.append(marked(ether / ARP(op=2, hwsrc=source, psrc="10.77.2.1", pdst="10.77.2.2", hwdst=VICTIM)))
            frames.append(marked(ether / IPv6(src="fe80::9", dst="ff02::1") / ICMPv6EchoRequest()))
            frames.append(
                marked(ether / IPv6(src="fd00:77:1::2", dst="fd00:77:2::2") / ICMPv6ND_NS(tgt="fd00:77:2::2"))
            )
    return frames


def within_network() -> list[bytes]:
    """Frames that pretend to come from another guest of n1, or carry a VLAN tag."""
    frames = []
    for target in (PEER, BROADCAST):
        genuine = Ether(src=ATTACKER, dst=target)
        for ether in (Ether(src=OTHER_PEER, dst=target), Ether(src="02:00:00:00:01:01", dst=target)):
            frames.append(marked(ether / IP(src="10.77.1.2", dst="10.77.1.3") / UDP(sport=1, dport=9)))
            frames.append(marked(ether / IP(src="10.77.1.4", dst="10.77.1.3") / UDP(sport=1, dport=9)))
        for address in ("10.77.1.4", "10.77.1.1", "10.77.2.2", "127.0.0.1", "169.254.64.1"):
            frames.append(marked(genuine / IP(src=address, dst="10.77.1.3") / UDP(sport=1, dport=9)))
            frames.append(marked(genuine / ARP(op=2, hwsrc=ATTACKER, psrc=address, hwdst=PEER, pdst="10.77.1.3")))
        frames.append(marked(genuine / ARP(op=2, hwsrc=OTHER_PEER, psrc="10.77.1.2", hwdst=PEER, pdst="10.77.1.3")))
        for address in ("fd00:77:1::4", "fd00:77:1::1", "fd00:77:2::2"):
            frames.append(marked(genuine / IPv6(src=address, dst="fd00:77:1::3") / ICMPv6EchoRequest()))
        advert = ICMPv6ND_NA(tgt="fd00:77:1::4", R=0, S=0, O=1) / ICMPv6NDOptDstLLAddr(lladdr=ATTACKER)
        frames.append(bytes(genuine / IPv6(src="fd00:77:1::2", dst="fd00:77:1::3") / advert / Raw(MARK)))
        plain = IP(src="10.77.1.2", dst="10.77.1.3") / UDP(sport=1, dport=9)
        for vlan in (0, 1, 100, 4095):
            frames.append(marked(genuine / Dot1Q(vlan=vlan) / plain))
            frames.append(marked(genuine / Dot1AD(vlan=vlan) / plain))
            frames.append(marked(genuine / Dot1Q(vlan=vlan) / Dot1Q(vlan=2) / plain))
    return frames


async def barrier(*pairs: tuple[Guest, str]) -> None:
    """Frames sent before have been dealt with once these answer."""
    for guest, address in pairs:
        assert guest.ping(address, count=3)


async def send_all(sock: socket.socket, frames: list[bytes], pause: Guest, address: str) -> None:
    for start in range(0, len(frames), 50):
        for frame in frames[start : start + 50]:
            sock.send(frame)
        assert pause.ping(address)  # so that no queue on the way overflows


async def make(rig: Rig) -> tuple[Guest, Guest, Guest, Guest, Guest]:
    await rig.apply(network(1, ipv6=True), network(2, ipv6=True))
    attacker = await rig.guest(endpoint(1, 2, "attacker", ipv6=True), gateway="10.77.1.1", dns="169.254.64.1")
    peer = await rig.guest(endpoint(1, 3, "peer", ipv6=True), gateway="10.77.1.1")
    other = await rig.guest(endpoint(1, 4, "other", ipv6=True), gateway="10.77.1.1")
    victim = await rig.guest(endpoint(2, 2, "victim", ipv6=True), gateway="10.77.2.1", dns="169.254.64.2")
    bystander = await rig.guest(endpoint(2, 3, "bystander", ipv6=True), gateway="10.77.2.1")
    return attacker, peer, other, victim, bystander


async def test_no_frame_reaches_another_network_or_carries_a_false_sender() -> None:
    async with helper() as rig:
        attacker, peer, other, victim, bystander = await make(rig)
        with (
            attacker.raw() as raw,
            peer.raw() as at_peer,
            other.raw() as at_other,
            victim.raw() as at_victim,
            bystander.raw() as at_bystander,
        ):
            # The rig works: a genuine marked frame arrives at the peer, and at nobody else.
            raw.send(marked(Ether(src=ATTACKER, dst=PEER) / IP(src="10.77.1.2", dst="10.77.1.3") / UDP(dport=9)))
            await barrier((attacker, "10.77.1.3"))
            # (The peer's own ICMP error, which quotes the frame, is seen here as well.)
            mine = bytes.fromhex(ATTACKER.replace(":", ""))
            assert sum(MARK in frame and frame[6:12] == mine for frame in received(at_peer)) == 1
            assert not any(MARK in frame for frame in received(at_other))

            await send_all(raw, within_network(), attacker, "10.77.1.3")
            await barrier((attacker, "10.77.1.3"), (other, "10.77.1.3"))
            assert not [frame for frame in received(at_peer) if MARK in frame]
            assert not [frame for frame in received(at_other) if MARK in frame]

            await send_all(raw, across_networks(), attacker, "10.77.1.3")
            await barrier((attacker, "10.77.1.3"), (victim, "10.77.2.3"), (bystander, "10.77.2.2"))
            for sock in (at_victim, at_bystander):
                frames = received(sock)
                assert not [frame for frame in frames if MARK in frame]
                assert not [frame for frame in frames if mine in frame[:12]]
        # Ordinary ways, with the routes that root can set.
        attacker.run("ip", "route", "add", "10.77.2.0/24", "via", "10.77.1.1")
        attacker.run("ip", "route", "add", "169.254.64.2/32", "via", "10.77.1.1")
        attacker.run("ip", "-6", "route", "add", "fd00:77:2::/64", "via", "fd00:77:1::1")
        others = ("10.77.2.2", "10.77.2.1", "169.254.64.2", "fd00:77:2::2", "fd00:77:2::1")
        assert not any(await answered(*(partial(attacker.ping, address, wait=1) for address in others)))
        assert victim.dig("169.254.64.2", "+short", "victim.net2") == "10.77.2.2"
        assert attacker.dig("169.254.64.1", "+short", "attacker.net1") == "10.77.1.2"
        assert "timed out" in attacker.dig("169.254.64.2", "+short", "victim.net2")
        # On-link routes and static neighbours, straight to the other's MAC and to the DNS servers' and gateways'.
        attacker.run("ip", "route", "replace", "10.77.2.0/24", "dev", "eth0")
        attacker.run("ip", "route", "replace", "169.254.64.2/32", "dev", "eth0")
        for mac in (VICTIM, "02:00:00:00:02:01", "02:00:00:00:01:fd", "02:00:00:00:02:fd"):
            for address in ("10.77.2.2", "169.254.64.2"):
                attacker.run("ip", "neigh", "replace", address, "lladdr", mac, "dev", "eth0", "nud", "permanent")
            pings = (partial(attacker.ping, address, wait=1) for address in ("10.77.2.2", "169.254.64.2"))
            assert not any(await answered(*pings)), mac
        # Whoever takes another's address loses what it had and gains nothing.
        attacker.run("ip", "addr", "replace", "10.77.2.3/24", "dev", "eth0")
        attacker.run("ip", "link", "set", "eth0", "address", "02:00:00:00:02:03")
        assert not attacker.ping("10.77.2.2", wait=1)
        assert not attacker.ping("10.77.1.3", wait=1)
        assert peer.ping("10.77.1.4")
        assert victim.ping("10.77.2.3")


async def test_the_helpers_own_kernel_does_not_answer() -> None:
    async with helper() as rig:
        # Addresses that the helper's machine may have anywhere, and a service on them.
        sh("ip", "-n", rig.netns, "addr", "add", "10.77.1.99/32", "dev", "lo")
        sh("ip", "-n", rig.netns, "addr", "add", "192.0.2.1/32", "dev", "lo")
        await rig.apply(network(1, ipv6=True))
        guest = await rig.guest(endpoint(1, 2, ipv6=True), gateway="10.77.1.1")
        (status,) = await rig.apply(endpoint(1, 2, ipv6=True))
        mac = sh("ip", "netns", "exec", rig.netns, "cat", f"/sys/class/net/{status.tap}/address").strip()
        assert not guest.ping("10.77.1.99", wait=1)
        for address in ("192.0.2.1", "127.0.0.1", "10.77.1.99"):
            guest.run("ip", "route", "replace", f"{address}/32", "dev", "eth0", check=False)
            for lladdr in ("ff:ff:ff:ff:ff:ff", mac):
                guest.run("ip", "neigh", "replace", address, "lladdr", lladdr, "dev", "eth0", "nud", "permanent")
        with guest.raw() as raw:
            for target in (mac, BROADCAST):
                for address in ("192.0.2.1", "10.77.1.99"):
                    ether = Ether(src=ATTACKER, dst=target)
                    raw.send(bytes(ether / IP(src="10.77.1.2", dst=address) / ICMP()))
                    raw.send(bytes(ether / IP(src="10.77.1.2", dst=address) / UDP(dport=53) / DNS(qd=DNSQR())))
                    raw.send(bytes(ether / ARP(op=1, hwsrc=ATTACKER, psrc="10.77.1.2", pdst=address)))
            await barrier((guest, "10.77.1.1"))
            senders = {frame[6:12].hex(":") for frame in received(raw)}
        assert senders <= {ATTACKER, "02:00:00:00:01:01"}
        # Nothing of ours speaks by itself on the switch's side either.
        assert sh("ip", "-n", rig.netns, "-6", "addr", "show", "dev", status.tap) == ""
