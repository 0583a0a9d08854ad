"""Hosts over REST: what administrators order of them, what becomes of it, and who is told that a host is silent.

What the conductor would do with each order is done by the conductor's own function, in the API's database.
"""

import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from api_world import ScriptedConductor, Tenant, problem_of
from httpx2 import AsyncClient

from leveret.shared.documents import HostView, VmView
from leveret.shared.errors import Code
from leveret.shared.ids import new_id

pytestmark = pytest.mark.integration

ACTIONS = ("cordon", "uncordon", "fence", "retire")
PROOF = "power cut at the PDU, outlet 7"
LONG_AGO = timedelta(minutes=5)


async def silent_host(tenant: Tenant, **more: Any) -> UUID:
    """A host that has not been heard of for a while, and that the sweeper has noticed."""
    silent = {"state": "silent", "state_reason": "no heartbeat", "heartbeat_at": datetime.now(UTC) - LONG_AGO}
    return await tenant.host(f"h-{new_id()}", **(silent | more))


def viewed(answer: Any) -> HostView:
    assert answer.status_code == 200, answer.text
    return HostView.model_validate_json(answer.content)


async def act(client: AsyncClient, host: object, verb: str, **body: Any) -> Any:
    return await client.post(f"/v1/hosts/{host}/actions/{verb}", json=body)


async def told(tenant: Tenant) -> list[tuple[str, dict[str, Any]]]:
    """What the project's log says, beside who asked."""
    rows = await tenant.connection.fetch(
        "SELECT type, data FROM events WHERE project_id = $1 ORDER BY id", tenant.project
    )
    data = [(row["type"], json.loads(row["data"])) for row in rows]
    assert all(re.fullmatch(f"token admin-.* of {tenant.project}", one.pop("by")) for _, one in data)
    assert all(one.pop("request_id") for _, one in data)
    return data


async def test_a_host_is_cordoned_and_let_work_again(
    admin: AsyncClient, clerk: ScriptedConductor, tenant: Tenant
) -> None:
    name = f"h-{new_id()}"
    host = await tenant.host(name)
    cordoned = viewed(await act(admin, name, "cordon", reason="new memory"))
    assert (cordoned.id, cordoned.state, cordoned.state_reason, cordoned.clean) == (
        host,
        "cordoned",
        "new memory",
        None,
    )
    assert viewed(await admin.get(f"/v1/hosts/{host}")) == cordoned
    assert viewed(await act(admin, str(host).upper(), "uncordon")).state == "up"
    (first, _) = clerk.heard
    assert (first.type, first.user_id, first.header("project")) == ("host.cordon.v1", "leveret-api", tenant.project)
    whose = {"host": name, "host_id": str(host)}
    assert await told(tenant) == [("host.cordoned", {**whose, "reason": "new memory"}), ("host.uncordoned", whose)]


async def test_an_order_needs_no_body_unless_it_has_to_say_something(
    admin: AsyncClient, clerk: ScriptedConductor, tenant: Tenant
) -> None:
    host = await silent_host(tenant)
    path = f"/v1/hosts/{host}/actions"
    assert viewed(await admin.post(f"{path}/cordon")).state_reason == "cordoned by an administrator"
    clerk.heard.clear()
    problem_of(await admin.post(f"{path}/fence"), 415, Code.UNSUPPORTED_CONTENT_TYPE)
    for proof in ({}, {"proof": ""}, {"proof": "ok"}, {"proof": "a\nb\nc\nd"}, {"proof": "x" * 513}, {"proof": None}):
        problem = problem_of(await admin.post(f"{path}/fence", json=proof), 422, Code.INVALID_REQUEST)
        assert [error["field"] for error in problem["errors"]] == ["proof"]
    assert not clerk.heard


async def test_a_fenced_host_works_again_only_when_it_is_clean(
    admin: AsyncClient, clerk: ScriptedConductor, tenant: Tenant
) -> None:
    host = await silent_host(tenant, epoch=7)
    fenced = viewed(await act(admin, host, "fence", proof=PROOF))
    assert (fenced.state, fenced.state_reason, fenced.clean) == ("fenced", PROOF, False)
    assert viewed(await act(admin, host, "fence", proof="once more")).state_reason == PROOF
    problem = problem_of(await act(admin, host, "uncordon"), 409, Code.HOST_CONFLICT)
    assert "Start it and its worker" in problem["hint"]
    await tenant.connection.execute("UPDATE hosts SET clean_epoch = 6 WHERE id = $1", host)
    problem_of(await act(admin, host, "uncordon"), 409, Code.HOST_CONFLICT)
    await tenant.connection.execute("UPDATE hosts SET clean_epoch = 7 WHERE id = $1", host)
    assert viewed(await admin.get(f"/v1/hosts/{host}")).clean is True
    await tenant.connection.execute("UPDATE hosts SET heartbeat_at = now() WHERE id = $1", host)
    back = viewed(await act(admin, host, "uncordon"))
    assert (back.state, back.state_reason, back.clean) == ("up", None, None)
    assert [(kind, data.get("proof")) for kind, data in await told(tenant)] == [
        ("host.fenced", PROOF),
        ("host.uncordoned", None),
    ]


async def test_who_was_heard_of_just_now_is_not_off(
    admin: AsyncClient, clerk: ScriptedConductor, tenant: Tenant
) -> None:
    host = await tenant.host(f"h-{new_id()}")
    problem_of(await act(admin, host, "fence", proof=PROOF), 409, Code.HOST_CONFLICT)
    assert viewed(await admin.get(f"/v1/hosts/{host}")).state == "up"


async def test_a_host_is_retired_when_it_has_no_vms_or_is_fenced(
    admin: AsyncClient, clerk: ScriptedConductor, tenant: Tenant
) -> None:
    host = await silent_host(tenant)
    await tenant.insert(host_id=host, token=1)
    problem = problem_of(await act(admin, host, "retire"), 409, Code.HOST_CONFLICT)
    assert "fence" in problem["hint"]
    await act(admin, host, "fence", proof=PROOF)
    assert viewed(await act(admin, host, "retire")).state == "retired"
    assert viewed(await act(admin, host, "retire")).state == "retired"
    problem_of(await act(admin, host, "uncordon"), 409, Code.HOST_CONFLICT)
    empty = await tenant.host(f"h-{new_id()}")
    assert viewed(await act(admin, empty, "retire")).state == "retired"


async def test_an_order_that_comes_again_is_not_carried_out_again(
    admin: AsyncClient, clerk: ScriptedConductor, tenant: Tenant
) -> None:
    host = await tenant.host(f"h-{new_id()}")
    for name, verb, state in (("a", "cordon", "cordoned"), ("b", "uncordon", "up"), ("a", "cordon", "up")):
        answer = await admin.post(f"/v1/hosts/{host}/actions/{verb}", headers={"X-Request-Id": f"{name}-{host}"})
        assert viewed(answer).state == state


async def test_a_name_that_several_hosts_have_means_none_of_them(
    admin: AsyncClient, clerk: ScriptedConductor, tenant: Tenant
) -> None:
    name = f"h-{new_id()}"
    retired, older = await tenant.host(name, state="retired"), await tenant.host(name)
    assert viewed(await admin.get(f"/v1/hosts/{name}")).id == older
    newer = await tenant.host(name, heartbeat_at=datetime.now(UTC) + timedelta(seconds=1))
    for answer in (await admin.get(f"/v1/hosts/{name}"), await act(admin, name, "fence", proof=PROOF)):
        problem = problem_of(answer, 409, Code.HOST_CONFLICT)
        assert problem["details"]["ids"] == [str(newer), str(older)]
        assert str(newer) in problem["hint"]
    assert not clerk.heard
    assert viewed(await act(admin, older, "cordon")).state == "cordoned"
    assert viewed(await admin.get(f"/v1/hosts/{newer}")).state == "up"
    assert viewed(await admin.get(f"/v1/hosts/{retired}")).state == "retired"


@pytest.mark.parametrize("verb", ACTIONS)
async def test_what_is_not_there_cannot_be_ordered_about(
    admin: AsyncClient, conductor: ScriptedConductor, verb: str
) -> None:
    body = {"proof": PROOF} if verb == "fence" else {}
    for host in ("nobody", str(new_id()), "a%00b"):
        problem_of(await act(admin, host, verb, **body), 404, Code.HOST_NOT_FOUND)
    assert not conductor.heard


@pytest.mark.parametrize("role", ["member", "reader"])
async def test_only_administrators_learn_of_hosts_and_order_them_about(
    stranger: AsyncClient, conductor: ScriptedConductor, tenant: Tenant, role: str
) -> None:
    stranger.headers.update(tenant.headers(role))
    for host in (await silent_host(tenant), "nobody"):
        for verb in ACTIONS:
            problem_of(await act(stranger, host, verb), 403, Code.FORBIDDEN)
    assert not conductor.heard


async def test_a_host_says_how_many_vms_would_be_made_anew(
    admin: AsyncClient, clerk: ScriptedConductor, tenant: Tenant
) -> None:
    other = Tenant(f"{tenant.project}-2", tenant.connection)
    await other.move_in()
    host = await silent_host(tenant)
    restart: dict[str, Any] = {"spec": {"on_host_failure": "restart"}}
    for whose, state, more in (
        (tenant, "running", restart),
        (other, "stopped", restart),
        (other, "building", {}),
        (tenant, "running", {}),
        (tenant, "deleting", restart),
    ):
        await whose.insert(state=state, host_id=host, token=1, **more)
    found = viewed(await admin.get(f"/v1/hosts/{host}"))
    assert (found.vms, found.vms_to_restart) == (5, 3)


async def test_who_owns_a_vm_is_told_that_its_host_is_silent(client: AsyncClient, tenant: Tenant) -> None:
    host = await silent_host(tenant)
    vm_id = await tenant.insert(host_id=host, token=1, spec={"on_host_failure": "restart"})
    heard_at = await tenant.connection.fetchval("SELECT heartbeat_at FROM hosts WHERE id = $1", host)
    answer = await client.get(f"/v1/vms/{vm_id}")
    vm = VmView.model_validate_json(answer.content)
    assert (vm.state, vm.host_silent_since, vm.on_host_failure) == ("running", heard_at, "restart")
    (listed,) = (await client.get("/v1/vms")).json()["items"]
    assert listed == answer.json()
    for state, ago, is_silent in (
        ("up", LONG_AGO, False),  # the conductors decide: when they were away themselves, everything is long ago
        ("cordoned", timedelta(), False),
        ("cordoned", LONG_AGO, True),
        ("fenced", LONG_AGO, True),
    ):
        await tenant.connection.execute(
            "UPDATE hosts SET state = $2, heartbeat_at = now() - $3::interval WHERE id = $1", host, state, ago
        )
        since = (await client.get(f"/v1/vms/{vm_id}")).json()["host_silent_since"]
        assert (since is not None) is is_silent, state


async def test_a_vm_on_a_silent_host_is_another_document_and_the_same_vm(
    client: AsyncClient, conductor: ScriptedConductor, tenant: Tenant
) -> None:
    host = await tenant.host(f"h-{new_id()}")
    vm_id = await tenant.insert(host_id=host, token=1)
    path = f"/v1/vms/{vm_id}"
    heard = (await client.get(path)).headers["etag"]
    await tenant.connection.execute("UPDATE hosts SET state = 'silent' WHERE id = $1", host)
    silent = await client.get(path, headers={"If-None-Match": heard})
    assert silent.status_code == 200
    etag = silent.headers["etag"]
    assert (await client.get(path, headers={"If-None-Match": etag})).status_code == 304
    for given in (heard, etag):
        assert (await client.post(f"{path}/actions/reboot", headers={"If-Match": given})).status_code == 202
        assert f'"{conductor.heard[-1].header("if_match")}"' == heard
