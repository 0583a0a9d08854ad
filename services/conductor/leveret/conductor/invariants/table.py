"""Every invariant, in one table. docs/reliability.md shows it, a test has a mutant for each."""

from leveret.conductor.invariants import queries as q
from leveret.conductor.invariants.invariant import Invariant, Place

_BUG = "This cannot come about but by a defect, or by hand: keep the database as it is, and report it."
_RESTORE = "Put right the row by hand if somebody changed it by hand; else keep the database as it is, and report it."
_HEALS = "Leveret puts it right by itself; if it stays, look at the log of the conductors."

INVARIANTS: tuple[Invariant, ...] = (
    # Requests.
    Invariant(
        "vm_made_or_rejected",
        Place.ROWS,
        "No id has both a VM and a rejection in one project, and every rejection has a code.",
        _BUG,
        q.MADE_OR_REJECTED,
    ),
    Invariant(
        "deleted_id_stays_deleted",
        Place.ROWS,
        "No VM lives whose id was deleted before it was created.",
        "Delete the VM: its owner has asked for that already.",
        q.DELETED_STAYS,
    ),
    Invariant(
        "vm_accepted_once",
        Place.LOG,
        "Every VM was accepted by exactly one event, and every accepted VM has its row.",
        _BUG,
        q.ACCEPTED_ONCE,
    ),
    # Placement and capacity.
    Invariant(
        "host_counters_match_placements",
        Place.ROWS,
        "What a host's counters say is used is the sum over the VMs that are placed there.",
        _RESTORE,
        q.HOST_COUNTERS,
    ),
    Invariant(
        "host_not_overbooked",
        Place.ROWS,
        "No host has more placed on it than it offers.",
        _RESTORE,
        q.HOST_CAPACITY,
    ),
    Invariant(
        "placement_fits_state",
        Place.ROWS,
        "A VM that is building, running, stopped or deleting has a host; one that is pending or deleted has none.",
        _RESTORE,
        q.PLACEMENT_BY_STATE,
    ),
    Invariant(
        "placement_has_its_own_token",
        Place.ROWS,
        "Every placement has a token, no two have the same, and none is newer than the last that was given.",
        "After an older copy of the database was restored, set the sequence placement_tokens beyond every token that "
        "hosts have; else keep the database as it is, and report it.",
        q.PLACEMENT_TOKENS,
    ),
    Invariant(
        "group_kept",
        Place.ROWS,
        "The VMs of a group that is spread hard stand each on a host, or in a zone, of its own; packed hard, on one "
        "host.",
        _BUG,
        q.GROUPS_KEPT,
    ),
    # Projects and networks.
    Invariant(
        "quota_counters_match_vms",
        Place.ROWS,
        "What a project's counters say is used is the sum over its VMs that are not deleted.",
        _RESTORE,
        q.QUOTA_COUNTERS,
    ),
    Invariant(
        "quota_not_exceeded",
        Place.ROWS,
        "Every project has a quota, and uses no more than that.",
        _RESTORE,
        q.QUOTA_LIMITS,
    ),
    Invariant(
        "name_has_one_vm",
        Place.ROWS,
        "No two VMs of a project that are not deleted have the same name.",
        "Rename one of them: `leveret rename`.",
        q.NAMES,
    ),
    Invariant(
        "address_has_one_vm",
        Place.ROWS,
        "No two VMs that are not deleted have the same address of a network.",
        "Delete one of them, and create it anew.",
        q.ADDRESSES_UNIQUE,
    ),
    Invariant(
        "address_held_as_given",
        Place.ROWS,
        "Every address that is taken is that of a living VM, and every VM's address is taken by it.",
        _RESTORE,
        q.ADDRESSES_AGREE,
    ),
    # Life.
    Invariant(
        "error_says_why",
        Place.ROWS,
        "Every VM in error has a code and an event that tells it.",
        _BUG,
        q.ERRORS_EXPLAINED,
    ),
    Invariant(
        "wait_has_deadline",
        Place.ROWS,
        "Every VM that waits for something has a deadline.",
        "Set a deadline by hand: the sweeper then sees to it. Report it.",
        q.WAITS_HAVE_DEADLINES,
    ),
    Invariant(
        "deadline_kept",
        Place.ROWS,
        "Nothing is more than a minute past its deadline.",
        "The sweeper of any conductor sees to it: look whether a conductor runs, and at its log.",
        q.DEADLINES_KEPT,
    ),
    # Secrets.
    Invariant(
        "user_data_wiped",
        Place.ROWS,
        "User-data is gone as soon as the guest is up or the VM is deleted.",
        _BUG,
        q.USER_DATA_WIPED,
    ),
    Invariant(
        "secret_only_where_it_belongs",
        Place.LOG,
        "Neither user-data nor a token, nor its hash, stands in a request as it is kept or in an event.",
        "Remove it there by hand, and make what it protected anew. Report it.",
        q.USER_DATA_NOWHERE_ELSE,
    ),
    # The event log.
    Invariant(
        "event_told_in_time",
        Place.ROWS,
        "Every event is numbered and handed to the broker within a minute.",
        "The relay of any conductor does that: look whether a conductor runs and the broker takes messages.",
        q.EVENTS_TOLD,
    ),
    Invariant(
        "event_numbers_without_gap",
        Place.LOG,
        "A project's events are numbered from the oldest that is kept to the newest without a gap.",
        _BUG,
        q.EVENTS_NUMBERED,
    ),
    Invariant(
        "event_order_is_vm_order",
        Place.LOG,
        "The events of one VM are numbered in the order in which they came about.",
        _BUG,
        q.EVENTS_IN_ORDER,
    ),
    Invariant(
        "move_is_legal_and_logged",
        Place.LOG,
        "The log of every VM is a chain of legal moves, each once, from its first state to its present one.",
        _BUG,
        q.MOVES_CHAINED,
    ),
    # The broker.
    Invariant(
        "broker_is_furnished",
        Place.BROKER,
        "Every exchange and queue that Leveret needs is there.",
        "What is missing is declared again within a minute. What stood in it is gone.",
    ),
    Invariant(
        "queue_is_consumed",
        Place.BROKER,
        "Every queue of the conductors has a consumer, and so has that of every host that is heard of.",
        "Restart the process that should consume it.",
    ),
    Invariant(
        "queue_gets_shorter",
        Place.BROKER,
        "No queue holds messages that do not get fewer.",
        "Look at the log of what consumes it; if there is simply too much to do, start another conductor.",
    ),
    Invariant(
        "no_dead_letters",
        Place.BROKER,
        "No message lies in leveret.dead: none has crashed its handler, and none was refused with nobody to tell.",
        "Look at their headers with the broker's own tools: `dead_message` says what was wrong, `dead_user` whose it "
        "was. Then purge the queue.",
    ),
    # The hosts.
    Invariant(
        "vm_runs_once",
        Place.HOSTS,
        "At most one host runs a domain of a VM.",
        "Stop the domain whose token is not the VM's at once: two guests may write to what they share.",
    ),
    Invariant(
        "domain_is_where_it_is_placed",
        Place.HOSTS,
        "Every domain of a VM stands on the host that it is placed on, with the token of that placement.",
        "An older placement's domain is removed when its host reports it; one that stays holds data: look at it, then "
        "`virsh undefine` it by hand.",
    ),
    Invariant(
        "domain_has_a_vm",
        Place.HOSTS,
        "Every domain of Leveret's on a host is that of a VM that is not deleted.",
        "Leveret leaves alone what it does not know. Restore a newer copy of the database, or remove it by hand.",
    ),
    Invariant(
        "vm_has_its_domain",
        Place.HOSTS,
        "Every VM that is running has a running domain, and every one that is stopped one that is off.",
        _HEALS,
    ),
    Invariant(
        "files_are_of_placed_vms",
        Place.HOSTS,
        "The VMs with files in a host's pool are those that are placed on it.",
        "Files of a VM that is not placed there may be removed by hand, when no domain uses them.",
    ),
    Invariant(
        "pool_holds_nothing_else",
        Place.HOSTS,
        "A host's pool holds VMs, the image cache, and nothing else.",
        "Remove by hand what does not belong to Leveret. What Leveret itself left is removed when the worker starts.",
    ),
)

BY_NAME = {invariant.name: invariant for invariant in INVARIANTS}
