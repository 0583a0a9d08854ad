"""Who gets to see or change what: every address of the API, asked by everybody.

Two projects, north and south. Whoever is not of north learns nothing about it: neither what it has, nor that it has it.
"""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import httpx2
import pytest
from installation import Installation
from peers import eventually, tiny

from leveret.api.routes import ROUTES, Route
from leveret.client import Leveret
from leveret.shared.documents import CreateToken
from leveret.shared.groups import CreateGroup
from leveret.shared.ids import new_id

pytestmark = pytest.mark.acceptance

STRANGERS = ("none", "unknown", "expired", "revoked")
PROTECTED = [route for route in ROUTES if route.needs_token]
#: Words that stand in the things of north and nowhere else.
MARKS = ("bluewhale", "bluebell", "bluebird", "blueberry", "bluebonnet")


@dataclass
class Scene:
    """The things of north, and a token for everybody who may come."""

    url: str
    house: Installation
    vm_id: UUID
    token_id: UUID
    tokens: dict[str, str]

    def address(self, route: Route) -> str:
        """The route with north's own things in it, and for lists no page that would be too long to read."""
        return route.path.format(
            vm_id=self.vm_id, project="north", token_id=self.token_id, user="bluebird", host="fake-1", group="bluejay"
        )

    async def ask(self, route: Route, who: str) -> httpx2.Response:
        headers = {"Authorization": f"Bearer {self.tokens[who]}"} if who != "none" else {}
        body = None if route.takes is None else json.dumps(BODIES.get(route.operation, {}))
        if body is not None:
            headers["Content-Type"] = "application/json"
        async with httpx2.AsyncClient(base_url=self.url, timeout=20, verify=False) as client:
            return await client.request(route.method, self.address(route), headers=headers, content=body)

    async def of_north(self) -> dict[str, list[Any]]:
        """All that the database knows about north, and how the hosts are."""
        tables = {
            "vms": "id, name, labels, desired, generation, restarts, state, recent_requests",
            "tokens": "id, name, role, revoked_at, expires_at",
            "amqp_users": "name, role",
            "groups": "name, policy, enforcement, topology",
            "quotas": "vms_max, vcpus_max, memory_mib_max, disk_gib_max, vms_used, requests_per_s",
            "rejections": "vm_id, problem",
        }
        found = {
            table: await self.house.query(f"SELECT {columns} FROM {table} WHERE project_id = 'north' ORDER BY 1")
            for table, columns in tables.items()
        }
        found["hosts"] = await self.house.query("SELECT name, state, state_reason FROM hosts ORDER BY name")
        found["projects"] = await self.house.query("SELECT deleted_at FROM projects WHERE id = 'north'")
        return {table: [tuple(row) for row in rows] for table, rows in found.items()}


_CREATE = {"name": "intruder", "image": {"name": "tiny"}, "memory_mib": 128, "disk_gib": 1}
BODIES: dict[str, dict[str, Any]] = {
    "createVm": _CREATE,
    "createVmByKey": _CREATE,
    "createGroup": {"name": "intruder"},
    "updateVm": {"labels": {"hacked": "yes"}},
    "updateQuota": {"vms": 1000},
    "createToken": {"name": "intruder", "role": "admin"},
    "fenceHost": {"proof": "the intruder says so"},
}


@pytest.fixture(scope="module")
def scene(house: Installation) -> Iterator[Scene]:
    scene = asyncio.run(_set(house))
    yield scene
    asyncio.run(_clear(scene))


async def _set(house: Installation) -> Scene:
    vm_id, tokens = new_id(), {"unknown": "lv_" + "x" * 43}
    async with house.client() as admin:
        for project in ("north", "south"):
            await admin.create_project(project)
        kept = await admin.create_token("north", CreateToken(name="bluebell", role="member"))
        ended = await admin.create_token("north", CreateToken(name="gone"))
        tokens |= {"own": kept.token, "revoked": ended.token}
        for who, project, token in (
            ("reader", "north", CreateToken(name="looks", role="reader")),
            ("expired", "north", CreateToken(name="old")),
            ("other", "south", CreateToken(name="neighbour")),
            ("other reader", "south", CreateToken(name="spy", role="reader")),
        ):
            tokens[who] = (await admin.create_token(project, token)).token
        await admin.revoke_token("north", ended.id)
        await house.query("UPDATE tokens SET expires_at = now() - interval '1 s' WHERE name = 'old'")
        await admin.add_amqp_user("north", "bluebird")
    async with Leveret(house.url, tokens["own"]) as owner:
        for group in ("bluebonnet", "bluejay"):  # one that everybody asks for by its name, and one that nobody names
            await owner.create_group(CreateGroup(name=group))
        await owner.create(tiny("bluewhale", labels={"team": "blueberry"}), vm_id=vm_id, wait="running")
    return Scene(house.url, house, vm_id, kept.id, tokens)


async def _clear(scene: Scene) -> None:
    for who in ("own", "other"):
        async with Leveret(scene.url, scene.tokens[who]) as owner:
            async for vm in owner.list():
                await owner.delete(vm.id, wait=True)


def named(route: Route) -> str:
    return route.operation


def is_about_north(route: Route) -> bool:
    return any(thing in route.path for thing in ("{vm_id}", "{project}", "{group}"))


@pytest.mark.parametrize("who", STRANGERS)
async def test_without_a_good_token_nothing_is_told_or_changed(scene: Scene, who: str) -> None:
    before = await scene.of_north()
    for route in PROTECTED:
        answer = await scene.ask(route, who)
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated"), named(route)
        assert not any(mark in answer.text for mark in MARKS), named(route)
    assert await scene.of_north() == before


@pytest.mark.parametrize("who", ["other", "other reader"])
async def test_another_project_learns_and_changes_nothing(scene: Scene, who: str) -> None:
    before = await scene.of_north()
    for route in PROTECTED:
        if route.operation == "createVm" and who == "other":
            continue  # see below
        answer = await scene.ask(route, who)
        told = answer.text + str(dict(answer.headers))
        assert not any(mark in told for mark in MARKS), f"{named(route)}: {told}"
        if is_about_north(route):
            # Who may not write at all, or make projects, is told so whatever there is.
            is_told_so = route.operation == "createProject" or (
                who == "other reader" and "{project}" not in route.path and route.method != "GET"
            )
            expected = 403 if is_told_so else 404
            assert answer.status_code == expected, f"{named(route)}: {answer.status_code} {answer.text}"
    assert await scene.of_north() == before


async def test_an_id_of_another_project_is_only_known_to_be_taken(scene: Scene) -> None:
    """An id is anybody's to choose, and means one VM in the whole installation."""
    before = await scene.of_north()
    create = next(route for route in ROUTES if route.operation == "createVm")
    answer = await scene.ask(create, "other")
    assert (answer.status_code, answer.json()["code"]) == (409, "id_conflict")
    assert "north" not in answer.text
    assert await scene.of_north() == before


async def test_a_reader_sees_everything_and_changes_nothing(scene: Scene) -> None:
    before = await scene.of_north()
    for route in PROTECTED:
        answer = await scene.ask(route, "reader")
        looks = route.method == "GET" and route.tag != "projects" and not route.path.startswith("/v1/hosts")
        if looks or route.operation in {"getProject", "listProjects", "listProjectEvents", "whoami", "getWhoami"}:
            assert answer.status_code == 200, f"{named(route)}: {answer.status_code} {answer.text}"
        else:
            assert (answer.status_code, answer.json()["code"]) == (403, "forbidden"), f"{named(route)}: {answer.text}"
    assert await scene.of_north() == before


async def test_a_member_does_what_it_likes_with_vms_and_does_not_administer(scene: Scene) -> None:
    before = await scene.of_north()
    for route in PROTECTED:
        if route.tag != "projects" and not route.path.startswith("/v1/hosts"):
            continue
        answer = await scene.ask(route, "own")
        if route.operation in {"getProject", "listProjects", "listProjectEvents", "whoami", "getWhoami"}:
            assert answer.status_code == 200, f"{named(route)}: {answer.text}"
        else:
            assert (answer.status_code, answer.json()["code"]) == (403, "forbidden"), f"{named(route)}: {answer.text}"
    assert await scene.of_north() == before
    for route in PROTECTED:
        ends = {"deleteVm", "createVm", "retryVm", "deleteGroup"}
        if route.tag in {"vms", "events", "groups"} and route.operation not in ends:
            answer = await scene.ask(route, "own")
            # What a VM's present state does not allow is refused for that reason, and for no other.
            allowed = {200, 201, 202} | ({409} if "/actions/" in route.path else set())
            assert answer.status_code in allowed, f"{named(route)}: {answer.status_code} {answer.text}"


async def test_a_token_that_is_revoked_works_nowhere_five_seconds_later(scene: Scene) -> None:
    async with scene.house.client() as admin:
        token = await admin.create_token("north", CreateToken(name="short-lived"))
        scene.tokens["short"] = token.token
        get = next(route for route in ROUTES if route.operation == "getVm")
        assert (await scene.ask(get, "short")).status_code == 200
        await admin.revoke_token("north", token.id)

        async def refused() -> bool:
            return (await scene.ask(get, "short")).status_code == 401

        await eventually(refused, within_s=5.0)
