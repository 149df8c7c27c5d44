#!/bin/bash
# All tests, as CI runs them on a machine with nothing installed: `make test`, then `make test-vm`. The first waits now and
# then, so the kernel that the second boots is built meanwhile, in processor time that nothing else wants; where the cache
# has it, that takes no time. Run as root, by `make ci`.
set -u
cd "$(dirname "$0")/.." || exit 1

kernel=
log=$(mktemp)
stop_kernel() {
	if [ -n "$kernel" ]; then
		kill "$kernel" 2>/dev/null
		wait "$kernel"
	fi
	rm -f "$log"
}
trap stop_kernel EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# idly COMMAND...: runs it when a processor has nothing else to do, and not longer than this shell lives. Where Linux
# shares processors out by session (autogroups), a policy counts within a session only, and so the session gets least too.
idly() {
	# shellcheck disable=SC2016
	exec setsid setpriv --pdeathsig TERM sh -c \
		'echo 19 2>/dev/null >/proc/self/autogroup; exec chrt --idle 0 "$@"' idly "$@"
}

arch=$(uname -m | sed 's/aarch64/arm64/')
echo "== kernel: built beside the tests"
idly kernel/build --arch "$arch" </dev/null >"$log" 2>&1 &
kernel=$!

echo "== make test"
if ! make test; then
	echo "make ci: FAILED at: make test"
	exit 1
fi

echo "== kernel"
start=$SECONDS
tail -n 2 -f --pid="$kernel" "$log"
wait "$kernel"
result=$?
kernel=
if [ $result != 0 ]; then
	cat "$log"
	echo "make ci: FAILED at: kernel (kernel/build --arch $arch)"
	exit 1
fi
echo "the kernel took $((SECONDS - start)) s more than make test"

echo "== make test-vm"
if ! make test-vm; then
	echo "make ci: FAILED at: make test-vm"
	exit 1
fi
echo "make ci: all passed in $((SECONDS / 60)) min $((SECONDS % 60)) s"
