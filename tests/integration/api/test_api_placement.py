"""Several VMs at once, why a VM stands where it does, and how many more fit, over REST."""

import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from api_process import Api
from api_world import TINY, ScriptedConductor, Tenant, problem_of, verdict
from httpx2 import AsyncClient

from leveret.client import AskCapacity, CreateVm, Leveret, Placement, VmFailed
from leveret.shared import ids
from leveret.shared.bus import Delivery
from leveret.shared.documents import HostView, RequestView
from leveret.shared.errors import Code, Problem
from leveret.shared.ids import new_id
from leveret.shared.messages import MadeVm, Verdict
from leveret.shared.placements import CapacityReport, PlacementView

pytestmark = pytest.mark.integration

THREE = {**TINY, "name": "web", "count": 3}
WHY = Problem.of(Code.NO_CAPACITY, "None of the 3 hosts can take this VM.", constraints={"memory": 3})

Made = Callable[[tuple[uuid.UUID, ...]], Awaitable[None]]


def making(tenant: Tenant, made: Made | None = None, *, states: tuple[str, ...] = ("pending",) * 3) -> Any:
    """A conductor's script: it makes the VMs that a create asks for, in these states."""

    async def script(delivery: Delivery) -> Verdict:
        vm_ids = ids.ids_of(uuid.UUID(delivery.header("vm_id")), len(states))
        for number, (vm_id, state) in enumerate(zip(vm_ids, states, strict=True), start=1):
            await tenant.insert(vm_id, state=state, name=f"web-{number}")
        if made is not None:
            await made(vm_ids)
        return verdict(delivery).model_copy(
            update={"vms": tuple(MadeVm(id=vm_id, name="web", state="pending") for vm_id in vm_ids)}
        )

    return script


# Several at once.


async def test_several_are_answered_in_order_and_the_answer_is_no_single_vms(
    client: AsyncClient, conductor: ScriptedConductor, tenant: Tenant
) -> None:
    conductor.script = making(tenant)
    answer = await client.post("/v1/vms", json=THREE, headers={"Idempotency-Key": "k"})
    assert answer.status_code == 202
    assert not {"etag", "location"} & set(answer.headers)
    view = RequestView.model_validate(answer.json())
    assert (view.verdict, view.vm, view.vm_id) == ("accepted", None, ids.id_for_key(tenant.project, "k"))
    assert tuple(vm.id for vm in view.vms) == ids.ids_of(view.vm_id, 3)
    assert [vm.name for vm in view.vms] == ["web-1", "web-2", "web-3"]
    (heard,) = conductor.heard
    assert heard.decoded() == CreateVm.model_validate(THREE)


async def test_a_wait_for_several_is_over_when_all_are_there(
    client: AsyncClient, conductor: ScriptedConductor, tenant: Tenant
) -> None:
    async def made(vm_ids: tuple[uuid.UUID, ...]) -> None:
        await tenant.tell(vm_ids[0], "running", "running")

    conductor.script = making(tenant, made, states=("running", "running", "running"))
    answer = await client.post("/v1/vms?wait=running&timeout_s=10", json=THREE)
    assert answer.headers["leveret-wait"] == "reached"
    assert {vm["state"] for vm in answer.json()["vms"]} == {"running"}


async def test_a_wait_for_several_goes_on_while_one_is_missing(
    client: AsyncClient, conductor: ScriptedConductor, tenant: Tenant
) -> None:
    conductor.script = making(tenant, states=("running", "building", "running"))
    answer = await client.post("/v1/vms?wait=running&timeout_s=0.5", json=THREE)
    assert answer.headers["leveret-wait"] == "timed_out"
    assert [vm["state"] for vm in answer.json()["vms"]] == ["running", "building", "running"]


async def test_a_wait_for_several_fails_as_soon_as_one_of_them_does(
    client: AsyncClient, conductor: ScriptedConductor, tenant: Tenant
) -> None:
    conductor.script = making(tenant, states=("pending", "error", "running"))
    answer = await client.post("/v1/vms?wait=running&timeout_s=30", json=THREE)
    assert (answer.status_code, answer.headers["leveret-wait"]) == (202, "failed")


async def test_several_that_nobody_judged_in_time_are_queued(
    client: AsyncClient, conductor: ScriptedConductor, tenant: Tenant
) -> None:
    conductor.script = conductor.silence
    view = RequestView.model_validate((await client.post("/v1/vms", json=THREE)).json())
    assert (view.verdict, view.vm, view.vms) == ("queued", None, ())


async def test_a_queued_request_for_several_that_is_refused_later_ends_its_wait_with_the_reason(
    client: AsyncClient, conductor: ScriptedConductor, tenant: Tenant
) -> None:
    async def refuse_later(delivery: Delivery) -> None:
        request_id = delivery.header("request_id")
        assert request_id is not None
        await tenant.refuse(uuid.UUID(delivery.header("vm_id")), request_id, WHY)

    conductor.script = refuse_later
    answer = await client.post("/v1/vms?wait=running&timeout_s=20", json=THREE)
    assert problem_of(answer, 409, Code.NO_CAPACITY)["details"] == WHY.details


async def test_several_are_refused_as_one_is(client: AsyncClient, conductor: ScriptedConductor) -> None:
    conductor.refuse(Code.NO_CAPACITY, "No room.", vms=3, vms_fitting=1)
    assert problem_of(await client.post("/v1/vms", json=THREE), 409, Code.NO_CAPACITY)["details"]["vms_fitting"] == 1
    conductor.refuse(Code.ID_CONFLICT)
    problem_of(await client.post("/v1/vms", json=THREE, headers={"Idempotency-Key": "k"}), 422, Code.ID_CONFLICT)


async def test_several_may_be_rehearsed(client: AsyncClient, conductor: ScriptedConductor) -> None:
    answer = await client.post("/v1/vms?dry_run=true", json=THREE)
    assert (answer.status_code, answer.json()["verdict"]) == (200, "would_be_accepted")
    assert conductor.heard[0].header("dry_run") == "true"


async def test_an_id_of_ones_own_is_one_vms(client: AsyncClient, conductor: ScriptedConductor) -> None:
    problem = problem_of(await client.put(f"/v1/vms/{new_id()}", json=THREE), 422, Code.INVALID_REQUEST)
    (fault,) = problem["errors"]
    assert fault["field"] == "count"
    assert "POST /v1/vms" in fault["message"]
    assert not conductor.heard


async def test_only_an_administrator_says_which_hosts(
    stranger: AsyncClient, conductor: ScriptedConductor, tenant: Tenant
) -> None:
    wish = {**TINY, "placement": {"hosts": ["rack1"]}}
    for role in ("member", "reader"):
        problem_of(await stranger.post("/v1/vms", json=wish, headers=tenant.headers(role)), 403, Code.FORBIDDEN)
        put = await stranger.put(f"/v1/vms/{new_id()}", json=wish, headers=tenant.headers(role))
        problem_of(put, 403, Code.FORBIDDEN)
    assert not conductor.heard
    assert (await stranger.post("/v1/vms", json=wish, headers=tenant.headers("admin"))).status_code == 202


async def test_the_client_gets_several_and_waits_for_them(
    api: Api, conductor: ScriptedConductor, tenant: Tenant
) -> None:
    conductor.script = making(tenant, states=("running", "building", "running"))
    async with Leveret(api.url, tenant.tokens["member"]) as leveret:
        receipt = await leveret.create(CreateVm.model_validate(THREE))
        assert receipt.vm_ids == tuple(one.id for one in receipt.made) == tuple(vm.id for vm in receipt.vms)
        with pytest.raises(ValueError, match="wait_all"):
            await leveret.wait(receipt, "running", timeout_s=1)
        await tenant.settle(receipt.vm_ids[1], "running")
        vms = await leveret.wait_all(receipt, "running", timeout_s=10)
        assert [vm.name for vm in vms] == ["web-1", "web-2", "web-3"]
        await tenant.update(
            receipt.vm_ids[2],
            state="error",
            problem=WHY.model_dump(mode="json"),
            deadline=None,
            host_id=None,
            token=None,
        )
        with pytest.raises(VmFailed, match="web-3"):
            await leveret.wait_all(receipt.vm_ids, "running", timeout_s=10)


# Where a VM stands, and why.


async def placement_of(client: AsyncClient, vm_id: uuid.UUID) -> PlacementView:
    answer = await client.get(f"/v1/vms/{vm_id}/placement")
    assert answer.status_code == 200, answer.text
    return PlacementView.model_validate(answer.json())


async def test_a_placement_tells_every_host_that_was_chosen_and_what_came_of_it(
    client: AsyncClient, tenant: Tenant
) -> None:
    hosts = [await tenant.host(f"h-{new_id()}") for _ in range(2)]
    spec = {"placement": {"zones": ["z1"], "tolerate": {"gpu": "yes"}}}
    vm_id = await tenant.insert(host_id=hosts[1], token=2, spec=spec)
    score = {"room_class": 3.0, "image": 1.0, "room": 0.5}
    why: dict[str, Any] = {"looked_at": 4, "considered": 2, "refused": {"zone": 2}, "score": score, "seconds": 0.001}
    await tenant.tell(vm_id, "accepted", "pending")
    await tenant.tell(vm_id, "scheduled", "building", host="one", host_id=str(hosts[0]), attempt=1, **why)
    full = Problem.of(Code.DISK_FULL, "No space.", host="one").model_dump(mode="json")
    await tenant.tell(vm_id, "build_failed", "building", problem=full, attempt=1)
    await tenant.tell(vm_id, "pending", "pending", attempt=1)
    await tenant.tell(vm_id, "scheduled", "building", host="two", host_id=str(hosts[1]), attempt=2)
    found = await placement_of(client, vm_id)
    assert (found.vm_id, found.state, found.zone) == (vm_id, "running", "z1")
    assert found.placement == Placement.model_validate(spec["placement"])
    first, second = found.tried
    assert (first.host, first.attempt, first.refused, first.seconds) == ("one", 1, {"zone": 2}, 0.001)
    assert list(first.score) == list(score)
    assert first.problem is not None
    assert first.problem.code is Code.DISK_FULL
    assert (second.host, second.host_id, second.problem, second.looked_at) == ("two", hosts[1], None, None)


async def test_a_vm_that_waits_for_room_says_why(client: AsyncClient, tenant: Tenant) -> None:
    vm_id = await tenant.insert(state="pending", step="waiting_for_capacity", problem=WHY.model_dump(mode="json"))
    found = await placement_of(client, vm_id)
    assert (found.host, found.tried, found.problem) == (None, (), WHY)
    assert found.placement == Placement()


async def test_a_host_that_was_fenced_says_why_the_vm_left_it(client: AsyncClient, tenant: Tenant) -> None:
    vm_id = await tenant.insert(state="pending")
    await tenant.tell(vm_id, "scheduled", "building", host="one", host_id=str(new_id()), attempt=1)
    await tenant.tell(vm_id, "running", "running")
    off = Problem.of(Code.HOST_FENCED, "Host one is off.").model_dump(mode="json")
    await tenant.tell(vm_id, "pending", "pending", attempt=1, problem=off)
    (tried,) = (await placement_of(client, vm_id)).tried
    assert tried.problem is not None
    assert tried.problem.code is Code.HOST_FENCED


async def test_a_vm_that_never_came_to_be_is_told_of_as_the_vm_itself(client: AsyncClient, tenant: Tenant) -> None:
    refused = new_id()
    await tenant.refuse(refused, "r-1", WHY)
    assert problem_of(await client.get(f"/v1/vms/{refused}/placement"), 409, Code.NO_CAPACITY)["details"] == WHY.details
    problem_of(await client.get(f"/v1/vms/{new_id()}/placement"), 404, Code.VM_NOT_FOUND)


async def test_a_placement_of_another_project_is_not_there(client: AsyncClient, tenant: Tenant) -> None:
    other = Tenant(f"p-{uuid.uuid4().hex[:12]}", tenant.connection)
    await other.move_in()
    problem_of(await client.get(f"/v1/vms/{await other.insert()}/placement"), 404, Code.VM_NOT_FOUND)


async def test_the_taints_and_the_limit_of_a_host_are_shown(admin: AsyncClient, tenant: Tenant) -> None:
    host = await tenant.host(f"h-{new_id()}", taints='{"gpu": "yes"}', vms_max=7)
    view = HostView.model_validate((await admin.get(f"/v1/hosts/{host}")).json())
    assert (view.taints, view.vms_max) == ({"gpu": "yes"}, 7)


# How many more fit.

REPORT = CapacityReport(at=datetime(2026, 11, 22, tzinfo=UTC), hosts=3, zones={"a": 12, "b": 3}, total=15)


@pytest.fixture
def asked(conductor: ScriptedConductor) -> list[Delivery]:
    """What a conductor that always says the same was asked."""

    async def report(_delivery: Delivery) -> Any:
        return REPORT

    conductor.script = report
    return conductor.heard


async def test_anybody_asks_how_many_more_fit(stranger: AsyncClient, tenant: Tenant, asked: list[Delivery]) -> None:
    answer = await stranger.get("/v1/capacity", headers=tenant.headers("reader"))
    assert answer.status_code == 200, answer.text
    assert CapacityReport.model_validate(answer.json()) == REPORT
    (heard,) = asked
    assert (heard.type, heard.header("project"), heard.decoded()) == ("capacity.ask.v1", tenant.project, AskCapacity())


async def test_the_question_is_asked_as_it_was_meant(client: AsyncClient, asked: list[Delivery]) -> None:
    answer = await client.get(
        "/v1/capacity?vcpus=4&memory_mib=2048&disk_gib=20&zones=a&zones=b&require_labels=disk%3Dnvme"
        "&forbid_labels=old%3Dyes&tolerate=gpu%3Dyes&tolerate=edge%3D"
    )
    assert answer.status_code == 200, answer.text
    placement = Placement(
        zones=("a", "b"),
        require_labels={"disk": "nvme"},
        forbid_labels={"old": "yes"},
        tolerate={"gpu": "yes", "edge": ""},
    )
    assert asked[0].decoded() == AskCapacity(vcpus=4, memory_mib=2048, disk_gib=20, placement=placement)


async def test_the_client_asks_the_same(api: Api, tenant: Tenant, asked: list[Delivery]) -> None:
    shape = AskCapacity(
        vcpus=2,
        placement=Placement(zones=("a",), require_labels={"disk": "nvme"}, tolerate={"gpu": "yes"}),
    )
    async with Leveret(api.url, tenant.tokens["reader"]) as leveret:
        assert await leveret.capacity() == await leveret.capacity(shape) == REPORT
        for other in (Placement(hosts=("one",)), Placement(group="web")):
            with pytest.raises(ValueError, match="capacity"):
                await leveret.capacity(AskCapacity(placement=other))
    assert [heard.decoded() for heard in asked] == [AskCapacity(), shape]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("vcpus=0", "vcpus"),
        ("memory_mib=1G", "memory_mib"),
        ("disk_gib=1&disk_gib=2", "disk_gib"),
        ("zones=a%20b", "zones.0"),
        ("require_labels=disk", "require_labels.0"),
        ("tolerate=a%3D1&tolerate=a%3D2", "tolerate"),
        ("group=web", "group"),
        ("hosts=rack1", "hosts"),
    ],
)
async def test_what_cannot_be_meant_is_refused(
    client: AsyncClient, asked: list[Delivery], query: str, field: str
) -> None:
    problem = problem_of(await client.get(f"/v1/capacity?{query}"), 422, Code.INVALID_REQUEST)
    assert [fault["field"] for fault in problem["errors"]] == [field]
    assert not asked


async def test_without_an_answer_to_be_read_it_is_to_be_asked_again(
    client: AsyncClient, conductor: ScriptedConductor
) -> None:
    problem_of(await client.get("/v1/capacity"), 503, Code.UNAVAILABLE)  # the conductor says: accepted
