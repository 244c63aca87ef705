"""The shape of compare.json, version 1: finished runs side by side, each held against the first.

A difference is this run's less the first's, on the same test rows. What was not measured is null.
"""

from typing import Any, Literal

from pydantic import AliasChoices, Field

from raykd.reports.schema import Estimate, Metrics, Part, Ratio, ReportData, Retentions

VERSION = 1
Verdict = Literal["better", "worse", "not shown to differ"]


class Change(Part):
    """One recipe key that a run sets otherwise than the first; null where it is not set."""

    key: str
    first: Any
    here: Any


class Difference(Estimate):
    """A paired difference; better or worse only where its interval leaves 0 out."""

    verdict: Verdict


class ComparedRun(Part):
    """One run. Its student's accuracy less the first run's, over all rows and by part; null in the
    first run itself.

    `others` are the same differences of what else was `measured`: of losses, and of students as
    drafters.
    """

    name: str
    folder: str
    recipe_digest: str
    technique: str
    setting: str
    seeds: list[int]
    steps: int
    changes: list[Change]
    teacher: Estimate | None
    control: Estimate | None
    student: Estimate
    gap_closed: Ratio
    retention: Retentions
    artefact_bytes: int | None
    compression: float | None
    training_cost: float | None
    bytes_per_row: float | None
    accuracy: Difference | None
    thriving: Difference | None
    rest: Difference | None
    random: Difference | None
    measured: Metrics
    others: dict[str, Difference]


class Comparison(Part):
    """The whole of it.

    `digest` is of the files it was made from; `thriving_of` names whose thriving rows are meant.
    """

    version: Literal[1] = Field(
        VERSION, validation_alias=AliasChoices("schema", "version"), serialization_alias="schema"
    )
    metric: str
    data: ReportData
    thriving_of: str | None
    thriving_rows: int
    runs: list[ComparedRun]
    warnings: list[str]
    digest: str
