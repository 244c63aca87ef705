"""Layers that hold codes and scales, and answer as the layers that they were rounded from."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raykd.quant.linear import be_called
from raykd.quant.rounding import as_multiplied
from raykd.recipe.quant import Quant


def times(codes: Tensor, scales: Tensor) -> Tensor:
    """(..., K) float32: codes (..., K) times the scales (..., G) of their groups."""
    return (codes.unflatten(-1, (scales.shape[-1], -1)) * scales[..., None]).flatten(-2)


class FixedLinear(nn.Module):
    """A rounded linear layer: codes (N, K) int8, scales (N, G), a bias (N,) or None."""

    codes: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, quant: Quant, codes: Tensor, scales: Tensor, bias: Tensor | None):
        super().__init__()
        self.quant = quant
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)
        self.register_forward_pre_hook(be_called)

    @property
    def weight(self) -> Tensor:
        """(N, K) float32: what is multiplied with, for owners that look at a layer's weights."""
        return times(self.codes, self.scales)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        bias = None if self.bias is None else self.bias.float()
        return F.linear(as_multiplied(x.float(), self.quant), self.weight, bias).to(x.dtype)


class FixedEmbedding(nn.Module):
    """A rounded table: codes (V, D) int8, scales (V, G); its rows have the table's `dtype`."""

    codes: Tensor
    scales: Tensor

    def __init__(self, codes: Tensor, scales: Tensor, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def forward(self, ids: Tensor) -> Tensor:
        """Integers (...) -> (..., D)."""
        return times(self.codes[ids], self.scales[ids]).to(self.dtype)
