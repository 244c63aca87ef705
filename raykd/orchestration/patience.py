"""How long losses are made good: as long as the work goes forward, and for a time without."""

import time
from collections.abc import Callable

from raykd.orchestration.session import causes, own_fault

# Of Ray: a process or a node is lost, or could not be had. What a task raised itself is none.
LOST = {
    "ActorDiedError",
    "ActorUnavailableError",
    "ActorUnschedulableError",
    "LocalRayletDiedError",
    "NodeDiedError",
    "ObjectLostError",
    "ObjectRefStreamEndOfStreamError",
    "OwnerDiedError",
    "PreemptionError",
    "RayActorError",
    "WorkerCrashedError",
    "WorkerGroupStartupFailedError",
    "WorkerGroupStartupTimeoutError",
    "WorkerHealthCheckFailedError",
    "WorkerHealthCheckTimeoutError",
}


def is_lost(error: BaseException) -> bool:
    """Whether an error tells of a lost process or node, which a repetition may not meet again."""
    if own_fault(error):
        return False
    names = {base.__name__ for link in causes(error) for base in type(link).__mro__}
    return bool(names & LOST)


class Patience:
    """Whether a stage whose workers were lost too often begins again.

    Ray counts losses, and a node that dies costs several of them within seconds. So what counts
    here is the time: `limit_s` since the work last went forward by `least`.
    """

    def __init__(
        self, limit_s: float, *, least: int = 1, clock: Callable[[], float] = time.monotonic
    ):
        self.limit_s = limit_s
        self.least = least
        self.clock = clock
        self.since = clock()
        self.reached = 0

    def again(self, error: BaseException, reached: int) -> bool:
        """Whether to begin again after an error, with `reached` of the work done."""
        if not is_lost(error):
            return False
        if reached - self.reached >= self.least:
            self.reached = reached
            self.since = self.clock()
            return True
        return self.clock() - self.since < self.limit_s
