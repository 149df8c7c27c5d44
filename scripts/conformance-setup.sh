#!/bin/sh
# Installs what the tests against a real dockerd need beyond `make setup`. Run as root on Debian; running it again changes
# nothing.
#
# - Debian packages: docker.io, busybox-static, tini, socat and others. No service is started.
# - docker-compose 2 and a docker client, which Debian has from trixie on, unpacked below the cache directory.
# - aiodocker's source distribution, by the hash in tests/conformance/aiodocker.lock: its tests are not in the wheel.
#
# Environment: see scripts/debian.sh
set -eu
. "$(dirname "$0")/debian.sh"

here=$(cd "$(dirname "$0")/.." && pwd)
cache=$taploom_cache/conformance
lock=$here/tests/conformance/aiodocker.lock

# Unpacks aiodocker's source distribution into the cache.
fetch_aiodocker() {
	version=$(sed -n 's/^aiodocker==\([^ ]*\).*/\1/p' "$lock")
	[ ! -e "$cache/aiodocker-$version/tests/test_networks.py" ] || return 0
	echo "conformance: fetching aiodocker's source distribution"
	work=$(mktemp -d "$cache/new.XXXXXX")
	"$here/.venv/bin/pip" --disable-pip-version-check -q download --no-deps --no-binary aiodocker --require-hashes \
		-r "$lock" -d "$work" || fail "pip could not download aiodocker's source distribution"
	tar -C "$work" -xzf "$work/aiodocker-$version.tar.gz"
	rm -rf "$cache/aiodocker-$version"
	mv "$work/aiodocker-$version" "$cache/"
	rm -rf "$work"
}

mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9
install_packages docker.io busybox-static tini socat iptables iproute2 util-linux dnsmasq-base cpio zstd debian-archive-keyring
if [ ! -x "$cache/trixie/usr/libexec/docker/cli-plugins/docker-compose" ]; then
	rm -rf "$cache/trixie.new" "$cache/trixie"
	from_trixie "$cache/trixie.new" docker-compose docker-cli
	"$cache/trixie.new/usr/libexec/docker/cli-plugins/docker-compose" version >/dev/null ||
		fail "trixie's docker-compose does not run on this release"
	"$cache/trixie.new/usr/bin/docker" --version >/dev/null || fail "trixie's docker does not run on this release"
	mv "$cache/trixie.new" "$cache/trixie"
fi
fetch_aiodocker
