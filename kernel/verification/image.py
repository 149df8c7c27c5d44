"""The verification's initramfs: tools of Debian trixie, the checks, and the compiled eBPF programs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from images.common import cpio, debian, elf, python
from images.common.cache import cached, file_sha256, inputs_hash
from images.common.tools import BuildError, run
from kernel.verification import programs
from lab.vm.tools import host_architecture

SUITE = "trixie"
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
GUEST = HERE / "guest"
_PYTHON = "python3.13"
_INTERPRETER = ("python3-minimal", "libpython3-stdlib", "libc6")
PACKAGES = (
    *("busybox-static", *_INTERPRETER),
    *("iproute2", "bpftool", "wireguard-tools"),
    *("nftables", "iptables", "ipset", "conntrack", "ipvsadm"),
    *("openvswitch-switch", "openvswitch-common", "containernetworking-plugins"),
)
_PROGRAMS = (
    *("/usr/bin/busybox", f"/usr/bin/{_PYTHON}", "/usr/bin/ip", "/usr/sbin/tc", "/usr/sbin/bridge", "/usr/bin/wg"),
    *("/usr/sbin/bpftool", "/usr/sbin/nft", "/usr/sbin/xtables-nft-multi", "/usr/sbin/xtables-legacy-multi"),
    *("/usr/sbin/ipset", "/usr/sbin/conntrack", "/usr/sbin/ipvsadm"),
    *("/usr/sbin/ovsdb-server", "/usr/bin/ovsdb-tool", "/usr/lib/openvswitch-switch/ovs-vswitchd"),
    *("/usr/bin/ovs-vsctl", "/usr/bin/ovs-ofctl", "/usr/bin/ovs-appctl"),
)
_CNI = [
    "bridge",
    "ptp",
    "macvlan",
    "ipvlan",
    "vlan",
    "host-local",
    "portmap",
    "bandwidth",
    "tuning",
    "firewall",
    "loopback",
]
_LINKS = {
    "/usr/bin/python3": _PYTHON,
    "/usr/bin/sh": "busybox",
    "/usr/bin/mount": "busybox",
    "/usr/sbin/ovs-vswitchd": "../lib/openvswitch-switch/ovs-vswitchd",
    "/usr/sbin/iptables": "xtables-nft-multi",
    "/usr/sbin/ip6tables": "xtables-nft-multi",
    **{
        f"/usr/sbin/{name}-{kind}{end}": f"xtables-{kind}-multi"
        for name in ("iptables", "ip6tables")
        for kind in ("nft", "legacy")
        for end in ("", "-save", "-restore")
    },
}
_TREES = ("/usr/share/iproute2", "/usr/share/openvswitch/vswitch.ovsschema")
# What of Python's library no check can need.
_LEFT_OUT = {
    *("asyncio", "concurrent", "ctypes/macholib", "ctypes/test", "curses", "dbm", "email", "html", "http", "idlelib"),
    *(
        "lib2to3",
        "multiprocessing",
        "pathlib/test",
        "pydoc_data",
        "sqlite3",
        "sysconfig",
        "test",
        "tkinter",
        "turtledemo",
    ),
    *("unittest", "urllib", "venv", "wsgiref", "xml", "xmlrpc", "zoneinfo", "_pyrepl", "__phello__", "ensurepip"),
}
_INIT = """#!/bin/sh
/bin/busybox mount -t devtmpfs dev /dev
exec </dev/console >/dev/console 2>&1
export PATH=/usr/sbin:/usr/bin HOME=/root
PYTHONPATH=/usr/lib/verify exec python3 -SB -m guest.main
"""
BOOK = "/usr/lib/verify"


def build(arch: str, cache: Path, say: Callable[[str], None]) -> Path:
    """The initramfs of an architecture, from the cache when its inputs are the same.

    It is two archives: the tools, and the checks with the eBPF programs, which change more often.

    Args:
        arch: x86_64 or arm64.
        cache: the cache's root.
        say: called with what is being done.

    Raises:
        BuildError: a package, or a tool to build with, is missing.
    """
    tools = _tools(arch, cache, say)
    objects = programs.build(arch, cache, say)

    def fill(directory: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="taploom-verify-") as work:
            root, archive = Path(work, "root"), Path(work, "checks.cpio")
            _checks(root, objects)
            cpio.write_newc(root, archive)
            cpio.concatenate([tools, archive], directory / "verify.cpio")

    hashes = [file_sha256(path) for path in (tools, *sorted(objects.iterdir()))]
    key = inputs_hash(hashes, [Path(__file__), GUEST], ROOT)
    return cached(cache, f"kernel-verify/{arch}", key, fill)[0] / "verify.cpio"


def _tools(arch: str, cache: Path, say: Callable[[str], None]) -> Path:
    """The archive with Debian's programs and Python."""
    say("finding the tools' packages (Debian trixie)")
    packages = debian.packages(SUITE, arch, PACKAGES, cache=cache)
    host = host_architecture()
    interpreter = packages if host == arch else debian.packages(SUITE, host, _INTERPRETER, cache=cache)

    def fill(directory: Path) -> None:
        say("building the initramfs of the tools")
        with tempfile.TemporaryDirectory(prefix="taploom-verify-") as work:
            everything, root = Path(work, "all"), Path(work, "root")
            debian.unpack(packages, everything)
            here = everything
            if host != arch:
                here = Path(work, "here")
                debian.unpack(interpreter, here)
            _pick(everything, root)
            _python(everything, root, here)
            _own(root)
            archive = Path(work, "tools.cpio")
            cpio.write_newc(root, archive, devices=cpio.CONSOLE)
            run(["zstd", "-q", "-6", "-T0", archive, "-o", directory / "tools.cpio.zst"])

    key = inputs_hash([arch, *(package.sha256 for package in (*packages, *interpreter))], [Path(__file__)], ROOT)
    return cached(cache, f"kernel-verify/tools-{arch}", key, fill)[0] / "tools.cpio.zst"


def _checks(root: Path, objects: Path) -> None:
    """The checks, as sources: the host's Python cannot compile for the machine's; and the eBPF programs."""
    book = root / BOOK.lstrip("/")
    for source in sorted(GUEST.rglob("*.py")):
        target = book / "guest" / source.relative_to(GUEST)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    shutil.copytree(objects, book / "bpf")


def _pick(everything: Path, root: Path) -> None:
    """Copies the programs, what they need to run, and their data."""
    files = [everything / name.lstrip("/") for name in _PROGRAMS]
    files += [everything / "usr/lib/cni" / name for name in _CNI]
    for extension in everything.glob("usr/lib/*/xtables/*.so"):
        files.append(extension)
    for dynload in everything.glob(f"usr/lib/{_PYTHON}/lib-dynload/*.so"):
        if not any(
            word in dynload.name
            for word in (
                "_test",
                "xx",
                "_tkinter",
                "_ssl",
                "_sqlite3",
                "_dbm",
                "_curses",
                "_asyncio",
                "_codecs",
                "readline",
                "_multi",
            )
        ):
            files.append(dynload)
    missing = [str(file.relative_to(everything)) for file in files if not file.exists()]
    if missing:
        raise BuildError(f"Debian {SUITE}'s packages have no {', '.join(missing)}")
    for file in {*files, *elf.libraries(everything, files)}:
        target = root / file.relative_to(everything)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target, follow_symlinks=False)
    for name in _TREES:
        source, target = everything / name.lstrip("/"), root / name.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy2(source, target)
    for name in ("bin", "sbin", "lib", "lib64"):
        if (root / "usr" / name).is_dir():
            (root / name).symlink_to(f"usr/{name}")
    for name, to in _LINKS.items():
        (root / name.lstrip("/")).symlink_to(to)


def _python(everything: Path, root: Path, here: Path) -> None:
    """Compiles Python's library; `here` is a root whose interpreter runs on this machine."""
    library = everything / "usr/lib" / _PYTHON
    modules = {}
    for source in library.rglob("*.py"):
        name = source.relative_to(library)
        if source.is_file() and not any(str(name).startswith(f"{left}/") for left in _LEFT_OUT):
            modules[f"/usr/lib/{_PYTHON}/{name}"] = source
    loader = next(here.glob("usr/lib*/ld-linux-*"))
    libraries = ":".join(str(path) for path in here.glob("usr/lib/*-linux-gnu"))
    program = here / "usr/bin" / _PYTHON
    python.compile_into(modules, root, interpreter=[loader, "--library-path", libraries, program], optimize=0)


def _own(root: Path) -> None:
    """The initramfs's first program, and the directories that things are mounted on."""
    for name in ("dev", "proc", "sys", "run", "tmp", "mnt", "var", "root", "etc"):
        (root / name).mkdir(exist_ok=True)
    # getprotobyname(3), which ipset asks.
    (root / "etc/protocols").write_text("icmp 1 ICMP\ntcp 6 TCP\nudp 17 UDP\nsctp 132 SCTP\n")
    init = root / "init"
    init.write_text(_INIT)
    init.chmod(0o755)
