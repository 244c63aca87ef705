"""What a student keeps of full distillation's gain when it learns from what an encoding stores."""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipelines.bench.encodings import Encoding, Stored, stored
from pipelines.bench.language import Language, fit
from raykd.losses.fused import dense_kl, sparse_kl
from raykd.targets import SparseTargets

# rows a step: 512 tokens
ROWS = 4
RATE = 1e-3


class School:
    """A warm student, rows to distil on with their teacher's logits, and held-out rows to be judged
    by.
    """

    def __init__(
        self,
        warm: Language,
        tokens: Tensor,
        logits: Tensor,
        held: tuple[Tensor, Tensor],
        steps: int,
    ):
        self.warm = warm
        self.tokens = tokens
        self.logits = logits
        self.held = held
        self.steps = steps
        self.start = self.divergence(warm)

    def taught(self, encoding: Encoding | None, seed: int) -> float:
        """The held-out KL of a student that learns from an encoding, None: from every class, in the
        seed's order.
        """
        kept = None if encoding is None else stored(encoding, self.logits, key=seed)
        student = copy.deepcopy(self.warm)
        draws = torch.Generator().manual_seed(seed)
        passes = -(-self.steps * ROWS // len(self.tokens))
        order = torch.cat(
            [torch.randperm(len(self.tokens), generator=draws) for _ in range(passes)]
        )

        def loss(step: int) -> Tensor:
            rows = order[step * ROWS : (step + 1) * ROWS]
            hidden = student.hidden(self.tokens[rows]).flatten(0, 1)
            if kept is None:
                return dense_kl(hidden, student.head, None, self.logits[rows].flatten(0, 1)).mean()
            return sparse_kl(hidden, student.head, None, self._targets(kept, rows)).mean()

        fit(student, loss, steps=self.steps, rate=RATE)
        return self.divergence(student)

    def shares(self, encoding: Encoding, full: NDArray[np.float64]) -> NDArray[np.float64]:
        """(seeds,): the share of full distillation's gain in held-out KL, `full` (seeds,) being its
        KL.
        """
        reached = np.array([self.taught(encoding, seed) for seed in range(len(full))])
        return (self.start - reached) / (self.start - full)

    @torch.inference_mode()
    def divergence(self, student: Language) -> float:
        """KL(teacher || student), the mean over the held-out tokens."""
        total = 0.0
        (tokens, logits) = self.held
        for x, z in zip(tokens.split(8), logits.split(8), strict=True):
            log_q = student(x).log_softmax(2)
            log_p = z.float().log_softmax(2)
            total += float(F.kl_div(log_q, log_p, log_target=True, reduction="sum"))
        return total / tokens.numel()

    def _targets(self, kept: Stored, rows: Tensor) -> SparseTargets:
        assert isinstance(kept.targets, SparseTargets)
        steps = self.tokens.shape[1]
        return kept.targets.take((rows[:, None] * steps + torch.arange(steps)).flatten())
