"""Which of the hosts that could take a VM should: one table."""

from collections.abc import Callable
from dataclasses import dataclass

from leveret.conductor.scheduling.host import Host
from leveret.conductor.scheduling.wish import Wish

#: Rooms that differ by less than this share of a host are alike, as far as images are concerned.
ALIKE = 1 / 16


def _group(host: Host, wish: Wish) -> float:
    group = wish.group
    if group is None:
        return 0.0
    members = group.by_host.get(host.id, 0) if group.topology == "host" else group.by_zone.get(host.zone, 0)
    return float(members if group.policy == "pack" else -members)


def _zone_balance(host: Host, wish: Wish) -> float:
    group = wish.group
    return 0.0 if group is None or group.policy == "pack" else -float(group.by_zone.get(host.zone, 0))


def _room(host: Host, wish: Wish) -> float:
    room = host.room_left(wish)
    return room if wish.strategy == "spread" else -room


def _room_class(host: Host, wish: Wish) -> float:
    return _room(host, wish) // ALIKE


def _image(host: Host, wish: Wish) -> float:
    return float(wish.image in host.images)


@dataclass(frozen=True, slots=True)
class Score:
    """`of` is larger for the better host. Of a wish that does not ask for it, it is the same for all."""

    of: Callable[[Host, Wish], float]
    asked_by: Callable[[Wish], bool]


#: In order of weight: a later one decides only among equals; after the last, chance does. The image comes after the
#: room's class and before the room itself. Were it first, every VM of one image would go to the few hosts that have it,
#: until they are full; were it last, it would never count. So who takes the VM that it has the image for is poorer by a
#: class sooner or later, and the image then moves to one more host: at most a sixteenth of a host is out of balance.
SCORES: dict[str, Score] = {
    "group": Score(_group, lambda wish: wish.group is not None),
    "zone_balance": Score(_zone_balance, lambda wish: wish.group is not None and wish.group.policy == "spread"),
    "room_class": Score(_room_class, lambda wish: wish.image is not None),
    "image": Score(_image, lambda wish: wish.image is not None),
    "room": Score(_room, lambda _wish: True),
}
