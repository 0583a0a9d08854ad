"""The verdict of a storm, as Markdown."""

import os
import platform
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from chaos import schedule
from chaos.baseline import MORE_FDS, MORE_MIB, MORE_SHARE, MORE_THREADS, Baseline
from chaos.case import LEGEND, Finding, counts
from chaos.history import Entry, Told, requests
from chaos.storm import CONVERGED_WITHIN_S, Result

SHOWN = 50

FAULTS = """\
`share` is what of all faults a component gets by its weight, were it not left alone for a while after each. Broker and
database together get about one of eight: each takes some ten seconds to come back, and a storm in which they never do
shows nothing. *Left out*: the component was still down, or there was no guest.

`kill` is SIGKILL, `restart` SIGTERM, `freeze` SIGSTOP for a while, `cut` ends all connections to broker or database,
`part` keeps them from being made again for a while, `hang` lets nothing through them for a while. What was killed is
started again after 0.5 to 1 s, as systemd would do it."""

ROUNDS = f"""\
Three rounds of the same VMs, made, stopped and deleted without a fault; this is what each process held after the second
and after the third. Leveret's own processes may have {MORE_FDS} file descriptors, {MORE_THREADS} threads, \
{MORE_SHARE:.0%} and {MORE_MIB:g} MiB more."""

LEGEND_HEAD = """\
A *request* is all attempts under one id. *Confirmed*: told 2xx, or confirmed by the broker. Every count is taken twice:
at rest after the storm, and when all VMs were deleted. *Converged* counts from the moment of the last kill, or from the
end of the last freeze or cut, until the clients know the fate of all requests that they have made, all processes are of
use, no VM waits for anything, every event is told, every host is heard of and the queues are empty. What there was no
time to ask before is asked then, without faults."""


def report(result: Result) -> str:
    """Everything that a reader needs to believe it, or to find out what went wrong."""
    plan = result.plan
    parts = [
        f"# Chaos: seed {plan.seed}, {'good' if result.is_good else 'NOT GOOD'}",
        _setting(result),
        "## Verdict",
        _verdict(result),
        *(["## Findings", _findings(result)] if not result.is_good else []),
        "## Requests",
        _requests(result),
        "## Faults",
        _faults(result),
        "## Quiet rounds",
        _rounds(result.baselines),
        "## What the counts mean",
        "\n".join([LEGEND_HEAD, "", *(f"* **{sort}**: {words}" for sort, words in LEGEND.items())]),
        "## Schedule",
        "```\n" + "\n".join(map(str, plan.faults)) + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _setting(result: Result) -> str:
    plan = result.plan
    guests = "one host with real guests (libvirt, QEMU without KVM), " if plan.guests else ""
    processes = ", ".join(component for component in plan.components if component != "qemu")
    command = f"script/chaos --seed {plan.seed} --minutes {plan.storm_s / 60:g} --requests {plan.requests}"
    return "\n".join(
        [
            f"{plan.requests} requests in {len(plan.lives)} lives over {plan.storm_s:.0f} s;",
            f"{len(plan.faults)} faults, one every {schedule.EVERY_S:g} s; {guests}{plan.hosts} simulated hosts.",
            f"Processes: {processes}.",
            "",
            f"`{command}{'' if plan.guests else ' --no-guests'}` makes the same schedule again.",
            f"Python {platform.python_version()}, {os.cpu_count()} CPUs.",
            f"The machine's load at the end of the storm was {result.load[0]:.1f}.",
        ]
    )


def _verdict(result: Result) -> str:
    asked, after = requests(_asked(result)), requests(result.history.entries)
    in_storm = requests(result.history.entries[: result.in_storm])
    outcomes = Counter(request.outcome for request in asked)
    rows = {
        "attempted": len(asked),
        "of these before the last fault was over": len(in_storm),
        "confirmed": outcomes["accepted"] + outcomes["confirmed"],
        "refused, with a reason": outcomes["refused"],
        "never known": outcomes["unknown"],
        "attempted afterwards (quiet rounds, clearing)": len(after) - len(asked),
        **{f"**{sort}**": number for sort, number in counts(result.findings).items()},
        "**not given back** (quiet rounds)": len(result.grown),
        f"converged after the last fault (limit {CONVERGED_WITHIN_S:.0f} s)": (
            "never" if result.converged_s is None else f"{result.converged_s:.1f} s"
        ),
    }
    return _table(("", ""), [(name, str(value)) for name, value in rows.items()])


def _asked(result: Result) -> list[Entry]:
    return result.history.entries[: result.asked]


def _findings(result: Result) -> str:
    lines = [f"* {_line(finding)}" for finding in result.findings[:SHOWN]]
    if (more := len(result.findings) - SHOWN) > 0:
        lines.append(f"* and {more} more")
    lines += [f"* **not given back**: {what}" for what in result.grown]
    if not result.is_finished:
        lines.append("* **unfinished**: some lives were not lived to their end")
    if not result.converged_in_time:
        lines.append(f"* **late**: {', '.join(f'{name} {what}' for name, what in result.late.items())}")
    return "\n".join(lines)


def _line(finding: Finding) -> str:
    return f"**{finding.sort}**: {finding.subject}: {finding.evidence}"


def _requests(result: Result) -> str:
    entries = _asked(result)
    asked = requests(entries)
    by_op: dict[str, Counter[str]] = {}
    for request in asked:
        by_op.setdefault(request.op, Counter())[request.outcome] += 1
    outcomes = ("accepted", "confirmed", "refused", "unknown")
    rows = [(op, *(str(found[outcome]) for outcome in outcomes)) for op, found in sorted(by_op.items())]
    refused = Counter(code for request in asked for code in set(request.refused))
    unknown = Counter(entry.code for entry in entries if entry.told is Told.UNKNOWN)
    doors = Counter(entry.via for entry in entries if entry.told is Told.INVOKE)
    errors = Counter(vm.code or "no code" for vm in result.there.vms if vm.state == "error")
    return "\n\n".join(
        [
            _table(("request", *outcomes), rows),
            f"{sum(request.attempts for request in asked)} attempts, by door: {_counted(doors)}.",
            f"Answers that told nothing, after which it was asked again: {_counted(unknown)}.",
            f"Refused: {_counted(refused)}.",
            f"From the first attempt to the verdict, retries included: {_took(result.took)}.",
            f"VMs in error at rest, explained: {_counted(errors)}.",
            f"Lives that were not begun, since there was no room for their guests in time: {result.unlived}.",
            f"Watchers that were told of a gap: {'; '.join(result.gaps) or 'none'}.",
        ]
    )


def _took(took: Mapping[str, list[float]]) -> str:
    return ", ".join(
        f"{kind} {statistics.median(times):.2f} s for half of them (worst {max(times):.1f} s)"
        for kind, times in took.items()
        if times
    )


def _faults(result: Result) -> str:
    shares = schedule.shares(result.plan.components)
    rows = []
    for component in result.plan.components:
        done = {deed: number for (one, deed), number in result.done.items() if one == component}
        left_out = sum(number for (one, _), number in result.skipped.items() if one == component)
        rows.append((component, f"{shares[component]:.0%}", _counted(done), str(left_out)))
    ended = ", ".join(f"{name} at {at_s:.0f} s" for at_s, name in result.ended) or "none"
    return "\n\n".join(
        [
            _table(("component", "share", "done", "left out"), rows),
            FAULTS,
            f"Processes that ended by themselves, and were started again: {ended}.",
            f"What the logs say that is worth a look: {_counted(result.said)}.",
        ]
    )


def _rounds(baselines: tuple[Baseline, ...]) -> str:
    if len(baselines) < 3:
        return "There were none."
    before, after = baselines[1], baselines[2]
    rows = [
        (
            name,
            f"{was.rss_mib:.0f} → {now.rss_mib:.0f}",
            f"{was.fds} → {now.fds}",
            f"{was.threads} → {now.threads}",
        )
        for name, now in sorted(after.processes.items())
        if (was := before.processes.get(name)) is not None
    ]
    counted = (
        f"The broker's connections: {before.connections} → {after.connections}, "
        f"channels: {before.channels} → {after.channels}."
    )
    return "\n\n".join([ROUNDS, _table(("process", "MiB", "file descriptors", "threads"), rows), counted])


def _counted(found: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(found.items())) or "none"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
