"""Contrastive distillation: a student's summary of a row is nearest to the teacher's of the same
row, not of others.

L = w_ce CE + w_kd T^2 KL + w_infonce I, I = (CE over rows + CE over columns) / 2 of s_ij =
<g_S(f_S^i), g_T(f_T^j)> / t with unit vectors g, f the mean over steps of a layer, and the other
rows of the global batch as negatives (van den Oord et al. 2018, arXiv 1807.03748, eq. 4; both
directions as in Radford et al. 2021; for distillation Tian et al. 2020, arXiv 1910.10699). ln N - I
bounds what the two know of each other from below. g_S and g_T are never exported.

Tian et al. keep a memory of stale embeddings for more negatives than a batch has. Here the store is
that memory, and never stale: with `negatives` > 0 the students' rows are also held against so many
teacher embeddings drawn from it.
"""

import math
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from raykd.losses.all_rows import gather_rows
from raykd.losses.terms import Pairs, TermValues, term
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
    """(CE over rows + CE over columns) / 2 a row, mean over pairs of layers.

    `alike` names the rows that are no negatives of each other: the same row only, those of one
    known label, or those that the teacher answers alike. `hard` > 1 counts a negative of saliency
    below the batch's mean that many times.
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
        bias, own = self._bias(batch)
        drawn, drawn_bias = self._drawn(batch)
        values = []
        for g_s, g_t, (s, t) in zip(self.mine, self.theirs, self.pairs, strict=True):
            x = _unit(g_s, student.layers[s])
            y = _unit(g_t, batch.teacher.layers[t])
            rows, columns = (
                a @ gather_rows(b)[0].T / self.temperature + bias for a, b in ((x, y), (y, x))
            )
            if len(drawn):
                assert batch.split is not None
                more = _unit(g_t, batch.split.teacher[t][drawn])
                rows = torch.cat([rows, x @ more.T / self.temperature + drawn_bias], 1)
            values += [F.cross_entropy(s, own, reduction="none") for s in (rows, columns)]
        return TermValues(torch.stack(values).mean(0), batch.mask.any(1))

    @torch.no_grad()
    def _bias(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """((B, N) what is added to the similarity of a row of the global batch, (B,) each row's own
        column).
        """
        row_id, first = gather_rows(batch.row_id)
        own = first + torch.arange(len(batch.row_id), device=row_id.device)
        valid, _ = gather_rows(batch.mask.any(1).to(torch.int64))
        group, _ = gather_rows(self._group(batch.label, batch.answer))
        hidden = (valid == 0) | _alike(batch.row_id, row_id) | _alike(group[own], group)
        bias = torch.zeros(hidden.shape, device=row_id.device)
        if self.hard > 1 and batch.saliency is not None:
            saliency, _ = gather_rows(batch.saliency)
            bias += math.log(self.hard) * (saliency < saliency.nanmean())
        bias.masked_fill_(hidden, -torch.inf)
        return bias.index_put_(
            (torch.arange(len(own), device=own.device), own), bias.new_zeros(())
        ), own

    @torch.no_grad()
    def _drawn(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(places (K,) in the split of more negatives, (B, K) what is added to their similarity).

        Drawn by the ids of the global batch, so that every worker draws the same.
        """
        if not self.negatives or batch.split is None:
            return batch.row_id[:0], torch.empty(0)
        key = int(gather_rows(batch.row_id)[0].sum())
        rows = np.random.default_rng(key).integers(len(batch.split.row_id), size=self.negatives)
        drawn = torch.from_numpy(rows).to(batch.row_id.device)
        answer = batch.split.answer
        group = self._group(batch.split.label[drawn], None if answer is None else answer[drawn])
        hidden = _alike(batch.row_id, batch.split.row_id[drawn]) | _alike(
            self._group(batch.label, batch.answer), group
        )
        return drawn, torch.zeros(hidden.shape, device=drawn.device).masked_fill_(
            hidden, -torch.inf
        )

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
