"""What each consumer needs of a kernel. Symbols are without CONFIG_; "A|B" is satisfied by either of them.

Sources: taploom's own code; OVS (Documentation/intro/install/general.rst, acinclude of the datapath) and OVN; moby's
contrib/check-config.sh; the CNI plugins' code (containernetworking/plugins 1.5); Cilium's system requirements
(Documentation/operations/system_requirements.rst, 1.18) and the helpers and program types that its datapath uses.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


class Level(enum.Enum):
    """How much a consumer needs something."""

    REQUIRED = "required"
    USEFUL = "useful"
    FORBIDDEN = "forbidden"  # it must be off


@dataclass(frozen=True)
class Need:
    """Symbols for one purpose.

    Attributes:
        symbols: each of them is needed; "A|B" is satisfied by either.
        loss: what one loses without them (or, forbidden, what happens with them).
    """

    level: Level
    symbols: tuple[str, ...]
    loss: str


@dataclass(frozen=True)
class Consumer:
    """Who uses the kernel. `key` is for scripts, `title` for people."""

    key: str
    title: str
    needs: tuple[Need, ...]


def required(symbols: str, loss: str) -> Need:
    """It does not work without these (separated by blanks)."""
    return Need(Level.REQUIRED, tuple(symbols.split()), loss)


def useful(symbols: str, loss: str) -> Need:
    """A feature is lost without these."""
    return Need(Level.USEFUL, tuple(symbols.split()), loss)


def forbidden(symbols: str, loss: str) -> Need:
    """These must be off."""
    return Need(Level.FORBIDDEN, tuple(symbols.split()), loss)


_MACHINE = (
    required("NET INET UNIX", "all sockets"),
    required("VSOCKETS VIRTIO_VSOCKETS", "the host's way to the agent"),
    required("TUN", "every interface that the agent makes: they are TAPs"),
    required("NET_NS", "network name spaces"),
    required("PROC_FS SYSFS TMPFS DEVTMPFS", "the file systems that the agent's init mounts"),
    useful(
        "BLK_DEV_INITRD RD_ZSTD", "taploom's initramfs images (zstd); a runtime's own root file system needs neither"
    ),
    required("VIRTIO VIRTIO_PCI|VIRTIO_MMIO", "all of the VMM's devices"),
    required("EPOLL SIGNALFD|EVENTFD FUTEX MEMFD_CREATE", "Python and its event loops"),
    required("PACKET", "announcing addresses, captures"),
    useful("IPV6", "networks with IPv6"),
    useful("VIRTIO_CONSOLE|SERIAL_8250_CONSOLE|SERIAL_AMBA_PL011_CONSOLE", "messages on the VMM's console"),
    useful("VIRTIO_BLK", "root file systems on disks"),
    useful("NET_9P NET_9P_VIRTIO 9P_FS", "directories shared by virtio-9p"),
    useful("VIRTIO_FS", "directories shared by virtiofs"),
    useful("VIRTIO_BALLOON", "memory given back to the host"),
    useful("HW_RANDOM_VIRTIO", "random numbers from the host early in the boot"),
    useful("HOTPLUG_PCI_PCIE|HOTPLUG_PCI_ACPI|VIRTIO_MMIO", "a vsock device replaced while the VM runs"),
    useful("HIGH_RES_TIMERS", "latencies below a timer tick"),
    useful("IKCONFIG_PROC", "checking the running kernel without its configuration file"),
)

CONSUMERS: tuple[Consumer, ...] = (
    Consumer(
        "taploom-guest",
        "taploom guest",
        (
            *_MACHINE,
            forbidden(
                "VSOCKETS_LOOPBACK",
                "with it a process in the guest reaches the agent's ports, which are for the host",
            ),
            required("NAMESPACES PID_NS UTS_NS IPC_NS", "containers in the guest"),
            required("CGROUPS", "limits of containers"),
            useful("OVERLAY_FS", "images' layers as root file system"),
            useful("SQUASHFS|EROFS_FS EXT4_FS", "read-only and writable root images"),
            useful("NF_TABLES NFT_NAT|IP_NF_NAT", "rules that redirect names or ports within the guest"),
            useful("SECCOMP_FILTER", "containers' system call filters"),
            useful("MEMCG CGROUP_PIDS CFS_BANDWIDTH CPUSETS", "limits of memory, processes and CPU"),
            useful("USER_NS", "containers without the VM's root"),
        ),
    ),
    Consumer(
        "taploom-helper",
        "taploom helper",
        (
            *_MACHINE,
            forbidden(
                "VSOCKETS_LOOPBACK",
                "with it a process in the helper reaches the agent's ports, which are for the host",
            ),
            required("OPENVSWITCH", "the kernel datapath; the slower userspace datapath is left"),
            required(
                "NF_CONNTRACK NF_NAT NF_CONNTRACK_ZONES NF_CONNTRACK_LABELS", "policies, egress and published ports"
            ),
            required("VETH", "the name servers' links"),
            required("NF_TABLES NFT_MASQ|IP_NF_TARGET_MASQUERADE NFT_NAT|IP_NF_NAT", "egress from the helper"),
            required("INOTIFY_USER", "new names: dnsmasq is told of them by inotify"),
            useful("GENEVE", "several helpers joined by tunnels"),
            useful("NET_SCH_HTB NET_SCH_INGRESS NET_CLS_ACT NET_ACT_POLICE", "bandwidth limits"),
            useful("NF_CONNTRACK_TIMEOUT", "idle times per kind of connection"),
            useful("IPV6_MULTIPLE_TABLES IP_MULTIPLE_TABLES", "policy routing"),
            useful("NF_TABLES_NETDEV NETFILTER_EGRESS NFT_DUP_NETDEV", "mirrors"),
        ),
    ),
    Consumer(
        "ovs-ovn",
        "OVS and OVN",
        (
            required("OPENVSWITCH", "the kernel datapath"),
            required("NF_CONNTRACK NF_NAT", "OVN's ACLs with state, NAT and load balancers (ct action)"),
            required(
                "NF_CONNTRACK_ZONES NF_CONNTRACK_MARK NF_CONNTRACK_LABELS", "a zone per port, marks and labels of OVN"
            ),
            required("NF_DEFRAG_IPV4 NF_CONNTRACK_OVS|NF_CONNTRACK", "fragments through conntrack"),
            required("NETFILTER_CONNCOUNT|OPENVSWITCH", "limits of connections per zone"),
            required("TUN", "internal and TAP ports of the userspace datapath"),
            useful("NF_DEFRAG_IPV6 IPV6", "IPv6 through conntrack"),
            useful("GENEVE OPENVSWITCH_GENEVE", "OVN's tunnels between chassis"),
            useful("VXLAN OPENVSWITCH_VXLAN", "tunnels to VTEPs and VXLAN peers"),
            useful("NET_IPGRE NET_IPGRE_DEMUX OPENVSWITCH_GRE", "GRE tunnels and ERSPAN"),
            useful("NF_CONNTRACK_TIMEOUT", "timeout policies per zone"),
            useful("NF_CONNTRACK_FTP NF_NAT_FTP NF_CONNTRACK_TFTP NF_NAT_TFTP", "FTP and TFTP through NAT (alg=)"),
            useful("NF_CT_NETLINK", "ovs-appctl dpctl/dump-conntrack and flush of kernel entries"),
            useful("NET_NSH", "NSH actions"),
            useful("MPLS NET_MPLS_GSO", "MPLS actions"),
            useful("PSAMPLE", "sampling in the kernel (OVS 3.4 and newer)"),
            useful("VLAN_8021Q", "VLAN interfaces beside OVS"),
            useful("NET_SCH_INGRESS NET_CLS_BASIC NET_CLS_MATCHALL NET_CLS_U32 NET_ACT_POLICE", "ingress policing"),
            useful(
                "NET_SCH_HTB NET_SCH_HFSC NET_SCH_SFQ NET_SCH_FQ_CODEL", "OVN's QoS and linux-htb, linux-hfsc queues"
            ),
            useful("NET_SCH_NETEM", "linux-netem QoS"),
            useful(
                "NET_CLS_FLOWER NET_ACT_MIRRED NET_ACT_TUNNEL_KEY NET_ACT_PEDIT NET_ACT_CT NET_TC_SKB_EXT",
                "flows offloaded to tc (hw-offload)",
            ),
            useful("XDP_SOCKETS", "AF_XDP ports of the userspace datapath"),
            useful("INET_ESP XFRM_USER", "OVN's encrypted tunnels"),
        ),
    ),
    Consumer(
        "docker",
        "Docker",
        (
            required("NAMESPACES NET_NS PID_NS IPC_NS UTS_NS", "containers"),
            required("CGROUPS CGROUP_SCHED CGROUP_BPF", "limits, and access to devices under cgroup v2"),
            required("KEYS", "containers' key rings"),
            required("VETH BRIDGE BRIDGE_NETFILTER", "the bridge driver"),
            required(
                "IP_NF_FILTER|NFT_COMPAT IP_NF_MANGLE|NFT_COMPAT IP_NF_NAT|NFT_COMPAT IP_NF_RAW|NFT_COMPAT",
                "its rules (iptables, or iptables-nft)",
            ),
            required("IP_NF_TARGET_MASQUERADE|NETFILTER_XT_TARGET_MASQUERADE|NFT_MASQ", "egress of containers"),
            required(
                "IP6_NF_FILTER|NFT_COMPAT IP6_NF_MANGLE|NFT_COMPAT IP6_NF_NAT|NFT_COMPAT IP6_NF_RAW|NFT_COMPAT",
                "its rules for IPv6",
            ),
            required("IP6_NF_TARGET_MASQUERADE|NETFILTER_XT_TARGET_MASQUERADE|NFT_MASQ", "egress of containers, IPv6"),
            required("NETFILTER_XT_MATCH_ADDRTYPE NETFILTER_XT_MATCH_CONNTRACK NETFILTER_XT_MARK", "published ports"),
            required("NETFILTER_XT_MATCH_IPVS IP_VS", "swarm's load balancer"),
            required("NF_NAT", "published ports and egress"),
            required("POSIX_MQUEUE", "/dev/mqueue in containers"),
            required("OVERLAY_FS|BTRFS_FS", "a storage driver"),
            useful("NFT_COMPAT", "iptables-nft, which Debian's iptables is"),
            useful("USER_NS", "containers whose root is not the host's (userns-remap, rootless)"),
            useful("SECCOMP SECCOMP_FILTER", "the default system call filter"),
            useful(
                "MEMCG CPUSETS CGROUP_PIDS CGROUP_FREEZER CGROUP_DEVICE", "--memory, --cpuset-cpus, --pids-limit, pause"
            ),
            useful("CFS_BANDWIDTH FAIR_GROUP_SCHED", "--cpus, --cpu-shares"),
            useful("BLK_CGROUP BLK_DEV_THROTTLING", "--device-read-bps and the like"),
            useful("CGROUP_PERF", "perf per container"),
            useful("CGROUP_HUGETLB", "limits of huge pages"),
            useful("NET_CLS_CGROUP CGROUP_NET_PRIO", "network classes and priorities of cgroup v1"),
            useful("IP_NF_TARGET_REDIRECT|NETFILTER_XT_TARGET_REDIRECT", "swarm's ingress"),
            useful("IP_VS_NFCT IP_VS_PROTO_TCP IP_VS_PROTO_UDP IP_VS_RR", "swarm's load balancer in full"),
            useful("EXT4_FS EXT4_FS_POSIX_ACL EXT4_FS_SECURITY", "overlay2 on ext4"),
            useful("VXLAN BRIDGE_VLAN_FILTERING", "the overlay driver"),
            useful(
                "CRYPTO CRYPTO_AEAD CRYPTO_GCM CRYPTO_SEQIV CRYPTO_GHASH XFRM XFRM_USER XFRM_ALGO INET_ESP "
                "NETFILTER_XT_MATCH_BPF|NETFILTER_XT_MATCH_U32",
                "encrypted overlay networks",
            ),
            useful("IPVLAN", "the ipvlan driver"),
            useful("MACVLAN DUMMY", "the macvlan driver"),
            useful("NF_CONNTRACK_FTP NF_NAT_FTP NF_CONNTRACK_TFTP NF_NAT_TFTP", "FTP and TFTP clients in containers"),
            useful("SECURITY_APPARMOR|SECURITY_SELINUX", "a mandatory access profile per container"),
        ),
    ),
    Consumer(
        "cni",
        "CNI plugins",
        (
            required("NET_NS", "every plugin"),
            required("VETH", "bridge, ptp"),
            required("BRIDGE", "bridge"),
            required(
                "NETFILTER_XT_MATCH_COMMENT NETFILTER_XT_MATCH_MULTIPORT NETFILTER_XT_MARK NETFILTER_XT_TARGET_MARK|"
                "NETFILTER_XT_MARK",
                "portmap and ipMasq through iptables",
            ),
            required("IP_NF_NAT|NFT_COMPAT NF_NAT", "portmap, ipMasq"),
            required("IP_NF_FILTER|NFT_COMPAT NETFILTER_XT_MATCH_CONNTRACK", "firewall"),
            required(
                "NETFILTER_XT_TARGET_MASQUERADE|IP_NF_TARGET_MASQUERADE NETFILTER_XT_NAT|IP_NF_NAT", "ipMasq, portmap"
            ),
            useful("NETFILTER_XT_MATCH_STATISTIC", "portmap with several addresses"),
            useful("NF_TABLES NF_TABLES_INET NFT_NAT NFT_MASQ NFT_FIB_INET", "portmap and ipMasq through nftables"),
            useful("MACVLAN", "macvlan"),
            useful("IPVLAN", "ipvlan"),
            useful("VLAN_8021Q", "vlan"),
            useful("BRIDGE_VLAN_FILTERING", "bridge with vlan="),
            useful("BRIDGE_NETFILTER", "rules for traffic within a bridge"),
            useful("DUMMY", "dummy"),
            useful("NET_VRF", "vrf"),
            useful("TUN", "tap"),
            useful("IFB NET_SCH_TBF NET_SCH_INGRESS NET_CLS_U32 NET_ACT_MIRRED NET_CLS_ACT", "bandwidth"),
            useful("IP_MULTIPLE_TABLES", "sbr"),
            useful("IPV6", "addresses of IPv6"),
            useful("PACKET", "static, dhcp, and announcing addresses"),
        ),
    ),
    Consumer(
        "cilium",
        "Cilium",
        (
            required("BPF BPF_SYSCALL", "every program of its datapath"),
            required("BPF_JIT", "programs at a speed that it accepts"),
            required("NET_CLS_BPF NET_CLS_ACT NET_SCH_INGRESS", "programs at interfaces (tc)"),
            required("CGROUPS CGROUP_BPF", "service addresses at connect() (bpf-lb-sock)"),
            required("CRYPTO_SHA1 CRYPTO_USER_API_HASH", "names of compiled programs"),
            required("PERF_EVENTS", "events to the agent, hubble"),
            required("SCHEDSTATS", "times of the scheduler (in its list of base requirements)"),
            required("VETH|NETKIT", "pods' interfaces"),
            required("FIB_RULES IP_MULTIPLE_TABLES", "policy routing"),
            required("VXLAN|GENEVE", "tunnels between nodes (or use native routing)"),
            useful("VXLAN", "VXLAN tunnels"),
            useful("GENEVE", "GENEVE tunnels"),
            useful("DUMMY", "dummy devices of its egress gateway and local redirects"),
            useful("DEBUG_INFO_BTF", "programs that find the kernel's types (CO-RE), and iterators"),
            useful("BPF_EVENTS KPROBES", "tracing programs (pwru, Tetragon)"),
            useful("BPF_STREAM_PARSER", "socket redirection (sockmap)"),
            useful(
                "CGROUP_NET_CLASSID|SOCK_CGROUP_DATA INET_DIAG_DESTROY INET_UDP_DIAG",
                "connections to removed back ends are closed (bpf-lb-sock)",
            ),
            useful(
                "NETFILTER_XT_TARGET_TPROXY NETFILTER_XT_TARGET_MARK|NETFILTER_XT_MARK NETFILTER_XT_TARGET_CT "
                "NETFILTER_XT_MATCH_MARK|NETFILTER_XT_MARK NETFILTER_XT_MATCH_SOCKET",
                "L7 proxy and FQDN policies",
            ),
            useful("IP_SET IP_SET_HASH_IP NETFILTER_XT_SET NETFILTER_XT_MATCH_COMMENT", "masquerading with iptables"),
            useful(
                "IP_NF_FILTER|NFT_COMPAT IP_NF_NAT|NFT_COMPAT IP_NF_MANGLE|NFT_COMPAT IP_NF_RAW|NFT_COMPAT",
                "its iptables chains",
            ),
            useful("NET_SCH_FQ", "bandwidth manager, BBR for pods"),
            useful("TCP_CONG_BBR", "BBR for pods"),
            useful("WIREGUARD", "encryption with WireGuard"),
            useful(
                "XFRM XFRM_OFFLOAD XFRM_STATISTICS XFRM_ALGO XFRM_USER INET_ESP INET6_ESP INET_IPCOMP INET6_IPCOMP "
                "INET_XFRM_TUNNEL INET6_XFRM_TUNNEL INET_TUNNEL INET6_TUNNEL CRYPTO_AEAD CRYPTO_GCM CRYPTO_SEQIV "
                "CRYPTO_CBC CRYPTO_HMAC CRYPTO_SHA256 CRYPTO_AES",
                "encryption with IPsec",
            ),
            useful("NETKIT", "netkit devices instead of veth (Linux 6.7 and newer)"),
            useful("LWTUNNEL_BPF", "programs on routes"),
            useful("XDP_SOCKETS", "AF_XDP beside its XDP programs"),
            useful("NET_IPIP", "DSR with IPIP (standalone load balancer)"),
            useful("MACVLAN IPVLAN", "pods with interfaces of other plugins beside it"),
            useful("IPV6", "IPv6"),
        ),
    ),
)


def by_key() -> Mapping[str, Consumer]:
    """The consumers by their key."""
    return {consumer.key: consumer for consumer in CONSUMERS}


def alternatives(symbol: str) -> Iterator[str]:
    """The names in "A|B"."""
    yield from symbol.split("|")
