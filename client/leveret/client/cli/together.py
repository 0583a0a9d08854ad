"""Several VMs at once: a failure with one does not keep the others from it."""

from collections.abc import Iterable

import typer

from leveret.client.cli import failing
from leveret.client.errors import ClientError


def outcome(results: Iterable[object]) -> None:
    """Report every failure among the results, and end with the exit code of the first. Raises what is a defect."""
    codes = []
    for failure in results:
        if not isinstance(failure, BaseException):
            continue
        if not isinstance(failure, ClientError):
            raise failure
        codes.append(failing.report(failure))
    if codes:
        raise typer.Exit(codes[0])
