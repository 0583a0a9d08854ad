"""Row 20 of the fault table: the database is restored from an older copy. Real guests, which know nothing of that."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import UUID

import pytest
from installation import Installation
from peers import eventually
from real_host import OBEDIENT, RealHost, guest, real_house

from leveret.client import Leveret
from leveret.shared.checks import CheckReport
from leveret.shared.documents import ImageByUrl
from leveret.shared.errors import Code
from leveret.shared.ids import new_id
from leveret.shared.lifecycle import State
from leveret.stack.account import Account
from leveret.stack.postgres import SUPERUSER, programs
from leveret.stack.process import BASE_ENV
from leveret.stack.up import DATABASE, OWNER

pytestmark = [
    pytest.mark.fault,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="a private libvirtd needs root"),
]

#: An image of which there is none in any cache.
OTHER = OBEDIENT.ljust(64 * 1024, b"\0")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealHost]:
    with real_house(tmp_path_factory.mktemp("images")) as host:
        yield host


@pytest.fixture
async def client(host: RealHost) -> AsyncIterator[Leveret]:
    async with host.house.client() as client:
        yield client


def copied(house: Installation) -> str:
    """The database as it is now, as SQL."""
    argv = [str(programs() / "pg_dump"), f"--dbname={house.postgres.dsn(SUPERUSER, DATABASE)}"]
    dumped = Account.for_service("postgres").run(argv, env=dict(BASE_ENV), timeout_s=60)
    assert dumped.returncode == 0, dumped.stderr
    return dumped.stdout


def restore(house: Installation, copy: str) -> None:
    """Stop what uses the database, put the copy in its place, and start everything again."""
    users = ("conductor-1", "api")
    for name in users:
        house.kill(name)
    house.postgres.drop_database(DATABASE)
    house.postgres.create_database(DATABASE, owner=OWNER)
    house.postgres.psql(copy, database=DATABASE)
    for name in users:
        house.restart(name)
    house.wait_ready()


async def newest_token(house: Installation) -> int:
    (row,) = await house.query("SELECT last_value FROM placement_tokens")
    return int(row["last_value"])


async def test_after_a_restore_hosts_keep_what_nobody_knows_and_what_both_know_goes_on(
    host: RealHost, client: Leveret
) -> None:
    kept, stopped, deleted = ids = [new_id() for _ in range(3)]
    await asyncio.gather(*(client.create(guest(), vm_id=vm_id) for vm_id in ids))
    await host.all_are(State.RUNNING, *ids)
    late = Path(host.house.layout.image_dir(host.house.options)) / "late.raw"
    image = ImageByUrl(url=late.as_uri(), sha256=hashlib.sha256(OTHER).hexdigest(), format="raw")
    hostless, remade = new_id(), new_id()
    await client.create(guest().model_copy(update={"image": image}), vm_id=hostless)
    await host.all_are(State.ERROR, hostless)
    host.house.freeze("compute")
    try:
        await client.create(guest().model_copy(update={"image": image}), vm_id=remade)
        copy = await asyncio.to_thread(copied, host.house)
    finally:
        host.house.thaw("compute")
    await host.all_are(State.ERROR, remade)

    # What happens now will be forgotten.
    unknown = [new_id() for _ in range(2)]
    await asyncio.gather(*(client.create(guest(), vm_id=vm_id) for vm_id in unknown))
    late.write_bytes(OTHER)
    await asyncio.gather(
        client.stop(stopped, grace_s=0), client.delete(deleted), client.retry(hostless), client.retry(remade)
    )
    await host.all_are(State.STOPPED, stopped)
    await host.all_are(State.DELETED, deleted)
    await host.all_are(State.RUNNING, *unknown, hostless, remade)
    before = host.domains()
    pids = {vm_id: host.qemu(vm_id).pid for vm_id in (kept, remade, hostless, *unknown)}
    given = await newest_token(host.house)
    await asyncio.to_thread(restore, host.house, copy)

    # What both know: the row's wish counts, in a generation and under a token that are no older than the host's.

    async def is_adopted() -> bool:
        vm = await client.get(stopped)
        return vm.state is State.RUNNING and vm.generation == vm.observed_generation == 3

    await eventually(is_adopted, within_s=60, what="the host's generation adopted, and what the row wants done")
    await host.all_are(State.RUNNING, kept, remade)
    # What the host has no more is explained, and not made again.
    (vm,) = await host.all_are(State.ERROR, deleted)
    assert vm.problem is not None
    assert vm.problem.code is Code.DOMAIN_MISSING
    # What nobody knows there is left alone, and told.
    report = await host.agrees(broken={"domain_has_a_vm", "domain_is_where_it_is_placed", "files_are_of_placed_vms"})
    assert named_by(report, "domain_has_a_vm") == set(unknown)
    assert named_by(report, "domain_is_where_it_is_placed") == {hostless}
    assert named_by(report, "files_are_of_placed_vms") == {*unknown, hostless}
    assert host.domains() == before | {stopped: "running"}
    assert {vm_id: host.qemu(vm_id).pid for vm_id in pids} == pids

    assert await newest_token(host.house) >= given
    await what_is_known_can_be_changed_and_deleted(host, client, [kept, stopped, deleted, remade], given)
    assert host.domains() == dict.fromkeys((hostless, *unknown), "running")


async def what_is_known_can_be_changed_and_deleted(
    host: RealHost, client: Leveret, known: list[UUID], given: int
) -> None:
    """As ever; and a new VM gets a token that no host has."""
    new = new_id()
    await client.create(guest(), vm_id=new)
    await host.all_are(State.RUNNING, new)
    (row,) = await host.house.query("SELECT token FROM vms WHERE id = $1", new)
    assert row["token"] > given
    await client.stop(known[-1], grace_s=0)
    await host.all_are(State.STOPPED, known[-1])
    await asyncio.gather(*(client.delete(vm_id) for vm_id in (*known, new)))
    await host.all_are(State.DELETED, *known, new)


def named_by(report: CheckReport, rule: str) -> set[UUID]:
    """The VMs that break a rule."""
    (found,) = [one for one in report.rules if one.name == rule]
    return {UUID(example["vm_id"]) for example in found.examples}
