"""What the tests over virtual machines share: the artefacts under build/, and the consoles' ends in every failure."""

from __future__ import annotations

import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from portal import Portal, open_portal

ROOT = Path(__file__).parents[2]
ARCH = {"x86_64": "x86_64", "aarch64": "arm64"}[platform.machine()]
CONSOLE_LINES = 30

_watched: set[Path] = set()


def built(*parts: str, command: str) -> Path:
    """An artefact under build/; fails with the command that builds it where it is missing."""
    path = ROOT.joinpath("build", *parts)
    if not path.exists():
        pytest.fail(f"{path.relative_to(ROOT)} is missing: run {command} (make test-vm does)", pytrace=False)
    return path


@pytest.fixture(scope="session")
def kernel() -> Path:
    """The kernel of this machine's architecture."""
    return built("kernel", ARCH, "vmlinuz", command=f"kernel/build --arch {ARCH}")


@pytest.fixture(scope="session")
def guest_initfs() -> Path:
    return built(
        "images", "guest-initfs", ARCH, "guest-initfs.cpio.zst", command=f"images/guest-initfs/build --arch {ARCH}"
    )


@pytest.fixture(scope="session")
def helper_initfs() -> Path:
    return built(
        "images", "alpine-helper", ARCH, "helper.cpio.zst", command=f"images/alpine-helper/build --arch {ARCH}"
    )


@pytest.fixture(scope="session")
def portal() -> Iterator[Portal]:
    """Where machines that several tests share run."""
    with open_portal() as portal:
        yield portal


@pytest.fixture(scope="session")
def machine_directory() -> Iterator[Callable[[str], Path]]:
    """A directory for a machine's sockets (their paths are short) and logs, by the machine's name; a failing test shows
    the end of each console in one.
    """
    # Not in pytest's own: sockets have paths of 107 bytes at most.
    base = Path(tempfile.mkdtemp(prefix="tlv-", dir="/run"))
    _watched.add(base)
    try:
        yield lambda name: base / name
    finally:
        _watched.discard(base)
        shutil.rmtree(base)


@pytest.fixture(scope="session")
def watch_consoles() -> Callable[[Path], None]:
    """Has a failing test show the ends of the consoles in a directory and below."""
    return _watched.add


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    del item, call
    report: pytest.TestReport = yield  # type: ignore[assignment,misc]  # a hook wrapper is sent the result
    if report.failed:
        for path in sorted({path for base in _watched for path in base.rglob("*console*.log")}):
            lines = path.read_text(errors="replace").splitlines()[-CONSOLE_LINES:]
            report.sections.append((f"end of {path}", "\n".join(lines)))
    return report  # type: ignore[return-value]
