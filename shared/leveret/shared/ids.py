"""Identities that anybody can compute before anything exists."""

import hashlib
import os
import time
import uuid
from functools import lru_cache

#: Namespace of ids made from an Idempotency-Key: UUIDv5 of this and "project/key".
NAMESPACE = uuid.UUID("6c657665-7265-5400-8000-76656c657400")

_ADJECTIVES = (
    "able amber bold brave bright brisk calm clear clever cosy crisp dapper eager early fair fleet fond fresh "
    "gentle glad golden happy hardy honest jolly keen kind lively lucky mellow merry mild neat nimble noble patient "
    "plucky polite proud quick quiet ready rosy royal serene sharp shiny silver smart snug spry steady sunny swift "
    "tidy true vivid warm wise witty young zesty"
).split()
_ANIMALS = (
    "badger beaver bison bream camel cobra condor crane curlew dingo dolphin dove egret elk falcon ferret finch "
    "fox gecko gibbon heron hare ibex ibis jackal kestrel kite koala lark lemur leveret linnet lion llama lynx "
    "marten mole moose newt ocelot okapi orca otter owl panda pika plover puffin quail raven robin seal shrew "
    "stoat stork swan tapir tern thrush toad trout vole walrus wombat wren"
).split()


def new_id() -> uuid.UUID:
    """A UUIDv7 (RFC 9562): 48 bits of milliseconds since the epoch, then randomness, so that ids sort by age."""
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10))
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return uuid.UUID(int=value)


def id_for_key(project: str, key: str) -> uuid.UUID:
    """The VM id that `Idempotency-Key: key` means in a project."""
    return uuid.uuid5(NAMESPACE, f"{project}/{key}")


@lru_cache(maxsize=1024)  # a conductor asks again and again while it carries a request out
def ids_of(request: uuid.UUID, count: int) -> tuple[uuid.UUID, ...]:
    """The VMs that a request of this id is about: itself; of several, UUIDv5 of it and "1", "2" and so on."""
    if count == 1:
        return (request,)
    return tuple(uuid.uuid5(request, str(number)) for number in range(1, count + 1))


def name_for(vm_id: uuid.UUID) -> str:
    """The pleasant name of a VM whose owner gave none. The same id always has the same name."""
    digest = hashlib.sha256(vm_id.bytes).digest()
    adjective = _ADJECTIVES[digest[0] % len(_ADJECTIVES)]
    animal = _ANIMALS[digest[1] % len(_ANIMALS)]
    return f"{adjective}-{animal}-{digest[2:4].hex()}"


def mac_for(vm_id: uuid.UUID) -> str:
    """The MAC of a VM's first interface: locally administered, 40 bits from its id."""
    return ":".join(f"{octet:02x}" for octet in (0x0A, *hashlib.sha256(vm_id.bytes).digest()[:5]))
