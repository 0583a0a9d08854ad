"""Row 19 of the fault table: changes of mind in the middle of a build, and storms of creates and deletes of one name.

It ends as was asked last, and nothing is left of what was not.
"""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from uuid import UUID

import pytest
from installation import Installation, installed, latencies
from load import whole
from peers import eventually, tiny

from leveret.client import ApiError, Leveret, NotFound
from leveret.client.amqp import LeveretAmqp
from leveret.shared.errors import Code
from leveret.shared.ids import new_id
from leveret.shared.lifecycle import BUILD_STEPS, State, Step
from leveret.stack.layout import Options

pytestmark = [pytest.mark.fault, pytest.mark.timeout(300)]

HOSTS = 4
#: Long enough to be met in the middle by somebody who looks at the row.
LONG_STEPS = latencies(fetch_image=2.0, make_disk=2.0, make_config_drive=2.0, define=2.0, start=2.0, remove=0.3)
SHORT_STEPS = latencies(fetch_image=0.02, make_disk=0.02, define=0.02, start=0.03, remove=0.03)


@pytest.fixture(scope="module")
def house() -> Iterator[Installation]:
    """Two conductors and four hosts."""
    with installed(Options(conductors=2, fake_hosts=HOSTS, libvirt=False)) as installation:
        yield installation


async def hosts_take(house: Installation, steps: str) -> None:
    """Have the hosts take so long for their steps."""
    await asyncio.to_thread(house.reconfigure, "fake-hosts", LEVERET_SIMULATE_LATENCY_S=steps)
    await house.settle()


@pytest.fixture
async def client(house: Installation) -> AsyncIterator[Leveret]:
    async with house.client() as client:
        yield client


async def become(client: Leveret, state: State, *ids: UUID) -> None:
    """Wait until these are in this state."""

    async def there() -> bool:
        return all([(await client.get(vm_id)).state is state for vm_id in ids])

    await eventually(there, within_s=90, what=f"{len(ids)} VMs {state}")


async def at_step(house: Installation, vm_id: UUID, step: Step) -> None:
    """Wait until the host is at this step of the build."""

    async def there() -> bool:
        [row] = await house.query("SELECT state, step FROM vms WHERE id = $1", vm_id)
        assert row["state"] == "building", f"{row['state']}: {step} was missed"
        return bool(row["step"] == step)

    await eventually(there, within_s=90, what=f"{vm_id} at {step}")


async def steps_before(house: Installation, vm_id: UUID) -> list[str]:
    """The steps that were told of a VM before its owner changed his mind."""
    rows = await house.query("SELECT type, data->>'step' AS step FROM events WHERE vm_id = $1 ORDER BY id", vm_id)
    told = []
    for row in rows:
        if row["type"] in {"changed", "deleting"}:
            break
        if row["type"] == "progress":
            told.append(row["step"])
    return told


async def empty(house: Installation) -> None:
    """Everything is deleted and at rest, every rule holds on the hosts too, and nothing is taken of anything."""
    await whole(house)
    [used] = await house.query("SELECT sum(vcpus_used + memory_mib_used + disk_gib_used) AS n FROM hosts")
    [quota] = await house.query("SELECT sum(vms_used + vcpus_used) AS n FROM quotas")
    [addresses] = await house.query("SELECT count(vm_id) AS n FROM addresses")
    assert (used["n"], quota["n"], addresses["n"]) == (0, 0, 0)
    assert {row["state"] for row in await house.query("SELECT state FROM vms")} == {"deleted"}


async def change_mind(house: Installation, client: Leveret, step: Step, verbs: str) -> tuple[UUID, State]:
    """One VM of which something else is wanted at this step of its build; what it must become."""
    vm_id = new_id()
    await client.create(tiny(), vm_id=vm_id)
    await at_step(house, vm_id, step)
    for verb in verbs.split():
        match verb:
            case "stop":
                await client.stop(vm_id, grace_s=0)
            case "start":
                await client.start(vm_id)
            case "delete":
                await client.delete(vm_id)
    if step is not Step.DISPATCHED:
        assert (await steps_before(house, vm_id))[-1] == step
    ends = {"stop": State.STOPPED, "start": State.RUNNING, "delete": State.DELETED}
    return vm_id, ends[verbs.rsplit(maxsplit=1)[-1]]


MINDS = ("delete", "stop", "stop start", "stop delete", "delete delete")


async def test_a_change_of_mind_during_any_step_of_a_build_is_carried_out(house: Installation, client: Leveret) -> None:
    await hosts_take(house, LONG_STEPS)
    changes = [change_mind(house, client, step, verbs) for step in BUILD_STEPS for verbs in MINDS]
    wished = dict(await asyncio.gather(*changes))
    for state in set(wished.values()):
        await become(client, state, *(vm_id for vm_id, wish in wished.items() if wish is state))
    await whole(house)
    assert not await house.query("SELECT FROM events WHERE type IN ('error', 'build_failed')")
    assert {
        row["n"]
        for row in await house.query("SELECT count(*) AS n FROM events WHERE type = 'scheduled' GROUP BY vm_id")
    } == {1}
    living = [vm_id for vm_id, wish in wished.items() if wish is not State.DELETED]
    await asyncio.gather(*(client.delete(vm_id) for vm_id in living))
    await become(client, State.DELETED, *wished)
    await empty(house)


async def test_a_change_of_mind_before_the_host_has_heard_of_it_is_carried_out(
    house: Installation, client: Leveret
) -> None:
    await hosts_take(house, SHORT_STEPS)
    house.freeze("fake-hosts")
    try:
        wished = dict([await change_mind(house, client, Step.DISPATCHED, verbs) for verbs in MINDS])
    finally:
        house.thaw("fake-hosts")
    for state in set(wished.values()):
        await become(client, state, *(vm_id for vm_id, wish in wished.items() if wish is state))
    await asyncio.gather(*(client.delete(vm_id) for vm_id, wish in wished.items() if wish is not State.DELETED))
    await become(client, State.DELETED, *wished)
    await empty(house)


ROUNDS = (25, pytest.param(400, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]))


@pytest.mark.parametrize("rounds", ROUNDS)
async def test_a_storm_for_one_name_gives_it_to_one_at_a_time(
    house: Installation, client: Leveret, rounds: int
) -> None:
    """Twelve ask for a VM of this name over REST and AMQP, and delete whichever has it."""
    await hosts_take(house, SHORT_STEPS)
    chance = random.Random(19)
    url = await asyncio.to_thread(house.rabbit.create_client, "stormy", "default")
    if "stormy" not in {user.name for user in await client.amqp_users("default")}:
        await client.add_amqp_user("default", "stormy")
    verdicts: Counter[str] = Counter()

    async def ask(asker: Leveret | LeveretAmqp, name: str) -> None:
        for _ in range(rounds):
            vm_id = new_id()
            try:
                await asker.create(tiny(name), vm_id=vm_id)
                verdicts["accepted"] += 1
            except ApiError as refusal:
                verdicts[refusal.code] += 1
                with suppress(NotFound):
                    vm_id = (await client.find(name)).id
            await asyncio.sleep(chance.uniform(0, 0.1))
            with suppress(ApiError):  # somebody else was quicker, or it never was
                await asker.delete(vm_id)

    before = {row["id"] for row in await house.query("SELECT id FROM vms")}
    async with LeveretAmqp(url, "default", waits=False) as amqp:
        await asyncio.gather(*(ask(asker, name) for asker in (client, amqp) for name in ("web", "web", "db") * 2))
    await asyncio.gather(*[client.delete(vm.id) async for vm in client.list()])
    assert verdicts.keys() == {"accepted", Code.NAME_TAKEN}
    await eventually(lambda: none_alive(client), within_s=60, what="all gone")
    await empty(house)
    vms = [row["id"] for row in await house.query("SELECT id FROM vms") if row["id"] not in before]
    assert len(vms) == verdicts["accepted"] > 4
    for name in ("web", "db"):
        log = await house.query(
            """SELECT e.type, e.vm_id FROM events e WHERE e.vm_name = $1 AND e.type IN ('accepted', 'deleted')
            AND e.vm_id = ANY($2) ORDER BY e.seq""",
            name,
            vms,
        )
        assert [row["type"] for row in log] == ["accepted", "deleted"] * (len(log) // 2), "one after the other"
        assert [row["vm_id"] for row in log[::2]] == [row["vm_id"] for row in log[1::2]]


async def none_alive(client: Leveret) -> bool:
    return not [vm async for vm in client.list()]


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
async def test_a_storm_for_one_id_ends_deleted_and_it_never_comes_back(
    house: Installation, client: Leveret, count: int
) -> None:
    """Each id is asked for and deleted by five at once, in any order."""
    await hosts_take(house, SHORT_STEPS)

    async def create(vm_id: UUID) -> str:
        try:
            await client.create(tiny(), vm_id=vm_id)
        except ApiError as refusal:
            return refusal.code
        return "accepted"

    async def delete(vm_id: UUID) -> str:
        try:
            await client.delete(vm_id)
        except ApiError as refusal:
            return refusal.code
        return "deleted"

    ids = [new_id() for _ in range(count)]
    asking = [verb(vm_id) for vm_id in ids for verb in (create, delete, create, delete, create)]
    random.Random(19).shuffle(asking)
    told = Counter(await asyncio.gather(*asking))
    assert told.keys() <= {"accepted", "deleted", Code.VM_DELETED, Code.VM_NOT_FOUND}
    await asyncio.gather(*(delete(vm_id) for vm_id in ids))
    await eventually(lambda: none_alive(client), within_s=60, what="all gone")
    again = await asyncio.gather(*(create(vm_id) for vm_id in ids))
    # Who was accepted is told so again, with the VM as it is: deleted.
    assert set(again) <= {"accepted", Code.VM_DELETED}
    assert await none_alive(client)
    await empty(house)
    made = await house.query(
        "SELECT vm_id, count(*) AS n FROM events WHERE type = 'accepted' AND vm_id = ANY($1) GROUP BY vm_id", ids
    )
    assert {row["n"] for row in made} <= {1}


async def test_a_storm_of_starts_stops_and_reboots_ends_as_the_last_of_them_says(
    house: Installation, client: Leveret
) -> None:
    await hosts_take(house, SHORT_STEPS)
    chance = random.Random(23)

    async def live(vm_id: UUID) -> State:
        wish = State.RUNNING
        for _ in range(20):
            verb = chance.choice(("stop", "start", "reboot"))
            with suppress(ApiError):  # what does not run cannot be rebooted
                if verb == "reboot":
                    await client.reboot(vm_id)
                else:
                    await (client.stop(vm_id, grace_s=0) if verb == "stop" else client.start(vm_id))
                    wish = State.STOPPED if verb == "stop" else State.RUNNING
            await asyncio.sleep(chance.uniform(0, 0.05))
        return wish

    ids = [new_id() for _ in range(10)]
    await asyncio.gather(*(client.create(tiny(), vm_id=vm_id) for vm_id in ids))
    wishes = await asyncio.gather(*(live(vm_id) for vm_id in ids))
    await whole(house)
    assert [(await client.get(vm_id)).state for vm_id in ids] == wishes
    await asyncio.gather(*(client.delete(vm_id) for vm_id in ids))
    await become(client, State.DELETED, *ids)
    await empty(house)
