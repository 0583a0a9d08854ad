"""Faults of a request, said as a person would."""

import re
from typing import Any, get_args

import pytest
import typer
from pydantic import BaseModel

from leveret.client.cli.amqp_users import AmqpRoleChoice
from leveret.client.cli.faults import RULES, checked, checked_word
from leveret.client.cli.group import PolicyChoice, TopologyChoice
from leveret.client.cli.token import RoleChoice
from leveret.client.cli.wait import Goal
from leveret.client.leveret import Target
from leveret.shared.documents import (
    AmqpRole,
    AmqpUserName,
    CreateToken,
    CreateVm,
    Placement,
    ProjectId,
    Role,
    UpdateQuota,
    UpdateVm,
)
from leveret.shared.groups import CreateGroup, Policy, Topology
from leveret.shared.placements import AskCapacity

pytestmark = pytest.mark.unit

LIBRARY = re.compile(r"Input should|String should|pattern|pydantic|Value error|type=|ImageBy|\^\[", re.IGNORECASE)
GOOD: dict[str, Any] = {"image": {"name": "tiny"}}
DIGEST = "0" * 64


@pytest.mark.parametrize(
    ("asked", "option"),
    [
        ({"name": "Not A Name"}, "NAME"),
        ({"name": "x" * 64}, "NAME"),
        ({"vcpus": 0}, "--vcpus"),
        ({"vcpus": 1.5}, "--vcpus"),
        ({"memory_mib": 1}, "--memory"),
        ({"disk_gib": 1 << 20}, "--disk"),
        ({"image": {"name": "no such/name"}}, "--image"),
        ({"image": {"url": "https://h/x", "sha256": "12"}}, "--sha256"),
        ({"image": {"url": "gopher://h/x", "sha256": DIGEST}}, "--image"),
        ({"image": {"url": "https://u:p@h/x", "sha256": DIGEST}}, "--image"),
        ({"image": {"url": "https://h/x", "sha256": DIGEST, "format": "vmdk"}}, "--image-format"),
        ({"image": "tiny"}, "--image"),
        ({"ssh_keys": ["no key at all, only words"]}, "--ssh-key"),
        ({"ssh_keys": ["short"]}, "--ssh-key"),
        ({"user_data": "x" * (1 << 20) + "x"}, "--user-data"),
        ({"network": "a b"}, "--network"),
        ({"labels": {"a": "b c"}}, "--label"),
        ({"labels": {"a b": "c"}}, "--label"),
        ({"labels": {str(n): "" for n in range(33)}}, "--label"),
        ({"placement": {"zones": ["a b"]}}, "--zone"),
        ({"placement": {"require_labels": {"a b": "c"}}}, "--require-label"),
        ({"placement": {"forbid_labels": {"a": "b c"}}}, "--forbid-label"),
        ({"placement": {"strategy": "scatter"}}, "--strategy"),
        ({"placement": {"tolerate": {"a": "b c"}}}, "--tolerate"),
        ({"placement": {"tolerate": {"a b": "c"}}}, "--tolerate"),
        ({"placement": {"hosts": ["a b"]}}, "--on-host"),
        ({"placement": {"group": "No"}}, "--group"),
        ({"count": 0}, "--count"),
        ({"count": 101}, "--count"),
        ({"on_host_failure": "pray"}, "--on-host-failure"),
    ],
)
def test_a_fault_names_the_option_and_sounds_like_a_person(asked: dict[str, Any], option: str) -> None:
    with pytest.raises(typer.BadParameter) as caught:
        checked(CreateVm, GOOD | asked)
    assert caught.value.param_hint == option
    assert not LIBRARY.search(caught.value.message), caught.value.message
    assert caught.value.message.endswith(".")


def test_a_value_that_may_be_a_secret_is_never_told() -> None:
    with pytest.raises(typer.BadParameter) as caught:
        checked(CreateVm, GOOD | {"user_data": "s3cret" * 200_000, "name": "Not A Name"})
    assert "s3cret" not in caught.value.message
    assert "Not A Name" not in caught.value.message
    assert "--user-data: " in caught.value.message
    assert "NAME: " in caught.value.message


def test_a_misspelt_field_is_told_with_the_right_one() -> None:
    with pytest.raises(typer.BadParameter, match="is `memory_mib` meant") as caught:
        checked(CreateVm, GOOD | {"memory_mb": 512})
    assert caught.value.param_hint == "memory_mb"


def test_new_names_and_limits_have_options_of_their_own() -> None:
    with pytest.raises(typer.BadParameter) as caught:
        checked(UpdateVm, {"name": "No"}, rename={"name": "new_name"})
    assert caught.value.param_hint == "NEW"
    with pytest.raises(typer.BadParameter) as caught:
        checked(CreateToken, {"name": "a b"}, rename={"name": "token_name"})
    assert "token" in caught.value.message


@pytest.mark.parametrize(
    ("kind", "word", "field"),
    [(ProjectId, "Team", "project"), (AmqpUserName, "leveret-x", "user"), (AmqpUserName, "a.b", "user")],
)
def test_words_are_checked_too(kind: Any, word: str, field: str) -> None:
    with pytest.raises(typer.BadParameter) as caught:
        checked_word(kind, word, field)
    assert not LIBRARY.search(caught.value.message)


def test_every_field_of_a_request_has_a_rule() -> None:
    def fields(model: type[BaseModel]) -> set[str]:
        return set(model.model_fields)

    spoken = {pattern.partition(".")[0] for pattern in RULES} | {"placement"}
    assert fields(CreateVm) - {"running"} <= spoken
    assert {f"placement.{name}" for name in fields(Placement)} <= set(RULES)
    assert fields(UpdateQuota) <= spoken
    assert fields(UpdateVm) <= spoken
    assert fields(AskCapacity) <= spoken


def test_the_choices_are_those_of_the_documents() -> None:
    assert {choice.value for choice in RoleChoice} == set(get_args(Role))
    assert {choice.value for choice in AmqpRoleChoice} == set(get_args(AmqpRole))
    assert {choice.value for choice in Goal} == set(get_args(Target))
    assert {choice.value for choice in PolicyChoice} == set(get_args(Policy))
    assert {choice.value for choice in TopologyChoice} == set(get_args(Topology))


def test_the_name_of_a_group_is_told_as_its_argument() -> None:
    with pytest.raises(typer.BadParameter) as caught:
        checked(CreateGroup, {"name": "No"}, rename={"name": "group_name"})
    assert caught.value.param_hint == "GROUP"


def test_a_name_that_is_too_long_to_be_numbered_is_told() -> None:
    with pytest.raises(typer.BadParameter, match="too long to be numbered"):
        checked(CreateVm, GOOD | {"name": "a" * 62, "count": 10})
