"""Named points where a test can kill the process, to prove that nothing is lost there.

`RAYKD_FAULT="train:step=30,rank=1"` kills (SIGKILL) the first process to reach that point with
those values, once: `RAYKD_FAULT_FIRED` names a file that is created by the kill and prevents a
second one.
"""

import os
import signal


def point(stage: str, **where: object) -> None:
    """Kill this process if the environment asks for it here; otherwise do nothing."""
    wanted = os.environ.get("RAYKD_FAULT")
    if not wanted:
        return
    name, _, conditions = wanted.partition(":")
    wanted_values = dict(part.split("=") for part in conditions.split(",") if part)
    if name != stage or any(str(where.get(k)) != v for k, v in wanted_values.items()):
        return
    try:
        os.close(os.open(os.environ["RAYKD_FAULT_FIRED"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
