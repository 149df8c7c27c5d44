#!/bin/bash
# Builds the kernel and the images for an architecture, proves the kernel by use, and boots the images. Nothing of this is
# needed to run the architecture's machines emulated; on a machine of the same architecture it is all of make test-vm.
# Run as root, by `make test-vm ARCH=arm64`. Arguments after the architecture go to pytest.
#
# Environment: TAPLOOM_CACHE  where what was built and fetched stays (default /var/cache/taploom)
set -u
cd "$(dirname "$0")/.." || exit 1
. scripts/leftovers.sh

arch=${1:-}
tests=tests/vm/arch/test_$arch.py
if [ "$arch" = "$(uname -m | sed 's/aarch64/arm64/')" ]; then
	shift
	exec scripts/test-vm.sh "$@"
elif [ ! -f "$tests" ]; then
	echo "make test-vm: nothing is tested for ARCH=$arch on this machine; there is ARCH=arm64" >&2
	exit 2
elif [ "$(id -u)" != 0 ]; then
	echo "make test-vm needs root: it makes namespaces, TAPs and virtual machines" >&2
	exit 1
fi
shift

step() {
	local name=$1 start=$SECONDS
	shift
	echo "== $name"
	if ! "$@"; then
		echo "make test-vm ARCH=$arch: FAILED at: $name ($*)"
		exit 1
	fi
	printf 'time: %s\t%s s\n' "$name" $((SECONDS - start)) >>"$summary"
}

summary=$(mktemp)
trap 'rm -f "$summary"' EXIT
step "what virtual machines need is installed" scripts/vm-setup.sh
step "kernel" kernel/build --arch "$arch"
step "guest image" images/guest-initfs/build --arch "$arch"
step "helper image" images/alpine-helper/build --arch "$arch"
before=$(leftovers)
step "start-up, one VM at a time" python -m bench.starts --arch "$arch" --boots 1 --table "$summary"
step "kernel verified by use" kernel/verify --arch "$arch"
step "images in virtual machines" \
	env --default-signal=INT,QUIT python -m pytest "$tests" --durations 5 "$@"
step "nothing is left behind" nothing_left "$before"
echo
sort "$summary" | column -t -s "$(printf '\t')" -N figure,measured,wanted
echo
echo "make test-vm ARCH=$arch: all passed in $((SECONDS / 60)) min $((SECONDS % 60)) s"
