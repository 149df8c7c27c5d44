"""Events, the command line and the features that are offered."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from agent_guest.cli import STATE_DIR, build_parser, default_state_dir, read_arguments, run
from agent_guest.events import EventHub, SlowWatcherError
from agent_guest.options import OPTIONAL_FEATURES, features
from taploom.address import parse_address
from taploom.contracts.taploom.guest.v1 import GuestFeature, LinkDown, LinkUp
from taploom.contracts.taploom.link.v1 import LinkFeature


async def test_every_watcher_gets_every_event_in_order() -> None:
    hub = EventHub()
    hub.publish(LinkUp(endpoint_id="before"))
    with hub.watch() as one, hub.watch() as two:
        for number in range(3):
            hub.publish(LinkDown(endpoint_id=str(number)))
        for watcher in (one, two):
            events = watcher.__aiter__()
            with trio.fail_after(5):
                found = [await anext(events) for _ in range(3)]
            assert [event.link_down.endpoint_id for event in found if event.link_down] == ["0", "1", "2"]
            assert all(event.time is not None for event in found)


async def test_a_slow_watcher_is_dropped_and_the_others_are_not() -> None:
    hub = EventHub(queue_length=2)
    with hub.watch() as slow:
        for _ in range(2):
            hub.publish(LinkUp(endpoint_id="a"))
        with hub.watch() as quick:
            hub.publish(LinkUp(endpoint_id="b"))
            with trio.fail_after(5):
                assert (await anext(quick.__aiter__())).link_up is not None
        seen = []
        with pytest.raises(SlowWatcherError):
            async for event in slow:
                seen.append(event)
        assert len(seen) == 2
    hub.publish(LinkUp(endpoint_id="c"))


async def test_a_closed_hub_ends_watches_after_what_they_have_to_read() -> None:
    hub = EventHub()
    with hub.watch() as watcher:
        hub.publish(LinkUp(endpoint_id="a"))
        hub.close()
        with trio.fail_after(5):
            assert len([event async for event in watcher]) == 1


def test_features_are_what_the_kernel_has_and_nobody_hides() -> None:
    everything = frozenset({LinkFeature.VNET_HDR, LinkFeature.TSO, LinkFeature.USO})
    assert features(everything, frozenset(), vlan=True) == set(OPTIONAL_FEATURES.values())
    assert GuestFeature.VLAN not in features(everything, frozenset())
    assert GuestFeature.VLAN not in features(everything, frozenset({"vlan"}), vlan=True)
    always = {GuestFeature.RESOLVER, GuestFeature.EVENTS, GuestFeature.HOSTS, GuestFeature.DIRECT_DNS}
    assert features(frozenset(), frozenset()) == always
    assert GuestFeature.LINK_TSO not in features(everything, frozenset({"tso"}))
    hidden = ("events", "hosts", "direct-dns")
    assert features(everything, frozenset({"vnet-hdr", *hidden})) == {GuestFeature.RESOLVER}


def test_state_is_kept_with_the_control_socket() -> None:
    assert default_state_dir(parse_address("unix:/run/web/control.sock")) == Path("/run/web")
    assert default_state_dir(parse_address("vsock:any:5555")) == STATE_DIR


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["--version"]):
        with pytest.raises(SystemExit) as caught:
            build_parser().parse_args(arguments)
        assert caught.value.code == 0
    assert "example" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args(["--control", "unix:/a", "--data", "unix:/b", "--without", "nonsense"])
    assert caught.value.code == 2
    capsys.readouterr()
    assert run(["--control", "nonsense", "--data", "unix:/b"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--resolv-conf", "/r/etc/resolv.conf", "--log-level", "debug"],
        ["--hosts", "/h", "--state-dir", "/s"],
        ["--without", "uso"],
        ["--log-level=error"],
    ],
)
def test_command_lines_are_read_as_argparse_reads_them(more: list[str]) -> None:
    argv = ["--control", "vsock:any:5555", "--data", "unix:/d", *more]
    assert vars(read_arguments(argv)) == vars(build_parser().parse_args(argv))


@pytest.mark.parametrize(
    "argv",
    [["--control", "unix:/c"], ["--control", "a", "--data"], ["--control", "a", "--data", "b", "--log-level", "?"]],
)
def test_command_lines_that_are_wrong_are_argparses_to_refuse(argv: list[str]) -> None:
    with pytest.raises(SystemExit):
        read_arguments(argv)
