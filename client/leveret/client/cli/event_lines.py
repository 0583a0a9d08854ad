"""Events as lines that people read."""

import shutil
import sys
import textwrap
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from leveret.client.cli.columns import local_time, state_style
from leveret.client.cli.output import paint

if TYPE_CHECKING:
    from uuid import UUID

    from leveret.shared.documents import EventView

#: A name that was made up has at most so many characters; a longer one only moves what follows it.
_SUBJECT_WIDTH = 18
_TYPE_WIDTH = 12
_TIME_WIDTH = 12
_GAP = "  "
#: A note with less room than this beside what it is about goes below it.
_LEAST_NOTE_WIDTH = 24
_LEAST_SUBJECT_WIDTH = 8
_QUOTA_ORDER = ("vms", "vcpus", "memory_mib", "disk_gib", "requests_per_s", "request_burst")


class EventLines:
    """Writes events one after the other: what one of them changed is told against those before it."""

    def __init__(self, *, with_subject: bool, indent: str = "") -> None:
        self._with_subject = with_subject
        self._indent = indent
        self._called: dict[UUID, str] = {}
        self._labels: dict[UUID, Mapping[str, str]] = {}

    def line(self, event: "EventView") -> str:
        """The event in one line; on a terminal in as many as it takes, none of them longer than it."""
        room = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        note = self._note(event)
        style = state_style("error" if event.type in {"error", "build_failed", "rejected"} else event.type)
        kind = paint(event.type, style)
        subject = self._subject(event, room) if self._with_subject else ""
        head = f"{self._indent}{paint(local_time(event.at), 'dim')}{_GAP}{subject}{kind}"
        if not note:
            return head
        before = len(self._indent) + _TIME_WIDTH + len(_GAP) + len(subject) + max(len(event.type), _TYPE_WIDTH)
        head += " " * (_TYPE_WIDTH - len(event.type)) + _GAP
        if room is None or before + len(_GAP) + len(note) <= room:
            return head + note
        if room - before - len(_GAP) >= _LEAST_NOTE_WIDTH:
            return head + f"\n{' ' * (before + len(_GAP))}".join(_folded(note, room - before - len(_GAP)))
        below = " " * (len(self._indent) + _TIME_WIDTH + len(_GAP))
        return "\n".join([head.rstrip(), *(below + line for line in _folded(note, max(8, room - len(below))))])

    def _subject(self, event: "EventView", room: int | None) -> str:
        text, width = subject_of(event), _SUBJECT_WIDTH
        if room is not None:
            left = room - len(self._indent) - _TIME_WIDTH - 2 * len(_GAP) - max(len(event.type), _TYPE_WIDTH)
            most = max(_LEAST_SUBJECT_WIDTH, left)
            text = text if len(text) <= most else f"{text[: most - 3]}..."
            width = min(width, most)
        return f"{text.ljust(width)}{_GAP}"

    def _note(self, event: "EventView") -> str:
        """What there is to say of an event beside its type."""
        renamed = self._renamed(event)
        if event.type == "changed" and event.data.get("verb") == "update":
            return "; ".join(part for part in (renamed, self._relabelled(event)) if part)
        return _note(event)

    def _renamed(self, event: "EventView") -> str:
        if event.vm_id is None or event.vm_name is None:
            return ""
        before = self._called.get(event.vm_id, event.vm_name)
        self._called[event.vm_id] = event.vm_name
        return f"renamed from {before} to {event.vm_name}" if before != event.vm_name else ""

    def _relabelled(self, event: "EventView") -> str:
        """What changed, where the labels before are known; else all that there are now."""
        labels = event.data.get("labels")
        if not isinstance(labels, dict) or event.vm_id is None:
            return ""
        before = self._labels.get(event.vm_id)
        self._labels[event.vm_id] = labels
        if before is None:
            return f"labels: {_pairs(labels) or 'none'}"
        removed = [f"{key}-" for key in sorted(before.keys() - labels.keys())]
        changed = {key: value for key, value in labels.items() if before.get(key) != value}
        return ", ".join([part for part in (_pairs(changed), *removed) if part])


def subject_of(event: "EventView") -> str:
    """The VM that an event is about: its name, else its id; a dash for what is about the project itself."""
    return event.vm_name or (str(event.vm_id) if event.vm_id else "-")


def _folded(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False) or [""]


def _pairs(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(labels.items()))


def _note(event: "EventView") -> str:
    problem = event.data.get("problem") or {}
    if problem:
        return f"{problem.get('message', '')} ({problem.get('code', '?')})"
    if "." in event.type:
        return _administration_note(event.data)
    if event.type == "progress":
        done = ", ".join(f"{one['step']} {float(one['seconds']):.2f} s" for one in event.data.get("steps", ()))
        step = str(event.data.get("step") or "").replace("_", " ")
        return f"{step} (done: {done})" if done else step
    parts = {"scheduled": "host", "changed": "verb"}
    return str(event.data.get(parts.get(event.type, ""), ""))


def _administration_note(data: dict[str, Any]) -> str:
    """Of an event about a project itself, or a host: what it concerns, and who did it."""
    about = [str(data[key]) for key in ("name", "user") if data.get(key)]
    if data.get("host"):
        why = data.get("proof") or data.get("reason")
        about.append(f"{data['host']}: {why}" if why else str(data["host"]))
    if data.get("policy"):
        about.append(f"({data['policy']}, {data.get('enforcement')}, by {data.get('topology')})")
    if data.get("role"):
        about.append(f"as {data['role']}")
    if data.get("expires_at"):
        about.append(f"until {datetime.fromisoformat(data['expires_at']).astimezone():%Y-%m-%d %H:%M}")
    quota = data.get("quota") or {}
    known = [name for name in _QUOTA_ORDER if name in quota] + sorted(quota.keys() - set(_QUOTA_ORDER))
    about += [f"{name}={'none' if quota[name] is None else quota[name]}" for name in known]
    by = f"(by {data['by']})" if data.get("by") else ""
    return " ".join([*about, by]).strip()
