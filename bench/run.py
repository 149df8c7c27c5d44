"""What one benchmark run owns: processes, network namespaces, a scratch directory and the compiled tools.

Everything belongs to a process of the run: network namespaces are anonymous and live as long as the process that holds
them, and every process gets SIGKILL when the benchmark dies (PR_SET_PDEATHSIG, prctl(2)), so that even kill -9 of the
benchmark leaves no process, namespace or interface behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

CACHE = Path(os.environ.get("TAPLOOM_CACHE", "/var/cache/taploom")) / "bench"
_SOURCES = Path(__file__).parent
_PREFIX = "taploom-bench-"


class BenchError(Exception):
    """The benchmark cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class Netns:
    """A network namespace, by a path to it (namespaces(7)), such as /proc/PID/ns/net."""

    path: str

    def command(self, *argv: str) -> list[str]:
        """The command line that runs argv inside."""
        return ["nsenter", f"--net={self.path}", "--", *argv]


def wait_for(condition: Callable[[], bool], what: str, *, timeout: float = 30.0) -> None:
    """Waits until the condition holds.

    Raises:
        BenchError: it does not within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise BenchError(f"timed out after {timeout:.0f} s: {what}")
        time.sleep(0.005)


@dataclass
class Run:
    """A run's resources; leave `stack` and they are gone."""

    stack: contextlib.ExitStack
    directory: Path
    _logs: dict[int, Path] = field(default_factory=dict)
    _spawned: int = 0

    @property
    def name(self) -> str:
        """Unique on this machine while the run lives; starts with `tlb`."""
        return f"tlb{os.getpid()}"

    def netprobe(self, *argv: str) -> list[str]:
        """The command line of the probe (netprobe.c)."""
        return [str(self.directory / "netprobe"), *argv]

    def compile(self, name: str) -> str:
        """Compiles bench/NAME.c and returns the program's path."""
        target = self.directory / name
        self.check("cc", "-O2", "-std=gnu11", "-pthread", "-o", str(target), str(_SOURCES / f"{name}.c"))
        return str(target)

    def spawn(self, *argv: str, env: dict[str, str] | None = None, name: str = "") -> subprocess.Popen[str]:
        """Starts a process that ends with the run at the latest. Its stderr goes to a file in the run's directory."""
        self._spawned += 1
        log = self.directory / f"{name or Path(argv[0]).name}-{self._spawned}.log"
        with log.open("w") as errors:
            process = subprocess.Popen(
                # Started by the main thread, whose end is the benchmark's end.
                ["setpriv", "--pdeathsig", "KILL", *argv],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **(env or {})},
                text=True,
                # Ctrl-C is for the benchmark; it then stops its children in order.
                start_new_session=True,
            )
        self._logs[process.pid] = log
        self.stack.callback(_stop, process)
        return process

    def spawn_ready(self, *argv: str, name: str = "", env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """Starts a process that prints the line `ready` when it is, and waits for it."""
        process = self.spawn(*argv, name=name, env=env)
        assert process.stdout is not None
        line = process.stdout.readline()
        if line.strip() != "ready":
            process.wait()
            raise BenchError(f"{' '.join(argv)} did not start: {self.log_of(process)}")
        return process

    def log_of(self, process: subprocess.Popen[str]) -> str:
        """The last lines that the process wrote to stderr."""
        text = self._logs[process.pid].read_text(errors="replace").strip()
        return "\n".join(text.splitlines()[-5:]) or "it said nothing"

    def namespace(self) -> Netns:
        """Makes a network namespace with its loopback up."""
        holder = self.spawn_ready(
            *("unshare", "--net", "--", "sh", "-c", "ip link set lo up && echo ready && exec sleep infinity"),
            name="namespace",
        )
        return Netns(f"/proc/{holder.pid}/ns/net")

    def guard(self, *argv: str) -> None:
        """Runs a command if the benchmark dies without leaving the run."""
        process = subprocess.Popen(
            ["sh", "-c", 'read -r _ || exec "$@"', "sh", *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

        def dismiss() -> None:
            process.communicate(b"done\n")

        self.stack.callback(dismiss)

    def check(self, *argv: str, timeout: float = 120.0, env: dict[str, str] | None = None) -> str:
        """Runs a command to its end and returns what it printed.

        Raises:
            BenchError: it failed, or took more than `timeout` seconds.
        """
        try:
            done = subprocess.run(
                ["setpriv", "--pdeathsig", "KILL", *argv],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
                start_new_session=True,
                env={**os.environ, **(env or {})},
            )
        except subprocess.TimeoutExpired as error:
            raise BenchError(f"{' '.join(argv)}: not done after {timeout:.0f} s") from error
        if done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip())[-800:]
            raise BenchError(f"{' '.join(argv)}: exit {done.returncode}: {said}")
        return done.stdout


def _stop(process: subprocess.Popen[str]) -> None:
    """Ends a process: SIGTERM, SIGKILL after 5 s."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


@contextlib.contextmanager
def open_run() -> Iterator[Run]:
    """A run. SIGTERM, SIGHUP and Ctrl-C end it through its clean-up, which they cannot interrupt.

    Raises:
        BenchError: not root, or a tool is missing.
    """
    if os.geteuid() != 0:
        raise BenchError("the benchmark makes network namespaces: run it as root")
    for tool in ("setpriv", "unshare", "nsenter", "ip", "cc", "iperf3", "ping"):
        if shutil.which(tool) is None:
            raise BenchError(f"{tool} is not installed: run bench/setup.sh")
    for signum in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup(1) leaves SIGHUP
            signal.signal(signum, _interrupt)
    sweep()
    directory = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    stack = contextlib.ExitStack()
    try:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        run = Run(stack, directory)
        run.compile("netprobe")
        yield run
    finally:
        for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(signum, signal.SIG_IGN)
        stack.close()
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(signum: int, frame: object) -> None:
    del frame
    raise SystemExit(128 + signum)


def sweep() -> None:
    """Removes the directories of runs that were killed before they could."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        pid = path.name.removeprefix(_PREFIX).split("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(path, ignore_errors=True)
