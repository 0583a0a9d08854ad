"""What becomes of a VM: pure functions from a row and a fact to a change, or to a refusal.

No clock, no database, no bus in here. `now` is always Postgres's own, so that one clock sets every deadline (law 9);
a change says everything: counters, addresses and commands follow from the row before and the row after.
"""

from leveret.conductor.decisions.deadlines import on_deadline
from leveret.conductor.decisions.fencing import is_waiting_for_its_host, on_fence, on_retire
from leveret.conductor.decisions.parts import Limits
from leveret.conductor.decisions.placement import placed, unplaceable, wait
from leveret.conductor.decisions.reports import HOPELESS, HOST_FAULTS, on_report
from leveret.conductor.decisions.requests import REMEMBERED_REQUESTS, Verb, is_known, on_request, remember

__all__ = [
    "HOPELESS",
    "HOST_FAULTS",
    "REMEMBERED_REQUESTS",
    "Limits",
    "Verb",
    "is_known",
    "is_waiting_for_its_host",
    "on_deadline",
    "on_fence",
    "on_report",
    "on_request",
    "on_retire",
    "placed",
    "remember",
    "unplaceable",
    "wait",
]
