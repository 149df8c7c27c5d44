"""`make demo`: shows the fabric working on this machine, step by step, as a person would type it."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys

from lab.steps import Row, StepFailedError, Steps, console, print_rows, round_trip

LAB = "demo"


def show_docker(steps: Steps) -> list[Row]:
    """Containers through Docker's own command, on the same networks.

    Raises:
        StepFailedError: something did not work.
    """
    page = "import http.server; http.server.test(http.server.SimpleHTTPRequestHandler, port=80)"
    steps.docker("network", "create", "shop")
    python = os.path.realpath(sys.executable)
    _, started = steps.docker(
        *("run", "-d", "--name", "api", "--network", "shop", "--network-alias", "backend"),
        *("-p", "127.0.0.1::80", "host", python, "-c", page),
    )
    rows = [Row("docker run: a container with the machine's own files", "started", f"{started * 1000:.0f} ms")]
    answer, _ = steps.docker("run", "--rm", "--network", "shop", "host", "getent", "hosts", "backend")
    rows.append(Row("another one finds it by its alias", answer.split()[0]))
    published = steps.docker("port", "api", "80")[0].strip()
    rows.append(Row("its published port, from the machine", steps.http(published, timeout=5, patience=20)))
    _, connected = steps.docker("network", "connect", "app", "api")
    reply = steps.in_guest("web", "ping", "-n", "-c1", "-W5", "api")
    rows.append(Row("docker network connect: pinged from web", round_trip(reply), f"{connected * 1000:.0f} ms"))
    steps.docker("rm", "-f", "api")
    steps.docker("network", "rm", "shop")
    return rows


def show(steps: Steps) -> list[Row]:
    """Runs the demonstration.

    Raises:
        StepFailedError: something did not work.
    """
    rows: list[Row] = []
    _, took = steps.run("lab", "up", "--guest", "web", "--guest", "db")
    rows.append(Row("the whole fabric started: OVS, OVN, helper, bridge, two guests", "ready", f"{took:.2f} s"))
    _, took = steps.run("network", "create", "app", "--ipv6")
    rows.append(Row("network app created (IPv4 and IPv6)", "ready", f"{took * 1000:.0f} ms"))
    steps.run("network", "create", "back")
    _, took = steps.run("network", "connect", "app", "web")
    rows.append(Row("running guest web connected to app", "eth0", f"{took * 1000:.0f} ms"))
    steps.run("network", "connect", "app", "db", "--alias", "postgres")
    steps.run("network", "connect", "back", "db")

    steps.in_guest("web", "ip", "-brief", "address")
    rows += steps.names(
        [
            ("db found by its name", ("ping", "-n", "-c2", "-i0.2", "db")),
            ("... by its alias", ("ping", "-n", "-c2", "-i0.2", "postgres")),
            ("... by its name on the network", ("ping", "-n", "-c2", "-i0.2", "db.app")),
            ("... over IPv6", ("ping", "-6", "-n", "-c2", "-i0.2", "db")),
        ]
    )

    rows += steps.hot_plug(0.01)

    rate = steps.iperf3("db", "web") / 1e9
    rows.append(Row("TCP from web to db (iperf3, MTU 1500)", f"{rate:.2f} Gb/s", "3 s"))
    rows += show_docker(steps)
    steps.run("status")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Shows the whole fabric working on this machine.")
    parser.add_argument("--keep", action="store_true", help="leave the lab up at the end")
    keep = parser.parse_args().keep
    steps = Steps(LAB)
    failure = ""
    rows: list[Row] = []
    try:
        rows = show(steps)
    except StepFailedError as error:
        failure = str(error)
        steps.show_logs()
    except KeyboardInterrupt:
        failure = "interrupted"
    finally:
        if not keep:
            with contextlib.suppress(StepFailedError):
                steps.run("lab", "down")
    if failure:
        console.print(f"\n[red]demo: FAILED: {failure}[/red]")
        sys.exit(1)
    print_rows("taploom on this machine", rows)
    if keep:
        console.print("The lab is still up. Try: [bold]. .venv/bin/activate; export TAPLOOM_LAB=demo[/bold], then")
        console.print(
            "[bold]taploom lab exec web -- ping db[/bold]; [bold]taploom lab down[/bold] ends it. For docker:"
        )
        console.print(f"[bold]export DOCKER_HOST={steps.environment()['DOCKER_HOST']}[/bold]")
    console.print(
        "[green]demo: everything worked; " + ("the lab is up[/green]" if keep else "nothing is left behind[/green]")
    )


if __name__ == "__main__":
    main()
