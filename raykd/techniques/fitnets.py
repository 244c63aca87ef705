"""FitNets: the student's inner layers follow the teacher's through a learned map (Romero et al.
2015, arXiv 1412.6550).

L = w_ce CE + w_kd T^2 KL + w_hint |LN(h_T) - r(h_S)|^2, jointly here; the paper's two stages, hints
first and the rest of the student after them, are `terms.hint.until = 0.3` with `since = 0.3` for
the other terms. r is linear, trained with the student and never exported. Pair a middle layer: a
late one leaves the student no freedom.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from raykd.losses.terms import Pairs, TermValues, mean_over_pairs, term
from raykd.signals import Batch, Signals, same_length

RECIPE = {
    "terms": {
        "ce": {"weight": 0.2},
        "kd": {"weight": 0.8, "temperature": 2.0},
        "hint": {"weight": 1.0, "pairs": [["blocks.0", "blocks.1"]]},
    }
}


@term(layers="hidden")
class hint(nn.Module):
    """Mean over channels of (t(h_T) - r(h_S))^2 at every valid step, mean over pairs of layers.

    t is LayerNorm without parameters, or nothing with normalise = false. Where the layers have
    unequal numbers of steps, the longer is averaged down to the shorter.
    """

    def __init__(self, student: Signals, batch: Batch, *, pairs: Pairs, normalise: bool = True):
        super().__init__()
        assert batch.teacher is not None
        self.pairs = [(f"hidden.{mine}", f"hidden.{theirs}") for mine, theirs in pairs]
        self.normalise = normalise
        widths = [
            (student.layers[s].shape[-1], batch.teacher.layers[t].shape[-1]) for s, t in self.pairs
        ]
        self.maps = nn.ModuleList(nn.Linear(mine, theirs) for mine, theirs in widths)

    def forward(self, student: Signals, batch: Batch) -> TermValues:
        assert batch.teacher is not None
        layers = zip(self.maps, self.pairs, strict=True)
        values = [
            self._pair(r, student.layers[s], batch.teacher.layers[t], batch.mask)
            for r, (s, t) in layers
        ]
        return mean_over_pairs(values, batch.mask)

    def _pair(self, regressor: nn.Module, mine: Tensor, theirs: Tensor, mask: Tensor) -> Tensor:
        """(B, T): the squared difference, mean over channels; (B, 1), mean over steps too, of
        unequal lengths.
        """
        is_even = mine.shape[1] == theirs.shape[1]
        mine, theirs = same_length(mine.float(), theirs.float(), mask)
        if self.normalise:
            theirs = F.layer_norm(theirs, theirs.shape[-1:])
        value = (theirs - regressor(mine)).square().mean(-1)
        return value if is_even else value.mean(1, keepdim=True)
