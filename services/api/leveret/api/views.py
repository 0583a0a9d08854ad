"""From rows to the documents that users read: the one place that knows both."""

import asyncpg

from leveret.shared.documents import Document, EventView, HostView, ImageView, VmView


class VmPage(Document):
    """Some VMs in the order of their ids. `next` is the cursor of the page that follows; null means none does."""

    items: tuple[VmView, ...]
    next: str | None = None


class HostPage(Document):
    """All hosts."""

    items: tuple[HostView, ...]
    next: None = None


class ImagePage(Document):
    """All registered images."""

    items: tuple[ImageView, ...]
    next: None = None


class EventPage(Document):
    """Some events in the order of `seq`. `next` is what to give as `after` for those that follow."""

    items: tuple[EventView, ...]
    next: int


def vm(row: asyncpg.Record) -> VmView:
    image = row["image"]
    return VmView.model_validate({**row, "image": image.get("name") or image["url"]})


def event(row: asyncpg.Record) -> EventView:
    return EventView.model_validate(dict(row))


def host(row: asyncpg.Record) -> HostView:
    return HostView.model_validate(dict(row))


def image(row: asyncpg.Record) -> ImageView:
    return ImageView.model_validate(dict(row))


def etag(view: VmView) -> str:
    """A VM's document is another one when its wish (generation) or its row (updated_at) is."""
    return f'"{view.generation}.{int(view.updated_at.timestamp() * 1_000_000)}"'
