"""The checks; importing this package registers all of them, in the order of the table."""

from . import base, links, tunnels, netfilter, tc, ipsec, ebpf, ovs, cni  # noqa: F401, I001 - the table's order
