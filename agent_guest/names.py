"""Names in the VM: the resolver's life, /etc/resolv.conf and /etc/hosts, from what the host and the interfaces say."""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Awaitable, Callable, Iterable

import trio

from .plan import name_order
from .resolver.config import MAX_UPSTREAMS, RESOLVER_ADDRESS, ResolverConfig
from .resolver.hostsfile import HostsFile
from .resolver.lookup import NetworkView, name_links
from .resolver.resolvconf import ResolvConf
from .resolver.server import Knowledge, Resolver, ResolverServer
from .spec import InterfaceSpec

logger = logging.getLogger("taploom.guest.names")

RESTART_DELAY_MAX = 5.0


class NamesError(Exception):
    """The resolver cannot be what it is asked to be; the message says what stands in the way."""


class Names:
    """The resolver, its resolv.conf and the hosts file."""

    def __init__(self, loopback_up: Callable[[], Awaitable[None]], resolv_conf: ResolvConf, hosts: HostsFile) -> None:
        self._loopback_up = loopback_up
        self._resolv_conf = resolv_conf
        self._hosts = hosts
        self._resolver = Resolver()
        self._server = ResolverServer(self._resolver)
        self._config = ResolverConfig()
        self._networks: tuple[NetworkView, ...] = ()
        self._lock = trio.Lock()
        self._nursery: trio.Nursery | None = None
        self._serving: trio.CancelScope | None = None
        self._stopped = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves whenever the configuration says so; on cancellation gives resolv.conf and hosts back."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                await self._take_over()
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._restore()
            self._restore_hosts()
            self._server.close()

    async def apply(self, config: ResolverConfig) -> None:
        """Makes the resolver be as described. Raises NamesError and stays as it was."""
        async with self._lock:
            before = self._config
            self._config = config
            self._publish()  # before the container is sent to the resolver
            try:
                if config.serves:
                    await self._serve()
                self._write_files(config)
            except NamesError:
                self._config = before
                self._publish()
                with contextlib.suppress(NamesError):
                    self._write_files(before)
                raise
            finally:
                if not self._config.serves:
                    await self._stop()

    def set_interfaces(self, specs: Iterable[InterfaceSpec]) -> None:
        """The networks to ask from now on, and the container's own addresses."""
        self._networks = tuple(
            NetworkView(
                name=spec.network_name,
                interface=spec.name,
                servers=tuple(map(str, spec.dns_servers)),
                addresses=tuple(address.ip for address in spec.addresses if not address.ip.is_link_local),
                links=name_links(spec.network_name, spec.name_links),
            )
            for spec in name_order(specs)
        )
        self._publish()

    async def _take_over(self) -> None:
        """Has the port at once where the agent before this one has served: queries wait for the configuration then."""
        if not self._resolv_conf.is_ours():
            return
        try:
            await self._bind()
        except NamesError as error:
            logger.warning("%s", error)

    def _publish(self) -> None:
        config = self._config
        self._resolver.learn(
            Knowledge(self._networks, config.upstreams[:MAX_UPSTREAMS], config.hostname, config.has_ndots)
        )

    async def _serve(self) -> None:
        if self._serving is None:
            if not self._server.is_bound:
                await self._bind()
            assert self._nursery is not None
            self._serving = trio.CancelScope()
            self._stopped = trio.Event()
            self._nursery.start_soon(self._supervise, self._serving, self._stopped)

    def _write_files(self, config: ResolverConfig) -> None:
        try:
            if config.hosts is None:
                self._restore_hosts()
            else:
                self._hosts.write(config.hosts)
            if config.enabled:
                self._resolv_conf.write(config)
            else:
                self._restore()
        except OSError as error:
            raise NamesError(f"cannot write {error.filename or 'the file'}: {error.strerror}") from error

    async def _bind(self) -> None:
        try:
            await self._loopback_up()
            self._server.bind()
        except OSError as error:
            what = f"cannot serve names on {RESOLVER_ADDRESS}:53"
            if error.errno == errno.EADDRINUSE:
                raise NamesError(f"{what}: another program has the port; stop it or turn it off there") from error
            raise NamesError(f"{what}: {error.strerror}") from error

    async def _stop(self) -> None:
        if self._serving is not None:
            self._serving.cancel()
            await self._stopped.wait()
            self._serving = None
        self._server.close()

    async def _supervise(self, scope: trio.CancelScope, stopped: trio.Event) -> None:
        """Serves, and serves again whatever ends it."""
        delay = 0.0
        try:
            with scope:
                while True:
                    started = trio.current_time()
                    try:
                        await self._server.serve()
                    except Exception:
                        logger.exception("the resolver ended; it starts again")
                    delay = (
                        0.0
                        if trio.current_time() - started > RESTART_DELAY_MAX
                        else min(2 * delay + 0.1, RESTART_DELAY_MAX)
                    )
                    await trio.sleep(delay)
                    try:
                        self._server.bind()
                    except OSError as error:
                        logger.error("the resolver cannot have its port again: %s", error)
        finally:
            stopped.set()

    def _restore(self) -> None:
        try:
            self._resolv_conf.restore()
        except OSError as error:
            logger.error("resolv.conf could not be given back: %s", error)

    def _restore_hosts(self) -> None:
        try:
            self._hosts.restore()
        except OSError as error:
            logger.error("hosts could not be given back: %s", error)
