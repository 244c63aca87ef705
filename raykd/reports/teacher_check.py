"""What is known of a teacher once it has scored, before anything is trained on its answers."""

import numpy as np
from numpy.typing import NDArray

from raykd.data.table import Source
from raykd.reports import bootstrap
from raykd.reports.bootstrap import Hits
from raykd.reports.evidence import chance_words
from raykd.store.reader import Store
from raykd.training.predictions import TestPlaces

SPLIT = "val"  # test rows are looked at once, by the report


def answers(store: Store, places: TestPlaces, split: str) -> NDArray[np.integer]:
    """(n,): the teacher's answer at each place of a split, -1 where it has none."""
    if places.is_text:
        return store.stepwise("answer", split, places.row_id, places.steps)
    return store.aligned("answer", split, places.row_id, -1)


def warning(store: Store, source: Source) -> str:
    """That the teacher is at chance on the labelled validation rows; nothing where it is not."""
    places = TestPlaces.of_source(source, SPLIT)
    answer = answers(store, places, SPLIT)
    known = (places.label >= 0) & (answer >= 0)
    if not known.any():
        return ""
    label = places.label[known]
    right = answer[known] == label
    sample = bootstrap.resample(Hits(places.group[known], right[None], [0]))
    return chance_words(label, source.table().classes, sample.student, "validation")
