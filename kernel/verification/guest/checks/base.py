"""What containers and their agents stand on: namespaces, cgroups, file systems, vsock."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

from ..check import CheckError, check, expect, run, step, wait_for
from ..netns import Namespace
from ..runner import CGROUPS
from ..system import CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWUSER, mount, prctl, setns, umount, unshare

GROUP = "base"
# The host's side of the vsock check (kernel/verification/boot.py) has the same numbers.
VSOCK_PORT_HOST = 7000
VSOCK_PORT_GUEST = 7001
_CID_ANY = 0xFFFFFFFF
_CID_LOCAL = 1
_CID_HOST = 2
_PATIENCE = 20


@check(
    "only-lo", GROUP, "list the interfaces at the start and in a new network namespace: lo and nothing else", alone=True
)
def only_lo() -> str:
    setns(os.open("/proc/1/ns/net", os.O_RDONLY), CLONE_NEWNET)
    at_start = sorted(name for _, name in socket.if_nameindex())
    wanted = [name for name in at_start if not _is_virtio(name)]
    expect(wanted == ["lo"], f"interfaces at the start: {' '.join(at_start)}")
    unshare(CLONE_NEWNET)
    new = [name for _, name in socket.if_nameindex()]
    expect(new == ["lo"], f"interfaces in a new namespace: {' '.join(new)}")
    return "lo"


def _is_virtio(name: str) -> bool:
    """Whether an interface is a device that the machine was given, not one that a driver made of itself."""
    return Path(f"/sys/class/net/{name}/device").exists()


@check("no-modules", GROUP, "look for the module loader: everything is built in", alone=True)
def no_modules() -> str:
    expect(not Path("/proc/modules").exists(), "/proc/modules exists: the kernel loads modules")
    return "no /proc/modules"


@check("vsock-host", GROUP, "the guest dials the host, then the host dials the guest; bytes both ways", alone=True)
def vsock_host() -> str:
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener:
        listener.bind((_CID_ANY, VSOCK_PORT_GUEST))
        listener.listen()
        listener.settimeout(_PATIENCE)
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
            sock.settimeout(_PATIENCE)
            step("dial the host")
            sock.connect((_CID_HOST, VSOCK_PORT_HOST))
            word = os.urandom(16).hex().encode()
            sock.sendall(word + b"\n")
            step("wait for the host to dial")
            accepted, (cid, _) = listener.accept()
            with accepted:
                accepted.settimeout(_PATIENCE)
                expect(cid == _CID_HOST, f"the host dialled from CID {cid}")
                expect(accepted.makefile("rb").readline().strip() == word, "the host answered something else")
                accepted.sendall(b"thanks\n")
            step("wait for the host's last word")
            expect(sock.makefile("rb").readline() == b"thanks\n", "the host did not get what was sent to it")
    return "both directions"


@check(
    "no-vsock-loopback",
    GROUP,
    "dial CID 1 and the machine's own CID where something listens: both must fail",
    alone=True,
)
def no_vsock_loopback() -> str:
    refused = []
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener:
        listener.bind((_CID_ANY, VSOCK_PORT_GUEST + 1))
        listener.listen()
        listener.settimeout(0.2)
        for cid in (_CID_LOCAL, _own_cid()):
            with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
                sock.settimeout(3)
                try:
                    sock.connect((cid, VSOCK_PORT_GUEST + 1))
                except OSError as error:
                    refused.append(f"CID {cid}: {errno.errorcode.get(error.errno or 0, 'no answer')}")
                    with contextlib.suppress(TimeoutError):
                        listener.accept()[0].close()
                        raise CheckError(f"CID {cid}: the listener was reached") from None
                    continue
                raise CheckError(f"a process in the machine reached another one by vsock, at CID {cid}")
    return ", ".join(refused)


def _own_cid() -> int:
    import fcntl

    with Path("/dev/vsock").open("rb") as device:
        answer = fcntl.ioctl(device, 0x7B9, b"\0\0\0\0")  # IOCTL_VM_SOCKETS_GET_LOCAL_CID
    return int(struct.unpack("I", answer)[0])


@check("overlayfs", GROUP, "mount lower, upper and work directories; read through, copy up, remove, list")
def overlayfs() -> str:
    top = Path("/tmp/overlay")  # noqa: S108 - a tmpfs of the check's own
    lower, upper, work, merged = (top / name for name in ("lower", "upper", "work", "merged"))
    for directory in (lower, upper, work, merged):
        directory.mkdir(parents=True)
    for name in ("kept", "changed", "removed"):
        (lower / name).write_text(f"{name} below\n")
    os.setxattr(lower / "changed", "user.taploom", b"1") if _has_user_xattr(lower) else None
    mount("overlay", str(merged), "overlay", options=f"lowerdir={lower},upperdir={upper},workdir={work}")
    expect((merged / "kept").read_text() == "kept below\n", "the lower file is not seen")
    (merged / "changed").write_text("changed above\n")
    (merged / "removed").unlink()
    (merged / "new").mkdir()
    expect((lower / "changed").read_text() == "changed below\n", "a write went to the lower layer")
    expect((upper / "changed").read_text() == "changed above\n", "a write did not go to the upper layer")
    expect((upper / "removed").is_char_device(), "no whiteout stands for the removed file")
    names = sorted(path.name for path in merged.iterdir())
    expect(names == ["changed", "kept", "new"], f"the merged directory lists {names}")
    umount(str(merged))
    return "copy-up, whiteout"


def _has_user_xattr(path: Path) -> bool:
    try:
        os.setxattr(path, "user.probe", b"1")
    except OSError:
        return False
    return True


@check(
    "cgroup-controllers", GROUP, "cgroup v2 has the controllers that container runtimes use, and they can be enabled"
)
def cgroup_controllers() -> str:
    have = set((CGROUPS / "cgroup.controllers").read_text().split())
    top = _cgroup("cgroup-controllers", {"cpuset", "cpu", "io", "memory", "pids"})
    for name in ("cpu.max", "memory.max", "pids.max", "io.max", "cpuset.cpus", "cgroup.freeze", "cpu.pressure"):
        expect((top / name).exists(), f"a cgroup has no {name}")
    return " ".join(sorted(have))


def _cgroup(name: str, controllers: set[str]) -> Path:
    have = set((CGROUPS / "cgroup.controllers").read_text().split())
    expect(controllers <= have, f"cgroup v2 lacks the controllers {' '.join(sorted(controllers - have))}")
    (CGROUPS / "cgroup.subtree_control").write_text(" ".join(f"+{one}" for one in sorted(controllers)))
    top = CGROUPS / f"verify-{name}"
    top.mkdir()
    return top


def _in_cgroup(cgroup: Path, function: Callable[[], int]) -> int:
    """Runs a function in a fork inside a cgroup; its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            (cgroup / "cgroup.procs").write_text("0")
            status = function()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _counter(path: Path, key: str) -> int:
    return int(dict(line.split() for line in path.read_text().splitlines())[key])


@check("cgroup-pids", GROUP, "a process in a cgroup with pids.max 3 forks until it is refused")
def cgroup_pids() -> str:
    cgroup = _cgroup("cgroup-pids", {"pids"})
    (cgroup / "pids.max").write_text("3")

    def fork_bomb() -> int:
        children = 0
        for _ in range(10):
            try:
                pid = os.fork()
            except BlockingIOError:
                break
            if pid == 0:
                time.sleep(30)
                os._exit(0)
            children += 1
        return children

    expect((made := _in_cgroup(cgroup, fork_bomb)) == 2, f"{made} children were made where 2 are allowed")
    (cgroup / "cgroup.kill").write_text("1")
    return "third fork refused"


@check("cgroup-memory", GROUP, "a process with memory.max 16 MiB takes 64 MiB: killed by the kernel, counted")
def cgroup_memory() -> str:
    cgroup = _cgroup("cgroup-memory", {"memory"})
    (cgroup / "memory.max").write_text(str(16 << 20))
    with contextlib.suppress(OSError):
        (cgroup / "memory.swap.max").write_text("0")

    def hog() -> int:
        taken = [b"x" * (1 << 20) for _ in range(64)]
        return len(taken)

    expect((status := _in_cgroup(cgroup, hog)) == -signal.SIGKILL, f"the process ended with {status}, not killed")
    kills = _counter(cgroup / "memory.events", "oom_kill")
    expect(kills, "memory.events counts no oom_kill")
    return f"oom_kill {kills}"


@check("cgroup-cpu", GROUP, "a busy process with cpu.max 10 % is throttled: nr_throttled grows")
def cgroup_cpu() -> str:
    cgroup = _cgroup("cgroup-cpu", {"cpu"})
    (cgroup / "cpu.max").write_text("10000 100000")

    def busy() -> int:
        until = time.monotonic() + 0.7
        while time.monotonic() < until:
            pass
        return 0

    _in_cgroup(cgroup, busy)
    throttled = _counter(cgroup / "cpu.stat", "nr_throttled")
    expect(throttled, "cpu.stat counts no throttled period")
    return f"{throttled} periods throttled"


@check("cgroup-freezer", GROUP, "freeze and thaw a counting process by cgroup.freeze")
def cgroup_freezer() -> str:
    cgroup = _cgroup("cgroup-freezer", set())
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        while True:
            os.write(writer, b".")
            time.sleep(0.01)
    os.set_blocking(reader, False)
    (cgroup / "cgroup.procs").write_text(str(pid))
    (cgroup / "cgroup.freeze").write_text("1")
    wait_for("the cgroup to be frozen", lambda: _counter(cgroup / "cgroup.events", "frozen") == 1)
    with contextlib.suppress(BlockingIOError):
        while os.read(reader, 4096):
            pass
    time.sleep(0.1)
    with contextlib.suppress(BlockingIOError):
        raise CheckError(f"a frozen process wrote {len(os.read(reader, 4096))} bytes")
    (cgroup / "cgroup.freeze").write_text("0")

    def goes_on() -> bool:
        with contextlib.suppress(BlockingIOError):
            return bool(os.read(reader, 1))
        return False

    wait_for("the thawed process to go on", goes_on)
    return "stopped and went on"


@check("user-namespaces", GROUP, "an unprivileged user becomes root of a user namespace, mounts and makes a network")
def user_namespaces() -> str:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        answer = "?"
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            prctl(4, 1)  # PR_SET_DUMPABLE: /proc/self belongs to the new user
            unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET)
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text("0 65534 1")
            Path("/proc/self/gid_map").write_text("0 65534 1")
            mount("tmpfs", "/mnt", "tmpfs")
            run("ip", "link", "add", "d0", "type", "dummy")
            run("ip", "link", "set", "lo", "up")
            answer = "" if os.getuid() == 0 else f"uid {os.getuid()}"
        except (OSError, CheckError) as error:
            answer = str(error)
        finally:
            os.write(writer, answer.encode())
            os._exit(0)
    os.close(writer)
    answer = os.read(reader, 1000).decode()
    os.waitpid(pid, 0)
    expect(not answer, f"in a user namespace: {answer}")
    return "uid 65534 is root there"


@check("seccomp", GROUP, "a BPF filter makes mkdir fail with EPERM in the process that set it, and in no other")
def seccomp() -> str:
    machine = os.uname().machine
    numbers = {"x86_64": (0xC000003E, (83, 258)), "aarch64": (0xC00000B7, (34,))}
    expect(machine in numbers, f"no system call numbers known for {machine}")
    _arch, calls = numbers[machine]
    instructions = [struct.pack("HBBI", 0x20, 0, 0, 0)]  # load the number
    for index, number in enumerate(calls):
        instructions.append(struct.pack("HBBI", 0x15, len(calls) - index, 0, number))
    instructions.append(struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000))  # SECCOMP_RET_ALLOW
    instructions.append(struct.pack("HBBI", 0x06, 0, 0, 0x00050000 | errno.EPERM))  # SECCOMP_RET_ERRNO
    filters = ctypes.create_string_buffer(b"".join(instructions))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(instructions), ctypes.addressof(filters)))
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            prctl(38, 1)  # PR_SET_NO_NEW_PRIVS
            prctl(22, 2, ctypes.c_void_p(ctypes.addressof(program)))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
            try:
                Path("/tmp/forbidden").mkdir()  # noqa: S108 - a tmpfs of the check's own
            except PermissionError:
                status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    expect(status == 0, "mkdir was not refused, or the filter was not taken")
    Path("/tmp/allowed").mkdir()  # noqa: S108
    return "mkdir: EPERM"


@check("network-namespaces", GROUP, "two namespaces bind the same address and port, and do not reach one another")
def network_namespaces() -> str:
    one, two = Namespace("one"), Namespace("two")
    listeners = []
    for namespace in (one, two):
        with namespace:
            sock = socket.socket()
            sock.bind(("127.0.0.1", 7000))
            listeners.append(sock)
    listeners[0].listen()
    with one, socket.create_connection(("127.0.0.1", 7000), 3):
        pass
    with two, contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", 7000), 3):
        raise CheckError("a listener of one namespace was reached from another")
    return "same port bound twice"
