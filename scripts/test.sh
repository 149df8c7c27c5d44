#!/bin/bash
# Runs every test that needs no virtual machine, then checks that nothing was left behind. Run as root, by `make test`.
set -u
cd "$(dirname "$0")/.." || exit 1
. scripts/leftovers.sh

if [ "$(id -u)" != 0 ]; then
	echo "make test needs root: it makes namespaces and TAPs" >&2
	exit 1
fi
scripts/conformance-setup.sh || exit 1
before=$(leftovers)
began=$(date +%s)
# Files run side by side, one lab or more each: they mostly wait, so there are more of them than cores. Those that take
# longest begin first.
summary=$(mktemp)
trap 'rm -f "$summary"' EXIT
# Interrupts are tested: a shell that began this in the background had them ignored.
TAPLOOM_CONFORMANCE_SUMMARY=$summary env --default-signal=INT,QUIT python -m pytest \
	tests/conformance tests/system tests/protocol tests/unit \
	--numprocesses 3 --dist loadfile --no-loadscope-reorder "$@"
result=$?
nothing_left "$before" || result=1
cat "$summary"
took=$(($(date +%s) - began))
if [ $result = 0 ]; then
	echo "make test: all passed in $((took / 60)) min $((took % 60)) s; nothing left behind"
else
	echo "make test: FAILED after $((took / 60)) min $((took % 60)) s"
fi
exit $result
