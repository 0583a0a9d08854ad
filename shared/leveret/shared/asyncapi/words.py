"""What the contract says in words, and in tables that no model holds."""

from typing import Any

from leveret.shared.documents import MAX_REQUEST_BYTES, MAX_USER_DATA_BYTES, UpdateQuota
from leveret.shared.errors import Code
from leveret.shared.headers import IF_MATCH_PATTERN, REQUEST_ID_PATTERN, TRACEPARENT_PATTERN

#: Of the contract, not of the program: the first number changes with the `.v1` in the types, and only then.
CONTRACT_VERSION = "1.2.0"

_QUOTA = UpdateQuota()

INTRODUCTION = """\
*Get me a VM*, over RabbitMQ (AMQP 0-9-1). Everything that a client needs stands in this file: no other library
of Leveret's is needed, in any language.

This file is written from your program's side: `send` is what you send, `receive` is what you hear.

## The conversation

1. Connect to the virtual host `leveret` as your broker user. An administrator makes it, and says for which
   project it speaks (over REST: PUT /v1/projects/{project}/amqp-users/{user}).
2. Declare a queue of your own, `client.{user}.` and anything, and bind it to the exchange
   `leveret.events.{project}`: with `#` for everything, with `vm.{vm_id}.*` for one VM, with `vm.*.error` for
   every VM that fails. Do this first: an event is copied into the queues that are bound at its moment.
3. Open a channel, switch on publisher confirms, and consume `amq.rabbitmq.reply-to` on it without
   acknowledgements.
4. Choose the new VM's id yourself: any UUID (version 7 or 4). Publish the request on that same channel to
   `leveret.requests`, `mandatory` and persistent. The routing key is the message's type, `vm.create.v1`. The id
   stands in the header `vm_id`.
5. The broker confirms: the request is *queued*, and cannot be lost any more. The verdict follows, as a direct
   reply with your `correlation_id`: *accepted* means committed; otherwise `problem` says why not, by a `code`
   that you may branch on and a `hint` for a person.
6. Follow the VM through its events: `scheduled`, `progress`, `running`; `error` has the `problem`.

## What is promised

* **Request.** Confirmed by the broker: it will be judged, whatever is restarted in between. Returned
  (`mandatory`): Leveret is not set up at this broker, nobody has it. Negatively confirmed: the queue is full, nobody
  has it; try again later. No confirm within your time limit, or a lost connection: *unknown*. Send it again.
* **Sending again is safe.** Keep `vm_id`, `request_id` and the body; take a fresh `message_id`. A create with
  the same document is accepted again and is still one VM; with another document it is refused (`id_conflict`).
  Every other request is carried out once for a `request_id` (a VM remembers the last 16); a delete may be
  repeated without end.
* **Order.** Requests may overtake each other. When one builds on another, wait for its verdict. A delete that
  overtakes its create wins: the create is refused.
* **Verdict.** A convenience, given at most once: it is lost when you are not there. The truth is what was committed:
  an accepted create is told by the event `accepted`, an accepted change by `changed` or `deleting`; a refused create by
  `rejected`, and so is whatever else is refused without asking for a verdict. Without an answer, send it again: the
  verdict is given again.
* **Event.** At least once, in order. `sequence` counts every event of a project without a gap: drop what is not
  greater than the greatest you have handled. Acknowledge after you have handled it.
* **Resuming.** A durable queue of yours keeps events while you are away, as long as it has room. If it is bound
  with `#` and `sequence` jumps, something was dropped (your queue was full, or deleted): read what is missing
  over REST, GET /v1/events?after={sequence}. With a narrower binding jumps mean nothing.
* **Truth.** An event says what was true at its moment. Whatever is lost, a VM still goes where its owner wants
  it.

## How it may change

The version stands in the type. Within `.v1` there are only additions: new types of events, new fields in
verdicts, in events and in their `data`, new codes, new optional fields in requests. So: ignore fields and
events that you do not know, and take a code that you do not know for what its `message` says. Leveret itself is
strict with requests: a field that it does not know is refused, so that a misspelt one is not a surprise. What
cannot be added becomes `.v2`, beside `.v1`.

## Bodies

One JSON document in UTF-8. The same documents are taken and given by the REST API. In verdicts and events a
field that equals its `default` here is left out: what is not there has its default.

## Properties

AsyncAPI has no word for the properties of AMQP 0-9-1: what must stand in them is said under `x-amqp-properties`. In
this file's runtime expressions `$message.header#/reply_to` and `$message.header#/correlation_id` mean the properties
of these names; all other headers are AMQP headers.
"""

_STRING: dict[str, Any] = {"type": "string"}

_COMMON_PROPERTIES: dict[str, Any] = {
    "content_type": {"const": "application/json", "description": "What the body is."},
    "type": _STRING | {"description": "The type of the message, with its version: the `name` of the message here."},
    "message_id": _STRING | {"minLength": 1, "maxLength": 128, "description": "Fresh for every attempt to send."},
    "delivery_mode": {"const": 2, "description": "Persistent."},
}
REQUEST_PROPERTIES: dict[str, Any] = {
    "type": "object",
    "description": "The AMQP properties of a request.",
    "required": ["content_type", "type", "message_id", "user_id", "delivery_mode"],
    "properties": _COMMON_PROPERTIES
    | {
        "user_id": _STRING
        | {
            "description": "Your broker user, the one you are connected as. The broker checks it and closes the "
            "channel when it is another; Leveret knows by it for which project you speak.",
        },
        "reply_to": {
            "const": "amq.rabbitmq.reply-to",
            "description": "To hear the verdict. Only direct reply-to is answered: consume this name without "
            "acknowledgements on the channel on which you publish, before you publish.",
        },
        "correlation_id": _STRING | {"maxLength": 255, "description": "Comes back with the verdict."},
    },
}
ANSWER_PROPERTIES: dict[str, Any] = {
    "type": "object",
    "description": "The AMQP properties of a verdict or an event.",
    "required": ["content_type", "type", "message_id"],
    "properties": {
        "content_type": _COMMON_PROPERTIES["content_type"],
        "type": _COMMON_PROPERTIES["type"],
        "message_id": _STRING | {"description": "Fresh for every attempt: know an event by its `sequence`."},
        "correlation_id": _STRING | {"description": "A verdict has that of its request."},
    },
}

HEADERS: dict[str, dict[str, Any]] = {
    "vm_id": {
        "type": "string",
        "format": "uuid",
        "description": "The VM that the request is about. A create makes a VM of this id, which you choose.",
    },
    "request_id": {
        "type": "string",
        "pattern": REQUEST_ID_PATTERN,
        "description": "Names the request through every attempt to send it; without it, `message_id` does.",
    },
    "requested_at": {
        "type": "string",
        "pattern": r"^[0-9]+(\.[0-9]+)?$",
        "description": "When it was asked for, in seconds since 1970, as text. Only shown, never decided by.",
    },
    "traceparent": {
        "type": "string",
        "pattern": TRACEPARENT_PATTERN,
        "description": "W3C trace context. The event of the request itself (`accepted`, `changed`, `deleting`, "
        "`rejected`) carries it on; those that follow from it later do not. What is none is ignored.",
    },
}
IF_MATCH: dict[str, Any] = {
    "type": "string",
    "pattern": IF_MATCH_PATTERN,
    "description": "Only if the VM has not changed meanwhile: the `revision` of a verdict, which is the ETag of REST "
    "without its quotes; or its `generation` alone, which says nothing of names, labels and what its host reports. "
    "Otherwise it is refused with `precondition_failed`.",
}
DRY_RUN: dict[str, Any] = {
    "const": "true",
    "description": "Judge it, but neither claim nor make anything. The verdict has `dry_run: true`.",
}
#: The headers of a request that is about no VM.
GROUP_HEADERS = {name: schema for name, schema in HEADERS.items() if name != "vm_id"}
HEADERS_NOTE = (
    "AMQP headers; every value is text (a long string). CC, BCC and x-death are refused; others that are not named "
    "here are ignored."
)

LIMITS: dict[str, dict[str, Any]] = {
    "message_bytes": {
        "max": MAX_REQUEST_BYTES,
        "description": "A request's body; more is `body_too_large`. Of twice that the broker closes the channel.",
    },
    "user_data_bytes": {
        "max": MAX_USER_DATA_BYTES,
        "description": "User-data as the guest reads it, as text or in base64; more is `invalid_request`.",
    },
    "requests_per_s": {
        "default": _QUOTA.requests_per_s,
        "description": "Of a project, over AMQP and REST together, in the long run; more is `rate_limited`. An "
        "administrator may set another.",
    },
    "request_burst": {
        "default": _QUOTA.request_burst,
        "description": "How many requests a project that was idle may make at once.",
    },
    "connections": {"max": 32, "description": "Of one broker user, at one time."},
    "channels": {"max": 256, "description": "Of one broker user, at one time, over all of its connections."},
    "own_queue_messages": {
        "max": 100_000,
        "description": "What a queue of yours keeps; beyond that the oldest are dropped. You may set a lower limit.",
    },
    "own_queue_bytes": {"max": 64 * 1024 * 1024, "description": "Likewise."},
    "own_queue_unused_s": {
        "max": 7 * 24 * 3600,
        "description": "After which a queue of yours that nobody consumes is deleted. You may set a shorter time.",
    },
}

PERMISSIONS: dict[str, Any] = {
    "description": "What your broker user may touch; the broker closes the channel (403 ACCESS_REFUSED) for all else. "
    "Queues that the broker would name (`amq.gen-...`) are among it: give yours a name. A `reader` writes no requests.",
    "member": {
        "configure": r"^client\.{user}\..*$",
        "write": r"^(leveret\.requests|client\.{user}\..*)$",
        "read": r"^(leveret\.events\.{project}|client\.{user}\..*)$",
    },
    "reader": {
        "configure": r"^client\.{user}\..*$",
        "write": r"^(client\.{user}\..*)$",
        "read": r"^(leveret\.events\.{project}|client\.{user}\..*)$",
    },
}

#: Codes that a verdict may carry.
IN_VERDICTS = frozenset(
    {
        Code.INVALID_REQUEST,
        Code.UNSUPPORTED_CONTENT_TYPE,
        Code.UNKNOWN_TYPE,
        Code.BODY_TOO_LARGE,
        Code.UNAUTHENTICATED,
        Code.FORBIDDEN,
        Code.VM_NOT_FOUND,
        Code.VM_DELETED,
        Code.ID_CONFLICT,
        Code.NAME_TAKEN,
        Code.STATE_CONFLICT,
        Code.IMAGE_UNKNOWN,
        Code.NETWORK_UNKNOWN,
        Code.GROUP_UNKNOWN,
        Code.GROUP_NOT_FOUND,
        Code.GROUP_IN_USE,
        Code.PRECONDITION_FAILED,
        Code.PROJECT_NOT_FOUND,
        Code.QUOTA_EXCEEDED,
        Code.NO_CAPACITY,
        Code.NO_ADDRESS,
        Code.RATE_LIMITED,
    }
)
#: Codes that only REST answers with.
IN_REST = frozenset(
    {
        Code.NOT_FOUND,
        Code.METHOD_NOT_ALLOWED,
        Code.PROJECT_IN_USE,
        Code.TOKEN_NOT_FOUND,
        Code.HOST_NOT_FOUND,
        Code.HOST_CONFLICT,
        Code.AMQP_USER_NOT_FOUND,
        Code.UNAVAILABLE,
        Code.HANDLER_CRASHED,
        Code.INTERNAL,
    }
)


def told_in(code: Code) -> str:
    """Where a client reads a code: in a `verdict`, an `event` of a VM, or only in `rest`."""
    return "verdict" if code in IN_VERDICTS else "rest" if code in IN_REST else "event"


#: What the fields of the documents mean, by model.
FIELDS: dict[str, dict[str, str]] = {
    "CreateVm": {
        "name": "Unique among the project's VMs, and the guest's hostname. Left out, it gets a pleasant one.",
        "vcpus": "Virtual processors.",
        "memory_mib": "Memory in MiB.",
        "disk_gib": "Size of the disk in GiB; the image is grown to it.",
        "image": "What the disk is made from.",
        "ssh_keys": "OpenSSH public keys that may log in, one a string: `ssh-ed25519 AAAA... comment`.",
        "user_data": "User-data for cloud-init, as text. Never shown again, and wiped when the guest is ready.",
        "user_data_base64": "User-data of any bytes, in base64; instead of `user_data`.",
        "network": "The network of its interface.",
        "labels": "Yours to sort and find VMs by.",
        "placement": "Which hosts may have it.",
        "running": "Whether to start it once it is made.",
        "on_host_failure": "What becomes of it when its host is declared to be off (with proof, by an administrator): "
        "`none` waits for the host, with its disk; `restart` makes it anew on another one, without what was on its "
        "disk. Nothing becomes of it when its host is only silent.",
        "count": "So many of them at once, all or none. Their ids are UUIDv5 of the header `vm_id` (as namespace) and "
        '"1", "2" and so on; with a `name` they are called name-1, name-2 and so on. The verdict lists them in `vms`.',
        "wait_for_capacity": "When there is no room: accept it all the same, and let it stay `pending` until there is "
        "some, for at most an hour. The event `waiting` says why.",
    },
    "CreateGroup": {
        "name": "Unique among the project's groups.",
        "policy": "Its VMs keep apart (`spread`) or together (`pack`).",
        "enforcement": "Whether a VM is refused that would break it (`hard`), or placed as near to it as there is room "
        "(`soft`).",
        "topology": "Apart or together on hosts, or in zones.",
    },
    "DeleteGroup": {"name": "Which one."},
    "UpdateVm": {
        "name": "Its new name.",
        "labels": "Labels to set; one whose value is null is removed.",
    },
    "StopVm": {"grace_s": "Seconds that the guest has to shut down before it is switched off."},
    "ImageByName": {"name": "The name of a registered image."},
    "ImageByUrl": {
        "url": "Where hosts fetch it: http, https or (where allowed) file; without credentials.",
        "sha256": "Of the whole file, in hex.",
        "format": "What kind of file it is.",
    },
    "Placement": {
        "zones": "Only hosts of these zones; empty is any.",
        "require_labels": "Only hosts that have all of these labels.",
        "forbid_labels": "No host that has any of these labels.",
        "tolerate": "Hosts that are kept for somebody are meant too, when all their taints are named here.",
        "hosts": "Only these hosts, by name or id. For administrators, over REST: of a broker user it is `forbidden`.",
        "group": "The group of the project that it belongs to, and is placed with.",
        "strategy": "Prefer empty hosts (`spread`) or full ones (`pack`).",
    },
    "Verdict": {
        "request_id": "The request's header `request_id`, or its `message_id`.",
        "vm_id": "The request's VM; null when that could not be read, and for a request about a group.",
        "accepted": "Whether it was committed; for a dry run, whether it would have been.",
        "dry_run": "Whether this answers a dry run.",
        "generation": "Counts the accepted changes of what its host should do: names and labels are none. Usable as "
        "`if_match`.",
        "revision": "Changes whenever the VM as its owner sees it does, its ETag over REST; usable as `if_match`.",
        "state": "The VM's state right after.",
        "name": "The VM's name.",
        "address": "The VM's IPv4 address: known before it boots.",
        "vms": "The VMs of a request for several, in order; then the fields above say nothing, and `vm_id` is no VM.",
        "problem": "Why it was refused.",
    },
    "MadeVm": {
        "id": "The VM's id.",
        "name": "The VM's name.",
        "state": "The VM's state right after.",
        "address": "The VM's IPv4 address: known before it boots.",
    },
    "Problem": {
        "code": "What your program may branch on. A newer Leveret may say codes that are not listed here.",
        "message": "What happened, for a person.",
        "hint": "What to do about it, for a person.",
        "step": "The step in which it happened.",
        "host": "The host on which it happened.",
        "details": "More, depending on the code: counts, limits, `errors` with each faulty `field`.",
    },
    "CloudEvent": {
        "specversion": "The version of CloudEvents.",
        "id": "The same however often the event is sent.",
        "source": "The project, as /v1/projects/{project}.",
        "type": "What happened, with its version.",
        "subject": "The VM's id; the project, when it is not about a VM.",
        "time": "When it was committed, by RFC 3339.",
        "datacontenttype": "What `data` is.",
        "sequence": "The event's number in its project: a decimal integer as text. Without gaps, ever greater.",
        "data": "What this type of event says.",
        "traceparent": "The W3C trace context of the request whose event this is, if it had one.",
    },
    "StepTime": {"step": "The step's name.", "seconds": "How long it took."},
}
#: Better words for a reader from outside than the model's own.
DESCRIPTIONS: dict[str, str] = {
    "State": "Where a VM is, as last seen.",
    "Step": "What is being done with a VM right now.",
    "Code": "Stable reason codes: never renamed, only added to. `x-errors` has the hint to each.",
    "CloudEvent": "A CloudEvents 1.0 envelope in structured JSON.",
    "Verdict": "What became of a request. A field that equals its default is left out.",
    "StepTime": "How long one step of a build took.",
}
