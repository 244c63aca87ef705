"""compare.html: runs side by side in one file that needs no network."""

from collections.abc import Mapping
from typing import Any

from raykd import stats
from raykd.charts import COLOURS, LONGEST_NAME, bars
from raykd.compare import words
from raykd.page import fill
from raykd.svg import INK, svg

HEIGHTS = (0.75, 0.42)  # inches: of the axis, of each run


def render(made: Mapping[str, Any]) -> str:
    """The page of a comparison as text."""
    from markupsafe import Markup

    return fill(
        "compare.html.j2",
        made=made,
        headline=words.headline(made),
        models=words.models(made),
        figures=words.figures(made),
        bought=words.bought(made),
        charts=[(caption, Markup(drawing)) for caption, drawing in charts(made).items()],
        resamples=stats.RESAMPLES,
    )


def charts(made: Mapping[str, Any]) -> dict[str, str]:
    """SVG by caption: the differences, and the gap closed where any run has one."""
    first, *others = made["runs"]
    differences = {first["name"]: {"value": 0, "lo": 0, "hi": 0}} | {run["name"]: run["accuracy"] for run in others}
    closed = {run["name"]: run["gap_closed"] for run in made["runs"] if run["gap_closed"]["value"] is not None}
    told = {
        "Accuracy less the first run's, in points": ("difference", differences, COLOURS["artefact"]),
        "Share of its gap that each student closes, in %": ("gap", closed, COLOURS["student"]),
    }
    return {caption: _chart(name, caption, parts, colour) for caption, (name, parts, colour) in told.items() if parts}


def _chart(name: str, caption: str, parts: Mapping[str, Mapping[str, Any]], colour: str) -> str:
    def draw(axes: Any) -> None:
        bars(axes, [words.brief(run, LONGEST_NAME) for run in parts], list(parts.values()), [colour] * len(parts))
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, 0), max(high, 0))
        axes.axvline(0, color=INK, linewidth=1.2, linestyle="--")

    return svg(name, f"{caption}, with 95 % intervals", HEIGHTS[0] + HEIGHTS[1] * len(parts), draw)
