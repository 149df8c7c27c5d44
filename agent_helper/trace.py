"""What would become of a packet: by OVN's own trace, and from there on by what the kernel's tables say."""

from __future__ import annotations

import ipaddress
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import trio

from agent_helper import northbound, policy_rows
from agent_helper.errors import InvalidSpecError, NotFoundError, PreconditionError, UnavailableError
from agent_helper.fabric import EndpointState, Fabric, NetworkState
from agent_helper.logical_flows import flows_of
from agent_helper.ovn_trace import Flow, NoFlow, Output, Pipeline, Translation, backends, parse
from agent_helper.ovsdb import Txn
from agent_helper.spec import Address, legs
from agent_helper.stack import Stack
from taploom.contracts.taploom.helper.v1 import (
    PolicyAction,
    PolicyDirection,
    TraceBackend,
    TraceHop,
    TraceOutcome,
    TracePacketRequest,
    TracePacketResponse,
    TraceProtocol,
    TraceRule,
    TraceTranslation,
)

_TIMEOUT = 10.0
# More than a packet meets connection trackers: to each of them the connection is new.
_TRACKERS = 24
_SOURCE_PORT = 40000
_ANY_MAC = "02:00:00:00:00:01"  # of a sender that nobody looks at
_TTL = 64
_ACL_STAGES = frozenset(
    f"ls_{side}_acl{stage}" for side in ("in", "out") for stage in ("", "_eval", "_after_lb", "_after_lb_eval")
)
_BALANCING = frozenset({"ls_in_lb", "ls_in_lb_aff_check", "lr_in_dnat"})
_ACTIONS = {
    "allow": PolicyAction.ALLOW,
    "allow-related": PolicyAction.ALLOW,
    "allow-stateless": PolicyAction.ALLOW,
    "drop": PolicyAction.DROP,
    "reject": PolicyAction.REJECT,
}
_PROTOCOLS = {TraceProtocol.TCP: "tcp", TraceProtocol.UDP: "udp", TraceProtocol.ICMP: "icmp"}


@dataclass(frozen=True)
class _Acl:
    """What the northbound database says of an ACL: the rule that it is (or empty), and its action."""

    rule_id: str
    action: str
    incoming: bool


@dataclass(frozen=True)
class _Packet:
    protocol: TraceProtocol
    source: Address
    destination: Address
    port: int

    def microflow(self, inport: str, source_mac: str, destination_mac: str) -> str:
        """As ovn-trace(8) takes it: an expression that a single packet fits (ovn-sb(5), Logical_Flow)."""
        ip = f"ip{self.source.version}"
        parts = [
            f'inport == "{inport}"',
            f"eth.src == {source_mac}",
            f"eth.dst == {destination_mac}",
            f"{ip}.src == {self.source}",
            f"{ip}.dst == {self.destination}",
            f"ip.ttl == {_TTL}",
        ]
        if self.protocol is TraceProtocol.ICMP:
            kind = "icmp4.type == 8 && icmp4.code == 0" if ip == "ip4" else "icmp6.type == 128 && icmp6.code == 0"
            parts.append(kind)
        else:
            name = _PROTOCOLS[self.protocol]
            parts += [f"{name}.src == {_SOURCE_PORT}", f"{name}.dst == {self.port}"]
        return " && ".join(parts)


@dataclass
class _Way:
    """What is known of a packet's way so far."""

    packet: _Packet
    response: TracePacketResponse = field(default_factory=TracePacketResponse)
    sender: str = ""  # the port that it comes in by
    inport: str = ""
    datapath: str = ""
    balanced: list[str] = field(default_factory=list)  # the backends that a load balancer chooses from
    stuck: bool = False  # in the connection tracker of the router that `datapath` is

    def hop(self, hop: TraceHop) -> None:
        self.response.hops.append(hop)

    def end(self, outcome: TraceOutcome, why: str = "") -> None:
        self.response.outcome = outcome
        if why:
            self.hop(TraceHop(end=why))

    @property
    def ended(self) -> bool:
        return self.response.outcome != TraceOutcome.UNSPECIFIED


class Tracer:
    """Follows packets through a fabric."""

    def __init__(self, fabric: Fabric, stack: Stack) -> None:
        self._fabric = fabric
        self._stack = stack
        # Each is a process that reads the whole southbound database.
        self._limiter = trio.CapacityLimiter(2)

    async def trace(self, request: TracePacketRequest) -> TracePacketResponse:
        """What would become of a packet; nothing is sent.

        Raises:
            InvalidSpecError, NotFoundError, PreconditionError, UnavailableError: it cannot be said.
        """
        packet, source, network = self._packet(request)
        way = _Way(packet)
        if source is not None:
            way.response.source_up = self._fabric.is_up(source)
            inport, source_mac = northbound.endpoint_port(source.spec.endpoint_id), source.spec.mac_address
            destination_mac = self._neighbour(network, packet.destination)
            if not destination_mac:
                way.hop(TraceHop(network_id=network.spec.network_id))
                way.end(TraceOutcome.UNANSWERED)
                return way.response
        else:
            assert self._fabric.uplink is not None
            way.response.source_up = True
            inport, source_mac = northbound.KERNEL_PORT, self._fabric.uplink.mac_address
            destination_mac = network.spec.uplink_mac
        if not self._stack.ready.is_set():
            raise UnavailableError(f"waiting for {self._stack.waiting_for}; try again")
        way.sender = inport
        acls = await self._acls()
        microflow = packet.microflow(inport, source_mac, destination_mac)
        await self._follow(way, microflow, acls)
        if len(way.balanced) > 1:
            # To any of them; told is the way to the first.
            first, source_up = way.balanced[0], way.response.source_up
            way = _Way(packet, TracePacketResponse(source_up=source_up), sender=inport)
            await self._follow(way, microflow, acls, f"--lb-dst={first}")
        if way.stuck and not way.ended:
            await self._follow_on(way, acls)
        if not way.ended:
            way.end(TraceOutcome.UNSPECIFIED, "OVN's trace ends here")
        endpoint = self._fabric.endpoints.get(way.response.endpoint_id)
        way.response.destination_up = endpoint is not None and self._fabric.is_up(endpoint)
        return way.response

    def _packet(self, request: TracePacketRequest) -> tuple[_Packet, EndpointState | None, NetworkState]:
        try:
            destination = ipaddress.ip_address(request.destination)
        except ValueError as exc:
            raise InvalidSpecError(f"destination {request.destination!r} must be an address") from exc
        if request.protocol not in _PROTOCOLS:
            raise InvalidSpecError("protocol must be TCP, UDP or ICMP")
        if request.protocol != TraceProtocol.ICMP and not 0 < request.port < 1 << 16:
            raise InvalidSpecError(f"port {request.port} must be 1 to 65535")
        protocol = TraceProtocol(request.protocol)
        if request.endpoint_id:
            endpoint = self._fabric.endpoints.get(request.endpoint_id)
            if endpoint is None or endpoint.spec.disabled:
                raise NotFoundError(f"endpoint {request.endpoint_id} is not here")
            own = next((a for a in endpoint.spec.addresses if a.version == destination.version), None)
            if own is None:
                raise PreconditionError(f"the endpoint has no IPv{destination.version} address")
            return _Packet(protocol, own, destination, request.port), endpoint, endpoint.network
        network = self._fabric.networks.get(request.network_id)
        if network is None:
            raise NotFoundError(f"network {request.network_id} is not here")
        leg = next(
            (g for g in legs(network.spec, self._fabric.uplink) if g.kernel.version == destination.version), None
        )
        if leg is None:
            raise PreconditionError("the network is not on the uplink")
        return _Packet(protocol, leg.kernel, destination, request.port), None, network

    def _neighbour(self, network: NetworkState, destination: Address) -> str:
        """The MAC address that a guest on the network sends to; empty: nobody answers for the address."""
        spec = network.spec
        if destination in spec.dns_servers:
            return spec.dns_mac
        holder = network.holders.get(str(destination))
        if spec.vlan is not None and holder not in self._fabric.endpoints:
            return _ANY_MAC  # who is there on the VLAN, or is its router, is not known here
        if destination == spec.gateway(destination.version) or destination not in (
            spec.subnet(destination.version) or ()
        ):
            return spec.gateway_mac
        if self._fabric.is_balanced(spec.network_id, destination):
            return spec.gateway_mac  # the router answers for it
        return self._fabric.endpoints[holder].spec.mac_address if holder in self._fabric.endpoints else ""

    async def _acls(self) -> dict[str, _Acl]:
        """The ACLs of logical flows, by the beginnings of these flows' uuids."""
        acls = await self._stack.nb.transact(_read_acls)
        try:
            with trio.fail_after(_TIMEOUT):
                flows = await flows_of(self._stack.socket, _ACL_STAGES)
        except (OSError, trio.TooSlowError, trio.BrokenResourceError, ValueError) as exc:
            raise UnavailableError(f"OVN's flows cannot be read now ({exc}); try again") from exc
        return {uuid[:8]: acls[hint] for hint, uuids in flows.items() if hint in acls for uuid in uuids}

    async def _follow(self, way: _Way, microflow: str, acls: Mapping[str, _Acl], *options: str) -> None:
        argv = [
            self._stack.programs["ovn-trace"],
            f"--db=unix:{self._stack.socket}",
            *["--ct=new"] * _TRACKERS,
            *options,
            microflow,
        ]
        run = partial(
            subprocess.run,
            argv,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            stdin=subprocess.DEVNULL,
            env=self._stack.env,
            timeout=_TIMEOUT,
        )
        try:
            done = await trio.to_thread.run_sync(run, limiter=self._limiter)
        except subprocess.TimeoutExpired as exc:
            raise UnavailableError("OVN's trace did not end; try again") from exc
        if done.returncode:
            why = done.stderr.strip()[:200]
            raise UnavailableError(f"OVN's trace failed ({why}); try again")
        text = done.stdout
        way.response.text += ("\n" if way.response.text else "") + text
        way.stuck = False
        for event in parse(text):
            if isinstance(event, Pipeline):
                self._enter(way, event)
            elif isinstance(event, Translation):
                self._translated(way, event)
            elif isinstance(event, Flow):
                self._met(way, event, acls)
            elif isinstance(event, NoFlow):
                way.end(TraceOutcome.DROPPED, f"no flow of {event.stage} is for it")
            else:
                self._left(way, event)
            if way.ended:
                return

    async def _follow_on(self, way: _Way, acls: Mapping[str, _Acl]) -> None:
        """Goes on behind a gateway router's connection tracker, with what is for the router's own address.

        ovn-trace ends there. The data path, with a packet of a new connection, goes on to the router's translation of
        destinations: what is for the gateway goes to the kernel by way of the stand-in.
        """
        network = self._fabric.networks.get(way.datapath.partition("-")[2])
        found = [] if network is None else legs(network.spec, self._fabric.uplink)
        leg = next((one for one in found if one.gateway == way.packet.destination), None)
        if network is None or leg is None:
            way.end(TraceOutcome.DROPPED, f"{way.packet.destination} is the router's own, which takes nothing")
            return
        self._translated(way, Translation(destination=True, address=str(leg.stand_in)))
        at_gateway = way.inport.startswith("gwp-")
        mac = network.spec.gateway_mac if at_gateway else network.spec.uplink_mac
        await self._follow(way, way.packet.microflow(way.inport, _ANY_MAC, mac), acls)

    def _enter(self, way: _Way, event: Pipeline) -> None:
        if event.ingress and event.datapath != way.datapath:
            kind, _, network_id = event.datapath.partition("-")
            if kind == "net":
                way.hop(TraceHop(network_id=network_id))
            elif kind == "gw":
                way.hop(TraceHop(router_of=network_id))
        way.inport, way.datapath = event.inport, event.datapath
        if event.outport.startswith("ep-"):
            way.response.endpoint_id = event.outport.removeprefix("ep-")

    def _translated(self, way: _Way, event: Translation) -> None:
        address = ipaddress.ip_address(event.address)
        old = way.packet.destination if event.destination else way.packet.source
        if address != old:
            changed = {"destination": address} if event.destination else {"source": address}
            way.packet = _Packet(**{**vars(way.packet), **changed})
            way.hop(TraceHop(translation=TraceTranslation(destination=event.destination, address=str(address))))

    def _met(self, way: _Way, flow: Flow, acls: Mapping[str, _Acl]) -> None:
        actions = " ".join(flow.actions)
        if flow.stage in _ACL_STAGES and (acl := acls.get(flow.uuid)) is not None:
            self._decided(way, acl)
        elif chosen := backends(flow.actions):
            if not way.balanced:  # by the switch; the router takes it for what it has become
                way.hop(TraceHop(backend=TraceBackend(virtual_address=_shown(way.packet), backend=", ".join(chosen))))
            way.balanced = chosen
        elif flow.stage in _BALANCING and "reject {" in actions:
            way.end(TraceOutcome.REJECTED, f"the load balancer at {_shown(way.packet)} has no backend")
        elif "drop;" in flow.actions:
            if flow.stage == "lr_in_policy" and self._isolates(way.datapath):
                way.hop(TraceHop(isolated_network_id=way.datapath.partition("-")[2]))
                way.end(TraceOutcome.DROPPED)
            elif flow.stage.endswith("_apply_port_sec"):
                way.end(TraceOutcome.DROPPED, "port security")
            else:
                way.end(TraceOutcome.DROPPED, "no route" if flow.stage == "lr_in_ip_routing" else flow.stage)
        elif flow.stage == "lr_in_arp_request" and ("arp {" in actions or "nd_ns {" in actions):
            way.end(TraceOutcome.UNANSWERED)
        way.stuck = flow.actions[-1:] == ["ct_snat;"] and flow.stage.startswith("lr_in_")

    def _decided(self, way: _Way, acl: _Acl) -> None:
        action = _ACTIONS[acl.action]
        if acl.rule_id:
            direction = PolicyDirection.IN if acl.incoming else PolicyDirection.OUT
            way.hop(TraceHop(rule=TraceRule(rule_id=acl.rule_id, direction=direction, action=action)))
        elif action is not PolicyAction.ALLOW and self._isolates(way.datapath):
            way.hop(TraceHop(isolated_network_id=way.datapath.partition("-")[2]))
        if action is PolicyAction.DROP:
            way.end(TraceOutcome.DROPPED, "" if way.response.hops else "an ACL")
        elif action is PolicyAction.REJECT:
            way.end(TraceOutcome.REJECTED)

    def _isolates(self, datapath: str) -> bool:
        network = self._fabric.networks.get(datapath.partition("-")[2])
        return network is not None and network.spec.endpoints_isolated

    def _left(self, way: _Way, event: Output) -> None:
        if event.port == northbound.KERNEL_PORT:
            self._in_kernel(way)
        elif event.port.startswith("ep-"):
            if event.port == way.sender:  # the router's answer
                way.response.endpoint_id = ""
                way.end(TraceOutcome.ANSWERED)
            else:
                way.end(TraceOutcome.DELIVERED)
        elif event.port.startswith("vlan-"):
            way.end(TraceOutcome.LEFT)
        elif event.port.startswith("dns-"):
            way.end(TraceOutcome.ANSWERED)

    def _in_kernel(self, way: _Way) -> None:
        way.hop(TraceHop(kernel=True))
        destination = way.packet.destination
        if self._fabric.kernel.is_for_host(destination):
            icmp = way.packet.protocol is TraceProtocol.ICMP
            way.end(TraceOutcome.ANSWERED if icmp else TraceOutcome.HOST)
            return
        uplink = self._fabric.uplink
        assert uplink is not None
        networks = [network.spec for network in self._fabric.networks.values()]
        routed = [leg.subnet for network in networks for leg in legs(network, uplink)]
        if any(destination in subnet for subnet in routed) or any(
            destination in address.network for address in uplink.addresses
        ):
            way.end(TraceOutcome.DROPPED, "the helper lets nothing pass from one network to another")
            return
        own = _source_for(destination)
        if own is None:
            way.end(TraceOutcome.DROPPED, f"the helper has no route to {destination}")
        elif own == str(destination):
            way.end(TraceOutcome.DROPPED, f"{destination} is the helper's own, which takes nothing from networks")
        else:
            way.end(TraceOutcome.LEFT)


def _read_acls(txn: Txn) -> dict[str, _Acl]:
    """All ACLs by the beginnings of their uuids."""
    return {
        str(row.uuid)[:8]: _Acl(row.external_ids.get(policy_rows.RULE_KEY, ""), row.action, row.direction == "to-lport")
        for row in txn.rows("ACL")
    }


def _source_for(destination: Address) -> str | None:
    """The address that this machine would send from; None: it has no route. (No packet is sent: connect(2), udp(7).)"""
    family = socket.AF_INET if destination.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((str(destination), 9))
        except OSError:
            return None
        return str(sock.getsockname()[0])


def _shown(packet: _Packet) -> str:
    if packet.protocol is TraceProtocol.ICMP:
        return str(packet.destination)
    address = f"[{packet.destination}]" if packet.destination.version == 6 else str(packet.destination)
    return f"{address}:{packet.port}"
