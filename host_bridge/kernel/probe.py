"""What the running kernel has, found out by use, for kernels whose configuration is nowhere to be read.

Looks at what the kernel shows (name spaces, file systems, sysctls), opens sockets, makes interfaces and queueing
disciplines in a network name space of its own, and finds names of functions in /proc/kallsyms. It says nothing about
what cannot be found out so.

Run as a program it does this in its own process and prints JSON: the name space is left with it.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

_CLONE_NEWNET, _CLONE_NEWUSER = 0x40000000, 0x10000000
_RTM_NEWLINK, _RTM_NEWQDISC = 16, 36
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_EXCL, _NLM_F_CREATE = 0x1, 0x4, 0x200, 0x400
_IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_INFO_KIND, _TCA_KIND = 3, 18, 1, 1
_NLMSG_ERROR = 2
# "Operation not supported" and "no such file" are a kernel's answers to a kind that it does not know.
_NO_SUCH_KIND = {errno.EOPNOTSUPP, errno.ENOENT, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT}

# What is there when a path is. Source: the kernel's code that makes each.
_PATHS = {
    "NET_NS": "/proc/self/ns/net",
    "PID_NS": "/proc/self/ns/pid",
    "IPC_NS": "/proc/self/ns/ipc",
    "UTS_NS": "/proc/self/ns/uts",
    "USER_NS": "/proc/self/ns/user",
    "NAMESPACES": "/proc/self/ns/mnt",
    "CGROUPS": "/proc/cgroups",
    "SECCOMP": "/proc/sys/kernel/seccomp",
    "SECCOMP_FILTER": "/proc/sys/kernel/seccomp/actions_avail",
    "KEYS": "/proc/keys",
    "DEBUG_INFO_BTF": "/sys/kernel/btf/vmlinux",
    "INOTIFY_USER": "/proc/sys/fs/inotify",
    "EPOLL": "/proc/sys/fs/epoll",
    "IKCONFIG_PROC": "/proc/config.gz",
    "SCHEDSTATS": "/proc/sys/kernel/sched_schedstats",
    "XFRM_STATISTICS": "/proc/net/xfrm_stat",
    "BPF_SYSCALL": "/proc/sys/kernel/unprivileged_bpf_disabled",
}
# Present only when the code is built in or loaded: its absence proves nothing where modules are loaded on demand.
_SHOWN = {
    "TUN": "/dev/net/tun",
    "BPF_JIT": "/proc/sys/net/core/bpf_jit_enable",
    "BRIDGE_NETFILTER": "/proc/sys/net/bridge/bridge-nf-call-iptables",
    "NF_CONNTRACK": "/proc/sys/net/netfilter/nf_conntrack_max",
    "NF_CONNTRACK_TIMEOUT": "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established",
    "IP_VS": "/proc/net/ip_vs",
    "PACKET": "/proc/net/packet",
}
_FILE_SYSTEMS = {
    "OVERLAY_FS": "overlay",
    "EXT4_FS": "ext4",
    "SQUASHFS": "squashfs",
    "EROFS_FS": "erofs",
    "BTRFS_FS": "btrfs",
    "9P_FS": "9p",
    "VIRTIO_FS": "virtiofs",
    "PROC_FS": "proc",
    "SYSFS": "sysfs",
    "TMPFS": "tmpfs",
    "DEVTMPFS": "devtmpfs",
    "POSIX_MQUEUE": "mqueue",
}
_FAMILIES = {"UNIX": 1, "INET": 2, "IPV6": 10, "PACKET": 17, "VSOCKETS": 40, "XDP_SOCKETS": 44}
_LINKS = {
    "VETH": "veth",
    "BRIDGE": "bridge",
    "DUMMY": "dummy",
    "IFB": "ifb",
    "VXLAN": "vxlan",
    "GENEVE": "geneve",
    "WIREGUARD": "wireguard",
    "MACVLAN": "macvlan",
    "IPVLAN": "ipvlan",
    "VLAN_8021Q": "vlan",
    "NET_VRF": "vrf",
    "NET_IPIP": "ipip",
    "NET_IPGRE": "gre",
    "NETKIT": "netkit",
}
_QDISCS = {
    "NET_SCH_HTB": "htb",
    "NET_SCH_TBF": "tbf",
    "NET_SCH_NETEM": "netem",
    "NET_SCH_INGRESS": "ingress",
    "NET_SCH_FQ": "fq",
    "NET_SCH_FQ_CODEL": "fq_codel",
    "NET_SCH_SFQ": "sfq",
    "NET_SCH_HFSC": "hfsc",
}
# A function that is there when the symbol is on. Modules' names follow in brackets.
_FUNCTIONS = {
    "OPENVSWITCH": "ovs_dp_process_packet",
    "VSOCKETS_LOOPBACK": "vsock_loopback_send_pkt",
    "VIRTIO_VSOCKETS": "virtio_vsock_probe",
    "VIRTIO": "virtio_dev_probe",
    "VIRTIO_PCI": "virtio_pci_probe",
    "VIRTIO_MMIO": "virtio_mmio_probe",
    "VIRTIO_BLK": "virtblk_probe",
    "VIRTIO_CONSOLE": "virtcons_probe",
    "VIRTIO_BALLOON": "virtballoon_probe",
    "HW_RANDOM_VIRTIO": "virtrng_probe",
    "NET_9P": "p9_client_create",
    "NET_9P_VIRTIO": "p9_virtio_probe",
    "NF_NAT": "nf_nat_setup_info",
    "NF_CONNTRACK": "nf_conntrack_in",
    "NF_CONNTRACK_LABELS": "nf_connlabels_get",
    "NF_CT_NETLINK": "ctnetlink_new_conntrack",
    "NF_TABLES": "nf_tables_newrule",
    "NFT_MASQ": "nft_masq_init",
    "NFT_NAT": "nft_nat_init",
    "NFT_COMPAT": "nft_target_init",
    "NF_DEFRAG_IPV4": "ipv4_conntrack_defrag",
    "NETFILTER_CONNCOUNT": "nf_conncount_init",
    "NETFILTER_XT_MATCH_ADDRTYPE": "addrtype_mt_v1",
    "NETFILTER_XT_MATCH_CONNTRACK": "conntrack_mt_v3",
    "NETFILTER_XT_MATCH_COMMENT": "comment_mt",
    "NETFILTER_XT_MATCH_MULTIPORT": "multiport_mt",
    "NETFILTER_XT_MATCH_IPVS": "ipvs_mt",
    "NETFILTER_XT_MATCH_SOCKET": "socket_mt4_v1_v2_v3",
    "NETFILTER_XT_MARK": "mark_mt",
    "NETFILTER_XT_TARGET_MASQUERADE": "masquerade_tg",
    "NETFILTER_XT_TARGET_TPROXY": "tproxy_tg4_v1",
    "NETFILTER_XT_NAT": "xt_dnat_target_v2",
    "IP_NF_FILTER": "iptable_filter_table_init",
    "IP_NF_NAT": "iptable_nat_table_init",
    "IP_NF_MANGLE": "iptable_mangle_table_init",
    "IP_NF_RAW": "iptable_raw_table_init",
    "IP6_NF_FILTER": "ip6table_filter_table_init",
    "IP6_NF_NAT": "ip6table_nat_table_init",
    "IP6_NF_MANGLE": "ip6table_mangle_table_init",
    "IP6_NF_RAW": "ip6table_raw_table_init",
    "IP_VS": "ip_vs_conn_new",
    "NET": "sock_register",
    "FUTEX": "do_futex",
    "SIGNALFD": "do_signalfd4",
    "EVENTFD": "do_eventfd",
    "MEMFD_CREATE": "__do_sys_memfd_create",
    "BLK_DEV_INITRD": "initrd_load",
    "CGROUP_SCHED": "sched_create_group",
    "CGROUP_BPF": "__cgroup_bpf_attach",
    "MEMCG": "mem_cgroup_css_alloc",
    "CGROUP_PIDS": "pids_css_alloc",
    "CFS_BANDWIDTH": "throttle_cfs_rq",
    "BPF": "bpf_prog_alloc",
    "NET_CLS_BPF": "cls_bpf_classify",
    "NET_CLS_ACT": "tcf_action_exec",
    "NET_CLS_U32": "u32_classify",
    "NET_CLS_FLOWER": "fl_classify",
    "NET_CLS_MATCHALL": "mall_classify",
    "NET_ACT_POLICE": "tcf_police_act",
    "NET_ACT_MIRRED": "tcf_mirred_act",
    "BPF_STREAM_PARSER": "sk_psock_verdict_data_ready",
    "LWTUNNEL_BPF": "bpf_lwt_xmit_reroute",
    "PERF_EVENTS": "perf_event_alloc",
    "KPROBES": "register_kprobe",
    "CRYPTO_SHA1": "crypto_sha1_update",
    "CRYPTO_USER_API_HASH": "hash_accept_parent",
    "XFRM": "xfrm_lookup",
    "XFRM_USER": "xfrm_user_rcv_msg",
    "INET_ESP": "esp_input",
    "INET6_ESP": "esp6_input",
    "FIB_RULES": "fib_rules_lookup",
    "IP_MULTIPLE_TABLES": "fib4_rule_action",
    "IPV6_MULTIPLE_TABLES": "fib6_rule_action",
    "INET_DIAG_DESTROY": "tcp_diag_destroy",
    "TCP_CONG_BBR": "bbr_main",
    "IP_SET": "ip_set_create",
}


def probe() -> dict[str, str]:
    """What was found out: name -> "y", "m", "works" (whether built in or a module is not known) or "n"."""
    found = subprocess.run(
        [sys.executable, "-m", __name__],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    try:
        return {str(name): str(value) for name, value in json.loads(found.stdout).items()}
    except ValueError:
        return {}


def _probe() -> dict[str, str]:
    modules = Path("/proc/modules").exists()
    found: dict[str, str] = {}
    for name, path in _PATHS.items():
        found[name] = "works" if Path(path).exists() else "n"
    _merge(found, {name: "works" for name, path in _SHOWN.items() if Path(path).exists()})
    _merge(found, _file_systems(Path("/proc/filesystems").read_text(), modules))
    _merge(found, {name: _family(number) for name, number in _FAMILIES.items()})
    if _own_network():
        _merge(found, dict(_requests(_LINKS, _link_request)))
        _merge(found, dict(_requests(_QDISCS, _qdisc_request)))
    kallsyms = Path("/proc/kallsyms")
    if kallsyms.is_file():
        for name, value in functions(kallsyms.read_text(), modules).items():
            if value != "n" or found.get(name, "n") == "n":
                found[name] = value
    return {name: value for name, value in found.items() if value}


def functions(kallsyms: str, modules: bool) -> dict[str, str]:
    """What names of functions say.

    Args:
        kallsyms: lines "ADDRESS TYPE NAME [MODULE]".
        modules: whether code that is not loaded now may be loaded later.
    """
    places: dict[str, str] = {}
    for line in kallsyms.splitlines():
        parts = line.split()
        if len(parts) >= 3:
            # GCC and Clang add suffixes to names of parts of functions.
            places.setdefault(re.split(r"[.$]", parts[2])[0], parts[3] if len(parts) > 3 else "")
    if len(places) < 1000:  # the kernel hides them, or was built without
        return {}
    found = {}
    for name, function in _FUNCTIONS.items():
        place = places.get(function)
        if place is not None:
            found[name] = "m" if place else "y"
        elif name == "VSOCKETS_LOOPBACK" and not modules:
            found[name] = "n"
    return found


def _file_systems(text: str, modules: bool) -> dict[str, str]:
    listed = {line.split()[-1] for line in text.splitlines() if line.strip()}
    missing = "" if modules else "n"
    return {name: "works" if kind in listed else missing for name, kind in _FILE_SYSTEMS.items()}


def _merge(into: dict[str, str], more: Mapping[str, str]) -> None:
    for name, value in more.items():
        if value and into.get(name, "n") == "n":
            into[name] = value


def _family(number: int) -> str:
    try:
        socket.socket(number, socket.SOCK_RAW if number in {17, 44} else socket.SOCK_STREAM).close()
    except OSError as error:
        return {errno.EAFNOSUPPORT: "n", errno.EPERM: "works"}.get(error.errno or 0, "")
    return "works"


def _own_network() -> bool:
    """Moves this process to a network name space of its own, with a user name space where that needs one."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _CLONE_NEWNET if os.geteuid() == 0 else _CLONE_NEWNET | _CLONE_NEWUSER
    return bool(libc.unshare(flags) == 0)


def _requests(kinds: Mapping[str, str], build: object) -> Iterator[tuple[str, str]]:
    assert callable(build)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
        sock.settimeout(10)
        for name, kind in kinds.items():
            sock.send(build(kind))
            answer = sock.recv(65536)
            (type_,) = struct.unpack_from("=H", answer, 4)
            (code,) = struct.unpack_from("=i", answer, 16) if type_ == _NLMSG_ERROR else (0,)
            # Other errors, such as a missing parent interface, come from the kind itself: it is there.
            yield name, "n" if -code in _NO_SUCH_KIND else "" if -code == errno.EPERM else "works"


def _link_request(kind: str) -> bytes:
    info = _attribute(_IFLA_LINKINFO, _attribute(_IFLA_INFO_KIND, kind.encode()))
    body = struct.pack("=BxHiII", 0, 0, 0, 0, 0) + _attribute(_IFLA_IFNAME, f"p-{kind}\0".encode()) + info
    return _message(_RTM_NEWLINK, body)


def _qdisc_request(kind: str) -> bytes:
    parent = 0xFFFFFFF1 if kind == "ingress" else 0xFFFFFFFF  # TC_H_INGRESS, TC_H_ROOT
    handle = 0xFFFF0000 if kind == "ingress" else 0
    body = struct.pack("=BxxxiIII", 0, 1, handle, parent, 0) + _attribute(_TCA_KIND, kind.encode() + b"\0")
    return _message(_RTM_NEWQDISC, body)


def _attribute(type_: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), type_) + value + b"\0" * (-len(value) % 4)


def _message(type_: int, body: bytes) -> bytes:
    flags = _NLM_F_REQUEST | _NLM_F_ACK | _NLM_F_CREATE | _NLM_F_EXCL
    return struct.pack("=IHHII", 16 + len(body), type_, flags, 1, 0) + body


if __name__ == "__main__":
    print(json.dumps(_probe()))  # noqa: T201 - its parent reads it
