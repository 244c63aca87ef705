"""report.json from what was predicted: each figure with its control, its seeds, its interval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from raykd.reports import bootstrap, class_rates, schema, sentences
from raykd.reports.bootstrap import Hits, Sample
from raykd.reports.intervals import Predicted, beside, metrics, plain, ratio
from raykd.reports.text_measures import Measure
from raykd.teacher.statistics import HISTOGRAM

BINS = HISTOGRAM
MOST_CLASSES = 64  # told one by one


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything a report is made of. Arrays follow the test split; rows with a negative label are
    left out.

    Rows without an answer of the teacher are left out of what is compared with it.

    `best_seed` names the student that was exported, chosen on validation rows; the confusion table
    is of it.
    """

    recipe_digest: str
    technique: str
    setting: str = ""
    seeds: Sequence[int]
    data_name: str
    data_rows: Mapping[str, int]  # train, val, test
    tested: int | None = None  # of the test rows, how many have a label
    test_digest: str = ""
    classes: Sequence[str]
    row_id: NDArray[np.integer] | None = None  # (n,) counted from 0 where rows have none
    label: NDArray[np.integer]  # (n,)
    group: NDArray[np.integer]  # (n,) the recording of each row
    student: Mapping[int, Predicted]  # by seed
    control: Mapping[int, Predicted] = field(default_factory=dict)
    beside: Mapping[str, Mapping[int, Predicted]] = field(
        default_factory=dict
    )  # other trainings, by name and seed
    teacher: Predicted | None = None  # -1 where it has no answer
    artefact: Predicted | None = None
    measures: Mapping[str, Measure] = field(
        default_factory=dict
    )  # beside accuracy, by name; of labelled places alone
    thriving: NDArray[np.int8] | None = None  # (n,) 1, 0, and -1 where it is unknown
    saliency: NDArray[np.floating] | None = None  # of any split; NaN where unknown
    histogram: Mapping[str, Any] | None = None  # of saliency: counts, edges, q75; in its place
    best_seed: int | None = None
    student_params: int | None = None
    control_params: int | None = None
    teacher_info: Mapping[str, Any] = field(default_factory=dict)  # params, bytes, dtype
    artefact_info: Mapping[str, Any] = field(
        default_factory=dict
    )  # path, format, bytes, parity, latency
    training_cost: float | None = None
    throughput: Mapping[str, float] = field(default_factory=dict)  # of the best seed's student
    store: Mapping[str, Any] = field(default_factory=dict)  # id, rows, bytes, bytes_per_row, codec
    mlflow: Mapping[str, Any] = field(default_factory=dict)  # uri, experiment, run_id
    history: Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]] = field(
        default_factory=dict
    )  # arm
    search: Mapping[str, Any] | None = None  # metric, trials, best
    machine: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    asks_control: bool = True
    asks_valence: bool = True  # else nothing is said of saliency and of rows that thrive
    phase_ends: Sequence[int] = ()  # the steps at which a student's phases end


def build(evidence: Evidence) -> dict[str, Any]:
    """The report as plain JSON values, checked against its schema."""
    e = _labelled(evidence)
    taught = _taught(e)
    alone = replace(e, teacher=None) if taught is not e else e
    report = schema.Report(**_described(e), **_measured(alone, taught))
    return report.model_dump(mode="json", by_alias=True)


def _described(e: Evidence) -> dict[str, Any]:
    """The parts that are passed through."""
    return {
        "recipe_digest": e.recipe_digest,
        "technique": e.technique,
        "setting": e.setting,
        "data": _data(e),
        "classes": list(e.classes) if _tells_classes(e) else [],
        "seeds": list(e.seeds),
        "compression": _compression(e.teacher_info, e.student_params, e.artefact_info.get("bytes")),
        "training_cost": schema.Cost(ratio=plain(e.training_cost)),
        "throughput": schema.Throughput(**plain(e.throughput)),
        "store": schema.ReportStore(**plain(e.store)),
        "mlflow": schema.Tracking(**plain(e.mlflow)),
        "curves": plain(e.history),
        "phase_ends": list(e.phase_ends),
        "asks_valence": e.asks_valence,
        "valence": _histogram(e),
        "search": None if e.search is None else schema.ReportSearch(**plain(e.search)),
        "machine": plain(e.machine),
        "versions": plain(e.versions),
    }


def _measured(e: Evidence, taught: Evidence) -> dict[str, Any]:
    """The parts that are computed from predictions: of the models alone, and of the rows that the
    teacher answers, which all is over that compares with it.
    """
    alone = _samples(e)
    sample, others = alone
    paired, paired_others = alone if taught is e else _samples(taught)
    seed = _exported(e)
    per_class = _per_class(e, taught) if _tells_classes(e) else []
    closed = ratio(bootstrap.gap_closed(paired))
    gain = ratio(bootstrap.difference(sample))
    by_class = {name: each for name, each in paired_others.items() if name in class_rates.NAMES}
    no_better = chance_words(taught.label, e.classes, paired.teacher, "test")
    judged = replace(paired, teacher=None) if no_better else paired
    if no_better:  # what is kept of an accuracy that guessing has, too, means nothing
        by_class = {name: replace(found, teacher=None) for name, found in by_class.items()}
    why = no_better or sentences.gap_words(
        _first(paired.teacher), _first(paired.control), closed.value
    )
    verdict = sentences.verdict(closed.model_dump(), gain.model_dump())
    lost = sentences.lost_classes(
        [row.model_dump() for row in _per_class(taught, taught)] if per_class else []
    )
    return {
        "teacher": schema.ReportTeacher(
            **plain(e.teacher_info), metrics=_metrics("teacher", paired, paired_others)
        ),
        "control": schema.ReportModel(
            params=e.control_params, metrics=_metrics("control", sample, others)
        ),
        "student": schema.ReportModel(
            params=e.student_params, metrics=_metrics("student", sample, others)
        ),
        "beside": {
            name: beside(e.label, e.group, e.student, arm) for name, arm in e.beside.items()
        },
        "artefact": _artefact(e, sample, others, seed)
        | {"retention": ratio(bootstrap.retention(judged, "artefact"))},
        "retention": _retentions(taught, judged),
        "kept": {name: ratio(bootstrap.retention(found)) for name, found in by_class.items()},
        "gap_closed": closed,
        "gap_words": why,
        "gain": gain,
        "gains": {name: ratio(bootstrap.difference(found)) for name, found in others.items()},
        "warnings": [w for w in (why, verdict, *_cautions(e, taught), *lost, *e.warnings) if w],
        "per_class": per_class,
        "confusion": _confusion(e.label, e.student[seed], len(e.classes))
        if _tells_classes(e)
        else [],
        "confusion_seed": seed,
    }


def _samples(e: Evidence) -> tuple[Sample, dict[str, Sample]]:
    """The accuracies over the resamples of these rows, and what else was measured by name."""
    others = {name: measure.sample() for name, measure in e.measures.items()}
    return bootstrap.resample(_hits(e)), others | _by_class(e)


def chance_words(
    label: NDArray[np.integer], classes: Sequence[str], teacher: bootstrap.Values | None, split: str
) -> str:
    """That a teacher is no better than always the same answer to rows of a split; else nothing.

    `label` is of the rows that `teacher`, its accuracy with resamples, is over.
    """
    guess = bootstrap.chance(label)
    if teacher is None or not bootstrap.at_chance(teacher, guess, len(label)):
        return ""
    often = classes[int(np.bincount(label).argmax())]
    return sentences.at_chance(float(teacher[0]), guess, often, f"{len(label):,} {split} rows")


def _tells_classes(e: Evidence) -> bool:
    return len(e.classes) <= MOST_CLASSES


def _by_class(e: Evidence) -> dict[str, Sample]:
    """What counts each class alike, by name; nothing where classes are too many to tell."""
    if not _tells_classes(e):
        return {}
    models = {"student": e.student}
    models |= {"control": e.control} if e.control else {}
    models |= {
        name: {0: answer}
        for name, answer in (("teacher", e.teacher), ("artefact", e.artefact))
        if answer is not None
    }
    return class_rates.samples(e.label, e.group, models)


def _metrics(model: str, sample: Sample, others: Mapping[str, Sample]) -> schema.Metrics:
    """A model's accuracy and what else was measured of it."""
    found = metrics(getattr(sample, model), sample.n)
    for name, other in others.items():
        found |= metrics(getattr(other, model), other.n, name)
    return found


def _data(e: Evidence) -> schema.ReportData:
    return schema.ReportData(
        name=e.data_name,
        rows=plain(e.data_rows),
        tested=e.tested,
        groups=len(np.unique(e.group)),
        test_sha256=e.test_digest,
    )


def _exported(e: Evidence) -> int:
    return min(e.student) if e.best_seed is None else e.best_seed


def _labelled(e: Evidence) -> Evidence:
    """`e` without the test rows that have no label."""
    known = e.label >= 0
    assert known.any(), "a report needs labelled test rows"
    assert e.student, "a report needs a student"
    return _only(e, known)


def _taught(e: Evidence) -> Evidence:
    """`e` without the test rows that the teacher has no answer to; without the teacher if it has
    none at all.
    """
    if e.teacher is None:
        return e
    answered = e.teacher >= 0
    if answered.all():
        return e
    return _only(e, answered) if answered.any() else replace(e, teacher=None)


def _only(e: Evidence, known: NDArray[np.bool_]) -> Evidence:
    """`e` with these of its test rows alone; its measures stay as they are."""
    arrays = {
        k: getattr(e, k) for k in ("row_id", "label", "group", "teacher", "artefact", "thriving")
    }
    return replace(
        e,
        **{k: None if v is None else np.asarray(v)[known] for k, v in arrays.items()},
        student=_rows(e.student, known),
        control=_rows(e.control, known),
        beside={name: _rows(arm, known) for name, arm in e.beside.items()},
    )


def _rows(arm: Mapping[int, Predicted], known: NDArray[np.bool_]) -> dict[int, Predicted]:
    return {seed: np.asarray(predicted)[known] for seed, predicted in sorted(arm.items())}


def _hits(e: Evidence, rows: NDArray[np.bool_] | None = None) -> Hits:
    return Hits(
        groups=e.group,
        student=np.stack(list(e.student.values())) == e.label,
        student_seeds=list(e.student),
        control=np.stack(list(e.control.values())) == e.label if e.control else None,
        control_seeds=list(e.control),
        teacher=None if e.teacher is None else e.teacher == e.label,
        artefact=None if e.artefact is None else e.artefact == e.label,
        rows=rows,
    )


def _first(values: bootstrap.Values | None) -> float | None:
    return None if values is None else float(values[0])


def _retentions(e: Evidence, sample: Sample) -> schema.Retentions:
    parts = {"all": _retention(e, sample, None)}
    for name, rows in parts_of(e.thriving).items():
        part = bootstrap.resample(_hits(e, rows))
        parts[name] = _retention(
            e, part if sample.teacher is not None else replace(part, teacher=None), rows
        )
    return schema.Retentions(**parts)


def thrives(thriving: NDArray[np.int8] | None) -> TypeGuard[NDArray[np.int8]]:
    """Whether any row is known to thrive."""
    return thriving is not None and bool((thriving == 1).any())


def parts_of(thriving: NDArray[np.int8] | None) -> dict[str, NDArray[np.bool_]]:
    """The test rows by part, none of them empty: thriving, the rest, and as many as thrive drawn at
    random. A row of which it is unknown is in no part.

    What holds on thriving rows and on the random ones alike is no effect of thriving, but of how
    few rows they are.
    """
    if not thrives(thriving):
        return {}
    high = thriving == 1
    known = np.flatnonzero(thriving >= 0)
    drawn = np.random.default_rng(0).permutation(len(known))[: int(high.sum())]
    random = np.zeros(len(thriving), bool)
    random[known[drawn]] = True
    return {
        name: rows
        for name, rows in (("thriving", high), ("rest", thriving == 0), ("random", random))
        if rows.any()
    }


def _retention(e: Evidence, sample: Sample, rows: NDArray[np.bool_] | None) -> schema.Retention:
    guess = bootstrap.chance(e.label, rows)
    corrected = bootstrap.corrected_retention(sample, guess)
    return schema.Retention(
        **ratio(bootstrap.retention(sample)).model_dump(),
        chance_corrected=corrected and corrected.value,
        chance_corrected_lo=corrected and corrected.lo,
        chance_corrected_hi=corrected and corrected.hi,
        chance=guess,
        n=sample.n,
    )


def _artefact(
    e: Evidence, sample: Sample, others: Mapping[str, Sample], seed: int
) -> dict[str, Any]:
    return {
        **plain(e.artefact_info),
        "seed": seed if e.artefact_info else None,
        "metrics": _metrics("artefact", sample, others),
    }


def _compression(
    teacher: Mapping[str, Any], params: int | None, size: int | None
) -> schema.Compression:
    whole = teacher["bytes"] / size if teacher.get("bytes") and size else None
    shape = teacher["params"] / params if teacher.get("params") and params else None
    bits = whole / shape if whole and shape else None
    return schema.Compression(ratio=whole, architecture=shape, bits=bits)


def _cautions(e: Evidence, taught: Evidence) -> list[str]:
    missing = {
        "teacher": taught.teacher is None,
        "control": e.asks_control and not e.control,
        "artefact": e.artefact is None,
        "store": not e.store,
        "thriving": e.asks_valence and not thrives(e.thriving),
    }
    named = enumerate(e.classes) if _tells_classes(e) else ()
    absent = [name for i, name in named if not (e.label == i).any()]
    found = sentences.cautions(
        seeds=len(e.student), groups=len(np.unique(e.group)), absent=absent, missing=missing
    )
    unanswered = len(e.label) - len(taught.label)
    return found + ([sentences.unanswered(unanswered, len(e.label))] if unanswered else [])


def _per_class(e: Evidence, taught: Evidence) -> list[schema.ClassRow]:
    """Each class's rows and recalls; the teacher's is over the rows that it answers."""
    hits = _hits(e)
    arms = {name: (getattr(hits, name), e.label) for name in ("control", "student", "artefact")}
    arms |= {"teacher": (_hits(taught).teacher, taught.label)}
    return [
        schema.ClassRow(
            name=name,
            rows=int((e.label == i).sum()),
            **{arm: _recall(right, label == i) for arm, (right, label) in arms.items()},
        )
        for i, name in enumerate(e.classes)
    ]


def _recall(hits: NDArray[np.bool_] | None, rows: NDArray[np.bool_]) -> float | None:
    return None if hits is None or not rows.any() else float(hits[..., rows].mean())


def _confusion(label: NDArray, predicted: Predicted, classes: int) -> list[list[int]]:
    """(C, C) counts: rows are true classes, columns predicted ones."""
    return (
        np.bincount(label * classes + predicted, minlength=classes**2)
        .reshape(classes, classes)
        .tolist()
    )


def _histogram(e: Evidence) -> schema.Histogram | None:
    if e.histogram is not None:
        return schema.Histogram(**e.histogram)
    saliency = e.saliency
    known = np.array([]) if saliency is None else saliency[np.isfinite(saliency)]
    if not len(known):
        return None
    counts, edges = np.histogram(known, BINS)
    return schema.Histogram(
        counts=counts.tolist(), edges=edges.tolist(), q75=float(np.quantile(known, 0.75))
    )
