"""What is known of a teacher once it has scored, before anything is trained on its answers."""

import numpy as np
from numpy.typing import NDArray

from raykd.data import Dataset
from raykd.reports import bootstrap
from raykd.reports.bootstrap import Hits
from raykd.reports.evidence import chance_words
from raykd.store.reader import Store
from raykd.training.predictions import TestPlaces

SPLIT = "val"  # test rows are looked at once, by the report


def answers(store: Store, dataset: Dataset, split: str) -> NDArray[np.integer]:
    """(n,): the teacher's answer at each place of a split, -1 where it has none."""
    rows = dataset.splits[split]
    if rows.is_text:
        return store.stepwise("answer", split, rows.row_id, rows.mask.sum(1))
    return store.aligned("answer", split, rows.row_id, -1)


def warning(store: Store, dataset: Dataset) -> str:
    """That the teacher is at chance on the labelled validation rows; nothing where it is not."""
    places = TestPlaces.of(dataset.splits[SPLIT])
    answer = answers(store, dataset, SPLIT)
    known = (places.label >= 0) & (answer >= 0)
    if not known.any():
        return ""
    label = places.label[known]
    right = answer[known] == label
    sample = bootstrap.resample(Hits(places.group[known], right[None], [0]))
    return chance_words(label, dataset.classes, sample.student, "validation")
