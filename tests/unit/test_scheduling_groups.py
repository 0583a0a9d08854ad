"""Groups: VMs that are kept apart or together, one by one and all at once."""

import itertools
import random
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leveret.conductor.scheduling import CONSTRAINTS, Chosen, Fleet, GroupView, Host, Refused, Wish

pytestmark = pytest.mark.unit


def host(name: str, zone: str = "z1", vcpus: int = 4, **more: Any) -> Host:
    facts: dict[str, Any] = {
        "id": uuid.uuid5(uuid.NAMESPACE_DNS, name), "name": name, "zone": zone, "state": "up", "healthy": True,
        "labels": {}, "vcpus": vcpus, "memory_mib": 4096, "disk_gib": 100, "vcpus_free": vcpus,
        "memory_mib_free": 4096, "disk_gib_free": 100,
    }  # fmt: skip
    return Host(**(facts | more))


def wish(vcpus: int = 1, **more: Any) -> Wish:
    return Wish(vcpus, **({"memory_mib": 64, "disk_gib": 1} | more))


def all_of(choice: tuple[Chosen, ...] | Refused) -> list[Host]:
    assert not isinstance(choice, Refused), choice
    return [one.host for one in choice]


def no(choice: object) -> Refused:
    assert isinstance(choice, Refused)
    return choice


def seed(number: int = 1) -> random.Random:
    return random.Random(number)


def grid(zones: str = "abc", each: int = 3, vcpus: int = 4) -> list[Host]:
    return [host(f"{zone}{number}", zone, vcpus) for zone in zones for number in range(each)]


def group(policy: Any, *, hard: bool, topology: Any = "host", on: Sequence[Host] = ()) -> GroupView:
    view = GroupView(policy, hard, topology)
    for member in on:
        view = view.joined(member.id, member.zone)
    return view


def test_a_hard_spread_group_has_one_a_host_and_is_balanced_over_zones() -> None:
    hosts = all_of(Fleet(grid()).choose_all([wish()] * 9, group("spread", hard=True), seed()))
    assert len({one.id for one in hosts}) == 9
    assert [len({one.zone for one in hosts[n : n + 3]}) for n in (0, 3, 6)] == [3, 3, 3]
    refused = no(Fleet(grid()).choose_all([wish()] * 10, group("spread", hard=True), seed()))
    assert (refused.vms, refused.vms_fitting, refused.only) == (10, 9, {"group": 9})


def test_a_hard_spread_group_over_zones_has_one_a_zone() -> None:
    spread = group("spread", hard=True, topology="zone")
    assert Counter(one.zone for one in all_of(Fleet(grid()).choose_all([wish()] * 3, spread, seed()))) == Counter("abc")
    assert no(Fleet(grid()).choose_all([wish()] * 4, spread, seed())).vms_fitting == 3


def test_a_soft_spread_group_shares_hosts_only_when_there_is_no_other() -> None:
    fleet = Fleet([host("roomy", vcpus=64), host("small", vcpus=2)])
    hosts = all_of(fleet.choose_all([wish()] * 4, group("spread", hard=False), seed()))
    assert Counter(one.name for one in hosts) == {"roomy": 2, "small": 2}


def test_being_alone_on_a_host_comes_before_the_balance_of_zones() -> None:
    hosts = [host("a1", "a"), host("b1", "b"), host("b2", "b")]
    soft = group("spread", hard=False, on=[hosts[0], hosts[1], hosts[1]])
    choice = Fleet(hosts).choose(wish(group=soft), seed())
    assert isinstance(choice, Chosen)
    assert choice.host.name == "b2"
    assert choice.score == {"group": 0.0, "zone_balance": -2.0, "room": 0.75}


def test_the_balance_of_zones_comes_before_room() -> None:
    hosts = [host("a1", "a"), host("a2", "a"), host("b1", "b", vcpus_free=1)]
    choice = Fleet(hosts).choose(wish(group=group("spread", hard=True, on=[hosts[0]])), seed())
    assert isinstance(choice, Chosen)
    assert choice.host.name == "b1"


@pytest.mark.parametrize("topology", ["host", "zone"])
def test_a_soft_group_that_packs_goes_where_its_members_are_while_there_is_room(topology: str) -> None:
    hosts = grid(each=2)
    soft = group("pack", hard=False, topology=topology, on=[hosts[2]])
    fleet = Fleet(hosts)
    names = [one.name for one in all_of(fleet.choose_all([wish()] * 9, soft, seed()))]
    first = 4 if topology == "host" else 8
    assert all(name in {"b0"} | ({"b1"} if topology == "zone" else set()) for name in names[:first])
    assert not names[first].startswith("b0")


@pytest.mark.parametrize("strategy", ["spread", "pack"])
def test_a_hard_pack_group_finds_the_only_host_with_room_for_all(strategy: Any) -> None:
    def place(count: int) -> tuple[Chosen, ...] | Refused:
        fleet = Fleet([*grid(each=20, vcpus=4), host("only", "b", vcpus=16, vcpus_free=5)])
        return fleet.choose_all([wish(strategy=strategy)] * count, group("pack", hard=True), seed())

    assert {one.name for one in all_of(place(5))} == {"only"}
    refused = no(place(6))
    assert (refused.vms, refused.vms_fitting) == (6, 5)
    assert refused.constraints == {"vcpus": 61}


@pytest.mark.parametrize("strategy", ["spread", "pack"])
def test_a_hard_pack_group_finds_the_only_zone_with_room_for_all(strategy: Any) -> None:
    def place(count: int) -> tuple[Chosen, ...] | Refused:
        rest = [host(f"c{n}", "c", vcpus=32, vcpus_free=3) for n in range(3)]
        packed = group("pack", hard=True, topology="zone")
        return Fleet([*grid("abd", each=2), *rest]).choose_all([wish(strategy=strategy)] * count, packed, seed())

    assert {one.zone for one in all_of(place(9))} == {"c"}
    refused = no(place(10))
    assert (refused.vms_fitting, refused.constraints) == (9, {"group": 6, "vcpus": 3})


def test_a_group_that_would_rather_be_together_looks_for_a_host_for_all_first() -> None:
    hosts = [*(host(f"h{n}") for n in range(5)), host("large", vcpus=16, vcpus_free=7)]
    names = {one.name for one in all_of(Fleet(hosts).choose_all([wish()] * 7, group("pack", hard=False), seed()))}
    assert names == {"large"}
    assert len(all_of(Fleet(hosts).choose_all([wish()] * 8, group("pack", hard=False), seed()))) == 8


def test_a_group_that_would_rather_be_in_one_zone_looks_for_a_zone_for_all_first() -> None:
    hosts = [*grid("abd", each=2), *(host(f"c{n}", "c", vcpus=32, vcpus_free=3) for n in range(3))]
    choice = Fleet(hosts).choose_all([wish()] * 9, group("pack", hard=False, topology="zone"), seed())
    assert {one.zone for one in all_of(choice)} == {"c"}


def test_members_of_several_sizes_and_conditions_are_placed_together_in_the_order_asked() -> None:
    hosts = [host("a", vcpus=8), host("b", vcpus=8, labels={"disk": "fast"})]
    asked = [wish(1), wish(4), wish(3, require_labels={"disk": "fast"})]
    fleet = Fleet(hosts)
    choice = fleet.choose_all(asked, group("pack", hard=True), seed())
    assert [one.name for one in all_of(choice)] == ["b", "b", "b"]
    assert hosts[1].vcpus_free == 0
    spread = all_of(Fleet([host("s", vcpus=1), host("m", vcpus=4)]).choose_all([wish(1), wish(4)], None, seed()))
    assert [one.name for one in spread] == ["s", "m"]


def test_nothing_is_booked_when_one_does_not_fit() -> None:
    hosts = grid(each=1, vcpus=2)
    fleet = Fleet(hosts)
    for view in (None, group("spread", hard=True), group("pack", hard=True), group("pack", hard=True, topology="zone")):
        assert isinstance(fleet.choose_all([wish()] * 7, view, seed()), Refused)
        assert [(one.vcpus_free, one.memory_mib_free, one.disk_gib_free, one.vms) for one in hosts] == [
            (2, 4096, 100, 0)
        ] * 3
    assert len(all_of(fleet.choose_all([wish()] * 6, None, seed()))) == 6


@pytest.mark.parametrize("topology", ["host", "zone"])
def test_one_vm_is_chosen_for_as_if_it_were_asked_for_alone(topology: str) -> None:
    for view in (None, group("pack", hard=True, topology=topology), group("pack", hard=False, topology=topology)):
        alone = Fleet(grid()).choose(wish(group=view), seed())
        assert Fleet(grid()).choose_all([wish()], view, seed()) == (alone,)


def test_no_vms_are_placed_at_once() -> None:
    assert Fleet(grid()).choose_all([], group("pack", hard=True), seed()) == ()


@st.composite
def small_fleets(draw: st.DrawFn) -> list[Host]:
    return [
        host(
            f"h{number}",
            draw(st.sampled_from("ab")),
            4,
            vcpus_free=draw(st.integers(0, 4)),
            labels=draw(st.sampled_from([{}, {"l": "1"}])),
            vms_max=draw(st.sampled_from([None, None, 1, 3])),
        )
        for number in range(draw(st.integers(0, 4)))
    ]


def there_is_a_way(hosts: Sequence[Host], asked: Wish, count: int, view: GroupView | None) -> bool:
    """Every assignment, one member after the other."""
    if count == 0:
        return True
    one = replace(asked, group=view)
    for each in hosts:
        if all(constraint.accepts(each, one) for constraint in CONSTRAINTS.values()):
            each.take(one)
            found = there_is_a_way(hosts, asked, count - 1, view and view.joined(each.id, each.zone))
            each.give_back(one)
            if found:
                return True
    return False


@given(
    small_fleets(),
    st.builds(
        wish,
        vcpus=st.integers(1, 3),
        require_labels=st.sampled_from([{}, {}, {"l": "1"}]),
        strategy=st.sampled_from(["spread", "pack"]),
    ),
    st.integers(1, 4),
    st.sampled_from([None, *itertools.product(["spread", "pack"], [True, False], ["host", "zone"])]),
    st.lists(st.integers(0, 3), max_size=2),
)
def test_all_of_one_shape_are_refused_only_if_there_is_no_way(
    hosts: list[Host], asked: Wish, count: int, kind: Any, members: list[int]
) -> None:
    on = [hosts[number] for number in members if number < len(hosts)]
    view = kind and group(kind[0], hard=kind[1], topology=kind[2], on=on)
    fleet = Fleet(hosts)
    before = [(one.vcpus_free, one.vms) for one in hosts]
    possible = there_is_a_way(hosts, asked, count, view)
    choice = fleet.choose_all([asked] * count, view, seed())
    assert isinstance(choice, tuple) == possible
    if isinstance(choice, Refused):
        assert [(one.vcpus_free, one.vms) for one in hosts] == before
        assert choice.vms_fitting < count
        if count > 1:
            assert there_is_a_way(hosts, asked, choice.vms_fitting, view)
    else:
        placed = [one.host for one in choice]
        assert all(one.vcpus_free >= 0 for one in hosts)
        if view is not None and view.hard:
            hosts_in, zones_in = {one.id for one in [*on, *placed]}, {one.zone for one in [*on, *placed]}
            match view.policy, view.topology:
                case "spread", "host":
                    assert len(hosts_in) == len(placed) + len({one.id for one in on})
                case "spread", "zone":
                    assert len(zones_in) == len(placed) + len({one.zone for one in on})
                case "pack", "host":
                    assert len(hosts_in) == max(1, len({one.id for one in on}))
                case "pack", "zone":
                    assert len(zones_in) == max(1, len({one.zone for one in on}))
