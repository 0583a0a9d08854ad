"""Everybody who asks: projects with their tokens and broker users, their clients, and those who only watch."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

from installation import Installation

from chaos import house
from chaos.doors import AmqpDoor, RestDoor
from chaos.history import History
from chaos.lives import Clients
from chaos.watcher import Watcher
from chaos.workload import PROJECTS, QUOTA_VMS
from leveret.client import Leveret
from leveret.client.amqp import LeveretAmqp
from leveret.shared.documents import CreateToken, UpdateQuota


@asynccontextmanager
async def crowd(
    installation: Installation, history: History, *, image: str, give_up_s: float
) -> AsyncIterator[Clients]:
    """Make the projects, and everybody's clients; the watchers listen already. `image` is for real guests.

    A watcher that hears of no API, or of no broker, for `give_up_s` seconds gives up.
    """
    made = (asyncio.to_thread(installation.rabbit.create_client, project, project) for project in PROJECTS)
    users = dict(zip(PROJECTS, await asyncio.gather(*made), strict=True))
    tokens = await _projects(installation)
    apis = house.urls(installation)
    rest = {project: [RestDoor(name, url, tokens[project]) for name, url in apis.items()] for project in PROJECTS}
    amqp = {project: AmqpDoor(users[project], project, project) for project in PROJECTS}
    async with AsyncExitStack() as stack:
        for project in PROJECTS:
            await amqp[project].open()
            stack.push_async_callback(amqp[project].close)
            for door in rest[project]:
                stack.push_async_callback(door.close)
        watchers = await _watch(stack, list(apis.values()), tokens, users, give_up_s)
        yield Clients(history, rest, amqp, watchers, image, time.monotonic())


def client_queues() -> tuple[str, ...]:
    """The queues that the watchers over AMQP own."""
    return tuple(f"client.{project}.main" for project in PROJECTS)


async def _projects(installation: Installation) -> dict[str, str]:
    """Make them, each with a broker user of its name; their tokens."""
    tokens = {}
    async with installation.client() as admin:
        for project in PROJECTS:
            quota = UpdateQuota(vms=QUOTA_VMS if project == PROJECTS[-1] else None)
            await admin.create_project(project, quota)
            tokens[project] = (await admin.create_token(project, CreateToken(name="storm"))).token
            await admin.add_amqp_user(project, project)
    return tokens


async def _watch(
    stack: AsyncExitStack, urls: list[str], tokens: Mapping[str, str], users: Mapping[str, str], give_up_s: float
) -> list[Watcher]:
    """For each project a watcher over REST (server-sent events) and one over AMQP."""
    watchers = []
    for index, project in enumerate(PROJECTS):
        client = Leveret(urls[index % len(urls)], tokens[project], retry_for_s=60)
        stack.push_async_callback(client.close)
        _, since = await client.events_page(after="latest")
        rest, amqp = Watcher(f"rest {project}", project), Watcher(f"amqp {project}", project, since)
        of_broker = LeveretAmqp(users[project], project, waits=False)
        for watching in (
            rest.run(client.watch(after=0, give_up_s=give_up_s, on_gap=rest.on_gap)),
            amqp.run(of_broker.watch(after=since, give_up_s=give_up_s, on_gap=amqp.on_gap)),
        ):
            stack.push_async_callback(_cancelled, asyncio.create_task(watching))
        watchers += [rest, amqp]
    return watchers


async def _cancelled(task: "asyncio.Task[None]") -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
