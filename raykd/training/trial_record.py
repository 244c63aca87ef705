"""What is known of one trial of a search, in its folder: its point as it begins, and how it ended.

A trial's id is the digest of its point. So a search that is given again finds the trials that it
has paid for, and a point that is proposed twice is trained once.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raykd.errors import StoreError
from raykd.files.atomic import read_json, write_json
from raykd.files.digests import digest_of
from raykd.training import run_files

FINISHED = "finished"
STOPPED = "stopped"
HEX = 12  # letters of an id


@dataclass(frozen=True)
class TrialRecord:
    """A trial that is over: `state` is "finished", or "stopped" by the scheduler at `step`.

    `value` is the metric that trials are compared by, of the weights that are kept; None of a
    stopped one.
    """

    state: str
    step: int
    value: float | None = None


def trial_id(params: Mapping[str, Any]) -> str:
    """The id of the trial at a point.

    Example:
        >>> trial_id({"optim.learning_rate": 0.01})
        'a3f8d0ce3093'
    """
    return digest_of(dict(params))[:HEX]


def begin(folder: Path, params: Mapping[str, Any], number: int) -> None:
    """Write the point of a trial in its folder, unless it was begun before."""
    path = folder / run_files.POINT
    if not path.exists():
        write_json(path, {"params": dict(params), "number": number})


def begun(run: Path) -> list[dict[str, Any]]:
    """The points of all trials that were begun in a run folder, in the order of their numbers."""
    found = [read_json(path) for path in run_files.trials(run).glob(f"*/{run_files.POINT}")]
    return [point["params"] for point in sorted(found, key=lambda point: point["number"])]


def write(folder: Path, record: TrialRecord) -> None:
    """Write how a trial ended; its weights and history stand there before."""
    write_json(folder / run_files.TRIAL, asdict(record))


def read(folder: Path) -> TrialRecord | None:
    """How a trial ended; None while it has not. StoreError if the file is no such record."""
    path = folder / run_files.TRIAL
    found = read_json(path)
    if found is None:
        return None
    try:
        return TrialRecord(**found)
    except TypeError:
        raise StoreError(
            f"{path} is damaged; delete it and give the same command, which trains it again"
        ) from None
