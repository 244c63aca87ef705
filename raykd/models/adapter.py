"""Any nn.Module as a source of Signals: its answer in any form, its inner layers by hooks."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from raykd.errors import RecipeError
from raykd.quant.linear import QuantLinear
from raykd.signals import Headed, Signals, has_places, masked_mean

FEW = 8  # tokens on which a head is sought
MANY = 8192  # classes: a head of more is not multiplied out where losses can do without
TOKENS = "input_ids"  # a parameter of a forward that takes a sentence's tokens
MASKS = ("mask", "attention_mask")  # parameters of a forward that take the mask of valid steps


@runtime_checkable
class KeepsAttention(Protocol):
    """A module that leaves its attention (B, H, T, T) in `.attention` while this is True.

    If it also leaves the logits in `.scores`, -inf at hidden keys, these can be read too.
    """

    keep_attention: bool


@runtime_checkable
class ReadsInParts(Protocol):
    """A module that calls its submodules on parts of a batch in turn.

    `joined` gives their answers as the batch's rows.
    """

    def joined(self, answers: list[Tensor]) -> Tensor: ...


def whole_batch(module: nn.Module, answers: list[Tensor]) -> Tensor:
    """A submodule's answer to a module's latest batch, from the answers to its calls."""
    return module.joined(answers) if isinstance(module, ReadsInParts) else answers[-1]


class Adapter(nn.Module):
    """`module` as a function (inputs (B, T, K), mask (B, T)) -> Signals.

    The module answers with logits (B, C) or (B, T, C), or with a dict or object that has `logits`
    and, if it has a value head, `valence` (B, T). Of series and sentences it gets the mask, too, if
    its forward has a parameter `mask` (bool) or `attention_mask` (int64). `want` names inner layers
    as in Signals:

        hidden.<submodule>, embedding.<submodule>   any submodule that answers (B, T, D)
        attention.<submodule>                       an nn.MultiheadAttention, or KeepsAttention
        scores.<submodule>                          a module that KeepsAttention, with `.scores`

    With a `dtype` it gets series in that type, and answers in float32.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        want: frozenset[str] = frozenset(),
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.module = module
        self.dtype = dtype
        self.want = want
        self.head: str | None = None  # the submodule whose product is left to the losses
        self.left = LeftOut()
        self.answers: dict[str, list[Tensor]] = {}  # of the wanted layers, to the latest batch
        named = dict(module.named_modules())
        for name in sorted(want):
            kind, _, path = name.partition(".")
            if path not in named:
                known = ", ".join(filter(None, named))
                raise RecipeError(
                    f"layer {path!r}: the module has no such submodule; it has {known}"
                )
            self._watch(name, kind, named[path])

    def forward(self, inputs: Tensor, mask: Tensor) -> Signals:
        """Signals of a batch; per-sequence logits become one step."""
        self.answers.clear()
        if self.dtype != torch.float32 and inputs.is_floating_point():
            inputs = inputs.to(self.dtype)
        head = self._bare_head()
        if head is not None:
            with self.left.out_of(head):
                answer = call(self.module, inputs, mask)
            hidden = whole_batch(self.module, self.left.taken())
            return self._headed(head, hidden, answer, mask)
        answer = call(self.module, inputs, mask)
        logits = self._in_full(field(answer, "logits"))
        valence = self._in_full(field(answer, "valence"))
        if logits is None or logits.dim() not in (2, 3):
            raise RecipeError(
                f"{type(self.module).__name__} must answer with logits (B, C) or (B, T, C)"
            )
        answered = mask
        if logits.dim() == 3 and logits.shape[:2] != mask.shape:
            raise RecipeError(self._other_steps("logits", logits, mask))
        if valence is not None and valence.shape != mask.shape:
            raise RecipeError(self._other_steps("valence", valence, mask))
        if logits.dim() == 2:
            logits = logits.unsqueeze(1)
            answered = torch.ones_like(mask[:, :1])
        known = None if valence is None else mask
        return Signals(logits, answered, valence, self._layers(mask), known)

    def _layers(self, mask: Tensor) -> dict[str, Tensor]:
        """The wanted inner layers of the latest batch."""
        layers = {}
        for name, answers in self.answers.items():
            layers[name] = whole_batch(self.module, answers)
            if name.startswith("embedding."):
                layers[name] = _pooled(layers[name], mask)
        return layers

    def heads(self) -> dict[str, nn.Linear]:
        """The plain linear layers with so many outputs that their product is worth leaving out."""
        read = {name.partition(".")[2] for name in self.want}
        return {
            name: part
            for name, part in self.module.named_modules()
            if type(part) in (nn.Linear, QuantLinear)
            and isinstance(part, nn.Linear)
            and part.out_features > MANY
            and name not in read
        }

    @torch.no_grad()
    def find_head(self, inputs: Tensor, mask: Tensor) -> None:
        """Leave the product with the head to the losses, if the answer to these rows is just that.

        From then on signals have their hidden states and head in place of logits.
        """
        outputs: dict[str, list[Any]] = {}
        handles = [
            head.register_forward_hook(
                lambda _module, _inputs, output, name=name: outputs.setdefault(name, []).append(
                    output
                )
            )
            for name, head in self.heads().items()
        ]
        self.head = None
        if has_places(inputs):  # what is kept of all wide layers must not take much memory
            inputs = inputs[:, :FEW]
            mask = mask[:, :FEW]
        with at_rest(self):
            logits = field(call(self.module, inputs, mask), "logits")
        for handle in handles:
            handle.remove()
        if logits is not None and logits.shape[:2] == mask.shape:
            self.head = next(
                (name for name, out in outputs.items() if self._is_answer(out, logits)), None
            )

    def _is_answer(self, outputs: list[Any], logits: Tensor) -> bool:
        """Whether a head's answers to a batch are the module's own, and nothing follows them."""
        if isinstance(self.module, ReadsInParts):
            return torch.equal(self.module.joined(outputs), logits)
        return outputs[-1] is logits

    def _bare_head(self) -> nn.Linear | None:
        """The head whose product is left out now: not one that is rounded."""
        if self.head is None:
            return None
        head = self.module.get_submodule(self.head)
        is_rounded = isinstance(head, QuantLinear) and head.quant is not None
        return head if isinstance(head, nn.Linear) and not is_rounded else None

    def _headed(self, head: nn.Linear, hidden: Tensor, answer: Any, mask: Tensor) -> Signals:
        """Signals with a head and what it would have been given, in the numbers of its product."""
        weight: Tensor = head.weight
        bias: Tensor | None = head.bias
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden = hidden.to(dtype)
            weight = weight.to(dtype)
        valence = field(answer, "valence")
        if valence is not None and valence.shape != mask.shape:
            raise RecipeError(self._other_steps("valence", valence, mask))
        return Signals.of_head(
            Headed(hidden, weight, bias),
            mask,
            valence=valence,
            layers=self._layers(mask),
            valence_mask=None if valence is None else mask,
        )

    def _in_full(self, values: Tensor | None) -> Tensor | None:
        """What a module in another type answers, as float32."""
        return values if values is None or self.dtype == torch.float32 else values.float()

    def _other_steps(self, what: str, values: Tensor, mask: Tensor) -> str:
        return (
            f"{type(self.module).__name__} answers rows of {mask.shape[1]} steps with {what} "
            f"{tuple(values.shape)}; give {tuple(mask.shape)}, one for each step"
            + (", or one answer (B, C) a row" if what == "logits" else "")
        )

    def _watch(self, name: str, kind: str, layer: nn.Module) -> None:
        def keep(module: Any, _inputs: Any, output: Any) -> None:
            earlier = self.answers.get(name, []) if isinstance(self.module, ReadsInParts) else []
            self.answers[name] = [*earlier, read(module, output)]

        if kind in ("hidden", "embedding"):
            read = _first
        elif kind == "attention" and isinstance(layer, nn.MultiheadAttention):
            layer.register_forward_pre_hook(_ask_for_maps, with_kwargs=True)
            read = _second
        elif isinstance(layer, KeepsAttention) and (
            kind == "attention" or hasattr(layer, "scores")
        ):
            layer.keep_attention = True
            read = _left if kind == "attention" else _scores
        else:
            raise RecipeError(
                f"layer {name!r}: a {type(layer).__name__} shows no {kind}; name an "
                "nn.MultiheadAttention (attention only) or a module with .keep_attention, "
                ".attention and .scores, or leave the term out: weight = 0"
            )
        layer.register_forward_hook(keep)


@contextmanager
def at_rest(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every submodule is in its own mode again."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


class LeftOut:
    """The forward of a head that is left out: it keeps what it is given, and multiplies nothing.

    It is one object for all calls, as torch.compile wants it.
    """

    def __init__(self):
        self.inputs: list[Tensor] = []

    def __call__(self, input: Tensor) -> Tensor:
        """No columns."""
        self.inputs.append(input)
        return input.new_empty(*input.shape[:-1], 0)

    @contextmanager
    def out_of(self, head: nn.Linear) -> Iterator[None]:
        """While it is entered, a head answers with no columns."""
        self.inputs.clear()
        head.forward = self
        try:
            yield
        finally:
            del head.forward

    def taken(self) -> list[Tensor]:
        """What the head was given since then, a tensor for each call."""
        inputs = list(self.inputs)
        self.inputs.clear()
        return inputs


def mask_name(module: nn.Module) -> str | None:
    """The parameter of a module's forward that takes the mask of valid steps; None without one."""
    # The masks of torch's own modules are of another kind: nn.TransformerEncoder's is (T, T).
    if type(module).__module__.startswith("torch.nn."):
        return None
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in MASKS if name in parameters), None)


def call(module: nn.Module, inputs: Tensor, mask: Tensor) -> Any:
    """A module's own answer to a batch (B, T, K), with the mask (B, T) if its forward takes one.

    Sentences go in as int64 (B, T), by the name `input_ids` where the forward has it. A mask of
    text whose labels are its next tokens never goes in: it says where a loss applies, not what a
    model may read.
    """
    if has_places(inputs):
        return module(inputs)
    if not inputs.is_floating_point():
        return call_on_tokens(module, inputs[..., 0].long(), mask)
    return module(inputs, **_mask_of(module, mask))


def call_on_tokens(module: nn.Module, tokens: Tensor, mask: Tensor) -> Any:
    """A module's own answer to sentences, whose tokens are int64 (B, T)."""
    given = _mask_of(module, mask)
    if TOKENS in inspect.signature(module.forward).parameters:
        return module(**{TOKENS: tokens}, **given)
    return module(tokens, **given)


def _mask_of(module: nn.Module, mask: Tensor) -> dict[str, Tensor]:
    """The mask as the keyword of a module's forward; nothing where it takes none."""
    name = mask_name(module)
    return {} if name is None else {name: mask.long() if name == "attention_mask" else mask}


def field(answer: Any, name: str) -> Tensor | None:
    """The logits or valence of a module's answer, in any form; None if it has none."""
    if isinstance(answer, Tensor):
        return answer if name == "logits" else None
    if isinstance(answer, dict):
        return answer.get(name)
    return getattr(answer, name, None)


def _ask_for_maps(
    _module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    return args, kwargs | {"need_weights": True, "average_attn_weights": False}


def _first(_module: Any, output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _second(_module: Any, output: Any) -> Tensor:
    return output[1].transpose(1, 2)


def _left(module: Any, _output: Any) -> Tensor:
    return module.attention.transpose(1, 2)


def _scores(module: Any, _output: Any) -> Tensor:
    return module.scores.masked_fill(module.scores == float("-inf"), 0.0).transpose(1, 2)


def _pooled(values: Tensor, mask: Tensor) -> Tensor:
    """(B, 1, D): the mean over valid steps, or over all steps if the layer has other steps."""
    if values.dim() == 2:
        return values.unsqueeze(1)
    mask = mask if values.shape[1] == mask.shape[1] else mask.new_ones(values.shape[:2])
    return masked_mean(values, mask).unsqueeze(1)
