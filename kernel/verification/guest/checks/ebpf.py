"""eBPF: programs are loaded, attached and seen to act on traffic, at the hooks of Cilium and container runtimes."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
from pathlib import Path
from typing import Any

from ..bpf import (
    ATTACH_NETKIT_PEER,
    ATTACH_NETKIT_PRIMARY,
    ATTACH_SK_LOOKUP,
    ATTACH_TCX_INGRESS,
    Loaded,
    Map,
    index,
    link,
)
from ..check import CheckError, check, expect, run, step, wait_for
from ..netns import Namespace, linked, veth
from ..runner import CGROUPS
from ..traffic import (
    PATIENCE,
    Sniffer,
    accept,
    connect,
    connected,
    exchange,
    ipv4,
    listening,
    only_udp,
    talk,
    tcp,
    transfer,
    udp,
)

GROUP = "eBPF"
_BTF = Path("/sys/kernel/btf/vmlinux")
_SEEN, _DROPPED = 0, 1


def _no_answer(client: Namespace, server: Namespace, port: int = 7010) -> None:
    """A UDP port that a program drops does not answer."""
    try:
        udp(client, server, "10.1.0.2", port, tries=1, wait=0.8)
    except CheckError:
        return
    raise CheckError(f"UDP port {port} answered although the program drops it")


def _filters(loaded: Loaded, client: Namespace, server: Namespace) -> str:
    """Traffic passes but to the port that the program drops; its counters agree."""
    counts = loaded.map("counts")
    talk(client, server, "10.1.0.2")
    _no_answer(client, server)
    seen, dropped = counts[_SEEN], counts[_DROPPED]
    expect(seen > 5 and dropped >= 1, f"the program counts {seen} packets seen, {dropped} dropped")
    return f"{seen} seen, {dropped} dropped"


@check("bpf-jit", GROUP, "the JIT compiler is on and has compiled a loaded program")
def bpf_jit() -> str:
    loaded = Loaded("filter")
    shown = json.loads(run("bpftool", "-j", "prog", "show", "pinned", str(loaded.program("tc_filter"))))
    expect(shown.get("jited"), "the program was loaded without being compiled")
    return f"{shown['bytes_xlated']} bytes of BPF are {shown['bytes_jited']} bytes of machine code"


@check("bpf-btf", GROUP, "read the kernel's types from /sys/kernel/btf/vmlinux")
def bpf_btf() -> str:
    expect(_BTF.exists(), f"there is no {_BTF}")
    data = _BTF.read_bytes()
    magic, version, _, header, _, types, strings, length = struct.unpack_from("<HBBIIIII", data)
    expect(magic == 0xEB9F and version == 1, "no BTF of version 1")
    expect(header + strings + length <= len(data), "the BTF is cut off")
    names = data[header + strings : header + strings + length]
    for name in (b"task_struct", b"sk_buff", b"net_device", b"bpf_sock_addr_kern"):
        expect(b"\0" + name + b"\0" in names, f"the BTF does not know {name.decode()}")
    return f"{len(data) >> 10} KiB, {types >> 10} KiB of types"


@check(
    "bpf-core",
    GROUP,
    "a CO-RE program whose structures are declared in another order reads the right fields of a new process",
)
def bpf_core() -> str:
    loaded = Loaded("trace", "", "autoattach")
    executed = loaded.map("executed", value="II16s16s")
    program = Path("/tmp/verify-core")  # noqa: S108 - a tmpfs of the check's own
    program.symlink_to("/usr/bin/busybox")
    with subprocess.Popen(["true"], executable=str(program)):
        pass
    wait_for("the program to see the process", lambda: executed[0])
    tgid, parent, comm, parent_comm = struct.unpack_from("II16s16s", executed.raw(0))
    ours = Path("/proc/self/comm").read_text().strip().encode()
    comm, parent_comm = (name.partition(b"\0")[0] for name in (comm, parent_comm))
    expect(comm == b"verify-core", f"it read the name {comm!r}")
    expect(parent_comm == ours, f"it read the parent's name {parent_comm!r}, which is {ours!r}")
    expect(tgid > parent > 0, f"it read process {tgid} of parent {parent}")
    return f"process {tgid} of {parent} ({ours.decode()})"


@check("bpf-tracing", GROUP, "fentry, fexit, kprobe, kretprobe and a tracepoint each see a TCP connection being made")
def bpf_tracing() -> str:
    loaded = Loaded("trace", "", "autoattach")
    counts = loaded.map("counts")
    a, b = linked()
    tcp(a, b, "10.1.0.2")
    names = ("fentry", "fexit", "kprobe", "kretprobe", "tracepoint")
    silent = [name for number, name in enumerate(names) if not counts[number]]
    expect(not silent, f"{' '.join(silent)} saw nothing")
    return " ".join(names)


@check(
    "bpf-tc",
    GROUP,
    "a program on clsact ingress drops one UDP port and passes the rest (loaded by bpftool, then by tc itself)",
)
def bpf_tc() -> str:
    a, b = linked()
    loaded = Loaded("filter")
    b.tc("qdisc add dev eth0 clsact", f"filter add dev eth0 ingress bpf da pinned {loaded.program('tc_filter')}")
    seen = _filters(loaded, a, b)
    b.tc(
        "filter del dev eth0 ingress",
        f"filter add dev eth0 ingress bpf da obj {loaded.object} sec tc",
    )
    _no_answer(a, b)
    return seen


@check(
    "bpf-tcx",
    GROUP,
    "the same program attached by a tcx link, as Cilium does since 1.16; closing the link detaches it",
)
def bpf_tcx() -> str:
    a, b = linked()
    loaded = Loaded("filter")
    with b:
        attached = link(loaded.program("tc_filter"), index(b, "eth0"), ATTACH_TCX_INGRESS, "tcx ingress of eth0")
    seen = _filters(loaded, a, b)
    os.close(attached)
    udp(a, b, "10.1.0.2", 7010)
    return seen


@check("bpf-xdp", GROUP, "an XDP program in the driver (veth) and generic: drops one UDP port and passes the rest")
def bpf_xdp() -> str:
    a, b = linked()
    seen = []
    for mode in ("xdpdrv", "xdpgeneric"):
        loaded = Loaded("filter", mode)
        b.ip(f"link set dev eth0 {mode} pinned {loaded.program('xdp_filter')}")
        shown = b.ip_json("link", "show", "dev", "eth0")[0]["xdp"]
        expect(shown.get("mode") == {"xdpdrv": 1, "xdpgeneric": 2}[mode], f"attached in mode {shown}")
        seen.append(f"{mode[3:]}: {_filters(loaded, a, b)}")
        b.ip(f"link set dev eth0 {mode} off")
    udp(a, b, "10.1.0.2", 7010)
    return "; ".join(seen)


@check("bpf-netkit", GROUP, "a program on a netkit pair's peer: drops one UDP port on its way out of the container")
def bpf_netkit() -> str:
    host, pod = Namespace("host"), Namespace("pod")
    host.ip("link add nk0 type netkit mode l2 forward peer forward name nk1", f"link set nk1 netns {pod.name}")
    loaded = Loaded("filter")
    with host:
        device = index(host, "nk0")
        links = [
            link(loaded.program("tc_filter"), device, ATTACH_NETKIT_PEER, "peer of nk0"),
            link(loaded.program("tc_filter"), device, ATTACH_NETKIT_PRIMARY, "nk0"),
        ]
    host.ip("address add 10.1.0.2/24 dev nk0", "link set nk0 up")
    pod.ip("address add 10.1.0.1/24 dev nk1", "link set nk1 up")
    seen = _filters(loaded, pod, host)
    for fd in links:
        os.close(fd)
    return seen


def _cgroup(name: str) -> Path:
    cgroup = CGROUPS / f"verify-{name}"
    cgroup.mkdir()
    return cgroup


def _attach(cgroup: Path, kind: str, program: Path) -> None:
    run("bpftool", "cgroup", "attach", str(cgroup), kind, "pinned", str(program))


def _place(address: str, port: int) -> tuple[int, int]:
    """An address and a port as bpf_sock_addr has them: network order, in integers."""
    return struct.unpack("=I", socket.inet_aton(address))[0], socket.htons(port)


@check(
    "bpf-socket-lb",
    GROUP,
    "cgroup connect4, sendmsg4, recvmsg4, getpeername4, connect6: virtual addresses land on backends (Cilium's "
    "bpf-lb-sock)",
)
def bpf_socket_lb() -> str:
    a, b = linked()
    a.ip("address add fd00::1/64 dev eth0 nodad", "route add default dev eth0")
    b.ip("address add fd00::2/64 dev eth0 nodad")
    loaded = Loaded("service")
    cgroup = _cgroup("bpf-socket-lb")
    for name in ("connect4", "sendmsg4", "recvmsg4", "getpeername4", "connect6"):
        kind = {
            "connect4": "cgroup_inet4_connect",
            "connect6": "cgroup_inet6_connect",
            "sendmsg4": "cgroup_udp4_sendmsg",
        }
        kind |= {"recvmsg4": "cgroup_udp4_recvmsg", "getpeername4": "cgroup_inet4_getpeername"}
        _attach(cgroup, kind[name], loaded.program(f"service_{name}"))
    services = loaded.map("services", "II", "II")
    backends = loaded.map("backends", "II", "II")
    for virtual, real in (
        (_place("10.96.0.10", 80), _place("10.1.0.2", 7000)),
        (_place("10.96.0.10", 53), _place("10.1.0.2", 7001)),
    ):
        services[virtual] = real
        backends[real] = virtual
    wire = Sniffer(b, "eth0")
    (cgroup / "cgroup.procs").write_text("0")
    try:
        seen = tcp(a, b, "10.1.0.2", to=("10.96.0.10", 80))
        expect(seen.server == "10.96.0.10", f"getpeername says {seen.server}")
        answered = udp(a, b, "10.1.0.2", 7001, to=("10.96.0.10", 53))
        expect(answered.server == "10.96.0.10", f"recvfrom says {answered.server}")
        tcp(a, b, "fd00::2", to=("fd96::10", 80))
    finally:
        (CGROUPS / "cgroup.procs").write_text("0")
    packets = ipv4(wire.frames())
    expect(packets, "nothing was on the wire")
    expect(not any(b"\x0a\x60\x00\x0a" in frame[26:34] for frame in packets), "the virtual address was on the wire")
    return "TCP, UDP, IPv6; the wire has only the backend"


@check(
    "bpf-cgroup",
    GROUP,
    "cgroup programs as runtimes attach: a device list, a packet filter, a rule for new sockets",
)
def bpf_cgroup() -> str:
    a, b = linked()
    loaded = Loaded("container")
    cgroup = _cgroup("bpf-cgroup")
    _attach(cgroup, "cgroup_device", loaded.program("no_zero"))
    _attach(cgroup, "cgroup_inet_egress", loaded.program("no_udp"))
    _attach(cgroup, "cgroup_inet_sock_create", loaded.program("no_raw"))
    (cgroup / "cgroup.procs").write_text("0")
    try:
        with contextlib.suppress(PermissionError):
            Path("/dev/zero").open("rb").close()
            raise CheckError("/dev/zero was opened, which the device program forbids")
        Path("/dev/null").open("rb").close()
        with contextlib.suppress(PermissionError):
            socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close()
            raise CheckError("a raw socket was made, which the program forbids")
        tcp(a, b, "10.1.0.2")
        with a, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, contextlib.suppress(PermissionError):
            sock.sendto(b"taploom", ("10.1.0.2", 7001))
            raise CheckError("a datagram was sent, which the packet filter forbids")
    finally:
        (CGROUPS / "cgroup.procs").write_text("0")
    Path("/dev/zero").open("rb").close()
    return "device, egress, sock_create"


@contextlib.contextmanager
def _sockets(name: str) -> Any:
    """The sockets object attached to a cgroup that this process is in, and a namespace."""
    loaded = Loaded("sockets")
    cgroup = _cgroup(name)
    _attach(cgroup, "cgroup_sock_ops", loaded.program("remember"))
    namespace = Namespace("a")
    (cgroup / "cgroup.procs").write_text("0")
    try:
        yield loaded, namespace
    finally:
        (CGROUPS / "cgroup.procs").write_text("0")


_ESTABLISHED, _MESSAGES, _BYTES, _PROXIED = range(4)


@check(
    "bpf-sockmap",
    GROUP,
    "sockops puts both ends of a connection into a map, sk_msg moves bytes from one to the other past the network",
)
def bpf_sockmap() -> str:
    with _sockets("bpf-sockmap") as (loaded, namespace):
        run(
            *("bpftool", "prog", "attach", "pinned", str(loaded.program("shortcut"))),
            *("sk_msg_verdict", "pinned", str(loaded.maps / "connections")),
        )
        counts = loaded.map("counts")
        with connected(namespace, namespace, "127.0.0.1") as (sock, accepted):
            expect(counts[_ESTABLISHED] == 2, f"sockops saw {counts[_ESTABLISHED]} of both ends")
            wire = Sniffer(namespace, "lo")
            exchange(sock, accepted, 32768)
            passed = sum(len(frame) for frame in wire.frames())
        moved, messages = counts[_BYTES], counts[_MESSAGES]
        expect(moved >= 65536, f"{moved} of 65536 bytes were redirected")
        expect(passed < 4096, f"{passed} bytes passed the loopback interface all the same")
    return f"{moved} bytes in {messages} messages, {passed} on lo"


@check(
    "bpf-stream-parser",
    GROUP,
    "sk_skb parser and verdict on a sockmap: what one connection receives leaves by another (a proxy)",
)
def bpf_stream_parser() -> str:
    with _sockets("bpf-stream-parser") as (loaded, namespace):
        for name, kind in (("parse", "sk_skb_stream_parser"), ("pass_on", "sk_skb_stream_verdict")):
            run(
                *("bpftool", "prog", "attach", "pinned", str(loaded.program(name))),
                *(kind, "pinned", str(loaded.maps / "proxy")),
            )
        with contextlib.ExitStack() as stack:
            ends = []
            for port in (7101, 7102):
                ends.append(stack.enter_context(connected(namespace, namespace, "127.0.0.1", port))[0])
            ends[1].settimeout(PATIENCE)
            for word in (b"taploom", os.urandom(2000)):
                ends[0].sendall(word)
                got = b""
                try:
                    while len(got) < len(word):
                        got += ends[1].recv(4096)
                except TimeoutError:
                    raise CheckError(f"{len(got)} of {len(word)} bytes came out of the other connection") from None
                expect(got == word, "other bytes came out of the other connection")
        proxied = loaded.map("counts")[_PROXIED]
    return f"{proxied} bytes"


@check("bpf-sk-lookup", GROUP, "a program takes a hundred ports for one listener")
def bpf_sk_lookup() -> str:
    a, b = linked()
    loaded = Loaded("steer")
    with listening(b) as listener:
        loaded.map("listener")[0] = listener.fileno()
        namespace = os.open(b.path, os.O_RDONLY)
        attached = link(loaded.program("many_ports"), namespace, ATTACH_SK_LOOKUP, "the namespace")
        for port in (8000, 8099):
            with connect(a, "10.1.0.2", port) as sock, accept(listener, b.name) as accepted:
                exchange(sock, accepted)
        os.close(attached)
    return "ports 8000 to 8099"


@check(
    "bpf-overlay",
    GROUP,
    "Cilium's overlay: programs on two hosts put pods' packets into VXLAN by bpf_skb_set_tunnel_key, and take them out",
)
def bpf_overlay() -> str:
    hosts = linked()
    pods = []
    for number, host in enumerate(hosts, 1):
        pod = Namespace(f"pod{number}")
        veth(pod, host, "eth0", "lxc0")
        pod.ip(f"address add 172.16.0.{number}/24 dev eth0", "link set eth0 mtu 1400")
        host.ip("link add vx0 type vxlan external dstport 4789", "link set vx0 up")
        loaded = Loaded("overlay", str(number))
        settings = loaded.map("settings")
        settings[0] = index(host, "vx0")
        settings[1] = index(host, "lxc0")
        settings[3] = 0x0A010000 + 3 - number
        for device, program in (("lxc0", "to_overlay"), ("vx0", "from_overlay")):
            host.tc(
                f"qdisc add dev {device} clsact",
                f"filter add dev {device} ingress bpf da pinned {loaded.program(program)}",
            )
        pods.append(pod)
    wire = Sniffer(hosts[1], "eth0")
    talk(pods[0], pods[1], "172.16.0.2")
    return only_udp(wire.frames(), 4789, "VXLAN")


@check("bpf-redirect-peer", GROUP, "bpf_redirect_peer hands packets from one pod's device straight into another pod")
def bpf_redirect_peer() -> str:
    host, pods = Namespace("host"), [Namespace("pod1"), Namespace("pod2")]
    for number, pod in enumerate(pods, 1):
        veth(pod, host, "eth0", f"lxc{number}")
        pod.ip(f"address add 172.16.0.{number}/24 dev eth0")
    for number, (pod, other) in enumerate((pods, pods[::-1]), 1):
        pod.ip(f"neighbour add 172.16.0.{3 - number} lladdr {other.mac('eth0')} dev eth0")
        loaded = Loaded("overlay", str(number))
        loaded.map("settings")[1] = index(host, f"lxc{3 - number}")
        host.tc(
            f"qdisc add dev lxc{number} clsact",
            f"filter add dev lxc{number} ingress bpf da pinned {loaded.program('to_neighbour')}",
        )
    wire = Sniffer(host, "lxc2")
    talk(pods[0], pods[1], "172.16.0.2")
    sent = [frame for frame in ipv4(wire.frames()) if frame[30:34] == b"\xac\x10\x00\x02"]
    expect(not sent, f"{len(sent)} packets took the way through the device all the same")
    return "past the host's devices"


@check(
    "bpf-pacing",
    GROUP,
    "a program on egress sets departure times for fq: 128 KiB at 256 KiB/s take their time (Cilium's bandwidth "
    "manager)",
)
def bpf_pacing() -> str:
    a, b = linked()
    loaded = Loaded("overlay")
    a.tc(
        "qdisc add dev eth0 root fq",
        "qdisc add dev eth0 clsact",
        f"filter add dev eth0 egress bpf da pinned {loaded.program('pace')}",
    )
    with connected(a, b, "10.1.0.2") as (sock, accepted):
        took = transfer(sock, accepted, 128 << 10)
    expect(took > 0.25, f"128 KiB at 256 KiB/s took {took:.2f} s")
    return f"{took:.2f} s"


_MAPS = {
    "hash": (4, 8),
    "array": (4, 8),
    "percpu_hash": (4, 8),
    "percpu_array": (4, 8),
    "lru_hash": (4, 8),
    "lru_percpu_hash": (4, 8),
    "lpm_trie": (8, 8),
    "prog_array": (4, 4),
    "perf_event_array": (4, 4),
    "cgroup_array": (4, 4),
    "ringbuf": (0, 0),
    "stack_trace": (4, 64),
    "sockmap": (4, 4),
    "sockhash": (4, 4),
    "devmap": (4, 4),
    "devmap_hash": (4, 4),
    "cpumap": (4, 4),
    "xskmap": (4, 4),
    "queue": (0, 8),
    "stack": (0, 8),
    "bloom_filter": (0, 8),
    "reuseport_sockarray": (4, 8),
}


@check(
    "bpf-maps",
    GROUP,
    "every type of map that Cilium uses is created; longest-prefix match, LRU and maps in maps give the right answers",
)
def bpf_maps() -> str:
    pins = Path("/sys/fs/bpf/maps")
    pins.mkdir()
    missing = []
    for kind, (key, value) in _MAPS.items():
        entries = "4096" if kind == "ringbuf" else "16"
        flags = ["flags", "1"] if kind == "lpm_trie" else []
        command = ["bpftool", "map", "create", str(pins / kind), "type", kind, "key", str(key), "value", str(value)]
        try:
            run(*command, "entries", entries, "name", "verify", *flags)
        except CheckError as error:
            missing.append(f"{kind} ({error})")
    expect(not missing, f"not created: {'; '.join(missing)}")
    step("longest-prefix match")
    routes = Map(pins / "lpm_trie", "=I4B", "Q")
    routes[(8, 10, 0, 0, 0)] = 8
    routes[(24, 10, 1, 2, 0)] = 24
    found = (routes[(32, 10, 1, 2, 3)], routes[(32, 10, 9, 9, 9)])
    expect(found == (24, 8), f"longest-prefix match found /{found[0]} and /{found[1]}")
    step("LRU")
    recent = Map(pins / "lru_hash")
    for key in range(200):
        recent[key] = key
    expect(recent[199] == 199, "the newest entry of an LRU map is gone")
    step("map in map")
    run(
        *("bpftool", "map", "create", str(pins / "outer"), "type", "hash_of_maps", "key", "4", "value", "4"),
        *("entries", "4", "name", "outer", "inner_map", "pinned", str(pins / "hash")),
    )
    run(*f"bpftool map update pinned {pins}/outer key 1 0 0 0 value pinned {pins}/hash".split())
    return f"{len(_MAPS) + 1} types"
