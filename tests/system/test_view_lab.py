"""`taploom topology` and `taploom top` in a lab: what they show is what is there and what was carried."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fabric import TAPLOOM, Fabric, fabric, until

pytestmark = pytest.mark.system

SVG = "{http://www.w3.org/2000/svg}"
# Sends and receives for as long as it lives; prints what it has sent of UDP payload when it is told to.
SENDER = """
import socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
while True:
    s.sendto(bytes(1000), (sys.argv[1], 9))
    time.sleep(0.005)
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Fabric]:
    with fabric("web", "db", "mal") as lab:
        lab.run("network", "create", "app", "--ipv6", "--label", 'quote="><script>')
        lab.run("network", "create", "back", "--internal", "-o", "com.docker.network.bridge.enable_icc=false")
        lab.run("network", "connect", "app", "web")
        lab.run("network", "connect", "app", "db", "--alias", "postgres")
        lab.run("network", "connect", "back", "db")
        path = lab.path / "policy.yaml"
        path.write_text("networks: {back: deny}\ngroups: {data: {members: [{alias: postgres}]}}\n")
        lab.run("policy", "apply", "-f", str(path))
        yield lab


@pytest.fixture
def sender(lab: Fabric) -> Iterator[None]:
    process = lab.start_in_guest("web", sys.executable, "-c", SENDER, lab.address("db", "app"))
    yield
    process.kill()
    process.wait()


def rates(lab: Fabric) -> dict[tuple[str, str], dict[str, Any]]:
    found = lab.json("top", "--once", "--interval", "0.5")
    return {(one["guest"], one["network"]): one for one in found["endpoints"]}


def test_the_tree_and_the_files(lab: Fabric, tmp_path: Path) -> None:
    text = lab.run("topology", "--measure", "0")
    app, db = lab.json("network", "inspect", "app"), lab.endpoint("db", "app")
    for part in (
        f"app  {' '.join(app['subnets'])}\n",
        f"gateway  {' '.join(app['gateways'])}  to the outside",
        f"● db  eth0 {' '.join(db['addresses'])}  also postgres  in data",
        "internal  isolated  policy deny\n",
        "● mal",
    ):
        assert part in text, text
    page, drawing = tmp_path / "page.html", tmp_path / "drawing.svg"
    assert lab.run("topology", "--html", str(page), "--svg", str(drawing)) == ""
    root = ET.fromstring(drawing.read_text())
    texts = {element.text for element in root.iter(f"{SVG}text")}
    assert {"app", "back", "web", "db", "mal", "also postgres", "in data", "isolated", *db["addresses"]} <= texts
    assert any('label quote="><script>' in (title.text or "") for title in root.iter(f"{SVG}title"))
    assert page.read_text().count("<script") == 1
    assert "http://" not in page.read_text().replace(SVG.strip("{}"), "")
    assert lab.run("topology", "-o", "-").startswith("<!doctype html>")
    assert lab.run("topology", "--svg", "-").startswith("<?xml")
    found = lab.json("topology")
    assert [(n["name"], n["ways_out"], len(n["places"])) for n in found["networks"]] == [
        ("app", {"4": "nat", "6": "nat"}, 2),
        ("back", {}, 1),
        ("bridge", {"4": "nat"}, 0),
    ]
    assert "cannot write /nowhere/x: No such file" in lab.fails("topology", "-o", "/nowhere/x")
    assert "Only one thing can go to standard output" in lab.fails("topology", "--html", "-", "--json")


def test_rates_are_those_of_the_traffic(lab: Fabric, sender: None) -> None:
    until(lambda: rates(lab)["db", "app"]["rates"]["received_bits"], "traffic")
    found = rates(lab)
    web, db, idle = found["web", "app"], found["db", "app"], found["db", "back"]
    # Each frame is 1042 bytes: payload, UDP, IPv4 and Ethernet headers. (Others are few: ARP, neighbours.)
    for one, way in ((web, "sent"), (db, "received")):
        bits, frames = one["rates"][f"{way}_bits"], one["rates"][f"{way}_frames"]
        assert bits > 0
        assert bits / frames / 8 == pytest.approx(1042, rel=0.1)
    assert web["rates"]["received_bits"] < web["rates"]["sent_bits"] / 4
    assert idle["rates"]["received_bits"] < db["rates"]["received_bits"] / 4
    assert lab.json("top", "--once", "--sort", "sent", "--interval", "0.5")["endpoints"][0]["guest"] == "web"
    assert lab.json("top", "--once", "--sort", "received", "--interval", "0.5")["endpoints"][0]["guest"] == "db"
    places = {
        place["guest"]: place for network in lab.json("topology")["networks"] for place in network["places"][::-1]
    }
    assert places["web"]["rates"]["sent_bits"] > 0
    assert "frames/s" in lab.run("topology", "--svg", "-")


def test_live_in_a_terminal(lab: Fabric) -> None:
    """It redraws, sorts by keys, ends with q, and leaves the terminal as it was."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [TAPLOOM, "top", "--interval", "0.2"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**lab.environment, "COLUMNS": "160", "LINES": "20", "TERM": "xterm"},
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    shown = bytearray()

    def says(text: bytes) -> bool:
        with contextlib.suppress(BlockingIOError):
            shown.extend(os.read(ours, 65536))
        return text in shown

    try:
        until(lambda: says(b"sorted by rate"), "the first measurement")
        os.write(ours, b"d")
        until(lambda: says(b"sorted by drops"), "another order")
        os.write(ours, b"xq")
        until(lambda: says(b"\x1b[?1049l"), "the terminal given back")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_lines_for_scripts(lab: Fabric) -> None:
    process = subprocess.Popen(
        [TAPLOOM, "top", "--json", "--interval", "0.2"], stdout=subprocess.PIPE, text=True, env=lab.environment
    )
    try:
        assert process.stdout is not None
        for _ in range(2):
            assert {one["guest"] for one in json.loads(process.stdout.readline())["endpoints"]} == {"web", "db"}
    finally:
        process.kill()
        process.wait()
    assert "Invalid value for '--sort'" in lab.fails("top", "--sort", "speed")


def test_what_is_not_well_is_shown(lab: Fabric, tmp_path: Path) -> None:
    lab.run("guest", "register", "ghost", f"unix:{tmp_path}/nobody.sock")
    try:
        text = lab.run("topology", "--measure", "0")
        assert "not converged" in text
        assert "○ ghost" in text
        assert "guest/ghost  down: " in text
        assert "guest/ghost: " in lab.run("topology", "--measure", "0", "--svg", "-")
    finally:
        lab.run("guest", "rm", "ghost")
