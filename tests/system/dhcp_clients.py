"""Debian's DHCP clients as a host that configures itself runs them, in a namespace of a test's."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

# What the client is told, as it tells its script, and the address where it belongs. dhclient-script(8) would write the
# machine's own /etc/resolv.conf.
_DHCLIENT_SCRIPT = """#!/bin/sh
env | grep -E '^(reason|new_)' >"{log}.$reason"
case "$reason" in
BOUND|REBOOT|RENEW|REBIND)
    ip -4 address replace "$new_ip_address/$new_subnet_mask" dev "$interface"
    ip link set "$interface" mtu "$new_interface_mtu"
    set -- $new_rfc3442_classless_static_routes
    while [ $# -ge 5 ]; do
        case $1 in
        0) ip route replace default via "$2.$3.$4.$5" dev "$interface"; shift 5;;
        32) ip route replace "$2.$3.$4.$5/32" dev "$interface"; shift 9;;
        *) exit 1;;
        esac
    done;;
BOUND6|RENEW6|REBIND6)
    ip -6 address replace "$new_ip6_address/$new_ip6_prefixlen" dev "$interface" nodad;;
esac
exit 0
"""

# As Debian's dhclient.conf asks.
_DHCLIENT_CONF = """
option rfc3442-classless-static-routes code 121 = array of unsigned integer 8;
request subnet-mask, broadcast-address, routers, domain-name, domain-name-servers, dhcp6.name-servers,
    dhcp6.domain-search, interface-mtu, rfc3442-classless-static-routes;
"""

_UDHCPC_SCRIPT = """#!/bin/sh
env >"{log}.$1"
[ "$1" = bound ] || [ "$1" = renew ] || exit 0
ip -4 address replace "$ip/$mask" dev "$interface"
set -- $staticroutes
while [ $# -ge 2 ]; do
    if [ "$2" = 0.0.0.0 ]; then ip route replace "$1" dev "$interface"; else ip route replace "$1" via "$2"; fi
    shift 2
done
exit 0
"""


class Clients:
    """Runs the clients in one namespace, on one interface.

    Args:
        netns: the namespace's name.
        interface: the interface's name.
        folder: for what they are told.
    """

    def __init__(self, netns: str, interface: str, folder: Path) -> None:
        self.netns, self.interface, self.folder = netns, interface, folder
        self.log = folder / f"told-{netns}"

    def _script(self, name: str, text: str) -> str:
        path = self.folder / f"{name}-{self.netns}"
        path.write_text(text.replace("{log}", str(self.log)))
        path.chmod(0o755)
        return str(path)

    def _run(self, *command: str, timeout: float) -> str:
        argv = ["ip", "netns", "exec", self.netns, "timeout", "-k1", str(timeout), *command]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr + f"(exit {done.returncode})"

    def told(self, reason: str) -> dict[str, str]:
        """What the client's script was told with a reason; empty when it was not called with it."""
        path = Path(f"{self.log}.{reason}")
        if not path.exists():
            return {}
        return dict(line.partition("=")[::2] for line in path.read_text().splitlines())

    def dhclient(self, family: int, *, timeout: float = 30) -> dict[str, str]:
        """Asks with ISC's client until it has an address or gives up; what it was told then."""
        script = self._script("dhclient", _DHCLIENT_SCRIPT)
        conf = self.folder / "dhclient.conf"
        conf.write_text(_DHCLIENT_CONF)
        leases = self.folder / f"leases{family}-{self.netns}"
        leases.touch()
        # With a lease from before, it asks for the same address again: REBOOT, REBIND6.
        reasons = ("BOUND", "REBOOT") if family == 4 else ("BOUND6", "REBIND6")
        for reason in reasons:
            Path(f"{self.log}.{reason}").unlink(missing_ok=True)
        # -D LL: its identity is the MAC address. It stays in the foreground until it is bound, and goes away then.
        out = self._run(
            *("dhclient", f"-{family}", "-1", "-v", "-cf", str(conf), "-lf", str(leases), "-sf", script),
            *("-pf", str(self.folder / f"pid{family}-{self.netns}"), "-D", "LL", self.interface),
            timeout=timeout,
        )
        self._end(family)
        return next(filter(None, map(self.told, reasons)), {"failed": out})

    def _end(self, family: int) -> None:
        pid = self.folder / f"pid{family}-{self.netns}"
        if pid.exists():
            subprocess.run(["kill", pid.read_text().strip()], capture_output=True, check=False)
            pid.unlink()

    def udhcpc(self, *, timeout: float = 20) -> dict[str, str]:
        """Asks with busybox's client; what it was told, or why it was told nothing."""
        script = self._script("udhcpc", _UDHCPC_SCRIPT)
        Path(f"{self.log}.bound").unlink(missing_ok=True)
        out = self._run(
            *("busybox", "udhcpc", "-f", "-n", "-q", "-t", "8", "-T", "2", "-i", self.interface, "-s", script),
            *("-O", "staticroutes", "-O", "mtu"),
            timeout=timeout,
        )
        return self.told("bound") or {"failed": out}

    def addresses(self, family: int) -> list[dict[str, Any]]:
        """The interface's addresses, as ip(8) has them."""
        argv = ["ip", "-n", self.netns, "-j", f"-{family}", "address", "show", "dev", self.interface]
        found = json.loads(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)
        return [address for link in found for address in link.get("addr_info", [])]
