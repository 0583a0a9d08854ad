"""docs/asyncapi.yaml is what the generator writes, valid by AsyncAPI's own schema, and true to the code."""

import json
import re
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from jsonschema import Draft7Validator
from pydantic import ValidationError
from referencing import Registry
from referencing.jsonschema import DRAFT7

from leveret.shared import examples, topology
from leveret.shared.asyncapi import words
from leveret.shared.asyncapi.__main__ import main
from leveret.shared.asyncapi.document import document, yaml_text
from leveret.shared.asyncapi.guide import refreshed
from leveret.shared.errors import Code, Problem
from leveret.shared.event_types import EVENTS, OF_PROJECTS, OF_VMS
from leveret.shared.messages import (
    ADMINISTRATION,
    ANSWERS,
    GROUPS,
    REQUESTS,
    CloudEvent,
    Verdict,
    decode,
    encode,
    parse,
)
from leveret.stack.client_permissions import CLIENT_LIMITS, CLIENT_POLICY, client_permissions

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
SPECS = ROOT / "tests/acceptance/javascript/node_modules/@asyncapi/specs/schemas/3.0.0-without-$id.json"

CONTRACT: dict[str, Any] = yaml.safe_load(yaml_text())
MESSAGES: dict[str, dict[str, Any]] = CONTRACT["components"]["messages"]
SHOWN = [
    pytest.param(name, example, id=f"{name}:{example['name']}")
    for name, message in MESSAGES.items()
    for example in message["examples"]
]


def validator(schema: dict[str, Any]) -> Draft7Validator:
    """A schema of the contract, whose references lead into the contract."""
    registry: Registry[Any] = Registry().with_resource("urn:contract", DRAFT7.create_resource(CONTRACT))
    return Draft7Validator(_absolute(schema), registry=registry, format_checker=Draft7Validator.FORMAT_CHECKER)


def _absolute(schema: Any) -> Any:
    if isinstance(schema, dict):
        return {
            key: f"urn:contract{value}" if key == "$ref" and value.startswith("#") else _absolute(value)
            for key, value in schema.items()
        }
    return [_absolute(item) for item in schema] if isinstance(schema, list) else schema


def test_the_published_file_is_what_the_generator_writes() -> None:
    written = (ROOT / "docs/asyncapi.yaml").read_text(encoding="utf-8")
    assert written == yaml_text(), "run: python -m leveret.shared.asyncapi docs/asyncapi.yaml docs/amqp.md"


def test_the_tables_and_programs_of_the_guide_are_current() -> None:
    guide = ROOT / "docs/amqp.md"
    current = refreshed(guide)
    assert guide.read_text(encoding="utf-8") == current, "run: python -m leveret.shared.asyncapi docs/amqp.md"


def test_both_files_are_written_by_one_command(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    contract, guide = tmp_path / "docs/asyncapi.yaml", tmp_path / "docs/amqp.md"
    (tmp_path / "program.py").write_text("print('one')\n", encoding="utf-8")
    block = "<!-- generated: {} -->\nout-of-date\n<!-- end -->\n"
    guide.write_text(f"# Title\n{block.format('limits')}kept\n{block.format('program.py')}", encoding="utf-8")
    main([str(contract), str(guide)])
    assert contract.read_text(encoding="utf-8") == yaml_text()
    written = guide.read_text(encoding="utf-8")
    assert "out-of-date" not in written
    assert "kept\n<!-- generated: program.py -->\n```python\nprint('one')\n```\n<!-- end -->" in written
    assert f"| `message_bytes` | {words.LIMITS['message_bytes']['max']} |" in written


def test_yaml_says_the_same_as_the_document() -> None:
    assert json.loads(json.dumps(document())) == CONTRACT


@pytest.mark.skipif(not SPECS.exists(), reason="AsyncAPI's schemas are not installed: run script/setup --dev")
def test_it_is_a_valid_asyncapi_document() -> None:
    checker = Draft7Validator(json.loads(SPECS.read_text(encoding="utf-8")))
    assert [error.json_path + ": " + error.message for error in checker.iter_errors(CONTRACT)] == []
    broken = CONTRACT | {"operations": {"createVm": {"action": "shout"}}}
    assert list(checker.iter_errors(broken))


def test_every_schema_is_a_json_schema() -> None:
    for schema in CONTRACT["components"]["schemas"].values():
        Draft7Validator.check_schema(schema)


def test_every_reference_leads_somewhere() -> None:
    for reference in re.findall(r"\$ref: '?(#[^'\s]+)", yaml_text()):
        found: Any = CONTRACT
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]


def test_every_message_of_a_client_is_in_it_and_no_other() -> None:
    assert {message["name"] for message in MESSAGES.values()} == REQUESTS.keys() | GROUPS.keys() | ANSWERS.keys()
    assert set(CONTRACT["channels"]["requests"]["messages"]) == REQUESTS.keys() | GROUPS.keys()
    assert not [name for name in ADMINISTRATION if name in yaml_text()]
    assert set(CONTRACT["channels"]["ownQueue"]["messages"]) == set(EVENTS)


def test_every_field_of_a_document_is_explained() -> None:
    silent = [
        f"{name}.{field}"
        for name, schema in CONTRACT["components"]["schemas"].items()
        for field, said in schema.get("properties", {}).items()
        if "description" not in said and field not in {"vm_id", "host_id", "problem", "content_type", "token_id"}
    ]
    assert silent == []


def test_every_error_code_is_explained_in_one_place() -> None:
    assert set(CONTRACT["x-errors"]) == {str(code) for code in Code}
    assert not words.IN_VERDICTS & words.IN_REST
    assert all(said["hint"] for said in CONTRACT["x-errors"].values())


def test_permissions_and_limits_are_those_that_clients_get() -> None:
    for role in ("member", "reader"):
        granted = client_permissions("shop", "blue", role)
        for right, pattern in CONTRACT["x-permissions"][role].items():
            told = re.compile(pattern.replace("{user}", "shop").replace("{project}", "blue"))
            for name in (
                "client.shop.x", "client.shopx", "xclient.shop.x", "leveret.requests", "leveret.events.blue",
                "leveret.events.other", "leveret.hosts", "amq.gen-1", "",
            ):  # fmt: skip
                assert bool(told.search(name)) == bool(re.search(getattr(granted, right), name)), (role, right, name)
    limits = {name: said.get("max") for name, said in CONTRACT["x-limits"].items()}
    assert limits["connections"] == CLIENT_LIMITS["max-connections"]
    assert limits["channels"] == CLIENT_LIMITS["max-channels"]
    policy: Any = CLIENT_POLICY["definition"]
    assert limits["own_queue_messages"] == policy["max-length"]
    assert limits["own_queue_bytes"] == policy["max-length-bytes"]
    assert limits["own_queue_unused_s"] * 1000 == policy["expires"]


def test_exchanges_are_named_as_they_are() -> None:
    channels = CONTRACT["channels"]
    told = {name: c["bindings"]["amqp"]["exchange"] for name, c in channels.items() if "exchange" in str(c["bindings"])}
    assert told["requests"]["name"] == topology.REQUESTS.name
    assert told["vmEvents"]["name"].replace("{project}", "blue") == topology.events_exchange("blue").name
    assert {exchange["type"] for exchange in told.values()} == {topology.REQUESTS.kind.value}


@pytest.mark.parametrize(("name", "example"), SHOWN)
def test_every_example_is_valid_by_the_schema_it_stands_under(name: str, example: dict[str, Any]) -> None:
    message = MESSAGES[name]
    validator(message["payload"]).validate(example["payload"])
    if "headers" in message:
        validator(message["headers"]).validate(example["headers"])
        assert ("vm_id" in example["headers"]) == (name in REQUESTS)
        if name in REQUESTS:
            UUID(example["headers"]["vm_id"])


@pytest.mark.parametrize(("name", "example"), SHOWN)
def test_every_example_is_valid_by_the_model_and_says_nothing_it_does_not_know(
    name: str, example: dict[str, Any]
) -> None:
    body = json.dumps(example["payload"]).encode()
    read = decode(MESSAGES[name]["name"], body)
    assert json.loads(encode(read)) == example["payload"] or name in REQUESTS | GROUPS
    if isinstance(read, CloudEvent):
        data = EVENTS[read.type].model_validate(read.data)
        assert read.data.keys() <= type(data).model_fields.keys()


@pytest.mark.parametrize("name", REQUESTS | GROUPS)
def test_every_request_has_an_example(name: str) -> None:
    assert (examples.REQUESTS | examples.GROUPS)[name]


def test_what_a_schema_refuses_the_model_refuses_and_the_other_way_round() -> None:
    create = {"image": {"name": "debian-12"}}
    for wrong in (
        {}, {"vcpus": 1}, create | {"vcpus": 0}, create | {"vcpus": "2"}, create | {"vcpuz": 2}, create | {"name": "A"},
        create | {"labels": {"": "x"}}, create | {"labels": {"a": "b c"}}, create | {"labels": {"a": 1}},
        create | {"placement": {"strategy": "any"}}, create | {"ssh_keys": ["short"]}, create | {"running": "yes"},
        {"image": {"name": "x", "url": "https://x/y"}}, {"image": {"url": "https://x/y", "sha256": "0"}},
    ):  # fmt: skip
        assert not validator({"$ref": "#/components/schemas/CreateVm"}).is_valid(wrong), wrong
        with pytest.raises(ValidationError):
            REQUESTS["vm.create.v1"].model_validate_json(json.dumps(wrong))


def test_verdicts_as_they_are_sent_are_valid_whatever_is_left_out() -> None:
    check = validator({"$ref": "#/components/schemas/Verdict"})
    for verdict in (
        Verdict(request_id="r", vm_id=None, accepted=False, problem=Problem.of(Code.FORBIDDEN, "No.")),
        Verdict(request_id="r", vm_id=UUID(examples.VM_ID), accepted=True),
    ):
        sent = json.loads(encode(verdict))
        check.validate(sent)
        assert parse(Verdict, json.dumps(sent).encode()) == verdict
        missing = set(Verdict.model_fields) - sent.keys()
        assert all("default" in CONTRACT["components"]["schemas"]["Verdict"]["properties"][field] for field in missing)


def test_a_client_may_hear_more_than_it_knows() -> None:
    event = examples.EVENTS["leveret.vm.running.v1"].body
    newer = event | {"data": event["data"] | {"colour": "blue"}, "colour": "blue"}
    validator(MESSAGES["leveret.vm.running.v1"]["payload"]).validate(newer)
    verdict = examples.VERDICTS[1].body
    newer = verdict | {"problem": verdict["problem"] | {"code": "code_of_tomorrow"}}
    validator(MESSAGES["request.verdict.v1"]["payload"]).validate(newer)


def test_events_about_vms_are_told_from_events_about_projects_by_their_names() -> None:
    assert not [name for name in OF_VMS if "." in name]
    assert all(len(name.split(".")) == 2 for name in OF_PROJECTS)
