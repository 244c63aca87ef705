"""A large teacher and a small drafter to decode with: built, or read from two of Hugging Face's
folders.

The drafter learns text. To train 20 M parameters takes longer than a bench may, so the built
teacher holds the drafter: its first coordinates, heads and hidden units are the drafter's, and all
others have random weights. What those write to the stream is multiplied by one scale. At 0 the
teacher answers as the drafter does, at the cost of its own size; the scale is set by bisection so
that the mean of sum min(p, q) over text that the drafter drew is what is wanted. All products are
dense, so the cost is that of any teacher of this shape.
"""

import hashlib
import json
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor

from pipelines.bench import corpus
from pipelines.bench.language import Windows, fit
from raykd.data.vocabulary import shared_tokens
from raykd.errors import RecipeError
from raykd.files.atomic import write_bytes
from raykd.models import hf_folder
from raykd.models.llama import Llama

STEPS = 256
PROMPT = 16
DRAFTER: dict[str, Any] = {"width": 64, "layers": 2, "heads": 2, "kv_heads": 2, "inner": 192}
TEACHER: dict[str, Any] = {
    "width": 384,
    "layers": 8,
    "heads": 12,
    "kv_heads": 12,
    "inner": 1152,
    "tied": False,
}
WRITING = ("embed_tokens.weight", "o_proj.weight", "down_proj.weight")  # what adds to the stream
# of the scale
LEAST = 1e-4
MOST = 10.0
HALVINGS = 12


@dataclass(frozen=True)
class Pair:
    """Two models, prompts, how many ids both know (None: all), and what they are, in words."""

    teacher: Llama
    drafter: Llama
    prompts: list[list[int]]
    vocab: int | None
    described: str


def built(out: Path, *, acceptance: float, steps: int, prompts: int) -> Pair:
    """A drafter after `steps` steps of text, kept in the folder `out`, and a teacher of that
    overlap with it.
    """
    text = corpus.load(out, rows=16, held=prompts)
    drafter = _drafter(text, out, steps)
    teacher, noise = _large(drafter)
    drawn = continued(drafter, torch.from_numpy(text.distil[:8, :PROMPT].copy()), 64)

    def reached(scale: float) -> float:
        embed(drafter, teacher, noise, scale)
        return overlap(teacher, drafter, drawn)[:, PROMPT:].mean().item()

    same = reached(0.0)
    low = LEAST
    high = MOST
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        if reached(middle) > acceptance:
            low = middle
        else:
            high = middle
    scale = (low * high) ** 0.5
    found = reached(scale)
    described = (
        f"{text.described}\n"
        f"built pair: a teacher of {_count(teacher)} parameters around a drafter of "
        f"{_count(drafter)}\n"
        f"the drafter learnt for {steps} steps; "
        f"sum min(p, q) on its text: {same:.6f} at scale 0, {found:.3f} at {scale:.4f}"
    )
    return Pair(teacher, drafter, text.held[:, :PROMPT].tolist(), None, described)


def read(teacher: Path, student: Path, *, prompts: int) -> Pair:
    """The models of two folders with a tokenizer.json each; prompts are how files of the standard
    library begin.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise RecipeError(
            "this bench needs the tokenizers library: pip install 'raykd[lm]'"
        ) from None

    for folder in (teacher, student):
        if not (folder / "tokenizer.json").exists():
            raise RecipeError(
                f"{folder}: no tokenizer.json in it; give the folder of a model with its tokeniser"
            )
    ours, theirs = (
        Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (teacher, student)
    )
    vocab = shared_tokens(ours.get_vocab(), theirs.get_vocab())
    large, small = (hf_folder.read(folder).eval() for folder in (teacher, student))
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    starts = [
        ours.encode(path.read_text(encoding="utf-8", errors="replace")[:2000]).ids[:PROMPT]
        for path in files
    ]
    known = [ids for ids in starts if len(ids) == PROMPT and max(ids) < vocab][:prompts]
    described = (
        f"{teacher} of {_count(large)} parameters, {student} of {_count(small)}, "
        f"{vocab} tokens alike"
    )
    return Pair(large, small, known, vocab, described)


def embed(small: Llama, large: Llama, noise: Mapping[str, Tensor], scale: float) -> None:
    """Write the small model into the large one's first coordinates, and noise everywhere else.

    RMSNorm over D coordinates of which d are not 0 gives sqrt(D / d) times that over d, so weights
    of norms shrink.
    """
    parts = small.state_dict()
    shrink = (small.settings["width"] / large.settings["width"]) ** 0.5
    with torch.no_grad():
        for name, weight in large.state_dict().items():
            weight.copy_(noise[name] * scale if name.endswith(WRITING) else noise[name])
            if name in parts:
                part = parts[name] * shrink if weight.dim() == 1 else parts[name]
                weight[tuple(map(slice, part.shape))] = part


@torch.inference_mode()
def continued(module: Llama, tokens: Tensor, count: int) -> Tensor:
    """(B, T) tokens and `count` drawn after each row, (B, T + count)."""
    cache = module.cache(len(tokens))
    found = [tokens]
    draws = torch.Generator().manual_seed(0)
    for _ in range(count):
        law = module(found[-1], cache)["logits"][:, -1].softmax(-1)
        found.append(torch.multinomial(law, 1, generator=draws))
    return torch.cat(found, 1)


@torch.inference_mode()
def overlap(teacher: Llama, drafter: Llama, tokens: Tensor) -> Tensor:
    """(B, T): sum min(p, q) at every position."""
    p, q = (module(tokens)["logits"].softmax(-1) for module in (teacher, drafter))
    return torch.minimum(p, q).sum(-1)


def _large(small: Llama) -> tuple[Llama, dict[str, Tensor]]:
    """A teacher whose weights are not set, and the noise for each: a product's outputs have the
    size of its inputs.
    """
    torch.manual_seed(0)
    settings = small.settings | TEACHER
    settings["norm_eps"] *= small.settings["width"] / settings["width"]
    module = Llama(**settings).eval()
    noise = {
        k: torch.ones_like(v) if v.dim() == 1 else torch.randn_like(v)
        for k, v in module.state_dict().items()
    }
    for name, value in noise.items():
        if value.dim() == 2 and not name.endswith("embed_tokens.weight"):
            value /= value.shape[1] ** 0.5
    return module, noise


def _drafter(text: corpus.Corpus, out: Path, steps: int) -> Llama:
    torch.manual_seed(0)
    module = Llama(classes=corpus.VOCAB, steps=STEPS, **DRAFTER)
    named = hashlib.sha256(json.dumps([module.settings, steps]).encode()).hexdigest()[:12]
    path = out / f"drafter-{text.digest}-{named}.safetensors"
    if not path.exists():
        windows = Windows(text.train, corpus.STEPS, batch=4, seed=0)

        def loss(step: int) -> Tensor:
            tokens, following = windows(step)
            return F.cross_entropy(module(tokens)["logits"].flatten(0, 1), following.flatten())

        fit(module, loss, steps=steps, rate=3e-3)
        write_bytes(
            path, save({k: v for k, v in module.state_dict().items() if k != hf_folder.HEAD})
        )
    tensors = load_file(path)
    module.load_state_dict(tensors | {hf_folder.HEAD: tensors[hf_folder.TABLE]})
    return module.eval()


def _count(module: Llama) -> str:
    return f"{sum(p.numel() for p in module.parameters()):,}"
