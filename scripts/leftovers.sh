# Sourced by the scripts that run tests: what a run may leave behind, and what of it was not there before.
# shellcheck shell=sh disable=SC2009,SC2012

# A line each for namespaces, interfaces, processes and state; processes by what only ours have in their command lines,
# for a machine may run other virtual machines too.
leftovers() {
	{
		ip netns list 2>/dev/null | awk '/^(taploom\.|tlt)/ {print "namespace " $1}'
		ip -o link | awk -F': ' '{sub(/@.*/, "", $2); print "interface " $2}'
		ps -eo args= | grep -E '(process=taploom-vm|vhost-device-vsock|ovs-vswitchd|ovsdb-server|ovn-northd|ovn-controller|dnsmasq|agent_guest|agent_helper|host_bridge|lab\.supervisor|lab\.runtime|crun)' |
			grep -v grep | sed 's/^/process /'
		ls /run/taploom 2>/dev/null | sed 's,^,state /run/taploom/,'
		ls -d /run/tlv-* 2>/dev/null | sed 's,^,state ,'
	} | sort
}

# nothing_left BEFORE: whether nothing is there that leftovers had not printed as BEFORE; says what is.
nothing_left() {
	before=$(mktemp)
	echo "$1" >"$before"
	new=$(leftovers | comm -13 "$before" -)
	rm -f "$before"
	[ -z "$new" ] && return
	printf 'left behind by the tests:\n%s\n' "$new"
	return 1
}
