"""Rows for an arm, with all that it reads of a teacher whose weights are random."""

import torch

from raykd.losses.terms import needs_of
from raykd.models.adapter import Adapter
from raykd.models.series_encoder import SeriesEncoder
from raykd.store.layer_signals import is_signal
from raykd.training.arm import Arm
from raykd.training.device_rows import DeviceRows


def rows_for(arm: Arm) -> DeviceRows:
    """Forty rows of two to eight steps, and all that the arm reads of a random teacher."""
    torch.manual_seed(0)
    needs = needs_of(arm.terms)
    module = SeriesEncoder(channels=3, classes=4, steps=8, width=12, layers=3).eval()
    teacher = Adapter(module, want=frozenset(filter(is_signal, needs)))
    draw = torch.Generator().manual_seed(0)
    mask = torch.arange(8) < torch.randint(2, 9, (40, 1), generator=draw)
    inputs = torch.randn(40, 8, 3, generator=draw) * mask[..., None]
    with torch.no_grad():
        said = teacher(inputs, mask)
    signals = {"logits": said.logits, "trajectory": said.valence} | said.layers
    saliency = torch.randn(40, generator=draw)
    answer = said.sequence_logits().argmax(1)
    label = torch.arange(40) % 4
    return DeviceRows(
        torch.arange(40), inputs, mask, label, None, signals, mask, saliency=saliency, answer=answer
    )
