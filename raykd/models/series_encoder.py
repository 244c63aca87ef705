"""A small causal encoder of multivariate series, with a class head and a value head."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raykd.models.kv_cache import Past
from raykd.models.llama import check_counts, visible


class SeriesPast(Past, Protocol):
    """What the encoder needs of earlier steps: keys and values, and the last of their inputs."""

    tail: Tensor  # (B, channels, kernel - 1), zeros where there are fewer


class SeriesEncoder(nn.Module):
    """Class logits and future valence at every step, each from that step and the ones before it.

    It has a causal convolution, learned positions, `layers` pre-norm blocks and two linear heads.
    Inputs may have at most `steps` steps. Without `bias` the blocks' linear layers have none, as in
    BitNet (arXiv 2402.17764).
    """

    def __init__(
        self,
        *,
        channels: int,
        classes: int,
        steps: int,
        width: int = 16,
        layers: int = 1,
        heads: int = 2,
        expansion: int = 2,
        kernel: int = 5,
        bias: bool = True,
    ):
        super().__init__()
        counts = {"width": width, "heads": heads, "expansion": expansion, "kernel": kernel}
        check_counts(counts, layers)
        self.steps = steps
        self.kernel = kernel
        self.heads = heads
        self.conv = nn.Conv1d(channels, width, kernel)
        self.positions = nn.Parameter(0.02 * torch.randn(steps, width))
        self.blocks = nn.ModuleList(
            EncoderBlock(width, heads, expansion, bias) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        self.value = nn.Linear(width, 1)

    def forward(self, inputs: Tensor, past: SeriesPast | None = None) -> dict[str, Tensor]:
        """Inputs (B, T, channels) -> logits (B, T, C) and valence (B, T) in [-1, 1].

        With a past, the inputs follow its steps and are added to it. ValueError if there are more
        than `steps` steps.
        """
        first = past.length if past is not None else 0
        count = inputs.shape[1]
        if first + count > self.steps:
            after = f" after {first}" if first else ""
            raise ValueError(
                f"{count} steps{after}, but this encoder was built for at most {self.steps}"
            )
        series = inputs.transpose(1, 2)
        if past is None:
            series = F.pad(series, (self.kernel - 1, 0))  # (B, channels, kernel - 1 + T)
            places = self.positions[:count]
            seen = None
        else:
            series = torch.cat([past.tail, series], 2)
            # an index: a slice's bounds would be conditions on the exported shapes
            places = self.positions[torch.arange(first, first + count, device=inputs.device)]
            seen = visible(count, first + count, inputs.device)
        x = self.conv(series).transpose(1, 2) + places  # (B, T, D)
        for index, block in enumerate(self.blocks):
            x = block(x, index, past, seen)
        if past is not None:
            past.tail = series[:, :, count:]
            past.length = first + count
        x = self.norm(x)
        return {"logits": self.head(x), "valence": torch.tanh(self.value(x)).squeeze(-1)}


class EncoderBlock(nn.Module):
    """Pre-norm causal attention and a GELU MLP, each added to its input."""

    def __init__(self, width: int, heads: int, expansion: int, bias: bool = True):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = CausalAttention(width, heads, bias)
        self.norm2 = nn.LayerNorm(width)
        inner = expansion * width
        self.mlp = nn.Sequential(
            nn.Linear(width, inner, bias), nn.GELU(), nn.Linear(inner, width, bias)
        )

    def forward(
        self, x: Tensor, index: int = 0, past: Past | None = None, seen: Tensor | None = None
    ) -> Tensor:
        """(B, T, D) -> (B, T, D).

        `seen` (T, past + T) is True at the steps that each step sees; None is all before it.
        """
        x = x + self.attention(self.norm1(x), index, past, seen)
        return x + self.mlp(self.norm2(x))


class CausalAttention(nn.Module):
    """Multi-head attention of each step over itself and the steps before it.

    While `keep_attention` is True, every call leaves its map in `attention` and the map's logits in
    `scores`, both (B, H, T, past + T); the scores of later steps are -inf. `is_eager` computes the
    same step by step in any case.
    """

    def __init__(self, width: int, heads: int, bias: bool = True):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias)
        self.out = nn.Linear(width, width, bias)
        self.keep_attention = False
        self.is_eager = False
        self.attention: Tensor | None = None
        self.scores: Tensor | None = None

    def forward(
        self, x: Tensor, index: int = 0, past: Past | None = None, seen: Tensor | None = None
    ) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        split = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, T, 3, H, D / H)
        q, k, v = split.permute(2, 0, 3, 1, 4)  # each (B, H, T, D / H)
        if past is not None:
            k, v = past.extend(index, k, v)
        by_steps = self.keep_attention or self.is_eager
        mix = self._mix_and_keep if by_steps else self._mix
        return self.out(mix(q, k, v, seen).transpose(1, 2).flatten(2))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None)

    def _mix_and_keep(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        seen = visible(q.shape[-2], k.shape[-2], q.device) if seen is None else seen
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
        attention = scores.softmax(-1)
        if self.keep_attention:
            self.scores = scores
            self.attention = attention
        return attention @ v
