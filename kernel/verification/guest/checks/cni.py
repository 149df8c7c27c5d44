"""The CNI plugins themselves (Debian's containernetworking-plugins): ADD, traffic, CHECK and DEL of each.

Source: the CNI specification 1.0.0; the plugins' own documentation.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..check import CheckError, check, expect, run, step
from ..netns import Namespace, veth
from ..traffic import connected, ping, talk, tcp, transfer, unreachable

GROUP = "CNI plugins"
_PLUGINS = "/usr/lib/cni"
_VERSION = "1.0.0"
_COMMON = {"cniVersion": _VERSION, "name": "verify"}


class _Network:
    """A CNI network configuration list, run by this process as a runtime runs it, in the namespace `host`."""

    def __init__(self, host: Namespace, *plugins: dict[str, Any], path: str = "") -> None:
        self._host = host
        self._path = path or os.environ["PATH"]
        self._plugins = plugins
        self.results: dict[str, dict[str, Any]] = {}

    def add(self, pod: Namespace, **capabilities: Any) -> dict[str, Any]:
        """ADD of every plugin in turn; the last one's result."""
        result: dict[str, Any] | None = None
        for plugin in self._plugins:
            result = json.loads(self._call("ADD", pod, plugin, result, capabilities))
        assert result is not None
        self.results[pod.name] = result
        return result

    def check(self, pod: Namespace, **capabilities: Any) -> None:
        """CHECK of every plugin: what ADD has made is still there."""
        for plugin in self._plugins:
            self._call("CHECK", pod, plugin, self.results[pod.name], capabilities)

    def delete(self, pod: Namespace, **capabilities: Any) -> None:
        """DEL of every plugin in reverse, twice: the second time there is nothing left, which must not be an error."""
        for _ in range(2):
            for plugin in reversed(self._plugins):
                self._call("DEL", pod, plugin, self.results[pod.name], capabilities)

    def _call(
        self,
        command: str,
        pod: Namespace,
        plugin: dict[str, Any],
        previous: dict[str, Any] | None,
        capabilities: dict[str, Any],
    ) -> str:
        config = {**_COMMON, **plugin}
        if previous is not None:
            config["prevResult"] = previous
        wanted = {name: capabilities[name] for name in plugin.get("capabilities", {}) if name in capabilities}
        if wanted:
            config["runtimeConfig"] = wanted
        environment = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": f"verify-{pod.name}",
            "CNI_NETNS": str(pod.path),
            "CNI_IFNAME": "lo" if plugin["type"] == "loopback" else "eth0",
            "CNI_PATH": _PLUGINS,
            "PATH": self._path,
        }
        with self._host:
            try:
                return run(f"{_PLUGINS}/{plugin['type']}", stdin=json.dumps(config), env=environment)
            except CheckError as error:
                raise CheckError(f"{plugin['type']} {command}: {_reason(str(error))}") from None


def _reason(text: str) -> str:
    """What a plugin says on failure is JSON with a message."""
    start = text.find("{")
    try:
        found = json.loads(text[start:]) if start >= 0 else {}
    except ValueError:
        return text
    return " ".join(str(found[name]) for name in ("msg", "details") if found.get(name)) or text


def _ipam(subnet: str = "10.22.0.0/24", **options: Any) -> dict[str, Any]:
    return {"type": "host-local", "ranges": [[{"subnet": subnet}]], "dataDir": "/run/cni", **options}


def _address(result: dict[str, Any]) -> str:
    return str(result["ips"][0]["address"].split("/")[0])


def _pods(network: _Network) -> tuple[Namespace, Namespace, str, str]:
    """Two pods in the network, and their addresses."""
    one, two = Namespace("pod1"), Namespace("pod2")
    return one, two, _address(network.add(one)), _address(network.add(two))


def _uplink(outside: Namespace, host: Namespace) -> None:
    """A veth pair between the outside (192.0.2.1) and the host (192.0.2.2, device uplink)."""
    lines = ["address add 192.0.2.1/24 dev eth0"], ["address add 192.0.2.2/24 dev uplink"]
    veth(outside, host, "eth0", "uplink", then_a=lines[0], then_b=lines[1])


def _gone(network: _Network, *pods: Namespace) -> None:
    """DEL of the pods; then they have no interface but lo, and their addresses are free."""
    for pod in pods:
        network.delete(pod)
        left = [str(one["ifname"]) for one in pod.ip_json("link") if one["ifname"] != "lo"]
        expect(not left, f"{pod.name} still has {' '.join(left)} after DEL")
    leases = Path("/run/cni/verify")
    taken = [path.name for path in leases.iterdir() if path.name[0].isdigit()] if leases.exists() else []
    expect(not taken, f"host-local still holds {' '.join(taken)} after DEL")


@check("cni-bridge", GROUP, "bridge with gateway, masquerade and hairpin: pod to pod, pod to host, pod to outside")
def cni_bridge() -> str:
    host, outside = Namespace("host"), Namespace("outside")
    _uplink(outside, host)
    bridge = {"type": "bridge", "bridge": "cni0", "isGateway": True, "ipMasq": True, "hairpinMode": True}
    network = _Network(host, bridge | {"ipam": _ipam(routes=[{"dst": "0.0.0.0/0"}])})
    one, two, _, address = _pods(network)
    talk(one, two, address)
    talk(one, host, "10.22.0.1")
    seen = tcp(one, outside, "192.0.2.1")
    expect(seen.client == "192.0.2.2", f"the outside saw {seen.client}, not the host's address")
    network.check(one)
    _gone(network, one, two)
    return f"{address}, masqueraded"


@check("cni-bridge-vlan", GROUP, "bridge with vlan=: pods of two VLANs on one bridge do not reach one another")
def cni_bridge_vlan() -> str:
    host = Namespace("host")
    # With an address of its own: without a gateway it takes its lowest port's, and CHECK wants the one that ADD saw.
    host.ip("link add cni0 address 02:00:00:00:0c:01 type bridge")
    plugin = {"type": "bridge", "bridge": "cni0"}
    ten = _Network(host, plugin | {"vlan": 10, "ipam": _ipam()})
    twenty = _Network(host, plugin | {"vlan": 20, "ipam": _ipam()})
    one, two, _, address = _pods(ten)
    three = Namespace("pod3")
    other = _address(twenty.add(three))
    talk(one, two, address)
    unreachable(one, other)
    ten.check(two)
    twenty.delete(three)
    _gone(ten, one, two)
    return "10 and 20 apart"


@check("cni-ptp", GROUP, "ptp with masquerade: two pods reach one another through the host")
def cni_ptp() -> str:
    host = Namespace("host")
    network = _Network(host, {"type": "ptp", "ipMasq": True, "ipam": _ipam(routes=[{"dst": "0.0.0.0/0"}])})
    one, two, _, address = _pods(network)
    talk(one, two, address)
    network.check(one)
    _gone(network, one, two)
    return address


def _on_uplink(plugin: dict[str, Any]) -> str:
    host, outside = Namespace("host"), Namespace("outside")
    veth(outside, host, "eth0", "uplink")
    outside.ip("address add 10.22.0.250/24 dev eth0")
    network = _Network(host, plugin | {"ipam": _ipam()})
    one, two, _, address = _pods(network)
    talk(one, two, address)
    talk(one, outside, "10.22.0.250")
    network.check(two)
    _gone(network, one, two)
    return address


@check("cni-macvlan", GROUP, "macvlan in bridge mode on the host's uplink: pod to pod, pod to outside")
def cni_macvlan() -> str:
    return _on_uplink({"type": "macvlan", "master": "uplink", "mode": "bridge"})


@check("cni-ipvlan", GROUP, "ipvlan in l2 mode on the host's uplink: pod to pod, pod to outside")
def cni_ipvlan() -> str:
    return _on_uplink({"type": "ipvlan", "master": "uplink", "mode": "l2"})


@check("cni-vlan", GROUP, "vlan 30 on the host's uplink: the pod speaks with an outside that is tagged")
def cni_vlan() -> str:
    host, outside = Namespace("host"), Namespace("outside")
    veth(outside, host, "eth0", "uplink")
    outside.ip(
        "link add link eth0 name eth0.30 type vlan id 30",
        "address add 10.22.0.250/24 dev eth0.30",
        "link set eth0.30 up",
    )
    network = _Network(host, {"type": "vlan", "master": "uplink", "vlanId": 30, "ipam": _ipam()})
    pod = Namespace("pod1")
    address = _address(network.add(pod))
    talk(pod, outside, "10.22.0.250")
    network.check(pod)
    _gone(network, pod)
    return address


@check(
    "cni-host-local",
    GROUP,
    "host-local: two ranges, a range that is used up, an address that is asked for, one that is free again",
)
def cni_host_local() -> str:
    host = Namespace("host")
    ranges = [
        [{"subnet": "10.22.0.0/29", "rangeStart": "10.22.0.4", "rangeEnd": "10.22.0.5"}],
        [{"subnet": "fd22::/64"}],
    ]
    network = _Network(host, {"type": "ptp", "ipam": _ipam() | {"ranges": ranges}})
    one, two, first, _ = _pods(network)
    third = Namespace("pod3")
    try:
        network.add(third)
    except CheckError as error:
        expect("no IP addresses available" in str(error), str(error))
    else:
        raise CheckError("a third address came from a range of two")
    six = [ip["address"] for ip in network.results[one.name]["ips"]]
    expect(any(":" in address for address in six), f"no IPv6 address among {six}")
    network.delete(one)
    again = _address(network.add(third))
    expect(again == first, f"{again} was given where {first} is free")
    network.delete(third)
    network.delete(two)
    return " ".join(six)


@check("cni-loopback", GROUP, "loopback brings lo up in a namespace")
def cni_loopback() -> str:
    host, pod = Namespace("host"), Namespace("pod1")
    pod.ip("link set lo down")
    network = _Network(host, {"type": "loopback"})
    network.add(pod)
    expect("UP" in pod.ip_json("link", "show", "dev", "lo")[0]["flags"], "lo is not up")
    tcp(pod, pod, "127.0.0.1")
    network.check(pod)
    network.delete(pod)
    return "up"


@check(
    "cni-portmap",
    GROUP,
    "portmap (iptables on nf_tables): a published port from outside and from the host itself; gone after DEL",
)
def cni_portmap() -> str:
    host, outside = Namespace("host"), Namespace("outside")
    _uplink(outside, host)
    host.sysctl("net/ipv4/ip_forward", 1)
    # The CHECK of 1.1.1 looks for the rules of an IPv4 pod in ip6tables, too, where that is in the PATH.
    programs = Path("/run/iptables")
    programs.mkdir()
    (programs / "iptables").symlink_to("/usr/sbin/iptables")
    network = _Network(
        host,
        {"type": "ptp", "ipMasq": True, "ipam": _ipam(routes=[{"dst": "0.0.0.0/0"}])},
        {"type": "portmap", "snat": True, "capabilities": {"portMappings": True}},
        path=str(programs),
    )
    mappings = [{"hostPort": 8080, "containerPort": 7000, "protocol": "tcp"}]
    pod = Namespace("pod1")
    address = _address(network.add(pod, portMappings=mappings))
    tcp(outside, pod, address, to=("192.0.2.2", 8080))
    tcp(host, pod, address, to=("127.0.0.1", 8080))
    network.check(pod, portMappings=mappings)
    network.delete(pod, portMappings=mappings)
    rules = host.run("iptables", "-w", "-t", "nat", "-S")
    expect("8080" not in rules, "the port's rules are still there after DEL")
    unreachable(outside, "192.0.2.2", 8080)
    return "8080 to 7000"


@check("cni-bandwidth", GROUP, "bandwidth (TBF, IFB): 64 KiB out of and into a pod of 1 Mbit/s take their time")
def cni_bandwidth() -> str:
    host = Namespace("host")
    limit = {"ingressRate": 1_000_000, "ingressBurst": 80_000, "egressRate": 1_000_000, "egressBurst": 80_000}
    network = _Network(
        host,
        {"type": "bridge", "bridge": "cni0", "isGateway": True, "ipam": _ipam()},
        {"type": "bandwidth", "capabilities": {"bandwidth": True}},
    )
    pod = Namespace("pod1")
    address = _address(network.add(pod, bandwidth=limit))
    took = [_transfer(host, pod, address, into=into) for into in (True, False)]
    expect(min(took) > 0.2, f"64 KiB took {took[0]:.2f} s into and {took[1]:.2f} s out of the pod")
    listed = host.run("tc", "qdisc")
    expect(listed.count("tbf") >= 2, f"no two TBF: {listed}")
    network.check(pod, bandwidth=limit)
    network.delete(pod, bandwidth=limit)
    expect("ifb" not in host.run("ip", "-brief", "link", "show", "type", "ifb"), "the IFB is still there after DEL")
    return f"{took[0]:.2f} s in, {took[1]:.2f} s out"


def _transfer(host: Namespace, pod: Namespace, address: str, *, into: bool) -> float:
    """The seconds that 64 KiB take over TCP."""
    with connected(host, pod, address) as (sock, accepted):
        step(f"64 KiB {'into' if into else 'out of'} the pod")
        return transfer(sock, accepted, 65536) if into else transfer(accepted, sock, 65536)


@check("cni-tuning", GROUP, "tuning: sysctl, MTU, MAC and promiscuous mode of a pod's interface, and back after DEL")
def cni_tuning() -> str:
    host, pod = Namespace("host"), Namespace("pod1")
    network = _Network(
        host,
        {"type": "ptp", "ipam": _ipam()},
        {
            "type": "tuning",
            "sysctl": {"net.core.somaxconn": "500", "net.ipv4.conf.eth0.arp_filter": "1"},
            "mtu": 1300,
            "mac": "02:00:00:00:00:77",
            "promisc": True,
        },
    )
    network.add(pod)
    shown = pod.ip_json("link", "show", "dev", "eth0")[0]
    expect(shown["mtu"] == 1300, f"the MTU is {shown['mtu']}")
    expect(shown["address"] == "02:00:00:00:00:77", f"the MAC is {shown['address']}")
    expect("PROMISC" in shown["flags"], "it is not promiscuous")
    with pod:
        expect(Path("/proc/sys/net/core/somaxconn").read_text().strip() == "500", "the sysctl was not set")
    ping(pod, "10.22.0.1")
    network.check(pod)
    _gone(network, pod)
    return "sysctl, mtu, mac, promisc"


@check(
    "cni-firewall",
    GROUP,
    "firewall (iptables on nf_tables): where forwarding is dropped, the pod's traffic is let through; gone after DEL",
)
def cni_firewall() -> str:
    host, outside = Namespace("host"), Namespace("outside")
    _uplink(outside, host)
    outside.ip("route add default via 192.0.2.2")
    host.sysctl("net/ipv4/ip_forward", 1)
    host.run("iptables", "-w", "-P", "FORWARD", "DROP")
    ptp = {"type": "ptp", "ipam": _ipam(routes=[{"dst": "0.0.0.0/0"}])}
    pod = Namespace("pod1")
    plain = _Network(host, ptp)
    plain.add(pod)
    unreachable(pod, "192.0.2.1")
    plain.delete(pod)
    network = _Network(host, ptp, {"type": "firewall", "backend": "iptables"})
    address = _address(network.add(pod))
    tcp(pod, outside, "192.0.2.1")
    network.check(pod)
    network.delete(pod)
    expect(address not in host.run("iptables", "-w", "-S"), "the pod's rules are still there after DEL")
    return address
