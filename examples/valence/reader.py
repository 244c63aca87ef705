"""A reader of sentences in their order: of each it answers what the document's class is, and how it
goes on.
"""

import torch
from torch import Tensor, nn


class Reader(nn.Module):
    """Class logits and future valence at every step, from that sentence and a GRU's memory of those
    before it.

    `lost` is the share of words left out at each training step, `dropout` that of hidden values.
    """

    def __init__(self, channels: int, classes: int, width: int, lost: float, dropout: float):
        super().__init__()
        self.lost = nn.Dropout(lost)
        self.dropout = nn.Dropout(dropout)
        self.embed = nn.Linear(channels, width)
        self.memory = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(2 * width, classes)
        self.value = nn.Linear(2 * width, 1)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """(B, T, channels) -> logits (B, T, C) and valence (B, T) in [-1, 1]."""
        now = self.dropout(torch.tanh(self.embed(self.lost(inputs))))
        past, _ = self.memory(now)
        both = torch.cat([now, self.dropout(past)], -1)
        return {"logits": self.head(both), "valence": torch.tanh(self.value(both)).squeeze(-1)}


def build(
    *, channels: int, classes: int, width: int = 8, lost: float = 0.3, dropout: float = 0.0
) -> nn.Module:
    """What the recipes name as `model = "examples.valence.reader:build"`."""
    return Reader(channels, classes, width, lost, dropout)
