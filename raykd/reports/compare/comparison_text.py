"""What a comparison says, in words: its table for a terminal, its verdicts and its warnings."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from raykd.reports.compare.table import ComparedRun, Verdict
from raykd.reports.sentences import MEASURES, count, percent, signed, span, tested, times, wrapped
from raykd.reports.sentences import cautions as sparse

MODELS = {"run": 27, "teacher, %": 23, "control, %": 23, "student, %": 23}
FIGURES = {
    "technique": 17,
    "gap closed, %": 19,
    "kept, thriving, %": 23,
    "kept, rest, %": 23,
    "cost": 7,
    "B/row": 7,
}
SIZES = {"run": 27, "artefact, bytes": 18, "smaller": 10, "kept, all, %": 23}
UNLIKE = (
    "the teachers call different rows thriving: one run's are meant in every difference, "
    "each its own in what is kept"
)
DIFFERING = {
    "data.": "the runs were trained on different rows or labels",
    "teacher.": (
        "the teachers differ: each gap closed, and what is kept, is of the run's own teacher"
    ),
    "optim.steps": "the runs were trained for different numbers of steps",
}


def cautions(rows: Sequence[ComparedRun], groups: int) -> list[str]:
    """Warnings about what the runs do not share, and about too few seeds or recordings."""
    keys = [change.key for row in rows for change in row.changes]
    found = [
        text for start, text in DIFFERING.items() if any(key.startswith(start) for key in keys)
    ]
    seeds = [set(row.seeds) for row in rows]
    if any(own != seeds[0] for own in seeds):
        found.append(
            "the runs have different seeds: a difference is paired only by those that both have"
        )
    found += sparse(seeds=min(map(len, seeds)), groups=groups, absent=[], missing={})
    return found


def change(part: Mapping[str, Any]) -> str:
    """A change of the recipe, as "terms.hint.weight: - -> 1.0"."""
    return f"{part['key']}: {_value(part['first'])} -> {_value(part['here'])}"


def _value(value: Any) -> str:
    return "-" if value is None else value if isinstance(value, str) else json.dumps(value)


def points(part: Mapping[str, Any]) -> str:
    """A difference, as "+1.2 points (0.3 to 2.1): better"."""
    return f"{100 * part['value']:+.1f} points ({span(part)}): {part['verdict']}"


def share_with_interval(part: Mapping[str, Any] | None, digits: int = 1) -> str:
    """A share with its interval, as "87.0 % (83.8 to 90.2)"."""
    if part is None or part["value"] is None:
        return "-"
    return f"{percent(part['value'], digits)} ({span(part, digits)})"


def models_by_run(made: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(run, teacher, control, student) of each run, accuracies with their intervals."""
    return [
        (run["name"], *(share_with_interval(run[k]) for k in ("teacher", "control", "student")))
        for run in made["runs"]
    ]


def figures_by_run(made: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(technique, gap closed, kept thriving, kept rest, training cost, store bytes a row) of each
    run.
    """
    return [
        (
            run["technique"],
            share_with_interval(run["gap_closed"], 0),
            *(share_with_interval(run["retention"][k]) for k in ("thriving", "rest")),
            times(run["training_cost"]),
            count(run["bytes_per_row"] and round(run["bytes_per_row"])),
        )
        for run in made["runs"]
    ]


def sizes_by_run(made: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(run, bytes of its artefact, how much smaller than its teacher, what its students keep),
    where there is one.
    """
    return [
        (
            run["name"],
            count(run["artefact_bytes"]),
            times(run["compression"]),
            share_with_interval(run["retention"]["all"]),
        )
        for run in made["runs"]
        if run["artefact_bytes"]
    ]


def differences_by_run(
    made: Mapping[str, Any],
) -> list[tuple[str, list[str], list[tuple[str, str]]]]:
    """(run, its changes, its differences by name) of every run but the first."""
    parts = {
        "accuracy": "all rows",
        "thriving": "thriving rows",
        "rest": "the rest",
        "random": "random rows",
    }
    return [
        (
            run["name"],
            [change(c) for c in run["changes"]] or ["nothing: the same recipe"],
            [(name, points(run[key])) for key, name in parts.items() if run[key] is not None]
            + [
                (MEASURES[key], f"{signed(part)}: {part['verdict']}")
                for key, part in run["others"].items()
            ],
        )
        for run in made["runs"][1:]
    ]


def headline(made: Mapping[str, Any]) -> str:
    """How many runs differ from the first, and which way."""
    verdicts = [run["accuracy"]["verdict"] for run in made["runs"][1:]]
    shares = [f"{verdicts.count(v)} {v}" for v in get_args(Verdict) if v in verdicts]
    runs = f"{len(verdicts)} run{'s' * (len(verdicts) > 1)}"
    return f"Of {runs} held against {made['runs'][0]['name']}: {', '.join(shares)}"


def table(made: Mapping[str, Any]) -> str:
    """The comparison for a terminal, at most 100 columns wide but for long names and values."""
    data = made["data"]
    lines = [
        f"{len(made['runs'])} runs on {data['name']}: {tested(data)} of"
        f" {count(data['groups'])} recordings; 95 % intervals",
        "",
        *_columns(MODELS, models_by_run(made)),
        "",
        *_columns(FIGURES, figures_by_run(made)),
    ]
    lines += ["", *_columns(SIZES, sizes_by_run(made))] if sizes_by_run(made) else []
    for number, (name, changed, differences) in enumerate(differences_by_run(made), 2):
        lines += ["", f"{number:>2}  {name} less {made['runs'][0]['name']}"]
        lines += [wrapped(f"    {text}") for text in changed]
        lines += [f"    {name:<23}{text}" for name, text in differences]
    lines += ["", *(wrapped(f"! {text}") for text in made["warnings"])] if made["warnings"] else []
    return "\n".join(lines)


def _columns(widths: Mapping[str, int], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """A head, which says what is in per cent, and numbered rows."""
    plain = [(first, *(cell.replace(" %", "") for cell in others)) for first, *others in rows]
    found = []
    for number, row in enumerate([tuple(widths), *plain]):
        cells = [
            f"{brief(cell, width - 1):<{width}}"
            for cell, width in zip(row, widths.values(), strict=True)
        ]
        found.append(f"{number or '':>2}  {''.join(cells)}".rstrip())
    return found


def brief(name: str, width: int) -> str:
    """`name` in at most `width` letters, with its end, because a run's ends in its digest."""
    return name if len(name) <= width else f"{name[: width - 10]}..{name[-8:]}"
