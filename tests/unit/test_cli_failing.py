"""Errors as people read them, exit codes as scripts do."""

import uuid
from datetime import UTC, datetime

import pytest

from leveret.client import errors
from leveret.client.cli import room
from leveret.client.cli.failing import Exit, exit_code, report
from leveret.client.cli.look import _explain
from leveret.client.cli.session import RetryNotice
from leveret.conductor.scheduling.constraints import CONSTRAINTS
from leveret.conductor.scheduling.explaining import CHANGES
from leveret.conductor.scheduling.refusal import Fit, Refused
from leveret.shared.documents import VmView
from leveret.shared.errors import Code, Problem, fail
from leveret.shared.lifecycle import Desired, State

pytestmark = pytest.mark.unit


def vm(problem: Problem | None = None) -> VmView:
    now = datetime.now(UTC)
    return VmView(
        id=uuid.UUID(int=7),
        project="default",
        name="web",
        state=State.ERROR,
        step=None,
        desired=Desired.RUNNING,
        generation=1,
        observed_generation=0,
        vcpus=1,
        memory_mib=64,
        disk_gib=1,
        image="appliance",
        network="default",
        address=None,
        mac=None,
        ssh=None,
        host=None,
        zone=None,
        labels={},
        guest_ready=False,
        problem=problem,
        attempts=1,
        created_at=now,
        updated_at=now,
    )


def api(status: int, code: str = "internal") -> errors.ApiError:
    return errors.ApiError(status=status, code=code, message="It is so.")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (api(422), Exit.USAGE),
        (api(404), Exit.NOT_FOUND),
        (errors.NotFound("VM", "web"), Exit.NOT_FOUND),
        (api(409), Exit.CONFLICT),
        (api(412), Exit.CONFLICT),
        (errors.Ambiguous("web", ["1", "2"]), Exit.CONFLICT),
        (api(409, "no_capacity"), Exit.FAILED),
        (errors.VmFailed(vm(), "running"), Exit.FAILED),
        (fail(Code.DISK_FULL, "It is full."), Exit.FAILED),
        (errors.WaitTimedOut(vm(), "running", 3), Exit.TIMED_OUT),
        (errors.Unreachable("http://x", "refused"), Exit.UNREACHABLE),
        (api(503), Exit.UNREACHABLE),
        (api(429), Exit.UNREACHABLE),
        (api(500), Exit.UNEXPECTED),
        (api(401), Exit.USAGE),
        (api(403), Exit.USAGE),
        (errors.EventGap(1, 5), Exit.FAILED),
        (errors.ConfigError("where?"), Exit.USAGE),
        (RuntimeError("a defect"), Exit.UNEXPECTED),
    ],
)
def test_exit_codes(error: BaseException, code: Exit) -> None:
    assert exit_code(error) is code


def test_no_capacity_says_how_many_hosts_each_constraint_refused_and_what_would_fit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = errors.ApiError(
        status=409,
        code="no_capacity",
        message="None of the 12 hosts can take this VM.",
        hint="It would fit with 2048 MiB of memory (1 host), or in b (2 hosts).",
        request_id="req-1",
        details={
            "hosts": 12,
            "constraints": {"zone": 4, "memory_mib": 10},
            "only": {"zone": 2, "memory_mib": 8},
            "zones": ["a", "b"],
            "fits": [
                {"change": "memory_mib", "value": 2048, "hosts": 1},
                {"change": "zones", "value": "b", "hosts": 2},
                {"change": "group", "value": None, "hosts": 3},
            ],
            "largest": {"vcpus": 2, "memory_mib": 2048, "disk_gib": 40},
        },
    )
    assert report(error) is Exit.FAILED
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == [
        "error: None of the 12 hosts can take this VM. (no_capacity)",
        "   4 of 12 hosts are in another zone; 2 for this reason alone",
        "  10 of 12 hosts have too little memory free; 8 for this reason alone",
        "  it would fit with --memory 2G (1 host)",
        "  it would fit with --zone b (2 hosts)",
        "  it would fit without its group, or if that were soft (3 hosts)",
        "  zones there are: a, b",
        "  request id: req-1",
    ]


def test_no_capacity_of_several_says_how_many_would_fit_and_what_is_largest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    details = {
        "hosts": 1,
        "constraints": {"vcpus": 1, "aura": 1},
        "largest": {"vcpus": 2, "memory_mib": 1536, "disk_gib": 40, "gpu": 1},
        "vms": 3,
        "vms_fitting": 2,
    }
    report(errors.ApiError(status=409, code="no_capacity", message="No.", hint="Ask for less.", details=details))
    assert capsys.readouterr().err.splitlines() == [
        "error: No. (no_capacity)",
        "  hint: Ask for less.",
        "  of 3 VMs 2 would fit",
        "  1 of 1 hosts have too few vCPUs free",
        "  1 of 1 hosts are refused by aura",
        "  the most that one host has free: 2 vCPUs, 1536M memory, 40G disk, gpu 1",
    ]


def test_every_constraint_and_every_change_has_words() -> None:
    assert set(room._WHY) == set(CONSTRAINTS)
    assert set(CHANGES.values()) | {"vcpus", "memory_mib", "disk_gib"} == set(room._CHANGES)
    told = Refused(3, {"zone": 3}, {"zone": 2}, ["a"], [Fit("zones", "a", 2)], None, vms=2, vms_fitting=1).problem()
    assert set(told.details) <= room.FIELDS


def test_a_failed_vm_says_what_happened_on_every_host(capsys: pytest.CaptureFixture[str]) -> None:
    attempts = [{"host_id": "h1", "problem": {"code": "disk_full", "message": "No space.", "host": "host-1"}}]
    problem = Problem.of(Code.BUILD_FAILED, "No host could build it.", attempts=attempts)
    report(errors.VmFailed(vm(problem), "running"))
    told = capsys.readouterr().err
    assert "web: No host could build it. (build_failed)" in told
    assert "tried host-1: No space. (disk_full)" in told
    assert "leveret explain web" in told


def test_a_time_out_says_that_the_vm_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    report(errors.WaitTimedOut(vm(), "ready", 60))
    told = capsys.readouterr().err
    assert "not ready after 60 s: still error" in told
    assert "kept" in told


def test_a_defect_is_told_without_a_traceback_unless_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LEVERET_DEBUG", raising=False)
    assert report(ZeroDivisionError("division by zero")) is Exit.UNEXPECTED
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("LEVERET_DEBUG", "1")
    report(ZeroDivisionError("division by zero"))
    assert "ZeroDivisionError" in capsys.readouterr().err


DETAILS = [
    ({"quota": {"vms": {"limit": 1, "used": 1, "asked": 1}}}, ["VMs: 1 of 1 used, 1 more asked"]),
    (
        {"quota": {"memory_mib": {"limit": 2048, "used": 1536, "asked": 1024}, "disk_gib": {"limit": 5, "used": 9}}},
        ["memory: 1536M of 2G used, 1G more asked", "disk: 9G of 5G used"],
    ),
    ({"hosts": 3, "constraints": {"memory_mib": 3}}, ["3 of 3 hosts have too little memory free"]),
    ({"hosts": 0, "constraints": {}}, ["there is no host"]),
    ({"revision": "3.17"}, ["its revision is now 3.17"]),
    ({"retry_after_s": 1.5}, ["it may be asked again in 1.5 s"]),
    ({"after": 9, "last_seq": 4}, ["after: 9", "the newest event is 4"]),
    ({"something_new": {"a": [1, None], "b": True}}, ["something new: a 1, none, b yes"]),
]


@pytest.mark.parametrize(("details", "lines"), DETAILS)
def test_details_are_told_in_words(
    details: dict[str, object], lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    report(errors.ApiError(status=409, code="some_code", message="No.", details=details))
    assert capsys.readouterr().err.splitlines() == ["error: No. (some_code)", *(f"  {line}" for line in lines)]


def test_a_retry_after_of_the_header_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    details = {"retry_after_s": 2.0}
    report(errors.ApiError(status=429, code="rate_limited", message="Slower.", details=details, retry_after_s=2.0))
    assert capsys.readouterr().err.count("it may be asked again in 2 s") == 1


def test_an_api_that_does_not_answer_is_told_once_and_not_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    notice = RetryNotice()
    away = errors.Unreachable("http://leveret.test", "refused")
    notice(away, 0.3, 14.7)
    notice(errors.refusal("not_ready", "Not now.", status=503), 2.0, 13.0)
    assert capsys.readouterr().err == ""
    notice(away, 1.2, 13.8)
    notice(away, 3.0, 12.0)
    assert capsys.readouterr().err == "The API does not answer; trying again for 14 s.\n"


def test_a_deleted_vm_waits_for_no_host(capsys: pytest.CaptureFixture[str]) -> None:
    _explain(vm().model_copy(update={"state": State.DELETED, "desired": Desired.DELETED, "generation": 2}), [])
    assert "Waiting" not in capsys.readouterr().out
    _explain(vm().model_copy(update={"state": State.PENDING}), [])
    assert "Waiting for a host to confirm" in capsys.readouterr().out
