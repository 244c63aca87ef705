"""How alike an artefact and the student it was made of must answer, and what is said where they do
not.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raykd.errors import GateError
from raykd.recipe.quant import Quant


class Bar(NamedTuple):
    """What an artefact must reach beside its student: differences over the largest logit, share of
    equal decisions.

    `relative` is of 99 rows in 100, `largest` of all: where activations are rounded, a sum in
    another order flips a rounding at a tie now and then, by a whole level.
    """

    relative: float
    largest: float
    agreement: float


EXACT = Bar(1e-5, 1e-5, 1.0)  # float activations, the same integers
INTEGER = Bar(2e-3, 2e-2, 0.99)  # activations rounded alike
BLOCKS = Bar(
    2e-2, 5e-2, 0.98
)  # activations rounded block by block as on x86; other kernels may do otherwise


def bar_of(quant: Quant | None) -> Bar:
    """The bar of a student under a Quant; None is full precision."""
    if quant is None or quant.activations == "none":
        return EXACT
    return INTEGER if quant.weights == "int8" else BLOCKS


Parity = dict[str, float]


def compare(
    trained: NDArray[np.floating], answered: NDArray[np.floating], bar: Bar, where: str
) -> Parity:
    """How far the logits (N, C) of a file are from the trained student's on the same rows.

    GateError if they miss the bar; `where` says which rows these are.
    """
    apart = np.abs(trained - answered).max(1)
    relative = apart / float(np.abs(trained).max())
    agreement = float((trained.argmax(1) == answered.argmax(1)).mean())
    gate(relative, agreement, bar, where)
    return {
        "max_abs_diff": float(apart.max()),
        "relative": float(relative.max()),
        "agreement": agreement,
    }


def gate(each: NDArray[np.floating], agreement: float, bar: Bar, where: str) -> None:
    """GateError where an artefact misses its bar:

    `each` (N,) is an answer's difference over the largest logit.
    """
    most, relative = float(np.quantile(each, 0.99)), float(each.max())
    if not (most <= bar.relative and relative <= bar.largest and agreement >= bar.agreement):
        said = (
            f"by {relative:.3g} of the largest, 99 % by {most:.3g}, {agreement:.2%} decided alike"
        )
        asked = (
            f"at most {bar.largest:g}, {bar.relative:g} and at least {bar.agreement:.0%} are asked"
        )
        raise refusal(f"{said}; {asked}", where)


def refusal(how: str, where: str) -> GateError:
    """The error of an artefact that answers otherwise: how far, and on what."""
    return GateError(
        f"export: the artefact's logits differ from the trained student's {how}, on {where}; no artefact was written"
    )
