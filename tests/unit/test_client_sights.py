"""What a program that only hears of VMs makes of what it hears."""

import asyncio
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import pytest

import leveret.client
import leveret.client.sights as sights_module
from leveret.client.errors import ApiError, Conflict, Unreachable, VmFailed
from leveret.client.sights import Sights, VmSight
from leveret.shared.documents import EventView
from leveret.shared.ids import new_id
from leveret.shared.waiting import Target

pytestmark = pytest.mark.unit

VM_ID = new_id()
PROBLEM = {"code": "name_taken", "message": "It is taken."}


def event(kind: str, state: str | None = None, **data: Any) -> EventView:
    return EventView.model_validate(
        {
            "seq": 1,
            "vm_id": VM_ID,
            "vm_name": "web",
            "type": kind,
            "state": state,
            "at": datetime.now(UTC),
            "data": data,
        }
    )


ACCEPTED = event("accepted", "pending")
RUNNING = event("running", "running")
READY = event("guest_ready", "running")
STOPPED = event("stopped", "stopped")


def sight(*events: EventView) -> VmSight:
    seen = VmSight(VM_ID)
    for one in events:
        seen = seen.after(one)
    return seen


@pytest.mark.parametrize(
    ("events", "reached"),
    [
        ([ACCEPTED], set()),
        ([ACCEPTED, RUNNING], {"running"}),
        ([ACCEPTED, RUNNING, READY], {"running", "ready"}),
        ([RUNNING, READY, event("changed", "running", verb="reboot")], set()),  # it is on its way
        ([RUNNING, READY, event("changed", "running", verb="update")], {"running", "ready"}),
        ([RUNNING, event("changed", "running", verb="reboot"), event("settled", "running")], {"running"}),
        ([RUNNING, READY, STOPPED, event("changed", "stopped", verb="start"), RUNNING], {"running"}),
        ([STOPPED, event("changed", "stopped", verb="start")], set()),
    ],
)
def test_what_was_heard_reaches_what_is_waited_for(events: list[EventView], reached: set[str]) -> None:
    found = set()
    for target in get_args(Target):
        with suppress(VmFailed):
            found |= {target} if sight(*events).reached(target) else set()
    assert found == reached


@pytest.mark.parametrize(
    ("events", "target"),
    [
        ([RUNNING, STOPPED], "running"),
        ([event("error", "error", problem=PROBLEM)], "stopped"),
        ([event("deleting", "deleting")], "running"),
        ([event("deleted", "deleted")], "ready"),
        ([RUNNING], "deleted"),
    ],
)
def test_what_was_heard_may_be_hopeless(events: list[EventView], target: Target) -> None:
    with pytest.raises(VmFailed, match="web will not be"):
        sight(*events).reached(target)


def test_a_stopped_vm_of_which_nothing_else_is_known_may_be_starting() -> None:
    """A verdict says how it stands, not whether somebody has asked for something since."""
    assert not VmSight(VM_ID, state=STOPPED.state).reached("running")


def test_a_refused_request_ends_the_wait_for_a_vm_that_is_not_there() -> None:
    rejected = event("rejected", problem=PROBLEM)
    with pytest.raises(Conflict, match="name_taken"):
        sight(rejected).reached("running")
    assert sight(RUNNING, rejected).reached("running")  # it was another request


async def test_who_waits_is_woken_by_the_news_of_that_vm() -> None:
    sights = Sights()
    waiting = asyncio.create_task(sights.until(VM_ID, "running"))
    for one in (ACCEPTED, event("changed", "pending", verb="update"), RUNNING):
        await asyncio.sleep(0)
        assert not waiting.done()
        sights.hear(one)
    assert (await waiting).name == "web"
    assert not sights._waiting


async def test_what_was_known_before_a_request_says_nothing_about_it() -> None:
    """A verdict is faster than the event of its request: a VM that runs is not a VM that was rebooted."""
    sights = Sights()
    sights.hear(RUNNING)
    sights.asked(VM_ID, "reboot-1")
    waiting = asyncio.create_task(sights.until(VM_ID, "running"))
    for one in (
        event("progress", "running"),
        event("changed", "running", verb="reboot", request_id="reboot-1"),
        event("settled", "running"),
    ):
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not waiting.done()
        sights.hear(one)
    assert (await waiting).state == "running"


async def test_an_event_may_be_faster_than_the_verdict() -> None:
    sights = Sights()
    for one in (
        RUNNING,
        event("changed", "running", verb="reboot", request_id="reboot-1"),
        event("settled", "running"),
    ):
        sights.hear(one)
    sights.asked(VM_ID, "reboot-1")
    async with asyncio.timeout(1):
        assert await sights.until(VM_ID, "running")


async def test_a_request_that_changed_nothing_has_no_event_and_is_not_waited_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sights_module, "_HEARD_WITHIN_S", 0.05)
    sights = Sights()
    sights.hear(RUNNING)
    sights.asked(VM_ID, "start-1")
    async with asyncio.timeout(5):
        assert await sights.until(VM_ID, "running")


async def test_who_waits_learns_that_nothing_will_be_heard_any_more() -> None:
    sights = Sights()
    waiting = asyncio.create_task(sights.until(VM_ID, "running"))
    await asyncio.sleep(0)
    sights.end(Unreachable("amqp://broker", "away"))
    with pytest.raises(Unreachable):
        await waiting


def test_lost_events_leave_doubt_about_where_vms_are_on_their_way_to() -> None:
    sights = Sights()
    for one in (RUNNING, STOPPED):
        sights.hear(one)
    sights.doubt()
    seen = sights.get(VM_ID)
    assert seen is not None
    assert not seen.reached("running")  # it may be starting: the event that says so may be among the lost


def test_every_public_name_is_there() -> None:
    for name in leveret.client.__all__:
        assert getattr(leveret.client, name) is not None
    assert issubclass(leveret.client.Missing, ApiError)
    with pytest.raises(AttributeError):
        _ = leveret.client.Nothing


def test_a_program_that_speaks_rest_loads_no_broker_library(tmp_path: Path) -> None:
    code = (
        "import sys, leveret.client\n"
        "from leveret.client import Leveret, Conflict, CreateVm, EventGap\n"
        "heavy = {'aio_pika', 'aiormq', 'structlog', 'asyncpg', 'fastapi'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


def test_a_client_program_has_nothing_printed_for_it(tmp_path: Path) -> None:
    code = (
        "import asyncio\n"
        "from leveret.client import LeveretAmqp, Unreachable, new_id\n"
        "async def main():\n"
        "    client = LeveretAmqp('amqp://app:secret@127.0.0.1:1/leveret', 'default', waits=False, retry_for_s=0.3)\n"
        "    async with client:\n"
        "        try:\n"
        "            await client.reboot(new_id())\n"
        "        except Unreachable:\n"
        "            return\n"
        "asyncio.run(main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "secret" not in done.stderr
