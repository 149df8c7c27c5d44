"""The agent's command line: one clear line for what is wrong, and nothing left running."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "agent_helper", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, timeout=30, check=False, env=env)


def complete(folder: Path) -> list[str]:
    return ["--control", f"unix:{folder}/c.sock", "--data", f"unix:{folder}/d.sock", "--state-dir", f"{folder}/state"]


def test_help_has_an_example() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert "example: python -m agent_helper --control" in " ".join(done.stdout.split())


def test_version() -> None:
    assert run("--version").stdout.startswith("agent_helper ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["--control", "tcp:1.2.3.4:5", "--data", "unix:/x", "--state-dir", "/x"], "--control"),
        (["--control", "unix:/x", "--data", "vsock:5", "--state-dir", "/x"], "--data"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = run(*(f"{tmp_path}/state" if argument == "/x" else argument for argument in arguments))
    assert not list(tmp_path.iterdir())
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.system
def test_missing_programs_are_named_with_their_packages(tmp_path: Path) -> None:
    # A namespace of mounts in which dnsmasq is not to be found.
    script = f'mount -t tmpfs none {tmp_path}; mount --bind {tmp_path} /usr/sbin; exec "$@"'
    argv = [
        "unshare",
        "-m",
        "-n",
        "sh",
        "-c",
        script,
        "sh",
        sys.executable,
        "-m",
        "agent_helper",
        *complete(Path("/tmp")),
    ]
    argv[-1] = str(tmp_path / "state")
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, timeout=30, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "dnsmasq" in line
    assert "apt-get install dnsmasq-base" in line


@pytest.mark.system
def test_a_state_directory_is_for_one(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    with (tmp_path / "state" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run(*complete(tmp_path))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "in use by another agent_helper" in line


@pytest.mark.system
def test_a_state_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    done = run(*complete(tmp_path))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "--state-dir" in line
