"""kernel/verify on the host: what the machine's console says, the table, the command's arguments."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kernel.verification import cli
from kernel.verification.guest.check import CHECKS
from kernel.verification.guest.main import MARK
from kernel.verification.report import Report, select, table


def said(kind: str, **fields: Any) -> str:
    return "\n" + MARK + json.dumps({"kind": kind, **fields}) + "\n"


def result(name: str, ok: bool = True, detail: str = "seen") -> str:
    return said("result", name=name, ok=ok, detail=detail, seconds=1.5)


@pytest.fixture
def report() -> Report:
    return Report(select(["vxlan", "geneve"]))


def test_results_are_read_from_between_the_kernels_messages(report: Report) -> None:
    text = "[    0.1] Linux version" + said("boot", kernel="6.12.1", machine="x86_64", seconds=3.2)
    text += said("start", name="vxlan") + "[    5.0] vx0: link up" + result("vxlan")
    messages = []
    for start in range(0, len(text), 7):  # as it comes from a console: in pieces
        messages += report.feed(text[start : start + 7])
    assert [message["kind"] for message in messages] == ["boot", "start", "result"]
    assert report.kernel == "6.12.1 x86_64"
    assert report.boot_seconds == 3.2
    assert report.results["vxlan"]["ok"]
    assert not report.running


def test_a_line_that_something_was_printed_into_is_passed_over(report: Report) -> None:
    whole = result("vxlan").strip()
    assert report.feed(whole[:30] + "[   3.2] oops\n" + whole[30:] + "\n" + MARK + "[1]\n") == []
    assert len(report.feed(result("vxlan"))) == 1


def test_a_check_without_a_result_has_failed_and_says_why(report: Report) -> None:
    report.feed(result("vxlan") + said("start", name="geneve"))
    rows = {row["name"]: row for row in report.rows("the machine ended by itself")}
    assert rows["vxlan"]["ok"]
    assert not rows["geneve"]["ok"]
    assert rows["geneve"]["detail"] == "it was running when the machine ended by itself"
    assert rows["kernel-log"]["detail"] == "not reached: the machine ended by itself"


def test_the_end_is_seen(report: Report) -> None:
    report.feed(said("end", ok=True, seconds=99.0))
    assert report.ended
    assert report.seconds == 99.0


def test_the_table_has_a_heading_per_group_and_names_the_reason(report: Report) -> None:
    report.feed(result("vxlan", detail="22 packets") + result("geneve", ok=False, detail="Unknown device type"))
    lines = table(report.rows("…")).splitlines()
    assert lines[0] == "tunnels"
    assert lines[1].split()[:2] == ["vxlan", "ok"]
    assert lines[2].strip() == "-> 22 packets"
    assert lines[3].split()[:2] == ["geneve", "FAILED"]
    assert lines[4].strip() == "BECAUSE Unknown device type"


def test_checks_are_chosen_by_name_and_by_group_in_the_tables_order() -> None:
    assert [check.name for check in select(["geneve", "veth"])] == ["veth", "geneve"]
    assert {check.group for check in select(["IPsec"])} == {"IPsec"}
    assert select([]) == list(CHECKS.values())
    with pytest.raises(ValueError, match="no check or group is called vxlam"):
        select(["vxlam"])


def test_every_feature_that_is_promised_has_a_check() -> None:
    promised = """
        only-lo vsock-host no-vsock-loopback overlayfs cgroup-controllers seccomp user-namespaces veth vlan bridge
        bridge-vlan-filtering tap dummy ifb macvlan ipvlan-l2 ipvlan-l3 vxlan geneve gre wireguard nft-dnat
        nft-masquerade nft-redirect nft-tproxy iptables-nft-dnat conntrack htb tbf netem police esp-aes-gcm
        esp-aes-cbc-hmac bpf-jit bpf-btf bpf-core bpf-tc bpf-xdp bpf-socket-lb bpf-sockmap bpf-maps
        ovs-flows ovs-ct ovs-nat ovs-geneve cni-bridge cni-ptp cni-macvlan cni-ipvlan cni-vlan
        cni-host-local cni-portmap cni-bandwidth cni-tuning cni-firewall cni-loopback
    """
    assert set(promised.split()) <= set(CHECKS)


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in listed] == list(CHECKS)
    assert cli.main(["--list", "--only", "tunnels"]) == 0
    assert capsys.readouterr().out.startswith("tunnels\n  vxlan ")


def test_errors_say_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--only", "nothing-like-it"]) == 2
    assert "--list shows them" in capsys.readouterr().err
    assert cli.main(["--kernel", "/nonexistent"]) == 2
    assert "kernel/build --arch x86_64" in capsys.readouterr().err
