"""Where VMs go: a fleet of hosts, wishes, and for each wish a host or the reason why there is none.

Pure: no database, no clock, no bus. What two conductors decide at once is not its business: the claim in SQL settles
that, and the loser asks again with facts that it has just read.
"""

from leveret.conductor.scheduling.constraints import CONSTRAINTS, admits
from leveret.conductor.scheduling.fleet import Chosen, Fleet
from leveret.conductor.scheduling.group import GroupView
from leveret.conductor.scheduling.host import Host
from leveret.conductor.scheduling.refusal import Fit, Refused
from leveret.conductor.scheduling.scores import SCORES
from leveret.conductor.scheduling.wish import Wish

__all__ = ["CONSTRAINTS", "SCORES", "Chosen", "Fit", "Fleet", "GroupView", "Host", "Refused", "Wish", "admits"]
