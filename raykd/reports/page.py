"""report.html: one file that needs no network, with the headline in words, tables and charts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raykd.files.atomic import write_bytes
from raykd.reports import bootstrap, sentences
from raykd.reports.charts import charts, searched

FOLDER = Path(__file__).parent


def write_html(report: Mapping[str, Any], path: Path) -> None:
    """Write the page of `report` (as `raykd.reports.evidence.build` gives it) to `path`, whole or
    not at all.
    """
    write_bytes(path, render(report).encode())


def render(report: Mapping[str, Any]) -> str:
    """The page as text."""
    from markupsafe import Markup

    drawn = {name: Markup(svg) for name, svg in charts(report).items()}
    return fill(
        "report.html.j2",
        report=report,
        headline=sentences.headline(report),
        models=sentences.rows_of(report),
        figures=sentences.figure_lines(report),
        accuracy_chart=drawn.pop("accuracy"),
        charts={name: svg for name, svg in drawn.items() if not name.startswith("search")},
        captions=CAPTIONS | ({"curves": PHASES} if len(report["phase_ends"]) > 1 else {}),
        search_charts=[svg for name, svg in drawn.items() if name.startswith("search")],
        searched=searched(report),
        resamples=bootstrap.RESAMPLES,
        facts=_facts(report),
    )


def fill(template: str, **values: Any) -> str:
    """A template of this folder as text.

    All but Markup is escaped: names of classes and runs come from users.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    env = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {
        "percent": sentences.percent,
        "count": sentences.count,
        "tested": sentences.tested,
        "figure": _figure,
        "firm": _firm,
    }
    return env.get_template(template).render(**values)


CAPTIONS = {
    "retention": "What the student keeps of the teacher (dashed), with 95 % intervals",
    "curves": "Learning: each seed thin, their mean bold",
    "confusion": "Confusion of the exported student",
    "saliency": "Saliency of the rows; thriving ones right of the line",
}


PHASES = (
    "Learning: each seed thin, their mean bold. The student's phases meet at the dashed lines: "
    "each starts its rate anew and rounds differently, so its curve is no single training"
)


def _firm(text: str) -> str:
    """`text` whose per cent signs stay with their numbers."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def _figure(value: Any) -> str:
    """A searched value: four digits of a number, anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of everything needed to find or repeat the run; what is unknown is left out."""
    rows = report["data"]["rows"]
    known = report["data"].get("tested")
    store = report["store"]
    artefact = report["artefact"]
    mlflow = report["mlflow"]
    found = {
        "recipe digest": report["recipe_digest"],
        "data": f"{report['data']['name']}: "
        + ", ".join(f"{k} {sentences.count(v)}" for k, v in rows.items())
        + (
            ""
            if known in (None, rows["test"])
            else f", of which {sentences.count(known)} have a label"
        ),
        "seeds": ", ".join(map(str, report["seeds"])),
        "teacher weights": report["teacher"]["dtype"],
        "artefact": artefact["path"],
        "artefact format": artefact["format"],
        "teacher store": store["id"],
        "store size": store["bytes"]
        and f"{sentences.count(store['bytes'])} bytes, {sentences.count(store['rows'])} rows",
        "MLflow": mlflow["run_id"]
        and f"{mlflow['experiment']} / {mlflow['run_id']} at {mlflow['uri']}",
    }
    found |= {f"machine: {k}": v for k, v in report["machine"].items()}
    found |= {f"version: {k}": v for k, v in report["versions"].items()}
    return [
        (name, str(value)) for name, value in found.items() if value is not None and value != ""
    ]
