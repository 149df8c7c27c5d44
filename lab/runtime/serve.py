"""The runtime's process, once it has its namespaces."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import signal
from pathlib import Path

import trio

from lab.runtime import children
from lab.runtime.agents import Zygote
from lab.runtime.children import MachinePids
from lab.runtime.containers import Containers
from lab.runtime.crun import Crun
from lab.runtime.engine import Engine
from lab.runtime.images import ImageStore
from lab.runtime.namespaces import NamespaceEngine
from lab.runtime.service import RuntimeService
from lab.state import Lab
from taploom.address import open_listener, parse_address
from taploom.log import setup_logging
from taploom.rpc import Server

logger = logging.getLogger("taploom.runtime")

_MAX_FILES = 1 << 20


def run(name: str, machine_proc: int) -> int:
    """Serves the lab's containers until the process is ended; nothing has to be put away by hand then."""
    setup_logging("lab.runtime", os.environ.get("TAPLOOM_LOG_LEVEL", "info"))
    # A container takes up to ten descriptors. Containers inherit the limit: as much as dockerd gives them.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = min(hard, _MAX_FILES) if hard != resource.RLIM_INFINITY else _MAX_FILES
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    trio.run(_serve, Lab(name), machine_proc)
    return 0


async def _serve(lab: Lab, machine_proc: int) -> None:
    images = ImageStore(lab.path / "images")
    service = RuntimeService(images)
    async with trio.open_nursery() as nursery:
        await nursery.start(_reap)
        service.containers = Containers(
            lab.containers,
            engine=await _engine(lab, images, machine_proc, nursery),
            nursery=nursery,
            on_exit=service.process_ended,
        )
        await images.remove_unused_layers({container.record.layer for container in service.containers.all()})
        listener = await open_listener(parse_address(lab.runtime_address))
        logger.info("serves containers on %s", lab.runtime_address)
        await Server([service]).serve(listener)


async def _engine(lab: Lab, images: ImageStore, machine_proc: int, nursery: trio.Nursery) -> Engine:
    if lab.on_vms():
        from lab.vm.containers import VmEngine

        return VmEngine(lab, root_of=images.root, nursery=nursery)
    zygote = Zygote()
    await nursery.start(zygote.run)
    return NamespaceEngine(
        crun=Crun(_empty(lab.path / "crun")),
        zygote=zygote,
        pids=MachinePids(machine_proc),
        agent_log=lab.logs / "containers.log",
        root_of=images.root,
        nursery=nursery,
    )


async def _reap(*, task_status: trio.TaskStatus[None]) -> None:
    with trio.open_signal_receiver(signal.SIGCHLD) as signals:
        task_status.started()
        async for _ in signals:
            children.reap()


def _empty(path: Path) -> Path:
    """crun's records of containers that the kernel has ended with the last runtime."""
    shutil.rmtree(path, ignore_errors=True)
    return path
