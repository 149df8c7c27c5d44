"""Finding the configuration to judge: a file, the running kernel's, or one within a kernel image."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from taploom.kconfig import ConfigError, parse_bytes

# Where kernels built with IKCONFIG keep theirs; source: kernel/configs.c
_MARK, _END = b"IKCFG_ST", b"IKCFG_ED"


class SourceError(Exception):
    """There is no configuration to judge; the message says what to do."""


@dataclass(frozen=True)
class Configuration:
    """Symbols, where they come from, and whether what is not among them is off (`complete`) or unknown."""

    origin: str
    symbols: Mapping[str, str]
    complete: bool = True


def from_file(path: Path) -> Configuration:
    """The configuration in a file: text, gzip, or an uncompressed kernel image built with IKCONFIG.

    Raises:
        SourceError: it cannot be read, or is something else.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror or error}") from None
    start = data.find(_MARK + b"\x1f\x8b")
    if start >= 0:
        end = data.find(_END, start)
        data = data[start + len(_MARK) : end if end >= 0 else len(data)]
    try:
        return Configuration(str(path), parse_bytes(data))
    except ConfigError as error:
        raise SourceError(f"{path}: {error}") from None


def candidates(release: str) -> list[Path]:
    """Where a running kernel's configuration may be, best first."""
    return [
        Path("/proc/config.gz"),
        Path(f"/boot/config-{release}"),
        Path(f"/lib/modules/{release}/config"),
        Path(f"/usr/lib/modules/{release}/config"),
        Path(f"/usr/lib/ostree-boot/config-{release}"),
        Path(f"/lib/modules/{release}/build/.config"),
        Path(f"/usr/src/linux-headers-{release}/.config"),
    ]


def running() -> Configuration:
    """The running kernel's configuration; where no file has it, what could be probed by use.

    Raises:
        SourceError: the running kernel is not Linux.
    """
    if platform.system() != "Linux":
        raise SourceError(
            f"this machine runs {platform.system()}, not Linux: give a Linux kernel's configuration with --config FILE"
        )
    release = platform.release()
    for path in candidates(release):
        if path.is_file():
            return from_file(path)
    from host_bridge.kernel.probe import probe

    return Configuration(f"probing the running kernel {release} (no configuration file)", probe(), complete=False)
