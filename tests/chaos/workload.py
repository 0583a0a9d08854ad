"""Whose lives the clients live: every request of a storm, drawn from a seed before it begins."""

import random
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from leveret.shared.ids import id_for_key

#: The projects that ask. The last one has a quota that it reaches.
PROJECTS = ("storm-a", "storm-b", "storm-c")
QUOTA_VMS = 200

#: Zones of the simulated hosts: two with room, one in which builds fail, one that is full now and then.
ROOMY, FLAKY, TIGHT = ("a", "b"), "flaky", "tight"
#: The zone, and a label, of the host with real guests: whatever does not ask for it stays away.
REAL = "real"
REAL_LABEL = {"guests": "real"}
#: Real guests at once, whatever is asked: each is a QEMU without KVM on a small machine.
REAL_AT_ONCE = 4

#: Names that several lives want at the same time.
SHARED_NAMES = ("phoenix", "lazarus", "phoebe")


class Door(StrEnum):
    """How a client asks."""

    REST = "rest"
    AMQP = "amqp"


@dataclass(frozen=True, slots=True)
class Step:
    """One request of a life, `after_s` seconds after the one before was answered.

    `times`: sent that often at once, under one id, through different doors. `quiet`: published without asking for a
    verdict. `until_settled`: only when the VM has come to rest, or that has taken too long. `if_error`: only if it is
    in error then.
    """

    op: str
    after_s: float = 0.0
    times: int = 1
    quiet: bool = False
    until_settled: bool = False
    if_error: bool = False
    with_next: bool = False


@dataclass(frozen=True, slots=True)
class Life:
    """One VM and what is asked of it. `at_s` counts from the storm's beginning."""

    number: int
    kind: str
    at_s: float
    project: str
    door: Door
    vm_id: str
    steps: tuple[Step, ...]
    zone: str | None = None
    name: str | None = None
    key: str | None = None

    def request_id(self, index: int) -> str:
        return f"{self.kind}-{self.number}-{index}"


# The kinds of lives: each function returns the steps of one.


def _plain(chance: random.Random) -> tuple[Step, ...]:
    """Made, used, and mostly deleted again."""
    steps = [Step("create", times=chance.choice((1, 1, 1, 2)))]
    for _ in range(chance.choice((0, 0, 1, 1, 2, 3))):
        op = chance.choices(("stop", "start", "reboot", "update"), (4, 3, 2, 2))[0]
        steps.append(
            Step(op, chance.uniform(0, 3), times=chance.choice((1, 1, 1, 2)), until_settled=chance.random() < 0.6)
        )
    if chance.random() < 0.85:
        steps.append(Step("delete", chance.uniform(0, 4), times=chance.choice((1, 1, 2))))
    return tuple(steps)


def _cancel(chance: random.Random) -> tuple[Step, ...]:
    """Deleted while it is built."""
    return (Step("create"), Step("delete", chance.uniform(0, 1.5)))


def _early(chance: random.Random) -> tuple[Step, ...]:
    """The delete comes first, or at the same time."""
    return (Step("delete", with_next=chance.random() < 0.6), Step("create"))


def _twice(chance: random.Random) -> tuple[Step, ...]:
    """Everything is sent two or three times at once."""
    middle = chance.choice(("stop", "reboot"))
    return (
        Step("create", times=3),
        Step(middle, chance.uniform(0, 2), times=2, until_settled=True),
        Step("delete", chance.uniform(0, 2), times=2),
    )


def _quiet(chance: random.Random) -> tuple[Step, ...]:
    """Published, confirmed by the broker, and never asked about."""
    steps = [Step("create", quiet=True), Step("stop", chance.uniform(0, 3), quiet=True, until_settled=True)]
    if chance.random() < 0.8:
        steps.append(Step("delete", chance.uniform(0, 3), quiet=True))
    return tuple(steps)


def _flaky(chance: random.Random) -> tuple[Step, ...]:
    """Where builds fail: tried again while it is in error."""
    again = Step("retry", chance.uniform(0, 1), until_settled=True, if_error=True)
    end = (Step("delete", chance.uniform(0, 3)),) if chance.random() < 0.9 else ()
    return (Step("create"), again, again, *end)


def _brief(chance: random.Random) -> tuple[Step, ...]:
    """Where room is scarce, or a name: had for a short while."""
    return (Step("create"), Step("delete", chance.uniform(0, 2), until_settled=chance.random() < 0.5))


def _guest(chance: random.Random) -> tuple[Step, ...]:
    """A real guest."""
    ops = chance.sample(("stop", "start", "reboot", "update"), chance.choice((0, 1, 2, 3)))
    middle = [Step(op, chance.uniform(0, 5), until_settled=True) for op in ops]
    return (Step("create"), *middle, Step("delete", chance.uniform(0, 8), until_settled=chance.random() < 0.8))


KINDS: Mapping[str, tuple[float, Callable[[random.Random], tuple[Step, ...]]]] = {
    "plain": (40, _plain),
    "cancel": (12, _cancel),
    "twice": (8, _twice),
    "early": (5, _early),
    "quiet": (8, _quiet),
    "flaky": (6, _flaky),
    "tight": (6, _brief),
    "name": (5, _brief),
    "key": (5, _plain),
    "burst": (5, _brief),
}
#: One life with a real guest for so many seconds of storm: each costs several seconds of a CPU.
GUEST_EVERY_S = 20.0
BURST = range(10, 30)
#: By then the last life has begun, as a share of the storm.
BEGUN = 0.93


def workload(seed: int, requests: int, storm_s: float, *, guests: bool) -> tuple[Life, ...]:
    """Lives with this many requests in all, or a few more.

    Retries are not counted, since they may not be needed, nor are requests for real guests: there may be no room.
    """
    chance = random.Random(f"requests {seed}")
    lives: list[Life] = []
    asked = 0
    if guests:
        for index in range(max(2, int(storm_s / GUEST_EVERY_S))):
            life = _life(chance, len(lives), "guest", _guest(chance), (index + chance.random()) * GUEST_EVERY_S)
            lives.append(replace(life, zone=REAL))
    while asked < requests:
        kind = chance.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]
        at_s = chance.uniform(0, BEGUN * storm_s)
        project, zone = chance.choice(PROJECTS), chance.choice((None, TIGHT))
        for _ in range(chance.choice(BURST) if kind == "burst" else 1):
            life = _life(chance, len(lives), kind, KINDS[kind][1](chance), at_s)
            life = replace(life, project=project, zone=zone) if kind == "burst" else life
            lives.append(life)
            asked += _requests_of(life)
            if asked >= requests:
                break
    return tuple(sorted(lives, key=lambda life: life.at_s))


def _requests_of(life: Life) -> int:
    return sum(not step.if_error for step in life.steps)


def _life(chance: random.Random, number: int, kind: str, steps: tuple[Step, ...], at_s: float) -> Life:
    life = Life(
        number=number,
        kind=kind,
        at_s=round(at_s, 3),
        project=chance.choice(PROJECTS),
        door=chance.choices((Door.REST, Door.AMQP), (3, 2))[0],
        vm_id=str(uuid.UUID(int=chance.getrandbits(128), version=4)),
        steps=steps,
    )
    match kind:
        case "flaky":
            return replace(life, zone=FLAKY)
        case "tight":
            return replace(life, zone=TIGHT)
        case "name":
            return replace(life, name=chance.choice(SHARED_NAMES))
        case "key":  # only REST has keys
            key = f"key-{number}"
            return replace(life, key=key, door=Door.REST, vm_id=str(id_for_key(life.project, key)))
        case "quiet":
            return replace(life, door=Door.AMQP)
    return life


def calm(number: int, first: int, lives: int) -> tuple[Life, ...]:
    """A quiet round after a storm, the same each time: `lives` VMs that are made, stopped and deleted."""
    steps = (Step("create"), Step("stop", until_settled=True), Step("delete", until_settled=True))
    chance = random.Random(f"calm {number}")
    made = [_life(chance, first + index, f"calm{number}", steps, index * 0.05) for index in range(lives)]
    return tuple(replace(life, zone=ROOMY[0]) for life in made)
