"""The steps of a trace, in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from host_bridge.names import clean_text
from host_bridge.policy.model import IN, OUT
from host_bridge.policy.state import RuleRef
from host_bridge.trace.ways import Place
from taploom.contracts.taploom.bridge.v1 import TracePath, TraceStep, TraceTopic, TraceVerdict
from taploom.contracts.taploom.helper import v1 as helper

PASSES, STOPS, UNKNOWN = TraceVerdict.PASSES, TraceVerdict.STOPS, TraceVerdict.UNSPECIFIED

_ACTIONS = {
    helper.PolicyAction.ALLOW: ("allow", "lets it pass"),
    helper.PolicyAction.DROP: ("drop", "drops it"),
    helper.PolicyAction.REJECT: ("reject", "rejects it"),
}
# What holds for everybody to whom something is denied, by the helper's names.
_ALWAYS = {
    "gateway": "what comes from the gateway, as connections to published ports do, passes",
    "dns": "questions to the network's DNS server pass",
    # Helpers of before.
    "dns-udp": "questions to the network's DNS server pass",
    "dns-tcp": "questions to the network's DNS server pass",
    "ping": "pings of the gateway pass",
    "dhcp": "DHCP passes",
    "answers": "what it sends passes",
}
_REST = frozenset({"rest-in", "rest-out"})


def step(topic: TraceTopic, text: str, verdict: TraceVerdict = PASSES, **more: str) -> TraceStep:
    """A step; `more` are its other fields."""
    return TraceStep(topic=topic, text=text, verdict=verdict, **more)


@dataclass
class Teller:
    """Tells of a packet's hops, one after another.

    Attributes:
        path: where the steps go.
        source, target: who sends it and whom it is meant for; None: no guest.
        network_name: gives the name of a network.
        rule: gives the rule that the helper calls so.
        denied_by: says what denies a place something in a direction, for people.
    """

    path: TracePath
    source: Place | None
    target: Place | None
    network_name: Callable[[str], str]
    rule: Callable[[str], RuleRef | None]
    denied_by: Callable[[Place, str], list[str]]

    def add(self, topic: TraceTopic, text: str, verdict: TraceVerdict = PASSES, **more: str) -> None:
        """Adds a step."""
        self.path.steps.append(step(topic, text, verdict, **more))

    def tell(self, found: helper.TracePacketResponse) -> None:
        """Tells of all hops and the end; where no rule decides, that is said, too."""
        self.path.ovn_trace = found.text
        decided = {hop.rule.direction for hop in found.hops if hop.rule is not None}
        if self.source is not None and found.outcome != helper.TraceOutcome.UNANSWERED:
            self._unless(helper.PolicyDirection.OUT in decided, self.source, OUT)
        for hop in found.hops:
            self._hop(hop)
        if self.target is not None and found.outcome == helper.TraceOutcome.DELIVERED:
            self._unless(helper.PolicyDirection.IN in decided, self.target, IN)

    def _unless(self, decided: bool, place: Place, direction: str) -> None:
        if not decided:
            text = f"{self._who(place, direction)}: no policy restricts it"
            self.add(TraceTopic.POLICY, text, direction=direction, network=place.network.name)

    def _hop(self, hop: helper.TraceHop) -> None:
        if hop.rule is not None:
            self._rule(hop.rule)
        elif hop.translation is not None:
            which = "destination" if hop.translation.destination else "source"
            address = clean_text(hop.translation.address, 60)
            self.add(TraceTopic.NAT, f"its {which} becomes {address}")
        elif hop.backend is not None:
            virtual, backend = clean_text(hop.backend.virtual_address, 60), clean_text(hop.backend.backend, 300)
            text = f"the load balancer at {virtual} hands it to {'one of ' if ',' in backend else ''}{backend}"
            if "," in backend:
                text += "; followed is the first"
            self.add(TraceTopic.LOAD_BALANCER, text)
        elif hop.router_of is not None:
            name = self.network_name(hop.router_of)
            self.add(TraceTopic.ROUTE, f"the gateway of {name} routes it", network=name)
        elif hop.isolated_network_id is not None:
            name = self.network_name(hop.isolated_network_id)
            self.add(
                TraceTopic.ISOLATION,
                f"guests of {name} do not reach each other (enable_icc=false)",
                STOPS,
                network=name,
            )
        elif hop.end is not None and hop.end:
            self._end(clean_text(hop.end))

    def _end(self, why: str) -> None:
        if why == "no route":
            name = self.source.network.name if self.source is not None else ""
            self.add(TraceTopic.ISOLATION, f"the gateway of {name} leads nowhere: the network has no way out", STOPS)
        elif "load balancer" in why:
            self.add(TraceTopic.LOAD_BALANCER, why, STOPS)
        elif why == "port security":
            self.add(TraceTopic.PORT_SECURITY, "the sender may not send from that address", STOPS)
        else:
            self.add(TraceTopic.ISOLATION, why, STOPS)

    def _rule(self, rule: helper.TraceRule) -> None:
        direction = IN if rule.direction == helper.PolicyDirection.IN else OUT
        place = self.target if direction == IN else self.source
        who = self._who(place, direction)
        action, what = _ACTIONS.get(rule.action, ("drop", "drops it"))
        more = {"direction": direction, "action": action}
        if place is not None:
            more["network"] = place.network.name
        verdict = PASSES if action == "allow" else STOPS
        if rule.rule_id in _REST:
            reasons = self.denied_by(place, direction) if place is not None else []
            text = f"{who}: no rule allows it, and {' and '.join(reasons) or 'what no rule allows is denied'}"
            self.add(TraceTopic.POLICY, text, STOPS, **more)
        elif rule.rule_id in _ALWAYS:
            self.add(TraceTopic.POLICY, f"{who}: {_ALWAYS[rule.rule_id]}", verdict, **more)
        elif (found := self.rule(rule.rule_id)) is not None:
            text = f"{who}: rule {found.rule} of group {found.group} {what}"
            self.add(TraceTopic.POLICY, text, verdict, **more, group=found.group, rule=found.rule)
        else:
            self.add(TraceTopic.POLICY, f"{who}: a rule that has just gone {what}", verdict, **more)

    @staticmethod
    def _who(place: Place | None, direction: str) -> str:
        name = "the guest" if place is None else place.guest.name
        return f"into {name}" if direction == IN else f"out of {name}"
