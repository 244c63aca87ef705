"""The `[source]` table: which rows of a step are text that the student wrote. Needs no torch."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from raykd.recipe.tables import Amount, Count, Share, Table


class Source(Table):
    """Text that the student writes in training: `share` of the rows of each step.

    Each such row begins as a row of the data and is continued by `length` tokens. The live teacher
    scores it. As `drafts`, the teacher tests the tokens as in speculative decoding.

    `mixed` draws tokens from mixed p + (1 - mixed) q, with p the teacher and q the student. Each
    group of rows serves `passes` steps in a row, beginning `ahead` steps after it was drawn. Its
    age in steps of the optimiser stays within `limit`.

    `keep` writes tested drafts to the run's `drafts/<arm>`. `replay` reads such a `log` and needs
    no teacher; `{seed}` in its path is the seed of each training.
    """

    kind: Literal["on_policy", "drafts", "replay"] = "on_policy"
    """Texts that the student continues, drafts that the teacher tests, or a log of them."""
    share: Share = 0.5
    """The share of a step's rows that the student writes."""
    length: Count = 32
    """Tokens written."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """The temperature of the drawn tokens."""
    mixed: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The teacher's share in the distribution that tokens are drawn from."""
    passes: Count = 1
    """Steps that a text serves."""
    ahead: Amount = 0
    """Steps from the drawing of a text to its first use."""
    limit: Amount = 16
    """Optimiser steps that a text may be old."""
    keep: bool = False
    """Store tested drafts in the run's `drafts/<arm>`."""
    log: str | None = None
    """The log that a replay reads; `{seed}` is the seed of each training."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.kind == "drafts" and self.mixed:
            raise ValueError(
                f"mixed = {self.mixed} has no effect on drafts, which the student writes alone; "
                "set it to 0"
            )
        if self.keep and self.kind != "drafts":
            raise ValueError(
                f'keep = true has nothing to write down: kind = "{self.kind}" tests no drafts'
            )
        if (self.log is None) == (self.kind == "replay"):
            fault = f'is not read by kind = "{self.kind}"'
            if self.log is None:
                fault = "names the log that is read"
            raise ValueError(
                f'log = {self.log!r}: it {fault}; give kind = "replay" and log together'
            )
        if self.log and "://" in self.log:
            raise ValueError(
                f"log = {self.log!r} is not a folder; give one of this machine, or one that all "
                "nodes mount"
            )
        fields = type(self).model_fields
        changed = [
            name
            for name in ("mixed", "passes", "ahead")
            if getattr(self, name) != fields[name].default
        ]
        if self.kind == "replay" and changed:
            raise ValueError(
                f'{", ".join(changed)}: no effect when source.kind = "replay", whose texts are '
                "already written; leave out"
            )
        oldest = self.ahead + self.passes - 1
        if oldest > self.limit:
            raise ValueError(
                f"ahead = {self.ahead} and passes = {self.passes} use text {oldest} steps after "
                f"it was drawn, above limit = {self.limit}; lower them, or raise limit"
            )
        return self

    def log_of(self, seed: int) -> str | None:
        """The log that one training reads."""
        return self.log and self.log.replace("{seed}", str(seed))

    def rows(self, batch: int) -> int:
        """How many rows of a global batch are the student's.

        At least one; all of them only if `share` is 1.
        """
        if self.share == 1:
            return batch
        return min(max(1, round(self.share * batch)), batch - 1)
