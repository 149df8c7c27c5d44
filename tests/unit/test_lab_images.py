"""Names of images, the instructions of `docker import --change`, and tars from anywhere."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.runtime.changes import ChangeError, ImageConfig, apply_changes, parse_ports, split_words, unquote
from lab.runtime.references import ReferenceFormatError, is_id, normalise
from lab.runtime.unpack import UnpackError, unpack


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("busybox", "busybox:latest"),
        ("busybox:1.36", "busybox:1.36"),
        ("docker.io/library/busybox", "busybox:latest"),
        ("index.docker.io/library/busybox:x", "busybox:x"),
        ("library/busybox", "busybox:latest"),
        ("docker.io/me/tool", "me/tool:latest"),
        ("me/tool", "me/tool:latest"),
        ("localhost:5000/a/b:T_1.2-3", "localhost:5000/a/b:T_1.2-3"),
        ("localhost:5000/a", "localhost:5000/a:latest"),
        ("Example.org/a__b", "Example.org/a__b:latest"),
    ],
)
def test_names(text: str, name: str) -> None:
    assert normalise(text) == name
    assert normalise(name) == name


@pytest.mark.parametrize(
    "text", ["", ":", "a:", "a b", "-a", "a-", "a//b", "/a", "a:b:c", "a:" + "t" * 129, "a@b", "\n"]
)
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(ReferenceFormatError):
        normalise(text)


def test_capitals_are_explained() -> None:
    with pytest.raises(ReferenceFormatError, match=r"repository name \(library/Bad\) must be lowercase"):
        normalise("Bad")


@given(st.text(max_size=40))
def test_any_text_is_a_name_or_refused(text: str) -> None:
    with contextlib.suppress(ReferenceFormatError):
        assert normalise(normalise(text)) == normalise(text)
    is_id(text)


def config(*changes: str) -> ImageConfig:
    return apply_changes(ImageConfig(), changes)


def test_commands() -> None:
    assert config('CMD ["a", "b c"]').command == ("a", "b c")
    assert config("cmd a 'b c'").command == ("/bin/sh", "-c", "a 'b c'")
    assert config("CMD [a").command == ("/bin/sh", "-c", "[a")
    assert config("CMD x", "CMD").command == ()
    assert config('ENTRYPOINT ["/init"]').entrypoint == ("/init",)


def test_variables_and_labels() -> None:
    assert config('ENV A=1 B=\'2 3\' C="4\\"5" D=6\\ 7').environment == ("A=1", "B=2 3", 'C=4"5', "D=6 7")
    assert config("ENV A one two").environment == ("A=one two",)
    assert config("ENV A=1", "ENV B=2 A=3").environment == ("A=3", "B=2")
    assert config("LABEL a=b c='d e'", "LABEL c=f").labels == {"a": "b", "c": "f"}


def test_the_others() -> None:
    assert config("EXPOSE 80 53/udp 8000-8002/TCP 80").exposed_ports == (
        *("80/tcp", "53/udp", "8000/tcp", "8001/tcp", "8002/tcp"),
    )
    assert config("WORKDIR /a", "WORKDIR b/../c").working_directory == "/a/c"
    assert config("USER 33:44").user == "33:44"
    assert config("VOLUME /a /b", 'VOLUME ["/c d", "/a"]').volumes == ("/a", "/b", "/c d")
    assert config("STOPSIGNAL SIGUSR1").stop_signal == "SIGUSR1"
    assert config("# nothing", "ENV A=1 \\\n B=2\nUSER x") == ImageConfig(environment=("A=1", "B=2"), user="x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("RUN x", "run is not a valid change command"),
        ("FOO", "foo is not a valid change command"),
        ("ENV a", "ENV must have two arguments"),
        ("ENV =x", "ENV names can not be blank"),
        ("ENV a=b c", 'Syntax error - can\'t find = in "c". Must be of the form: name=value'),
        ("LABEL a", "LABEL must have two arguments"),
        ("EXPOSE", "EXPOSE requires at least one argument"),
        ("EXPOSE x", "Invalid containerPort: x"),
        ("EXPOSE 80/foo", "Invalid proto: foo"),
        ("EXPOSE 70000", "Invalid containerPort: 70000"),
        ("USER", "USER requires exactly one argument"),
        ("WORKDIR", "WORKDIR requires exactly one argument"),
        ("VOLUME []", "VOLUME requires at least one argument"),
    ],
)
def test_refused_changes(change: str, message: str) -> None:
    with pytest.raises(ChangeError) as caught:
        config(change)
    assert str(caught.value) == message


@given(st.text(max_size=60))
def test_any_change_is_applied_or_refused(text: str) -> None:
    for name in ("", "ENV ", "LABEL ", "EXPOSE ", "VOLUME ", "CMD ", "WORKDIR "):
        with contextlib.suppress(ChangeError):
            config(name + text)
    with contextlib.suppress(ChangeError):
        parse_ports(text)


@given(st.lists(st.text(alphabet="ab \\'\"$=", min_size=1, max_size=8), max_size=4))
def test_quoted_words_come_back(values: list[str]) -> None:
    quoted = " ".join('"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"' for value in values)
    assert [unquote(word) for word in split_words(quoted)] == values


def archive(*members: tuple[str, bytes, str]) -> bytes:
    """A tar of (name, type, link's target)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as writer:
        for name, kind, target in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.mode = kind, target, 0o755
            data = b"data" if kind == tarfile.REGTYPE else b""
            member.size = len(data)
            writer.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


FILE, DIRECTORY, SYMLINK, LINK = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
GOOD = archive(
    (".", DIRECTORY, ""), ("./a", DIRECTORY, ""), ("a/f", FILE, ""), ("/abs", FILE, ""), ("l", SYMLINK, "/a/f")
)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_tars_of_every_kind(pack: object, tmp_path: Path) -> None:
    assert callable(pack)
    result = unpack(io.BytesIO(pack(GOOD)), str(tmp_path))
    assert result["size"] == 8
    assert result["digest"] == unpack(io.BytesIO(GOOD), str(tmp_path))["digest"]
    assert (tmp_path / "a/f").read_bytes() == (tmp_path / "abs").read_bytes() == b"data"
    assert str((tmp_path / "l").readlink()) == "/a/f"


def test_nothing_is_an_image_too(tmp_path: Path) -> None:
    assert unpack(io.BytesIO(b""), str(tmp_path))["size"] == 0


@pytest.mark.parametrize(
    "members",
    [
        [("../x", FILE, "")],
        [("a/../../x", FILE, "")],
        [("a", SYMLINK, "../x")],
        [("d/a", SYMLINK, "../../x")],
        [("a", LINK, "../x")],
        [("..", DIRECTORY, "")],
    ],
)
def test_ways_out_are_refused(members: list[tuple[str, bytes, str]], tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(UnpackError, match="outside"):
        unpack(io.BytesIO(archive(*members)), str(root))
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def test_a_later_entry_replaces_a_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    root = tmp_path / "root"
    root.mkdir()
    unpack(io.BytesIO(archive(("x", SYMLINK, str(outside)), ("x", FILE, ""))), str(root))
    assert outside.read_text() == "mine"
    assert (root / "x").read_bytes() == b"data"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\1" * 4096, "archive/tar: invalid tar header"),
        (b"short", "unexpected EOF"),
        (GOOD[:700], "unexpected EOF"),
        (GOOD[:1024] + b"x" * 1024 + GOOD[1024:], "archive/tar: invalid tar header"),
        (gzip.compress(GOOD)[:-20], "unexpected EOF"),
        (lzma.compress(GOOD)[:-20], "unexpected EOF"),
        (bz2.compress(GOOD)[:-20], "unexpected EOF"),
        (b"\x1f\x8b" + b"x" * 100, "archive/tar: invalid tar header"),
    ],
)
def test_what_is_no_tar(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UnpackError) as caught:
        unpack(io.BytesIO(data), str(tmp_path))
    assert str(caught.value) == message


@given(st.binary(max_size=3000), st.integers(0, len(GOOD)), st.integers(0, 600))
def test_no_bytes_do_anything_else(data: bytes, at: int, length: int) -> None:
    import tempfile

    for stream in (data, GOOD[:at] + data[:length] + GOOD[at + length :]):
        with tempfile.TemporaryDirectory() as root, contextlib.suppress(UnpackError):
            json.dumps(unpack(io.BytesIO(stream), root))
