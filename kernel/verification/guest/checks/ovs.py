"""Open vSwitch with the kernel's datapath: flows, connection tracking, NAT and tunnels as OVN makes them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ..check import CheckError, check, expect, run, step, wait_for
from ..netns import Namespace, veth
from ..traffic import Sniffer, only_udp, talk, tcp, udp, unreachable

GROUP = "Open vSwitch"
_RUN = Path("/run/openvswitch")
_SCHEMA = "/usr/share/openvswitch/vswitch.ovsschema"


class _Switch:
    """ovsdb-server and ovs-vswitchd in a namespace, with one bridge of the kernel's datapath."""

    def __init__(self, bridge: str = "br0") -> None:
        self.namespace = Namespace("switch")
        self.bridge = bridge
        _RUN.mkdir()
        run("ovsdb-tool", "create", "/run/conf.db", _SCHEMA)
        with self.namespace:
            self._start("ovsdb-server", "/run/conf.db", f"--remote=punix:{_RUN}/db.sock")
            run("ovs-vsctl", "--no-wait", "init")
            self._start("ovs-vswitchd", f"unix:{_RUN}/db.sock")
        self.vsctl("set", "Open_vSwitch", ".", "external_ids:system-id=verify")
        self.vsctl("add-br", bridge, "--", "set", "bridge", bridge, "datapath_type=system", "fail_mode=secure")
        shown = self.appctl("dpctl/show")
        expect("system@ovs-system" in shown, f"no kernel datapath: {shown.strip() or 'dpctl/show is empty'}")

    def _start(self, program: str, *arguments: str) -> None:
        run(
            program,
            *arguments,
            "--detach",
            "--no-chdir",
            f"--pidfile={_RUN}/{program}.pid",
            f"--log-file=/run/{program}.log",
        )

    def vsctl(self, *arguments: str) -> str:
        """ovs-vsctl in the switch's namespace; waits until ovs-vswitchd has done it."""
        try:
            return self.namespace.run("ovs-vsctl", "--timeout=80", *arguments)
        except CheckError as error:
            raise CheckError(f"{error} {self.complaints()}".strip()) from None

    def complaints(self) -> str:
        """The warnings and errors in ovs-vswitchd's log."""
        log = Path("/run/ovs-vswitchd.log")
        lines = log.read_text().splitlines() if log.exists() else []
        return "; ".join(
            line.split("|", 3)[-1]
            for line in lines
            if ("|WARN|" in line or "|ERR|" in line) and "|timeval|" not in line
        )[:300]

    def appctl(self, *arguments: str) -> str:
        """ovs-appctl to ovs-vswitchd."""
        return self.namespace.run("ovs-appctl", *arguments)

    def flows(self, text: str) -> None:
        """Replaces the bridge's flows."""
        file = Path("/tmp/flows")  # noqa: S108 - a tmpfs of the check's own
        file.write_text("\n".join(line.strip() for line in text.strip().splitlines()) + "\n")
        step(f"flows: {'; '.join(file.read_text().splitlines())}")
        self.namespace.run("ovs-ofctl", "-O", "OpenFlow13", "replace-flows", self.bridge, str(file))

    def host(self, name: str, number: int) -> Namespace:
        """A namespace on port `number` of the bridge, with the address 10.1.0.NUMBER."""
        host = Namespace(name)
        veth(host, self.namespace, "eth0", f"p{number}", then_a=[f"address add 10.1.0.{number}/24 dev eth0"])
        self.vsctl(
            "add-port", self.bridge, f"p{number}", "--", "set", "interface", f"p{number}", f"ofport_request={number}"
        )
        return host


@contextlib.contextmanager
def _switch() -> Iterator[_Switch]:
    switch = _Switch()
    try:
        yield switch
    finally:  # a datapath outlives its daemon: its ports must go before the namespace does
        with contextlib.suppress(CheckError):
            switch.vsctl("del-br", switch.bridge)


@check(
    "ovs-flows",
    GROUP,
    "ovs-vswitchd with datapath type system: two namespaces speak through flows that sit in the kernel",
)
def ovs_flows() -> str:
    with _switch() as switch:
        one, two = switch.host("one", 1), switch.host("two", 2)
        switch.flows("priority=0,actions=drop")
        unreachable(one, "10.1.0.2", timeout=0.3)
        switch.flows("in_port=1,actions=output:2\nin_port=2,actions=output:1")
        talk(one, two, "10.1.0.2")
        flows = switch.appctl("dpctl/dump-flows", "type=ovs", "system@ovs-system")
        in_kernel = [line for line in flows.splitlines() if "eth_type(0x0800)" in line and "actions:drop" not in line]
        expect(in_kernel, f"the kernel's datapath has no flow for IPv4: {flows.strip()}")
        hits = switch.appctl("dpctl/show").split("hit:")[1].split()[0]
        expect(int(hits), "the kernel's datapath counts no hit")
        return f"{len(in_kernel)} flows in the kernel, {hits} hits"


@check("ovs-ct", GROUP, "ct(): only what one side began passes; established by ct_state, in a zone of its own")
def ovs_ct() -> str:
    with _switch() as switch:
        one, two = switch.host("one", 1), switch.host("two", 2)
        switch.flows(
            """priority=10,arp,actions=normal
            priority=5,ip,ct_state=-trk,actions=ct(table=1,zone=5)
            table=1,priority=9,ip,in_port=1,ct_state=+trk+new,actions=ct(commit,zone=5,exec(load:0x7->NXM_NX_CT_MARK[])),output:2
            table=1,priority=9,ip,ct_state=+trk+est,ct_mark=7,in_port=1,actions=output:2
            table=1,priority=9,ip,ct_state=+trk+est,ct_mark=7,in_port=2,actions=output:1"""
        )
        talk(one, two, "10.1.0.2")
        try:
            udp(two, one, "10.1.0.1", tries=1, wait=0.8)
        except CheckError:
            pass
        else:
            raise CheckError("a connection from the other side passed")
        entries = switch.appctl("dpctl/dump-conntrack", "zone=5")
        expect("10.1.0.1" in entries and "mark=7" in entries, f"conntrack's zone 5 has: {entries.strip()}")
        return f"{len(entries.splitlines())} connections in zone 5"


@check("ovs-nat", GROUP, "ct(nat): DNAT of a virtual address (OVN's load balancer) and SNAT of a source")
def ovs_nat() -> str:
    with _switch() as switch:
        one, two = switch.host("one", 1), switch.host("two", 2)
        one.ip(f"neighbour add 10.1.0.99 lladdr {two.mac('eth0')} dev eth0")
        two.ip(f"neighbour add 10.1.0.50 lladdr {one.mac('eth0')} dev eth0")
        switch.flows(
            """priority=10,arp,actions=normal
            priority=6,tcp,in_port=1,nw_dst=10.1.0.99,tp_dst=80,ct_state=-trk,actions=ct(commit,table=1,zone=1,nat(dst=10.1.0.2:7000))
            priority=5,ip,ct_state=-trk,in_port=2,actions=ct(table=2,zone=2,nat)
            table=1,ip,actions=ct(commit,table=3,zone=2,nat(src=10.1.0.50))
            table=2,ip,actions=ct(table=4,zone=1,nat)
            table=3,ip,actions=output:2
            table=4,ip,actions=output:1"""
        )
        seen = tcp(one, two, "10.1.0.2", to=("10.1.0.99", 80))
        expect(seen.client == "10.1.0.50", f"the server saw {seen.client}")
        return "10.1.0.99:80 is 10.1.0.2:7000, seen from 10.1.0.50"


@check("ovs-geneve", GROUP, "a GENEVE port with a key and an option by flow (as OVN's tunnels) to another namespace")
def ovs_geneve() -> str:
    with _switch() as switch:
        one = switch.host("one", 1)
        remote = Namespace("remote")
        veth(remote, switch.namespace, "eth0", "underlay")
        switch.namespace.ip("address add 10.9.0.1/24 dev underlay")
        remote.ip(
            "address add 10.9.0.2/24 dev eth0",
            "link add gv0 type geneve id 55 remote 10.9.0.1 dstport 6081",
            "address add 10.1.0.2/24 dev gv0",
            "link set gv0 up",
        )
        switch.vsctl(
            *("add-port", switch.bridge, "tun", "--", "set", "interface", "tun", "type=geneve", "ofport_request=9"),
            *("options:remote_ip=10.9.0.2", "options:key=flow"),
        )
        switch.flows("in_port=1,actions=set_field:55->tun_id,output:9\nin_port=9,tun_id=55,actions=output:1")
        wire = Sniffer(remote, "eth0")
        talk(one, remote, "10.1.0.2")
        return only_udp(wire.frames(), 6081, "GENEVE")


@check("ovs-tunnels", GROUP, "VXLAN and GRE ports and an internal port; a policed port and a meter")
def ovs_tunnels() -> str:
    with _switch() as switch:
        one = switch.host("one", 1)
        remote = Namespace("remote")
        veth(remote, switch.namespace, "eth0", "underlay")
        switch.namespace.ip("address add 10.9.0.1/24 dev underlay")
        remote.ip(
            "address add 10.9.0.2/24 dev eth0",
            "link add vx0 type vxlan id 55 remote 10.9.0.1 local 10.9.0.2 dstport 4789 dev eth0",
            "link add gt0 type gretap local 10.9.0.2 remote 10.9.0.1 key 55",
        )
        for number, (kind, device) in enumerate((("vxlan", "vx0"), ("gre", "gt0")), 8):
            switch.vsctl(
                *("add-port", switch.bridge, kind, "--", "set", "interface", kind, f"type={kind}"),
                *(f"ofport_request={number}", "options:remote_ip=10.9.0.2", "options:key=55"),
            )
            switch.flows(f"in_port=1,actions=output:{number}\nin_port={number},actions=output:1")
            remote.ip(f"address add 10.1.0.2/24 dev {device}", f"link set {device} up")
            one.ip("neighbour flush dev eth0")  # the other device has a MAC of its own
            talk(one, remote, "10.1.0.2")
            remote.ip(f"address del 10.1.0.2/24 dev {device}", f"link set {device} down")
        switch.vsctl(
            "add-port", switch.bridge, "in0", "--", "set", "interface", "in0", "type=internal", "ofport_request=7"
        )
        wait_for("the internal port", lambda: "in0" in switch.namespace.run("ip", "-brief", "link"))
        switch.namespace.ip("address add 10.1.0.7/24 dev in0", "link set in0 up")
        switch.namespace.run(
            "ovs-ofctl",
            "-O",
            "OpenFlow13",
            "add-meter",
            switch.bridge,
            "meter=1,kbps,burst,band=type=drop,rate=100000,burst_size=10000",
        )
        switch.flows("in_port=1,actions=meter:1,output:7\nin_port=7,actions=output:1")
        switch.vsctl("set", "interface", "p1", "ingress_policing_rate=100000", "ingress_policing_burst=10000")
        talk(one, switch.namespace, "10.1.0.7")
        complaints = switch.complaints()
        expect("meter" not in complaints and "polic" not in complaints, complaints)
        return "vxlan, gre, internal, meter, policing"
