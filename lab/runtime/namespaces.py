"""Containers on namespaces of this machine: crun, and the guest agent beside it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import trio

from lab.runtime import children, kernel, roots
from lab.runtime.agents import Agent, Zygote
from lab.runtime.bundle import ProcessSpec
from lab.runtime.containers import Container, Process
from lab.runtime.crun import Crun, Stdio
from lab.runtime.engine import Child, Guest, Layout
from lab.runtime.streams import pipe

# As dockerd sets them in each network namespace: ports below 1024 and ping need no capability.
_SYSCTLS = {"net/ipv4/ip_unprivileged_port_start": "0", "net/ipv4/ping_group_range": "0 2147483647"}


class _Booted:
    """What runs of a booted container, besides its processes."""

    def __init__(self) -> None:
        self.netns: int | None = None
        self.agent_scope: trio.CancelScope | None = None
        self.agent_gone = trio.Event()


class NamespaceEngine:
    """Runs containers in namespaces.

    Args:
        root_of: where the root file system of a layer is.
        nursery: where agents run.
    """

    host_network = True

    def __init__(
        self,
        *,
        crun: Crun,
        zygote: Zygote,
        pids: children.MachinePids,
        agent_log: Path,
        root_of: Callable[[str], Path],
        nursery: trio.Nursery,
    ) -> None:
        self._crun = crun
        self._zygote = zygote
        self._pids = pids
        self._agent_log = agent_log
        self._root_of = root_of
        self._nursery = nursery
        self._booted: dict[str, _Booted] = {}

    async def boot(self, container: Container, *, own_network: bool) -> Guest | None:
        """As `Engine.boot`."""
        booted = self._booted[container.id] = _Booted()
        agent = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, self._prepare, container, own_network)
            if own_network:
                # With the limit of its own that a thread which waits for the kernel's lock needs.
                booted.netns = await trio.to_thread.run_sync(kernel.new_network_namespace, _SYSCTLS)
                agent = Agent(self._zygote, container.directory, booted.netns, self._agent_log)
                booted.agent_scope = trio.CancelScope()
                await self._nursery.start(self._run_agent, agent, booted)
        return None if agent is None else Guest(agent.control, agent.data)

    async def _run_agent(self, agent: Agent, booted: _Booted, *, task_status: trio.TaskStatus[None]) -> None:
        assert booted.agent_scope is not None
        try:
            with booted.agent_scope:
                await agent.run(task_status=task_status)
        finally:
            booted.agent_gone.set()

    def _prepare(self, container: Container, own_network: bool) -> None:
        roots.mount(container, self._root_of(container.record.layer))
        for name in roots.write_files(container, own_network=own_network):
            path = container.directory / name
            # A mount point cannot be replaced by renaming: whoever writes it writes into the file that is bound.
            kernel.mount(str(path), path, "", kernel.MS_BIND)

    def layout(self, container: Container) -> Layout:
        """As `Engine.layout`."""
        directory = container.directory
        netns = self._booted[container.id].netns
        return Layout(
            root=directory / "root",
            files={f"/etc/{name}": directory / name for name in ("resolv.conf", "hostname", "hosts")},
            mounts=container.record.mounts,
            netns=None if netns is None else f"/proc/{os.getpid()}/fd/{netns}",
        )

    async def start(self, container: Container, process: Process, config: dict[str, Any], spec: ProcessSpec) -> Child:
        """As `Engine.start`."""
        run = self._crun.execute if process.id else self._crun.run
        with _pipes(spec) as (stdio, ours):
            child, master = await run(container.name, container.directory, config, stdio)
            if master is not None:
                process.streams.open_terminal(master, stdin=spec.stdin)
            elif ours is not None:
                process.streams.open_pipes(*ours)
        process.start(child)
        return child

    async def end(self, container: Container) -> None:
        """As `Engine.end`."""
        await self._crun.delete(container.name)

    async def halt(self, container: Container) -> None:
        """As `Engine.halt`."""
        booted = self._booted.pop(container.id, None)
        if booted is not None:
            if booted.agent_scope is not None:
                booted.agent_scope.cancel()
                await booted.agent_gone.wait()
            if booted.netns is not None:
                os.close(booted.netns)
        await trio.to_thread.run_sync(roots.unmount, container)

    def pid(self, child: Child) -> int:
        """As `Engine.pid`."""
        assert isinstance(child, children.Child)
        return self._pids.pid(child)


@contextlib.contextmanager
def _pipes(spec: ProcessSpec) -> Iterator[tuple[Stdio | None, tuple[int | None, int, int] | None]]:
    """A process's ends of its streams, which are closed at the end, and ours, which are only closed after a failure.

    Neither for a process with a terminal.
    """
    if spec.terminal:
        yield None, None
        return
    out, err = pipe(), pipe()
    into = pipe() if spec.stdin else (None, None)
    ours = (into[1], out[0], err[0])
    try:
        yield Stdio(into[0], out[1], err[1]), ours
    except BaseException:
        for fd in ours:
            if fd is not None:
                os.close(fd)
        raise
    finally:
        for fd in (into[0], out[1], err[1]):
            if fd is not None:
                os.close(fd)
