"""Which fault hits what, when, and for how long: drawn from a seed, so that it comes the same again."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

#: Seconds from one fault to the next.
EVERY_S = 2.0
#: How long systemd would wait before it starts a process again, in seconds.
DOWN_S = (0.5, 1.0)


class Deed(StrEnum):
    """What is done to a component."""

    KILL = "kill"  # SIGKILL; started again after a moment
    RESTART = "restart"  # SIGTERM, and started again at once
    FREEZE = "freeze"  # SIGSTOP, later SIGCONT
    CUT = "cut"  # all its connections to one server end at once; new ones may be made
    PART = "part"  # likewise, and for a while no new ones can be made
    HANG = "hang"  # its connections stay, and for a while nothing comes through


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. `at_s` counts from the storm's beginning; `for_s` is how long it lasts.

    `link` names the server of a connection that is cut. Of a component that is many, such as the guests, `pick` (0 to
    1) chooses one.
    """

    at_s: float
    component: str
    deed: Deed
    for_s: float
    link: str = ""
    pick: float = 0.0

    def __str__(self) -> str:
        link = f" from {self.link}" if self.link else ""
        return f"{self.at_s:7.2f} s  {self.deed} {self.component}{link} for {self.for_s:.2f} s"


@dataclass(frozen=True, slots=True)
class Kind:
    """What may be done to one kind of component, and how often.

    `weight` is its share of all faults; `deeds` are weights, too. For `rest_s` after a fault it is left alone: to come
    up again takes a broker some ten seconds, and a storm in which it never does shows nothing.
    """

    weight: float
    deeds: Mapping[Deed, float]
    freeze_s: tuple[float, float]
    rest_s: float


_SERVICE = {Deed.KILL: 6.0, Deed.RESTART: 1.0, Deed.FREEZE: 2.0, Deed.CUT: 1.5, Deed.PART: 1.5, Deed.HANG: 1.5}
_SERVER = {Deed.KILL: 6.0, Deed.RESTART: 2.0, Deed.FREEZE: 2.0}

#: By the beginning of a component's name. Broker and database together are hit by one fault of eight.
KINDS: Mapping[str, Kind] = {
    "conductor": Kind(3.0, _SERVICE, (1.0, 6.0), 5.0),
    "api": Kind(2.5, _SERVICE, (1.0, 6.0), 5.0),
    "fake-hosts": Kind(1.6, _SERVICE, (1.0, 28.0), 6.0),
    "compute": Kind(2.0, _SERVICE, (1.0, 8.0), 8.0),
    "libvirtd": Kind(1.2, _SERVER, (1.0, 5.0), 15.0),
    "qemu": Kind(2.2, {Deed.KILL: 7.0, Deed.FREEZE: 3.0}, (1.0, 5.0), 1.0),
    "rabbitmq": Kind(1.9, _SERVER, (1.0, 5.0), 30.0),
    "postgres": Kind(1.9, _SERVER, (1.0, 5.0), 20.0),
}
#: The services whose connections go through proxies, and to what: one of each kind, since a proxy costs as much as what
#: it stands before.
LINKS: Mapping[str, tuple[str, ...]] = {
    "conductor-3": ("rabbitmq", "postgres"),
    "api-2": ("rabbitmq", "postgres"),
    "fake-hosts-2": ("rabbitmq",),
    "compute": ("rabbitmq",),
}
_CUTS = frozenset({Deed.CUT, Deed.PART, Deed.HANG})


def kind_of(component: str) -> Kind:
    return KINDS[family(component)]


def family(component: str) -> str:
    """`api` of `api-2`."""
    return next(name for name in KINDS if component == name or component.startswith(f"{name}-"))


def schedule(seed: int, storm_s: float, components: Sequence[str], *, every_s: float = EVERY_S) -> tuple[Fault, ...]:
    """The faults of a storm: one every `every_s` seconds, and none of a component that may still be down."""
    chance = random.Random(f"faults {seed}")
    free_at = dict.fromkeys(components, 0.0)
    faults = []
    for number in range(int(storm_s / every_s)):
        at_s = round(number * every_s + chance.uniform(0, 0.5), 3)
        able = [component for component in components if free_at[component] <= at_s]
        if not able:
            continue
        fault = _fault(chance, at_s, chance.choices(able, [kind_of(one).weight for one in able])[0])
        free_at[fault.component] = at_s + fault.for_s + kind_of(fault.component).rest_s
        faults.append(fault)
    return tuple(faults)


def _fault(chance: random.Random, at_s: float, component: str) -> Fault:
    kind = kind_of(component)
    links = LINKS.get(component, ())
    deeds = {deed: weight for deed, weight in kind.deeds.items() if links or deed not in _CUTS}
    deed = chance.choices(list(deeds), list(deeds.values()))[0]
    link, pick = chance.choice(links or ("",)), round(chance.random(), 4)
    match deed:
        case Deed.KILL:
            for_s = chance.uniform(*DOWN_S)
        case Deed.FREEZE:
            # Most are short; the square makes few of them as long as they may be.
            low, high = kind.freeze_s
            for_s = low + (high - low) * chance.random() ** 2
        case Deed.PART | Deed.HANG:
            for_s = chance.uniform(1.0, 6.0)
        case _:
            for_s = 0.0
    return Fault(at_s, component, deed, round(for_s, 3), link if deed in _CUTS else "", pick)


def shares(components: Sequence[str]) -> dict[str, float]:
    """How many of all faults each component can expect, leaving aside that it is left alone for a while after one."""
    total = sum(kind_of(one).weight for one in components)
    return {one: kind_of(one).weight / total for one in components}
