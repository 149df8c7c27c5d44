#!/bin/sh
# Makes this VM ready for a container of the lab: container STATE TAG=TARGET...
#   STATE       a directory to make, for pid files and the like
#   TAG=TARGET  a virtio-9p share of the host and where to mount it. A tag that ends in ":own" is the container's alone,
#               so that what was read of it may be kept.
set -eu
mkdir -p "$1"
shift
for share in "$@"; do
	target=${share#*=}
	tag=${share%%=*}
	options=trans=virtio,version=9p2000.L,msize=262144,access=any
	case $tag in
	*:own) options=$options,cache=loose ;;
	*) options=$options,cache=none ;;
	esac
	mkdir -p "$target"
	mount -t 9p -o "$options" "${tag%:own}" "$target"
done
# The container has these two files bound over its own. A mount point is written into, never replaced.
for file in /etc/resolv.conf /etc/hosts; do
	[ -e "$file" ] || : >"$file"
	mount --bind "$file" "$file"
done
# As Docker has it: ports below 1024 and ping need no capability.
echo 0 >/proc/sys/net/ipv4/ip_unprivileged_port_start
echo "0 2147483647" >/proc/sys/net/ipv4/ping_group_range
