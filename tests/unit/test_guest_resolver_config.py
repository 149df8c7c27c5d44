"""The resolver's configuration, and resolv.conf written and given back."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_guest.resolver.config import ConfigError, ResolverConfig, Upstream, parse_upstream
from agent_guest.resolver.hostsfile import Host
from agent_guest.resolver.resolvconf import MARK, ResolvConf, content
from taploom.contracts.taploom.guest.v1 import HostEntry, Resolver

PLAIN = ResolverConfig(enabled=True)
X = ResolverConfig(enabled=True, search=("x",))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("192.0.2.1", Upstream("192.0.2.1")),
        ("192.0.2.1:5353", Upstream("192.0.2.1", 5353)),
        ("2001:db8::1", Upstream("2001:db8::1")),
        ("[2001:db8::1]", Upstream("2001:db8::1")),
        ("[2001:db8::1]:54", Upstream("2001:db8::1", 54)),
        ("fe80::1%eth0", Upstream("fe80::1%eth0")),
        ("[fe80::1%eth0]:53", Upstream("fe80::1%eth0")),
        ("127.0.0.11:54", Upstream("127.0.0.11", 54)),
    ],
)
def test_upstreams(text: str, expected: Upstream) -> None:
    assert parse_upstream(text) == expected
    assert parse_upstream(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    ["", "dns.example", "192.0.2.1:0", "192.0.2.1:65536", "192.0.2.1:", "[192.0.2.1]:53", "1.2.3", "[::1", "127.0.0.11",
     "127.0.0.11:53", "0.0.0.0", "ff02::1", "192.0.2.1/32", "fe80::1%a b", "192.0.2.1:５３"],
)  # fmt: skip
def test_bad_upstreams(text: str) -> None:
    with pytest.raises(ConfigError, match="upstreams"):
        parse_upstream(text)


@given(st.text(max_size=30))
def test_any_text_is_an_upstream_or_is_refused(text: str) -> None:
    try:
        upstream = parse_upstream(text)
    except ConfigError:
        return
    assert parse_upstream(str(upstream)) == upstream


def test_a_configuration_is_checked() -> None:
    parsed = ResolverConfig.parse(
        Resolver(enabled=True, upstreams=["192.0.2.1"] * 5, search=["a.b"], options=["ndots:2"], hostname="web.")
    )
    assert len(parsed.upstreams) == 5 and parsed.hostname == "web" and parsed.hosts is None and parsed.serves
    assert not ResolverConfig.parse(Resolver(enabled=True, direct=True)).serves
    hosts = [HostEntry(address="fd00::1", names=["a_b", "Ä.b"])]
    assert ResolverConfig.parse(Resolver(hosts=hosts)).hosts is None
    assert ResolverConfig.parse(Resolver(manage_hosts=True, hosts=hosts)).hosts == (Host("fd00::1", ("a_b", "Ä.b")),)
    for bad in (
        Resolver(search=["a b"]),
        Resolver(search=["a\nnameserver 6.6.6.6"]),
        Resolver(search=[""]),
        Resolver(options=["ndots:1 debug"]),
        Resolver(options=["a\nb"]),
        Resolver(hostname="a b"),
        Resolver(hostname="x" * 64),
        Resolver(manage_hosts=True, hosts=[HostEntry(address="192.0.2.1/24", names=["a"])]),
        Resolver(manage_hosts=True, hosts=[HostEntry(address="192.0.2.1")]),
        Resolver(manage_hosts=True, hosts=[HostEntry(address="192.0.2.1", names=[""])]),
        Resolver(manage_hosts=True, hosts=[HostEntry(address="192.0.2.1", names=["a", "b\n6.6.6.6 bank"])]),
        Resolver(manage_hosts=True, hosts=[HostEntry(address="fe80::1%a\n6.6.6.6", names=["a"])]),
        Resolver(manage_hosts=True, hosts=[HostEntry(address="192.0.2.1", names=["a#"])]),
        Resolver(manage_hosts=True, hosts=[HostEntry(address="192.0.2.1", names=["a"])] * 4097),
    ):
        with pytest.raises(ConfigError):
            ResolverConfig.parse(bad)


def lines(**values: object) -> list[str]:
    return content(ResolverConfig.parse(Resolver(enabled=True, **values))).decode().splitlines()[1:]  # type: ignore[arg-type]


def test_the_file_is_what_docker_writes() -> None:
    """As dockerd 20.10 wrote them for the same options."""
    assert lines() == ["nameserver 127.0.0.11", "options ndots:0"]
    assert lines(search=["."], options=["ndots:0"]) == ["nameserver 127.0.0.11", "options ndots:0"]
    assert lines(options=["rotate"])[-1] == "options rotate ndots:0"
    given = lines(search=["x.example", "y.example"], options=["ndots:3", "timeout:2"], upstreams=["192.0.2.1"])
    assert given == ["search x.example y.example", "nameserver 127.0.0.11", "options ndots:3 timeout:2"]


def test_a_direct_file_has_the_upstreams() -> None:
    assert lines(direct=True) == []
    upstreams = ["192.0.2.1", "[2001:db8::1]:53", "192.0.2.2", "fe80::1%eth0", "192.0.2.3:5353"]
    assert lines(direct=True, search=["a"], options=["timeout:1"], upstreams=upstreams) == [
        "search a",
        "nameserver 192.0.2.1",
        "nameserver 2001:db8::1",
        "nameserver 192.0.2.2",
        "nameserver fe80::1%eth0",
        "options timeout:1",
    ]


@pytest.fixture
def conf(tmp_path: Path) -> tuple[Path, ResolvConf]:
    return tmp_path / "resolv.conf", ResolvConf(tmp_path / "resolv.conf", tmp_path / "run" / "saved")


def test_a_file_comes_back_with_its_mode(conf: tuple[Path, ResolvConf], tmp_path: Path) -> None:
    path, resolv = conf
    path.write_bytes(b"nameserver 9.9.9.9\n\xff")
    path.chmod(0o640)
    resolv.write(X)
    assert path.read_bytes() == content(X)
    resolv.write(ResolverConfig(enabled=True, direct=True))
    ResolvConf(path, tmp_path / "run" / "saved").write(PLAIN)  # after kill -9: the next agent
    assert path.read_bytes() == content(PLAIN)
    ResolvConf(path, tmp_path / "run" / "saved").restore()
    assert path.read_bytes() == b"nameserver 9.9.9.9\n\xff"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["resolv.conf", "run"]


def test_no_file_and_a_symbolic_link_come_back_as_such(conf: tuple[Path, ResolvConf], tmp_path: Path) -> None:
    path, resolv = conf
    resolv.write(PLAIN)
    resolv.restore()
    assert not path.exists()
    target = tmp_path / "stub.conf"
    target.write_text("nameserver 127.0.0.53\n")
    for value in ("stub.conf", "missing"):
        path.unlink(missing_ok=True)
        path.symlink_to(value)
        resolv.write(PLAIN)
        assert not path.is_symlink() and target.read_text() == "nameserver 127.0.0.53\n"
        resolv.restore()
        assert path.readlink() == Path(value)


def test_what_somebody_else_wrote_since_is_left_alone(conf: tuple[Path, ResolvConf]) -> None:
    path, resolv = conf
    path.write_text("one\n")
    resolv.write(PLAIN)
    path.write_text("two\n")
    resolv.restore()
    assert path.read_text() == "two\n"
    resolv.write(PLAIN)
    resolv.restore()
    assert path.read_text() == "two\n"


def test_a_lost_original_is_not_invented(conf: tuple[Path, ResolvConf], tmp_path: Path) -> None:
    path, resolv = conf
    path.write_bytes(MARK + b"nameserver 127.0.0.11\n")
    resolv.write(PLAIN)
    resolv.restore()
    assert path.read_bytes() == b""
    resolv.restore()


@given(st.binary(max_size=200))
def test_any_content_survives(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    directory = tmp_path_factory.mktemp("conf")
    path = directory / "resolv.conf"
    path.write_bytes(data)
    resolv = ResolvConf(path, directory / "saved")
    resolv.write(PLAIN)
    resolv.restore()
    assert path.read_bytes() == (data if not data.startswith(MARK) else b"")
