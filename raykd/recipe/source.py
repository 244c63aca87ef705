"""The `[source]` table: whether rows are the data's alone, or the student's own text among them.

Needs no torch.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from raykd.recipe.tables import Positive, Share, Table


class Source(Table):
    """Text that the student writes in training, scored by the live teacher: `share` of a step's
    rows, the data's begun and continued by `length` tokens; as `drafts`, these are tested by the
    teacher as speculative decoding would.

    `mixed` draws tokens from mixed p + (1 - mixed) q. Each group of rows serves `passes` steps in a
    row, from `ahead` steps after it was drawn; its age in steps of the optimiser then stays within
    `limit`. `keep` writes tested drafts down, in the run's `drafts/<arm>`; `replay` reads such a
    `log`, `{seed}` in whose path is that of each training, and needs no teacher.
    """

    kind: Literal["on_policy", "drafts", "replay"] = "on_policy"
    share: Share = 0.5
    length: Positive = 32
    temperature: Annotated[float, Field(gt=0)] = 1.0
    mixed: Annotated[float, Field(ge=0, lt=1)] = 0.0
    passes: Positive = 1
    ahead: Annotated[int, Field(ge=0)] = 0
    limit: Annotated[int, Field(ge=0)] = 16
    keep: bool = False
    log: str | None = None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.kind == "drafts" and self.mixed:
            raise ValueError(
                f"mixed = {self.mixed} has no effect on drafts, which the student writes alone; set it to 0"
            )
        if self.keep and self.kind != "drafts":
            raise ValueError(
                f'keep = true has nothing to write down: kind = "{self.kind}" tests no drafts'
            )
        if (self.log is None) == (self.kind == "replay"):
            wanted = (
                "names the log that is read"
                if self.log is None
                else f'is not read by kind = "{self.kind}"'
            )
            raise ValueError(
                f'log = {self.log!r}: it {wanted}; give kind = "replay" and log together'
            )
        if self.log and "://" in self.log:
            raise ValueError(
                f"log = {self.log!r} is no folder; give one of this machine, or one that all nodes mount"
            )
        unread = [
            name
            for name in ("mixed", "passes", "ahead")
            if getattr(self, name) != self.__class__.model_fields[name].default
        ]
        if self.kind == "replay" and unread:
            raise ValueError(
                f"{', '.join(unread)}: without effect on a log, whose texts are written; leave them out"
            )
        oldest = self.ahead + self.passes - 1
        if oldest > self.limit:
            raise ValueError(
                f"ahead = {self.ahead} and passes = {self.passes} use text {oldest} steps after it was drawn, above "
                f"limit = {self.limit}; lower them, or raise limit"
            )
        return self

    def log_of(self, seed: int) -> str | None:
        """The log that one training reads."""
        return self.log and self.log.replace("{seed}", str(seed))

    def rows(self, batch: int) -> int:
        """How many rows of a global batch are the student's: at least one; all of them only for a
        share of 1.
        """
        return batch if self.share == 1 else min(max(1, round(self.share * batch)), batch - 1)
