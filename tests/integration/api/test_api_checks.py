"""A check over REST: only administrators order one, and what the conductor says is what they get."""

from datetime import UTC, datetime
from typing import Any

import pytest
from api_world import ScriptedConductor, Tenant, problem_of
from httpx2 import AsyncClient

from leveret.client import Leveret
from leveret.shared.bus import Delivery
from leveret.shared.checks import CheckReport, RuleView, RunCheck, UncheckedView
from leveret.shared.errors import Code

pytestmark = pytest.mark.integration

RULE = RuleView(name="vm_runs_once", says="Once.", broken=1, examples=({"vm_id": "x", "token": 3},), repair="Stop it.")
REPORT = CheckReport(
    at=datetime(2026, 11, 22, tzinfo=UTC),
    seconds=0.5,
    broken=1,
    hosts_asked=2,
    rules=(RULE, RuleView(name="no_dead_letters", says="None.", broken=None, repair="Look.")),
    unchecked=(UncheckedView(what="broker", why="It is away."),),
)


@pytest.fixture
def asked(conductor: ScriptedConductor) -> list[RunCheck]:
    """What a conductor that always says the same was asked for."""
    asked: list[RunCheck] = []

    async def report(delivery: Delivery) -> Any:
        assert delivery.type == "check.run.v1"
        body = delivery.decoded()
        assert isinstance(body, RunCheck)
        asked.append(body)
        return REPORT

    conductor.script = report
    return asked


@pytest.mark.parametrize(("body", "hosts"), [(None, True), ({}, True), ({"hosts": False}, False)])
async def test_an_administrator_gets_the_report_of_the_conductor(
    stranger: AsyncClient, tenant: Tenant, asked: list[RunCheck], body: dict[str, Any] | None, hosts: bool
) -> None:
    answer = await stranger.post("/v1/checks", headers=tenant.headers("admin"), json=body)
    assert answer.status_code == 200, answer.text
    assert CheckReport.model_validate(answer.json()) == REPORT
    assert answer.headers["cache-control"] == "no-store"
    assert asked == [RunCheck(hosts=hosts)]


@pytest.mark.parametrize("role", ["member", "reader"])
async def test_nobody_else_does(stranger: AsyncClient, tenant: Tenant, asked: list[RunCheck], role: str) -> None:
    problem_of(await stranger.post("/v1/checks", headers=tenant.headers(role), json={}), 403, Code.FORBIDDEN)
    assert asked == []


async def test_the_client_reads_the_report(api: Any, tenant: Tenant, asked: list[RunCheck]) -> None:
    async with Leveret(api.url, tenant.tokens["admin"]) as client:
        assert await client.check(hosts=False) == REPORT


async def test_a_conductor_that_does_not_know_how_says_so(
    stranger: AsyncClient, tenant: Tenant, conductor: ScriptedConductor
) -> None:
    conductor.refuse(Code.UNKNOWN_TYPE)
    answer = await stranger.post("/v1/checks", headers=tenant.headers("admin"), json={})
    assert answer.json()["code"] == Code.UNKNOWN_TYPE


async def test_without_an_answer_to_be_read_it_is_to_be_asked_again(
    stranger: AsyncClient, tenant: Tenant, conductor: ScriptedConductor
) -> None:
    answer = await stranger.post("/v1/checks", headers=tenant.headers("admin"), json={})  # it says: accepted
    problem_of(answer, 503, Code.UNAVAILABLE)
    assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize("body", [{"hosts": "maybe"}, {"rules": []}, []])
async def test_what_cannot_be_meant_is_refused(
    stranger: AsyncClient, tenant: Tenant, asked: list[RunCheck], body: Any
) -> None:
    answer = await stranger.post("/v1/checks", headers=tenant.headers("admin"), json=body)
    assert answer.json()["code"] == Code.INVALID_REQUEST
    assert asked == []
