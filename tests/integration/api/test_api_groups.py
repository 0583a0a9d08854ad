"""Groups over REST: made, listed and forgotten by members, seen by readers, and by nobody of another project.

What the conductor would do with each request is done by the conductor's own function, in the API's database.
"""

import uuid
from typing import Any

import pytest
from api_process import Api
from api_world import ScriptedConductor, Tenant, problem_of
from httpx2 import AsyncClient

from leveret.client import Conflict, CreateGroup, Denied, Leveret, Missing
from leveret.shared.errors import Code
from leveret.shared.groups import GroupView

pytestmark = pytest.mark.integration

ZONES = {"name": "web", "policy": "spread", "enforcement": "soft", "topology": "zone"}


async def test_a_group_is_made_shown_and_forgotten(client: AsyncClient, clerk: ScriptedConductor) -> None:
    made = await client.post("/v1/groups", json=ZONES)
    assert (made.status_code, made.headers["location"]) == (201, "/v1/groups/web")
    view = GroupView.model_validate(made.json())
    assert view.model_dump(exclude={"created_at"}) == {**ZONES, "vms": 0}
    assert (await client.get("/v1/groups/web")).json() == made.json()
    assert (await client.get("/v1/groups")).json() == {"items": [made.json()], "next": None}
    assert (await client.delete("/v1/groups/web")).status_code == 204
    problem_of(await client.get("/v1/groups/web"), 404, Code.GROUP_NOT_FOUND)
    problem_of(await client.delete("/v1/groups/web"), 404, Code.GROUP_NOT_FOUND)


async def test_what_is_left_out_has_its_default(client: AsyncClient, clerk: ScriptedConductor) -> None:
    view = GroupView.model_validate((await client.post("/v1/groups", json={"name": "db"})).json())
    assert (view.policy, view.enforcement, view.topology) == ("spread", "hard", "host")


async def test_made_again_it_is_the_same_one_and_made_otherwise_its_name_is_taken(
    client: AsyncClient, clerk: ScriptedConductor
) -> None:
    first = await client.post("/v1/groups", json=ZONES)
    again = await client.post("/v1/groups", json=ZONES)
    assert (again.status_code, again.json()) == (200, first.json())
    problem_of(await client.post("/v1/groups", json={**ZONES, "policy": "pack"}), 409, Code.NAME_TAKEN)
    assert (await client.get("/v1/groups/web")).json() == first.json()


async def test_a_group_with_vms_stays(client: AsyncClient, clerk: ScriptedConductor, tenant: Tenant) -> None:
    await client.post("/v1/groups", json=ZONES)
    vm_id = await tenant.insert(group_name="web")
    assert (await client.get("/v1/groups/web")).json()["vms"] == 1
    assert (await client.get(f"/v1/vms/{vm_id}")).json()["group"] == "web"
    problem_of(await client.delete("/v1/groups/web"), 409, Code.GROUP_IN_USE)
    await tenant.connection.execute("DELETE FROM vms WHERE id = $1", vm_id)
    assert (await client.delete("/v1/groups/web")).status_code == 204


async def test_a_list_of_groups_is_read_page_by_page(client: AsyncClient, clerk: ScriptedConductor) -> None:
    names = ["a" * 63, "a", "b", "c" * 63, "d"]
    for name in names:
        assert (await client.post("/v1/groups", json={"name": name})).status_code == 201
    found: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        page = (await client.get(f"/v1/groups?limit=2{cursor and f'&cursor={cursor}'}")).json()
        found += [item["name"] for item in page["items"]]
        cursor = page["next"]
    assert found == sorted(names)


async def test_a_reader_looks_and_changes_nothing(
    stranger: AsyncClient, clerk: ScriptedConductor, tenant: Tenant
) -> None:
    await stranger.post("/v1/groups", json=ZONES, headers=tenant.headers())
    clerk.heard.clear()
    reader = tenant.headers("reader")
    assert (await stranger.get("/v1/groups", headers=reader)).json()["items"][0]["name"] == "web"
    assert (await stranger.get("/v1/groups/web", headers=reader)).status_code == 200
    problem_of(await stranger.post("/v1/groups", json={"name": "x"}, headers=reader), 403, Code.FORBIDDEN)
    problem_of(await stranger.delete("/v1/groups/web", headers=reader), 403, Code.FORBIDDEN)
    assert not clerk.heard


async def test_another_project_has_groups_of_its_own(
    stranger: AsyncClient, clerk: ScriptedConductor, tenant: Tenant
) -> None:
    other = Tenant(f"p-{uuid.uuid4().hex[:12]}", tenant.connection)
    await other.move_in()
    await stranger.post("/v1/groups", json=ZONES, headers=tenant.headers())
    assert (await stranger.get("/v1/groups", headers=other.headers())).json()["items"] == []
    problem_of(await stranger.get("/v1/groups/web", headers=other.headers("admin")), 404, Code.GROUP_NOT_FOUND)
    problem_of(await stranger.delete("/v1/groups/web", headers=other.headers("admin")), 404, Code.GROUP_NOT_FOUND)
    own = await stranger.post("/v1/groups", json={"name": "web", "policy": "pack"}, headers=other.headers())
    assert own.status_code == 201
    assert (await stranger.get("/v1/groups/web", headers=tenant.headers())).json()["policy"] == "spread"


@pytest.mark.parametrize("name", ["UPPER", "9lives", "x" * 64, "a%00b", "a.b"])
async def test_a_name_that_cannot_be_is_not_there(client: AsyncClient, conductor: ScriptedConductor, name: str) -> None:
    problem_of(await client.get(f"/v1/groups/{name}"), 404, Code.GROUP_NOT_FOUND)
    problem_of(await client.delete(f"/v1/groups/{name}"), 404, Code.GROUP_NOT_FOUND)
    assert not conductor.heard


@pytest.mark.parametrize("body", [{}, {"name": "A"}, {"name": "a", "policy": "scatter"}, {"name": "a", "size": 3}])
async def test_what_cannot_be_meant_is_refused(client: AsyncClient, conductor: ScriptedConductor, body: Any) -> None:
    problem_of(await client.post("/v1/groups", json=body), 422, Code.INVALID_REQUEST)
    assert not conductor.heard


async def test_the_client_has_every_verb(api: Api, clerk: ScriptedConductor, tenant: Tenant) -> None:
    async with Leveret(api.url, tenant.tokens["member"]) as leveret:
        made = await leveret.create_group(CreateGroup(name="web", policy="pack"))
        assert (await leveret.groups(), await leveret.group("web")) == ((made,), made)
        with pytest.raises(Conflict, match="name_taken"):
            await leveret.create_group(CreateGroup(name="web"))
        await leveret.delete_group("web")
        with pytest.raises(Missing):
            await leveret.group("web")
    async with Leveret(api.url, tenant.tokens["reader"]) as reader:
        with pytest.raises(Denied):
            await reader.delete_group("web")
