"""Reading: VMs, lists, events, hosts, images, consoles, and the pages that need no token."""

import asyncio
import time
import uuid
from datetime import UTC, datetime
from typing import Any

import pytest
from api_world import ScriptedConductor, Tenant, problem_of
from httpx2 import AsyncClient

from leveret.api.routes import ROUTES
from leveret.shared import topology
from leveret.shared.bus import DONE, Consumer, Delivery, Envelope, Furniture, Link, Outcome, Publisher
from leveret.shared.documents import EventView, HostView, ImageView, VmView
from leveret.shared.errors import Code, Problem
from leveret.shared.ids import new_id
from leveret.shared.messages import ConsoleTail, ReadConsole
from leveret.stack.rabbitmq import Rabbit

pytestmark = pytest.mark.integration


async def test_a_vm_is_shown_whole(client: AsyncClient, tenant: Tenant) -> None:
    host = await tenant.host(f"h-{tenant.project}", zone="zone-a")
    vm_id = await tenant.insert(
        name="web",
        host_id=host,
        token=7,
        address="10.80.3.4",
        ssh={"host": "127.0.0.1", "port": 2222},
        labels={"app": "web"},
        guest_ready=True,
        problem=Problem.of(Code.GUEST_SHUTDOWN, "It went off.").model_dump(mode="json"),
    )
    answer = await client.get(f"/v1/vms/{vm_id}")
    vm = VmView.model_validate_json(answer.content)
    assert (vm.id, vm.project, vm.name, vm.host, vm.zone) == (
        vm_id,
        tenant.project,
        "web",
        f"h-{tenant.project}",
        "zone-a",
    )
    assert (str(vm.address), vm.labels, vm.image, vm.guest_ready) == ("10.80.3.4", {"app": "web"}, "tiny", True)
    assert vm.ssh is not None
    assert vm.ssh.port == 2222
    assert vm.problem is not None
    assert vm.problem.code is Code.GUEST_SHUTDOWN
    assert answer.headers["etag"].startswith('"1.')


async def test_an_image_that_was_given_by_url_is_shown_by_url(client: AsyncClient, tenant: Tenant) -> None:
    image = {"url": "https://images.example/a.qcow2", "sha256": "0" * 64, "format": "qcow2"}
    vm_id = await tenant.insert(image=image)
    assert (await client.get(f"/v1/vms/{vm_id}")).json()["image"] == "https://images.example/a.qcow2"


async def test_an_etag_spares_reading_the_same_document_again(client: AsyncClient, tenant: Tenant) -> None:
    vm_id = await tenant.insert()
    etag = (await client.get(f"/v1/vms/{vm_id}")).headers["etag"]

    async def status(*given: str) -> int:
        answer = await client.get(f"/v1/vms/{vm_id}", headers=[("If-None-Match", line) for line in given])
        assert (answer.content == b"") == (answer.status_code == 304)
        assert answer.headers["etag"].startswith('"')
        return answer.status_code

    assert await status(etag) == 304
    for known in (f'"x", {etag}', f"W/{etag}", "*", f'"a,b",W/"c" , W/{etag}'):
        assert await status(known) == 304, known
    assert await status('"x"', etag) == 304
    for unknown in (etag[:-2] + '"', etag.strip('"'), f'"*", "{etag}x', '"x"', f'"{etag[1:-1]}0"', ""):
        assert await status(unknown) == 200, unknown
    await tenant.update(vm_id, guest_ready=True)
    assert await status(etag) == 200


async def test_an_unknown_vm_and_one_of_another_project_look_the_same(client: AsyncClient, tenant: Tenant) -> None:
    other = Tenant(f"{tenant.project}-2", tenant.connection)
    await other.move_in()
    theirs = await other.insert()
    for vm_id in (new_id(), theirs):
        for path in (f"/v1/vms/{vm_id}", f"/v1/vms/{vm_id}/events", f"/v1/vms/{vm_id}/console-log"):
            problem = problem_of(await client.get(path), 404, Code.VM_NOT_FOUND)
            assert problem["detail"] == "This VM is not there."
    assert (await client.get("/v1/vms")).json()["items"] == []


async def test_a_refused_create_is_remembered_under_its_id(client: AsyncClient, tenant: Tenant) -> None:
    vm_id = new_id()
    await tenant.refuse(vm_id, "r-1", Problem.of(Code.NO_CAPACITY, "None of 2 hosts.", hosts=2))
    problem = problem_of(await client.get(f"/v1/vms/{vm_id}"), 409, Code.NO_CAPACITY)
    assert problem["details"] == {"hosts": 2}
    problem_of(await client.get(f"/v1/vms/{vm_id}/events"), 409, Code.NO_CAPACITY)


async def test_a_deleted_vm_is_shown_by_id_and_listed_only_when_asked_for(client: AsyncClient, tenant: Tenant) -> None:
    gone, there = sorted(new_id() for _ in range(2))
    await tenant.insert(gone, state="deleted")
    await tenant.insert(there)
    assert (await client.get(f"/v1/vms/{gone}")).json()["state"] == "deleted"
    assert await listed(client) == [there]
    assert await listed(client, state="deleted") == [gone]
    assert await listed(client, state=["deleted", "running"]) == [gone, there]


async def listed(client: AsyncClient, **params: Any) -> list[uuid.UUID]:
    answer = await client.get("/v1/vms", params=params)
    assert answer.status_code == 200, answer.text
    return [uuid.UUID(item["id"]) for item in answer.json()["items"]]


async def test_lists_are_filtered(client: AsyncClient, tenant: Tenant) -> None:
    host = await tenant.host(f"h-{tenant.project}")
    web, db, off = sorted(new_id() for _ in range(3))  # those of one millisecond have no order
    await tenant.insert(web, name="web", labels={"app": "web", "env": "test"})
    await tenant.insert(db, name="db", labels={"app": "db", "env": "test"}, host_id=host, token=1)
    await tenant.insert(off, name="off", state="stopped", labels={"x": "", "app": "web.2"})
    assert await listed(client) == [web, db, off]
    assert await listed(client, state="stopped") == [off]
    assert await listed(client, label="env=test") == [web, db]
    assert await listed(client, label=["env=test", "app=db"]) == [db]
    assert await listed(client, label="x=") == [off]
    assert await listed(client, label="env=") == []
    assert await listed(client, label=["app!=web", "env"]) == [db]
    assert await listed(client, label="app!=web") == [db, off]
    assert await listed(client, label="nothing!=x") == [web, db, off]
    assert await listed(client, label="env") == [web, db]
    assert await listed(client, label="!env") == [off]
    assert await listed(client, label="app in (web, db)") == [web, db]
    assert await listed(client, label="app in (web, db), !x, app in (db)") == [db]
    assert await listed(client, label="app notin (web, db)") == [off]
    assert await listed(client, label="env notin (prod)") == [web, db, off]
    assert await listed(client, label=["app=web", "app=db"]) == []
    assert await listed(client, host=str(host)) == [db]
    assert await listed(client, host=f"h-{tenant.project}") == [db]
    assert await listed(client, host="nowhere") == []
    assert await listed(client, name="web") == [web]
    assert await listed(client, name="web", state="stopped") == []


async def test_pages_stay_in_order_while_vms_come_and_go(client: AsyncClient, tenant: Tenant) -> None:
    vms = sorted([await tenant.insert() for _ in range(9)])
    seen: list[uuid.UUID] = []
    cursor: str | None = None
    pages = 0
    while pages == 0 or cursor is not None:
        page = (await client.get("/v1/vms", params={"limit": 4} | ({"cursor": cursor} if cursor else {}))).json()
        seen += [uuid.UUID(item["id"]) for item in page["items"]]
        cursor, pages = page["next"], pages + 1
        if pages == 1:
            await tenant.update(vms[0], state="deleting", desired="deleted", deadline=datetime.now(UTC))
            await tenant.update(vms[0], state="deleted", host_id=None, token=None, deadline=None)
    assert (seen, pages) == (vms, 3)


async def test_a_page_that_is_just_full_is_the_last(client: AsyncClient, tenant: Tenant) -> None:
    for _ in range(2):
        await tenant.insert()
    page = (await client.get("/v1/vms", params={"limit": 2})).json()
    assert (len(page["items"]), page["next"]) == (2, None)


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/vms?limit=0", "limit"),
        ("/v1/vms?limit=100001", "limit"),
        ("/v1/vms?limit=x", "limit"),
        ("/v1/vms?cursor=abc", "cursor"),
        ("/v1/vms?cursor=%00", "cursor"),
        ("/v1/vms?state=sleeping", "state.0"),
        ("/v1/vms?label=a%3E1", "label"),
        ("/v1/vms?label=a%3D1&label=", "label"),
        ("/v1/vms?label=" + ",".join("a" * 33), "label"),
        ("/v1/vms?stat=running", "stat"),
        ("/v1/vms?name=%00", "name"),
        ("/v1/events?after=-1", "after"),
        ("/v1/events?wait_s=56", "wait_s"),
        ("/v1/vms/{}/console-log?max_bytes=0", "max_bytes"),
        ("/v1/vms/{}?wait=asleep", "wait"),
        ("/v1/vms/{}?timeout_s=nan", "timeout_s"),
    ],
)
async def test_bad_parameters_are_named(client: AsyncClient, path: str, field: str) -> None:
    problem = problem_of(await client.get(path.format(new_id())), 422, Code.INVALID_REQUEST)
    assert problem["errors"][0]["field"].startswith(field)


async def events(client: AsyncClient, path: str = "/v1/events", **params: Any) -> tuple[list[int], int]:
    answer = await client.get(path, params=params)
    assert answer.status_code == 200, answer.text
    items = [EventView.model_validate(item) for item in answer.json()["items"]]
    return [item.seq for item in items], answer.json()["next"]


async def test_events_are_read_on_from_where_one_was(client: AsyncClient, tenant: Tenant) -> None:
    one, two = await tenant.insert(), await tenant.insert()
    for vm_id in (one, two, one, two, one):
        await tenant.tell(vm_id, "progress", "building")
    assert await events(client) == ([1, 2, 3, 4, 5], 5)
    assert await events(client, limit=2) == ([1, 2], 2)
    assert await events(client, after=2, limit=2) == ([3, 4], 4)
    assert await events(client, after=5) == ([], 5)
    assert await events(client, f"/v1/vms/{one}/events") == ([1, 3, 5], 5)
    assert await events(client, f"/v1/vms/{two}/events", after=2) == ([4], 4)
    assert await events(client, after="latest") == ([], 5)


async def test_an_event_without_a_number_is_not_shown(client: AsyncClient, tenant: Tenant) -> None:
    vm_id = await tenant.insert()
    await tenant.connection.execute(
        "INSERT INTO events (project_id, vm_id, vm_name, type, state) VALUES ($1, $2, 'x', 'accepted', 'pending')",
        tenant.project,
        vm_id,
    )
    assert await events(client) == ([], 0)


@pytest.mark.parametrize("of_vm", [False, True])
async def test_a_long_poll_returns_with_the_next_event(client: AsyncClient, tenant: Tenant, of_vm: bool) -> None:
    vm_id, other = await tenant.insert(), await tenant.insert()
    path = f"/v1/vms/{vm_id}/events" if of_vm else "/v1/events"
    delays = []
    for _ in range(5):
        poll = asyncio.create_task(events(client, path, after="latest", wait_s=20))
        await asyncio.sleep(0.05)
        assert not poll.done()
        if of_vm:
            await tenant.tell(other, "running", "running")
            assert not poll.done()
        began = time.perf_counter()
        seq = await tenant.tell(vm_id, "running", "running")
        assert await poll == ([seq], seq)
        delays.append(time.perf_counter() - began)
    print(f"notify to answer: {[round(1000 * delay, 1) for delay in delays]} ms")
    assert max(delays) < 1.5  # pushed, not found by the safety net


async def test_a_lost_notification_only_delays_a_long_poll(client: AsyncClient, tenant: Tenant) -> None:
    vm_id = await tenant.insert()
    poll = asyncio.create_task(events(client, after=0, wait_s=20))
    await asyncio.sleep(0.1)
    began = time.perf_counter()
    await tenant.tell(vm_id, "running", "running", notify=False)
    assert await poll == ([1], 1)
    print(f"without a notification: {time.perf_counter() - began:.2f} s")


async def test_a_long_poll_ends_empty_when_nothing_happens(client: AsyncClient, tenant: Tenant) -> None:
    began = time.perf_counter()
    assert await events(client, wait_s=0.3) == ([], 0)
    assert time.perf_counter() - began >= 0.3


async def test_the_events_of_a_vm_that_is_still_queued_are_waited_for(client: AsyncClient, tenant: Tenant) -> None:
    vm_id = new_id()
    poll = asyncio.create_task(events(client, f"/v1/vms/{vm_id}/events", wait_s=20))
    await asyncio.sleep(0.1)
    await tenant.insert(vm_id, state="pending")
    await tenant.tell(vm_id, "accepted", "pending")
    assert await poll == ([1], 1)


async def test_hosts_are_shown_by_id_and_name(client: AsyncClient, tenant: Tenant) -> None:
    other = Tenant(f"{tenant.project}-2", tenant.connection)
    await other.move_in()
    client.headers.update(tenant.headers("admin"))
    name = f"h-{tenant.project}"
    host = await tenant.host(name, zone="z9", vcpus_used=1)
    for whose in (tenant, other):  # a host counts the VMs of everybody
        await whose.insert(host_id=host, token=1)
    shown = [HostView.model_validate(item) for item in (await client.get("/v1/hosts")).json()["items"]]
    assert host in {item.id for item in shown}
    for key in (host, name):
        view = HostView.model_validate_json((await client.get(f"/v1/hosts/{key}")).content)
        assert (view.id, view.name, view.zone, view.vms, view.vcpus_used) == (host, name, "z9", 2, 1)
    problem_of(await client.get("/v1/hosts/nobody"), 404, Code.HOST_NOT_FOUND)
    problem_of(await client.get("/v1/hosts/a%00b"), 404, Code.HOST_NOT_FOUND)


@pytest.mark.parametrize("role", ["member", "reader"])
async def test_hosts_are_for_administrators_only(stranger: AsyncClient, tenant: Tenant, role: str) -> None:
    for path in ("/v1/hosts", f"/v1/hosts/{await tenant.host(f'h-{tenant.project}')}"):
        problem_of(await stranger.get(path, headers=tenant.headers(role)), 403, Code.FORBIDDEN)


async def test_images_are_listed(client: AsyncClient) -> None:
    images = [ImageView.model_validate(item) for item in (await client.get("/v1/images")).json()["items"]]
    assert [(image.name, image.format) for image in images] == [("tiny", "qcow2")]


class ConsoleHost:
    """A host that only knows consoles."""

    def __init__(self, rabbit: Rabbit, host_id: uuid.UUID, text: str, problem: Problem | None = None) -> None:
        queue = topology.host_queue(host_id)
        self._tail = (text, problem)
        self._publisher = Publisher("leveret-compute")
        self.link = Link(rabbit.url_of("leveret-compute"), "test-console")
        self.link.add(Furniture((*topology.CORE_QUEUES, queue)))
        self.link.add(self._publisher)
        self.consumer = Consumer(self.link, queue, self._handle, self._publisher)

    async def _handle(self, batch: Any) -> list[Outcome]:
        for delivery in batch:
            await self._answer(delivery)
        return [DONE] * len(batch)

    async def _answer(self, delivery: Delivery) -> None:
        question = delivery.decoded()
        assert isinstance(question, ReadConsole)
        text, problem = self._tail
        short = text[-question.max_bytes :]
        tail = ConsoleTail(vm_id=question.vm_id, text=short, truncated=len(short) < len(text), problem=problem)
        envelope = Envelope(correlation_id=delivery.correlation_id)
        await self._publisher.post("", delivery.reply_to or "", tail, envelope=envelope)

    async def __aenter__(self) -> None:
        self.link.start()
        self.consumer.start()
        assert await self.link.wait_up(20)

    async def __aexit__(self, *_: object) -> None:
        await self.consumer.stop(1)
        await self.link.stop()


async def test_a_console_is_read_from_the_vms_host(client: AsyncClient, tenant: Tenant, broker: Rabbit) -> None:
    host = await tenant.host(f"h-{tenant.project}")
    vm_id = await tenant.insert(host_id=host, token=1)
    async with ConsoleHost(broker, host, "booting\nlögin: "):
        answer = await client.get(f"/v1/vms/{vm_id}/console-log")
        assert (answer.status_code, answer.text) == (200, "booting\nlögin: ")
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        assert answer.headers["leveret-truncated"] == "false"
        short = await client.get(f"/v1/vms/{vm_id}/console-log", params={"max_bytes": 3})
        assert (short.text, short.headers["leveret-truncated"]) == ("n: ", "true")


async def test_a_console_that_the_host_cannot_read_is_its_problem(
    client: AsyncClient, tenant: Tenant, broker: Rabbit
) -> None:
    host = await tenant.host(f"h-{tenant.project}")
    vm_id = await tenant.insert(host_id=host, token=1)
    problem = Problem.of(Code.HYPERVISOR_UNAVAILABLE, "libvirtd is away.")
    async with ConsoleHost(broker, host, "", problem):
        problem_of(await client.get(f"/v1/vms/{vm_id}/console-log"), 503, Code.HYPERVISOR_UNAVAILABLE)


async def test_a_host_without_a_queue_is_silent(client: AsyncClient, tenant: Tenant) -> None:
    vm_id = await tenant.insert(host_id=await tenant.host(f"h-{tenant.project}"), token=1)
    problem_of(await client.get(f"/v1/vms/{vm_id}/console-log"), 503, Code.HOST_SILENT)


async def test_a_vm_without_a_host_has_no_console(client: AsyncClient, tenant: Tenant) -> None:
    vm_id = await tenant.insert(state="pending")
    problem_of(await client.get(f"/v1/vms/{vm_id}/console-log"), 409, Code.STATE_CONFLICT)


async def test_what_needs_no_token_is_there(stranger: AsyncClient, conductor: ScriptedConductor) -> None:
    index = (await stranger.get("/")).json()
    assert (index["name"], index["api_versions"]) == ("leveret", ["v1"])
    assert (await stranger.get("/livez")).json() == {"alive": True}
    assert (await stranger.get("/version")).json()["version"] == index["version"]
    ready = (await stranger.get("/readyz")).json()
    assert ready == {
        "ready": True,
        "dependencies": {"broker": {"ok": True}, "postgres": {"ok": True}, "event_feed": {"ok": True}},
    }
    assert (await stranger.get("/openapi.json")).json()["openapi"].startswith("3.")
    for page in ("/docs", "/docs/errors"):
        answer = await stranger.get(page)
        assert answer.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in answer.headers["content-security-policy"]


async def test_metrics_tell_of_requests_by_route(client: AsyncClient, tenant: Tenant) -> None:
    await client.get(f"/v1/vms/{await tenant.insert()}")
    text = (await client.get("/metrics")).text
    assert 'leveret_api_requests_total{method="GET",route="/v1/vms/{vm_id}",status="200"}' in text
    assert 'leveret_api_request_seconds_bucket{le="0.005",method="GET",route="/v1/vms/{vm_id}"}' in text
    assert "leveret_api_broker_up 1.0" in text
    assert "leveret_api_feed_up 1.0" in text


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH"])
async def test_an_address_that_does_not_exist_is_a_problem_too(stranger: AsyncClient, method: str) -> None:
    for path in ("/v2/vms", "/v1/vms/", "/v1/vms/x/y/z"):
        problem_of(await stranger.request(method, path), 404, Code.NOT_FOUND)


async def test_a_wrong_method_names_the_right_ones(stranger: AsyncClient) -> None:
    answer = await stranger.post(f"/v1/vms/{new_id()}")
    problem_of(answer, 405, Code.METHOD_NOT_ALLOWED)
    assert answer.headers["allow"] == "DELETE, GET, HEAD, PATCH, PUT"


def test_every_route_is_read_or_written_in_these_tests() -> None:
    """Holds the list below against the table of routes, so that a new route is not forgotten here."""
    tested = {
        "createVm", "createVmByKey", "updateVm", "deleteVm", "startVm", "stopVm", "rebootVm", "retryVm",
        "listVms", "getVm", "getPlacement", "readConsole", "listVmEvents", "listEvents", "listProjectEvents", "whoami",
        "listHosts", "getHost", "cordonHost", "uncordonHost", "fenceHost", "retireHost", "listImages", "runCheck",
            "listGroups", "createGroup", "getGroup", "deleteGroup", "getCapacity",
        "listProjects", "createProject", "getProject", "updateQuota", "deleteProject",
        "listTokens", "createToken", "revokeToken", "listAmqpUsers", "addAmqpUser", "removeAmqpUser",
        "getIndex", "getVersion", "getLive", "getReady", "getMetrics", "getOpenapi", "getDocs", "getErrorDocs",
    }  # fmt: skip
    assert {route.operation for route in ROUTES} == tested
