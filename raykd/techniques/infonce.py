"""Contrastive distillation: a row's summary is nearest to the teacher's of the same row (InfoNCE).

L = w_ce CE + w_kd T^2 KL + w_infonce I, with I = (CE over rows + CE over columns) / 2 of
s_ij = <g_S(f_S^i), g_T(f_T^j)> / t. g are maps to unit vectors, and f is the mean over steps of a
layer. The other rows of the global batch are the negatives (van den Oord et al. 2018, arXiv
1807.03748, eq. 4; both directions as in Radford et al. 2021; for distillation Tian et al. 2020,
arXiv 1910.10699). ln N - I is a lower bound on the mutual information of the two. g_S and g_T are
never exported.

Tian et al. keep a memory of stale embeddings, for more negatives than a batch has. Here the store
is that memory and is never stale: with `negatives` > 0 the student's rows are also compared with so
many teacher embeddings drawn from it.
"""

import math
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from raykd.losses import Pairs, TermValues, gather_rows, term
from raykd.signals import Batch, Signals
from raykd.targets import UNLABELLED

RECIPE = {
    "terms": {
        "ce": {"weight": 0.2},
        "kd": {"weight": 0.8, "temperature": 2.0},
        "infonce": {"weight": 0.2, "pairs": [["norm", "norm"]]},
    }
}


@term(layers="embedding", whole_batch=True)
class infonce(nn.Module):
    """(CE over rows + CE over columns) / 2 of each row, mean over pairs of layers.

    pairs        pairs of a submodule of the student and one of the teacher
    temperature  what similarities are divided by
    width        the width of the space that both layers are mapped to
    alike        the rows that are no negatives of each other: the same row only, those of one known
                 label, or those to which the teacher gives one answer
    negatives    how many further negatives are drawn from the whole split
    hard         how many times a negative counts whose saliency is below the batch's mean
    """

    def __init__(
        self,
        student: Signals,
        batch: Batch,
        *,
        pairs: Pairs,
        temperature: Annotated[float, Field(gt=0)] = 0.1,
        width: Annotated[int, Field(ge=1)] = 64,
        alike: Literal["row", "label", "answer"] = "answer",
        negatives: Annotated[int, Field(ge=0)] = 0,
        hard: Annotated[float, Field(ge=1)] = 1.0,
    ):
        super().__init__()
        assert batch.teacher is not None
        self.pairs = [(f"embedding.{mine}", f"embedding.{theirs}") for mine, theirs in pairs]
        self.temperature = temperature
        self.alike = alike
        self.negatives = negatives
        self.hard = hard
        sizes = [
            (student.layers[s].shape[-1], batch.teacher.layers[t].shape[-1]) for s, t in self.pairs
        ]
        self.mine = nn.ModuleList(nn.Linear(size, width) for size, _ in sizes)
        self.theirs = nn.ModuleList(nn.Linear(size, width) for _, size in sizes)

    def forward(self, student: Signals, batch: Batch) -> TermValues:
        assert batch.teacher is not None
        bias, own_column = self._bias(batch)
        drawn, drawn_bias = self._drawn(batch)
        values = []
        for g_s, g_t, (s, t) in zip(self.mine, self.theirs, self.pairs, strict=True):
            x = _unit(g_s, student.layers[s])
            y = _unit(g_t, batch.teacher.layers[t])
            rows = x @ gather_rows(y)[0].T / self.temperature + bias
            columns = y @ gather_rows(x)[0].T / self.temperature + bias
            if len(drawn):
                assert batch.split is not None
                more = _unit(g_t, batch.split.teacher[t][drawn])
                rows = torch.cat([rows, x @ more.T / self.temperature + drawn_bias], 1)
            values.append(F.cross_entropy(rows, own_column, reduction="none"))
            values.append(F.cross_entropy(columns, own_column, reduction="none"))
        return TermValues(torch.stack(values).mean(0), batch.mask.any(1))

    @torch.no_grad()
    def _bias(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What is added to the similarities (B, N) of the global batch, and each row's own column.

        The column (B,) is the row's place in the global batch, which is its one positive.
        """
        row_id, first = gather_rows(batch.row_id)
        own_column = first + torch.arange(len(batch.row_id), device=row_id.device)
        valid, _ = gather_rows(batch.mask.any(1).to(torch.int64))
        group, _ = gather_rows(self._group(batch.label, batch.answer))
        hidden = (valid == 0) | _alike(batch.row_id, row_id) | _alike(group[own_column], group)
        bias = torch.zeros(hidden.shape, device=row_id.device)
        if self.hard > 1 and batch.saliency is not None:
            saliency, _ = gather_rows(batch.saliency)
            bias += math.log(self.hard) * (saliency < saliency.nanmean())
        bias.masked_fill_(hidden, -torch.inf)
        row = torch.arange(len(own_column), device=own_column.device)
        bias.index_put_((row, own_column), bias.new_zeros(()))
        return bias, own_column

    @torch.no_grad()
    def _drawn(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The places (K,) in the split of further negatives, and what is added to them, (B, K).

        They are drawn by the ids of the global batch, so that every worker draws the same.
        """
        if not self.negatives or batch.split is None:
            return batch.row_id[:0], torch.empty(0)
        key = int(gather_rows(batch.row_id)[0].sum())
        rows = np.random.default_rng(key).integers(len(batch.split.row_id), size=self.negatives)
        drawn = torch.from_numpy(rows).to(batch.row_id.device)
        answer = batch.split.answer
        drawn_answer = None if answer is None else answer[drawn]
        drawn_group = self._group(batch.split.label[drawn], drawn_answer)
        group = self._group(batch.label, batch.answer)
        same_row = _alike(batch.row_id, batch.split.row_id[drawn])
        hidden = same_row | _alike(group, drawn_group)
        bias = torch.zeros(hidden.shape, device=drawn.device)
        return drawn, bias.masked_fill_(hidden, -torch.inf)

    def _group(self, label: Tensor, answer: Tensor | None) -> Tensor:
        """(B,): rows of one number are no negatives of each other, unless it is UNLABELLED."""
        if self.alike == "answer" and answer is not None:
            return answer
        return label if self.alike == "label" else torch.full_like(label, UNLABELLED)


def _unit(project: nn.Module, values: Tensor) -> Tensor:
    """(B, width) unit vectors of pooled layers (B, 1, D)."""
    return F.normalize(project(values.float()[:, 0]), dim=1)


def _alike(mine: Tensor, theirs: Tensor) -> Tensor:
    """(B, N): where two numbers are one and known."""
    return (mine[:, None] == theirs) & (mine[:, None] != UNLABELLED)
