"""Row 18 of the fault table: image servers that hang, trickle, cut short, lie, lead inwards and never end.

A whole worker with a real hypervisor fetches from them, and what counts is what users see: the reason, told before the
deadline; the other VMs, which run meanwhile; and the pool, where nothing is left.
"""

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import pytest
from peers import eventually
from real_host import OBEDIENT, RealHost, real_house

from leveret.client import Leveret
from leveret.shared.documents import CreateVm, ImageByUrl, Placement, VmView
from leveret.shared.errors import Code
from leveret.shared.ids import new_id
from leveret.shared.lifecycle import State

pytestmark = [pytest.mark.fault, pytest.mark.timeout(300)]

#: An address of this machine that no host may ask; images may only come from 127.0.0.1.
INNER = "127.0.0.2"
ALLOWED = ["127.0.0.1/32"]
#: Long enough for a server that sends nothing to be given up (20 s), and no longer than that takes on a busy machine.
BUILD_TIMEOUT_S = 90
REAL = Placement(zones=("default",))
HERE = hashlib.sha256(OBEDIENT).hexdigest()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealHost]:
    """A real host, and a simulated one in another zone, which can fetch everything."""
    directory = tmp_path_factory.mktemp("images")
    directory.chmod(0o755)
    settings = {
        "LEVERET_IMAGE_INNER_ALLOWED": json.dumps(ALLOWED),
        "LEVERET_IMAGE_MAX_BYTES": str(128 * 1024**2),
        "LEVERET_RESERVE_DISK_GIB": "0",
        "LEVERET_VCPU_RATIO": "32",
    }
    with real_house(directory, settings, fake_hosts=1) as host:
        host.house.reconfigure("fake-hosts", LEVERET_ZONE="elsewhere", LEVERET_HEARTBEAT_S="1")
        host.house.reconfigure("conductor-1", LEVERET_BUILD_TIMEOUT_S=str(BUILD_TIMEOUT_S))
        host.house.wait_ready()
        yield host


@pytest.fixture
async def client(host: RealHost) -> AsyncIterator[Leveret]:
    async with host.house.client() as client:
        yield client


# Servers.

Behaviour = Callable[["Site", asyncio.StreamWriter], Awaitable[None]]


def head(length: int | None = None, status: str = "200 OK", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers.items())]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode()


async def good(_site: "Site", writer: asyncio.StreamWriter) -> None:
    writer.write(head(len(OBEDIENT)) + OBEDIENT)


async def hang(_site: "Site", _writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def hang_half_way(_site: "Site", writer: asyncio.StreamWriter) -> None:
    writer.write(head(len(OBEDIENT)) + OBEDIENT[:100])
    await writer.drain()
    await asyncio.Event().wait()


async def trickle(_site: "Site", writer: asyncio.StreamWriter) -> None:
    writer.write(head(10_000_000))
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.2)


async def truncated(_site: "Site", writer: asyncio.StreamWriter) -> None:
    writer.write(head(len(OBEDIENT)) + OBEDIENT[:300])


async def wrong(_site: "Site", writer: asyncio.StreamWriter) -> None:
    writer.write(head(len(OBEDIENT)) + OBEDIENT[:-1] + b"x")


async def inwards(site: "Site", writer: asyncio.StreamWriter) -> None:
    writer.write(head(0, "302 Found", Location=f"http://{INNER}:{site.inner_port}/secret"))


async def endless(_site: "Site", writer: asyncio.StreamWriter) -> None:
    writer.write(head())
    while True:
        writer.write(bytes(1024 * 1024))
        await writer.drain()


async def missing(_site: "Site", writer: asyncio.StreamWriter) -> None:
    writer.write(head(0, "404 Not Found"))


BEHAVIOURS: dict[str, Behaviour] = {
    behaviour.__name__: behaviour
    for behaviour in (good, hang, hang_half_way, trickle, truncated, wrong, inwards, endless, missing)
}


class Site:
    """An image server that behaves as the path says, and another at an inner address that only counts who asks it."""

    def __init__(self) -> None:
        self.port = self.inner_port = 0
        self.asked: Counter[str] = Counter()
        self.asked_inside = 0

    def url(self, behaviour: str, host: str = "127.0.0.1", port: int | None = None) -> str:
        return f"http://{host}:{port or self.port}/{behaviour}/{new_id()}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        behaviour = request.split()[1].decode().split("/")[1]
        self.asked[behaviour] += 1
        await BEHAVIOURS[behaviour](self, writer)
        await writer.drain()

    async def serve_inside(self, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked_inside += 1
        writer.close()


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site()
    async with listening("127.0.0.1", site.serve) as site.port, listening(INNER, site.serve_inside) as site.inner_port:
        yield site
    assert site.asked_inside == 0, "nobody asked the inner address"


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listening(address: str, serve: Serve) -> AsyncIterator[int]:
    """Serve on a port of this address, which is given."""
    tasks: set[asyncio.Task[None]] = set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # who asked has gone
        finally:
            writer.close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(carry(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, address, 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# What is asked, and what must be.


def vm_of(url: str, sha256: str | None = None, placement: Placement = REAL) -> CreateVm:
    """A VM of an image that nobody has fetched yet, unless its hash is given."""
    image = ImageByUrl(url=url, sha256=sha256 or hashlib.sha256(url.encode()).hexdigest(), format="raw")
    return CreateVm(vcpus=1, memory_mib=64, disk_gib=1, image=image, placement=placement)


async def until_error(client: Leveret, vm_id: UUID) -> VmView:
    async def failed() -> VmView | None:
        vm = await client.get(vm_id)
        assert vm.state in {State.PENDING, State.BUILDING, State.ERROR}, vm
        return vm if vm.state is State.ERROR and vm.host is None else None

    found: VmView = await eventually(failed, within_s=2 * BUILD_TIMEOUT_S, what=f"{vm_id} in error, and cleaned up")
    return found


#: Each, with the code of the reason, and words of it.
FAULTS: dict[str, tuple[Code, str]] = {
    "hang": (Code.IMAGE_UNREACHABLE, "cannot be fetched"),
    "hang_half_way": (Code.IMAGE_UNREACHABLE, "KiB"),
    "trickle": (Code.IMAGE_UNREACHABLE, "KiB"),
    "truncated": (Code.IMAGE_UNREACHABLE, ""),
    "missing": (Code.IMAGE_UNREACHABLE, "404"),
    "wrong": (Code.IMAGE_HASH_MISMATCH, "sha256"),
    "inwards": (Code.IMAGE_FORBIDDEN, INNER),
    "inside": (Code.IMAGE_FORBIDDEN, INNER),
    "endless": (Code.IMAGE_TOO_LARGE, ""),
}


async def test_every_bad_server_fails_its_own_vms_with_the_reason_and_nobody_elses(
    host: RealHost, client: Leveret, site: Site
) -> None:
    left_before = {path.name for path in (host.pool / "images").iterdir()}
    urls = {name: site.url(name) for name in FAULTS if name != "inside"}
    urls["inside"] = site.url("good", INNER, site.inner_port)
    vms = {name: (await client.create(vm_of(url))).vm_id for name, url in urls.items()}
    many = [(await client.create(vm_of(site.url("hang")))).vm_id for _ in range(5)]
    await eventually(lambda: site.asked["hang"] + site.asked["trickle"] >= 4, within_s=30, what="servers are asked")

    # An image that is fetched now, and one that was fetched before: both are quicker than those who hang are given up.
    began = asyncio.get_running_loop().time()
    for _ in range(2):
        receipt = await client.create(vm_of(site.url("good"), HERE), wait="running", timeout_s=60)
        assert receipt.wait == "reached", receipt
    took_s = asyncio.get_running_loop().time() - began
    assert (await client.get(vms["hang"])).state is State.BUILDING, f"the good ones took {took_s:.1f} s"

    for name, (code, words) in FAULTS.items():
        vm = await until_error(client, vms[name])
        assert vm.problem is not None
        last = (vm.problem.details.get("attempts") or [vm.problem.model_dump()])[-1]
        assert (name, last["code"]) == (name, code)
        assert words in last["message"], (name, last)
        assert last["step"] == "image"
        assert last["host"]
        [told] = await host.house.query(
            """SELECT extract(epoch FROM e.at - v.created_at) AS after_s FROM events e JOIN vms v ON v.id = e.vm_id
            WHERE e.vm_id = $1 AND e.type = 'build_failed'""",
            vms[name],
        )
        assert told["after_s"] < BUILD_TIMEOUT_S, "the reason is told before the deadline"
    for vm_id in many:
        await until_error(client, vm_id)
    fetched = {path.name for path in (host.pool / "images").iterdir()} - left_before
    assert fetched == {f"{HERE}.raw"}, "nothing partial is left"
    assert site.asked["wrong"] == site.asked["inwards"] == site.asked["endless"] == 1, "no other host was tried"
    await remove_all(host, client)


async def test_what_one_host_cannot_fetch_is_tried_on_another(host: RealHost, client: Leveret, site: Site) -> None:
    """Perhaps only this one cannot reach it. What every host would find is not tried again."""
    await host.house.query("UPDATE hosts SET state = 'cordoned' WHERE virt_type = 'simulated'")
    anywhere = Placement()
    vm_id = (await client.create(vm_of(site.url("hang_half_way"), placement=anywhere))).vm_id
    bad_id = (await client.create(vm_of(site.url("wrong"), placement=anywhere))).vm_id
    await eventually(lambda: site.asked["hang_half_way"] == 1, within_s=30)
    await until_error(client, bad_id)
    await host.house.query("UPDATE hosts SET state = 'up' WHERE virt_type = 'simulated'")

    async def running() -> bool:
        return (await client.get(vm_id)).state is State.RUNNING

    await eventually(running, within_s=2 * BUILD_TIMEOUT_S, what="it runs elsewhere")
    rows = await host.house.query(
        "SELECT type, data FROM events WHERE vm_id = $1 AND type IN ('scheduled', 'build_failed') ORDER BY id", vm_id
    )
    assert [row["type"] for row in rows] == ["scheduled", "build_failed", "scheduled"]
    problem: dict[str, Any] = json.loads(rows[1]["data"])["problem"]
    assert problem["code"] == Code.IMAGE_UNREACHABLE
    assert site.asked["wrong"] == 1
    await remove_all(host, client)


@pytest.mark.parametrize("behaviour", ["hang", "trickle", "endless"])
async def test_a_delete_ends_the_fetch_at_once(host: RealHost, client: Leveret, site: Site, behaviour: str) -> None:
    left_before = {path.name for path in (host.pool / "images").iterdir()}
    vm_id = (await client.create(vm_of(site.url(behaviour)))).vm_id
    await eventually(lambda: site.asked[behaviour] == 1, within_s=30)
    began = asyncio.get_running_loop().time()
    assert (await client.delete(vm_id, wait=True, timeout_s=60)).wait == "reached"
    assert asyncio.get_running_loop().time() - began < 15, "nobody waits for the server"
    assert {path.name for path in (host.pool / "images").iterdir()} == left_before
    await remove_all(host, client)


async def remove_all(host: RealHost, client: Leveret) -> None:
    """Everything is deleted, and the installation is as it should be, on the host too."""
    living = [vm.id async for vm in client.list()]
    await asyncio.gather(*(client.delete(vm_id) for vm_id in living))

    async def gone() -> bool:
        return not [vm async for vm in client.list()]

    await eventually(gone, within_s=60, what="all gone")
    await host.agrees()
    assert host.files() == set()
    assert host.domains() == {}
