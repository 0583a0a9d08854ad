"""What Schemathesis has to know of this API to get anywhere with it, and the checks that need to know more.

Loaded by the `schemathesis` command through SCHEMATHESIS_HOOKS; see tests/acceptance/test_rest_contract.py.
"""

import re
from typing import Any

import schemathesis
from schemathesis import Case, CheckContext, HookContext, Response
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance, use_after_free

#: The project of the token that everything is asked with: without it, nothing more could be asked.
OWN_PROJECT = "default"
_IS_A_HOST = re.compile(r"fake-[0-9]+|[0-9a-fA-F-]{36}")
#: Nobody waits long for one of some thousand requests.
WAIT_S = 0.1
#: Sound requests that are refused for what they name, or for what became of it meanwhile; not for how they are written.
REFUSED_FOR_GOOD_REASON = {"image_unknown", "network_unknown", "id_conflict", "precondition_failed", "rate_limited"}


@schemathesis.hook
def filter_case(context: HookContext, case: "Case[Any]") -> bool:
    named = case.path_parameters or {}
    if case.path.startswith("/v1/hosts/") and "/actions/" in case.path and _IS_A_HOST.fullmatch(str(named.get("host"))):
        return False  # all others live on them
    return not (named.get("project") == OWN_PROJECT and case.method.upper() in {"DELETE", "PATCH"})


@schemathesis.hook
def before_call(context: HookContext, case: "Case[Any]", kwargs: dict[str, Any]) -> None:
    _wait_shortly(case)
    if not _is_sound(case):
        return
    headers = case.headers
    if headers is not None and re.fullmatch(r"[0-9.]+", headers.get("If-Match", "")):
        headers["If-Match"] = f'"{headers["If-Match"]}"'  # Schemathesis takes quotes around a value for its own
    if isinstance(case.body, dict):
        _make_possible(case.body, is_for_one=case.method.upper() == "PUT")


def _wait_shortly(case: "Case[Any]") -> None:
    query = case.query if isinstance(case.query, dict) else {}
    if "wait" in query:
        query["timeout_s"] = WAIT_S
    if isinstance(query.get("wait_s"), int | float) and query["wait_s"] > WAIT_S:
        query["wait_s"] = WAIT_S


def _make_possible(body: dict[str, Any], *, is_for_one: bool) -> None:
    """A made-up image would only ever be unknown, a made-up zone have no host, and a made-up time be past.

    An id in the address is that of one VM; and a hundred at a time would soon be all that there is room for.
    """
    if "image" in body:
        body["image"] = {"name": "tiny"}
        body.pop("placement", None)
        body |= {"vcpus": 1, "memory_mib": 64, "disk_gib": 1}
        if body.get("count", 1) != 1:
            body |= {"count": 1 if is_for_one else 2, "name": None}
    if body.get("expires_at"):
        body["expires_at"] = "2099-12-31T23:59:59Z"


@schemathesis.check
def sound_requests_are_not_called_invalid(ctx: CheckContext, response: Response, case: "Case[Any]") -> bool | None:
    """The check of the same meaning, beside what no schema can say."""
    if response.status_code in {412, 422, 429}:
        problem = response.json()
        if problem["code"] in REFUSED_FOR_GOOD_REASON:
            return None
        if any(error["message"].startswith(("give at most", "give each key")) for error in problem.get("errors", ())):
            return None  # the sum over several parameters, or two values of one of them
    return positive_data_acceptance(ctx, response, case)


@schemathesis.check
def what_is_deleted_is_gone(ctx: CheckContext, response: Response, case: "Case[Any]") -> bool | None:
    """The check of the same meaning, but for VMs: deleting one takes time, and its story stays readable."""
    return None if case.path.startswith("/v1/vms/") else use_after_free(ctx, response, case)


def _is_sound(case: "Case[Any]") -> bool:
    return case.meta is not None and case.meta.generation.mode is GenerationMode.POSITIVE
