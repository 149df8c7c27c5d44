"""gvproxy's L2 switch (containers/gvisor-tap-vsock) between two guests that reach it over Unix sockets.

gvproxy runs as it does for several guests: `-listen`, and each guest takes over a `POST /connect`. The guests' side is
gvproxy_tap.c. One gvproxy per MTU, each in a namespace of its own, because it also listens for SSH on the loopback.
"""

from __future__ import annotations

from pathlib import Path as FilePath

from bench.paths import Link, Path, Process
from bench.run import CACHE, BenchError, Run, wait_for

PROGRAM = CACHE / "gvproxy/usr/bin/gvproxy"


def build(run: Run, mtus: list[int]) -> Path:
    """Starts a gvproxy per MTU and joins two namespaces to each.

    Raises:
        BenchError: gvproxy is not installed, or does not start.
    """
    if not PROGRAM.exists():
        raise BenchError(f"{PROGRAM} is missing: run bench/setup.sh")
    forwarder = run.compile("gvproxy_tap")
    client, server = run.namespace(), run.namespace()
    links, processes = [], []
    for number, mtu in enumerate(mtus):
        path = run.directory / f"gvproxy-{mtu}.sock"
        switch = run.spawn(
            *run.namespace().command(str(PROGRAM), "-mtu", str(mtu), "-listen", f"unix://{path}"),
            name=f"gvproxy-{mtu}",
        )
        wait_for(lambda path=path, switch=switch: _listens(run, path, switch), "gvproxy")  # type: ignore[misc]
        processes.append(Process(f"gvproxy (MTU {mtu})", switch.pid))
        name, address = f"tap{number}", f"10.97.{number}.2"
        for netns, own in ((client, f"10.97.{number}.1"), (server, address)):
            tap = run.spawn_ready(*netns.command(forwarder, name, str(path)), name="gvproxy_tap")
            processes.append(Process(f"a guest's TAP forwarder (MTU {mtu})", tap.pid))
            run.check(*netns.command("ip", "address", "add", f"{own}/24", "dev", name))
            run.check(*netns.command("ip", "link", "set", name, "mtu", str(mtu), "up"))
        links.append(Link("gvproxy", mtu, client, server, address))
    version = (CACHE / "gvproxy/version").read_text().strip()
    return Path("gvproxy", links, {"gvproxy (Debian)": version}, processes=lambda: processes)


def _listens(run: Run, path: FilePath, switch: object) -> bool:
    import subprocess

    assert isinstance(switch, subprocess.Popen)
    if switch.poll() is not None:
        raise BenchError(f"gvproxy ended: {run.log_of(switch)}")
    return path.is_socket()
