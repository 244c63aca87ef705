"""What a model's answers come to: sums over places, from which its metrics are told.

The sums of any pieces of a split, made by any process, come to those of all its places: counts are
whole numbers, and losses are added in the order of the pieces.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raykd.training.arm import World

Ints = NDArray[np.integer]


class Tally:
    """Sums over the places of a split that is told in so many pieces.

    `classes` are those of series, which are counted one by one. Of text it is None.
    """

    def __init__(self, pieces: int = 1, classes: int | None = None, *, has_kl: bool = False):
        self.has_kl = has_kl
        self.counts = np.zeros(3)  # places, those with a label, and right answers to these
        self.by_class = None if classes is None else np.zeros((3, classes))
        self.losses = np.zeros((2, pieces))  # of each piece: log q of the labels, and the KL

    def add(
        self,
        piece: int,
        label: Ints,
        answer: Ints,
        log_q: NDArray[np.float32],
        kl: NDArray[np.float32] | None,
    ) -> None:
        """Count some places of a piece."""
        known = label >= 0
        true = label[known]
        right = answer[known] == true
        self.counts += (len(label), len(true), right.sum())
        self.losses[0, piece] += log_q[known].sum(dtype=np.float64)
        if kl is not None:
            self.losses[1, piece] += kl.sum(dtype=np.float64)
        if self.by_class is not None:
            classes = self.by_class.shape[1]
            for row, of in zip(self.by_class, (true, answer[known], true[right]), strict=True):
                row += np.bincount(of, minlength=classes)[:classes]

    def of_all(self, world: World, device: torch.device) -> "Tally":
        """The sums of all ranks, of which each has counted other pieces."""
        if world.size == 1:
            return self
        parts = [self.counts, self.losses]
        if self.by_class is not None:
            parts.append(self.by_class)
        flat = torch.from_numpy(np.concatenate([part.ravel() for part in parts])).to(device)
        total = world.sum(flat).cpu().numpy()
        found = Tally(self.losses.shape[1], has_kl=self.has_kl)
        pieces = np.split(total, np.cumsum([part.size for part in parts])[:-1])
        found.counts, found.losses, *rest = (
            piece.reshape(part.shape) for piece, part in zip(pieces, parts, strict=True)
        )
        found.by_class = rest[0] if rest else None
        return found

    def metrics(self) -> dict[str, float]:
        """Accuracy and mean negative log-likelihood over the labelled places, macro-F1 of series,
        and the mean KL over all places where it is known.
        """
        places, labelled, right = self.counts.tolist()
        log_q, kl = map(sum, self.losses.tolist())
        measured: dict[str, Any] = {
            "accuracy": _over(right, labelled),
            "nll": -_over(log_q, labelled),
        }
        if self.by_class is not None:
            measured["macro_f1"] = macro_f1(*self.by_class)
        if self.has_kl:
            measured["kl"] = _over(kl, places)
        return measured


def macro_f1(
    rows: NDArray[np.floating], answers: NDArray[np.floating], hits: NDArray[np.floating]
) -> float:
    """The mean over the classes that have rows of F1 = 2 hits / (rows + answers); each (C,).

    NaN where no class has rows.
    """
    present = rows > 0
    if not present.any():
        return float("nan")
    return float(np.mean(2 * hits[present] / (rows[present] + answers[present])))


def _over(total: float, count: float) -> float:
    return total / count if count else float("nan")
