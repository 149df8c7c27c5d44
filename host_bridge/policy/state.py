"""Policies that are wanted: changed in one transaction each, and compiled to what the helper is told."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from host_bridge.errors import NotFoundError, PreconditionError
from host_bridge.model import EndpointRecord, GuestRecord, NetworkRecord
from host_bridge.names import shown
from host_bridge.places import Place, Places, fits
from host_bridge.policy.check import check_defaults, check_together, checked_groups
from host_bridge.policy.model import (
    ALLOW,
    ANY,
    DENY,
    DENY_IN,
    DENY_OUT,
    DROP,
    ICMP,
    ICMPV6,
    IN,
    LABEL_GROUPS,
    OPTION_POLICY,
    OUT,
    REJECT,
    TCP,
    UDP,
    Group,
    NetworkDefault,
    Rule,
)
from host_bridge.selectors import Selector
from host_bridge.sources import Changes, Source
from host_bridge.store import Store
from taploom.contracts.taploom.helper import v1 as helper

_ACTIONS = {
    ALLOW: helper.PolicyAction.ALLOW,
    DROP: helper.PolicyAction.DROP,
    REJECT: helper.PolicyAction.REJECT,
}
_DIRECTIONS = {IN: helper.PolicyDirection.IN, OUT: helper.PolicyDirection.OUT}
_PROTOCOLS = {
    ANY: helper.PolicyProtocol.UNSPECIFIED,
    TCP: helper.PolicyProtocol.TCP,
    UDP: helper.PolicyProtocol.UDP,
    ICMP: helper.PolicyProtocol.ICMP,
    ICMPV6: helper.PolicyProtocol.ICMPV6,
}


class PolicyGroupNotFoundError(NotFoundError):
    """No group has this name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"policy group {shown(name)} not found: 'taploom policy ls' lists those there are")
        self.name = name


@dataclass(frozen=True, slots=True)
class RuleRef:
    """A rule by name."""

    group: str
    direction: str
    rule: str


@dataclass(frozen=True)
class _Compiled:
    """All that follows from the groups alone."""

    groups: Mapping[str, Group]
    message: helper.Policy
    # What makes an endpoint a member, and the id of the group that the helper knows: by the guest that is named, or "".
    selectors: Mapping[str, Sequence[tuple[Selector, str]]]
    names: Mapping[str, str]  # the helper's id of a user's group -> its name
    denies: Mapping[str, tuple[bool, bool]]  # by that id: whether it has a list for in, for out
    holders: Mapping[str, Sequence[str]]  # by a group's name: those that have it as a member
    references: Mapping[str, RuleRef]
    rule_ids: Mapping[RuleRef, str] = field(default_factory=dict)


class PolicyState:
    """The policies in the database, and what they mean.

    Args:
        store: the database. Policies are changed by this object only.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._compiled: _Compiled | None = None
        self._defaults: dict[str, str] | None = None
        self._places = Places(store)

    # Changes

    def apply(
        self, source: str, groups: Iterable[Group], defaults: Sequence[NetworkDefault], *, prune: bool = False
    ) -> Changes:
        """Creates or replaces groups, and says what networks do by default.

        Args:
            source: what messages call what is applied.
            prune: remove the groups and networks' defaults that are not given.

        Raises:
            InvalidError: nothing was changed.
        """
        where = Source(source)
        given = checked_groups(where, groups)
        networks = {network.name: network for network in self._store.networks() if network.switched and network.active}
        check_defaults(where, defaults, networks)
        present = self.groups
        wanted = given if prune else {**present, **given}
        check_together(where, wanted)
        removed = tuple(sorted(present.keys() - wanted.keys()))
        different = {name: group for name, group in given.items() if present.get(name) != group}
        now_us = round(datetime.datetime.now(datetime.UTC).timestamp() * 1_000_000)
        try:
            with self._store.change():
                for name in removed:
                    self._store.delete_policy_group(name)
                for group in different.values():
                    self._store.put_policy_group(group, now_us)
                if prune:
                    for network_id in self._store.policy_networks():
                        self._store.delete_policy_network(network_id)
                for one in defaults:
                    self._store.put_policy_network(networks[one.network].id, one.default)
        finally:
            self._forget()
        return Changes(
            created=tuple(sorted(different.keys() - present.keys())),
            updated=tuple(sorted(different.keys() & present.keys())),
            unchanged=tuple(sorted(given.keys() - different.keys())),
            removed=removed,
        )

    def remove(self, names: Iterable[str]) -> None:
        """Removes groups.

        Raises:
            NotFoundError, PreconditionError: nothing was changed.
        """
        present = self.groups
        going = set(names)
        for name in sorted(going):
            if name not in present:
                raise PolicyGroupNotFoundError(name)
        for group in present.values():
            if group.name in going:
                continue
            used = {member.group for member in group.members if member.group in going}
            used |= {
                peer.selector.group
                for _, rule in group.all_rules()
                for peer in rule.peers
                if peer.selector is not None and peer.selector.group in going
            }
            if used:
                raise PreconditionError(
                    f"group {group.name} names group {', '.join(sorted(used))}: change {group.name} first, or remove "
                    "it too"
                )
        try:
            with self._store.change():
                for name in going:
                    self._store.delete_policy_group(name)
        finally:
            self._forget()

    def _forget(self) -> None:
        self._compiled = self._defaults = None

    # What there is

    @property
    def groups(self) -> Mapping[str, Group]:
        """The groups by name."""
        return self._now().groups

    def times(self, name: str) -> tuple[datetime.datetime, datetime.datetime]:
        """When a group was applied first and when it was last changed."""
        for group, created, updated in self._store.policy_groups():
            if group.name == name:
                return (_moment(created), _moment(updated))
        raise PolicyGroupNotFoundError(name)

    def default_of(self, network: NetworkRecord) -> str:
        """What a network does by default."""
        if self._defaults is None:
            self._defaults = self._store.policy_networks()
        return self._defaults.get(network.id) or network.options.get(OPTION_POLICY, "") or ALLOW

    def members(self) -> dict[str, list[EndpointRecord]]:
        """The members of each group, also of those that only containers' labels name, in order of the guests' names."""
        found: dict[str, list[EndpointRecord]] = {name: [] for name in self.groups}
        names = self._now().names
        guests = {guest.id: guest for guest in self._store.guests()}
        for endpoint in self._store.endpoints():
            network = self._store.network(endpoint.network_id)
            guest = guests.get(endpoint.guest_id)
            if network is None or guest is None:
                continue
            place = self._places.of(endpoint, guest, network)
            for group_id in self._group_ids(place):
                if group_id in names:
                    found[names[group_id]].append(endpoint)
            for name in _named(place.labels):
                if name not in self.groups:
                    found.setdefault(name, []).append(endpoint)
        return found

    # What the helper is told

    @property
    def message(self) -> helper.Policy:
        """The rules."""
        return self._now().message

    def endpoint_policy(
        self, endpoint: EndpointRecord, guest: GuestRecord, network: NetworkRecord
    ) -> helper.EndpointPolicy | None:
        """What policies mean to an endpoint; None: everything passes."""
        default = self.default_of(network)
        deny_in, deny_out = default in (DENY, DENY_IN), default in (DENY, DENY_OUT)
        compiled = self._now()
        group_ids: list[str] = []
        if compiled.groups:
            group_ids = self._group_ids(self._places.of(endpoint, guest, network))
            for group_id in group_ids:
                group_in, group_out = compiled.denies.get(group_id, (False, False))
                deny_in, deny_out = deny_in or group_in, deny_out or group_out
        if not group_ids and not deny_in and not deny_out:
            return None
        return helper.EndpointPolicy(group_ids=group_ids, deny_in=deny_in, deny_out=deny_out)

    def reference(self, name: str) -> RuleRef | None:
        """The rule that the helper calls so in its log."""
        return self._now().references.get(name)

    def rule_id(self, reference: RuleRef) -> str:
        """What the helper calls a rule."""
        return self._now().rule_ids[reference]

    def rule_of(self, rule_id: str) -> RuleRef | None:
        """The rule that the helper calls so."""
        return next((reference for reference, known in self._now().rule_ids.items() if known == rule_id), None)

    def restricting(
        self, endpoint: EndpointRecord, guest: GuestRecord, network: NetworkRecord, direction: str
    ) -> list[str]:
        """The groups of an endpoint that have a list for a direction, in order of their names."""
        groups, names = self.groups, self._now().names
        found = self._group_ids(self._places.of(endpoint, guest, network)) if groups else []
        return sorted(names[one] for one in found if one in names and groups[names[one]].rules(direction) is not None)

    def _group_ids(self, place: Place) -> list[str]:
        compiled = self._now()
        direct = {
            group_id
            for guest in (place.guest, "")
            for selector, group_id in compiled.selectors.get(guest, ())
            if fits(selector, place)
        }
        direct |= {_group_id(name) for name in _named(place.labels) if name in compiled.groups}
        return sorted(direct | self._including(direct))

    def _including(self, group_ids: set[str]) -> set[str]:
        """The groups that have one of these as a member, and so on."""
        names, holders = self._now().names, self._now().holders
        found: set[str] = set()
        todo = [names[group_id] for group_id in group_ids if group_id in names]
        while todo:
            for holder in holders.get(todo.pop(), ()):
                if _group_id(holder) not in found:
                    found.add(_group_id(holder))
                    todo.append(holder)
        return found

    def _now(self) -> _Compiled:
        if self._compiled is None:
            self._compiled = _compile({group.name: group for group, _, _ in self._store.policy_groups()})
        return self._compiled


def _named(labels: Mapping[str, str]) -> list[str]:
    """The groups that a container's label names."""
    return [name.strip() for name in labels.get(LABEL_GROUPS, "").split(",") if name.strip()]


def _compile(groups: Mapping[str, Group]) -> _Compiled:
    messages: dict[str, helper.PolicyGroup] = {}
    selectors: dict[str, list[tuple[Selector, str]]] = {}
    holders: dict[str, list[str]] = {}
    names: dict[str, str] = {}
    denies: dict[str, tuple[bool, bool]] = {}
    references: dict[str, RuleRef] = {}
    rule_ids: dict[RuleRef, str] = {}
    for group in groups.values():
        group_id = _group_id(group.name)
        names[group_id] = group.name
        for member in group.members:
            if member.group:
                holders.setdefault(member.group, []).append(group.name)
            else:
                selectors.setdefault(member.guest, []).append((member, group_id))
        denies[group_id] = (group.incoming is not None, group.outgoing is not None)
        messages[group_id] = helper.PolicyGroup(group_id=group_id)
    for group in groups.values():
        for direction, rule in group.all_rules():
            reference = RuleRef(group.name, direction, rule.name)
            rule_id = rule_ids[reference] = _digest("r", group.name, direction, rule.name)
            log_name = f"{group.name}/{direction}/{rule.name}"
            if len(log_name) > 63:
                log_name = rule_id
            references[log_name] = reference
            message = _rule_message(rule_id, log_name, direction, rule)
            for peer in rule.peers:
                if peer.cidr:
                    message.peers.append(helper.PolicyPeer(cidr=peer.cidr))
                elif peer.host:
                    message.peers.append(helper.PolicyPeer(host=True))
                elif peer.selector is not None and peer.selector.group:
                    message.peers.append(helper.PolicyPeer(group_id=_group_id(peer.selector.group)))
                elif peer.selector is not None:
                    # Whoever fits is a group of its own.
                    peer_id = _digest("s", json.dumps(sorted(peer.selector.given().items())))
                    if peer_id not in messages:
                        messages[peer_id] = helper.PolicyGroup(group_id=peer_id)
                        selectors.setdefault(peer.selector.guest, []).append((peer.selector, peer_id))
                    message.peers.append(helper.PolicyPeer(group_id=peer_id))
            messages[_group_id(group.name)].rules.append(message)
    policy = helper.Policy(groups=[messages[group_id] for group_id in sorted(messages)])
    return _Compiled(groups, policy, selectors, names, denies, holders, references, rule_ids)


def _rule_message(rule_id: str, log_name: str, direction: str, rule: Rule) -> helper.PolicyRule:
    return helper.PolicyRule(
        rule_id=rule_id,
        name=log_name,
        direction=_DIRECTIONS[direction],
        action=_ACTIONS[rule.action],
        priority=rule.priority,
        protocol=_PROTOCOLS[rule.protocol],
        ports=[helper.PortRange(first=ports.first, last=ports.last) for ports in rule.ports],
        log=rule.log,
    )


@functools.lru_cache(maxsize=8192)
def _group_id(name: str) -> str:
    return _digest("g", name)


def _digest(kind: str, *parts: str) -> str:
    """A short id that follows from what it is for, so that what stays the same keeps its rows at the helper."""
    return kind + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _moment(us: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(us / 1_000_000, tz=datetime.UTC)
