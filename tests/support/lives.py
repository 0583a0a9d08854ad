"""VMs that come and go while something breaks, and what must be true of them afterwards."""

import asyncio
import random
from collections.abc import Awaitable
from uuid import UUID

from installation import Installation
from peers import eventually, tiny

from leveret.client import Leveret
from leveret.client.receipt import Receipt
from leveret.shared.documents import VmView
from leveret.shared.ids import new_id
from leveret.shared.lifecycle import State

#: For how long a life asks for one thing before it gives up.
PATIENCE_S = 180.0
#: How a life may go on after its create, and how it then ends.
COURSES: tuple[tuple[str, ...], ...] = (
    (),
    ("stop",),
    ("stop", "start"),
    ("reboot",),
    ("reboot", "stop"),
    ("delete",),
    ("stop", "start", "delete"),
    ("reboot", "delete"),
)
ENDS = {"": State.RUNNING, "start": State.RUNNING, "reboot": State.RUNNING, "stop": State.STOPPED}


class Lives:
    """Each asks for one thing after the other, like a client that waits for its verdicts; so its end is known."""

    def __init__(self, house: Installation, client: Leveret, seed: int, *, patience_s: float = PATIENCE_S) -> None:
        self.house = house
        self.client = client
        self.patience_s = patience_s
        self.wished: dict[UUID, State] = {}
        self.unwished: set[UUID] = set()  # that must not live, whether they ever did or not
        self.reboots: dict[UUID, int] = {}
        self.chance = random.Random(seed)

    async def live_many(self, count: int, *, within_s: float) -> None:
        """So many lives, begun at random moments in this time."""
        plans = [
            (self.chance.uniform(0, within_s), self.chance.choice(COURSES), self.chance.uniform(0, 1))
            for _ in range(count)
        ]
        await asyncio.gather(*(self.live(*plan) for plan in plans))

    async def live(self, begins_s: float, course: tuple[str, ...], pause_s: float) -> None:
        await asyncio.sleep(begins_s)
        vm_id = new_id()
        await judged(self.client.create(tiny(), vm_id=vm_id), self.patience_s)
        for verb in course:
            await asyncio.sleep(pause_s)
            match verb:
                case "reboot":
                    await self.until([vm_id], State.RUNNING)
                    await judged(self.client.reboot(vm_id), self.patience_s)
                case "stop":
                    await judged(self.client.stop(vm_id, grace_s=0), self.patience_s)
                case "start":
                    await judged(self.client.start(vm_id), self.patience_s)
                case "delete":
                    await judged(self.client.delete(vm_id), self.patience_s)
        self.wished[vm_id] = ENDS.get(course[-1] if course else "", State.DELETED)
        self.reboots[vm_id] = course.count("reboot")

    async def until(self, ids: list[UUID], state: State, *, within_s: float = 120.0) -> list[VmView]:
        """These VMs, once every one is in this state."""

        seen: dict[UUID, VmView] = {}

        async def there() -> bool:
            seen.update({vm_id: await self.client.get(vm_id) for vm_id in ids})
            return all(vm.state is state for vm in seen.values())

        try:
            await eventually(there, within_s=within_s)
        except AssertionError:
            others = [vm.model_dump_json() for vm in seen.values() if vm.state is not state]
            raise AssertionError(f"not {state} within {within_s:g} s: {others}") from None
        return list(seen.values())

    async def end_well(self, *, within_s: float = 120.0) -> None:
        """Nothing lost, nothing doubled, every VM as it was wished, no rule broken, no dead letter."""
        await self.house.settle(within_s=within_s)
        rows = {row["id"]: row for row in await self.house.query("SELECT id, state, restarts FROM vms")}
        assert {vm_id: rows[vm_id]["state"] for vm_id in self.wished} == self.wished
        assert {rows[vm_id]["state"] for vm_id in self.unwished & rows.keys()} <= {State.DELETED}
        assert {vm_id: rows[vm_id]["restarts"] for vm_id in self.reboots} == self.reboots
        accepted = await self.house.query(
            "SELECT vm_id FROM events WHERE type = 'accepted' GROUP BY vm_id HAVING count(*) <> 1"
        )
        assert accepted == []
        await self.check()

    async def check(self) -> None:
        """Every rule holds, those of broker and hosts too."""
        told: list[str] = []

        async def whole() -> bool:
            report = await self.client.check()
            told[:] = [f"{rule.name} {rule.broken}" for rule in report.rules if rule.broken != 0]
            told.extend(f"{one.what}: {one.why}" for one in report.unchecked)
            return not told

        try:
            await eventually(whole, within_s=60, what="a check that finds nothing")
        except AssertionError as error:
            raise AssertionError(f"the check finds {told}") from error

    async def remove_all(self) -> None:
        """Delete what is left; hosts are empty again."""
        ids = [vm_id for vm_id, wish in self.wished.items() if wish is not State.DELETED]
        await asyncio.gather(*(self.client.delete(vm_id) for vm_id in ids))
        await self.until(ids, State.DELETED)
        await self.house.settle()
        used = await self.house.query("SELECT sum(vcpus_used + memory_mib_used + disk_gib_used) AS used FROM hosts")
        assert used[0]["used"] == 0


async def judged(asking: Awaitable[Receipt], within_s: float = PATIENCE_S) -> Receipt:
    """The receipt of a request that was accepted, however often it had to be asked for with the same ids."""
    async with asyncio.timeout(within_s):
        return await (await asking).judged()
