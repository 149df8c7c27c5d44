"""What ovn-trace(8) prints, as values.

It follows a packet through the logical flows of the southbound database. What it prints is a line for each flow that
the packet meets, the flow's actions below it, and a heading for each pipeline, connection tracker and nested action
that it enters:

    ingress(dp="net-a", inport="ep-1")
     8. ls_in_acl (northd.c:6809): ip && !ct.est, priority 1, uuid dd9a1fa4
        reg0[1] = 1;
        next;
    ct_snat(ip4.src=192.0.2.1)
        output;
        /* output to "ep-2", type "" */
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_PIPELINE = re.compile(r'(ingress|egress)\(dp="([^"]*)", inport="([^"]*)"(?:, outport="([^"]*)")?')
_FLOW = re.compile(r"\s*\d+\. (\w+)(?: \([^)]*\))?: (.*), priority (\d+), uuid ([0-9a-f]{8})")
_NO_FLOW = re.compile(r"\s*\d+\. (\w+)(?: \([^)]*\))?: no match")
_NAT = re.compile(r"ct_([sd])nat\w*\(ip[46]\.(?:src|dst)=([0-9a-f.:]+)\)")
_BACKENDS = re.compile(r"ct_lb(?:_mark)?\(backends=([^)]*?)(?:;[^)]*)?\);")
_OUTPUT = re.compile(r'\s*/\* output to "([^"]*)", type "([^"]*)" \*/')


@dataclass(frozen=True)
class Pipeline:
    """The packet enters a switch or a router."""

    ingress: bool
    datapath: str
    inport: str
    outport: str = ""


@dataclass
class Flow:
    """A flow that it meets. `uuid` is the beginning of the logical flow's; `actions` are lines."""

    stage: str
    match: str
    uuid: str
    actions: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class NoFlow:
    """No flow of the stage matches: it is dropped."""

    stage: str


@dataclass(frozen=True)
class Translation:
    """An address of it is replaced: the destination's, or else the source's."""

    destination: bool
    address: str


@dataclass(frozen=True)
class Output:
    """It leaves by a port; `kind` is the port's type."""

    port: str
    kind: str


Event = Pipeline | Flow | NoFlow | Translation | Output


def parse(text: str) -> list[Event]:
    """The events in order. Lines of other kinds are skipped."""
    found: list[Event] = []
    for line in text.splitlines():
        if match := _PIPELINE.match(line):
            found.append(Pipeline(match[1] == "ingress", match[2], match[3], match[4] or ""))
        elif match := _FLOW.match(line):
            found.append(Flow(match[1], match[2], match[4]))
        elif match := _NO_FLOW.match(line):
            found.append(NoFlow(match[1]))
        elif match := _NAT.match(line):
            found.append(Translation(match[1] == "d", match[2]))
        elif match := _OUTPUT.match(line):
            found.append(Output(match[1], match[2]))
        elif line.startswith("    ") and (flow := _last_flow(found)) is not None:
            flow.actions.append(line.strip())
    return found


def _last_flow(events: list[Event]) -> Flow | None:
    return events[-1] if events and isinstance(events[-1], Flow) else None


def backends(actions: Iterable[str]) -> list[str]:
    """The backends, as address:port, among which a flow's load balancer chooses; none when it is not one."""
    for action in actions:
        if found := _BACKENDS.search(action):
            return found[1].split(",")
    return []
