"""IPsec: ESP in tunnel mode as OVN, Cilium and Docker's encrypted overlay set it up, with the proof on the wire."""

from __future__ import annotations

import os

from ..check import check, expect
from ..netns import linked
from ..traffic import Sniffer, ip_protocol, ipv4, talk, tcp, udp

GROUP = "IPsec"
_ESP = 50


def _key(length: int) -> str:
    return "0x" + os.urandom(length).hex()


def _tunnel(algorithms: list[str]) -> str:
    """ESP tunnel between a and b with networks 172.16.1.0/24 and 172.16.2.0/24 behind."""
    a, b = linked()
    ends = {a.name: ("10.1.0.1", "172.16.1.1"), b.name: ("10.1.0.2", "172.16.2.1")}
    for namespace, other in ((a, b), (b, a)):
        (here, inner), (there, far) = ends[namespace.name], ends[other.name]
        namespace.ip("link add d0 type dummy", f"address add {inner}/24 dev d0", "link set d0 up")
        namespace.ip(f"route add {far[:-1]}0/24 dev eth0 src {inner}")
        for source, destination, spi in (("10.1.0.1", "10.1.0.2", "0x101"), ("10.1.0.2", "10.1.0.1", "0x102")):
            namespace.run(
                *f"ip xfrm state add src {source} dst {destination} proto esp spi {spi} reqid 7 mode tunnel".split(),
                *algorithms,
            )
        template = "tmpl src {} dst {} proto esp reqid 7 mode tunnel"
        namespace.ip(
            f"xfrm policy add src {inner[:-1]}0/24 dst {far[:-1]}0/24 dir out {template.format(here, there)}",
            f"xfrm policy add src {far[:-1]}0/24 dst {inner[:-1]}0/24 dir in {template.format(there, here)}",
        )
    wire = Sniffer(b, "eth0")
    udp(a, b, "172.16.2.1")
    tcp(a, b, "172.16.2.1")
    return _only_esp(wire.frames())


def _only_esp(frames: list[bytes]) -> str:
    # AF_PACKET sees a packet that came out of a tunnel on the device once more, with the inner addresses.
    outer = [frame for frame in ipv4(frames) if frame[26:30] in (b"\x0a\x01\x00\x01", b"\x0a\x01\x00\x02")]
    expect(outer, "nothing was seen on the wire")
    clear = [frame for frame in outer if ip_protocol(frame) != _ESP]
    expect(not clear, f"{len(clear)} packets on the wire are not ESP")
    expect(not any(b"taploom" in frame for frame in outer), "the text was on the wire")
    return f"{len(outer)} packets of ESP"


@check("esp-aes-gcm", GROUP, "an ESP tunnel with AES-GCM between two namespaces: UDP, TCP; only ESP on the wire")
def esp_gcm() -> str:
    return _tunnel(["aead", "rfc4106(gcm(aes))", _key(20), "128"])


@check("esp-aes-cbc-hmac", GROUP, "the same with AES-CBC and HMAC-SHA256")
def esp_cbc() -> str:
    return _tunnel(["auth-trunc", "hmac(sha256)", _key(32), "128", "enc", "cbc(aes)", _key(16)])


@check(
    "esp-transport-vxlan",
    GROUP,
    "VXLAN under ESP in transport mode, chosen by a firewall mark (Docker's encrypted overlay)",
)
def esp_transport_vxlan() -> str:
    a, b = linked()
    for namespace, here, there, host in ((a, "10.1.0.1", "10.1.0.2", 1), (b, "10.1.0.2", "10.1.0.1", 2)):
        for source, destination, spi in (("10.1.0.1", "10.1.0.2", "0x201"), ("10.1.0.2", "10.1.0.1", "0x202")):
            namespace.ip(
                f"xfrm state add src {source} dst {destination} proto esp spi {spi} reqid 13681891 mode transport"
                f" aead rfc4106(gcm(aes)) 0x{'5a' * 20} 64"
            )
        namespace.ip(
            f"xfrm policy add src {here} dst {there} proto udp dport 4789 dir out mark 0xd0c4e3"
            f" tmpl src {here} dst {there} proto esp reqid 13681891 mode transport",
            f"link add vx0 type vxlan id 42 dstport 4789 local {here} remote {there} dev eth0",
            f"address add 172.16.0.{host}/24 dev vx0",
            "link set vx0 up",
        )
        namespace.line("iptables-nft -w -t mangle -A OUTPUT -p udp --dport 4789 -j MARK --set-mark 0xd0c4e3")
    wire = Sniffer(b, "eth0")
    talk(a, b, "172.16.0.2")
    return _only_esp(wire.frames())


@check("xfrm-interface", GROUP, "a route-based ESP tunnel on an xfrm interface between two routers' networks")
def xfrm_interface() -> str:
    a, b = linked()
    for namespace, here, there, host in ((a, "10.1.0.1", "10.1.0.2", 1), (b, "10.1.0.2", "10.1.0.1", 2)):
        for source, destination, spi in (("10.1.0.1", "10.1.0.2", "0x301"), ("10.1.0.2", "10.1.0.1", "0x302")):
            namespace.ip(
                f"xfrm state add src {source} dst {destination} proto esp spi {spi} reqid 9 mode tunnel if_id 9"
                f" aead rfc4106(gcm(aes)) 0x{'6b' * 20} 128"
            )
        namespace.ip(
            f"xfrm policy add dir out if_id 9 tmpl src {here} dst {there} proto esp reqid 9 mode tunnel",
            f"xfrm policy add dir in if_id 9 tmpl src {there} dst {here} proto esp reqid 9 mode tunnel",
            "link add ipsec0 type xfrm dev eth0 if_id 9",
            f"address add 172.16.0.{host}/24 dev ipsec0",
            "link set ipsec0 up",
        )
    wire = Sniffer(b, "eth0")
    udp(a, b, "172.16.0.2")
    tcp(a, b, "172.16.0.2")
    return _only_esp(wire.frames())
