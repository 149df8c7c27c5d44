#!/bin/sh
# Mounts what a container of the lab is made of: container TAG=TARGET...; each a virtio-9p share of the host.
# A tag that ends in ":own" is the container's alone, so that what was read of it may be kept.
set -eu
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
