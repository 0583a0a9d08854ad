"""Orders of administrators that were judged, with what was said."""

from leveret.conductor.database import Connection
from leveret.conductor.rows import told
from leveret.shared.errors import Problem


async def judged(connection: Connection, project: str, request_id: str, digest: bytes) -> tuple[bool, Problem | None]:
    """Whether this very order was judged before, and why it was refused, if it was.

    Until the transaction ends nobody else judges it.
    """
    await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", f"{project} {request_id}")
    row = await connection.fetchrow(
        "SELECT problem FROM orders WHERE project_id = $1 AND request_id = $2 AND digest = $3",
        project,
        request_id,
        digest,
    )
    if row is None:
        return False, None
    return True, Problem.model_validate(row["problem"]) if row["problem"] is not None else None


async def note(connection: Connection, project: str, request_id: str, digest: bytes, problem: Problem | None) -> None:
    await connection.execute(
        "INSERT INTO orders (project_id, request_id, digest, problem) VALUES ($1, $2, $3, $4)",
        project,
        request_id,
        digest,
        told(problem) if problem is not None else None,
    )
