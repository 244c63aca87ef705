"""Bytes a token against gradient error, as one SVG."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipelines.bench.gradients import Point

COLOURS = {"comb": "#1b6ca8", "RS-KD": "#d9822b"}
MARKS = {
    "top-50 renormalised": "^",
    "top-50 + tail mass": "v",
    "DistillKit 128/16": "s",
    "DistillKit 50/1": "D",
}


def draw(teachers: Mapping[str, list[Point]], path: Path) -> None:
    """Write one panel a teacher, its name the title: curves of the samplers, marks of the
    truncations.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.hashsalt": "raykd", "svg.fonttype": "none", "font.size": 9})
    figure, axes = pyplot.subplots(
        1, len(teachers), figsize=(9, 3.6), sharey=True, layout="constrained"
    )
    for axis, (title, points) in zip(np.atleast_1d(axes), teachers.items(), strict=True):
        for family, colour in COLOURS.items():
            curve = [p for p in points if p.encoding.family == family]
            size = [p.bytes_per_token.mean() for p in curve]
            axis.plot(
                size,
                [p.error.mean() for p in curve],
                "o-",
                color=colour,
                label=family,
                markersize=4,
            )
        for point in points:
            if point.encoding.family in MARKS:
                mark = MARKS[point.encoding.family]
                size = point.bytes_per_token.mean()
                error = point.error.mean()
                axis.plot(
                    size, error, mark, color="#777777", label=point.encoding.family, markersize=6
                )
        axis.set(xscale="log", yscale="log", title=title, xlabel="bytes a token, as stored")
        axis.grid(alpha=0.3, which="both", linewidth=0.5)
    first = np.atleast_1d(axes)[0]
    first.set_ylabel("relative error of the gradient")
    first.legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)
