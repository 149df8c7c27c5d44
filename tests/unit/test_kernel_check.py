"""`taploom kernel check`: verdicts, where configurations come from, probing, output and exit codes."""

from __future__ import annotations

import gzip
import json
import platform
from collections.abc import Iterable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from host_bridge.cli import cli
from host_bridge.kernel import probe, source
from host_bridge.kernel.check import judge
from host_bridge.kernel.needs import CONSUMERS, Consumer, by_key, forbidden, required, useful
from kernel.builder.fragments import merge, read_fragments
from taploom.kconfig import render

EVERYTHING = {
    name: "y"
    for consumer in CONSUMERS
    for need in consumer.needs
    for symbol in need.symbols
    for name in symbol.split("|")
    if name != "VSOCKETS_LOOPBACK"
}
TOY = Consumer("toy", "Toy", (required("A B|C", "all"), useful("D", "some"), forbidden("E", "safety")))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["kernel", "check", *arguments])


def states(symbols: dict[str, str], **options: bool) -> dict[str, str]:
    return {finding.symbol: finding.state for finding in judge(TOY, symbols, **options).findings}


def test_states_and_answers() -> None:
    assert states({"A": "y", "C": "m", "D": "n"}) == {
        "A": "y",
        "B|C": "m",
        "D": "missing",
        "E": "missing",
    }
    assert judge(TOY, {"A": "y", "C": "m"}).answer == "yes"
    assert judge(TOY, {"A": "y", "C": "m"}, builtin=True).answer == "no"
    assert judge(TOY, {"A": "y", "B": "y", "E": "m"}).answer == "no"
    assert [finding.symbol for finding in judge(TOY, {"A": "y", "B": "y", "E": "y"}).bad] == ["E"]
    assert [finding.symbol for finding in judge(TOY, {"A": "y", "B": "y"}).lost] == ["D"]
    assert states({"A": "5", "B": '"x"'})["A"] == "y"


def test_what_is_not_known_is_unknown() -> None:
    verdict = judge(TOY, {"A": "works"}, complete=False)
    assert verdict.answer == "unknown"
    assert {finding.symbol for finding in verdict.unknown} == {"B|C", "E"}
    assert judge(TOY, {"A": "n"}, complete=False).answer == "no"


@given(st.dictionaries(st.sampled_from("ABCDE"), st.sampled_from(["y", "m", "n", "works"])))
def test_more_symbols_never_make_it_worse(symbols: dict[str, str]) -> None:
    before = judge(TOY, symbols)
    after = judge(TOY, symbols | {"A": "y", "B": "y"})
    assert len(after.bad) <= len(before.bad)
    assert (after.answer == "yes") == (symbols.get("E", "n") == "n")


def test_all_that_consumers_need_is_enough() -> None:
    for consumer in CONSUMERS:
        verdict = judge(consumer, EVERYTHING)
        assert verdict.answer == "yes"
        assert not verdict.lost


@pytest.mark.parametrize("consumer", CONSUMERS, ids=lambda consumer: consumer.key)
def test_each_required_symbol_counts(consumer: Consumer) -> None:
    for need in consumer.needs:
        for symbol in need.symbols:
            without = {name: value for name, value in EVERYTHING.items() if name not in symbol.split("|")}
            verdict = judge(consumer, without)
            if need.level.value == "required":
                assert symbol in {finding.symbol for finding in verdict.bad}
            elif need.level.value == "useful":
                assert symbol in {finding.symbol for finding in verdict.lost}


def test_a_file_of_ours_fits_all(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(render(EVERYTHING))
    result = run("--config", str(path))
    assert result.exit_code == 0, result.output
    for consumer in CONSUMERS:
        assert consumer.title in result.output


def test_vsock_loopback_makes_a_guest_unfit(tmp_path: Path) -> None:
    path = tmp_path / "config.gz"
    path.write_bytes(gzip.compress(render(EVERYTHING | {"VSOCKETS_LOOPBACK": "m"}).encode()))
    result = run("--config", str(path), "--json")
    assert result.exit_code == 3
    found = json.loads(result.output)
    answers = {consumer["consumer"]: consumer["answer"] for consumer in found["consumers"]}
    assert answers["taploom-guest"] == answers["taploom-helper"] == "no"
    assert answers["docker"] == answers["cilium"] == "yes"
    assert found["fit"] is False
    assert run("--config", str(path), "--for", "docker", "--for", "cni").exit_code == 0


def test_a_kernel_as_apples_has_no_openvswitch(tmp_path: Path) -> None:
    """The helper needs a kernel of its own where guests run Virtualization.framework's usual one."""
    off = {"OPENVSWITCH", "IFB", "BPF_STREAM_PARSER", "BRIDGE_VLAN_FILTERING", "INET_ESP", "BPF_JIT", "KPROBES"}
    path = tmp_path / "config"
    path.write_text(render({name: "n" if name in off else value for name, value in EVERYTHING.items()}))
    answers = {
        consumer["consumer"]: consumer["answer"]
        for consumer in json.loads(run("--config", str(path), "--json").output)["consumers"]
    }
    assert answers == {
        "taploom-guest": "yes",
        "taploom-helper": "no",
        "ovs-ovn": "no",
        "docker": "yes",
        "cni": "yes",
        "cilium": "no",
    }


def test_only_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(render({name: value for name, value in EVERYTHING.items() if name != "WIREGUARD"}))
    result = run("--config", str(path), "--missing", "--for", "cilium")
    lines = [line for line in result.output.splitlines() if line.startswith("!")]
    assert len(lines) == 1
    assert "WIREGUARD" in lines[0]
    assert "missing" in lines[0]
    assert "encryption with WireGuard" in lines[0]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot read"),
        (b"\x7fELF\0", "binary"),
        (b"hello", "no line like"),
        (gzip.compress(b"x", mtime=0)[:-9], "gzip"),
    ],
)
def test_errors_say_what_is_wrong(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "config"
    if content is not None:
        path.write_bytes(content)
    result = run("--config", str(path))
    assert result.exit_code == 1
    assert says in result.output


def test_wrong_usage() -> None:
    assert run("--config", "x", "--running").exit_code == 2
    assert run("--for", "nobody").exit_code == 2


def test_a_kernel_image_with_its_configuration_inside(tmp_path: Path) -> None:
    path = tmp_path / "Image"
    inside = gzip.compress(render({"NET": "y", "IKCONFIG": "y"}).encode())
    path.write_bytes(b"MZ\0\0" * 100 + b"IKCFG_ST" + inside + b"IKCFG_ED" + b"\0" * 50)
    assert source.from_file(path).symbols == {"NET": "y", "IKCONFIG": "y"}


def test_this_machines_kernel() -> None:
    found = source.running()
    assert found.symbols.get("NET", "works") in {"y", "works"}
    result = run("--running", "--json")
    assert json.loads(result.output)["config"] == found.origin
    assert result.exit_code in {0, 3}


def test_another_system_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    result = run("--running")
    assert result.exit_code == 1
    assert "--config FILE" in result.output


def test_probing_agrees_with_the_configuration_where_there_is_one() -> None:
    found = source.running()
    probed = probe.probe()
    assert probed["NET_NS"] == "works"
    if not found.complete:
        return
    wrong = {
        name: (value, found.symbols.get(name, "n"))
        for name, value in probed.items()
        if (value == "n") != (found.symbols.get(name, "n") == "n")
    }
    assert not wrong


def test_functions_of_modules_and_of_the_kernel() -> None:
    text = "\n".join(_kallsyms(["ovs_dp_process_packet [openvswitch]", "ip_vs_conn_new", "fib4_rule_action.isra.0"]))
    found = probe.functions(text, modules=True)
    assert found == {"OPENVSWITCH": "m", "IP_VS": "y", "IP_MULTIPLE_TABLES": "y"}
    assert probe.functions(text, modules=False)["VSOCKETS_LOOPBACK"] == "n"
    assert probe.functions("0 T one\n", modules=True) == {}


def _kallsyms(names: Iterable[str]) -> list[str]:
    filler = [f"0000000000000000 t filler_{number}" for number in range(2000)]
    return filler + [f"0000000000000000 T {' '.join(name.split())}" for name in names]


def test_keys_are_unique_and_our_fragments_are_known() -> None:
    assert len(by_key()) == len(CONSUMERS)
    assert merge(read_fragments("x86_64"))["OPENVSWITCH"] == "y"
