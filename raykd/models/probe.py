"""Two rows put to a model before any work: what it would do wrong in training, known at once.

One row is asked alone, and once more beside a longer one, padded to its length. A row that is
padded before a step is asked again with other padding.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from raykd.errors import Problem, RaykdError, RecipeError
from raykd.models.adapter import MASKS, call, field, mask_name
from raykd.models.form import DTYPES, computing
from raykd.recipe.precision import Precision
from raykd.recipe.user_code import is_a_signals
from raykd.signals import masked_mean

REPEATED = 1e-6  # of the largest answer: two calls on equal rows
BESIDE = 1e-4  # of the largest answer: a row alone and among others, whose sums differ in order
STIRRED = 0.02  # added to weights, so that nothing hides behind zeros of an initialisation


class ProbeRows(NamedTuple):
    """A short row and a long one as the data have them: padded to equal length."""

    inputs: Tensor  # (2, T, K)
    mask: Tensor  # (2, T) bool
    classes: int
    may_have_more: bool = False  # whether columns beyond the classes are padding, as of text


class _Answer(NamedTuple):
    """What a module said, each at valid steps where it has steps."""

    logits: Tensor
    valence: Tensor | None


def check_student(module: nn.Module, key: str, rows: ProbeRows) -> None:
    """RecipeError, at `<key>.model`, if a module cannot be trained on rows like these.

    The module is changed.
    """
    found = _dtype_problem(module)
    if found is None and not any(value.requires_grad for value in module.parameters()):
        found = "no parameter requires a gradient; leave some unfrozen"
    if found:
        raise _refused(key, module, found)
    _check_answers(module, key, rows, is_student=True)
    _check_gradients(module, key, rows)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for value in module.parameters():
            value.add_(torch.randn_like(value), alpha=STIRRED)
    _check_beside(module, key, rows)
    _check_scattered(module, key, rows)


def check_teacher(module: nn.Module, key: str, rows: ProbeRows) -> None:
    """RecipeError, at `<key>.model`, if a module cannot teach rows like these."""
    _check_answers(module, key, rows, is_student=False)
    _check_beside(module, key, rows)
    _check_scattered(module, key, rows)


def check_numbers(module: nn.Module, key: str, rows: ProbeRows, precision: Precision) -> None:
    """RecipeError, at `precision.<key>`, if a module cannot answer in the numbers of a recipe.

    The module is changed.
    """
    numbers = getattr(precision, key)
    if numbers == "fp32":
        return
    inputs = rows.inputs
    if key == "teacher":
        module = module.to(DTYPES[numbers])
        inputs = inputs.to(DTYPES[numbers]) if inputs.is_floating_point() else inputs
    module.eval()
    try:
        with torch.inference_mode(), computing(precision, inputs.device):
            answer = call(module, inputs, rows.mask)
        found = ""
        if not _valid(answer, rows.mask).logits.isfinite().all():
            found = "it answers with NaN or infinite values"
    except Exception as error:  # of any kind: it is the user's code
        found = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    if found:
        text = (
            f'"{numbers}", in which {type(module).__name__} cannot answer ({found}); write "fp32"'
        )
        raise RecipeError([Problem(f"precision.{key}", text)])


def check_shared(
    module: nn.Module, key: str, rows: ProbeRows, *, advice: str = "set scale.workers = 1"
) -> None:
    """RecipeError, at `<key>.model`, if a batch that is read in parts would train another module
    than one that is read whole: by chance in training, or statistics of a batch.

    Workers share a batch, and `scale.micro` parts it. The module is changed.
    """
    chance = [name for name, part in module.named_modules() if _draws(part)]
    found = f"draws by chance in training ({', '.join(chance)})" if chance else None
    module.train()
    answers: list[_Answer] = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for seed, count in ((0, 2), (1, 2), (0, 1)):
            torch.manual_seed(seed)
            try:
                answer = call(module, rows.inputs[:count], rows.mask[:count])
            except Exception as error:  # of any kind: it is the user's code
                found = found or f"cannot read one row in training ({error})"
                break
            answers.append(_valid(_of_first(answer), rows.mask[:1]))
    if len(answers) == 3 and not found:
        both, again, alone = answers
        if not _apart(both, again) <= BESIDE:
            found = "draws by chance in training"
        elif not _apart(both, alone) <= BESIDE:
            found = "answers a row by the others of its batch in training, as BatchNorm does"
    if found:
        told = "so a batch in parts would train another student than a whole one"
        raise _refused(key, module, f"{found}, {told}; {advice}")


def _draws(part: nn.Module) -> bool:
    """Whether a layer of torch drops values in training."""
    rate = getattr(part, "p", 0) if isinstance(part, nn.modules.dropout._DropoutNd) else 0
    if isinstance(part, nn.RNNBase | nn.MultiheadAttention):
        rate = part.dropout
    return bool(rate)


def _refused(key: str, module: nn.Module, what: str) -> RecipeError:
    return RecipeError([Problem(f"{key}.model", f"{type(module).__name__}: {what}")])


def _dtype_problem(module: nn.Module) -> str | None:
    for name, value in module.named_parameters():
        if value.is_floating_point() and value.dtype != torch.float32:
            return (
                f"{name} is {_short(value.dtype)}, and a student is trained in float32; "
                "return module.float()"
            )
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _ask(module: nn.Module, key: str, inputs: Tensor, mask: Tensor) -> Any:
    """The module's own answer. RecipeError with what went wrong, if something does."""
    try:
        return call(module, inputs, mask)
    except RaykdError:
        raise
    except BaseException as error:  # of any kind: it is the user's code
        if is_a_signals(error):
            raise
        reason = next(iter(str(error).strip().splitlines()), "")
        shape = "x".join(map(str, inputs.shape))
        what = f"fails on {_short(inputs.dtype)} rows of {shape}: {type(error).__name__}: {reason}"
        raise _refused(key, module, f"{what}; mend its forward") from None


def _check_answers(module: nn.Module, key: str, rows: ProbeRows, *, is_student: bool) -> None:
    """Shape, dtype, values, and whether a second call answers alike."""
    module.eval()
    with torch.inference_mode():
        answer = _ask(module, key, rows.inputs, rows.mask)
        problem = _shape_problem(answer, rows, is_student=is_student)
        if problem:
            raise _refused(key, module, problem)
        first = _valid(answer, rows.mask)
        again = _valid(_ask(module, key, rows.inputs, rows.mask), rows.mask)
    apart = _apart(first, again)
    if not apart <= REPEATED:
        raise _refused(
            key,
            module,
            f"answers the same rows twice in eval mode, {apart:.2g} of the largest apart; "
            "let chance act in training only",
        )


def _shape_problem(answer: Any, rows: ProbeRows, *, is_student: bool) -> str | None:
    """What is wrong with an answer; None if it can be learnt from."""
    logits = field(answer, "logits")
    count, steps = rows.mask.shape
    wanted = f"logits ({count}, {rows.classes}) or ({count}, {steps}, {rows.classes})"
    if not isinstance(logits, Tensor):
        return f"answers with a {type(answer).__name__} without logits; give {wanted}"
    shape = tuple(logits.shape)
    dtype = logits.dtype
    if not dtype.is_floating_point:
        return f"answers with {_short(dtype)} {shape}; give {wanted} of floats"
    if is_student and dtype != torch.float32:
        return f"answers with {_short(dtype)}, and a student is trained in float32; give {wanted}"
    if shape[:-1] not in ((count,), (count, steps)):
        return f"answers {count} rows of {steps} steps with {shape}; give {wanted}"
    columns = shape[-1]
    fits = columns >= rows.classes if rows.may_have_more else columns == rows.classes
    if not fits:
        return f"answers with {columns} classes, and the data have {rows.classes}; give {wanted}"
    valence = field(answer, "valence")
    if valence is not None and tuple(valence.shape) != (count, steps):
        return f"answers with valence {tuple(valence.shape)}; give ({count}, {steps}), or none"
    kept = _valid(answer, rows.mask)
    if not all(values.isfinite().all() for values in kept if values is not None):
        return "answers with NaN or infinite values; mend its weights or its forward"
    return None


def _check_gradients(module: nn.Module, key: str, rows: ProbeRows) -> None:
    """RecipeError unless a loss of the answers reaches a parameter."""
    module.train()
    logits = field(_ask(module, key, rows.inputs, rows.mask), "logits")
    assert logits is not None
    if logits.requires_grad:
        logits.float().log_softmax(-1)[..., 0].mean().backward()
    if all(value.grad is None for value in module.parameters()):
        raise _refused(
            key,
            module,
            "no parameter gets a gradient from its logits; leave out detach() and no_grad()",
        )
    module.zero_grad(set_to_none=True)


def _check_beside(module: nn.Module, key: str, rows: ProbeRows) -> None:
    """RecipeError if the short row is answered otherwise alone than padded beside the long one.

    A module that takes one number of steps only is asked alone with the same padding: that is
    the length of all its rows, here and where it is deployed.
    """
    module.eval()
    inputs = rows.inputs
    mask = rows.mask
    steps = mask.shape[1]
    length = int(mask[0].sum())
    is_padded = length < steps and bool(mask[0, :length].all())
    with torch.inference_mode():
        alone = _alone(module, inputs[:1], mask[:1], length) if is_padded else None
        if is_padded and alone is None and steps > 2:
            # it may fail on rows as short as this one and read longer ones
            length = steps - 1
            cut = mask.clone()
            cut[0] = torch.arange(steps) < length
            long_row = torch.where(cut[:1, :, None], inputs[1:], torch.zeros_like(inputs[1:]))
            alone = _alone(module, long_row, cut[:1], length)
            if alone is not None:
                inputs = torch.cat([long_row, inputs[1:]])
                mask = cut
        if alone is None:
            alone = _valid(_ask(module, key, inputs[:1], mask[:1]), mask[:1])
            is_padded = False
        answer = _ask(module, key, inputs, mask)
    beside = _valid(_of_first(answer), mask[:1])
    apart = _apart(alone, beside)
    if apart <= BESIDE:
        return
    if is_padded and mask_name(module) is None:
        what = (
            f"answers a row of {length} steps otherwise when it is padded to {steps}, "
            f"{apart:.2g} of the largest apart, and rows here are of unequal length; "
            f"give its forward a parameter {MASKS[0]} (B, T) and read only steps where it is True"
        )
    elif is_padded:
        what = (
            f"gets a mask, and still answers a row of {length} steps otherwise when it is padded "
            f"to {steps}, {apart:.2g} of the largest apart; read only steps where it is True"
        )
    else:
        what = (
            f"answers a row otherwise beside another one, {apart:.2g} of the largest apart; "
            "let each row's answer depend on that row alone in eval mode"
        )
    raise _refused(key, module, what)


def _check_scattered(module: nn.Module, key: str, rows: ProbeRows) -> None:
    """RecipeError if a row whose steps do not stand first is answered by what is padded.

    Not of a module that takes one number of steps only, which are 0 wherever it is asked.
    """
    inputs = rows.inputs[:1]
    mask = rows.mask[:1]
    steps = mask.shape[1]
    if bool(mask[0, : int(mask.sum())].all()):
        return
    shorter = _alone(module, inputs, torch.ones_like(mask), steps - 1)
    if shorter is None:
        return
    noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0))
    if not inputs.is_floating_point():  # of sentences: its own tokens at other places
        noise = inputs.roll(1, 1)
    with torch.inference_mode():
        padded = _valid(_ask(module, key, inputs, mask), mask)
        filled = torch.where(mask[..., None], inputs, noise)
        apart = _apart(padded, _valid(_ask(module, key, filled, mask), mask))
    if apart <= BESIDE:
        return
    what = f"reads padding, {apart:.2g} of the largest apart, and rows here have it before steps"
    if mask_name(module) is None:
        advice = f"give its forward a parameter {MASKS[0]} (B, T) and read only steps where it is"
    else:
        advice = "it gets a mask; read only steps where that is"
    raise _refused(key, module, f"{what}; {advice} True, or pad behind the steps")


def _alone(module: nn.Module, inputs: Tensor, mask: Tensor, length: int) -> _Answer | None:
    """The answer to one row cut to its length; None if the module cannot read that."""
    cut = mask[:, :length]
    try:
        answer = call(module, inputs[:, :length].contiguous(), cut)
        logits = field(answer, "logits")
        if logits is None or (logits.dim() == 3 and logits.shape[1] != length):
            return None
        return _valid(answer, cut)
    except Exception:  # of any kind: it is the user's code
        return None


def _of_first(answer: Any) -> dict[str, Tensor | None]:
    """The first row of an answer."""
    found = {name: field(answer, name) for name in ("logits", "valence")}
    return {name: None if values is None else values[:1] for name, values in found.items()}


def _valid(answer: Any, mask: Tensor) -> _Answer:
    """An answer at its valid steps; of logits also their mean over these."""
    logits = field(answer, "logits")
    assert logits is not None
    valence = field(answer, "valence")
    if logits.dim() == 3:
        mean = masked_mean(logits.float(), mask)
        logits = torch.cat([logits[mask].float(), mean])
    return _Answer(logits.float(), None if valence is None else valence[mask].float())


def _apart(one: _Answer, other: _Answer) -> float:
    """The largest difference over the largest logit, or valence."""
    pairs = [(one.logits, other.logits)]
    if one.valence is not None and other.valence is not None:
        pairs.append((one.valence, other.valence))
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-6)) for a, b in pairs)
