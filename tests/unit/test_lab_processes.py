"""What a container's processes are given: users, capabilities, mounts; and their log."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.runtime.bundle import MountSpec, ProcessSpec, capability_names, container_config, process_config
from lab.runtime.errors import InvalidFailure
from lab.runtime.log import MAX_ENTRY, Entry, Log
from lab.runtime.streams import STDERR, STDOUT
from lab.runtime.users import User, resolve

PASSWD = "root:x:0:0:root:/root:/bin/sh\n# a comment\nweb:x:33:34:web:/srv:/bin/sh\nbroken\nnohome:x:40:40\n"
GROUP = "root:x:0:\nweb:x:34:\nlogs:x:44:web,other\n"


@pytest.mark.parametrize(
    ("text", "user"),
    [
        ("", User(0, 0, (), "/root")),
        ("root", User(0, 0, (), "/root")),
        ("web", User(33, 34, (44,), "/srv")),
        ("33", User(33, 34, (44,), "/srv")),
        ("web:logs", User(33, 44, (), "/srv")),
        ("web:7", User(33, 7, (), "/srv")),
        ("1000", User(1000, 0, (), "/")),
        ("1000:1001", User(1000, 1001, (), "/")),
    ],
)
def test_users(text: str, user: User) -> None:
    assert resolve(text, PASSWD, GROUP) == user


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nosuch", "unable to find user nosuch: no matching entries in passwd file"),
        ("web:nosuch", "unable to find group nosuch: no matching entries in group file"),
        ("99999999999", "uids and gids must be in range 0-2147483647"),
    ],
)
def test_nobody(text: str, message: str) -> None:
    with pytest.raises(InvalidFailure) as caught:
        resolve(text, PASSWD, GROUP)
    assert str(caught.value) == message


@given(st.text(max_size=30), st.text(max_size=200), st.text(max_size=200))
def test_any_files_give_a_user_or_a_reason(text: str, passwd: str, group: str) -> None:
    try:
        user = resolve(text, passwd, group)
    except InvalidFailure:
        return
    assert user.uid >= 0
    assert user.gid >= 0


def test_capabilities() -> None:
    def names(**spec: object) -> list[str]:
        return capability_names(ProcessSpec(("x",), **spec))  # type: ignore[arg-type]

    default = names()
    assert "NET_RAW" in default
    assert "NET_ADMIN" not in default
    assert "NET_ADMIN" in names(add_capabilities=("net_admin",))
    assert "CHOWN" not in names(drop_capabilities=("CAP_CHOWN",))
    assert names(drop_capabilities=("ALL",)) == []
    assert names(drop_capabilities=("ALL",), add_capabilities=("CHOWN",)) == ["CHOWN"]
    assert names(add_capabilities=("ALL",)) == names(privileged=True)
    assert "CHOWN" not in names(add_capabilities=("ALL",), drop_capabilities=("CHOWN",))
    with pytest.raises(InvalidFailure):
        names(add_capabilities=("FLY",))


def test_configuration() -> None:
    process = process_config(ProcessSpec(("a",), ("X=1",), terminal=True, columns=7), User(3, 4, (5,), "/h"))
    assert process["env"] == ["X=1", "HOME=/h"]
    assert process["user"] == {"uid": 3, "gid": 4, "additionalGids": [4, 5]}
    assert process["consoleSize"] == {"width": 7, "height": 24}
    config = container_config(
        process,
        root=Path("/r"),
        writable=False,
        hostname="h",
        domainname="",
        files={"/etc/hosts": Path("/x/hosts"), "/etc/resolv.conf": Path("/x/resolv.conf")},
        mounts=[MountSpec("/s", "/a/b", False), MountSpec("", "/a", True), MountSpec("/m", "/etc/hosts", True)],
        netns="/n",
        privileged=False,
        fresh_run=True,
    )
    targets = [mount["destination"] for mount in config["mounts"]]
    assert targets.index("/a") < targets.index("/a/b")
    assert targets.count("/etc/hosts") == 1
    assert config["root"] == {"path": "/r", "readonly": True}
    assert {"type": "network", "path": "/n"} in config["linux"]["namespaces"]
    assert "domainname" not in config


async def entries(log: Log, tail: int | None = None) -> list[Entry]:
    return [entry async for entry in log.read(follow=False, tail=tail)]


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "log")


async def test_a_log_has_lines(log: Log) -> None:
    assert await entries(log) == []
    log.start()
    log.write(STDOUT, b"one\ntw")
    log.write(STDERR, b"error\n")
    log.write(STDOUT, b"o\n" + b"x" * (MAX_ENTRY + 1))
    assert [(entry.stream, entry.data) for entry in await entries(log)] == [
        (STDOUT, b"one\n"),
        (STDERR, b"error\n"),
        (STDOUT, b"two\n"),
        (STDOUT, b"x" * MAX_ENTRY),
    ]
    log.end()
    everything = await entries(log)
    assert everything[-1].data == b"x"
    for count in range(7):
        assert await entries(log, count) == everything[len(everything) - min(count, 5) :]
    log.start()
    log.write(STDOUT, b"again\n")
    log.end()
    assert (await entries(log, 1))[0].data == b"again\n"


async def test_half_an_entry_at_the_end_goes(log: Log, tmp_path: Path) -> None:
    log.start()
    log.write(STDOUT, b"whole\nhalf\n")
    log.end()
    whole = (tmp_path / "log").read_bytes()
    (tmp_path / "log").write_bytes(whole[:-3])
    log.start()
    log.write(STDOUT, b"next\n")
    log.end()
    assert [entry.data for entry in await entries(log)] == [b"whole\n", b"next\n"]


@given(st.lists(st.tuples(st.sampled_from([STDOUT, STDERR]), st.binary(max_size=40)), max_size=20))
async def test_nothing_of_a_stream_is_lost(chunks: list[tuple[int, bytes]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        log = Log(Path(directory, "log"))
        log.start()
        for stream, data in chunks:
            log.write(stream, data)
        log.end()
        found = await entries(log)
        for stream in (STDOUT, STDERR):
            written = b"".join(data for number, data in chunks if number == stream)
            assert b"".join(entry.data for entry in found if entry.stream == stream) == written
        assert [entry.time for entry in found] == sorted(entry.time for entry in found)
