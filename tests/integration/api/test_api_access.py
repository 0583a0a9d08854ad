"""Who may do what, and how much anybody may send."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

import asyncpg
import pytest
from api_process import Api
from api_world import TINY, ScriptedConductor, Tenant, problem_of
from httpx2 import AsyncClient
from peers import eventually

from leveret.api.auth import KEEP_S, Tokens
from leveret.api.database import Database
from leveret.api.routes import ROUTES, Route
from leveret.shared.documents import MAX_REQUEST_BYTES
from leveret.shared.errors import Code, LeveretError
from leveret.shared.ids import new_id

pytestmark = pytest.mark.integration

GUARDED = [route for route in ROUTES if route.needs_token]


#: Who may do the least, may do nothing that others may not.
ROLES = ("reader", "member", "admin")
FOR_ADMINISTRATORS = {
    *("listHosts", "getHost", "cordonHost", "uncordonHost", "fenceHost", "retireHost"),
    *("runCheck", "listTokens", "listAmqpUsers"),
}


def least_role(route: Route) -> str:
    """Who may do this, of those who may do least."""
    if route.operation in FOR_ADMINISTRATORS or (route.tag == "projects" and route.method != "GET"):
        return "admin"
    return "reader" if route.method == "GET" else "member"


def address_of(route: Route, project: str = "nobody") -> str:
    return route.path.format(
        vm_id=new_id(), host="nobody", project=project, token_id=new_id(), user="nobody", group="nobody"
    )


@pytest.mark.parametrize("route", GUARDED, ids=lambda route: route.operation)
async def test_without_a_good_token_nothing_is_told(stranger: AsyncClient, route: Route) -> None:
    for token in (None, "Bearer", "Bearer nonsense", f"Bearer {'x' * 600}", "Basic YTpi", "nonsense"):
        headers = {} if token is None else {"Authorization": token}
        answer = await stranger.request(route.method, address_of(route), headers=headers)
        problem = problem_of(answer, 401, Code.UNAUTHENTICATED)
        assert answer.headers["www-authenticate"].startswith('Bearer realm="leveret"')
        assert "nonsense" not in json.dumps(problem)


@pytest.mark.parametrize("route", GUARDED, ids=lambda route: route.operation)
async def test_each_role_may_do_what_it_may(
    stranger: AsyncClient, conductor: ScriptedConductor, tenant: Tenant, route: Route
) -> None:
    for role in ROLES:
        answer = await stranger.request(
            route.method,
            address_of(route, tenant.project),
            headers=tenant.headers(role),
            json=TINY if route.method != "GET" else None,
        )
        if ROLES.index(role) < ROLES.index(least_role(route)):
            problem_of(answer, 403, Code.FORBIDDEN)
        else:
            assert answer.status_code not in {401, 403}, answer.text


async def test_revoked_and_expired_tokens_are_refused_and_say_so(stranger: AsyncClient, tenant: Tenant) -> None:
    past, future = (datetime.now(UTC) + timedelta(hours=hours) for hours in (-1, 1))
    for token, why in (
        (await tenant.issue("admin", revoked=True), "was revoked"),
        (await tenant.issue("admin", expires_at=past), "has expired"),
        ("nonsense", "is not known"),
    ):
        answer = await stranger.get("/v1/vms", headers={"Authorization": f"Bearer {token}"})
        assert why in problem_of(answer, 401, Code.UNAUTHENTICATED)["detail"]
        assert 'error="invalid_token"' in answer.headers["www-authenticate"]
    good = await tenant.issue("reader", expires_at=future)
    assert (await stranger.get("/v1/vms", headers={"Authorization": f"bearer {good}"})).status_code == 200


async def test_a_token_works_no_longer_than_it_is_remembered_after_it_was_revoked(api_dsn: str, tenant: Tenant) -> None:
    database = Database(api_dsn, connections_max=1)
    await database.open()
    tokens = Tokens(database, keep_s=0.3)
    token = tenant.tokens["member"]
    assert (await tokens.identify(token)).project == tenant.project
    await tenant.connection.execute("UPDATE tokens SET revoked_at = now() WHERE project_id = $1", tenant.project)
    assert (await tokens.identify(token)).role == "member"

    async def is_refused() -> bool:
        try:
            await tokens.identify(token)
        except LeveretError as error:
            return error.problem.code is Code.UNAUTHENTICATED
        return False

    await eventually(is_refused, within_s=2)
    assert KEEP_S <= 5
    await database.close()


async def test_a_vm_of_another_project_is_out_of_reach_for_writes_too(
    client: AsyncClient, conductor: ScriptedConductor, tenant: Tenant
) -> None:
    """The API does not judge writes; but it says whose they are, and shows nothing of another project's VM."""
    other = Tenant(f"{tenant.project}-2", tenant.connection)
    await other.move_in()
    theirs = await other.insert()
    answer = await client.delete(f"/v1/vms/{theirs}")
    assert answer.json()["vm"] is None
    assert conductor.heard[0].header("project") == tenant.project


async def test_the_api_cannot_write_to_the_database(api_dsn: str) -> None:
    connection = await asyncpg.connect(api_dsn)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await connection.execute("UPDATE vms SET name = 'x'")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await connection.fetch("SELECT * FROM vm_user_data")
    await connection.close()


async def test_a_body_that_declares_too_much_is_refused_before_it_is_sent(api: Api, tenant: Tenant) -> None:
    head = _head(tenant, f"Content-Length: {MAX_REQUEST_BYTES + 1}")
    reader, writer = await _connect(api)
    writer.write(head)
    answer = await reader.readuntil(b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in answer.lower()
    assert json.loads(await reader.read())["code"] == Code.BODY_TOO_LARGE
    writer.close()


async def test_a_body_without_a_length_is_refused_as_soon_as_it_is_too_large(api: Api, tenant: Tenant) -> None:
    reader, writer = await _connect(api)
    writer.write(_head(tenant, "Transfer-Encoding: chunked"))
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    for _ in range(MAX_REQUEST_BYTES // 0x10000 + 1):
        writer.write(chunk)
    answer = await reader.readuntil(b"\r\n\r\n")  # the body has no end
    assert answer.startswith(b"HTTP/1.1 413")
    writer.close()


async def test_a_streamed_body_within_the_limit_is_read(client: AsyncClient, conductor: ScriptedConductor) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for piece in json.dumps(TINY).encode().split(b","):
            yield (b"," if piece != json.dumps(TINY).encode().split(b",")[0] else b"") + piece

    answer = await client.post("/v1/vms", content=pieces(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 202


async def test_secrets_never_reach_the_log(client: AsyncClient, conductor: ScriptedConductor, api: Api) -> None:
    secret = "s3cret-in-user-data"
    token = client.headers["authorization"].removeprefix("Bearer ")
    await client.post("/v1/vms", json=TINY | {"user_data": secret})
    await client.post("/v1/vms", json=TINY | {"user_data": {"x": secret}})
    await client.get(f"/v1/vms?name={secret}")
    log = api.log.read_text()
    assert '"route": "/v1/vms"' in log
    assert secret not in log
    assert token not in log
    assert urlsplit(str(client.base_url)).hostname not in ("", None)


async def _connect(api: Api) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", urlsplit(api.url).port)


def _head(tenant: Tenant, framing: str) -> bytes:
    return (
        f"POST /v1/vms HTTP/1.1\r\nHost: x\r\nAuthorization: {tenant.headers()['Authorization']}\r\n"
        f"Content-Type: application/json\r\n{framing}\r\n\r\n"
    ).encode()
