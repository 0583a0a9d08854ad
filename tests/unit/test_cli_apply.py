"""What `apply` reads and what it decides, before it asks for anything."""

import uuid
from datetime import UTC, datetime
from typing import Any

import pytest
import typer

from leveret.client.cli.apply import plan, wanted
from leveret.shared.documents import CreateVm, VmView
from leveret.shared.lifecycle import Desired, State

pytestmark = pytest.mark.unit


def vm(**changes: Any) -> VmView:
    now = datetime.now(UTC)
    fields: dict[str, Any] = {
        "id": uuid.UUID(int=7),
        "project": "default",
        "name": "web",
        "state": State.RUNNING,
        "step": None,
        "desired": Desired.RUNNING,
        "generation": 1,
        "observed_generation": 1,
        "vcpus": 2,
        "memory_mib": 1024,
        "disk_gib": 10,
        "image": "tiny",
        "network": "default",
        "address": None,
        "mac": None,
        "ssh": None,
        "host": "h",
        "zone": "a",
        "labels": {"app": "web", "old": "1"},
        "guest_ready": True,
        "problem": None,
        "attempts": 1,
        "created_at": now,
        "updated_at": now,
    }
    return VmView(**(fields | changes))


def spec(**fields: Any) -> CreateVm:
    return CreateVm.model_validate({"name": "web", "image": {"name": "tiny"}, **fields})


def test_documents_and_lists_may_be_mixed() -> None:
    text = (
        "name: a\nimage: {name: tiny}\n---\n- {name: b, image: {name: tiny}}\n- {name: c, image: {name: tiny}}\n---\n"
    )
    assert [one.name for one in wanted(text, "f")] == ["a", "b", "c"]
    assert [one.name for one in wanted('[{"name": "a", "image": {"name": "tiny"}}]', "f")] == ["a"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds no VM"),
        ("a: [", "is not YAML"),
        ("- x", "VM 1: must be a mapping"),
        ("image: {name: tiny}", "VM 1: name: is missing"),
        ("name: a", "VM 1 (a): image: is missing"),
        ("name: a\nimage: tiny", "write {name: NAME}"),
        ("name: a\nimage: {name: tiny}\nvcpu: 2", "is `vcpus` meant"),
        ("name: a\nimage: {name: tiny}\nvcpus: '2'", "VM 1 (a): vcpus: must be a whole number"),
        ("name: a\nimage: {name: tiny}\n---\nname: a\nimage: {name: tiny}", "VM 2 (a): there are two of this name"),
        ("name: a\nimage: {name: tiny}\nuser_data: !!python/object:os.system x", "is not YAML"),
    ],
)
def test_what_cannot_be_applied_is_told_with_its_place(text: str, told: str) -> None:
    with pytest.raises(typer.BadParameter) as caught:
        wanted(text, "f")
    assert told in caught.value.message


def test_one_that_is_missing_is_made() -> None:
    assert plan(spec(), None).action == "create"


def test_one_that_is_being_deleted_is_made_anew() -> None:
    assert plan(spec(), vm(desired=Desired.DELETED, state=State.DELETING)).action == "create"


def test_what_the_file_does_not_say_stays() -> None:
    found = plan(spec(), vm(desired=Desired.STOPPED, state=State.STOPPED))
    assert (found.action, found.update, found.run, found.differs) == ("none", None, None, ())


def test_labels_are_all_that_the_file_says() -> None:
    found = plan(spec(labels={"app": "db", "new": "2"}), vm())
    assert found.update is not None
    assert found.update.labels == {"app": "db", "new": "2", "old": None}
    assert plan(spec(labels={"app": "web", "old": "1"}), vm()).action == "none"


def test_it_is_started_and_stopped() -> None:
    assert plan(spec(running=False), vm()).run is False
    assert plan(spec(running=True), vm(desired=Desired.STOPPED)).run is True
    assert plan(spec(running=True), vm()).action == "none"


def test_what_cannot_be_changed_is_named_with_both_values() -> None:
    found = plan(spec(vcpus=4, memory_mib=1024, image={"name": "other"}, placement={"zones": ["b"]}), vm())
    assert found.differs == (("vcpus", "2", "4"), ("image", "tiny", "other"), ("placement.zones", "a", "b"))
    assert found.action == "none"


def test_what_becomes_of_it_when_its_host_fails_cannot_be_changed() -> None:
    assert plan(spec(on_host_failure="restart"), vm()).differs == (("on_host_failure", "none", "restart"),)
    assert plan(spec(on_host_failure="restart"), vm(on_host_failure="restart")).differs == ()
    assert plan(spec(), vm(on_host_failure="restart")).differs == ()


def test_an_image_by_url_is_known_by_its_url() -> None:
    image = {"url": "https://h.test/x", "sha256": "0" * 64}
    assert plan(spec(image=image), vm(image="https://h.test/x")).differs == ()
