"""What rules tell: ovn-controller's lines about ACLs with `log`, as events.

It writes them to its log, module acl_log (ovn-nb(5), ACL; lib/acl-log.c), which goes by syslog's protocol to a socket
of ours: nothing grows on the disk, whatever a guest sends. How many there are a second is limited by the ACLs' meter.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable

import trio

from taploom.contracts.taploom.helper.v1 import PolicyAction, PolicyDirection, PolicyLogged

_MAX = 4096

_LINE = re.compile(
    r'acl_log\([^)]*\)\|[A-Z]+\|name="(?P<name>[^"]*)", verdict=(?P<verdict>[a-z]+), severity=[a-z]+'
    r"(?:, direction=(?P<direction>[a-z-]+))?: (?P<flow>.*)"
)
_ACTIONS = {"allow": PolicyAction.ALLOW, "drop": PolicyAction.DROP, "reject": PolicyAction.REJECT}
_DIRECTIONS = {"to-lport": PolicyDirection.IN, "from-lport": PolicyDirection.OUT}


def parse_line(line: str) -> PolicyLogged | None:
    """What a line of ovn-controller's log says about a rule; None when it is about something else."""
    found = _LINE.search(line)
    if found is None:
        return None
    protocol, *fields = found["flow"].strip().split(",")
    values = dict(field.split("=", 1) for field in fields if "=" in field)

    def number(*keys: str) -> int:
        text = next((values[key] for key in keys if key in values), "0")
        return int(text) if text.isdecimal() else 0

    return PolicyLogged(
        rule_name=found["name"],
        action=_ACTIONS.get(found["verdict"], PolicyAction.UNSPECIFIED),
        direction=_DIRECTIONS.get(found["direction"] or "", PolicyDirection.UNSPECIFIED),
        protocol=protocol.removesuffix("6") if protocol in ("tcp6", "udp6") else protocol,
        source=values.get("nw_src", values.get("ipv6_src", "")),
        destination=values.get("nw_dst", values.get("ipv6_dst", "")),
        source_port=number("tp_src", "icmp_type"),
        destination_port=number("tp_dst", "icmp_code"),
    )


class PolicyLog:
    """Listens to ovn-controller.

    Args:
        bound: the socket, with an address, that it is told to send its lines to.
        on_logged: called with each.
    """

    def __init__(self, bound: socket.socket, on_logged: Callable[[PolicyLogged], None]) -> None:
        self._bound = bound
        self._on_logged = on_logged

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listens until cancelled, and closes the socket; reports started when it does."""
        with trio.socket.from_stdlib_socket(self._bound) as sock:
            task_status.started()
            while True:
                data = await sock.recv(_MAX)
                logged = parse_line(data.decode("utf-8", "replace"))
                if logged is not None:
                    self._on_logged(logged)
