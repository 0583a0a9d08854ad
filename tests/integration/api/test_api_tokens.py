"""A token is good for as long as it is good, and not five seconds longer, for whoever waits too."""

import asyncio
import hashlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from api_process import Api, running_api
from api_world import ScriptedConductor, Tenant, problem_of
from httpx2 import AsyncClient
from peers import eventually
from sse_reader import streaming

from leveret.api.auth import KEEP_S, REFUSED_KEEP_S, Tokens
from leveret.api.database import Database
from leveret.api.last_use import LastUse
from leveret.shared import topology
from leveret.shared.bus import Furniture, Link, Publisher
from leveret.shared.errors import Code, LeveretError
from leveret.shared.ids import new_id
from leveret.shared.messages import TokensUsed
from leveret.stack.rabbitmq import Rabbit

pytestmark = pytest.mark.integration

#: After this time a revoked token works nowhere. The margin is for a machine that does much else meanwhile.
NOWHERE_S = 5.0 + 1.0


@pytest.fixture
async def database(api_dsn: str) -> AsyncIterator[Database]:
    database = Database(api_dsn, connections_max=2)
    await database.open()
    yield database
    await database.close()


class Counted(Database):
    """A database that counts how often it is asked."""

    asked = 0

    async def row(self, project: str | None, query: str, *arguments: object):  # type: ignore[no-untyped-def]
        self.asked += 1
        return await super().row(project, query, *arguments)


@pytest.fixture
async def counted(api_dsn: str) -> AsyncIterator[Counted]:
    database = Counted(api_dsn, connections_max=2)
    await database.open()
    yield database
    await database.close()


async def refused(asking: Awaitable[object]) -> str:
    with pytest.raises(LeveretError) as caught:
        await asking
    assert caught.value.problem.code is Code.UNAUTHENTICATED
    return caught.value.problem.message


async def test_a_token_tells_who_it_is(stranger: AsyncClient, tenant: Tenant) -> None:
    ends = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    token = await tenant.issue("reader", name="ci", expires_at=ends)
    for headers, role in ((tenant.headers("admin"), "admin"), ({"Authorization": f"Bearer {token}"}, "reader")):
        answer = (await stranger.get("/v1/whoami", headers=headers)).json()
        assert (answer["project"], answer["role"]) == (tenant.project, role)
        assert set(answer) == {"project", "role", "token"}
        assert set(answer["token"]) == {"id", "name", "expires_at"}
    assert answer["token"]["name"] == "ci"
    assert datetime.fromisoformat(answer["token"]["expires_at"]) == ends
    assert uuid.UUID(answer["token"]["id"]) == await tenant.connection.fetchval(
        "SELECT id FROM tokens WHERE hash = $1", hashlib.sha256(token.encode()).digest()
    )
    assert token not in str(answer)
    problem_of(await stranger.get("/v1/whoami?x=1", headers=tenant.headers()), 422, Code.INVALID_REQUEST)


async def test_who_asks_is_named_for_the_record(database: Database, tenant: Tenant) -> None:
    identity = await Tokens(database).identify(await tenant.issue("member", name="ci"))
    assert identity.actor == f"token ci of {tenant.project}"
    assert identity.digest.hex() not in repr(identity)
    assert repr(identity.digest) not in repr(identity)


async def poll(client: AsyncClient, tenant: Tenant) -> int:
    return (await client.get("/v1/events", params={"after": "latest", "wait_s": 30})).status_code


async def wait(client: AsyncClient, tenant: Tenant) -> int:
    path = f"/v1/vms/{await tenant.insert()}"
    return (await client.get(path, params={"wait": "stopped", "timeout_s": 30})).status_code


async def follow(client: AsyncClient, tenant: Tenant) -> int:
    async with streaming(client) as stream:
        assert await stream.next() is None  # an end, and no error
    return (await client.get("/v1/events")).status_code


@pytest.mark.parametrize("ends", ["revoked", "expired", "project"])
async def test_nobody_waits_on_with_a_token_that_has_ended(api: Api, tenant: Tenant, ends: str) -> None:
    """Long polls, waits and streams are under way while it ends; and others, whose token is good, go on."""
    soon = datetime.now(UTC) + timedelta(seconds=2) if ends == "expired" else None
    token = await tenant.issue("reader", expires_at=soon)
    headers, good = {"Authorization": f"Bearer {token}"}, tenant.headers("reader")
    async with (
        AsyncClient(base_url=api.url, headers=headers, timeout=60, trust_env=False) as client,
        AsyncClient(base_url=api.url, headers=good, timeout=60, trust_env=False) as other,
        streaming(other) as kept,
    ):
        kinds: tuple[Callable[[AsyncClient, Tenant], Awaitable[int]], ...] = (poll, wait, follow)
        waiting = [asyncio.ensure_future(kind(client, tenant)) for kind in kinds]
        assert (await client.get("/v1/vms")).status_code == 200
        await asyncio.sleep(1.0)
        assert not any(task.done() for task in waiting)
        began = time.monotonic()
        if ends == "revoked":
            await tenant.revoke(token)
        elif ends == "expired":
            began += 1.0  # it has one second left
        else:
            await tenant.connection.execute("UPDATE projects SET deleted_at = now() WHERE id = $1", tenant.project)
        done, _ = await asyncio.wait(waiting, timeout=began + NOWHERE_S - time.monotonic())
        assert len(done) == len(waiting)
        assert [task.result() for task in waiting] == [401, 401, 401]
        print(f"{ends}: nobody waits any more after {time.monotonic() - began:.1f} s")
        if ends != "project":
            seq = await tenant.tell(await tenant.insert(), "running", "running")
            assert [event.id for event in await kept.take(1)] == [str(seq)]


def test_a_token_is_believed_for_less_than_five_seconds() -> None:
    assert KEEP_S < 5
    assert REFUSED_KEEP_S < 5


async def test_a_good_token_is_asked_about_once_in_a_while(counted: Counted, tenant: Tenant) -> None:
    tokens = Tokens(counted, keep_s=0.3)
    first = await tokens.identify(tenant.tokens["member"])
    for _ in range(20):
        assert await tokens.confirm(first) is first
    assert counted.asked == 1
    await eventually(lambda: time.monotonic() > first.until)
    together = await asyncio.gather(*(tokens.confirm(first) for _ in range(50)))
    assert counted.asked == 2
    assert {identity.until for identity in together} == {together[0].until}
    assert together[0].until > first.until


async def test_the_same_guess_costs_nothing_again_and_pushes_no_good_token_out(
    counted: Counted, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leveret.api.auth.REFUSED_KEPT_MAX", 10)
    tokens = Tokens(counted)
    await tokens.identify(tenant.tokens["member"])
    for _ in range(20):
        assert "is not known" in await refused(tokens.identify("nonsense"))
    assert counted.asked == 2
    for n in range(30):
        await refused(tokens.identify(f"guess-{n}"))
    assert counted.asked == 32
    await tokens.identify(tenant.tokens["member"])
    await refused(tokens.identify("guess-29"))
    assert counted.asked == 32
    assert len(tokens._refused) == 10


async def test_a_token_that_was_tried_too_early_works_soon(
    counted: Counted, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leveret.api.auth.REFUSED_KEEP_S", 0.2)
    tokens = Tokens(counted)
    await refused(tokens.identify("early"))
    await tenant.connection.execute(
        "INSERT INTO tokens (id, project_id, name, role, hash) VALUES ($1, $2, 'early', 'reader', $3)",
        new_id(),
        tenant.project,
        hashlib.sha256(b"early").digest(),
    )

    async def works() -> bool:
        try:
            return (await tokens.identify("early")).token_name == "early"
        except LeveretError:
            return False

    await eventually(works, within_s=3)
    await tenant.connection.execute("DELETE FROM tokens WHERE name = 'early'")


async def test_a_thousand_guesses_at_once_leave_connections_for_others(api_dsn: str, tenant: Tenant) -> None:
    """Two of the pool's connections may be asked about tokens at a time."""
    busiest = 0

    class Watched(Database):
        busy = 0

        async def row(self, project: str | None, query: str, *arguments: object):  # type: ignore[no-untyped-def]
            nonlocal busiest
            self.busy += 1
            busiest = max(busiest, self.busy)
            try:
                return await super().row(project, query, *arguments)
            finally:
                self.busy -= 1

    database = Watched(api_dsn, connections_max=8)
    await database.open()
    tokens = Tokens(database)
    began = time.perf_counter()
    guesses = [refused(tokens.identify(f"guess-{n}")) for n in range(1000)]
    asking = asyncio.ensure_future(tokens.identify(tenant.tokens["member"]))
    whys = await asyncio.gather(*guesses)
    identity = await asking
    print(f"1000 guesses: {time.perf_counter() - began:.2f} s")
    assert whys == ["This token is not known."] * 1000
    assert identity.project == tenant.project
    assert busiest == 2
    await database.close()


async def test_when_tokens_were_used_is_told_now_and_then(broker: Rabbit, conductor: ScriptedConductor) -> None:
    publisher = Publisher("leveret-api")
    link = Link(broker.url_of("leveret-api"), "test-last-use")
    link.add(Furniture())
    link.add(publisher)
    last_use = LastUse(publisher, link)
    one, two = new_id(), new_id()
    last_use.note(one)
    await last_use.tell_once()  # nobody listens yet: it is kept
    link.start()
    assert await link.wait_up(20)
    began = time.time()
    await last_use.tell_once()
    last_use.note(one)  # told of a moment ago
    last_use.note(two)
    await last_use.tell_once()
    last_use.note(two)
    await last_use.tell_once()
    await eventually(lambda: len(conductor.noted) == 2)
    told = [delivery.decoded() for delivery in conductor.noted]
    assert all(isinstance(message, TokensUsed) for message in told)
    assert [list(message.last_used) for message in told if isinstance(message, TokensUsed)] == [[one], [two]]
    assert all(
        abs(at - began) < 30 for message in told if isinstance(message, TokensUsed) for at in message.last_used.values()
    )
    assert conductor.noted[0].user_id == "leveret-api"
    assert conductor.noted[0].queue == topology.REQUESTS_QUEUE.name
    await link.stop()


async def test_a_process_that_stops_tells_what_it_knows(
    run_dir: Path, broker: Rabbit, conductor: ScriptedConductor, api_dsn: str, tenant: Tenant
) -> None:
    with running_api(run_dir, amqp_url=broker.url_of("leveret-api"), database_url=api_dsn) as api:
        await asyncio.to_thread(api.wait_ready)
        async with AsyncClient(base_url=api.url, headers=tenant.headers("reader"), trust_env=False) as client:
            me = uuid.UUID((await client.get("/v1/whoami")).json()["token"]["id"])
        api.process.terminate()
        await asyncio.to_thread(api.process.wait, 20)

    def told() -> bool:
        messages = [delivery.decoded() for delivery in conductor.noted if delivery.type == "token.used.v1"]
        return any(isinstance(message, TokensUsed) and me in message.last_used for message in messages)

    await eventually(told)
