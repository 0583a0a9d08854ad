"""Lists of any length: quick to begin, whole or visibly cut, in constant memory."""

import asyncio
import json
import socket
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import psutil
import pytest
from api_process import Api, running_api
from api_world import Tenant
from httpx2 import AsyncClient
from peers import eventually
from proxy import Proxy

from leveret.api.auth import KEEP_S
from leveret.api.views import VmPage
from leveret.stack.rabbitmq import Rabbit

pytestmark = pytest.mark.integration

MANY = 10_000


async def fill(tenant: Tenant, count: int) -> list[uuid.UUID]:
    """So many running VMs of a project, in the order of their ids."""
    model = await tenant.insert()
    columns = [
        row[0]
        for row in await tenant.connection.fetch(
            "SELECT column_name FROM information_schema.columns WHERE table_name = 'vms' AND table_schema = 'public'"
        )
        if row[0] not in {"id", "name"}
    ]
    named = ", ".join(columns)
    await tenant.connection.execute(
        f"INSERT INTO vms (id, name, {named}) SELECT gen_random_uuid(), 'vm-' || n, {named}"
        " FROM vms, generate_series(2, $2::integer) AS n WHERE id = $1",
        model,
        count,
    )
    await tenant.connection.execute("ANALYZE vms")
    rows = await tenant.connection.fetch("SELECT id FROM vms WHERE project_id = $1 ORDER BY id", tenant.project)
    return [row["id"] for row in rows]


def ids_of(page: dict[str, object]) -> list[uuid.UUID]:
    items = page["items"]
    assert isinstance(items, list)
    return [uuid.UUID(item["id"]) for item in items]


async def test_a_long_list_is_whole_and_begins_at_once(client: AsyncClient, tenant: Tenant) -> None:
    vms = await fill(tenant, MANY)
    firsts, wholes = [], []
    await client.get("/v1/whoami")
    for _ in range(5):
        began = time.perf_counter()
        body = b""
        async with client.stream("GET", "/v1/vms", params={"limit": 100_000}) as response:
            async for chunk in response.aiter_raw():
                if not body:
                    firsts.append(1000 * (time.perf_counter() - began))
                body += chunk
        wholes.append(1000 * (time.perf_counter() - began))
    page = VmPage.model_validate_json(body)
    assert [vm.id for vm in page.items] == vms
    assert page.next is None
    print(f"{MANY} VMs, {len(body) / 2**20:.1f} MiB: first byte after {min(firsts):.0f}-{max(firsts):.0f} ms,", end=" ")
    print(f"last after {min(wholes):.0f}-{max(wholes):.0f} ms")
    assert min(firsts) < 100


async def test_a_list_ends_where_it_is_asked_to_and_says_how_to_go_on(client: AsyncClient, tenant: Tenant) -> None:
    """Around the sizes of the batches in which it is read: 100, then 500 each."""
    vms = await fill(tenant, 1300)
    for limit in (1, 99, 100, 101, 599, 600, 601, 1100, 1299, 1300, 1301):
        page = (await client.get("/v1/vms", params={"limit": limit})).json()
        assert ids_of(page) == vms[:limit]
        assert (page["next"] is None) == (limit >= 1300)
        if page["next"]:
            rest = (await client.get("/v1/vms", params={"limit": 100_000, "cursor": page["next"]})).json()
            assert (ids_of(rest), rest["next"]) == (vms[limit:], None)


async def test_a_list_is_whole_while_vms_come_and_go(client: AsyncClient, tenant: Tenant) -> None:
    """What was there all the time is in it once, whatever else happens between its batches."""
    vms = await fill(tenant, 3000)
    doomed = set(vms[::7])
    listing = asyncio.create_task(client.get("/v1/vms", params={"limit": 100_000}))
    for vm_id in list(doomed)[:60]:
        await tenant.update(vm_id, state="deleting", desired="deleted", deadline=datetime.now(UTC))
        await tenant.update(vm_id, state="deleted", host_id=None, token=None)
        await tenant.insert()
    listed = ids_of((await listing).json())
    assert listed == sorted(set(listed))
    assert set(vms) - doomed <= set(listed)


async def slow_reader(api: Api, token: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Somebody who has asked for a long list, and has taken no more than its head."""
    reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(api.url).port, limit=2**16)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**18)
    request = f"GET /v1/vms?limit=100000 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n"
    writer.write(request.encode())
    head = await reader.readuntil(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head.lower()
    return reader, writer


async def test_a_list_may_lose_all_that_was_still_to_come(api: Api, tenant: Tenant) -> None:
    """They were counted as more to come, and then they are gone: the document is whole all the same."""
    vms = await fill(tenant, 15_000)
    reader, writer = await slow_reader(api, tenant.tokens["reader"])
    await tenant.connection.execute("DELETE FROM vms WHERE project_id = $1", tenant.project)
    page = json.loads(await dechunked(reader))
    listed = ids_of(page)
    assert 0 < len(listed) < len(vms)
    assert (listed, page["next"]) == (vms[: len(listed)], None)
    writer.close()


async def test_a_list_is_cut_when_its_readers_token_has_ended(api: Api, tenant: Tenant) -> None:
    await fill(tenant, 15_000)
    reader, writer = await slow_reader(api, tenant.tokens["reader"])
    await tenant.revoke(tenant.tokens["reader"])
    await asyncio.sleep(KEEP_S + 0.2)
    with pytest.raises((asyncio.IncompleteReadError, ValueError)):  # there is no last chunk
        await dechunked(reader)
    writer.close()


async def dechunked(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int(await reader.readline(), 16):
        body += await reader.readexactly(size)
        assert await reader.readexactly(2) == b"\r\n"
    return body


async def test_an_error_in_the_middle_of_a_list_is_no_end(
    run_dir: Path, rabbit: Rabbit, api_dsn: str, tenant: Tenant
) -> None:
    await fill(tenant, 8_000)
    proxy = Proxy(urlsplit(api_dsn).port or 0)
    await proxy.open()
    through = api_dsn.replace(f":{urlsplit(api_dsn).port}/", f":{proxy.port}/")
    with running_api(run_dir, amqp_url=rabbit.url_of("leveret-api"), database_url=through) as api:
        await asyncio.to_thread(api.wait_ready)
        async with AsyncClient(base_url=api.url, headers=tenant.headers(), timeout=30, trust_env=False) as client:
            async with client.stream("GET", "/v1/vms", params={"limit": 100_000}) as response:
                assert response.status_code == 200
                chunks = response.aiter_raw()
                assert (await anext(chunks)).startswith(b'{"items":[')
                await proxy.close()
                with pytest.raises(httpx2.RemoteProtocolError):
                    [chunk async for chunk in chunks]
            await proxy.open()
            await asyncio.to_thread(api.wait_ready)
            assert (await client.get("/v1/vms?limit=1")).status_code == 200
        log = api.log.read_text()
        assert "answer.cut" in log
        assert "Traceback" not in log
    await proxy.close()


async def test_a_list_costs_as_much_memory_as_a_batch_however_slow_its_reader(
    run_dir: Path, rabbit: Rabbit, api_dsn: str, tenant: Tenant
) -> None:
    """20,000 VMs are 10 MB, and 5 readers that take nothing would hold 50 MB of them."""
    await fill(tenant, 20_000)
    with running_api(run_dir, amqp_url=rabbit.url_of("leveret-api"), database_url=api_dsn) as api:
        api.wait_ready()
        process = psutil.Process(api.process.pid)
        async with AsyncClient(base_url=api.url, headers=tenant.headers(), timeout=60, trust_env=False) as client:
            assert len((await client.get("/v1/vms?limit=1000")).content) > 500_000
            before = process.memory_info().rss
            whole = (await client.get("/v1/vms?limit=100000")).content
            after = process.memory_info().rss
            slow = [await asyncio.open_connection("127.0.0.1", urlsplit(api.url).port, limit=1024) for _ in range(5)]
            token = tenant.headers()["Authorization"]
            for _, writer in slow:
                writer.write(f"GET /v1/vms?limit=100000 HTTP/1.1\r\nHost: x\r\nAuthorization: {token}\r\n\r\n".encode())

            async def are_stuck() -> bool:
                under_way = "leveret_api_requests_in_flight 6.0" in (await client.get("/metrics")).text
                return under_way and await asyncio.to_thread(process.cpu_percent, 0.3) < 5

            await eventually(are_stuck, within_s=20, what="all that will be made is made")
            stuck = process.memory_info().rss
            for _, writer in slow:
                writer.transport.abort()

            async def are_gone() -> bool:
                return "leveret_api_requests_in_flight 1.0" in (await client.get("/metrics")).text

            await eventually(are_gone, what="who went away is let go")
    mib = [round(rss / 2**20, 1) for rss in (before, after, stuck)]
    print(
        f"resident MiB: {mib[0]} before, {mib[1]} after a list of {len(whole) / 2**20:.0f} MiB, {mib[2]} with 5 stuck"
    )
    assert after - before < 15 * 2**20
    assert stuck - before < 30 * 2**20
