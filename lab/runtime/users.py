"""Who a process in a container is: Docker's USER text, looked up in the container's own files.

Sources: passwd(5), group(5); error texts as runc's libcontainer/user gives them through dockerd.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lab.runtime.errors import InvalidFailure
from lab.runtime.kernel import read_in_root

_MAX_ID = (1 << 31) - 1


@dataclass(frozen=True)
class User:
    """Numbers for the kernel, and the home directory."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


def find_user(root: Path, text: str) -> User:
    """The user of NAME or UID, with :GROUP or :GID; nothing is root.

    Raises:
        InvalidFailure: there is no such user or group.
    """
    return resolve(text, _file(root, "etc/passwd"), _file(root, "etc/group"))


def resolve(text: str, passwd: str, group: str) -> User:
    """As `find_user`, with the contents of the two files."""
    user, _, wanted_group = text.partition(":")
    uid, gid, home, name = 0, 0, "/", ""
    wanted = user or "0"
    number = _number(wanted)
    for fields in _records(passwd, 7):
        entry_uid, entry_gid = _number(fields[2]), _number(fields[3])
        if entry_uid is None or entry_gid is None:
            continue
        if fields[0] == user or (number is not None and entry_uid == number):
            name, uid, gid, home = fields[0], entry_uid, entry_gid, fields[5] or "/"
            break
    else:
        if number is None:
            raise InvalidFailure(f"unable to find user {user}: no matching entries in passwd file")
        uid = _checked(number)
    groups: list[int] = []
    if wanted_group:
        gid = _find_group(wanted_group, group)
    elif name:
        for fields in _records(group, 4):
            entry_gid = _number(fields[2])
            if entry_gid is not None and name in fields[3].split(","):
                groups.append(entry_gid)
    return User(uid, gid, tuple(dict.fromkeys(groups)), home)


def _find_group(text: str, group: str) -> int:
    number = _number(text)
    for fields in _records(group, 4):
        entry = _number(fields[2])
        if entry is not None and (fields[0] == text or (number is not None and entry == number)):
            return entry
    if number is None:
        raise InvalidFailure(f"unable to find group {text}: no matching entries in group file")
    return _checked(number)


def _checked(number: int) -> int:
    if number > _MAX_ID:
        raise InvalidFailure(f"uids and gids must be in range 0-{_MAX_ID}")
    return number


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def _records(text: str, fields: int) -> Iterator[list[str]]:
    for line in text.splitlines():
        record = line.strip().split(":")
        if len(record) >= fields - 1 and not line.startswith("#"):
            yield [*record, *[""] * (fields - len(record))]


def _file(root: Path, path: str) -> str:
    try:
        return read_in_root(root, path).decode("utf-8", "surrogateescape")
    except OSError:
        return ""  # an image need not have it
