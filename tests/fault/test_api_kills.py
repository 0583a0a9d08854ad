"""Row 1 of the fault table: the API is killed before it publishes, before the confirm, and before it answers.

Whoever asked does not know what became of it, and asks again: with the same id (PUT), the same Idempotency-Key (POST)
or the same X-Request-Id. What nobody asks for again was made once, or not at all.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx2
import pytest
from installation import Installation, installed
from load import TINY, whole
from peers import eventually
from proxy import Proxy

from leveret.shared.fault_points import Deed
from leveret.shared.ids import id_for_key, new_id
from leveret.stack.layout import Options

pytestmark = [pytest.mark.fault, pytest.mark.timeout(300)]

#: How long a confirm is on its way where the API is killed before it comes.
SLOW_LINE_S = 1.5


@pytest.fixture(scope="module")
def house() -> Iterator[Installation]:
    with installed(Options(conductors=1, fake_hosts=2, libvirt=False)) as installation:
        installation.reconfigure("api", LEVERET_FAULTS=str(plans_of(installation)))
        installation.wait_ready()
        yield installation


def plans_of(house: Installation) -> Path:
    plans = house.layout.root / "plans"
    plans.mkdir(exist_ok=True)
    return plans


@dataclass
class Ask:
    """One request that can be sent again as it is. `vm_id` is known before it is sent."""

    verb: str
    path: str
    vm_id: UUID
    headers: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] | None = None


def put() -> Ask:
    vm_id = new_id()
    return Ask("PUT", f"/v1/vms/{vm_id}", vm_id, body=TINY)


def post() -> Ask:
    key = f"key {new_id()}"
    return Ask("POST", "/v1/vms", id_for_key("default", key), {"Idempotency-Key": key}, TINY)


def reboot(vm_id: UUID) -> Ask:
    return Ask("POST", f"/v1/vms/{vm_id}/actions/reboot", vm_id, {"X-Request-Id": str(new_id())})


class Web:
    """A client that tries nothing twice by itself."""

    def __init__(self, house: Installation) -> None:
        headers = {"Authorization": f"Bearer {house.token}"}
        self.client = httpx2.AsyncClient(base_url=house.url, headers=headers, timeout=20, trust_env=False)

    async def send(self, ask: Ask) -> httpx2.Response | None:
        """The answer; None when the connection broke instead."""
        try:
            return await self.client.request(ask.verb, ask.path, headers=ask.headers, json=ask.body)
        except httpx2.TransportError:
            return None

    async def again(self, ask: Ask) -> dict[str, Any]:
        """Ask once more, until somebody answers; an API that does not reach the broker yet says that it is safe to."""

        async def answered() -> httpx2.Response | None:
            answer = await self.send(ask)
            return None if answer is not None and answer.headers.get("retry-after") else answer

        answer: httpx2.Response = await eventually(answered, within_s=60, what="an API that answers")
        assert answer.status_code == 202, answer.text
        told: dict[str, Any] = answer.json()
        assert told["vm_id"] == str(ask.vm_id)
        return told


@pytest.fixture
async def web(house: Installation) -> AsyncIterator[Web]:
    web = Web(house)
    async with web.client:
        yield web


Killing = Callable[[Installation, list[Ask]], contextlib.AbstractAsyncContextManager[None]]


def at(point: str, deed: Deed) -> Killing:
    """The API ends at a step that it takes for one of the requests; the others are wherever they are."""

    @contextlib.asynccontextmanager
    async def killing(house: Installation, _asks: list[Ask]) -> AsyncIterator[None]:
        pending = plans_of(house) / "new"
        pending.write_text(deed)
        pending.rename(plans_of(house) / point)
        try:
            yield
            await eventually(lambda: not house.runner.daemon("api").is_running(), within_s=30, what="the API ends")
        finally:
            (plans_of(house) / point).unlink(missing_ok=True)

    return killing


@contextlib.asynccontextmanager
async def before_the_confirm(house: Installation, asks: list[Ask]) -> AsyncIterator[None]:
    """Everything is queued, and carried out; that is on its way to the API when it ends."""
    usual = house.services["api"]
    proxy = Proxy(house.rabbit.port)
    await proxy.open()
    try:
        url = proxy.through(usual.env["LEVERET_AMQP_URL"])
        await asyncio.to_thread(house.reconfigure, "api", LEVERET_AMQP_URL=url)
        await asyncio.to_thread(house.wait_ready)
        proxy.delay_s = SLOW_LINE_S
        yield

        async def carried_out() -> bool:
            rows = await house.query("SELECT id, restarts FROM vms WHERE id = ANY($1)", [ask.vm_id for ask in asks])
            return len(rows) == len(asks) and (asks[0].body is not None or all(row["restarts"] for row in rows))

        await eventually(carried_out, within_s=30, what="the requests are carried out")
        await asyncio.to_thread(house.kill, "api")
    finally:
        await proxy.close()
        house.services["api"] = usual


MOMENTS: dict[str, Killing] = {
    "before it publishes": at("asking.publish", Deed.KILL_BEFORE),
    "before the confirm": before_the_confirm,
    "before the verdict": at("asking.publish", Deed.KILL_AFTER),
    "before it answers": at("api.answer", Deed.KILL_BEFORE),
}


async def suffer(house: Installation, web: Web, killing: Killing, asks: list[Ask]) -> None:
    """Ask all of this at once, and have the API killed meanwhile; then it is started again."""
    async with killing(house, asks):
        sending = [asyncio.create_task(web.send(ask)) for ask in asks]
        await asyncio.sleep(0)
    answers = await asyncio.gather(*sending)
    assert None in answers, "somebody does not know what became of it"
    assert all(answer is None or answer.status_code == 202 for answer in answers)
    await asyncio.to_thread(house.restart, "api")


async def events_of(house: Installation, kind: str, ids: list[UUID]) -> dict[UUID, int]:
    rows = await house.query(
        "SELECT vm_id, count(*) AS n FROM events WHERE type = $1 AND vm_id = ANY($2) GROUP BY vm_id", kind, ids
    )
    return {row["vm_id"]: row["n"] for row in rows}


@pytest.mark.parametrize("kind", [put, post])
@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_create_that_is_asked_for_again_gets_the_same_vm(
    house: Installation, web: Web, moment: str, kind: Callable[[], Ask]
) -> None:
    asks = [kind() for _ in range(5)]
    ids = [ask.vm_id for ask in asks]
    known = {row["id"] for row in await house.query("SELECT id FROM vms")}
    await suffer(house, web, MOMENTS[moment], asks)
    *repeated, given_up = asks  # of which nobody asks again
    for _ in range(2):
        told = await asyncio.gather(*(web.again(ask) for ask in repeated))
        assert [UUID(one["vm_id"]) for one in told] == ids[:-1]
    other = await web.send(Ask(repeated[0].verb, repeated[0].path, ids[0], repeated[0].headers, {**TINY, "vcpus": 2}))
    assert other is not None
    assert (other.status_code, other.json()["code"]) == (422 if kind is post else 409, "id_conflict")
    await whole(house)
    rows = {row["id"]: row["state"] for row in await house.query("SELECT id, state FROM vms")}
    assert rows.keys() - known - {given_up.vm_id} == set(ids[:-1]), "no ghost"
    assert {rows[vm_id] for vm_id in ids[:-1]} == {"running"}
    assert set((await events_of(house, "accepted", ids)).values()) == {1}
    assert set((await events_of(house, "scheduled", ids)).values()) == {1}
    assert not await house.query("SELECT FROM rejections WHERE vm_id = ANY($1)", ids)


@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_reboot_that_is_asked_for_again_happens_once(house: Installation, web: Web, moment: str) -> None:
    makings = [put() for _ in range(3)]
    await asyncio.gather(*(web.again(ask) for ask in makings))
    await whole(house)
    asks = [reboot(ask.vm_id) for ask in makings]
    await suffer(house, web, MOMENTS[moment], asks)
    await asyncio.gather(*(web.again(ask) for ask in asks))
    await asyncio.gather(*(web.again(ask) for ask in asks))
    await whole(house)
    rows = await house.query("SELECT state, restarts FROM vms WHERE id = ANY($1)", [ask.vm_id for ask in asks])
    assert [(row["state"], row["restarts"]) for row in rows] == [("running", 1)] * 3
