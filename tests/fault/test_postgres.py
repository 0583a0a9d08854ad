"""Postgres is away, slow, full, or never says what became of a COMMIT: rows 3 and 15 of the fault table."""

import asyncio
import json
import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import aio_pika
import pytest
from installation import Installation, installed
from load import Load, paused, redelivered, whole
from peers import Gateway, eventually, tiny, up
from postgres_proxy import Fate, proxied
from standby import freeze

from leveret.shared.documents import CreateProject, CreateVm, DeleteVm, RebootVm, StopVm, UpdateQuota
from leveret.shared.errors import Code
from leveret.shared.ids import new_id
from leveret.shared.messages import EndToken, NewToken
from leveret.stack.layout import Options

pytestmark = [pytest.mark.fault, pytest.mark.timeout(300)]

CONDUCTORS = ("conductor-1", "conductor-2")
#: The database roles of the services.
ROLES = ("conductor", "api")


@pytest.fixture(scope="module")
def house() -> Iterator[Installation]:
    with installed(Options(conductors=2, fake_hosts=8, libvirt=False)) as installation:
        installation.reconfigure("fake-hosts", LEVERET_HEARTBEAT_S="1")
        installation.wait_ready()
        yield installation


# Row 3.


@dataclass
class History:
    """What was asked, under which id, and what was told."""

    accepted: dict[str, str] = field(default_factory=dict)
    refused: dict[str, Code | str] = field(default_factory=dict)

    async def ask(self, gateway: Gateway, vm_id: UUID, message: Any) -> bool:
        """Whether a request about a VM was accepted."""
        return await self._ask(gateway, message, vm_id=str(vm_id), requested_at=str(time.time()), project="default")

    async def order(self, gateway: Gateway, message: Any, project: str) -> bool:
        return await self._ask(gateway, message, project=project, actor="token admin")

    async def _ask(self, gateway: Gateway, message: Any, **headers: str) -> bool:
        """However long it takes: the answer comes when it is known."""
        verdict = await gateway.ask_with(message, {"request_id": new_id().hex} | headers, wait_s=90)
        if verdict.problem is None:
            self.accepted[verdict.request_id] = type(message).__name__
        else:
            self.refused[verdict.request_id] = verdict.problem.code
        return bool(verdict.accepted)


@dataclass
class Wish:
    """What became of one VM, by what its owner was told."""

    state: str
    reboots: int = 0


async def live(gateway: Gateway, history: History, chance: random.Random, taken: str) -> tuple[UUID, Wish | None]:
    """The life of one VM: made, rebooted, stopped or deleted, and its name wanted by another."""
    vm_id = new_id()
    await asyncio.sleep(chance.uniform(0, 3))
    name = taken if chance.random() < 0.2 else f"vm-{vm_id.hex[-12:]}"
    if not await history.ask(gateway, vm_id, tiny(name)):
        return vm_id, None
    wish = Wish("running")
    for _ in range(chance.randrange(3)):
        wish.reboots += await history.ask(gateway, vm_id, RebootVm())
    match chance.randrange(4):
        case 0:
            assert await history.ask(gateway, vm_id, StopVm(grace_s=0))
            wish.state = "stopped"
        case 1:
            assert await history.ask(gateway, vm_id, DeleteVm())
            wish.state = "deleted"
    return vm_id, wish


async def administer(gateway: Gateway, history: History, chance: random.Random, project: str) -> None:
    """A project with a limit, a token that stays, one that goes, and one whose name is taken."""
    assert await history.order(gateway, CreateProject(), project)
    assert await history.order(gateway, UpdateQuota(vms=chance.randrange(1, 9)), project)
    tokens = [NewToken(name=name, token_id=uuid4(), hash=uuid4().hex * 2) for name in ("stays", "goes", "stays")]
    told = [await history.order(gateway, token, project) for token in tokens]
    assert told == [True, True, False]
    assert await history.order(gateway, EndToken(token_id=tokens[1].token_id), project)


@asynccontextmanager
async def hearing(house: Installation, project: str) -> AsyncIterator[list[tuple[int, str]]]:
    """Everything that the relay publishes of this project: number and body."""
    heard: list[tuple[int, str]] = []
    async with await aio_pika.connect(house.rabbit.url) as connection:
        queue = await (await connection.channel()).declare_queue(exclusive=True)
        await queue.bind(f"leveret.events.{project}", "#")

        async def hear(message: Any) -> None:
            body = message.body.decode()
            heard.append((int(json.loads(body)["sequence"]), body))

        await queue.consume(hear, no_ack=True)
        yield heard


async def cut_commits(house: Installation, *, lives: int, seed: int) -> Counter[Fate]:
    """Ask for much while a fifth of all COMMITs is cut, then compare what was told with what there is."""
    chance = random.Random(seed)
    fates = random.Random(seed + 1)
    history = History()
    taken = f"taken-{seed % 1000}"

    def decide() -> Fate:
        return fates.choices([Fate.PASS, Fate.UNHEARD, Fate.UNANSWERED], [8, 1, 1])[0]

    async with proxied(house.postgres.port, decide) as proxy, hearing(house, "default") as heard:
        for name in CONDUCTORS:
            dsn = house.services[name].env["LEVERET_DATABASE_URL"]
            await asyncio.to_thread(house.reconfigure, name, LEVERET_DATABASE_URL=proxy.url_of(dsn))
        try:
            await asyncio.to_thread(house.wait_ready)
            before = await redelivered(house)
            gateway = Gateway(house.rabbit)
            async with up(gateway):
                assert await history.ask(gateway, new_id(), tiny(taken))
                projects = [f"p{seed % 1000}-{n}" for n in range(max(1, lives // 10))]
                ends, _ = await asyncio.gather(
                    asyncio.gather(*(live(gateway, history, chance, taken) for _ in range(lives))),
                    asyncio.gather(*(administer(gateway, history, chance, project) for project in projects)),
                )
            await house.settle(within_s=120)
            await eventually(lambda: house.query(_ALL_PUBLISHED), within_s=60, what="everything published")
            assert await redelivered(house) == before, "a consumer that waits gives nothing back"
        finally:
            for name in CONDUCTORS:
                await asyncio.to_thread(house.reconfigure, name, LEVERET_DATABASE_URL=dsn)
    carried_out = Counter(history.accepted.values())
    assert min(carried_out[kind.__name__] for kind in (CreateVm, RebootVm, StopVm, DeleteVm)) >= lives // 10, (
        carried_out
    )
    await agrees(house, history, dict(ends))
    newest = (await house.query("SELECT last_seq FROM projects WHERE id = 'default'"))[0]["last_seq"]
    bodies = dict(heard)
    assert all(bodies[seq] == body for seq, body in heard), "an event that is told again is the same event"
    assert sorted(bodies) == list(range(min(bodies), newest + 1)), "the relay left nothing out"
    return proxy.met


_ALL_PUBLISHED = "SELECT FROM projects WHERE id = 'default' AND published_seq = last_seq"


async def agrees(house: Installation, history: History, ends: dict[UUID, Wish | None]) -> None:
    """The database holds what was told: everything that was accepted once, nothing that was refused."""
    rows = {row["id"]: row for row in await house.query("SELECT id, state, restarts FROM vms")}
    found = {vm_id: rows.get(vm_id) for vm_id in ends}
    assert {vm_id: row and (row["state"], row["restarts"]) for vm_id, row in found.items()} == {
        vm_id: wish and (wish.state, wish.reboots) for vm_id, wish in ends.items()
    }
    events = await house.query("SELECT type, data->>'request_id' AS request FROM events WHERE data ? 'request_id'")
    told = Counter((row["request"], row["type"] == "rejected") for row in events if row["type"] != "token.created")
    tokens = Counter(row["request"] for row in events if row["type"] == "token.created")
    for request_id, what in history.accepted.items():
        count = tokens[request_id] if what == "NewToken" else told[request_id, False]
        assert (count, told[request_id, True]) == (1, 0), f"{what} {request_id} was accepted"
    for request_id, code in history.refused.items():
        assert told[request_id, False] + tokens[request_id] == 0, f"{request_id} was refused: {code}"
        assert told[request_id, True] <= 1
    judged = Counter(row["request_id"] for row in await house.query("SELECT request_id FROM orders"))
    assert {judged[one] for one, what in history.accepted.items() if what in _ORDERS} == {1}
    refused = await house.query("SELECT vm_id FROM rejections")
    assert {row["vm_id"] for row in refused} >= {vm_id for vm_id, wish in ends.items() if wish is None}


_ORDERS = {CreateProject.__name__, UpdateQuota.__name__, NewToken.__name__, EndToken.__name__}


async def test_whatever_becomes_of_a_commit_everybody_is_told_what_is_so(
    house: Installation, record_property: Callable[[str, object], None]
) -> None:
    """COMMITs that are never heard, and that are never answered; of creates, changes, reports, orders, relays."""
    met = await cut_commits(house, lives=40, seed=20261122)
    record_property("commits", {fate.name: count for fate, count in met.items()})
    assert min(met[Fate.UNHEARD], met[Fate.UNANSWERED]) >= 20, met
    await whole(house)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(5))
async def test_whatever_becomes_of_many_commits(seed: int, house: Installation) -> None:
    met = await cut_commits(house, lives=200, seed=seed)
    assert min(met[Fate.UNHEARD], met[Fate.UNANSWERED]) >= 100, met
    await whole(house)


# Row 15.


Trouble = Callable[[Installation, Load], AbstractAsyncContextManager[None]]


@asynccontextmanager
async def crashed(house: Installation, _load: Load) -> AsyncIterator[None]:
    """An immediate shutdown leaves what a crash leaves."""
    await asyncio.to_thread(house.postgres.stop, "immediate")
    yield
    await asyncio.to_thread(house.postgres.start)
    await asyncio.to_thread(house.postgres.wait_ready)


@asynccontextmanager
async def setting(house: Installation, _load: Load, name: str, value: str) -> AsyncIterator[None]:
    """With this setting of the server, which sessions that are there take on too."""
    await asyncio.to_thread(house.postgres.psql, f"ALTER SYSTEM SET {name} = {value}; SELECT pg_reload_conf();")
    try:
        yield
    finally:
        await asyncio.to_thread(house.postgres.psql, f"ALTER SYSTEM RESET {name}; SELECT pg_reload_conf();")


@asynccontextmanager
async def exhausted(house: Installation, _load: Load) -> AsyncIterator[None]:
    """All connections that the services may have are taken."""
    limits = "".join(f"ALTER ROLE {role} CONNECTION LIMIT 0;" for role in ROLES)
    ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename IN ('conductor', 'api');"
    await asyncio.to_thread(house.postgres.psql, limits + ended)
    try:
        yield
    finally:
        await asyncio.to_thread(house.postgres.psql, limits.replace("LIMIT 0", "LIMIT -1"))


@asynccontextmanager
async def full(house: Installation, _load: Load) -> AsyncIterator[None]:
    """Not a byte is left where Postgres keeps its data. A server that gave up is started again, as by a supervisor."""
    ballast = _data_of(house) / "ballast"
    await asyncio.to_thread(_command, "dd", "if=/dev/zero", f"of={ballast}", "bs=64k")
    try:
        yield
    finally:
        ballast.unlink()
    await asyncio.to_thread(house.postgres.start)
    await asyncio.to_thread(house.postgres.wait_ready)


def _data_of(house: Installation) -> Path:
    return house.layout.postgres / "data"


@contextmanager
def on_small_disk(house: Installation) -> Iterator[None]:
    """The server's data on a file system of 160 MiB of its own."""
    data, small = _data_of(house), house.layout.postgres / "small"
    small.mkdir()
    owner = data.stat()
    options = f"size=160m,mode=700,uid={owner.st_uid},gid={owner.st_gid}"
    if _command("mount", "-t", "tmpfs", "-o", options, "leveret-test", str(small)):
        pytest.skip("no file system can be mounted here")
    try:
        house.postgres.stop()
        assert not _command("cp", "-a", f"{data}/.", str(small))
        assert not _command("mount", "--bind", str(small), str(data))
        try:
            house.postgres.start()
            house.postgres.wait_ready()
            yield
        finally:
            house.postgres.stop()
            assert not _command("umount", str(data))
        shutil.rmtree(data)
        assert not _command("cp", "-a", str(small), str(data))
    finally:
        _command("umount", "--lazy", str(small))
        house.postgres.start()
        house.postgres.wait_ready()


def _command(*argv: str) -> int:
    return subprocess.run(argv, capture_output=True, check=False, timeout=60).returncode


@asynccontextmanager
async def hung(house: Installation, load: Load) -> AsyncIterator[None]:
    """COMMITs wait for a standby that is not there. What it does not have must not be seen, nor told, by anybody."""

    async def seen() -> tuple[int, int, int]:
        [row] = await house.query("SELECT count(*) AS events, count(seq) AS numbered FROM events")
        return row["events"], row["numbered"], sum(life.created == "accepted" for life in load.lives.values())

    waiting = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND usename = 'conductor'"
    async with setting(house, load, name="synchronous_standby_names", value="nobody"):
        await eventually(lambda: house.postgres.psql(waiting), within_s=30, what="a COMMIT that waits")
        before = await seen()
        yield
        assert await seen() == before


async def survive(
    house: Installation, trouble: Trouble, record_property: Callable[[str, object], None], *, hold_s: float
) -> Load:
    """Ask before, during and after a trouble of this length; nothing is lost, and nobody waits for long."""
    load = Load(house, random.Random(15))
    before, waited = await redelivered(house), paused(house)
    async with load.going_on(pause_s=max(0.1, hold_s / 600)):
        await eventually(lambda: len(load.told) > 5, within_s=30, what="some asked before")
        async with trouble(house, load):
            until = time.monotonic() + hold_s
            await eventually(
                lambda: paused(house) > waited and time.monotonic() > until,
                within_s=hold_s + 60,
                what="the conductors wait for Postgres",
            )
            assert await redelivered(house) == before, "a consumer that waits gives nothing back"
        recovery_s = await load.caught_up(within_s=60)
        asked = len(load.told)
        await eventually(lambda: len(load.told) > asked + 3, within_s=30, what="some asked afterwards")
    record_property("recovery_s", round(recovery_s, 2))
    record_property("longest_answer_s", round(load.longest_s, 2))
    record_property("answers", dict(load.statuses))
    print(f"recovery {recovery_s:.2f} s, longest answer {load.longest_s:.2f} s, {dict(load.statuses)}")
    assert load.longest_s < 9, "an answer within 5 s, on a machine that has time"
    await load.is_kept()
    assert await redelivered(house) == before
    return load


@pytest.mark.parametrize(
    "trouble",
    [partial(setting, name="default_transaction_read_only", value="on"), exhausted],
    ids=["read only", "out of connections"],
)
async def test_nothing_is_lost_while_postgres_is(
    trouble: Trouble, house: Installation, record_property: Callable[[str, object], None]
) -> None:
    await survive(house, trouble, record_property, hold_s=4)


async def test_nothing_is_lost_while_postgres_has_no_room(
    house: Installation, record_property: Callable[[str, object], None]
) -> None:
    with on_small_disk(house):
        await survive(house, full, record_property, hold_s=6)


async def test_nothing_is_lost_while_commits_wait_for_a_standby(
    house: Installation, record_property: Callable[[str, object], None]
) -> None:
    """Longer than anybody waits for an answer; nothing is taken for committed until it is."""
    await survive(house, hung, record_property, hold_s=12)


@pytest.mark.slow
async def test_nothing_is_lost_when_every_commit_takes_ten_seconds(house: Installation) -> None:
    load = Load(house, random.Random(10))
    async with proxied(house.postgres.port) as proxy:
        proxy.commit_delay_s = 10.0
        for name in CONDUCTORS:
            dsn = house.services[name].env["LEVERET_DATABASE_URL"]
            await asyncio.to_thread(house.reconfigure, name, LEVERET_DATABASE_URL=proxy.url_of(dsn))
        try:
            await asyncio.to_thread(house.wait_ready)
            async with load.going_on(clients=1, pause_s=1):
                await eventually(lambda: len(load.told) >= 5, within_s=60, what="some asked")
            await load.caught_up(within_s=120)
            proxy.commit_delay_s = 0.0
        finally:
            for name in CONDUCTORS:
                await asyncio.to_thread(house.reconfigure, name, LEVERET_DATABASE_URL=dsn)
    await load.is_kept()


async def test_nothing_is_lost_in_a_crash_and_an_outage_of_twenty_seconds(
    house: Installation, record_property: Callable[[str, object], None]
) -> None:
    await survive(house, crashed, record_property, hold_s=20)


@pytest.mark.slow
@pytest.mark.timeout(3600)
async def test_nothing_is_lost_in_an_outage_of_half_an_hour(
    house: Installation, record_property: Callable[[str, object], None]
) -> None:
    await survive(house, crashed, record_property, hold_s=1800)


async def test_a_conductor_that_is_told_to_stop_does_not_wait_for_a_postgres_that_hangs(house: Installation) -> None:
    load = Load(house, random.Random(16))
    stopping = house.runner.daemon("conductor-1")
    async with load.going_on():
        await eventually(lambda: len(load.told) > 5, within_s=30, what="some asked before")
        frozen = await asyncio.to_thread(freeze, house.postgres)
        try:
            asked = len(load.lives)
            await eventually(lambda: len(load.lives) > asked + 3, within_s=30, what="some asked while it hangs")
            assert await asyncio.to_thread(stopping.stop, 20), "it ends by itself"
        finally:
            for process in frozen:
                process.resume()
        await asyncio.to_thread(house.restart, "conductor-1")
    await load.is_kept()
