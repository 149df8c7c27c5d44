"""Carries plans out: the blocking half of the interfaces, meant for one worker thread at a time."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from taploom.contracts.taploom.link.v1 import LinkCounters
from taploom.link import Tap, TapError
from taploom.netlink import NetlinkError

from . import plan, vlan
from .netlink import GONE, Netlink
from .spec import InterfaceSpec, SpecError
from .state import ALIAS_PREFIX, NAMES_TABLE, KernelState, LinkState

logger = logging.getLogger("taploom.guest.kernel")

TEMPORARY = "tlx"
"""How names begin that an interface has only until it gets its own."""


class NameTakenError(Exception):
    """The interface's name belongs to something that is not the agent's."""


class NoTrunkError(Exception):
    """What is to carry the interface is not here."""


class Kernel:
    """The namespace's interfaces, through one netlink socket and /proc/sys/net."""

    def __init__(self, sysctl_root: Path = Path("/proc/sys/net")) -> None:
        self._netlink = Netlink()
        self._sysctl = sysctl_root

    def close(self) -> None:
        self._netlink.close()

    def state(self) -> KernelState:
        return self._netlink.state()

    def counters(self, indexes: Iterable[int]) -> dict[int, LinkCounters]:
        """What these VLAN interfaces have carried, by index; nothing for those that are gone."""
        found = {index: self._netlink.counters(index) for index in indexes}
        return {index: counters for index, counters in found.items() if counters is not None}

    def loopback_up(self) -> None:
        """Brings `lo` up, and with it 127.0.0.0/8."""
        for link in self._netlink.links().values():
            if link.name == "lo" and not link.up:
                self._netlink.set_link(link.index, up=True)

    # -- interfaces coming and going ------------------------------------------------------------------------------

    def adoptable(self) -> list[LinkState]:
        """The TAPs, and VLAN interfaces over them, that an agent before this one left."""
        return [link for link in self._netlink.links().values() if link.endpoint_id and link.kind in ("tun", vlan.KIND)]

    def attach(self, link: LinkState) -> Tap:
        """Opens the TAP of a link that an agent before this one left. Raises TapError."""
        tap = Tap.open(link.name)
        # Its maker may have died between marking it and making it persistent.
        tap.set_persist(True)
        return tap

    def create(self, spec: InterfaceSpec, *, left: bool) -> tuple[Tap, int]:
        """Creates the interface as it is described; returns its TAP and its link's index.

        ``left``: an interface of the endpoint may have been left here, by whatever name.

        Raises SpecError, NameTakenError, TapError, NetlinkError, and has taken back what it did then.
        """
        tap, index = self._open(spec, left=left)
        try:
            self.converge_link(index, spec)
        except BaseException:
            with contextlib.suppress(OSError):
                tap.set_persist(False)
            tap.close()
            self.remove(index)
            raise
        return tap, index

    def _open(self, spec: InterfaceSpec, *, left: bool) -> tuple[Tap, int]:
        """Makes the interface's TAP, marked as the agent's, or attaches to the one left for the same endpoint."""
        for link in self._links_near(spec.name, left=left):
            if link.endpoint_id == spec.endpoint_id and link.kind == "tun":
                try:
                    return self.attach(link), link.index
                except TapError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    # Made by an agent that opened its TAPs with other flags: of no use to this one.
                    self._netlink.delete_link(link.index)
                    return self._open(spec, left=left)
        self._check_name(spec)
        tap = Tap.open(spec.name)
        try:
            index = socket.if_nametoindex(spec.name)
            self._netlink.set_link(index, alias=ALIAS_PREFIX + spec.endpoint_id)
            # Only now, so that a kill at any moment leaves either nothing or something to adopt.
            tap.set_persist(True)
        except BaseException:
            tap.close()
            raise
        return tap, index

    def _links_near(self, *names: str, left: bool) -> list[LinkState]:
        """The links with these names, or all when one that was ``left`` may have any."""
        if left:
            return list(self._netlink.links().values())
        return [link for name in names if (link := self._netlink.link_named(name)) is not None]

    def _check_name(self, spec: InterfaceSpec) -> None:
        link = self._netlink.link_named(spec.name)
        if link is not None:
            raise NameTakenError(
                f"interface name {spec.name} belongs to {_owner(link)} in this VM; choose another name"
            )

    def create_child(self, spec: InterfaceSpec, parent: int, *, left: bool) -> int:
        """Creates the VLAN interface as it is described, over the link ``parent``; returns its index.

        Raises as `create`, but for TapError, and NoTrunkError; has taken back what it did then.
        """
        index = self._open_child(spec, parent, left=left)
        try:
            self.converge_link(index, spec)
        except BaseException:
            self.remove(index)
            raise
        return index

    def _open_child(self, spec: InterfaceSpec, parent: int, *, left: bool) -> int:
        """Makes the VLAN interface, marked as the agent's, or finds the one left for the same endpoint."""
        assert spec.trunk is not None
        # A kill may come between making and marking it: until it is marked, its name says whose it is.
        temporary = f"{TEMPORARY}{parent}.{spec.trunk.tag}"
        carrier = self._netlink.link(parent)
        if carrier is None:
            raise NoTrunkError(f"the interface of endpoint {spec.trunk.parent_id} is gone from this VM")
        for link in self._links_near(spec.name, temporary, left=left):
            if link.kind != vlan.KIND:
                continue
            same = (link.over, link.tag) == (parent, spec.trunk.tag)
            if link.endpoint_id == spec.endpoint_id and same:
                return link.index
            if link.endpoint_id == spec.endpoint_id or link.name == temporary:
                self.remove(link.index)
            elif same:
                raise NameTakenError(
                    f"tag {link.tag} over {carrier.name} is {link.name}, which belongs to {_owner(link)} in this"
                    f" VM; remove that (ip link del {link.name}) or choose another tag"
                )
        self._check_name(spec)
        try:
            self._netlink.add_vlan(temporary, parent, spec.trunk.tag)
        except NetlinkError as error:
            if error.errno != errno.EEXIST or left:
                raise
            return self._open_child(spec, parent, left=True)  # which finds who has the tag
        index = socket.if_nametoindex(temporary)
        try:
            self._netlink.set_link(index, alias=ALIAS_PREFIX + spec.endpoint_id)
            self.rename(index, spec.name)
        except BaseException:
            self.remove(index)
            raise
        return index

    def exists(self, index: int) -> bool:
        """Whether there still is a link with this index."""
        try:
            socket.if_indextoname(index)
        except OSError:
            return False
        return True

    def remove(self, index: int) -> None:
        """Removes an interface that nobody has open as a TAP. It may be gone already."""
        try:
            if self.exists(index):
                self._netlink.delete_link(index)
        except NetlinkError as error:
            if error.errno not in GONE:
                raise

    def rename(self, index: int, name: str) -> None:
        """Renames a link, going down for it only on kernels that cannot do it live (before 6.2).

        Raises NameTakenError.
        """
        try:
            self._netlink.set_link(index, name=name)
        except NetlinkError as error:
            if error.errno == errno.EEXIST:
                raise NameTakenError(f"interface name {name} is taken in this VM; choose another name") from error
            if error.errno != errno.EBUSY:
                raise
            self._netlink.set_link(index, up=False)
            self._netlink.set_link(index, name=name)

    # -- convergence ----------------------------------------------------------------------------------------------

    def converge_link(self, index: int, spec: InterfaceSpec, *, repair: bool = False) -> list[plan.Step]:
        """Makes the link and its addresses be as described; returns the steps that were needed.

        ``repair``: addresses that others added are left alone.
        """
        link = self._netlink.link(index)
        if link is None:
            raise NetlinkError(errno.ENODEV, f"interface {spec.name} has been removed by another program")
        steps = plan.plan_link(spec, link, ALIAS_PREFIX + spec.endpoint_id)
        if link.name != spec.name:
            self.rename(index, spec.name)
        for step in steps:
            # Not up yet: the kernel makes addresses of its own then. But with its MTU, without which there is no IPv6
            # (below 1280 the kernel takes the interface's IPv6 away, settings and all).
            self._execute(replace(step, up=None))
        self._set_sysctls(spec)
        if steps:
            self._execute(plan.SetLink(index, up=True))
        addresses = plan.plan_addresses(spec, index, self._netlink.addresses(index), remove_others=not repair)
        for change in addresses:
            self._execute(change)
        return [*steps, *addresses]

    def converge_routes(
        self, specs: Mapping[int, InterfaceSpec], changed: Collection[int] | None = None
    ) -> list[plan.Step]:
        """Makes the routes over the given links be as described; returns the steps that were needed.

        ``changed``: the only links that came or are described otherwise since the routes were so; None: any.
        """
        over = specs.keys() if changed is None else (plan.default_links(specs) | set(changed)) & specs.keys()
        current = self._netlink.routes() if changed is None else [r for i in over for r in self._netlink.routes(i)]
        steps = plan.plan_routes(specs, current, over)
        versions = {r.destination.version for r in plan.wanted_routes(specs, over) if r.table == NAMES_TABLE}
        for version in versions:
            try:
                self._netlink.consult_names_table(version)
            except NetlinkError as error:
                if error.errno != errno.EEXIST:
                    raise
        for step in steps:
            self._execute(step)
        return steps

    def needs(self, specs: Mapping[int, InterfaceSpec], among: Collection[int]) -> dict[int, bool]:
        """Which links are gone (True) or differ from their description (False), by index; all right: not named.

        ``among``: the only links that this may be so of, but for default routes.
        """
        over = (plan.default_links(specs) | set(among)) & specs.keys()
        state = self._netlink.state(over)
        wrong: dict[int, bool] = {}
        for index in over:
            spec = specs[index]
            link = state.links.get(index)
            if link is None:
                wrong[index] = True
            elif plan.plan_link(spec, link, ALIAS_PREFIX + spec.endpoint_id) or plan.plan_addresses(
                spec, index, state.addresses, remove_others=False
            ):
                wrong[index] = False
        for step in plan.plan_routes(specs, state.routes, over):
            if isinstance(step, plan.ReplaceRoute | plan.RemoveRoute):
                wrong.setdefault(step.route.index, False)
        return wrong

    def _execute(self, step: plan.Step) -> None:
        netlink = self._netlink
        try:
            match step:
                case plan.SetLink():
                    netlink.set_link(step.index, mac=step.mac, mtu=step.mtu, alias=step.alias, up=step.up)
                case plan.AddAddress():
                    netlink.add_address(step.address)
                case plan.RemoveAddress():
                    netlink.delete_address(step.address)
                case plan.ReplaceRoute():
                    netlink.replace_route(step.route)
                case plan.RemoveRoute():
                    netlink.delete_route(step.route)
        except NetlinkError as error:
            if isinstance(step, plan.AddAddress) and error.errno == errno.EEXIST:
                return
            if isinstance(step, plan.RemoveAddress | plan.RemoveRoute) and error.errno in GONE:
                return
            raise NetlinkError(error.errno, f"{_purpose(step)}: {error.strerror}") from error

    def _set_sysctls(self, spec: InterfaceSpec) -> None:
        # Without it, removing an address removes the newer ones of its subnet too (Documentation/networking/ip-sysctl).
        self._write(f"ipv4/conf/{spec.name}/promote_secondaries", "1")
        ipv6 = self._sysctl / f"ipv6/conf/{spec.name}"
        if not ipv6.is_dir():
            if spec.wants_ipv6:
                raise SpecError("addresses: this VM's kernel has no IPv6; ask for IPv4 addresses only")
            return
        # The host decides every address; the agent sets the link-local one itself (plan.wanted_addresses).
        for key, value in (("accept_ra", "0"), ("autoconf", "0"), ("addr_gen_mode", "1"), ("keep_addr_on_down", "1")):
            self._write(f"ipv6/conf/{spec.name}/{key}", value)
        disabled = "0" if spec.wants_ipv6 else "1"
        if not self._write(f"ipv6/conf/{spec.name}/disable_ipv6", disabled) and spec.wants_ipv6:
            raise NetlinkError(errno.EROFS, f"cannot enable IPv6 on {spec.name}: /proc/sys is not writable")

    def _write(self, key: str, value: str) -> bool:
        # Unbuffered bytes: an interface has six of these, and texts take twice as long.
        path, wanted = self._sysctl / key, value.encode()
        try:
            with path.open("rb", buffering=0) as file:
                present = file.read(64)
            if present.strip() != wanted:
                with path.open("wb", buffering=0) as file:
                    file.write(wanted)
        except OSError as error:
            logger.warning("cannot set net/%s to %s: %s", key, value, error.strerror)
            return False
        return True


def _owner(link: LinkState) -> str:
    return f"endpoint {link.endpoint_id}" if link.endpoint_id else "something that is not taploom's"


def _purpose(step: plan.Step) -> str:
    match step:
        case plan.SetLink():
            return "cannot set up the interface"
        case plan.AddAddress():
            return f"cannot add address {step.address.address}"
        case plan.RemoveAddress():
            return f"cannot remove address {step.address.address}"
        case plan.ReplaceRoute():
            return f"cannot set the route to {step.route.destination}"
        case plan.RemoveRoute():
            return f"cannot remove the route to {step.route.destination}"
