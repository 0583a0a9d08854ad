"""Broker users for AMQP clients: made and removed at a broker of our own, and at one that somebody else runs."""

import asyncio
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import aiormq
import httpx2
import pytest
from peers import eventually

from leveret.shared import topology
from leveret.stack.broker_admin import BrokerAdmin
from leveret.stack.client_permissions import MAX_CHANNELS, MAX_CONNECTIONS, Role
from leveret.stack.errors import StackError
from leveret.stack.rabbitmq import MAX_MESSAGE_BYTES, Rabbit

pytestmark = pytest.mark.integration

EVENTS, FOREIGN = topology.events_exchange("default").name, topology.events_exchange("other").name
REFUSED = aiormq.exceptions.ChannelAccessRefused


@dataclasses.dataclass(frozen=True)
class Door:
    """One of the two ways in which clients are let in."""

    add: Callable[..., str | None]
    remove: Callable[[str], None]
    name: str


@pytest.fixture(scope="module")
def managed(run_dir: Path) -> Iterator[Rabbit]:
    server = Rabbit(run_dir / "managed-rabbit", management=True)
    server.start()
    server.wait_ready()
    yield server
    server.destroy()


@pytest.fixture(scope="module")
def admin(managed: Rabbit) -> Iterator[BrokerAdmin]:
    with BrokerAdmin(managed.management_url) as admin:
        yield admin


@pytest.fixture(params=["ours", "theirs"])
async def door(request: pytest.FixtureRequest, managed: Rabbit, admin: BrokerAdmin) -> Door:
    connection = await aiormq.connect(managed.url)
    channel = await connection.channel()
    for name in (topology.REQUESTS.name, EVENTS, FOREIGN, topology.HOSTS.name):
        kind = "direct" if name == topology.HOSTS.name else "topic"
        await channel.exchange_declare(name, exchange_type=kind, durable=True)
    await channel.queue_declare(topology.REQUESTS_QUEUE.name, durable=True, arguments=topology.REQUESTS_QUEUE.arguments)
    await connection.close()
    if request.param == "ours":
        return Door(managed.create_client, managed.delete_client, "ours")
    return Door(admin.add_client, admin.remove_client, "theirs")


async def may(url: str, what: Callable[[aiormq.abc.AbstractChannel], object]) -> bool:
    """Whether the broker lets it be done; a refusal closes the channel."""
    connection = await aiormq.connect(url)
    try:
        channel = await connection.channel()
        await what(channel)  # type: ignore[misc]
    except REFUSED:
        return False
    finally:
        await connection.close()
    return True


def told(managed: Rabbit, what: str) -> str:
    """What the broker's management API says of one kind of thing."""
    base, _, _ = managed.management_url.rpartition("/")
    return httpx2.get(f"{base}/api/{what}").raise_for_status().text


def put(managed: Rabbit, what: str, content: dict[str, str]) -> None:
    base, _, _ = managed.management_url.rpartition("/")
    httpx2.put(f"{base}/api/{what}", json=content).raise_for_status()


async def gone(connection: aiormq.abc.AbstractConnection) -> None:
    await eventually(lambda: connection.is_closed, what="the connection is closed by the broker")


async def test_a_member_may_ask_and_listen_for_its_project_and_nothing_else(door: Door) -> None:
    url = await asyncio.to_thread(door.add, f"shop-{door.name}", "default", "member")
    assert url is not None
    requests = topology.REQUESTS.name

    async def own_queue(channel: aiormq.abc.AbstractChannel) -> None:
        await channel.queue_declare(f"client.shop-{door.name}.events", durable=True)
        await channel.queue_bind(f"client.shop-{door.name}.events", EVENTS, "#")
        await channel.basic_consume(f"client.shop-{door.name}.events", lambda _: asyncio.sleep(0))

    allowed = {
        "ask": lambda c: c.basic_publish(b"{}", exchange=requests, routing_key="vm.create.v1"),
        "listen": own_queue,
        "be answered": lambda c: c.basic_consume("amq.rabbitmq.reply-to", lambda _: asyncio.sleep(0), no_ack=True),
    }
    forbidden = {
        "declare a foreign queue": lambda c: c.queue_declare("leveret.host.x"),
        "declare a queue of a similar name": lambda c: c.queue_declare("client.shopping.x"),
        "have the broker name a queue": lambda c: c.queue_declare(""),
        "declare an exchange of ours": lambda c: c.exchange_declare("leveret.events.mine", exchange_type="topic"),
        "listen to another project": lambda c: c.queue_bind(f"client.shop-{door.name}.events", FOREIGN, "#"),
        "listen to requests": lambda c: c.queue_bind(f"client.shop-{door.name}.events", requests, "#"),
        "read the requests": lambda c: c.basic_get(topology.REQUESTS_QUEUE.name),
        "speak as the conductor": lambda c: c.basic_publish(b"", exchange=topology.HOSTS.name, routing_key="x"),
        "forge an event": lambda c: c.basic_publish(b"", exchange=EVENTS, routing_key="x"),
        "use the default exchange": lambda c: c.basic_publish(b"", routing_key=topology.REQUESTS_QUEUE.name),
        "reach a broker exchange": lambda c: c.basic_publish(b"", exchange="amq.topic", routing_key="x"),
        "feed the requests' queue": lambda c: c.queue_bind(topology.REQUESTS_QUEUE.name, EVENTS, "#"),
        "purge the requests": lambda c: c.queue_purge(topology.REQUESTS_QUEUE.name),
        "delete the requests": lambda c: c.queue_delete(topology.REQUESTS_QUEUE.name),
        "delete an exchange": lambda c: c.exchange_delete(EVENTS),
        "dead-letter to hosts": lambda c: c.queue_declare(
            f"client.shop-{door.name}.d", arguments={"x-dead-letter-exchange": topology.HOSTS.name}
        ),
    }
    said = {name: await may(url, do) for name, do in (allowed | forbidden).items()}
    assert said == dict.fromkeys(allowed, True) | dict.fromkeys(forbidden, False)


async def test_a_reader_listens_and_may_not_ask(door: Door) -> None:
    url = await asyncio.to_thread(door.add, f"watcher-{door.name}", "default", "reader")
    assert url is not None

    async def listen(channel: aiormq.abc.AbstractChannel) -> None:
        await channel.queue_declare(f"client.watcher-{door.name}.e", durable=True)
        await channel.queue_bind(f"client.watcher-{door.name}.e", EVENTS, "#")

    assert await may(url, listen)
    assert not await may(url, lambda c: c.basic_publish(b"", exchange=topology.REQUESTS.name, routing_key="x"))
    assert not await may(
        url,
        lambda c: c.queue_declare(
            f"client.watcher-{door.name}.d", arguments={"x-dead-letter-exchange": topology.REQUESTS.name}
        ),
    )


async def test_a_forged_sender_closes_the_channel(door: Door) -> None:
    url = await asyncio.to_thread(door.add, f"forger-{door.name}", "default")
    assert url is not None
    connection = await aiormq.connect(url)
    channel = await connection.channel()
    for user, is_refused in ((f"forger-{door.name}", False), ("leveret-api", True)):
        properties = aiormq.spec.Basic.Properties(user_id=user)
        publishing = channel.basic_publish(
            b"{}", exchange=topology.REQUESTS.name, routing_key="x", properties=properties
        )
        if is_refused:
            with pytest.raises(aiormq.exceptions.ChannelPreconditionFailed, match="user_id"):
                await publishing
        else:
            await publishing
    await connection.close()


async def test_adding_again_changes_nothing_and_a_new_password_only_when_asked_for(door: Door) -> None:
    url = await asyncio.to_thread(door.add, f"again-{door.name}", "default")
    assert url is not None
    connection = await aiormq.connect(url)
    assert await asyncio.to_thread(door.add, f"again-{door.name}", "default") in {None, url}
    assert not connection.is_closed
    rotated = await asyncio.to_thread(lambda: door.add(f"again-{door.name}", "default", rotate=True))
    assert rotated not in {None, url}
    with pytest.raises(aiormq.exceptions.AMQPConnectionError):
        await aiormq.connect(url)
    await (await aiormq.connect(rotated)).close()
    await connection.close()


@pytest.mark.parametrize("to", [("other", "member"), ("default", "reader")])
async def test_a_client_that_moves_starts_anew(managed: Rabbit, door: Door, to: tuple[str, Role]) -> None:
    """Its old queue would go on getting the events of the project that it left."""
    await asyncio.to_thread(door.remove, "mover")
    url = await asyncio.to_thread(door.add, "mover", "default", "member")
    assert url is not None
    connection = await aiormq.connect(url)
    channel = await connection.channel()
    for name, exclusive in (("client.mover.e", False), ("client.mover.mine", True)):
        await channel.queue_declare(name, durable=True, exclusive=exclusive)
        await channel.queue_bind(name, EVENTS, "#")
    await channel.exchange_declare("client.mover.x", exchange_type="fanout")
    await asyncio.to_thread(door.add, "mover", *to)
    await gone(connection)
    assert "client.mover" not in told(managed, "queues") + told(managed, "exchanges")
    await (await aiormq.connect(url)).close()  # with the same password


async def test_a_removed_client_is_thrown_out_and_its_queues_are_gone(managed: Rabbit, door: Door) -> None:
    await asyncio.to_thread(door.remove, "leaver")
    url = await asyncio.to_thread(door.add, "leaver", "default")
    assert url is not None
    connection = await aiormq.connect(url)
    channel = await connection.channel()
    await channel.queue_declare("client.leaver.e", durable=True)
    await asyncio.to_thread(door.remove, "leaver")
    await gone(connection)
    assert "client.leaver" not in told(managed, "queues")
    with pytest.raises(aiormq.exceptions.AMQPConnectionError):
        await aiormq.connect(url)
    await asyncio.to_thread(door.remove, "leaver")  # and again


async def test_a_client_is_held_to_its_limits(managed: Rabbit, door: Door) -> None:
    await asyncio.to_thread(door.add, f"greedy-{door.name}", "default")
    (limits,) = [one for one in json.loads(told(managed, "user-limits")) if one["user"] == f"greedy-{door.name}"]
    assert limits["value"] == {"max-connections": MAX_CONNECTIONS, "max-channels": MAX_CHANNELS}
    (policy,) = json.loads(told(managed, "policies"))
    assert policy["pattern"] == r"^client\."
    assert policy["definition"]["max-length-bytes"] > 0


@pytest.mark.parametrize("name", ["leveret-api", "a.b", "Shop", "", "a/b", "a" * 63, 'a">>', "a\n"])
async def test_a_name_that_no_client_may_have_is_refused(door: Door, name: str) -> None:
    with pytest.raises(StackError, match="cannot be the broker user"):
        await asyncio.to_thread(door.add, name, "default")
    with pytest.raises(StackError, match="cannot be the broker user"):
        await asyncio.to_thread(door.remove, name)


async def test_a_body_far_beyond_the_limit_is_stopped_by_the_broker(managed: Rabbit) -> None:
    connection = await aiormq.connect(await asyncio.to_thread(managed.create_client, "fat", "default"))
    channel = await connection.channel()
    with pytest.raises(aiormq.exceptions.ChannelPreconditionFailed, match="larger than"):
        await channel.basic_publish(b" " * (MAX_MESSAGE_BYTES + 1), exchange=topology.REQUESTS.name, routing_key="x")
    await connection.close()


def test_somebody_elses_user_is_neither_changed_nor_removed(managed: Rabbit, admin: BrokerAdmin) -> None:
    put(managed, "users/payroll", {"password": "secret", "tags": ""})
    put(managed, "permissions/leveret/payroll", {"configure": ".*", "write": ".*", "read": ".*"})
    put(managed, "users/boss", {"password": "secret", "tags": "administrator"})
    for name in ("payroll", "boss"):
        with pytest.raises(StackError, match="is not a client of Leveret"):
            admin.add_client(name, "default")
        with pytest.raises(StackError, match="is not a client of Leveret"):
            admin.remove_client(name)
        assert f'"{name}"' in told(managed, "users")
    assert '".*"' in told(managed, "users/payroll/permissions")


def test_half_of_what_was_to_be_done_is_completed(managed: Rabbit, admin: BrokerAdmin) -> None:
    put(managed, "users/half", {"password": "secret", "tags": ""})
    assert admin.add_client("half", "default") is None
    assert "leveret" in told(managed, "users/half/permissions")


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (lambda url: url.replace("://leveret:", "://nobody:"), "check the user and the password"),
        (lambda url: url.removesuffix("leveret") + "nowhere", "virtual host"),
        (lambda url: url.replace("@127.0.0.1:", "@127.0.0.2:"), "rabbitmq_management"),
        (lambda url: "amqp" + url.removeprefix("http"), "must look like"),
        (lambda url: "http://leveret@localhost:15672", "must look like"),
        (lambda url: "http://a:b@localhost:x", "is not one"),
    ],
)
def test_what_is_wrong_with_the_management_api_is_said(
    managed: Rabbit, change: Callable[[str], str], hint: str
) -> None:
    with pytest.raises(StackError, match=hint) as caught, BrokerAdmin(change(managed.management_url)) as admin:
        admin.add_client("nobody-yet", "default")
    assert managed.management_url.split(":")[2].split("@")[0] not in str(caught.value)


async def test_clients_are_there_again_when_the_broker_was_restarted(managed: Rabbit) -> None:
    """The last test: it takes the broker away from the others."""
    url = await asyncio.to_thread(managed.create_client, "stayer", "default")
    await asyncio.to_thread(managed.create_client, "goner", "default")
    await asyncio.to_thread(managed.delete_client, "goner")
    await asyncio.to_thread(managed.kill)
    with pytest.raises(StackError, match="not running"):
        await asyncio.to_thread(managed.create_client, "early", "default")
    await asyncio.to_thread(managed.start)
    await asyncio.to_thread(managed.wait_ready)
    await (await aiormq.connect(url)).close()
    limits = await asyncio.to_thread(managed.ctl, "list_user_limits", "--user", "stayer")
    assert "max-connections" in limits
    users = await asyncio.to_thread(managed.ctl, "list_users")
    assert "stayer" in users
    assert "goner" not in users
    assert "early" not in users
