#!/bin/sh
# Installs what tests/conformance needs beyond `make setup`. Run as root on Debian; running it again changes nothing.
#
# - Debian packages: docker.io, busybox-static, tini and socat. No service is started.
# - docker, where there is none newer than the distribution's: the client whose every option is compared. From trixie.
# - docker-compose 2, which Debian has from trixie on. Both are taken from the same mirror's trixie with a private apt
#   configuration and unpacked below the cache directory: the system's apt sources and package database know nothing of it.
# - aiodocker's source distribution, by the hash in tests/conformance/aiodocker.lock: its tests are not in the wheel.
#
# Environment: TAPLOOM_CACHE         cache directory (default /var/cache/taploom)
#              TAPLOOM_DEBIAN_MIRROR where trixie is (default: the mirror that this machine's apt uses)
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
cache=${TAPLOOM_CACHE:-/var/cache/taploom}/conformance
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
lock=$here/tests/conformance/aiodocker.lock
policy=/usr/sbin/policy-rc.d
work=
made_policy=

fail() {
	echo "conformance-setup.sh: $*" >&2
	exit 1
}

clean_up() {
	[ -z "$made_policy" ] || rm -f "$policy"
	[ -z "$work" ] || rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# True when the Debian package is installed.
installed() {
	[ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

install_packages() {
	missing=
	for package in docker.io busybox-static tini socat iptables iproute2 util-linux dnsmasq-base; do
		installed "$package" || missing="$missing $package"
	done
	[ -n "$missing" ] || return 0
	[ "$(id -u)" = 0 ] || fail "these packages are missing, and installing them needs root:$missing"
	echo "conformance: installing$missing"
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
	DEBIAN_FRONTEND=noninteractive apt-get -q -y install --no-install-recommends "$@" >&2
}

# Prints the URI of the Debian archive that this machine's apt uses.
mirror() {
	if [ -n "${TAPLOOM_DEBIAN_MIRROR:-}" ]; then
		echo "$TAPLOOM_DEBIAN_MIRROR"
		return
	fi
	apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' | sort -u | head -n 1
}

# Unpacks trixie's packages into the cache.
from_trixie() {
	echo "conformance: fetching $*"
	work=$(mktemp -d)
	uri=$(mirror)
	if [ -z "$uri" ]; then
		apt-get -q update || fail "apt-get update failed"
		uri=$(mirror)
	fi
	[ -n "$uri" ] || fail "no Debian archive among this machine's apt sources; set TAPLOOM_DEBIAN_MIRROR"
	[ -r "$keyring" ] || fail "$keyring is missing: install debian-archive-keyring"
	mkdir -p "$work/lists/partial" "$work/archives/partial"
	echo "deb [signed-by=$keyring] $uri trixie main" >"$work/sources.list"
	packages=$*
	set -- -q -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=- \
		-o Dir::State::lists="$work/lists" -o Dir::Cache="$work" -o Dir::Cache::archives="$work/archives" \
		-o APT::Sandbox::User=root -o Acquire::Languages=none
	apt-get "$@" update >&2 || fail "apt-get could not read trixie's index from $uri"
	# shellcheck disable=SC2086
	(cd "$work" && apt-get "$@" download $packages >&2) || fail "apt-get could not download $packages from trixie"
	rm -rf "$cache/trixie.new"
	for archive in "$work"/*.deb; do
		dpkg-deb -x "$archive" "$cache/trixie.new"
	done
	"$cache/trixie.new/usr/libexec/docker/cli-plugins/docker-compose" version >/dev/null ||
		fail "trixie's docker-compose does not run on this release"
	"$cache/trixie.new/usr/bin/docker" --version >/dev/null || fail "trixie's docker does not run on this release"
	rm -rf "$cache/trixie"
	mv "$cache/trixie.new" "$cache/trixie"
	rm -rf "$work"
	work=
}

# Unpacks aiodocker's source distribution into the cache.
fetch_aiodocker() {
	version=$(sed -n 's/^aiodocker==\([^ ]*\).*/\1/p' "$lock")
	[ ! -e "$cache/aiodocker-$version/tests/test_networks.py" ] || return 0
	echo "conformance: fetching aiodocker's source distribution"
	work=$(mktemp -d)
	"$here/.venv/bin/pip" --disable-pip-version-check -q download --no-deps --no-binary aiodocker --require-hashes \
		-r "$lock" -d "$work" || fail "pip could not download aiodocker's source distribution"
	tar -C "$work" -xzf "$work/aiodocker-$version.tar.gz"
	rm -rf "$cache/aiodocker-$version"
	mv "$work/aiodocker-$version" "$cache/"
	rm -rf "$work"
	work=
}

mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9
install_packages
[ -x "$cache/trixie/usr/libexec/docker/cli-plugins/docker-compose" ] || from_trixie docker-compose docker-cli
fetch_aiodocker
