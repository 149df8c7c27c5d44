"""Mirrors: what makes no sense, what the kernel is told, and what goes with a guest, a connection or a network."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_helper.errors import InvalidSpecError
from agent_helper.mirrors import NONE, MirrorSpec, parse_mirrors, ruleset
from host_bridge.desired import DesiredState
from host_bridge.errors import InvalidError, PreconditionError
from host_bridge.mirror.state import BOTH, IN, MirrorNotFoundError
from host_bridge.mirror.tables import MirrorRecord, Place
from host_bridge.model import ContainerRecord, EndpointOptions
from host_bridge.store import Store
from taploom.contracts.taploom.helper.v1 import Mirror, MirrorDirection, Mirrors

_IDS = [f"endpoint-{number}" for number in range(4)]


def mirror(source: int, target: int, direction: MirrorDirection = MirrorDirection.UNSPECIFIED) -> Mirror:
    return Mirror(source_endpoint_id=_IDS[source], target_endpoint_id=_IDS[target], direction=direction)


@pytest.mark.parametrize(
    ("mirrors", "reason"),
    [
        ([mirror(0, 0)], "endpoint endpoint-0 is copied from and to"),
        ([mirror(0, 1), mirror(1, 2)], "endpoint endpoint-1 is copied from and to"),
        ([mirror(0, 1), mirror(1, 0)], "is copied from and to"),
        ([mirror(0, 1), mirror(0, 1)], "is described twice"),
        ([mirror(0, 1, MirrorDirection(7))], "its direction is not known"),
        ([Mirror(source_endpoint_id="a")], "target_endpoint_id"),
        ([Mirror(source_endpoint_id='a"; flush ruleset', target_endpoint_id="b")], "source_endpoint_id"),
        ([mirror(0, 1)] * 4097, "at most 4096"),
    ],
)
def test_what_makes_no_sense(mirrors: list[Mirror], reason: str) -> None:
    with pytest.raises(InvalidSpecError, match=reason):
        parse_mirrors(Mirrors(mirrors=mirrors))


def test_what_the_kernel_is_told() -> None:
    assert parse_mirrors(None) == ()
    specs = parse_mirrors(
        Mirrors(mirrors=[mirror(0, 2), mirror(1, 2, MirrorDirection.IN), mirror(0, 3, MirrorDirection.OUT)])
    )
    assert specs[1] == MirrorSpec(_IDS[1], _IDS[2], incoming=True, outgoing=False)
    taps = {name: f"tl{number}" for number, name in enumerate(_IDS)}
    lines = [line.strip() for line in ruleset(specs, taps).splitlines()]
    hooks = [line.partition(" priority")[0] for line in lines if line.startswith("type")]
    assert hooks == [
        'type filter hook egress device "tl0"',
        'type filter hook egress device "tl1"',
        'type filter hook ingress device "tl0"',
    ]
    assert [line for line in lines if "dup" in line] == ['dup to "tl2"', 'dup to "tl2"', 'dup to "tl2"', 'dup to "tl3"']
    # An end that is not there: only the mirrors of others.
    del taps[_IDS[2]]
    assert ruleset(specs, taps).count("dup to") == 1
    assert ruleset(specs, {}) == ruleset((), taps) == NONE


@given(st.sets(st.tuples(st.sampled_from(_IDS), st.sampled_from(_IDS), st.booleans(), st.booleans()), max_size=12))
def test_every_copy_once(drawn: set[tuple[str, str, bool, bool]]) -> None:
    specs = {(source, target): MirrorSpec(source, target, i, o) for source, target, i, o in drawn}.values()
    text = ruleset(specs, {name: f"tl{number}" for number, name in enumerate(_IDS)})
    assert text.count("dup to") == sum(one.incoming + one.outgoing for one in specs)
    hooks = [line.split(" priority")[0] for line in text.splitlines() if "hook" in line]
    assert len(hooks) == len(set(hooks)), "one chain for each hook of a TAP"


@pytest.fixture
def desired(tmp_path: Path) -> DesiredState:
    state = DesiredState(Store(tmp_path))
    for name in ("app", "watch"):
        state.activate_network(state.create_network(name).id)
    for number, name in enumerate(("web", "db", "ids")):
        state.register_guest(name, f"unix:/nowhere/{number}/control.sock")
        for network in ("app", "watch"):
            state.activate_endpoint(state.connect(network, name).id)
    return state


def place(desired: DesiredState, network: str, guest: str) -> Place:
    return desired.find_network(network).id, desired.find_guest(guest).id


def test_tagged_frames_have_no_mirror_of_their_own(desired: DesiredState) -> None:
    desired.activate_network(desired.create_network("inner").id)
    options = EndpointOptions(driver_options={"taploom.vlan.parent": "app", "taploom.vlan.tag": "20"})
    desired.activate_endpoint(desired.connect("inner", "web", options).id)
    child, ids = place(desired, "inner", "web"), place(desired, "watch", "ids")
    before = desired.store.dump()
    for source, target in ((child, ids), (ids, child)):
        labels = ["web on inner" if one == child else "ids" for one in (source, target)]
        with pytest.raises(PreconditionError, match="web on inner is tag 20 over app, without an interface"):
            desired.mirrors.add(MirrorRecord(source, target, BOTH), *labels)
    assert desired.store.dump() == before


def test_wanted_mirrors(desired: DesiredState) -> None:
    mirrors = desired.mirrors
    web, db, ids = (place(desired, "app", name) for name in ("web", "db", "ids"))
    mirrors.add(MirrorRecord(web, ids, BOTH), "web", "ids")
    mirrors.add(MirrorRecord(web, ids, IN), "web", "ids")
    assert [one.direction for one in mirrors.records()] == [IN]
    before = desired.store.dump()
    with pytest.raises(InvalidError, match="web cannot be mirrored to itself"):
        mirrors.add(MirrorRecord(web, web, BOTH), "web", "web")
    with pytest.raises(PreconditionError, match="ids receives copies, which would be copied again"):
        mirrors.add(MirrorRecord(ids, db, BOTH), "ids", "db")
    with pytest.raises(PreconditionError, match="web is mirrored itself"):
        mirrors.add(MirrorRecord(db, web, BOTH), "db", "web")
    with pytest.raises(MirrorNotFoundError, match="there is no mirror of db to ids"):
        mirrors.remove(db, ids, "of db to ids")
    assert desired.store.dump() == before
    told = mirrors.message().mirrors
    assert told is not None
    endpoint = desired.store.endpoint_of(*web)
    assert endpoint is not None
    assert [(one.source_endpoint_id, one.direction) for one in told.mirrors] == [(endpoint.id, MirrorDirection.IN)]
    # Another place of the same guest is another matter.
    mirrors.add(MirrorRecord(place(desired, "watch", "ids"), db, BOTH), "ids on watch", "db")
    mirrors.remove(web, ids, "of web to ids")
    assert len(mirrors.records()) == 1


def test_what_goes_with_what(desired: DesiredState) -> None:
    mirrors = desired.mirrors
    web, db, ids = (place(desired, "app", name) for name in ("web", "db", "ids"))
    elsewhere = place(desired, "watch", "ids")
    for source, target in ((web, ids), (db, ids), (web, elsewhere), (db, elsewhere)):
        mirrors.add(MirrorRecord(source, target, BOTH), "", "")
    desired.disconnect("watch", "ids")
    assert {(one.source, one.target) for one in mirrors.records()} == {(web, ids), (db, ids)}
    desired.remove_guest("web")
    assert [one.source for one in mirrors.records()] == [db]
    for name in ("db", "ids"):
        desired.disconnect("app", name)
    assert mirrors.records() == []
    assert mirrors.message().mirrors is not None


def test_a_container_that_stops_keeps_them(desired: DesiredState) -> None:
    web, ids = place(desired, "app", "web"), place(desired, "app", "ids")
    guest = desired.find_guest("web")
    desired.store.insert_container(ContainerRecord(guest.id, "web", guest.created_at, {}, {}))
    desired.mirrors.add(MirrorRecord(web, ids, BOTH), "web", "ids")
    desired.remove_guest("web")
    assert len(desired.mirrors.records()) == 1
    told = desired.mirrors.message().mirrors
    assert told is not None
    assert told.mirrors == []
    with pytest.raises(PreconditionError, match="ids receives copies"):
        desired.mirrors.add(MirrorRecord(ids, place(desired, "app", "db"), BOTH), "ids", "db")
    desired.store.delete_container(guest.id)
    assert desired.mirrors.records() == []
    # Taken off the network while it does not run.
    desired.store.insert_container(ContainerRecord(guest.id, "web", guest.created_at, {}, {}))
    desired.mirrors.add(MirrorRecord(web, ids, BOTH), "web", "ids")
    desired.forget_connection(*web)
    assert desired.mirrors.records() == []
