"""The shape of report.json, version 1: closed tables, so that a misspelt or missing key is an error
at once.

What was not measured is null, and says so in `warnings`. Keys are only added within a version,
never renamed.
"""

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field

VERSION = 1


class Part(BaseModel):
    """A closed, immutable table of finite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Estimate(Part):
    """A value with its 95 % interval from `n` test rows."""

    value: float
    lo: float
    hi: float
    n: int


class Ratio(Part):
    """A ratio with its 95 % interval; all null where there is nothing to divide by."""

    value: float | None = None
    lo: float | None = None
    hi: float | None = None


class Retention(Ratio):
    """m_S / m_T over `n` rows; corrected: (m_S - chance) / (m_T - chance)."""

    chance_corrected: float | None = None
    chance_corrected_lo: float | None = None
    chance_corrected_hi: float | None = None
    chance: float | None = None
    n: int = 0


class Retentions(Part):
    """Over all test rows, the thriving quarter, the other rows, and as many as thrive, drawn at
    random.
    """

    all: Retention = Retention()
    thriving: Retention = Retention()
    rest: Retention = Retention()
    random: Retention = Retention()


Metrics = dict[str, Estimate]


class ReportTeacher(Part):
    params: int | None = None
    bytes: int | None = None
    dtype: str | None = None
    metrics: Metrics = {}


class ReportModel(Part):
    params: int | None = None
    metrics: Metrics = {}


class Beside(Part):
    """Another training of the same student, seed by seed.

    `lost`: the student's accuracy less this one's.
    """

    metrics: Metrics = {}
    lost: Ratio = Ratio()


class ReportParity(Part):
    """The artefact against the trained student: largest difference of logits, share of equal
    decisions.

    `relative` is over the largest logit; `alone_agreement` the share of rows decided alike alone
    and in a batch. Of text, what both reach at the `positions` that were judged.
    """

    max_abs_diff: float | None = None
    agreement: float | None = None
    relative: float | None = None
    alone_agreement: float | None = None
    positions: int | None = None
    nll: dict[str, float] = {}
    accuracy: dict[str, float] = {}


class Time(Part):
    """One model as one runtime executes it; its time over the artefact's, above 1 where the
    artefact is quicker.
    """

    model: str
    runtime: str
    ratio: float


class Latency(Part):
    """Time of the artefact over the other's, one row at a time on this machine; below 1 is faster.

    Both as onnxruntime executes them, or the other as torch does where it cannot be written as
    ONNX.
    """

    ratio_vs_teacher: float | None = None
    ratio_vs_fp32_student: float | None = None
    rows: list[Time] = []
    threads: int | None = None
    flags: str | None = None


class ReportTensor(Part):
    """One rounded tensor of the artefact: bytes of codes and scales, error = |W - Q(W)| / |W|."""

    name: str
    shape: list[int]
    kind: str
    bytes: dict[str, int]
    error: float


class ReportUnrounded(Part):
    """A layer that the artefact computes with in float32, why, and how it is stored."""

    name: str
    reason: str
    stored: str = "float32"


class ReportArtefact(Part):
    path: str | None = None
    format: str | None = None
    bytes: int | None = None
    seed: int | None = None
    metrics: Metrics = {}
    retention: Ratio = Ratio()
    parity: ReportParity = ReportParity()
    latency: Latency = Latency()
    bytes_by_kind: dict[str, int] = {}
    tensors: list[ReportTensor] = []
    computed_in_float32: list[ReportUnrounded] = []
    needs_raykd: str | None = None  # why there is no file for onnxruntime


class ReportData(Part):
    """`groups` counts the test recordings, the units that the bootstrap resamples; `test_sha256` is
    of their rows, of which `tested` have a label.
    """

    name: str
    rows: dict[Literal["train", "val", "test"], int]
    tested: int | None = None
    groups: int
    test_sha256: str = ""


class Compression(Part):
    """ratio = bytes of teacher / artefact; architecture = their parameters; bits = ratio /
    architecture.
    """

    ratio: float | None = None
    architecture: float | None = None
    bits: float | None = None


class Cost(Part):
    """Time to train the student, teacher included, over the time to train the control."""

    ratio: float | None = None


class Throughput(Part):
    """How fast the student was trained: by all workers, and as a share of what its device can do.

    It is of the steps since the last start, validation and checkpoints left out.
    """

    rows_per_second: float | None = None
    tokens_per_second: float | None = None
    waiting_share: float | None = None  # of a step, for rows that were not ready
    flops_per_row: float | None = None
    peak_share: float | None = None
    peak_memory_mb: float | None = None


class ReportStore(Part):
    id: str | None = None
    rows: int | None = None
    bytes: int | None = None
    bytes_per_row: float | None = None
    codec: str | None = None


class Tracking(Part):
    uri: str | None = None
    experiment: str | None = None
    run_id: str | None = None


class ClassRow(Part):
    """One class: its test rows, and the share that each model gets right, mean over seeds."""

    name: str
    rows: int
    teacher: float | None
    control: float | None
    student: float | None
    artefact: float | None


class Histogram(Part):
    """Saliency of the rows; thriving rows lie at or above `q75`."""

    counts: list[int]
    edges: list[float]
    q75: float


class ReportTrial(BaseModel):
    """One trial of the search; its metric stands under the search's own `metric` key."""

    model_config = ConfigDict(extra="allow", frozen=True)
    number: int
    params: dict[str, Any]
    steps: int | None = None
    state: str


class ReportSearch(Part):
    metric: str
    trials: list[ReportTrial]
    best: ReportTrial | None = None


Table = Annotated[dict[str, Any], BeforeValidator(dict)]


class Report(Part):
    """The whole report. `curves`: histories by arm and seed. `confusion`: [true][predicted] of one
    seed.

    `kept` is the student's macro-F1 over the teacher's, and its balanced accuracy likewise. `gains`
    are what else was measured of the student less its control's: nll and kl to the teacher of text.

    Sentences and charts leave saliency and thriving rows out unless the recipe `asks_valence`. A
    student's curve is of the phases that end at `phase_ends`, each with a rate and scales of its
    own.

    Of text rows are tokens to tell and recordings are documents; classes and what is told of each
    are left out where they are many.

    `inputs` is the digest of the files it was made from.
    """

    version: Literal[1] = Field(
        VERSION, validation_alias=AliasChoices("schema", "version"), serialization_alias="schema"
    )
    recipe_digest: str
    technique: str
    setting: str
    data: ReportData
    classes: list[str]
    seeds: list[int]
    teacher: ReportTeacher
    control: ReportModel
    student: ReportModel
    beside: dict[str, Beside] = {}
    artefact: ReportArtefact
    retention: Retentions
    kept: dict[str, Ratio] = {}
    gap_closed: Ratio
    gap_words: str
    gain: Ratio
    gains: dict[str, Ratio] = {}
    compression: Compression
    training_cost: Cost
    throughput: Throughput = Throughput()
    store: ReportStore
    mlflow: Tracking
    warnings: list[str]
    per_class: list[ClassRow]
    confusion: list[list[int]]
    confusion_seed: int
    curves: dict[str, dict[str, list[Table]]]
    valence: Histogram | None
    search: ReportSearch | None
    machine: Table
    versions: Table
    asks_valence: bool = True
    phase_ends: list[int] = []
    inputs: str = ""
