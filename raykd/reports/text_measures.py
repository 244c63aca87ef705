"""Figures of text that are ratios of sums: nats a token, KL a token, drafts accepted, tokens a call
of the teacher.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raykd.generation.acceptance import Acceptance
from raykd.reports import bootstrap
from raykd.reports.bootstrap import Hits, Sample
from raykd.training.predictions import Predictions

LEAST = np.finfo(np.float64).tiny
Arms = Mapping[
    str, Mapping[int, NDArray]
]  # (n,) by arm and seed; the teacher and the artefact have one


@dataclass(frozen=True)
class Measure:
    """The sum of `top` over that of `whole`, of each arm over n tokens or texts; without `whole`
    over their number.
    """

    group: NDArray[np.integer]  # (n,) the document of each
    top: Arms
    whole: Arms | None = None

    def sample(self) -> Sample:
        """The ratio of each arm, resampled as accuracies are: both sums of a resample are over the
        same documents.
        """
        top = bootstrap.resample(_hits(self.group, self.top))
        if self.whole is None:
            return top
        whole = bootstrap.resample(_hits(self.group, self.whole))
        others = (
            _over(getattr(top, arm), getattr(whole, arm))
            for arm in ("control", "teacher", "artefact")
        )
        return Sample(top.n, top.student / np.maximum(whole.student, LEAST), *others)

    def beside(self, other: "Measure") -> "Measure":
        """This student, and the other's in the control's place."""
        top = _beside(self.top, other.top)
        return Measure(
            self.group,
            top,
            _beside(self.whole, other.whole) if self.whole and other.whole else None,
        )


def of_predictions(
    arms: Mapping[str, Mapping[int, Predictions]], group: NDArray[np.integer]
) -> dict[str, Measure]:
    """nll, and kl where all students have it, over the labelled places, whose documents are
    `group`.
    """
    nll = {
        name: {seed: -said.log_q[said.label >= 0] for seed, said in arm.items()}
        for name, arm in arms.items()
    }
    kl = {
        name: {seed: said.kl[said.label >= 0] for seed, said in arm.items() if said.kl is not None}
        for name, arm in arms.items()
    }
    whole = len(kl["student"]) == len(arms["student"])
    return {"nll": Measure(group, nll)} | ({"kl": Measure(group, kl)} if whole else {})


def of_drafts(arms: Mapping[str, Mapping[int, Acceptance]]) -> dict[str, Measure]:
    """What students are told by as drafters, where they have drafted: ratios of the sums that
    acceptance.py names.
    """
    if not arms["student"]:
        return {}
    column = {
        key: {
            name: {seed: getattr(each, key) for seed, each in arm.items()}
            for name, arm in arms.items()
        }
        for key in ("overlap", "tested", "tokens", "calls", "shared", "places")
    }
    group = next(iter(arms["student"].values())).group
    found = {
        "acceptance": Measure(group, column["overlap"], column["tested"]),
        "block_efficiency": Measure(group, column["tokens"], column["calls"]),
    }
    known = all(each.shared is not None for arm in arms.values() for each in arm.values())
    return found | (
        {"overlap": Measure(group, column["shared"], column["places"])} if known else {}
    )


def _hits(group: NDArray[np.integer], arms: Arms) -> Hits:
    stacked = {name: np.stack(list(by_seed.values())) for name, by_seed in arms.items() if by_seed}
    teacher, artefact = (
        stacked[name][0] if name in stacked else None for name in ("teacher", "artefact")
    )
    return Hits(
        groups=group,
        student=stacked["student"],
        student_seeds=list(arms["student"]),
        control=stacked.get("control"),
        control_seeds=list(arms["control"]) if "control" in stacked else [],
        teacher=teacher,
        artefact=artefact,
    )


def _beside(arms: Arms, others: Arms) -> Arms:
    return {"student": arms["student"], "control": others["student"]}


def _over(top: bootstrap.Values | None, whole: bootstrap.Values | None) -> bootstrap.Values | None:
    return None if top is None or whole is None else top / np.maximum(whole, LEAST)
