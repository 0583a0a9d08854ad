"""Projects, quotas, tokens and broker users through the command line, against a whole installation."""

import json
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import aio_pika
import pytest
from commands import Cli, eventually, installed

from leveret.stack.rabbitmq import Rabbit

pytestmark = pytest.mark.acceptance


@pytest.fixture(scope="module")
def cli() -> Iterator[Cli]:
    with installed() as made:
        yield made


def holder(cli: Cli, token: str, name: str) -> Cli:
    """The command as somebody else runs it: with a context of their own for this token."""
    env = cli.env | {"XDG_CONFIG_HOME": str(cli.root / name)}
    theirs = Cli(cli.root, env)
    theirs("context", "add", name, "--url", cli.json("whoami")["url"], stdin=f"{token}\n")
    return theirs


def is_refused(cli: Cli, *args: str) -> bool:
    try:
        cli(*args, code=2)
    except AssertionError:
        return False
    return True


async def can_connect(url: str) -> bool:
    try:
        connection = await aio_pika.connect(url, timeout=10)
    except (aio_pika.exceptions.AMQPConnectionError, ConnectionError):
        return False
    await connection.close()
    return True


def test_whoami_says_who_asks_and_where(cli: Cli) -> None:
    found = cli.json("whoami")
    assert (found["project"], found["role"], found["context"]) == ("default", "admin", "local")
    assert re.search(r"^role +admin$", cli("whoami").stdout, re.MULTILINE)


def test_a_project_has_limits_that_hold_for_its_members(cli: Cli) -> None:
    cli("project", "create", "limited", "--vms", "1", "--vcpus", "8", "--memory", "none")
    assert "limited" in cli("project", "list", "-o", "name").stdout.split()
    made = cli("token", "create", "ci", "--project", "limited", "--expires", "30d", "-o", "name")
    assert made.stderr == ""
    member = holder(cli, made.stdout.strip(), "limited-ci")
    assert member.json("whoami")["project"] == "limited"
    member("create", "one")
    told = member("create", "two", code=4).stderr
    assert "(quota_exceeded)" in told
    assert "VMs: 1 of 1 used, 1 more asked" in told
    assert cli.json("quota", "show", "limited")["usage"]["vms"] == 1
    assert "(forbidden)" in member("quota", "set", "--vms", "5", code=2).stderr
    cli("quota", "set", "limited", "--vms", "none", "--disk", "1T")
    assert cli.json("project", "show", "limited")["quota"]["disk_gib"] == 1024
    member("create", "two")
    assert member.json("project", "show")["usage"]["vms"] == 2
    assert "(quota_exceeded)" in cli("quota", "set", "limited", "--vms", "1", code=4).stderr
    assert "one" not in cli("list", "-o", "name").stdout.split()


def test_another_projects_things_are_not_there(cli: Cli) -> None:
    cli("project", "create", "apart")
    cli("create", "theirs", "--no-wait")
    token = cli("token", "create", "ci", "-p", "apart", "-o", "name").stdout.strip()
    member = holder(cli, token, "apart-ci")
    assert "(project_not_found)" in member("project", "show", "default", code=3).stderr
    member("show", cli.json("show", "theirs")["id"], code=3)
    assert member("project", "list", "-o", "name").stdout == "apart\n"


def test_a_reader_looks_and_changes_nothing(cli: Cli) -> None:
    token = cli("token", "create", "eyes", "--role", "reader", "-o", "name").stdout.strip()
    reader = holder(cli, token, "eyes")
    assert reader("list").returncode == 0
    told = reader("create", "nothing", "--image", "tiny", code=2).stderr
    assert "(forbidden)" in told
    assert "leveret whoami" in told


def test_a_secret_is_told_once_and_a_revoked_token_works_no_longer(cli: Cli) -> None:
    made = json.loads(cli("token", "create", "short", "-o", "json").stdout)
    theirs = holder(cli, made["token"], "short")
    assert theirs("list").returncode == 0
    config = cli.root / "short/leveret/config.toml"
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    shown = cli("token", "list", "-a", "-o", "json").stdout + cli("token", "list").stdout
    assert made["token"] not in shown + theirs("context", "show").stdout + theirs("whoami").stdout
    assert "(name_taken)" in cli("token", "create", "short", code=4).stderr
    cli("token", "revoke", "short")
    eventually(lambda: is_refused(theirs, "list"), "the token is refused")
    assert "(unauthenticated)" in theirs("list", code=2).stderr
    assert json.loads(theirs("doctor", "--no-machine", "-o", "json", code=5).stdout)[-1]["name"] == "token"
    assert "short" not in cli("token", "list", "-o", "name").stdout.split()
    assert "short" in cli("token", "list", "-a", "-o", "name").stdout.split()
    cli("token", "revoke", "short", code=3)


def test_what_happens_to_a_project_is_in_its_events(cli: Cli) -> None:
    cli("project", "create", "logged")
    cli("quota", "set", "logged", "--vms", "3")
    told = cli("project", "events", "logged").stdout
    assert re.search(r"quota\.changed +vms=3 \(by token leveret up of default\)$", told, re.MULTILINE)
    kinds = [json.loads(line)["type"] for line in cli("project", "events", "logged", "-o", "json").stdout.splitlines()]
    assert kinds == ["project.created", "quota.changed"]


def test_a_closed_project_is_gone_with_its_tokens(cli: Cli) -> None:
    cli("project", "create", "closing")
    member = holder(cli, cli("token", "create", "ci", "-p", "closing", "-o", "name").stdout.strip(), "closing")
    member("create", "last", "--image", "tiny")
    assert "give --yes" in cli("project", "delete", "closing", code=2).stderr
    assert "(project_in_use)" in cli("project", "delete", "closing", "--yes", code=4).stderr
    member("delete", "last", "--wait")
    cli("project", "delete", "closing", "--yes")
    cli("project", "show", "closing", code=3)
    eventually(lambda: is_refused(member, "list"), "its token is refused")
    assert "(id_conflict)" in cli("project", "create", "closing", code=4).stderr


async def test_a_broker_user_is_made_rotated_and_removed_on_both_sides(cli: Cli) -> None:
    cli("project", "create", "bus")
    first = cli("project", "add-amqp-user", "bus", "robot", "-o", "name").stdout.strip()
    assert first.startswith("amqp://robot:")
    assert await can_connect(first)
    assert [user["name"] for user in cli.json("project", "amqp-users", "bus")] == ["robot"]
    again = cli("project", "add-amqp-user", "bus", "robot")
    assert again.stdout == ""
    assert "--rotate" in again.stderr
    assert await can_connect(first)
    second = cli("project", "add-amqp-user", "bus", "robot", "--rotate", "-o", "name").stdout.strip()
    assert await can_connect(second)
    assert not await can_connect(first)
    assert "(id_conflict)" in cli("project", "add-amqp-user", "default", "robot", code=4).stderr
    cli("project", "remove-amqp-user", "default", "robot", code=3)
    assert await can_connect(second)
    cli("project", "remove-amqp-user", "bus", "robot")
    assert not await can_connect(second)
    assert cli.json("project", "amqp-users", "bus") == []


@pytest.fixture
def elsewhere() -> Iterator[Rabbit]:
    """A broker that `leveret up` knows nothing of, with its management API."""
    root = Path(tempfile.mkdtemp(prefix="leveret-test-"))
    root.chmod(0o755)
    server = Rabbit(root / "rabbitmq", management=True)
    try:
        server.start()
        server.wait_ready()
        yield server
    finally:
        server.destroy()
        shutil.rmtree(root, ignore_errors=True)


async def test_a_broker_user_is_made_at_a_broker_elsewhere(cli: Cli, elsewhere: Rabbit) -> None:
    cli("project", "create", "remote")
    env = cli.env | {"LEVERET_BROKER_ADMIN_URL": elsewhere.management_url}
    remote = Cli(cli.root, env)
    url = remote("project", "add-amqp-user", "remote", "far", "-o", "name").stdout.strip()
    assert f"@127.0.0.1:{elsewhere.port}/" in url
    assert await can_connect(url)
    assert remote("project", "add-amqp-user", "remote", "far").stdout == ""
    remote("project", "remove-amqp-user", "remote", "far")
    assert not await can_connect(url)


def test_without_a_broker_nothing_is_recorded(cli: Cli) -> None:
    env = {name: value for name, value in cli.env.items() if name != "XDG_CONFIG_HOME"}
    whoami = cli.json("whoami")
    env |= {"LEVERET_URL": whoami["url"], "LEVERET_TOKEN": (cli.root / "state/token").read_text().strip()}
    told = Cli(cli.root, env)("project", "add-amqp-user", "default", "nowhere", code=2).stderr
    assert "LEVERET_BROKER_ADMIN_URL" in told
    assert cli.json("project", "amqp-users", "default") == []
