"""The DNS server of one network: dnsmasq in a namespace of its own, on a veth pair whose other end is plugged into the
integration bridge as the network's localport.

The namespace and the veth pair are held by this process: a dnsmasq that died comes back without touching either.
Names are files in a folder that dnsmasq watches by inotify (--hostsdir).
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import secrets
import shutil
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import trio

from agent_helper import names
from agent_helper.links import Namespace, delete_link, plug_veth
from agent_helper.spec import Address, NetworkSpec
from taploom.supervise import SupervisedProcess

logger = logging.getLogger("taploom.helper.dns")

_INNER = "dns0"
_TTL = "600"  # what Docker's own DNS server gives
_RETRY = 0.002  # s between probes of a server that is not there yet; also until one lost is sent again
_ANSWER = 0.25


class Named(Protocol):
    """What has names: an endpoint, or a `NameSpec`."""

    @property
    def endpoint_id(self) -> str:
        """What it is told apart by."""

    @property
    def addresses(self) -> tuple[Address, ...]:
        """What its names stand for."""

    @property
    def names(self) -> tuple[str, ...]:
        """Its names; the first is what its addresses are called."""


@dataclass(frozen=True)
class NameSpec:
    """Names of what is no endpoint."""

    endpoint_id: str
    addresses: tuple[Address, ...]
    names: tuple[str, ...]


class DnsServer:
    """dnsmasq for one network.

    Args:
        spec: the network.
        folder: a folder of its own for the names.
        outer: the name of the veth end to plug into the bridge.
        program: dnsmasq.
        log: where its messages go.
        on_daemon: called when its state changed.
    """

    def __init__(
        self,
        spec: NetworkSpec,
        *,
        folder: Path,
        outer: str,
        program: str,
        log: Path,
        env: dict[str, str],
        on_daemon: Callable[[SupervisedProcess], None],
    ) -> None:
        self.spec = spec
        self.outer = outer
        self._folder = folder
        self._names = folder / "names"
        self._servers = folder / "servers"
        self._namespace: Namespace | None = None
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._probe_lock = trio.Lock()
        self._probe_id = secrets.randbelow(65536)
        # Names that dnsmasq has seen stay known to it for good, empty or not: they are used again, lowest first.
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._next_slot = 0
        self._written: dict[str, str] = {}
        self._known: dict[str, tuple[str, ...]] = {}
        self._served = ""
        self._to_reload = False
        argv = [
            program,
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--pid-file=",
            "--log-facility=/dev/null",  # it tells of each name file that it reads; fatal errors go to stderr
            "--user=root",
            "--group=root",
            "--no-resolv",
            "--no-hosts",
            "--no-poll",
            f"--hostsdir={self._names}",
            f"--servers-file={self._servers}",
            f"--local-ttl={_TTL}",
            "--bind-interfaces",
            *(f"--listen-address={address}" for address in spec.dns_servers),
        ]
        self._start = partial(
            SupervisedProcess,
            "dnsmasq",
            argv,
            env=env,
            log=log,
            backoff_max=1.0,
            ready=self._answering,
            on_change=self._changed,
        )
        self._on_daemon = on_daemon
        self.process: SupervisedProcess | None = None

    async def open(self) -> None:
        """Makes the namespace and the veth pair. Names may be set before.

        Raises:
            OSError: the kernel refused; nothing is left.
        """
        spec = self.spec
        self._make_folder()

        def make() -> Namespace:
            namespace = Namespace()
            try:
                addresses, routes = list(spec.dns_servers), list(spec.subnets)
                namespace.index = plug_veth(namespace, self.outer, _INNER, spec.dns_mac, spec.mtu, addresses, routes)
            except BaseException:
                namespace.close()
                raise
            return namespace

        self._namespace = await trio.to_thread.run_sync(make)
        self.process = self._start(netns=f"/proc/self/fd/{self._namespace.fd}")

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keeps dnsmasq running until `close`; reports started at once. `open` comes first."""
        assert self.process is not None
        try:
            with self._scope:
                task_status.started()
                await self.process.run()
        finally:
            self._ended.set()

    async def close(self) -> None:
        """Ends dnsmasq and removes namespace, veth pair and files. The veth must be unplugged before."""
        with trio.CancelScope(shield=True):
            self._scope.cancel()
            await self._ended.wait()
            await self._drop()

    async def _drop(self) -> None:
        namespace, self._namespace = self._namespace, None
        if namespace is not None:
            # A question may be waiting for its answer. Were the socket closed under it, the next descriptor of that
            # number would not be trio's to wait for.
            for probe in namespace.probes.values():
                trio.lowlevel.notify_closing(probe)

            def drop() -> None:
                namespace.close()
                # Deleted by name and not left to the end of the namespace, which the kernel defers.
                delete_link(self.outer)

            await trio.to_thread.run_sync(drop)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _make_folder(self) -> None:
        if not self._folder.exists():
            self._names.mkdir(parents=True)
            self._servers.touch()

    def set_names(self, endpoints: Iterable[Named]) -> None:
        """Makes these names be known, and those that the same endpoints had before unknown."""
        self._make_folder()
        for endpoint in endpoints:
            content = names.hosts_file(endpoint.addresses, endpoint.names, self.spec.name)
            if not content:
                self._forget(endpoint.endpoint_id)
            elif self._written.get(endpoint.endpoint_id) != content:
                slot = self._slots.get(endpoint.endpoint_id)
                if slot is None:
                    slot = heapq.heappop(self._free) if self._free else self._next_slot
                    self._next_slot = max(self._next_slot, slot + 1)
                    self._slots[endpoint.endpoint_id] = slot
                # dnsmasq ignores files that start with a dot.
                _write(self._names / f".{slot}", self._names / str(slot), content)
                self._written[endpoint.endpoint_id] = content
                self._known[endpoint.endpoint_id] = endpoint.names
        self._reload()

    def remove_names(self, endpoint_ids: Iterable[str]) -> None:
        """Makes the endpoints' names unknown."""
        for endpoint_id in endpoint_ids:
            self._forget(endpoint_id)
        self._reload()

    def _forget(self, endpoint_id: str) -> None:
        slot = self._slots.pop(endpoint_id, None)
        if slot is not None:
            del self._written[endpoint_id], self._known[endpoint_id]
            (self._names / str(slot)).unlink(missing_ok=True)
            heapq.heappush(self._free, slot)

    def _reload(self) -> None:
        content = names.servers_file({name for known in self._known.values() for name in known}, self.spec.name)
        if content == self._served:
            return
        self._served = content
        _write(self._folder / ".servers", self._servers, content)
        # Before it answers, it may not have its handler yet and would end.
        if self.process is not None and self.process.state == "running":
            self.process.kill(signal.SIGHUP)
        else:
            self._to_reload = True

    def _changed(self, process: SupervisedProcess) -> None:
        if process.state == "running" and self._to_reload:
            self._to_reload = False
            process.kill(signal.SIGHUP)
        self._on_daemon(process)

    async def knows(self, endpoint: Named, *, within: float) -> bool:
        """Waits until dnsmasq answers the endpoint's name with its addresses; False when it does not in `within` s."""
        if not endpoint.names or len(name := f"{endpoint.names[0]}.{self.spec.name}") > 253:
            return True
        with trio.move_on_after(within):
            # dnsmasq takes inotify's events before it takes questions, so the first answer nearly always has it.
            for version in (4, 6):
                wanted = {address for address in endpoint.addresses if address.version == version}
                while True:
                    answer = await self._ask(name, version)
                    if answer is not None and not names.rcode(answer) and wanted <= names.answers(answer, version):
                        break
                    await trio.sleep(_RETRY)
            return True
        return False

    async def _answering(self) -> None:
        while await self._ask("taploom", 4) is None:  # noqa: ASYNC110 -- another process: nothing to be told by
            await trio.sleep(_RETRY)

    async def _ask(self, name: str, version: int) -> bytes | None:
        """The answer to one question, or None when there was none."""
        async with self._probe_lock:
            namespace = self._namespace
            if namespace is None:
                return None
            server = min(self.spec.dns_servers, key=lambda address: address.version)
            sock = namespace.probes[server.version]
            self._probe_id = (self._probe_id + 1) % 65536
            # Connected, so that a port nobody listens on is an error at once and not silence.
            with contextlib.suppress(OSError, trio.ClosedResourceError), trio.move_on_after(_ANSWER):
                sock.connect((str(server), 53) if server.version == 4 else (str(server), 53, 0, namespace.index))
                sock.send(names.query(self._probe_id, name, version))
                while True:
                    await trio.lowlevel.wait_readable(sock)
                    data = sock.recv(4096)
                    if names.answer_id(data) == self._probe_id:
                        return data
            return None


def _write(temporary: Path, path: Path, content: str) -> None:
    """Renamed into place, so that nobody ever reads half of it."""
    temporary.write_text(content)
    temporary.rename(path)
