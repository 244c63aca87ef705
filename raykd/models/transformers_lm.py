"""Any causal language model of transformers (extra `hf`), from a local folder, as a teacher.

Documents that share a row are read in separate calls, those of similar lengths together. So each is
read as if it were alone, even by an architecture that has no mask between documents.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from raykd.errors import DataError, RecipeError
from raykd.models.form import Form
from raykd.models.weights import check_stored
from raykd.recipe.weight_files import config_of, tensor_files

PROBE = 8  # tokens; the logits of the first half must not depend on the second
NEAR = 1e-3  # of the largest logit: differences up to this are rounding
ROUNDED = 8  # times the rounding of a type of number, the same
READ = {
    "local_files_only": True,
    "trust_remote_code": False,
    "use_safetensors": True,
}

Part = tuple[Tensor, Tensor]


class TransformersLM(nn.Module):
    """Next-token logits at every position, from the tokens of its document up to it.

    It keeps no cache. `settings` holds `classes`, the columns of its head, and `steps`, the most
    tokens it takes (None: any number). Inner layers answer in parts, which `joined` gives as rows.
    """

    def __init__(self, model: Any, *, classes: int, steps: int | None):
        super().__init__()
        self.model = model
        self.settings: dict[str, Any] = {"classes": classes, "steps": steps}
        self._shape = (0, 0)
        self._parts: list[Part] = []

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """Integers (B, T), or (B, T, 2) with their places in their documents -> logits (B, T, V).

        A place of 0 starts a document, which continues to the next one or to the end of its row.
        DataError if there are more than `steps` tokens.
        """
        most = self.settings["steps"]
        if most is not None and tokens.shape[1] > most:
            raise DataError(
                f"tokens: {tokens.shape[1]}, but this model takes at most {most}; give fewer"
            )
        if tokens.dim() == 3:
            places = tokens[..., 1]
            text = tokens[..., 0].long()
        else:
            places = torch.arange(tokens.shape[1], device=tokens.device)
            text = tokens.long()
        self._shape = (text.shape[0], text.shape[1])
        self._parts = documents_by_length(places.expand(text.shape))
        flat = text.flatten()
        answers = [self.model(input_ids=flat[at], use_cache=False).logits for at, _ in self._parts]
        return {"logits": self.joined(answers)}

    def joined(self, answers: list[Tensor]) -> Tensor:
        """(B, T, ...): the rows of a submodule's answers (N, L, ...) to each part of a batch.

        If it is called several times in a part, its last answer counts.
        """
        calls = len(answers) // len(self._parts)
        answers = answers[calls - 1 :: calls]
        rows, steps = self._shape
        whole = answers[0].new_empty(rows * steps, *answers[0].shape[2:])
        for (at, inside), answer in zip(self._parts, answers, strict=True):
            if answer.shape[:2] != inside.shape:
                raise RecipeError(
                    f"a layer answers {tuple(answer.shape)} to {tuple(inside.shape)} tokens, "
                    "not at each"
                )
            whole[at[inside]] = answer[inside]
        return whole.unflatten(0, (rows, steps))


def documents_by_length(places: Tensor) -> list[Part]:
    """(at (N, L), inside (N, L)) of the documents of 1, 2, up to 4, up to 8, ... tokens each.

    `places` (B, T) are the tokens' places in their documents. `at` are positions in the flat rows;
    after a document's end, where `inside` is False, its first position is repeated.
    """
    starts = places == 0
    starts[:, 0] = True
    first = starts.flatten().nonzero()[:, 0]
    length = first.diff(append=first.new_tensor([places.numel()]))
    size = length.double().log2().ceil()
    parts = []
    for value in size.unique():
        chosen = size == value
        step = torch.arange(int(length[chosen].max()), device=places.device)
        inside = step < length[chosen, None]
        parts.append((first[chosen, None] + torch.where(inside, step, 0), inside))
    return parts


def read(folder: Path, form: Form | None = None) -> TransformersLM:
    """The model of a folder, in the numbers of a `form` or in float32, and in evaluation mode.

    RecipeError if its weights are not in the folder, or if it is not causal.
    """
    form = form or Form()
    config_of(folder)
    check_stored(tensor_files(folder))
    try:
        from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise RecipeError(
            "model = \"transformers\" needs transformers; type: pip install 'raykd[hf]'"
        ) from None
    with unreadable(folder, "as a causal language model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=form.dtype,
            attn_implementation=form.implementation,
            output_loading_info=True,
            **placing(form),
            **READ,
        )
    model, loading = loaded
    absent = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise RecipeError(
            f"{folder}: its files lack {', '.join(absent[:3])}{more}, as config.json has them"
        )
    model = model.to(form.device, form.dtype).eval()
    return TransformersLM(
        model, classes=_columns(model, folder), steps=_room(model.config.get_text_config())
    )


@contextmanager
def unreadable(folder: Path, what: str) -> Iterator[None]:
    """RecipeError in place of what transformers raises where it cannot read a folder."""
    try:
        yield
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        ImportError,
        SafetensorError,
    ) as error:
        raise RecipeError(f"{folder}: transformers cannot read it {what}: {error}") from None


def placing(form: Form) -> dict[str, Any]:
    """What lets transformers read weights straight to a GPU, where its helper is installed."""
    if form.device.type == "cpu" or importlib.util.find_spec("accelerate") is None:
        return {}
    return {"device_map": {"": str(form.device)}}


def _room(config: Any) -> int | None:
    """The most tokens a model takes; with LongRoPE (arXiv 2402.13753) before its factors change."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return getattr(config, "original_max_position_embeddings", None)
    return getattr(config, "max_position_embeddings", None)


@torch.no_grad()
def _columns(model: Any, folder: Path) -> int:
    """The number of the head's columns. RecipeError if a model's answer depends on later tokens."""
    table = model.get_input_embeddings().weight
    tokens = torch.arange(PROBE, device=table.device)[None] % table.shape[0]
    whole = model(input_ids=tokens, use_cache=False).logits
    half = model(input_ids=tokens[:, : PROBE // 2], use_cache=False).logits
    near = max(NEAR, ROUNDED * torch.finfo(half.dtype).eps)
    if (whole[:, : PROBE // 2] - half).abs().max() > near * half.abs().max():
        raise RecipeError(
            f"{folder}: {type(model).__name__} reads what follows a token, too; it must be causal"
        )
    return whole.shape[-1]
