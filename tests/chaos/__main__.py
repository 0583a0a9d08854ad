"""`python -m chaos`: see script/chaos --help."""

import argparse
import asyncio
import logging
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import uvloop

from chaos import house
from chaos.history import read
from chaos.report import report
from chaos.rules import judge
from chaos.snapshot import Snapshot
from chaos.storm import Plan, Result, Storm, plan

ROOT = Path(__file__).resolve().parents[2]
#: Requests a second, when no number is given: ten thousand in seven minutes.
RATE = 24.0


def run(what: Plan, directory: Path, *, image_dir: Path | None = None, keep: bool = False) -> Result:
    """A storm over an installation of its own; all that it leaves is in `directory`."""
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "logs").mkdir(parents=True)
    (directory / "schedule.txt").write_text("\n".join(map(str, what.faults)) + "\n")
    # What the clients' own libraries have to say of a broker that is killed; lives are not told of it.
    logging.basicConfig(
        filename=directory / "logs" / "clients.log",
        level=logging.WARNING,
        format="%(asctime)s %(name)s %(message)s",
        force=True,
    )
    began = time.monotonic()

    def say(words: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {words}", file=sys.stderr, flush=True)

    say(f"seed {what.seed}: {len(what.faults)} faults, {len(what.lives)} lives; starting everything")
    with house.standing(guests=what.guests, hosts=what.hosts, image_dir=image_dir) as installation:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            result = runner.run(_until_told(Storm(what, installation, directory, say)))
        if keep or not result.is_good:
            for server in (installation.rabbit, installation.postgres):
                if server.log_file.exists():
                    shutil.copyfile(server.log_file, directory / "logs" / f"{server.log_file.stem}.last.log")
    (directory / "report.md").write_text(report(result))
    if result.is_good and not keep:
        shutil.rmtree(directory / "logs")
    return result


def has_libvirt() -> bool:
    return os.geteuid() == 0 and shutil.which("libvirtd") is not None and shutil.which("qemu-system-x86_64") is not None


def main() -> int:
    parser = argparse.ArgumentParser(prog="script/chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=None, help="makes the same schedule again; default: a new one")
    parser.add_argument("--minutes", type=float, default=2.0, help="how long the storm lasts (default: %(default)g)")
    parser.add_argument("--requests", type=int, help=f"how many (default: {RATE:g} a second)")
    parser.add_argument("--no-guests", action="store_true", help="simulated hosts only: no libvirt, no QEMU")
    parser.add_argument("--directory", type=Path, help="default: build/chaos/SEED")
    parser.add_argument("--keep", action="store_true", help="keep the logs even when all is well")
    parser.add_argument("--show-schedule", action="store_true", help="print the schedule, and do nothing")
    parser.add_argument("--judge", type=Path, metavar="DIRECTORY", help="judge the history of an earlier storm again")
    asked = parser.parse_args()
    if asked.judge:
        return _judge_again(asked.judge)
    seed = asked.seed if asked.seed is not None else int.from_bytes(os.urandom(3))
    storm_s = asked.minutes * 60
    guests = not asked.no_guests and has_libvirt()
    what = plan(seed, storm_s, asked.requests or int(RATE * storm_s), guests=guests)
    if asked.show_schedule:
        print("\n".join(map(str, what.faults)))
        return 0
    directory = asked.directory or ROOT / "build" / "chaos" / str(seed)
    result = run(what, directory, keep=asked.keep)
    print((directory / "report.md").read_text())
    return 0 if result.is_good else 1


async def _until_told(storm: Storm) -> Result:
    """Whoever tells it to end waits until it has cleaned up."""
    # Starting and stopping processes blocks, and no fault may wait for another.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(max_workers=64))
    storming = asyncio.ensure_future(storm.run())
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, storming.cancel)
    return await storming


def _judge_again(directory: Path) -> int:
    entries = read(directory / "history.jsonl")
    findings = []
    for name in ("converged.json", "empty.json"):
        if (directory / name).exists():
            there = Snapshot.model_validate_json((directory / name).read_text())
            findings += judge(entries[: there.entries], there)
    print("\n".join(map(str, findings)) or "nothing found")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
