"""Resampled accuracies as the tables of report.json."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raykd.reports import bootstrap, schema
from raykd.reports.bootstrap import Hits, Interval

METRIC = "accuracy"
Predicted = NDArray[np.integer]  # (n,) the class that a model gives each test row


def metrics(values: bootstrap.Values | None, n: int, name: str = METRIC) -> schema.Metrics:
    """The headline metric, or another, of a model that is there, else nothing."""
    return {} if values is None else {name: schema.Estimate(**vars(bootstrap.interval(values, n)))}


def ratio(found: Interval | None) -> schema.Ratio:
    """An interval, all null where nothing was measured."""
    return (
        schema.Ratio()
        if found is None
        else schema.Ratio(value=found.value, lo=found.lo, hi=found.hi)
    )


def beside(
    label: NDArray, group: NDArray, student: Mapping[int, Predicted], other: Mapping[int, Predicted]
) -> schema.Beside:
    """Another training of the student's seeds, and the student's accuracy less its, paired by rows
    and seeds.
    """
    right = [np.stack(list(arm.values())) == label for arm in (student, other)]
    sample = bootstrap.resample(Hits(group, right[0], list(student), right[1], list(other)))
    return schema.Beside(
        metrics=metrics(sample.control, sample.n), lost=ratio(bootstrap.difference(sample))
    )


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: string keys, Python numbers, and None for NaN and infinities."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
