"""Laws of the report: the keys of the contract, words where a figure is missing, a page safe
offline.
"""

import json
import re
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from html_page import Page

from raykd.files.atomic import read_json, write_json
from raykd.reports import answers as answer_file
from raykd.reports import charts, page, schema, sentences
from raykd.reports.evidence import Evidence, build

CLASSES = [
    "Biceps curl",
    "Shoulder press",
    "Lateral raise",
    "Triceps dip",
    "Chest fly",
    "Row",
    "Rest",
]
CONTRACT = {
    "schema": [],
    "recipe_digest": [],
    "technique": [],
    "data": ["name", "rows"],
    "seeds": [],
    "teacher": ["params", "bytes", "dtype", "metrics"],
    "control": ["params", "metrics"],
    "student": ["params", "metrics"],
    "artefact": ["path", "format", "bytes", "metrics", "parity", "latency"],
    "retention": ["all", "thriving", "rest"],
    "gap_closed": ["value", "lo", "hi"],
    "compression": ["ratio", "architecture", "bits"],
    "training_cost": ["ratio"],
    "store": ["id", "rows", "bytes", "bytes_per_row", "codec"],
    "mlflow": ["uri", "experiment", "run_id"],
    "warnings": [],
}


def answers(rng, label, rate):
    """A model that is right on `rate` of the rows, else one class on."""
    wrong = rng.random(len(label)) > rate
    return np.where(
        wrong, (label + rng.integers(1, len(CLASSES), len(label))) % len(CLASSES), label
    )


def curve(rng, top):
    steps = range(250, 2001, 250)
    return [
        {
            "step": s,
            "loss": 2 / s,
            "val_accuracy": top * (1 - np.exp(-s / 400)) + rng.normal(0, 0.006),
        }
        for s in steps
    ]


def trials(rng):
    return [
        {
            "number": i,
            "params": {
                "terms.kd.temperature": float(rng.uniform(1, 4)),
                "terms.kd.weight": float(rng.uniform(0, 2)),
            },
            "val_accuracy": float(rng.uniform(0.85, 0.93)),
            "steps": 2000 if i % 2 else 500,
            "state": "finished" if i % 2 else "stopped",
        }
        for i in range(12)
    ]


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    """140 recordings of five windows, three seeds, a control seven points below the student."""
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(140), 5)
    label = group % len(CLASSES)
    saliency = rng.beta(5, 2, 3000) * 2 - 1
    arms = {"control": 0.86, "student": 0.93}
    found = trials(rng)
    return Evidence(
        recipe_digest="3f9a" * 16,
        technique="qat_valence",
        setting="A wrist band must name the exercise from 0.64 seconds, with one label in ten "
        "known.",
        seeds=[0, 1, 2],
        data_name="watch_gestures",
        data_rows={"train": 2710, "val": 420, "test": 700},
        classes=CLASSES,
        label=label,
        group=group,
        teacher=answers(rng, label, 0.965),
        control={s: answers(rng, label, arms["control"]) for s in range(3)},
        student={s: answers(rng, label, arms["student"]) for s in range(3)},
        artefact=answers(rng, label, 0.93),
        thriving=rng.random(len(label)) < 0.25,
        saliency=saliency,
        best_seed=1,
        student_params=30_112,
        control_params=30_112,
        teacher_info={"params": 412_345, "bytes": 1_654_210, "dtype": "float32"},
        artefact_info={
            "path": "artefact/student.rkd",
            "format": "raykd int8 + ternary",
            "bytes": 14_204,
            "parity": {"max_abs_diff": 0.0021, "agreement": 0.9986},
            "latency": {"ratio_vs_teacher": 0.081, "ratio_vs_fp32_student": 0.62},
        },
        training_cost=1.62,
        store={
            "id": "s-77aa01",
            "rows": 2710,
            "bytes": 3_400_200,
            "bytes_per_row": 1254.7,
            "codec": "dense",
        },
        mlflow={"uri": "sqlite:///runs/mlflow.db", "experiment": "raykd", "run_id": "0b1c2d"},
        history={arm: {s: curve(rng, top) for s in range(3)} for arm, top in arms.items()},
        search={"metric": "val_accuracy", "trials": found, "best": found[3]},
        machine={"cpu": "2 cores", "memory": "8 GiB"},
        versions={"raykd": "0.1.0", "torch": "2.11.0"},
    )


@pytest.fixture(scope="module")
def full(evidence) -> dict:
    return build(evidence)


def alone(evidence: Evidence) -> Evidence:
    """The evidence of a run without teacher, control, store or artefact."""
    return replace(
        evidence,
        technique="none",
        teacher=None,
        control={},
        artefact=None,
        thriving=None,
        saliency=None,
        teacher_info={},
        artefact_info={},
        store={},
        training_cost=None,
        history={},
        search=None,
    )


def test_the_keys_of_the_contract_survive_a_round_trip(full, evidence, tmp_path):
    for made in (full, build(alone(evidence))):
        write_json(tmp_path / "report.json", made)
        back = read_json(tmp_path / "report.json")
        assert back == made
        assert schema.Report.model_validate(back).model_dump(mode="json", by_alias=True) == made
        assert set(CONTRACT) <= set(back)
        for key, inner in CONTRACT.items():
            assert set(inner) <= set(back[key] if inner else ()), key
        for part in back["retention"].values():
            assert {"value", "lo", "hi", "chance_corrected"} <= set(part)
        of_text = {"positions", "nll", "accuracy"}
        assert (
            set(back["artefact"]["parity"])
            == {"max_abs_diff", "agreement", "relative", "alone_agreement"} | of_text
        )
        assert set(back["student"]["metrics"]["accuracy"]) == {"value", "lo", "hi", "n"}


def test_the_figures_are_those_of_the_predictions(full, evidence):
    label = evidence.label
    student = np.mean([(p == label).mean() for p in evidence.student.values()])
    control = np.mean([(p == label).mean() for p in evidence.control.values()])
    teacher = (evidence.teacher == label).mean()
    guess = np.bincount(label).max() / len(label)
    assert full["student"]["metrics"]["accuracy"]["value"] == pytest.approx(student)
    assert full["retention"]["all"]["value"] == pytest.approx(student / teacher)
    assert full["retention"]["all"]["chance_corrected"] == pytest.approx(
        (student - guess) / (teacher - guess)
    )
    assert full["gap_closed"]["value"] == pytest.approx((student - control) / (teacher - control))
    assert full["gain"]["value"] == pytest.approx(student - control)
    sizes = full["compression"]
    assert sizes["ratio"] == pytest.approx(sizes["architecture"] * sizes["bits"])
    assert sizes["ratio"] == 1_654_210 / 14_204
    assert np.sum(full["confusion"]) == len(label)
    assert np.trace(full["confusion"]) == (evidence.student[1] == label).sum()
    assert sum(full["valence"]["counts"]) == 3000


def test_thriving_and_rest_share_out_the_rows(full):
    parts = full["retention"]
    assert parts["thriving"]["n"] + parts["rest"]["n"] == parts["all"]["n"] == 700


def test_rows_without_a_label_change_nothing(evidence, full):
    def longer(values):
        return np.concatenate([values, values[:9]])

    label = longer(evidence.label)
    label[-9:] = -100
    arrays = {k: longer(getattr(evidence, k)) for k in ("group", "teacher", "artefact", "thriving")}
    arms = {
        k: {s: longer(p) for s, p in getattr(evidence, k).items()} for k in ("student", "control")
    }
    assert build(replace(evidence, label=label, **arrays, **arms)) == full


@pytest.fixture(scope="module")
def unanswered(evidence) -> tuple[Evidence, np.ndarray]:
    """The teacher has no answer to 140 rows, most of them of class 0; the students are wrong there,
    and whether those rows thrive is unknown.
    """
    known = np.ones(len(evidence.label), bool)
    known[np.flatnonzero(evidence.label == 0)[20:]] = False
    known[np.flatnonzero(evidence.label == 1)[-60:]] = False
    thriving = np.where(known, evidence.thriving, -1).astype(np.int8)
    found = replace(
        evidence,
        teacher=np.where(known, evidence.teacher, -1),
        thriving=thriving,
        student={s: np.where(known, p, p * 0 + 6) for s, p in evidence.student.items()},
    )
    return found, known


def test_rows_without_an_answer_of_the_teacher_are_not_its_mistakes(unanswered):
    found, known = unanswered
    made = build(found)
    right = {
        name: np.stack([p == found.label for p in getattr(found, name).values()]).mean(0)
        for name in ("student", "control")
    }
    teacher = (found.teacher == found.label)[known].mean()
    told = {name: made[name]["metrics"]["accuracy"] for name in ("teacher", "student", "control")}
    assert told["teacher"]["value"] == pytest.approx(teacher)
    assert told["teacher"]["n"] == known.sum() == 560
    for name, each in right.items():
        assert told[name]["value"] == pytest.approx(each.mean())
        assert told[name]["n"] == 700
    kept = right["student"][known].mean() / teacher
    assert made["retention"]["all"]["value"] == pytest.approx(kept)
    assert made["retention"]["all"]["n"] == 560
    artefact = (found.artefact == found.label)[known].mean() / teacher
    assert made["artefact"]["retention"]["value"] == pytest.approx(artefact)
    control = right["control"][known].mean()
    closed = (right["student"][known].mean() - control) / (teacher - control)
    assert made["gap_closed"]["value"] == pytest.approx(closed)
    gain = right["student"].mean() - right["control"].mean()
    assert made["gain"]["value"] == pytest.approx(gain)
    assert any("no answer to 140 of 700 test rows" in text for text in made["warnings"])
    assert not any("less than 80 %" in text for text in made["warnings"])
    alone = build(evidence_of(found, known))
    for key in ("retention", "kept", "gap_closed"):
        assert made[key] == alone[key], key
    assert made["teacher"]["metrics"] == alone["teacher"]["metrics"]


def evidence_of(found: Evidence, rows: np.ndarray) -> Evidence:
    """The evidence of these rows alone: the others have no label."""
    return replace(found, label=np.where(rows, found.label, -100))


def test_recalls_of_the_teacher_are_over_the_rows_that_it_answers(unanswered):
    found, known = unanswered
    made = build(found)
    for i, row in enumerate(made["per_class"]):
        rows = found.label == i
        assert row["rows"] == rows.sum() == 100
        right = (found.teacher == i)[rows & known].mean()
        assert row["teacher"] == pytest.approx(right)
        student = np.mean([(p == i)[rows].mean() for p in found.student.values()])
        assert row["student"] == pytest.approx(student)


def test_rows_of_unknown_saliency_are_not_the_rest(unanswered):
    found, known = unanswered
    parts = build(found)["retention"]
    thriving = int((found.thriving == 1).sum())
    assert parts["thriving"]["n"] == parts["random"]["n"] == thriving
    assert parts["rest"]["n"] == known.sum() - thriving


def test_a_teacher_without_any_answer_is_none(evidence):
    made = build(replace(evidence, teacher=np.full(700, -1)))
    assert made["teacher"]["metrics"] == {}
    assert made["retention"]["all"]["value"] is None
    assert sentences.MISSING["teacher"] in made["warnings"]


def test_the_first_line_counts_the_rows_with_a_label(evidence):
    made = build(replace(evidence, tested=640))
    assert " 640 labelled of 700 test rows of 140 recordings" in sentences.table(made)
    assert "test 700, of which 640 have a label" in page.render(made)
    whole = build(replace(evidence, tested=700))
    assert ": 700 test rows of 140 recordings" in sentences.table(whole)


def test_a_complete_report_has_no_warning(full):
    assert full["warnings"] == []


@pytest.mark.parametrize("missing", list(sentences.MISSING))
def test_what_is_missing_is_null_and_said(evidence, missing):
    made = build(alone(evidence))
    assert sentences.MISSING[missing] in made["warnings"]
    assert made["gap_closed"] == made["gain"] == {"value": None, "lo": None, "hi": None}
    assert all(p["value"] is None for p in made["retention"].values())
    assert made["teacher"]["metrics"] == made["control"]["metrics"] == {}
    assert set(made["compression"].values()) == {None}


def test_a_control_that_reaches_the_teacher_leaves_no_gap(evidence):
    made = build(replace(evidence, control=dict.fromkeys(range(3), evidence.teacher)))
    assert made["gap_closed"]["value"] is None
    assert made["gap_words"].startswith("no gap to close: the control")
    assert made["gap_words"] in made["warnings"]
    assert "No gap to close" in sentences.headline(made)


def test_a_student_like_its_control_is_not_shown_to_help(evidence):
    made = build(replace(evidence, student=evidence.control))
    assert made["gap_closed"]["value"] == 0
    assert any(w.startswith("not shown to help") for w in made["warnings"])


def test_a_student_below_its_control_is_called_harmful(evidence):
    worse = {s: answers(np.random.default_rng(s), evidence.label, 0.6) for s in range(3)}
    assert any(w.startswith("harmful") for w in build(replace(evidence, student=worse))["warnings"])


def test_few_seeds_few_recordings_and_absent_classes_are_warned_of(evidence):
    one = {0: evidence.student[0]}
    made = build(
        replace(
            evidence, student=one, best_seed=0, group=evidence.group % 4, classes=[*CLASSES, "Jump"]
        )
    )
    assert [w.split(":")[0] for w in made["warnings"]] == [
        "1 seed",
        "4 test recordings",
        "no test row of class 'Jump'",
    ]
    assert made["per_class"][-1]["student"] is None


def test_numbers_that_are_not_finite_become_null(evidence, tmp_path):
    broken = {"student": {0: [{"step": 1, "loss": float("nan"), "val_accuracy": np.float32(0.5)}]}}
    made = build(replace(evidence, history=broken, training_cost=float("inf")))
    write_json(tmp_path / "report.json", made)
    assert made["curves"]["student"]["0"][0] == {"step": 1, "loss": None, "val_accuracy": 0.5}
    assert made["training_cost"]["ratio"] is None


def test_an_unknown_key_is_refused(evidence):
    with pytest.raises(ValueError, match="sizes"):
        build(replace(evidence, store={"id": "x", "sizes": 3}))


def test_the_table_fits_a_terminal_and_names_every_model(full, evidence):
    text = sentences.table(full)
    assert max(map(len, text.splitlines())) <= 100
    for name in (
        "teacher",
        "control",
        "student",
        "artefact",
        "gap closed",
        "compression",
        "training cost",
    ):
        assert re.search(rf"^{name}", text, re.M), name
    bare = sentences.table(build(alone(evidence)))
    assert max(map(len, bare.splitlines())) <= 100
    assert "! no teacher" in bare


@pytest.fixture(scope="module")
def html(full) -> str:
    return page.render(full)


def test_the_page_is_well_formed(html, evidence):
    for text in (html, page.render(build(alone(evidence)))):
        assert Page(text).open == []


def test_the_page_needs_no_network(html):
    seen = Page(html)
    addresses = re.findall(r"https?://[^\s\"'<>]+", html)
    assert set(addresses) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not {tag for tag, _ in seen.seen} & {"script", "link", "iframe", "img", "object"}
    assert "@import" not in html
    assert "url(" not in html.replace("url(#", "")
    targets = [v for _, a in seen.seen for k, v in a.items() if k in ("src", "href", "xlink:href")]
    assert all(t.startswith(("#", "data:")) for t in targets)


def test_ids_are_unique_and_every_reference_meets_one(html):
    seen = Page(html).seen
    ids = [a["id"] for _, a in seen if "id" in a]
    assert len(ids) == len(set(ids))
    used = re.findall(r"url\(#([^)]+)\)", html) + re.findall(r'href="#([^"]+)"', html)
    assert set(used) <= set(ids)


def test_names_from_users_are_text_never_markup(evidence):
    odd = ["<script>alert(1)</script>", "a$b$^{", "\u4e2d\u6587 & co", *CLASSES[3:]]
    made = build(replace(evidence, classes=odd, setting="<b onload=x>", data_name='"><img src=x>'))
    text = page.render(made)
    seen = Page(text)
    assert not {tag for tag, _ in seen.seen} & {"script", "img"}
    assert not any(k.startswith("on") for _, a in seen.seen for k in a)
    assert odd[0] in seen.text
    assert odd[1] in seen.text
    assert "<b onload=x>" in seen.text


def test_the_page_says_the_result_in_words(html, full):
    text = " ".join(Page(html).text)
    assert "The student keeps" in sentences.headline(full)
    assert "14,204 bytes (116x smaller)" in sentences.headline(full)
    assert sentences.headline(full) in text.replace("\N{NO-BREAK SPACE}", " ")
    assert full["setting"] in text


def test_writing_the_page_again_gives_the_same_bytes(full, tmp_path):
    for name in ("a.html", "b.html"):
        page.write_html(json.loads(json.dumps(full)), tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_chart_without_data_is_left_out(full, evidence):
    assert set(charts.charts(full)) == {
        "accuracy", "retention", "curves", "confusion", "saliency", "search-0", "search-1"
    }  # fmt: skip
    assert set(charts.charts(build(alone(evidence)))) == {"accuracy", "confusion"}


def test_searched_words_and_numbers_can_mix(full):
    values = [0.1, "none", True, 3]
    mixed = [
        {"number": i, "params": {"x": v}, "val_accuracy": 0.5, "steps": 1, "state": "finished"}
        for i, v in enumerate(values)
    ]
    made = full | {"search": {"metric": "val_accuracy", "trials": mixed, "best": None}}
    assert "none" in charts.charts(made)["search-0"]


@pytest.mark.parametrize("answer", ["always the first", "one class on", "as drawn"])
def test_of_a_teacher_at_chance_nothing_is_kept(evidence, answer):
    label = evidence.label
    drawn = np.random.default_rng(3).integers(0, len(CLASSES), len(label))
    wrong = {
        "always the first": np.zeros_like(label),
        "one class on": (label + 1) % len(CLASSES),
        "as drawn": drawn,
    }
    made = build(replace(evidence, teacher=wrong[answer]))
    assert made["warnings"][0].startswith("the teacher is not shown to be better than chance")
    assert "always answering 'Biceps curl' on 14.3 %" in made["warnings"][0]
    for part in [
        *made["retention"].values(),
        *made["kept"].values(),
        made["artefact"]["retention"],
    ]:
        assert part["value"] is None
    assert made["retention"]["all"]["chance"] == pytest.approx(1 / 7)
    assert "o gap to close" not in json.dumps(made)
    headline = sentences.headline(made)
    assert headline.startswith("The student is right on")
    assert "No gap to close" not in headline
    assert "kept" not in sentences.table(made)
    assert page.render(made)


def test_a_teacher_a_little_above_chance_is_kept(evidence):
    rng = np.random.default_rng(4)
    made = build(replace(evidence, teacher=answers(rng, evidence.label, 0.3)))
    assert made["retention"]["all"]["value"] > 1
    assert not any("chance" in warning for warning in made["warnings"])


def test_rows_that_thrive_are_told_of_only_where_valence_was_asked_for(evidence):
    plain = build(replace(evidence, asks_valence=False))
    assert plain["retention"]["thriving"]["value"] is not None
    told = sentences.table(plain) + " ".join(Page(page.render(plain)).text)
    assert not re.search("thriv|saliency", told, re.IGNORECASE)
    assert not any("saliency" in w for w in build(alone(plain_of(evidence)))["warnings"])
    assert "saliency" not in charts.charts(plain)
    assert "kept, all rows" in told


def plain_of(evidence: Evidence) -> Evidence:
    return replace(evidence, asks_valence=False)


def test_a_control_that_was_not_asked_for_is_not_missed(evidence):
    missed = sentences.MISSING["control"]
    assert missed in build(replace(evidence, control={}))["warnings"]
    assert missed not in build(replace(evidence, control={}, asks_control=False))["warnings"]


def test_a_curve_of_several_phases_says_so(evidence):
    made = build(replace(evidence, phase_ends=[1000, 2000]))
    one = build(replace(evidence, phase_ends=[2000]))
    assert "phases meet at the dashed lines" in page.render(made)
    assert "phases meet" not in page.render(one)
    assert charts.charts(made)["curves"] != charts.charts(one)["curves"]


def test_answers_have_the_names_of_their_classes(evidence, tmp_path):
    label = evidence.label.copy()
    label[:3] = -100
    teacher = evidence.teacher.copy()
    teacher[3] = -1
    answer_file.write(replace(evidence, label=label, teacher=teacher), tmp_path)
    table = pq.read_table(tmp_path / "answers.parquet").to_pylist()
    assert [row["label_class"] for row in table[:3]] == [None] * 3
    assert table[3]["teacher_class"] is None
    for row in table[4:40]:
        for name in ("label", "teacher", "artefact", "student-0", "control-2"):
            assert row[f"{name}_class"] == CLASSES[row[name]]
    assert list(answer_file.read(tmp_path).student) == [0, 1, 2]
