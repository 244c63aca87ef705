"""Macro-F1 and balanced accuracy of each model, over the resamples that its accuracy is over.

A frequent class can carry the accuracy while rare ones are lost; here each class counts alike. Only
classes with test rows count: of others nothing is known. In a resample that drew no row of a class,
that class is left out.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from raykd.reports import bootstrap
from raykd.reports.bootstrap import RESAMPLES, Sample, Values

MACRO_F1 = "macro_f1"
BALANCED_ACCURACY = "balanced_accuracy"
NAMES = (MACRO_F1, BALANCED_ACCURACY)
Answers = Mapping[int, NDArray[np.integer]]  # (n,) by seed; of one model without seeds under 0
Counts = NDArray[np.float64]


def samples(
    label: NDArray[np.integer],
    group: NDArray[np.integer],
    models: Mapping[str, Answers],
    *,
    num: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Sample]:
    """Both measures by name. `models` has student, and control, teacher and artefact if they are
    there.

    The draws of recordings and seeds are those of `bootstrap.resample` with the same `seed`.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    own = list(models["student"])
    other = list(models.get("control", {}))
    student_seeds, control_seeds = bootstrap.seed_weights(rng, own, other, num)
    one = np.ones((1 + num, 1))
    weights = {"student": student_seeds, "control": control_seeds, "teacher": one, "artefact": one}
    _, place = np.unique(group, return_inverse=True)
    present = np.unique(label)
    sums: list[Counts | None] = [_sums(label, place, present)]
    for answers in models.values():
        sums.append(np.concatenate([_hits(label, a, place, present) for a in answers.values()]))
        sums.append(np.concatenate([_sums(a, place, present) for a in answers.values()]))
    drawn, _ = bootstrap.draw_groups(rng, sums, np.bincount(place), num)
    counted = [part for part in drawn if part is not None]
    rows = counted[0][:, None, :]  # (1 + B, 1, C)
    found: dict[str, dict[str, Values]] = {name: {} for name in NAMES}
    for number, (model, answers) in enumerate(models.items()):
        shape = (1 + num, len(answers), len(present))
        hits = counted[1 + 2 * number].reshape(shape)
        answered = counted[2 + 2 * number].reshape(shape)
        rates = {
            MACRO_F1: _mean_of_classes(2 * hits, rows + answered, rows),
            BALANCED_ACCURACY: _mean_of_classes(hits, rows, rows),
        }
        for name, by_seed in rates.items():
            share = weights[model]
            found[name][model] = (by_seed * share).sum(1) / share.sum(1)
    return {name: _sample(len(label), values) for name, values in found.items()}


def _sample(n: int, values: Mapping[str, Values]) -> Sample:
    others = (values.get(model) for model in ("control", "teacher", "artefact"))
    return Sample(n, values["student"], *others)


def _sums(
    classes: NDArray[np.integer],
    place: NDArray[np.integer],
    present: NDArray[np.integer],
    rows: NDArray[np.bool_] | None = None,
) -> Counts:
    """(C, G): of the rows, how many of each recording are of each class that is present."""
    kept = np.isin(classes, present)
    if rows is not None:
        kept &= rows
    groups = int(place.max()) + 1
    cell = np.searchsorted(present, classes[kept]) * groups + place[kept]
    counts = np.bincount(cell, minlength=len(present) * groups)
    return counts.reshape(len(present), groups).astype(np.float64)


def _hits(
    label: NDArray[np.integer],
    answer: NDArray[np.integer],
    place: NDArray[np.integer],
    present: NDArray[np.integer],
) -> Counts:
    """(C, G): the right answers of each recording in each class."""
    return _sums(label, place, present, answer == label)


def _mean_of_classes(top: Counts, whole: Counts, rows: Counts) -> Counts:
    """(1 + B, S): the mean of top / whole over the classes that have rows in a resample."""
    drawn = rows > 0
    shares = np.where(drawn, top / np.where(drawn, whole, 1.0), 0.0)
    return shares.sum(2) / drawn.sum(2)
