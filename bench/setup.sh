#!/bin/sh
# Installs what `python -m bench` needs beyond `make setup`. Run as root on Debian; running it again changes nothing.
#
#   bench/setup.sh
#
# - Debian packages: a C compiler, iperf3, ping, docker.io and busybox-static. No service is started.
# - gvproxy, which Debian has from trixie on, unpacked below the cache directory.
# - trixie's Open vSwitch and OVN, those of the helper's image, with the libraries that they need: programs that run on
#   this release, in $cache/ovn/bin.
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
if [ ! -x "$cache/ovn/bin/ovn-northd" ]; then
	rm -rf "$cache/ovn.new" "$cache/ovn"
	from_trixie "$cache/ovn.new/root" openvswitch-switch openvswitch-common ovn-central ovn-common ovn-host libc6 libbpf1 \
		libcap2 libcap-ng0 libelf1t64 libevent-2.1-7t64 libnuma1 libssl3t64 libudev1 libunbound8 libxdp1 libzstd1 zlib1g
	mkdir "$cache/ovn.new/bin"
	ln -s root/usr/share "$cache/ovn.new/share"
	for program in usr/sbin/ovsdb-server usr/lib/openvswitch-switch/ovs-vswitchd usr/bin/ovn-northd usr/bin/ovn-controller \
		usr/bin/ovn-trace; do
		# They need a newer C library than this release's: each is run by its own loader (ld.so(8)).
		cat >"$cache/ovn.new/bin/${program##*/}" <<-EOF
			#!/bin/sh
			root=$cache/ovn/root
			exec "\$root"/usr/lib/*-linux-gnu/ld-linux-*.so.* --argv0 "\$0" --library-path "\$(echo "\$root"/usr/lib/*-linux-gnu)" "\$root/$program" "\$@"
		EOF
		chmod 755 "$cache/ovn.new/bin/${program##*/}"
	done
	mv "$cache/ovn.new" "$cache/ovn"
	"$cache/ovn/bin/ovn-northd" --version >/dev/null || fail "trixie's OVN does not run on this release"
fi
echo "bench: ready"
