"""The world around the API in its tests: rows as a conductor writes them, a conductor with a script, a proxy."""

import hashlib
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
from httpx2 import Response

from leveret.shared import topology
from leveret.shared.bus import DONE, Consumer, Delivery, Envelope, Furniture, Link, Outcome, Publisher
from leveret.shared.errors import Code, Problem
from leveret.shared.ids import mac_for, name_for, new_id
from leveret.shared.messages import Verdict

TINY = {"image": {"name": "tiny"}, "vcpus": 1, "memory_mib": 128, "disk_gib": 1}

#: What a conductor answers: a verdict, or nothing.
Script = Callable[[Delivery], Awaitable[Verdict | None]]


@dataclass
class Tenant:
    """One project with its tokens, and what its conductor writes into its rows."""

    project: str
    connection: "asyncpg.Connection[Any]"
    tokens: dict[str, str] = field(default_factory=dict)

    async def move_in(self) -> None:
        await self.connection.execute("INSERT INTO projects (id) VALUES ($1)", self.project)
        for role in ("admin", "member", "reader"):
            self.tokens[role] = await self.issue(role)

    async def issue(
        self, role: str, *, name: str | None = None, expires_at: datetime | None = None, revoked: bool = False
    ) -> str:
        token = secrets.token_urlsafe(32)
        token_id = new_id()
        await self.connection.execute(
            """INSERT INTO tokens (id, project_id, name, role, hash, expires_at, revoked_at)
            VALUES ($1, $2, $3, $4, $5, $6, CASE WHEN $7 THEN now() END)""",
            token_id,
            self.project,
            name or f"{role}-{token_id}",
            role,
            hashlib.sha256(token.encode()).digest(),
            expires_at,
            revoked,
        )
        return token

    async def revoke(self, token: str) -> None:
        await self.connection.execute(
            "UPDATE tokens SET revoked_at = now() WHERE hash = $1", hashlib.sha256(token.encode()).digest()
        )

    def headers(self, role: str = "member") -> dict[str, str]:
        return {"Authorization": f"Bearer {self.tokens[role]}"}

    async def insert(self, vm_id: UUID | None = None, *, state: str = "running", **more: Any) -> UUID:
        """A VM's row as it may stand in the table; `more` are columns."""
        vm_id = vm_id or new_id()
        wanted = {"stopped": "stopped", "deleting": "deleted", "deleted": "deleted"}.get(state, "running")
        moving = state in {"pending", "building", "deleting"}
        if state in {"building", "running", "stopped", "deleting"} and "host_id" not in more:
            more |= {"host_id": await self.host(f"host-{vm_id}"), "token": 1}
        row = {
            "id": vm_id,
            "project_id": self.project,
            "name": name_for(vm_id),
            "spec": "{}",
            "spec_hash": bytes(32),
            "labels": {},
            "vcpus": 1,
            "memory_mib": 128,
            "disk_gib": 1,
            "image": {"name": "tiny", "url": "file:///images/tiny.qcow2", "sha256": "0" * 64, "format": "qcow2"},
            "network": "default",
            "mac": mac_for(vm_id),
            "desired": wanted,
            "state": state,
            "generation": 1,
            "observed_generation": 0 if moving else 1,
            "deadline": datetime.now(UTC) + timedelta(minutes=5) if moving else None,
            "problem": Problem.of(Code.BUILD_FAILED, "It failed.").model_dump(mode="json")
            if state == "error"
            else None,
        } | more
        row |= {key: json.dumps(value) for key, value in row.items() if isinstance(value, dict)}
        columns, places = ", ".join(row), ", ".join(f"${n}" for n in range(1, len(row) + 1))
        await self.connection.execute(f"INSERT INTO vms ({columns}) VALUES ({places})", *row.values())
        return vm_id

    async def host(self, name: str, **more: Any) -> UUID:
        row = {
            "id": new_id(),
            "name": name,
            "zone": "z1",
            "epoch": 1,
            "virt_type": "simulated",
            "version": "test",
            "vcpus": 8,
            "memory_mib": 8192,
            "disk_gib": 100,
        } | more
        columns, places = ", ".join(row), ", ".join(f"${n}" for n in range(1, len(row) + 1))
        await self.connection.execute(f"INSERT INTO hosts ({columns}) VALUES ({places})", *row.values())
        return UUID(str(row["id"]))

    async def update(self, vm_id: UUID, **columns: Any) -> None:
        assigned = ", ".join(f"{name} = ${n}" for n, name in enumerate(columns, 2))
        values = [json.dumps(value) if isinstance(value, dict) else value for value in columns.values()]
        await self.connection.execute(
            f"UPDATE vms SET {assigned}, updated_at = clock_timestamp() WHERE id = $1", vm_id, *values
        )

    async def settle(self, vm_id: UUID, state: str, **columns: Any) -> None:
        """Move a VM where its host saw it, and tell."""
        await self.update(vm_id, state=state, observed_generation=1, deadline=None, **columns)
        await self.tell(vm_id, state, state)

    async def tell(self, vm_id: UUID | None, kind: str, state: str | None, *, notify: bool = True, **data: Any) -> int:
        """Write an event, number it and notify, as the relay does. Returns its number."""
        async with self.connection.transaction():
            seq: int = await self.connection.fetchval(
                "UPDATE projects SET last_seq = last_seq + 1 WHERE id = $1 RETURNING last_seq", self.project
            )
            await self.connection.execute(
                """INSERT INTO events (project_id, vm_id, vm_name, seq, type, state, data)
                VALUES ($1, $2, $3, $4, $5, $6, $7)""",
                self.project,
                vm_id,
                name_for(vm_id) if vm_id is not None else None,
                seq,
                kind,
                state,
                json.dumps(data),
            )
            if notify:
                await self.connection.execute("SELECT pg_notify('leveret_events', $1)", self.project)
        return seq

    async def forget(self, seq: int) -> None:
        """Forget every event up to this one, as retention does."""
        async with self.connection.transaction():
            await self.connection.execute("DELETE FROM events WHERE project_id = $1 AND seq <= $2", self.project, seq)
            await self.connection.execute("UPDATE projects SET forgotten_seq = $2 WHERE id = $1", self.project, seq)

    async def refuse(self, vm_id: UUID, request_id: str, problem: Problem) -> None:
        await self.connection.execute(
            "INSERT INTO rejections (vm_id, project_id, request_id, problem) VALUES ($1, $2, $3, $4)",
            vm_id,
            self.project,
            request_id,
            problem.model_dump_json(),
        )


class ScriptedConductor:
    """Consumes requests as a conductor does, and answers them as the test says."""

    def __init__(self, amqp_url: str) -> None:
        self.heard: list[Delivery] = []
        #: When tokens were used: the API tells that by itself, whatever else is going on.
        self.noted: list[Delivery] = []
        self.script: Script = self.accept
        self._publisher = Publisher("leveret-conductor")
        self.link = Link(amqp_url, "test-conductor")
        self.link.add(Furniture())
        self.link.add(self._publisher)
        self.consumer = Consumer(self.link, topology.REQUESTS_QUEUE, self._handle, self._publisher)

    async def accept(self, delivery: Delivery) -> Verdict | None:
        return verdict(delivery)

    async def silence(self, delivery: Delivery) -> Verdict | None:
        return None

    def refuse(self, code: Code, message: str = "No.", **details: Any) -> None:
        async def refuse(delivery: Delivery) -> Verdict | None:
            return verdict(delivery, problem=Problem.of(code, message, **details))

        self.script = refuse

    async def _handle(self, batch: Sequence[Delivery]) -> Sequence[Outcome]:
        for delivery in batch:
            (self.noted if delivery.type == "token.used.v1" else self.heard).append(delivery)
            said = await self.script(delivery)
            if said is not None and delivery.reply_to is not None:
                envelope = Envelope(correlation_id=delivery.correlation_id)
                await self._publisher.post("", delivery.reply_to, said, envelope=envelope)
        return [DONE] * len(batch)


def verdict(delivery: Delivery, *, problem: Problem | None = None, generation: int = 1) -> Verdict:
    return Verdict(
        request_id=delivery.header("request_id") or "",
        vm_id=UUID(vm_id) if (vm_id := delivery.header("vm_id")) else None,
        accepted=problem is None,
        generation=None if problem else generation,
        problem=problem,
    )


@asynccontextmanager
async def conducting(amqp_url: str) -> AsyncIterator[ScriptedConductor]:
    conductor = ScriptedConductor(amqp_url)
    conductor.link.start()
    conductor.consumer.start()
    try:
        assert await conductor.link.wait_up(20)
        yield conductor
    finally:
        await conductor.consumer.stop(1)
        await conductor.link.stop()


def problem_of(answer: Response, status: int, code: Code) -> dict[str, Any]:
    """The problem in an answer, which must be whole."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = answer.json()
    assert document["code"] == code
    assert document["status"] == status
    assert document["type"] == f"/docs/errors#{code}"
    assert document["title"]
    assert document["detail"]
    assert document["hint"]
    assert document["request_id"] == answer.headers["x-request-id"]
    return document
