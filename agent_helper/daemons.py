"""The OVS and OVN daemons' command lines, and what Open vSwitch is told at first.

Imports next to nothing: the daemons are started before the agent has imported itself.
"""

from __future__ import annotations

import os
from pathlib import Path

CHASSIS = "taploom-helper"
BRIDGE = "br-int"
ACL_LOG = "acl-log.sock"  # where ovn-controller tells of rules that log (policy_log.py)
SCHEMAS = {
    "conf": ("openvswitch/vswitch.ovsschema", "openvswitch-switch"),
    "nb": ("ovn/ovn-nb.ovsschema", "ovn-central"),
    "sb": ("ovn/ovn-sb.ovsschema", "ovn-central"),
}
"""Of each database: the file below /usr/share, and the Debian package that has it."""
BRIDGE_COLUMNS = {"fail_mode": "secure", "other_config": {"disable-in-band": "true"}}

# These spend much of their time on memory, and with jemalloc, where it is installed, they take a third to a half of
# their time less: for each port and turn of its loop, vswitchd's userspace data path allocates 32 buffers of the port's
# MTU and frees them again; OVN makes its flows of small pieces. Threads keep as many, and as large ones, at hand
# (jemalloc(3), "opt."). The helper's image does without: in an emulated VM, loading it would cost a second at start.
_ALLOCATING = ("ovs-vswitchd", "ovn-northd", "ovn-controller")
_JEMALLOC = tuple(
    f"{folder}/libjemalloc.so.2" for folder in (f"/usr/lib/{os.uname().machine}-linux-gnu", "/usr/lib64", "/usr/lib")
)
_JEMALLOC_CONF = "tcache_max:131072,tcache_nslots_small_min:64,tcache_nslots_large:64"
# glibc gives the top of the heap back and takes it anew each time, which adds 0.4 ms to a round trip once a port has a
# large MTU; so it is told to keep it (mallopt(3), environment variables).
_GLIBC_MALLOC = {
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
    "MALLOC_TOP_PAD_": str(32 << 20),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
}


def schema_file(file: str, server: str | None) -> Path:
    """Where a schema is: beside the programs that speak it, in `share` of /usr, /usr/local or wherever they are.

    Args:
        server: ovsdb-server's path, if it was found.
    """
    beside = Path(server or "/usr/sbin/ovsdb-server").resolve().parent.parent / "share" / file
    return beside if beside.exists() else Path("/usr/share") / file


def search_path() -> str:
    """The folders that have the programs."""
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/local/sbin"


def database_socket(run_dir: Path) -> Path:
    """Where ovsdb-server listens."""
    return run_dir / "db.sock"


def standby_socket(run_dir: Path) -> Path:
    """Where the agent takes the daemons' connections while ovsdb-server restarts."""
    return run_dir / "standby.sock"


def mgmt_socket(run_dir: Path) -> Path:
    """Where the bridge takes OpenFlow connections: there once vswitchd has the bridge."""
    return run_dir / f"{BRIDGE}.mgmt"


def remotes(run_dir: Path) -> str:
    """Where the daemons find the databases."""
    return f"unix:{database_socket(run_dir)},unix:{standby_socket(run_dir)}"


def environment(run_dir: Path, name: str = "") -> dict[str, str]:
    """The whole environment of a daemon; ovsdb-server, ovs-vswitchd and ovn-controller find one another by it."""
    folders = {f"{who}_{what}DIR": str(run_dir) for who in ("OVS", "OVN") for what in ("RUN", "LOG", "DB", "SYSCONF")}
    return {**os.environ, "LC_ALL": "C.UTF-8", **folders, **_memory(name)}


def _memory(name: str) -> dict[str, str]:
    if name not in _ALLOCATING:
        return {}
    for library in _JEMALLOC:
        if Path(library).exists():
            others = os.environ.get("LD_PRELOAD")
            return {"LD_PRELOAD": f"{others}:{library}" if others else library, "MALLOC_CONF": _JEMALLOC_CONF}
    return _GLIBC_MALLOC if name == "ovs-vswitchd" else {}


def niceness(name: str, kernel_datapath: bool) -> int:
    """What is added to a daemon's niceness.

    Packets in the userspace data path wait for vswitchd's main thread, which visits all ports in turn; who is given a
    processor before it is, many packets pay for. (-10 is also what ovs-ctl(8) gives it.)
    """
    return -10 if name == "ovs-vswitchd" and not kernel_datapath else 0


def command(name: str, program: str, run_dir: Path) -> list[str]:
    """A daemon's command line; `program` is its path."""
    own = {
        "ovsdb-server": [
            f"--remote=punix:{database_socket(run_dir)}",
            f"--unixctl={run_dir}/ovsdb-server.ctl",
            *(str(run_dir / f"{database}.db") for database in SCHEMAS),
        ],
        "ovs-vswitchd": [remotes(run_dir), f"--unixctl={run_dir}/ovs-vswitchd.ctl"],
        "ovn-northd": [
            f"--unixctl={run_dir}/ovn-northd.ctl",
            f"--ovnnb-db={remotes(run_dir)}",
            f"--ovnsb-db={remotes(run_dir)}",
        ],
        # It names its control socket itself, after its process id.
        "ovn-controller": [remotes(run_dir), f"--syslog-method=unix:{run_dir / ACL_LOG}"],
    }[name]
    quiet = ["-vconsole:warn", "-vsyslog:off", "-vfile:off"]
    loud = ["-vacl_log:syslog:info"] if name == "ovn-controller" else []
    return [program, *own, *quiet, *loud, "--no-chdir"]


def datapath_type(kernel_datapath: bool) -> str:
    """Of the bridge: the kernel's data path, or OVS's own."""
    return "system" if kernel_datapath else "netdev"


def external_ids(run_dir: Path, kernel_datapath: bool) -> dict[str, str]:
    """What ovn-controller is told (ovn-controller(8))."""
    return {
        "system-id": CHASSIS,
        "hostname": CHASSIS,
        "ovn-remote": remotes(run_dir),
        "ovn-encap-type": "geneve",
        "ovn-encap-ip": "127.0.0.1",  # mandatory, though there is no other chassis
        "ovn-monitor-all": "true",
        "ovn-bridge-datapath-type": datapath_type(kernel_datapath),
    }


def other_config(kernel_datapath: bool) -> dict[str, str]:
    """What vswitchd is told (ovs-vswitchd.conf.db(5))."""
    return {} if kernel_datapath else {"userspace-tso-enable": "true"}
