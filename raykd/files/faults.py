"""Named points where a test can kill or stop the process, to prove that nothing is lost there.

`RAYKD_FAULT="train:step=30,rank=1"` kills (SIGKILL) the first process to reach that point with
those values, once: `RAYKD_FAULT_FIRED` names a file that is created by the kill and prevents a
second one. With `signal=STOP` among them the process is stopped instead (SIGSTOP). Several such
points are separated by `;`, and the file of each ends with its number, from 0: `fired.0`.
"""

import os
import signal
from collections.abc import Callable


def point(stage: str, *, first: Callable[[], None] | None = None, **where: object) -> None:
    """Kill or stop this process if the environment asks for it here; otherwise do nothing.

    What is under way beside it is brought to its end `first`, so that a test knows what is left.
    """
    wanted = os.environ.get("RAYKD_FAULT")
    if not wanted:
        return
    fired = os.environ["RAYKD_FAULT_FIRED"]
    plans = wanted.split(";")
    for number, plan in enumerate(plans):
        values = _values(plan)
        sent = signal.Signals[f"SIG{values.pop('signal', 'KILL')}"]
        name = plan.partition(":")[0]
        if name == stage and all(str(where.get(key)) == value for key, value in values.items()):
            if first:
                first()
            _send_once(sent, fired if len(plans) == 1 else f"{fired}.{number}")


def _values(plan: str) -> dict[str, str]:
    """What a plan says of its point."""
    conditions = plan.partition(":")[2]
    return dict(part.split("=") for part in conditions.split(",") if part)


def _send_once(sent: signal.Signals, fired: str) -> None:
    try:
        os.close(os.open(fired, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), sent)
