"""What the fabric refuses, in Docker's words and under Docker's status."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from host_bridge import errors
from host_bridge.docker_api.errors import DockerError

OVERLAP = "invalid pool request: Pool overlaps with other one on this address space"
_OPERATOR_FIELDS = (
    "configuration network can only contain network specific fields. Network operator fields like "
    "[ ingress | internal | attachable | scope ] are not supported."
)
CONFIG_CONFLICT = "user specified configurations are not supported if the network depends on a configuration network"
CONFIG_OPTIONS = "network driver options are not supported if the network depends on a configuration network"
_HOST_NETWORK = "container cannot be disconnected from host network or connected to host network"
_NONE_NETWORK = "container cannot be connected to multiple networks with one of the networks in private (none) mode"
STATIC_ADDRESS = "user specified IP address is supported only when connecting to networks with user configured subnets"
STATIC_ON_DEFAULT = "user specified IP address is supported on user defined networks only"
ALIAS_ON_DEFAULT = "network-scoped alias is supported only for containers in user defined networks"


def endpoint_settings(*reasons: str) -> DockerError:
    """400: how a container is to be connected makes no sense."""
    return DockerError(400, "invalid endpoint settings:\n" + joined(reasons))


def joined(reasons: tuple[str, ...] | list[str]) -> str:
    """Several reasons as Docker lists them; one alone as it is."""
    return reasons[0].strip() if len(reasons) == 1 else "* " + "\n* ".join(reasons)


def as_docker_error(error: errors.BridgeError) -> DockerError:
    """The answer for a refusal. What Docker never refuses has the fabric's own message."""
    status = getattr(error, "status", None)
    if isinstance(status, int):  # it knows its own, as those of containers do
        return DockerError(status, str(error))
    for kind, translate in _TRANSLATIONS.items():
        if isinstance(error, kind):
            return translate(error)
    return DockerError(_STATUS.get(error.code, 500), str(error))


_STATUS = {
    "INVALID_ARGUMENT": 400,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "FAILED_PRECONDITION": 409,
    "RESOURCE_EXHAUSTED": 503,
    "UNAVAILABLE": 503,
    "ABORTED": 409,
}


def _name(error: errors.InvalidNameError) -> DockerError:
    if error.name.strip():
        return DockerError(400, str(error))
    return DockerError(400, "invalid name: name is empty")


def _ambiguous(error: errors.AmbiguousIdError) -> DockerError:
    if error.kind != "network":
        return DockerError(400, f"Multiple IDs found with provided prefix: {error.text}")
    return DockerError(400, f"network {error.text} is ambiguous ({len(error.names)} matches found based on ID prefix)")


def _predefined(error: errors.PredefinedNetworkError) -> DockerError:
    match error.action:
        case "create":
            return DockerError(403, f"operation is not permitted on predefined {error.name} network ")
        case "remove":
            return DockerError(403, f"{error.name} is a pre-defined network and cannot be removed")
    return DockerError(400, _NONE_NETWORK if error.name == "none" else _HOST_NETWORK)


def _option(error: errors.NetworkOptionError) -> DockerError:
    key, value = error.option, error.value
    match error.reason:
        case "bool":
            reason = f'strconv.ParseBool: parsing "{value}": invalid syntax'
        case "integer":
            reason = f'strconv.Atoi: parsing "{value}": invalid syntax'
        case "address":
            reason = "nil ip"
        case "gateway-mode":
            reason = f"unknown gateway mode {value}"
        case "negative" | "range":
            return DockerError(400, f"invalid MTU number: {value}")
        case "isolated":
            return DockerError(400, "gateway mode 'isolated' can only be used for an internal network")
        case _:
            reason = error.wanted
    return DockerError(400, f"failed to parse {key} value: {value} ({reason})")


def _config(error: errors.ConfigNetworkError) -> DockerError:
    match error.reason:
        case "not-config-only" | "not-found":
            return DockerError(404, f'configuration network "{error.name}" does not exist')
        case "config-only":
            return DockerError(403, "cannot create endpoint on configuration-only network")
        case "in-use":
            return DockerError(403, f'error while removing network: configuration network "{error.name}" is in use')
        case "nested":
            return DockerError(403, "a configuration network cannot depend on another configuration network")
        case "operator":
            return DockerError(403, _OPERATOR_FIELDS)
    return DockerError(403, CONFIG_CONFLICT)


def operator_fields() -> DockerError:
    """403: a configuration has fields that only networks have."""
    return DockerError(403, _OPERATOR_FIELDS)


def _subnet(error: errors.InvalidSubnetError) -> DockerError:
    value = error.value
    if error.reason == "prefix":
        return DockerError(500, "failed to allocate gateway (): no available addresses on this pool")
    if error.reason in ("reserved", "taken"):
        if error.what == "gateway":
            return DockerError(500, f"failed to allocate gateway ({value}): Address already in use")
        return DockerError(500, f"failed to allocate secondary ip address ({value}): Address already in use")
    return DockerError(400, f"invalid network config:\ninvalid {error.what} {value}: {error}")


def _active(error: errors.ActiveEndpointsError) -> DockerError:
    listed = ", ".join(f'name:"{name}" id:"{endpoint[:12]}"' for name, endpoint in error.endpoints)
    return DockerError(403, f"error while removing network: network {error.network} has active endpoints ({listed})")


def _outside(error: errors.OutsideSubnetError) -> DockerError:
    return endpoint_settings(f"no configured subnet or ip-range contain the IP address {error.address}")


def _family(address: str) -> str:
    return "IPv6" if ":" in address else "IPv4"


_TRANSLATIONS: dict[type[errors.BridgeError], Callable[[Any], DockerError]] = {
    errors.InvalidNameError: _name,
    errors.NetworkNotFoundError: lambda e: DockerError(404, f"network {e.name} not found"),
    errors.GuestNotFoundError: lambda e: DockerError(404, f"No such container: {e.name}"),
    errors.AmbiguousIdError: _ambiguous,
    errors.NetworkNameTakenError: lambda e: DockerError(409, f"network with name {e.name} already exists"),
    errors.PredefinedNetworkError: _predefined,
    errors.NetworkOptionError: _option,
    errors.UnsupportedDriverError: lambda e: DockerError(404, f'plugin "{e.driver}" not found'),
    errors.ConfigNetworkError: _config,
    errors.InvalidSubnetError: _subnet,
    errors.MultipleSubnetsError: lambda _: DockerError(403, "bridge driver doesn't support multiple subnets"),
    errors.NoFamilyError: lambda _: DockerError(400, "IPv4 or IPv6 must be enabled"),
    errors.PoolOverlapError: lambda _: DockerError(403, OVERLAP),
    errors.NoPoolLeftError: lambda _: DockerError(400, "all predefined address pools have been fully subnetted"),
    errors.ActiveEndpointsError: _active,
    errors.InvalidAddressError: lambda e: endpoint_settings(f"invalid {_family(e.address)} address: {e.address}"),
    errors.OutsideSubnetError: _outside,
    errors.StaticAddressError: lambda _: endpoint_settings(STATIC_ADDRESS),
    errors.AddressTakenError: lambda _: DockerError(403, "Address already in use"),
    errors.NoAddressLeftError: lambda _: DockerError(503, "no available addresses on this pool"),
    errors.InvalidMacError: lambda e: DockerError(400, f"invalid MAC address {e.mac}"),
    errors.AliasOnDefaultError: lambda _: endpoint_settings(ALIAS_ON_DEFAULT),
    errors.AlreadyConnectedError: lambda e: DockerError(
        403, f"endpoint with name {e.guest} already exists in network {e.network}"
    ),
    errors.NotConnectedError: lambda e: DockerError(
        500, f"container {e.guest_id or e.guest} is not connected to network {e.network}"
    ),
}
