"""The recipe: what is distilled from what, as typed tables. Needs neither torch nor Ray.

A recipe is sparse TOML over the technique's own settings: `technique < file < --set`. Every unknown
key is an error with a suggestion, and all errors come at once. Tables that change the result enter
the digest; `[scale]` and `[track]`, which only say where and how fast, and `[export]`, in which
forms, do not.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

from raykd.files.address import checked_address
from raykd.recipe.drafter import Drafter
from raykd.recipe.quant import Quant
from raykd.recipe.source import Source

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
N = TypeVar("N")
Pair = Annotated[
    tuple[N, N], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)
]  # TOML has no tuples
Home = Annotated[str, BeforeValidator(lambda v: checked_address(v) if isinstance(v, str) else v)]


class Table(BaseModel):
    """A closed, immutable TOML table."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Columns(Table):
    """Names of the Parquet columns: `inputs` is a list of steps, each a list of channel values.

    Of text, `text` is a whole document, or `prompt` and `completion` are its two parts.
    """

    inputs: str = "inputs"
    label: str = "label"
    split: str = "split"
    group: str | None = None
    valence: str | None = None
    text: str = "text"
    prompt: str | None = None
    completion: str | None = None

    @model_validator(mode="after")
    def _both_parts(self) -> Self:
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion belong together; name both columns, or neither")
        return self


class DataRef(Table):
    """`source`: a built-in name, a folder of Parquet files, or `module:function` returning rows.

    With a `tokenizer`, a tokenizer.json, rows are text: `window` tokens each, whose label is the
    token after each. Of every split at most `limit` rows are kept, spread evenly over it.
    """

    source: str = "watch_gestures"
    tokenizer: str | None = None
    end: str = "<|endoftext|>"  # the token after every document
    split: Literal["time", "subject"] = "time"
    window: Positive = 16
    stride: Positive = 8
    classes: list[str] | None = None
    columns: Columns = Columns()
    settings: dict[str, JsonValue] = {}
    limit: Positive | None = None
    label_fraction: Share = 1.0
    label_seed: Annotated[int, Field(ge=0)] = 0


class ModelRef(Table):
    """`model`: a built-in name or `module:factory`; `settings` are its keyword arguments.

    A teacher's `weights` may be a Hugging Face folder, which has its settings in it: of a "llama",
    or of any architecture of "transformers". A student's `weights` are those it starts from;
    `{seed}` in their path is the seed of each training.
    """

    model: str = "series_encoder"
    weights: str | None = None
    settings: dict[str, JsonValue] = {}

    def of_seed(self, seed: int) -> "ModelRef":
        """What one training starts from."""
        return self.model_copy(
            update={"weights": self.weights and self.weights.replace("{seed}", str(seed))}
        )

    @property
    def bare(self) -> "ModelRef":
        """Without weights: of a module whose own are loaded afterwards, or not needed."""
        return self.model_copy(update={"weights": None})


class Valence(Table):
    """Where the valence per step comes from, and how a trajectory becomes one saliency."""

    source: Literal["prefix_confidence", "column"] = "prefix_confidence"
    discount: Annotated[float, Field(ge=0, le=1)] = 0.95
    mean: float = 0.6
    min: float = 0.25
    coherence: float = 0.15
    certainty: Literal["normalised", "nats"] = "normalised"  # 1 - H / ln C, or the reference's -H


class StoreSettings(Table):
    """The fixed shape of the teacher store; part of its identity, because batches decide the last
    bit.
    """

    codec: Literal["auto", "dense", "comb", "topk", "hidden"] = "auto"
    values: Literal["fp16", "int8"] = "fp16"  # dense
    points: Annotated[int, Field(ge=1, le=255)] = 50  # comb
    top: Positive = 50  # topk
    temperatures: list[Annotated[float, Field(gt=0)]] | None = (
        None  # comb, topk; the terms' own by default
    )
    head: str = "head"  # hidden: the submodule whose input is kept
    rows_per_shard: Positive = 1024
    batch: Positive = 256


class TermSpec(BaseModel):
    """One loss term: its weight, when it counts, and keyword settings that the term's own signature
    checks.

    It counts from the share `since` of the steps up to the share `until`; `weighted = false` keeps
    it out of the `[weighting]` of rows.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, JsonValue] = Field(init=False)
    weight: Annotated[float, Field(ge=0)] = 1.0
    since: Annotated[float, Field(ge=0, lt=1)] = 0.0
    until: Share = 1.0
    weighted: bool = True

    @model_validator(mode="after")
    def _some_time(self) -> Self:
        if self.since >= self.until:
            raise ValueError(f"since = {self.since} must come before until = {self.until}")
        return self

    @property
    def settings(self) -> dict[str, JsonValue]:
        return dict(self.__pydantic_extra__ or {})


class Weighting(Table):
    """How much each row counts, by its saliency z standardised: exp(boost z), tamed by `mode`.
    Present, every term is a mean over rows of means over a row's steps; absent, a mean over all
    steps.

    `ess` lowers boost until the effective sample size is `fraction` of the rows. `dataset`
    statistics make a row's weight one number for the whole training; the others take mean and
    spread from the rows of each batch.
    """

    mode: Literal["ess", "selfnorm", "capped", "raw", "snippet", "uniform"] = "ess"
    boost: Annotated[float, Field(ge=0)] = 6.0
    statistics: Literal["dataset", "global_batch", "local_batch"] = "dataset"
    fraction: Share = 0.5  # ess
    cap: Annotated[float, Field(gt=0)] = 20.0  # capped
    clip: Annotated[float, Field(gt=0)] | None = None  # of |z|
    least_std: Annotated[float, Field(gt=0)] = 0.02


class Phase(Table):
    """A part of the student's training, up to the share `until` of its steps: full precision, or
    under a Quant.

    Each phase warms the learning rate up to `rate` times `optim.learning_rate` and decays it again,
    takes its scales anew from the weights as they are, and fades rounding in over the share `blend`
    of its steps.
    """

    until: Share
    quant: Quant | None = None
    rate: Annotated[float, Field(gt=0)] = 1.0
    blend: Annotated[float, Field(ge=0, lt=1)] = 0.15


class Optim(Table):
    """One arm's optimisation.

    `batch` is global: the number of workers does not change the result.
    """

    steps: Positive = 2000
    batch: Positive = 128
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    clip: Annotated[float, Field(gt=0)] = 1.0
    input_noise: Annotated[float, Field(ge=0)] = 0.0
    labelled_share: Share = 0.5
    evaluate_every: Positive = 250


class Range(Table):
    """Where one key is searched: exactly one of the four forms."""

    uniform: Pair[float] | None = None
    loguniform: Pair[float] | None = None
    integer: Pair[int] | None = None
    choice: list[JsonValue] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        forms = [
            getattr(self, name)
            for name in type(self).model_fields
            if getattr(self, name) is not None
        ]
        if len(forms) != 1:
            raise ValueError(
                "give one of uniform = [lo, hi], loguniform = [lo, hi], integer = [lo, hi], choice = [..]"
            )
        if not forms[0] or (self.choice is None and not forms[0][0] < forms[0][1]):
            raise ValueError(
                f"an empty range {forms[0]!r}; the first bound must be below the second"
            )
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform = {list(self.loguniform)!r} needs bounds above 0")
        return self

    def ends(self) -> list[JsonValue]:
        """Both bounds or every choice: what the searched key must accept for any trial to be sound."""
        return list(self.uniform or self.loguniform or self.integer or self.choice or ())


class Search(Table):
    """Trials over dotted recipe keys: `"terms.kd.temperature" = { uniform = [1, 4] }`."""

    trials: Positive = 4
    concurrent: Positive = 2
    grace: Positive = 500
    seed: Annotated[int, Field(ge=0)] = 0
    searcher: Literal["optuna", "random"] = "optuna"
    space: dict[str, Range] = {}

    @model_validator(mode="before")
    @classmethod
    def _gather_dotted_keys(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        plain = {k: v for k, v in raw.items() if "." not in k}
        return plain | {
            "space": {**plain.get("space", {}), **{k: v for k, v in raw.items() if "." in k}}
        }

    @model_validator(mode="after")
    def _something_to_search(self) -> Self:
        if not self.space:
            raise ValueError(
                'no key to search; add a line such as "terms.kd.temperature" = { uniform = [1, 4] }'
            )
        return self


class Scale(Table):
    """Where and how fast; never what.

    `workers = 1` trains in this process, N or [min, max] in a Ray group.
    """

    workers: Pair[Positive] = (1, 1)
    scorers: Pair[Positive] = (1, 2)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    retries: Annotated[int, Field(ge=0)] = 3
    max_bad_rows: Annotated[int, Field(ge=0)] = (
        0  # that the teacher can not score; they are left out
    )
    checkpoint_every: Positive = 500
    start_timeout_s: Positive = 120
    store: Home | None = None  # a folder or s3://bucket/prefix; by default OUT/stores

    @model_validator(mode="before")
    @classmethod
    def _one_number_is_a_fixed_size(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        return {
            k: [v, v] if k in ("workers", "scorers") and isinstance(v, int) else v
            for k, v in raw.items()
        }

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for key in ("workers", "scorers"):
            low, high = getattr(self, key)
            if low > high:
                raise ValueError(f"{key} = [{low}, {high}]: the least must not exceed the most")
        return self


class Export(Table):
    """What stands in the artefact beside the student (`raykd.deploy.forms`).

    It changes nothing that is trained.
    """

    stream: bool = False
    packed: bool = False
    pte: bool = False
    gguf: bool = False


class Track(Table):
    """The MLflow server; by default a sqlite file under --out."""

    uri: str | None = None
    experiment: str = "raykd"


class Recipe(Table):
    """One distillation, resolved: every key has its value. Its digest names the run's folder.

    Where phases round, two more trainings can stand beside: `unrounded` (the same losses in full
    precision, and what rounding it afterwards costs) and `rounded_control` (labels alone, under the
    same phases).
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")] = "run"
    setting: str = ""
    technique: str = "vanilla"
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0]
    control: bool = True
    unrounded: bool = True
    rounded_control: bool = False
    data: DataRef = DataRef()
    teacher: ModelRef | None = None
    student: ModelRef = ModelRef()
    terms: Annotated[dict[str, TermSpec], Field(min_length=1)]
    source: Source | None = None  # None: every row is the data's, and the teacher is its store
    weighting: Weighting | None = None
    phases: list[Phase] = []
    drafter: Drafter | None = None
    valence: Valence = Valence()
    store: StoreSettings = StoreSettings()
    optim: Optim = Optim()
    search: Search | None = None
    scale: Scale = Scale()
    track: Track = Track()
    export: Export = Export()

    @property
    def quant(self) -> Quant | None:
        """What the student is rounded as in the end: the last phase's; None in full precision."""
        return self.phases[-1].quant if self.phases else None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.optim.batch < self.scale.workers[1]:
            raise ValueError(
                f"optim.batch = {self.optim.batch} rows can not be shared by scale.workers = {self.scale.workers[1]};"
                " raise optim.batch or lower scale.workers"
            )
        own = self.source.rows(self.optim.batch) if self.source else 0
        if own and min(own, self.optim.batch - own or own) < self.scale.workers[1]:
            raise ValueError(
                f"source.share = {self.source.share if self.source else 0} makes {own} of {self.optim.batch} rows the "
                f"student's, which scale.workers = {self.scale.workers[1]} can not share with as many of the data's; "
                "raise optim.batch or lower scale.workers"
            )
        ends = [phase.until for phase in self.phases]
        if ends and (ends != sorted(set(ends)) or ends[-1] != 1):
            raise ValueError(
                f"phases end at {ends}: each until must be above the one before, and the last 1"
            )
        steps = [0, *ends_of(self.phases, self.optim.steps)]
        if any(a == b for a, b in pairwise(steps)):
            raise ValueError(
                f"optim.steps = {self.optim.steps} leaves a phase without a step: they end at {steps[1:]}"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {self.seeds} repeats a seed; each must be its own run")
        return self


def ends_of(phases: Sequence[Phase], steps: int) -> list[int]:
    """The step that each phase ends before."""
    return [round(phase.until * steps) for phase in phases]
