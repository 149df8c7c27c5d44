"""Who reaches whom: containers x networks x ports, the gateways, the host and the internet."""

from __future__ import annotations

from script import Scenario

SCENARIOS: list[Scenario] = []


def scenario(name: str) -> Scenario:
    made = Scenario(name)
    SCENARIOS.append(made)
    return made


s = scenario("reachability")
s.cli("network create --subnet 10.41.0.0/24 one")
s.cli("network create --subnet 10.42.0.0/24 two")
s.cli("network create --subnet 10.43.0.0/24 --internal inner")
s.cli("network create --subnet 10.44.0.0/24 -o com.docker.network.bridge.enable_icc=false noicc")
s.cli("network create --subnet 10.45.0.0/24 -o com.docker.network.driver.mtu=1400 small")
s.cli("network create --subnet 10.46.0.0/24 -o com.docker.network.bridge.enable_ip_masquerade=false bare")
ADDRESSES: dict[str, str] = {}
for network, prefix in (
    ("one", "10.41.0"),
    ("two", "10.42.0"),
    ("inner", "10.43.0"),
    ("noicc", "10.44.0"),
    ("small", "10.45.0"),
    ("bare", "10.46.0"),
):
    for number in (1, 2) if network in ("one", "inner", "noicc") else (1,):
        name = f"{network}{number}"
        ADDRESSES[name] = f"{prefix}.{10 + number}"
        s.run(
            f"--name {name} --hostname {name} --network {network} --ip {ADDRESSES[name]} -p {8800 + len(ADDRESSES)}:80",
            "serve",
        )
s.run("--name dflt --hostname dflt", "serve")
s.cli("network connect --ip 10.42.0.99 two one2")
s.serve("host", "serve 8660")
s.serve("internet", "serve 8661")
s.inside("one1", "get <internet> 8661", until=True, silent=True)
for asker in ("one1", "one2", "two1", "inner1", "noicc1", "small1", "bare1", "dflt"):
    s.inside(asker, f"get {ADDRESSES.get(asker, '127.0.0.1')} 80", until=True, silent=True)
    s.inside(asker, "matrix " + " ".join(f"{address}:80" for address in ADDRESSES.values()))
for asker in ("one1", "inner1", "noicc1", "bare1", "dflt"):
    s.inside(
        asker, "matrix <internet>:8661 <host>:8660 10.41.0.1:8660 10.43.0.1:8660 <host>:8801 10.42.0.1:8803 <host>:8804"
    )
    s.inside(asker, "pings <internet>")
    s.inside(asker, "pings 10.41.0.1")
    s.inside(asker, "pings 10.43.0.1")
    s.inside(asker, "routes")
s.inside("small1", "mtus")
s.inside("one1", "mtus")
s.inside("noicc1", "names noicc2.")
s.inside("one1", "get one2 80")
s.inside("one1", "get one2 81")
s.inside("one2", "addresses")
s.inside("one2", "routes")
s.cli("network disconnect two one2")
s.inside("one2", "get 10.42.0.11 80", silent=True)
s.inside("one2", "get 10.41.0.11 80")
s.internet("get 10.41.0.11 80", silent=True)
s.host("get 10.41.0.11 80", silent=True)

s = scenario("reachability with six")
s.cli("network create --ipv6 --subnet 10.47.0.0/24 --subnet fd00:47::/64 one")
s.cli("network create --ipv6 --subnet 10.48.0.0/24 --subnet fd00:48::/64 two")
s.cli("network create --ipv6 --internal --subnet 10.49.0.0/24 --subnet fd00:49::/64 inner")
s.run("--name a1 --hostname a1 --network one --ip6 fd00:47::11", "serve")
s.run("--name a2 --hostname a2 --network one --ip6 fd00:47::12", "serve")
s.run("--name b1 --hostname b1 --network two --ip6 fd00:48::11", "serve")
s.run("--name i1 --hostname i1 --network inner --ip6 fd00:49::11", "serve")
s.run("--name i2 --hostname i2 --network inner --ip6 fd00:49::12", "serve")
s.inside("a1", "get [fd00:47::12] 80", until=True)
s.inside("i1", "get [fd00:49::12] 80", until=True)
s.inside("a1", "matrix [fd00:48::11]:80 [fd00:49::11]:80 [fd00:49::1]:80")
s.inside("i1", "matrix [fd00:47::11]:80 [fd00:48::11]:80 [fd00:47::1]:80")
s.inside("a1", "pings fd00:47::1", until=True)
s.inside("i1", "pings fd00:49::1", until=True)
for name in ("a1", "b1", "i1"):
    s.inside(name, "addresses")
    s.inside(name, "routes")
s.inside("a1", "get a2 80")
