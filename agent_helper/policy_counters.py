"""What rules have done: the counters of the flows that they became.

A rule is an ACL; northd makes logical flows of it; ovn-controller makes OpenFlow flows of these whose cookie is the
beginning of the logical flow's uuid (ovn-sb(5), Logical_Flow). Their counters are asked for when somebody looks, by
aggregate requests (OpenFlow 1.3, 7.3.5.3).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import trio

from agent_helper import openflow
from agent_helper.errors import UnavailableError
from agent_helper.logical_flows import flows_of

_TIMEOUT = 5.0
# As northd of 23.03 calls the stages, and of 23.06 and later.
_STAGES = ("ls_in_acl_after_lb", "ls_in_acl_after_lb_eval", "ls_out_acl", "ls_out_acl_eval")
_REQUEST = struct.Struct("!B3xII4xQQHH4x")
_REPLY = struct.Struct("!QQI4x")
_ANY = 0xFFFFFFFF


async def read_counters(db_socket: Path, mgmt: Path, acls: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """Packets and bytes of each rule.

    Args:
        db_socket: ovsdb-server's.
        mgmt: where the integration bridge takes OpenFlow connections.
        acls: rules' ids and their ACLs' uuids.

    Raises:
        UnavailableError: a daemon does not answer.
    """
    try:
        with trio.fail_after(_TIMEOUT):
            flows = await flows_of(db_socket, _STAGES)
            wanted = {
                rule_id: [int(flow[:8], 16) for flow in flows.get(uuid[:8], ())] for rule_id, uuid in acls.items()
            }
            cookies = sorted({cookie for found in wanted.values() for cookie in found})
            answers = await openflow.multipart(mgmt, openflow.AGGREGATE, [_request(cookie) for cookie in cookies])
            counted = {cookie: _REPLY.unpack_from(answer) for cookie, answer in zip(cookies, answers, strict=True)}
    except (OSError, trio.TooSlowError, trio.BrokenResourceError, ValueError, struct.error) as exc:
        raise UnavailableError(f"the counters cannot be read now ({exc}); try again") from exc
    return {
        rule_id: (sum(counted[c][0] for c in found), sum(counted[c][1] for c in found))
        for rule_id, found in wanted.items()
    }


def _request(cookie: int) -> bytes:
    # Every table, port and group; the cookie's lower 32 bits are ovn-controller's, the others are 0; no match.
    return _REQUEST.pack(0xFF, _ANY, _ANY, cookie, 0xFFFFFFFFFFFFFFFF, 1, 4)
