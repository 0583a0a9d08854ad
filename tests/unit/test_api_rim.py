"""The rim: an answer even for a defect, a bound on what is under way."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from fastapi import FastAPI, Request
from httpx2 import ASGITransport, AsyncClient
from starlette.responses import Response, StreamingResponse

from leveret.api.app import build, main
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
