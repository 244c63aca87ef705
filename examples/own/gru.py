"""Your own model: any factory of an nn.Module that answers with logits, one a sequence or one a step."""

import torch
from torch import Tensor, nn


class Gru(nn.Module):
    """Class logits at every step, each from that step and the ones before it."""

    def __init__(self, channels: int, classes: int, width: int):
        super().__init__()
        self.gru = nn.GRU(channels, width, batch_first=True)
        self.head = nn.Linear(width, classes)
        self.value = nn.Linear(width, 1)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """(B, T, channels) -> logits (B, T, C) and, if there is a value head, valence (B, T) in [-1, 1]."""
        states, _ = self.gru(inputs)
        return {"logits": self.head(states), "valence": torch.tanh(self.value(states)).squeeze(-1)}


def build(*, channels: int, classes: int, width: int = 8) -> nn.Module:
    """What a recipe names as `model = "examples.own.gru:build"`; its other keywords are the recipe's settings."""
    return Gru(channels, classes, width)
