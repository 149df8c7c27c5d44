"""What the bridge refuses and why.

Every error carries the name of the gRPC status code it becomes (see `protos/taploom/bridge/v1/bridge.proto`), a message
that says what to do, and, in the classes below the families, what it is about as attributes, so that another API can
say it in its own words. Nothing here imports gRPC: state and address management are usable without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class BridgeError(Exception):
    """A request that cannot be done. The message is for people; `code` names a gRPC status code."""

    code: ClassVar[str] = "INTERNAL"


class InvalidError(BridgeError):
    """The request is malformed, whatever the state is."""

    code = "INVALID_ARGUMENT"


class NotFoundError(BridgeError):
    """What the request names does not exist."""

    code = "NOT_FOUND"


class TakenError(BridgeError):
    """A name, address or place is held by another."""

    code = "ALREADY_EXISTS"


class PreconditionError(BridgeError):
    """The state does not allow the request now."""

    code = "FAILED_PRECONDITION"


class ExhaustedError(BridgeError):
    """No address, subnet or interface name is left."""

    code = "RESOURCE_EXHAUSTED"


class UnavailableError(BridgeError):
    """A guest or the helper does not answer; nothing was changed."""

    code = "UNAVAILABLE"


class AbortedError(BridgeError):
    """Another request undid this one while it was running."""

    code = "ABORTED"


# Names


class InvalidNameError(InvalidError):
    """A network or guest cannot have this name. `kind` is "network" or "guest"."""

    def __init__(self, message: str, *, kind: str, name: str) -> None:
        super().__init__(message)
        self.kind, self.name = kind, name


class NetworkNotFoundError(NotFoundError):
    """No network has this name, id or prefix of an id."""

    def __init__(self, name: str) -> None:
        super().__init__(f"network {_shown(name)} not found: 'taploom network ls' lists those there are")
        self.name = name


class GuestNotFoundError(NotFoundError):
    """No guest has this name, id or prefix of an id."""

    def __init__(self, name: str) -> None:
        super().__init__(f"guest {_shown(name)} not found: 'taploom guest ls' lists those there are")
        self.name = name


class AmbiguousIdError(InvalidError):
    """A prefix fits several ids. `kind` is "network" or "guest"; `names` are those of some that it fits."""

    def __init__(self, kind: str, text: str, names: Sequence[str] = ()) -> None:
        fits = f": it fits {kind}s {', '.join(names[:10])}" if names else ""
        super().__init__(f"id prefix '{_shown(text)}' is ambiguous{fits}; give more characters")
        self.kind, self.text, self.names = kind, text, tuple(names)


class NetworkNameTakenError(TakenError):
    """Another network has the name; `id` is its."""

    def __init__(self, name: str, id: str) -> None:
        super().__init__(f"network with name {name} already exists")
        self.name, self.id = name, id


class NameInUseError(TakenError):
    """Another guest or container has the name; `id` is its."""

    def __init__(self, name: str, id: str) -> None:
        super().__init__(f"guest with name {name} already exists: remove it first, or choose another name")
        self.name, self.id = name, id


class PredefinedNetworkError(PreconditionError):
    """The networks bridge, host and none stay as they are. `action` is "create", "remove" or "connect"."""

    def __init__(self, name: str, action: str) -> None:
        super().__init__(
            {
                "create": f"{name} is the name of a predefined network: choose another",
                "remove": f"network {name} is predefined and cannot be removed",
            }.get(action, f"network {name} is predefined: guests cannot {action} there")
        )
        self.name, self.action = name, action


# Networks


class NetworkOptionError(InvalidError):
    """An option of a network cannot be used. `option` is its key; `value` what was given; `reason` one of "bool",
    "integer", "negative", "range", "address", "policy", and those of `addressing`."""

    def __init__(self, option: str, value: str, reason: str) -> None:
        wanted = {
            "bool": "use true or false",
            "integer": "use a whole number",
            "negative": "use a number above 0",
            "range": "use 68 to 65535 bytes, 1280 at least with IPv6",
            "address": "use an IP address",
            "policy": "use allow, deny, deny-in or deny-out",
            "unknown": "there is no such option",
            "no-ipv6": "the network has no IPv6: give it IPv6 too",
            "gateway-mode": "use nat, nat-unprotected, routed or isolated",
            "isolated": "only an internal network can do without a gateway",
            "ra": "use none, slaac, stateless or stateful",
            "prefix": "hosts make addresses only of a subnet of 64 bits",
            "interval": "use 4 to 1800 seconds",
            "preference": "use low, medium or high",
            "rdnss": "use an IPv6 address or none",
            "dhcp": "use auto, on or off",
            "lease": "use 60 to 2147483647 seconds",
            "dns": "use 1 to 3 IP addresses with commas between",
            "vlan-tag": "use 1 to 4094",
            "vlan-uplink": "use the name of a network card of the helper's, such as eth1",
            "vlan-no-tag": "give taploom.vlan.tag too",
            "vlan-gateway": "the gateway of a VLAN is a router of its own",
        }[reason]
        super().__init__(f"option {_shown(option)} cannot be '{_shown(value)}': {wanted}")
        self.option, self.value, self.reason, self.wanted = option, value, reason, wanted


class EndpointOptionError(InvalidError):
    """An option of an endpoint cannot be used."""

    def __init__(self, option: str, value: str, wanted: str) -> None:
        super().__init__(f"option {_shown(option)} cannot be '{_shown(value)}': {wanted}")
        self.option, self.value = option, value


class VlanTakenError(TakenError):
    """A network is to be the VLAN that another is."""

    def __init__(self, tag: int, place: str, network: str) -> None:
        super().__init__(f"tag {tag} is network {network}'s ({place}): choose another tag or card, or use that network")
        self.tag, self.network = tag, network


class UnsupportedDriverError(NotFoundError):
    """There is no such network driver. `kind` is "network" or "ipam"."""

    def __init__(self, kind: str, driver: str) -> None:
        what = "network driver" if kind == "network" else "IPAM driver"
        only = "bridge" if kind == "network" else "default"
        super().__init__(f"{what} '{_shown(driver)}' is not supported: use '{only}'")
        self.kind, self.driver = kind, driver


class ConfigNetworkError(PreconditionError):
    """A configuration-only network was used as a network, or another as a configuration, or it is in use.

    `name` is the network's; `reason` one of "not-config-only", "config-only", "in-use", "not-found", "conflict",
    "operator" (fields that a configuration cannot have), "nested".
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            {
                "not-config-only": f"network {name} is no configuration: create one with config_only",
                "config-only": f"network {name} is a configuration only: create a network from it",
                "in-use": f"network {name} is the configuration of other networks: remove them first",
                "not-found": f"configuration network {_shown(name)} not found",
                "conflict": f"a network made from configuration {name} takes its options from there: give none",
                "operator": f"configuration {name} cannot be internal, attachable or ingress: what is made from it can",
                "nested": f"configuration {name} cannot be made from another configuration",
            }.get(reason, f"configuration network {name}: {reason}")
        )
        self.name, self.reason = name, reason


class InvalidSubnetError(InvalidError):
    """A subnet, range, gateway or auxiliary address is malformed or does not fit; `value` is what was given.

    `reason` is one of "malformed", "host-bits", "prefix", "special", "family", "outside" (the subnet), "range",
    "reserved" (network or broadcast address), "twice", "no-subnet". `what` names the field: "subnet", "ip-range",
    "gateway", "aux-address". `subnet` is the subnet that it was to fit, or empty.
    """

    def __init__(self, message: str, *, what: str, value: str, reason: str, subnet: str = "") -> None:
        super().__init__(message)
        self.what, self.value, self.reason, self.subnet = what, value, reason, subnet


class MultipleSubnetsError(InvalidError):
    """A network has at most one subnet of a family (4 or 6)."""

    def __init__(self, family: int) -> None:
        super().__init__(f"two IPv{family} subnets: give one per family")
        self.family = family


class NoFamilyError(InvalidError):
    """A network needs IPv4, IPv6 or both."""

    def __init__(self, network: str) -> None:
        super().__init__(f"network {network} has neither IPv4 nor IPv6: enable one")
        self.network = network


class PoolOverlapError(PreconditionError):
    """A subnet overlaps another network's. `other` is that subnet, `network` that network's name."""

    def __init__(self, subnet: str, other: str, network: str = "") -> None:
        super().__init__(f"subnet {subnet} overlaps {other} of network {network}: choose another")
        self.subnet, self.other, self.network = subnet, other, network


class NoPoolLeftError(ExhaustedError):
    """No default subnet of the family (4 or 6) is left."""

    def __init__(self, message: str, *, family: int) -> None:
        super().__init__(message)
        self.family = family


class ActiveEndpointsError(PreconditionError):
    """Guests are connected to the network. `endpoints` are (guest's name, endpoint's id)."""

    def __init__(self, network: str, network_id: str, endpoints: Sequence[tuple[str, str]]) -> None:
        names = [name for name, _ in endpoints]
        listed = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        super().__init__(
            f"network {network} is in use by {'guest' if len(names) == 1 else 'guests'} {listed}: disconnect first, "
            f"with 'taploom network disconnect {network} GUEST'"
        )
        self.network, self.network_id, self.endpoints = network, network_id, tuple(endpoints)


class BalancedNetworkError(ActiveEndpointsError):
    """Load balancers have addresses on the network; to Docker's users they are endpoints of theirs."""

    def __init__(self, network: str, network_id: str, balancers: Sequence[str]) -> None:
        super().__init__(network, network_id, [(name, f"lb-{name}") for name in balancers])
        listed = ", ".join(balancers[:10])
        self.args = (f"network {network} is in use by balancer {listed}: remove it first, with 'taploom lb rm'",)


# Endpoints


class InvalidAddressError(InvalidError):
    """An address that a guest is to have is malformed; `address` is what was given."""

    def __init__(self, message: str, *, address: str) -> None:
        super().__init__(message)
        self.address = address


class OutsideSubnetError(InvalidError):
    """A guest cannot have this address on the network: no subnet has it, or it is the subnet's first or last."""

    def __init__(self, message: str, *, address: str, network: str) -> None:
        super().__init__(message)
        self.address, self.network = address, network


class StaticAddressError(InvalidError):
    """Addresses can be chosen only on networks whose subnet was chosen. `family` is the address's."""

    def __init__(self, address: str, network: str, family: int) -> None:
        super().__init__(
            f"address {address}: network {network} has a subnet that the bridge chose; addresses can be asked for on "
            "networks that were created with --subnet"
        )
        self.address, self.network, self.family = address, network, family


class AddressTakenError(TakenError):
    """Somebody has the address; `holder` says who, for people."""

    def __init__(self, address: str, network: str, holder: str) -> None:
        super().__init__(f"address {address} of network {network} is taken by {holder}: choose another")
        self.address, self.network, self.holder = address, network, holder


class NoAddressLeftError(ExhaustedError):
    """Every address of the subnet (or of its range) has a holder."""

    def __init__(self, subnet: str) -> None:
        super().__init__(f"no address is left in {subnet}: disconnect a guest or create a larger network")
        self.subnet = subnet


class InvalidMacError(InvalidError):
    """A MAC address is malformed or not unicast."""

    def __init__(self, message: str, *, mac: str) -> None:
        super().__init__(message)
        self.mac = mac


class MacTakenError(TakenError):
    """Somebody has the MAC address; `holder` says who, for people."""

    def __init__(self, mac: str, holder: str) -> None:
        super().__init__(f"MAC address {mac} is taken by {holder}: choose another")
        self.mac, self.holder = mac, holder


class InvalidAliasError(InvalidError):
    """An alias or link is not a DNS name."""

    def __init__(self, message: str, *, alias: str) -> None:
        super().__init__(message)
        self.alias = alias


class AliasOnDefaultError(InvalidError):
    """The default bridge knows no names, so no aliases either."""

    def __init__(self, network: str) -> None:
        super().__init__(f"network {network} has no names, so no aliases: use a network that you created")
        self.network = network


class AlreadyConnectedError(TakenError):
    """The guest is on the network."""

    def __init__(self, guest: str, network: str) -> None:
        super().__init__(f"guest {guest} is already connected to network {network}")
        self.guest, self.network = guest, network


class NotConnectedError(PreconditionError):
    """The guest is not on the network."""

    def __init__(self, guest: str, network: str, guest_id: str = "") -> None:
        super().__init__(f"guest {guest} is not connected to network {network}")
        self.guest, self.network, self.guest_id = guest, network, guest_id


class StateError(Exception):
    """The state directory or its database cannot be used; the message says what to do."""


def _shown(text: str) -> str:
    """A user's text within a message: printable, short."""
    return repr(text if len(text) <= 80 else text[:80] + "...")[1:-1]
