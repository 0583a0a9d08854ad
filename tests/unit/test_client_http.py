"""The client's own judgement: what it sends again, what it gives up on, what it makes of answers."""

import asyncio
import json
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx2
import pytest
from peers import eventually

from leveret.api import examples
from leveret.api.problems import STATUS
from leveret.client.errors import (
    Ambiguous,
    ApiError,
    ConfigError,
    Conflict,
    Denied,
    EventGap,
    Invalid,
    Missing,
    NotFound,
    Unavailable,
    Unreachable,
    VmFailed,
    WaitTimedOut,
    refusal,
)
from leveret.client.http import Http
from leveret.client.leveret import Leveret
from leveret.client.receipt import tag_of
from leveret.shared.documents import CreateToken, CreateVm, ImageByName, UpdateVm, VmView
from leveret.shared.ids import ids_of

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


async def test_the_outcome_of_a_wait_in_the_api_is_in_the_receipt() -> None:
    answer = receipt()
    answer.headers["Leveret-Wait"] = "timed_out"
    peer = Peer(answer)
    async with leveret(peer) as client:
        told = await client.create(CreateVm(image=ImageByName(name="appliance")), wait="ready", timeout_s=9)
    assert told.wait == "timed_out"
    assert dict(peer.requests[0].url.params) == {"wait": "ready", "timeout_s": "9"}


Verb = Callable[[Leveret], Awaitable[object]]
PLAIN_VERBS: list[Verb] = [
    lambda client: client.create(CreateVm(image=ImageByName(name="appliance"))),
    lambda client: client.update(VM_ID, UpdateVm(labels={"role": "db", "old": None})),
    lambda client: client.delete(VM_ID),
    lambda client: client.start(VM_ID),
    lambda client: client.stop(VM_ID),
    lambda client: client.reboot(VM_ID),
    lambda client: client.retry(VM_ID),
]


@pytest.mark.parametrize("verb", PLAIN_VERBS)
async def test_a_write_whose_fate_is_unknown_is_sent_again_as_the_same_request(verb: Verb) -> None:
    peer = Peer(httpx2.ReadTimeout("no answer"), problem(503, "unavailable"), receipt())
    async with leveret(peer) as client:
        await verb(client)
    assert len(peer.requests) == 3
    assert len({(request.method, request.url, request.content) for request in peer.requests}) == 1
    (request_id,) = {request.headers["x-request-id"] for request in peer.requests}
    assert re.fullmatch(r"[A-Za-z0-9._:-]{1,64}", request_id)


async def test_two_writes_are_two_requests() -> None:
    peer = Peer(receipt())
    async with leveret(peer) as client:
        await client.reboot(VM_ID)
        await client.reboot(VM_ID)
    assert len({request.headers["x-request-id"] for request in peer.requests}) == 2


async def test_a_write_may_go_on_under_a_request_id_of_ones_own() -> None:
    peer = Peer(receipt())
    async with leveret(peer) as client:
        await client.reboot(VM_ID, request_id="from-before")
    assert peer.requests[0].headers["x-request-id"] == "from-before"


@pytest.mark.parametrize(
    ("if_match", "header"),
    [
        (VmView.model_validate_json(json.dumps(vm(generation=3))), '"3.1795334401000000"'),
        ('"3.1795334401000000"', '"3.1795334401000000"'),
        ("3.1795334401000000", '"3.1795334401000000"'),
        (3, '"3"'),
        ("*", "*"),
    ],
)
@pytest.mark.parametrize("verb", ["delete", "start", "stop", "reboot", "retry"])
async def test_a_write_may_be_meant_for_one_state_of_things_only(verb: str, if_match: Any, header: str) -> None:
    peer = Peer(problem(412, "precondition_failed"))
    async with leveret(peer) as client:
        with pytest.raises(Conflict) as caught:
            await getattr(client, verb)(VM_ID, if_match=if_match)
    assert caught.value.code == "precondition_failed"
    assert peer.requests[0].headers["if-match"] == header


async def test_an_update_says_only_what_changes() -> None:
    peer = Peer(receipt())
    async with leveret(peer) as client:
        await client.update(VM_ID, UpdateVm(labels={"role": "db", "old": None}), if_match=2)
    asked = peer.requests[0]
    assert (asked.method, asked.url.path) == ("PATCH", f"/v1/vms/{VM_ID}")
    assert json.loads(asked.content) == {"labels": {"role": "db", "old": None}}


async def test_a_dry_run_waits_for_nothing() -> None:
    told = {"request_id": "r1", "vm_id": str(VM_ID), "verdict": "would_be_accepted", "vm": None}
    peer = Peer(httpx2.Response(200, json=told))
    async with leveret(peer) as client:
        answer = await client.create(CreateVm(image=ImageByName(name="appliance")), dry_run=True, wait="ready")
    assert answer.verdict == "would_be_accepted"
    assert dict(peer.requests[0].url.params) == {"dry_run": "true"}


async def test_a_receipt_tells_of_its_vm() -> None:
    async with leveret(Peer(receipt(generation=4))) as client:
        told = await client.start(VM_ID)
    assert (told.generation, told.state, told.name, str(told.address)) == (4, "running", "web", "10.80.0.2")


async def test_a_token_whose_fate_is_unknown_is_not_made_again() -> None:
    peer = Peer(httpx2.ReadTimeout("no answer"), page())
    async with leveret(peer) as client:
        with pytest.raises(Unreachable):
            await client.create_token("default", CreateToken(name="ci"))
    assert len(peer.requests) == 1


async def test_what_a_lost_answer_removed_is_removed() -> None:
    gone = problem(404, "amqp_user_not_found")
    async with leveret(Peer(httpx2.ReadTimeout("no answer"), gone)) as client:
        await client.remove_amqp_user("default", "builder")
    async with leveret(Peer(gone)) as client:
        with pytest.raises(NotFound):
            await client.remove_amqp_user("default", "builder")


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (404, "vm_not_found", NotFound),
        (404, "project_not_found", Missing),
        (409, "name_taken", Conflict),
        (401, "unauthenticated", Denied),
        (403, "forbidden", Denied),
        (422, "invalid_request", Invalid),
        (503, "unavailable", Unavailable),
        (500, "internal", ApiError),
    ],
)
async def test_refusals_have_kinds(status: int, code: str, kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught:
        await http(Peer(problem(status, code)), Sleeps(), retry_for_s=0.0).send("GET", "/v1/vms")
    assert isinstance(caught.value, ApiError)
    assert (caught.value.status, caught.value.code) == (status, code)


def test_a_code_alone_has_the_status_that_rest_gives_it() -> None:
    told = {str(code): refusal(code, "It is so.").status for code in STATUS}
    asked_for_a_console = {"host_silent", "hypervisor_unavailable", "hypervisor_timeout"}
    assert told | dict.fromkeys(asked_for_a_console, 503) == {str(code): int(status) for code, status in STATUS.items()}


@pytest.mark.parametrize("text", ["<html>Welcome</html>", "[]", '{"id": 1}'])
async def test_an_answer_that_is_not_the_apis_is_an_error_of_ours(text: str) -> None:
    async with leveret(Peer(httpx2.Response(200, text=text))) as client:
        with pytest.raises(ApiError) as caught:
            await client.get(VM_ID)
    assert caught.value.code == "unreadable_answer"


async def test_names_in_addresses_are_quoted() -> None:
    peer = Peer(problem(404, "project_not_found"))
    async with leveret(peer) as client:
        with pytest.raises(Missing):
            await client.project("../vms?x=1")
    assert peer.requests[0].url.raw_path == b"/v1/projects/..%2Fvms%3Fx%3D1"


HOST = examples.HOST | {"state": "fenced", "clean": False}


async def test_an_order_about_a_host_is_sent_again_under_its_own_name() -> None:
    peer = Peer(problem(503, "unavailable"), httpx2.Response(200, json=HOST))
    async with leveret(peer) as client:
        host = await client.fence_host("h/1", "power cut")
    assert (host.state, host.clean, host.vms_to_restart) == ("fenced", False, 0)
    first, again = peer.requests
    assert first.url.raw_path == b"/v1/hosts/h%2F1/actions/fence"
    assert first.content == again.content == b'{"proof":"power cut"}'
    assert first.headers["x-request-id"] == again.headers["x-request-id"]


@pytest.mark.parametrize("verb", ["cordon", "uncordon", "retire"])
async def test_every_order_about_a_host_has_its_address(verb: str) -> None:
    peer = Peer(httpx2.Response(200, json=HOST))
    async with leveret(peer) as client:
        await getattr(client, f"{verb}_host")("h1", request_id="mine")
    (request,) = peer.requests
    assert request.url.path == f"/v1/hosts/h1/actions/{verb}"
    assert request.headers["x-request-id"] == "mine"


def test_the_etag_of_a_vm_on_a_silent_host_is_that_of_the_vm() -> None:
    assert tag_of('"3.1795339809000000-silent"') == "3.1795339809000000"
    with pytest.raises(ValueError, match="if_match"):
        tag_of('"3.1795339809000000-loud"')


SECRET = "lv_Vq3secret"


@pytest.mark.parametrize(
    "token", ["", f"{SECRET}\n", f"{SECRET} x", f"{SECRET}\u00e9", f"{SECRET}\r\nX: y", f"\0{SECRET}"]
)
def test_a_token_that_cannot_be_sent_is_refused_without_being_told(token: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Leveret("http://leveret.test", token)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "",
        SECRET,
        f"ftp://{SECRET}",
        f"//{SECRET}",
        f"http://{SECRET}@leveret.test",
        f"http://x:{SECRET}@leveret.test",
        f"http://leveret.test/?{SECRET}",
        f"http://leveret.test\n{SECRET}",
        f"http://{SECRET}:99999",
        f"http://[{SECRET}",
    ],
)
def test_an_address_that_is_none_is_refused_without_being_told(url: str) -> None:
    """It may be the token, in the wrong place."""
    with pytest.raises(ConfigError) as caught:
        Leveret(url, "lv_good")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("kind", [httpx2.LocalProtocolError, httpx2.UnsupportedProtocol])
async def test_what_cannot_be_sent_is_neither_sent_again_nor_told(kind: type[httpx2.TransportError]) -> None:
    peer, sleeps = Peer(kind(f"Illegal header value b'Bearer {SECRET}'")), Sleeps()
    with pytest.raises(ConfigError) as caught:
        await http(peer, sleeps).send("PUT", "/v1/vms/x", body="{}")
    assert "secret" not in str(caught.value)
    assert caught.value.__suppress_context__
    assert len(peer.requests) == 1
    with pytest.raises(ConfigError) as caught:
        async with http(peer, sleeps).listen("/v1/events", params={}, headers={}, silence_s=1):
            pytest.fail("it was sent")
    assert "secret" not in str(caught.value)


NOT_TO_BE_SENT: list[dict[str, Any]] = [
    {"request_id": ""},
    {"request_id": "two words"},
    {"request_id": "line\nbreak"},
    {"request_id": "x" * 129},
    {"if_match": "latest"},
    {"if_match": ""},
    {"traceparent": "00-0"},
    {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\n"},
]


@pytest.mark.parametrize("given", NOT_TO_BE_SENT)
async def test_headers_that_cannot_be_sent_are_refused_before_anything_is(given: dict[str, Any]) -> None:
    peer = Peer(receipt())
    async with leveret(peer) as client:
        with pytest.raises(ValueError, match=r"request id|if_match|traceparent"):
            await client.start(VM_ID, **given)
    assert peer.requests == []


TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def test_every_write_takes_a_trace_along() -> None:
    peer = Peer(receipt())
    async with leveret(peer) as client:
        await client.create(CreateVm(image=ImageByName(name="appliance")), traceparent=TRACEPARENT)
        await client.update(VM_ID, UpdateVm(labels={}), traceparent=TRACEPARENT)
        for verb in ("delete", "start", "stop", "reboot", "retry"):
            await getattr(client, verb)(VM_ID, traceparent=TRACEPARENT)
    assert len(peer.requests) == 7
    assert {request.headers["traceparent"] for request in peer.requests} == {TRACEPARENT}


@pytest.mark.parametrize("document", [{}, {"items": 3}, {"items": {}}, {"items": [], "next": "x"}, {"items": [{}]}])
async def test_a_list_that_is_none_is_an_error_of_ours(document: dict[str, Any]) -> None:
    async with leveret(Peer(httpx2.Response(200, json=document))) as client:
        with pytest.raises(ApiError) as caught:
            await client.events_page()
        assert caught.value.code == "unreadable_answer"
        if "next" not in document:
            with pytest.raises(ApiError) as caught:
                await client.hosts()
            assert caught.value.code == "unreadable_answer"


async def test_a_log_that_ends_before_where_one_was_is_a_gap() -> None:
    gone_back = problem(409, "state_conflict", details={"after": 90, "last_seq": 40})
    async with leveret(Peer(gone_back)) as client:
        with pytest.raises(EventGap, match="went back to event 40") as caught:
            await anext(client.events(after=90))
    assert (caught.value.after, caught.value.until) == (90, 40)


def queued() -> httpx2.Response:
    told = {"request_id": "r1", "vm_id": str(VM_ID), "verdict": "queued", "vm": None}
    return httpx2.Response(202, json=told)


ACTIONS = ["start", "stop", "reboot"]


@pytest.mark.parametrize("verb", ACTIONS)
async def test_a_wait_for_a_queued_request_asks_it_again_and_goes_by_its_verdict(verb: str) -> None:
    """What a VM is before its request was judged is not what comes of it."""
    state, desired = ("stopped", "stopped") if verb == "stop" else ("running", "running")
    there = httpx2.Response(200, json=vm(state=state, desired=desired, generation=7, observed_generation=7))
    peer = Peer(queued(), queued(), problem(503, "unavailable"), receipt(generation=7), there)
    async with Leveret("http://leveret.test", "secret", retry_for_s=0, transport=httpx2.MockTransport(peer)) as client:
        asked = await getattr(client, verb)(VM_ID)
        found = await client.wait(asked, state, timeout_s=10)  # type: ignore[arg-type]
    assert found.generation == 7
    writes, look = peer.requests[:4], peer.requests[4]
    assert len({(one.method, one.url, one.content, one.headers["x-request-id"]) for one in writes}) == 1
    assert look.method == "GET"


async def test_a_queued_request_that_is_refused_ends_its_wait_with_the_refusal() -> None:
    peer = Peer(queued(), problem(409, "state_conflict"))
    async with leveret(peer) as client:
        asked = await client.reboot(VM_ID)
        with pytest.raises(Conflict, match="state_conflict"):
            await client.wait(asked, "running", timeout_s=10)


async def test_a_row_from_before_the_given_generation_says_nothing() -> None:

    async def silence() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    def answer(request: httpx2.Request) -> Answer:
        if request.url.path.endswith("/events"):
            return httpx2.Response(200, headers={"Content-Type": "text/event-stream"}, content=silence())
        return httpx2.Response(200, json=vm(generation=1))

    async with leveret(Peer(answer)) as client:
        with pytest.raises(WaitTimedOut):
            await client.wait(VM_ID, "running", timeout_s=0.1, generation=2)
        assert (await client.wait(VM_ID, "running", timeout_s=1, generation=1)).generation == 1


async def test_a_dry_run_is_nothing_to_wait_for() -> None:
    told = {"request_id": "r1", "vm_id": str(VM_ID), "verdict": "would_be_accepted", "vm": None}
    async with leveret(Peer(httpx2.Response(200, json=told))) as client:
        asked = await client.create(CreateVm(image=ImageByName(name="appliance")), dry_run=True)
        with pytest.raises(ValueError, match="dry run"):
            await client.wait(asked, "running", timeout_s=1)


async def test_a_target_that_is_none_is_refused_before_anything_is_sent() -> None:
    peer = Peer(receipt())
    async with leveret(peer) as client:
        with pytest.raises(ValueError, match="runing"):
            await client.wait(VM_ID, "runing", timeout_s=1)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="runing"):
            await client.create(CreateVm(image=ImageByName(name="appliance")), wait="runing")  # type: ignore[arg-type]
    assert peer.requests == []


async def test_a_selector_that_says_nothing_is_not_left_out() -> None:
    """Without it the list would be of every VM."""
    peer = Peer(problem(422, "invalid_request"))
    async with leveret(peer) as client:
        with pytest.raises(Invalid):
            await anext(client.list(selector=""))
    assert peer.requests[0].url.params.get_list("label") == [""]


# Several VMs of one request.


THREE = CreateVm(name="web", image=ImageByName(name="appliance"), count=3)
THEIR_IDS = ids_of(VM_ID, 3)


def several(*states: str) -> httpx2.Response:
    vms = [
        vm(id=str(vm_id), name=f"web-{n}", state=state)
        for n, (vm_id, state) in enumerate(zip(THEIR_IDS, states, strict=False), start=1)
    ]
    verdict = "accepted" if vms else "queued"
    told = {"request_id": "r1", "vm_id": str(VM_ID), "verdict": verdict, "vm": None, "vms": vms}
    return httpx2.Response(202, json=told)


async def test_every_attempt_to_get_several_carries_the_same_key() -> None:
    peer = Peer(httpx2.ReadTimeout("no answer"), problem(503, "unavailable"), several("pending", "pending", "building"))
    async with leveret(peer) as client:
        asked = await client.create(THREE, vm_id=VM_ID)
    assert {(one.method, one.url.path, one.headers["idempotency-key"]) for one in peer.requests} == {
        ("POST", "/v1/vms", str(VM_ID))
    }
    assert len(peer.requests) == 3
    assert json.loads(peer.requests[0].content)["count"] == 3
    assert asked.vm_ids == THEIR_IDS == tuple(one.id for one in asked.made)
    assert [(one.name, one.state) for one in asked.made] == [
        ("web-1", "pending"),
        ("web-2", "pending"),
        ("web-3", "building"),
    ]


async def test_the_ids_of_several_are_known_while_they_are_queued_and_one_alone_has_no_key() -> None:
    peer = Peer(several(), receipt())
    async with leveret(peer) as client:
        asked = await client.create(THREE)
        assert (asked.verdict, asked.made, asked.vm_ids) == ("queued", (), THEIR_IDS)
        one = await client.create(CreateVm(image=ImageByName(name="appliance")), vm_id=VM_ID)
    assert one.vm_ids == (VM_ID,)
    assert "idempotency-key" not in peer.requests[1].headers


async def test_a_receipt_for_several_is_nothing_for_a_wait_for_one() -> None:
    peer = Peer(several("running", "running", "running"))
    async with leveret(peer) as client:
        asked = await client.create(THREE)
        with pytest.raises(ValueError, match="wait_all"):
            await client.wait(asked, "running", timeout_s=1)
    assert len(peer.requests) == 1


class Fleet:
    """An API in which several VMs have these states, and whose events are those that the test tells."""

    def __init__(self, **states: str) -> None:
        self.states = dict(zip(THEIR_IDS, states.values(), strict=False))
        self.events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.looks: list[str] = []
        self._told = 0

    def becomes(self, number: int, state: str) -> None:
        vm_id = THEIR_IDS[number - 1]
        self.states[vm_id] = state
        self._told += 1
        told = event(self._told, state) | {"vm_id": str(vm_id), "vm_name": f"web-{number}"}
        self.events.put_nowait(told)

    def __call__(self, request: httpx2.Request) -> Answer:
        path = request.url.path
        if request.method == "POST":
            return several("pending", "pending", "pending")
        if path == "/v1/events" and request.url.params.get("after") == "latest":
            return httpx2.Response(200, json={"items": [], "next": 0, "forgotten_seq": 0})
        if path == "/v1/events":
            return httpx2.Response(200, headers={"Content-Type": "text/event-stream"}, content=self._stream())
        vm_id = uuid.UUID(path.rpartition("/")[2])
        self.looks.append(path)
        if vm_id not in self.states:
            return problem(404, "vm_not_found")
        name = f"web-{THEIR_IDS.index(vm_id) + 1}"
        return httpx2.Response(200, json=vm(id=str(vm_id), name=name, state=self.states[vm_id]))

    async def _stream(self) -> AsyncIterator[bytes]:
        while True:
            told = await self.events.get()
            yield f"id: {told['seq']}\nevent: {told['type']}\ndata: {json.dumps(told)}\n\n".encode()


async def test_a_wait_for_several_looks_at_those_that_news_is_about_and_ends_when_all_are_there() -> None:
    fleet = Fleet(one="building", two="running", three="building")
    heard: list[tuple[str | None, str]] = []
    async with leveret(Peer(fleet)) as client:
        waiting = asyncio.create_task(
            client.wait_all(
                THEIR_IDS, "running", timeout_s=10, on_event=lambda news: heard.append((news.vm_name, news.type))
            )
        )
        await eventually(lambda: len(fleet.looks) == 3, what="a first look at each")
        fleet.becomes(3, "running")
        await eventually(lambda: len(fleet.looks) == 4, what="a look at the one with news")
        assert fleet.looks[3].endswith(str(THEIR_IDS[2]))
        fleet.becomes(1, "running")
        found = await waiting
    assert [one.name for one in found] == ["web-1", "web-2", "web-3"]
    assert heard == [("web-3", "running"), ("web-1", "running")]


async def test_a_wait_for_several_fails_with_the_first_that_cannot_come_to_be_so() -> None:
    async with leveret(Peer(Fleet(one="running", two="error", three="building"))) as client:
        with pytest.raises(VmFailed, match="web-2"):
            await client.wait_all(await client.create(THREE), "running", timeout_s=10)


async def test_a_wait_for_several_that_is_over_says_which_is_late() -> None:
    async with leveret(Peer(Fleet(one="running", two="building", three="running"))) as client:
        with pytest.raises(WaitTimedOut) as caught:
            await client.wait_all(THEIR_IDS, "running", timeout_s=0.2)
        assert caught.value.vm is not None
        assert caught.value.vm.name == "web-2"
        with pytest.raises(ValueError, match="runing"):
            await client.wait_all(THEIR_IDS, "runing", timeout_s=1)  # type: ignore[arg-type]


async def test_several_that_are_refused_later_end_their_wait_with_the_refusal() -> None:
    peer = Peer(several(), problem(409, "no_capacity"))
    async with leveret(peer) as client:
        asked = await client.create(THREE)
        with pytest.raises(Conflict, match="no_capacity"):
            await client.wait_all(asked, "running", timeout_s=10)
    assert len({one.headers["idempotency-key"] for one in peer.requests}) == 1


async def test_a_group_that_a_lost_answer_removed_is_removed() -> None:
    peer = Peer(httpx2.ReadTimeout("no answer"), problem(404, "group_not_found"))
    async with leveret(peer) as client:
        await client.delete_group("a b")
    assert peer.requests[0].url.raw_path == b"/v1/groups/a%20b"
