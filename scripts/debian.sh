# Sourced by the scripts that install Debian packages; $0 is whose name errors carry. No service is started by it.
#
# Environment: TAPLOOM_CACHE         cache directory (default /var/cache/taploom)
#              TAPLOOM_DEBIAN_MIRROR where other Debian releases are (default: the mirror that this machine's apt uses)
# shellcheck shell=sh

taploom_cache=${TAPLOOM_CACHE:-/var/cache/taploom}
_keyring=/usr/share/keyrings/debian-archive-keyring.gpg
_policy=/usr/sbin/policy-rc.d
_made_policy=
_work=

fail() {
	echo "${0##*/}: $*" >&2
	exit 1
}

_clean_up() {
	[ -z "$_made_policy" ] || rm -f "$_policy"
	[ -z "$_work" ] || rm -rf "$_work"
}
trap _clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Runs a command; its output is shown only when it fails.
quietly() {
	_log=$(mktemp)
	if ! "$@" >"$_log" 2>&1; then
		cat "$_log" >&2
		rm -f "$_log"
		fail "failed: $*"
	fi
	rm -f "$_log"
}

# Installs those of the packages that are missing.
install_packages() {
	_missing=
	for _package in "$@"; do
		[ "$(dpkg-query -W -f '${db:Status-Status}' "$_package" 2>/dev/null)" = installed ] || _missing="$_missing $_package"
	done
	[ -n "$_missing" ] || return 0
	command -v apt-get >/dev/null || fail "needs Debian's apt-get for these packages:$_missing"
	[ "$(id -u)" = 0 ] || fail "these packages are missing, and installing them needs root:$_missing"
	echo "${0##*/}: installing$_missing"
	# Maintainer scripts ask policy-rc.d before they start a service (Debian policy 9.3.3): 101 = do not.
	if [ ! -e "$_policy" ]; then
		_made_policy=yes
		printf '#!/bin/sh\nexit 101\n' >"$_policy"
		chmod 755 "$_policy"
	fi
	export DEBIAN_FRONTEND=noninteractive
	quietly apt-get update -q
	# shellcheck disable=SC2086
	quietly apt-get install -q -y --no-install-recommends $_missing
	if [ -n "$_made_policy" ]; then
		rm -f "$_policy"
		_made_policy=
	fi
}

# Prints the URI of the Debian archive that this machine's apt uses.
_mirror() {
	if [ -n "${TAPLOOM_DEBIAN_MIRROR:-}" ]; then
		echo "$TAPLOOM_DEBIAN_MIRROR"
		return
	fi
	apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' | sort -u | head -n 1
}

# from_trixie DIRECTORY PACKAGE...: unpacks Debian 13's packages into a directory.
from_trixie() {
	from_suite trixie "$@"
}

# from_suite SUITE DIRECTORY PACKAGE...: unpacks packages of another Debian release into a directory, with a private apt
# configuration: the system's apt sources and its package database know nothing of them. DIRECTORY/version-PACKAGE has
# each one's version.
from_suite() {
	_suite=$1
	_into=$2
	shift 2
	echo "${0##*/}: fetching $*"
	_work=$(mktemp -d)
	_uri=$(_mirror)
	if [ -z "$_uri" ]; then
		quietly apt-get update -q
		_uri=$(_mirror)
	fi
	[ -n "$_uri" ] || fail "no Debian archive among this machine's apt sources; set TAPLOOM_DEBIAN_MIRROR"
	[ -r "$_keyring" ] || fail "$_keyring is missing: install debian-archive-keyring"
	mkdir -p "$_work/lists/partial" "$_work/archives/partial" "$_into"
	echo "deb [signed-by=$_keyring] $_uri $_suite main" >"$_work/sources.list"
	_wanted=$*
	set -- -q -o Dir::Etc::sourcelist="$_work/sources.list" -o Dir::Etc::sourceparts=- \
		-o Dir::State::lists="$_work/lists" -o Dir::Cache="$_work" -o Dir::Cache::archives="$_work/archives" \
		-o APT::Sandbox::User=root -o Acquire::Languages=none
	quietly apt-get "$@" update
	_here=$PWD
	cd "$_work"
	# shellcheck disable=SC2086
	quietly apt-get "$@" download $_wanted
	cd "$_here"
	for _archive in "$_work"/*.deb; do
		dpkg-deb -x "$_archive" "$_into"
		dpkg-deb -f "$_archive" Version >"$_into/version-$(dpkg-deb -f "$_archive" Package)"
	done
	rm -rf "$_work"
	_work=
}
