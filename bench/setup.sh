#!/bin/sh
# Installs what `python -m bench` needs beyond `make setup`. Run as root on Debian; running it again changes nothing.
#
#   bench/setup.sh
#
# - Debian packages: a C compiler, iperf3, ping, docker.io and busybox-static. No service is started.
# - gvproxy, which Debian has from trixie on: when this release lacks it, it is taken from the same mirror's trixie with
#   a private apt configuration and unpacked below the cache directory. The system's apt sources and its package
#   database know nothing of it.
#
# Environment: TAPLOOM_CACHE        cache directory (default /var/cache/taploom)
#              TAPLOOM_DEBIAN_MIRROR where trixie is (default: the mirror that this machine's apt uses)
set -eu

cache=${TAPLOOM_CACHE:-/var/cache/taploom}/bench
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
policy=/usr/sbin/policy-rc.d
work=
made_policy=

fail() {
	echo "bench/setup.sh: $*" >&2
	exit 1
}

clean_up() {
	[ -z "$made_policy" ] || rm -f "$policy"
	[ -z "$work" ] || rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

[ "$(id -u)" = 0 ] || fail "needs root (it installs Debian packages)"
command -v apt-get >/dev/null || fail "needs Debian's apt-get"

# True when the Debian package is installed.
installed() {
	[ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

install_packages() {
	missing=
	for package in gcc libc6-dev iperf3 iputils-ping iproute2 util-linux iptables docker.io busybox-static; do
		installed "$package" || missing="$missing $package"
	done
	[ -n "$missing" ] || return 0
	echo "installing:$missing"
	# Maintainer scripts ask policy-rc.d before they start a service (Debian policy 9.3.3): 101 = do not.
	if [ ! -e "$policy" ]; then
		made_policy=yes
		printf '#!/bin/sh\nexit 101\n' >"$policy"
		chmod 755 "$policy"
	fi
	# shellcheck disable=SC2086
	apt_install $missing || { apt-get -q update && apt_install $missing; } || fail "apt-get could not install:$missing"
	if [ -n "$made_policy" ]; then
		rm -f "$policy"
		made_policy=
	fi
}

apt_install() {
	DEBIAN_FRONTEND=noninteractive apt-get -q -y install --no-install-recommends "$@"
}

# Prints the URI of the Debian archive that this machine's apt uses.
mirror() {
	if [ -n "${TAPLOOM_DEBIAN_MIRROR:-}" ]; then
		echo "$TAPLOOM_DEBIAN_MIRROR"
		return
	fi
	apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' | sort -u | head -n 1
}

install_gvproxy() {
	[ ! -x "$cache/gvproxy/usr/bin/gvproxy" ] || return 0
	echo "fetching gvproxy"
	work=$(mktemp -d)
	mkdir -p "$cache"
	if apt-cache show gvproxy >/dev/null 2>&1; then
		(cd "$work" && apt-get -q -o APT::Sandbox::User=root download gvproxy) || fail "apt-get could not download gvproxy"
	else
		uri=$(mirror)
		if [ -z "$uri" ]; then
			apt-get -q update || fail "apt-get update failed"
			uri=$(mirror)
		fi
		[ -n "$uri" ] || fail "no Debian archive among this machine's apt sources; set TAPLOOM_DEBIAN_MIRROR"
		[ -r "$keyring" ] || fail "$keyring is missing: install debian-archive-keyring"
		mkdir -p "$work/lists/partial" "$work/archives/partial"
		echo "deb [signed-by=$keyring] $uri trixie main" >"$work/sources.list"
		set -- -q -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=- \
			-o Dir::State::lists="$work/lists" -o Dir::Cache="$work" -o Dir::Cache::archives="$work/archives" \
			-o APT::Sandbox::User=root -o Acquire::Languages=none
		apt-get "$@" update || fail "apt-get could not read trixie's index from $uri"
		(cd "$work" && apt-get "$@" download gvproxy) || fail "apt-get could not download gvproxy from trixie"
	fi
	rm -rf "$cache/gvproxy.new" "$cache/gvproxy"
	dpkg-deb -x "$work"/gvproxy_*.deb "$cache/gvproxy.new"
	"$cache/gvproxy.new/usr/bin/gvproxy" -version >/dev/null || fail "trixie's gvproxy does not run on this release"
	# The version is kept beside it because Debian's build does not know its own.
	dpkg-deb -f "$work"/gvproxy_*.deb Version >"$cache/gvproxy.new/version"
	mv "$cache/gvproxy.new" "$cache/gvproxy"
}

install_packages
install_gvproxy
echo "bench: ready"
