"""Which containers GET /containers/json lists: filters and limits as dockerd's."""

from __future__ import annotations

import re
from collections.abc import Callable

from host_bridge.containers import ports
from host_bridge.containers.errors import ContainerError
from host_bridge.containers.manager import ContainerManager, Found
from host_bridge.containers.model import Container
from host_bridge.containers.references import parse
from host_bridge.docker_api import container_views
from host_bridge.docker_api.errors import DockerError, bad_request
from host_bridge.docker_api.filters import Filters
from host_bridge.model import GuestRecord

KEYS_WORDS = "ancestor before exited expose health id is-task isolation label name network publish since status volume"
KEYS = frozenset(KEYS_WORDS.split())
_STATUSES = ("created", "running", "paused", "restarting", "removing", "exited", "dead")
_HEALTH = ("none", "starting", "healthy", "unhealthy")
_PORT = re.compile(r"([0-9]+)(?:-([0-9]+))?(?:/([a-z]+))?")

Condition = Callable[[Found], bool]


async def chosen(manager: ContainerManager, *, everything: bool, limit: int, filters: Filters) -> list[Found]:
    """The containers that a list shows, newest first.

    Args:
        everything: also those that do not run.
        limit: at most so many of the newest, whether they run or not; 0 or less: all that are shown.
    """
    filters.check_keys(KEYS)
    conditions = await _conditions(manager, filters)
    everyone: list[Found] = sorted(
        [*manager.containers(), *manager.guests()], key=lambda one: one.created_at, reverse=True
    )
    states = filters.get("status") or filters.get("exited")
    if not (everything or states or limit > 0):
        conditions.append(lambda one: not isinstance(one, Container) or one.running)
    for key, newer in (("before", False), ("since", True)):
        for text in filters.get(key):
            border = _border(manager, text)
            at = everyone.index(border)
            everyone = everyone[:at] if newer else everyone[at + 1 :]
    result = [one for one in everyone if all(condition(one) for condition in conditions)]
    return result[:limit] if limit > 0 else result


def _border(manager: ContainerManager, text: str) -> Found:
    try:
        return manager.find(text)
    except ContainerError as error:
        raise DockerError(500, f"no such container {text}") from error


async def _conditions(manager: ContainerManager, filters: Filters) -> list[Condition]:
    _check_values(filters)
    result: list[Condition] = [
        lambda one: _fits_id(filters, one),
        lambda one: _fits_name(filters, one),
        lambda one: filters.labels("label", _labels(one)),
    ]
    if filters.get("status"):
        result.append(lambda one: (one.status if isinstance(one, Container) else "running") in filters.get("status"))
    if filters.get("exited"):
        codes = [_exit_code(text) for text in filters.get("exited")]
        result.append(lambda one: isinstance(one, Container) and _has_exited(one) and one.state["ExitCode"] in codes)
    if filters.get("network"):
        result.append(lambda one: _on_network(manager, filters.get("network"), one))
    if filters.get("ancestor"):
        ids = set()
        for text in filters.get("ancestor"):
            ids |= await _image_ids(manager, text)
        result.append(lambda one: isinstance(one, Container) and one.config["Image"] in ids)
    if filters.get("volume"):
        result.append(lambda one: _has_mount(one, filters.get("volume")))
    for key in ("publish", "expose"):
        if filters.get(key):
            result.append(_port_condition(manager, key, filters.get(key)))
    if filters.get("health"):
        # There are no health checks: every container's health is none.
        result.append(lambda one: "none" in filters.get("health"))
    if "is-task" in filters:
        wanted = filters.boolean("is-task")
        result.append(lambda one: not wanted)
    return result


def _check_values(filters: Filters) -> None:
    for text in filters.get("status"):
        if text not in _STATUSES:
            raise bad_request(f"invalid filter 'status={text}'")
    for text in filters.get("health"):
        if text not in _HEALTH:
            raise bad_request(f"Unrecognised filter value for health: {text}")


def _exit_code(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise DockerError(500, f'strconv.Atoi: parsing "{text}": invalid syntax') from None


def _has_exited(one: Container) -> bool:
    return not one.running and one.status != "created"


def _fits_id(filters: Filters, one: Found) -> bool:
    return filters.match("id", one.id)


def _fits_name(filters: Filters, one: Found) -> bool:
    if not filters.get("name"):
        return True
    return filters.match("name", one.name) or filters.match("name", f"/{one.name}")


def _labels(one: Found) -> dict[str, str]:
    return {} if isinstance(one, GuestRecord) else one.docker["Labels"] or {}


def _on_network(manager: ContainerManager, wanted: tuple[str, ...], one: Found) -> bool:
    if isinstance(one, Container):
        names = list(one.networks)
    else:
        names = [network.name for network, _ in manager.networks.endpoints(one.id)]
    for name in names:
        if name in wanted:
            return True
        network = manager.networks.network(name)
        if network is not None and network.id in wanted:
            return True
    return False


async def _image_ids(manager: ContainerManager, text: str) -> set[str]:
    if manager.runtime is None:
        return set()
    image = await manager.runtime.image(text)
    if image is not None:
        return {image.id}
    try:
        parse(text)
    except ContainerError:
        return set()
    return {one.config["Image"] for one in manager.containers() if one.docker["Image"] == text}


def _has_mount(one: Found, wanted: tuple[str, ...]) -> bool:
    return isinstance(one, Container) and any(
        text in (mount["Source"], mount["Destination"]) for mount in one.config["Mounts"] for text in wanted
    )


def _port_condition(manager: ContainerManager, key: str, values: tuple[str, ...]) -> Condition:
    wanted: set[str] = set()
    for value in values:
        found = _PORT.fullmatch(value)
        if found is None or not 0 <= int(found[1]) <= int(found[2] or found[1]) <= 65535:
            number = value.partition("/")[0].partition("-")[0]
            why = f'strconv.ParseUint: parsing "{number}": invalid syntax'
            raise DockerError(500, f"error while looking up for {key} {value}: {why}")
        wanted |= {f"{port}/{found[3] or 'tcp'}" for port in range(int(found[1]), int(found[2] or found[1]) + 1)}

    def fits(one: Found) -> bool:
        if isinstance(one, GuestRecord):
            return False
        if key == "expose":
            return bool(wanted & set(ports.exposed(one.docker)))
        published = container_views.port_list(manager, one)
        return any(f"{entry['PublicPort']}/{entry['Type']}" in wanted for entry in published if "PublicPort" in entry)

    return fits
