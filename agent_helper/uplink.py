"""The helper's kernel on the uplink network: its interface, its routes to the networks, and what it lets through.

The interface is one end of a veth pair in the agent's own namespace; the other end is plugged into the integration
bridge. The kernel routes on from there with whatever routes the machine has.

The ways of packets, with OVN 23.03 and the userspace data path:

- Container to the outside: its router translates the source to the router's address on the uplink (not where
  masquerading is off), the kernel forwards, and masquerades on the way out.
- Container to its own gateway: the address is the router's, and no policy or route can send it on. The router
  translates the destination to a stand-in, an address that nobody has; the kernel translates it back, by the source, so
  that listeners and answers have the gateway's. Echo requests the router answers before it translates.
- Container to another network's gateway, or to the host: leaves by the default route with its destination as it is.
- The kernel into a network (published ports): its router translates the source to the network's gateway.
- From outside into a network whose gateway mode is routed or nat-unprotected: as it is, where a rule lets it in.
- Network to network: never forwarded here, and ACLs on the uplink switch keep routers from each other.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import trio

from agent_helper import firewall, links
from agent_helper.door import Door
from agent_helper.errors import HelperError, PreconditionError
from agent_helper.firewall import Opened, Redirect, Rules
from agent_helper.rtnetlink import NetlinkError, Rtnetlink
from agent_helper.spec import EndpointSpec, Leg, NetworkSpec, UplinkSpec, legs
from taploom.contracts.taploom.helper.v1 import GatewayMode

logger = logging.getLogger("taploom.helper.uplink")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

INTERFACE = "tlup"
_DEAF = ("tl*", "br-int", "ovs-netdev", "ovs-system")
_USUAL_MTU, _LEAST_MTU = 1500, 1280
# Local delivery of what is marked: ip-rule(8). Numbers that nobody else is likely to use.
_RULE_PRIORITY, _RULE_TABLE = 29804, 29804
_VERSIONS = (4, 6)
_NO_SUCH_FAMILY = errno.EAFNOSUPPORT, errno.EOPNOTSUPP  # a kernel without IPv6

_IPV6 = Path("/proc/sys/net/ipv6")

Route = tuple[str, str, int]  # destination, next hop or "", MTU
Neighbour = tuple[str, str]  # address, MAC address


class KernelEnd:
    """The kernel's end of the uplink, converged to what `describe` said last.

    Args:
        nft: the program.
        numbers: for the name of the interface's other end; a name is never used twice.
    """

    def __init__(self, nft: str, numbers: Iterator[int]) -> None:
        self.outer = ""  # the name of the end to plug; empty while there is none
        self._nft = nft
        self._numbers = numbers
        self._networks: dict[str, NetworkSpec] = {}
        self._spec: UplinkSpec | None = None
        self._redirect: Redirect | None = None
        self._door: Door | None = None
        self._there: dict[str, Route | Neighbour] = {}  # by destination
        self._rules: Rules | None = None
        self._taken: frozenset[Address] = frozenset()
        self._lock = trio.Lock()
        self._asked = self._done = 0
        self._failed: dict[str, PreconditionError] = {}  # of the last time, by network
        self._endpoints: dict[str, EndpointSpec] = {}  # those with open ports
        self._opened = True  # whether the rules have the open ports
        self.cards: frozenset[str] = frozenset()  # that are VLANs': frames there are none of the kernel's

    async def clear(self) -> None:
        """Removes what a run before has left, its interface apart."""
        try:
            await trio.to_thread.run_sync(self._clear)
        except (HelperError, OSError) as exc:  # networks work all the same; who applies an uplink is told
            logger.warning("there will be no way out of the networks: %s", exc)

    def is_for(self, spec: UplinkSpec | None) -> bool:
        """Whether the interface that there is is this uplink's."""
        present = self._spec
        if present is None or spec is None:
            return present is spec
        return replace(present, host_addresses=()) == replace(spec, host_addresses=())

    async def open(self, spec: UplinkSpec) -> None:
        """Makes the interface, unless it is there, with no way for any packet through it yet. `outer` is to be plugged.

        Raises:
            HelperError, OSError: the kernel refused; nothing is left.
        """
        async with self._lock:
            if self.outer:
                self._spec = spec
            else:
                await trio.to_thread.run_sync(self._open, spec)
                if self._door is not None:
                    try:
                        self._door.open(INTERFACE, self.outer)
                    except OSError:
                        await trio.to_thread.run_sync(self._close)
                        raise

    async def close(self) -> None:
        """Removes the interface and all else of ours; nothing when it is not there. It must be unplugged before."""
        async with self._lock:
            if self._door is not None:
                self._door.close()
            if self.outer:
                await trio.to_thread.run_sync(self._close)

    def set_redirect(self, redirect: Redirect, door: Door) -> None:
        """Has what is for the host taken by these listeners, connections once the door has let them in.

        To be called before there is an uplink.
        """
        self._redirect, self._door = redirect, door

    def set_network(self, spec: NetworkSpec) -> None:
        """Counts the network in, from the next `converge` on."""
        self._networks[spec.network_id] = spec

    def remove_network(self, network_id: str) -> None:
        """Counts the network out, from the next `converge` on."""
        self._networks.pop(network_id, None)

    def set_endpoints(self, specs: Iterable[EndpointSpec]) -> None:
        """Has these endpoints' ports open, from the next `open_ports` or `converge` on."""
        for spec in specs:
            if spec.open_ports:
                self._opened = self._opened and self._endpoints.get(spec.endpoint_id) == spec
                self._endpoints[spec.endpoint_id] = spec
            else:
                self.remove_endpoints([spec.endpoint_id])

    def remove_endpoints(self, endpoint_ids: Iterable[str]) -> None:
        """Has no port of these endpoints open, from the next `open_ports` or `converge` on."""
        for endpoint_id in endpoint_ids:
            if self._endpoints.pop(endpoint_id, None) is not None:
                self._opened = False

    async def open_ports(self) -> None:
        """Makes the rules be right for the endpoints; nothing when they are.

        Raises:
            HelperError, OSError: as `converge`.
        """
        if not self._opened:
            self._opened = True
            try:
                await self.converge()
            except BaseException:
                self._opened = False
                raise

    async def converge(self, network_id: str = "") -> None:
        """Makes routes and rules be right for the networks. Many at once are one.

        Raises:
            PreconditionError: the machine has a route of its own to a subnet of this network. (What is wrong with
                another is for who applies that.)
            HelperError, OSError: the kernel refused; the next attempt completes it.
        """
        self._asked += 1
        asked = self._asked
        async with self._lock:
            if self._done < asked:
                asked = self._asked
                self._failed = {}
                if self._spec is not None:
                    found = {n: legs(spec, self._spec) for n, spec in self._networks.items()}
                    self._failed = await trio.to_thread.run_sync(
                        self._converge, self._spec, dict(self._networks), found
                    )
                self._done = asked
            if network_id in self._failed:
                raise self._failed[network_id]

    def network_of(self, source: str) -> str:
        """The id of the network that a packet from the uplink came from; "" when it is not known.

        Args:
            source: the address that it has here: the router's, or the container's own where masquerading is off.
        """
        found = self._leg_of(source)
        return found[0] if found is not None else ""

    def origin(self, source: str, destination: str) -> tuple[str, str] | None:
        """Of a packet from the uplink as it arrives, the network that it came from and the gateway or address of the
        host's that it was sent to; None when it is not for the host."""
        address = ipaddress.ip_address(destination)
        if self._spec is None or not (address in self._taken or address in self._spec.stand_ins):
            return None
        found = self._leg_of(source)
        if address in self._spec.stand_ins:
            return (found[0], str(found[1].gateway)) if found is not None else None
        return found[0] if found is not None else "", destination

    def is_for_host(self, address: Address) -> bool:
        """Whether what networks send to this address is for the host: a gateway, or an address of the host's."""
        return self._spec is not None and (address in self._taken or address in self._spec.stand_ins)

    def _leg_of(self, source: str) -> tuple[str, Leg] | None:
        address = ipaddress.ip_address(source)
        for network_id, network in self._networks.items():
            for leg in legs(network, self._spec):
                if any(address in subnet for subnet in _sources(network, leg)):
                    return network_id, leg
        return None

    # In a worker thread from here on.

    def _clear(self) -> None:
        firewall.remove(self._nft)
        with Rtnetlink() as kernel:
            for version in _VERSIONS:
                while _tried(partial(kernel.delete_rule, version, _RULE_PRIORITY), errno.ENOENT, *_NO_SUCH_FAMILY):
                    pass
                _tried(
                    partial(kernel.delete_local_default, version, _RULE_TABLE),
                    errno.ENOENT,
                    errno.ESRCH,
                    *_NO_SUCH_FAMILY,
                )

    def _open(self, spec: UplinkSpec) -> None:
        outer = links.free_name(f"{INTERFACE}o", self._numbers)
        # The rules first: no moment without them.
        self._load(Rules(INTERFACE, _DEAF, spec.mtu, _subnets(spec), {}, (), frozenset(), None))
        try:
            with Rtnetlink() as kernel:
                kernel.add_veth(outer, INTERFACE, mtu=spec.mtu, mac=spec.mac_address)
                links.mark(outer)
                links.harden(outer)
                _forward()
                _settings(INTERFACE)
                kernel.set_up(socket.if_nametoindex(outer))
                index = socket.if_nametoindex(INTERFACE)
                kernel.set_up(index)
                loopback = socket.if_nametoindex("lo")
                for address in spec.addresses:
                    kernel.add_address(index, address.ip, address.network.prefixlen)
                    kernel.add_rule(
                        address.version,
                        interface=INTERFACE,
                        mark=firewall.MARK,
                        table=_RULE_TABLE,
                        priority=_RULE_PRIORITY,
                    )
                    kernel.add_local_default(address.version, loopback, _RULE_TABLE)
        except NetlinkError as exc:
            self._close(outer)
            raise OSError(exc.errno, f"cannot set up the uplink {INTERFACE}: {exc.strerror}") from exc
        self.outer, self._spec = outer, spec

    def _close(self, outer: str = "") -> None:
        links.delete_link(outer or self.outer)  # its addresses, routes and neighbours go with it
        self._clear()
        self.outer, self._spec, self._rules, self._there = "", None, None, {}

    def _converge(
        self, spec: UplinkSpec, networks: dict[str, NetworkSpec], network_legs: dict[str, tuple[Leg, ...]]
    ) -> dict[str, PreconditionError]:
        wanted: dict[str, Route | Neighbour] = {}
        whose: dict[str, str] = {}
        failed: dict[str, PreconditionError] = {}
        own: dict[IPNetwork, Address] = {}
        taken: set[Address] = set(spec.host_addresses)
        routed: list[IPNetwork] = []
        unprotected: list[IPNetwork] = []
        for network_id, found in network_legs.items():
            network = networks[network_id]
            for leg in found:
                # The MTU of the network, so that what is larger is refused or cut here, as on a bridge of Docker's.
                mtu = min(network.mtu, spec.mtu)
                address = str(leg.address.ip)
                itself = f"{address}/{leg.address.max_prefixlen}"
                wanted[address] = (address, network.uplink_mac)
                wanted[itself] = (itself, "", mtu)
                wanted[str(leg.subnet)] = (str(leg.subnet), address, mtu)
                mode = network.mode(leg.subnet.version)
                routed += [leg.subnet] if mode == GatewayMode.ROUTED else []
                unprotected += [leg.subnet] if mode == GatewayMode.NAT_UNPROTECTED else []
                whose |= dict.fromkeys((address, itself, str(leg.subnet)), network_id)
                own |= dict.fromkeys(_sources(network, leg), leg.gateway)
            if network.vlan is None:
                taken.update(network.gateways)
        subnets = _subnets(spec)
        self._taken = frozenset(taken)
        deaf = (*_DEAF, *sorted(self.cards))
        rules = Rules(INTERFACE, deaf, spec.mtu, subnets, own, spec.stand_ins, self._taken, self._redirect)
        self._load(replace(rules, opened=_opened(list(self._endpoints.values()), routed, unprotected)))
        with Rtnetlink() as kernel:
            index = socket.if_nametoindex(INTERFACE)
            gone = [key for key in self._there if key not in wanted]
            # Routes over a next hop need the next hop's own first, and go before it.
            for key in sorted(gone, key=lambda key: _order(self._there[key]), reverse=True):
                _change(kernel, index, self._there[key], "del")
                del self._there[key]
            for key in sorted(wanted, key=lambda key: _order(wanted[key])):
                if self._there.get(key) != wanted[key]:
                    # Never in the place of a route that the machine has for itself.
                    ours = key in self._there or len(wanted[key]) == 2
                    try:
                        _change(kernel, index, wanted[key], "replace" if ours else "add")
                    except PreconditionError as exc:
                        failed[whose[key]] = exc
                    else:
                        self._there[key] = wanted[key]
        return failed

    def _load(self, rules: Rules) -> None:
        if rules != self._rules:
            firewall.load(self._nft, firewall.ruleset(rules))
            self._rules = rules


def usable(spec: UplinkSpec) -> UplinkSpec | None:
    """The uplink as this machine can have it: with the MTU of its way on, and without IPv6 where there is none.

    Blocks for a millisecond.
    """
    addresses = tuple(address for address in spec.addresses if address.version == 4 or _IPV6.exists())
    return replace(spec, addresses=addresses, mtu=_outside_mtu()) if addresses else None


def _outside_mtu() -> int:
    """The MTU of the interfaces of the machine's default routes, the smallest, in bytes.

    The uplink must not have a larger one: ovs-vswitchd up to 3.2 cuts TCP segments anew, to the MTU of the port that
    they leave by (netdev_linux_prepend_vnet_hdr), and nothing on the way makes them smaller again.
    """
    with Rtnetlink() as kernel:
        outside = {index for version in _VERSIONS for index in kernel.default_route_interfaces(version)}
        found = [link.mtu for link in kernel.links() if link.index in outside] if outside else []
    return max(min(found, default=_USUAL_MTU), _LEAST_MTU)


def _subnets(spec: UplinkSpec) -> tuple[IPNetwork, ...]:
    return tuple(address.network for address in spec.addresses)


def _sources(network: NetworkSpec, leg: Leg) -> list[IPNetwork]:
    """The addresses with which packets come from a network over its leg."""
    itself = ipaddress.ip_network(leg.address.ip)
    return [itself] if network.masquerades(leg.subnet.version) else [itself, leg.subnet]


def _opened(endpoints: Iterable[EndpointSpec], routed: list[IPNetwork], unprotected: list[IPNetwork]) -> Opened:
    """What who has a route to the networks reaches of them."""
    ports = {
        (address, protocol, port)
        for endpoint in endpoints
        for address in endpoint.addresses
        if any(address in subnet for subnet in routed)
        for protocol, port in endpoint.open_ports
    }
    return Opened(frozenset(ports), tuple(routed), tuple(unprotected))


def _order(item: Route | Neighbour) -> tuple[bool, Route | Neighbour]:
    return len(item) == 3 and bool(item[1]), item


def _change(kernel: Rtnetlink, index: int, item: Route | Neighbour, verb: Literal["add", "replace", "del"]) -> None:
    change: Callable[[], None]
    if len(item) == 2:
        address, mac = ipaddress.ip_address(item[0]), item[1]
        if verb == "del":
            change = partial(kernel.delete_neighbour, index, address)
        else:
            change = partial(kernel.set_neighbour, index, address, mac)
    else:
        destination, hop, mtu = item
        way = kernel.delete_route if verb == "del" else partial(kernel.add_route, replace=verb == "replace")
        via = ipaddress.ip_address(hop) if hop else None
        change = partial(way, index, ipaddress.ip_network(destination), via=via, mtu=mtu)
    if verb == "del":
        _tried(change, errno.ENOENT, errno.ESRCH)
    else:
        try:
            change()
        except NetlinkError as exc:
            if exc.errno == errno.EEXIST:
                raise PreconditionError(
                    f"the helper's machine has a route to {item[0]} itself; choose another subnet"
                ) from exc
            raise OSError(exc.errno, f"cannot enter {item[0]} on the uplink: {exc.strerror}") from exc


def _tried(change: Callable[[], object], *nothing: int) -> bool:
    """Makes a change; False when there is nothing to change."""
    try:
        change()
    except NetlinkError as exc:
        if exc.errno in nothing:
            return False
        raise
    return True


def _write(setting: str, value: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6, say
        path = Path("/proc/sys/net") / setting
        if path.read_text().strip() != value:
            path.write_text(value)


def _settings(interface: str) -> None:
    """Of the kernel's end, which is still down: it takes no routes from the networks and believes no false sender."""
    for setting, value in (
        (f"ipv4/conf/{interface}/rp_filter", "1"),
        (f"ipv4/conf/{interface}/forwarding", "1"),
        (f"ipv4/conf/{interface}/accept_redirects", "0"),
        (f"ipv4/conf/{interface}/send_redirects", "0"),
        (f"ipv4/conf/{interface}/route_localnet", "0"),
        (f"ipv6/conf/{interface}/disable_ipv6", "0"),
        (f"ipv6/conf/{interface}/accept_ra", "0"),
        (f"ipv6/conf/{interface}/accept_redirects", "0"),
        (f"ipv6/conf/{interface}/forwarding", "1"),
    ):
        _write(setting, value)


def _forward() -> None:
    """Has the kernel forward, which it may do already; the data path's own interfaces it must not.

    A kernel that forwards IPv6 takes no router advertisements unless told so twice (accept_ra 2, ip-sysctl.rst), and
    the machine may have its own address and route from one.
    """
    base = Path("/proc/sys/net")
    forwards = base / "ipv6/conf/all/forwarding"
    if forwards.exists() and forwards.read_text().strip() == "0":
        for folder in (base / "ipv6/conf").iterdir():
            accept = folder / "accept_ra"
            with contextlib.suppress(FileNotFoundError):
                if folder.name != "all" and accept.read_text().strip() == "1":
                    accept.write_text("2")
        forwards.write_text("1")
    if (base / "ipv4/ip_forward").read_text().strip() == "0":
        (base / "ipv4/ip_forward").write_text("1")
        for folder in (base / "ipv4/conf").iterdir():  # that was for all of them
            if folder.name.startswith("tl") and folder.name != INTERFACE:
                _write(f"ipv4/conf/{folder.name}/forwarding", "0")
