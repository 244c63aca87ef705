"""A log of verified drafts, read again as batches to train on.

`raykd/generation/draft_log.py` writes it.
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
from raykd.store.logits import Targets
from raykd.store.reader import Store
from raykd.targets import UNLABELLED


class Replay:
    """The drafts of a log, as batches.

    StoreError for a store of another kind, or one with impossible numbers. DataError for a log of
    another tokeniser, or of texts that are longer than the student was built for.
    """

    def __init__(self, where: Address, classes: Sequence[str], steps: int, device: torch.device):
        self.where = where
        self.device = device
        store = Store(where)
        try:
            identity = store.manifest["identity"]
            self.temperature = float(identity["drafts"]["temperature"])
            size = int(identity["vocabulary"]["size"])
            sha256 = str(identity["vocabulary"]["sha256"])
            self.logits = store.logits(SPLIT)
            text = store.column("text", SPLIT)
            log_q = store.column("log_q", SPLIT)
            self.row = _column(store, "row")
            self.accepted = _column(store, "accepted")
            self.correction = _column(store, "correction")
            self.steps = _column(store, "steps")
            self.text_steps = _column(store, "text_steps")
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"source.log: {where} is no log of drafts ({error!r}); "
                "a training with source.keep = true writes one"
            ) from None
        self.vocab = check_digest(sha256, size, classes)
        self.text = torch.from_numpy(text.values.copy())
        self.log_q = torch.from_numpy(log_q.values.copy())
        self.start = self.text_steps.cumsum(0) - self.text_steps  # of each text in `text`
        self.drawn = self.steps.cumsum(0) - self.steps  # of each draft in `log_q`
        self._check()
        longest = int(self.text_steps.max()) - 1
        if longest > steps:
            raise DataError(
                f"source.log: texts of {longest} tokens, but the student was built for {steps}"
            )

    def __len__(self) -> int:
        return len(self.row)

    def batch(self, index: NDArray[np.int64]) -> Batch:
        """The drafts at `index` (B,), padded to the longest text.

        They are those of the training that kept them, up to rounding and to padding that nobody
        reads.
        """
        i = torch.from_numpy(index)
        length = self.text_steps[i][:, None]
        steps = self.steps[i][:, None]
        accepted = self.accepted[i][:, None]
        at = torch.arange(int(length.max()))
        source = (self.start[i][:, None] + at).clamp(max=len(self.text) - 1)
        text = torch.where(at < length, self.text[source], 0)
        at = at[:-1]
        nth = at - (length - 1 - steps)  # which of the drafted tokens a position is about
        mask = (nth >= 0) & (nth < steps)
        rejected = mask & (nth == accepted)
        inputs = torch.stack([text[:, :-1], torch.where(at < length - 1, at, 0)], -1)
        stored_log_q = self.log_q[(self.drawn[i][:, None] + nth)[mask]].float()
        log_q = torch.zeros(mask.shape).masked_scatter(mask, stored_log_q).to(self.device)
        correction = torch.where(rejected, self.correction[i][:, None], 0)
        tail = torch.where(mask & (nth > accepted), nth - accepted, 0)
        rollout = Rollout(
            log_q=log_q,
            weight=torch.ones_like(log_q),
            lag=0,
            temperature=self.temperature,
            accepted=(mask & (nth < accepted)).to(self.device),
            rejected=rejected.to(self.device),
            correction=correction.to(self.device),
            tail=tail.to(self.device),
        )
        logits, targets = self._answers(index, mask)
        on_device = mask.to(self.device)
        return Batch(
            row_id=self.row[i].to(self.device),
            inputs=inputs.to(self.device),
            mask=on_device,
            label=torch.where(mask, text[:, 1:], UNLABELLED).to(self.device),
            teacher=Signals(logits, on_device),
            targets=targets,
            rollout=rollout,
        )

    def _answers(self, index: NDArray[np.int64], mask: Tensor) -> tuple[Tensor, Targets | None]:
        """The teacher's logits (B, T, V) at the drafts in `mask`, or V = 0 and sparse targets."""
        stored = self.logits.take(index)
        if stored.is_sparse:
            return torch.zeros(*mask.shape, 0).to(self.device), stored.targets(self.device)
        answers = stored.decode()
        assert isinstance(answers, Tensor)
        logits = torch.zeros(*mask.shape, answers.shape[1])
        return logits.index_put_((mask,), answers.float()).to(self.device), None

    def check(self, terms: Mapping[str, TermSpec], temperature: float) -> None:
        """RecipeError for a term that needs what the log does not hold, or another temperature."""
        if temperature != self.temperature:
            raise RecipeError(
                f"source.temperature = {temperature}, but {self.where} was drafted at "
                f"{self.temperature}; write that"
            )
        draft = self.batch(np.zeros(1, np.int64))
        student = Signals(
            torch.zeros(*draft.mask.shape, self.vocab, device=self.device), draft.mask
        )
        for name, spec in terms.items():
            if spec.weight > 0 and TERMS[name].own:
                TERMS[name].make(student, draft, **spec.settings)

    def _check(self) -> None:
        vocab = self.vocab
        codec = self.logits.codec
        sound = {
            "a temperature that is none": torch.tensor(0 < self.temperature < math.inf),
            "a codec that keeps no answers": torch.tensor(codec.name in CODECS),
            "answers of another vocabulary": torch.tensor(getattr(codec, "vocab", vocab) == vocab),
            "no drafts": torch.tensor(len(self.row) > 0),
            "texts that no draft ends": (self.steps >= 1) & (self.steps < self.text_steps),
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
