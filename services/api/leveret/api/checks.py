"""Checking the installation over REST: a conductor looks at every invariant, and says what is broken."""

from typing import Annotated

from fastapi import Depends, Request
from starlette.responses import Response

from leveret.api.asking import ask_for
from leveret.api.auth import Administrator
from leveret.api.bodies import body_of
from leveret.api.params import Nothing
from leveret.api.service import service_of
from leveret.shared.checks import CheckReport, RunCheck
from leveret.shared.errors import Code, fail

#: A check takes a moment when all is well, and some seconds when it has to look twice.
WAIT_S = 25.0


async def post_check(
    request: Request,
    identity: Administrator,
    document: Annotated[RunCheck, Depends(body_of(RunCheck, optional=True))],
    _params: Nothing,
) -> Response:
    ask = ask_for(request, identity, document)
    report = await service_of(request).requests.ask(ask, CheckReport, wait_s=WAIT_S)
    if report is None:
        raise fail(
            Code.UNAVAILABLE,
            f"No conductor has answered within {WAIT_S:.0f} s.",
            hint="Look whether a conductor runs, and at its log; then ask again.",
        )
    return Response(report.model_dump_json(), media_type="application/json", headers={"Cache-Control": "no-store"})
