"""The OVS and OVN daemons: brought up from nothing, watched, and put right after any of them died.

The databases are the daemons' working memory and no more: they are created afresh at each start, and again when lost.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import signal
import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import trio

from agent_helper import daemons, links, vswitch
from agent_helper.daemons import BRIDGE, CHASSIS, SCHEMAS
from agent_helper.early import Early, bind_acl_log
from agent_helper.errors import SetupError, UnavailableError
from agent_helper.ovsdb import Database, Txn, Values
from agent_helper.packet_sockets import enlarge_packet_sockets
from agent_helper.policy_log import PolicyLog
from agent_helper.port_flows import PortFlows
from agent_helper.schemas import create_database, read_schema
from taploom.contracts.taploom.helper.v1 import PolicyLogged
from taploom.supervise import SupervisedProcess

logger = logging.getLogger("taploom.helper.stack")

_DATAPATH_INTERFACES = (BRIDGE, "ovs-netdev", "ovs-system")
_PROGRAMS = {
    "ovsdb-server": "openvswitch-switch",
    "ovs-vswitchd": "openvswitch-switch",
    "ovn-northd": "ovn-central",
    "ovn-controller": "ovn-host",
    "dnsmasq": "dnsmasq-base",
    "nft": "nftables",
}
# Without it nobody can be told what would become of a packet (HELPER_FEATURE_TRACE).
TRACE_PROGRAM = "ovn-trace"
_PROVEN_AGE = 1.2  # s
_PROBE_INTERVAL = 0.003  # between attempts to connect to a socket that is not there yet

_CONF_TABLES = {
    "Open_vSwitch": ["bridges", "external_ids", "other_config", "next_cfg", "cur_cfg", "ovs_version"],
    "Bridge": ["name", "datapath_type", "fail_mode", "other_config", "ports"],
    "Port": ["name", "interfaces", "external_ids"],
    "Interface": ["name", "type", "external_ids", "ofport", "error", "mtu_request"],
}
_CONF_MIRROR = {
    "Open_vSwitch": ["cur_cfg"],
    "Interface": ["ofport", "external_ids", "error"],
}
_NB_TABLES = {
    "NB_Global": ["nb_cfg", "hv_cfg", "options"],
    "Logical_Switch_Port": [
        *("name", "type", "options", "addresses", "port_security", "enabled", "dhcpv4_options", "dhcpv6_options"),
        *("parent_name", "tag", "up", "external_ids"),
    ],
    "Logical_Switch": ["name", "ports", "acls", "qos_rules", "load_balancer", "other_config", "external_ids"],
    "Logical_Router": ["name", "ports", "static_routes", "policies", "nat", "load_balancer", "options", "external_ids"],
    "Logical_Router_Port": ["name", "networks", "mac", "options", "ipv6_ra_configs", "external_ids"],
    "Logical_Router_Policy": ["priority", "match", "action", "external_ids"],
    "Logical_Router_Static_Route": ["ip_prefix", "nexthop", "output_port", "external_ids"],
    "NAT": ["external_ip", "logical_ip", "type", "exempted_ext_ips", "options", "external_ids"],
    "ACL": ["priority", "direction", "match", "action", "name", "log", "severity", "meter", "options", "external_ids"],
    "DHCP_Options": ["cidr", "options", "external_ids"],
    "Port_Group": ["name", "ports", "acls"],
    "QoS": ["priority", "direction", "match", "action", "bandwidth", "external_ids"],
    "Address_Set": ["name", "addresses"],
    "Meter": ["name", "unit", "bands", "fair"],
    "Meter_Band": ["action", "rate", "burst_size"],
    "Load_Balancer": [
        *(
            "name",
            "vips",
            "protocol",
            "health_check",
            "ip_port_mappings",
            "selection_fields",
            "options",
            "external_ids",
        ),
    ],
    "Load_Balancer_Health_Check": ["vip", "options"],
}
_NB_MIRROR = {"NB_Global": ["nb_cfg", "hv_cfg"]}
_SB_TABLES = {
    "Chassis": ["name"],
    "Service_Monitor": ["logical_port", "ip", "port", "protocol", "status"],
}


def find_programs() -> dict[str, str]:
    """The paths of the programs needed.

    Raises:
        SetupError: names those missing and the Debian packages that have them.
    """
    found = {name: shutil.which(name, path=daemons.search_path()) for name in (*_PROGRAMS, TRACE_PROGRAM)}
    missing = [name for name in _PROGRAMS if found[name] is None]
    missing += [file for file, _ in SCHEMAS.values() if not daemons.schema_file(file, found["ovsdb-server"]).exists()]
    if missing:
        packages = {_PROGRAMS.get(name) or dict(SCHEMAS.values())[name] for name in missing}
        raise SetupError(f"missing {', '.join(missing)}: apt-get install {' '.join(sorted(packages))}")
    return {name: where for name, where in found.items() if where is not None}


class Stack:
    """Supervises the four daemons and holds the connections to their databases.

    Args:
        state_dir: a folder of ours: sockets and databases go to `run`, logs to `log`.
        on_daemon: called when a daemon's state changed.
        on_content: called with a database's name each time its content was read anew: at start, and after a
            reconnection, when it may have been lost.
        early: what has been started already.
    """

    def __init__(
        self,
        state_dir: Path,
        programs: dict[str, str],
        *,
        on_daemon: Callable[[SupervisedProcess], None],
        on_content: Callable[[str], None],
        early: Early | None = None,
    ) -> None:
        self.state_dir = state_dir
        self.run_dir = state_dir / "run"
        self.log_dir = state_dir / "log"
        self.programs = programs
        self.kernel_datapath = early is not None and early.kernel_datapath
        self.ovs_version = self.ovn_version = ""  # known once they run
        server = programs["ovsdb-server"]
        self._schemas = {name: read_schema(daemons.schema_file(file, server)) for name, (file, _) in SCHEMAS.items()}
        self.ready = trio.Event()
        self.waiting_for = "the daemons to start"
        self.daemons: dict[str, SupervisedProcess] = {}
        # Called with each line that a policy's rule logs.
        self.on_logged: Callable[[PolicyLogged], None] | None = None
        # Called with a row of Service_Monitor when it changed; None: it is gone.
        self.on_monitor: Callable[[Values | None], None] | None = None
        self._on_daemon = on_daemon
        self._on_content = on_content
        self._conf: Database | None = None
        self._nb: Database | None = None
        self._sb: Database | None = None
        self._daemon_changed = trio.Event()
        self._enlarging = trio.Lock()
        self._enlargings_asked = self._enlargings_done = 0
        self._enlarged: tuple[int, set[str]] = (0, set())
        self._early = early
        self._flows = PortFlows(self.mgmt)
        self.env = daemons.environment(self.run_dir)

    @property
    def conf(self) -> Database:
        """Open vSwitch's database.

        Raises:
            UnavailableError: it is not there yet.
        """
        if self._conf is None:
            raise UnavailableError("Open vSwitch has not started yet; try again")
        return self._conf

    @property
    def nb(self) -> Database:
        """OVN's northbound database.

        Raises:
            UnavailableError: it is not there yet.
        """
        if self._nb is None:
            raise UnavailableError("OVN has not started yet; try again")
        return self._nb

    def monitors(self) -> list[Values]:
        """The health checks of load balancers' backends: rows of Service_Monitor (ovn-sb(5))."""
        return [] if self._sb is None else list(self._sb.mirrors["Service_Monitor"].rows.values())

    @property
    def socket(self) -> Path:
        return daemons.database_socket(self.run_dir)

    @property
    def mgmt(self) -> Path:
        """Where br-int takes OpenFlow connections: there once vswitchd has the bridge."""
        return daemons.mgmt_socket(self.run_dir)

    async def probe(self) -> None:
        """Finds out what the kernel has."""
        if self._early is None:
            self.kernel_datapath = await trio.to_thread.run_sync(links.has_kernel_datapath)

    async def run(
        self, clear: Callable[[], Awaitable[None]], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Runs the daemons until cancelled; reports started once ports can be plugged and are forwarded.

        Args:
            clear: removes what else a run before has left. It is run while the daemons start, and nobody is told that
                they are ready before it is through.
        """
        cleared = trio.Event()

        async def clear_away() -> None:
            await clear()
            cleared.set()

        if self._early is None:
            self._prepare_folders()
            await trio.to_thread.run_sync(self._remove_datapath)  # of a run that was killed
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(clear_away)
                await nursery.start(self._run_ovsdb_server)
                # They start while we read the databases; vswitchd does nothing before it has its configuration.
                nursery.start_soon(self._run_vswitchd)
                nursery.start_soon(self._run_northd)
                await self._connect()
                await self.ensure_conf()
                await self._connectable(self.mgmt)
                await trio.to_thread.run_sync(self._mark_datapath)
                if self.on_logged is not None:
                    acl_log = bind_acl_log(self.run_dir) if self._early is None else self._early.acl_log
                    await nursery.start(PolicyLog(acl_log, self.on_logged).run)
                nursery.start_soon(self._flows.run)
                nursery.start_soon(self._run_controller)
                nursery.start_soon(self._kick_controller)
                nursery.start_soon(self._prove_connections)
                self.waiting_for = "ovn-controller to register its chassis"
                assert self._sb is not None
                await self._sb.mirrors["Chassis"].wait(CHASSIS, lambda row: row is not None)
                self.waiting_for = "OVN to program the data path"
                await self.wait_programmed()
                await self._ask_versions()
                await nursery.start(self._stand_in)  # only now: the daemons have their connections
                self.waiting_for = "what a run before has left to be removed"
                await cleared.wait()
                self.waiting_for = ""
                self.ready.set()
                task_status.started()
        finally:
            with trio.CancelScope(shield=True):
                for database in (self._conf, self._nb, self._sb):
                    if database is not None:
                        await database.stop()
                await trio.to_thread.run_sync(self._remove_datapath)

    def _prepare_folders(self) -> None:
        # Whatever a run before left (sockets, databases, hosts files) is of no use.
        shutil.rmtree(self.run_dir, ignore_errors=True)
        self.run_dir.mkdir(parents=True, mode=0o700)
        self.log_dir.mkdir(exist_ok=True)
        longest = len(str(self.run_dir / "ovn-controller.4194304.ctl"))
        if longest > 100:
            raise SetupError(f"--state-dir {self.state_dir} is too long for Unix sockets: at most 75 characters")

    def _daemon(self, name: str, **options: object) -> SupervisedProcess:
        process = SupervisedProcess(
            name,
            daemons.command(name, self.programs[name], self.run_dir),
            env=daemons.environment(self.run_dir, name),
            adopt=0 if self._early is None else self._early.pids[name],
            nice=daemons.niceness(name, self.kernel_datapath),
            log=self.log_dir / f"{name}.log",
            backoff_max=1.0,
            on_change=self._on_daemon,
            **options,  # type: ignore[arg-type]  # ready and prepare, passed on
        )
        self.daemons[name] = process
        return process

    async def _run_ovsdb_server(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        process = self._daemon(
            "ovsdb-server",
            ready=partial(self._connectable, self.socket),
            prepare=self._prepare_databases,
        )
        await process.run(task_status=task_status)

    async def _stand_in(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Takes the daemons' connections while ovsdb-server restarts.

        A client that loses its connection tries its next remote at once, but pauses for a second when that is refused,
        and vswitchd's userspace data path forwards nothing meanwhile. Here it is not refused: it waits until
        ovsdb-server listens again, and its bytes are passed on from then on.
        """
        path = daemons.standby_socket(self.run_dir)
        with trio.socket.socket(trio.socket.AF_UNIX) as sock:
            await sock.bind(str(path))
            sock.listen()

            async def copy(source: trio.SocketStream, target: trio.SocketStream, scope: trio.CancelScope) -> None:
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    async for data in source:
                        await target.send_all(data)
                scope.cancel()

            async def pass_on(client: trio.SocketStream) -> None:
                async with client, await self._answering_server() as server, trio.open_nursery() as pair:
                    pair.start_soon(copy, client, server, pair.cancel_scope)
                    pair.start_soon(copy, server, client, pair.cancel_scope)

            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    client, _ = await sock.accept()
                    nursery.start_soon(pass_on, trio.SocketStream(client))

    async def _answering_server(self) -> trio.SocketStream:
        # A server that is just ending may still take a connection.
        while True:
            stream = await self._connected(self.socket)
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(b'{"method":"echo","params":[],"id":0}')
                if await stream.receive_some():
                    return stream
            await stream.aclose()

    def _prepare_databases(self) -> None:
        process = self.daemons["ovsdb-server"]
        refused = re.match(r"ended with exit code [1-9]", process.last_exit) is not None
        for name in SCHEMAS:
            file = self.run_dir / f"{name}.db"
            if refused:  # it could not read them
                file.unlink(missing_ok=True)
            if not file.exists() or not file.stat().st_size:
                file.unlink(missing_ok=True)
                (self.run_dir / f".{name}.db.~lock~").unlink(missing_ok=True)
                create_database(file, self._schemas[name])

    async def _connect(self) -> None:
        remote = f"unix:{self.socket}"
        schemas = self._schemas
        conf = Database(
            remote,
            schemas["conf"],
            tables=_CONF_TABLES,
            mirror=_CONF_MIRROR,
            on_dump=partial(self._on_content, "conf"),
        )
        nb = Database(
            remote, schemas["nb"], tables=_NB_TABLES, mirror=_NB_MIRROR, on_dump=partial(self._on_content, "nb")
        )
        sb = Database(
            remote,
            schemas["sb"],
            tables=_SB_TABLES,
            mirror=_SB_TABLES,
            on_dump=partial(self._on_content, "sb"),
            on_change=self._sb_changed,
        )
        async with trio.open_nursery() as nursery:
            for database in (conf, nb, sb):
                nursery.start_soon(database.start)
        self._conf, self._nb, self._sb = conf, nb, sb

    def _sb_changed(self, table: str, _key: str, values: Values | None) -> None:
        if table == "Service_Monitor" and self.on_monitor is not None:
            self.on_monitor(values)

    async def ensure_conf(self) -> None:
        """Makes Open vSwitch's own configuration be as it must: the integration bridge and OVN's settings."""

        def op(txn: Txn) -> None:
            root = txn.only("Open_vSwitch")
            if root is None:
                root = txn.insert("Open_vSwitch")
                ids, config, bridges = {}, {}, []
            else:
                ids, config, bridges = dict(root.external_ids), dict(root.other_config), list(root.bridges)
            ids |= daemons.external_ids(self.run_dir, self.kernel_datapath)
            config |= daemons.other_config(self.kernel_datapath)
            bridge = txn.find("Bridge", BRIDGE)
            if bridge is None:
                interface = txn.insert("Interface", name=BRIDGE, type="internal")
                port = txn.insert("Port", name=BRIDGE, interfaces=[interface])
                bridge = txn.insert(
                    "Bridge",
                    name=BRIDGE,
                    datapath_type=daemons.datapath_type(self.kernel_datapath),
                    ports=[port],
                    **daemons.BRIDGE_COLUMNS,
                )
                root.bridges = [*bridges, bridge]
            root.external_ids = ids
            root.other_config = config

        await self.conf.transact(op)

    async def _run_vswitchd(self) -> None:
        def prepare() -> None:
            self.mgmt.unlink(missing_ok=True)

        process = self._daemon(
            "ovs-vswitchd",
            ready=partial(self._connectable, self.mgmt),
            prepare=prepare,
        )
        await process.run()

    async def _run_northd(self) -> None:
        ctl = self.run_dir / "ovn-northd.ctl"
        process = self._daemon(
            "ovn-northd",
            ready=partial(self._connectable, ctl),
            prepare=partial(ctl.unlink, missing_ok=True),
        )
        await process.run()

    async def _run_controller(self) -> None:
        def prepare() -> None:
            for file in self.run_dir.glob("ovn-controller.*.ctl"):
                file.unlink(missing_ok=True)

        async def ready() -> None:
            await self._connectable(self.run_dir / f"ovn-controller.{process.pid}.ctl")

        process = self._daemon("ovn-controller", ready=ready, prepare=prepare)
        await process.run()

    async def _prove_connections(self) -> None:
        """Has vswitchd reconnect without a pause when ovsdb-server dies.

        It does so only from a connection that has brought it something at an age of a second or more (OVS's
        lib/reconnect.c), and in a fabric where nothing changes nothing is brought.
        """

        def op(txn: Txn) -> None:
            root = txn.only("Open_vSwitch")
            if root is not None:
                txn.increment(root, "next_cfg")

        while True:
            changed = self._daemon_changed
            with trio.move_on_after(_PROVEN_AGE):
                await changed.wait()
            if not changed.is_set():
                with contextlib.suppress(UnavailableError):
                    await self.conf.transact(op)
                await changed.wait()

    def _mark_datapath(self) -> None:
        for name in _DATAPATH_INTERFACES:
            links.mark(name)

    def _remove_datapath(self) -> None:
        """vswitchd leaves its data path behind on purpose, for its next run; ours starts from nothing."""
        left = links.marked()
        if "ovs-system" in left:  # the kernel's: its interfaces go with it
            with contextlib.suppress(OSError):
                links.delete_kernel_datapath()
            left = links.marked()
        for name in left:
            with contextlib.suppress(OSError):
                links.delete_link(name)

    async def _kick_controller(self) -> None:
        """Restarts ovn-controller once a restarted vswitchd accepts OpenFlow again: its own back-off takes seconds."""
        vswitchd = self.daemons["ovs-vswitchd"]
        await vswitchd.wait_ready()
        while True:
            seen = vswitchd.restarts
            await self._restarted(vswitchd, seen)
            await vswitchd.wait_ready()
            await self.enlarge_packet_sockets()  # br-int's ports are opened before it accepts OpenFlow
            # Not by SIGTERM: it would take the chassis and its ports out of the database on its way out.
            self.daemons["ovn-controller"].kill(signal.SIGKILL)

    async def enlarge_packet_sockets(self) -> None:
        """Lets the userspace data path take bursts on every port that it has. The kernel's needs nothing."""
        pid = self.daemons["ovs-vswitchd"].pid
        if self.kernel_datapath or not pid:
            return
        self._enlargings_asked += 1
        asked = self._enlargings_asked
        try:
            async with self._enlarging:
                if self._enlargings_done >= asked:  # by a run that began after this was asked for
                    return
                self._enlargings_done = self._enlargings_asked
                if self._enlarged[0] != pid:
                    self._enlarged = (pid, set())
                await trio.to_thread.run_sync(enlarge_packet_sockets, *self._enlarged)
        except OSError as exc:
            logger.warning("ports of the userspace data path keep small receive buffers: %s", exc)

    async def _restarted(self, process: SupervisedProcess, seen: int) -> None:
        while process.restarts == seen:
            await self._daemon_changed.wait()

    def daemon_changed(self) -> None:
        """To be called on each change of a daemon's state."""
        self._daemon_changed.set()
        self._daemon_changed = trio.Event()

    def is_installed(self, interface: str) -> bool:
        """Whether all flows of a plugged interface's logical port are programmed."""
        row = self.conf.mirrors["Interface"].rows.get(interface)
        return vswitch.is_installed(row) or (row is not None and any(self._flows.has(port) for port in row["ofport"]))

    async def until_installed(self, interface: str) -> None:
        """Returns once all flows of a plugged interface's logical port are programmed, whoever tells it first."""
        mirror = self.conf.mirrors["Interface"]
        async with trio.open_nursery() as nursery:

            async def until_flows() -> None:
                row = await mirror.wait(interface, vswitch.is_port)
                if row is not None:
                    await self._flows.wait(next(iter(row["ofport"])))
                    nursery.cancel_scope.cancel()

            nursery.start_soon(until_flows)
            await mirror.wait(interface, vswitch.is_installed)
            nursery.cancel_scope.cancel()

    async def wait_programmed(self) -> None:
        """Returns once the chassis has programmed all that the northbound database had when this was called."""
        mirror = self.nb.mirrors["NB_Global"]

        def op(txn: Txn) -> None:
            row = txn.only("NB_Global") or txn.insert("NB_Global")
            txn.increment(row, "nb_cfg")

        while True:
            _, wanted = await self.nb.transact_counted(op)

            def counted(row: Values | None, wanted: int = wanted) -> bool:
                return row is None or row["hv_cfg"] >= wanted or row["nb_cfg"] < wanted

            row = await mirror.wait(next(iter(mirror.rows), ""), counted)
            if row is not None and row["hv_cfg"] >= wanted:
                return
            # The database was lost meanwhile, and its count with it.

    async def wait_in_force(self) -> None:
        """As `wait_programmed`, and no packet is treated any more as one like it was before.

        When ovn-controller says that it has programmed everything, vswitchd has its OpenFlow flows, but the data path
        keeps what was made of those before until vswitchd comes to look through it.
        """
        await self.wait_programmed()
        with contextlib.suppress(OSError, trio.BrokenResourceError):  # one that just starts has kept nothing
            await self._control(self.run_dir / "ovs-vswitchd.ctl", "revalidator/purge")

    async def _ask_versions(self) -> None:
        controller = self.run_dir / f"ovn-controller.{self.daemons['ovn-controller'].pid}.ctl"
        found = []
        for socket in (self.run_dir / "ovs-vswitchd.ctl", controller):
            match = None
            with contextlib.suppress(OSError, trio.BrokenResourceError):  # one that just restarts
                match = re.search(r"\d+(\.\d+)+", await self._control(socket, "version"))
            found.append(match[0] if match else "")
        self.ovs_version, self.ovn_version = found

    async def list_meters(self) -> str:
        """The meters of the data path and what they are made from, in ovn-controller's words."""
        pid = self.daemons["ovn-controller"].pid
        return await self._control(self.run_dir / f"ovn-controller.{pid}.ctl", "meter-table-list")

    async def _control(self, socket: Path, command: str) -> str:
        """Has a daemon do a command of ovs-appctl(8) (ovs-vswitchd(8), "Runtime Management Commands"); returns what it
        says."""
        async with await trio.open_unix_socket(str(socket)) as stream:
            await stream.send_all(json.dumps({"id": 0, "method": command, "params": []}).encode())
            answer = b""
            async for data in stream:
                answer += data
                with contextlib.suppress(ValueError):  # there is more to come
                    message = json.loads(answer)
                    if message["error"] is not None:
                        logger.warning("%s: %s", command, message["error"])
                    return str(message["result"] or "")
            return ""

    @staticmethod
    async def _connected(path: Path) -> trio.SocketStream:
        while True:
            with contextlib.suppress(OSError):
                return await trio.open_unix_socket(str(path))
            await trio.sleep(_PROBE_INTERVAL)

    @classmethod
    async def _connectable(cls, path: Path) -> None:
        await (await cls._connected(path)).aclose()


def new_instance_id() -> str:
    return uuid.uuid4().hex
