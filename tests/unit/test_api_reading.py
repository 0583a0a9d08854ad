"""What the API makes of what it is sent: bodies, parameters, cursors, ids."""

import json
import re
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from starlette.requests import Request

from leveret.api import headers, paging, rim
from leveret.api.params import EventParams, ListParams, WaitParams
from leveret.shared.documents import CreateVm, StopVm, UpdateVm
from leveret.shared.errors import Code, LeveretError
from leveret.shared.examples import CREATE, VM_ID
from leveret.shared.headers import trace_id_in, traceparent_in, uuid_in
from leveret.shared.messages import explain, parse

pytestmark = pytest.mark.unit


@given(st.uuids())
def test_a_cursor_leads_back_to_its_id(vm_id: uuid.UUID) -> None:
    cursor = paging.cursor_of(vm_id)
    assert paging.after_cursor(cursor) == vm_id
    assert re.fullmatch(paging.CURSOR_PATTERN, cursor)


@given(st.text(max_size=40))
def test_what_no_list_has_given_out_is_no_cursor(text: str) -> None:
    with pytest.raises(LeveretError) as caught:
        paging.after_cursor(text)
    assert caught.value.problem.code is Code.INVALID_REQUEST


@pytest.mark.parametrize(
    "change",
    [str.lower, lambda cursor: cursor + " ", lambda cursor: cursor + "=", lambda cursor: cursor[3:]],
)
def test_a_cursor_that_was_changed_is_none(change: Callable[[str], str]) -> None:
    cursor = paging.cursor_of(uuid.UUID(int=0xABCDEF << 96))
    with pytest.raises(LeveretError):
        paging.after_cursor(change(cursor))


@pytest.mark.parametrize("name", ["a", "shop", "k8s-" + "x" * 58])
def test_a_cursor_leads_back_to_its_name(name: str) -> None:
    cursor = paging.cursor_of_name(name)
    assert paging.after_name(cursor) == name
    assert re.fullmatch(paging.NAME_CURSOR_PATTERN, cursor)


@given(st.text(max_size=40))
def test_what_no_list_has_given_out_is_no_name_to_go_on_after(text: str) -> None:
    with pytest.raises(LeveretError) as caught:
        paging.after_name(text)
    assert caught.value.problem.code is Code.INVALID_REQUEST


def asked_with(*lines: tuple[str, str]) -> Request:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in lines]
    return Request({"type": "http", "headers": raw})


@pytest.mark.parametrize(
    ("given", "meant"), [('"3.1795339809000000"', "3.1795339809000000"), ('"3"', "3"), ("*", None), (' "3" ', "3")]
)
def test_an_etag_is_told_without_its_quotes(given: str, meant: str | None) -> None:
    assert headers.if_match(asked_with(("if-match", given))) == meant
    assert re.fullmatch(headers.IF_MATCH_PATTERN, given.strip())


def test_without_an_etag_any_vm_will_do() -> None:
    assert headers.if_match(asked_with()) is None


@pytest.mark.parametrize(
    "lines", [["3"], ['W/"3"'], ['"3", "4"'], ['"3"', '"4"'], ['"3'], [""], ['"three"'], ['"3."'], ["*, *"], ['"\xb3"']]
)
def test_anything_but_one_strong_etag_is_refused(lines: list[str]) -> None:
    with pytest.raises(LeveretError) as caught:
        headers.if_match(asked_with(*(("if-match", line) for line in lines)))
    assert caught.value.problem.details["errors"][0]["field"] == "If-Match"


def refused(body: bytes | str, model: type[CreateVm | StopVm | UpdateVm] = CreateVm) -> list[dict[str, str]]:
    with pytest.raises(LeveretError) as caught:
        parse(model, body.encode() if isinstance(body, str) else body)
    assert caught.value.problem.code is Code.INVALID_REQUEST
    errors: list[dict[str, str]] = caught.value.problem.details["errors"]
    assert errors
    return errors


def test_a_document_is_read() -> None:
    assert parse(CreateVm, json.dumps(CREATE).encode()).vcpus == 2


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "null",
        "[]",
        '"text"',
        "{} {}",
        b"\xff\xfe{}",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"image": {"name": "x"}, "vcpus": NaN}',
        '{"image": {"name": "x"}, "vcpus": 1e999}',
        '{"image": {"name": "x"}, "vcpus": "2"}',
        '{"image": {"name": "x"}, "vcpus": true}',
        '{"image": {"name": "x"}, "user_data": "\\ud800"}',
    ],
    ids=lambda body: repr(body[:30]),
)
def test_what_is_not_one_valid_document_is_refused(body: bytes | str) -> None:
    refused(body)


@pytest.mark.parametrize(
    "body",
    [
        '{"image": {"name": "x"}, "vcpus": 1, "vcpus": 2}',
        '{"image": {"name": "x", "name": "y"}}',
        '{"image": {"name": "x"}, "labels": {"a": "1", "a": "2"}}',
    ],
)
def test_a_field_that_stands_there_twice_is_refused(body: str) -> None:
    assert refused(body) == [{"field": "(document)", "message": "a field stands there twice"}]


def test_an_unknown_field_is_named() -> None:
    assert refused('{"grace_ms": 5}', StopVm) == [{"field": "grace_ms", "message": "Extra inputs are not permitted"}]


SECRET = "hunter2-hunter2"


@pytest.mark.parametrize(
    "document",
    [
        {"image": {"name": "x"}, "user_data": {"password": SECRET}},
        {"image": {"name": "x"}, "user_data_base64": f"!{SECRET}"},
        {"image": {"name": "x"}, "ssh_keys": [SECRET * 3]},
        {"image": {"url": f"http://me:{SECRET}@host/x", "sha256": "0" * 64}},
        {"image": {"name": "x"}, "name": SECRET.upper()},
    ],
)
def test_a_refusal_never_repeats_a_value(document: dict[str, Any]) -> None:
    assert SECRET.lower() not in json.dumps(refused(json.dumps(document))).lower()


@pytest.mark.parametrize(
    ("model", "values"),
    [
        (ListParams, {"limit": 0}),
        (ListParams, {"limit": 100_001}),
        (ListParams, {"name": "a\x00b"}),
        (ListParams, {"stat": "running"}),
        (EventParams, {"wait_s": 56}),
        (EventParams, {"after": -1}),
        (EventParams, {"after": 2**63}),
        (EventParams, {"after": "newest"}),
        (WaitParams, {"wait": "paused"}),
        (WaitParams, {"timeout_s": "nan"}),
        (WaitParams, {"timeout_s": -1}),
    ],
)
def test_parameters_have_bounds(model: type[ListParams], values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        model.model_validate(values)


@pytest.mark.parametrize("given_id", ["abc", "a.b:c_d-1", 'a"b', "!~", "x" * 128])
def test_a_plain_request_id_is_kept(given_id: str) -> None:
    assert rim.request_id_from(given_id) == given_id
    headers.check_request_id(asked_with(("x-request-id", given_id)))


@pytest.mark.parametrize("given_id", ["", "a b", "x" * 129, "a\n", "\xe9", "\x7f"])
def test_any_other_request_id_is_replaced_and_for_a_write_refused(given_id: str) -> None:
    assert uuid.UUID(rim.request_id_from(given_id)).version == 7
    with pytest.raises(LeveretError) as caught:
        headers.check_request_id(asked_with(("x-request-id", given_id)))
    assert caught.value.problem.details["errors"][0]["field"] == "X-Request-Id"


def test_a_request_without_a_name_gets_one() -> None:
    assert uuid.UUID(rim.request_id_from(None)).version == 7
    headers.check_request_id(asked_with())


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (headers.check_request_id, "X-Request-Id"),
        (headers.idempotency_key, "Idempotency-Key"),
        (headers.last_event_id, "Last-Event-ID"),
    ],
)
def test_a_header_that_means_one_thing_stands_there_once(read: Callable[[Request], object], name: str) -> None:
    read(asked_with((name.lower(), "1")))
    with pytest.raises(LeveretError) as caught:
        read(asked_with((name.lower(), "1"), (name.lower(), "2")))
    assert caught.value.problem.details["errors"][0]["field"] == name


@pytest.mark.parametrize(("text", "meant"), [("", None), ("0", 0), ("7", 7), ("9" * 18, 10**18 - 1)])
def test_the_place_in_a_stream_is_read_as_it_is_described(text: str, meant: int | None) -> None:
    assert headers.last_event_id(asked_with(("last-event-id", text))) == meant
    assert re.search(headers.LAST_EVENT_ID_PATTERN, text)


@pytest.mark.parametrize("text", ["-1", "1.0", "9" * 19, "latest", " 1", "\xb2"])
def test_no_other_place_in_a_stream_is_read_or_described(text: str) -> None:
    assert not re.search(headers.LAST_EVENT_ID_PATTERN, text)
    with pytest.raises(LeveretError):
        headers.last_event_id(asked_with(("last-event-id", text)))


@pytest.mark.parametrize(
    ("model", "values"),
    [
        (ListParams, {"limit": "5.0"}),
        (ListParams, {"limit": "1_0"}),
        (ListParams, {"limit": " 5"}),
        (ListParams, {"limit": "+5"}),
        (ListParams, {"limit": "\u0665"}),
        (WaitParams, {"timeout_s": "1_0"}),
        (WaitParams, {"timeout_s": " 1"}),
        (WaitParams, {"timeout_s": "inf"}),
        (EventParams, {"after": "1_0"}),
        (EventParams, {"after": "5.0"}),
    ],
)
def test_numbers_are_written_as_everybody_writes_them(model: type[ListParams], values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        model.model_validate(values)


def test_usual_numbers_are_read() -> None:
    assert ListParams.model_validate({"limit": "5"}).limit == 5
    assert WaitParams.model_validate({"timeout_s": "2.5"}).timeout_s == 2.5
    assert WaitParams.model_validate({"timeout_s": "1e-05"}).timeout_s == 1e-5
    assert EventParams.model_validate({"after": "7"}).after == 7
    assert EventParams.model_validate({"after": "latest"}).after == "latest"


def test_a_place_that_is_none_is_explained_in_one_sentence() -> None:
    with pytest.raises(ValidationError) as caught:
        EventParams.model_validate({"after": "newest"})
    assert [fault["field"] for fault in explain(caught.value)] == ["after"]


@pytest.mark.parametrize(
    "text",
    [f"urn:uuid:{VM_ID}", f"{{{VM_ID}}}", VM_ID.replace("-", ""), f" {VM_ID}", f"{VM_ID}\n", VM_ID[:-1], "", None],
)
def test_an_id_is_written_in_one_way(text: str | None) -> None:
    assert uuid_in(text) is None


@pytest.mark.parametrize("text", [VM_ID, VM_ID.upper()])
def test_an_id_is_read(text: str) -> None:
    assert uuid_in(text) == uuid.UUID(VM_ID)


TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def test_a_trace_is_read() -> None:
    assert traceparent_in(f"00-{TRACE}-00f067aa0ba902b7-01") == f"00-{TRACE}-00f067aa0ba902b7-01"
    assert trace_id_in(f"00-{TRACE}-00f067aa0ba902b7-01") == TRACE


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        f"ff-{TRACE}-00f067aa0ba902b7-01",
        f"00-{'0' * 32}-00f067aa0ba902b7-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-00f067aa0ba902b7-01",
        f"00-{TRACE}-00f067aa0ba902b7-01\n",
    ],
)
def test_what_is_no_trace_is_left_out(text: str | None) -> None:
    assert traceparent_in(text) is None
    assert trace_id_in(text) is None


@pytest.mark.parametrize(
    ("image", "faults"),
    [
        ({"url": "ftp://h/x", "sha256": "0" * 64}, {"image.url": "must be an http, https or file url"}),
        ({"url": "http://h/x"}, {"image.sha256": "Field required"}),
        ({"nmae": "x"}, {"image.name": "Field required", "image.nmae": "Extra inputs are not permitted"}),
        ({"name": "x", "format": "raw"}, {"image.format": "Extra inputs are not permitted"}),
        ("debian", {"image": "Input should be an object"}),
        (None, {"image": "Input should be an object"}),
    ],
    ids=repr,
)
def test_of_several_forms_the_one_that_was_meant_is_explained_in_the_words_of_the_document(
    image: object, faults: dict[str, str]
) -> None:
    found = refused(json.dumps({"image": image}))
    assert {fault["field"]: fault["message"] for fault in found} == faults
    assert len(found) == len(faults)


def test_the_name_of_a_field_is_not_taken_for_one_of_ours() -> None:
    found = refused(json.dumps({"image": {"name": "x"}, "labels": {"ImageByUrl": 1, "[key]": "x"}}))
    assert [fault["field"] for fault in found] == ["labels.ImageByUrl", "labels.[key]"]


def test_a_message_says_what_is_wrong_and_not_who_found_it() -> None:
    (fault,) = refused(json.dumps(CREATE | {"user_data": "x", "user_data_base64": "eA=="}))
    assert fault == {
        "field": "(document)",
        "message": "give user_data (text) or user_data_base64 (any bytes), not both",
    }


def test_a_vm_cannot_be_without_a_name() -> None:
    assert refused('{"name": null}', UpdateVm) == [
        {"field": "name", "message": "give a name, or leave it out to keep the one it has"}
    ]
    assert parse(UpdateVm, b"{}").name is None
    assert UpdateVm.model_json_schema()["properties"]["name"].keys() == {"pattern", "title", "type"}


@given(st.datetimes(timezones=st.just(UTC)), st.uuids())
def test_a_cursor_leads_back_to_its_age(made_at: datetime, token_id: uuid.UUID) -> None:
    cursor = paging.cursor_of_age(made_at, token_id)
    assert paging.after_age(cursor) == (made_at, token_id)
    assert re.fullmatch(paging.AGE_CURSOR_PATTERN, cursor)


@given(st.text(max_size=40))
def test_what_no_list_has_given_out_is_no_age_to_go_on_after(text: str) -> None:
    with pytest.raises(LeveretError):
        paging.after_age(text)


@given(st.from_regex(paging.AGE_CURSOR_PATTERN, fullmatch=True))
def test_a_made_up_age_is_one_or_the_end_of_all_ages(text: str) -> None:
    made_at, token_id = paging.after_age(text)
    assert made_at.tzinfo is UTC
    assert paging.after_age(paging.cursor_of_age(made_at, token_id)) == (made_at, token_id)
