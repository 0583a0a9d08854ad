"""The rim: an answer even for a defect, a bound on what is under way."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from fastapi import FastAPI, Request
from httpx2 import ASGITransport, AsyncClient
from starlette.responses import Response, StreamingResponse
from structlog.testing import capture_logs

from leveret.api.app import build, main
from leveret.api.routes import ROUTES, Route
from leveret.api.settings import ApiSettings

pytestmark = pytest.mark.unit


@pytest.fixture
def app() -> FastAPI:
    nowhere = {"amqp_url": "amqp://u:p@127.0.0.1:1/x", "database_url": "postgresql://u:p@127.0.0.1:1/d"}
    return build(ApiSettings.model_validate(nowhere | {"max_in_flight": 1}))


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(transport=ASGITransport(app=app), base_url="http://test") as client:
        yield client


async def test_a_defect_is_answered_with_a_request_id_and_nothing_else(app: FastAPI, client: AsyncClient) -> None:
    async def crash(_request: Request) -> Response:
        raise ValueError("s3cret")

    app.add_api_route("/v1/crash", crash)
    answer = await client.get("/v1/crash", headers={"X-Request-Id": "r-7"})
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-request-id"] == "r-7"
    assert (answer.json()["code"], answer.json()["request_id"]) == ("internal", "r-7")
    assert "s3cret" not in answer.text


async def test_a_defect_in_the_middle_of_an_answer_cuts_it_off(app: FastAPI, client: AsyncClient) -> None:
    async def half() -> AsyncIterator[bytes]:
        yield b"half"
        raise ValueError("the other half")

    async def stream(_request: Request) -> Response:
        return StreamingResponse(half())

    app.add_api_route("/v1/half", stream)
    with pytest.raises(ValueError, match="other half"):
        await client.get("/v1/half")


async def test_too_many_requests_at_once_are_turned_away_but_probes_are_answered(
    app: FastAPI, client: AsyncClient
) -> None:
    arrived, leave = asyncio.Event(), asyncio.Event()

    async def linger(_request: Request) -> Response:
        arrived.set()
        await leave.wait()
        return Response()

    app.add_api_route("/v1/linger", linger)
    lingering = asyncio.create_task(client.get("/v1/linger"))
    await arrived.wait()
    refused = await client.get("/v1/linger")
    assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
    assert refused.headers["retry-after"]
    assert (await client.get("/livez")).status_code == 200
    leave.set()
    assert (await lingering).status_code == 200
    assert (await client.get("/v1/linger")).status_code == 200


async def test_a_route_is_measured_by_its_template_and_never_by_its_ids(client: AsyncClient) -> None:
    await client.get("/v1/vms/0198c5a2-6d4f-7c31-9d0e-3f6f0b8f2a10")
    await client.get("/no/such/address")
    text = (await client.get("/metrics")).text
    assert 'route="/v1/vms/{vm_id}",status="401"' in text
    assert 'route="(none)",status="404"' in text
    assert "0198c5a2" not in text


SYSTEM = [route for route in ROUTES if not route.needs_token]


@pytest.mark.parametrize("route", SYSTEM, ids=lambda route: route.operation)
async def test_what_needs_no_token_is_strict_and_guessed_by_nobody(route: Route, client: AsyncClient) -> None:
    answer = await client.get(route.path)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "cache-control" not in answer.headers
    head = await client.head(route.path)
    assert (head.status_code, head.headers["content-type"]) == (answer.status_code, answer.headers["content-type"])
    refused = await client.get(route.path, params={"verbos": 1})
    assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "verbos")


@pytest.mark.parametrize("path", ["/docs", "/docs/errors"])
async def test_no_other_page_may_frame_ours(path: str, client: AsyncClient) -> None:
    policy = (await client.get(path)).headers["content-security-policy"]
    assert {"default-src 'none'", "frame-ancestors 'none'", "base-uri 'none'"} <= set(policy.split("; "))


@pytest.mark.parametrize(
    ("headers", "kept"), [({}, "no-store"), ({"ETag": '"1"'}, "private, no-cache"), ({"Cache-Control": "x"}, "x")]
)
async def test_what_a_token_was_told_is_kept_by_nobody_on_the_way(
    headers: dict[str, str], kept: str, app: FastAPI, client: AsyncClient
) -> None:
    async def tell(_request: Request) -> Response:
        return Response(headers=headers)

    app.add_api_route("/v1/tell", tell)
    answer = await client.get("/v1/tell", headers={"Authorization": "Bearer x"})
    assert answer.headers["cache-control"] == kept
    missing = await client.get("/v1/no-such", headers={"Authorization": "Bearer x"})
    assert (missing.status_code, missing.headers["cache-control"]) == (404, "no-store")


async def test_the_log_line_of_a_request_says_which_trace_it_belongs_to(client: AsyncClient) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    with capture_logs() as lines:
        await client.get("/v1/whoami", headers={"traceparent": f"00-{trace}-00f067aa0ba902b7-01"})
        await client.get("/v1/whoami", headers={"traceparent": f"00-{'0' * 32}-00f067aa0ba902b7-01"})
    traced, untraced = (line for line in lines if line["event"] == "request.done")
    assert traced["trace_id"] == trace
    assert "trace_id" not in untraced


async def test_two_tokens_are_none(client: AsyncClient) -> None:
    answer = await client.get("/v1/whoami", headers=[("Authorization", "Bearer a"), ("Authorization", "Bearer b")])
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
    assert "more than one" in answer.json()["detail"]


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_the_command_says_what_it_is(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([option])
    assert caught.value.code == 0
    assert "leveret-api" in capsys.readouterr().out


def test_a_missing_setting_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("LEVERET_AMQP_URL", raising=False)
    monkeypatch.setenv("LEVERET_DATABASE_URL", "postgresql://u:s3cret@h/d")
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "LEVERET_AMQP_URL" in said
    assert "s3cret" not in said
