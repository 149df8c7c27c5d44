"""Mirrors: copies of what passes one endpoint's TAP, sent to another's.

nf_tables' netdev family makes them (nft(8), "NETDEV ADDRESS FAMILY" and "DUP STATEMENT"), at the TAPs, before OVS has a
frame and after it has let go of it: each frame is copied once, whatever becomes of it in OVN, and OVN knows of nothing.
What a guest sends comes in at its TAP (ingress), what it receives goes out (egress). A copy takes along the checksum
and the segment size that its frame has still to be given, and goes to the receiving guest's TAP alone: OVS does not
take what a TAP sends. Without mirrors there is no table and no hook.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from agent_helper import firewall
from agent_helper.errors import InvalidSpecError
from agent_helper.ids import check_id
from taploom.contracts.taploom.helper.v1 import MirrorDirection, Mirrors

TABLE = "taploom_mirrors"
_MAX_MIRRORS = 4096
_PRIORITY = -500


@dataclass(frozen=True)
class MirrorSpec:
    """A mirror, and whether what the source receives and sends is copied."""

    source: str
    target: str
    incoming: bool
    outgoing: bool


def parse_mirrors(message: Mirrors | None) -> tuple[MirrorSpec, ...]:
    """Checks mirrors.

    Raises:
        InvalidSpecError: says which is wrong and why.
    """
    if message is None:
        return ()
    if len(message.mirrors) > _MAX_MIRRORS:
        raise InvalidSpecError(f"mirrors must be at most {_MAX_MIRRORS}, not {len(message.mirrors)}")
    found: dict[tuple[str, str], MirrorSpec] = {}
    for one in message.mirrors:
        source = check_id("source_endpoint_id", one.source_endpoint_id)
        target = check_id("target_endpoint_id", one.target_endpoint_id)
        if one.direction not in tuple(MirrorDirection):
            raise InvalidSpecError(f"mirror of {source} to {target}: its direction is not known; update the helper")
        if (source, target) in found:
            raise InvalidSpecError(f"mirror of {source} to {target} is described twice")
        incoming, outgoing = one.direction != MirrorDirection.OUT, one.direction != MirrorDirection.IN
        found[source, target] = MirrorSpec(source, target, incoming, outgoing)
    both = {source for source, _ in found} & {target for _, target in found}
    if both:
        raise InvalidSpecError(f"endpoint {min(both)} is copied from and to: copies would be copied again")
    return tuple(found.values())


def ruleset(mirrors: Iterable[MirrorSpec], taps: Mapping[str, str]) -> str:
    """The ruleset that makes these mirrors, of endpoints that have TAPs, and no others.

    Args:
        taps: the TAPs' names, by the endpoints' ids.
    """
    copies: dict[tuple[str, str], list[str]] = {}
    for mirror in mirrors:
        source, target = taps.get(mirror.source), taps.get(mirror.target)
        if source is None or target is None:
            continue
        for hook, wanted in (("ingress", mirror.outgoing), ("egress", mirror.incoming)):
            if wanted:
                copies.setdefault((hook, source), []).append(f'    dup to "{target}"')
    lines = [f"table netdev {TABLE}", f"delete table netdev {TABLE}"]
    if copies:
        lines.append(f"table netdev {TABLE} {{")
        for (hook, tap), statements in sorted(copies.items()):
            lines.append(f"  chain {hook}_{tap} {{")
            lines.append(f'    type filter hook {hook} device "{tap}" priority {_PRIORITY}; policy accept;')
            lines += [*sorted(statements), "  }"]
        lines.append("}")
    return "\n".join(lines) + "\n"


NONE = ruleset((), {})


def load(nft: str, text: str) -> None:
    """Has nft(8) take a ruleset of `ruleset`'s. Blocks for some milliseconds.

    Raises:
        HelperError: it refused; nothing was changed.
    """
    firewall.load(nft, text, needs="nf_tables' netdev family with egress and NFT_DUP_NETDEV")
