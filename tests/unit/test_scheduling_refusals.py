"""Why no host takes a VM, what would fit instead, and how that is said."""

import json
import random
import uuid
from typing import Any

import pytest

from leveret.conductor.scheduling import Fit, Fleet, GroupView, Host, Refused, Wish
from leveret.shared.errors import HINTS, Code

pytestmark = pytest.mark.unit


def host(name: str, **more: Any) -> Host:
    facts: dict[str, Any] = {
        "id": uuid.uuid5(uuid.NAMESPACE_DNS, name), "name": name, "zone": "east", "state": "up", "healthy": True,
        "labels": {}, "vcpus": 8, "memory_mib": 8192, "disk_gib": 100, "vcpus_free": 8,
        "memory_mib_free": 8192, "disk_gib_free": 100,
    }  # fmt: skip
    return Host(**(facts | more))


def refuse(fleet: list[Host], /, **asked: Any) -> Refused:
    choice = Fleet(fleet).choose(Wish(**({"vcpus": 1, "memory_mib": 512, "disk_gib": 1} | asked)), random.Random(1))
    assert isinstance(choice, Refused)
    return choice


def test_constraints_are_counted_and_the_largest_that_fits_is_named() -> None:
    refused = refuse(
        [host("a", memory_mib_free=300), host("b", memory_mib_free=200), host("c", state="silent", memory_mib_free=1)]
    )
    assert refused.constraints == {"state": 1, "memory_mib": 3}
    assert refused.only == {"memory_mib": 2}
    assert refused.largest == {"vcpus": 8, "memory_mib": 300, "disk_gib": 100}
    assert refused.fits == (Fit("memory_mib", 300, 1),)
    problem = refused.problem()
    assert problem.code is Code.NO_CAPACITY
    assert problem.message == "None of the 3 hosts can take this VM; refused by: state 1, memory_mib 3."
    assert problem.hint == "It would fit with 300 MiB of memory (1 host)."
    assert problem.details == {
        "hosts": 3,
        "constraints": {"state": 1, "memory_mib": 3},
        "only": {"memory_mib": 2},
        "zones": ["east"],
        "fits": [{"change": "memory_mib", "value": 300, "hosts": 1}],
        "largest": {"vcpus": 8, "memory_mib": 300, "disk_gib": 100},
    }


@pytest.mark.parametrize(
    ("unfit", "asked", "fit", "said"),
    [
        ({"vcpus_free": 3}, {"vcpus": 4}, Fit("vcpus", 3, 1), "with 3 vcpus (1 host)"),
        ({"disk_gib_free": 30}, {"disk_gib": 40}, Fit("disk_gib", 30, 1), "with 30 GiB of disk (1 host)"),
        (
            {"resources": {"gpu": 4}, "resources_free": {"gpu": 1}},
            {"resources": {"gpu": 2}},
            Fit("gpu", 1, 1),
            "with 1 of gpu (1 host)",
        ),
        ({}, {"resources": {"gpu": 2}}, Fit("gpu", 0, 1), "with 0 of gpu (1 host)"),
        ({}, {"require_labels": {"a": "1"}}, Fit("require_labels", None, 1), "without its required labels (1 host)"),
        (
            {"labels": {"a": "1"}},
            {"forbid_labels": {"a": "1"}},
            Fit("forbid_labels", None, 1),
            "without its forbidden labels (1 host)",
        ),
        ({"taints": {"gpu": "a10"}}, {}, Fit("tolerate", "gpu=a10", 1), "if it tolerated gpu=a10 (1 host)"),
        ({}, {"hosts": ("other",)}, Fit("hosts", None, 1), "without its choice of hosts (1 host)"),
        (
            {},
            {"avoid": frozenset({host("h").id})},
            Fit("avoid", None, 1),
            "on a host that failed to build it before (1 host)",
        ),
        (
            {},
            {"group": GroupView("spread", True, "host", {host("h").id: 1}, {"east": 1})},
            Fit("group", None, 1),
            "if its group were soft (1 host)",
        ),
    ],
)
def test_every_single_change_that_helps_is_named(
    unfit: dict[str, Any], asked: dict[str, Any], fit: Fit, said: str
) -> None:
    refused = refuse([host("h", **unfit), host("down", state="silent")], **asked)
    assert refused.fits == (fit,)
    assert refused.problem().hint == f"It would fit {said}."


def test_a_change_that_does_not_help_alone_is_not_named() -> None:
    refused = refuse([host("a", zone="west", vcpus_free=1)], zones=("east",), vcpus=2)
    assert refused.constraints == {"zone": 1, "vcpus": 1}
    assert (refused.only, refused.fits, refused.largest) == ({}, (), None)
    assert refused.problem().hint == "Zones there are: west."


def test_of_two_resources_that_are_missing_neither_is_named() -> None:
    both = {"gpu": 1, "fpga": 1}
    assert refuse([host("a", resources={"gpu": 1}, resources_free={"gpu": 0})], resources=both).fits == ()
    refused = refuse([host("a", resources=both, resources_free={"gpu": 0, "fpga": 1})], resources=both)
    assert refused.fits == (Fit("gpu", 0, 1),)


def test_what_is_named_does_fit() -> None:
    hosts = [host("a", memory_mib_free=300), host("b", zone="west"), host("c", taints={"t": "1"}), host("d", vcpus=1)]
    hosts[3].vcpus_free = 1
    refused = refuse(hosts, zones=("east",), vcpus=2)
    assert [fit.change for fit in refused.fits] == ["vcpus", "memory_mib", "zones", "tolerate"]
    asked: dict[str, Any] = {"vcpus": 2, "memory_mib": 512, "disk_gib": 1, "zones": ("east",)}
    for change in ({"vcpus": 1}, {"memory_mib": 300}, {"zones": ("west",)}, {"tolerate": {"t": "1"}}):
        assert not isinstance(Fleet(hosts).choose(Wish(**(asked | change)), random.Random(1)), Refused)
    assert isinstance(Fleet(hosts).choose(Wish(**(asked | {"memory_mib": 301})), random.Random(1)), Refused)


def test_a_zone_that_is_not_there_is_answered_with_those_that_are() -> None:
    hosts = [host("a", zone="east"), host("b", zone="west")]
    assert refuse(hosts, zones=("mars",)).problem().hint == "Zones there are: east, west."
    hosts[0].vcpus_free = 0
    hint = refuse(hosts, zones=("mars",)).problem().hint
    assert hint == "Zones there are: east, west. It would fit in west (1 host)."


def test_when_nothing_helps_the_most_there_is_is_named() -> None:
    hint = refuse([host("a", vcpus_free=1, memory_mib_free=64)], vcpus=2).problem().hint
    assert hint == "The most that one host has free: 1 vcpus, 64 MiB, 100 GiB."


def test_without_hosts_it_says_so() -> None:
    problem = refuse([]).problem()
    assert (problem.message, problem.hint) == ("There is no host.", HINTS[Code.NO_CAPACITY])


def test_several_vms_say_how_many_of_them_fit() -> None:
    fleet = Fleet([host("a", vcpus_free=3), host("b", vcpus_free=2)])
    refused = fleet.choose_all([Wish(1, 64, 1)] * 7, None, random.Random(1))
    assert isinstance(refused, Refused)
    problem = refused.problem()
    assert problem.message == "Of these 7 VMs only 5 would fit; the rest is refused by: vcpus 2."
    assert (problem.details["vms"], problem.details["vms_fitting"]) == (7, 5)


def test_sizes_of_vms_that_stay_together_are_told_for_each() -> None:
    fleet = Fleet([host("a", memory_mib_free=1000)])
    refused = fleet.choose_all([Wish(1, 512, 1)] * 3, GroupView("pack", True, "host"), random.Random(1))
    assert isinstance(refused, Refused)
    assert refused.vms_fitting == 1
    assert refused.fits == (Fit("memory_mib", 333, 1),)
    assert not isinstance(
        fleet.choose_all([Wish(1, 333, 1)] * 3, GroupView("pack", True, "host"), random.Random(1)), Refused
    )


def test_an_answer_is_json_and_small_however_large_the_fleet() -> None:
    hosts = [host(f"h{n}", zone=f"z{n}", taints={f"taint-{n}-{m}": "x" * 60 for m in range(40)}) for n in range(500)]
    problem = refuse(hosts, resources={f"r{n}": 1 for n in range(50)}, zones=("mars",)).problem()
    assert len(json.dumps(problem.model_dump(mode="json"))) < 8192
    tolerant = refuse(hosts).problem()
    assert len(json.dumps(tolerant.model_dump(mode="json"))) < 8192
    assert json.loads(json.dumps(problem.details)) == problem.details
