"""Any causal language model of transformers (extra `hf`), from a folder on this machine, as a
teacher of rows of text.

Documents that share a row are read in calls of their own, those of like lengths together: so each
is read as if it stood alone, by architectures that know of no mask between documents too.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from raykd.errors import DataError, RecipeError
from raykd.recipe.weight_files import config_of, tensor_files

PROBE = 8  # tokens, of which the first half must not depend on the others
NEAR = 1e-3  # of the largest logit
READ = {
    "local_files_only": True,
    "trust_remote_code": False,
    "use_safetensors": True,
    "attn_implementation": "eager",
}

Part = tuple[Tensor, Tensor]


class TransformersLM(nn.Module):
    """Next-token logits at every position, each from that token and those before it in its
    document.

    It keeps no cache. `settings` holds its `classes`, the head's columns, and the most `steps` it
    takes, None for any number. Inner layers answer in parts, which `joined` lays out as rows.
    """

    def __init__(self, model: Any, *, classes: int, steps: int | None):
        super().__init__()
        self.model = model
        self.settings: dict[str, Any] = {"classes": classes, "steps": steps}
        self._shape, self._parts = (0, 0), list[Part]()

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """Integers (B, T), or with their places in their documents (B, T, 2), -> logits (B, T, V).

        A place of 0 starts a document, which goes on to the next or to the end of its row.
        DataError where there are more than `steps` tokens.
        """
        most = self.settings["steps"]
        if most is not None and tokens.shape[1] > most:
            raise DataError(
                f"tokens: {tokens.shape[1]}, but this model takes at most {most}; give fewer"
            )
        places = (
            tokens[..., 1]
            if tokens.dim() == 3
            else torch.arange(tokens.shape[1], device=tokens.device)
        )
        text = (tokens[..., 0] if tokens.dim() == 3 else tokens).long()
        self._shape, self._parts = tuple(text.shape), parts(places.expand(text.shape))
        flat = text.flatten()
        return {
            "logits": self.joined(
                [self.model(input_ids=flat[at], use_cache=False).logits for at, _ in self._parts]
            )
        }

    def joined(self, answers: list[Tensor]) -> Tensor:
        """(B, T, ...): what a submodule answered in the latest call, (N, L, ...) to each part in
        turn.

        Of one that is called several times in a part the last answer counts.
        """
        calls = len(answers) // len(self._parts)
        answers, (rows, steps) = answers[calls - 1 :: calls], self._shape
        whole = answers[0].new_empty(rows * steps, *answers[0].shape[2:])
        for (at, inside), answer in zip(self._parts, answers, strict=True):
            if answer.shape[:2] != inside.shape:
                raise RecipeError(
                    f"a layer answers {tuple(answer.shape)} to {tuple(inside.shape)} tokens, not at each"
                )
            whole[at[inside]] = answer[inside]
        return whole.unflatten(0, (rows, steps))


def parts(places: Tensor) -> list[Part]:
    """The documents of rows (B, T), those of 1, 2, up to 4, up to 8, ... tokens together: (at (N,
    L), inside (N, L)).

    `at` counts along all rows; behind a document's end, where it is not `inside`, its first token
    stands again.
    """
    starts = places == 0
    starts[:, 0] = True
    first = starts.flatten().nonzero()[:, 0]
    length = first.diff(append=first.new_tensor([places.numel()]))
    size, found = length.double().log2().ceil(), []
    for each in size.unique():
        own = size == each
        step = torch.arange(int(length[own].max()), device=places.device)
        inside = step < length[own, None]
        found.append((first[own, None] + torch.where(inside, step, 0), inside))
    return found


def read(folder: Path) -> TransformersLM:
    """The model of a folder, in float32 and evaluation.

    RecipeError if it has no weights for it, or is not causal.
    """
    config_of(folder)
    tensor_files(folder)
    try:
        from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise RecipeError(
            "model = \"transformers\" needs transformers; type: pip install 'raykd[hf]'"
        ) from None
    try:
        model, said = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float32, output_loading_info=True, **READ
        )
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        ImportError,
        SafetensorError,
    ) as error:
        raise RecipeError(
            f"{folder}: transformers can not read it as a causal language model: {error}"
        ) from None
    absent = sorted(map(str, [*said["missing_keys"], *said["mismatched_keys"]]))
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise RecipeError(
            f"{folder}: its files lack {', '.join(absent[:3])}{more}, as config.json has them"
        )
    model = model.float().eval()
    return TransformersLM(
        model, classes=_columns(model, folder), steps=_room(model.config.get_text_config())
    )


def _room(config: Any) -> int | None:
    """How many tokens a model takes; with LongRoPE (arXiv 2402.13753) up to where its turns are
    fixed.
    """
    longer = (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "longrope"
    return getattr(
        config, "original_max_position_embeddings" if longer else "max_position_embeddings", None
    )


@torch.no_grad()
def _columns(model: Any, folder: Path) -> int:
    """The head's columns, of a model that answers alike whatever follows.

    RecipeError for any other.
    """
    tokens = torch.arange(PROBE)[None] % model.get_input_embeddings().weight.shape[0]
    whole, half = (
        model(input_ids=x, use_cache=False).logits for x in (tokens, tokens[:, : PROBE // 2])
    )
    if (whole[:, : PROBE // 2] - half).abs().max() > NEAR * half.abs().max():
        raise RecipeError(
            f"{folder}: {type(model).__name__} reads what follows a token, too; it must be causal"
        )
    return whole.shape[-1]
