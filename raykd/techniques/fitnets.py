"""FitNets: inner layers follow the teacher's through a learned map (Romero et al. 2015).

L = w_ce CE + w_kd T^2 KL + w_hint |LN(h_T) - r(h_S)|^2, jointly (arXiv 1412.6550). The paper trains
in two stages, hints first and the rest of the student after them: that is `terms.hint.until = 0.3`
with `since = 0.3` for the other terms. r is linear, trained with the student and never exported.
Pair a middle layer: a late one leaves the student no freedom.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from raykd.losses import Answered, Pairs, TermValues, mean_over_pairs, term
from raykd.signals import Batch, Signals, same_length

RECIPE = {
    "terms": {
        "ce": {"weight": 0.2},
        "kd": {"weight": 0.8, "temperature": 2.0},
        "hint": {"weight": 1.0, "pairs": [["blocks.0", "blocks.1"]]},
    }
}


def _counts(answered: Answered, batch: Batch, *, pairs: Pairs, **_settings: Any) -> Tensor:
    """The steps where layers and batch have the same ones, else the rows."""
    assert batch.teacher is not None
    steps = batch.mask.shape[1]
    for mine, theirs in pairs:
        here = answered.layers[f"hidden.{mine}"]
        there = batch.teacher.layers[f"hidden.{theirs}"].shape[1]
        if steps > 1 and not here == there == steps:
            return batch.mask.any(1)
    return batch.mask


@term(layers="hidden", counts=_counts)
class hint(nn.Module):
    """The mean over channels of (t(h_T) - r(h_S))^2 at every valid step, mean over pairs of layers.

    Where two layers have unequal numbers of steps, the longer is averaged down to the shorter.

    pairs      pairs of a submodule of the student and one of the teacher
    normalise  whether t is LayerNorm without parameters; else it is the identity
    """

    def __init__(self, student: Signals, batch: Batch, *, pairs: Pairs, normalise: bool = True):
        super().__init__()
        assert batch.teacher is not None
        self.pairs = [(f"hidden.{mine}", f"hidden.{theirs}") for mine, theirs in pairs]
        self.normalise = normalise
        self.maps = nn.ModuleList()
        for mine, theirs in self.pairs:
            width = student.layers[mine].shape[-1]
            teacher_width = batch.teacher.layers[theirs].shape[-1]
            self.maps.append(nn.Linear(width, teacher_width))

    def forward(self, student: Signals, batch: Batch) -> TermValues:
        assert batch.teacher is not None
        values = []
        for regressor, (mine, theirs) in zip(self.maps, self.pairs, strict=True):
            layer = student.layers[mine]
            teacher_layer = batch.teacher.layers[theirs]
            values.append(self._pair(regressor, layer, teacher_layer, batch.mask))
        return mean_over_pairs(values, batch.mask)

    def _pair(self, regressor: nn.Module, mine: Tensor, theirs: Tensor, mask: Tensor) -> Tensor:
        """(B, T): the squared difference, mean over channels.

        Of layers with unequal numbers of steps it is (B, 1), the mean over steps too.
        """
        is_even = mine.shape[1] == theirs.shape[1]
        mine, theirs = same_length(mine.float(), theirs.float(), mask)
        if self.normalise:
            theirs = F.layer_norm(theirs, theirs.shape[-1:])
        value = (theirs - regressor(mine)).square().mean(-1)
        return value if is_even else value.mean(1, keepdim=True)
