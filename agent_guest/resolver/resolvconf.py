"""/etc/resolv.conf (resolv.conf(5)): written for the resolver, and given back as it was."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

from .config import RESOLVER_ADDRESS, ResolverConfig

MARK = b"# Written by taploom's guest agent; the file that was here comes back when its resolver stops.\n"
_FILE, _LINK, _ABSENT = b"file", b"symlink", b"absent"


def content(config: ResolverConfig) -> bytes:
    """The file as Docker writes it: search domains, servers, options, each line only where there is something to say.

    When the resolver answers, it is the only server, and ndots:0 is added when no ndots is given. A direct
    configuration has the upstreams, without those on another port than 53, which resolv.conf(5) cannot say.
    """
    options = list(config.options)
    servers = [RESOLVER_ADDRESS]
    if config.direct:
        servers = [upstream.host for upstream in config.upstreams if upstream.port == 53]
    elif not config.has_ndots:
        options.append("ndots:0")
    lines = [f"nameserver {server}" for server in servers]
    if config.search and config.search != (".",):  # Docker's way to say: none
        lines.insert(0, "search " + " ".join(config.search))
    if options:
        lines.append("options " + " ".join(options))
    return MARK + "".join(line + "\n" for line in lines).encode()


class ResolvConf:
    """One resolv.conf. What was there is kept in ``saved``, which outlives the agent but not the VM's boot."""

    def __init__(self, path: Path, saved: Path) -> None:
        self._path = path
        self._saved = saved

    def is_ours(self) -> bool:
        """Whether what is there now was written by an agent."""
        try:
            current = self._read()
        except OSError:
            return False
        return current is not None and current.startswith(MARK)

    def write(self, config: ResolverConfig) -> None:
        """Puts ours in place; what was there is saved first, unless it is ours already. Raises OSError."""
        wanted = content(config)
        current = self._read()
        if current == wanted and not self._path.is_symlink():
            return
        if current is None or not current.startswith(MARK):
            self._save(current)
        self._replace(wanted)

    def restore(self) -> None:
        """Puts back what was there, if what is there now is ours. Raises OSError."""
        current = self._read()
        if current is None or not current.startswith(MARK):
            return  # somebody else has written it since: theirs counts
        kind, _, rest = self._load().partition(b"\n")
        mode, _, body = rest.partition(b"\n")
        if kind == _LINK:
            self._restore_link(os.fsdecode(body))
        elif kind == _ABSENT:
            try:
                self._path.unlink()
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                self._replace(b"")
        else:
            self._replace(body, int(mode, 8) if mode else 0o644)
        self._saved.unlink(missing_ok=True)

    def _read(self) -> bytes | None:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None  # also a symbolic link to nowhere

    def _save(self, current: bytes | None) -> None:
        if self._path.is_symlink():
            record = b"%s\n\n%s" % (_LINK, os.fsencode(self._path.readlink()))
        elif current is None:
            record = b"%s\n\n" % _ABSENT
        else:
            mode = stat.S_IMODE(self._path.stat().st_mode)
            record = b"%s\n%o\n%s" % (_FILE, mode, current)
        self._saved.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write_new(self._saved, record, 0o600)

    def _load(self) -> bytes:
        try:
            return self._saved.read_bytes()
        except FileNotFoundError:
            return b"%s\n644\n" % _FILE  # lost: an empty file is all that can honestly be given back

    def _restore_link(self, target: str) -> None:
        temporary = self._path.with_name(f".{self._path.name}.taploom")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        temporary.replace(self._path)

    def _replace(self, data: bytes, mode: int | None = None) -> None:
        if mode is None:
            try:
                mode = stat.S_IMODE(self._path.stat().st_mode)
            except FileNotFoundError:
                mode = 0o644
        try:
            _write_new(self._path, data, mode)
        except OSError as error:
            # A bind mount cannot be renamed over (EBUSY), nor a file in a read-only directory be made beside it.
            if error.errno not in (errno.EBUSY, errno.EROFS, errno.EACCES, errno.EPERM, errno.EXDEV):
                raise
            _write_in_place(self._path, data)


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """Replaces the file atomically."""
    temporary = path.with_name(f".{path.name}.taploom")
    try:
        temporary.unlink(missing_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, mode)
            file.write(data)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _write_in_place(path: Path, data: bytes) -> None:
    """Overwrites, then cuts: a reader in between never sees an empty file."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.ftruncate(fd, len(data))
