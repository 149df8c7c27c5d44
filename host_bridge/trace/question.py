"""What is asked: a connection, and the answer in one line."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from host_bridge.errors import InvalidError
from host_bridge.ipam import is_address
from host_bridge.names import shown
from host_bridge.trace.words import PASSES, STOPS, UNKNOWN
from taploom.contracts.taploom.bridge.v1 import TraceResponse
from taploom.contracts.taploom.helper.v1 import TraceProtocol

# Who is meant by these: as a source, somebody outside; as a target, the machine that the bridge runs on.
HOST_WORDS = frozenset({"host", "outside"})
PROTOCOLS = {"tcp": TraceProtocol.TCP, "udp": TraceProtocol.UDP, "icmp": TraceProtocol.ICMP}
_MAX_TEXT = 255


@dataclass(frozen=True, slots=True)
class Question:
    """A connection to follow. `family` is 4, 6 or 0 for both; `port` is 0 for ICMP."""

    source: str
    target: str
    protocol: str
    port: int
    family: int

    @property
    def service(self) -> str:
        """What it is for, such as `tcp 80` or `icmp`."""
        return f"{self.protocol} {self.port}" if self.port else self.protocol


def question(source: str, target: str, protocol: str, port: int, family: int) -> Question:
    """Checks a question.

    Raises:
        InvalidError: says what is wrong.
    """
    protocol = protocol or ("tcp" if port else "icmp")
    if protocol not in PROTOCOLS:
        raise InvalidError(f"protocol {shown(protocol)} is unknown: use tcp, udp or icmp")
    if protocol == "icmp" and port:
        raise InvalidError("icmp has no ports: leave the port out")
    if protocol != "icmp" and not 0 < port < 1 << 16:
        raise InvalidError(f"{protocol} needs a port from 1 to 65535, such as {target or 'db'}:80")
    if family not in (0, 4, 6):
        raise InvalidError(f"family {family} is unknown: use 4 or 6")
    for what, text in (("source", source), ("target", target)):
        if not text or len(text) > _MAX_TEXT or not text.isprintable() or " " in text:
            raise InvalidError(f"{what} {shown(text)} is neither a name nor an address")
    if is_address(target) and family not in (0, ipaddress.ip_address(target).version):
        raise InvalidError(f"{target} is no IPv{family} address")
    return Question(source, target, protocol, port, family)


def conclude(asked: Question, response: TraceResponse) -> None:
    """The verdicts of the paths and of the whole, and the summary."""
    for path in response.paths:
        verdicts = {one.verdict for one in path.steps}
        path.verdict = STOPS if STOPS in verdicts else UNKNOWN if UNKNOWN in verdicts else PASSES
    said = {one.verdict for one in response.steps}
    found = {path.verdict for path in response.paths}
    if STOPS in said or (not found and UNKNOWN not in said):
        response.verdict = STOPS
    elif PASSES in found:
        response.verdict = PASSES
    else:
        response.verdict = UNKNOWN if UNKNOWN in said | found else STOPS
    what = f"{asked.service} from {asked.source} to {asked.target}"
    if response.verdict == PASSES:
        over = sorted({path.destination_address for path in response.paths if path.verdict == PASSES})
        response.summary = f"{what} passes ({', '.join(over)})"
        return
    every = [*response.steps, *(one for path in response.paths for one in path.steps)]
    why = next((one.text for one in every if one.verdict == response.verdict), "")
    response.summary = f"{what} {'does not pass' if response.verdict == STOPS else 'cannot be told'}: {why}"
