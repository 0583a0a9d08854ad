"""`apply`: let VMs be as a file says."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from leveret.client.cli import failing
from leveret.client.cli.failing import Exit
from leveret.client.cli.output import Format, Output, emit_document, paint
from leveret.client.cli.session import confirm, connect, run
from leveret.client.cli.values import count
from leveret.client.errors import ClientError

if TYPE_CHECKING:
    from leveret.client.leveret import Leveret, Receipt, Target
    from leveret.shared.documents import CreateVm, UpdateVm, VmView

_RETRY_FOR_S = 15.0
_AT_ONCE = 16
_DONE = {"create": "created", "change": "changed", "delete": "deleted", "none": "unchanged"}
_STYLES = {"created": "green", "changed": "green", "deleted": "magenta", "unchanged": "dim"}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done with one VM. `differs` is what cannot be changed: [field, there, in the file]."""

    name: str
    action: str
    spec: "CreateVm | None" = None
    vm: "VmView | None" = None
    update: "UpdateVm | None" = None
    run: bool | None = None
    differs: tuple[tuple[str, str, str], ...] = ()

    @property
    def note(self) -> str:
        """What of a VM that is there is changed."""
        parts = []
        if self.update is not None:
            parts += [f"{key}={value}" if value is not None else f"{key}-" for key, value in self.update.labels.items()]
        if self.run is not None:
            parts.append("start" if self.run else "stop")
        return ", ".join(parts)


@dataclass(slots=True)
class Outcome:
    """What became of a plan."""

    plan: Plan
    vm: "VmView | None" = None
    error: ClientError | None = None
    result: str = ""
    note: str = field(default="")

    def document(self) -> dict[str, Any]:
        return {
            "name": self.plan.name,
            "id": str(self.vm.id) if self.vm else None,
            "result": self.result,
            "differs": [{"field": name, "there": old, "wanted": new} for name, old, new in self.plan.differs],
            "error": str(self.error) if self.error else None,
            "vm": self.vm.model_dump(mode="json") if self.vm else None,
        }


def apply(
    ctx: typer.Context,
    file: Annotated[
        Path, typer.Option("-f", "--file", metavar="FILE", help="YAML or JSON: VMs as documents or lists; - for stdin.")
    ],
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return when everything is accepted.")] = False,
    timeout: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="How long to wait.")] = 300,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete the VMs that --selector finds and the file does not have.")
    ] = False,
    labels: Annotated[
        list[str] | None, typer.Option("-l", "--selector", metavar="SELECTOR", help="Which VMs --prune may delete.")
    ] = None,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Prune without asking.")] = False,
    output: Output = Format.TABLE,
) -> None:
    """Make VMs what a file says.

    Those that are missing are made; those that differ are labelled, started or stopped.

    Each document is a request as the API takes it (name, image, vcpus, memory_mib, ...). VMs are matched by name.
    Labels in the file are all that a VM keeps; without `labels` or `running`, those stay as they are. What cannot be
    changed is named, and makes the exit code 4; the rest is done all the same. Keys and user-data are not compared.
    """
    if prune and not labels:
        raise typer.BadParameter("say with -l which VMs may be deleted.", param_hint="--prune")
    if labels and not prune:
        raise typer.BadParameter("it says what --prune may delete: give that too.", param_hint="--selector")
    if prune and not "".join(labels or []).strip(" ,"):
        raise typer.BadParameter("it is empty, which would be every VM.", param_hint="--selector")
    specs = wanted(text_of(file), str(file))

    async def body() -> list[Outcome]:
        async with connect(ctx, retry_for_s=_RETRY_FOR_S) as leveret:
            chosen = [vm async for vm in leveret.list(selector=",".join(labels or []))] if prune else []
            there = {vm.name: vm async for vm in leveret.list()}
            plans = [plan(spec, there.get(str(spec.name))) for spec in specs]
            surplus = _surplus(chosen, specs)
            if surplus and not dry_run:
                names = ", ".join(one.name for one in surplus)
                confirm(f"Delete {count(len(surplus), 'VM')} not in {file}: {names}?", yes)
            work = Work(leveret, None if no_wait else timeout, dry_run, output)
            done = await work.carry_out(plans)
            if surplus and any(one.error for one in done):
                print("Nothing is pruned, since not all of the file was applied.", file=sys.stderr)
                return done
            return done + await work.carry_out(surplus)

    try:
        done = run(body())
    except KeyboardInterrupt:
        print("\nInterrupted: what was accepted goes on. Apply the file again to go on.", file=sys.stderr)
        raise typer.Exit(Exit.INTERRUPTED) from None
    if output in {Format.JSON, Format.YAML}:
        emit_document([one.document() for one in done], output)
    _end(done)


def text_of(file: Path) -> str:
    """Raises a usage error when it cannot be read."""
    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"cannot read it: {error}", param_hint="--file") from error


def wanted(text: str, name: str) -> "list[CreateVm]":
    """The requests in a file. Raises a usage error that says in which document what is wrong."""
    import yaml

    from leveret.client.cli.faults import faults
    from leveret.shared.documents import CreateVm

    try:
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
    except yaml.YAMLError as error:
        raise typer.BadParameter(f"{name} is not YAML: {error}", param_hint="--file") from error
    listed = [item for document in documents for item in (document if isinstance(document, list) else [document])]
    found: dict[str, CreateVm] = {}
    wrong = []
    for number, item in enumerate(listed, start=1):
        if not isinstance(item, Mapping):
            wrong.append(f"VM {number}: must be a mapping, with `key: value` lines")
            continue
        title = f"VM {number} ({item['name']})" if isinstance(item.get("name"), str) else f"VM {number}"
        try:
            spec = CreateVm.model_validate(dict(item))
        except ValueError as error:
            wrong += [f"{title}: {one.field}: {one.message}" for one in faults(cast("Any", error), item, CreateVm)]
            continue
        if spec.count > 1:
            wrong.append(f"{title}: count: VMs are matched by name; write one for each")
        elif spec.name is None:
            wrong.append(f"{title}: name: is missing; VMs are matched by it")
        elif spec.name in found:
            wrong.append(f"{title}: there are two of this name")
        else:
            found[spec.name] = spec
    if wrong:
        raise typer.BadParameter("\n  ".join([f"{name} cannot be applied:", *wrong]), param_hint="--file")
    if not found:
        raise typer.BadParameter(f"{name} holds no VM.", param_hint="--file")
    return list(found.values())


def plan(spec: "CreateVm", vm: "VmView | None") -> Plan:
    """What makes this VM as the file says: a pure function."""
    from leveret.shared.documents import UpdateVm

    name = str(spec.name)
    if vm is None or vm.desired == "deleted":
        return Plan(name, "create", spec, vm)
    labels: dict[str, str | None] = {}
    if "labels" in spec.model_fields_set:
        labels = {key: None for key in vm.labels if key not in spec.labels}
        labels |= {key: value for key, value in spec.labels.items() if vm.labels.get(key) != value}
    run_it = None
    if "running" in spec.model_fields_set and spec.running is not (vm.desired == "running"):
        run_it = spec.running
    change = UpdateVm(labels=labels) if labels else None
    action = "change" if change or run_it is not None else "none"
    return Plan(name, action, spec, vm, change, run_it, _differences(spec, vm))


def _differences(spec: "CreateVm", vm: "VmView") -> tuple[tuple[str, str, str], ...]:
    """What a VM has that no request changes. Only what the file names is compared."""
    image = getattr(spec.image, "name", None) or getattr(spec.image, "url", "")
    pairs: dict[str, tuple[object, object]] = {
        "vcpus": (vm.vcpus, spec.vcpus),
        "memory_mib": (vm.memory_mib, spec.memory_mib),
        "disk_gib": (vm.disk_gib, spec.disk_gib),
        "network": (vm.network, spec.network),
        "image": (vm.image, image),
        "on_host_failure": (vm.on_host_failure, spec.on_host_failure),
    }
    found = [
        (name, str(there), str(asked))
        for name, (there, asked) in pairs.items()
        if name in spec.model_fields_set and there != asked
    ]
    zones = spec.placement.zones
    if vm.zone is not None and zones and vm.zone not in zones:
        found.append(("placement.zones", vm.zone, ", ".join(zones)))
    group = spec.placement.group
    if group is not None and vm.group != group:
        found.append(("placement.group", vm.group or "none", group))
    return tuple(found)


def _surplus(chosen: "Iterable[VmView]", specs: "Iterable[CreateVm]") -> list[Plan]:
    """What is to be done with the VMs that were chosen and that the file does not have."""
    kept = {spec.name for spec in specs}
    return [Plan(vm.name, "delete", vm=vm) for vm in chosen if vm.name not in kept and vm.desired != "deleted"]


class Work:
    """Carries plans out, some at the same time, and says of each what became of it."""

    def __init__(self, leveret: "Leveret", timeout_s: float | None, dry_run: bool, form: Format) -> None:
        self._leveret = leveret
        self._timeout_s = timeout_s
        self._dry_run = dry_run
        self._form = form

    async def carry_out(self, plans: list[Plan]) -> list[Outcome]:
        import asyncio

        at_once = asyncio.Semaphore(_AT_ONCE)

        async def one(plan: Plan) -> Outcome:
            outcome = Outcome(plan, plan.vm)
            async with at_once:
                try:
                    await self._do(plan, outcome)
                except ClientError as error:
                    outcome.error = error
                    outcome.result = "failed"
            self._tell(outcome)
            return outcome

        return list(await asyncio.gather(*(one(plan) for plan in plans)))

    async def _do(self, plan: Plan, outcome: Outcome) -> None:
        outcome.result = _DONE[plan.action]
        outcome.note = plan.note
        if self._dry_run:
            outcome.result = {"none": "unchanged"}.get(plan.action, f"would be {_DONE[plan.action]}")
            if plan.action == "create" and plan.spec and plan.vm is None:
                await self._leveret.create(plan.spec, dry_run=True)
            return
        match plan.action:
            case "create":
                await self._create(plan, outcome)
            case "delete" if plan.vm is not None:
                await self._follow(outcome, await self._leveret.delete(plan.vm.id), "deleted")
            case "change" if plan.vm is not None:
                await self._change(plan, plan.vm, outcome)

    async def _create(self, plan: Plan, outcome: Outcome) -> None:
        from leveret.shared import ids

        assert plan.spec is not None
        if plan.vm is not None and self._timeout_s is not None:  # its name is free once the old one is gone
            await self._leveret.wait(plan.vm.id, "deleted", timeout_s=self._timeout_s)
        receipt = await self._leveret.create(plan.spec, vm_id=ids.new_id())
        await self._follow(outcome, receipt, "running" if plan.spec.running else "stopped")

    async def _change(self, plan: Plan, vm: "VmView", outcome: Outcome) -> None:
        if plan.update is not None:
            outcome.vm = (await self._leveret.update(vm.id, plan.update)).vm or vm
        if plan.run is not None:
            act = self._leveret.start if plan.run else self._leveret.stop
            await self._follow(outcome, await act(vm.id), "running" if plan.run else "stopped")

    async def _follow(self, outcome: Outcome, receipt: "Receipt", target: "Target") -> None:
        """Until it has come true, unless nobody waits."""
        outcome.vm = receipt.vm or outcome.vm
        if self._timeout_s is not None:
            outcome.vm = await self._leveret.wait(receipt, target, timeout_s=self._timeout_s)

    def _tell(self, outcome: Outcome) -> None:
        if outcome.result == "failed" and outcome.error is not None:
            print(f"{outcome.plan.name}: {paint('failed', 'red', sys.stderr)}", file=sys.stderr)
            failing.report(outcome.error)
        elif self._form is Format.TABLE:
            result = paint(outcome.result, _STYLES.get(outcome.result, ""))
            vm = outcome.vm
            state = f", {vm.state}" if vm and vm.state != "deleted" and not self._dry_run else ""
            at = f" at {vm.address}" if vm and vm.address and outcome.result == "created" else ""
            note = f" ({outcome.note})" if outcome.note else ""
            print(f"{outcome.plan.name}: {result}{note}{state}{at}", flush=True)
        elif self._form is Format.NAME:
            print(outcome.plan.name, flush=True)
        for name, there, asked in outcome.plan.differs:
            text = f"  {outcome.plan.name}: {name} is {there} and cannot become {asked}"
            print(paint(text, "magenta", sys.stderr), file=sys.stderr, flush=True)


def _end(done: list[Outcome]) -> None:
    """The exit code: of the first failure, else 4 when something cannot be as the file says."""
    failures = [one.error for one in done if one.error is not None]
    if failures:
        raise typer.Exit(failing.exit_code(failures[0]))
    stuck = [one.plan.name for one in done if one.plan.differs]
    if stuck:
        print(
            f"hint: only a new VM can be otherwise: leveret delete {' '.join(stuck)}, then apply again.",
            file=sys.stderr,
        )
        raise typer.Exit(Exit.CONFLICT)
