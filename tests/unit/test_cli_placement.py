"""Where VMs go, as the command line tells it: placements, groups, capacity, several VMs at once."""

import uuid
from datetime import UTC, datetime
from typing import Any

import pytest

from leveret.api import examples
from leveret.client.cli import capacity, group, look
from leveret.client.cli.building import Builds
from leveret.client.cli.create import _show_all
from leveret.client.cli.output import Format
from leveret.client.cli.where import asked_text, placement_lines
from leveret.conductor.scheduling import SCORES as WEIGHTS
from leveret.shared.documents import EventView, Placement, VmView
from leveret.shared.errors import Code, Problem
from leveret.shared.groups import GroupView
from leveret.shared.lifecycle import State
from leveret.shared.placements import SCORES, CapacityReport, PlacementView, TriedHost

pytestmark = pytest.mark.unit

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
FULL = Problem.of(Code.DISK_FULL, "The pool is full.", host="h1")


def tried(host: str, attempt: int, **more: Any) -> TriedHost:
    return TriedHost.model_validate(
        {"host": host, "host_id": uuid.UUID(int=attempt), "attempt": attempt, "at": NOON} | more
    )


def placement(*hosts: TriedHost, **more: Any) -> PlacementView:
    shape = {"vm_id": uuid.UUID(int=7), "name": "web", "state": "running", "host": "h2", "zone": "a", "problem": None}
    return PlacementView.model_validate(shape | {"placement": Placement(), "tried": hosts} | more)


def at_noon() -> str:
    return f"{NOON.astimezone():%H:%M:%S}"


def test_a_placement_tells_of_every_host_and_why_it_was_left() -> None:
    first = tried("h1", 1, looked_at=12, considered=9, refused={"zone": 2, "memory_mib": 1}, problem=FULL)
    second = tried("h2", 2, looked_at=1, considered=1, score={"room_class": 14.0, "room": 0.91}, seconds=0.25)
    found = placement(first, second, placement=Placement(zones=("a",), group="db"))
    assert list(placement_lines(found)) == [
        "asked for: zones a; group db",
        f"{at_noon()}  attempt 1 on h1: 9 of 12 hosts looked at could take it",
        "    refused: zone 2, memory_mib 1",
        "    The pool is full. (disk_full)",
        f"{at_noon()}  attempt 2 on h2: 1 of 1 host looked at could take it, found in 0.2 s",
        "    chosen by room class 14, room 0.91",
    ]


def test_a_vm_that_stands_nowhere_says_so_and_one_whose_story_is_forgotten_where() -> None:
    assert list(placement_lines(placement(host=None, zone=None))) == ["on no host"]
    assert list(placement_lines(placement())) == ["on h2 in zone a"]
    moved = list(placement_lines(placement(tried("h1", 1), host=None, zone=None)))
    assert moved == [f"{at_noon()}  attempt 1 on h1", "on no host"]


def test_every_condition_of_a_placement_is_told() -> None:
    everything: dict[str, Any] = {
        "zones": ["a", "b"],
        "require_labels": {"disk": "nvme"},
        "forbid_labels": {"old": "yes"},
        "tolerate": {"gpu": "yes"},
        "hosts": ["h1"],
        "group": "db",
        "strategy": "pack",
    }
    assert everything.keys() == Placement.model_fields.keys()
    assert asked_text(Placement.model_validate(everything)) == (
        "zones a, b; with labels disk=nvme; without labels old=yes; tolerating gpu=yes; on hosts h1; group db; "
        "strategy pack"
    )
    assert asked_text(Placement()) == ""


def test_scores_are_told_in_the_order_of_their_weight() -> None:
    assert tuple(WEIGHTS) == SCORES


def test_explain_tells_where_a_vm_that_waits_stands_and_what_would_fit(capsys: pytest.CaptureFixture[str]) -> None:
    fits = [{"change": "zones", "value": "b", "hosts": 2}]
    why = Problem.of(Code.NO_CAPACITY, "None of the 3 hosts can.", hosts=3, constraints={"zone": 3}, fits=fits)
    vm = VmView.model_validate(
        examples.VM | {"state": "pending", "step": "waiting_for_capacity", "problem": why, "host": None, "zone": None}
    )
    look._explain(vm, [], placement(host=None, zone=None, problem=why))
    told = capsys.readouterr().out
    assert "is pending (waiting for capacity) and is wanted running" in told
    assert "3 of 3 hosts are in another zone" in told
    assert "it would fit with --zone b (2 hosts)" in told
    assert "where\n  on no host\n" in told


@pytest.mark.parametrize(
    ("policy", "topology", "enforcement", "rule"),
    [
        ("spread", "host", "hard", "no two on one host"),
        ("spread", "zone", "soft", "no two in one zone, as far as there is room"),
        ("pack", "host", "hard", "all on one host"),
        ("pack", "zone", "hard", "all in one zone"),
    ],
)
def test_a_group_tells_its_rule(policy: str, topology: str, enforcement: str, rule: str) -> None:
    shape = {"name": "db", "policy": policy, "topology": topology, "enforcement": enforcement, "vms": 3}
    assert group.rule_text(GroupView.model_validate(shape | {"created_at": NOON})) == rule


def test_capacity_is_told_by_zone_and_in_all(capsys: pytest.CaptureFixture[str]) -> None:
    report = CapacityReport(at=NOON, hosts=3, zones={"b": 2, "a": 12}, total=14)
    capacity.show(report, Format.TABLE)
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["ZONE", "VMS"],
        ["a", "12"],
        ["b", "2"],
        ["all", "14"],
    ]
    capacity.show(report, Format.NAME)
    assert capsys.readouterr().out == "14\n"


def test_every_line_about_one_of_several_says_whose_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    builds = Builds("running", 60.0)

    def tell(seq: int, number: int, kind: str, **data: Any) -> None:
        vm_id, name = uuid.UUID(int=number), f"web-{number}"
        builds.tell(EventView(seq=seq, vm_id=vm_id, vm_name=name, type=kind, state=State.BUILDING, at=NOON, data=data))

    tell(1, 1, "accepted")
    tell(2, 2, "waiting", problem={"code": "no_capacity", "message": "No room."})
    tell(3, 1, "scheduled", host="h1")
    tell(3, 1, "scheduled", host="h1")
    lines = [line.split(maxsplit=2)[2] for line in capsys.readouterr().err.splitlines()]
    assert [" ".join(line.split()) for line in lines] == [
        "web-1 accepted",
        "web-2 no room yet No room. (no_capacity)",
        "web-1 scheduled on h1",
    ]


def test_the_names_of_several_stand_on_lines_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    builds = Builds("running", 60.0)
    builds.names = ("web-1", "web-2")
    vms = tuple(VmView.model_validate(examples.VM | {"name": name}) for name in builds.names)
    _show_all(vms, builds, Format.NAME)
    told = capsys.readouterr()
    assert told.out == "web-1\nweb-2\n"
    assert "web-2 is running at 10.77.0.10. Log in:  leveret ssh web-2" in told.err
    assert builds.interrupted() == "Interrupted: web-1, web-2 go on being built.\nFollow them:  leveret events -f"
