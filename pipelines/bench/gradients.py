"""Bytes against gradient error: a student's whole gradient from what an encoding stores, and from
every class.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipelines.bench.encodings import Encoding, Stored
from pipelines.bench.language import Language
from raykd.losses.fused import sparse_kl
from raykd.targets import SparseTargets

TOKENS = 1024
COSINE = 0.999


@dataclass(frozen=True)
class Point:
    """An encoding's place: bytes a token (shards,), and its gradient's cosine and relative error
    (blocks,).
    """

    encoding: Encoding
    bytes_per_token: NDArray[np.float64]
    cosine: NDArray[np.float64]
    error: NDArray[np.float64]


class Judge:
    """A student and blocks of tokens with their exact gradients, KL at T = 1 from softmax(factor
    z).
    """

    def __init__(
        self, student: Language, tokens: Tensor, logits: Tensor, factor: float, blocks: int
    ):
        self.student = student
        self.tokens = tokens
        steps = tokens.shape[1]
        rows = TOKENS // steps
        at = np.linspace(0, len(tokens) - rows, blocks).astype(int)
        self.blocks = [(slice(i, i + rows), slice(i * steps, (i + rows) * steps)) for i in at]
        self.exact = [
            self._gradient(rows, logits[rows].flatten(0, 1).float() * factor)
            for rows, _ in self.blocks
        ]

    def point(self, encoding: Encoding, kept: Stored) -> Point:
        """What is kept of the tokens of the blocks, of as many as there is, against every class."""
        count = len(kept.targets)
        blocks = [b for b in zip(self.blocks, self.exact, strict=True) if b[0][1].stop <= count]
        pairs = [
            (self._gradient(rows, _at(kept, places)), exact) for (rows, places), exact in blocks
        ]
        cosine = np.array([float(F.cosine_similarity(g, e, dim=0)) for g, e in pairs])
        error = np.array([float((g - e).norm() / e.norm()) for g, e in pairs])
        return Point(encoding, kept.bytes_per_token, cosine, error)

    def _gradient(self, rows: slice, targets: SparseTargets | Tensor) -> Tensor:
        """(parameters,) in fp64: of the mean forward KL over the rows' steps."""
        self.student.zero_grad()
        hidden = self.student.hidden(self.tokens[rows]).flatten(0, 1)
        if isinstance(targets, SparseTargets):
            loss = sparse_kl(hidden, self.student.head, None, targets).mean()
        else:
            log_p = targets.float().log_softmax(1)
            log_q = (hidden @ self.student.head.T).log_softmax(1)
            loss = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        loss.backward()
        return torch.cat(
            [p.grad.flatten().double() for p in self.student.parameters() if p.grad is not None]
        )


def _at(kept: Stored, places: slice) -> SparseTargets | Tensor:
    if isinstance(kept.targets, Tensor):
        return kept.targets[places]
    return kept.targets.take(torch.arange(places.start, places.stop))


def smallest(points: list[Point]) -> Point:
    """The point of fewest bytes whose mean cosine over the blocks is COSINE at least."""
    good = [p for p in points if p.cosine.mean() >= COSINE] or [
        max(points, key=lambda p: p.cosine.mean())
    ]
    return min(good, key=lambda p: p.bytes_per_token.mean())


def error_at(size: float, points: list[Point]) -> NDArray[np.float64]:
    """(blocks,): the error that a family of encodings has at `size` bytes, on the lines between its
    points, log-log.
    """
    ordered = sorted(points, key=lambda p: p.bytes_per_token.mean())
    sizes = np.log([p.bytes_per_token.mean() for p in ordered])
    errors = np.log(np.stack([p.error for p in ordered], 1))
    return np.exp([np.interp(np.log(size), sizes, row) for row in errors])
