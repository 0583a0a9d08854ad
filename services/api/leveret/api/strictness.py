"""What no address takes, wherever it is asked: a parameter twice, a name that is none, a condition on nothing."""

from collections.abc import Callable

from fastapi import Request

from leveret.api.headers import check_request_id, refuse_if_match
from leveret.api.params import REPEATED
from leveret.shared.errors import Code, fail


def strictness(*, writes: bool, conditional: bool) -> Callable[[Request], None]:
    """A dependency. `writes`: it changes something; `conditional`: it heeds If-Match.

    Raises LeveretError `invalid_request`.
    """

    def check(request: Request) -> None:
        _refuse_repeated(request)
        if writes:
            check_request_id(request)
        if writes and not conditional:
            refuse_if_match(request)

    return check


def _refuse_repeated(request: Request) -> None:
    """Of two values one would be dropped silently."""
    query = request.query_params
    twice = [name for name in query if name not in REPEATED and len(query.getlist(name)) > 1]
    if twice:
        errors = [{"field": name[:64], "message": "give it once"} for name in twice[:20]]
        raise fail(Code.INVALID_REQUEST, "The parameters are not valid.", errors=errors)
