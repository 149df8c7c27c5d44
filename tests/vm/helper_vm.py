"""The helper's image in a virtual machine, driven as the helper agent of the system tests is: over its contracts."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import trio
from system import test_helper_rig as rig

from lab.vm.machine import Machine, RunningMachine, running
from taploom.address import Address, connect, parse_address
from taploom.contracts.taploom.helper.v1 import GetHealthRequest
from taploom.link import open_dataplane
from taploom.rpc import RpcError

CONTROL, DATA = 6000, 6001
BOOT = 900.0  # s that a boot may take on a machine that has much else to do


@dataclass
class HelperVm(rig.Rig):
    """A helper agent in a VM, and guests in namespaces of this machine."""

    vm: RunningMachine = field(kw_only=True)

    @property
    def data(self) -> Address:  # type: ignore[override]  # a VM's is no Unix socket
        return parse_address(self.vm.machine.address(DATA))

    async def start(self) -> None:
        """Connects, once the agent answers, and waits until it is ready."""
        control = parse_address(self.vm.machine.address(CONTROL))
        with trio.fail_after(BOOT):
            while True:
                with contextlib.suppress(OSError, RpcError):
                    stream = await connect(control)
                    break
                await trio.sleep(0.05)
            await self.nursery.start(self._hold_channel, stream)
            while not (await self.client.get_health(GetHealthRequest())).ready:
                await trio.sleep(0.05)

    async def stop(self, *_: object) -> None:
        """Lets go of the connection."""
        self._channel_scope.cancel()

    def log(self) -> str:
        return self.vm.console.read_text(errors="replace")


@contextlib.asynccontextmanager
async def helper_vm(machine: Machine, netns: str | None = None) -> AsyncIterator[HelperVm]:
    """A helper VM that is ready; it has ended when this does.

    Args:
        netns: the network namespace that its TAP is in.
    """
    async with running(machine, netns=netns) as vm, open_dataplane() as dataplane, trio.open_nursery() as nursery:
        helper = HelperVm("", Path(), dataplane, nursery, vm=vm)
        try:
            await helper.start()
            yield helper
        finally:
            with trio.CancelScope(shield=True):
                for guest in list(helper.guests):
                    await helper.drop(guest)
                await helper.stop()
