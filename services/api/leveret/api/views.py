"""From rows to the documents that users read: the one place that knows both."""

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

import asyncpg

from leveret.shared.documents import (
    AmqpUserView,
    Document,
    EventView,
    HostView,
    ImageView,
    NewTokenView,
    ProjectView,
    Role,
    TokenView,
    VmView,
    revision_of,
)
from leveret.shared.errors import Problem
from leveret.shared.groups import GroupView
from leveret.shared.headers import SILENT_MARK
from leveret.shared.placements import SCORES, PlacementView, TriedHost


class VmPage(Document):
    """Some VMs in the order of their ids. `next` is the cursor of the page that follows; null means none does."""

    items: tuple[VmView, ...]
    next: str | None = None


class HostPage(Document):
    """All hosts."""

    items: tuple[HostView, ...]
    next: None = None


class GroupPage(Document):
    """Some groups by name. `next` is the cursor of the page that follows."""

    items: tuple[GroupView, ...]
    next: str | None = None


class ImagePage(Document):
    """All registered images."""

    items: tuple[ImageView, ...]
    next: None = None


class EventPage(Document):
    """Some events in the order of `seq`. `next` is what to give as `after` for those that follow.

    Who asked for what is `after` a number that is less than `forgotten_seq` may have missed some for good.
    """

    items: tuple[EventView, ...]
    next: int
    forgotten_seq: int


class TokenName(Document):
    """The token that was presented."""

    id: UUID
    name: str
    expires_at: datetime | None


class WhoamiView(Document):
    """What the holder of a token is, and where."""

    project: str
    role: Role
    token: TokenName


class ProjectPage(Document):
    """Some projects in the order of their ids. `next` is the cursor of the page that follows."""

    items: tuple[ProjectView, ...]
    next: str | None = None


class TokenPage(Document):
    """Some tokens of a project, the oldest first; revoked ones are shown too. `next` is the cursor of what follows."""

    items: tuple[TokenView, ...]
    next: str | None = None


class AmqpUserPage(Document):
    """Some broker users that speak for a project, by name. `next` is the cursor of the page that follows."""

    items: tuple[AmqpUserView, ...]
    next: str | None = None


def vm(row: asyncpg.Record) -> VmView:
    image = row["image"]
    return VmView.model_validate({**row, "image": image.get("name") or image["url"]})


def event(row: asyncpg.Record) -> EventView:
    return EventView.model_validate(dict(row))


def host(row: asyncpg.Record) -> HostView:
    return HostView.model_validate(dict(row))


def group(row: asyncpg.Record) -> GroupView:
    return GroupView.model_validate(dict(row))


def placement(row: asyncpg.Record, decisions: Sequence[asyncpg.Record]) -> PlacementView:
    """`decisions` are the VM's events of these kinds, the oldest first."""
    values = {**row, "placement": row["placement"] or {}, "tried": tuple(_tried(decisions))}
    return PlacementView.model_validate(values)


def _tried(decisions: Sequence[asyncpg.Record]) -> list[TriedHost]:
    """Every choice of a host, with what the next event says against it: it failed to build, or was fenced."""
    tried: list[TriedHost] = []
    for event in decisions:
        if event["type"] == "scheduled":
            score = dict(sorted(event["data"].get("score", {}).items(), key=_weight))
            tried.append(TriedHost.model_validate({**event["data"], "at": event["at"], "score": score}))
        elif tried and tried[-1].problem is None and event["data"].get("problem") is not None:
            problem = Problem.model_validate(event["data"]["problem"])
            tried[-1] = tried[-1].model_copy(update={"problem": problem})
    return tried


def _weight(score: tuple[str, float]) -> int:
    """Those that count most come first, and those that are not known here last."""
    return SCORES.index(score[0]) if score[0] in SCORES else len(SCORES)


def image(row: asyncpg.Record) -> ImageView:
    return ImageView.model_validate(dict(row))


def etag(view: VmView) -> str:
    """A VM's document is another one when its wish (generation) or its row (updated_at) is, or its host is silent."""
    mark = "" if view.host_silent_since is None else SILENT_MARK
    return f'"{revision_of(view.generation, view.updated_at)}{mark}"'


def project(row: asyncpg.Record) -> ProjectView:
    resources = ("vms", "vcpus", "memory_mib", "disk_gib")
    return ProjectView.model_validate(
        {
            "id": row["id"],
            "created_at": row["created_at"],
            "quota": {name: row[f"{name}_max"] for name in resources}
            | {name: row[name] for name in ("requests_per_s", "request_burst")},
            "usage": {name: row[f"{name}_used"] for name in resources},
        }
    )


def token(row: asyncpg.Record) -> TokenView:
    return TokenView.model_validate(dict(row))


def new_token(row: asyncpg.Record, secret: str) -> NewTokenView:
    return NewTokenView.model_validate({**row, "token": secret})


def amqp_user(row: asyncpg.Record) -> AmqpUserView:
    return AmqpUserView.model_validate(dict(row))
