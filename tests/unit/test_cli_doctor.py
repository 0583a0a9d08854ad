"""What `doctor` makes of what it finds."""

import os
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from leveret.client.cli import reaching
from leveret.client.cli.doctor import config_file
from leveret.client.config import Config, Context, Contexts, write_contexts
from leveret.shared.documents import HostView, ProjectView
from leveret.shared.errors import Code, Problem
from leveret.stack import health
from leveret.stack.layout import Layout
from leveret.stack.ports import free_port

pytestmark = pytest.mark.unit


LONG_AGO = datetime.now(UTC) - timedelta(hours=1)


def host(name: str = "h1", **changes: Any) -> HostView:
    fields: dict[str, Any] = {
        "id": uuid.uuid4(),
        "name": name,
        "zone": "a",
        "state": "up",
        "state_reason": None,
        "labels": {},
        "virt_type": "kvm",
        "vcpus": 4,
        "vcpus_used": 1,
        "memory_mib": 8192,
        "memory_mib_used": 1024,
        "disk_gib": 100,
        "disk_gib_used": 10,
        "vms": 1,
        "heartbeat_at": datetime.now(UTC),
    }
    return HostView(**(fields | changes))


def project(vms: int | None, used: int) -> ProjectView:
    quota = {"vms": vms, "vcpus": None, "memory_mib": None, "disk_gib": None}
    return ProjectView.model_validate(
        {
            "id": "default",
            "created_at": datetime.now(UTC),
            "quota": quota | {"requests_per_s": 500, "request_burst": 5000},
            "usage": {"vms": used, "vcpus": 1, "memory_mib": 1, "disk_gib": 1},
        }
    )


def test_a_private_file_is_fine_and_one_that_others_can_read_is_not(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    assert [one.level for one in config_file(path)] == ["ok"]
    write_contexts(Contexts("a", {"a": Context("http://x.test", "t")}), path)
    assert [one.level for one in config_file(path)] == ["ok"]
    path.chmod(0o644)
    (found,) = config_file(path)
    assert (found.level, found.advice) == ("warn", f"chmod 600 {path}")
    path.write_text("url = ")
    assert [one.level for one in config_file(path)] == ["fail"]


def test_a_token_file_that_is_gone_is_found(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    write_contexts(Contexts("a", {"a": Context("http://x.test", token_file=Path("gone"))}), path)
    assert [one.level for one in config_file(path)] == ["ok", "fail"]


@pytest.mark.parametrize(
    ("hosts", "levels"),
    [
        ([], ["fail"]),
        ([host(state="retired", heartbeat_at=LONG_AGO)], ["fail"]),
        ([host(state="retired")], ["fail", "fail"]),
        ([host()], ["ok"]),
        ([host(state="silent")], ["fail"]),
        ([host(), host("h2", state="silent")], ["warn", "ok"]),
        ([host(), host("h2", state="retired")], ["fail", "ok"]),
        ([host(problem=Problem.of(Code.DISK_FULL, "The pool is full."))], ["warn", "ok"]),
        ([host(), host("h2", state="cordoned")], ["warn", "ok"]),
        ([host(vcpus_used=4)], ["warn"]),
        ([host(memory_mib_used=8000), host("h2")], ["ok"]),
    ],
)
def test_hosts(hosts: list[HostView], levels: list[str]) -> None:
    assert [one.level for one in reaching.hosts(tuple(hosts))] == levels


@pytest.mark.parametrize(("limit", "used", "level"), [(None, 99, "ok"), (10, 8, "ok"), (10, 9, "warn"), (0, 0, "warn")])
def test_a_quota_that_is_nearly_used(limit: int | None, used: int, level: str) -> None:
    assert [one.level for one in reaching.quota(project(limit, used))] == [level]


@pytest.mark.parametrize(
    ("expires_in", "level"), [(None, "ok"), (timedelta(days=30), "ok"), (timedelta(days=3), "warn")]
)
def test_a_token_that_ends_soon(expires_in: timedelta | None, level: str) -> None:
    expires_at = (datetime.now(UTC) + expires_in).isoformat() if expires_in else None
    identity = {"project": "p", "role": "member", "token": {"name": "ci", "expires_at": expires_at}}
    (found,) = reaching._token(identity)
    assert found.level == level
    assert "ci, member of project p" in found.text


def test_nobody_at_the_port_is_told_apart_from_an_unknown_name() -> None:
    *_, refused = reaching.api_findings(Config(f"http://127.0.0.1:{free_port()}", "t"))
    assert (refused.name, refused.level) == ("tcp", "fail")
    *_, unknown = reaching.api_findings(Config("http://no-such-host.invalid", "t"))
    assert (unknown.name, unknown.level) == ("dns", "fail")


def test_a_machine_without_an_installation_is_judged_all_the_same(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    found = {one.name: one for one in health.findings(Layout(tmp_path / "state"))}
    assert found.keys() >= {"modules", "postgres", "kvm", "memory", "disk", "port", "processes", "images"}
    assert "yet" in found["processes"].text
    assert not (tmp_path / "state").exists(), "looking makes nothing"


def test_a_state_directory_that_servers_cannot_enter_is_found(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root's servers run under other accounts")
    tmp_path.chmod(0o700)
    found = list(health._accounts(Layout(tmp_path / "state")))
    assert [one.level for one in found] == ["fail"]
    assert "cannot enter" in found[0].text


def test_every_failure_says_what_to_do(tmp_path: Path) -> None:
    found = [*reaching.hosts(()), *reaching.quota(project(1, 1)), *health.findings(Layout(tmp_path / "state"))]
    assert all(one.advice for one in found if one.level != "ok")
