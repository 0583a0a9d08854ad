"""The simulated hypervisor's memory: an append-only file that survives a SIGKILL of the worker.

One JSON line for each durable step, the last one of a key says all. A torn last line is what a kill leaves: it is
dropped, and the file is compacted, at the next opening. (A real host keeps this in libvirt and on its disks.)
"""

import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Ledger:
    """Records by host and key. Writing is one `write` into the page cache: it outlives the process, not the machine."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: dict[str, dict[str, Record]] = {}
        if path.exists():
            for line in path.read_bytes().splitlines():
                try:
                    host, key, record = json.loads(line)
                except ValueError:
                    continue  # torn by a kill
                self._note(host, key, record)
        self._fd = self._compacted()

    def of(self, host: str) -> dict[str, Record]:
        """A host's records by key."""
        return dict(self._records.get(host, {}))

    def put(self, host: str, key: str, record: Record | None) -> None:
        """Write a record, or with None that there is none any more."""
        self._note(host, key, record)
        os.write(self._fd, _line(host, key, record))

    def close(self) -> None:
        os.close(self._fd)

    def _note(self, host: str, key: str, record: Record | None) -> None:
        records = self._records.setdefault(host, {})
        if record is None:
            records.pop(key, None)
        else:
            records[key] = record

    def _compacted(self) -> int:
        fresh = self._path.with_suffix(".new")
        lines = (_line(host, key, record) for host, of in self._records.items() for key, record in of.items())
        fresh.write_bytes(b"".join(lines))
        fresh.replace(self._path)
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)


def _line(host: str, key: str, record: Record | None) -> bytes:
    return json.dumps([host, key, record], separators=(",", ":")).encode() + b"\n"
