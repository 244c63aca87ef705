"""compare.html: runs side by side in one file that needs no network."""

from collections.abc import Mapping, Sequence
from typing import Any

from raykd.reports import bootstrap
from raykd.reports.charts import COLOURS, LONGEST_NAME, bars
from raykd.reports.compare import comparison_text
from raykd.reports.page import fill
from raykd.reports.svg import INK, svg

HEIGHTS = (0.75, 0.42)  # inches: of the axis, of each run


def render(made: Mapping[str, Any]) -> str:
    """The page of a comparison as text."""
    from markupsafe import Markup

    return fill(
        "compare.html.j2",
        made=made,
        headline=comparison_text.headline(made),
        models=comparison_text.models_by_run(made),
        figures=comparison_text.figures_by_run(made),
        sizes=comparison_text.sizes_by_run(made),
        bought=comparison_text.differences_by_run(made),
        charts=[(caption, Markup(drawing)) for caption, drawing in charts(made).items()],
        resamples=bootstrap.RESAMPLES,
    )


def charts(made: Mapping[str, Any]) -> dict[str, str]:
    """SVG by caption: the differences, the gap closed where any run has one, and what is kept at
    which size.
    """
    first, *others = made["runs"]
    differences = {first["name"]: {"value": 0, "lo": 0, "hi": 0}} | {
        run["name"]: run["accuracy"] for run in others
    }
    closed = {
        run["name"]: run["gap_closed"]
        for run in made["runs"]
        if run["gap_closed"]["value"] is not None
    }
    told = {
        "Accuracy less the first run's, in points": (
            "difference",
            differences,
            COLOURS["artefact"],
        ),
        "Share of its gap that each student closes, in %": ("gap", closed, COLOURS["student"]),
    }
    found = {
        caption: _chart(name, caption, parts, colour)
        for caption, (name, parts, colour) in told.items()
        if parts
    }
    sized = [
        run
        for run in made["runs"]
        if run["compression"] and run["retention"]["all"]["value"] is not None
    ]
    return found | (
        {"What is kept, and how much smaller the file is": _frontier(sized)} if sized else {}
    )


def _frontier(found: Sequence[Mapping[str, Any]]) -> str:
    """Retention against compression, a point a run; those that no other run beats in both are
    joined.
    """
    points = [(run["compression"], 100 * run["retention"]["all"]["value"]) for run in found]
    best = [p for p in points if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)]

    def draw(axes: Any) -> None:
        axes.plot(
            *zip(*sorted(best), strict=True), color=COLOURS["student"], linewidth=1.2, alpha=0.5
        )
        for number, (run, (size, kept)) in enumerate(zip(found, points, strict=True)):
            part = run["retention"]["all"]
            axes.plot(
                [size, size],
                [100 * part["lo"], 100 * part["hi"]],
                color=COLOURS["student"],
                alpha=0.35,
            )
            axes.plot(size, kept, "o", color=COLOURS["student"], markersize=7)
            text = comparison_text.brief(run["name"], LONGEST_NAME)
            below = number % 2
            axes.annotate(
                text,
                (size, kept),
                (5, -9 if below else 5),
                textcoords="offset points",
                fontsize=7.5,
            )
        axes.set_xscale("log")
        axes.set_xlabel("times smaller than the teacher's file")
        axes.set_ylabel("kept of its accuracy, %")

    return svg("frontier", "Retention against compression, with 95 % intervals", 3.2, draw)


def _chart(name: str, caption: str, parts: Mapping[str, Mapping[str, Any]], colour: str) -> str:
    def draw(axes: Any) -> None:
        bars(
            axes,
            [comparison_text.brief(run, LONGEST_NAME) for run in parts],
            list(parts.values()),
            [colour] * len(parts),
        )
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, 0), max(high, 0))
        axes.axvline(0, color=INK, linewidth=1.2, linestyle="--")

    return svg(name, f"{caption}, with 95 % intervals", HEIGHTS[0] + HEIGHTS[1] * len(parts), draw)
