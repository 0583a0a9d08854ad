"""Problems over HTTP: the table of statuses, the document, and the page that explains every code."""

from http import HTTPStatus
from pathlib import Path

import pytest

from leveret.api import errors_page, problems
from leveret.api.pages import errors_page as errors_html
from leveret.shared.errors import HINTS, Code, Problem

pytestmark = pytest.mark.unit

#: These say why a VM is not as wanted. No request is ever answered with one.
ONLY_IN_VMS = {
    Code.IMAGE_UNREACHABLE,
    Code.IMAGE_FORBIDDEN,
    Code.IMAGE_TOO_LARGE,
    Code.IMAGE_HASH_MISMATCH,
    Code.IMAGE_INVALID,
    Code.DISK_FULL,
    Code.DISK_FAILED,
    Code.CONFIG_DRIVE_FAILED,
    Code.NETWORK_FAILED,
    Code.DEFINE_FAILED,
    Code.START_FAILED,
    Code.STOP_FAILED,
    Code.DELETE_FAILED,
    Code.BUILD_FAILED,
    Code.BUILD_TIMEOUT,
    Code.STOP_TIMEOUT,
    Code.DELETE_TIMEOUT,
    Code.GUEST_SHUTDOWN,
    Code.GUEST_CRASHED,
    Code.HOST_REBOOTED,
    Code.HOST_FENCED,
    Code.HOST_RETIRED,
}


def test_every_code_has_a_status_or_is_only_told_inside_a_vm() -> None:
    assert set(problems.STATUS) | ONLY_IN_VMS == set(Code)
    assert not set(problems.STATUS) & ONLY_IN_VMS


def test_every_status_is_an_error_and_a_code_without_one_is_our_defect() -> None:
    assert all(status >= 400 for status in problems.STATUS.values())
    assert problems.status_of(Code.DISK_FULL) is HTTPStatus.INTERNAL_SERVER_ERROR


@pytest.mark.parametrize(
    ("code", "title"),
    [
        (Code.VM_NOT_FOUND, "VM not found"),
        (Code.AMQP_USER_NOT_FOUND, "AMQP user not found"),
        (Code.ID_CONFLICT, "ID conflict"),
        (Code.NO_CAPACITY, "No capacity"),
        (Code.NOT_FOUND, "Not found"),
    ],
)
def test_a_title_is_written_as_people_write(code: Code, title: str) -> None:
    assert problems.title_of(code) == title


def test_a_problem_document_has_the_fields_of_the_rfc_and_ours() -> None:
    problem = Problem.of(Code.NO_CAPACITY, "None of 3 hosts can take it.", refused_by={"memory_mib": 3}, host="h1")
    document = problems.view(problem, request_id="r-1", docs_url="/docs/errors").model_dump(
        mode="json", exclude_none=True
    )
    assert document == {
        "type": "/docs/errors#no_capacity",
        "title": "No capacity",
        "status": 409,
        "code": "no_capacity",
        "detail": "None of 3 hosts can take it.",
        "hint": HINTS[Code.NO_CAPACITY],
        "details": {"refused_by": {"memory_mib": 3}, "host": "h1"},
        "request_id": "r-1",
    }


def test_field_errors_stand_at_the_top_of_the_document() -> None:
    problem = Problem.of(Code.INVALID_REQUEST, "Not valid.", errors=[{"field": "vcpus", "message": "too few"}])
    document = problems.view(problem, request_id="r-1", docs_url="x").model_dump(mode="json", exclude_none=True)
    assert document["errors"] == [{"field": "vcpus", "message": "too few"}]
    assert "details" not in document


@pytest.mark.parametrize(
    ("code", "details", "header", "value"),
    [
        (Code.UNAVAILABLE, {}, "retry-after", "2"),
        (Code.RATE_LIMITED, {"retry_after_s": 7.2}, "retry-after", "8"),
        (Code.RATE_LIMITED, {"retry_after_s": "soon"}, "retry-after", "2"),
        (Code.UNAUTHENTICATED, {}, "www-authenticate", 'Bearer realm="leveret"'),
        (Code.BODY_TOO_LARGE, {}, "connection", "close"),
        (Code.VM_NOT_FOUND, {}, "retry-after", None),
    ],
)
def test_a_problem_says_in_its_headers_what_a_client_acts_on(
    code: Code, details: dict[str, object], header: str, value: str | None
) -> None:
    answer = problems.response(
        problems.view(Problem.of(code, "So it is.", **details), request_id="r-1", docs_url="x")  # type: ignore[arg-type]
    )
    assert answer.headers.get(header) == value
    assert answer.headers["content-type"] == "application/problem+json"


def test_every_code_is_explained() -> None:
    assert set(errors_page.MEANINGS) == set(Code)


def test_docs_errors_md_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs/errors.md"
    assert page.read_text() == errors_page.markdown(), "run: python -m leveret.api.errors_page docs/errors.md"


def test_the_type_of_every_problem_leads_to_a_section_of_the_served_page() -> None:
    html = errors_html()
    assert all(f'id="{code}"' in html for code in Code)
