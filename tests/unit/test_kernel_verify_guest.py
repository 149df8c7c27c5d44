"""kernel/verify in the machine: checks are bounded in time and named when they hang; packets are read right."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable

from kernel.verification.guest.check import Check, CheckError, run, step
from kernel.verification.guest.runner import Result, run_checks
from kernel.verification.guest.traffic import describe, ip_protocol, ipv4, udp_port


def check(name: str, function: Callable[[], str | None], seconds: float = 20, alone: bool = True) -> Check:
    """A check that stays in the namespaces of the tests."""
    return Check(name, "test", "test", function, seconds, alone)


def results(*checks: Check, jobs: int = 1) -> dict[str, Result]:
    ended: list[Result] = []
    run_checks(checks, jobs, lambda check: None, ended.append)
    return {result.name: result for result in ended}


def test_what_a_check_returns_is_its_detail() -> None:
    result = results(check("good", lambda: "42 packets"))["good"]
    assert (result.ok, result.detail) == (True, "42 packets")


def test_a_failure_has_its_reason_in_one_line() -> None:
    def bad() -> str:
        raise CheckError("no answer\nfrom b")

    result = results(check("bad", bad))["bad"]
    assert (result.ok, result.detail) == (False, "no answer; from b")


def test_an_unforeseen_error_is_named_with_its_place() -> None:
    result = results(check("broken", lambda: str(1 // 0)))["broken"]
    assert not result.ok
    assert result.detail.startswith("ZeroDivisionError: ")
    assert "test_kernel_verify_guest.py:" in result.detail


def test_a_hung_check_is_ended_and_names_its_last_step() -> None:
    def hangs() -> str:
        step("first")
        step("tc qdisc add dev eth0 root")
        time.sleep(60)
        return ""

    start = time.monotonic()
    found = results(check("hangs", hangs, seconds=0.5), check("next", lambda: "reached"))
    assert time.monotonic() - start < 10
    assert found["hangs"].detail == "hung: no end after 0.5 s, at: tc qdisc add dev eth0 root"
    assert found["next"].ok


def test_a_check_whose_process_dies_has_failed() -> None:
    def dies() -> str:
        step("the last thing")
        os._exit(3)

    assert results(check("dies", dies))["dies"].detail == "its process died, at: the last thing"


def test_a_failing_command_says_what_it_said() -> None:
    def fails() -> str:
        return run("sh", "-c", "echo this is why >&2; exit 3")

    result = results(check("fails", fails))["fails"]
    assert result.detail == "sh -c echo this is why >&2; exit 3: this is why"


def test_a_missing_command_is_named() -> None:
    assert (
        results(check("missing", lambda: run("no-such-tool")))["missing"].detail == "no-such-tool is not in the image"
    )


def test_checks_run_at_once_but_for_those_that_want_to_be_alone() -> None:
    running: list[str] = []
    most = 0

    def started(one: Check) -> None:
        nonlocal most
        if one.alone:
            assert not running
        running.append(one.name)
        most = max(most, len(running))

    checks = [check(f"c{number}", lambda: time.sleep(0.05), alone=number == 3) for number in range(6)]
    run_checks(checks, 2, started, lambda result: running.remove(result.name))
    assert most == 2


def test_all_well_only_when_every_check_is() -> None:
    def bad() -> str:
        raise CheckError("no")

    nothing = (lambda one: None, lambda result: None)
    assert run_checks([check("a", lambda: "")], 1, *nothing)
    assert not run_checks([check("b", bad), check("a", lambda: "")], 1, *nothing)


def udp_frame(port: int) -> bytes:
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 36, 0, 0, 64, 17, 0, bytes([10, 1, 0, 1]), bytes([10, 1, 0, 2]))
    return b"\2" * 12 + b"\x08\x00" + header + struct.pack("!HHHH", 5, port, 16, 0) + b"taploom!"


def test_frames_are_told_apart() -> None:
    frame = udp_frame(4789)
    assert ip_protocol(frame) == 17
    assert udp_port(frame) == 4789
    assert describe(frame) == "10.1.0.1 to 10.1.0.2, protocol 17, port 4789"
    esp = frame[:23] + b"\x32" + frame[24:]
    assert (ip_protocol(esp), udp_port(esp)) == (50, -1)
    arp = frame[:12] + b"\x08\x06" + frame[14:]
    six = frame[:12] + b"\x86\xdd" + bytes(6) + b"\x3a" + bytes(40)
    assert (ip_protocol(arp), ip_protocol(six)) == (-1, 58)
    assert ipv4([arp, frame, six]) == [frame]
