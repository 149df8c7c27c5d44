"""Where taploom differs from the dockerd that it is compared with, and why. docs/docker.md says the same for people.

Everything else that differs fails the build, and so does an entry that nothing matches any more, unless it says that
dockerd itself varies.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from normalise import ABSENT

Kind = Literal["newer", "deliberate"]


@dataclass(frozen=True)
class Difference:
    """One listed difference. The patterns are searched; real and ours in the values' repr."""

    kind: Kind  # newer: later versions of Docker do as taploom does
    reason: str
    path: str  # where in the answer, such as json.EnableIPv4
    step: str = ""
    scenario: str = ""
    real: str | None = None
    ours: str | None = None
    without: str = ""  # both are the same without the lines in which this is found
    varies: bool = False  # dockerd does now this and now that (it often walks a map): not seen in every run

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str], ...]:
        return tuple(re.compile(pattern, re.DOTALL) for pattern in (self.scenario, self.step, self.path))

    def explains(self, scenario: str, step: str, path: str, real: Any, ours: Any) -> bool:
        """True when this is the difference that was found."""
        by_place = all(p.search(text) for p, text in zip(self._patterns, (scenario, step, path), strict=True))
        if self.without and by_place:
            return _lines_without(self.without, real) == _lines_without(self.without, ours)
        return by_place and _matches(self.real, real) and _matches(self.ours, ours)


def _lines_without(pattern: str, value: Any) -> list[str]:
    return [line for line in str(value).splitlines() if not re.search(pattern, line)]


def _matches(pattern: str | None, value: Any) -> bool:
    if pattern is None:
        return True
    return re.search(pattern, "ABSENT" if value is ABSENT else str(value), re.DOTALL) is not None


# Docker's own changes since 20.10. 26.1.5 and the sources of 28 were looked at.
_JSON_ERROR = (
    r"^(invalid JSON: |unsupported Content-Type|malformed Content-Type|unexpected content after JSON|invalid name)"
)
_SETTINGS = "Addresses are checked before anything is done, and all that is wrong with them is said at once"
_BODIES = (
    "Errors in a request's body begin with “invalid JSON:”, name the newer types, and what comes after the JSON is "
    "refused"
)
_FILTERS = "A malformed filter is a client's error (400) that says “invalid filter”"
_BRIDGE = "The default bridge's gateway is part of what inspect shows"
_NAMES = "A blank name of a network is refused with “invalid name: name is empty”"
_UNIQUE = "Two networks cannot have the same name, with or without CheckDuplicate"
_SIX = "A network with IPv6 and no IPv6 subnet is given one out of the host's ULA prefix"
_SWARM = "The ping says whether the engine is in a swarm"
_VERSIONS = "The API's versions are 1.24 to 1.51"
_TEXTS = "Error texts of Docker 28"

NEWER = [
    Difference("newer", _BODIES, r"^json\.message$", ours=_JSON_ERROR),
    Difference(
        "newer", _BODIES, r"^(status|json|json\.(Id|Warning)|stdout)$", step="trailing|CheckDuplicate..: .x|n6..\\{"
    ),
    Difference("newer", _BODIES, r"^status$", scenario="containers, raw", step="POST", real="500", ours="400"),
    Difference("newer", "A container is created with several networks", r"", step="--network n1 --network n2"),
    Difference(
        "newer",
        _FILTERS,
        r"^(json\.message|stderr)$",
        real="(?i)invalid filter|json|invalid char",
        ours="invalid filter",
    ),
    Difference("newer", _FILTERS, r"^status$", step="filters=", real="500", ours="400"),
    Difference("newer", _BRIDGE, r"IPAM\.Config\[0\]\.Gateway$", real="ABSENT", ours=r"^172\.17\.0\.1$"),
    Difference("newer", _NAMES, r"^stderr$", step="network create ' ?'$", ours="invalid name: name is empty"),
    Difference(
        "newer", _UNIQUE, r"^(status|json\.\w+)$", scenario="network create, raw", step='create {"Name": "n1"}$'
    ),
    Difference("newer", _SIX, r"", step="--ipv6 --subnet 10.91.0.0/16 x|field28"),
    Difference("newer", _SWARM, r"^headers\.swarm$", real="^$", ours="inactive"),
    Difference("newer", _VERSIONS, r"^(stdout|json\.message)$", ours="supported API version is 1.(24|51)"),
    Difference(
        "newer",
        _SETTINGS,
        r"^(stderr|json\.message|status)$",
        ours="invalid (network config|endpoint settings):|^400$",
        step="network create|networks/create|network connect|networks/two/connect|run --rm --network \\w+ --ip",
    ),
    Difference("newer", _SETTINGS, r"^(exit|stdout)$", step="--subnet 10.91.0.5/16|--ip-range 10.91.0.0/8"),
    Difference("newer", _SETTINGS, r"", step="field43"),
    Difference(
        "newer",
        "A name that nobody is there to be asked about is SERVFAIL at once",
        r"^stdout$",
        step="in ini: names",
        ours="SERVFAIL",
    ),
    Difference(
        "newer",
        "resolv.conf of a container on a user-defined network names no other server than 127.0.0.11",
        r"^stdout$",
        without="^nameserver 2001:db8::1$",
    ),
    Difference(
        "newer", "The loopback interface has ::1 in every container", r"^stdout$", without=r"^1: lo +inet6 ::1/128"
    ),
    Difference(
        "newer",
        "Compose creates a service's container with all its networks, of which another one comes first",
        r"^stdout$",
        scenario="compose, several",
        step="middle (addresses|routes)",
        ours="10.67.0.0/24 dev eth0|eth0 inet 10.67.0.20/24",
    ),
    Difference("newer", _TEXTS, r"^stderr$", ours="invalid pool request: Pool overlaps"),
    Difference("newer", _TEXTS, r"^stderr$", ours=r"has active endpoints \(name:"),
    Difference(
        "newer", _TEXTS, r"^stderr$", step="--subnet 10.91.0.0/3[12] x", ours="no available addresses on this pool"
    ),
]

# What taploom does otherwise on purpose.
DELIBERATE = [
    Difference(
        "deliberate",
        "A container that asks for a published UDP port by the host's address is answered from that address",
        r"^(stdout|exit)$",
        scenario="UDP",
        step="in (near|dns): uget <host> 5353",
        real="no answer|^1$",
    ),
    Difference(
        "deliberate", "Networks are local: a scope that is none is refused", r"^status$", step='"Scope": "nonsense"'
    ),
    Difference(
        "deliberate", "Subnets of loopback, link-local and multicast addresses are refused", r"", step="127.0.0.0/8"
    ),
    Difference(
        "deliberate",
        "From an internal network the host cannot be reached, and what is outside is unreachable at once",
        r"^(stdout|exit)$",
        scenario="reachability$",
        step="in inner1: (matrix <internet>|pings)",
    ),
    Difference(
        "deliberate",
        "From an internal network the host cannot be reached, and what is outside is unreachable at once",
        r"^stdout$",
        scenario="reachability$",
        step="in inner1: matrix 10",
        without="unreachable|timed out",
    ),
    Difference(
        "deliberate",
        "Networks are isolated from each other in IPv6 as in IPv4",
        r"^stdout$",
        scenario="reachability with six",
        step="matrix",
        real="sees .fd00",
        ours="^((?! sees ).)*$",
    ),
    Difference(
        "deliberate",
        "The host has no route to the networks: it reaches containers at published ports",
        r"^exit$",
        step="on the host: get 10.41.0.11 80",
    ),
    Difference(
        "deliberate",
        "Links are in /etc/hosts in the order in which they were given; with dockerd in any",
        r"^stdout$",
        scenario="names on the default bridge",
        step="in asker: cat /etc/hosts",
        real=r"allrouters\n172.17.0.2\tweb webhost\n172.17.0.2\talias webhost web\n172.17.0.3\t<id>$",
        ours=r"allrouters\n172.17.0.2\talias webhost web\n172.17.0.2\tweb webhost\n172.17.0.3\t<id>$",
        varies=True,
    ),
    Difference(
        "deliberate",
        "Links are in /etc/hosts in the order in which they were given; with dockerd in any",
        r"^stdout$",
        scenario="names on the default bridge",
        step="in asker: getent hosts web",
        real="^172.17.0.2  web webhost$",
        ours="^172.17.0.2  alias webhost web$",
        varies=True,
    ),
    Difference(
        "deliberate",
        "Links are told in the order in which they were given; by dockerd in any",
        r"^stdout$",
        scenario="names on the default bridge",
        step="inspect asker",
        real=r"\[/web:/asker/web /web:/asker/alias\]",
        ours=r"\[/web:/asker/alias /web:/asker/web\]",
        varies=True,
    ),
    Difference(
        "deliberate",
        "After a disconnect /etc/hosts has the addresses on the networks that are left",
        r"^stdout$",
        scenario="several networks",
        step="in both: cat /etc/hosts",
    ),
    Difference(
        "deliberate",
        "A refused connection leaves nothing behind",
        r"^(json|stdout)$",
        scenario="network connect and disconnect, raw",
        step="inspect web",
        real="'NetworkID': ''|^ABSENT$",
        ours="ABSENT|null",
    ),
    Difference(
        "deliberate",
        "A network that is gone is named by its name",
        r"^stderr$",
        step="docker start",
        real="network <[a-z]+> not found",
        ours="network [a-z]+ not found",
    ),
    Difference(
        "deliberate",
        "A container with internal networks alone has no default route",
        r"^stdout$",
        step="in (c3|i1|inner1): routes$",
        real=r"default via (<pool:a-inner>|10.4[39].0.1)",
    ),
    Difference(
        "deliberate",
        "What a failed connection attempt had taken is free again, so the next address is a lower one",
        r"",
        scenario="connect with addresses",
        step="in web2: (addresses|routes)|inspect dual",
    ),
    Difference(
        "deliberate",
        "There is no registry to pull from; images are imported",
        r"^stderr$",
        ours="there is no registry here",
    ),
    Difference(
        "deliberate",
        "The image host, the machine's own root file system, is always there",
        r"^stdout$",
        ours="host:latest",
    ),
    Difference(
        "deliberate",
        "A container has no files on the host: the paths are empty",
        r"^json\.(ResolvConfPath|HostnamePath|HostsPath|LogPath|GraphDriver\.Data|SizeRootFs)$",
    ),
    Difference("deliberate", "A container without an image is refused", r"", step='"Image": ""'),
    Difference(
        "deliberate", "The network in NAME.NETWORK is found in any case, as the name is", r"^stdout$", step="WWW.Net"
    ),
    Difference(
        "deliberate", "A sandbox has no file that a program could enter", r"SandboxKey$", ours="^/var/run/docker/netns/"
    ),
    Difference(
        "deliberate",
        "dockerd reports the end of an endpoint twice; taploom once",
        r"",
        scenario="events of a disconnect",
    ),
    Difference(
        "deliberate", "Only TCP and UDP can be published", r"^stderr$", ours="only tcp and udp can be published"
    ),
    Difference(
        "deliberate",
        "The peer of a published connection is always the network's gateway, as with Docker's userland proxy",
        r"^stdout$",
        real=r"sees \[?(::ffff:)?<(host|internet)6?>",
        ours=r"sees \S+\.1\]?$",
    ),
    Difference(
        "deliberate",
        "A service of the host that a container asks by a gateway or the host's address sees the host itself",
        r"^stdout$",
        scenario="dns options|reach",
        ours=r"sees \[::ffff:(127.0.0.1|<host>)\]",
    ),
]

DIFFERENCES: list[Difference] = [*NEWER, *DELIBERATE]


def page(kind: Kind) -> str:
    """What docs/docker.md says: every reason once."""
    reasons = dict.fromkeys(entry.reason for entry in DIFFERENCES if entry.kind == kind)
    return "".join(f"- {reason}.\n" for reason in reasons)


if (
    __name__ == "__main__"
):  # writes them into the page, or with --check says whether they are in it; needs PYTHONPATH=tests
    document = Path(__file__).parents[2] / "docs/docker.md"
    present = text = document.read_text()
    for which in get_args(Kind):
        mark = f"<!-- {which}: from tests/conformance/differences.py -->\n"
        before, after = text.split(mark)
        _, heading, rest = after.partition("\n## ")
        text = f"{before}{mark}\n{page(which)}{heading}{rest}"
    if "--check" not in sys.argv:
        document.write_text(text)
    elif text != present:
        sys.exit("docs/docker.md lacks differences: run PYTHONPATH=tests python tests/conformance/differences.py")
