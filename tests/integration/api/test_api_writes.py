"""Asking for changes: what reaches the conductor, and what it says reaches the user."""

import json
import re
import time
import uuid
from itertools import product
from typing import Any

import pytest
from api_world import TINY, ScriptedConductor, Tenant, problem_of, verdict
from httpx2 import AsyncClient

from leveret.shared import ids
from leveret.shared.bus import Delivery
from leveret.shared.documents import CreateVm, RequestView, StopVm, UpdateVm
from leveret.shared.errors import Code, Problem
from leveret.shared.messages import Verdict

pytestmark = pytest.mark.integration


async def test_a_create_reaches_the_conductor_with_everything_it_needs(
    client: AsyncClient, conductor: ScriptedConductor, tenant: Tenant
) -> None:
    vm_id = ids.new_id()
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    before = time.time()
    answer = await client.put(f"/v1/vms/{vm_id}", json=TINY, headers={"X-Request-Id": "mine-1", "traceparent": trace})
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/v1/vms/{vm_id}"
    assert answer.headers["x-request-id"] == "mine-1"
    assert RequestView.model_validate(answer.json()) == RequestView(
        request_id="mine-1", vm_id=vm_id, verdict="accepted", vm=None
    )
    (heard,) = conductor.heard
    assert (heard.type, heard.user_id, heard.content_type) == ("vm.create.v1", "leveret-api", "application/json")
    requested_at = heard.header("requested_at")
    assert requested_at is not None
    assert before <= float(requested_at) <= time.time()
    assert re.fullmatch(f"token member-.* of {tenant.project}", heard.header("actor") or "")
    assert {name: heard.header(name) for name in ("vm_id", "request_id", "project", "traceparent")} == {
        "vm_id": str(vm_id),
        "request_id": "mine-1",
        "project": tenant.project,
        "traceparent": trace,
    }
    assert heard.decoded() == CreateVm.model_validate(TINY)


async def test_an_accepted_vm_is_shown_at_once(
    client: AsyncClient, conductor: ScriptedConductor, tenant: Tenant
) -> None:
    async def create(delivery: Delivery) -> Verdict:
        await tenant.insert(uuid.UUID(delivery.header("vm_id")), state="pending", name="first")
        return verdict(delivery)

    conductor.script = create
    document = (await client.post("/v1/vms", json=TINY)).json()
    assert document["verdict"] == "accepted"
    assert (document["vm"]["name"], document["vm"]["state"]) == ("first", "pending")
    assert document["vm"]["id"] == document["vm_id"]


async def test_without_a_verdict_in_time_a_request_is_queued(client: AsyncClient, conductor: ScriptedConductor) -> None:
    conductor.script = conductor.silence
    answer = await client.put(f"/v1/vms/{ids.new_id()}", json=TINY)
    assert answer.status_code == 202
    assert (answer.json()["verdict"], answer.json()["vm"]) == ("queued", None)
    assert len(conductor.heard) == 1


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (Code.ID_CONFLICT, 409),
        (Code.NAME_TAKEN, 409),
        (Code.VM_DELETED, 409),
        (Code.NO_CAPACITY, 409),
        (Code.IMAGE_UNKNOWN, 422),
        (Code.RATE_LIMITED, 429),
    ],
)
async def test_a_refused_create_is_answered_with_the_conductors_reason(
    client: AsyncClient, conductor: ScriptedConductor, code: Code, status: int
) -> None:
    conductor.refuse(code, "Because.", refused_by={"zone": 3})
    problem = problem_of(await client.put(f"/v1/vms/{ids.new_id()}", json=TINY), status, code)
    assert problem["detail"] == "Because."
    assert problem["details"] == {"refused_by": {"zone": 3}}


async def test_one_key_with_two_bodies_is_422(client: AsyncClient, conductor: ScriptedConductor) -> None:
    conductor.refuse(Code.ID_CONFLICT)
    problem_of(await client.post("/v1/vms", json=TINY, headers={"Idempotency-Key": "k"}), 422, Code.ID_CONFLICT)


async def test_the_same_key_always_means_the_same_vm_of_a_project(
    client: AsyncClient, conductor: ScriptedConductor, tenant: Tenant
) -> None:
    first = await client.post("/v1/vms", json=TINY, headers={"Idempotency-Key": "my key/1"})
    again = await client.post("/v1/vms", json=TINY, headers={"Idempotency-Key": "my key/1"})
    assert first.json()["vm_id"] == again.json()["vm_id"] == str(ids.id_for_key(tenant.project, "my key/1"))
    assert first.json()["request_id"] != again.json()["request_id"]


async def test_without_a_key_every_post_means_another_vm(client: AsyncClient, conductor: ScriptedConductor) -> None:
    first, second = [uuid.UUID((await client.post("/v1/vms", json=TINY)).json()["vm_id"]) for _ in range(2)]
    assert first < second
    assert first.version == 7


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb"])
async def test_a_key_must_be_short_and_printable(client: AsyncClient, key: str) -> None:
    problem = problem_of(
        await client.post("/v1/vms", json=TINY, headers={"Idempotency-Key": key}), 422, Code.INVALID_REQUEST
    )
    assert problem["errors"][0]["field"] == "Idempotency-Key"


@pytest.mark.parametrize(
    ("verb", "body", "heard"),
    [
        ("start", None, ("vm.start.v1", b"{}")),
        ("stop", b'{"grace_s": 5}', ("vm.stop.v1", b'{"grace_s":5}')),
        ("stop", None, ("vm.stop.v1", b"{}")),
        ("reboot", b"{}", ("vm.reboot.v1", b"{}")),
        ("retry", b" {} ", ("vm.retry.v1", b"{}")),
    ],
)
async def test_an_action_is_a_request_whose_document_may_be_left_out(
    client: AsyncClient,
    conductor: ScriptedConductor,
    tenant: Tenant,
    verb: str,
    body: bytes | None,
    heard: tuple[str, bytes],
) -> None:
    vm_id = await tenant.insert()
    headers = {"Content-Type": "application/json"} if body is not None else {}
    answer = await client.post(f"/v1/vms/{vm_id}/actions/{verb}", content=body, headers=headers)
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/v1/vms/{vm_id}"
    assert answer.json()["vm"]["id"] == str(vm_id)
    assert [(delivery.type, delivery.body) for delivery in conductor.heard] == [heard]
    assert conductor.heard[0].header("vm_id") == str(vm_id)


async def test_a_delete_is_a_request_without_a_document(
    client: AsyncClient, conductor: ScriptedConductor, tenant: Tenant
) -> None:
    vm_id = await tenant.insert()
    answer = await client.delete(f"/v1/vms/{vm_id}")
    assert (answer.status_code, answer.json()["verdict"]) == (202, "accepted")
    assert [(delivery.type, delivery.body) for delivery in conductor.heard] == [("vm.delete.v1", b"{}")]


async def test_a_state_conflict_tells_the_present_state(client: AsyncClient, conductor: ScriptedConductor) -> None:
    conductor.refuse(Code.STATE_CONFLICT, "VM x is in error.", state="error")
    problem = problem_of(await client.post(f"/v1/vms/{ids.new_id()}/actions/start"), 409, Code.STATE_CONFLICT)
    assert problem["details"] == {"state": "error"}


async def test_an_answer_that_is_no_verdict_leaves_a_request_queued(
    client: AsyncClient, conductor: ScriptedConductor
) -> None:
    async def babble(delivery: Delivery) -> Any:
        return StopVm()  # has no place among answers

    conductor.script = babble
    assert (await client.put(f"/v1/vms/{ids.new_id()}", json=TINY)).json()["verdict"] == "queued"


async def test_a_request_with_the_largest_user_data_passes(client: AsyncClient, conductor: ScriptedConductor) -> None:
    largest = TINY | {"user_data_base64": "A" * (1024 * 1024 * 4 // 3 // 4 * 4)}
    assert (await client.put(f"/v1/vms/{ids.new_id()}", json=largest)).status_code == 202
    assert len(conductor.heard[0].body) > 1024 * 1024


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", "(document)"),
        (b"{", "(document)"),
        (b"[" * 50_000, "(document)"),
        (b'{"image": {"name": "x"}, "vcpus": NaN}', "vcpus"),
        (b'{"image": {"name": "x"}, "vcpus": 1, "vcpus": 1}', "(document)"),
        (b'{"image": {"name": "x"}, "cpus": 1}', "cpus"),
        (b'{"image": {"name": "x"}, "vcpus": 0}', "vcpus"),
        (b'{"image": {"name": "x"}, "name": "Not A Name"}', "name"),
    ],
    ids=lambda value: repr(value)[:40],
)
async def test_an_invalid_document_is_refused_before_anything_is_queued(
    client: AsyncClient, conductor: ScriptedConductor, body: bytes, field: str
) -> None:
    headers = {"Content-Type": "application/json"}
    answer = await client.put(f"/v1/vms/{ids.new_id()}", content=body, headers=headers)
    problem = problem_of(answer, 422, Code.INVALID_REQUEST)
    assert problem["errors"][0]["field"] == field
    assert not conductor.heard


async def test_all_faults_are_named_at_once(client: AsyncClient) -> None:
    body = {"image": {"name": "x"}, "vcpus": 0, "memory_mib": "1", "labels": {"a": "!"}}
    problem = problem_of(await client.post("/v1/vms", json=body), 422, Code.INVALID_REQUEST)
    assert {error["field"] for error in problem["errors"]} == {"vcpus", "memory_mib", "labels.a"}


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"])
async def test_only_json_is_read(client: AsyncClient, content_type: str) -> None:
    headers = {"Content-Type": content_type}
    answer = await client.post("/v1/vms", content=json.dumps(TINY).encode(), headers=headers)
    problem_of(answer, 415, Code.UNSUPPORTED_CONTENT_TYPE)


async def test_a_bad_id_is_an_invalid_parameter(client: AsyncClient) -> None:
    problem = problem_of(await client.put("/v1/vms/not-an-id", json=TINY), 422, Code.INVALID_REQUEST)
    assert problem["errors"][0]["field"] == "vm_id"
    assert "not-an-id" not in problem["errors"][0]["message"]


async def test_a_delete_of_what_never_was_is_404(client: AsyncClient, conductor: ScriptedConductor) -> None:
    conductor.refuse(Code.VM_NOT_FOUND)
    problem_of(await client.delete(f"/v1/vms/{ids.new_id()}"), 404, Code.VM_NOT_FOUND)


async def test_a_verdict_without_a_reason_is_our_defect(client: AsyncClient, conductor: ScriptedConductor) -> None:
    async def mumble(delivery: Delivery) -> Verdict:
        return verdict(delivery, problem=Problem.of(Code.INTERNAL, "")).model_copy(update={"problem": None})

    conductor.script = mumble
    problem_of(await client.delete(f"/v1/vms/{ids.new_id()}"), 500, Code.INTERNAL)


PATCHES = ["application/json", "application/merge-patch+json", "application/merge-patch+json; charset=utf-8"]


@pytest.mark.parametrize("content_type", PATCHES)
async def test_a_patch_carries_only_what_was_given(
    client: AsyncClient, conductor: ScriptedConductor, tenant: Tenant, content_type: str
) -> None:
    vm_id = await tenant.insert()
    body = b'{"labels": {"role": "db", "old": null}}'
    answer = await client.patch(f"/v1/vms/{vm_id}", content=body, headers={"Content-Type": content_type})
    assert (answer.status_code, answer.json()["verdict"]) == (202, "accepted")
    assert answer.json()["vm"]["id"] == str(vm_id)
    assert answer.headers["location"] == f"/v1/vms/{vm_id}"
    (heard,) = conductor.heard
    assert (heard.type, heard.body) == ("vm.update.v1", b'{"labels":{"role":"db","old":null}}')
    assert heard.decoded() == UpdateVm.model_validate_json(body)


async def test_a_patch_is_read_as_json_only(client: AsyncClient) -> None:
    headers = {"Content-Type": "application/json-patch+json"}
    answer = await client.patch(f"/v1/vms/{ids.new_id()}", content=b"[]", headers=headers)
    problem = problem_of(answer, 415, Code.UNSUPPORTED_CONTENT_TYPE)
    assert "application/merge-patch+json" in problem["detail"]


@pytest.mark.parametrize(
    ("body", "field"),
    [(b"{}{}", "(document)"), (b'{"vcpus": 2}', "vcpus"), (b'{"labels": {"a": 1}}', "labels.a"), (b"", "(document)")],
)
async def test_an_invalid_patch_is_refused(
    client: AsyncClient, conductor: ScriptedConductor, body: bytes, field: str
) -> None:
    headers = {"Content-Type": "application/merge-patch+json"}
    answer = await client.patch(f"/v1/vms/{ids.new_id()}", content=body, headers=headers)
    assert problem_of(answer, 422, Code.INVALID_REQUEST)["errors"][0]["field"] == field
    assert not conductor.heard


CHANGES = [("PATCH", ""), ("DELETE", ""), ("POST", "/actions/start"), ("POST", "/actions/retry")]


@pytest.mark.parametrize(
    ("given", "heard"), [('"3.1795339809000000"', "3.1795339809000000"), ('"3"', "3"), ("*", None)]
)
async def test_an_etag_goes_to_the_conductor(
    client: AsyncClient, conductor: ScriptedConductor, tenant: Tenant, given: str, heard: str | None
) -> None:
    address = f"/v1/vms/{await tenant.insert()}"
    for method, action in CHANGES:
        body = {"name": "other"} if method == "PATCH" else None
        answer = await client.request(method, f"{address}{action}", headers={"If-Match": given}, json=body)
        assert answer.status_code == 202
    assert [delivery.header("if_match") for delivery in conductor.heard] == [heard] * len(CHANGES)


async def test_the_etag_of_a_vm_can_be_given_back(
    client: AsyncClient, conductor: ScriptedConductor, tenant: Tenant
) -> None:
    vm_id = await tenant.insert()
    etag = (await client.get(f"/v1/vms/{vm_id}")).headers["etag"]
    assert (await client.delete(f"/v1/vms/{vm_id}", headers={"If-Match": etag})).status_code == 202
    assert conductor.heard[0].header("if_match") == etag.strip('"')


async def test_what_is_not_one_strong_etag_is_refused(client: AsyncClient, conductor: ScriptedConductor) -> None:
    for (method, action), given in product(CHANGES, ['W/"3"', '"3", "4"', "3", ""]):
        body = {"name": "other"} if method == "PATCH" else None
        address = f"/v1/vms/{ids.new_id()}{action}"
        answer = await client.request(method, address, headers={"If-Match": given}, json=body)
        assert problem_of(answer, 422, Code.INVALID_REQUEST)["errors"][0]["field"] == "If-Match"
    assert not conductor.heard


async def test_a_stale_etag_is_412(client: AsyncClient, conductor: ScriptedConductor) -> None:
    conductor.refuse(Code.PRECONDITION_FAILED, "It changed.", revision="4.1")
    answer = await client.delete(f"/v1/vms/{ids.new_id()}", headers={"If-Match": '"3.1"'})
    assert problem_of(answer, 412, Code.PRECONDITION_FAILED)["details"] == {"revision": "4.1"}


@pytest.mark.parametrize("method", ["PUT", "POST"])
async def test_a_dry_run_is_judged_and_makes_nothing(
    client: AsyncClient, conductor: ScriptedConductor, method: str
) -> None:
    vm_id = ids.new_id()
    address = f"/v1/vms/{vm_id}" if method == "PUT" else "/v1/vms"
    answer = await client.request(method, f"{address}?dry_run=true&wait=running", json=TINY)
    assert answer.status_code == 200
    assert (answer.json()["verdict"], answer.json()["vm"]) == ("would_be_accepted", None)
    assert "location" not in answer.headers
    (heard,) = conductor.heard
    assert (heard.type, heard.header("dry_run")) == ("vm.create.v1", "true")
    assert method == "POST" or heard.header("vm_id") == str(vm_id)


@pytest.mark.parametrize(
    ("code", "status"), [(Code.NO_CAPACITY, 409), (Code.QUOTA_EXCEEDED, 409), (Code.IMAGE_UNKNOWN, 422)]
)
async def test_a_dry_run_gets_the_problem_that_it_would_get(
    client: AsyncClient, conductor: ScriptedConductor, code: Code, status: int
) -> None:
    conductor.refuse(code, "Because.")
    problem_of(await client.put(f"/v1/vms/{ids.new_id()}?dry_run=true", json=TINY), status, code)


async def test_a_dry_run_that_nobody_judges_is_unavailable(client: AsyncClient, conductor: ScriptedConductor) -> None:
    conductor.script = conductor.silence
    answer = await client.post("/v1/vms?dry_run=true", json=TINY)
    problem = problem_of(answer, 503, Code.UNAVAILABLE)
    assert "dry run" in problem["detail"]
    assert "queued" not in problem["detail"]
    assert answer.headers["retry-after"]


async def test_nothing_else_is_tried(client: AsyncClient, conductor: ScriptedConductor) -> None:
    problem_of(await client.delete(f"/v1/vms/{ids.new_id()}?dry_run=true"), 422, Code.INVALID_REQUEST)
    assert not conductor.heard


@pytest.mark.parametrize(("told", "header"), [(0.2, "1"), (7.01, "8"), (None, "2")])
async def test_who_asks_too_much_is_told_when_to_ask_again(
    client: AsyncClient, conductor: ScriptedConductor, told: float | None, header: str
) -> None:
    details = {} if told is None else {"retry_after_s": told}
    conductor.refuse(Code.RATE_LIMITED, "Slower.", **details)
    answer = await client.put(f"/v1/vms/{ids.new_id()}", json=TINY)
    problem_of(answer, 429, Code.RATE_LIMITED)
    assert answer.headers["retry-after"] == header


async def test_a_reader_changes_nothing(stranger: AsyncClient, conductor: ScriptedConductor, tenant: Tenant) -> None:
    stranger.headers.update(tenant.headers("reader"))
    vm = f"/v1/vms/{await tenant.insert()}"
    for answer in (
        await stranger.patch(vm, json={"name": "x"}),
        await stranger.put(f"{vm}?dry_run=true", json=TINY),
        await stranger.delete(vm),
    ):
        problem_of(answer, 403, Code.FORBIDDEN)
    assert not conductor.heard
