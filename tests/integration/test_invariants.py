"""Every invariant has a mutant that breaks it, and is found out by the rule it breaks."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import aio_pika
import asyncpg
import pytest
from conductor_world import World
from invariants import violations
from peers import as_delivery, eventually, tiny
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from leveret.compute.app import ComputeProcess
from leveret.compute.driver import Journal, Power
from leveret.compute.identity import take_identity
from leveret.compute.settings import ComputeSettings
from leveret.compute.simulated import SimulatedDriver
from leveret.conductor.checking import CheckDesk, Checker
from leveret.conductor.database import open_pool
from leveret.conductor.invariants import INVARIANTS, BrokerCheck, HostCheck, Place, check_database
from leveret.shared import topology
from leveret.shared.bus import Caller, Delivery, Link
from leveret.shared.checks import CheckReport, RunCheck
from leveret.shared.documents import DeleteVm, StartVm, StopVm
from leveret.shared.ids import new_id
from leveret.shared.lifecycle import State
from leveret.shared.messages import TYPE_OF
from leveret.stack.postgres import Postgres
from leveret.stack.rabbitmq import Rabbit

pytestmark = pytest.mark.integration

RUNS, FAILED, GONE = (UUID(int=n) for n in (1, 2, 3))

#: One VM that runs, one in error, one that is deleted; a rejection, a tombstone, and the log of it all.
SETTLED = f"""
INSERT INTO hosts (id, name, zone, epoch, virt_type, version, vcpus, memory_mib, disk_gib,
                   vcpus_used, memory_mib_used, disk_gib_used)
VALUES ('{UUID(int=9)}', 'h1', 'z1', 1, 'simulated', 'test', 8, 8192, 100, 1, 128, 1);

INSERT INTO vms (id, project_id, name, spec, spec_hash, vcpus, memory_mib, disk_gib, image, network, address, mac,
                 desired, host_id, token, state, observed_generation, problem)
SELECT v.id::uuid, 'default', v.name, '{{}}', decode(repeat('00', 32), 'hex'), 1, 128, 1, '{{}}', 'default',
       v.address::inet, 'm', v.desired, v.host::uuid, v.token, v.state, 1, v.problem::jsonb
FROM (VALUES
    ('{RUNS}', 'runs', '10.80.0.2', 'running', '{UUID(int=9)}', nextval('placement_tokens'), 'running', NULL),
    ('{FAILED}', 'failed', '10.80.0.3', 'running', NULL, NULL, 'error', '{{"code": "build_failed"}}'),
    ('{GONE}', 'gone', NULL, 'deleted', NULL, NULL, 'deleted', NULL)
) AS v (id, name, address, desired, host, token, state, problem);

UPDATE addresses SET vm_id = '{RUNS}' WHERE address = '10.80.0.2';
UPDATE addresses SET vm_id = '{FAILED}' WHERE address = '10.80.0.3';
UPDATE quotas SET vms_used = 2, vcpus_used = 2, memory_mib_used = 256, disk_gib_used = 2 WHERE project_id = 'default';

INSERT INTO events (project_id, vm_id, vm_name, seq, type, moved_from, state)
SELECT 'default', e.vm::uuid, 'x', row_number() OVER (), e.type, e.moved_from, e.state
FROM (VALUES
    ('{RUNS}', 'accepted', NULL, 'pending'), ('{RUNS}', 'scheduled', 'pending', 'building'),
    ('{RUNS}', 'running', 'building', 'running'),
    ('{FAILED}', 'accepted', NULL, 'pending'), ('{FAILED}', 'error', 'pending', 'error'),
    ('{GONE}', 'accepted', NULL, 'pending'), ('{GONE}', 'deleted', 'pending', 'deleted')
) AS e (vm, type, moved_from, state);
UPDATE projects SET last_seq = 7, published_seq = 7 WHERE id = 'default';

INSERT INTO groups (project_id, name, policy, enforcement, topology)
VALUES ('default', 'apart', 'spread', 'hard', 'host');
INSERT INTO rejections (vm_id, project_id, request_id, problem)
VALUES ('{UUID(int=4)}', 'default', 'r4', '{{"code": "no_capacity"}}');
INSERT INTO tombstones (vm_id, project_id) VALUES ('{UUID(int=5)}', 'default');
"""

#: What the database itself refuses: it has to look away for a mutant to be made.
DEFENCELESS = """
DO $$
DECLARE it record;
BEGIN
    FOR it IN SELECT conrelid::regclass AS t, conname FROM pg_constraint
              WHERE contype = 'c' AND connamespace = 'public'::regnamespace AND conrelid <> 0
    LOOP EXECUTE format('ALTER TABLE %s DROP CONSTRAINT %I', it.t, it.conname); END LOOP;
END
$$;
DROP INDEX vms_name, events_seq;
SET session_replication_role = replica;
"""

#: By rule, what breaks it. Whatever else a mutant breaks by its nature stands beside it.
DATABASE_MUTANTS: dict[str, tuple[tuple[str, set[str]], ...]] = {
    "vm_made_or_rejected": (
        (f"UPDATE rejections SET vm_id = '{RUNS}'", set()),
        ("UPDATE rejections SET problem = '{}'", set()),
    ),
    "deleted_id_stays_deleted": ((f"UPDATE tombstones SET vm_id = '{RUNS}'", set()),),
    "vm_accepted_once": (
        (f"UPDATE events SET type = 'progress' WHERE type = 'accepted' AND vm_id = '{RUNS}'", set()),
        (f"UPDATE events SET type = 'accepted' WHERE type = 'scheduled' AND vm_id = '{RUNS}'", set()),
        (f"DELETE FROM vms WHERE id = '{GONE}'", set()),
    ),
    "host_counters_match_placements": (("UPDATE hosts SET vcpus_used = 2", set()),),
    "host_not_overbooked": (("UPDATE hosts SET memory_mib = 127", set()),),
    "placement_fits_state": (
        (
            f"UPDATE vms SET host_id = '{UUID(int=9)}', token = nextval('placement_tokens') WHERE id = '{GONE}'",
            {"host_counters_match_placements"},
        ),
        (
            f"UPDATE vms SET host_id = NULL, token = NULL WHERE id = '{RUNS}'",
            {"host_counters_match_placements"},
        ),
    ),
    "placement_has_its_own_token": (
        (f"UPDATE vms SET token = NULL WHERE id = '{RUNS}'", set()),
        ("UPDATE vms SET token = 1000000 WHERE token IS NOT NULL", set()),
        (
            f"""UPDATE vms SET host_id = '{UUID(int=9)}', token = (SELECT token FROM vms WHERE id = '{RUNS}')
            WHERE id = '{FAILED}'""",
            {"host_counters_match_placements"},
        ),
    ),
    "group_kept": (
        (f"UPDATE vms SET group_name = 'apart' WHERE id = '{RUNS}'", set()),
        (
            f"""UPDATE vms SET group_name = 'apart', seat = id::text WHERE id IN ('{RUNS}', '{FAILED}');
            UPDATE vms SET host_id = '{UUID(int=9)}', token = nextval('placement_tokens') WHERE id = '{FAILED}'""",
            {"host_counters_match_placements"},
        ),
    ),
    "quota_counters_match_vms": (("UPDATE quotas SET vms_used = 3 WHERE project_id = 'default'", set()),),
    "quota_not_exceeded": (
        ("UPDATE quotas SET vcpus_max = 1 WHERE project_id = 'default'", set()),
        ("DELETE FROM quotas WHERE project_id = 'other'", set()),
    ),
    "name_has_one_vm": ((f"UPDATE vms SET name = 'runs' WHERE id = '{FAILED}'", set()),),
    "address_has_one_vm": ((f"UPDATE vms SET address = '10.80.0.2' WHERE id = '{FAILED}'", {"address_held_as_given"}),),
    "address_held_as_given": (
        (f"UPDATE addresses SET vm_id = '{GONE}' WHERE address = '10.80.0.9'", set()),
        (f"UPDATE addresses SET vm_id = NULL WHERE vm_id = '{RUNS}'", set()),
    ),
    "error_says_why": (
        (f"UPDATE vms SET problem = '{{}}' WHERE id = '{FAILED}'", set()),
        (f"UPDATE events SET type = 'progress' WHERE type = 'error' AND vm_id = '{FAILED}'", set()),
    ),
    "wait_has_deadline": (
        (f"UPDATE vms SET generation = 2 WHERE id = '{RUNS}'", set()),
        (f"UPDATE vms SET step = 'cleanup' WHERE id = '{FAILED}'", set()),
    ),
    "deadline_kept": ((f"UPDATE vms SET deadline = now() - interval '61 s' WHERE id = '{RUNS}'", set()),),
    "user_data_wiped": ((f"INSERT INTO vm_user_data VALUES ('{GONE}', 'x')", set()),),
    "secret_only_where_it_belongs": (
        (f"""UPDATE vms SET spec = '{{"user_data": "x"}}' WHERE id = '{RUNS}'""", set()),
        ("""UPDATE events SET data = '{"hash": "x"}' WHERE seq = 1""", set()),
    ),
    "event_told_in_time": (
        (
            """UPDATE events SET at = now() - interval '61 s';
            UPDATE projects SET published_seq = 6 WHERE id = 'default'""",
            set(),
        ),
        (
            "INSERT INTO events (project_id, type, at) VALUES ('default', 'x', now() - interval '61 s')",
            set(),
        ),
    ),
    "event_numbers_without_gap": (
        ("UPDATE events SET type = 'scheduled', seq = NULL WHERE seq = 2", set()),
        ("UPDATE projects SET last_seq = 8 WHERE id = 'default'", set()),
        ("UPDATE events SET seq = 2 WHERE seq = 1", set()),
        ("UPDATE projects SET published_seq = 8 WHERE id = 'default'", set()),
    ),
    "event_order_is_vm_order": (("UPDATE events SET seq = CASE seq WHEN 1 THEN 2 WHEN 2 THEN 1 ELSE seq END", set()),),
    "move_is_legal_and_logged": (
        (f"UPDATE vms SET state = 'stopped' WHERE id = '{RUNS}'", set()),
        ("UPDATE events SET moved_from = 'stopped' WHERE seq = 3", set()),
        (f"UPDATE events SET moved_from = NULL WHERE vm_id = '{RUNS}'", set()),
        (
            """UPDATE events SET state = 'running' WHERE seq = 2;
            UPDATE events SET moved_from = 'running' WHERE seq = 3""",
            set(),
        ),
    ),
}


@pytest.fixture
async def settled(database: str) -> AsyncIterator["asyncpg.Connection[Any]"]:
    """A database in which everything fits together, and that lets anything be broken."""
    connection = await asyncpg.connect(database)
    await connection.execute(SETTLED)
    assert await violations(connection) == {}
    await connection.execute(DEFENCELESS)
    yield connection
    await connection.close()


@pytest.mark.parametrize("rule", DATABASE_MUTANTS)
async def test_what_breaks_a_rule_of_the_database_is_found_out(settled: "asyncpg.Connection[Any]", rule: str) -> None:
    for mutant, others in DATABASE_MUTANTS[rule]:
        async with _undone(settled):
            await settled.execute(mutant)
            found = await violations(settled)
            assert set(found) == {rule} | others, (mutant, found)
    assert await violations(settled) == {}


@asynccontextmanager
async def _undone(connection: "asyncpg.Connection[Any]") -> AsyncIterator[None]:
    change = connection.transaction()
    await change.start()
    try:
        yield
    finally:
        await change.rollback()


async def test_a_hidden_conflict_of_ids_between_projects_is_none(settled: "asyncpg.Connection[Any]") -> None:
    await settled.execute(f"UPDATE rejections SET vm_id = '{RUNS}', project_id = 'other'")
    await settled.execute(f"UPDATE tombstones SET vm_id = '{RUNS}', project_id = 'other'")
    assert await violations(settled) == {}


async def test_events_that_were_forgotten_leave_no_gap(settled: "asyncpg.Connection[Any]") -> None:
    await settled.execute(f"DELETE FROM events WHERE vm_id = '{GONE}'; DELETE FROM vms WHERE id = '{GONE}'")
    assert set(await violations(settled)) == {"event_numbers_without_gap"}
    await settled.execute("UPDATE projects SET forgotten_seq = 7 WHERE id = 'default'")
    assert await violations(settled) == {}


async def test_a_conductor_may_look_at_everything_and_says_no_more_than_twenty_examples(
    settled: "asyncpg.Connection[Any]", postgres: Postgres, database: str
) -> None:
    await settled.execute(
        "INSERT INTO events (project_id, vm_id, type, state) "
        "SELECT 'default', gen_random_uuid(), 'accepted', 'pending' FROM generate_series(1, 50)"
    )
    role = f"looks_{uuid4().hex[:8]}"
    postgres.create_role(role)
    postgres.psql(f"GRANT leveret_conductor TO {role}")
    pool = await open_pool(postgres.dsn(role, database.rpartition("/")[2].partition("?")[0]), max_size=1)
    findings = await check_database(pool, set(Place), budget_s=30)
    late = await check_database(pool, set(Place), budget_s=0)
    await pool.close()
    assert findings.unchecked == []
    assert set(findings.looked_at) == set(DATABASE_MUTANTS)
    broken = findings.looked_at["vm_accepted_once"]
    assert (broken.count, len(broken.examples)) == (50, 20)
    assert {name for name, _ in late.unchecked} == set(DATABASE_MUTANTS)


# The broker and the hosts: a conductor, and a compute process with two simulated hosts.


@dataclass
class Stage:
    """A whole world at rest, and the grip to break it."""

    world: World
    checker: Checker
    compute: ComputeProcess
    link: Link
    rabbit: Rabbit

    @property
    def drivers(self) -> list[SimulatedDriver]:
        drivers = [worker.driver for worker in self.compute.workers]
        assert all(isinstance(driver, SimulatedDriver) for driver in drivers)
        return drivers  # type: ignore[return-value]

    async def broken(self) -> set[str]:
        """The rules that a check finds broken; it must have been able to look at everything."""
        report = await self.checker.check_once()
        assert report.unchecked == ()
        assert report.hosts_asked == 2
        return {rule.name for rule in report.rules if rule.broken}

    async def home_of(self, vm_id: UUID) -> tuple[SimulatedDriver, SimulatedDriver]:
        """The host of a VM, and the other one."""
        host_id = (await self.world.row(vm_id))["host_id"]
        at = [worker.agent.host_id for worker in self.compute.workers].index(host_id)
        return self.drivers[at], self.drivers[1 - at]

    @asynccontextmanager
    async def channel(self) -> AsyncIterator[Any]:
        connection = await aio_pika.connect(self.rabbit.url)
        async with connection:
            yield await connection.channel()


@pytest.fixture
async def stage(world: World, broker: Rabbit, tmp_path: Path) -> AsyncIterator[Stage]:
    settings = ComputeSettings(
        amqp_url=broker.url_of("leveret-compute"), host_state_dir=tmp_path, heartbeat_s=0.2, reserve_memory_mib=0
    )
    compute = ComputeProcess(settings, take_identity(tmp_path), simulate=2)
    pool = world.conductor.pool
    link, caller = Link(broker.url_of("leveret-conductor"), "test-check"), Caller("leveret-conductor")
    look = BrokerCheck(pool, confirm_s=0.5)
    link.add(caller)
    link.add(look)
    link.start()
    stop = asyncio.Event()
    running = asyncio.create_task(compute.run(stop))
    try:
        assert await link.wait_up(20)

        async def registered() -> bool:
            return bool(await world.db.fetchval("SELECT count(*) = 2 FROM hosts"))

        await eventually(registered, what="two hosts")
        yield Stage(world, Checker(pool, look, HostCheck(pool, caller, confirm_s=0.5)), compute, link, broker)
    finally:
        stop.set()
        await running
        await link.stop()
        async with await aio_pika.connect(broker.url) as connection:
            channel = await connection.channel()
            for worker in compute.workers:
                await channel.queue_delete(worker.queue.name)


async def _run_vm(world: World) -> UUID:
    vm_id = new_id()
    assert (await world.gateway.ask(vm_id, tiny())).accepted
    await world.until(vm_id, State.RUNNING)
    await world.until_ready(vm_id)
    return vm_id


async def _no_queue(stage: Stage, _vm: UUID) -> None:
    async with stage.channel() as channel:
        await channel.queue_delete(topology.DEAD_QUEUE.name)


async def _no_exchange(stage: Stage, _vm: UUID) -> None:
    async with stage.channel() as channel:
        await channel.exchange_delete(topology.DEAD.name)


async def _nobody_listens(stage: Stage, _vm: UUID) -> None:
    await stage.world.conductor.consumers[1].stop()


async def _stuck(stage: Stage, _vm: UUID) -> None:
    """A conductor that takes no reports any more, of which nobody has noticed yet."""
    await stage.world.conductor.consumers[1].stop()
    async with stage.channel() as channel:
        await channel.default_exchange.publish(aio_pika.Message(b"{}"), topology.REPORTS_QUEUE.name)


async def _dead_letter(stage: Stage, _vm: UUID) -> None:
    async with stage.channel() as channel:
        await channel.default_exchange.publish(aio_pika.Message(b"{}"), topology.DEAD_QUEUE.name)


async def _second_domain(stage: Stage, vm_id: UUID) -> None:
    home, other = await stage.home_of(vm_id)
    machine = home._machines[vm_id]
    other._machines[vm_id] = replace(machine)


async def _wrong_token(stage: Stage, vm_id: UUID) -> None:
    home, _ = await stage.home_of(vm_id)
    journal = home._machines[vm_id].journal
    assert isinstance(journal, Journal)
    home._machines[vm_id].journal = replace(journal, token=journal.token - 1)


async def _usurper(stage: Stage, vm_id: UUID) -> None:
    _, other = await stage.home_of(vm_id)
    other.add_foreign(vm_id)


async def _unknown_domain(stage: Stage, vm_id: UUID) -> None:
    home, _ = await stage.home_of(vm_id)
    machine = home._machines[vm_id]
    assert isinstance(machine.journal, Journal)
    stranger = uuid4()
    home._machines[stranger] = replace(machine, journal=replace(machine.journal, vm_id=stranger))


async def _no_domain(stage: Stage, vm_id: UUID) -> None:
    home, _ = await stage.home_of(vm_id)
    home._machines[vm_id].journal = None


async def _off(stage: Stage, vm_id: UUID) -> None:
    home, _ = await stage.home_of(vm_id)
    home._machines[vm_id].power = Power.OFF


async def _no_files(stage: Stage, vm_id: UUID) -> None:
    home, _ = await stage.home_of(vm_id)
    home._machines[vm_id].files = set()


async def _other_files(stage: Stage, vm_id: UUID) -> None:
    home, other = await stage.home_of(vm_id)
    other._machines[vm_id] = replace(home._machines[vm_id], journal=None, power=Power.OFF)


async def _stray_file(stage: Stage, _vm: UUID) -> None:
    stage.drivers[0].litter("notes.txt")


Mutant = Callable[[Stage, UUID], Awaitable[None]]
LIVING_MUTANTS: dict[str, tuple[tuple[Mutant, set[str]], ...]] = {
    "broker_is_furnished": ((_no_queue, set()), (_no_exchange, set())),
    "queue_is_consumed": ((_nobody_listens, set()),),
    "queue_gets_shorter": ((_stuck, {"queue_is_consumed"}),),
    "no_dead_letters": ((_dead_letter, set()),),
    "vm_runs_once": ((_second_domain, {"domain_is_where_it_is_placed", "files_are_of_placed_vms"}),),
    "domain_is_where_it_is_placed": ((_wrong_token, set()), (_usurper, set())),
    "domain_has_a_vm": ((_unknown_domain, {"files_are_of_placed_vms"}),),
    "vm_has_its_domain": ((_no_domain, set()), (_off, set())),
    "files_are_of_placed_vms": ((_no_files, set()), (_other_files, set())),
    "pool_holds_nothing_else": ((_stray_file, set()),),
}


@pytest.mark.parametrize(
    ("rule", "mutant", "others"),
    [
        pytest.param(rule, mutant, others, id=mutant.__name__.strip("_"))
        for rule, mutants in LIVING_MUTANTS.items()
        for mutant, others in mutants
    ],
)
async def test_what_breaks_a_rule_of_broker_or_hosts_is_found_out(
    stage: Stage, rule: str, mutant: Mutant, others: set[str]
) -> None:
    vm_id = await _run_vm(stage.world)
    assert await stage.broken() == set()
    await mutant(stage, vm_id)
    assert await stage.broken() == {rule} | others
    value = REGISTRY.get_sample_value("leveret_invariant_violations", {"name": rule})
    assert value
    if rule == "broker_is_furnished":
        assert await stage.broken() == set(), "it was declared again"


def test_every_invariant_has_a_mutant() -> None:
    names = [invariant.name for invariant in INVARIANTS]
    assert len(set(names)) == len(names)
    assert set(names) == DATABASE_MUTANTS.keys() | LIVING_MUTANTS.keys()
    for invariant in INVARIANTS:
        assert (invariant.query is not None) == (invariant.place in {Place.ROWS, Place.LOG})
        assert (invariant.name in DATABASE_MUTANTS) == (invariant.query is not None)


async def test_changes_that_are_under_way_are_no_violations(stage: Stage) -> None:
    """VMs come, stop, start and go all the while; nothing is ever found."""
    lived: list[UUID] = []
    busy = True

    async def churn() -> None:
        while busy:
            vm_id = new_id()
            for body, state in (
                (tiny(), State.RUNNING),
                (StopVm(grace_s=0), State.STOPPED),
                (StartVm(), State.RUNNING),
                (DeleteVm(), State.DELETED),
            ):
                assert (await stage.world.gateway.ask(vm_id, body)).accepted
                await eventually(partial(_is, stage, vm_id, state), what=f"{vm_id} {state}")
            lived.append(vm_id)

    churning = [asyncio.create_task(churn()) for _ in range(4)]
    checks = 0
    try:
        while len(lived) < 20 or checks < 10:
            assert await stage.broken() == set()
            checks += 1
    finally:
        busy = False
        await asyncio.gather(*churning)
    assert await stage.broken() == set()
    assert await violations(stage.world.db) == {}


async def _is(stage: Stage, vm_id: UUID, state: State) -> bool:
    found = await stage.world.conductor.pool.fetchval("SELECT state FROM vms WHERE id = $1", vm_id)
    return bool(found == state)


async def test_silent_hosts_are_unchecked_and_no_violation(stage: Stage) -> None:
    vm_id = await _run_vm(stage.world)
    home, _ = await stage.home_of(vm_id)
    home.go_away()
    report = await stage.checker.check_once()
    assert [(one.what.split("-")[-1], one.why) for one in report.unchecked] == [
        (f"000{stage.drivers.index(home) + 1}", "The simulated hypervisor is away.")
    ]
    assert (report.broken, report.hosts_asked) == (0, 1)
    home.come_back()
    name = "a host of which nobody has heard for long"
    await stage.world.db.execute(
        """INSERT INTO hosts
            (id, name, zone, epoch, virt_type, version, vcpus, memory_mib, disk_gib, state, heartbeat_at)
        VALUES (gen_random_uuid(), $1, 'z', 1, 'x', 'x', 1, 1, 1, 'silent', now() - interval '1 h')""",
        name,
    )
    report = await stage.checker.check_once()
    assert [(one.what, one.why) for one in report.unchecked] == [(f"host {name}", "It is silent.")]
    assert report.broken == 0


async def test_a_host_that_beats_and_hears_nothing_is_told(stage: Stage) -> None:
    for link in stage.compute._consume_links:
        await link.stop()
    report = await stage.checker.check_once()
    assert [(rule.name, rule.broken) for rule in report.rules if rule.broken] == [("queue_is_consumed", 2)]


async def test_without_the_broker_or_postgres_the_rest_is_checked_and_that_is_told(stage: Stage, database: str) -> None:
    await stage.link.stop()
    report = await stage.checker.check_once()
    assert {one.what.partition(" ")[0] for one in report.unchecked} == {"broker", "host"}
    by_name = {rule.name: rule.broken for rule in report.rules}
    assert by_name["broker_is_furnished"] is None
    assert by_name["host_counters_match_placements"] == 0
    nowhere = await open_pool("postgresql://nobody@127.0.0.1:1/none", max_size=1)
    look = BrokerCheck(nowhere, confirm_s=0)
    checker = Checker(nowhere, look, HostCheck(nowhere, Caller("x"), confirm_s=0))
    report = await checker.check_once()
    assert {one.what for one in report.unchecked} == {"postgres", "broker", "hosts"}
    assert {rule.broken for rule in report.rules} == {None}


async def test_a_gateway_orders_a_check_and_requests_go_on_meanwhile(stage: Stage) -> None:
    stage.drivers[0].litter("notes.txt")  # so that it looks twice, which takes five seconds
    gateway = stage.world.gateway
    asking = asyncio.create_task(_order(stage, RunCheck()))
    await asyncio.sleep(0)
    vm_id = new_id()
    assert (await gateway.ask(vm_id, tiny(), wait_s=3)).accepted
    report = await asking
    assert [rule.name for rule in report.rules] == [invariant.name for invariant in INVARIANTS]
    assert [rule.name for rule in report.rules if rule.broken] == ["pool_holds_nothing_else"]
    [broken] = [rule for rule in report.rules if rule.broken]
    assert broken.examples[0]["file"] == "notes.txt"
    without = await _order(stage, RunCheck(hosts=False))
    assert (without.broken, without.hosts_asked) == (0, 0)
    assert not {"pool_holds_nothing_else"} & {rule.name for rule in without.rules}


async def _order(stage: Stage, ask: RunCheck) -> CheckReport:
    headers = {"project": "default", "actor": "token admin", "request_id": new_id().hex}
    caller = stage.world.gateway._caller
    answer = await caller.ask(topology.REQUESTS.name, TYPE_OF[RunCheck], ask, headers=headers, wait_s=20)
    assert isinstance(answer, CheckReport)
    return answer


async def test_who_asks_while_a_check_is_made_gets_the_next_one_and_all_are_answered(stage: Stage) -> None:
    given: list[tuple[int, CheckReport]] = []

    async def give(delivery: Delivery, report: CheckReport) -> None:
        given.append((int(delivery.correlation_id or ""), report))

    desk = CheckDesk(stage.checker, give)
    asks = [replace(as_delivery(RunCheck()), correlation_id=str(n)) for n in range(CheckDesk.WAITING_MAX + 10)]
    for ask in asks[:3]:
        desk.ask(ask, RunCheck(hosts=False))
    await asyncio.sleep(0)  # the first check begins
    for ask in asks[3:]:
        desk.ask(ask, RunCheck(hosts=False))
    await eventually(lambda: len(given) == 3 + CheckDesk.WAITING_MAX, what="all are answered whom there is room for")
    assert [n for n, _ in given] == list(range(3 + CheckDesk.WAITING_MAX))
    assert len({report.at for _, report in given}) == 2
    await desk.stop()


async def test_what_is_newly_broken_is_logged_once_and_once_more_when_it_holds_again(stage: Stage) -> None:
    stage.drivers[0].litter("notes.txt")
    with capture_logs() as logs:
        for _ in range(2):
            await stage.checker.check_seldom()
        stage.drivers[0]._leftovers.clear()
        for _ in range(2):
            await stage.checker.check_seldom()
            await stage.checker.check_often()
    told = [(entry["event"], entry["name"], entry["log_level"]) for entry in logs if entry["event"].startswith("inv")]
    rule = "pool_holds_nothing_else"
    assert told == [("invariant.broken", rule, "error"), ("invariant.restored", rule, "info")]
    for invariant in INVARIANTS:
        assert REGISTRY.get_sample_value("leveret_invariant_violations", {"name": invariant.name}) == 0
        assert REGISTRY.get_sample_value("leveret_invariant_checked_timestamp_seconds", {"name": invariant.name})
