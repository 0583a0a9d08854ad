"""The lane: blocking calls neither block the loop nor hold each other up when one of them hangs."""

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest

from leveret.compute.libvirt_driver.lane import Lane
from leveret.shared.errors import Code, LeveretError

pytestmark = pytest.mark.unit


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What hanging calls wait for; opened at the end, so that no thread is left."""
    event = threading.Event()
    yield event
    event.set()


def lane(*, width: int = 2, max_hung: int = 2) -> Lane:
    return Lane("test", width=width, max_hung=max_hung, timeout_code=Code.HYPERVISOR_TIMEOUT)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_a_call_gives_its_result_or_raises_its_own_error() -> None:
    calls = lane()

    assert await calls.run(lambda a, b: a + b, 1, 2, timeout_s=5, doing="adding") == 3
    with pytest.raises(ZeroDivisionError):
        await calls.run(lambda: 1 / 0, timeout_s=5, doing="dividing")


async def test_the_loop_goes_on_while_a_call_blocks(gate: threading.Event) -> None:
    call = asyncio.create_task(lane().run(gate.wait, timeout_s=5, doing="waiting"))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not call.done()

    gate.set()

    assert await call is True


async def test_a_call_that_hangs_is_given_up_with_the_reason(gate: threading.Event) -> None:
    calls = lane()

    with pytest.raises(LeveretError, match="while defining") as caught:
        await calls.run(gate.wait, timeout_s=0.01, doing="defining")

    assert caught.value.problem.code is Code.HYPERVISOR_TIMEOUT
    assert calls.hung == 1
    gate.set()
    await until(lambda: calls.hung == 0)


async def test_hanging_calls_do_not_take_the_places_of_others(gate: threading.Event) -> None:
    calls = lane(width=1, max_hung=3)
    for _ in range(2):
        with pytest.raises(LeveretError):
            await calls.run(gate.wait, timeout_s=0.01, doing="hanging")

    assert await calls.run(lambda: "through", timeout_s=5, doing="going on") == "through"


async def test_with_too_many_hanging_calls_new_ones_fail_at_once_and_later_work_again(gate: threading.Event) -> None:
    calls = lane(max_hung=2)
    for _ in range(2):
        with pytest.raises(LeveretError):
            await calls.run(gate.wait, timeout_s=0.01, doing="hanging")

    with pytest.raises(LeveretError, match="2 calls hang already"):
        await calls.run(lambda: None, timeout_s=60, doing="anything")

    gate.set()
    await until(lambda: calls.hung == 0)
    assert await calls.run(lambda: "again", timeout_s=5, doing="anything") == "again"


async def test_no_more_calls_run_at_once_than_there_are_places(gate: threading.Event) -> None:
    calls, running, most = lane(width=2), 0, 0
    lock = threading.Lock()

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        gate.wait(0.01)
        with lock:
            running -= 1

    await asyncio.gather(*(calls.run(work, timeout_s=5, doing="working") for _ in range(10)))

    assert most == 2


async def test_a_cancelled_caller_leaves_when_its_call_has_ended(gate: threading.Event) -> None:
    ended = threading.Event()

    def work() -> None:
        gate.wait()
        ended.set()

    task = asyncio.create_task(lane().run(work, timeout_s=5, doing="working"))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.sleep(0.01)
    assert not task.done()

    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_a_cancelled_caller_of_a_hanging_call_leaves_when_the_time_is_up(gate: threading.Event) -> None:
    calls = lane()
    task = asyncio.create_task(calls.run(gate.wait, timeout_s=0.05, doing="hanging"))
    await asyncio.sleep(0)
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert calls.hung == 1


async def test_it_is_known_for_whom_a_call_hangs_until_it_has_come_back(gate: threading.Event) -> None:
    calls = lane()
    with pytest.raises(LeveretError):
        await calls.run(gate.wait, timeout_s=0.01, doing="waiting", of="a")

    assert calls.hangs("a")
    assert not calls.hangs("b")
    gate.set()
    await until(lambda: not calls.hangs("a"))
    assert calls.hung == 0
