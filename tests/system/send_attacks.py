"""Runs in a guest as root: sends every frame that should not get through, then one that should.

usage: send_attacks.py JSON, an object with: interface, mac, ip, ip6 (the attacker's), gateway_mac, peer_mac, peer_ip
(a guest on the same network), victim_mac, victim_ip, victim_ip6, victim_gateway, victim_gateway_mac (a guest on
another network), spoof_mac, spoof_ip (nobody's).
"""

import json
import sys

from scapy.all import ARP, ICMP, IP, UDP, Dot1AD, Dot1Q, Ether, ICMPv6ND_NA, ICMPv6ND_NS, IPv6, Raw, conf

a = json.loads(sys.argv[1])
socket = conf.L2socket(iface=a["interface"])


def mark(name: str) -> Raw:
    return Raw(b"MARK<" + name.encode() + b">" + bytes(32))


def send(frame: Ether) -> None:
    socket.send(frame)


own, broadcast = a["mac"], "ff:ff:ff:ff:ff:ff"
solicited = "33:33:ff:" + ":".join(a["victim_mac"].split(":")[3:])
udp = UDP(sport=4000, dport=4000)

# The other network's guest, by its MAC, by the gateway's MAC, and by everyone's.
for name, to in (
    ("mac", a["victim_mac"]),
    ("gateway", a["gateway_mac"]),
    ("other-gateway", a["victim_gateway_mac"]),
    ("broadcast", broadcast),
):
    for source_mac in (own, a["victim_gateway_mac"], a["spoof_mac"], a["peer_mac"]):
        for source_ip in (a["ip"], a["victim_gateway"], a["spoof_ip"], a["victim_ip"]):
            send(Ether(dst=to, src=source_mac) / IP(src=source_ip, dst=a["victim_ip"]) / udp / mark(f"{name} udp"))
        send(Ether(dst=to, src=source_mac) / IP(src=a["ip"], dst=a["victim_ip"]) / ICMP() / mark(f"{name} icmp"))
        if a["victim_ip6"]:
            send(Ether(dst=to, src=source_mac) / IPv6(src=a["ip6"], dst=a["victim_ip6"]) / udp / mark(f"{name} udp6"))
        # No IP at all.
        send(Ether(dst=to, src=source_mac, type=0x88B5) / mark(f"{name} raw"))
        # VLAN tags, single, double and 802.1ad.
        for vid in (0, 1, 2, 100, 4095):
            send(
                Ether(dst=to, src=source_mac)
                / Dot1Q(vlan=vid)
                / IP(src=a["ip"], dst=a["victim_ip"])
                / udp
                / mark("vlan")
            )
        send(
            Ether(dst=to, src=source_mac)
            / Dot1Q(vlan=1)
            / Dot1Q(vlan=2)
            / IP(src=a["ip"], dst=a["victim_ip"])
            / udp
            / mark("vlan double")
        )
        send(Ether(dst=to, src=source_mac) / Dot1AD(vlan=1) / IP(dst=a["victim_ip"]) / udp / mark("vlan ad"))

# ARP and neighbour discovery, asking and claiming.
for source_ip in (a["ip"], a["victim_gateway"], a["spoof_ip"]):
    send(Ether(dst=broadcast, src=own) / ARP(op=1, hwsrc=own, psrc=source_ip, pdst=a["victim_ip"]) / mark("arp ask"))
    send(
        Ether(dst=a["victim_mac"], src=own)
        / ARP(op=2, hwsrc=own, psrc=source_ip, hwdst=a["victim_mac"], pdst=a["victim_ip"])
        / mark("arp claim")
    )
    send(Ether(dst=broadcast, src=own) / ARP(op=2, hwsrc=own, psrc=a["victim_gateway"]) / mark("arp gratuitous"))
if a["victim_ip6"]:
    send(
        Ether(dst=solicited, src=own)
        / IPv6(src=a["ip6"], dst="ff02::1")
        / ICMPv6ND_NS(tgt=a["victim_ip6"])
        / mark("nd ask")
    )
    send(
        Ether(dst="33:33:00:00:00:01", src=own)
        / IPv6(src=a["ip6"], dst="ff02::1")
        / ICMPv6ND_NA(tgt=a["victim_ip6"], R=1, S=0, O=1)
        / mark("nd claim")
    )
    send(Ether(dst="33:33:00:00:00:01", src=own) / IPv6(src=a["ip6"], dst="ff02::1") / udp / mark("multicast6"))
send(Ether(dst="01:00:5e:00:00:fb", src=own) / IP(src=a["ip"], dst="224.0.0.251") / udp / mark("multicast"))

# The same network's guest: what port security stops.
to_peer = IP(src=a["ip"], dst=a["peer_ip"]) / udp
send(Ether(dst=a["peer_mac"], src=a["spoof_mac"]) / to_peer / mark("peer spoofed mac"))
send(Ether(dst=a["peer_mac"], src=own) / IP(src=a["spoof_ip"], dst=a["peer_ip"]) / udp / mark("peer spoofed ip"))
send(Ether(dst=a["peer_mac"], src=own) / Dot1Q(vlan=5) / to_peer / mark("peer vlan"))
send(
    Ether(dst=a["peer_mac"], src=own)
    / ARP(op=2, hwsrc=own, psrc=a["spoof_ip"], hwdst=a["peer_mac"], pdst=a["peer_ip"])
    / mark("peer spoofed arp")
)

# Allowed, and last: frames keep their order, so once it has arrived, all before it has been dealt with.
send(Ether(dst=a["peer_mac"], src=own) / to_peer / mark("end"))
print("sent", flush=True)
