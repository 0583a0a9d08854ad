"""What is not meant is refused, on every address alike; and HEAD tells what GET would."""

import uuid
from typing import Any

import pytest
from api_world import TINY, ScriptedConductor, Tenant, problem_of
from httpx2 import AsyncClient

from leveret.api import examples
from leveret.api.routes import ROUTES, Route
from leveret.shared.errors import Code
from leveret.shared.ids import new_id

pytestmark = pytest.mark.integration

READS = [route for route in ROUTES if route.method == "GET" and route.needs_token]
WRITES = [route for route in ROUTES if route.method != "GET"]
UNCONDITIONAL = [route for route in WRITES if "If-Match" not in route.reads]


@pytest.fixture
def admin(stranger: AsyncClient, tenant: Tenant) -> AsyncClient:
    stranger.headers.update(tenant.headers("admin"))
    return stranger


async def ask(client: AsyncClient, route: Route, tenant: Tenant, **more: Any) -> Any:
    path = route.path.format(
        vm_id=new_id(), host="nobody", project=tenant.project, token_id=new_id(), user="nobody", group="nobody"
    )
    if route.takes is not None:
        more["json"] = examples.DOCUMENTS[route.takes.__name__]
    return await client.request(route.method, path, **more)


def field_of(answer: Any) -> str:
    """The one field at fault."""
    (fault,) = problem_of(answer, 422, Code.INVALID_REQUEST)["errors"]
    field: str = fault["field"]
    return field


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.operation)
async def test_a_parameter_that_is_not_known_is_an_error_everywhere(
    admin: AsyncClient, conductor: ScriptedConductor, tenant: Tenant, route: Route
) -> None:
    assert field_of(await ask(admin, route, tenant, params={"no_such": "1"})) == "no_such"
    assert not conductor.heard


@pytest.mark.parametrize(
    ("path", "name"),
    [("/v1/vms", "limit"), ("/v1/vms", "name"), ("/v1/events", "after"), ("/v1/projects", "cursor"), ("/livez", "x")],
)
async def test_of_two_values_none_is_dropped_silently(admin: AsyncClient, path: str, name: str) -> None:
    assert field_of(await admin.get(f"{path}?{name}=1&{name}=2")) == name


async def test_what_may_be_given_again_is(client: AsyncClient, tenant: Tenant) -> None:
    await tenant.insert(labels={"a": "1", "b": "2"})
    for query in ("state=running&state=stopped", "label=a%3D1&label=b%3D2"):
        assert len((await client.get(f"/v1/vms?{query}")).json()["items"]) == 1


@pytest.mark.parametrize("given", ["a b", "x" * 129, "", "a,\xe9"])
@pytest.mark.parametrize("route", WRITES, ids=lambda route: route.operation)
async def test_a_write_is_not_carried_out_under_another_name_than_its_own(
    admin: AsyncClient, conductor: ScriptedConductor, tenant: Tenant, route: Route, given: str
) -> None:
    answer = await ask(admin, route, tenant, headers={"X-Request-Id": given.encode("latin-1")})
    assert field_of(answer) == "X-Request-Id"
    assert not conductor.heard


async def test_a_long_name_reaches_the_conductor_as_it_is(client: AsyncClient, conductor: ScriptedConductor) -> None:
    name = "r/" + "x" * 126
    answer = await client.post(f"/v1/vms/{new_id()}/actions/reboot", headers={"X-Request-Id": name})
    assert (answer.status_code, answer.headers["x-request-id"]) == (202, name)
    assert [heard.header("request_id") for heard in conductor.heard] == [name]


async def test_a_read_is_answered_under_another_name(client: AsyncClient) -> None:
    answer = await client.get("/v1/vms", headers={"X-Request-Id": "a b"})
    assert answer.status_code == 200
    assert uuid.UUID(answer.headers["x-request-id"]).version == 7


@pytest.mark.parametrize("name", ["X-Request-Id", "Idempotency-Key", "If-Match"])
async def test_two_headers_for_one_thing_are_refused(
    client: AsyncClient, conductor: ScriptedConductor, name: str
) -> None:
    path = f"/v1/vms/{new_id()}/actions/start" if name == "If-Match" else "/v1/vms"
    body = {} if name == "If-Match" else TINY
    values = ('"1"', '"2"') if name == "If-Match" else ("one", "two")
    headers = [*client.headers.multi_items(), *((name, value) for value in values)]
    assert field_of(await client.post(path, json=body, headers=headers)) == name
    assert not conductor.heard


@pytest.mark.parametrize("etag", ['"1"', "*", "nonsense"])
@pytest.mark.parametrize("route", UNCONDITIONAL, ids=lambda route: route.operation)
async def test_a_condition_that_nothing_heeds_is_refused(
    admin: AsyncClient, conductor: ScriptedConductor, tenant: Tenant, route: Route, etag: str
) -> None:
    assert field_of(await ask(admin, route, tenant, headers={"If-Match": etag})) == "If-Match"
    assert not conductor.heard


def other_forms(vm_id: uuid.UUID) -> list[str]:
    return [f"urn:uuid:{vm_id}", f"{{{vm_id}}}", vm_id.hex, f"{vm_id}%20"]


async def test_an_id_is_written_in_one_way(client: AsyncClient, conductor: ScriptedConductor, tenant: Tenant) -> None:
    vm_id = await tenant.insert()
    for form in other_forms(vm_id):
        for method, path in (("GET", ""), ("GET", "/events"), ("GET", "/console-log"), ("DELETE", "")):
            assert field_of(await client.request(method, f"/v1/vms/{form}{path}")) == "vm_id"
    assert (await client.get(f"/v1/vms/{str(vm_id).upper()}")).status_code == 200
    assert not conductor.heard


@pytest.mark.parametrize("query", ["limit=5.0", "limit=1_0", "limit=%205", "limit=%2B5"])
async def test_a_number_is_written_in_one_way(client: AsyncClient, query: str) -> None:
    for path in ("/v1/vms", "/v1/events", "/v1/projects"):
        assert field_of(await client.get(f"{path}?{query}")) == "limit"


async def test_a_vm_keeps_a_name(client: AsyncClient, conductor: ScriptedConductor) -> None:
    assert field_of(await client.patch(f"/v1/vms/{new_id()}", json={"name": None})) == "name"
    assert not conductor.heard


@pytest.mark.parametrize("route", READS, ids=lambda route: route.operation)
async def test_head_tells_what_get_would_but_its_body(
    admin: AsyncClient, conductor: ScriptedConductor, tenant: Tenant, route: Route
) -> None:
    vm_id, host = await tenant.insert(), f"h-{new_id()}"
    await tenant.host(host)
    path = route.path.format(vm_id=vm_id, host=host, project=tenant.project, group="nobody")
    head = await admin.head(path)
    if route.stream is not None:
        problem = head.headers["content-type"], head.status_code, head.headers["allow"]
        assert problem == ("application/problem+json", 405, "GET")
        return
    answer = await admin.get(path)
    assert head.status_code == answer.status_code
    assert head.content == b""
    own = {"date", "x-request-id"}
    assert {key: value for key, value in head.headers.items() if key not in own} == {
        key: value for key, value in answer.headers.items() if key not in own
    }


async def test_head_of_a_long_list_reads_none_of_it(client: AsyncClient, tenant: Tenant) -> None:
    for _ in range(120):
        await tenant.insert(state="deleted")
    head = await client.head("/v1/vms", params={"state": "deleted", "limit": 1000})
    assert (head.status_code, head.content) == (200, b"")
    assert "content-length" not in head.headers


async def test_what_a_token_was_told_is_not_kept_on_the_way(client: AsyncClient, tenant: Tenant) -> None:
    vm_id = await tenant.insert()
    shown = await client.get(f"/v1/vms/{vm_id}")
    assert shown.headers["cache-control"] == "private, no-cache"
    same = await client.get(f"/v1/vms/{vm_id}", headers={"If-None-Match": shown.headers["etag"]})
    assert (same.status_code, same.headers["cache-control"]) == (304, "private, no-cache")
    for path in ("/v1/vms", "/v1/whoami", f"/v1/vms/{new_id()}"):
        answer = await client.get(path)
        assert (answer.headers["cache-control"], answer.headers["x-content-type-options"]) == ("no-store", "nosniff")
