"""Old and new versions side by side, and migrations that are killed half way: row 22 of the fault table.

`messages-0.1` holds every type of message as the version before this one encoded it, with its schema and, of what is
recognised when it comes again, the hash that stands in its database.
"""

import asyncio
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from installation import Installation, Silent
from jsonschema import Draft202012Validator
from load import Load
from peers import eventually

from leveret.conductor.migrate import migrate, status
from leveret.conductor.order import Order
from leveret.conductor.request import _hash
from leveret.shared import topology
from leveret.shared.messages import REGISTRY, REQUESTS, decode, encode
from leveret.stack.down import down
from leveret.stack.layout import Layout, Options
from leveret.stack.ports import free_port
from leveret.stack.up import BROKER_USERS, DATABASE, OWNER, Summary

pytestmark = [pytest.mark.fault, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
BEFORE = Path(__file__).parent / "messages-0.1"
FROZEN = {file.stem: json.loads(file.read_text()) for file in BEFORE.glob("*.json")}
MESSAGES = [(kind, message) for kind, frozen in FROZEN.items() for message in frozen["messages"]]

#: What only they can say who want what the old version has not got: an old conductor refuses it with a reason. So
#: conductors come before the API when an installation is renewed.
NEW_WISHES = {
    "vm.create.v1": {
        "on_host_failure",
        "count",
        "wait_for_capacity",
        "placement.tolerate",
        "placement.group",
        "placement.hosts",
    }
}


def test_every_type_that_the_old_version_spoke_is_still_spoken() -> None:
    assert FROZEN.keys() <= REGISTRY.keys()


@pytest.mark.parametrize(("kind", "message"), MESSAGES)
def test_what_the_old_version_says_is_understood(kind: str, message: dict[str, Any]) -> None:
    """All of it: said again, it is what it was."""
    assert json.loads(encode(decode(kind, json.dumps(message["body"]).encode()))) == message["body"]


@pytest.mark.parametrize(("kind", "message"), [(kind, one) for kind, one in MESSAGES if "hash" in one])
def test_a_request_that_the_old_version_judged_is_recognised(kind: str, message: dict[str, Any]) -> None:
    """An id that is asked for again, before and after: the same document is the same wish."""
    body = decode(kind, json.dumps(message["body"]).encode())
    found = _hash(body) if kind in REQUESTS else Order("default", "token admin", "request", body).digest
    assert found.hex() == message["hash"]


@pytest.mark.parametrize("kind", sorted(FROZEN))
def test_the_old_version_understands_what_is_said_now(kind: str) -> None:
    """Nothing that it needs is gone, nothing has become something else, and what is new it may ignore."""
    new, old = REGISTRY[kind].model_json_schema(), FROZEN[kind]["schema"]
    assert list(_differences(new, old, new, old, NEW_WISHES.get(kind, set()))) == []


@pytest.mark.parametrize("kind", sorted(FROZEN))
def test_the_schemas_of_the_old_version_are_those_of_its_messages(kind: str) -> None:
    """So that the comparison above compares with something."""
    for message in FROZEN[kind]["messages"]:
        Draft202012Validator(FROZEN[kind]["schema"]).validate(message["body"])


def test_what_both_versions_declare_at_the_broker_they_declare_alike() -> None:
    """Whoever declares a queue otherwise than it is loses its channel, for as long as the other keeps it."""
    old = json.loads((BEFORE / "broker" / "topology.json").read_text())
    host = UUID(int=0)
    queues = {
        queue.name: {"arguments": queue.arguments, "durable": not queue.exclusive, "exclusive": queue.exclusive}
        for queue in (*topology.CORE_QUEUES, topology.host_queue(host))
    }
    exchanges = {exchange.name: exchange.kind.value for exchange in topology.CORE_EXCHANGES}
    assert {name: queues[name] for name in queues.keys() & old["queues"].keys()} == {
        name: old["queues"][name] for name in queues.keys() & old["queues"].keys()
    }
    assert exchanges == old["exchanges"], "an old process publishes to each of them"


def _told_otherwise(kind: str, field: str, **changes: Any) -> list[str]:
    """What the comparison says when one field of today's messages were another."""
    old = FROZEN[kind]["schema"]
    new = json.loads(json.dumps(old))
    new["properties"][field] |= changes
    if changes.get("default"):
        new["required"].remove(field)
    return list(_differences(new, old, new, old, set()))


def test_the_comparison_sees_what_an_old_version_would_stumble_over() -> None:
    assert _told_otherwise("host.desired", "generation", default=1) == [
        "generation may be missing",
        "the default of generation changed",
    ]
    assert _told_otherwise("host.desired", "generation", type="string") == ["generation: integer became string"]
    assert _told_otherwise("vm.create.v1", "vcpus", maximum=10**6)
    states = FROZEN["request.verdict.v1"]["schema"]["$defs"]["State"]["enum"]
    assert _told_otherwise("request.verdict.v1", "state", anyOf=[{"type": "string", "enum": [*states, "paused"]}])
    assert _told_otherwise("host.heartbeat", "zone", type="string") == []


#: What bounds a value, beside its type.
_BOUNDS = (
    "pattern",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "format",
)


def _differences(
    new: Mapping[str, Any], old: Mapping[str, Any], news: Mapping[str, Any], olds: Mapping[str, Any], wishes: set[str]
) -> Iterator[str]:
    """Where something that is valid by the new schema would not be by the old one."""
    new, old = _resolved(new, news), _resolved(old, olds)
    if choices := new.get("anyOf"):
        for choice in choices:
            yield from _differences(choice, old, news, olds, wishes)
        return
    if choices := old.get("anyOf"):
        found = [list(_differences(new, choice, news, olds, wishes)) for choice in choices]
        if all(found):
            yield from min(found, key=len)
        return
    if old.get("type", new.get("type")) != new.get("type"):
        yield f"{old.get('type')} became {new.get('type')}"
    if "enum" in old or "const" in old:
        values = {*new.get("enum", ()), *([new["const"]] if "const" in new else ())}
        known = {*old.get("enum", ()), *([old["const"]] if "const" in old else ())}
        if not values or values - known:
            yield f"values {sorted(values - known) or 'of any kind'} are new"
    for bound in _BOUNDS:
        if bound in old and new.get(bound) != old[bound]:
            yield f"{bound} {old[bound]} became {new.get(bound)}"
    for part in ("items", "additionalProperties"):
        if isinstance(old.get(part), Mapping) and isinstance(new.get(part), Mapping):
            yield from (f"[]: {found}" for found in _differences(new[part], old[part], news, olds, wishes))
    yield from _fields(new, old, news, olds, wishes)


def _fields(
    new: Mapping[str, Any], old: Mapping[str, Any], news: Mapping[str, Any], olds: Mapping[str, Any], wishes: set[str]
) -> Iterator[str]:
    mine, theirs = new.get("properties", {}), old.get("properties", {})
    for name in set(old.get("required", ())) - set(new.get("required", ())):
        yield f"{name} may be missing"  # what equals its default is not sent
    for name in mine.keys() & theirs.keys():
        inner = {wish.removeprefix(f"{name}.") for wish in wishes if wish.startswith(f"{name}.")}
        if _without(inner, mine[name].get("default")) != theirs[name].get("default"):
            yield f"the default of {name} changed"
        yield from (f"{name}: {found}" for found in _differences(mine[name], theirs[name], news, olds, inner))
    if old.get("additionalProperties") is False:
        yield from (f"{name} would be refused" for name in mine.keys() - theirs.keys() - wishes)


def _without(names: set[str], default: Any) -> Any:
    if not isinstance(default, dict):
        return default
    return {name: value for name, value in default.items() if name not in names}


def _resolved(schema: Mapping[str, Any], whole: Mapping[str, Any]) -> Mapping[str, Any]:
    while "$ref" in schema:
        schema = whole["$defs"][schema["$ref"].rpartition("/")[2]]
    return schema


# The processes themselves.

#: The last commit of the version before this one.
OLD = "a9bb0ea"
ROOMS = ("shared", "client", "deploy", "services/api", "services/conductor", "services/compute")
UP = """
import json, os, sys
from pathlib import Path
from leveret.stack import process
from leveret.stack.layout import Layout, Options
from leveret.stack.up import up

class Silent:
    def doing(self, what): ...
    def done(self, name, note=""): ...

process.BASE_ENV = {**process.BASE_ENV, "PYTHONPATH": os.environ["PYTHONPATH"]}
made = up(Layout(Path(sys.argv[1])), Options(**json.loads(sys.argv[2])), Silent())
print(json.dumps([made.url, made.token]))
"""


@contextmanager
def old_sources() -> Iterator[dict[str, str]]:
    """The environment in which Python finds the old version."""
    asked = ["git", "-C", str(ROOT), "archive", OLD]
    archive = subprocess.run(asked, capture_output=True, check=False, timeout=60)
    if archive.returncode:
        pytest.skip(f"commit {OLD} is not in this clone")
    directory = Path(tempfile.mkdtemp(prefix="leveret-test-"))
    try:
        subprocess.run(["tar", "-x", "-C", str(directory)], input=archive.stdout, check=True, timeout=60)
        yield {"PYTHONPATH": ":".join(str(directory / room) for room in ROOMS)}
    finally:
        shutil.rmtree(directory)


@contextmanager
def old_installation(env: dict[str, str]) -> Iterator[Installation]:
    """What the old version's `leveret up` makes: its database, its services."""
    root = Path(tempfile.mkdtemp(prefix="leveret-test-"))
    root.chmod(0o755)
    layout, options = Layout(root), Options(conductors=2, fake_hosts=8, libvirt=False, api_port=free_port())
    given = {"conductors": 2, "fake_hosts": 8, "libvirt": False, "api_port": options.api_port}
    try:
        made = subprocess.run(
            [sys.executable, "-c", UP, str(root), json.dumps(given)],
            env={"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": str(root), **env},
            capture_output=True,
            text=True,
            check=False,
            timeout=180,
        )
        assert made.returncode == 0, made.stderr
        url, token = json.loads(made.stdout)
        house = Installation(layout, options, Summary(url, token, (), (), ()))
        asyncio.run(house.query("INSERT INTO images VALUES ('tiny', 'file:///tiny', $1, 'raw')", "0" * 64))
        yield house
    finally:
        down(layout, Silent(), purge=True)
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def old() -> Iterator[tuple[Installation, dict[str, str]]]:
    with old_sources() as env, old_installation(env) as house:
        yield house, env


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_an_installation_is_renewed_under_load_one_process_after_the_other(
    old: tuple[Installation, dict[str, str]],
) -> None:
    """What `leveret up` does: database and broker first, then the services; here some go back. Nobody notices."""
    house, env = old
    load = Load(house, random.Random(22), is_cut_off=True)

    async def more(what: str) -> None:
        told = len(load.told)
        await eventually(lambda: len(load.told) > told + 10, within_s=60, what=f"some asked {what}")

    async def become(name: str, **version: str) -> None:
        await asyncio.to_thread(house.reconfigure, name, **{"PYTHONPATH": "", **version})
        await more(f"after {name}")

    async with load.going_on(pause_s=0.2):
        await more("before")
        dsn = house.postgres.dsn(OWNER, DATABASE)
        assert all(one.applied_at is None for one in (await status(dsn))[2:])
        assert await migrate(dsn)
        for user, (configure, write, read) in BROKER_USERS.items():
            await asyncio.to_thread(house.rabbit.create_user, user, configure=configure, write=write, read=read)
        await more("after the migration")
        await become("conductor-1")
        await become("fake-hosts")
        await become("conductor-1", **env)
        await become("conductor-2")
        await become("api")
        await become("fake-hosts", **env)
        await become("conductor-1")
        await become("fake-hosts")
    await load.is_kept()
    assert not await house.query("SELECT FROM rejections WHERE problem->>'code' <> 'vm_deleted'")
