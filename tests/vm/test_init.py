"""The images' PID 1 as a process in namespaces of its own: no virtual machine, the same program.

Its root is an overlay of this machine's, so that services can be anything; it gets PID, mount, network, UTS and IPC
namespaces, where reboot(2) ends PID 1 by a signal: SIGINT for poweroff and halt, SIGHUP for reboot.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from images.common import cache
from images.common.init import build_init

AGENT = """
import os, pathlib, signal, socket, sys, time
pathlib.Path("/mark").open("a").write(f"{os.getpid()}\\n")
print("agent", *sys.argv[1:], flush=True)
signal.signal(signal.SIGTERM, lambda *_: (print("agent ends", flush=True), sys.exit(0)))
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
    notify.sendto(b"STATUS=here\\nREADY=1", os.environ["NOTIFY_SOCKET"])
while True:
    signal.pause()
"""
CONF = """
# what an image has
control = vsock:any:5555
data = vsock:any:5556
hostname = image
command = /usr/bin/env python3 -S /agent.py --control ${control} --data ${data} --log ${log} --root=${root}
environment = A=1 B=${hostname}
notify = yes
oom-score = 500
"""
WAIT = 20.0


class Booted:
    """A running PID 1 and what its console shows."""

    def __init__(self, root: Path, upper: Path, process: subprocess.Popen[bytes], log: Path) -> None:
        self.root, self.upper, self.process, self.log = root, upper, process, log

    def console(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, wanted: str | Callable[[], bool]) -> None:
        until = time.monotonic() + WAIT
        while not (wanted() if callable(wanted) else re.search(wanted, self.console())):
            assert time.monotonic() < until, f"waited for {wanted}, the console has:\n{self.console()}"
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.console()}"
            time.sleep(0.02)

    @property
    def pid(self) -> int:
        """PID 1's number out here."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def run(self, *argv: str) -> str:
        """Runs a command inside."""
        enter = ["nsenter", "--target", str(self.pid), "--all", "--root", "--wd"]
        return subprocess.run([*enter, *argv], check=True, capture_output=True, text=True, timeout=WAIT).stdout

    def ended(self) -> int:
        return self.process.wait(WAIT)


Boot = Callable[..., contextlib.AbstractContextManager[Booted]]


@pytest.fixture(scope="session")
def program() -> Path:
    return build_init("x86_64", cache=cache.DEFAULT_CACHE)[0]


@pytest.fixture
def boot(program: Path, tmp_path: Path) -> Boot:
    @contextlib.contextmanager
    def start(
        *arguments: str,
        conf: str = CONF,
        agent: str = AGENT,
        services: dict[str, str] | None = None,
        files: dict[str, str] | None = None,
    ) -> Iterator[Booted]:
        upper, root, log = tmp_path / "upper", tmp_path / "root", tmp_path / "console"
        (upper / "etc/taploom/services.d").mkdir(parents=True)
        (tmp_path / "work").mkdir()
        root.mkdir()
        shutil.copy(program, upper / "init")
        (upper / "poweroff").symlink_to("init")
        (upper / "reboot").symlink_to("init")
        (upper / "etc/taploom/init.conf").write_text(conf)
        (upper / "agent.py").write_text(agent)
        for name, text in (services or {}).items():
            (upper / f"etc/taploom/services.d/{name}.conf").write_text(text)
        for name, text in (files or {}).items():
            (upper / name).write_text(text)
            (upper / name).chmod(0o755)
        overlay = f"lowerdir=/,upperdir={upper},workdir={tmp_path / 'work'}"
        script = 'mount -t overlay -o "$1" overlay "$2"; root=$2; shift 2; exec unshare --pid --fork --kill-child \\\n'
        script += '  --net --uts --ipc chroot "$root" /init "$@"'
        with log.open("ab") as output:
            process = subprocess.Popen(
                ["unshare", "--mount", "sh", "-ec", script, "sh", overlay, str(root), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        booted = Booted(root, upper, process, log)
        try:
            yield booted
        finally:
            process.kill()
            process.wait()

    return start


def test_mounts_names_and_services(boot: Boot) -> None:
    with boot("taploom.hostname=web", 'taploom.log="debug"') as booted:
        booted.wait(r"agent answers after \d+\.\d\d s")
        mounts = {line.split()[1]: line.split()[2] for line in booted.run("cat", "/proc/mounts").splitlines()}
        wanted = {
            "/proc": "proc",
            "/sys": "sysfs",
            "/dev": "devtmpfs",
            "/dev/pts": "devpts",
            "/dev/shm": "tmpfs",
            "/run": "tmpfs",
            "/tmp": "tmpfs",
            "/sys/fs/cgroup": "cgroup2",
        }
        assert wanted.items() <= mounts.items()
        assert booted.run("hostname").strip() == "web"
        assert "LOOPBACK,UP" in booted.run("ip", "link", "show", "lo")
        assert re.search(
            r"^agent --control vsock:any:5555 --data vsock:any:5556 --log debug --root=$", booted.console(), re.M
        )
        agent = booted.run("pgrep", "-f", "agent.py").split()[0]
        environment = booted.run("cat", f"/proc/{agent}/environ").split("\0")
        assert {"A=1", "B=web", "HOME=/root"} <= set(environment)
        assert (
            booted.run("cat", f"/proc/{agent}/oom_score_adj").strip() == "500"
        )  # lowering it needs a capability that containers lack
        assert re.match(r"taploom-init: init after \d+\.\d{3} s\n", booted.console())


@pytest.mark.parametrize(
    ("number", "how", "ends"),
    [
        (signal.SIGTERM, "poweroff", signal.SIGINT),
        (signal.SIGINT, "poweroff", signal.SIGINT),
        (signal.SIGPWR, "poweroff", signal.SIGINT),
        (signal.SIGUSR2, "poweroff", signal.SIGINT),
        (signal.SIGUSR1, "halt", signal.SIGINT),
        (39, "reboot", signal.SIGHUP),
    ],
)
def test_signals_end_the_machine_cleanly(boot: Boot, number: int, how: str, ends: int) -> None:
    with boot() as booted:
        booted.wait("agent answers")
        os.kill(booted.pid, number)
        assert booted.ended() == -ends
        assert f"taploom-init: {how}: stopping\nagent ends\ntaploom-init: {how} after " in booted.console()


@pytest.mark.parametrize(("command", "ends"), [("poweroff", signal.SIGINT), ("reboot", signal.SIGHUP)])
def test_its_own_commands_end_it(boot: Boot, command: str, ends: int) -> None:
    with boot() as booted:
        booted.wait("agent answers")
        with contextlib.suppress(subprocess.CalledProcessError):  # it may be stopped with everything else
            booted.run(f"/{command}")
        assert booted.ended() == -ends


def test_off_is_configurable_and_what_ignores_sigterm_is_killed(boot: Boot) -> None:
    stubborn = (
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf', flush=True)\ntime.sleep(99)"
    )
    with boot("taploom.off=reboot", agent=stubborn) as booted:
        booted.wait("deaf")
        os.kill(booted.pid, signal.SIGTERM)
        assert booted.ended() == -signal.SIGHUP
        assert "some processes did not end within 5 s; they are killed" in booted.console()


def test_an_agent_that_was_ready_is_started_again_at_once(boot: Boot) -> None:
    with boot() as booted:
        booted.wait("agent answers")
        for number in range(2, 5):
            booted.run("pkill", "-KILL", "-f", "agent.py")
            booted.wait(lambda: booted.console().count("agent answers") == number)  # noqa: B023 - called in the loop
        assert re.search(
            r"agent was ended by signal 9 after [\d.]+ s; it is started again in 0\.00 s", booted.console()
        )
        assert len(set((booted.upper / "mark").read_text().split())) == 4


def test_an_agent_that_keeps_failing_is_backed_off(boot: Boot) -> None:
    with boot(agent="raise SystemExit(3)") as booted:
        booted.wait(r"status 3 after [\d.]+ s; it is started again in 0\.80 s")
        pauses = re.findall(r"started again in ([\d.]+) s", booted.console())
        assert pauses == ["0.05", "0.10", "0.20", "0.40", "0.80"]


def test_orphans_are_reaped(boot: Boot) -> None:
    with boot() as booted:
        booted.wait("agent answers")
        booted.run("sh", "-c", "for i in 1 2 3 4 5; do (setsid sh -c 'exit 0' &) ; done; (setsid sleep 0.1 &)")
        states = "cat /proc/[0-9]*/status 2>/dev/null; true"  # some end meanwhile
        booted.wait(lambda: not re.search(r"^State:\s+Z", booted.run("sh", "-c", states), re.M))
        booted.wait(lambda: "sleep" not in booted.run("ps", "-eo", "comm"))


def test_further_services_are_kept_running_too(boot: Boot) -> None:
    services = {"10-ticker": "command = sh -c echo${IFS}tick;exit${IFS}1\n", "none": "notify = yes\nwhat = ever\n"}
    with boot(services=services) as booted:
        booted.wait("agent answers")
        booted.wait(r"(?s)tick.*10-ticker ended with status 1 .*tick")
        assert "none.conf: no command; none is not started" in booted.console()
        assert "none.conf: nothing is called what; it is ignored" in booted.console()


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ("taploom.control=tcp:1.2.3.4:1", "control=tcp:1.2.3.4:1 is ignored: wanted vsock:any:PORT or unix:/PATH"),
        ("taploom.log=loud", "log=loud is ignored: wanted debug, info, warning or error"),
        ("taploom.hostname=no_good", "hostname=no_good is ignored: wanted letters, digits, - and ."),
        ("taploom.hostname=" + "a" * 65, "is ignored: wanted a shorter value"),
        ("taploom.nonsense=1", "nothing is called nonsense; it is ignored"),
        ("taploom.exec=relative", "exec=relative is ignored: wanted an absolute path"),
        ("taploom.exec=/no/such/init", "/no/such/init does not take over: No such file or directory"),
        ("taploom.exec=/etc/passwd", "/etc/passwd does not take over: Permission denied"),
        ("taploom.exec=/etc", "/etc does not take over: Permission denied"),
        ("taploom.exec=/x taploom.root=sda", "root=sda is ignored: wanted /dev/NAME, 9p:TAG or virtiofs:TAG"),
        ("taploom.exec=/x taploom.root=/dev/null", "cannot mount /dev/null as the root: "),
        ("taploom.exec", "exec= is ignored: wanted an absolute path"),
        ("taploom.", "nothing is called ; it is ignored"),
    ],
)
def test_bad_parameters_are_named_and_the_rest_runs(boot: Boot, parameter: str, message: str) -> None:
    with boot(*parameter.split()) as booted:
        booted.wait("agent answers")
        assert message in booted.console()


def test_without_its_configuration_it_still_runs_as_pid_1(boot: Boot) -> None:
    with boot(conf="nonsense\n") as booted:
        booted.wait("no command; agent is not started")
        assert "this line is ignored, it is not KEY = VALUE: nonsense" in booted.console()
        os.kill(booted.pid, signal.SIGTERM)
        assert booted.ended() == -signal.SIGINT


OTHER = """#!/bin/busybox sh
/bin/busybox test -e /proc/mounts && echo other found /proc mounted
echo "other init: $$ $1 $(/bin/busybox cat /mark-of-root)"
/bin/busybox test -e /proc/mounts || /bin/busybox mount -t proc proc /proc
exec /bin/busybox sleep 1000
"""


def test_another_init_takes_over_in_the_same_root(boot: Boot) -> None:
    files = {"other": OTHER, "mark-of-root": "same root"}
    with boot("taploom.exec=/other,first", files=files) as booted:
        booted.wait("agent answers")
        assert re.search(r"^other init: 1 first same root$", booted.console(), re.M)
        assert "other found /proc mounted" not in booted.console()  # as the kernel left it
        assert re.search(r"^agent .* --root=$", booted.console(), re.M)
        assert booted.run("cat", "/proc/1/comm") == "busybox\n"
        booted.run("pkill", "-KILL", "-f", "agent.py")
        booted.wait(lambda: booted.console().count("agent answers") == 2)
        booted.run("pkill", "-TERM", "taploom-init|^init$")
        booted.wait("agent ends")
        assert booted.process.poll() is None


def test_another_root_is_entered_and_the_agent_stays_behind(boot: Boot, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("bin", "proc", "sys", "dev", "run", "etc"):
        (tree / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "bin/busybox")
    (tree / "other").write_text(OTHER)
    (tree / "other").chmod(0o755)
    (tree / "mark-of-root").write_text("new root")
    image = tmp_path / "image"
    subprocess.run(["mksquashfs", tree, image, "-quiet", "-no-progress"], check=True, capture_output=True)
    device = subprocess.run(["losetup", "--find", "--show", image], check=True, capture_output=True, text=True).stdout
    try:
        with boot("taploom.exec=/other,first", f"taploom.root={device.strip()}") as booted:
            booted.wait("agent answers")
            assert re.search(r"^other init: 1 first new root$", booted.console(), re.M)
            assert "other found /proc mounted" in booted.console()
            assert re.search(r"^agent .* --root=/proc/1/root$", booted.console(), re.M)
            assert booted.run("/bin/busybox", "cat", "/mark-of-root") == "new root"
            mounts = booted.run("/bin/busybox", "cat", "/proc/mounts")
            assert all(f" /{name} " in mounts for name in ("proc", "sys", "dev", "run"))
            assert len((booted.upper / "mark").read_text().split()) == 1
    finally:
        subprocess.run(["losetup", "--detach", device.strip()], check=True)


def test_an_init_that_cannot_be_executed_after_all_leaves_the_agent_running(boot: Boot) -> None:
    with boot("taploom.exec=/other", files={"other": "#!/no/such/interpreter\n"}) as booted:
        booted.wait("agent answers")
        assert "cannot become /other: No such file or directory" in booted.console()
        os.kill(booted.pid, signal.SIGTERM)
        assert booted.ended() == -signal.SIGINT
        assert "agent ends" in booted.console()
