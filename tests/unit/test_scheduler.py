"""The scheduler, as a function."""

import random
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leveret.conductor.scheduler import FILTERS, HostSnapshot, Refused, Wish, choose
from leveret.shared.documents import Placement
from leveret.shared.errors import Code

pytestmark = pytest.mark.unit


def host(name: str = "h", **more: Any) -> HostSnapshot:
    size = {"vcpus": 8, "memory_mib": 8192, "disk_gib": 100} | {k: more.pop(k) for k in list(more) if k in SIZES}
    free = {f"{k}_free": more.pop(f"{k}_free", v) for k, v in size.items()}
    base: dict[str, Any] = {"zone": "z1", "state": "up", "healthy": True, "labels": {}} | more
    return HostSnapshot(id=uuid.uuid4(), name=name, **base, **size, **free)


SIZES = ("vcpus", "memory_mib", "disk_gib")


def wish(**more: Any) -> Wish:
    return Wish(**({"vcpus": 1, "memory_mib": 512, "disk_gib": 1} | more))


def placed(choice: HostSnapshot | Refused) -> HostSnapshot:
    assert isinstance(choice, HostSnapshot)
    return choice


@pytest.mark.parametrize(
    ("constraint", "unfit", "asked"),
    [
        ("state", host(state="cordoned"), wish()),
        ("hypervisor", host(healthy=False), wish()),
        ("zone", host(zone="z2"), wish(placement=Placement(zones=("z1",)))),
        ("required_labels", host(), wish(placement=Placement(require_labels={"gpu": "a"}))),
        ("forbidden_labels", host(labels={"old": "yes"}), wish(placement=Placement(forbid_labels={"old": "yes"}))),
        ("vcpus", host(vcpus_free=0), wish()),
        ("memory_mib", host(memory_mib_free=511), wish()),
        ("disk_gib", host(disk_gib_free=0), wish()),
    ],
)
def test_each_constraint_refuses_by_its_own_name(constraint: str, unfit: HostSnapshot, asked: Wish) -> None:
    choice = choose(asked, [unfit], random.Random(1))
    assert isinstance(choice, Refused)
    assert choice.constraints == {constraint: 1}


def test_a_host_that_failed_a_vm_is_not_asked_again() -> None:
    failed, other = host("failed"), host("other", vcpus_free=1)
    assert placed(choose(wish(avoid=frozenset({failed.id})), [failed, other], random.Random(1))) is other


def test_every_filter_has_a_case_above() -> None:
    assert set(FILTERS) == {
        "state", "hypervisor", "failed_before", "zone", "required_labels", "forbidden_labels",
        "vcpus", "memory_mib", "disk_gib",
    }  # fmt: skip


def test_spread_takes_the_emptiest_and_pack_the_fullest_that_fits() -> None:
    def hosts() -> list[HostSnapshot]:
        return [host("full", memory_mib_free=256), host("busy", memory_mib_free=1024), host("empty")]

    assert placed(choose(wish(), hosts(), random.Random(1))).name == "empty"
    assert placed(choose(wish(placement=Placement(strategy="pack")), hosts(), random.Random(1))).name == "busy"


def test_ties_are_broken_at_random() -> None:
    names = {placed(choose(wish(), [host("a"), host("b"), host("c")], random.Random(n))).name for n in range(50)}
    assert names == {"a", "b", "c"}


def test_what_is_placed_is_booked_in_the_snapshot() -> None:
    hosts = [host("a", vcpus=2, memory_mib=1024), host("b", vcpus=2, memory_mib=1024)]
    names = sorted(placed(choose(wish(), hosts, random.Random(1))).name for _ in range(4))
    assert names == ["a", "a", "b", "b"]
    assert isinstance(choose(wish(), hosts, random.Random(1)), Refused)


def test_no_capacity_counts_constraints_and_says_what_would_fit() -> None:
    hosts = [host("a", memory_mib_free=300), host("b", memory_mib_free=200), host("c", state="silent")]
    choice = choose(wish(), hosts, random.Random(1))
    assert isinstance(choice, Refused)
    problem = choice.problem()
    assert problem.code is Code.NO_CAPACITY
    assert problem.details["constraints"] == {"state": 1, "memory_mib": 2}
    assert problem.details["largest"] == {"vcpus": 8, "memory_mib": 300, "disk_gib": 100}
    assert "300 MiB" in problem.hint
    assert "memory_mib 2" in problem.message


def test_a_zone_that_is_not_there_is_answered_with_those_that_are() -> None:
    choice = choose(
        wish(placement=Placement(zones=("mars",))), [host(zone="east"), host(zone="west")], random.Random(1)
    )
    assert isinstance(choice, Refused)
    assert choice.problem().hint == "Zones there are: east, west."


def test_without_hosts_it_says_so() -> None:
    choice = choose(wish(), [], random.Random(1))
    assert isinstance(choice, Refused)
    assert choice.problem().message == "There is no host."


@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(64, 4096), st.integers(1, 50)), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(1, 4), st.integers(64, 2048), st.integers(1, 20)), max_size=30),
    st.booleans(),
)
def test_no_host_is_ever_overbooked(
    sizes: list[tuple[int, int, int]], asked: list[tuple[int, int, int]], pack: bool
) -> None:
    hosts = [host(vcpus=v, memory_mib=m, disk_gib=d) for v, m, d in sizes]
    placement = Placement(strategy="pack" if pack else "spread")
    for vcpus, memory_mib, disk_gib in asked:
        before = [(h.vcpus_free, h.memory_mib_free, h.disk_gib_free) for h in hosts]
        choice = choose(Wish(vcpus, memory_mib, disk_gib, placement), hosts, random.Random(0))
        if isinstance(choice, Refused):
            assert not any(v >= vcpus and m >= memory_mib and d >= disk_gib for v, m, d in before)
    assert all(min(h.vcpus_free, h.memory_mib_free, h.disk_gib_free) >= 0 for h in hosts)
