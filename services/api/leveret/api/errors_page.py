"""docs/errors.md: every code, what it means, what to do, and with which status HTTP tells it. Generated, and tested.

`python -m leveret.api.errors_page docs/errors.md` writes it.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from leveret.api.problems import STATUS, title_of
from leveret.shared.errors import HINTS, Code

INTRODUCTION = """\
Every failure is told with one of these codes: in the problem documents of the REST API (`type` leads here), in verdicts
on the message bus, in the `problem` of a VM and in its events. Codes are never renamed. Where a status is given, REST
may answer a request with the code; the others are only read inside a VM or an event."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One code, explained. `status` is None for what REST never answers with."""

    code: Code
    title: str
    status: int | None
    meaning: str
    hint: str


def entries() -> Iterator[Entry]:
    for code in Code:
        status = STATUS.get(code)
        yield Entry(
            code=code,
            title=title_of(code),
            status=None if status is None else int(status),
            meaning=MEANINGS[code],
            hint=HINTS[code],
        )


def markdown() -> str:
    parts = ["# Errors", INTRODUCTION]
    for entry in entries():
        told = "Read in a VM or an event." if entry.status is None else f"HTTP {entry.status}."
        parts.append(f"## {entry.code}\n\n{entry.meaning} {told}\n\n**What to do:** {entry.hint}")
    return "\n\n".join(parts) + "\n"


#: What each code says happened; what to do about it is its hint.
MEANINGS: dict[Code, str] = {
    Code.INVALID_REQUEST: "The document, a parameter or a header is not as described; `errors` names each fault.",
    Code.UNSUPPORTED_CONTENT_TYPE: "The body is not declared as JSON, or as what this address takes.",
    Code.UNKNOWN_TYPE: "The message has a type that nobody knows.",
    Code.BODY_TOO_LARGE: "The body is larger than any request can be.",
    Code.UNAUTHENTICATED: "There is no token, or it is unknown, expired or revoked.",
    Code.FORBIDDEN: "The token or broker user is known, and may not do this.",
    Code.NOT_FOUND: "There is nothing at this address.",
    Code.METHOD_NOT_ALLOWED: "The address exists, but not with this method.",
    Code.VM_NOT_FOUND: "The project has no VM of this id.",
    Code.VM_DELETED: "The VM was deleted, and nothing brings it back.",
    Code.ID_CONFLICT: "The id, name or Idempotency-Key was used before for something else (422 when it was a key).",
    Code.NAME_TAKEN: "Another VM of the project, not yet deleted, has this name; or a token, not yet revoked; or a "
    "group that was made otherwise.",
    Code.STATE_CONFLICT: "The VM is in a state in which this cannot be done; or the project never had an event of the "
    "number to go on after, as when its database was restored.",
    Code.IMAGE_UNKNOWN: "No image of this name is registered.",
    Code.NETWORK_UNKNOWN: "There is no network of this name.",
    Code.GROUP_UNKNOWN: "The request names a group that the project does not have.",
    Code.GROUP_NOT_FOUND: "The project has no group of this name.",
    Code.GROUP_IN_USE: "The group still has VMs.",
    Code.PRECONDITION_FAILED: "The VM is not as the ETag in If-Match (over AMQP: the header if_match) says.",
    Code.PROJECT_NOT_FOUND: "There is no such project, or the token may not know of it.",
    Code.PROJECT_IN_USE: "The project still has VMs.",
    Code.TOKEN_NOT_FOUND: "The project has no token of this id.",
    Code.HOST_NOT_FOUND: "No host has this id or name.",
    Code.HOST_CONFLICT: "The host is in a state in which this cannot be done; or several hosts have this name.",
    Code.AMQP_USER_NOT_FOUND: "No broker user of this name speaks for the project.",
    Code.QUOTA_EXCEEDED: "The project would use more than its quota allows; `details` says of what.",
    Code.NO_CAPACITY: "No host can take the VM; `details` counts which constraint refused how many hosts.",
    Code.NO_ADDRESS: "The network has no free address.",
    Code.RATE_LIMITED: "The project asks for more at once than it may.",
    Code.UNAVAILABLE: "The broker or the database cannot be reached. The request may or may not have been queued.",
    Code.HANDLER_CRASHED: "A message made the service that handled it fail, again and again; it was put aside.",
    Code.INTERNAL: "Something in Leveret is broken.",
    Code.IMAGE_UNREACHABLE: "The host could not fetch the image.",
    Code.IMAGE_FORBIDDEN: "The image's address is one that hosts must not fetch from.",
    Code.IMAGE_TOO_LARGE: "The image is larger than allowed, or than the VM's disk.",
    Code.IMAGE_HASH_MISMATCH: "What was fetched is not what the sha256 promises.",
    Code.IMAGE_INVALID: "The file is not an image of the declared format, or one that refers to other files.",
    Code.DISK_FULL: "The host's storage pool has no room.",
    Code.DISK_FAILED: "The VM's disk could not be made.",
    Code.CONFIG_DRIVE_FAILED: "The drive that tells the guest its configuration could not be made.",
    Code.NETWORK_FAILED: "The VM's network could not be prepared on the host.",
    Code.DEFINE_FAILED: "libvirt refused the definition of the VM.",
    Code.START_FAILED: "libvirt could not start the VM.",
    Code.STOP_FAILED: "The VM could not be stopped.",
    Code.DELETE_FAILED: "The host could not remove the VM, or all of its files.",
    Code.HYPERVISOR_UNAVAILABLE: "The host's libvirtd cannot be reached.",
    Code.HYPERVISOR_TIMEOUT: "The host's libvirtd took too long.",
    Code.BUILD_FAILED: "The VM could not be built on any of the hosts that were tried.",
    Code.BUILD_TIMEOUT: "The VM was not built in time.",
    Code.STOP_TIMEOUT: "The VM did not stop in time.",
    Code.DELETE_TIMEOUT: "The host did not confirm in time that the VM is gone.",
    Code.GUEST_SHUTDOWN: "The guest switched itself off.",
    Code.GUEST_CRASHED: "The guest, or the process that runs it, crashed.",
    Code.DOMAIN_MISSING: "The host has no such VM any more, though nobody asked Leveret to remove it.",
    Code.HOST_SILENT: "The VM's host does not answer.",
    Code.HOST_REBOOTED: "The VM's host was restarted.",
    Code.HOST_FENCED: "An administrator declared, with proof, that the VM's host is off.",
    Code.HOST_RETIRED: "An administrator gave the VM's host up for good.",
}

if __name__ == "__main__":
    Path(sys.argv[1]).write_text(markdown(), encoding="utf-8")
