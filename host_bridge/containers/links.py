"""Links on the default bridge: names in /etc/hosts, and variables that say where the other container's ports are."""

from __future__ import annotations

from host_bridge.containers import create, ports
from host_bridge.containers.errors import ContainerError
from host_bridge.containers.model import Container
from host_bridge.containers.networks import DEFAULT_NETWORK, ContainerNetworks


def resolve(
    container: Container, targets: dict[str, Container], networks: ContainerNetworks
) -> tuple[list[tuple[str, str]], list[str]]:
    """What the container's links on the default bridge come to.

    Args:
        container: whose links.
        targets: the container of each link, by the link's text.
        networks: where they are.

    Returns:
        (names, address) for /etc/hosts, and environment variables.

    Raises:
        ContainerError: a target does not run, or is not on the default bridge.
    """
    hosts, variables = [], []
    for text, target in targets.items():
        _, alias = create.parse_link(text)
        path = f"/{container.name}/{alias}"
        if not target.alive:
            raise ContainerError(500, f"Cannot link to a non running container: /{target.name} AS {path}")
        addresses = [
            endpoint.addresses for network, endpoint in networks.endpoints(target.id) if network.name == DEFAULT_NETWORK
        ]
        if not addresses:
            raise ContainerError(500, f"Cannot link to /{target.name}, as it does not belong to the default network")
        address = addresses[0][0]
        names = dict.fromkeys((alias, target.docker["Hostname"], target.name))
        hosts.append((" ".join(names), address))
        variables += _variables(alias, path, address, target)
    return hosts, variables


def _variables(alias: str, path: str, address: str, target: Container) -> list[str]:
    prefix = alias.upper().replace("-", "_")
    result = []
    exposed = ports.exposed(target.docker)
    for position, spec in enumerate(exposed):
        number, _, protocol = spec.partition("/")
        if position == 0:
            result.append(f"{prefix}_PORT={protocol}://{address}:{number}")
        name = f"{prefix}_PORT_{number}_{protocol.upper()}"
        result += [
            f"{name}={protocol}://{address}:{number}",
            f"{name}_ADDR={address}",
            f"{name}_PORT={number}",
            f"{name}_PROTO={protocol}",
        ]
    result.append(f"{prefix}_NAME={path}")
    for variable in target.docker["Env"] or ():
        key, equals, value = variable.partition("=")
        if equals and key not in ("HOME", "PATH"):
            result.append(f"{prefix}_ENV_{key}={value}")
    return result
