#!/bin/sh
# Fails when the contracts break what the last release promised. Before the first release, main is the promise; in a
# checkout that has neither (or whose promise has no contracts yet) there is nothing to break.
set -eu
cd "$(dirname "$0")/.."

against=$(git describe --tags --abbrev=0 --match 'v*' 2>/dev/null || true)
if [ -z "$against" ]; then
	for ref in origin/main main; do
		if git rev-parse --verify --quiet "$ref^{commit}" >/dev/null; then
			against=$ref
			break
		fi
	done
fi
if [ -z "$against" ] || ! git cat-file -e "$against:protos/buf.yaml" 2>/dev/null; then
	echo "buf breaking: nothing released to compare with"
	exit 0
fi
base=$(mktemp -d)
trap 'rm -rf "$base"' EXIT
git archive "$against" protos | tar -x -C "$base"
echo "buf breaking: against $against"
buf breaking protos --against "$base/protos"
