"""The tables that a recipe is made of, and the kinds of values in them. Needs no torch."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    field_validator,
    model_validator,
)

from raykd.files.address import checked_address
from raykd.recipe.quant import Quant

MOST = 10**9  # of anything that is counted
LONGEST = 1000  # entries of a list that each take work
Count = Annotated[int, Field(gt=0, le=MOST)]
Amount = Annotated[int, Field(ge=0, le=MOST)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # of torch and numpy
Share = Annotated[float, Field(gt=0, le=1)]
N = TypeVar("N")
# TOML has no tuples, so a list is taken for one.
Pair = Annotated[tuple[N, N], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]
Home = Annotated[str, BeforeValidator(lambda v: checked_address(v) if isinstance(v, str) else v)]


class Table(BaseModel):
    """A closed, immutable TOML table; the string below a field is its line in `raykd keys`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Columns(Table):
    """Names of the Parquet columns: `inputs` is a list of steps, each a list of channel values.

    Of text, `text` is a whole document, or `prompt` and `completion` are its two parts.
    """

    inputs: str = "inputs"
    """The column of the steps, each a list of channel values."""
    label: str = "label"
    """The column of the class."""
    split: str = "split"
    """The column that says `train`, `val` or `test`."""
    group: str | None = None
    """The column of the recording or document that a row belongs to."""
    valence: str | None = None
    """The column of the valence of each step."""
    text: str = "text"
    """Of text: the column of whole documents."""
    prompt: str | None = None
    """Of text: the column of prompts, with `completion` in place of `text`."""
    completion: str | None = None
    """Of text: the column of what follows the prompts."""

    @model_validator(mode="after")
    def _both_parts(self) -> Self:
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion belong together; name both columns, or neither")
        return self


class DataRef(Table):
    """`source`: a built-in name, a folder or bucket of files, or `module:function` returning rows.

    With a `tokenizer`, a tokenizer.json, rows are text: `window` tokens each. The label at each
    position is the next token; with `task.label = "class"` a row is one text, and has one class. At
    most `limit` rows of every split are kept, spread evenly over it.

    Example:
        >>> DataRef(window=32).source
        'watch_gestures'
    """

    source: str = "watch_gestures"
    """A built-in name, a folder of files, `s3://bucket/prefix`, or `module:function`."""
    tokenizer: str | None = None
    """A tokenizer.json: rows are then text."""
    end: str = "<|endoftext|>"
    """The token after every document; texts with a class have what their tokeniser adds."""
    splits: dict[Literal["train", "val", "test"], str] | None = None
    """The files of each split, as `{ train = "train/*.parquet", ... }`, in place of a column."""
    split: Literal["time", "subject"] = "time"
    """How the gestures are split: by time, or by subject."""
    window: Count = 16
    """Steps, or tokens, of a row."""
    steps: Count | None = None
    """Of series: the most steps of a row; without it those of the longest."""
    stride: Count = 8
    """Steps from the start of a row to that of the next."""
    classes: list[str] | None = None
    """The classes, in the order of their numbers."""
    columns: Columns = Columns()
    """The names of the Parquet columns."""
    settings: dict[str, JsonValue] = {}
    """Keyword arguments of the function."""
    limit: Count | None = None
    """At most so many rows of each split, spread evenly over it."""
    max_unfit: Annotated[float, Field(ge=0, le=1)] = 0.01
    """The share of rows that may be left out as unfit, such as an empty completion."""
    max_rows: Count = 10_000_000
    """More rows of a function are refused; one may never end."""
    label_fraction: Share = 1.0
    """The share of training labels that stay."""
    label_seed: Seed = 0
    """Which training labels stay."""


class Task(Table):
    """What a row's label is.

    Example:
        >>> Task(label="class").of_texts
        True
    """

    label: Literal["auto", "next", "class"] = "auto"
    """`class`: one of each row; `next`: of each token the next; `auto`: `next` of text."""

    @property
    def of_texts(self) -> bool:
        """Whether a text is one row with one class, if rows have a tokeniser."""
        return self.label == "class"


class ModelRef(Table):
    """`model`: a built-in name or `module:factory`; `settings` are its keyword arguments.

    A teacher's `weights` may be a Hugging Face folder, which holds its settings: of a "llama", or
    of any architecture of "transformers". A student starts from its `weights`; `{seed}` in their
    path is the seed of each training.

    Example:
        >>> ModelRef(weights="runs/seed-{seed}.safetensors").of_seed(1).weights
        'runs/seed-1.safetensors'
    """

    model: str = "series_encoder"
    """A built-in name, such as `llama` or `transformers`, or `module:factory`."""
    weights: str | None = None
    """A safetensors file or a Hugging Face folder; a student's may hold `{seed}`."""
    settings: dict[str, JsonValue] = {}
    """Keyword arguments of the model."""

    def of_seed(self, seed: int) -> Self:
        """What one training starts from."""
        weights = self.weights and self.weights.replace("{seed}", str(seed))
        return self.model_copy(update={"weights": weights})

    @property
    def bare(self) -> Self:
        """The same without weights, for a module whose weights are loaded later or not needed."""
        return self.model_copy(update={"weights": None})


class StudentRef(ModelRef):
    """A student's model. It may begin as its teacher, or as some layers of it (depth pruning, as
    DistilBERT, arXiv 1910.01108, and Minitron, arXiv 2407.14679, do).

    Example:
        >>> StudentRef(model="llama", weights="./teacher", layers=[0, 2]).layers
        [0, 2]
    """

    like: Literal["teacher"] | None = None
    """`teacher`: the teacher's model, settings and weights."""
    layers: Annotated[list[Amount], Field(min_length=1, max_length=LONGEST)] | None = None
    """The layers that are kept of `weights`, from 0, in their order; without it all."""

    @field_validator("layers")
    @classmethod
    def _check_order(cls, layers: list[int] | None) -> list[int] | None:
        if layers and any(a >= b for a, b in pairwise(layers)):
            raise ValueError("each must be above the one before it")
        return layers


class Valence(Table):
    """Where the valence per step comes from, and how a trajectory becomes one saliency."""

    source: Literal["prefix_confidence", "column"] = "prefix_confidence"
    """The valence of a step: the confidence in the label so far, or a column of the data."""
    discount: Annotated[float, Field(ge=0, le=1)] = 0.95
    """The factor of later steps in the future valence."""
    mean: float = 0.6
    """The coefficient of the mean future valence in saliency."""
    min: float = 0.25
    """The coefficient of the least future valence in saliency."""
    coherence: float = 0.15
    """The coefficient of coherence in saliency."""
    certainty: Literal["normalised", "nats"] = "normalised"
    """The certainty in coherence: 1 - H / ln C, or the reference's -H."""


class StoreSettings(Table):
    """The fixed shape of the teacher store.

    It is part of the store's identity, because batches decide the last bit.
    """

    codec: Literal["auto", "dense", "comb", "topk", "hidden"] = "auto"
    """How the teacher's answers become bytes; `auto`: `dense` for few classes, `comb` for many."""
    values: Literal["fp16", "int8"] = "fp16"
    """Of `dense`: the type of a stored logit."""
    points: Annotated[int, Field(ge=1, le=255)] = 50
    """Of `comb`: draws for each step."""
    top: Count = 50
    """Of `topk`: classes kept for each step."""
    temperatures: (
        Annotated[
            list[Annotated[float, Field(gt=0, allow_inf_nan=False)]], Field(max_length=LONGEST)
        ]
        | None
    ) = None
    """Of `comb` and `topk`; without it those at which the terms read."""
    head: str = "head"
    """Of `hidden`: the submodule whose input is stored."""
    rows_per_shard: Count = 1024
    """Rows of a file."""
    batch: Count = 256
    """Rows of a forward pass of the teacher."""


class TermSpec(BaseModel):
    """One loss term: its weight, when it counts, and the settings of its function.

    The term's own signature checks its settings. It counts from the share `since` of the steps up
    to the share `until`. `weighted = false` keeps it out of the `[weighting]` of rows.

    Example:
        >>> spec = TermSpec(weight=0.5, temperature=2.0)
        >>> spec.weight, spec.settings
        (0.5, {'temperature': 2.0})
    """

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)
    __pydantic_extra__: dict[str, JsonValue] = Field(init=False)
    weight: Annotated[float, Field(ge=0)] = 1.0
    """The factor of this term in the loss."""
    since: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The share of the steps from which on the term counts."""
    until: Share = 1.0
    """The share of the steps up to which the term counts."""
    weighted: bool = True
    """Whether `[weighting]` weighs the rows of this term."""

    @model_validator(mode="after")
    def _some_time(self) -> Self:
        if self.since >= self.until:
            raise ValueError(f"since = {self.since} must come before until = {self.until}")
        return self

    @property
    def settings(self) -> dict[str, JsonValue]:
        return dict(self.__pydantic_extra__ or {})


class Weighting(Table):
    """How much each row counts: exp(boost z), with z its standardised saliency, tamed by `mode`.

    With this table every term is a mean over rows of means over a row's steps. Without it, a term
    is a mean over all steps.

    `ess` lowers boost until the effective sample size is `fraction` of the rows. With `dataset`
    statistics a row has one weight for the whole training. The others take mean and spread from
    the rows of each batch.
    """

    mode: Literal["ess", "selfnorm", "capped", "raw", "snippet", "uniform"] = "ess"
    """How the weights of rows are tamed."""
    boost: Annotated[float, Field(ge=0)] = 6.0
    """How steeply weight rises with saliency."""
    statistics: Literal["dataset", "global_batch", "local_batch"] = "dataset"
    """The rows whose mean and spread standardise saliency."""
    fraction: Share = 0.5
    """Of `ess`: the effective sample as a share of the rows."""
    cap: Annotated[float, Field(gt=0)] = 20.0
    """Of `capped`: the largest weight."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """The largest absolute standardised saliency; without it there is no limit."""
    least_std: Annotated[float, Field(gt=0)] = 0.02
    """The least spread that is divided by."""


class Phase(Table):
    """A part of the student's training, in full precision or under a Quant.

    It lasts up to the share `until` of the steps. Each phase warms the learning rate up to `rate`
    times `optim.learning_rate` and decays it again. It takes its scales anew from the weights as
    they are, and fades rounding in over the share `blend` of its steps.

    Example:
        >>> phases = [Phase(until=0.5), Phase(until=1.0, quant=Quant())]
        >>> ends_of(phases, steps=100)
        [50, 100]
    """

    until: Share
    """The share of the steps at which the phase ends; the last is 1."""
    quant: Quant | None = None
    """How the phase rounds; without it full precision."""
    rate: Annotated[float, Field(gt=0)] = 1.0
    """The factor of the learning rate."""
    blend: Annotated[float, Field(ge=0, lt=1)] = 0.15
    """The share of the phase in which rounding fades in."""


class Optim(Table):
    """How each arm is optimised.

    `batch` is global: the number of workers does not change the result.

    Example:
        >>> Optim(steps=100).batch
        128
    """

    steps: Count = 2000
    """Steps of one training."""
    batch: Count = 128
    """Rows of a global batch, for any number of workers."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    """The learning rate of AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """The weight decay of AdamW."""
    betas: Pair[Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """How slowly AdamW's mean of the gradient, and that of its square, follow."""
    decay: Literal["all", "matrices"] = "all"
    """The parameters that decay: all, or not those of norms and biases."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The decay of a running mean of the weights, which is then what is validated and kept."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """The learning rate after the warm-up: falling to 0 in a line or a half wave, or constant."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """The share of the steps in which the learning rate rises."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """The largest norm of the gradient."""
    input_noise: Annotated[float, Field(ge=0)] = 0.0
    """The standard deviation of noise on the inputs."""
    labelled_share: Share = 0.5
    """The share of labelled rows in a batch."""
    evaluate_every: Count = 250
    """Steps from validation to validation."""
    order: Literal["auto", "rows", "blocks"] = "auto"
    """Rows shuffled as a whole, or in blocks of parts; `auto` takes blocks of many rows."""
    lanes: Count = 64
    """Of `blocks`: the stretches of the data that a batch is dealt from, at most one a row."""
    window: Count = 4
    """Of `blocks`: the parts of a lane whose rows are shuffled together."""


def ends_of(phases: Sequence[Phase], steps: int) -> list[int]:
    """The step that each phase ends before."""
    return [round(phase.until * steps) for phase in phases]
