"""How close an artefact's answers must be to those of the student it was made of."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raykd.errors import GateError
from raykd.recipe.quant import Quant


class Bar(NamedTuple):
    """What an artefact must reach: limits of differences, which are over the largest logit.

    99 rows in 100 have a limit of their own: where activations are rounded, a sum in another order
    now and then flips a rounding at a tie, by a whole level.
    """

    relative: float  # the largest difference of 99 rows in 100
    largest: float  # the largest difference of any row
    agreement: float  # the least share of equal decisions


EXACT = Bar(1e-5, 1e-5, 1.0)  # float activations, the same integers
INTEGER = Bar(2e-3, 2e-2, 0.99)  # activations rounded alike
# Activations rounded block by block, as on x86; other kernels may round otherwise.
BLOCKS = Bar(2e-2, 5e-2, 0.98)


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


def gate(relative: NDArray[np.floating], agreement: float, bar: Bar, where: str) -> None:
    """GateError if an artefact misses its bar.

    `relative` (N,) are the differences of its answers over the largest logit.
    """
    most = float(np.quantile(relative, 0.99))
    largest = float(relative.max())
    if not (most <= bar.relative and largest <= bar.largest and agreement >= bar.agreement):
        measured = (
            f"by {largest:.3g} of the largest, 99 % by {most:.3g}, {agreement:.2%} decided alike"
        )
        limits = (
            f"at most {bar.largest:g}, {bar.relative:g} and at least {bar.agreement:.0%} are asked"
        )
        raise refusal(f"{measured}; {limits}", where)


def refusal(how: str, where: str) -> GateError:
    """The error of an artefact that answers otherwise: how far off, and on which rows."""
    return GateError(
        f"export: the artefact's logits differ from the trained student's {how}, on {where}; "
        "no artefact was written"
    )
