"""A log of verified drafts, read again as batches to train on (written by
`raykd/generation/draft_log.py`).
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raykd.data.vocabulary import check_digest
from raykd.errors import DataError, RecipeError, StoreError
from raykd.files.address import Address
from raykd.generation.draft_log import CODECS, NONE, SPLIT
from raykd.losses.terms import TERMS
from raykd.recipe.tables import TermSpec
from raykd.signals import Batch, Rollout, Signals
from raykd.store.reader import Store
from raykd.targets import UNLABELLED


class Replay:
    """The drafts of a log, as batches.

    StoreError for a store of another kind, or one whose numbers can not be; DataError for another
    tokeniser's, or texts longer than the student was built for.
    """

    def __init__(self, where: Address, classes: Sequence[str], steps: int, device: torch.device):
        self.where, self.device, store = where, device, Store(where)
        try:
            told = store.manifest["identity"]["drafts"]
            vocabulary, self.temperature = (
                store.manifest["identity"]["vocabulary"],
                float(told["temperature"]),
            )
            size, sha256 = int(vocabulary["size"]), str(vocabulary["sha256"])
            self.logits = store.logits(SPLIT)
            text, log_q = store.column("text", SPLIT), store.column("log_q", SPLIT)
            names = ("row", "accepted", "correction", "steps", "text_steps")
            self.row, self.accepted, self.correction, self.steps, self.read = (
                _column(store, name) for name in names
            )
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"source.log: {where} is no log of drafts ({error!r}); a training with source.keep = true writes one"
            ) from None
        self.vocab = check_digest(sha256, size, classes)
        self.text, self.log_q = (torch.from_numpy(column.values.copy()) for column in (text, log_q))
        self.start, self.drawn = (steps.cumsum(0) - steps for steps in (self.read, self.steps))
        self._check()
        if (longest := int(self.read.max()) - 1) > steps:
            raise DataError(
                f"source.log: texts of {longest} tokens, but the student was built for {steps}"
            )

    def __len__(self) -> int:
        return len(self.row)

    def batch(self, index: NDArray[np.int64]) -> Batch:
        """The drafts at `index` (B,): those of the training that kept them, up to rounding and
        places nobody reads.
        """
        i = torch.from_numpy(index)
        read, steps, accepted = (
            values[i][:, None] for values in (self.read, self.steps, self.accepted)
        )
        at = torch.arange(int(read.max()))
        text = torch.where(
            at < read, self.text[(self.start[i][:, None] + at).clamp(max=len(self.text) - 1)], 0
        )
        at = at[:-1]
        nth = at - (read - 1 - steps)  # which of the drafted tokens a position is about
        mask = (nth >= 0) & (nth < steps)
        flat = (self.drawn[i][:, None] + nth)[mask]
        rejected = mask & (nth == accepted)
        stored = self.logits.take(index)
        logits = torch.zeros(*mask.shape, 0)
        if not stored.is_sparse:
            answers = stored.at()
            assert isinstance(answers, Tensor)
            logits = torch.zeros(*mask.shape, answers.shape[1]).index_put_((mask,), answers.float())
        inputs = torch.stack([text[:, :-1], torch.where(at < read - 1, at, 0)], -1)
        log_q = torch.zeros(mask.shape).masked_scatter(mask, self.log_q[flat].float())
        correction = torch.where(rejected, self.correction[i][:, None], 0)
        tail = torch.where(mask & (nth > accepted), nth - accepted, 0)
        label = torch.where(mask, text[:, 1:], UNLABELLED)
        found = (
            self.row[i],
            inputs,
            mask,
            label,
            logits,
            log_q,
            mask & (nth < accepted),
            rejected,
            correction,
            tail,
        )
        row, inputs, mask, label, logits, log_q, stayed, rejected, correction, tail = (
            x.to(self.device) for x in found
        )
        rollout = Rollout(
            log_q,
            torch.ones_like(log_q),
            0,
            self.temperature,
            stayed,
            rejected,
            correction=correction,
            tail=tail,
        )
        targets = stored.targets(self.device) if stored.is_sparse else None
        return Batch(
            row,
            inputs,
            mask,
            label,
            teacher=Signals(logits, mask),
            targets=targets,
            rollout=rollout,
        )

    def check(self, terms: Mapping[str, TermSpec], temperature: float) -> None:
        """RecipeError where a term can not be told from this log, or its drafts were drawn at
        another temperature.
        """
        if temperature != self.temperature:
            raise RecipeError(
                f"source.temperature = {temperature}, but {self.where} was drafted at {self.temperature}; write that"
            )
        draft = self.batch(np.zeros(1, np.int64))
        student = Signals(
            torch.zeros(*draft.mask.shape, self.vocab, device=self.device), draft.mask
        )
        for name, spec in terms.items():
            if spec.weight > 0 and TERMS[name].own:
                TERMS[name].make(student, draft, **spec.settings)

    def _check(self) -> None:
        vocab, codec = self.vocab, self.logits.codec
        sound = {
            "a temperature that is none": torch.tensor(0 < self.temperature < math.inf),
            "a codec that keeps no answers": torch.tensor(codec.name in CODECS),
            "answers of another vocabulary": torch.tensor(getattr(codec, "vocab", vocab) == vocab),
            "no drafts": torch.tensor(len(self.row) > 0),
            "texts that no draft ends": (self.steps >= 1) & (self.steps < self.read),
            "accepted tokens that were not drafted": (self.accepted >= 0)
            & (self.accepted <= self.steps),
            "corrections that do not fit": (self.correction >= NONE) & (self.correction < vocab),
            "rejections without a correction": (self.correction == NONE)
            == (self.accepted == self.steps),
            "tokens beyond the vocabulary": (self.text >= 0) & (self.text < vocab),
            "probabilities above 1": self.log_q <= 0,
        }
        if wrong := [name for name, right in sound.items() if not right.all()]:
            raise StoreError(f"source.log: {self.where} has {', '.join(wrong)}")


def _column(store: Store, name: str) -> Tensor:
    column = store.column(name, SPLIT).values
    if not np.issubdtype(column.dtype, np.integer):
        raise TypeError(f"{name} holds {column.dtype}")
    return torch.from_numpy(column.astype(np.int64))
