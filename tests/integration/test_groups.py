"""VMs that are placed together: groups, several at once, and waiting for room."""

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from conductor_world import World, conducting
from invariants import violations
from peers import Asker, Gateway, Host, eventually, tiny, up

from leveret.shared.documents import DeleteVm, Placement, StartVm, StopVm
from leveret.shared.errors import Code, Problem
from leveret.shared.groups import CreateGroup, DeleteGroup
from leveret.shared.ids import ids_of, new_id
from leveret.shared.lifecycle import Observed, State, Wanted
from leveret.shared.messages import Capacity, Verdict
from leveret.shared.placements import AskCapacity, CapacityReport
from leveret.stack.rabbitmq import Rabbit

pytestmark = pytest.mark.integration

#: Room for one `tiny` VM.
ONE = Capacity(vcpus=1, memory_mib=128, disk_gib=1)


def hosts_of(rabbit: Rabbit, count: int, *, size: Capacity | None = None, zones: int = 1) -> list[Host]:
    return [Host(rabbit, name=f"h{n}", zone=f"z{n % zones}", size=size) for n in range(count)]


def why(verdict: Verdict) -> Problem:
    assert verdict.problem is not None, verdict
    return verdict.problem


async def group(world: World, name: str = "cp", **how: Any) -> None:
    verdict = await world.gateway.order(CreateGroup(name=name, **how))
    assert verdict.accepted, verdict.problem


async def placed_on(world: World, ids: Any) -> Counter[UUID]:
    rows = await world.db.fetch("SELECT host_id FROM vms WHERE id = ANY($1) AND host_id IS NOT NULL", list(ids))
    return Counter(row["host_id"] for row in rows)


async def end(world: World, hosts: list[Host], vm_id: UUID) -> None:
    """Delete a VM, and have its host confirm that."""
    row = await world.row(vm_id)
    assert (await world.gateway.ask(vm_id, DeleteVm())).accepted
    host = next(host for host in hosts if host.id == row["host_id"])
    command = await host.command(vm_id, lambda c: c.wanted is Wanted.ABSENT)
    await host.say(host.seen(command, Observed.ABSENT))
    await world.until(vm_id, State.DELETED)


# Several at once.


async def test_several_are_made_at_once_numbered_and_asked_for_again_they_are_the_same(world: World) -> None:
    request = new_id()
    async with world.hosts(*hosts_of(world.rabbit, 2)):
        verdict = await world.gateway.ask(request, tiny("web", count=3, user_data="#!/bin/sh\n"))
        assert verdict.accepted, verdict.problem
        assert [vm.name for vm in verdict.vms] == ["web-1", "web-2", "web-3"]
        assert tuple(vm.id for vm in verdict.vms) == ids_of(request, 3)
        assert len({vm.address for vm in verdict.vms} - {None}) == 3
        again = await world.gateway.ask(request, tiny("web", count=3, user_data="#!/bin/sh\n"))
        assert [vm.id for vm in again.vms] == [vm.id for vm in verdict.vms]
        assert why(await world.gateway.ask(request, tiny("web", count=2))).code is Code.ID_CONFLICT
        assert why(await world.gateway.ask(request, tiny("one"))).code is Code.ID_CONFLICT
    rows = await world.db.fetch("SELECT id, bundle, xmin FROM vms")
    assert {row["bundle"] for row in rows} == {request}
    assert await world.db.fetchval("SELECT count(*) FROM vm_user_data") == 3
    assert await world.db.fetchval("SELECT count(DISTINCT vm_id) FROM events WHERE type = 'accepted'") == 3
    assert await violations(world.db) == {}


async def test_several_for_which_there_is_not_room_enough_are_refused_whole(world: World) -> None:
    request = new_id()
    async with world.hosts(*hosts_of(world.rabbit, 2, size=ONE)):
        problem = why(await world.gateway.ask(request, tiny(count=3)))
        assert problem.code is Code.NO_CAPACITY
        assert problem.details["constraints"] == {"vcpus": 2, "memory_mib": 2, "disk_gib": 2}
        assert await world.db.fetchval("SELECT count(*) FROM vms") == 0
        assert set(await world.used()) == {(0, 0, 0)}
        assert why(await world.gateway.ask(request, tiny(count=3), request_id="another")).code is Code.NO_CAPACITY
        assert (await world.gateway.ask(new_id(), tiny(count=2))).accepted


async def test_several_of_which_one_name_is_taken_or_quota_is_too_small_are_refused_whole(world: World) -> None:
    async with world.hosts(*hosts_of(world.rabbit, 2)):
        assert (await world.gateway.ask(new_id(), tiny("web-2"))).accepted
        assert why(await world.gateway.ask(new_id(), tiny("web", count=3))).code is Code.NAME_TAKEN
        await world.db.execute("UPDATE quotas SET vms_max = 3 WHERE project_id = 'default'")
        problem = why(await world.gateway.ask(new_id(), tiny("db", count=3)))
        assert problem.code is Code.QUOTA_EXCEEDED
        assert problem.details["quota"]["vms"] == {"limit": 3, "used": 1, "asked": 3}
        assert (await world.gateway.ask(new_id(), tiny("db", count=2))).accepted
    assert await world.db.fetchval("SELECT count(*) FROM vms") == 3


async def test_one_that_was_deleted_before_keeps_all_of_them_from_being_made(world: World) -> None:
    request = new_id()
    async with world.hosts(*hosts_of(world.rabbit, 1)):
        second = ids_of(request, 3)[1]
        assert why(await world.gateway.ask(second, DeleteVm())).code is Code.VM_NOT_FOUND
        assert why(await world.gateway.ask(request, tiny(count=3))).code is Code.VM_DELETED
    assert await world.db.fetchval("SELECT count(*) FROM vms") == 0


# Groups.


async def test_a_group_is_made_once_and_deleted_when_it_is_empty(world: World) -> None:
    hosts = hosts_of(world.rabbit, 1)
    async with world.hosts(*hosts):
        await group(world)
        await group(world)
        assert why(await world.gateway.order(CreateGroup(name="cp", policy="pack"))).code is Code.NAME_TAKEN
        vm_id = new_id()
        assert (await world.gateway.ask(vm_id, tiny(placement=Placement(group="cp")))).accepted
        assert why(await world.gateway.order(DeleteGroup(name="cp"))).code is Code.GROUP_IN_USE
        await end(world, hosts, vm_id)
        assert (await world.gateway.order(DeleteGroup(name="cp"))).accepted
        assert why(await world.gateway.order(DeleteGroup(name="cp"))).code is Code.GROUP_NOT_FOUND
        problem = why(await world.gateway.ask(new_id(), tiny(placement=Placement(group="cp"))))
        assert problem.code is Code.GROUP_UNKNOWN
    kinds = [event["type"] for event in await world.events() if event["type"].startswith("group.")]
    assert kinds == ["group.created", "group.deleted"]


async def test_amqp_clients_make_groups_and_may_not_choose_hosts(world: World) -> None:
    await world.db.execute("INSERT INTO amqp_users (name, project_id, role) VALUES ('ada', 'default', 'member')")
    ada = Asker(world.rabbit, "ada")
    async with up(ada), world.hosts(*hosts_of(world.rabbit, 2)):
        named = {"request_id": "g-1"}
        assert (await ada.ask_with(CreateGroup(name="cp"), named)).accepted
        verdict = await ada.ask(new_id(), tiny("cp", count=2, placement=Placement(group="cp")))
        assert [vm.name for vm in verdict.vms] == ["cp-1", "cp-2"]
        assert len(await placed_on(world, [vm.id for vm in verdict.vms])) == 2
        assert why(await ada.ask(new_id(), tiny(placement=Placement(hosts=("h1",))))).code is Code.FORBIDDEN
        assert why(await ada.ask_with(DeleteGroup(name="cp"), {"request_id": "g-2"})).code is Code.GROUP_IN_USE
        # Nobody waits for this verdict: the project's log says it.
        await ada.publisher.publish("leveret.requests", "group.delete.v1", DeleteGroup(name="xx"))

        async def is_logged() -> bool:
            return any(
                event["type"] == "rejected" and event["data"]["problem"]["code"] == "group_not_found"
                for event in await world.events()
            )

        await eventually(is_logged, what="the refusal in the log")


async def test_a_hard_group_of_three_lands_on_three_hosts_and_is_refused_whole_on_two(world: World) -> None:
    hosts = hosts_of(world.rabbit, 3)
    async with world.hosts(*hosts[:2]):
        await group(world)
        apart = tiny("cp", count=3, placement=Placement(group="cp"))
        problem = why(await world.gateway.ask(new_id(), apart))
        assert (problem.code, problem.details["constraints"]) == (Code.NO_CAPACITY, {"group": 2})
        assert {fit["change"] for fit in problem.details["fits"]} == {"group"}
        async with world.hosts(hosts[2]):
            request = new_id()
            assert (await world.gateway.ask(request, apart)).accepted
            assert set((await placed_on(world, ids_of(request, 3))).values()) == {1}
            assert why(await world.gateway.ask(new_id(), tiny(placement=Placement(group="cp")))).code is (
                Code.NO_CAPACITY
            )
            await end(world, hosts, ids_of(request, 3)[0])
            assert (await world.gateway.ask(new_id(), tiny(placement=Placement(group="cp")))).accepted
            assert set(
                (await placed_on(world, [r["id"] for r in await world.db.fetch("SELECT id FROM vms")])).values()
            ) == {1}
    assert await violations(world.db) == {}


async def test_a_group_over_zones_a_packed_one_and_a_soft_one(world: World) -> None:
    hosts = hosts_of(world.rabbit, 4, zones=2)
    async with world.hosts(*hosts):
        await group(world, "zones", topology="zone")
        request = new_id()
        assert (await world.gateway.ask(request, tiny(count=2, placement=Placement(group="zones")))).accepted
        zones = await world.db.fetch(
            "SELECT DISTINCT h.zone FROM vms v JOIN hosts h ON h.id = v.host_id WHERE v.group_name = 'zones'"
        )
        assert len(zones) == 2
        assert why(await world.gateway.ask(new_id(), tiny(placement=Placement(group="zones")))).code is (
            Code.NO_CAPACITY
        )
        await group(world, "together", policy="pack")
        request = new_id()
        assert (await world.gateway.ask(request, tiny(count=5, placement=Placement(group="together")))).accepted
        assert list((await placed_on(world, ids_of(request, 5))).values()) == [5]
        await group(world, "loose", enforcement="soft")
        request = new_id()
        assert (await world.gateway.ask(request, tiny(count=6, placement=Placement(group="loose")))).accepted
        assert sorted((await placed_on(world, ids_of(request, 6))).values()) == [1, 1, 2, 2]
    assert await violations(world.db) == {}


async def test_a_hard_group_is_kept_however_many_ask_at_how_many_conductors(
    world: World, broker: Rabbit, database: str
) -> None:
    """Two hosts are in no group's way; the third conductor and the second gateway make it a race."""
    async with AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(conducting(broker, database))
        other = Gateway(broker)
        await stack.enter_async_context(up(other))
        await stack.enter_async_context(world.hosts(*hosts_of(world.rabbit, 5)))
        await group(world)
        asked = [
            (world.gateway, other)[n % 2].ask(new_id(), tiny(count=1 + n % 2, placement=Placement(group="cp")))
            for n in range(40)
        ]
        verdicts = await asyncio.gather(*asked)
    accepted = [verdict for verdict in verdicts if verdict.accepted]
    assert sum(max(1, len(verdict.vms)) for verdict in accepted) == 5
    assert {why(verdict).code for verdict in verdicts if not verdict.accepted} == {Code.NO_CAPACITY}
    rows = await world.db.fetch("SELECT host_id, seat FROM vms WHERE group_name = 'cp'")
    assert len({row["host_id"] for row in rows}) == len(rows) == 5
    assert await violations(world.db) == {}


# Why there.


async def test_every_placement_says_why_and_every_no_says_what_would_fit(world: World) -> None:
    async with world.hosts(*hosts_of(world.rabbit, 3)):
        vm_id = new_id()
        assert (await world.gateway.ask(vm_id, tiny(placement=Placement(zones=["z0"])))).accepted
        (scheduled,) = [event["data"] for event in await world.events() if event["type"] == "scheduled"]
        assert scheduled["considered"] == scheduled["looked_at"] == 3
        assert scheduled["score"]["room"] > 0.8
        assert scheduled["seconds"] < 1
        problem = why(await world.gateway.ask(new_id(), tiny().model_copy(update={"memory_mib": 20_000})))
        assert problem.details["constraints"] == {"memory_mib": 3}
        assert {"change": "memory_mib", "value": 8192, "hosts": 2} in problem.details["fits"]
        problem = why(await world.gateway.ask(new_id(), tiny(placement=Placement(zones=["z9"]))))
        assert problem.details["only"] == {"zone": 3}
        assert [fit["change"] for fit in problem.details["fits"]] == ["zones"]


async def test_tainted_and_full_hosts_are_left_to_those_they_are_for(world: World) -> None:
    plain, kept = hosts_of(world.rabbit, 2)
    kept.taints, plain.vms_max = {"dedicated": "ada"}, 1
    async with world.hosts(plain, kept):
        first, second, third = new_id(), new_id(), new_id()
        assert (await world.gateway.ask(first, tiny())).accepted
        assert (await world.row(first))["host_id"] == plain.id
        problem = why(await world.gateway.ask(second, tiny()))
        assert problem.details["constraints"] == {"taints": 1, "max_vms": 1}
        assert (await world.gateway.ask(third, tiny(placement=Placement(tolerate={"dedicated": "ada"})))).accepted
        assert (await world.row(third))["host_id"] == kept.id
        pinned = new_id()
        everywhere = Placement(hosts=(kept.name,), tolerate={"dedicated": "ada"})
        assert (await world.gateway.ask(pinned, tiny(placement=everywhere))).accepted
        assert (await world.row(pinned))["host_id"] == kept.id


async def test_capacity_is_counted_by_zone_and_host(world: World) -> None:
    async with world.hosts(*hosts_of(world.rabbit, 3, zones=2)):
        ask = AskCapacity(vcpus=2, memory_mib=1024, disk_gib=10)
        headers = {"project": "default", "actor": "token x", "request_id": new_id().hex}
        report = await world.gateway._caller.ask("leveret.requests", "capacity.ask.v1", ask, headers=headers, wait_s=10)
    assert isinstance(report, CapacityReport)
    assert (report.zones, report.total, report.hosts) == ({"z0": 8, "z1": 4}, 12, 3)


# Waiting for room.


async def test_who_waits_for_room_says_why_and_is_placed_when_there_is_some(world: World) -> None:
    hosts = hosts_of(world.rabbit, 1, size=ONE)
    async with world.hosts(*hosts):
        first, second = new_id(), new_id()
        assert (await world.gateway.ask(first, tiny())).accepted
        verdict = await world.gateway.ask(second, tiny(wait_for_capacity=True))
        assert (verdict.accepted, verdict.state) == (True, State.PENDING)
        row = await world.row(second)
        assert (row["step"], row["problem"]["code"]) == ("waiting_for_capacity", "no_capacity")
        assert row["address"] is not None
        command = await hosts[0].command(first)
        await hosts[0].say(hosts[0].seen(command, Observed.RUNNING))
        await world.until(first, State.RUNNING)
        await end(world, hosts, first)
        row = await world.until(second, State.BUILDING)
        assert row["problem"] is None
        assert row["deadline"] - await world.db.fetchval("SELECT now()") < timedelta(minutes=30)
    types = [event["type"] for event in await world.events() if event["vm_id"] == second]
    assert types == ["accepted", "waiting", "scheduled"]
    assert await violations(world.db) == {}


async def test_who_waits_is_looked_at_again_only_when_room_came_about(world: World) -> None:
    hosts = hosts_of(world.rabbit, 1, size=ONE)
    async with world.hosts(*hosts):
        first, second = new_id(), new_id()
        assert (await world.gateway.ask(first, tiny())).accepted
        assert (await world.gateway.ask(second, tiny(wait_for_capacity=True))).accepted
        await world.conductor.sweeper.place_pending()
        before = await world.db.fetchval("SELECT xmin::text FROM vms WHERE id = $1", second)
        for _ in range(5):
            await hosts[0].beat()
            assert await world.conductor.sweeper.place_pending() == 0
        assert await world.db.fetchval("SELECT xmin::text FROM vms WHERE id = $1", second) == before


async def test_of_those_who_wait_the_project_that_has_least_comes_first(world: World) -> None:
    hosts = hosts_of(world.rabbit, 3, size=ONE)
    async with world.hosts(*hosts):
        held = [new_id() for _ in range(3)]
        for vm_id in held:
            assert (await world.gateway.ask(vm_id, tiny())).accepted
        waiting = {new_id(): project for project in ("default", "default", "other", "other")}
        for vm_id, project in waiting.items():
            assert (await world.gateway.ask(vm_id, tiny(wait_for_capacity=True), project=project)).accepted
        order: list[str] = []
        for vm_id in held:
            await end(world, hosts, vm_id)

            async def one_more() -> bool:
                rows = await world.db.fetch("SELECT id FROM vms WHERE state = 'building' AND id = ANY($1)", [*waiting])
                order.extend(waiting.pop(row["id"]) for row in rows)
                return bool(rows)

            await eventually(one_more, what="the next one placed")
    # First `default` has two and `other` none; then both have one; then `default` has had the turn that it waited for.
    assert order == ["other", "default", "default"]


async def test_several_that_wait_are_placed_together_or_not_at_all(world: World) -> None:
    hosts = hosts_of(world.rabbit, 3, size=ONE)
    async with world.hosts(*hosts):
        held = [new_id() for _ in range(3)]
        for vm_id in held:
            assert (await world.gateway.ask(vm_id, tiny())).accepted
        request = new_id()
        assert (await world.gateway.ask(request, tiny(count=2, wait_for_capacity=True))).accepted
        await end(world, hosts, held[0])
        assert await world.conductor.sweeper.place_pending() == 0
        assert {(await world.row(vm_id))["state"] for vm_id in ids_of(request, 2)} == {"pending"}
        await end(world, hosts, held[1])
        for vm_id in ids_of(request, 2):
            await world.until(vm_id, State.BUILDING)
    assert await violations(world.db) == {}


async def test_several_that_wait_are_looked_at_again_when_one_of_them_was_deleted(world: World) -> None:
    hosts = hosts_of(world.rabbit, 1, size=ONE)
    async with world.hosts(*hosts):
        request = new_id()
        assert (await world.gateway.ask(request, tiny(count=2, wait_for_capacity=True))).accepted
        first, second = ids_of(request, 2)
        assert await world.conductor.sweeper.place_pending() == 0
        assert (await world.gateway.ask(first, DeleteVm())).accepted
        await world.until(second, State.BUILDING)


async def test_who_is_stopped_and_started_while_waiting_still_says_why_it_waits(world: World) -> None:
    vm_id = new_id()
    async with world.hosts(*hosts_of(world.rabbit, 1, size=ONE)):
        assert (await world.gateway.ask(new_id(), tiny())).accepted
        assert (await world.gateway.ask(vm_id, tiny(wait_for_capacity=True))).accepted
        assert (await world.gateway.ask(vm_id, StopVm())).accepted
        assert (await world.gateway.ask(vm_id, StartVm())).accepted
        assert (await world.row(vm_id))["problem"]["code"] == "no_capacity"


async def test_who_waited_in_vain_ends_with_the_reason(world: World) -> None:
    vm_id = new_id()
    assert (await world.gateway.ask(vm_id, tiny(wait_for_capacity=True))).accepted
    world.conductor.sweeper.attentive_s = lambda: 60.0
    await world.db.execute("UPDATE vms SET deadline = now() - interval '1 second'")
    row = await world.until(vm_id, State.ERROR)
    assert row["problem"]["code"] == "no_capacity"
    assert "No room came about" in row["problem"]["message"]
