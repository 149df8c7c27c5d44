#!/bin/sh
# Installs what `python -m bench` needs beyond `make setup`. Run as root on Debian; running it again changes nothing.
#
#   bench/setup.sh
#
# - Debian packages: a C compiler, iperf3, ping, docker.io and busybox-static. No service is started.
# - gvproxy, which Debian has from trixie on, unpacked below the cache directory.
#
# Environment: see scripts/debian.sh
set -eu
. "$(dirname "$0")/../scripts/debian.sh"

cache=$taploom_cache/bench
install_packages gcc libc6-dev iperf3 iputils-ping iproute2 util-linux iptables docker.io busybox-static
if [ ! -x "$cache/gvproxy/usr/bin/gvproxy" ]; then
	rm -rf "$cache/gvproxy.new" "$cache/gvproxy"
	from_trixie "$cache/gvproxy.new" gvproxy
	"$cache/gvproxy.new/usr/bin/gvproxy" -version >/dev/null || fail "trixie's gvproxy does not run on this release"
	# Debian's build does not know its own version.
	mv "$cache/gvproxy.new/version-gvproxy" "$cache/gvproxy.new/version"
	mv "$cache/gvproxy.new" "$cache/gvproxy"
fi
echo "bench: ready"
