"""A causal language model of the Llama family (arXiv 2302.13971), with Hugging Face's names.

RMSNorm (arXiv 1910.07467), rotary positions (arXiv 2104.09864), SwiGLU (arXiv 2002.05202),
grouped-query attention (arXiv 2305.13245).
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raykd.errors import DataError
from raykd.models.kv_cache import Cache, Past

MOST_LAYERS = 10_000
DEVIATION = 0.02  # of initial weights

Turn = tuple[Tensor, Tensor]


def check_counts(counts: Mapping[str, Any], layers: int) -> None:
    """ValueError if one of a model's whole numbers is below 1, or if it has too many layers, or
    fewer than none.
    """
    for name, value in counts.items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise ValueError(f"{name} must be at least 1, found {value}")
    if layers < 0:
        raise ValueError(f"layers must be at least 0, found {layers}")
    if layers > MOST_LAYERS:
        raise ValueError(f"layers must be at most {MOST_LAYERS:,}, found {layers:,}")


class Llama(nn.Module):
    """Next-token logits at each of at most `steps` positions, from the tokens up to it.

    `heads` query heads share `kv_heads` heads of keys and values. `tied` makes the head's weight
    the embedding's. `sub_norm` puts an RMSNorm before the last projection of the attention and of
    the MLP, as ternary training needs it (BitDistill, arXiv 2510.13998, section 3.1). `settings`
    holds the arguments.
    """

    def __init__(
        self,
        *,
        classes: int,
        steps: int,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        kv_heads: int = 2,
        inner: int = 192,
        rope_theta: float = 10_000.0,
        norm_eps: float = 1e-5,
        tied: bool = True,
        sub_norm: bool = False,
    ):
        super().__init__()
        self.settings: dict[str, Any] = {
            "classes": classes,
            "steps": steps,
            "width": width,
            "layers": layers,
            "heads": heads,
            "kv_heads": kv_heads,
            "inner": inner,
            "rope_theta": rope_theta,
            "norm_eps": norm_eps,
            "tied": tied,
            "sub_norm": sub_norm,
        }
        check_counts(self.settings, layers)
        if width % heads or width // heads % 2 or heads % kv_heads:
            raise ValueError(
                f"width {width}, heads {heads}, kv_heads {kv_heads}: heads must be a multiple of "
                "kv_heads, and width an even multiple of heads"
            )
        self.model = Stack(self.settings)
        self.lm_head = nn.Linear(width, classes, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=DEVIATION)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor, cache: Past | None = None) -> dict[str, Tensor]:
        """Integers (B, T) -> logits (B, T, V).

        With a cache, the tokens follow those in it and are added to it. Integers (B, T, 2) are
        tokens and their places in their documents, from 0: each document of a row is then read as
        if it were alone, and so is padding of place 0. The cache of such rows must hold the places
        too. DataError if there are more than `steps` tokens.
        """
        past = cache.length if cache is not None else 0
        if past + tokens.shape[1] > self.settings["steps"]:
            raise DataError(
                f"tokens: {tokens.shape[1]} after {past}, but this model was built for at most "
                f"{self.settings['steps']}; give fewer, or build it with more steps"
            )
        logits = self.lm_head(self.model(tokens, cache))
        if cache is not None:
            cache.length = past + tokens.shape[1]
        return {"logits": logits}

    def cache(self, rows: int) -> Cache:
        """An empty cache for `rows` sequences of as many tokens as this model takes."""
        return Cache(
            layers=self.settings["layers"],
            rows=rows,
            heads=self.settings["kv_heads"],
            steps=self.settings["steps"],
            width=self.settings["width"] // self.settings["heads"],
            dtype=self.lm_head.weight.dtype,
        )


class Stack(nn.Module):
    """Embedding, blocks and the last norm: all of a Llama but its head."""

    def __init__(self, settings: dict[str, Any]):
        super().__init__()
        width = settings["width"]
        self.theta = settings["rope_theta"]
        self.turning = width // settings["heads"]
        self.embed_tokens = nn.Embedding(settings["classes"], width)
        self.layers = nn.ModuleList(LlamaBlock(settings) for _ in range(settings["layers"]))
        self.norm = nn.RMSNorm(width, settings["norm_eps"])

    def forward(self, tokens: Tensor, cache: Past | None) -> Tensor:
        """Integers (B, T) or (B, T, 2) -> (B, T, D)."""
        x = self.embed_tokens(tokens if tokens.dim() == 2 else tokens[..., 0])
        first = cache.length if cache is not None else 0
        count = tokens.shape[1]
        seen = None
        if tokens.dim() == 3:
            places = tokens[..., 1]
            turn = rotations(places[:, None], self.turning, self.theta)  # (B, 1, T, D / 2)
            if cache is not None:
                assert isinstance(cache, Cache), "only a Cache holds places"
                places = cache.placed(places)
            seen = within(places, count)
        else:
            places = torch.arange(first, first + count, device=x.device)
            turn = rotations(places, self.turning, self.theta)
            if cache is not None:
                seen = visible(count, first + count, x.device)
        for index, block in enumerate(self.layers):
            x = block(x, turn, index, cache, seen)
        return self.norm(x)


class LlamaBlock(nn.Module):
    """Pre-norm attention and a SwiGLU MLP, each added to its input."""

    def __init__(self, settings: dict[str, Any]):
        super().__init__()
        width = settings["width"]
        eps = settings["norm_eps"]
        self.input_layernorm = nn.RMSNorm(width, eps)
        self.self_attn = Attention(settings)
        self.post_attention_layernorm = nn.RMSNorm(width, eps)
        self.mlp = SwiGLU(settings)

    def forward(
        self, x: Tensor, turn: Turn, index: int, cache: Past | None, seen: Tensor | None
    ) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.self_attn(self.input_layernorm(x), turn, index, cache, seen)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Grouped-query attention of each position over itself and those before it.

    While `keep_attention` is True, every call leaves its map in `attention` and the map's logits in
    `scores`, both (B, H, T, past + T); the scores of later positions are -inf. `is_eager` computes
    the same step by step in any case.
    """

    def __init__(self, settings: dict[str, Any]):
        super().__init__()
        width = settings["width"]
        self.heads = settings["heads"]
        self.kv_heads = settings["kv_heads"]
        shared = width // self.heads * self.kv_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, shared, bias=False)
        self.v_proj = nn.Linear(width, shared, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.attn_sub_norm = (
            nn.RMSNorm(width, settings["norm_eps"]) if settings["sub_norm"] else nn.Identity()
        )
        self.keep_attention = False
        self.is_eager = False
        self.attention: Tensor | None = None
        self.scores: Tensor | None = None

    def forward(
        self, x: Tensor, turn: Turn, index: int, cache: Past | None, seen: Tensor | None
    ) -> Tensor:
        """(B, T, D) -> (B, T, D); `seen` as `visible` gives it, None for all positions before."""
        q = rotate(self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2), turn)
        k = rotate(self.k_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2), turn)
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(index, k, v)
        by_steps = self.keep_attention or self.is_eager
        mix = self._mix_and_keep if by_steps else self._mix
        return self.o_proj(self.attn_sub_norm(mix(q, k, v, seen).transpose(1, 2).flatten(2)))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, seen, is_causal=seen is None, enable_gqa=self.kv_heads < self.heads
        )

    def _mix_and_keep(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        k, v = (x.repeat_interleave(self.heads // self.kv_heads, 1) for x in (k, v))
        seen = visible(q.shape[2], k.shape[2], q.device) if seen is None else seen
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
        attention = scores.softmax(-1)
        if self.keep_attention:
            self.scores = scores
            self.attention = attention
        return attention @ v


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x) (arXiv 2002.05202, eq. 6)."""

    def __init__(self, settings: dict[str, Any]):
        super().__init__()
        width = settings["width"]
        inner = settings["inner"]
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.ffn_sub_norm = (
            nn.RMSNorm(inner, settings["norm_eps"]) if settings["sub_norm"] else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.down_proj(self.ffn_sub_norm(F.silu(self.gate_proj(x)) * self.up_proj(x)))


def rotations(places: Tensor, width: int, theta: float) -> Turn:
    """(cosine, sine), each (..., T, D / 2), of place times theta^(-2 i / D), D being `width`.

    `places` (..., T) are integers.
    """
    speed = theta ** -(torch.arange(0, width, 2, dtype=torch.float32, device=places.device) / width)
    angle = places[..., None].float() * speed
    return angle.cos(), angle.sin()


def rotate(x: Tensor, turn: Turn) -> Tensor:
    """Turn the pairs (i, i + D / 2) of (B, H, T, D).

    These are the pairs of Hugging Face's rotate_half, not the paper's neighbours.
    """
    a, b = x.chunk(2, -1)
    cosine, sine = (part.to(x.dtype) for part in turn)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1)


def visible(queries: int, keys: int, device: torch.device) -> Tensor:
    """(T, past + T) bool: which keys each of the last `queries` positions may see."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def within(places: Tensor, queries: int) -> Tensor:
    """(B, 1, T, past + T) bool: which keys of its own document each query may see.

    `places` (B, past + T) are those of the keys; the last `queries` of them are also those of the
    queries. A document starts at place 0.
    """
    document = (places == 0).cumsum(1)
    same = document[:, -queries:, None] == document[:, None]
    return (same & visible(queries, places.shape[1], places.device))[:, None]
