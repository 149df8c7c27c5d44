#!/bin/sh
# Installs what taploom needs on Debian 12: packages of the distribution, a virtual environment in .venv, and buf.
# Does nothing where it has been done. Run as root.
set -eu
cd "$(dirname "$0")/.."

. scripts/debian.sh

packages="openvswitch-switch ovn-central ovn-host dnsmasq-base nftables libjemalloc2 crun busybox-static iproute2 \
iputils-ping iperf3 dnsutils tcpdump isc-dhcp-client procps util-linux ca-certificates curl git"
# Node.js comes from the distribution only where there is no npm at all: another source's nodejs brings its own.
command -v npm >/dev/null || packages="$packages npm"
# The docker command drives a lab; any that is there does. Debian 12 has it in one package with the daemon, which is not
# started.
command -v docker >/dev/null || packages="$packages docker.io"

python=""
for candidate in python3.13 python3.12 python3.11 python3 /usr/bin/python3; do
	if command -v "$candidate" >/dev/null &&
		"$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
		python=$candidate
		break
	fi
done
if [ -z "$python" ]; then
	packages="$packages python3"
	python=/usr/bin/python3
fi
# Debian's own Python makes virtual environments only with this package; its headers build packages without a wheel.
"$python" -c 'import ensurepip' 2>/dev/null || packages="$packages python3-venv python3-dev"

# shellcheck disable=SC2086
install_packages $packages

# The environment is made anew when the lock file changes or the checkout has moved.
want="$(sha256sum <requirements.lock) $PWD"
if [ "$(cat .venv/taploom-lock 2>/dev/null)" != "$want" ]; then
	echo "setup: installing the Python packages of requirements.lock into .venv"
	rm -rf .venv
	quietly "$python" -m venv .venv
	quietly .venv/bin/pip install --disable-pip-version-check --require-hashes -r requirements.lock
	echo "$want" >.venv/taploom-lock
fi
want=$(sha256sum <pyproject.toml)
if [ "$(cat .venv/taploom-project 2>/dev/null)" != "$want" ]; then
	quietly .venv/bin/pip install --disable-pip-version-check --no-deps --no-build-isolation \
		--config-settings editable_mode=compat -e . # a plain path: the other modes cost every command 20 ms
	echo "$want" >.venv/taploom-project
fi

if [ "$(cat node_modules/taploom-setup 2>/dev/null)" != "$(sha256sum package-lock.json)" ]; then
	echo "setup: installing buf"
	quietly npm ci --no-audit --no-fund
	sha256sum package-lock.json >node_modules/taploom-setup
fi
