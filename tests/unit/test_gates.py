"""How much a host does at once."""

import asyncio

from leveret.compute.gates import FetchGate


def test_the_servers_of_one_project_that_hang_leave_places_to_the_others() -> None:
    async def scene() -> None:
        gate = FetchGate(4)
        for sha256 in ("a", "b"):
            await gate.enter(sha256, "noisy")
        third = asyncio.create_task(gate.enter("c", "noisy"))
        await gate.enter("a", "noisy")  # somebody fetches it already
        await gate.enter("d", "quiet")
        await asyncio.sleep(0)
        assert not third.done()
        gate.leave("b", fetched=False)
        await third

    asyncio.run(scene())


def test_what_was_fetched_before_waits_for_nobody() -> None:
    async def scene() -> None:
        gate = FetchGate(1)
        await gate.enter("a", "p")
        gate.leave("a", fetched=True)
        await gate.enter("b", "p")
        await gate.enter("a", "p")

    asyncio.run(scene())


def test_one_place_is_for_everybody() -> None:
    async def scene() -> None:
        gate = FetchGate(1)
        await gate.enter("a", "p")
        waiting = asyncio.create_task(gate.enter("b", "q"))
        await asyncio.sleep(0)
        assert not waiting.done()
        waiting.cancel()
        gate.leave("a", fetched=False)
        await gate.enter("c", "q")

    asyncio.run(scene())
