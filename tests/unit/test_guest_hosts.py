"""The hosts file: written, kept up beside others' lines, given back."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_guest.resolver.hostsfile import LOCALHOST, Host, HostsFile, Record, RecordError, content, merge

WEB = Host("172.18.0.2", ("web.example", "web"))
WEB_BACK = Host("172.19.0.2", ("web.example", "web"))
EXTRA = Host("2001:db8::1", ("Extra",))


@pytest.fixture
def hosts(tmp_path: Path) -> tuple[Path, HostsFile]:
    return tmp_path / "hosts", HostsFile(tmp_path / "hosts", tmp_path / "run" / "saved")


def test_the_file_is_what_docker_writes() -> None:
    """As dockerd 20.10 wrote it for --add-host Extra:2001:db8::1 --hostname web --domainname example."""
    assert content([EXTRA, WEB]) == (
        b"127.0.0.1\tlocalhost\n"
        b"::1\tlocalhost ip6-localhost ip6-loopback\n"
        b"fe00::0\tip6-localnet\n"
        b"ff00::0\tip6-mcastprefix\n"
        b"ff02::1\tip6-allnodes\n"
        b"ff02::2\tip6-allrouters\n"
        b"2001:db8::1\tExtra\n"
        b"172.18.0.2\tweb.example web\n"
    )


def test_a_file_comes_back_and_keeps_its_inode(hosts: tuple[Path, HostsFile], tmp_path: Path) -> None:
    path, file = hosts
    path.write_bytes(b"127.0.0.1 localhost\n\xff")
    path.chmod(0o640)
    inode = path.stat().st_ino
    file.write([WEB])
    assert path.read_bytes() == content([WEB])
    file.write([])
    HostsFile(path, tmp_path / "run" / "saved").write([EXTRA])  # after kill -9: the next agent
    assert path.read_bytes() == content([EXTRA])
    HostsFile(path, tmp_path / "run" / "saved").restore()
    assert path.read_bytes() == b"127.0.0.1 localhost\n\xff"
    assert path.stat().st_ino == inode and stat.S_IMODE(path.stat().st_mode) == 0o640
    file.restore()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["hosts", "run"]


def test_no_file_comes_back_as_such(hosts: tuple[Path, HostsFile]) -> None:
    path, file = hosts
    file.write([WEB])
    assert path.read_bytes() == content([WEB]) and stat.S_IMODE(path.stat().st_mode) == 0o644
    file.restore()
    assert not path.exists()


def test_lines_of_others_stay(hosts: tuple[Path, HostsFile]) -> None:
    path, file = hosts
    path.write_text("original\n")
    file.write([WEB])
    with path.open("a") as opened:
        opened.write("192.0.2.7 mine # no line feed")
    file.write([WEB, WEB_BACK])
    assert path.read_text().splitlines()[6:] == [
        "172.18.0.2\tweb.example web",
        "192.0.2.7 mine # no line feed",
        "172.19.0.2\tweb.example web",
    ]
    file.write([WEB_BACK])
    file.write([WEB_BACK])
    kept = [*LOCALHOST, "192.0.2.7 mine # no line feed", "172.19.0.2\tweb.example web"]
    assert path.read_text().splitlines() == kept
    file.restore()
    assert path.read_text().splitlines() == kept
    file.write([])
    assert path.read_text().splitlines() == [*LOCALHOST, "192.0.2.7 mine # no line feed"]


def test_a_lost_or_broken_record_is_begun_anew(hosts: tuple[Path, HostsFile], tmp_path: Path) -> None:
    path, file = hosts
    file.write([WEB])
    (tmp_path / "run" / "saved").write_bytes(b"file 644 1 1 1\n")
    file.restore()
    assert path.read_bytes() == content([WEB])
    file.write([EXTRA])
    assert path.read_bytes() == content([EXTRA])


names = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=2).map(tuple)
entries = st.lists(st.builds(Host, st.sampled_from(["192.0.2.1", "192.0.2.2", "fd00::1"]), names), max_size=5)


@given(entries, entries, st.lists(st.sampled_from(["", "# note", "192.0.2.9 other", "  "]), max_size=4))
def test_a_merge_has_what_is_wanted_and_what_others_wrote(
    before: list[Host], wanted: list[Host], others: list[str]
) -> None:
    current = content(before) + "\n".join(others).encode()
    merged = merge(current, content(before), content(wanted)).decode().split("\n")
    assert set(content(wanted).decode().split("\n")) <= set(merged)
    gone = {line for line in content(before).decode().split("\n") if line not in content(wanted).decode().split("\n")}
    assert not gone & set(merged)
    assert {line for line in others if line} <= set(merged)


@given(st.binary(max_size=60), st.integers(0, 0o7777), st.binary(max_size=60), st.binary(max_size=60), st.booleans())
def test_a_record_is_read_as_it_was_written(first: bytes, mode: int, second: bytes, third: bytes, none: bool) -> None:
    record = Record(None if none else first, mode, second, third)
    assert Record.parse(record.to_bytes()) == record


@given(st.binary(max_size=60) | st.from_regex(rb"\A(file|absent|x) [0-9]{1,4}( [0-3]){3}\n.{0,9}\Z"))
def test_any_bytes_are_a_record_or_are_refused(data: bytes) -> None:
    try:
        record = Record.parse(data)
    except RecordError:
        return
    assert len(record.original or b"") + len(record.before) + len(record.after) <= len(data)


@given(st.binary(max_size=200))
def test_any_content_survives(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    directory = tmp_path_factory.mktemp("hosts")
    path = directory / "hosts"
    path.write_bytes(data)
    file = HostsFile(path, directory / "saved")
    file.write([WEB])
    file.write([EXTRA])
    file.restore()
    assert path.read_bytes() == data
