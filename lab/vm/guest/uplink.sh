#!/bin/sh
# The helper VM's way out: addresses and default routes from lab.uplink=ADDRESS/PREFIX,GATEWAY[,ADDRESS/PREFIX,GATEWAY...]
# on the kernel's command line, on eth0. Without that there is nothing to do.
set -eu # a shell that is busybox takes its own ip where no path is given
way=
for word in $(cat /proc/cmdline); do
	case $word in
	lab.uplink=*) way=${word#lab.uplink=} ;;
	esac
done
if [ -n "$way" ]; then
	/usr/bin/ip link set eth0 up
	IFS=,
	# shellcheck disable=SC2086
	set -- $way
	while [ $# -gt 1 ]; do
		case $1 in
		*:*) /usr/bin/ip address replace "$1" dev eth0 nodad ;; # nobody else is on that link
		*) /usr/bin/ip address replace "$1" dev eth0 ;;
		esac
		/usr/bin/ip route replace default via "$2"
		shift 2
	done
fi
exec sleep infinity # a service that ends is started again
