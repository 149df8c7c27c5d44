"""The kernel's fragments: how they are read, merged and verified, and that consumers get what they require."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_bridge.kernel.check import judge
from host_bridge.kernel.needs import CONSUMERS, Consumer, Level, alternatives
from images.common.tools import BuildError
from kernel.builder.fragments import ARCHITECTURES, FRAGMENTS, Fragment, lost, merge, read_fragment, read_fragments

# Kconfig turns these on with what our fragments request; kernel/build proves it with the whole configuration.
SELECTED = frozenset(
    [
        "VIRTIO",
        "BPF",
        "FIB_RULES",
        "XFRM",
        "XFRM_ALGO",
        "XFRM_OFFLOAD",
        "NF_DEFRAG_IPV4",
        "NF_DEFRAG_IPV6",
        "NF_CONNTRACK_OVS",
        "NETFILTER_CONNCOUNT",
        "NF_NAT_FTP",
        "NF_NAT_TFTP",
        "CRYPTO_GHASH",
        "INET_XFRM_TUNNEL",
        "INET6_XFRM_TUNNEL",
        "INET_TUNNEL",
        "INET6_TUNNEL",
    ]
)
# Profiles of mandatory access are the one thing that is left out: a VM is the boundary.
LEFT_OUT = {"SECURITY_APPARMOR|SECURITY_SELINUX"}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("consumer", CONSUMERS, ids=lambda consumer: consumer.key)
def test_every_consumer_gets_what_it_needs(arch: str, consumer: Consumer) -> None:
    requested = merge(read_fragments(arch)) | dict.fromkeys(SELECTED, "y")
    verdict = judge(consumer, requested, builtin=True)
    assert verdict.answer == "yes", verdict.bad
    assert {finding.symbol for finding in verdict.lost} <= LEFT_OUT


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nothing_is_a_module_and_vsock_has_no_loopback(arch: str) -> None:
    requested = merge(read_fragments(arch))
    assert "m" not in requested.values()
    assert requested["MODULES"] == "n"
    assert requested["VSOCKETS_LOOPBACK"] == "n"


def test_each_fragment_says_who_needs_it() -> None:
    for path in FRAGMENTS.glob("*.config"):
        assert path.read_text().startswith("# "), f"{path.name} does not start with a comment"


def test_a_line_that_is_nothing_is_refused(tmp_path: Path) -> None:
    for line in ("CONFIG_A", "A=y", "# CONFIG_A is not", "config A", "#CONFIG"):
        path = tmp_path / "x.config"
        path.write_text(f"# why\nCONFIG_B=y\n{line}\n")
        if line == "#CONFIG":
            read_fragment(path)
            continue
        with pytest.raises(BuildError, match=r"x\.config:3"):
            read_fragment(path)


def test_a_symbol_twice_in_a_fragment_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.config"
    path.write_text("CONFIG_A=y\n# CONFIG_A is not set\n")
    with pytest.raises(BuildError, match="CONFIG_A occurs twice"):
        read_fragment(path)


def test_fragments_that_disagree_are_named() -> None:
    with pytest.raises(BuildError, match=r"CONFIG_A is y in one.config and n in two.config"):
        merge([Fragment("one.config", {"A": "y"}), Fragment("two.config", {"A": "n"})])
    assert merge([Fragment("one.config", {"A": "y"}), Fragment("two.config", {"A": "y", "B": "n"})]) == {
        "A": "y",
        "B": "n",
    }


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(BuildError, match="known: x86_64, arm64"):
        read_fragments("riscv64")


def test_symbols_that_did_not_survive_are_named() -> None:
    requested = {"A": "y", "B": "y", "C": "n", "D": "n", "E": "64", "F": "y", "G": '"x"'}
    result = {"A": "y", "B": "n", "C": "y", "E": "32", "G": '"x"'}
    lines = lost(requested, result)
    assert [line.split("=")[0].split()[0] for line in lines] == ["CONFIG_B", "CONFIG_C", "CONFIG_E", "CONFIG_F"]


symbol_maps = st.dictionaries(st.sampled_from("ABCDEFGH"), st.sampled_from(["y", "m", "n", "5"]))


@given(symbol_maps, symbol_maps)
def test_lost_is_empty_only_when_all_survived(requested: dict[str, str], result: dict[str, str]) -> None:
    survived = all(result.get(name, "n") == value for name, value in requested.items())
    assert (lost(requested, result) == []) == survived
    assert lost(requested, requested) == []


def test_every_alternative_is_a_name() -> None:
    for consumer in CONSUMERS:
        for need in consumer.needs:
            assert need.symbols
            assert need.loss
            for symbol in need.symbols:
                for name in alternatives(symbol):
                    assert name.replace("_", "").isalnum()
                    assert name == name.upper()


def test_only_vsock_loopback_is_forbidden() -> None:
    found = {
        symbol
        for consumer in CONSUMERS
        for need in consumer.needs
        if need.level is Level.FORBIDDEN
        for symbol in need.symbols
    }
    assert found == {"VSOCKETS_LOOPBACK"}
