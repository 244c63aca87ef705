"""The figures of a report as sentences: headline, warnings, and numbers as people read them."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

FEW_SEEDS = 3
FEW_GROUPS = 10
RETENTIONS = ("all", "thriving", "rest", "random")  # in the order they are told
WIDTH = 100
LEAST_KEPT = 0.8  # of the teacher's recall; a class that keeps less is warned of
NAMED = 6  # classes in one warning
MEASURES = {
    "nll": "nats a token",
    "kl": "KL to the teacher",
    "acceptance": "drafts accepted",
    "block_efficiency": "tokens a teacher call",
    "overlap": "shared with the teacher",
    "macro_f1": "macro-F1",
    "balanced_accuracy": "balanced accuracy",
}
LESS = ("nll", "kl")  # is better
BESIDE = {
    "unrounded": "full precision",
    "post_training": "rounded afterwards",
    "rounded_control": "rounded control",
}


def percent(value: float | None, digits: int = 1) -> str:
    """0.9312 as "93.1 %"."""
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def span(part: Mapping[str, Any], digits: int = 1) -> str:
    """The interval of a share, as "91.0 to 95.2"."""
    return (
        "-"
        if part["lo"] is None
        else f"{100 * part['lo']:.{digits}f} to {100 * part['hi']:.{digits}f}"
    )


def times(value: float | None) -> str:
    """12.34 as "12.3x"."""
    return "-" if value is None else f"{value:.3g}x" if value < 100 else f"{value:,.0f}x"


def count(value: int | None) -> str:
    """1234567 as "1,234,567"."""
    return "-" if value is None else f"{value:,}"


def tested(data: Mapping[str, Any]) -> str:
    """The test rows that a report is over, as "640 labelled of 700 test rows" where some have no
    label.
    """
    rows = data["rows"]["test"]
    known = data.get("tested")
    if known is None or known == rows:
        return f"{count(rows)} test rows"
    return f"{count(known)} labelled of {count(rows)} test rows"


def rows_of(report: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """(model, params, bytes, accuracy, interval) of each model that was measured."""
    found = []
    for name in ("teacher", "control", "student", "artefact"):
        part = report[name]
        params = report["student"]["params"] if name == "artefact" else part["params"]
        if metric := part["metrics"].get("accuracy"):
            size = part.get("bytes")
            found.append((name, count(params), count(size), percent(metric["value"]), span(metric)))
        if name == "control":
            found += [_beside_row(other, report) for other in report["beside"]]
    return found


def _beside_row(name: str, report: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    metric = report["beside"][name]["metrics"]["accuracy"]
    return (
        BESIDE[name],
        count(report["student"]["params"]),
        "-",
        percent(metric["value"]),
        span(metric),
    )


def headline(report: Mapping[str, Any]) -> str:
    """The result in one or two sentences, each figure with its interval."""
    kept = report["retention"]["all"]
    closed = report["gap_closed"]
    own = report["student"]["metrics"]["accuracy"]
    if kept["value"] is None:
        share = percent(own["value"])
        text = f"The student is right on {share} of the test rows (95 % interval {span(own)})"
    else:
        share = percent(kept["value"])
        text = f"The student keeps {share} of the teacher's accuracy (95 % interval {span(kept)})"
    if closed["value"] is not None:
        share = percent(closed["value"], 0)
        text += f", closes {share} of the gap between control and teacher ({span(closed, 0)})"
    if (size := report["artefact"]["bytes"]) is not None:
        text += f", in {count(size)} bytes{_shrinkage(report['compression']['ratio'])}"
    return text + "." + (f" {_sentence(report['gap_words'])}." if report["gap_words"] else "")


def _shrinkage(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f" ({times(ratio)} smaller)" if ratio >= 1 else f" ({times(1 / ratio)} larger)"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def at_chance(teacher: float, guess: float, often: str, rows: str) -> str:
    """That a teacher knows no more than which answer is the most frequent, and what to look at."""
    return (
        f"the teacher is not shown to be better than chance: it is right on {percent(teacher)} of "
        f"{rows}, and always answering {often!r} on {percent(guess)}; what a student keeps of it "
        "means nothing and is withheld; look at teacher.weights and at data.classes"
    )


def gap_words(teacher: float | None, control: float | None, closed: float | None) -> str:
    """Why there is no gap closed, or nothing where there is one."""
    if closed is not None or teacher is None or control is None:
        return ""
    reach = "reaches" if control >= teacher else "cannot be told from"
    return (
        f"no gap to close: the control ({percent(control)}), trained on labels alone, {reach}"
        f" the teacher ({percent(teacher)}), so these data cannot show what distillation adds"
    )


def verdict(closed: Mapping[str, Any], gain: Mapping[str, Any]) -> str:
    """A warning where the student is worse than its control, or not shown to be better."""
    if gain["value"] is not None and gain["hi"] < 0:
        return f"harmful: the student is worse than its control: {span(gain)} points"
    if closed["value"] is None or closed["lo"] > 0:
        return ""
    return f"not shown to help: the interval of the gap closed, {span(closed, 0)} %, includes 0"


def lost_classes(per_class: Sequence[Mapping[str, Any]]) -> list[str]:
    """A warning where the student keeps too little of the teacher's recall of a class."""
    lost = []
    for row in per_class:
        if row["teacher"] and row["student"] < LEAST_KEPT * row["teacher"]:
            kept = percent(row["student"] / row["teacher"], 0)
            lost.append(f"{row['name']!r} {kept} ({row['rows']:,} rows)")
    if not lost:
        return []
    named = ", ".join(lost[:NAMED])
    more = f" and {len(lost) - NAMED} more" if len(lost) > NAMED else ""
    return [
        f"classes that keep less than {percent(LEAST_KEPT, 0)} of the teacher's recall: "
        f"{named}{more}; see macro-F1 and the table of classes, not accuracy alone"
    ]


def cautions(
    *, seeds: int, groups: int, absent: list[str], missing: Mapping[str, bool]
) -> list[str]:
    """Warnings about what was not measured, or on too little."""
    found = []
    if seeds < FEW_SEEDS:
        number = f"{seeds} seed{'s' if seeds != 1 else ''}"
        found.append(
            f"{number}: the interval knows too little of how trainings vary; set seeds = [0, 1, 2]"
        )
    if groups < FEW_GROUPS:
        number = f"{groups} test recording{'s' if groups != 1 else ''}"
        found.append(f"{number}: the interval is too narrow; test on {FEW_GROUPS} or more")
    if absent:
        found.append(
            "no test row of class " + ", ".join(map(repr, absent)) + ": nothing is known of it"
        )
    return found + [MISSING[name] for name, is_missing in missing.items() if is_missing]


def unanswered(rows: int, whole: int) -> str:
    """How many test rows are left out of what is compared with the teacher."""
    return (
        f"the teacher has no answer to {rows:,} of {whole:,} test rows; what is compared with it, "
        f"or is of it, is over the other {whole - rows:,}"
    )


MISSING = {
    "teacher": "no teacher: retention, gap closed and compression are not defined",
    "control": "no control: what the teacher added is unknown; set control = true",
    "artefact": "no artefact: the figures are of the trained student, not of what a device runs",
    "store": "no teacher store: no term of the recipe reads one",
    "thriving": "no saliency on test rows: retention is given over all rows only",
}


def table(report: Mapping[str, Any]) -> str:
    """The report for a terminal, at most 100 columns wide."""
    data = report["data"]
    head = ("model", "params", "bytes", "accuracy", "95 % interval")
    lines = [
        f"{report['technique']} on {data['name']}: {tested(data)} of"
        f" {count(data['groups'])} recordings, seeds {', '.join(map(str, report['seeds']))}",
        "",
    ]
    lines += [f"{a:<20}{b:>14}{c:>14}{d:>12}   {e}" for a, b, c, d, e in [head, *rows_of(report)]]
    lines += ["", *(f"{name:<26}{text}" for name, text in figure_lines(report))]
    lines += (
        ["", *(wrapped(f"! {text}") for text in report["warnings"])] if report["warnings"] else []
    )
    return "\n".join(line if len(line) <= WIDTH else wrapped(line) for line in lines)


def wrapped(text: str) -> str:
    """`text` in lines that fit a terminal."""
    return "\n".join(textwrap.wrap(text, WIDTH, subsequent_indent="  "))


def retentions_told(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What was kept, by part of the rows; parts by saliency only where valence was asked for."""
    names = RETENTIONS if report.get("asks_valence", True) else RETENTIONS[:1]
    parts = {name: report["retention"][name] for name in names}
    return {name: part for name, part in parts.items() if part["value"] is not None}


def figure_lines(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, words) of every ratio that was measured."""
    found = []
    for name, part in retentions_told(report).items():
        extra = (
            f", less chance {percent(part['chance_corrected'])}" if part["chance_corrected"] else ""
        )
        share = f"{percent(part['value'])} ({span(part)}){extra}"
        found.append((f"kept, {name} rows", f"{share}; {part['n']:,} rows"))
    for name, part in report.get("kept", {}).items():
        if part["value"] is not None:
            found.append((f"kept, {MEASURES[name]}", f"{percent(part['value'])} ({span(part)})"))
    closed = report["gap_closed"]
    gain = report["gain"]
    size = report["compression"]
    if closed["value"] is not None:
        found.append(("gap closed", f"{percent(closed['value'], 0)} ({span(closed, 0)})"))
    if gain["value"] is not None:
        found.append(("over the control", f"{100 * gain['value']:+.1f} points ({span(gain)})"))
    for name, part in report["beside"].items():
        lost = part["lost"]
        found.append((f"over {BESIDE[name]}", f"{100 * lost['value']:+.1f} points ({span(lost)})"))
    found += [(MEASURES[name], _measured(report, name)) for name in report["gains"]]
    if size["ratio"] is not None:
        parts = f" = {times(size['architecture'])} architecture * {times(size['bits'])} bits"
        found.append(("compression", times(size["ratio"]) + (parts if size["bits"] else "")))
    if (cost := report["training_cost"]["ratio"]) is not None:
        found.append(("training cost", f"{times(cost)} the control's"))
    if told := _speed(report["throughput"]):
        found.append(("training speed", told))
    return found + _artefact_figures(report["artefact"])


def _speed(told: Mapping[str, Any]) -> str:
    """Rows a second, the share of the device's peak and of the time that is waited, and memory."""
    if told["rows_per_second"] is None:
        return ""
    text = f"{count(round(told['rows_per_second']))} rows a second"
    if told["peak_share"] is not None:
        text += f", {percent(told['peak_share'])} of the device's peak"
    if told["peak_memory_mb"] is not None:
        text += f", {count(round(told['peak_memory_mb']))} MB at most"
    if told["waiting_share"] is not None:
        text += f"; it waits for rows in {percent(told['waiting_share'])} of the time"
    return text


def _measured(report: Mapping[str, Any], name: str) -> str:
    """A figure of each model that has it, and the student's less its control's."""
    known = {
        model: report[model]["metrics"].get(name)
        for model in ("teacher", "control", "student", "artefact")
    }
    text = ", ".join(f"{model} {part['value']:.3f}" for model, part in known.items() if part)
    gain = report["gains"][name]
    return text + ("" if gain["value"] is None else f"; over the control {signed(gain)}")


def signed(gain: Mapping[str, Any]) -> str:
    """A difference, as "-0.340 (-0.390 to -0.280)"."""
    return f"{gain['value']:+.3f} ({gain['lo']:.3f} to {gain['hi']:.3f})"


def _artefact_figures(artefact: Mapping[str, Any]) -> list[tuple[str, str]]:
    parity = artefact["parity"]
    latency = artefact["latency"]
    found = []
    if parity["agreement"] is not None:
        share = percent(parity["agreement"], 2)
        found.append(("parity", f"{share} of decisions equal the trained student's"))
    for name, key in (
        ("the teacher", "ratio_vs_teacher"),
        ("the fp32 student", "ratio_vs_fp32_student"),
    ):
        if (ratio := latency[key]) is not None:
            found.append(("latency", f"{times(ratio)} the time of {name}"))
    if sizes := artefact["bytes_by_kind"]:
        found.append(("bytes", ", ".join(f"{name} {count(size)}" for name, size in sizes.items())))
    if left := artefact.get("computed_in_float32"):
        named = [f"{row['name']} (stored as {row['stored']})" for row in left]
        found.append(("computed in float32", ", ".join(named)))
    if reason := artefact.get("needs_raykd"):
        found.append(("run.py", f"needs raykd and torch: {reason}"))
    return found
