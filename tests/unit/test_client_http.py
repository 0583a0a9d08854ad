"""The client's own judgement: what it sends again, what it gives up on, what it makes of answers."""

import json
import uuid
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from leveret.client.errors import Ambiguous, ApiError, NotFound, Unreachable, VmFailed, WaitTimedOut
from leveret.client.http import Http
from leveret.client.leveret import Leveret, reached
from leveret.shared.documents import CreateVm, ImageByName, VmView

pytestmark = pytest.mark.unit

VM_ID = uuid.UUID("0192f0c1-0000-7000-8000-000000000001")
Answer = httpx2.Response | Exception


class Peer:
    """Answers with what it was given, one after the other, and remembers what it was asked."""

    def __init__(self, *answers: Answer | Callable[[httpx2.Request], Answer]) -> None:
        self.answers = list(answers)
        self.requests: list[httpx2.Request] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if callable(answer):
            answer = answer(request)
        if isinstance(answer, Exception):
            raise answer
        return answer


def problem(status: int, code: str, **more: Any) -> httpx2.Response:
    headers = more.pop("headers", None)
    document = {"status": status, "code": code, "detail": f"It is {code}.", "hint": "Do this.", "request_id": "r1"}
    return httpx2.Response(status, json=document | more, headers=headers)


def vm(**more: Any) -> dict[str, Any]:
    shape: dict[str, Any] = {
        "id": str(VM_ID),
        "project": "default",
        "name": "web",
        "state": "running",
        "step": None,
        "desired": "running",
        "generation": 1,
        "observed_generation": 1,
        "vcpus": 1,
        "memory_mib": 1024,
        "disk_gib": 10,
        "image": "appliance",
        "network": "default",
        "address": "10.80.0.2",
        "mac": "0a:00:00:00:00:01",
        "ssh": None,
        "host": "host-1",
        "zone": "default",
        "labels": {},
        "guest_ready": False,
        "problem": None,
        "attempts": 1,
        "created_at": "2026-11-22T08:00:00Z",
        "updated_at": "2026-11-22T08:00:01Z",
    }
    return shape | more


def receipt(**more: Any) -> httpx2.Response:
    return httpx2.Response(202, json={"request_id": "r1", "vm_id": str(VM_ID), "verdict": "accepted", "vm": vm(**more)})


def page(*items: Any, following: Any = None) -> httpx2.Response:
    return httpx2.Response(200, json={"items": list(items), "next": following})


def event(seq: int, kind: str, **data: Any) -> dict[str, Any]:
    return {
        "seq": seq,
        "vm_id": str(VM_ID),
        "vm_name": "web",
        "type": kind,
        "state": "building",
        "at": "2026-11-22T08:00:00Z",
        "data": data,
    }


class Sleeps:
    """Time that passes at once."""

    def __init__(self) -> None:
        self.taken: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.taken.append(seconds)


def http(peer: Peer, sleeps: Sleeps, *, retry_for_s: float = 30.0) -> Http:
    return Http(
        "http://leveret.test", "secret", retry_for_s=retry_for_s, transport=httpx2.MockTransport(peer), sleep=sleeps
    )


def leveret(peer: Peer) -> Leveret:
    return Leveret("http://leveret.test", "secret", transport=httpx2.MockTransport(peer))


async def test_a_request_that_found_nobody_is_sent_again() -> None:
    peer, sleeps = Peer(httpx2.ConnectError("refused"), httpx2.ConnectError("refused"), page()), Sleeps()
    await http(peer, sleeps).send("GET", "/v1/vms")
    assert len(peer.requests) == 3
    assert len(sleeps.taken) == 2
    assert sleeps.taken[1] > sleeps.taken[0] / 2  # the pauses grow, within their jitter


async def test_every_attempt_to_create_carries_the_same_id() -> None:
    peer = Peer(httpx2.ReadTimeout("no answer"), httpx2.ConnectError("refused"), receipt())
    async with leveret(peer) as client:
        await client.create(CreateVm(image=ImageByName(name="appliance")))
    paths = {request.url.path for request in peer.requests}
    assert len(peer.requests) == 3
    assert len(paths) == 1
    assert all(request.method == "PUT" for request in peer.requests)


async def test_retry_after_is_honoured() -> None:
    peer, sleeps = Peer(problem(503, "unavailable", headers={"Retry-After": "2"}), page()), Sleeps()
    await http(peer, sleeps).send("GET", "/v1/vms")
    assert sleeps.taken == [2.0]


async def test_a_retry_after_beyond_the_deadline_gives_up_at_once() -> None:
    peer, sleeps = Peer(problem(503, "unavailable", headers={"Retry-After": "60"})), Sleeps()
    with pytest.raises(ApiError) as caught:
        await http(peer, sleeps, retry_for_s=5.0).send("GET", "/v1/vms")
    assert caught.value.retry_after_s == 60
    assert sleeps.taken == []


async def test_a_refusal_is_not_asked_again_and_tells_all_it_was_told() -> None:
    details = {"constraints": {"memory": 3}}
    peer, sleeps = Peer(problem(409, "no_capacity", details=details, errors=[{"field": "a", "message": "b"}])), Sleeps()
    with pytest.raises(ApiError) as caught:
        await http(peer, sleeps).send("PUT", "/v1/vms/x", body="{}")
    error = caught.value
    assert (error.status, error.code, error.hint, error.request_id) == (409, "no_capacity", "Do this.", "r1")
    assert error.details == details
    assert error.errors == [{"field": "a", "message": "b"}]
    assert len(peer.requests) == 1


async def test_an_answer_that_is_no_problem_document_is_told_by_its_status() -> None:
    peer = Peer(httpx2.Response(502, text="<html>Bad Gateway</html>"))
    with pytest.raises(ApiError) as caught:
        await http(peer, Sleeps(), retry_for_s=0.0).send("GET", "/v1/vms")
    assert caught.value.code == "http_502"


async def test_nobody_there_is_unreachable_and_says_where() -> None:
    with pytest.raises(Unreachable) as caught:
        await http(Peer(httpx2.ConnectError("refused")), Sleeps(), retry_for_s=0.0).send("GET", "/v1/vms")
    assert caught.value.url == "http://leveret.test"
    assert "secret" not in str(caught.value)


async def test_a_redirect_never_gets_the_token() -> None:
    peer = Peer(httpx2.Response(307, headers={"Location": "http://elsewhere.test/"}))
    with pytest.raises(ApiError):
        await http(peer, Sleeps()).send("GET", "/v1/vms")
    assert {request.url.host for request in peer.requests} == {"leveret.test"}


async def test_a_list_is_read_to_its_last_page() -> None:
    peer = Peer(page(vm(name="one"), following="c1"), page(vm(name="two")))
    async with leveret(peer) as client:
        names = [found.name async for found in client.list(labels={"role": "web"})]
    assert names == ["one", "two"]
    assert [request.url.params.get("cursor") for request in peer.requests] == [None, "c1"]
    assert {request.url.params["label"] for request in peer.requests} == {"role=web"}


async def test_a_name_is_found_in_the_list() -> None:
    async with leveret(Peer(page(vm()))) as client:
        assert (await client.find("web")).id == VM_ID


async def test_a_name_of_nobody_is_not_found() -> None:
    async with leveret(Peer(page())) as client:
        with pytest.raises(NotFound, match="'nobody'"):
            await client.find("nobody")


async def test_a_name_of_two_is_ambiguous() -> None:
    async with leveret(Peer(page(vm(), vm(id=str(uuid.UUID(int=2)))))) as client:
        with pytest.raises(Ambiguous) as caught:
            await client.find("web")
    assert len(caught.value.ids) == 2


async def test_an_id_is_asked_for_directly() -> None:
    peer = Peer(httpx2.Response(200, json=vm()))
    async with leveret(peer) as client:
        assert (await client.find(str(VM_ID))).name == "web"
    assert peer.requests[0].url.path == f"/v1/vms/{VM_ID}"


async def test_a_name_that_looks_like_an_id_is_still_a_name() -> None:
    name = "abcdef01-0000-7000-8000-000000000001"
    async with leveret(Peer(problem(404, "vm_not_found"), page(vm(name=name)))) as client:
        assert (await client.find(name)).name == name


async def test_events_go_on_where_they_were_after_a_lost_connection() -> None:
    peer = Peer(
        page(event(1, "accepted"), following=1),
        httpx2.ReadError("reset"),
        page(event(2, "scheduled"), event(3, "running"), following=3),
        page(following=3),
    )
    async with leveret(peer) as client:
        seen = [one.seq async for one in client.events(vm_id=VM_ID)]
    assert seen == [1, 2, 3]
    assert [request.url.params["after"] for request in peer.requests] == ["0", "1", "1", "3"]


async def test_a_wait_ends_with_the_event_that_reaches_it() -> None:
    peer = Peer(
        page(event(1, "accepted"), following=1),
        httpx2.Response(200, json=vm(state="building", observed_generation=0)),
        page(event(2, "running"), following=2),
        httpx2.Response(200, json=vm()),
    )
    told: list[str] = []
    async with leveret(peer) as client:
        found = await client.wait(VM_ID, "running", timeout_s=5, on_event=lambda one: told.append(one.type))
    assert found.state == "running"
    assert told == ["accepted", "running"]
    assert peer.answers == [peer.answers[-1]]


async def test_who_watches_a_wait_hears_its_last_event_too() -> None:
    peer = Peer(
        page(event(1, "accepted"), following=1),
        httpx2.Response(200, json=vm()),  # the row is there before the event that tells of it
        page(event(2, "running"), following=2),
    )
    told: list[str] = []
    async with leveret(peer) as client:
        await client.wait(VM_ID, "running", timeout_s=5, on_event=lambda one: told.append(one.type))
    assert told == ["accepted", "running"]


async def test_a_wait_for_a_queued_vm_outlasts_its_absence() -> None:
    peer = Peer(
        problem(404, "vm_not_found"),
        problem(404, "vm_not_found"),
        page(event(1, "running"), following=1),
        httpx2.Response(200, json=vm()),
    )
    async with leveret(peer) as client:
        assert (await client.wait(VM_ID, "running", timeout_s=5)).name == "web"


async def test_a_wait_ends_with_the_refusal_of_a_queued_create() -> None:
    async with leveret(Peer(problem(409, "name_taken"))) as client:
        with pytest.raises(ApiError, match="name_taken"):
            await client.wait(VM_ID, "running", timeout_s=5)


async def test_a_wait_that_takes_too_long_says_where_the_vm_stands() -> None:
    building = httpx2.Response(200, json=vm(state="building", observed_generation=0))

    def answer(request: httpx2.Request) -> Answer:
        return page(following=0) if request.url.path.endswith("/events") else building

    async with leveret(Peer(answer)) as client:
        with pytest.raises(WaitTimedOut, match="still building"):
            await client.wait(VM_ID, "running", timeout_s=0.4)


def view(**more: Any) -> VmView:
    return VmView.model_validate_json(json.dumps(vm(**more)))


PROBLEM = {"code": "build_failed", "message": "All hosts failed."}


@pytest.mark.parametrize(
    ("shape", "target", "expected"),
    [
        ({}, "running", True),
        ({"generation": 2}, "running", False),  # an older wish has come true
        ({}, "ready", False),
        ({"guest_ready": True}, "ready", True),
        ({"state": "pending", "observed_generation": 0}, "running", False),
        ({"state": "stopped", "desired": "running", "generation": 2}, "running", False),  # a start is under way
        ({"state": "stopped", "desired": "stopped"}, "stopped", True),
        ({"desired": "stopped", "generation": 2}, "stopped", False),
        ({"state": "deleted", "desired": "deleted"}, "deleted", True),
        ({"state": "deleting", "desired": "deleted", "generation": 2}, "deleted", False),
    ],
)
def test_what_counts_as_reached(shape: dict[str, Any], target: Any, expected: bool) -> None:
    assert reached(view(**shape), target) is expected


@pytest.mark.parametrize(
    ("shape", "target"),
    [
        ({"state": "error", "problem": PROBLEM}, "running"),
        ({"state": "error", "problem": PROBLEM}, "stopped"),
        ({"state": "stopped", "desired": "running"}, "ready"),  # it went off by itself
        ({"desired": "stopped", "generation": 2}, "running"),  # somebody stops it
        ({"state": "deleting", "desired": "deleted"}, "running"),
        ({}, "deleted"),
    ],
)
def test_what_will_not_come_by_itself(shape: dict[str, Any], target: Any) -> None:
    with pytest.raises(VmFailed):
        reached(view(**shape), target)


async def test_the_outcome_of_a_wait_in_the_api_is_in_the_receipt() -> None:
    answer = receipt()
    answer.headers["Leveret-Wait"] = "timed_out"
    peer = Peer(answer)
    async with leveret(peer) as client:
        told = await client.create(CreateVm(image=ImageByName(name="appliance")), wait="ready", timeout_s=9)
    assert told.wait == "timed_out"
    assert dict(peer.requests[0].url.params) == {"wait": "ready", "timeout_s": "9"}


async def test_a_reboot_whose_fate_is_unknown_is_not_sent_again() -> None:
    peer = Peer(httpx2.ReadTimeout("no answer"), receipt())
    async with leveret(peer) as client:
        with pytest.raises(Unreachable):
            await client.reboot(VM_ID)
    assert len(peer.requests) == 1
