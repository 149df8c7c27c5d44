"""The helper VM's own way out: the address and the default route of its network interface, if it has one.

Given on the kernel's command line as `taploom.net=…`, or asked for by DHCP. Where something else configures the machine
(the default) this does nothing.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import re
import shlex
import shutil
import socket
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from agent_helper.errors import SetupError
from agent_helper.rtnetlink import NetlinkError, Rtnetlink
from taploom.supervise import SupervisedProcess

logger = logging.getLogger("taploom.helper.outside")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface

_PARAMETER = "taploom.net="
# What the image has for udhcpc to call; where that looks for it by itself differs between distributions.
_SCRIPT = Path("/usr/share/udhcpc/default.script")
_NAME = re.compile(r"[A-Za-z][\w.@-]{0,14}")
_DEFAULT = {4: ipaddress.ip_network("0.0.0.0/0"), 6: ipaddress.ip_network("::/0")}


@dataclass(frozen=True)
class Outside:
    """What was asked for.

    Attributes:
        addresses: the interface's own; with none, and `dhcp` not set, nothing is done.
        gateways: of default routes, at most one per family.
        interface: its name; "" for the first that is a device and not one of the kernel's own making.
    """

    dhcp: bool = False
    addresses: tuple[Interface, ...] = ()
    gateways: tuple[Address, ...] = ()
    interface: str = ""


def parse_outside(text: str) -> Outside:
    """`none`; `dhcp[,INTERFACE]`; `ADDRESS/PREFIX[,GATEWAY]…[,INTERFACE]`, with several addresses one after the other;
    `kernel`: what the kernel's command line has as taploom.net=…, or dhcp.

    Raises:
        SetupError: none of these.
    """
    if text == "kernel":
        words = shlex.split(Path("/proc/cmdline").read_text())
        given = [word.removeprefix(_PARAMETER) for word in words if word.startswith(_PARAMETER)]
        text = given[-1] if given else "dhcp"
        if text == "kernel":
            raise SetupError("taploom.net=kernel on the kernel's command line says nothing")
    if text == "none":
        return Outside()
    dhcp, interface = False, ""
    addresses: list[Interface] = []
    gateways: list[Address] = []
    for number, word in enumerate(text.split(",")):
        try:
            if word == "dhcp" and not number:
                dhcp = True
            elif "/" in word:
                addresses.append(ipaddress.ip_interface(word))
            elif _NAME.fullmatch(word) and not interface:
                interface = word
            else:
                gateways.append(ipaddress.ip_address(word))
        except ValueError as exc:
            raise SetupError(f"{text!r} as the way out: {exc}") from exc
    if len({gateway.version for gateway in gateways}) != len(gateways):
        raise SetupError(f"{text!r} as the way out: one gateway per family")
    if dhcp == bool(addresses) or (dhcp and gateways):
        raise SetupError(
            f"{text!r} as the way out: wanted none, dhcp[,INTERFACE] or ADDRESS/PREFIX[,GATEWAY][,INTERFACE]"
        )
    return Outside(dhcp, tuple(addresses), tuple(gateways), interface)


async def keep_outside(wanted: Outside, log: Path) -> None:
    """Configures the interface; for DHCP, runs until cancelled. Without an interface there is nothing to do."""
    name = wanted.interface or _first_device()
    if not name or not (wanted.dhcp or wanted.addresses):
        logger.info("no network interface of its own: no way out of the networks but to the host")
        return
    try:
        await trio.to_thread.run_sync(_configure, wanted, name)
    except OSError as exc:  # networks work all the same
        logger.error("the way out by %s cannot be configured: %s", name, exc)
        return
    if wanted.dhcp:
        program = shutil.which("udhcpc", path="/usr/sbin:/usr/bin:/sbin:/bin")
        if program is None:
            logger.error("no address for %s: udhcpc (busybox) is not installed", name)
            return
        argv = [program, "-f", "-i", name, "-t", "3", "-T", "1", "-A", "5", "-s", str(_SCRIPT)]
        await SupervisedProcess("udhcpc", argv, log=log).run()


def _first_device() -> str:
    found = sorted(path.parent.name for path in Path("/sys/class/net").glob("*/device"))
    return found[0] if found else ""


def _configure(wanted: Outside, name: str) -> None:
    index = socket.if_nametoindex(name)
    with Rtnetlink() as kernel:
        kernel.set_up(index)
        for address in wanted.addresses:
            _unless_there(partial(kernel.add_address, index, address.ip, address.network.prefixlen))
        for gateway in wanted.gateways:
            host = ipaddress.ip_network(gateway)
            if not any(gateway in address.network for address in wanted.addresses):
                kernel.add_route(index, host, replace=True)  # a gateway beyond the subnet, as point-to-point links have
            kernel.add_route(index, _DEFAULT[gateway.version], via=gateway, replace=True)


def _unless_there(change: partial[None]) -> None:
    try:
        change()
    except NetlinkError as exc:
        if exc.errno != errno.EEXIST:
            raise
