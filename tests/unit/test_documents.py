"""What users may send, and what is told them when they may not."""

import base64
import json
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from leveret.shared import ids
from leveret.shared.documents import (
    MAX_USER_DATA_BYTES,
    CreateToken,
    CreateVm,
    Document,
    UpdateQuota,
    UpdateVm,
)
from leveret.shared.errors import Code, LeveretError, Problem
from leveret.shared.messages import REQUESTS, decode, digest_of, encode

pytestmark = pytest.mark.unit

SHA = "a" * 64
GOOD: dict[str, Any] = {"name": "web", "image": {"name": "tiny"}}


def read(document: dict[str, Any]) -> CreateVm:
    message = decode("vm.create.v1", json.dumps(document).encode(), among=REQUESTS)
    assert isinstance(message, CreateVm)
    return message


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("nmae", {"nmae": "web"}),
        ("name", {"name": "Web"}),
        ("name", {"name": "web-"}),
        ("name", {"name": "a" * 64}),
        ("name", {"name": "web\n"}),
        ("vcpus", {"vcpus": 0}),
        ("vcpus", {"vcpus": 10**9}),
        ("vcpus", {"vcpus": "1"}),
        ("vcpus", {"vcpus": True}),
        ("memory_mib", {"memory_mib": 1.5}),
        ("disk_gib", {"disk_gib": -1}),
        ("image.sha256", {"image": {"url": "http://h/x", "sha256": "zz"}}),
        ("image.url", {"image": {"url": "ftp://h/x", "sha256": SHA}}),
        ("image.url", {"image": {"url": "http://user:secret@h/x", "sha256": SHA}}),
        ("image.url", {"image": {"url": "file://host/x", "sha256": SHA}}),
        ("ssh_keys", {"ssh_keys": ["not a public key at all"]}),
        ("ssh_keys", {"ssh_keys": ["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA a\0b"]}),
        ("ssh_keys", {"ssh_keys": ["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA x\ncommand=y"]}),
        ("image.url", {"image": {"url": "http://h/\0x", "sha256": SHA}}),
        ("labels.b@d", {"labels": {"b@d": "x"}}),
        ("running", {"running": "yes"}),
        ("(document)", {"user_data": "x", "user_data_base64": "eA=="}),
        ("(document)", {"user_data_base64": "***"}),
    ],
)
def test_a_bad_field_is_named_and_its_value_is_not_repeated(field: str, bad: dict[str, Any]) -> None:
    with pytest.raises(LeveretError) as caught:
        read(GOOD | bad)
    problem = caught.value.problem
    assert problem.code is Code.INVALID_REQUEST
    assert {error["field"] for error in problem.details["errors"]} == {field}
    assert "secret" not in problem.model_dump_json()


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"image": NaN}', b'{"a":' * 5000]
)
def test_what_is_no_document_is_refused_in_order(body: bytes) -> None:
    with pytest.raises(LeveretError) as caught:
        decode("vm.create.v1", body, among=REQUESTS)
    assert caught.value.problem.code is Code.INVALID_REQUEST


def test_unknown_types_and_huge_bodies_are_refused() -> None:
    with pytest.raises(LeveretError) as caught:
        decode("vm.explode", b"{}")
    assert caught.value.problem.code is Code.UNKNOWN_TYPE
    with pytest.raises(LeveretError) as caught:
        decode("vm.create.v1", b" " * (3 * 1024 * 1024))
    assert caught.value.problem.code is Code.BODY_TOO_LARGE


@given(st.binary(max_size=2000))
def test_user_data_arrives_byte_for_byte(data: bytes) -> None:
    body = encode(CreateVm(**GOOD, user_data_base64=base64.b64encode(data).decode()))
    back = decode("vm.create.v1", body, among=REQUESTS)
    assert isinstance(back, CreateVm)
    assert back.user_data_bytes() == data


def test_a_mebibyte_of_user_data_fits_and_a_byte_more_does_not() -> None:
    whole = base64.b64encode(b"\xff" * MAX_USER_DATA_BYTES).decode()
    assert len(read(GOOD | {"user_data_base64": whole}).user_data_bytes() or b"") == MAX_USER_DATA_BYTES
    more = base64.b64encode(b"\xff" * (MAX_USER_DATA_BYTES + 1)).decode()
    with pytest.raises(LeveretError):
        read(GOOD | {"user_data_base64": more})
    with pytest.raises(LeveretError):
        read(GOOD | {"user_data": "\u00e9" * (MAX_USER_DATA_BYTES // 2 + 1)})


def test_ids_sort_by_age_and_say_what_they_are() -> None:
    made = [ids.new_id() for _ in range(200)]
    assert {one.version for one in made} == {7}
    assert {one.variant for one in made} == {uuid.RFC_4122}
    assert len(set(made)) == 200
    assert [one.int >> 80 for one in made] == sorted(one.int >> 80 for one in made)


def test_a_key_means_the_same_id_in_its_project_only() -> None:
    assert ids.id_for_key("a", "k") == ids.id_for_key("a", "k")
    assert ids.id_for_key("a", "k") != ids.id_for_key("b", "k")


@given(st.uuids())
def test_names_and_macs_made_from_ids_are_valid(vm_id: uuid.UUID) -> None:
    assert read(GOOD | {"name": ids.name_for(vm_id)}).name == ids.name_for(vm_id)
    first = int(ids.mac_for(vm_id)[:2], 16)
    assert first & 0b11 == 0b10  # unicast, locally administered


def test_a_digest_does_not_depend_on_the_order() -> None:
    one, two = (ids.new_id(), 1, 1, "running"), (ids.new_id(), 2, 3, "stopped")
    assert digest_of([one, two]) == digest_of([two, one])
    assert digest_of([one]) != digest_of([(*one[:3], "stopped")])


def test_a_code_from_a_newer_version_is_passed_on() -> None:
    problem = Problem.model_validate({"code": "brand_new", "message": "x"})
    assert problem.code == "brand_new"
    assert Problem.model_validate({"code": "disk_full", "message": "x"}).code is Code.DISK_FULL


@pytest.mark.parametrize("number", ["4096", "4096.0", "4.096e3"])
def test_a_whole_number_is_one_however_it_is_written(number: str) -> None:
    body = b'{"image": {"name": "tiny"}, "memory_mib": %s}' % number.encode()
    message = decode("vm.create.v1", body, among=REQUESTS)
    assert isinstance(message, CreateVm)
    assert encode(message) == b'{"memory_mib":4096,"image":{"name":"tiny"}}'


@pytest.mark.parametrize(
    "document", [CreateVm, UpdateVm, CreateToken, UpdateQuota], ids=lambda document: document.__name__
)
def test_what_a_document_refuses_its_schema_refuses(document: type[Document]) -> None:
    """What a pattern, a bound or a combination forbids stands in the schema too, so that clients know beforehand."""
    validator = Draft202012Validator(document.model_json_schema())
    for bad in REFUSED[document]:
        assert not validator.is_valid(bad), bad
        with pytest.raises(ValidationError):
            document.model_validate_json(json.dumps(bad))


REFUSED: dict[type[Document], list[dict[str, Any]]] = {
    CreateVm: [
        GOOD | {"labels": {"b@d": "x"}},
        GOOD | {"labels": {str(n): "" for n in range(33)}},
        GOOD | {"placement": {"require_labels": {"b@d": "x"}}},
        GOOD | {"ssh_keys": ["not a public key at all"]},
        GOOD | {"user_data": "x", "user_data_base64": "eA=="},
        GOOD | {"user_data_base64": "***"},
        GOOD | {"user_data_base64": "eA="},
        GOOD | {"vcpus": 0},
        GOOD | {"vcpus": 1.5},
        {"image": {"url": "ftp://h/xxxxx", "sha256": SHA}},
        {"image": {"url": "http://user:secret@h/x", "sha256": SHA}},
        {"image": {"url": "file://host/x", "sha256": SHA}},
    ],
    UpdateVm: [{"labels": {"b@d": None}}, {"labels": {"a": 1}}, {"vcpus": 2}],
    CreateToken: [{"name": "x", "role": "owner"}, {"name": "x", "expires_at": 10046}, {}],
    UpdateQuota: [{"vms": -1}, {"requests_per_s": 0}, {"requests_per_s": None}],
}


@pytest.mark.parametrize(
    "body",
    [
        b'{"image":{"name":"x"},"placement":{"zones":[' + b"1," * 900_000 + b"1]}}",
        b'{"image":{"name":"x"},' + b",".join(b'"f%d":1' % n for n in range(150_000)) + b"}",
        b'{"image":{"name":"x"},"labels":{' + b",".join(b'"f%d":"1"' % n for n in range(100_000)) + b"}}",
        b"[" + b"[]," * 600_000 + b"[]]",
    ],
)
def test_rubbish_of_two_megabytes_is_refused_without_going_through_all_of_it(body: bytes) -> None:
    with pytest.raises(LeveretError) as refused:
        decode("vm.create.v1", body, among=REQUESTS)
    assert "more than 2000 values" in str(refused.value.problem.details)


def test_a_field_name_is_shown_as_far_as_it_can_be() -> None:
    body = json.dumps({"image": {"name": "x"}, "\x00\x1b" + "a" * 10_000: 1}).encode()
    with pytest.raises(LeveretError) as refused:
        decode("vm.create.v1", body, among=REQUESTS)
    [fault] = refused.value.problem.details["errors"]
    assert fault["field"] == "\N{REPLACEMENT CHARACTER}" * 2 + "a" * 62
