"""What every process holds, so that what is not given back shows."""

import asyncio
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import psutil

from chaos.house import Component
from leveret.stack.rabbitmq import Rabbit

#: What a process of ours may hold more after a quiet round than after the one before, which was just the same: a few
#: connections that a pool keeps, and what the allocator does.
MORE_FDS, MORE_THREADS, MORE_MIB, MORE_SHARE = 4, 4, 8.0, 0.05


#: One question, since asking costs half a second of a CPU.
_COUNT = "[length(rabbit_networking:connections()), length(rabbit_channel:list())]."


@dataclass(frozen=True, slots=True)
class Held:
    """One process: resident memory in MiB, open file descriptors, threads."""

    rss_mib: float
    fds: int
    threads: int


@dataclass(frozen=True, slots=True)
class Baseline:
    """All processes by name, and what the broker counts."""

    processes: Mapping[str, Held]
    connections: int
    channels: int


async def measure(components: Mapping[str, Component], rabbit: Rabbit) -> Baseline:
    held = {}
    for name, component in components.items():
        for process in component.processes()[:1]:
            with suppress(psutil.NoSuchProcess):
                rss_mib = process.memory_info().rss / 2**20
                held[name] = Held(round(rss_mib, 1), process.num_fds(), process.num_threads())
    connections, channels = json.loads(await asyncio.to_thread(rabbit.ctl, "eval", _COUNT))
    return Baseline(held, connections, channels)


def grown(before: Baseline, after: Baseline, ours: set[str]) -> list[str]:
    """What has more than it had: our own processes, and the broker's connections and channels."""
    found = []
    for name in sorted(ours):
        was, now = before.processes.get(name), after.processes.get(name)
        if was is None or now is None:
            found.append(f"{name} is not there")
            continue
        if now.fds > was.fds + MORE_FDS:
            found.append(f"{name} has {now.fds} file descriptors, and had {was.fds}")
        if now.threads > was.threads + MORE_THREADS:
            found.append(f"{name} has {now.threads} threads, and had {was.threads}")
        if now.rss_mib > was.rss_mib * (1 + MORE_SHARE) + MORE_MIB:
            found.append(f"{name} has {now.rss_mib} MiB, and had {was.rss_mib}")
    if after.connections > before.connections:
        found.append(f"the broker has {after.connections} connections, and had {before.connections}")
    if after.channels > before.channels:
        found.append(f"the broker has {after.channels} channels, and had {before.channels}")
    return found
