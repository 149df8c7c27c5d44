"""A plain veth pair between two namespaces: what the kernel alone can do."""

from __future__ import annotations

from bench.paths import Link, Path
from bench.run import Run


def build(run: Run, mtus: list[int]) -> Path:
    """Makes two namespaces and a veth pair per MTU."""
    client, server = run.namespace(), run.namespace()
    links = []
    for number, mtu in enumerate(mtus):
        name, address = f"veth{number}", f"10.98.{number}.2"
        run.check(
            *client.command("ip", "link", "add", name, "mtu", str(mtu), "type", "veth"),
            *("peer", "name", name, "mtu", str(mtu), "netns", server.path),
        )
        for netns, own in ((client, f"10.98.{number}.1"), (server, address)):
            run.check(*netns.command("ip", "address", "add", f"{own}/24", "dev", name))
            run.check(*netns.command("ip", "link", "set", name, "up"))
        links.append(Link("veth", mtu, client, server, address))
    return Path("veth", links)
