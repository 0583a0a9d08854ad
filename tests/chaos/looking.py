"""Finding out what there is: by the database, the broker, the hypervisors and the disks, and not by asking Leveret.

Only `Snapshot.check` is what Leveret says of itself.
"""

import asyncio
import json
from pathlib import Path
from xml.etree import ElementTree as ET

import asyncpg
import psutil

from chaos.snapshot import (
    Address,
    Check,
    Domain,
    Event,
    Files,
    Host,
    Queue,
    Quota,
    Refused,
    Snapshot,
    Tombstone,
    Vm,
    Watched,
)
from leveret.client import Leveret
from leveret.stack.layout import Layout
from leveret.stack.libvirtd import Libvirtd, virsh
from leveret.stack.rabbitmq import Rabbit

_VMS = """
SELECT id::text, project_id AS project, state, desired, step, generation, observed_generation, host_id::text, token,
       restarts, labels, vcpus, memory_mib, disk_gib, host(address) AS address, problem->>'code' AS code,
       extract(epoch FROM now() - deadline)::float8 AS late_s, recent_requests
FROM vms ORDER BY id
"""
_EVENTS = """
SELECT id, project_id AS project, seq, vm_id::text, type, state, moved_from, data->>'request_id' AS request_id,
       data->>'verb' AS verb, data->'problem'->>'code' AS code
FROM events ORDER BY id
"""
_REFUSED = """
SELECT vm_id::text, project_id AS project, request_id, problem->>'code' AS code FROM rejections
"""
_TOMBSTONES = "SELECT vm_id::text, project_id AS project FROM tombstones"
_HOSTS = """
SELECT id::text, name, state, vcpus, vcpus_used, memory_mib, memory_mib_used, disk_gib, disk_gib_used FROM hosts
"""
_QUOTAS = """
SELECT project_id AS project, vms_max, vms_used, vcpus_used, memory_mib_used, disk_gib_used FROM quotas
"""
_ADDRESSES = "SELECT host(address) AS address, vm_id::text FROM addresses WHERE vm_id IS NOT NULL"

#: Everything that is under way: what is to happen, and events that were not yet told.
UNDER_WAY = """
SELECT (SELECT count(*) FROM vms WHERE deadline IS NOT NULL OR state IN ('pending', 'building', 'deleting')) AS vms,
       (SELECT count(*) FROM events WHERE seq IS NULL)
       + (SELECT coalesce(sum(last_seq - published_seq), 0)::bigint FROM projects) AS events,
       (SELECT count(*) FROM hosts WHERE state = 'silent' OR heartbeat_at < now() - interval '15 s') AS hosts
"""

_METADATA = "{urn:leveret:domain:1}vm"
#: What a worker keeps in its pool beside the directories of VMs.
_CACHES = frozenset({"images", "dhcp", "kvm-probe.json", "lost+found"})


async def take(
    layout: Layout,
    dsn: str,
    rabbit: Rabbit,
    *,
    check: Check,
    watched: tuple[Watched, ...] = (),
    client_queues: tuple[str, ...] = (),
) -> Snapshot:
    """Everything there is now. At rest it is one moment; else its parts may differ by what happened meanwhile."""
    simulated = await asyncio.to_thread(simulated_hosts, layout)
    real = await asyncio.to_thread(real_host, layout)
    connection = await asyncpg.connect(dsn)
    await connection.set_type_codec("jsonb", encoder=json.dumps, decoder=json.loads, schema="pg_catalog")
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            rows = Snapshot(
                vms=tuple([Vm(**row) for row in await connection.fetch(_VMS)]),
                events=tuple([Event(**row) for row in await connection.fetch(_EVENTS)]),
                refused=tuple([Refused(**row) for row in await connection.fetch(_REFUSED)]),
                tombstones=tuple([Tombstone(**row) for row in await connection.fetch(_TOMBSTONES)]),
                hosts=tuple([Host(**row) for row in await connection.fetch(_HOSTS)]),
                quotas=tuple([Quota(**row) for row in await connection.fetch(_QUOTAS)]),
                addresses=tuple([Address(**row) for row in await connection.fetch(_ADDRESSES)]),
            )
    finally:
        await connection.close()
    found = {
        "domains": simulated.domains + real.domains,
        "files": simulated.files + real.files,
        "oddities": real.oddities,
        "qemus": real.qemus,
        "queues": tuple(await asyncio.to_thread(queues, rabbit)),
        "client_queues": client_queues,
        "watched": watched,
        "check": check,
    }
    return rows.model_copy(update=found)


async def check(client: Leveret) -> Check:
    """What the product says of itself."""
    report = await client.check()
    return Check(
        broken={rule.name: list(rule.examples) for rule in report.rules if rule.broken},
        unchecked=tuple(f"{one.what}: {one.why}" for one in report.unchecked)
        + tuple(rule.name for rule in report.rules if rule.broken is None),
        hosts_asked=report.hosts_asked,
    )


def simulated_hosts(layout: Layout) -> Snapshot:
    """The simulated hypervisors' own memory: for every key the last record says all."""
    records: dict[tuple[str, str], dict[str, object]] = {}
    for ledger in sorted(layout.fake_hosts.glob("**/simulated.jsonl")):
        for line in ledger.read_bytes().splitlines():
            try:
                host, key, record = json.loads(line)
            except ValueError:
                continue  # torn by a kill
            if record is None:
                records.pop((host, key), None)
            else:
                records[host, key] = record
    domains, files = [], []
    for (host, key), record in records.items():
        if record.get("files"):
            files.append(Files(host_id=host, vm_id=key))
        if journal := record.get("journal"):
            assert isinstance(journal, list)
            running = record["power"] == "running"
            domains.append(Domain(host_id=host, vm_id=key, token=journal[3], running=running))
    return Snapshot(domains=tuple(domains), files=tuple(files))


def real_host(layout: Layout) -> Snapshot:
    """What libvirt, the process table and the pool hold; nothing when there is no libvirt of this installation's."""
    server = Libvirtd(layout.libvirt)
    if not server.directory.exists():
        return Snapshot()
    host_id = (layout.host / "host-id").read_text().strip()
    active = set(virsh(server.uri, "list", "--uuid").split())
    domains = [
        Domain(host_id=host_id, vm_id=vm_id, token=_token(server.uri, vm_id), running=vm_id in active)
        for vm_id in virsh(server.uri, "list", "--all", "--uuid").split()
    ]
    entries = sorted(layout.pool.iterdir()) if layout.pool.exists() else []
    files = [Files(host_id=host_id, vm_id=entry.name) for entry in entries if is_vm_id(entry.name)]
    oddities = [entry.name for entry in entries if not is_vm_id(entry.name) and entry.name not in _CACHES]
    vms = {one.vm_id for one in files}
    leases = [path for path in layout.pool.glob("dhcp/*/*") if is_vm_id(path.name) and path.name not in vms]
    return Snapshot(
        domains=tuple(domains),
        files=tuple(files),
        oddities=(*oddities, *(str(path.relative_to(layout.pool)) for path in leases)),
        qemus=tuple(vm_id for vm_id, _ in qemus(server)),
    )


def qemus(server: Libvirtd) -> list[tuple[str, psutil.Process]]:
    """The guests' processes, each with the id in its command line."""
    found = []
    for pid in server.processes():
        try:
            process = psutil.Process(pid)
            words = process.cmdline()
        except psutil.NoSuchProcess:
            continue
        if "-uuid" in words and "qemu-system" in words[0]:
            found.append((words[words.index("-uuid") + 1], process))
    return sorted(found, key=lambda one: (one[0], one[1].pid))


def _token(uri: str, vm_id: str) -> int | None:
    element = ET.fromstring(virsh(uri, "dumpxml", vm_id)).find(f"metadata/{_METADATA}")  # libvirt has parsed it
    return None if element is None else int(element.attrib["token"])


def is_vm_id(name: str) -> bool:
    return Path(name).name == name and len(name) == 36 and name.count("-") == 4


def queues(rabbit: Rabbit) -> list[Queue]:
    told = rabbit.ctl("list_queues", "-p", "leveret", "--no-table-headers", "name", "messages", "consumers")
    rows = [line.split("\t") for line in told.splitlines() if line.count("\t") == 2]
    return [
        Queue(name=name, messages=int(messages or 0), consumers=int(consumers or 0))
        for name, messages, consumers in rows
    ]
