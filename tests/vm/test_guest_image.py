"""The guest image: what is in it, that it is reproducible, and that it boots to the agent answering over vsock."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from images.common import oci
from images.common.cache import file_sha256
from lab.vm.machine import Machine, running
from taploom.contracts.taploom.guest.v1 import GetInfoRequest
from taploom.contracts.taploom.guest.v1.rpc import GuestServiceClient
from taploom.rpc import open_channel

CHECKOUT = Path(__file__).parents[2]
BUILD = CHECKOUT / "images/guest-initfs/build"
SECONDS = 600.0


def build(*arguments: str | Path) -> dict[str, object]:
    done = subprocess.run([sys.executable, BUILD, "--json", *arguments], check=True, capture_output=True, text=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def image(guest_initfs: Path) -> Path:
    return guest_initfs.parent


def test_it_is_small_and_its_manifest_is_true(image: Path) -> None:
    manifest = json.loads((image / "manifest.json").read_text())
    archive = image / "guest-initfs.cpio.zst"
    assert archive.stat().st_size <= 16 << 20
    assert manifest["outputs"][archive.name] == {"bytes": archive.stat().st_size, "sha256": file_sha256(archive)}
    assert {"busybox-static", "python3.13-minimal", "musl-dev"} <= {package["name"] for package in manifest["packages"]}
    assert all(re.fullmatch("[0-9a-f]{64}", entry["sha256"]) for entry in manifest["packages"] + manifest["wheels"])
    plain = subprocess.run(["zstd", "-dc", archive], check=True, capture_output=True).stdout
    listed = subprocess.run(["cpio", "-t", "--quiet"], input=plain, check=True, capture_output=True, text=False).stdout
    names = {f"/{name}" for name in listed.decode().split("\n") if name}
    assert set(manifest["files"]) <= names
    assert not [name for name in names if name.endswith(".py")]  # compiled only


def test_its_oci_layout_is_whole(image: Path) -> None:
    [config] = oci.check_layout(image / "oci")
    assert (config["architecture"], config["os"]) == ("amd64", "linux")
    assert config["config"]["Entrypoint"] == ["/sbin/vminitd"]


def test_two_builds_from_the_same_inputs_are_identical(image: Path, tmp_path: Path) -> None:
    # The packages are those of the first build, the rest is built again: traced, compiled, packed.
    cache = tmp_path / "cache"
    cache.mkdir()
    for name in ("debian", "wheels"):
        (cache / name).symlink_to(Path(_cache()) / name)
    build("--arch", image.name, "--cache", cache, "--output", tmp_path / "again")
    for path in sorted(path for path in image.rglob("*") if path.is_file() and path.name != "seconds"):
        assert file_sha256(tmp_path / "again" / path.relative_to(image)) == file_sha256(path), path.name


async def test_it_boots_to_the_agent_answering_over_vsock(
    guest_initfs: Path,
    kernel: Path,
    machine_directory: Callable[[str], Path],
) -> None:
    machine = Machine(
        name="guest-image",
        directory=machine_directory("guest-image"),
        kernel=kernel,
        initrd=guest_initfs,
        append="taploom.hostname=booted",
    )
    with trio.fail_after(SECONDS):
        async with running(machine) as vm:
            stream = await vm.wait_connect(5555)
            async with open_channel(stream) as channel:
                info = await GuestServiceClient(channel).get_info(GetInfoRequest(), timeout=60.0)
            assert info.hostname == "booted"


def _cache() -> str:
    from images.common.cache import DEFAULT_CACHE

    return str(DEFAULT_CACHE)
