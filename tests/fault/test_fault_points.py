"""Every step of every handler ends, fails, hangs, or is done twice: whatever was asked for happens all the same, once.

Rows 1, 2 and 5 of the fault table, at each instruction that matters. The table of steps makes the matrix, so a new step
has its cases at once; a step that no scene leads to fails its cases.
"""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import UUID

import aio_pika
import asyncpg
import pytest
from faulty_house import FaultyHouse, faulty_house
from peers import eventually, tiny

from leveret.client import ApiError, Leveret, http
from leveret.shared import topology
from leveret.shared.documents import Placement
from leveret.shared.fault_points import POINTS, Deed
from leveret.shared.ids import new_id
from leveret.shared.lifecycle import State
from leveret.stack.up import local_database_url

Answer = TypeVar("Answer")

pytestmark = [pytest.mark.fault, pytest.mark.timeout(120)]

CASES = [
    (point, deed)
    for point, about in POINTS.items()
    for deed in Deed
    if (about.commits or deed is not Deed.KILL_AT_COMMIT) and (about.repeats or deed is not Deed.TWICE)
]


#: After these a step has been taken, and is taken once more.
AGAIN = {Deed.KILL_AFTER, Deed.FAIL_AFTER, Deed.HANG_AFTER, Deed.TWICE}


@pytest.fixture(autouse=True)
def _soon_tired(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that does not wait half a minute for an answer before it asks again."""
    monkeypatch.setattr(http, "READ_TIMEOUT_S", 3.0)


@pytest.fixture(scope="module")
def house() -> Iterator[FaultyHouse]:
    with faulty_house() as house:
        yield house


@dataclass
class Stage:
    """Where scenes are played: an installation, somebody who asks, and what is to become of each VM."""

    house: FaultyHouse
    client: Leveret
    wished: dict[UUID, State] = field(default_factory=dict)
    is_unreadable: bool = False

    async def row(self, vm_id: UUID) -> Any:
        rows = await self.house.house.query("SELECT * FROM vms WHERE id = $1", vm_id)
        return rows[0] if rows else None

    async def host_of(self, vm_id: UUID) -> tuple[UUID, str]:
        """The host of a VM, and the process that is this host."""
        [row] = await self.house.house.query(
            "SELECT h.id, h.name FROM vms v JOIN hosts h ON h.id = v.host_id WHERE v.id = $1", vm_id
        )
        return row["id"], row["name"].removesuffix("-sim-0001")

    async def until(self, vm_id: UUID, state: State) -> None:
        """Wait until the VM is in this state, and its host has nothing more to do for it."""
        seen: Any = None

        async def there() -> bool:
            nonlocal seen
            seen = await self.row(vm_id)
            return bool(seen and seen["state"] == state and seen["deadline"] is None)

        self.wished[vm_id] = state
        try:
            await eventually(there, within_s=20, what=f"VM {state}")
        except AssertionError as error:
            error.add_note(f"It is {dict(seen) if seen else seen}")
            raise

    async def insist(self, ask: Callable[..., Awaitable[Answer]], *what: Any, **more: Any) -> Answer:
        """Ask until there is an answer: after "something went wrong here" nobody knows, and the same is asked again."""
        for _ in range(3):
            try:
                return await ask(*what, **more)
            except ApiError as error:
                if error.status != 500:
                    raise
        return await ask(*what, **more)

    async def do(self, ask: Callable[..., Awaitable[Answer]], *what: Any, **more: Any) -> Answer:
        """Insist on a request, which has one id however often it is sent."""
        return await self.insist(ask, *what, request_id=new_id().hex, **more)

    async def create(self, *, anywhere: bool = False, **more: Any) -> UUID:
        vm_id = new_id()
        placement = Placement() if anywhere else Placement(zones=["default"])
        await self.do(self.client.create, tiny(placement=placement, **more), vm_id=vm_id)
        await self.until(vm_id, State.RUNNING)
        return vm_id

    async def delete(self, *vm_ids: UUID) -> None:
        for vm_id in vm_ids:
            await self.do(self.client.delete, vm_id)
        for vm_id in vm_ids:
            await self.until(vm_id, State.DELETED)

    async def change(self, sql: str, *arguments: Any) -> None:
        await self.house.house.query(sql, *arguments)

    async def restore(self, sql: str, *arguments: Any) -> None:
        """Change a row as nothing but an older copy of the database could."""
        connection = await asyncpg.connect(local_database_url(self.house.house.layout))
        try:
            async with connection.transaction():
                await connection.execute("ALTER TABLE vms DISABLE TRIGGER USER")
                await connection.execute(sql, *arguments)
                await connection.execute("ALTER TABLE vms ENABLE TRIGGER USER")
        finally:
            await connection.close()

    async def throw(self, exchange: str, key: str, kind: str, user: str, **headers: str) -> None:
        """Publish what nobody can read."""
        connection = await aio_pika.connect(self.house.house.rabbit.url_of(user))
        async with connection:
            channel = await connection.channel(on_return_raises=True)
            message = aio_pika.Message(
                b"{", headers=dict(headers), type=kind, user_id=user, content_type="application/json"
            )
            there = await channel.get_exchange(exchange, ensure=False)

            async def is_taken() -> bool:
                """A host that has just been killed has no queue until it is back."""
                with suppress(aio_pika.exceptions.DeliveryError):
                    await there.publish(message, key, mandatory=True)
                    return True
                return False

            await eventually(is_taken, within_s=20, what=f"a queue for {key}")


Scene = Callable[[Stage], Awaitable[None]]


async def a_life(stage: Stage) -> None:
    vm_id = await stage.create()
    await stage.do(stage.client.reboot, vm_id)
    await stage.until(vm_id, State.RUNNING)
    await stage.do(stage.client.stop, vm_id, grace_s=0)
    await stage.until(vm_id, State.STOPPED)
    await stage.do(stage.client.start, vm_id)
    await stage.until(vm_id, State.RUNNING)
    await stage.delete(vm_id)


async def an_order(stage: Stage) -> None:
    name = f"p-{new_id().hex[-12:]}"
    await stage.insist(stage.client.create_project, name)
    assert await stage.house.house.query("SELECT FROM projects WHERE id = $1", name)
    await stage.insist(stage.client.delete_project, name)


async def a_rehearsal(stage: Stage) -> None:
    vm_id = new_id()
    receipt = await stage.do(stage.client.create, tiny(), vm_id=vm_id, dry_run=True)
    assert receipt.verdict == "would_be_accepted"
    assert await stage.row(vm_id) is None


async def an_unreadable_request(stage: Stage) -> None:
    vm_id = new_id()
    names = {"vm_id": str(vm_id), "request_id": vm_id.hex, "project": "default"}
    await stage.throw(topology.REQUESTS.name, "vm.create.v1", "vm.create.v1", "leveret-api", **names)
    query = """SELECT FROM rejections r JOIN events e USING (vm_id)
               WHERE r.vm_id = $1 AND e.type = 'rejected' AND e.seq IS NOT NULL"""
    await eventually(lambda: stage.house.house.query(query, vm_id), within_s=20, what="the refusal written down")
    stage.is_unreadable = True


async def an_unreadable_report(stage: Stage) -> None:
    await stage.throw(topology.REPORTS.name, "report", "host.report", "leveret-compute")
    stage.is_unreadable = True


async def an_unreadable_heartbeat(stage: Stage) -> None:
    await stage.throw(topology.HEARTBEATS.name, "heartbeat", "host.heartbeat", "leveret-compute")
    stage.is_unreadable = True


async def an_unreadable_command(stage: Stage) -> None:
    [host] = await stage.house.house.query("SELECT id FROM hosts ORDER BY name LIMIT 1")
    await stage.throw(topology.HOSTS.name, str(host["id"]), "host.desired", "leveret-conductor")
    stage.is_unreadable = True


async def a_failing_build(stage: Stage) -> None:
    vm_id = await stage.create(anywhere=True)
    assert await stage.house.house.query("SELECT FROM events WHERE vm_id = $1 AND type = 'build_failed'", vm_id)
    await stage.delete(vm_id)


async def a_lost_command(stage: Stage) -> None:
    stage.house.plan("requests.send", Deed.FAIL_BEFORE)
    await stage.delete(await stage.create())


async def an_older_database(stage: Stage) -> None:
    """The row says what it said before the reboot: host and row differ."""
    vm_id = await stage.create()
    await stage.do(stage.client.reboot, vm_id)
    await stage.until(vm_id, State.RUNNING)
    await stage.restore("UPDATE vms SET generation = 1, observed_generation = 1 WHERE id = $1", vm_id)

    async def adopted() -> bool:
        return bool((await stage.row(vm_id))["generation"] > 2)

    await eventually(adopted, within_s=30, what="the host's generation adopted")
    await stage.until(vm_id, State.RUNNING)
    await stage.delete(vm_id)


async def a_late_delete(stage: Stage) -> None:
    house = stage.house.house
    vm_id = await stage.create()
    _, name = await stage.host_of(vm_id)
    house.freeze(name)
    try:
        await stage.do(stage.client.delete, vm_id)
        await stage.change("UPDATE vms SET deadline = now() WHERE id = $1 AND state = 'deleting'", vm_id)

        async def is_told() -> bool:
            return bool(await house.query("SELECT FROM events WHERE vm_id = $1 AND type = 'late'", vm_id))

        await eventually(is_told, within_s=20, what="told that it is late")
    finally:
        house.thaw(name)
    await stage.until(vm_id, State.DELETED)


async def something_old(stage: Stage) -> None:
    vm_id = new_id()
    await stage.change("INSERT INTO tombstones VALUES ($1, 'default', now() - interval '31 days')", vm_id)
    stage.house.restart("conductor-1")  # the forgetter looks at once

    async def forgotten() -> bool:
        return not await stage.house.house.query("SELECT FROM tombstones WHERE vm_id = $1", vm_id)

    await eventually(forgotten, within_s=20, what="the old tombstone forgotten")


async def a_host_that_dies(stage: Stage) -> None:
    """One host ends and is fenced: a VM that may is made anew on the other. Then it returns, and is made clean."""
    ids = [await stage.create(on_host_failure="restart") for _ in range(3)]
    house = stage.house.house
    lost, name = await stage.host_of(ids[0])
    stage.house.unattended.add(name)
    try:
        house.kill(name)

        async def is_silent() -> bool:
            return bool(await house.query("SELECT FROM hosts WHERE id = $1 AND state = 'silent'", lost))

        await eventually(is_silent, within_s=30, what="the host silent")
        await stage.do(stage.client.fence_host, str(lost), "the process was killed")

        async def is_settled() -> bool:
            query = "SELECT FROM vms WHERE id = ANY($1) AND host_id = $2"
            return not await house.query(query, ids, lost)

        await eventually(is_settled, within_s=20, what="every VM of the host elsewhere")
        for vm_id in ids:
            await stage.until(vm_id, State.RUNNING)
    finally:
        stage.house.unattended.discard(name)

    async def is_clean() -> bool:
        query = "SELECT FROM hosts WHERE id = $1 AND clean_epoch = epoch"
        return bool(await house.query(query, lost))

    await eventually(is_clean, within_s=30, what="the host clean")
    await stage.do(stage.client.uncordon_host, str(lost))
    await stage.delete(*ids)


#: What leads to each step; to all the others leads a VM's life.
SCENES: dict[str, Scene] = {
    "requests.administer": an_order,
    "requests.furnish": an_order,
    "requests.rehearse": a_rehearsal,
    "requests.record": an_unreadable_request,
    "requests.bury": an_unreadable_request,
    "reports.bury": an_unreadable_report,
    "heartbeats.bury": an_unreadable_heartbeat,
    "commands.bury": an_unreadable_command,
    "vm.cleanup": a_failing_build,
    "sweeper.place": a_failing_build,
    "sweeper.send": a_failing_build,
    "sweeper.resend": a_lost_command,
    "sweeper.end_late": a_late_delete,
    "sweeper.silence": a_host_that_dies,
    "sweeper.settle": a_host_that_dies,
    "sweeper.forget": something_old,
    "heartbeats.send": an_older_database,
    "reports.send": an_older_database,
    "host.list": an_older_database,
}


def _letters(point: str, deed: Deed) -> int:
    """How often one unreadable message is buried: what was not acknowledged is delivered, and buried, again.

    Unless its queue was a host's, which is gone with the connection: then nothing comes again.
    """
    if point == "commands.bury":
        return 2 if deed is Deed.TWICE else 1 if deed in AGAIN else 0
    return 2 if point.endswith("bury") and deed in AGAIN else 1


@pytest.mark.parametrize(("point", "deed"), CASES, ids=[f"{point}-{deed}" for point, deed in CASES])
async def test_whatever_goes_wrong_at_a_step_is_made_good(point: str, deed: Deed, house: FaultyHouse) -> None:
    async with house.house.client() as client:
        stage = Stage(house, client)
        try:
            async with house.attended():
                house.plan(point, deed)
                await SCENES.get(point, a_life)(stage)
                await eventually(lambda: house.happened(point), within_s=20, what=f"{deed} at {point}")
                await house.until_ready()
                if stage.is_unreadable:
                    await house.bury(letters=_letters(point, deed))
                await house.settle(client)
        finally:
            house.forget_plans()
        assert {vm_id: (await stage.row(vm_id))["state"] for vm_id in stage.wished} == stage.wished
