"""An administrator at work on one project: may they, and what became of what they asked for."""

from dataclasses import dataclass
from typing import Annotated, Any

import asyncpg
from fastapi import Depends, Path, Request
from pydantic import TypeAdapter, ValidationError

from leveret.api import queries
from leveret.api.asking import ask_for
from leveret.api.auth import Identity, Reader, may_administer
from leveret.api.requests import ASK_AGAIN
from leveret.api.service import service_of
from leveret.shared.documents import Document, ProjectId
from leveret.shared.errors import Code, LeveretError, fail
from leveret.shared.messages import explain

PROJECT_PATTERN = r"^[a-z][a-z0-9-]{0,61}$"

_PROJECT_ID: TypeAdapter[str] = TypeAdapter(ProjectId)

#: The pattern is described and not demanded by the framework: a project that cannot be is one that is not there.
ProjectPath = Annotated[str, Path(description="The project.", json_schema_extra={"pattern": PROJECT_PATTERN})]


@dataclass(frozen=True, slots=True)
class Desk:
    """One project on the desk of somebody who may look at it, or of an administrator."""

    request: Request
    project: str
    identity: Identity

    async def ask(self, document: Document, *, hint: str = ASK_AGAIN) -> None:
        """Return when it is committed. Raises what `Requests.judge` raises."""
        ask = ask_for(self.request, self.identity, document, project=self.project)
        await service_of(self.request).requests.judge(ask, hint=hint)

    async def row(self, query: str, *arguments: object) -> asyncpg.Record | None:
        return await service_of(self.request).database.row(self.project, query, self.project, *arguments)

    async def rows(self, query: str, *arguments: object) -> list[asyncpg.Record]:
        return await service_of(self.request).database.rows(self.project, query, self.project, *arguments)

    async def must_exist(self) -> asyncpg.Record:
        """The row of the project. Raises LeveretError `project_not_found`."""
        row = await self.row(queries.GET_PROJECT)
        if row is None:
            raise not_found()
        return row


async def may_look(request: Request, identity: Reader, project: ProjectPath) -> Desk:
    """A dependency: administrators anywhere, everybody in their own project."""
    if identity.project != project and identity.role != "admin":
        raise not_found()
    if not is_valid(_PROJECT_ID, project):
        raise not_found()
    return Desk(request, project, identity)


async def may_work(request: Request, identity: Reader, project: ProjectPath) -> Desk:
    """A dependency: administrators. Nobody else learns which other projects there are."""
    desk = await may_look(request, identity, project)
    await may_administer(identity)
    return desk


async def may_found(request: Request, identity: Reader, project: ProjectPath) -> Desk:
    """A dependency: administrators, for a project that need not be there yet. Nobody else learns whether it is."""
    await may_administer(identity)
    check(_PROJECT_ID, project, field="project")
    return Desk(request, project, identity)


def not_found() -> LeveretError:
    return fail(Code.PROJECT_NOT_FOUND, "There is no such project.")


def is_valid(kind: TypeAdapter[Any], value: str) -> bool:
    try:
        kind.validate_python(value)
    except ValidationError:
        return False
    return True


def check(kind: TypeAdapter[Any], value: str, *, field: str) -> None:
    """Raises LeveretError `invalid_request` for a part of the address that is not as described."""
    try:
        kind.validate_python(value)
    except ValidationError as error:
        errors = [{"field": field, "message": fault["message"]} for fault in explain(error)]
        raise fail(Code.INVALID_REQUEST, "The parameters are not valid.", errors=errors) from None


Looking = Annotated[Desk, Depends(may_look)]
Administering = Annotated[Desk, Depends(may_work)]
Founding = Annotated[Desk, Depends(may_found)]
