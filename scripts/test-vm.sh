#!/bin/bash
# Builds what virtual machines boot, proves the kernel, runs the tests over virtual machines, and checks that nothing was
# left behind. Run as root, by `make test-vm`. Arguments go to pytest.
#
# Environment: TAPLOOM_ACCEL  kvm, hvf or tcg instead of what works here
#              TAPLOOM_CACHE  where what was built and fetched stays (default /var/cache/taploom)
set -u
cd "$(dirname "$0")/.." || exit 1
. scripts/leftovers.sh

# figure WHAT MEASURED [WANTED]: a line of the table at the end.
figure() {
	printf '%s\t%s\t%s\n' "$1" "$2" "${3:-}" >>"$summary"
}

# size WHAT FILE [MOST]: a file's size and how many MB (10^6 bytes) it may have.
size() {
	local bytes
	bytes=$(stat -c %s "$2")
	figure "size: $1" "$(awk "BEGIN {printf \"%.1f MB\", $bytes / 1e6}")" "${3:+at most $3 MB}"
	if [ -n "${3:-}" ] && [ "$bytes" -gt $(($3 * 1000000)) ]; then
		echo "$2 has $bytes bytes: at most $3 MB are wanted"
		result=1
	fi
}

step() {
	local name=$1 start
	shift
	start=$(date +%s)
	echo "== $name"
	if ! "$@"; then
		echo "make test-vm: FAILED at: $name ($*)"
		exit 1
	fi
	times+=("$name $(($(date +%s) - start))")
}

# ended PID FILE: waits for a background command whose output is in a file, which is shown; returns what it returned.
# shellcheck disable=SC2317
ended() {
	tail -n +1 -f --pid="$1" "$2"
	wait "$1"
}

if [ "$(id -u)" != 0 ]; then
	echo "make test-vm needs root: it makes namespaces, TAPs and virtual machines" >&2
	exit 1
fi
times=()
arch=$(uname -m | sed 's/aarch64/arm64/')
step "what virtual machines need is installed" scripts/vm-setup.sh
step "kernel" kernel/build --arch "$arch"
# Its emulated processors take turns on one of the machine's: the other builds images meanwhile.
before=$(leftovers)
verified=$(mktemp)
kernel/verify >"$verified" 2>&1 &
verify=$!
trap 'kill "$verify" 2>/dev/null; rm -f "$verified"' EXIT
step "guest image" images/guest-initfs/build --arch "$arch"
step "helper image" images/alpine-helper/build --arch "$arch"

began=$(date +%s)
step "kernel verified by use" ended "$verify" "$verified"
summary=$(mktemp)
trap 'rm -f "$summary" "$verified"' EXIT
step "start-up, one VM at a time" python -m bench.starts --table "$summary"
echo "== tests over virtual machines"
start=$(date +%s)
# Two files at a time: a VM that boots keeps a processor busy, one that waits does not. Those that take longest begin
# first.
files=(tests/vm/test_{fabric_vm,features_vm,lab_vm,helper_image}.py)
for file in tests/vm/test_*.py; do
	[[ " ${files[*]} " == *" $file "* ]] || files+=("$file")
done
env --default-signal=INT,QUIT python -m pytest "${files[@]}" \
	--numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 12 "$@"
result=$?
times+=("tests $(($(date +%s) - start))")
nothing_left "$before" || result=1
size "kernel" "build/kernel/$arch/vmlinuz"
size "guest image, compressed" "build/images/guest-initfs/$arch/guest-initfs.cpio.zst" 16
size "helper image, compressed" "build/images/alpine-helper/$arch/helper.cpio.zst" 60
for entry in "${times[@]}"; do
	figure "time: ${entry% *}" "${entry##* } s"
done
echo
sort "$summary" | column -t -s "$(printf '\t')" -N figure,measured,wanted
echo
took=$(($(date +%s) - began))
if [ $result = 0 ]; then
	echo "make test-vm: all passed in $((took / 60)) min $((took % 60)) s after the builds; nothing left behind"
else
	echo "make test-vm: FAILED after $((took / 60)) min $((took % 60)) s"
fi
exit $result
