"""How long does it take to decide where a VM goes, and how well are hosts filled? The scheduling alone, no database.

Prints two tables; `--write` puts them into docs/benchmarks.md. Times are CPU times of the one thread that decides, so
that what else the machine does is not in them.
"""

import argparse
import math
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from uuid import UUID

import page

from leveret.conductor.scheduling import Chosen, Fleet, GroupView, Host, Refused, Wish

SIZES = (100, 1000, 10_000)
DECISIONS = 1000
#: vcpus, memory in MiB, disk in GiB.
Shape = tuple[int, int, int]
HOST_SHAPES: Sequence[Shape] = ((32, 131_072, 2000), (64, 262_144, 4000), (128, 524_288, 8000))
#: What is asked for, and how often.
MIXES: dict[str, dict[Shape, int]] = {
    "Kubernetes clusters": {(2, 4096, 40): 3, (4, 16_384, 100): 6, (8, 32_768, 100): 3, (16, 65_536, 200): 1},
    "general": {
        (1, 1024, 10): 6, (1, 2048, 20): 6, (2, 4096, 40): 6, (2, 8192, 40): 3, (4, 8192, 80): 4, (4, 16_384, 160): 3,
        (8, 16_384, 160): 2, (8, 65_536, 320): 1, (16, 32_768, 640): 1,
    },
    "large, and of memory or of CPUs": {
        (24, 32_768, 200): 2, (6, 98_304, 200): 2, (12, 49_152, 400): 2, (3, 6144, 50): 1,
    },
}  # fmt: skip


def shapes(mix: str, count: int, rng: random.Random) -> list[Shape]:
    weights = MIXES[mix]
    return rng.choices(list(weights), list(weights.values()), k=count)


def host(number: int, size: Shape, free: Shape, rng: random.Random) -> Host:
    """One of a fleet in three zones, in racks of 40, of two kinds of CPU; one in twenty is tainted."""
    return Host(
        id=UUID(int=rng.getrandbits(128), version=4),
        name=f"host-{number}",
        zone=f"zone-{number % 3}",
        state="up",
        healthy=True,
        labels={"rack": f"rack-{number // 40}", "cpu": rng.choice(("amd", "intel"))},
        taints={"gpu": "a10"} if number % 20 == 0 else {},
        vcpus=size[0],
        memory_mib=size[1],
        disk_gib=size[2],
        vcpus_free=free[0],
        memory_mib_free=free[1],
        disk_gib_free=free[2],
    )


def empty(count: int, rng: random.Random) -> list[Host]:
    sizes = [rng.choice(HOST_SHAPES) for _ in range(count)]
    return [host(number, size, size, rng) for number, size in enumerate(sizes)]


def nearly_full(count: int, rng: random.Random) -> list[Host]:
    """Of every resource a few hundredths are free on each host, at random."""

    def left(of: int) -> int:
        return max(0, int(of * rng.gauss(0.04, 0.03)))

    sizes = [rng.choice(HOST_SHAPES) for _ in range(count)]
    return [host(n, size, (left(size[0]), left(size[1]), left(size[2])), rng) for n, size in enumerate(sizes)]


def plain(shape: Shape, _number: int, _group: GroupView) -> Wish:
    return Wish(*shape)


def packed(shape: Shape, _number: int, _group: GroupView) -> Wish:
    return Wish(*shape, strategy="pack")


def constrained(shape: Shape, _number: int, group: GroupView) -> Wish:
    return Wish(*shape, zones=("zone-0", "zone-1"), require_labels={"cpu": "amd"}, group=group)


@dataclass(frozen=True, slots=True)
class Times:
    """What decisions took, in seconds of CPU."""

    placed_s: list[float]
    refused_s: list[float]

    def cells(self) -> str:
        every_s = [*self.placed_s, *self.refused_s]
        refused = f"{len(self.refused_s) / len(every_s):.0%}"
        cells = [f"{len(every_s) / sum(every_s):,.0f}", _ms(self.placed_s, 50), _ms(self.placed_s, 99), refused]
        return " | ".join([*cells, _ms(self.refused_s, 50), _ms(self.refused_s, 99)])


def _ms(times: list[float], percent: int) -> str:
    if len(times) < 2:
        return "-"
    return f"{statistics.quantiles(times, n=100, method='inclusive')[percent - 1] * 1000:.2f} ms"


def decide(hosts: list[Host], wish_of: Callable[[Shape, int, GroupView], Wish], rng: random.Random) -> Times:
    """Place a thousand VMs, ten of them a group."""
    fleet = Fleet(hosts)
    times = Times([], [])
    group = GroupView("spread", hard=True, topology="host")
    for number, shape in enumerate(shapes("general", DECISIONS, rng)):
        if number % 10 == 0:
            group = GroupView("spread", hard=True, topology="host")
        wish = wish_of(shape, number, group)
        began = time.thread_time()
        choice = fleet.choose(wish, rng)
        took = time.thread_time() - began
        if isinstance(choice, Refused):
            times.refused_s.append(took)
        else:
            times.placed_s.append(took)
            group = group.joined(choice.host.id, choice.host.zone)
    return times


def decide_all(hosts: list[Host], members: int, group: GroupView, rng: random.Random) -> Times:
    """Place fifty groups."""
    fleet = Fleet(hosts)
    times = Times([], [])
    for _ in range(50):
        wishes = [Wish(4, 16_384, 100)] * members
        began = time.thread_time()
        choice = fleet.choose_all(wishes, group, rng)
        took = time.thread_time() - began
        (times.refused_s if isinstance(choice, Refused) else times.placed_s).append(took)
    return times


def sorting_in_ms(count: int) -> tuple[float, float]:
    """Of a fleet from nothing, and of the same hosts once more, as they are read again."""
    times = []
    fleet = Fleet()
    for hosts in (empty(count, random.Random(1)), empty(count, random.Random(1))):
        began = time.thread_time()
        fleet.put(hosts)
        times.append((time.thread_time() - began) * 1000)
    return times[0], times[1]


def bytes_per_host(count: int) -> tuple[int, int]:
    """Of the hosts themselves, and of the order they are kept in."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        hosts = empty(count, random.Random(1))
        between = tracemalloc.get_traced_memory()[0]
        fleet = Fleet(hosts)
        after = tracemalloc.get_traced_memory()[0]
        assert len(fleet) == count
    finally:
        tracemalloc.stop()
    return (between - before) // count, (after - between) // count


def speed() -> str:
    apart = GroupView("spread", hard=True, topology="host")
    in_one_zone = GroupView("pack", hard=True, topology="zone")
    rows = [
        "| hosts | what | decisions/s | placed, p50 | p99 | refused | explained, p50 | p99 |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for count in SIZES:
        cases = {
            "plain, spread": decide(empty(count, random.Random(1)), plain, random.Random(2)),
            "plain, pack": decide(empty(count, random.Random(1)), packed, random.Random(2)),
            "zones, label, group": decide(empty(count, random.Random(1)), constrained, random.Random(2)),
            "nearly full": decide(nearly_full(count, random.Random(1)), plain, random.Random(2)),
            "3 at once, apart": decide_all(empty(count, random.Random(1)), 3, apart, random.Random(2)),
            "50 at once, apart": decide_all(empty(count, random.Random(1)), 50, apart, random.Random(2)),
            "50 at once, in one zone": decide_all(empty(count, random.Random(1)), 50, in_one_zone, random.Random(2)),
        }
        rows += [f"| {count:,} | {name} | {times.cells()} |" for name, times in cases.items()]
    of_hosts, of_order = bytes_per_host(SIZES[-1])
    first, again = sorting_in_ms(SIZES[-1])
    rows += [
        "",
        f"A host takes {of_hosts:,} bytes, and {of_order:,} more in the order that hosts are kept in. "
        f"To put {SIZES[-1]:,} in order takes {first:.0f} ms, and to take note of what they have now {again:.0f} ms.",
    ]
    return "\n".join(rows)


# How well hosts are filled. All are alike, so that their number says it all.

ALIKE: Shape = (64, 262_144, 4000)


def alike(count: int) -> list[Host]:
    rng = random.Random(1)
    return [replace(host(number, ALIKE, ALIKE, rng), taints={}) for number in range(count)]


def lower_bound(asked: Sequence[Shape]) -> int:
    """So many hosts are needed even if every VM could be cut into pieces."""
    sums: list[int] = [sum(column) for column in zip(*asked, strict=True)]
    return max(math.ceil(total / have) for total, have in zip(sums, ALIKE, strict=True))


def first_fit_decreasing(asked: Sequence[Shape]) -> int:
    """Hosts used when all VMs are known beforehand: the largest first, each on the first host with room for it."""
    free: list[list[int]] = []
    for shape in sorted(asked, key=lambda shape: max(s / a for s, a in zip(shape, ALIKE, strict=True)), reverse=True):
        room = next((one for one in free if all(s <= f for s, f in zip(shape, one, strict=True))), None)
        if room is None:
            free.append(room := list(ALIKE))
        room[:] = [f - s for s, f in zip(shape, room, strict=True)]
    return len(free)


def best_fit(asked: Sequence[Shape], count: int) -> int:
    """Hosts used, and VMs in the order asked: every host is looked at, the one with the least room afterwards taken."""
    hosts = alike(count)
    for shape in asked:
        wish = Wish(*shape)
        best = min((one for one in hosts if one.times(wish)), key=lambda one: one.room_left(wish))
        best.take(wish)
    return sum(1 for one in hosts if one.vms)


def hosts_used(asked: Sequence[Shape], count: int) -> int:
    """Hosts used by VMs that pack, in the order asked."""
    fleet, rng = Fleet(alike(count)), random.Random(1)
    used: set[UUID] = set()
    for shape in asked:
        choice = fleet.choose(Wish(*shape, strategy="pack"), rng)
        assert isinstance(choice, Chosen)
        used.add(choice.host.id)
    return len(used)


def share_at_first_refusal(asked: Sequence[Shape], count: int, wish: Callable[..., Wish]) -> float:
    """The share of the scarcest resource that is used when the first VM finds no host."""
    fleet, rng = Fleet(alike(count)), random.Random(1)
    used = [0, 0, 0]
    for shape in asked:
        if isinstance(fleet.choose(wish(shape, 0, GroupView("spread", False, "host")), rng), Refused):
            return max(u / (a * count) for u, a in zip(used, ALIKE, strict=True))
        used = [u + s for u, s in zip(used, shape, strict=True)]
    raise AssertionError("too few VMs for this fleet")


def filling() -> str:
    rows = [
        "| 1,000 VMs | least, if VMs could be cut up | first fit, largest first | best fit | pack | pack, at the first "
        "refusal | spread, at the first refusal |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for mix in MIXES:
        figures = []
        for seed in (1, 2, 3):
            asked = shapes(mix, 1000, random.Random(seed))
            least = lower_bound(asked)
            until = shapes(mix, 20_000, random.Random(seed))
            figures.append(
                (
                    least,
                    first_fit_decreasing(asked) / least,
                    best_fit(asked, 3 * least) / least,
                    hosts_used(asked, 3 * least) / least,
                    share_at_first_refusal(until, 50, packed),
                    share_at_first_refusal(until, 50, plain),
                )
            )
        least, *ratios, at_pack, at_spread = (statistics.mean(column) for column in zip(*figures, strict=True))
        cells = " | ".join(f"{ratio:.3f}" for ratio in ratios)
        rows.append(f"| {mix} | {least:.0f} hosts | {cells} | {at_pack:.1%} | {at_spread:.1%} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    arguments = parser.parse_args()
    text = f"{page.machine()}\n\n{speed()}\n\n{filling()}"
    print(text)
    if arguments.write:
        page.write("placing", text)


if __name__ == "__main__":
    main()
