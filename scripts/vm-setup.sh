#!/bin/sh
# Installs what the kernel, the VM images and the VM lab need beyond `make setup`. Run as root on Debian; running it again
# changes nothing. No service is started.
#
# - Debian packages: QEMU for both architectures, compilers, what a Linux build uses, archive tools.
# - vhost-device-vsock, which Debian has from forky on, unpacked below the cache directory.
#
# Environment: see scripts/debian.sh
set -eu
. "$(dirname "$0")/debian.sh"

cache=$taploom_cache/vm

# Debian's vhost-device-vsock needs only glibc 2.34.
fetch_vsock_device() {
	[ ! -x "$cache/forky/usr/bin/vhost-device-vsock" ] || return 0
	rm -rf "$cache/forky.new" "$cache/forky"
	from_suite forky "$cache/forky.new" vhost-device-vsock
	"$cache/forky.new/usr/bin/vhost-device-vsock" --version >/dev/null ||
		fail "forky's vhost-device-vsock does not run on this release"
	mv "$cache/forky.new" "$cache/forky"
}

mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9

# kernel/build: a Linux build, BTF (dwarves), the cross compiler for arm64
packages="gcc libc6-dev make flex bison bc libelf-dev libssl-dev dwarves cpio kmod lz4 zstd xz-utils rsync python3 \
gcc-aarch64-linux-gnu libc6-dev-arm64-cross debian-archive-keyring ca-certificates util-linux"
# virtual machines
packages="$packages qemu-system-x86 qemu-system-arm"

# shellcheck disable=SC2086
install_packages $packages
fetch_vsock_device
