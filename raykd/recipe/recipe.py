"""The recipe: what is distilled from what, as typed tables. Needs neither torch nor Ray.

A recipe is sparse TOML over the technique's own settings: `technique < file < --set`. Every unknown
key is an error with a suggestion, and all errors come at once.

Tables that change the result enter the digest. `[scale]`, `[track]` and `[export]` do not: they say
where, how fast and in which forms.
"""

from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_serializer, field_validator, model_validator

from raykd.files.address import checked_uri, public_uri
from raykd.recipe.drafter import Drafter
from raykd.recipe.precision import Precision
from raykd.recipe.quant import Quant
from raykd.recipe.search import Search
from raykd.recipe.source import Source
from raykd.recipe.tables import (
    LONGEST,
    Amount,
    Count,
    DataRef,
    Home,
    ModelRef,
    Optim,
    Pair,
    Phase,
    Seed,
    StoreSettings,
    StudentRef,
    Table,
    Task,
    TermSpec,
    Valence,
    Weighting,
    ends_of,
)
from raykd.recipe.toml import is_path

SIZES = ("workers", "scorers")  # keys of [scale] that are [min, max], or one number for both


class Scale(Table):
    """Where and how fast a recipe runs; never what it gives.

    `workers = 1` trains in this process, N or [min, max] in a Ray group.
    """

    workers: Pair[Count] = (1, 1)
    """Processes that train an arm: N, or [least, most]; the batch stays global."""
    scorers: Pair[Count] = (1, 2)
    """Actors that run the teacher: N, or [least, most]."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models run; with `auto` CUDA where the cluster has it."""
    retries: Amount = 3
    """How often a lost worker or actor is replaced."""
    max_bad_rows: Amount = 0
    """Rows that the teacher may fail to score; they are left out."""
    micro: Count | None = None
    """Rows of a forward pass in training, with equal results; without it a whole share at once."""
    recompute: Literal["none", "blocks"] = "none"
    """`blocks` keeps a block's inputs alone for the backward pass, and computes the rest again."""
    shard: Literal["none", "full", "hybrid"] = "none"
    """Of several workers: weights, gradients and optimiser in parts on all, or on a node's."""
    compile: bool = False
    """Training goes through torch.compile, with equal results; what it cannot do runs as it is."""
    checkpoint_every: Count = 500
    """Steps from checkpoint to checkpoint."""
    start_timeout_s: Count = 120
    """Seconds until all workers must have started."""
    stall_timeout_s: Count = 120
    """Seconds that a worker may make no step and use no CPU; then it is ended as lost."""
    cache_gb: Annotated[float, Field(gt=0)] = 50.0
    """Of rows read in parts: the gigabytes of them and their answers that a node's disk keeps."""
    readers: Count = 2
    """Of rows read in parts: the threads of a worker that read them ahead."""
    store: Home | None = None
    """Where stores are, a folder or `s3://bucket/prefix`; without it `OUT/stores`."""

    @model_validator(mode="before")
    @classmethod
    def _one_number_is_a_fixed_size(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        sizes = {k: [v, v] for k, v in raw.items() if k in SIZES and isinstance(v, int)}
        return raw | sizes

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for key in SIZES:
            low, high = getattr(self, key)
            if low > high:
                raise ValueError(f"{key} = [{low}, {high}]: the least must not exceed the most")
        return self


class Export(Table):
    """Which forms of the student the artefact holds besides its ONNX file (`raykd.deploy.forms`).

    It changes nothing that is trained.

    Example:
        >>> Export(gguf=True).pte
        False
    """

    stream: bool = False
    """An ONNX file that reads step by step, its state handed from call to call."""
    packed: bool = False
    """The student in few bytes, for readers of its own."""
    pte: bool = False
    """A file for ExecuTorch."""
    gguf: bool = False
    """A file for llama.cpp."""


class Track(Table):
    """The MLflow server; by default a sqlite file under --out."""

    uri: str | None = None
    """The MLflow server, by default a sqlite file under `--out`; its password is never written."""
    experiment: str = "raykd"
    """The name of the MLflow experiment."""

    @field_validator("uri")
    @classmethod
    def _is_address(cls, uri: str | None) -> str | None:
        return uri and checked_uri(uri)

    @field_serializer("uri")
    def _without_credentials(self, uri: str | None) -> str | None:
        """A password stays out of every file that a recipe is written to."""
        return uri and public_uri(uri)


class Recipe(Table):
    """One distillation with a value for every key. Its digest names the run's folder.

    If phases round, two more students can be trained: `unrounded` (the same losses in full
    precision, to measure what rounding it afterwards costs) and `rounded_control` (labels alone,
    under the same phases).

    Example:
        >>> recipe = Recipe(technique="none", terms={"ce": TermSpec(weight=2.0)}, seeds=[0, 1])
        >>> recipe.optim.steps, recipe.terms["ce"].weight, recipe.quant
        (2000, 2.0, None)
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")] = "run"
    """The name of the run, which begins its folder's."""
    setting: str = ""
    """One sentence for the report: under which conditions the result holds."""
    technique: str = "vanilla"
    """A name of `raykd techniques`, or a module."""
    seeds: Annotated[list[Seed], Field(min_length=1, max_length=LONGEST)] = [0]
    """One training of each arm for each seed."""
    control: bool = True
    """Train the same student on labels alone, too."""
    unrounded: bool = True
    """With rounding phases: train the student in full precision, too."""
    rounded_control: bool = False
    """With rounding phases: train on labels alone under the same phases, too."""
    select: Literal["accuracy", "macro_f1"] = "accuracy"
    """The validation metric that chooses seed and trial; `macro_f1` where rare classes count."""
    data: DataRef = DataRef()
    """The rows."""
    task: Task = Task()
    """What a row's label is."""
    teacher: ModelRef | None = None
    """The model to learn from; without it only labels teach."""
    student: StudentRef = StudentRef()
    """The model that is trained."""
    terms: Annotated[dict[str, TermSpec], Field(min_length=1)]
    """The loss terms, by name; a technique brings its own."""
    source: Source | None = None
    """Rows that the student writes; without it every row is the data's."""
    weighting: Weighting | None = None
    """How much each row counts; without it all count alike."""
    phases: Annotated[list[Phase], Field(max_length=LONGEST)] = []
    """Parts of the student's training; without any all of it is in full precision."""
    drafter: Drafter | None = None
    """Student and control judged as the teacher's speculative drafters."""
    valence: Valence = Valence()
    """Where valence comes from, and how it becomes the saliency of a row."""
    store: StoreSettings = StoreSettings()
    """The form of the teacher store, a part of its id."""
    optim: Optim = Optim()
    """How each arm is optimised."""
    precision: Precision = Precision()
    """The numbers that models compute in."""
    search: Search | None = None
    """Trials over keys of the recipe."""
    scale: Scale = Scale()
    """Where and how fast, never what."""
    track: Track = Track()
    """The MLflow record."""
    export: Export = Export()
    """Further forms of the artefact."""

    @property
    def quant(self) -> Quant | None:
        """What the student is rounded as in the end: the last phase's; None in full precision."""
        return self.phases[-1].quant if self.phases else None

    @property
    def packages(self) -> set[str]:
        """The top-level packages of the user's code that it names."""
        names = [self.data.source, self.student.model, self.teacher.model if self.teacher else ""]
        code = [name for name in names if ":" in name and not is_path(name)]
        code += [self.technique] if "." in self.technique else []
        return {name.replace(":", ".").partition(".")[0] for name in code}

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.optim.batch < self.scale.workers[1]:
            raise ValueError(
                f"optim.batch = {self.optim.batch} rows cannot be shared by scale.workers = "
                f"{self.scale.workers[1]}; raise optim.batch or lower scale.workers"
            )
        if self.source:
            student_rows = self.source.rows(self.optim.batch)
            data_rows = self.optim.batch - student_rows
            fewest = min(student_rows, data_rows or student_rows)
            if student_rows and fewest < self.scale.workers[1]:
                raise ValueError(
                    f"source.share = {self.source.share} makes {student_rows} of "
                    f"{self.optim.batch} rows the student's, which scale.workers = "
                    f"{self.scale.workers[1]} cannot share with as many of the data's; raise "
                    "optim.batch or lower scale.workers"
                )
        ends = [phase.until for phase in self.phases]
        if ends and (ends != sorted(set(ends)) or ends[-1] != 1):
            raise ValueError(
                f"phases end at {ends}: each until must be above the one before, and the last 1"
            )
        steps = [0, *ends_of(self.phases, self.optim.steps)]
        if any(a == b for a, b in pairwise(steps)):
            raise ValueError(
                f"optim.steps = {self.optim.steps} leaves a phase without a step: they end at "
                f"{steps[1:]}"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {self.seeds} repeats a seed; each must be its own run")
        return self
