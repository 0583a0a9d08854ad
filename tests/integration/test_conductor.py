"""The conductor on a real broker and a real database, with hosts played by the test over the bus."""

import asyncio
import json
import uuid
from typing import Any

import aio_pika
import pytest
from conductor_world import World
from peers import Host, as_delivery, eventually, tiny

from leveret.conductor.app import limits_of
from leveret.conductor.reports import ReportHandler
from leveret.shared.bus import DONE
from leveret.shared.documents import DeleteVm, ImageByName, Placement, RebootVm, RetryVm, StartVm, StopVm
from leveret.shared.errors import Code, Problem
from leveret.shared.ids import new_id
from leveret.shared.lifecycle import Observed, State, Wanted
from leveret.shared.messages import Capacity, HostReport

pytestmark = pytest.mark.integration


async def test_a_vm_goes_from_request_to_running_to_deleted(world: World) -> None:
    host, vm_id = Host(world.rabbit), new_id()
    async with world.hosts(host):
        verdict = await world.gateway.ask(vm_id, tiny("web", user_data="#!/bin/sh\necho hello\n"))
        assert verdict.accepted
        assert (verdict.state, verdict.name, verdict.address) == (State.BUILDING, "web", "10.80.0.2")
        assert await world.used() == [(1, 128, 1)]

        command = await host.command(vm_id)
        assert (command.wanted, command.may_build, command.name) == (Wanted.RUNNING, True, "web")
        assert command.user_data_base64
        assert command.nic is not None
        assert (command.nic.address, command.nic.prefix, command.nic.gateway) == ("10.80.0.2", 20, "10.80.0.1")

        await host.say(host.seen(command, Observed.RUNNING))
        await world.until(vm_id, State.RUNNING)
        await host.say(host.seen(command, Observed.RUNNING, guest_ready=True))
        await world.until_ready(vm_id)
        assert await world.db.fetchval("SELECT count(*) FROM vm_user_data") == 0

        assert (await world.gateway.ask(vm_id, DeleteVm())).state is State.DELETING
        await host.say(host.seen(await host.command(vm_id, lambda c: c.wanted is Wanted.ABSENT), Observed.ABSENT))
        row = await world.until(vm_id, State.DELETED)
        assert (row["host_id"], row["address"], row["desired"]) == (None, None, "deleted")
        assert await world.used() == [(0, 0, 0)]
        assert await world.db.fetchval("SELECT count(*) FROM addresses WHERE vm_id IS NOT NULL") == 0

        async def log() -> Any:
            rows = await world.db.fetch("SELECT seq, type FROM events ORDER BY id")
            return rows if all(row["seq"] for row in rows) and rows[-1]["type"] == "deleted" else None

        events = await eventually(log)
        assert [row["type"] for row in events] == [
            "accepted", "scheduled", "running", "guest_ready", "deleting", "deleted",
        ]  # fmt: skip
        assert [row["seq"] for row in events] == [1, 2, 3, 4, 5, 6]


async def test_the_same_create_sent_many_times_is_one_vm(world: World) -> None:
    host, vm_id = Host(world.rabbit), new_id()
    async with world.hosts(host):
        verdicts = await asyncio.gather(*(world.gateway.ask(vm_id, tiny("web")) for _ in range(10)))
        assert all(verdict.accepted for verdict in verdicts)
        assert await world.db.fetchval("SELECT count(*) FROM vms") == 1
        assert await world.used() == [(1, 128, 1)]
        other = await world.gateway.ask(vm_id, tiny("web", labels={"a": "b"}))
        assert other.problem is not None
        assert other.problem.code is Code.ID_CONFLICT
        clash = await world.gateway.ask(new_id(), tiny("web"))
        assert clash.problem is not None
        assert clash.problem.code is Code.NAME_TAKEN
        elsewhere = await world.gateway.ask(new_id(), tiny("web"), project="other")
        assert elsewhere.accepted


async def test_a_burst_beyond_capacity_fills_the_hosts_exactly_and_says_why_not(world: World) -> None:
    small = Capacity(vcpus=4, memory_mib=512, disk_gib=100)
    one, two = Host(world.rabbit, name="h1", size=small), Host(world.rabbit, name="h2", size=small)
    async with world.hosts(one, two):
        verdicts = await asyncio.gather(*(world.gateway.ask(new_id(), tiny()) for _ in range(30)))
        assert sum(verdict.accepted for verdict in verdicts) == 8
        assert await world.used() == [(4, 512, 4), (4, 512, 4)]
        refused = next(verdict for verdict in verdicts if not verdict.accepted)
        assert refused.problem is not None
        assert refused.problem.code is Code.NO_CAPACITY
        assert refused.problem.details["constraints"] == {"vcpus": 2, "memory_mib": 2}
        assert refused.problem.details["largest"] == {"vcpus": 0, "memory_mib": 0, "disk_gib": 96}
        assert await world.db.fetchval("SELECT count(*) FROM rejections") == 22
        assert await world.db.fetchval("SELECT count(*) FROM addresses WHERE vm_id IS NOT NULL") == 8


async def test_a_build_that_fails_goes_elsewhere_and_ends_with_every_reason(world: World) -> None:
    hosts = [Host(world.rabbit, name=f"h{n}") for n in range(3)]
    vm_id = new_id()
    async with world.hosts(*hosts):
        await world.gateway.ask(vm_id, tiny("web"))
        tried: set[uuid.UUID] = set()
        for attempt in (1, 2, 3):

            async def next_command() -> Any:
                return next(((h, c) for h in hosts for c in h.heard if h.id not in tried), None)

            host, command = await eventually(next_command, what=f"attempt {attempt}")
            tried.add(host.id)
            await host.fails(command, Problem.of(Code.DISK_FULL, "No space.", step="disk", host=host.name))
        row = await world.until(vm_id, State.ERROR)
        assert tried == {host.id for host in hosts}
        assert row["host_id"] is None
        assert row["problem"]["code"] == Code.BUILD_FAILED
        assert [a["code"] for a in row["problem"]["details"]["attempts"]] == ["disk_full"] * 3
        assert await world.used() == [(0, 0, 0)] * 3

        assert (await world.gateway.ask(vm_id, StartVm())).problem.code is Code.STATE_CONFLICT  # type: ignore[union-attr]
        for host in hosts:
            host.heard.clear()
        assert (await world.gateway.ask(vm_id, RetryVm())).accepted

        async def retried() -> Any:
            return next(((h, c) for h in hosts for c in h.heard), None)

        host, command = await eventually(retried, what="a retry")
        await host.say(host.seen(command, Observed.RUNNING))
        await world.until(vm_id, State.RUNNING)


async def test_a_failure_that_every_host_would_repeat_is_final_at_once(world: World) -> None:
    one, two = Host(world.rabbit, name="h1"), Host(world.rabbit, name="h2")
    vm_id = new_id()
    async with world.hosts(one, two):
        await world.gateway.ask(vm_id, tiny("web"))
        host = await eventually(lambda: next((h for h in (one, two) if h.heard), None))
        await host.fails(host.heard[0], Problem.of(Code.IMAGE_HASH_MISMATCH, "Wrong.", step="image"))
        row = await world.until(vm_id, State.ERROR)
        assert row["problem"]["code"] == Code.IMAGE_HASH_MISMATCH


async def test_stop_start_and_reboot_are_new_generations_that_the_host_confirms(world: World) -> None:
    host, vm_id = Host(world.rabbit), new_id()
    async with world.hosts(host):
        await world.gateway.ask(vm_id, tiny("web"))
        await host.say(host.seen(await host.command(vm_id), Observed.RUNNING))
        await world.until(vm_id, State.RUNNING)

        assert (await world.gateway.ask(vm_id, StopVm(grace_s=5))).generation == 2
        command = await host.command(vm_id, lambda c: c.generation == 2)
        assert (command.wanted, command.grace_s, command.may_build) == (Wanted.STOPPED, 5, False)
        await host.say(host.seen(command, Observed.STOPPED))
        await world.until(vm_id, State.STOPPED)
        refused = await world.gateway.ask(vm_id, RebootVm())
        assert refused.problem is not None
        assert refused.problem.code is Code.STATE_CONFLICT

        assert (await world.gateway.ask(vm_id, StartVm())).generation == 3
        await host.say(host.seen(await host.command(vm_id, lambda c: c.generation == 3), Observed.RUNNING))
        await world.until(vm_id, State.RUNNING)

        verdicts = [await world.gateway.ask(vm_id, RebootVm(), request_id="once") for _ in range(3)]
        assert [verdict.generation for verdict in verdicts] == [4, 4, 4]
        assert (await host.command(vm_id, lambda c: c.generation == 4)).restarts == 1


async def test_a_lost_command_is_sent_again_until_it_is_done(world: World) -> None:
    host, vm_id = Host(world.rabbit), new_id()
    async with world.hosts(host):
        await world.gateway.ask(vm_id, tiny("web"))
        await host.command(vm_id)
        host.heard.clear()
        command = await host.command(vm_id)
        await host.say(host.seen(command, Observed.RUNNING))
        await world.until(vm_id, State.RUNNING)


async def test_stale_reports_change_nothing(world: World) -> None:
    host, vm_id = Host(world.rabbit), new_id()
    async with world.hosts(host):
        await world.gateway.ask(vm_id, tiny("web"))
        command = await host.command(vm_id)
        await host.say(host.seen(command, Observed.RUNNING, seq=10))
        before = await world.until(vm_id, State.RUNNING)
        await host.say(host.seen(command, Observed.STOPPED, seq=9))
        await host.say(host.seen(command, Observed.STOPPED, token=command.token - 1, seq=11))
        await host.say(host.seen(command, Observed.RUNNING, guest_ready=True, seq=12))
        await world.until_ready(vm_id)
        after = await world.row(vm_id)
        assert (after["state"], after["generation"], after["token"]) == (
            "running",
            before["generation"],
            before["token"],
        )
        # The remnant under an older fence is proven to be over, so the host is told to remove it.
        remnant = await host.command(vm_id, lambda c: c.token == command.token - 1)
        assert remnant.wanted is Wanted.ABSENT


async def test_a_domain_that_nobody_knows_is_left_alone(world: World) -> None:
    host, known, unknown = Host(world.rabbit), new_id(), new_id()
    async with world.hosts(host):
        await world.gateway.ask(known, tiny("web"))
        command = await host.command(known)
        stray = command.model_copy(update={"vm_id": unknown})
        await host.say(host.seen(stray, Observed.RUNNING), host.seen(command, Observed.RUNNING), complete=True)
        await world.until(known, State.RUNNING)
        assert not [c for c in host.heard if c.vm_id == unknown]


async def test_a_complete_list_finds_what_is_missing_and_an_older_one_does_not(world: World) -> None:
    host, vm_id = Host(world.rabbit), new_id()
    async with world.hosts(host):
        await world.gateway.ask(vm_id, tiny("web"))
        command = await host.command(vm_id)
        host.seq = 20
        await host.say(host.seen(command, Observed.RUNNING))
        await world.until(vm_id, State.RUNNING)
        host.seq = 15
        await host.say(complete=True)  # made before the VM was there
        host.seq = 30
        await host.say(host.seen(command, Observed.RUNNING, guest_ready=True))
        await world.until_ready(vm_id)
        assert (await world.row(vm_id))["state"] == "running"
        host.seq += 1
        await host.say(complete=True)
        row = await world.until(vm_id, State.ERROR)
        assert row["problem"]["code"] == Code.DOMAIN_MISSING
        assert row["host_id"] == host.id  # its files may still be there: only a delete gives it up
        await world.gateway.ask(vm_id, DeleteVm())
        gone = await host.command(vm_id, lambda c: c.wanted is Wanted.ABSENT)
        await host.say(host.seen(gone, Observed.ABSENT))
        await world.until(vm_id, State.DELETED)


async def test_a_heartbeat_that_disagrees_makes_the_conductor_ask_for_the_list(world: World) -> None:
    host, vm_id = Host(world.rabbit), new_id()
    async with world.hosts(host):
        await world.gateway.ask(vm_id, tiny("web"))
        command = await host.command(vm_id)
        await host.say(host.seen(command, Observed.RUNNING))
        await world.until(vm_id, State.RUNNING)
        before = host.lists_asked
        beats = 0

        async def beat(observed: str) -> None:
            nonlocal beats
            beats += 1
            await host.beat((vm_id, command.token, command.generation, observed))
            await eventually(lambda: world.conductor.consumers[2].handled >= handled + beats)

        handled = world.conductor.consumers[2].handled
        for observed in ("running", "stopped", "building", "running"):  # a difference that passes is no news
            await beat(observed)
        assert host.lists_asked == before
        for _ in range(4):  # one that stays is asked about, once
            await beat("stopped")
        await eventually(lambda: host.lists_asked == before + 1)


async def test_delete_before_create_ends_without_a_vm(world: World) -> None:
    host, vm_id = Host(world.rabbit), new_id()
    async with world.hosts(host):
        first = await world.gateway.ask(vm_id, DeleteVm())
        assert first.problem is not None
        assert first.problem.code is Code.VM_NOT_FOUND
        late = await world.gateway.ask(vm_id, tiny("web"))
        assert late.problem is not None
        assert late.problem.code is Code.VM_DELETED
        assert await world.db.fetchval("SELECT count(*) FROM vms") == 0


async def test_a_vm_deleted_while_it_is_built_ends_deleted(world: World) -> None:
    host, vm_id = Host(world.rabbit), new_id()
    async with world.hosts(host):
        await world.gateway.ask(vm_id, tiny("web"))
        building = await host.command(vm_id)
        assert (await world.gateway.ask(vm_id, DeleteVm())).accepted
        await host.say(host.seen(building, Observed.RUNNING))  # it was too late to stop that
        gone = await host.command(vm_id, lambda c: c.wanted is Wanted.ABSENT)
        assert await world.used() == [(1, 128, 1)]  # not free before the host says so
        await host.say(host.seen(gone, Observed.ABSENT))
        await world.until(vm_id, State.DELETED)
        assert await world.used() == [(0, 0, 0)]


async def test_a_build_past_its_deadline_is_explained_and_keeps_its_host_until_it_is_clean(world: World) -> None:
    host, vm_id = Host(world.rabbit), new_id()
    async with world.hosts(host):
        await world.gateway.ask(vm_id, tiny("web"))
        await host.command(vm_id)
        await world.db.execute("UPDATE vms SET deadline = now() - interval '1 minute'")
        assert await world.conductor.sweeper.end_late() == 0  # it has not listened for long enough
        world.conductor.sweeper.attentive_s = lambda: 60.0
        row = await world.until(vm_id, State.ERROR)
        assert (row["problem"]["code"], row["host_id"]) == (Code.BUILD_TIMEOUT, host.id)
        gone = await host.command(vm_id, lambda c: c.wanted is Wanted.ABSENT)
        assert await world.used() == [(1, 128, 1)]
        await host.say(host.seen(gone, Observed.ABSENT))

        async def released() -> bool:
            return (await world.row(vm_id))["host_id"] is None

        await eventually(released)
        assert await world.used() == [(0, 0, 0)]


async def test_a_guest_that_goes_down_is_reported_and_a_rebooted_host_starts_it_again(world: World) -> None:
    host, vm_id = Host(world.rabbit), new_id()
    async with world.hosts(host):
        await world.gateway.ask(vm_id, tiny("web"))
        command = await host.command(vm_id)
        await host.say(host.seen(command, Observed.RUNNING))
        await world.until(vm_id, State.RUNNING)
        crashed = Problem.of(Code.GUEST_CRASHED, "QEMU is gone.")
        await host.say(host.seen(command, Observed.STOPPED, problem=crashed))
        row = await world.until(vm_id, State.STOPPED)
        assert (row["problem"]["code"], row["desired"]) == (Code.GUEST_CRASHED, "running")

        assert (await world.gateway.ask(vm_id, StartVm())).accepted
        command = await host.command(vm_id, lambda c: c.generation == 2)
        await host.say(host.seen(command, Observed.RUNNING))
        await world.until(vm_id, State.RUNNING)
        rebooted = Problem.of(Code.HOST_REBOOTED, "The host was rebooted.")
        await host.say(host.seen(command, Observed.STOPPED, problem=rebooted))
        again = await host.command(vm_id, lambda c: c.generation == 3)
        assert again.wanted is Wanted.RUNNING


async def test_a_silent_host_gets_no_new_vms_and_keeps_its_own(world: World) -> None:
    host, vm_id = Host(world.rabbit), new_id()
    async with world.hosts(host):
        await world.gateway.ask(vm_id, tiny("web"))
        await world.db.execute("UPDATE hosts SET heartbeat_at = now() - interval '1 hour'")
        assert await world.conductor.sweeper.silence_hosts() == []  # who was deaf cannot tell
        world.conductor.sweeper.attentive_s = lambda: 60.0

        async def silent() -> bool:
            return bool(await world.db.fetchval("SELECT state = 'silent' FROM hosts"))

        await eventually(silent)
        refused = await world.gateway.ask(new_id(), tiny())
        assert refused.problem is not None
        assert refused.problem.details["constraints"] == {"state": 1}
        assert (await world.row(vm_id))["host_id"] == host.id
        await host.beat()

        async def heard() -> bool:
            return bool(await world.db.fetchval("SELECT state = 'up' FROM hosts"))

        await eventually(heard)


async def test_zones_and_labels_decide_where_a_vm_may_go(world: World) -> None:
    one, two = Host(world.rabbit, name="h1", zone="east"), Host(world.rabbit, name="h2", zone="west")
    two.labels = {"disk": "nvme"}
    async with world.hosts(one, two):
        vm_id = new_id()
        await world.gateway.ask(vm_id, tiny(placement=Placement(zones=("west",))))
        assert (await world.row(vm_id))["host_id"] == two.id
        vm_id = new_id()
        await world.gateway.ask(vm_id, tiny(placement=Placement(forbid_labels={"disk": "nvme"})))
        assert (await world.row(vm_id))["host_id"] == one.id
        refused = await world.gateway.ask(
            new_id(), tiny(placement=Placement(zones=("east",), require_labels={"disk": "nvme"}))
        )
        assert refused.problem is not None
        assert refused.problem.details["constraints"] == {"zone": 1, "required_labels": 1}


async def test_what_does_not_exist_is_refused_by_name(world: World) -> None:
    host = Host(world.rabbit)
    async with world.hosts(host):
        image = await world.gateway.ask(new_id(), tiny().model_copy(update={"image": ImageByName(name="nope")}))
        network = await world.gateway.ask(new_id(), tiny(network="nope"))
        vm = await world.gateway.ask(new_id(), StartVm())
        codes = [v.problem.code for v in (image, network, vm) if v.problem]
        assert codes == [Code.IMAGE_UNKNOWN, Code.NETWORK_UNKNOWN, Code.VM_NOT_FOUND]


async def test_a_create_that_was_refused_is_not_made_when_its_message_comes_again(world: World) -> None:
    host, vm_id = Host(world.rabbit), new_id()
    refused = await world.gateway.ask(vm_id, tiny("web"), request_id="once")
    assert refused.problem is not None
    assert refused.problem.code is Code.NO_CAPACITY
    async with world.hosts(host):
        again = await world.gateway.ask(vm_id, tiny("web"), request_id="once")
        assert again.problem is not None
        assert again.problem.code is Code.NO_CAPACITY
        # What one project was told is nothing to another, whatever ids it uses.
        assert (await world.gateway.ask(vm_id, tiny("web"), project="other", request_id="once")).accepted
        rejected = await world.db.fetch("SELECT project_id FROM rejections")
        assert [row["project_id"] for row in rejected] == ["default"]


async def test_a_create_that_was_refused_may_be_asked_for_anew(world: World) -> None:
    host, vm_id = Host(world.rabbit), new_id()
    assert not (await world.gateway.ask(vm_id, tiny("web"), request_id="once")).accepted
    async with world.hosts(host):
        assert (await world.gateway.ask(vm_id, tiny("web"), request_id="another")).accepted
        assert await world.db.fetchval("SELECT count(*) FROM rejections") == 0


async def test_two_complete_lists_at_once_are_one_and_the_newer_counts(world: World) -> None:
    host, vm_id = Host(world.rabbit), new_id()
    async with world.hosts(host):
        await world.gateway.ask(vm_id, tiny("web"))
        await host.say(host.seen(await host.command(vm_id), Observed.RUNNING))
        await world.until(vm_id, State.RUNNING)
        lists = [HostReport(host_id=host.id, epoch=1, seq=seq, complete=True) for seq in (100, 101)]
        handler = ReportHandler(
            world.conductor.pool,
            world.conductor.publisher,
            limits_of(world.conductor.settings),
            cordon_after=5,
            placer=world.conductor.loops[1],
            relay=world.conductor.loops[0],
        )
        assert await handler.handle([as_delivery(one) for one in lists]) == [DONE, DONE]
        await world.until(vm_id, State.ERROR)


async def test_a_misspelt_url_speaks_against_no_host(world: World) -> None:
    host = Host(world.rabbit)
    async with world.hosts(host):
        for _ in range(6):
            vm_id = new_id()
            await world.gateway.ask(vm_id, tiny())
            problem = Problem.of(Code.IMAGE_UNREACHABLE, "There is no such file.", step="image")
            await host.fails(await host.command(vm_id), problem)
            await world.until(vm_id, State.ERROR)
        assert await world.db.fetchval("SELECT state FROM hosts") == "up"
        for _ in range(5):
            vm_id = new_id()
            await world.gateway.ask(vm_id, tiny())
            await host.fails(await host.command(vm_id), Problem.of(Code.DISK_FULL, "Full.", step="disk"))
            await world.until(vm_id, State.ERROR)
        assert await world.db.fetchval("SELECT state FROM hosts") == "cordoned"


async def test_a_list_of_a_new_incarnation_teaches_the_conductor_its_epoch(world: World) -> None:
    host, vm_id = Host(world.rabbit), new_id()
    async with world.hosts(host):
        await world.gateway.ask(vm_id, tiny("web"))
        await host.command(vm_id)
        host.epoch = 2
        await host.say(complete=True)
        await host.command(vm_id, lambda command: command.host_epoch == 2)


async def test_one_client_s_full_queue_holds_up_nobody(world: World) -> None:
    host = Host(world.rabbit)
    async with world.hosts(host), await aio_pika.connect(world.rabbit.url) as connection:
        channel = await connection.channel()
        queues = {}
        full: dict[str, Any] = {"x-max-length": 1, "x-overflow": "reject-publish"}
        for project, arguments in (("other", full), ("default", {})):
            exchange = await channel.declare_exchange(f"leveret.events.{project}", "topic", durable=True)
            queues[project] = await channel.declare_queue(exclusive=True, arguments=arguments)
            await queues[project].bind(exchange, "#")
        for project in ("other", "default"):
            for _ in range(3):
                await world.gateway.ask(new_id(), tiny(), project=project)

        async def published() -> bool:
            rows = await world.db.fetch("SELECT last_seq, published_seq FROM projects")
            return all(row["last_seq"] == row["published_seq"] == 6 for row in rows)

        await eventually(published)
        heard = [await queues["default"].get(no_ack=True) for _ in range(6)]
        events = [json.loads(message.body) for message in heard if message is not None]
        assert [event["sequence"] for event in events] == ["1", "2", "3", "4", "5", "6"]
        assert {(event["specversion"], event["datacontenttype"]) for event in events} == {("1.0", "application/json")}
        assert await queues["default"].get(no_ack=True, fail=False) is None


async def test_a_database_that_is_not_ready_for_us_is_waited_for(world: World) -> None:
    host, vm_id = Host(world.rabbit), new_id()
    async with world.hosts(host):
        await world.db.execute("ALTER TABLE tombstones RENAME TO hidden")
        asking = asyncio.ensure_future(world.gateway.ask(vm_id, tiny("web"), wait_s=30))
        await eventually(lambda: world.conductor.consumers[0].attentive_s < 0.5)
        await world.db.execute("ALTER TABLE hidden RENAME TO tombstones")
        assert (await asking).accepted


async def test_as_many_reboots_as_a_redelivery_may_bring_are_not_done_again(world: World) -> None:
    host, vm_id = Host(world.rabbit), new_id()
    async with world.hosts(host):
        await world.gateway.ask(vm_id, tiny())
        await host.say(host.seen(await host.command(vm_id), Observed.RUNNING))
        await world.until(vm_id, State.RUNNING)
        for _ in range(2):
            for number in range(20):
                assert (await world.gateway.ask(vm_id, RebootVm(), request_id=f"reboot-{number}")).accepted
        assert (await world.row(vm_id))["restarts"] == 20
