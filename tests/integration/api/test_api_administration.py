"""Projects, tokens and broker users: who may administer them, and what becomes of it.

What the conductor would do with each order is done by the conductor's own function, in the API's database.
"""

import hashlib
import re
import uuid
from datetime import UTC, datetime
from typing import Any

import pytest
from api_world import TINY, ScriptedConductor, Tenant, problem_of
from httpx2 import AsyncClient

from leveret.api.tokens import PREFIX
from leveret.shared import ids
from leveret.shared.documents import AmqpUserView, NewTokenView, ProjectView, TokenView
from leveret.shared.errors import Code
from leveret.shared.messages import NewAmqpUser, NewToken

pytestmark = pytest.mark.integration

QUOTA = {"vms": 3, "vcpus": None, "memory_mib": 4096, "disk_gib": None, "requests_per_s": 500, "request_burst": 5000}


@pytest.fixture
async def project(admin: AsyncClient, clerk: ScriptedConductor) -> str:
    """The address of a new project."""
    address = f"/v1/projects/p-{uuid.uuid4().hex[:12]}"
    assert (await admin.put(address, json={})).status_code == 201
    clerk.heard.clear()
    return address


def name_of(address: str) -> str:
    return address.rsplit("/", 1)[1]


async def token_of(admin: AsyncClient, address: str, role: str) -> dict[str, str]:
    answer = await admin.post(f"{address}/tokens", json={"name": f"a-{role}", "role": role})
    return {"Authorization": f"Bearer {answer.json()['token']}"}


# Projects


async def test_a_project_is_made_with_its_limits_and_shown(
    admin: AsyncClient, clerk: ScriptedConductor, tenant: Tenant
) -> None:
    address = f"/v1/projects/p-{uuid.uuid4().hex[:12]}"
    headers = {"X-Request-Id": "mine-1", "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}
    made = await admin.put(address, json={"quota": {"vms": 3, "memory_mib": 4096}}, headers=headers)
    assert (made.status_code, made.headers["location"]) == (201, address)
    view = ProjectView.model_validate(made.json())
    assert view.quota.model_dump() == QUOTA
    assert view.usage.model_dump() == {"vms": 0, "vcpus": 0, "memory_mib": 0, "disk_gib": 0}
    assert (await admin.get(address)).json() == made.json()
    (heard,) = clerk.heard
    assert (heard.type, heard.user_id) == ("project.create.v1", "leveret-api")
    assert re.fullmatch(f"token admin-.* of {tenant.project}", heard.header("actor") or "")
    assert {name: heard.header(name) for name in ("project", "request_id", "traceparent", "vm_id")} == {
        "project": name_of(address),
        "request_id": "mine-1",
        "traceparent": headers["traceparent"],
        "vm_id": None,
    }


async def test_making_it_again_changes_nothing(admin: AsyncClient, project: str) -> None:
    first = await admin.get(project)
    again = await admin.put(project, json={})
    assert (again.status_code, again.json()) == (200, first.json())
    problem_of(await admin.put(project, json={"quota": {"vms": 1}}), 409, Code.ID_CONFLICT)


async def test_only_what_is_given_of_a_quota_changes(
    admin: AsyncClient, clerk: ScriptedConductor, project: str
) -> None:
    await admin.patch(f"{project}/quota", json={"vms": 3, "memory_mib": 4096, "disk_gib": 7})
    headers = {"Content-Type": "application/merge-patch+json"}
    answer = await admin.patch(f"{project}/quota", content=b'{"disk_gib": null}', headers=headers)
    assert (answer.status_code, answer.json()["quota"]) == (200, QUOTA)
    assert clerk.heard[-1].body == b'{"disk_gib":null}'


async def test_a_quota_is_not_set_below_what_is_used(
    admin: AsyncClient, clerk: ScriptedConductor, tenant: Tenant
) -> None:
    own = f"/v1/projects/{tenant.project}"
    await tenant.connection.execute("UPDATE quotas SET vms_used = 2 WHERE project_id = $1", tenant.project)
    problem = problem_of(await admin.patch(f"{own}/quota", json={"vms": 1}), 409, Code.QUOTA_EXCEEDED)
    assert problem["details"]["quota"]["vms"] == {"limit": 1, "used": 2}
    assert (await admin.get(own)).json()["usage"]["vms"] == 2
    problem_of(await admin.delete(own), 409, Code.PROJECT_IN_USE)


async def test_a_closed_project_is_gone_for_good(admin: AsyncClient, project: str) -> None:
    answer = await admin.delete(project)
    assert (answer.status_code, answer.content) == (204, b"")
    for gone in (
        await admin.get(project),
        await admin.delete(project),
        await admin.patch(f"{project}/quota", json={}),
        await admin.get(f"{project}/tokens"),
        await admin.post(f"{project}/tokens", json={"name": "x"}),
        await admin.get(f"{project}/amqp-users"),
        await admin.put(f"{project}/amqp-users/shop-{uuid.uuid4().hex[:8]}", json={}),
    ):
        problem_of(gone, 404, Code.PROJECT_NOT_FOUND)
    problem_of(await admin.put(project, json={}), 409, Code.ID_CONFLICT)
    assert name_of(project) not in [
        found["id"] for found in (await admin.get("/v1/projects?limit=1000")).json()["items"]
    ]


async def test_administrators_see_every_project_page_by_page(admin: AsyncClient, project: str, tenant: Tenant) -> None:
    found, cursor = [], ""
    while cursor is not None:
        page = (await admin.get(f"/v1/projects?limit=2{cursor}")).json()
        found += [ProjectView.model_validate(item).id for item in page["items"]]
        cursor = page["next"] and f"&cursor={page['next']}"
    assert found == sorted(set(found))
    assert {name_of(project), tenant.project} <= set(found)


@pytest.mark.parametrize("role", ["member", "reader"])
async def test_others_see_their_own_project_and_nothing_else(stranger: AsyncClient, tenant: Tenant, role: str) -> None:
    stranger.headers.update(tenant.headers(role))
    assert [item["id"] for item in (await stranger.get("/v1/projects")).json()["items"]] == [tenant.project]
    assert (await stranger.get(f"/v1/projects/{tenant.project}")).json()["id"] == tenant.project


REQUESTS: list[tuple[str, str, Any]] = [
    ("PUT", "", {}),
    ("PATCH", "/quota", {}),
    ("DELETE", "", None),
    ("GET", "/tokens", None),
    ("POST", "/tokens", {"name": "x"}),
    ("DELETE", f"/tokens/{uuid.UUID(int=1)}", None),
    ("GET", "/amqp-users", None),
    ("PUT", "/amqp-users/shop", {}),
    ("DELETE", "/amqp-users/shop", None),
]


@pytest.mark.parametrize("role", ["member", "reader"])
async def test_only_administrators_administer(
    stranger: AsyncClient, conductor: ScriptedConductor, tenant: Tenant, role: str
) -> None:
    stranger.headers.update(tenant.headers(role))
    for method, path, body in REQUESTS:
        more = {"json": body} if body is not None else {}
        own = await stranger.request(method, f"/v1/projects/{tenant.project}{path}", **more)
        problem_of(own, 403, Code.FORBIDDEN)
        # "default" is there, the others are not: nobody else can tell.
        for other in ("default", "nowhere", "NOT-A-NAME"):
            answer = await stranger.request(method, f"/v1/projects/{other}{path}", **more)
            if (method, path) == ("PUT", ""):  # it need not be there: whether it is makes no difference
                problem_of(answer, 403, Code.FORBIDDEN)
            else:
                problem_of(answer, 404, Code.PROJECT_NOT_FOUND)
    problem_of(await stranger.get("/v1/projects/default"), 404, Code.PROJECT_NOT_FOUND)
    assert not conductor.heard


async def test_a_name_that_cannot_be_is_not_there_and_cannot_be_made(
    admin: AsyncClient, conductor: ScriptedConductor, project: str
) -> None:
    for name in ("UPPER", "9lives", "x" * 63, "a%00b", "a.b"):
        problem_of(await admin.get(f"/v1/projects/{name}"), 404, Code.PROJECT_NOT_FOUND)
        problem_of(await admin.get(f"/v1/projects/{name}/tokens"), 404, Code.PROJECT_NOT_FOUND)
        problem_of(await admin.delete(f"{project}/amqp-users/{name}"), 404, Code.AMQP_USER_NOT_FOUND)
        for address, field in ((f"/v1/projects/{name}", "project"), (f"{project}/amqp-users/{name}", "user")):
            problem = problem_of(await admin.put(address, json={}), 422, Code.INVALID_REQUEST)
            assert problem["errors"][0]["field"] == field
    assert not conductor.heard


async def test_what_nobody_judges_is_queued_and_said_so(admin: AsyncClient, conductor: ScriptedConductor) -> None:
    conductor.script = conductor.silence
    answer = await admin.put(f"/v1/projects/p-{uuid.uuid4().hex[:12]}", json={})
    problem = problem_of(answer, 503, Code.UNAVAILABLE)
    assert "queued" in problem["detail"]
    assert "safe" in problem["hint"]
    assert answer.headers["retry-after"]


# Tokens


async def test_a_secret_is_told_once_and_only_its_hash_goes_further(
    admin: AsyncClient, clerk: ScriptedConductor, project: str
) -> None:
    expires_at = datetime(2099, 1, 1, tzinfo=UTC)
    wish = {"name": "ci", "role": "reader", "expires_at": expires_at.isoformat()}
    answer = await admin.post(f"{project}/tokens", json=wish)
    assert (answer.status_code, answer.headers["cache-control"]) == (201, "no-store")
    made = NewTokenView.model_validate(answer.json())
    assert made.token.startswith(PREFIX)
    assert len(made.token) == len(PREFIX) + 43
    assert (made.name, made.role, made.expires_at, made.project) == ("ci", "reader", expires_at, name_of(project))
    (heard,) = clerk.heard
    assert made.created_by == heard.header("actor")
    assert made.token.encode() not in heard.body
    sent = heard.decoded()
    assert isinstance(sent, NewToken)
    assert (sent.token_id, sent.hash) == (made.id, hashlib.sha256(made.token.encode()).hexdigest())
    (listed,) = (await admin.get(f"{project}/tokens")).json()["items"]
    assert listed == {name: value for name, value in answer.json().items() if name != "token"}


NO_TIMES_TO_COME = [10046, "10046", "soon", "2099-01-01", "2099-01-01T00:00:00", "2020-01-01T00:00:00Z"]
#: Not to be represented in UTC.
NO_TIMES_AT_ALL = ["9999-12-31T23:59:59-12:00", "0001-01-01T00:00:00+14:00"]


async def test_a_token_ends_at_a_time_to_come(admin: AsyncClient, conductor: ScriptedConductor, tenant: Tenant) -> None:
    for expires_at in NO_TIMES_TO_COME + NO_TIMES_AT_ALL:
        wish = {"name": "ci", "expires_at": expires_at}
        answer = await admin.post(f"/v1/projects/{tenant.project}/tokens", json=wish)
        assert problem_of(answer, 422, Code.INVALID_REQUEST)["errors"][0]["field"] == "expires_at"
    assert not conductor.heard


async def test_a_new_token_works_at_once_in_its_own_project(
    admin: AsyncClient, stranger: AsyncClient, project: str
) -> None:
    headers = await token_of(admin, project, "member")
    assert (await stranger.get("/v1/projects", headers=headers)).json()["items"][0]["id"] == name_of(project)


async def test_a_name_stands_for_one_token_until_that_is_revoked(admin: AsyncClient, project: str) -> None:
    first = (await admin.post(f"{project}/tokens", json={"name": "ci"})).json()
    problem_of(await admin.post(f"{project}/tokens", json={"name": "ci"}), 409, Code.NAME_TAKEN)
    for _ in range(2):
        assert (await admin.delete(f"{project}/tokens/{first['id']}")).status_code == 204
    second = (await admin.post(f"{project}/tokens", json={"name": "ci"})).json()
    listed = [TokenView.model_validate(item) for item in (await admin.get(f"{project}/tokens")).json()["items"]]
    assert [(str(token.id), token.revoked_at is None) for token in listed] == [
        (first["id"], False),
        (second["id"], True),
    ]


async def test_a_token_of_another_project_is_not_revoked_here(admin: AsyncClient, project: str, tenant: Tenant) -> None:
    token_id = await tenant.connection.fetchval("SELECT id FROM tokens WHERE project_id = $1 LIMIT 1", tenant.project)
    problem_of(await admin.delete(f"{project}/tokens/{token_id}"), 404, Code.TOKEN_NOT_FOUND)
    problem_of(await admin.delete(f"{project}/tokens/not-an-id"), 422, Code.INVALID_REQUEST)


async def test_tokens_come_page_by_page(admin: AsyncClient, project: str) -> None:
    made = [(await admin.post(f"{project}/tokens", json={"name": f"t{n}"})).json()["id"] for n in range(3)]
    page = (await admin.get(f"{project}/tokens?limit=2")).json()
    rest = (await admin.get(f"{project}/tokens?limit=2&cursor={page['next']}")).json()
    assert [item["id"] for item in page["items"] + rest["items"]] == made
    assert rest["next"] is None


async def test_tokens_are_listed_by_their_age_whatever_their_ids_are(
    admin: AsyncClient, project: str, tenant: Tenant
) -> None:
    made = [uuid.UUID(int=n) for n in (9, 4, 7, 1)]
    for age, token_id in zip((4, 3, 3, 1), made, strict=True):
        await tenant.connection.execute(
            """INSERT INTO tokens (id, project_id, name, role, hash, created_at)
            VALUES ($1, $2, $3, 'reader', $4, timestamptz '2026-01-01' - $5 * interval '1 microsecond')""",
            uuid.uuid5(token_id, project),
            name_of(project),
            f"t{age}-{token_id.int}",
            uuid.uuid4().bytes * 2,
            age,
        )
    listed, address = list[dict[str, Any]](), f"{project}/tokens?limit=1"
    page = (await admin.get(address)).json()
    listed += page["items"]
    while page["next"]:
        page = (await admin.get(f"{address}&cursor={page['next']}")).json()
        listed += page["items"]
    assert [item["name"].partition("-")[0] for item in listed] == ["t4", "t3", "t3", "t1"]
    assert [(item["created_at"], item["id"]) for item in listed] == sorted(
        (item["created_at"], item["id"]) for item in listed
    )


async def test_a_token_that_nobody_made_in_time_may_still_come(
    admin: AsyncClient, conductor: ScriptedConductor
) -> None:
    conductor.script = conductor.silence
    answer = await admin.post("/v1/projects/default/tokens", json={"name": "ci"})
    assert "revoke it" in problem_of(answer, 503, Code.UNAVAILABLE)["hint"]


# Broker users


async def test_a_broker_user_speaks_for_one_project(
    admin: AsyncClient, clerk: ScriptedConductor, project: str, tenant: Tenant
) -> None:
    user = f"shop-{uuid.uuid4().hex[:8]}"
    made = await admin.put(f"{project}/amqp-users/{user}", json={})
    assert made.status_code == 201
    view = AmqpUserView.model_validate(made.json())
    assert (view.name, view.project, view.role) == (user, name_of(project), "member")
    sent = clerk.heard[0].decoded()
    assert sent == NewAmqpUser(user=user, role="member")
    again = await admin.put(f"{project}/amqp-users/{user}", json={"role": "reader"})
    assert (again.status_code, again.json()["role"]) == (200, "reader")
    assert (await admin.get(f"{project}/amqp-users")).json() == {"items": [again.json()], "next": None}
    elsewhere = f"/v1/projects/{tenant.project}/amqp-users/{user}"
    problem_of(await admin.put(elsewhere, json={}), 409, Code.ID_CONFLICT)
    problem_of(await admin.delete(elsewhere), 404, Code.AMQP_USER_NOT_FOUND)
    assert (await admin.delete(f"{project}/amqp-users/{user}")).status_code == 204
    problem_of(await admin.delete(f"{project}/amqp-users/{user}"), 404, Code.AMQP_USER_NOT_FOUND)


async def test_leverets_own_users_speak_for_nobody(admin: AsyncClient, project: str) -> None:
    answer = await admin.put(f"{project}/amqp-users/leveret-api", json={})
    assert problem_of(answer, 422, Code.INVALID_REQUEST)["errors"][0]["field"] == "user"


async def test_broker_users_come_page_by_page(admin: AsyncClient, project: str) -> None:
    users = [f"u{n}-{uuid.uuid4().hex[:8]}" for n in range(3)]
    for user in users:
        await admin.put(f"{project}/amqp-users/{user}", json={})
    page = (await admin.get(f"{project}/amqp-users?limit=2")).json()
    rest = (await admin.get(f"{project}/amqp-users?limit=2&cursor={page['next']}")).json()
    assert [item["name"] for item in page["items"] + rest["items"]] == users


@pytest.mark.parametrize("path", ["/v1/projects", "/v1/projects/{own}", "/v1/projects/{own}/tokens"])
async def test_a_parameter_that_is_not_known_is_an_error(admin: AsyncClient, tenant: Tenant, path: str) -> None:
    answer = await admin.get(path.format(own=tenant.project), params={"sort": "name"})
    assert problem_of(answer, 422, Code.INVALID_REQUEST)["errors"][0]["field"] == "sort"


async def test_an_administrator_has_vms_of_its_own_project(
    admin: AsyncClient, conductor: ScriptedConductor, tenant: Tenant
) -> None:
    assert (await admin.put(f"/v1/vms/{ids.new_id()}", json=TINY)).status_code == 202
    assert conductor.heard[0].header("project") == tenant.project
