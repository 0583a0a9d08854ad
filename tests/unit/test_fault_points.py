"""The table of fault points is whole: whatever a process does that outlives it is a step with a name."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from leveret.shared import fault_points
from leveret.shared.fault_points import POINTS, Deed, Fault, fault_point, take
from leveret.shared.lifecycle import Step

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    file
    for room in ("shared", "services/api", "services/conductor", "services/compute")
    for file in sorted((ROOT / room / "leveret").rglob("*.py"))
]

#: Calls that have an effect on Postgres, the broker or the hypervisor.
EFFECTS = {"transaction", "statement", "publish", "publish_raw", "post", "basic_ack", "declare_exchange"}
DEEDS = {"fetch_image", "make_disk", "make_config_drive", "define", "start", "stop", "reset", "mark", "remove"}
#: Where such calls stand outside a step, and why nothing is lost there.
BARE = {
    "shared/topology.py:declare": "declared again with every connection",
    "shared/bus/answering.py:_send": "an answer is a convenience, and requests.answer its step",
    "api/last_use.py:tell_once": "only ever shown",
    "conductor/database.py:transaction": "it is what steps are made of",
    "conductor/migrate.py:_apply": "migrations are told apart by their own table",
    "conductor/administration.py:carry_out": "a savepoint within requests.administer",
    "conductor/creating.py:_write_all": "a savepoint within requests.carry_out",
    "conductor/requests.py:_measure": "it reads",
    "conductor/identities.py:of": "it reads",
    "conductor/relay.py:_publish_some": "it reads",
    "conductor/invariants/hosts.py:_hosts": "it reads",
    "conductor/invariants/hosts.py:_rows": "it reads",
    "conductor/invariants/broker.py:_look": "it reads",
    "conductor/invariants/database.py:check_database": "it reads",
    "conductor/invariants/database.py:_look": "it reads",
    "compute/app.py:_post": "host.beat is its step",
    "compute/app.py:_reply": "the answer to a question that changes nothing",
}


def calls(tree: ast.Module) -> Iterator[tuple[ast.AsyncFunctionDef, ast.Call]]:
    """Every call with the innermost coroutine function around it."""

    def walk(node: ast.AST, within: ast.AsyncFunctionDef | None) -> Iterator[tuple[ast.AsyncFunctionDef, ast.Call]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Call) and within is not None:
                yield within, child
            yield from walk(child, child if isinstance(child, ast.AsyncFunctionDef) else within)

    return walk(tree, None)


def name_of(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def point_of(function: ast.AsyncFunctionDef) -> str | None:
    """The name that a decorator gives to this step."""
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call) and name_of(decorator.func) == "fault_point":
            assert isinstance(decorator.args[0], ast.Constant)
            return str(decorator.args[0].value)
    return None


def names_in(argument: ast.expr) -> set[str]:
    """The points that this first argument of `take` may name."""
    match ast.unparse(argument):
        case "f'vm.{step}'":
            return {f"vm.{step}" for step in Step if step not in {Step.SCHEDULING, Step.DISPATCHED}}
        case "f'{self._carries}.acknowledge'":
            return {f"{what}.acknowledge" for what in ("requests", "reports", "heartbeats", "commands")}
        case "f'{self._carries}.bury'":
            return {f"{what}.bury" for what in ("requests", "reports", "heartbeats", "commands")}
    return {argument.value} if isinstance(argument, ast.Constant) and isinstance(argument.value, str) else set()


TREES = {str(file).partition("/leveret/")[2]: ast.parse(file.read_text()) for file in SOURCES}
TAKEN = [
    call
    for tree in TREES.values()
    for _, call in calls(tree)
    if name_of(call.func) in {"take", "_do"} and len(call.args) > 1
]


def test_every_effect_is_part_of_a_step() -> None:
    stepped = {name_of(call.args[1]) for call in TAKEN}
    bare = set()
    for file, tree in TREES.items():
        for function, call in calls(tree):
            if name_of(call.func) not in EFFECTS or file == "shared/bus/publishing.py":
                continue
            if point_of(function) is None and function.name not in stepped:
                bare.add(f"{file}:{function.name}")
    assert bare == set(BARE)


def test_no_deed_of_the_hypervisor_is_done_but_as_a_step() -> None:
    done = {
        f"{file}:{function.name}"
        for file, tree in TREES.items()
        for function, call in calls(tree)
        if name_of(call.func) in DEEDS
        and isinstance(call.func, ast.Attribute)
        and name_of(call.func.value) in {"driver", "_driver"}
    }
    assert done == set()


def test_every_fault_point_is_the_name_of_a_step() -> None:
    nodes = (node for tree in TREES.values() for node in ast.walk(tree))
    named = [point for node in nodes if isinstance(node, ast.AsyncFunctionDef) and (point := point_of(node))]
    assert len(named) == len(set(named))
    assert set(named) | {name for call in TAKEN for name in names_in(call.args[0])} == set(POINTS)


@pytest.fixture
def plans(tmp_path: Path) -> Iterator[Path]:
    fault_points.arm(tmp_path)
    yield tmp_path
    fault_points.arm(None)


async def test_a_step_goes_wrong_once_and_only_as_planned(plans: Path) -> None:
    done: list[int] = []

    @fault_point("reports.apply")
    async def step(number: int) -> int:
        done.append(number)
        return number

    (plans / "reports.apply").write_text(Deed.FAIL_BEFORE)
    with pytest.raises(Fault):
        await step(1)
    assert (await step(2), done) == (2, [2])
    (plans / "reports.apply").write_text(Deed.FAIL_AFTER)
    with pytest.raises(Fault):
        await step(3)
    (plans / "reports.apply").write_text(Deed.TWICE)
    assert await step(4) == 4
    assert await step(5) == 5
    assert done == [2, 3, 4, 4, 5]


async def test_a_step_that_found_nothing_to_do_goes_wrong_later(plans: Path) -> None:
    async def poll(found: int) -> int:
        return found

    (plans / "sweeper.place").write_text(Deed.FAIL_AFTER)
    assert await take("sweeper.place", poll, 0) == 0
    with pytest.raises(Fault):
        await take("sweeper.place", poll, 1)


def test_a_step_that_is_not_in_the_table_cannot_be_named() -> None:
    with pytest.raises(ValueError, match="not in the table"):
        fault_point("nowhere.at_all")
