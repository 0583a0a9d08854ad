"""docs/asyncapi.yaml holds at a real conductor: what it lets a client send is judged, what is heard is as it says.

The client here is written from the file: it knows names, properties and schemas from there, and is the broker user
of a member with no other rights.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

import aio_pika
import aiormq
import pytest
import yaml
from aio_pika.abc import AbstractIncomingMessage
from conductor_world import World
from jsonschema import Draft7Validator
from peers import Host, eventually, tiny
from referencing import Registry
from referencing.jsonschema import DRAFT7

from leveret.shared import topology
from leveret.shared.documents import (
    CreateProject,
    DeleteProject,
    DeleteVm,
    RebootVm,
    StartVm,
    StepTime,
    StopVm,
    UpdateQuota,
)
from leveret.shared.errors import Code, Problem
from leveret.shared.event_types import EVENTS
from leveret.shared.ids import new_id
from leveret.shared.lifecycle import Observed, State, Step, Wanted
from leveret.shared.messages import (
    Cordon,
    DesiredVm,
    EndAmqpUser,
    EndToken,
    Fence,
    NewAmqpUser,
    NewToken,
    Retire,
    Uncordon,
)

pytestmark = pytest.mark.integration

USER = "ada"
CONTRACT: dict[str, Any] = yaml.safe_load((Path(__file__).parents[2] / "docs/asyncapi.yaml").read_text("utf-8"))
MESSAGES = CONTRACT["components"]["messages"]
REQUESTS = CONTRACT["channels"]["requests"]
EXCHANGE = CONTRACT["channels"]["vmEvents"]["bindings"]["amqp"]["exchange"]["name"]
REPLY_TO = CONTRACT["channels"]["verdicts"]["bindings"]["amqp"]["queue"]["name"]
RESOURCES: Registry[Any] = Registry().with_resource("urn:contract", DRAFT7.create_resource(CONTRACT))

#: The examples that are refused after those before them, and why.
REFUSED = {
    ("vm.stop.v1", "in_30_s"): "precondition_failed",
    ("vm.retry.v1", "retry"): "state_conflict",
}


def check(pointer: str, document: Any) -> None:
    """Raise unless the document is valid by the schema that stands there in the contract."""
    schema = {"$ref": f"urn:contract#/components/{pointer}"}
    Draft7Validator(schema, registry=RESOURCES, format_checker=Draft7Validator.FORMAT_CHECKER).validate(document)


def properties_of(message: AbstractIncomingMessage) -> dict[str, Any]:
    names = ("content_type", "type", "message_id", "correlation_id")
    return {name: value for name in names if (value := getattr(message, name)) is not None}


class Client:
    """Speaks for the project `default`, by the contract."""

    def __init__(self, connection: aio_pika.abc.AbstractConnection) -> None:
        self._connection = connection
        self._verdicts: asyncio.Queue[AbstractIncomingMessage] = asyncio.Queue()
        self.events: list[dict[str, Any]] = []

    async def open(self) -> None:
        self._channel = await self._connection.channel(publisher_confirms=True, on_return_raises=True)
        self._exchange = await self._channel.get_exchange(
            REQUESTS["bindings"]["amqp"]["exchange"]["name"], ensure=False
        )
        await (await self._channel.get_queue(REPLY_TO, ensure=False)).consume(self._verdicts.put, no_ack=True)

    async def follow(self, project: str) -> None:
        """Bind a queue of one's own to everything that happens in a project."""
        channel = await self._connection.channel()
        address = CONTRACT["channels"]["ownQueue"]["address"]
        queue = await channel.declare_queue(address.format(user=USER, name=project), exclusive=True)
        await queue.bind(EXCHANGE.format(project=project), "#")
        await queue.consume(self._heard)

    async def _heard(self, message: AbstractIncomingMessage) -> None:
        event = json.loads(message.body)
        self.events.append(event | {"routing_key": message.routing_key, "properties": properties_of(message)})
        await message.ack()

    async def send(self, kind: str, headers: dict[str, Any], body: bytes, **more: Any) -> None:
        properties: dict[str, Any] = {
            "content_type": CONTRACT["defaultContentType"],
            "type": kind,
            "message_id": new_id().hex,
            "user_id": USER,
            "delivery_mode": 2,
        }
        check("schemas/RequestProperties", properties | more)
        message = aio_pika.Message(body, headers=dict(headers), **(properties | more))
        await self._exchange.publish(message, routing_key=REQUESTS["address"].format(type=kind), mandatory=True)

    async def ask(self, kind: str, headers: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        """The verdict, which is held against the contract."""
        mark = new_id().hex
        await self.send(kind, headers, json.dumps(body).encode(), reply_to=REPLY_TO, correlation_id=mark)
        answer = await asyncio.wait_for(self._verdicts.get(), 10)
        assert (answer.correlation_id, answer.type) == (mark, "request.verdict.v1")
        check("schemas/AnswerProperties", properties_of(answer))
        verdict: dict[str, Any] = json.loads(answer.body)
        check("messages/request.verdict.v1/payload", verdict)
        assert verdict["request_id"] == headers["request_id"]
        return verdict

    def types(self) -> set[str]:
        return {event["type"] for event in self.events}


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Client]:
    connection = await aio_pika.connect(url)
    async with connection:
        client = Client(connection)
        await client.open()
        yield client


@pytest.fixture
async def client(world: World) -> AsyncIterator[Client]:
    """A member's client; the image of the examples is registered."""
    await world.db.execute("INSERT INTO amqp_users (name, project_id, role) VALUES ($1, 'default', 'member')", USER)
    await world.db.execute("INSERT INTO images VALUES ('debian-12', 'file:///d.qcow2', $1, 'qcow2')", "0" * 64)
    await exchange_of(world, "default")
    async with connected(world.rabbit.url_of(USER)) as client:
        await client.follow("default")
        yield client


async def exchange_of(world: World, project: str) -> None:
    """Have a project's exchange before its first event, as a conductor has it after a moment."""
    connection = await aio_pika.connect(world.rabbit.url)
    async with connection:
        wanted = topology.events_exchange(project)
        await (await connection.channel()).declare_exchange(wanted.name, wanted.kind, durable=True)


async def obey(host: Host) -> None:
    """Make true, at once, whatever the host is told."""
    done: set[tuple[UUID, int]] = set()
    reached = {Wanted.RUNNING: Observed.RUNNING, Wanted.STOPPED: Observed.STOPPED, Wanted.ABSENT: Observed.ABSENT}
    while True:
        for command in list(host.heard):
            if (command.vm_id, command.generation) not in done:
                done.add((command.vm_id, command.generation))
                await host.say(host.seen(command, reached[command.wanted]))
        await asyncio.sleep(0.01)


def is_valid(event: dict[str, Any]) -> bool:
    """Whether an event, as it was heard, is what the contract says; raises with the reason when it is not."""
    event = dict(event)
    key, properties = event.pop("routing_key"), event.pop("properties")
    check(f"messages/{event['type']}/payload", event)
    check("schemas/AnswerProperties", properties)
    assert properties["type"] == MESSAGES[event["type"]]["name"]
    data = event["data"]
    undescribed = data.keys() - EVENTS[event["type"]].model_fields.keys() - {"traceparent"}
    assert undescribed == set(), (event["type"], undescribed)
    if event["type"].startswith("leveret.vm."):
        assert key == f"vm.{event['subject']}.{data['state'] or 'rejected'}"
        assert event["subject"] == data["vm_id"]
    else:
        assert key == event["type"].removeprefix("leveret.").removesuffix(".v1")
    return True


async def test_every_example_is_judged_and_all_that_is_heard_is_as_published(world: World, client: Client) -> None:
    host = Host(world.rabbit, zone="zone-a")
    last: dict[str, Any] = {}
    async with world.hosts(host):
        obedience = asyncio.create_task(obey(host))
        for kind in (
            "group.create.v1", "vm.create.v1", "vm.update.v1", "vm.stop.v1", "vm.start.v1", "vm.reboot.v1",
            "vm.retry.v1", "vm.delete.v1", "group.delete.v1",
        ):  # fmt: skip
            for example in MESSAGES[kind]["examples"]:
                headers = example["headers"] | {"request_id": new_id().hex}
                if kind == "vm.create.v1" and example["name"] != "everything":
                    headers["vm_id"] = str(new_id())  # the others are about VMs of their own
                verdict = await client.ask(kind, headers, example["payload"])
                code = REFUSED.get((kind, example["name"]))
                assert verdict.get("problem", {}).get("code") == code, (kind, example["name"], verdict)
                assert verdict["accepted"] == (code is None)
                assert verdict.get("dry_run", False) == (example["name"] == "dry_run")
                assert [one["id"] for one in verdict.get("vms", ())] == [
                    str(uuid5(UUID(headers["vm_id"]), str(number)))
                    for number in range(1, example["payload"].get("count", 0) + 1)
                ]
                if "vm_id" in headers and (kind != "vm.create.v1" or example["name"] == "everything"):
                    await at_rest(world, UUID(headers["vm_id"]))
            last[kind] = verdict
        obedience.cancel()
    assert last["vm.delete.v1"]["state"] == "deleting"
    vm_id = MESSAGES["vm.create.v1"]["examples"][0]["headers"]["vm_id"]
    await eventually(lambda: any(e["routing_key"] == f"vm.{vm_id}.deleted" for e in client.events), what="deleted")
    assert all(is_valid(event) for event in client.events)
    assert [int(event["sequence"]) for event in client.events] == list(range(1, len(client.events) + 1))


async def at_rest(world: World, vm_id: UUID) -> None:
    """Wait until a VM is as it should be."""

    async def settled() -> bool:
        row = await world.row(vm_id)
        is_true = row["deadline"] is None and row["generation"] == row["observed_generation"]
        return bool(is_true or row["state"] == "deleted")

    await eventually(settled, what=f"{vm_id} at rest")


async def test_every_type_of_event_can_happen_and_is_valid(world: World, client: Client) -> None:
    one, two = Host(world.rabbit, name="h1"), Host(world.rabbit, name="h2")
    async with connected(world.rabbit.url) as everything:
        await exchange_of(world, "fresh")
        await everything.follow("fresh")
        async with world.hosts(one, two):
            await live_a_vms_life(world, one, two)
            await fail_a_build(world, one, two)
            await wait_for_room(client)
            await look_after_groups(client)
            await refuse(world, client)
            await administer(world)
            heard = client.events + everything.events
            await eventually(lambda: {e["type"] for e in client.events + everything.events} >= set(EVENTS), what="all")
            heard = client.events + everything.events
    assert all(is_valid(event) for event in heard)
    traced = [event for event in heard if event.get("traceparent")]
    assert {event["traceparent"] for event in traced} == {TRACEPARENT}


TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


async def live_a_vms_life(world: World, *hosts: Host) -> None:
    vm_id = new_id()
    assert (await world.gateway.ask(vm_id, tiny("web"), traceparent=TRACEPARENT)).accepted
    host, command = await told(vm_id, hosts)
    await host.fails(
        command, Problem.of(Code.DISK_FULL, "No space.", step="disk", host=host.name)
    )  # build_failed, pending
    host, command = await told(vm_id, [other for other in hosts if other is not host])
    steps = (StepTime(step="image", seconds=0.5),)
    await host.say(host.seen(command, Observed.BUILDING, settled=False, step=Step.DISK, steps=steps))
    await host.say(host.seen(command, Observed.RUNNING, steps=steps))
    await world.until(vm_id, State.RUNNING)
    await host.say(host.seen(command, Observed.RUNNING, guest_ready=True))
    await world.until_ready(vm_id)
    assert (await world.gateway.ask(vm_id, RebootVm())).accepted
    command = await host.command(vm_id, lambda c: c.restarts == 1)
    await host.say(host.seen(command, Observed.RUNNING))
    off = Problem.of(Code.GUEST_SHUTDOWN, "The guest switched itself off.")
    await host.say(host.seen(command, Observed.STOPPED, problem=off))
    await world.until(vm_id, State.STOPPED)
    assert (await world.gateway.ask(vm_id, StartVm())).accepted
    assert (await world.gateway.ask(vm_id, DeleteVm())).accepted
    await world.db.execute("UPDATE vms SET deadline = now() - interval '1 second' WHERE id = $1", vm_id)
    world.conductor.sweeper.attentive_s = lambda: 60.0
    await world.conductor.sweeper.end_late()
    command = await host.command(vm_id, lambda c: c.wanted is Wanted.ABSENT)
    await host.say(host.seen(command, Observed.ABSENT))
    await world.until(vm_id, State.DELETED)


async def told(vm_id: UUID, hosts: Any) -> tuple[Host, DesiredVm]:
    """The host that was told to build it, and what it was told."""
    found: tuple[Host, DesiredVm] = await eventually(
        lambda: next(((host, c) for host in hosts for c in host.heard if c.vm_id == vm_id), None), what="a command"
    )
    return found


async def fail_a_build(world: World, *hosts: Host) -> None:
    vm_id = new_id()
    assert (await world.gateway.ask(vm_id, tiny("bad"))).accepted
    host, command = await told(vm_id, hosts)
    await host.fails(command, Problem.of(Code.IMAGE_HASH_MISMATCH, "Wrong.", step="image"))
    await world.until(vm_id, State.ERROR)


async def wait_for_room(client: Client) -> None:
    giant = {"image": {"name": "debian-12"}, "vcpus": 256, "wait_for_capacity": True}
    verdict = await client.ask("vm.create.v1", {"vm_id": str(new_id()), "request_id": "r-waits"}, giant)
    assert (verdict["accepted"], verdict["state"]) == (True, "pending")


async def look_after_groups(client: Client) -> None:
    assert (await client.ask("group.create.v1", {"request_id": "r-group"}, {"name": "brief"}))["accepted"]
    assert (await client.ask("group.delete.v1", {"request_id": "r-gone"}, {"name": "brief"}))["accepted"]


async def refuse(world: World, client: Client) -> None:
    """Nobody waits for these verdicts: the log says why."""
    create = {"image": {"name": "no-such-image"}}
    await client.send("vm.create.v1", {"vm_id": str(new_id()), "request_id": "r-1"}, json.dumps(create).encode())
    await client.send("vm.create.v1", {"vm_id": "seven", "request_id": "r-2"}, b"{}")


async def administer(world: World) -> None:
    host_id = new_id()
    await world.db.execute(
        """INSERT INTO hosts
            (id, name, zone, state, epoch, virt_type, version, vcpus, memory_mib, disk_gib, heartbeat_at)
        VALUES ($1, 'burnt', 'default', 'silent', 1, 'qemu', '1', 1, 1, 1, now() - interval '1 hour')""",
        host_id,
    )
    token = NewToken(name="ci", token_id=new_id(), hash="0" * 64)
    for order in (
        CreateProject(quota=UpdateQuota(vms=3)),
        UpdateQuota(vms=4),
        token,
        EndToken(token_id=token.token_id),
        NewAmqpUser(user="someone"),
        NewAmqpUser(user="someone", role="reader"),
        EndAmqpUser(user="someone"),
        Cordon(host_id=host_id),
        Uncordon(host_id=host_id),
        Fence(host_id=host_id, proof="it burnt down"),
        Retire(host_id=host_id),
        DeleteProject(),
    ):
        assert (await world.gateway.order(order, project="fresh")).accepted, order


async def test_each_way_to_be_refused_is_told_by_a_valid_verdict(world: World, client: Client) -> None:
    image = {"image": {"name": "debian-12"}}
    for kind, headers, body, code in (
        ("vm.create.v1", {}, {"vcpus": 0} | image, "invalid_request"),
        ("vm.create.v1", {}, {"vcpuz": 1} | image, "invalid_request"),
        ("vm.create.v1", {"vm_id": "seven"}, image, "invalid_request"),
        ("vm.create.v1", {"if_match": "one"}, image, "invalid_request"),
        ("vm.create.v1", {"CC": ["elsewhere"]}, image, "invalid_request"),
        ("vm.start.v1", {"dry_run": "true"}, {}, "invalid_request"),
        ("vm.create.v2", {}, image, "unknown_type"),
        ("project.delete.v1", {}, {}, "unknown_type"),
        ("vm.create.v1", {"project": "other"}, image, "forbidden"),
        ("vm.start.v1", {}, {}, "vm_not_found"),
        ("vm.create.v1", {}, image, "no_capacity"),
        ("vm.create.v1", {}, {"image": {"name": "none"}}, "image_unknown"),
        ("vm.create.v1", {}, {"network": "none"} | image, "network_unknown"),
    ):
        named = {"vm_id": str(new_id()), "request_id": new_id().hex} | headers
        verdict = await client.ask(kind, named, body)
        assert not verdict["accepted"]
        assert verdict["problem"]["code"] == code, verdict
        assert CONTRACT["x-errors"][code]["told-in"] == "verdict"
        assert verdict["problem"]["hint"]


async def test_the_contract_promises_no_more_than_a_clients_permissions(world: World, client: Client) -> None:
    for project in ("other", "nowhere"):
        with pytest.raises(aiormq.exceptions.ChannelAccessRefused):
            await client.follow(project)
    assert (await client.ask("vm.stop.v1", {"vm_id": str(new_id()), "request_id": "r"}, {}))["accepted"] is False
    assert StopVm().grace_s == CONTRACT["components"]["schemas"]["StopVm"]["properties"]["grace_s"]["default"]
