"""What script/chaos does is a function of its seed, and leaves room for what it hits to come back."""

from collections import Counter

import pytest

from chaos import schedule
from chaos.schedule import LINKS, Deed
from chaos.storm import plan
from chaos.workload import KINDS, PROJECTS, REAL, Door, workload

pytestmark = pytest.mark.unit

COMPONENTS = plan(1, 60, 10, guests=True).components


def test_the_same_seed_makes_the_same_schedule_and_the_same_requests() -> None:
    assert plan(7, 420, 10_000, guests=True) == plan(7, 420, 10_000, guests=True)


def test_another_seed_makes_another() -> None:
    one, other = plan(7, 60, 500, guests=True), plan(8, 60, 500, guests=True)
    assert one.faults != other.faults
    assert one.lives != other.lives


def test_the_schedule_of_a_seed_is_what_it_was() -> None:
    """Who reports a seed must be able to count on it."""
    assert [str(fault) for fault in plan(1, 12, 10, guests=False).faults] == FIRST


FIRST = [
    "   0.08 s  freeze fake-hosts-3 for 1.21 s",
    "   2.03 s  freeze fake-hosts for 1.35 s",
    "   4.49 s  kill api-2 for 0.59 s",
    "   6.46 s  kill rabbitmq for 0.51 s",
    "   8.38 s  restart postgres for 0.00 s",
    "  10.38 s  kill conductor-1 for 0.76 s",
]


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_hit_that_may_still_be_down(seed: int) -> None:
    free_at: dict[str, float] = {}
    faults = schedule.schedule(seed, 420, COMPONENTS)
    for fault in faults:
        assert fault.at_s >= free_at.get(fault.component, 0.0)
        free_at[fault.component] = fault.at_s + fault.for_s + schedule.kind_of(fault.component).rest_s
    assert len(faults) == 210


def test_everything_is_hit_and_in_every_way() -> None:
    faults = [fault for seed in range(6) for fault in schedule.schedule(seed, 420, COMPONENTS)]
    hit = Counter(fault.component for fault in faults)
    assert set(hit) == set(COMPONENTS)
    assert {fault.deed for fault in faults} == set(Deed)
    stores = hit["rabbitmq"] + hit["postgres"]
    assert 0.08 < stores / len(faults) < 0.16
    assert all(fault.link in LINKS[fault.component] for fault in faults if fault.link)


@pytest.mark.parametrize("requests", [200, 10_000])
def test_as_many_requests_are_made_as_were_asked_for(requests: int) -> None:
    lives = workload(3, requests, 420, guests=False)
    surely = [step for life in lives for step in life.steps if not step.if_error]
    assert requests <= len(surely) <= requests + 8
    assert len({life.vm_id for life in lives}) == len(lives)
    assert len({(life.project, life.request_id(0)) for life in lives}) == len(lives)
    assert all(0 <= life.at_s <= 420 for life in lives)


def test_all_kinds_of_lives_are_lived_in_all_projects_through_both_doors() -> None:
    lives = workload(3, 10_000, 420, guests=True)
    assert {life.kind for life in lives} == {*KINDS, "guest"}
    assert {life.project for life in lives} == set(PROJECTS)
    assert {life.door for life in lives} == set(Door)
    assert {step.op for life in lives for step in life.steps} == {
        "create",
        "delete",
        "start",
        "stop",
        "reboot",
        "retry",
        "update",
    }
    guests = sum(life.zone == REAL for life in lives)
    assert guests == 21


def test_no_life_asks_more_than_a_vm_remembers() -> None:
    """A VM remembers its newest sixteen requests: the judge looks there for those that left no event."""
    assert max(len(life.steps) for life in workload(3, 10_000, 420, guests=True)) <= 16
