"""What must always hold, and how that is found out. The table of contents is `INVARIANTS`."""

from leveret.conductor.invariants.broker import BrokerCheck
from leveret.conductor.invariants.database import check_database
from leveret.conductor.invariants.hosts import HostCheck
from leveret.conductor.invariants.invariant import Broken, Findings, Invariant, Place
from leveret.conductor.invariants.table import BY_NAME, INVARIANTS

__all__ = [
    "BY_NAME",
    "INVARIANTS",
    "Broken",
    "BrokerCheck",
    "Findings",
    "HostCheck",
    "Invariant",
    "Place",
    "check_database",
]
