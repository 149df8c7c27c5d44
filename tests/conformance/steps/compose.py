"""Docker Compose: files with two services and with several networks, up to down."""

from __future__ import annotations

from script import Scenario

SCENARIOS: list[Scenario] = []


def scenario(name: str) -> Scenario:
    made = Scenario(name)
    SCENARIOS.append(made)
    return made


PS = "ps -a --format '{{.Service}} {{.Name}} {{.State}} {{.Ports}}'"

s = scenario("compose, two services")
s.compose("two.yaml", "up -d", unordered=True)
s.compose("two.yaml", PS, unordered=True)
s.cli("network inspect two_default --format '{{.Driver}} {{json .Labels}} {{len .Containers}}'")
s.compose("two.yaml", "exec -T asker get web 80", until=True, silent=True)
s.compose("two.yaml", "exec -T asker names web. two-web-1.", silent=True)
s.host("get 127.0.0.1 8901", until=True, silent=True)
s.compose("two.yaml", "port web 80")
s.compose("two.yaml", "up -d", unordered=True)
s.compose("two.yaml", "restart -t 0 web", unordered=True)
s.host("get 127.0.0.1 8901", until=True, silent=True)
s.compose("two.yaml", "up -d --scale asker=3", unordered=True)
s.compose("two.yaml", PS, unordered=True)
s.compose("two.yaml", "exec -T --index 2 asker get web 80", silent=True, until=True)
s.compose("two.yaml", "logs web")
s.compose("two.yaml", "stop -t 0", unordered=True)
s.compose("two.yaml", "start", unordered=True)
s.compose("two.yaml", "kill", unordered=True)
s.compose("two.yaml", "rm -f", silent=True)
s.compose("two.yaml", "down -t 0", unordered=True)
s.compose("two.yaml", PS)
s.cli("network ls --format {{.Name}}")

s = scenario("compose, several networks")
s.compose("networks.yaml", "up -d", unordered=True)
s.cli("network create theirs", silent=True)
s.compose("networks.yaml", "up -d", unordered=True)
s.compose("networks.yaml", PS, unordered=True)
s.cli("network inspect nets_edge --format '{{.Driver}} {{.Internal}} {{json .IPAM}} {{json .Options}} {{len .Labels}}'")
s.cli(
    "network inspect nets_back --format '{{.Driver}} {{.Internal}} {{.EnableIPv6}} {{json .IPAM}} {{len .Containers}}'"
)
s.compose("networks.yaml", "exec -T middle addresses")
s.compose("networks.yaml", "exec -T middle routes")
s.compose("networks.yaml", "exec -T middle resolv")
s.compose("networks.yaml", "exec -T front cat /etc/hosts", unordered=True, silent=True)
s.compose("networks.yaml", "exec -T front get middle 80", until=True)
s.compose("networks.yaml", "exec -T middle get www 80", until=True, silent=True)
s.compose("networks.yaml", "exec -T middle names entry. store. front. theirs.", silent=True)
s.compose("networks.yaml", "exec -T store get center 80", until=True, silent=True)
s.compose("networks.yaml", "exec -T store names store. middle. front.", silent=True)
s.compose("networks.yaml", "exec -T store pings <internet>")
s.compose("networks.yaml", "exec -T front mtus", unordered=True)
s.compose("networks.yaml", "exec -T alone addresses")
s.compose("networks.yaml", "exec -T plain addresses")
s.host("get 127.0.0.1 8902", until=True, silent=True)
s.host("get <host> 8902")
s.host("get <host> 8903", until=True, silent=True)
s.compose("networks.yaml", "down -t 0", unordered=True)
s.cli("network ls --format {{.Name}}")
