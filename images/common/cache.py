"""A cache of directories by content hash: what was built from the same inputs is not built again."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

DEFAULT_CACHE = Path(os.environ.get("TAPLOOM_CACHE", "/var/cache/taploom"))
_KEEP = 4


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inputs_hash(texts: Iterable[str], files: Iterable[Path], base: Path) -> str:
    """One SHA-256 (hex) over texts in their order, and over files' names below ``base``, modes and contents, sorted.

    Folders among ``files`` stand for all that is in them, without __pycache__.
    """
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"text {len(text.encode())}\n{text}\n".encode())
    found: set[Path] = set()
    for path in files:
        if path.is_dir():
            found |= {file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts}
        else:
            found.add(path)
    for file in sorted(found):
        executable = os.access(file, os.X_OK)
        digest.update(f"file {file.relative_to(base)} {executable:d} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on a file: builds of the same thing wait for each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def cached(cache: Path, kind: str, key: str, build: Callable[[Path], None]) -> tuple[Path, bool]:
    """The directory that ``build`` filled for this key, now or earlier.

    Args:
        cache: the cache's root.
        kind: a folder below it, such as "guest-initfs/x86_64"; the newest few keys of a kind are kept.
        key: the hash of all inputs.
        build: fills the empty directory that it is given. When it fails nothing is kept.

    Returns:
        The directory, not to be written to, and whether it was there already.
    """
    folder = cache / kind
    place = folder / key
    with locked(cache / "locks" / kind.replace("/", "-")):
        if place.is_dir():
            os.utime(place)
            return place, True
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".new-*"):  # by a build that was killed: the lock is ours
            shutil.rmtree(left, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
        try:
            work.chmod(0o755)
            build(work)
            work.rename(place)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        old = sorted(
            (entry for entry in folder.iterdir() if entry != place and not entry.name.startswith(".")),
            key=lambda entry: entry.stat().st_mtime,
        )
        for entry in old[: max(0, len(old) - _KEEP + 1)]:
            shutil.rmtree(entry, ignore_errors=True)
    return place, False


def publish(built: Path, output: Path) -> None:
    """Makes ``output`` a copy of a directory, file by file; files that are the same already are not touched.

    Each file is replaced by a rename: who has the old one open (a QEMU that boots from it) keeps it. Several that
    publish to one place do it one after the other.
    """
    output.mkdir(parents=True, exist_ok=True)
    lock = os.open(output, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _publish(built, output)
    finally:
        os.close(lock)


def _publish(built: Path, output: Path) -> None:
    wanted = {path.relative_to(built) for path in built.rglob("*") if not path.is_dir()}
    for path in sorted(output.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(output) not in wanted:
            path.unlink()
    for name in sorted(wanted):
        source, target = built / name, output / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_file() and target.stat().st_size == source.stat().st_size and _same(source, target):
            continue
        handle, temporary = tempfile.mkstemp(prefix=".new-", dir=target.parent)
        os.close(handle)
        shutil.copy2(source, temporary)
        Path(temporary).rename(target)


def _same(one: Path, other: Path) -> bool:
    return file_sha256(one) == file_sha256(other)
