"""`?wait=`: the answer comes when the VM is there, or cannot get there, or the time is over."""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

import pytest
from api_world import TINY, ScriptedConductor, Tenant, problem_of, verdict
from httpx2 import AsyncClient, Response
from peers import eventually

from leveret.shared.bus import Delivery
from leveret.shared.errors import Code, Problem
from leveret.shared.ids import new_id
from leveret.shared.messages import Verdict

pytestmark = pytest.mark.integration

#: Longer than any of these tests should take, shorter than its time limit.
LONG = {"timeout_s": 30}


def created(tenant: Tenant, then: Callable[[uuid.UUID], Awaitable[None]]) -> Callable[[Delivery], Awaitable[Verdict]]:
    """A conductor that makes the row, and some time later lets something happen to it."""
    tasks = set()

    async def create(delivery: Delivery) -> Verdict:
        vm_id = uuid.UUID(delivery.header("vm_id"))
        await tenant.insert(vm_id, state="building")
        task = asyncio.create_task(_later(then, vm_id))
        tasks.add(task)
        return verdict(delivery)

    return create


async def _later(then: Callable[[uuid.UUID], Awaitable[None]], vm_id: uuid.UUID) -> None:
    await asyncio.sleep(0.2)
    await then(vm_id)


def waited(answer: Response, outcome: str, state: str | None, *, status: int = 202) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["leveret-wait"] == outcome
    vm = answer.json()["vm"] if status == 202 else answer.json()
    assert (vm and vm["state"]) == state


async def test_a_create_that_waits_is_answered_when_the_vm_runs(
    client: AsyncClient, conductor: ScriptedConductor, tenant: Tenant
) -> None:
    async def runs(vm_id: uuid.UUID) -> None:
        await tenant.tell(vm_id, "progress", "building")
        await tenant.settle(vm_id, "running")

    conductor.script = created(tenant, runs)
    began = time.perf_counter()
    answer = await client.put(f"/v1/vms/{new_id()}", json=TINY, params=LONG | {"wait": "running"})
    waited(answer, "reached", "running")
    assert answer.json()["verdict"] == "accepted"
    print(f"0.2 s until running: answered after {time.perf_counter() - began:.3f} s")
    assert time.perf_counter() - began < 1.5


async def test_ready_waits_for_the_guests_own_word(
    client: AsyncClient, conductor: ScriptedConductor, tenant: Tenant
) -> None:
    async def gets_ready(vm_id: uuid.UUID) -> None:
        await tenant.settle(vm_id, "running")
        await asyncio.sleep(0.2)
        await tenant.update(vm_id, guest_ready=True)
        await tenant.tell(vm_id, "guest_ready", "running")

    conductor.script = created(tenant, gets_ready)
    answer = await client.post("/v1/vms", json=TINY, params=LONG | {"wait": "ready"})
    waited(answer, "reached", "running")
    assert answer.json()["vm"]["guest_ready"] is True


async def test_a_wait_fails_when_the_vm_ends_in_error(
    client: AsyncClient, conductor: ScriptedConductor, tenant: Tenant
) -> None:
    async def fails(vm_id: uuid.UUID) -> None:
        problem = Problem.of(Code.IMAGE_HASH_MISMATCH, "Other bytes.").model_dump(mode="json")
        await tenant.settle(vm_id, "error", problem=problem)

    conductor.script = created(tenant, fails)
    answer = await client.post("/v1/vms", json=TINY, params=LONG | {"wait": "running"})
    waited(answer, "failed", "error")
    assert answer.json()["vm"]["problem"]["code"] == "image_hash_mismatch"


async def test_a_wait_ends_when_its_time_is_over(
    client: AsyncClient, conductor: ScriptedConductor, tenant: Tenant
) -> None:
    async def nothing(vm_id: uuid.UUID) -> None:
        """It builds for ever."""

    conductor.script = created(tenant, nothing)
    answer = await client.post("/v1/vms", json=TINY, params={"wait": "running", "timeout_s": 0.5})
    waited(answer, "timed_out", "building")


async def test_a_queued_create_is_waited_for_like_any_other(
    client: AsyncClient, conductor: ScriptedConductor, tenant: Tenant
) -> None:
    conductor.script = conductor.silence
    vm_id = new_id()
    asking = asyncio.create_task(client.put(f"/v1/vms/{vm_id}", json=TINY, params=LONG | {"wait": "running"}))
    await asyncio.sleep(1.3)  # by now the verdict is given up
    assert not asking.done()
    await tenant.insert(vm_id)
    await tenant.tell(vm_id, "running", "running")
    answer = await asking
    waited(answer, "reached", "running")
    assert answer.json()["verdict"] == "accepted"  # its row is there


async def test_a_queued_create_that_is_refused_late_is_answered_with_the_reason(
    client: AsyncClient, conductor: ScriptedConductor, tenant: Tenant
) -> None:
    conductor.script = conductor.silence
    vm_id = new_id()
    await tenant.refuse(vm_id, "an-older-request", Problem.of(Code.NAME_TAKEN, "Old news."))
    asking = asyncio.create_task(
        client.put(
            f"/v1/vms/{vm_id}", json=TINY, params=LONG | {"wait": "running"}, headers={"X-Request-Id": "this-one"}
        )
    )
    await asyncio.sleep(1.3)
    assert not asking.done()
    problem = Problem.of(Code.NO_CAPACITY, "None.").model_dump_json()
    await tenant.connection.execute(
        "UPDATE rejections SET request_id = 'this-one', problem = $2 WHERE vm_id = $1", vm_id, problem
    )
    problem_of(await asking, 409, Code.NO_CAPACITY)


async def test_a_queued_create_that_nobody_takes_times_out_as_queued(
    client: AsyncClient, conductor: ScriptedConductor
) -> None:
    conductor.script = conductor.silence
    answer = await client.post("/v1/vms", json=TINY, params={"wait": "running", "timeout_s": 0.2})
    waited(answer, "timed_out", None)
    assert answer.json()["verdict"] == "queued"


async def test_a_refused_create_does_not_wait(client: AsyncClient, conductor: ScriptedConductor) -> None:
    conductor.refuse(Code.NAME_TAKEN)
    problem_of(await client.post("/v1/vms", json=TINY, params=LONG | {"wait": "running"}), 409, Code.NAME_TAKEN)


async def test_a_reboot_is_over_when_the_new_generation_is_made_true(
    client: AsyncClient, conductor: ScriptedConductor, tenant: Tenant
) -> None:
    vm_id = await tenant.insert()

    async def reboot(delivery: Delivery) -> Verdict:
        await tenant.connection.execute(
            "UPDATE vms SET generation = 2, restarts = 1, deadline = now() + interval '1 minute' WHERE id = $1", vm_id
        )
        return verdict(delivery, generation=2)

    conductor.script = reboot
    asking = asyncio.create_task(client.post(f"/v1/vms/{vm_id}/actions/reboot", params=LONG | {"wait": "running"}))
    await asyncio.sleep(0.4)
    assert not asking.done()  # it runs, but that is the old generation
    await tenant.update(vm_id, observed_generation=2, deadline=None)
    await tenant.tell(vm_id, "running", "running")
    waited(await asking, "reached", "running")


async def test_a_queued_action_does_not_take_the_old_state_for_its_effect(
    client: AsyncClient, conductor: ScriptedConductor, tenant: Tenant
) -> None:
    conductor.script = conductor.silence
    vm_id = await tenant.insert(state="error")
    asking = asyncio.create_task(client.post(f"/v1/vms/{vm_id}/actions/retry", params=LONG | {"wait": "running"}))
    await asyncio.sleep(1.3)
    assert not asking.done()
    placed = {"host_id": await tenant.host(f"h-{vm_id}"), "token": 1}
    await tenant.update(vm_id, state="running", generation=2, observed_generation=2, problem=None, **placed)
    await tenant.tell(vm_id, "running", "running")
    waited(await asking, "reached", "running")


async def test_a_delete_waits_until_the_host_confirmed(
    client: AsyncClient, conductor: ScriptedConductor, tenant: Tenant
) -> None:
    vm_id = await tenant.insert()

    async def delete(delivery: Delivery) -> Verdict:
        await tenant.update(vm_id, state="deleting", desired="deleted", generation=2, deadline=datetime.now(UTC))
        return verdict(delivery, generation=2)

    conductor.script = delete
    asking = asyncio.create_task(client.delete(f"/v1/vms/{vm_id}", params=LONG | {"wait": "deleted"}))
    await asyncio.sleep(0.2)
    assert not asking.done()
    await tenant.tell(vm_id, "deleting", "deleting")
    await tenant.update(vm_id, state="deleted", host_id=None, token=None, deadline=None)
    await tenant.tell(vm_id, "deleted", "deleted")
    waited(await asking, "reached", "deleted")


async def test_a_queued_delete_is_waited_for(client: AsyncClient, conductor: ScriptedConductor, tenant: Tenant) -> None:
    conductor.script = conductor.silence
    vm_id = await tenant.insert()
    asking = asyncio.create_task(client.delete(f"/v1/vms/{vm_id}", params=LONG | {"wait": "deleted"}))
    await asyncio.sleep(1.3)  # by now the verdict is given up, and nobody deletes it
    assert not asking.done()
    await tenant.update(vm_id, state="deleting", desired="deleted", generation=2, deadline=datetime.now(UTC))
    await tenant.update(vm_id, state="deleted", host_id=None, token=None, deadline=None)
    await tenant.tell(vm_id, "deleted", "deleted")
    waited(await asking, "reached", "deleted")


@pytest.mark.parametrize(
    ("state", "target"), [("stopped", "running"), ("stopped", "ready"), ("running", "deleted"), ("error", "deleted")]
)
async def test_a_wait_for_what_nobody_asked_for_fails_at_once(
    client: AsyncClient, tenant: Tenant, state: str, target: str
) -> None:
    vm_id = await tenant.insert(state=state)
    answer = await client.get(f"/v1/vms/{vm_id}", params=LONG | {"wait": target})
    waited(answer, "failed", state, status=200)
    assert answer.elapsed.total_seconds() < 5


async def test_a_create_that_is_to_be_stopped_does_not_wait_to_run(
    client: AsyncClient, conductor: ScriptedConductor, tenant: Tenant
) -> None:
    async def create(delivery: Delivery) -> Verdict:
        await tenant.insert(uuid.UUID(delivery.header("vm_id")), state="building", desired="stopped")
        return verdict(delivery)

    conductor.script = create
    answer = await client.post("/v1/vms", json=TINY | {"running": False}, params=LONG | {"wait": "running"})
    waited(answer, "failed", "building")


async def test_a_queued_delete_of_what_never_was_is_answered_like_a_judged_one(
    client: AsyncClient, conductor: ScriptedConductor, tenant: Tenant
) -> None:
    conductor.script = conductor.silence
    vm_id = new_id()
    asking = asyncio.create_task(client.delete(f"/v1/vms/{vm_id}", params=LONG | {"wait": "deleted"}))
    await asyncio.sleep(0.2)
    await tenant.connection.execute("INSERT INTO tombstones VALUES ($1, $2)", vm_id, tenant.project)
    problem_of(await asking, 404, Code.VM_NOT_FOUND)


async def test_get_waits_too_even_for_what_is_still_queued(client: AsyncClient, tenant: Tenant) -> None:
    vm_id = new_id()
    asking = asyncio.create_task(client.get(f"/v1/vms/{vm_id}", params=LONG | {"wait": "running"}))
    await asyncio.sleep(0.2)
    assert not asking.done()
    await tenant.insert(vm_id)
    await tenant.tell(vm_id, "running", "running")
    waited(await asking, "reached", "running", status=200)
    waited(await client.get(f"/v1/vms/{vm_id}", params={"wait": "running"}), "reached", "running", status=200)


async def test_get_stops_waiting_for_what_was_refused_or_never_comes(client: AsyncClient, tenant: Tenant) -> None:
    refused, unborn, unknown = new_id(), new_id(), new_id()
    await tenant.refuse(refused, "r", Problem.of(Code.NAME_TAKEN, "Taken."))
    await tenant.connection.execute("INSERT INTO tombstones VALUES ($1, $2)", unborn, tenant.project)
    problem_of(await client.get(f"/v1/vms/{refused}", params=LONG | {"wait": "running"}), 409, Code.NAME_TAKEN)
    problem_of(await client.get(f"/v1/vms/{unborn}", params=LONG | {"wait": "running"}), 404, Code.VM_NOT_FOUND)
    answer = await client.get(f"/v1/vms/{unknown}", params={"wait": "running", "timeout_s": 0.2})
    problem_of(answer, 404, Code.VM_NOT_FOUND)
    assert answer.headers["leveret-wait"] == "timed_out"


async def test_many_waits_are_answered_by_one_burst_of_events(client: AsyncClient, tenant: Tenant) -> None:
    vms = [await tenant.insert(state="building") for _ in range(60)]
    params = LONG | {"wait": "running"}
    waits = [asyncio.create_task(client.get(f"/v1/vms/{vm_id}", params=params)) for vm_id in vms]
    await asyncio.sleep(0.5)
    began = time.perf_counter()
    async with tenant.connection.transaction():
        for vm_id in vms:
            await tenant.settle(vm_id, "running")
    committed = time.perf_counter()
    for answer in await asyncio.gather(*waits):
        waited(answer, "reached", "running", status=200)
    print(f"60 waits answered {time.perf_counter() - committed:.3f} s after the commit ({committed - began:.3f} s)")


async def test_a_wait_whose_client_has_gone_is_given_up(client: AsyncClient, tenant: Tenant) -> None:
    async def watches(number: int) -> bool:
        return f"leveret_api_watches {number}.0" in (await client.get("/metrics")).text

    asking = asyncio.create_task(client.get(f"/v1/vms/{new_id()}", params=LONG | {"wait": "running"}))
    await eventually(lambda: watches(1))
    asking.cancel()
    await eventually(lambda: watches(0))
