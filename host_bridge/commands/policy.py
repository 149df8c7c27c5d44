"""`taploom policy`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from host_bridge.client import CommandError, call, unary
from host_bridge.commands.documents import read_document
from host_bridge.commands.options import bridge_options, json_option
from host_bridge.output import plain, print_fields, print_json, print_table

if TYPE_CHECKING:
    from taploom.contracts.taploom.bridge.v1 import (
        PolicyGroup,
        PolicySelector,
        Rule,
        RuleCounters,
        RulePeer,
        WatchPolicyLogRequest,
        WatchPolicyLogResponse,
    )
    from taploom.rpc import Channel


@click.group()
def policy() -> None:
    """Which connections may pass: groups of guests, their rules, and what networks deny.

    \b
    Example:
        taploom policy apply -f policy.yaml
        taploom policy show db
        taploom policy log --follow
    """


@policy.command()
@click.option("-f", "--file", "path", metavar="FILE", required=True, help="The policy, in YAML; - is standard input.")
@click.option("--prune", is_flag=True, help="Remove groups and networks' defaults that FILE does not have.")
@json_option
@bridge_options
def apply(bridge: str, path: str, prune: bool, as_json: bool) -> None:
    """Create or replace the groups in FILE, and what networks do by default; when anything is wrong, change nothing.

    Returns once it is enforced. Connections that are still allowed go on; those that no longer are end.

    \b
    Example:
        taploom policy apply -f policy.yaml
        taploom policy apply -f - <<END
        networks:
          app: deny
        groups:
          db:
            members: [{alias: postgres}]
            in:
              - {name: from-web, from: {guest: web}, protocol: tcp, ports: 5432}
        END
    """
    from host_bridge.policy.document import read
    from host_bridge.policy.messages import default_message, to_message
    from taploom.contracts.taploom.bridge.v1 import ApplyPolicyRequest, ApplyPolicyResponse

    name, found = read_document(path, read)
    request = ApplyPolicyRequest(
        source=name,
        groups=[to_message(group) for group in found.groups],
        networks=[default_message(one) for one in found.networks],
        prune=prune,
    )
    done = unary(bridge, "PolicyService/ApplyPolicy", request, ApplyPolicyResponse)
    if as_json:
        print_json(done)
    else:
        for what in ("created", "updated", "unchanged", "removed"):
            for group in getattr(done, what):
                click.echo(f"group {group} {what}")
        for one in found.networks:
            click.echo(f"network {one.network}: {one.default}")
    _check_enforced(done.pending)


def _check_enforced(pending: str) -> None:
    if pending:
        raise CommandError(f"recorded, but not enforced yet: {pending}")


@policy.command("ls")
@json_option
@bridge_options
def list_(bridge: str, as_json: bool) -> None:
    """List the groups, their members, and the networks that deny.

    \b
    Example:
        taploom policy ls
    """
    from taploom.contracts.taploom.bridge.v1 import ListPolicyRequest, ListPolicyResponse

    found = unary(bridge, "PolicyService/ListPolicy", ListPolicyRequest(), ListPolicyResponse)
    if as_json:
        print_json(found)
        return
    print_table(
        ("GROUP", "IN", "OUT", "MEMBERS"),
        [
            (
                one.name + (" (not defined)" if one.missing else ""),
                _rules(one.incoming_rules),
                _rules(one.outgoing_rules),
                " ".join(one.members) or "-",
            )
            for one in found.groups
        ],
    )
    if found.networks:
        click.echo()
        print_table(
            ("NETWORK", "DEFAULT"), [(one.network, plain(one.default).replace("_", "-")) for one in found.networks]
        )
    if found.pending:
        click.echo(f"\nnot enforced yet: {found.pending}")


def _rules(count: int | None) -> str:
    if count is None:
        return "-"
    return "nothing" if not count else f"{count} rule{'s' if count > 1 else ''}"


@policy.command()
@click.argument("group")
@json_option
@bridge_options
def show(bridge: str, group: str, as_json: bool) -> None:
    """Show a group: who is in it, its rules, and what each has let through or refused since it was programmed.

    \b
    Example:
        taploom policy show db
    """
    from taploom.contracts.taploom.bridge.v1 import GetPolicyGroupRequest, GetPolicyGroupResponse

    found = unary(bridge, "PolicyService/GetPolicyGroup", GetPolicyGroupRequest(name=group), GetPolicyGroupResponse)
    if as_json:
        print_json(found)
        return
    assert found.group is not None
    print_fields(
        [
            ("Name", found.group.name),
            ("Changed", plain(found.updated_at)),
            ("Selects", "; ".join(_selector(member) for member in found.group.members) or "-"),
            *[("Member", f"{one.guest_name}@{one.network_name} {' '.join(one.addresses)}") for one in found.members],
        ]
    )
    _print_rules("in", "FROM", found.group, found.incoming, counted=found.counted)
    _print_rules("out", "TO", found.group, found.outgoing, counted=found.counted)


def _print_rules(direction: str, side: str, group: PolicyGroup, counters: list[RuleCounters], *, counted: bool) -> None:
    rules = group.incoming if direction == "in" else group.outgoing
    click.echo()
    if rules is None:
        click.echo(f"{direction}: not restricted by this group")
        return
    if not rules.rules:
        click.echo(f"{direction}: nothing")
        return
    rows = []
    for number, rule in enumerate(rules.rules):
        figures = (str(counters[number].packets), str(counters[number].bytes)) if counted else ("?", "?")
        action = plain(rule.action)
        rows.append(
            (
                rule.name,
                action + (", log" if rule.log else ""),
                ", ".join(_peer(peer) for peer in rule.peers) or "any",
                _service(rule),
                str(rule.priority),
                *figures,
            )
        )
    print_table((direction.upper(), "ACTION", side, "WHAT", "PRIORITY", "PACKETS", "BYTES"), rows)


def _service(rule: Rule) -> str:
    ports = ",".join(str(p.first) if p.first == p.last else f"{p.first}-{p.last}" for p in rule.ports)
    return f"{rule.protocol} {ports}".strip()


def _peer(peer: RulePeer) -> str:
    if peer.selector is not None:
        return _selector(peer.selector)
    return "host" if peer.host else str(peer.cidr)


def _selector(selector: PolicySelector) -> str:
    given = [(key, getattr(selector, key)) for key in ("guest", "alias", "label", "network", "group")]
    return " and ".join(f"{key} {value}" for key, value in given if value)


@policy.command()
@click.argument("groups", metavar="GROUP...", nargs=-1, required=True)
@bridge_options
def rm(bridge: str, groups: tuple[str, ...]) -> None:
    """Remove groups with their rules; all of them or, when one is not there or still named by another group, none.

    \b
    Example:
        taploom policy rm web db
    """
    from taploom.contracts.taploom.bridge.v1 import RemovePolicyGroupsRequest, RemovePolicyGroupsResponse

    request = RemovePolicyGroupsRequest(names=list(groups))
    done = unary(bridge, "PolicyService/RemovePolicyGroups", request, RemovePolicyGroupsResponse)
    for group in groups:
        click.echo(group)
    _check_enforced(done.pending)


@policy.command()
@click.option("--follow", is_flag=True, help="Go on with what comes, until interrupted.")
@json_option
@bridge_options
def log(bridge: str, follow: bool, as_json: bool) -> None:
    """Show what rules with `log: true` have matched since the bridge was started; with --json, one document a line.

    \b
    Example:
        taploom policy log --follow
    """
    from taploom.contracts.taploom.bridge.v1 import WatchPolicyLogRequest

    request = WatchPolicyLogRequest(follow=follow)

    async def run(channel: Channel) -> None:
        await _follow(channel, request, as_json)

    call(bridge, run)


async def _follow(channel: Channel, request: WatchPolicyLogRequest, as_json: bool) -> None:
    from taploom.contracts.taploom.bridge.v1.rpc import PolicyServiceClient

    async with PolicyServiceClient(channel).watch_policy_log(request) as stream:
        async for line in stream:
            print_json(line, line=True) if as_json else click.echo(_log_line(line))
            sys.stdout.flush()


def _log_line(line: WatchPolicyLogResponse) -> str:
    from host_bridge.policy.messages import shown_line

    assert line.time is not None
    return f"{line.time.astimezone():%H:%M:%S.%f}"[:-3] + f" {shown_line(line)}"
