"""The /networks family."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import trio

from host_bridge.describe import with_prefixes
from host_bridge.docker_api import container_views, endpoints, ipam, refusals
from host_bridge.docker_api.absent import NO_SWARM
from host_bridge.docker_api.errors import DockerError, bad_request, conflict, forbidden, not_found
from host_bridge.docker_api.filters import Filters
from host_bridge.docker_api.gojson import BOOL, STRING, List, Map, Optional, Shape, Struct
from host_bridge.docker_api.http import Request, Response, Version, json_response
from host_bridge.docker_api.system import timestamp
from host_bridge.docker_api.times import TimeError, parse_moment
from host_bridge.errors import InvalidSubnetError, NetworkNotFoundError, NetworkOptionError
from host_bridge.model import (
    BRIDGE_DRIVER,
    HOST_DRIVER,
    NULL_DRIVER,
    EndpointOptions,
    NetworkOptions,
    NetworkRecord,
    SubnetRecord,
    parse_bool,
)

if TYPE_CHECKING:
    from host_bridge.docker_api.app import DockerApi

_IPAM_CONFIG = Struct(
    "network.IPAMConfig",
    {"Subnet": STRING, "IPRange": STRING, "Gateway": STRING, "AuxiliaryAddresses": Map(STRING)},
)
_OPTIONS: dict[str, Shape] = {
    "Driver": STRING,
    "Scope": STRING,
    "EnableIPv4": Optional(BOOL),
    "EnableIPv6": Optional(BOOL),
    "IPAM": Optional(Struct("network.IPAM", {"Driver": STRING, "Options": Map(STRING), "Config": List(_IPAM_CONFIG)})),
    "Internal": BOOL,
    "Attachable": BOOL,
    "Ingress": BOOL,
    "ConfigOnly": BOOL,
    "ConfigFrom": Optional(Struct("network.ConfigReference", {"Network": STRING})),
    "Options": Map(STRING),
    "Labels": Map(STRING),
}
CREATE = Struct(
    "network.CreateRequest",
    {"Name": STRING, "CheckDuplicate": Optional(BOOL), **_OPTIONS},
    embedded=("CreateOptions", frozenset(_OPTIONS)),
)
CONNECT = Struct(
    "network.ConnectOptions", {"Container": STRING, "EndpointConfig": Optional(endpoints.ENDPOINT_SETTINGS)}
)
DISCONNECT = Struct("network.DisconnectOptions", {"Container": STRING, "Force": BOOL})

_LIST_FILTERS = frozenset({"dangling", "driver", "id", "label", "name", "scope", "type"})
_PRUNE_FILTERS = frozenset({"label", "label!", "until"})
_RESERVED_NAMES = frozenset({"bridge", "host", "none", "default"})
_LOCAL = "local"
_NO_INTERFACE = {"MacAddress": "", "IPv4Address": "", "IPv6Address": ""}
_BRIDGE_NAME = "com.docker.network.bridge.name"


def register(api: DockerApi) -> None:
    """Adds the routes."""
    routes = Networks(api)
    add = api.router.add
    add("GET", "/networks", routes.list)
    add("GET", "/networks/", routes.list)
    add("GET", "/networks/{id:.+}", routes.inspect)
    add("POST", "/networks/create", routes.create)
    add("POST", "/networks/{id:.*}/connect", routes.connect)
    add("POST", "/networks/{id:.*}/disconnect", routes.disconnect)
    add("POST", "/networks/prune", routes.prune)
    add("DELETE", "/networks/{id:.*}", routes.delete)


class Networks:
    """Networks, and who is on them."""

    def __init__(self, api: DockerApi) -> None:
        self._api = api
        self._fabric = api.fabric
        self._pruning = False

    # Looking

    async def list(self, request: Request) -> Response:
        """GET /networks."""
        filters = Filters.parse(request.first("filters"))
        filters.check_keys(_LIST_FILTERS)
        await trio.lowlevel.checkpoint()
        found = [network for network in self._fabric.desired.networks() if self._matches(network, filters)]
        if dangling := filters.get("dangling"):
            if len(dangling) > 1:
                raise bad_request('got more than one value for filter key "dangling"')
            if dangling[0] not in ("0", "false", "1", "true"):
                raise bad_request(
                    """invalid value for filter 'dangling', must be "true" (or "1"), or "false" (or "0")"""
                )
            # Whom dockerd would have to ask its endpoints for, it leaves out of lists: only predefined ones are in use.
            unused = dangling[0] in ("1", "true")
            found = [network for network in found if network.predefined is not unused]
        if "type" in filters:
            chosen = []
            for kind in filters.get("type"):
                if kind not in ("builtin", "custom"):
                    raise DockerError(500, f"invalid filter: 'type'='{kind}'")
                chosen += [network for network in found if network.predefined is (kind == "builtin")]
            found = chosen
        detailed = request.version < (1, 28)
        return json_response([self.resource(network, request.version, detailed=detailed) for network in found])

    @staticmethod
    def _matches(network: NetworkRecord, filters: Filters) -> bool:
        return (
            filters.exact("driver", network.driver)
            and filters.match("name", network.name)
            and filters.match("id", network.id)
            and filters.labels("label", network.labels)
            and filters.exact("scope", _LOCAL)
        )

    async def inspect(self, request: Request) -> Response:
        """GET /networks/{id}."""
        verbose = request.first("verbose")
        if verbose and parse_bool(verbose) is None:
            raise bad_request(
                f'invalid value for verbose: {verbose}: strconv.ParseBool: parsing "{verbose}": invalid syntax'
            )
        await trio.lowlevel.checkpoint()
        term = request.params["id"]
        if request.first("scope") not in ("", _LOCAL):
            raise not_found(f"network {term} not found")
        networks = self._fabric.desired.networks()
        for found in (
            [network for network in networks if network.id == term],
            [network for network in networks if network.name == term],
            [network for network in networks if network.id.startswith(term)],
        ):
            if len(found) == 1:
                return json_response(self.resource(found[0], request.version, detailed=True))
            if found:
                raise bad_request(f"{len(found)} matches found based on ID prefix: network {term} is ambiguous")
        raise not_found(f"network {term} not found")

    def resource(self, network: NetworkRecord, version: Version, *, detailed: bool) -> dict[str, Any]:
        """A network as Docker describes it; who is on it only when `detailed`."""
        value: dict[str, Any] = {
            "Name": network.name,
            "Id": network.id,
            "Created": timestamp(network.created_at),
            "Scope": _LOCAL,
            "Driver": network.driver,
        }
        if version >= (1, 48):
            value["EnableIPv4"] = network.enable_ipv4
        return value | {
            "EnableIPv6": network.enable_ipv6,
            "IPAM": {
                "Driver": network.ipam_driver,
                "Options": None if network.ipam_options is None else dict(sorted(network.ipam_options.items())),
                "Config": [_subnet(subnet) for subnet in _all_subnets(network)],
            },
            "Internal": network.internal,
            "Attachable": network.attachable,
            "Ingress": network.ingress,
            "ConfigFrom": {"Network": network.config_from},
            "ConfigOnly": network.config_only,
            "Containers": self._containers(network) if detailed else {},
            "Options": dict(sorted(network.options.items())),
            "Labels": dict(sorted(network.labels.items())),
        }

    def _containers(self, network: NetworkRecord) -> dict[str, Any]:
        result = {}
        desired = self._fabric.desired
        for endpoint in desired.store.endpoints(network_id=network.id):
            if not endpoint.active:
                continue
            addresses = {6 if ":" in text else 4: text for text in with_prefixes(endpoint, network)}
            result[endpoint.guest_id] = {
                "Name": desired.guest_name(endpoint.guest_id),
                "EndpointID": endpoint.id,
                "MacAddress": endpoint.mac_address,
                "IPv4Address": addresses.get(4, ""),
                "IPv6Address": addresses.get(6, ""),
            }
        if not network.switched and self._api.manager is not None:
            for container in self._api.manager.users_of(network.name):
                if container.alive:
                    endpoint_id = container_views.endpoint_id(container, network.name)
                    result[container.id] = {"Name": container.name, "EndpointID": endpoint_id} | _NO_INTERFACE
        return dict(sorted(result.items()))

    # Changing

    async def create(self, request: Request) -> Response:
        """POST /networks/create."""
        wanted = await request.json(CREATE)
        if request.version < (1, 48):
            wanted["EnableIPv4"] = None
        name = wanted["Name"]
        options = self._options(wanted)
        try:
            record = await self._fabric.create_network(name, options)
        except InvalidSubnetError as error:
            raise _with_name(error, options) from error
        return json_response({"Id": record.id, "Warning": ""}, 201)

    def _options(self, wanted: Mapping[str, Any]) -> NetworkOptions:
        """What is wanted, once dockerd would have nothing against it; in its order of checks."""
        name, driver = wanted["Name"], wanted["Driver"] or BRIDGE_DRIVER
        if name in _RESERVED_NAMES:
            raise forbidden(f"operation is not permitted on predefined {name} network ")
        if driver == "overlay":
            raise forbidden(NO_SWARM)
        options = dict(wanted["Options"] or {})
        ipv4 = _enabled(wanted["EnableIPv4"], options, "com.docker.network.enable_ipv4", default=True)
        ipv6 = _enabled(wanted["EnableIPv6"], options, "com.docker.network.enable_ipv6", default=False)
        given = wanted["IPAM"] or {"Driver": "", "Options": None, "Config": None}
        configs = given["Config"] or []
        ipam.check(configs, ipv6=ipv6)
        if not name.strip():
            raise bad_request("invalid name: name is empty")
        if any(network.name == name for network in self._fabric.desired.networks()):
            raise conflict(f"network with name {name} already exists")
        config_from = (wanted["ConfigFrom"] or {"Network": ""})["Network"]
        self._check_configuration(wanted, config_from, given, ipv4=ipv4, ipv6=ipv6)
        if wanted["ConfigOnly"]:
            driver = NULL_DRIVER
        elif driver in (HOST_DRIVER, NULL_DRIVER):
            raise forbidden(f'only one instance of "{driver}" network is allowed')
        elif driver != BRIDGE_DRIVER:
            raise not_found(f'plugin "{driver}" not found')
        elif wanted["Ingress"]:
            raise forbidden("Ingress network can only be global scope network")
        elif wanted["Scope"] == "swarm":
            raise forbidden("cannot create a swarm scoped network when swarm is not active")
        elif wanted["Scope"] not in ("", _LOCAL):
            raise forbidden(NO_SWARM)
        else:
            self._check_bridge(options)
        ipam_driver = given["Driver"] or "default"
        if not wanted["ConfigOnly"] and ipam_driver == "null":
            raise bad_request(
                "null ipam driver does not handle specific address pool requests" if configs else "ipv4 pool is empty"
            )
        return NetworkOptions(
            subnets=ipam.subnets(configs),
            internal=wanted["Internal"],
            enable_ipv4=ipv4,
            enable_ipv6=ipv6,
            labels=wanted["Labels"] or {},
            options=options,
            driver=driver,
            attachable=wanted["Attachable"],
            ingress=wanted["Ingress"],
            config_only=wanted["ConfigOnly"],
            config_from=config_from,
            ipam_driver=ipam_driver,
            ipam_options=given["Options"],
        )

    def _check_bridge(self, options: Mapping[str, str]) -> None:
        """Options that mean nothing here but are checked by dockerd."""
        for key in ("com.docker.network.bridge.default_bridge", "com.docker.network.bridge.inhibit_ipv4"):
            if key in options and parse_bool(options[key]) is None:
                raise refusals.as_docker_error(NetworkOptionError(key, options[key], "bool"))
        name = options.get(_BRIDGE_NAME)
        for network in self._fabric.desired.networks() if name else ():
            if network.switched and network.options.get(_BRIDGE_NAME) == name:
                raise forbidden(
                    f"cannot create network {secrets.token_hex(32)} ({name}): conflicts with network "
                    f"{network.id} ({name}): networks have same bridge name"
                )

    @staticmethod
    def _check_configuration(
        wanted: Mapping[str, Any], config_from: str, given: Mapping[str, Any], *, ipv4: bool, ipv6: bool
    ) -> None:
        """What configuration networks, and networks made from one, may say of themselves."""
        operator = wanted["Ingress"] or wanted["Internal"] or wanted["Attachable"] or wanted["Scope"]
        if wanted["ConfigOnly"] and operator:
            raise refusals.operator_fields()
        if not config_from:
            return
        if wanted["ConfigOnly"]:
            raise forbidden("a configuration network cannot depend on another configuration network")
        own_ipam = given["Driver"] not in ("", "default") or given["Options"] or given["Config"]
        if own_ipam or not ipv4 or ipv6 or wanted["Labels"]:
            raise forbidden(refusals.CONFIG_CONFLICT)
        if wanted["Options"]:
            raise forbidden(refusals.CONFIG_OPTIONS)

    async def delete(self, request: Request) -> Response:
        """DELETE /networks/{id}."""
        network = self._find(request.params["id"])
        await self._fabric.delete_network(network.id)
        return Response(204)

    def _find(self, text: str) -> NetworkRecord:
        if not text:
            # Every id starts with nothing.
            count = len(self._fabric.desired.networks())
            raise bad_request(f"network  is ambiguous ({count} matches found based on ID prefix)")
        return self._fabric.desired.find_network(text)

    async def connect(self, request: Request) -> Response:
        """POST /networks/{id}/connect."""
        wanted = await request.json(CONNECT)
        container = wanted["Container"]
        self._check_container(container)
        settings = wanted["EndpointConfig"]
        options = EndpointOptions()
        text = request.params["id"]
        if settings is not None:
            text = settings["NetworkID"] or text
            try:
                network: NetworkRecord | None = self._find(text)
            except NetworkNotFoundError:
                network = None
            endpoints.check(settings, network)
            options = endpoints.options(settings)
        if self._api.manager is not None:
            await self._api.manager.connect(text, container, options, settings)
        else:
            await self._fabric.connect(self._find(text).id, container, options)
        return Response(200)

    def _check_container(self, text: str) -> None:
        """Raises what Docker answers when there is no such container; before it looks at the network."""
        if not text:
            raise bad_request('invalid name or ID supplied: ""')
        if self._api.manager is not None:
            self._api.manager.find(text)
        else:
            self._fabric.desired.find_guest(text)

    async def disconnect(self, request: Request) -> Response:
        """POST /networks/{id}/disconnect."""
        wanted = await request.json(DISCONNECT)
        container, force = wanted["Container"], wanted["Force"]
        text = request.params["id"]
        try:
            self._check_container(container)
        except Exception:
            if not force:
                raise
            # Docker then looks for an endpoint that nobody has any more; here every endpoint has its container.
            self._find(text)
            if not container:
                raise bad_request("invalid name: name is empty") from None
            raise not_found(f"endpoint {container} not found") from None
        if self._api.manager is not None:
            await self._api.manager.disconnect(text, container, force=force)
            return Response(200)
        try:
            network = self._find(text)
        except NetworkNotFoundError as error:
            if not force:
                raise
            guest = self._fabric.desired.find_guest(container)
            raise DockerError(500, f"container {guest.id} is not connected to the network {error.name}") from None
        await self._fabric.disconnect(network.id, container)
        return Response(200)

    async def prune(self, request: Request) -> Response:
        """POST /networks/prune."""
        filters = Filters.parse(request.first("filters"))
        if self._pruning:
            raise conflict("a prune operation is already running")
        filters.check_keys(_PRUNE_FILTERS)
        until: int | None = None
        if given := filters.get("until"):
            if len(given) > 1:
                raise bad_request("more than one until filter specified")
            try:
                until = parse_moment(given[0], time.time_ns())
            except TimeError as error:
                raise bad_request(str(error)) from None

        def unwanted(network: NetworkRecord) -> bool:
            if network.config_only or (until is not None and network.created_at.timestamp() * 1e9 > until):
                return False
            return filters.prunes(network.labels)

        self._pruning = True
        try:
            pruned = await self._fabric.prune_networks(unwanted)
        finally:
            self._pruning = False
        self._api.events.log("network", "prune", "", {"reclaimed": "0"})
        return json_response({"NetworksDeleted": [network.name for network in pruned] or None})


def _enabled(field: bool | None, options: dict[str, str], key: str, *, default: bool) -> bool:
    """Whether a family is enabled: the field, else the option, else the default."""
    if field is not None:
        options.pop(key, None)
        return field
    if key not in options:
        return default
    value = parse_bool(options[key])
    if value is None:
        raise bad_request(f'driver-opt "{key}" is not a valid bool')
    return value


def _with_name(error: InvalidSubnetError, options: NetworkOptions) -> Exception:
    """The error with the auxiliary address's name, which the fabric does not tell."""
    if error.what == "aux-address" and error.reason in ("reserved", "taken"):
        for subnet in options.subnets:
            for name, text in subnet.auxiliary.items():
                if text == error.value:
                    return DockerError(
                        500, f"failed to allocate secondary ip address ({name}:{text}): Address already in use"
                    )
    return error


def _all_subnets(network: NetworkRecord) -> list[SubnetRecord]:
    return sorted((*network.subnets, *network.idle_subnets), key=lambda subnet: subnet.family)


def _subnet(subnet: SubnetRecord) -> dict[str, Any]:
    value: dict[str, Any] = {"Subnet": subnet.subnet}
    if subnet.ip_range:
        value["IPRange"] = subnet.ip_range
    # A gateway that dockerd chose in a subnet that the user chose is not shown.
    if subnet.gateway and (subnet.gateway_given or not subnet.configured):
        value["Gateway"] = subnet.gateway
    if subnet.auxiliary:
        value["AuxiliaryAddresses"] = dict(sorted(subnet.auxiliary))
    return value
