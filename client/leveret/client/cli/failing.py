"""Errors as a person reads them, and the exit code that a script reads."""

import os
import re
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import typer

from leveret.client import errors
from leveret.client.cli import room
from leveret.client.cli.columns import memory_text
from leveret.client.cli.output import paint


class Exit(IntEnum):
    """What the exit codes mean; they are part of the interface."""

    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    NOT_FOUND = 3
    CONFLICT = 4
    FAILED = 5
    TIMED_OUT = 6
    UNREACHABLE = 7
    INTERRUPTED = 130


_BY_CODE = {"no_capacity": Exit.FAILED, "no_address": Exit.FAILED}
_BY_STATUS = {
    400: Exit.USAGE,
    401: Exit.USAGE,  # as without a token: what was given does not serve
    403: Exit.USAGE,
    413: Exit.USAGE,
    415: Exit.USAGE,
    422: Exit.USAGE,
    404: Exit.NOT_FOUND,
    410: Exit.NOT_FOUND,
    409: Exit.CONFLICT,
    412: Exit.CONFLICT,
    429: Exit.UNREACHABLE,
    502: Exit.UNREACHABLE,
    503: Exit.UNREACHABLE,
    504: Exit.UNREACHABLE,
}


#: Where the command line knows better than the API what can be done.
_HINTS = {
    "unauthenticated": "`leveret doctor` says which token is used; `leveret context add NAME --url URL --replace` "
    "takes another one, `leveret token create` makes one.",
    "forbidden": "`leveret whoami` says what this token may do; an administrator's may do more (--context, "
    "--token-file).",
}


def exit_code(error: BaseException) -> Exit:
    match error:
        case errors.ApiError():
            return _BY_CODE.get(error.code) or _BY_STATUS.get(error.status, Exit.UNEXPECTED)
        case errors.NotFound():
            return Exit.NOT_FOUND
        case errors.Ambiguous():
            return Exit.CONFLICT
        case errors.VmFailed() | errors.EventGap():
            return Exit.FAILED
        case errors.WaitTimedOut():
            return Exit.TIMED_OUT
        case errors.Unreachable():
            return Exit.UNREACHABLE
        case errors.ConfigError():
            return Exit.USAGE
    return Exit.FAILED if _is_of_the_stack(error) else Exit.UNEXPECTED


def _is_of_the_stack(error: BaseException) -> bool:
    """Whether it is a LeveretError or a StackError: their classes are only loaded where one may be raised."""
    kinds = (("leveret.shared.errors", "LeveretError"), ("leveret.stack.errors", "StackError"))
    return any(
        module in sys.modules and isinstance(error, getattr(sys.modules[module], name)) for module, name in kinds
    )


#: What the library that reads the command line says, and what we say.
_USAGE = (
    (re.compile(r"^Value error, "), ""),
    (re.compile(r"^Input should be a valid integer.*"), "it is no whole number."),
    (re.compile(r"^Input should be a valid number.*"), "it is no number."),
    (re.compile(r"^Input should be a finite number.*"), "it is no number."),
    (re.compile(r"^Input should be greater than or equal to (\S+)$"), r"it must be at least \1."),
    (re.compile(r"^Input should be less than or equal to (\S+)$"), r"it may be at most \1."),
)


@contextmanager
def plain_usage_errors() -> Iterator[None]:
    """Let usage errors speak as a person would."""
    try:
        yield
    except typer.BadParameter as error:
        for pattern, plain in _USAGE:
            error.message = pattern.sub(plain, error.message)
        raise


def report(error: BaseException) -> Exit:
    """Say on standard error what went wrong, why, and what to do; return the exit code."""
    for line in explain(error):
        print(line, file=sys.stderr)
    if exit_code(error) is Exit.UNEXPECTED and not isinstance(error, errors.ClientError):
        if os.environ.get("LEVERET_DEBUG"):
            traceback.print_exception(error)
        else:
            print("  LEVERET_DEBUG=1 shows where it happened.", file=sys.stderr)
    return exit_code(error)


def explain(error: BaseException) -> Iterator[str]:
    match error:
        case errors.ApiError():
            yield _headline(error.message, error.code)
            when = {} if error.retry_after_s is None else {"retry_after_s": error.retry_after_s}
            yield from _body(_HINTS.get(error.code, error.hint), error.details | when)
            for fault in error.errors:
                yield _line(f"{fault.get('field', '')}: {fault.get('message', '')}")
            if error.request_id:
                yield _line(f"request id: {error.request_id}")
        case errors.VmFailed(vm=vm) if vm.problem:
            yield _headline(f"{vm.name}: {vm.problem.message}", vm.problem.code)
            yield from problem_lines(vm.problem)
            yield _line(f"more: leveret explain {vm.name}")
        case errors.VmFailed() | errors.NotFound() | errors.ConfigError():
            yield _headline(str(error))
        case errors.WaitTimedOut(vm=vm):
            yield _headline(str(error))
            going_on = (
                "Leveret goes on deleting it." if error.waited_for == "deleted" else "The VM is kept and goes on."
            )
            yield _line(going_on if vm else "The request is kept and will be carried out.")
            yield _line(f"hint: leveret events -f {vm.name}" if vm else "hint: leveret list")
        case errors.Ambiguous(ids=ids):
            yield _headline(str(error))
            yield _line(f"hint: give an id, for example {ids[0]}")
        case errors.EventGap():
            yield _headline(f"{error}.")
            yield _line(f"hint: leveret list shows how things stand; go on with --after {error.until}")
        case errors.Unreachable():
            yield _headline(str(error))
            yield _line("hint: `leveret doctor` says what is wrong; `leveret up` starts Leveret on this machine.")
        case _ if problem := getattr(error, "problem", None):
            yield _headline(problem.message, problem.code)
            yield from problem_lines(problem)
        case _ if _is_of_the_stack(error):
            yield _headline(str(error))
        case _:
            yield _headline(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def problem_lines(problem: Any) -> Iterator[str]:
    """Where, hint and details of a `leveret.shared.errors.Problem`."""
    where = ", ".join(
        part for part in (problem.step and f"step {problem.step}", problem.host and f"host {problem.host}") if part
    )
    if where:
        yield _line(f"at: {where}")
    yield from _body(problem.hint, problem.details)


def _body(hint: str, details: dict[str, Any]) -> Iterator[str]:
    of_room = "constraints" in details
    if hint and not (of_room and room.is_told_by_lines(details)):
        yield _line(f"hint: {hint}")
    for text in room.refusal_lines(details) if of_room else ():
        yield _line(text)
    for name, value in details.items():
        if of_room and name in room.FIELDS:
            continue
        for text in _DETAILS[name](value) if name in _DETAILS else [f"{name.replace('_', ' ')}: {_text(value)}"]:
            yield _line(text)


def _quota(value: Any) -> Iterator[str]:
    """What of each resource is used, and what this request would add."""
    for name, amounts in value.items() if isinstance(value, dict) else ():
        told = {key: _amount(name, amount) for key, amount in amounts.items() if isinstance(amount, int)}
        more = f", {told['asked']} more asked" if "asked" in told else ""
        yield f"{_RESOURCES.get(name, name)}: {told.get('used', '?')} of {told.get('limit', '?')} used{more}"


_RESOURCES = {"vms": "VMs", "vcpus": "vCPUs", "memory_mib": "memory", "disk_gib": "disk"}


def _amount(name: str, amount: int) -> str:
    if name == "memory_mib":
        return memory_text(amount)
    return f"{amount}G" if name == "disk_gib" else str(amount)


def _attempts(value: Any) -> Iterator[str]:
    for attempt in value if isinstance(value, list) else ():
        told = attempt.get("problem", attempt) if isinstance(attempt, dict) else {"message": attempt}
        host = told.get("host") or (attempt.get("host_id", "?") if isinstance(attempt, dict) else "?")
        yield f"tried {host}: {told.get('message', '')} ({told.get('code', '?')})"


def _faults(value: Any) -> Iterator[str]:
    for fault in value if isinstance(value, list) else ():
        yield f"{fault.get('field', '')}: {fault.get('message', '')}"


#: How the details of a problem are told that have more to say than their name and value.
_DETAILS: dict[str, Callable[[Any], Iterator[str]]] = {
    "quota": _quota,
    "attempts": _attempts,
    "errors": _faults,
    "revision": lambda value: iter([f"its revision is now {_text(value)}"]),
    "retry_after_s": lambda value: iter([f"it may be asked again in {_text(value)} s"]),
    "last_seq": lambda value: iter([f"the newest event is {_text(value)}"]),
}


def _text(value: Any) -> str:
    """Any JSON in words."""
    match value:
        case dict():
            return ", ".join(f"{key} {_text(item)}" for key, item in value.items()) or "none"
        case list():
            return ", ".join(_text(item) for item in value) or "none"
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:g}"
    return str(value)


def _headline(message: str, code: str = "") -> str:
    text = _wrapped(f"error: {message}" + (f" ({code})" if code else ""), "", "  ")
    return text.replace("error:", paint("error:", "bold red", sys.stderr), 1)


def _line(text: str) -> str:
    return _wrapped(text, "  ", "    ")


def _wrapped(text: str, first: str, rest: str) -> str:
    """Whole words in every line of a terminal; one line for a pipe. Lines that are there stay."""
    if not sys.stderr.isatty():
        return f"{first}{text}"
    width = max(40, min(shutil.get_terminal_size().columns, 120))
    lines = [
        textwrap.wrap(
            line, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False, break_long_words=False
        )
        for line in text.splitlines()
    ]
    return "\n".join(line for wrapped in lines for line in wrapped)
