"""Hosts that are declared off: what becomes of their VMs, and of them when they come back. Row 9 of the fault table."""

from typing import Any
from uuid import UUID

import pytest
from conductor_world import World
from peers import Host, eventually, tiny
from pydantic import BaseModel

from leveret.shared.documents import DeleteVm, RetryVm
from leveret.shared.errors import Code
from leveret.shared.ids import new_id
from leveret.shared.lifecycle import Observed, State, Wanted
from leveret.shared.messages import Cordon, DesiredVm, Fence, Retire, Uncordon, Verdict

pytestmark = pytest.mark.integration


async def run(world: World, host: Host, **more: Any) -> DesiredVm:
    """A VM that runs on this host; the command that made it."""
    vm_id = new_id()
    verdict = await world.gateway.ask(vm_id, tiny(**more))
    assert verdict.accepted, verdict.problem
    command = await host.command(vm_id)
    await host.say(host.seen(command, Observed.RUNNING))
    await world.until(vm_id, State.RUNNING)
    return command


async def fall_silent(world: World, host: Host) -> None:
    """Nothing was heard of it for a minute."""
    await world.db.execute("UPDATE hosts SET heartbeat_at = now() - interval '1 minute' WHERE id = $1", host.id)


async def fence(world: World, host: Host) -> None:
    await fall_silent(world, host)
    verdict = await world.gateway.order(Fence(host_id=host.id, proof="power cut at the PDU"))
    assert verdict.accepted, verdict.problem


async def state_of(world: World, host: Host) -> str:
    return str(await world.db.fetchval("SELECT state FROM hosts WHERE id = $1", host.id))


async def code_of(world: World, vm_id: UUID) -> str | None:
    problem = (await world.row(vm_id))["problem"]
    return str(problem["code"]) if problem else None


async def accepts(world: World, order: BaseModel) -> bool:
    return (await world.gateway.order(order)).accepted


def refused(verdict: Verdict) -> Code:
    assert verdict.problem is not None
    return Code(verdict.problem.code)


async def until_error(world: World, vm_id: UUID, code: Code) -> None:
    async def said() -> bool:
        return (await world.row(vm_id))["state"] == "error" and await code_of(world, vm_id) == code

    await eventually(said, what=f"{vm_id} in error: {code}")


async def test_a_host_that_is_heard_of_is_not_believed_to_be_off(world: World) -> None:
    host = Host(world.rabbit)
    async with world.hosts(host):
        verdict = await world.gateway.order(Fence(host_id=host.id, proof="it must be"))
        assert refused(verdict) is Code.HOST_CONFLICT
        assert await state_of(world, host) == "up"
        assert refused(await world.gateway.order(Fence(host_id=new_id(), proof="it must be"))) is Code.HOST_NOT_FOUND


async def test_only_a_vm_that_may_is_made_anew_and_only_after_the_fence(world: World) -> None:
    lost, other = Host(world.rabbit, name="lost"), Host(world.rabbit, name="other")
    async with world.hosts(lost):
        anew = await run(world, lost, on_host_failure="restart", user_data="#!/bin/sh\n")
        waits = await run(world, lost)
        await lost.say(lost.seen(anew, Observed.RUNNING, guest_ready=True))
        await world.until_ready(anew.vm_id)
        async with world.hosts(other):
            await fall_silent(world, lost)
            await world.conductor.sweeper.sweep_once()
            assert (await world.row(anew.vm_id))["state"] == "running"  # a lost lease moves nothing
            await fence(world, lost)
            command = await other.command(anew.vm_id)
            assert (command.may_build, command.token > anew.token) == (True, True)
            assert command.user_data_base64 == anew.user_data_base64 is not None
            await until_error(world, waits.vm_id, Code.HOST_FENCED)
            await other.say(other.seen(command, Observed.RUNNING))
            await world.until(anew.vm_id, State.RUNNING)

            # It comes back, and still has both. What is over goes; what waited goes on; then it may work again.
            lost.epoch += 1
            lost.seq = 0
            await lost.beat()
            assert refused(await world.gateway.order(Uncordon(host_id=lost.id))) is Code.HOST_CONFLICT
            lost.heard.clear()
            await lost.say(lost.seen(anew, Observed.RUNNING), lost.seen(waits, Observed.STOPPED), complete=True)
            absent = await lost.command(anew.vm_id)
            assert (absent.wanted, absent.token) == (Wanted.ABSENT, anew.token)
            await world.until(waits.vm_id, State.STOPPED)
            assert refused(await world.gateway.order(Uncordon(host_id=lost.id))) is Code.HOST_CONFLICT
            await lost.say(lost.seen(waits, Observed.STOPPED), complete=True)
            await eventually(lambda: accepts(world, Uncordon(host_id=lost.id)), what="uncordoned")
            assert await state_of(world, lost) == "up"
            assert (await world.row(anew.vm_id))["host_id"] == other.id


async def test_the_old_news_of_a_fenced_host_brings_nothing_back(world: World) -> None:
    host = Host(world.rabbit)
    async with world.hosts(host):
        waits = await run(world, host)
        await fence(world, host)
        await until_error(world, waits.vm_id, Code.HOST_FENCED)
        reports = world.conductor.consumers[1]
        before = reports.handled
        await host.say(host.seen(waits, Observed.RUNNING), complete=True)
        await host.say(host.seen(waits, Observed.RUNNING))
        await eventually(lambda: reports.handled == before + 2, what="both reports handled")
        assert await code_of(world, waits.vm_id) == Code.HOST_FENCED


async def test_a_delete_on_a_fenced_host_ends(world: World) -> None:
    host = Host(world.rabbit)
    async with world.hosts(host):
        under_way, afterwards = await run(world, host), await run(world, host)
        await world.gateway.ask(under_way.vm_id, DeleteVm())
        await world.until(under_way.vm_id, State.DELETING)
        await fence(world, host)
        await world.until(under_way.vm_id, State.DELETED)
        await until_error(world, afterwards.vm_id, Code.HOST_FENCED)
        assert (await world.gateway.ask(afterwards.vm_id, DeleteVm())).accepted
        await world.until(afterwards.vm_id, State.DELETED)
        assert await world.used() == [(0, 0, 0)]


async def test_a_waiting_vm_may_be_retried_elsewhere_while_its_host_is_fenced(world: World) -> None:
    lost, other = Host(world.rabbit, name="lost"), Host(world.rabbit, name="other")
    async with world.hosts(lost):
        waits = await run(world, lost)
        await fence(world, lost)
        await until_error(world, waits.vm_id, Code.HOST_FENCED)
        async with world.hosts(other):
            assert (await world.gateway.ask(waits.vm_id, RetryVm())).accepted
            command = await other.command(waits.vm_id)
            await other.say(other.seen(command, Observed.RUNNING))
            await world.until(waits.vm_id, State.RUNNING)


async def test_a_retired_host_takes_its_disks_with_it_and_says_so(world: World) -> None:
    host = Host(world.rabbit)
    async with world.hosts(host):
        vm = await run(world, host)
        assert refused(await world.gateway.order(Retire(host_id=host.id))) is Code.HOST_CONFLICT
        await fence(world, host)
        assert (await world.gateway.order(Retire(host_id=host.id))).accepted
        await until_error(world, vm.vm_id, Code.HOST_RETIRED)
        assert (await world.row(vm.vm_id))["host_id"] is None
        assert await world.used() == [(0, 0, 0)]
        assert refused(await world.gateway.order(Uncordon(host_id=host.id))) is Code.HOST_CONFLICT


async def test_a_retired_host_that_is_still_heard_of_is_told_and_rid_of_what_is_over(world: World) -> None:
    """It was said to be gone for good, and it was not."""
    host = Host(world.rabbit)
    async with world.hosts(host):
        vm = await run(world, host)
        await fence(world, host)
        assert (await world.gateway.order(Retire(host_id=host.id))).accepted
        await until_error(world, vm.vm_id, Code.HOST_RETIRED)
        await host.beat((vm.vm_id, vm.token, vm.generation, "running"))

        async def is_told() -> bool:
            reason = await world.db.fetchval("SELECT state_reason FROM hosts WHERE id = $1", host.id)
            return "still heard of" in (reason or "")

        await eventually(is_told, what="that it is still heard of")
        await host.say(host.seen(vm, Observed.RUNNING), complete=True)
        await host.command(vm.vm_id, lambda c: c.wanted is Wanted.ABSENT)
        assert await state_of(world, host) == "retired"


async def test_a_fenced_host_that_came_back_and_died_again_is_fenced_again(world: World) -> None:
    host = Host(world.rabbit)
    async with world.hosts(host):
        vm = await run(world, host)
        await fence(world, host)
        await until_error(world, vm.vm_id, Code.HOST_FENCED)
        host.epoch += 1
        host.seq = 0
        await host.beat()
        await host.say(host.seen(vm, Observed.RUNNING), complete=True)
        await world.until(vm.vm_id, State.RUNNING)
        await fence(world, host)
        await until_error(world, vm.vm_id, Code.HOST_FENCED)


async def test_cordoning_is_undone_only_for_who_is_there(world: World) -> None:
    host = Host(world.rabbit)
    async with world.hosts(host):
        for _ in range(2):
            assert (await world.gateway.order(Cordon(host_id=host.id, reason="new disks"))).accepted
        verdict = await world.gateway.ask(new_id(), tiny())
        assert refused(verdict) is Code.NO_CAPACITY
        await fall_silent(world, host)
        assert (await world.gateway.order(Uncordon(host_id=host.id))).accepted
        assert await state_of(world, host) == "silent"
        await host.beat()

        async def is_up() -> bool:
            return await state_of(world, host) == "up"

        await eventually(is_up, what="up again")
        kinds = [row["type"] for row in await world.events() if row["type"].startswith("host.")]
        assert kinds == ["host.cordoned", "host.uncordoned"]
