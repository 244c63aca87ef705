"""A small causal encoder of multivariate series: class logits and a future-valence value at every step."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SeriesEncoder(nn.Module):
    """Class logits and future valence at every step, each from that step and the ones before it.

    A causal convolution, learned positions, `layers` pre-norm blocks and two linear heads. Inputs may have at
    most `steps` steps. Without `bias` the blocks' linear layers have none, as those of BitNet (arXiv 2402.17764).
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
        self.steps, self.kernel = steps, kernel
        self.conv = nn.Conv1d(channels, width, kernel)
        self.positions = nn.Parameter(0.02 * torch.randn(steps, width))
        self.blocks = nn.ModuleList(Block(width, heads, expansion, bias) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        self.value = nn.Linear(width, 1)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """Inputs (B, T, channels) -> logits (B, T, C) and valence (B, T) in [-1, 1]."""
        if inputs.shape[1] > self.steps:
            raise ValueError(f"{inputs.shape[1]} steps, but this encoder was built for at most {self.steps}")
        past = F.pad(inputs.transpose(1, 2), (self.kernel - 1, 0))  # (B, channels, kernel - 1 + T)
        x = self.conv(past).transpose(1, 2) + self.positions[: inputs.shape[1]]  # (B, T, D)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return {"logits": self.head(x), "valence": torch.tanh(self.value(x)).squeeze(-1)}


class Block(nn.Module):
    """Pre-norm causal attention and a GELU MLP, each added to its input."""

    def __init__(self, width: int, heads: int, expansion: int, bias: bool = True):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = CausalAttention(width, heads, bias)
        self.norm2 = nn.LayerNorm(width)
        inner = expansion * width
        self.mlp = nn.Sequential(nn.Linear(width, inner, bias), nn.GELU(), nn.Linear(inner, width, bias))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CausalAttention(nn.Module):
    """Multi-head attention of each step over itself and the steps before it.

    While `keep_attention` is True, every call leaves its map in `attention` and the map's logits in `scores`,
    both (B, H, T, T); the scores of later steps are -inf.
    """

    def __init__(self, width: int, heads: int, bias: bool = True):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias)
        self.out = nn.Linear(width, width, bias)
        self.keep_attention = False
        self.attention: Tensor | None = None
        self.scores: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        split = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, T, 3, H, D / H)
        q, k, v = split.permute(2, 0, 3, 1, 4)  # each (B, H, T, D / H)
        mix = self._mix_and_keep if self.keep_attention else self._mix
        return self.out(mix(q, k, v).transpose(1, 2).flatten(2))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def _mix_and_keep(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(later, float("-inf"))
        attention = scores.softmax(-1)
        self.scores, self.attention = scores, attention
        return attention @ v
