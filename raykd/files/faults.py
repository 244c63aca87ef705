"""Named points where a test can kill the process, to prove that nothing is lost there.

`RAYKD_FAULT="train:step=30,rank=1"` kills (SIGKILL) the first process to reach that point with
those values, once: `RAYKD_FAULT_FIRED` names a file that is created by the kill and prevents a
second one. Several such points are separated by `;`, and the file of each ends with its number,
from 0: `fired.0`.
"""

import os
import signal
from collections.abc import Callable


def point(stage: str, *, first: Callable[[], None] | None = None, **where: object) -> None:
    """Kill this process if the environment asks for it here; otherwise do nothing.

    What is under way beside it is brought to its end `first`, so that a test knows what is left.
    """
    wanted = os.environ.get("RAYKD_FAULT")
    if not wanted:
        return
    fired = os.environ["RAYKD_FAULT_FIRED"]
    plans = wanted.split(";")
    for number, plan in enumerate(plans):
        if _is_met(plan, stage, where):
            if first:
                first()
            _kill_once(fired if len(plans) == 1 else f"{fired}.{number}")


def _is_met(plan: str, stage: str, where: dict[str, object]) -> bool:
    """Whether a point is the one that a plan names."""
    name, _, conditions = plan.partition(":")
    values = dict(part.split("=") for part in conditions.split(",") if part)
    return name == stage and all(str(where.get(key)) == value for key, value in values.items())


def _kill_once(fired: str) -> None:
    try:
        os.close(os.open(fired, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
