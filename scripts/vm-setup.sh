#!/bin/sh
# Installs what building and running virtual machines needs on Debian 12: QEMU, a vhost-user vsock device, and the tools
# of the builders of kernel and images. Does nothing where it has been done. Run as root.
#
# Environment: TAPLOOM_CACHE  where what does not come from this release is unpacked (default /var/cache/taploom)
set -eu
cd "$(dirname "$0")/.."

. scripts/debian.sh

# Packages of this release, by what needs them.
lab="qemu-system-x86 qemu-system-arm"
# A Linux build, BTF (dwarves), and the cross compiler for arm64, with which the images' init is built too.
kernel="gcc libc6-dev make flex bison bc libelf-dev libssl-dev dwarves cpio kmod lz4 zstd xz-utils python3 \
gcc-aarch64-linux-gnu libc6-dev-arm64-cross debian-archive-keyring"
# kernel/verify's eBPF programs
verify="clang libbpf-dev"

# shellcheck disable=SC2086
install_packages $lab $kernel $verify

# The device's other half: QEMU's own vsock device needs the host kernel's, this one is a process with a Unix socket.
# Debian has it from release 14 on; the program needs glibc 2.34.
vsock=$taploom_cache/vhost-device-vsock
mkdir -p "$taploom_cache"
exec 9>"$taploom_cache/vm-setup.lock"
flock 9
if [ ! -x "$vsock/usr/bin/vhost-device-vsock" ]; then
	rm -rf "$vsock.new" "$vsock"
	from_suite forky "$vsock.new" vhost-device-vsock
	"$vsock.new/usr/bin/vhost-device-vsock" --version >/dev/null || fail "vhost-device-vsock does not run on this release"
	mv "$vsock.new" "$vsock"
fi
