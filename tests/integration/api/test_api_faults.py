"""Broker and database away, hung, restarted; the process told to stop."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import aio_pika
import pytest
from api_process import Api, running_api
from api_world import TINY, ScriptedConductor, Tenant, conducting, problem_of
from httpx2 import AsyncClient, Response
from peers import eventually
from proxy import Proxy

from leveret.shared import topology
from leveret.shared.errors import Code
from leveret.shared.ids import new_id
from leveret.stack.ports import free_port
from leveret.stack.postgres import Postgres
from leveret.stack.rabbitmq import Rabbit

pytestmark = pytest.mark.integration


@dataclass
class Frail:
    """An API behind proxies, with a client of the tenant."""

    api: Api
    broker: Proxy
    postgres: Proxy
    client: AsyncClient

    async def readyz(self, status: int) -> Response:
        async def answer() -> Response | None:
            got = await self.client.get("/readyz")
            return got if got.status_code == status else None

        got: Response = await eventually(answer, within_s=20, what=f"/readyz answers {status}")
        return got

    async def create(self) -> Response:
        return await self.client.put(f"/v1/vms/{new_id()}", json=TINY)


@asynccontextmanager
async def frail(run_dir: Path, rabbit: Rabbit, dsn: str, tenant: Tenant, **settings: object) -> AsyncIterator[Frail]:
    broker, postgres = Proxy(rabbit.port), Proxy(urlsplit(dsn).port or 0)
    await broker.open()
    await postgres.open()
    amqp_url = rabbit.url_of("leveret-api").replace(f":{rabbit.port}/", f":{broker.port}/")
    database_url = dsn.replace(f":{urlsplit(dsn).port}/", f":{postgres.port}/")
    try:
        with running_api(run_dir, amqp_url=amqp_url, database_url=database_url, **settings) as api:
            async with AsyncClient(base_url=api.url, headers=tenant.headers(), timeout=30, trust_env=False) as client:
                yield Frail(api, broker, postgres, client)
    finally:
        await broker.close()
        await postgres.close()


def timed(began: float, what: str, limit_s: float) -> None:
    """Print what it took. The limits leave room for a machine that does much else meanwhile."""
    took_s = time.perf_counter() - began
    print(f"{what}: {took_s:.2f} s")
    assert took_s < limit_s


async def test_without_broker_requests_are_refused_at_once_and_reads_go_on(
    run_dir: Path, broker: Rabbit, api_dsn: str, tenant: Tenant, conductor: ScriptedConductor
) -> None:
    vm_id = await tenant.insert()
    async with frail(run_dir, broker, api_dsn, tenant) as it:
        await it.readyz(200)
        await it.broker.close()
        down = (await it.readyz(503)).json()
        assert down["dependencies"]["broker"] == {"ok": False, "why": "The link to the message broker is down."}
        assert down["dependencies"]["postgres"] == {"ok": True}
        assert down["code"] == Code.UNAVAILABLE
        began = time.perf_counter()
        answer = await it.create()
        timed(began, "503 without broker", 4.0)
        problem = problem_of(answer, 503, Code.UNAVAILABLE)
        assert int(answer.headers["retry-after"]) > 0
        assert answer.headers["location"] == f"/v1/vms/{problem['details']['vm_id']}"
        assert "same id" in problem["hint"]
        assert (await it.client.get(f"/v1/vms/{vm_id}")).status_code == 200
        assert (await it.client.get("/livez")).status_code == 200
        await it.broker.open()
        began = time.perf_counter()
        await it.readyz(200)
        timed(began, "ready again", 20.0)
        assert (await it.create()).json()["verdict"] == "accepted"


async def test_what_hangs_is_answered_for_within_five_seconds(
    run_dir: Path, broker: Rabbit, api_dsn: str, tenant: Tenant, conductor: ScriptedConductor
) -> None:
    async with frail(run_dir, broker, api_dsn, tenant) as it:
        await it.readyz(200)
        assert (await it.client.get("/v1/vms")).status_code == 200  # from now on the token is known
        it.broker.swallow()
        it.postgres.swallow()
        began = time.perf_counter()
        write, read = await asyncio.gather(it.create(), it.client.get("/v1/vms"))
        timed(began, "503 from a hung broker and a hung database", 8.0)
        assert "unknown" in problem_of(write, 503, Code.UNAVAILABLE)["detail"]
        problem_of(read, 503, Code.UNAVAILABLE)
        it.broker.swallow(swallowing=False)
        it.postgres.swallow(swallowing=False)
        await it.readyz(200)
        assert (await it.create()).json()["verdict"] == "accepted"
        # What was given up as unknown arrived after all: that is what "unknown" means.
        await eventually(lambda: len(conductor.heard) == 2)


async def test_a_queue_that_vanished_is_made_again(client: AsyncClient, broker: Rabbit) -> None:
    connection = await aio_pika.connect(broker.url)
    async with connection:
        channel = await connection.channel()
        await channel.queue_delete(topology.REQUESTS_QUEUE.name)
    answer = await client.put(f"/v1/vms/{new_id()}", json=TINY)
    problem_of(answer, 503, Code.UNAVAILABLE)

    async def is_queued() -> bool:
        return (await client.put(f"/v1/vms/{new_id()}", json=TINY)).status_code == 202

    await eventually(is_queued)
    async with conducting(broker.url_of("leveret-conductor")) as conductor:
        await eventually(lambda: conductor.heard)


async def test_without_database_everything_but_the_process_is_away_and_comes_back(
    run_dir: Path, broker: Rabbit, api_dsn: str, tenant: Tenant, conductor: ScriptedConductor
) -> None:
    vm_id = await tenant.insert()
    async with frail(run_dir, broker, api_dsn, tenant) as it:
        await it.readyz(200)
        assert (await it.create()).status_code == 202  # now the token is known
        poll = asyncio.create_task(it.client.get("/v1/events?after=0&wait_s=20"))
        waiting = asyncio.create_task(it.client.get(f"/v1/vms/{vm_id}?wait=ready&timeout_s=20"))
        await asyncio.sleep(0.2)
        await it.postgres.close()
        down = (await it.readyz(503)).json()
        assert down["dependencies"]["postgres"]["ok"] is False
        assert down["dependencies"]["broker"] == {"ok": True}
        answer = await it.client.get(f"/v1/vms/{vm_id}")
        problem_of(answer, 503, Code.UNAVAILABLE)
        assert answer.headers["retry-after"]
        queued = await it.create()  # a known token is enough to queue a request
        assert (queued.status_code, queued.json()["vm"]) == (202, None)
        # Those who wait may be told to come back, and are otherwise answered when it is back.
        await it.postgres.open()
        began = time.perf_counter()
        await it.readyz(200)
        timed(began, "ready again", 15.0)
        await eventually(lambda: it.client.get("/metrics"), what="metrics")
        await tenant.update(vm_id, guest_ready=True)
        seq = await tenant.tell(vm_id, "guest_ready", "running")
        assert (await waiting).headers["leveret-wait"] == "reached"
        polled = await poll
        assert polled.status_code == 503 or [item["seq"] for item in polled.json()["items"]] == [seq]


async def test_connections_that_an_operator_ended_are_replaced_unnoticed(client: AsyncClient, tenant: Tenant) -> None:
    vm_id = await tenant.insert()
    await client.get("/v1/vms")
    poll = asyncio.create_task(client.get("/v1/events?wait_s=20"))
    waiting = asyncio.create_task(client.get(f"/v1/vms/{vm_id}?wait=stopped&timeout_s=20"))
    await asyncio.sleep(0.3)
    ended = await tenant.connection.fetchval(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'leveret-api'"
    )
    assert ended >= 2
    answer = await client.get(f"/v1/vms/{vm_id}")
    assert answer.status_code == 200, answer.text
    await tenant.settle(vm_id, "stopped", desired="stopped")
    assert [item["seq"] for item in (await poll).json()["items"]] == [1]
    assert (await waiting).headers["leveret-wait"] == "reached"


async def test_a_crash_of_postgres_is_survived(
    client: AsyncClient, postgres: Postgres, tenant: Tenant, conductor: ScriptedConductor, api: Api
) -> None:
    vm_id = await tenant.insert()
    assert (await client.get(f"/v1/vms/{vm_id}")).status_code == 200
    restarting = asyncio.create_task(asyncio.to_thread(postgres.restart, "immediate"))
    statuses = set()
    while not restarting.done():
        statuses.add((await client.get(f"/v1/vms/{vm_id}")).status_code)
        statuses.add((await client.put(f"/v1/vms/{new_id()}", json=TINY)).status_code)
    await restarting
    began = time.perf_counter()
    assert statuses <= {200, 202, 503}
    await asyncio.to_thread(api.wait_ready)
    timed(began, f"ready after Postgres listens (meanwhile {sorted(statuses)})", 15.0)
    assert (await client.get(f"/v1/vms/{vm_id}")).status_code == 200


async def test_it_starts_with_nothing_there_and_serves_as_soon_as_there_is(
    run_dir: Path, broker: Rabbit, api_dsn: str, tenant: Tenant, conductor: ScriptedConductor
) -> None:
    async with frail(run_dir, broker, api_dsn, tenant) as it:
        it.broker.swallow()
        await it.broker.close()
        await it.postgres.close()
        it.broker.swallow(swallowing=False)
        down = (await it.readyz(503)).json()
        assert down["ready"] is False
        assert not any(dependency["ok"] for dependency in down["dependencies"].values())
        problem_of(await it.create(), 503, Code.UNAVAILABLE)
        await it.broker.open()
        await it.postgres.open()
        await it.readyz(200)
        assert (await it.create()).json()["verdict"] == "accepted"


async def test_told_to_stop_it_finishes_what_is_under_way_and_holds_nobody_up(
    run_dir: Path, broker: Rabbit, api_dsn: str, tenant: Tenant, conductor: ScriptedConductor
) -> None:
    vm_id = await tenant.insert()
    conductor.script = conductor.silence
    metrics_port = free_port()
    async with frail(run_dir, broker, api_dsn, tenant, metrics_port=metrics_port) as it:
        await it.readyz(200)
        metrics = await it.client.get(f"http://127.0.0.1:{metrics_port}/metrics")
        assert "leveret_api_info" in metrics.text
        poll = asyncio.create_task(it.client.get("/v1/events?wait_s=55"))
        waiting = asyncio.create_task(it.client.get(f"/v1/vms/{vm_id}?wait=ready&timeout_s=300"))
        write = asyncio.create_task(it.create())
        await eventually(lambda: conductor.heard)
        it.api.process.send_signal(signal.SIGTERM)
        began = time.perf_counter()
        assert (await poll).json() == {"items": [], "next": 0, "forgotten_seq": 0}
        assert (await waiting).headers["leveret-wait"] == "timed_out"
        assert (await write).json()["verdict"] == "queued"
        assert await asyncio.to_thread(it.api.process.wait, 10) == 0
        timed(began, "stopped", 10.0)
        assert "api.stopped" in it.api.log.read_text()
        assert "Traceback" not in it.api.log.read_text()
