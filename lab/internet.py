"""A namespace that plays the internet: what is behind the helper's uplink.

The helper's namespace has the address 192.0.2.2 (2001:db8::2) on a link to it and sends what it does not know itself
there. A server of the internet's has 198.51.100.1 (2001:db8:1::1). It knows no way to the lab's networks: what comes
back was sent with the helper's address. The addresses are those for documentation (RFC 5737, RFC 3849).
"""

from __future__ import annotations

import subprocess

HELPER_ADDRESSES = ("192.0.2.2/24", "2001:db8::2/64")
GATEWAYS = ("192.0.2.1", "2001:db8::1")
SERVERS = ("198.51.100.1", "2001:db8:1::1")
_LINK = "eth0"


def connect(helper: str, internet: str) -> None:
    """Links the helper's namespace to the internet's; both are there. Does nothing when it has been done.

    Raises:
        subprocess.CalledProcessError: the machine does not do it.
    """
    if subprocess.run(["ip", "-n", helper, "link", "show", _LINK], capture_output=True, check=False).returncode == 0:
        return
    commands = (
        (helper, f"link add {_LINK} type veth peer name {_LINK} netns {internet}"),
        *((internet, f"address add {address}/{64 if ':' in address else 24} dev {_LINK}") for address in GATEWAYS),
        *((internet, f"address add {address} dev lo") for address in SERVERS),
        *((internet, f"link set {device} up") for device in ("lo", _LINK)),
        *((helper, f"address add {address} dev {_LINK}") for address in HELPER_ADDRESSES),
        (helper, f"link set {_LINK} up"),
        *((helper, f"route replace default via {address}") for address in GATEWAYS),
    )
    for namespace, command in commands:
        # Nobody else is on that link, and waiting for a second to find out would be the lab's start's.
        nodad = ["nodad"] if command.startswith("address") and "::" in command else []
        subprocess.run(["ip", "-n", namespace, *command.split(), *nodad], check=True)
