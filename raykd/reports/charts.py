"""The report's charts: each a small drawing that says one thing, as inline SVG."""

from collections.abc import Mapping, Sequence
from typing import Any

from raykd.reports.sentences import BESIDE, retentions_told
from raykd.reports.svg import INK, svg

COLOURS = {"teacher": "#7a7f87", "control": "#d9822b", "student": "#2f7ed8", "artefact": "#1a9a76"}
SHARE = "#1f5fb0"
OTHER = "#8a63b8"
MOST_PARAMS = 6
NAMED_CLASSES = 24
LONGEST_NAME = 22


def charts(report: Mapping[str, Any]) -> dict[str, str]:
    """SVG by name, in the order to show them; a chart without data is left out."""
    drawn = {
        "accuracy": _accuracy,
        "retention": _retention,
        "curves": _curves,
        "confusion": _confusion,
        "saliency": _saliency,
    }
    found = {name: draw(report) for name, draw in drawn.items()}
    found |= {f"search-{i}": _search(report, i, key) for i, key in enumerate(searched(report))}
    return {name: drawing for name, drawing in found.items() if drawing}


def _accuracy(report: Mapping[str, Any]) -> str:
    models = {n: report[n]["metrics"] for n in COLOURS} | {
        BESIDE[n]: p["metrics"] for n, p in report["beside"].items()
    }
    found = {n: metrics["accuracy"] for n, metrics in models.items() if "accuracy" in metrics}
    names = list(found)

    def draw(axes: Any) -> None:
        bars(axes, names, list(found.values()), [COLOURS.get(n, OTHER) for n in names])
        axes.set_xlabel("accuracy on test rows, %")

    return svg(
        "accuracy", "Accuracy of each model with its 95 % interval", 0.75 + 0.42 * len(names), draw
    )


def _retention(report: Mapping[str, Any]) -> str:
    parts = retentions_told(report)
    if not parts:
        return ""

    def draw(axes: Any) -> None:
        bars(
            axes,
            [f"{n} rows" for n in parts],
            list(parts.values()),
            [COLOURS["student"]] * len(parts),
        )
        axes.axvline(100, color=COLOURS["teacher"], linewidth=1.2, linestyle="--")
        axes.set_xlabel("% of the teacher's accuracy")

    return svg("retention", "Retention of the teacher's accuracy", 0.75 + 0.42 * len(parts), draw)


def bars(
    axes: Any, names: Sequence[str], parts: Sequence[Mapping[str, Any]], colours: Sequence[str]
) -> None:
    """Points with their intervals, one a line, on an axis cut to where they differ."""
    low = min(p["lo"] for p in parts)
    high = max(max(p["hi"], p["value"]) for p in parts)
    room = max(high - low, 0.02)
    for i, (part, colour) in enumerate(zip(parts, colours, strict=True)):
        ends = [100 * part["lo"], 100 * part["hi"]]  # butt: other caps reach beyond them
        axes.plot(ends, [i, i], color=colour, linewidth=7, alpha=0.35, solid_capstyle="butt")
        axes.plot(100 * part["value"], i, "o", color=colour, markersize=8)
        axes.annotate(
            f"{100 * part['value']:.1f}",
            (100 * part["value"], i),
            (0, 8),
            textcoords="offset points",
            ha="center",
        )
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.75)
    axes.set_xlim(100 * (low - 0.08 * room), 100 * (high + 0.08 * room))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)


def _curves(report: Mapping[str, Any]) -> str:
    key = "val_accuracy"
    arms = {arm: report["curves"].get(arm, {}) for arm in ("control", "student")}
    arms = {
        arm: [h for h in seeds.values() if any(key in p for p in h)] for arm, seeds in arms.items()
    }
    if not any(arms.values()):
        return ""

    def draw(axes: Any) -> None:
        for arm, histories in arms.items():
            _seeds_and_mean(axes, histories, key, COLOURS[arm], arm)
        for step in report["phase_ends"][:-1]:
            axes.axvline(step, color=INK, linewidth=1.0, linestyle="--")
        axes.set_xlabel("step")
        axes.set_ylabel("validation accuracy, %")
        axes.legend(loc="lower right")

    return svg(
        "curves", "Validation accuracy while training: each seed, and the mean in bold", 2.9, draw
    )


def _seeds_and_mean(
    axes: Any, histories: Sequence[Sequence[Mapping[str, Any]]], key: str, colour: str, label: str
) -> None:
    by_step: dict[int, list[float]] = {}
    for history in histories:
        points = [(p["step"], 100 * p[key]) for p in history if p.get(key) is not None]
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=0.8, alpha=0.45)
        for step, value in points:
            by_step.setdefault(step, []).append(value)
    shared = {s: sum(v) / len(v) for s, v in sorted(by_step.items()) if len(v) == len(histories)}
    axes.plot(list(shared), list(shared.values()), color=colour, linewidth=2.2, label=label)


def _confusion(report: Mapping[str, Any]) -> str:
    if not report["confusion"]:
        return ""
    counts = report["confusion"]
    names = [_short(c) for c in report["classes"]]
    size = len(names)
    shares = [[v / max(sum(row), 1) for v in row] for row in counts]

    def draw(axes: Any) -> None:
        from matplotlib.colors import LinearSegmentedColormap

        blues = LinearSegmentedColormap.from_list("share", [SHARE + "00", SHARE])
        axes.pcolormesh(shares, cmap=blues, vmin=0, vmax=1, rasterized=size > NAMED_CLASSES)
        axes.grid(visible=False)
        axes.set(xlabel="predicted", ylabel="true", xlim=(0, size), ylim=(size, 0), aspect="equal")
        if size <= NAMED_CLASSES:
            _name_cells(axes, counts, shares, names)

    return svg(
        "confusion", "Confusion of the exported student: true class by predicted class", 4.2, draw
    )


def _name_cells(axes: Any, counts: Any, shares: Any, names: Sequence[str]) -> None:
    size = len(names)
    small = {"fontsize": max(4.5, min(9.5, 70 / size))}
    middles = [i + 0.5 for i in range(size)]
    axes.set_xticks(middles, names, rotation=40, ha="right", rotation_mode="anchor", **small)
    axes.set_yticks(middles, names, **small)
    axes.tick_params(length=0)
    for i, row in enumerate(counts):
        for j, value in enumerate(row):
            if value:
                ink = "white" if shares[i][j] > 0.7 else INK
                axes.text(
                    j + 0.5, i + 0.5, str(value), ha="center", va="center", color=ink, **small
                )


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 2] + ".."


def _saliency(report: Mapping[str, Any]) -> str:
    part = report["valence"]
    if part is None or not report["asks_valence"]:
        return ""

    def draw(axes: Any) -> None:
        edges = part["edges"]
        q75 = part["q75"]
        for low, high, value in zip(edges[:-1], edges[1:], part["counts"], strict=True):
            colour = COLOURS["artefact"] if low >= q75 else COLOURS["teacher"]
            axes.bar(low, value, width=0.92 * (high - low), align="edge", color=colour)
        axes.axvline(q75, color=INK, linewidth=1.2, linestyle="--")
        axes.annotate(
            "thriving",
            (q75, 1),
            (4, -2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
        )
        axes.set(xlabel="saliency", ylabel="rows")

    return svg(
        "saliency",
        "Saliency of the rows; the thriving quarter lies right of the dashed line",
        2.5,
        draw,
    )


def searched(report: Mapping[str, Any]) -> list[str]:
    """The keys that trials differ in, at most six."""
    trials = report["search"]["trials"] if report["search"] else []
    return sorted({key for t in trials for key in t["params"]})[:MOST_PARAMS]


def _search(report: Mapping[str, Any], number: int, key: str) -> str:
    search = report["search"]
    metric = search["metric"]
    trials = [t for t in search["trials"] if t.get(metric) is not None and key in t["params"]]
    best = (search["best"] or {}).get("number")
    values = [t["params"][key] for t in trials]
    numbers = all(type(v) in (int, float) for v in values)
    wide = numbers and values and 0 < 30 * min(values) < max(values)

    def draw(axes: Any) -> None:
        for trial in trials:
            colour = COLOURS["student"] if trial["state"] == "finished" else COLOURS["teacher"]
            place = trial["params"][key] if numbers else _short(str(trial["params"][key]))
            axes.plot(place, trial[metric], "o", color=colour, markersize=6, alpha=0.85)
            if trial["number"] == best:
                axes.plot(
                    place,
                    trial[metric],
                    "o",
                    color=COLOURS["control"],
                    markersize=13,
                    fillstyle="none",
                )
        if wide:
            axes.set_xscale("log")
        axes.set(xlabel=key[-48:], ylabel=metric.replace("_", " "))

    title = f"Trials by {key}: blue finished, grey stopped early, the best ringed"
    return svg(f"search-{number}", title, 2.4, draw) if trials else ""
