"""Names: container names, aliases, short ids, hostnames, links, PTR, resolv.conf, /etc/hosts, forwarding."""

from __future__ import annotations

from script import Scenario

SCENARIOS: list[Scenario] = []


def scenario(name: str) -> Scenario:
    made = Scenario(name)
    SCENARIOS.append(made)
    return made


s = scenario("names on a network")
s.cli("network create net")
s.run("--name web --hostname webhost --network net --network-alias www --network-alias shared", capture="web")
s.run("--name two --network net --network-alias shared --network-alias WWW2", capture="two")
s.run("--name asker --network net")
for name in (
    "web",
    "WEB",
    "webhost",
    "www",
    "two",
    "www2",
    "<web:12>",
    "<two:12>",
    "<web>",
    "shared",
    "web.net",
    "www.net",
    "WWW.Net",
    "<web:12>.net",
    "web.other",
    "nosuch",
    "nosuch.net",
    "asker",
    "localhost",
    "www.internet.test",
    "alias.internet.test",
    "nosuch.internet.test",
):
    s.inside("asker", f"names {name}.")
s.inside("asker", "getent ahostsv4 web")
s.inside("asker", "getent ahostsv4 www.internet.test")
s.inside("asker", "getent ahostsv4 nosuch")
s.inside("asker", "nslookup -type=aaaa web.")
s.inside("asker", "nslookup -type=aaaa nosuch.")
s.inside("asker", "nslookup -type=mx web.")
s.inside("asker", "nslookup -type=txt txt.internet.test.")
s.inside("asker", "nslookup -type=ptr 2.0.<pool:net>.in-addr.arpa.".replace("2.0.<pool:net>", "9.9.9.9"))
s.inside("asker", "names <pool:net>.2")
s.inside("asker", "names <pool:net>.3")
s.inside("asker", "names <pool:net>.1")
s.inside("asker", "names <pool:net>.99")
s.inside("asker", "names 192.0.2.4")
s.inside("asker", "resolv")
s.inside("asker", "cat /etc/hosts")
s.inside("web", "cat /etc/hosts")
s.inside("web", "cat /etc/hostname")
s.inside("asker", "pings web", until=True)
s.cli("rm -f two")
s.inside("asker", "names shared.")
s.inside("asker", "names two.")
s.cli("stop -t 0 web")
s.inside("asker", "names web.")
s.cli("start web")
s.inside("asker", "names web.")
s.cli("rename web renamed")
s.inside("asker", "names web.")
s.inside("asker", "names renamed.")
s.cli("network disconnect net renamed")
s.inside("asker", "names renamed.")
s.cli("network connect --alias late net renamed")
s.inside("asker", "names late.")
s.inside("asker", "names renamed.")
s.inside("asker", "names www.")

s = scenario("names on several networks")
s.cli("network create --subnet 10.31.0.0/24 beta")
s.cli("network create --subnet 10.32.0.0/24 alpha")
s.cli("network create --internal --subnet 10.33.0.0/24 inner")
s.run("--name both --network beta --network-alias b")
s.cli("network connect --alias a alpha both")
s.cli("network connect --alias i inner both")
s.run("--name inb --network beta --network-alias same")
s.run("--name ina --network alpha --network-alias same")
s.run("--name ini --network inner --network-alias same")
for name in (
    "inb",
    "ina",
    "ini",
    "same",
    "same.alpha",
    "same.beta",
    "same.inner",
    "both",
    "a",
    "b",
    "i",
    "both.alpha",
    "www.internet.test",
):
    s.inside("both", f"names {name}.")
for name in ("both", "ina", "same", "b", "a", "both.alpha"):
    s.inside("inb", f"names {name}.")
for name in ("both", "same", "nosuch"):
    s.inside("ini", f"names {name}.")
s.inside("ini", "resolv")
s.inside("both", "cat /etc/hosts")
s.inside("both", "names 10.31.0.3")
s.inside("both", "names 10.32.0.3")
s.cli("network disconnect beta both")
s.inside("both", "names same.")
s.inside("both", "names inb.")
s.inside("both", "cat /etc/hosts")
s.inside("both", "resolv")

s = scenario("names with six")
s.cli("network create --ipv6 --subnet 10.34.0.0/24 --subnet fd00:34::/64 dual")
s.run("--name web --network dual")
s.run("--name asker --network dual")
s.inside("asker", "names web.")
s.inside("asker", "nslookup -type=aaaa web.")
s.inside("asker", "names fd00:34::2")
s.inside("asker", "getent ahostsv6 web")
s.inside("asker", "cat /etc/hosts")
s.inside("asker", "pings fd00:34::2", until=True)
s.inside("asker", "routes")

s = scenario("names on the default bridge")
s.run("--name web --network-alias www --hostname webhost")
s.run("--name web --hostname webhost")
s.run("--name asker --link web:alias --link web")
s.inside("asker", "cat /etc/hosts")
s.inside("asker", "resolv")
s.inside("asker", "getent hosts alias")
s.inside("asker", "getent hosts web")
s.inside("asker", "getent hosts webhost")
s.inside("asker", "getent ahostsv4 www.internet.test")
s.inside("asker", "names www.internet.test.")
s.inside("asker", "pings alias", until=True)
s.cli("inspect asker --format '{{.HostConfig.Links}}'")
s.run("--name stranger")
s.inside("stranger", "getent hosts web")
s.inside("stranger", "cat /etc/hosts")
s.run("--name wrong --link nosuch:x")
s.run("--name wrong2 --link web:")
s.cli("stop -t 0 web")
s.run("--name late --link web:x")
s.cli("ps -a --filter name=late --format '{{.Names}} {{.State}}'")

s = scenario("links on a network")
s.cli("network create net")
s.run("--name db --network net")
s.run("--name web --network net --link db:database --link db:store")
s.inside("web", "names database.")
s.inside("web", "names store.")
s.inside("web", "names db.")
s.inside("db", "names database.")
s.inside("web", "cat /etc/hosts")
s.cli("network create net2")
s.cli("network connect --link db:linked net2 web")
s.inside("web", "names linked.")
s.cli("network connect net2 db")
s.inside("web", "names linked.")
s.cli("inspect web --format '{{json .NetworkSettings.Networks}}'")
s.cli("network connect --link nosuch:x net2 db")
s.cli("rm -f db")
s.inside("web", "names database.")

s = scenario("dns options and hosts")
s.cli("network create net")
for number, options in enumerate(
    [
        "--dns 192.0.2.1",
        "--dns 192.0.2.1 --dns 192.0.2.2",
        "--dns-search a.test --dns-search b.test",
        "--dns-search .",
        "--dns-option ndots:3 --dns-option timeout:2",
        "--dns 192.0.2.1 --dns-search x.test --dns-opt use-vc",
        "--add-host one:192.0.2.7 --add-host two:192.0.2.8",
        "--add-host six:fd00::7",
        "--add-host gw:host-gateway",
        "--add-host host.docker.internal:host-gateway",
        "--hostname h1 --domainname d1.test",
        "--hostname h1.d2.test",
        "--dns nonsense",
        "--add-host nonsense",
        "--add-host x:nonsense",
        "--add-host one=192.0.2.9",
        "--dns-search '-bad-'",
        "--dns 2001:db8::1",
    ]
):
    for network in ("", "--network net"):
        if network == "" and number in (1, 4, 6, 12, 13, 14, 15, 16):
            continue
        s.cli(f"run --rm {network} {options} box sh -c 'resolv; grep -v ip6 /etc/hosts; hostname; cat /etc/hostname'")
s.run("--name web --network net --dns <internet> --add-host here:host-gateway")
s.inside("web", "names www.internet.test.")
s.inside("web", "getent hosts here")
s.serve("host", "serve 8650")
s.host("get 127.0.0.1 8650", until=True, silent=True)
s.inside("web", "get here 8650", until=True)
s.inside("web", "get <pool:net>.1 8650")
s.inside("web", "get <host> 8650")
s.inside("web", "get <host> 8651")
s.inside("web", "get here 8651")
s.inside("web", "sh -c 'echo 192.0.2.99 own >> /etc/hosts; getent hosts own'")
s.cli("network create net2")
s.cli("network connect net2 web")
s.inside("web", "getent hosts own")
s.inside("web", "cat /etc/hosts")
