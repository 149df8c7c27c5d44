"""Kernel configurations: what the parser reads from any text, and from compressed or damaged files."""

from __future__ import annotations

import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taploom.kconfig import ConfigError, parse, parse_bytes, render

names = st.from_regex(r"[A-Z0-9][A-Z0-9_]{0,30}", fullmatch=True)
values = st.one_of(
    st.sampled_from(["y", "m", "n"]),
    st.integers(-(2**31), 2**63).map(str),
    st.integers(0, 2**64).map(hex),
    st.text(st.characters(codec="ascii", exclude_categories=["Cc"], exclude_characters='"'), max_size=30).map(
        lambda text: f'"{text}"'
    ),
)
configurations = st.dictionaries(names, values, max_size=40)


@given(configurations)
def test_what_is_rendered_is_read_back(symbols: dict[str, str]) -> None:
    assert parse(render(symbols)) == symbols


@given(configurations, st.sampled_from(["\n", "\r\n"]))
def test_line_ends_do_not_matter(symbols: dict[str, str], end: str) -> None:
    assert parse(render(symbols).replace("\n", end)) == symbols


@given(configurations.filter(bool), st.booleans())
def test_compressed_or_not(symbols: dict[str, str], compressed: bool) -> None:
    data = render(symbols).encode()
    assert parse_bytes(gzip.compress(data) if compressed else data) == symbols


@given(st.text())
def test_any_text_is_read(text: str) -> None:
    for name, value in parse(text).items():
        assert name
        assert value == value.strip()


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        assert parse_bytes(data)
    except ConfigError as error:
        assert str(error)


@given(configurations.filter(bool), st.data())
def test_a_cut_gzip_is_refused(symbols: dict[str, str], data: st.DataObject) -> None:
    whole = gzip.compress(render(symbols).encode())
    cut = data.draw(st.integers(2, len(whole) - 9))
    with pytest.raises(ConfigError, match="gzip"):
        parse_bytes(whole[:cut])


def test_comments_and_what_only_looks_like_a_symbol() -> None:
    text = "\n".join(
        [
            "#",
            "# Automatically generated file; DO NOT EDIT.",
            "# CONFIG_OFF is not set",
            "CONFIG_ON=y",
            "CONFIG_TWICE=m",
            "CONFIG_TWICE=y",
            "  CONFIG_INDENTED=m",
            "# CONFIG_TALK is about something",
            "NOCONFIG_X=y",
            'CONFIG_TEXT="a=b # c"',
            "CONFIG_EMPTY=",
        ]
    )
    assert parse(text) == {
        "OFF": "n",
        "ON": "y",
        "TWICE": "y",
        "INDENTED": "m",
        "TEXT": '"a=b # c"',
        "EMPTY": "",
    }


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no line"),
        (b"hello\n", "no line"),
        (b"\x7fELF\x02\0\0", "binary"),
        (b"\x28\xb5\x2f\xfd....", "not with gzip"),
        (b"\xfd7zXZ\0", "not with gzip"),
        (b"BZh9", "not with gzip"),
        (gzip.compress(b"\n" * (17 << 20), mtime=0), "larger than"),
    ],
)
def test_other_files_are_named_for_what_they_are(data: bytes, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_bytes(data)


def test_a_byte_order_mark_and_other_encodings() -> None:
    assert parse_bytes(b"\xef\xbb\xbfCONFIG_A=y\n") == {"A": "y"}
    assert parse_bytes(b"# \xe9\nCONFIG_A=y\n") == {"A": "y"}
