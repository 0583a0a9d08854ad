"""The conductor's side of the front door: who may ask for what, how much of it, and how often."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import aio_pika
import aiormq
import asyncpg
import pytest
from conductor_world import World, conducting
from invariants import violations
from peers import Asker, Gateway, Host, eventually, tiny, up

from leveret.api.last_use import LastUse
from leveret.conductor.creating import create
from leveret.conductor.request import Request
from leveret.conductor.store import projects
from leveret.shared import topology
from leveret.shared.bus import Link, Publisher
from leveret.shared.documents import (
    CreateProject,
    CreateVm,
    DeleteProject,
    DeleteVm,
    RebootVm,
    RetryVm,
    StartVm,
    StopVm,
    UpdateQuota,
    UpdateVm,
)
from leveret.shared.errors import Code
from leveret.shared.ids import new_id
from leveret.shared.lifecycle import Observed, State
from leveret.shared.messages import (
    REQUESTS,
    TYPE_OF,
    Capacity,
    EndAmqpUser,
    EndToken,
    NewAmqpUser,
    NewToken,
    TokensUsed,
    Verdict,
    encode,
)
from leveret.stack.rabbitmq import Rabbit

pytestmark = pytest.mark.integration

VERBS = [DeleteVm(), StartVm(), StopVm(), RebootVm(), RetryVm(), UpdateVm(labels={"a": "b"})]
assert {type(verb) for verb in VERBS} | {CreateVm} == set(REQUESTS.values()), "every operation is asked below"


def code_of(verdict: Verdict) -> str:
    assert not verdict.accepted, verdict
    assert verdict.problem is not None
    assert verdict.problem.hint
    return str(verdict.problem.code)


@pytest.fixture
async def clients(world: World) -> AsyncIterator[dict[str, Asker]]:
    """Broker users that speak for two projects: ada and rex (a reader) for one, otto for the other."""
    for user, project, role in (
        ("ada", "default", "member"),
        ("rex", "default", "reader"),
        ("otto", "other", "member"),
    ):
        await world.db.execute(
            "INSERT INTO amqp_users (name, project_id, role) VALUES ($1, $2, $3)", user, project, role
        )
    askers = {user: Asker(world.rabbit, user) for user in ("ada", "otto")}
    async with up(*askers.values()):
        yield askers


async def quota(world: World, **limits: int) -> None:
    assert (await world.gateway.order(UpdateQuota.model_validate(limits))).accepted


async def wished(world: World, vm_id: uuid.UUID) -> dict[str, Any]:
    """The row without what the sweeper notes when it repeats a command."""
    return {name: value for name, value in dict(await world.row(vm_id)).items() if name != "sent_at"}


async def dead(world: World) -> list[dict[str, Any]]:
    """The headers of what lies in leveret.dead."""
    connection = await aio_pika.connect(world.rabbit.url)
    async with connection:
        queue = await (await connection.channel()).get_queue(topology.DEAD_QUEUE.name)
        found = []
        while (message := await queue.get(no_ack=True, fail=False)) is not None:
            found.append(dict(message.headers))
    return found


async def publish(world: World, user: str, body: bytes, **properties: Any) -> None:
    """Publish as a client in any language would, with exactly these properties."""
    connection = await aio_pika.connect(world.rabbit.url_of(user))
    async with connection:
        channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
        exchange = await channel.get_exchange(topology.REQUESTS.name, ensure=False)
        properties = {"content_type": "application/json", "user_id": user, "message_id": new_id().hex} | properties
        await exchange.publish(aio_pika.Message(body, **properties), routing_key="vm.create.v1", mandatory=True)


# Who


async def test_a_client_creates_and_changes_vms_of_its_own_project(world: World, clients: dict[str, Asker]) -> None:
    host, vm_id = Host(world.rabbit), new_id()
    async with world.hosts(host):
        verdict = await clients["ada"].ask(vm_id, tiny("web"))
        assert verdict.accepted
        row = await world.row(vm_id)
        assert (row["project_id"], row["name"]) == ("default", "web")
        assert (await clients["ada"].ask(vm_id, DeleteVm())).accepted
    accepted, *_ = await world.events()
    assert accepted["data"]["by"] == "broker user ada"


async def test_another_projects_vm_is_not_there_for_a_client(world: World, clients: dict[str, Asker]) -> None:
    vm_id = new_id()
    async with world.hosts(Host(world.rabbit)):
        assert (await clients["ada"].ask(vm_id, tiny("web"))).accepted
        before = await wished(world, vm_id)
        for verb in VERBS:
            assert code_of(await clients["otto"].ask(vm_id, verb)) == Code.VM_NOT_FOUND
        assert code_of(await clients["otto"].ask(vm_id, tiny("web"))) == Code.ID_CONFLICT
        assert await wished(world, vm_id) == before
        told = [entry for entry in await world.events("other") if entry["vm_name"] or entry["state"]]
        assert told == []


async def test_nobody_but_its_members_may_ask_anything_of_a_project(world: World, clients: dict[str, Asker]) -> None:
    """Every operation by everybody else: no sender, a reader, and a broker user that has lost its project."""
    vm_id = new_id()
    async with world.hosts(Host(world.rabbit)):
        assert (await clients["ada"].ask(vm_id, tiny("web"))).accepted
        assert (await world.gateway.order(EndAmqpUser(user="otto"), project="other")).accepted
        before = await wished(world, vm_id)

        async def is_nobody() -> bool:
            return code_of(await clients["otto"].ask(vm_id, StartVm())) == Code.FORBIDDEN

        await eventually(is_nobody, within_s=5)
        for verb in [*VERBS, tiny("web")]:
            assert code_of(await clients["otto"].ask(vm_id, verb)) == Code.FORBIDDEN
            kind, headers = TYPE_OF[type(verb)], {"vm_id": str(vm_id)}
            await publish(world, "ada", encode(verb), type=kind, headers=headers, user_id=None)
            with pytest.raises(aiormq.exceptions.ChannelAccessRefused):
                await publish(world, "rex", encode(verb), type=kind, headers=headers)
        letters: list[dict[str, Any]] = []

        async def buried() -> bool:
            letters.extend(await dead(world))
            return [letter["dead_code"] for letter in letters].count(Code.UNAUTHENTICATED) == len(REQUESTS)

        await eventually(buried)
        assert await wished(world, vm_id) == before
    assert [fact["type"] for fact in await world.events("other")] == ["amqp_user.removed"]


async def test_a_client_that_names_another_project_is_refused(world: World, clients: dict[str, Asker]) -> None:
    assert code_of(await clients["ada"].ask(new_id(), tiny(), project="other")) == Code.FORBIDDEN
    assert code_of(await clients["ada"].ask(new_id(), tiny(), project="none-such")) == Code.FORBIDDEN
    assert await world.db.fetchval("SELECT count(*) FROM vms") == 0


async def test_a_client_may_not_administer(world: World, clients: dict[str, Asker]) -> None:
    verdict = await clients["ada"].ask_with(UpdateQuota(vms=None), {"request_id": "r", "project": "default"})
    assert code_of(verdict) == Code.UNKNOWN_TYPE


async def test_a_broker_user_without_a_project_is_refused_until_it_has_one(world: World) -> None:
    asker = Asker(world.rabbit, "ada")
    async with up(asker), world.hosts(Host(world.rabbit)):
        assert code_of(await asker.ask(new_id(), tiny())) == Code.FORBIDDEN
        assert (await world.gateway.order(NewAmqpUser(user="ada"))).accepted

        async def asked() -> bool:
            return (await asker.ask(new_id(), tiny())).accepted

        await eventually(asked, within_s=5)
        assert (await world.gateway.order(EndAmqpUser(user="ada"))).accepted

        async def refused() -> bool:
            return not (await asker.ask(new_id(), tiny())).accepted

        await eventually(refused, within_s=5)


async def test_a_reader_cannot_even_publish(world: World, clients: dict[str, Asker]) -> None:
    with pytest.raises(aiormq.exceptions.ChannelAccessRefused):
        await publish(world, "rex", encode(tiny()), type="vm.create.v1")


async def test_a_forged_sender_is_told_by_the_broker(world: World, clients: dict[str, Asker]) -> None:
    with pytest.raises(aiormq.exceptions.ChannelPreconditionFailed, match="user_id"):
        await publish(world, "ada", encode(tiny()), type="vm.create.v1", user_id="leveret-api")


async def test_a_message_without_a_sender_is_kept_with_the_reason(world: World, clients: dict[str, Asker]) -> None:
    await publish(world, "ada", encode(tiny()), type="vm.create.v1", user_id=None, headers={"vm_id": str(new_id())})
    [letter] = await eventually(lambda: dead(world))
    assert letter["dead_code"] == Code.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("properties", "code", "about"),
    [
        ({"reply_to": "client.otto.q"}, Code.INVALID_REQUEST, "reply_to"),
        ({"headers": {"CC": ["vm.create.v1"]}}, Code.INVALID_REQUEST, "CC"),
        ({"headers": {"project": "other"}}, Code.FORBIDDEN, None),
        ({"headers": {"vm_id": "17"}}, Code.INVALID_REQUEST, "vm_id"),
        ({"headers": {"vm_id": str(uuid.uuid4()), "if_match": "x"}}, Code.INVALID_REQUEST, "if_match"),
        ({"type": "vm.create.v2"}, Code.UNKNOWN_TYPE, None),
        ({"type": "project.create.v1"}, Code.UNKNOWN_TYPE, None),
        ({"content_type": "text/plain"}, Code.UNSUPPORTED_CONTENT_TYPE, None),
    ],
)
async def test_what_cannot_be_answered_is_told_in_the_projects_log(
    world: World, clients: dict[str, Asker], properties: dict[str, Any], code: Code, about: str | None
) -> None:
    await publish(world, "ada", encode(tiny()), **{"type": "vm.create.v1", "message_id": "my-request"} | properties)
    [fact] = await eventually(world.events)
    assert (fact["type"], fact["state"], fact["data"]["request_id"]) == ("rejected", None, "my-request")
    assert fact["data"]["problem"]["code"] == code
    if about is not None:
        assert fact["data"]["problem"]["details"]["errors"][0]["field"] == about
    assert [letter["dead_code"] for letter in await eventually(lambda: dead(world))] == [code]
    assert await world.events("other") == []


async def test_a_refused_create_is_logged_once_however_often_it_is_asked(
    world: World, clients: dict[str, Asker]
) -> None:
    vm_id = new_id()
    for _ in range(3):
        assert code_of(await clients["ada"].ask(vm_id, tiny(), request_id="one")) == Code.NO_CAPACITY
    assert [(fact["type"], fact["vm_id"]) for fact in await world.events()] == [("rejected", vm_id)]
    assert code_of(await clients["ada"].ask(vm_id, tiny(), request_id="two")) == Code.NO_CAPACITY
    assert len(await world.events()) == 2


async def test_a_create_that_crashes_its_handler_is_explained_and_hurts_nobody_else(
    world: World, clients: dict[str, Asker], monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash_on(creates: Sequence[Request]) -> None:
        if any(request.body.name == "boom" for request in creates if isinstance(request.body, CreateVm)):
            raise ZeroDivisionError

    async def fragile(connection: Any, creates: Sequence[Request], *more: Any) -> Any:
        crash_on(creates)
        return await create(connection, creates, *more)

    monkeypatch.setattr("leveret.conductor.requests.create", fragile)
    bad = new_id()
    async with world.hosts(Host(world.rabbit, size=Capacity(vcpus=64, memory_mib=65536, disk_gib=1000))):
        verdicts = await asyncio.gather(
            clients["ada"].ask(bad, tiny("boom")), *(clients["ada"].ask(new_id(), tiny()) for _ in range(10))
        )
    assert code_of(verdicts[0]) == Code.HANDLER_CRASHED
    assert all(verdict.accepted for verdict in verdicts[1:])
    assert await world.db.fetchval("SELECT problem->>'code' FROM rejections WHERE vm_id = $1", bad)
    assert [fact["vm_id"] for fact in await world.events() if fact["type"] == "rejected"] == [bad]
    assert [letter["dead_code"] for letter in await eventually(lambda: dead(world))] == [Code.HANDLER_CRASHED]


async def test_an_address_made_up_to_hurt_who_answers_hurts_only_its_maker(
    world: World, clients: dict[str, Asker]
) -> None:
    """RabbitMQ 3.10 ends the connection that answers an address that it cannot decode."""
    await publish(world, "otto", encode(tiny()), type="vm.create.v1", reply_to="amq.rabbitmq.reply-to.AAAA")
    async with world.hosts(Host(world.rabbit)):
        for _ in range(5):
            assert (await world.gateway.ask(new_id(), tiny())).accepted
        assert (
            await clients["ada"].ask(
                new_id(),
                DeleteVm(),
            )
        ).problem is not None


@pytest.mark.parametrize(
    "header", [{"dry_run": {"a": 1}}, {"dry_run": [1]}, {"if_match": ["1"]}, {"vm_id": {"a": "b"}}, {"request_id": [1]}]
)
async def test_a_header_of_any_shape_is_refused_and_holds_up_nobody(
    world: World, clients: dict[str, Asker], header: dict[str, Any]
) -> None:
    async with world.hosts(Host(world.rabbit)):
        odd = clients["ada"].ask_with(tiny(), {"vm_id": str(new_id()), "request_id": "odd"} | header)
        verdicts = await asyncio.gather(odd, *(world.gateway.ask(new_id(), tiny()) for _ in range(5)))
    assert code_of(verdicts[0]) == Code.INVALID_REQUEST
    assert all(verdict.accepted for verdict in verdicts[1:])


@pytest.mark.parametrize("name", ["\x00", "x" * 100_000, "\x1b[31m", "\ud83d"])
async def test_a_field_name_that_cannot_be_stored_is_told_all_the_same(
    world: World, clients: dict[str, Asker], name: str
) -> None:
    body = json.dumps({"image": {"name": "tiny"}, name: 1}).encode()
    await publish(world, "ada", body, type="vm.create.v1", headers={"vm_id": str(new_id())})
    [fact] = await eventually(world.events)
    assert fact["data"]["problem"]["code"] == Code.INVALID_REQUEST
    assert len(json.dumps(fact["data"])) < 2000


async def test_a_redelivery_count_that_the_sender_made_up_is_not_believed(
    world: World, clients: dict[str, Asker]
) -> None:
    verdict = await clients["ada"].ask(new_id(), DeleteVm(), **{"x-delivery-count": 5000})
    assert code_of(verdict) == Code.VM_NOT_FOUND


async def test_a_request_id_may_be_used_for_something_else(world: World) -> None:
    vm_id = new_id()
    async with world.hosts(Host(world.rabbit)):
        assert (await world.gateway.ask(vm_id, tiny(), request_id="1")).accepted
        for verb in (StopVm(), StopVm(grace_s=0)):
            assert (await world.gateway.ask(vm_id, verb, request_id="1")).accepted
        row = await world.row(vm_id)
    assert (row["desired"], row["grace_s"], row["generation"]) == ("stopped", 0, 3)


async def test_the_revision_that_a_refusal_tells_is_the_one_to_use(world: World) -> None:
    vm_id = new_id()
    async with world.hosts(Host(world.rabbit)):
        await world.gateway.ask(vm_id, tiny())
        for _ in range(3):
            stale = await world.gateway.ask(vm_id, UpdateVm(labels={"a": "b"}), if_match="1.1")
            assert code_of(stale) == Code.PRECONDITION_FAILED
        assert stale.problem is not None
        fresh = await world.gateway.ask(vm_id, UpdateVm(labels={"a": "b"}), if_match=stale.problem.details["revision"])
        assert fresh.accepted


async def test_an_id_that_one_project_was_refused_is_free_for_another(world: World) -> None:
    vm_id = new_id()
    for project in ("default", "other"):
        for _ in range(2):
            verdict = await world.gateway.ask(vm_id, tiny(), project=project, request_id=project)
            assert code_of(verdict) == Code.NO_CAPACITY
    assert len(await world.events("default")) == len(await world.events("other")) == 1
    async with world.hosts(Host(world.rabbit)):
        assert (await world.gateway.ask(vm_id, tiny(), project="other", request_id="again")).accepted
    assert [row["project_id"] for row in await world.db.fetch("SELECT project_id FROM rejections")] == ["default"]


async def test_a_name_is_not_taken_by_a_vm_that_is_not_made(world: World) -> None:
    large = tiny("web").model_copy(update={"vcpus": 200})
    async with world.hosts(Host(world.rabbit)):
        verdicts = await asyncio.gather(world.gateway.ask(new_id(), large), world.gateway.ask(new_id(), tiny("web")))
    assert [verdict.accepted for verdict in verdicts] == [False, True]


# How much


async def test_a_quota_is_filled_exactly_by_clients_that_race(world: World, database: str) -> None:
    await quota(world, vms=7)
    host = Host(world.rabbit, size=Capacity(vcpus=64, memory_mib=65536, disk_gib=1000))
    async with conducting(world.rabbit, database), world.hosts(host):
        verdicts = await asyncio.gather(*(world.gateway.ask(new_id(), tiny()) for _ in range(40)))
    refused = [verdict for verdict in verdicts if not verdict.accepted]
    assert len(verdicts) - len(refused) == 7
    assert {code_of(verdict) for verdict in refused} == {Code.QUOTA_EXCEEDED}
    assert refused[0].problem is not None
    assert refused[0].problem.details["quota"] == {"vms": {"limit": 7, "used": 7, "asked": 1}}
    assert await violations(world.db) == {}


@pytest.mark.parametrize(("name", "limit"), [("vcpus", 2), ("memory_mib", 2 * 128), ("disk_gib", 2)])
async def test_every_resource_has_its_limit(world: World, name: str, limit: int) -> None:
    await quota(world, **{name: limit})
    async with world.hosts(Host(world.rabbit)):
        verdicts = [await world.gateway.ask(new_id(), tiny()) for _ in range(3)]
    assert [verdict.accepted for verdict in verdicts] == [True, True, False]
    assert code_of(verdicts[2]) == Code.QUOTA_EXCEEDED


async def test_a_deleted_vm_gives_its_quota_back_when_its_host_says_so(world: World) -> None:
    await quota(world, vms=1)
    host, vm_id = Host(world.rabbit), new_id()
    async with world.hosts(host):
        assert (await world.gateway.ask(vm_id, tiny())).accepted
        await world.gateway.ask(vm_id, DeleteVm())
        assert code_of(await world.gateway.ask(new_id(), tiny())) == Code.QUOTA_EXCEEDED
        command = await host.command(vm_id, lambda command: command.wanted == "absent")
        await host.say(host.seen(command, Observed.ABSENT))
        await world.until(vm_id, State.DELETED)
        assert (await world.gateway.ask(new_id(), tiny())).accepted
        assert await violations(world.db) == {}


async def test_who_finds_no_host_uses_no_quota(world: World) -> None:
    """In one batch: the first is too large for every host, and the second fits into what is left of the quota."""
    await quota(world, vcpus=9)
    large = tiny().model_copy(update={"vcpus": 9})
    async with world.hosts(Host(world.rabbit)):
        verdicts = await asyncio.gather(
            world.gateway.ask(new_id(), large), *(world.gateway.ask(new_id(), tiny()) for _ in range(3))
        )
    assert [verdict.accepted for verdict in verdicts] == [False, True, True, True]
    assert code_of(verdicts[0]) == Code.NO_CAPACITY


async def test_a_counter_that_is_wrong_keeps_no_vm_from_going(world: World) -> None:
    host, vm_id = Host(world.rabbit), new_id()
    async with world.hosts(host):
        await world.gateway.ask(vm_id, tiny())
        await world.db.execute("UPDATE quotas SET vms_used = 0, memory_mib_used = 5")
        await world.gateway.ask(vm_id, DeleteVm())
        command = await host.command(vm_id, lambda command: command.wanted == "absent")
        await host.say(host.seen(command, Observed.ABSENT))
        await world.until(vm_id, State.DELETED)


# How often


async def test_one_allowance_counts_for_rest_and_amqp_and_for_every_conductor(
    world: World, clients: dict[str, Asker], database: str
) -> None:
    await quota(world, request_burst=10, requests_per_s=1)
    async with conducting(world.rabbit, database):
        verdicts = await asyncio.gather(
            *(clients["ada"].ask(new_id(), DeleteVm()) for _ in range(15)),
            *(world.gateway.ask(new_id(), DeleteVm()) for _ in range(15)),
        )
        others = await asyncio.gather(*(clients["otto"].ask(new_id(), DeleteVm()) for _ in range(15)))
    limited = [verdict.problem for verdict in verdicts if verdict.problem and verdict.problem.code == Code.RATE_LIMITED]
    assert 18 <= len(limited) <= 20
    assert all(0 < problem.details["retry_after_s"] <= 1.1 for problem in limited)
    assert {code_of(verdict) for verdict in others} == {Code.VM_NOT_FOUND}
    assert await dead(world) == []


async def test_who_asks_too_often_and_cannot_be_answered_leaves_no_trace_in_the_log(
    world: World, clients: dict[str, Asker]
) -> None:
    await quota(world, request_burst=1, requests_per_s=1)
    for _ in range(3):
        await publish(world, "ada", b"{", type="vm.create.v1")
    letters = await eventually(lambda: dead(world))
    while len(letters) < 3:
        letters += await eventually(lambda: dead(world))
    assert {letter["dead_code"] for letter in letters} >= {Code.RATE_LIMITED}
    assert len([fact for fact in await world.events() if fact["type"] == "rejected"]) < 3


async def test_a_create_that_came_too_soon_is_explained_and_may_come_again(world: World) -> None:
    await quota(world, request_burst=1, requests_per_s=1)
    async with world.hosts(Host(world.rabbit)):
        ids = [new_id() for _ in range(3)]
        verdicts = await asyncio.gather(*(world.gateway.ask(vm_id, tiny(), request_id="mine") for vm_id in ids))
        late = next(vm_id for vm_id, verdict in zip(ids, verdicts, strict=True) if not verdict.accepted)
        kept = await world.db.fetchval("SELECT problem->>'code' FROM rejections WHERE vm_id = $1", late)
        assert kept == Code.RATE_LIMITED
        await quota(world, request_burst=100, requests_per_s=1000)

        async def accepted() -> bool:
            return (await world.gateway.ask(late, tiny(), request_id="mine")).accepted

        await eventually(accepted)


async def test_what_waited_while_nobody_worked_is_not_too_often(broker: Rabbit, database: str) -> None:
    """An hour's requests come at once when the conductors are back, and their senders did nothing wrong."""
    gateway = Gateway(broker)
    async with up(gateway):
        asking = [asyncio.create_task(gateway.ask(new_id(), DeleteVm(), wait_s=30)) for _ in range(40)]
        connection = await asyncpg.connect(database)
        await connection.execute("UPDATE quotas SET request_burst = 1, requests_per_s = 1")
        await connection.close()

        async def queued() -> bool:
            probe = await aio_pika.connect(broker.url)
            async with probe:
                queue = await (await probe.channel()).declare_queue(topology.REQUESTS_QUEUE.name, passive=True)
                return queue.declaration_result.message_count == 40

        await eventually(queued)
        async with conducting(broker, database):
            verdicts = await asyncio.gather(*asking)
            assert {code_of(verdict) for verdict in verdicts} == {Code.VM_NOT_FOUND}
            more = await asyncio.gather(*(gateway.ask(new_id(), DeleteVm()) for _ in range(10)))
            assert Code.RATE_LIMITED in {code_of(verdict) for verdict in more}


async def test_administration_goes_on_while_its_project_asks_too_often(world: World) -> None:
    await quota(world, request_burst=1, requests_per_s=1)
    verdicts = await asyncio.gather(*(world.gateway.ask(new_id(), DeleteVm()) for _ in range(5)))
    assert Code.RATE_LIMITED in {code_of(verdict) for verdict in verdicts}
    await quota(world, request_burst=100, requests_per_s=1000)
    await eventually(lambda: _not_limited(world))


async def _not_limited(world: World) -> bool:
    return code_of(await world.gateway.ask(new_id(), DeleteVm())) != Code.RATE_LIMITED


# Changes


async def test_names_and_labels_change_without_troubling_the_host(world: World) -> None:
    host, vm_id = Host(world.rabbit), new_id()
    async with world.hosts(host):
        await world.gateway.ask(vm_id, tiny("web", labels={"a": "1", "b": "2"}))
        command = await host.command(vm_id)
        await host.say(host.seen(command, Observed.RUNNING))
        await world.until(vm_id, State.RUNNING)
        heard = len(host.heard)
        assert (await world.gateway.ask(vm_id, UpdateVm(name="db", labels={"a": None, "c": "3"}))).name == "db"
        row = await world.row(vm_id)
        assert (row["name"], row["labels"]) == ("db", {"b": "2", "c": "3"})
        assert (row["generation"], row["observed_generation"], row["deadline"]) == (1, 1, None)
        assert len(host.heard) == heard
    changed = (await world.events())[-1]
    assert changed["data"]["labels"] == {"b": "2", "c": "3"}
    assert changed["data"]["by"] == "leveret-api"


async def test_a_name_that_is_taken_cannot_be_taken_over(world: World) -> None:
    ids = [new_id() for _ in range(3)]
    async with world.hosts(Host(world.rabbit)):
        for vm_id, name in zip(ids, ("a", "b", "c"), strict=True):
            await world.gateway.ask(vm_id, tiny(name))
        assert code_of(await world.gateway.ask(ids[0], UpdateVm(name="b"))) == Code.NAME_TAKEN
        both = await asyncio.gather(*(world.gateway.ask(vm_id, UpdateVm(name="d")) for vm_id in ids[:2]))
        assert sorted(verdict.accepted for verdict in both) == [False, True]
        assert (await world.gateway.ask(ids[2], UpdateVm(name="c"))).accepted


async def test_a_vm_has_no_more_labels_than_it_may(world: World) -> None:
    vm_id = new_id()
    async with world.hosts(Host(world.rabbit)):
        await world.gateway.ask(vm_id, tiny(labels={f"k{n}": "v" for n in range(32)}))
        assert code_of(await world.gateway.ask(vm_id, UpdateVm(labels={"one": "more"}))) == Code.INVALID_REQUEST
        assert (await world.gateway.ask(vm_id, UpdateVm(labels={"k0": None, "one": "more"}))).accepted


@pytest.mark.parametrize("verb", [StopVm(), DeleteVm(), UpdateVm(name="other")])
async def test_a_change_of_what_was_changed_meanwhile_is_refused(world: World, verb: Any) -> None:
    vm_id = new_id()
    async with world.hosts(Host(world.rabbit)):
        await world.gateway.ask(vm_id, tiny())
        stale = await world.gateway.ask(vm_id, verb, if_match="7")
        assert code_of(stale) == Code.PRECONDITION_FAILED
        assert (await world.row(vm_id))["generation"] == 1
        revision = stale.problem.details["revision"] if stale.problem else ""
        assert code_of(await world.gateway.ask(vm_id, verb, if_match=f"{revision}0")) == Code.PRECONDITION_FAILED
        fresh = await world.gateway.ask(vm_id, verb, if_match="1", request_id="mine")
        assert fresh.accepted
        again = await world.gateway.ask(vm_id, verb, if_match="1", request_id="mine")
        assert again.accepted, "the same request again is the same answer"


@pytest.mark.parametrize(
    ("verb", "headers", "code"),
    [(RetryVm(), {}, Code.STATE_CONFLICT), (StopVm(), {"if_match": "9"}, Code.PRECONDITION_FAILED)],
)
async def test_a_refused_change_stays_refused_when_it_comes_again(
    world: World, clients: dict[str, Asker], verb: Any, headers: dict[str, str], code: Code
) -> None:
    vm_id = new_id()
    async with world.hosts(Host(world.rabbit)):
        await clients["ada"].ask(vm_id, tiny())
        for _ in range(3):
            assert code_of(await clients["ada"].ask(vm_id, verb, request_id="same", **headers)) == code
        row = await world.row(vm_id)
        assert (row["generation"], row["desired"]) == (1, "running")
        assert len(row["recent_requests"]) == 2


async def test_a_refused_rename_is_not_carried_out_later(world: World) -> None:
    ids = [new_id() for _ in range(2)]
    async with world.hosts(Host(world.rabbit)):
        for vm_id, name in zip(ids, ("a", "b"), strict=True):
            await world.gateway.ask(vm_id, tiny(name))
        assert code_of(await world.gateway.ask(ids[0], UpdateVm(name="b"), request_id="one")) == Code.NAME_TAKEN
        assert (await world.gateway.ask(ids[1], UpdateVm(name="c"))).accepted
        assert code_of(await world.gateway.ask(ids[0], UpdateVm(name="b"), request_id="one")) == Code.NAME_TAKEN
        assert (await world.gateway.ask(ids[0], UpdateVm(name="b"), request_id="two")).accepted


async def test_a_refused_change_that_nobody_waits_for_is_told_in_the_log(
    world: World, clients: dict[str, Asker]
) -> None:
    vm_id = new_id()
    async with world.hosts(Host(world.rabbit)):
        await clients["ada"].ask(vm_id, tiny())
        await publish(world, "ada", b"{}", type="vm.retry.v1", headers={"vm_id": str(vm_id), "request_id": "unheard"})

        async def told() -> Any:
            return [dict(fact) for fact in await world.events() if fact["type"] == "rejected"]

        [fact] = await eventually(told)
        assert (fact["vm_id"], fact["data"]["request_id"]) == (vm_id, "unheard")
        assert fact["data"]["problem"]["code"] == Code.STATE_CONFLICT


async def test_a_refused_delete_buries_nothing(world: World) -> None:
    vm_id = new_id()
    async with world.hosts(Host(world.rabbit)):
        await world.gateway.ask(vm_id, tiny())
        assert code_of(await world.gateway.ask(vm_id, DeleteVm(), if_match="9")) == Code.PRECONDITION_FAILED
        assert await world.db.fetchval("SELECT count(*) FROM tombstones") == 0


async def test_a_dry_run_says_what_would_be_and_leaves_nothing(world: World) -> None:
    vm_id = new_id()
    host = Host(world.rabbit)
    async with world.hosts(host):
        would = await world.gateway.ask(vm_id, tiny("web"), dry_run="true")
        assert (would.accepted, would.dry_run, would.name) == (True, True, "web")
        large = tiny().model_copy(update={"memory_mib": 10**6})
        would_not = await world.gateway.ask(vm_id, large, dry_run="true")
        assert (code_of(would_not), would_not.dry_run) == (Code.NO_CAPACITY, True)
        for table in ("vms", "rejections", "events", "vm_user_data"):
            assert await world.db.fetchval(f"SELECT count(*) FROM {table}") == 0
        assert await world.used() == [(0, 0, 0)]
        assert host.heard == []
        assert code_of(await world.gateway.ask(vm_id, StopVm(), dry_run="true")) == Code.INVALID_REQUEST


# Administration


async def test_a_project_comes_with_its_quota_and_its_exchange_and_goes_when_it_is_empty(world: World) -> None:
    make = CreateProject(quota=UpdateQuota(vms=3, memory_mib=4096))
    for _ in range(2):
        assert (await world.gateway.order(make, project="blue")).accepted
    assert code_of(await world.gateway.order(CreateProject(), project="blue")) == Code.ID_CONFLICT
    connection = await aio_pika.connect(world.rabbit.url)
    async with connection:
        await (await connection.channel()).get_exchange(topology.events_exchange("blue").name)
    vm_id = new_id()
    async with world.hosts(Host(world.rabbit)):
        assert (await world.gateway.ask(vm_id, tiny(), project="blue")).accepted
        assert code_of(await world.gateway.order(DeleteProject(), project="blue")) == Code.PROJECT_IN_USE
    await world.gateway.order(UpdateQuota(vms=None), project="blue")
    assert code_of(await world.gateway.order(UpdateQuota(vcpus=0), project="blue")) == Code.QUOTA_EXCEEDED
    kinds = [event["type"] for event in await world.events("blue")]
    assert kinds == ["project.created", "accepted", "scheduled", "quota.changed"]


async def test_a_closed_project_is_closed_for_good(world: World) -> None:
    token = NewToken(token_id=uuid.uuid4(), name="ci", hash="ab" * 32)
    orders: list[Any] = [CreateProject(), token, NewAmqpUser(user="ada"), DeleteProject()]
    for order in orders:
        assert (await world.gateway.order(order, project="blue")).accepted
    for order in [*orders[1:], UpdateQuota(vms=1)]:
        assert code_of(await world.gateway.order(order, project="blue")) == Code.PROJECT_NOT_FOUND
    assert code_of(await world.gateway.order(CreateProject(), project="blue")) == Code.ID_CONFLICT
    assert code_of(await world.gateway.ask(new_id(), tiny(), project="blue")) == Code.PROJECT_NOT_FOUND
    assert await world.db.fetchval("SELECT revoked_at IS NOT NULL FROM tokens")
    assert await world.db.fetchval("SELECT count(*) FROM amqp_users") == 0


async def test_every_change_of_tokens_and_broker_users_is_logged_once_with_who_made_it(world: World) -> None:
    token = NewToken(token_id=uuid.uuid4(), name="ci", role="reader", hash="ab" * 32)
    orders = [
        token,
        EndToken(token_id=token.token_id),
        NewAmqpUser(user="ada"),
        NewAmqpUser(user="ada", role="reader"),
        EndAmqpUser(user="ada"),
    ]
    for order in orders:
        assert (await world.gateway.order(order, actor="token root of default")).accepted
        if not isinstance(order, EndAmqpUser):
            assert (await world.gateway.order(order)).accepted, "again"
    facts = await world.events()
    assert [fact["type"] for fact in facts] == [
        "token.created",
        "token.revoked",
        "amqp_user.added",
        "amqp_user.changed",
        "amqp_user.removed",
    ]
    assert {fact["data"]["by"] for fact in facts} == {"token root of default"}
    assert "ab" * 32 not in str([dict(fact) for fact in facts])


async def test_names_of_tokens_and_broker_users_belong_to_one(world: World) -> None:
    first, second = (NewToken(token_id=uuid.uuid4(), name="ci", hash=digit * 64) for digit in "12")
    assert (await world.gateway.order(first)).accepted
    assert code_of(await world.gateway.order(second)) == Code.NAME_TAKEN
    assert (
        code_of(await world.gateway.order(EndToken(token_id=first.token_id), project="other")) == Code.TOKEN_NOT_FOUND
    )
    assert (await world.gateway.order(EndToken(token_id=first.token_id))).accepted
    assert (await world.gateway.order(second)).accepted
    assert (await world.gateway.order(NewAmqpUser(user="ada"))).accepted
    assert code_of(await world.gateway.order(NewAmqpUser(user="ada"), project="other")) == Code.ID_CONFLICT
    assert code_of(await world.gateway.order(EndAmqpUser(user="ada"), project="other")) == Code.AMQP_USER_NOT_FOUND


async def test_an_order_that_comes_again_is_answered_and_not_done_again(world: World) -> None:
    async def order(message: Any, request_id: str) -> Verdict:
        return await world.gateway.ask_with(message, {"project": "default", "actor": "a", "request_id": request_id})

    assert (await order(NewAmqpUser(user="ada"), "one")).accepted
    assert (await order(EndAmqpUser(user="ada"), "two")).accepted
    assert (await order(EndAmqpUser(user="ada"), "two")).accepted, "it was done, and is not found missing"
    assert (await order(NewAmqpUser(user="ada"), "one")).accepted
    assert await world.db.fetchval("SELECT count(*) FROM amqp_users") == 0
    assert code_of(await order(EndAmqpUser(user="ada"), "three")) == Code.AMQP_USER_NOT_FOUND
    assert code_of(await order(EndAmqpUser(user="ada"), "three")) == Code.AMQP_USER_NOT_FOUND
    assert len(await world.events()) == 2


async def test_nothing_gets_into_a_project_while_it_closes(world: World, database: str) -> None:
    """Who waits for the project's row finds it closed."""
    await world.gateway.order(CreateProject(), project="blue")
    closing = await asyncpg.connect(database)
    async with world.hosts(Host(world.rabbit)):
        async with closing.transaction():
            await projects.quota(closing, "blue")
            await projects.close(closing, "blue")
            waiting = [
                asyncio.create_task(world.gateway.ask(new_id(), tiny(), project="blue")),
                asyncio.create_task(world.gateway.order(NewAmqpUser(user="ada"), project="blue")),
            ]

            async def blocked() -> bool:
                return bool(await world.db.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))

            await eventually(blocked)
        assert {code_of(verdict) for verdict in await asyncio.gather(*waiting)} == {Code.PROJECT_NOT_FOUND}
    await closing.close()
    assert await world.db.fetchval("SELECT count(*) FROM vms") == 0


async def test_a_broker_user_that_two_projects_want_at_once_gets_one(world: World) -> None:
    assert await projects.put_amqp_user(world.db, "ada", projects.AmqpUser("default", "reader"), "a")
    assert not await projects.put_amqp_user(world.db, "ada", projects.AmqpUser("other", "member"), "b")
    assert await projects.amqp_users(world.db, ["ada"]) == {"ada": projects.AmqpUser("default", "reader")}


async def test_somebody_can_always_administer(world: World) -> None:
    first, second = (NewToken(token_id=uuid.uuid4(), name=digit, role="admin", hash=digit * 64) for digit in "12")
    await world.gateway.order(first)
    assert code_of(await world.gateway.order(EndToken(token_id=first.token_id))) == Code.STATE_CONFLICT
    assert code_of(await world.gateway.order(DeleteProject())) == Code.PROJECT_IN_USE
    await world.gateway.order(second, project="other")
    assert (await world.gateway.order(EndToken(token_id=first.token_id))).accepted
    assert (
        code_of(await world.gateway.order(EndToken(token_id=second.token_id), project="other")) == Code.STATE_CONFLICT
    )


async def test_the_use_of_tokens_is_noted_and_never_goes_back(world: World) -> None:
    token = NewToken(token_id=uuid.uuid4(), name="ci", hash="ab" * 32)
    await world.gateway.order(token)
    for at in (2_000.0, 1_000.0, 1e12):
        assert (await world.gateway.order(TokensUsed(last_used={token.token_id: at, uuid.uuid4(): at}))).accepted
        used = await world.db.fetchval("SELECT extract(epoch FROM last_used_at)::float8 FROM tokens")
        assert used == 2_000.0 if at < 1e12 else used > 1e9
    assert await world.db.fetchval("SELECT last_used_at <= now() FROM tokens")


async def test_the_api_tells_which_tokens_were_used(world: World) -> None:
    token = NewToken(token_id=uuid.uuid4(), name="ci", hash="ab" * 32)
    await world.gateway.order(token)
    link, publisher = Link(world.rabbit.url_of("leveret-api"), "test-api"), Publisher("leveret-api")
    link.add(publisher)
    link.start()
    try:
        assert await link.wait_up(20)
        last_use = LastUse(publisher, link)
        last_use.note(token.token_id)
        await last_use.tell_once()

        async def noted() -> bool:
            return await world.db.fetchval("SELECT last_used_at FROM tokens") is not None

        await eventually(noted)
    finally:
        await link.stop()
    assert await dead(world) == []


async def test_a_token_of_a_project_that_is_not_there_is_refused(world: World, gateway_orders: list[Any]) -> None:
    for order in gateway_orders:
        verdict = await world.gateway.order(order, project="none-such")
        assert code_of(verdict) in {Code.PROJECT_NOT_FOUND, Code.TOKEN_NOT_FOUND, Code.AMQP_USER_NOT_FOUND}


@pytest.fixture
def gateway_orders() -> list[Any]:
    return [
        NewToken(token_id=uuid.uuid4(), name="ci", hash="ab" * 32),
        EndToken(token_id=uuid.uuid4()),
        NewAmqpUser(user="ada"),
        EndAmqpUser(user="ada"),
        UpdateQuota(vms=1),
        DeleteProject(),
    ]


# The log


async def test_what_is_forgotten_is_told(world: World) -> None:
    vm_id = new_id()
    async with world.hosts(Host(world.rabbit)):
        await world.gateway.ask(vm_id, tiny())

        async def numbered() -> int:
            return int(await world.db.fetchval("SELECT count(*) FROM events WHERE seq IS NOT NULL"))

        await eventually(numbered)
        count = await numbered()

        async def published() -> bool:
            return bool(await world.db.fetchval("SELECT published_seq = $1 FROM projects WHERE id = 'default'", count))

        await eventually(published)
        await world.conductor.sweeper.forget_once()
        assert await world.db.fetchval("SELECT forgotten_seq FROM projects WHERE id = 'default'") == 0
        await world.db.execute("""UPDATE vms SET state = 'deleting', desired = 'deleted' WHERE id = $1""", vm_id)
        await world.db.execute(
            """UPDATE vms SET state = 'deleted', host_id = NULL, token = NULL, address = NULL, deadline = NULL,
                              updated_at = now() - interval '1 year' WHERE id = $1""",
            vm_id,
        )
        await world.db.execute("UPDATE events SET at = now() - interval '1 year'")
        assert code_of(await world.gateway.ask(vm_id, tiny("another"))) == Code.VM_DELETED
        await world.conductor.sweeper.forget_once()
        assert await world.db.fetchval("SELECT count(*) FROM vms") == 0
        assert [fact["type"] for fact in await world.events()] == ["rejected"], "what happened today is still told"
        assert await world.db.fetchval("SELECT forgotten_seq FROM projects WHERE id = 'default'") == count


async def test_the_counters_refuse_what_the_code_would_let_pass(world: World) -> None:
    with pytest.raises(asyncpg.CheckViolationError):
        await world.db.execute("UPDATE quotas SET vms_max = 1, vms_used = 2")
    with pytest.raises(asyncpg.CheckViolationError):
        await world.db.execute("UPDATE quotas SET memory_mib_used = -1")
