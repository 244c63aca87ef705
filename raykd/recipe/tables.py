"""The tables that a recipe is made of, and the kinds of values in them. Needs no torch."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

from raykd.files.address import checked_address
from raykd.recipe.quant import Quant

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
N = TypeVar("N")
# TOML has no tuples, so a list is taken for one.
Pair = Annotated[tuple[N, N], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]
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

    With a `tokenizer`, a tokenizer.json, rows are text: `window` tokens each. The label at each
    position is the next token. At most `limit` rows of every split are kept, spread evenly over it.

    Example:
        >>> DataRef(window=32).source
        'watch_gestures'
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

    A teacher's `weights` may be a Hugging Face folder, which holds its settings: of a "llama", or
    of any architecture of "transformers". A student starts from its `weights`; `{seed}` in their
    path is the seed of each training.

    Example:
        >>> ModelRef(weights="runs/seed-{seed}.safetensors").of_seed(1).weights
        'runs/seed-1.safetensors'
    """

    model: str = "series_encoder"
    weights: str | None = None
    settings: dict[str, JsonValue] = {}

    def of_seed(self, seed: int) -> "ModelRef":
        """What one training starts from."""
        weights = self.weights and self.weights.replace("{seed}", str(seed))
        return self.model_copy(update={"weights": weights})

    @property
    def bare(self) -> "ModelRef":
        """The same without weights, for a module whose weights are loaded later or not needed."""
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
    """The fixed shape of the teacher store.

    It is part of the store's identity, because batches decide the last bit.
    """

    codec: Literal["auto", "dense", "comb", "topk", "hidden"] = "auto"
    values: Literal["fp16", "int8"] = "fp16"  # dense
    points: Annotated[int, Field(ge=1, le=255)] = 50  # comb
    top: Positive = 50  # topk
    # comb, topk; by default those at which the terms read
    temperatures: list[Annotated[float, Field(gt=0)]] | None = None
    head: str = "head"  # hidden: the submodule whose input is kept
    rows_per_shard: Positive = 1024
    batch: Positive = 256


class TermSpec(BaseModel):
    """One loss term: its weight, when it counts, and the settings of its function.

    The term's own signature checks its settings. It counts from the share `since` of the steps up
    to the share `until`. `weighted = false` keeps it out of the `[weighting]` of rows.

    Example:
        >>> spec = TermSpec(weight=0.5, temperature=2.0)
        >>> spec.weight, spec.settings
        (0.5, {'temperature': 2.0})
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
    """How much each row counts: exp(boost z), with z its standardised saliency, tamed by `mode`.

    With this table every term is a mean over rows of means over a row's steps. Without it, a term
    is a mean over all steps.

    `ess` lowers boost until the effective sample size is `fraction` of the rows. With `dataset`
    statistics a row has one weight for the whole training. The others take mean and spread from
    the rows of each batch.
    """

    mode: Literal["ess", "selfnorm", "capped", "raw", "snippet", "uniform"] = "ess"
    boost: Annotated[float, Field(ge=0)] = 6.0
    statistics: Literal["dataset", "global_batch", "local_batch"] = "dataset"
    fraction: Share = 0.5  # ess
    cap: Annotated[float, Field(gt=0)] = 20.0  # capped
    clip: Annotated[float, Field(gt=0)] | None = None  # of |z|
    least_std: Annotated[float, Field(gt=0)] = 0.02


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
    quant: Quant | None = None
    rate: Annotated[float, Field(gt=0)] = 1.0
    blend: Annotated[float, Field(ge=0, lt=1)] = 0.15


class Optim(Table):
    """How each arm is optimised.

    `batch` is global: the number of workers does not change the result.

    Example:
        >>> Optim(steps=100).batch
        128
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


def ends_of(phases: Sequence[Phase], steps: int) -> list[int]:
    """The step that each phase ends before."""
    return [round(phase.until * steps) for phase in phases]
