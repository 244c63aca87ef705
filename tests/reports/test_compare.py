"""Laws of a comparison: copies differ by exactly nothing, sides swap signs, pairing sharpens; and
what is refused.
"""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import ROOT, raykd
from digests import recipe_digest
from html_page import Page

from raykd.errors import DataError, RecipeError, StoreError
from raykd.files.atomic import read_json, write_json
from raykd.recipe.recipe import Recipe
from raykd.reports import answers, bootstrap, compare, evidence
from raykd.reports.compare import comparison_page, comparison_text, runs, table
from raykd.reports.evidence import Evidence
from raykd.training import run_files

CLASSES = [
    "Biceps curl",
    "Shoulder press",
    "Lateral raise",
    "Triceps dip",
    "Chest fly",
    "Row",
    "Rest",
]
GROUPS = 60
WINDOWS = 4
TERMS = {"ce": {}, "kd": {"temperature": 1.5}}


def world(
    rate: dict[str, float],
    *,
    seed: int = 0,
    seeds: tuple[int, ...] = (0, 1, 2),
    shared: float = 3.0,
) -> Evidence:
    """A run's evidence: recordings are as hard for every run (`shared` log odds apart), each
    training is its own.
    """
    hard = np.random.default_rng(99).normal(0, shared, GROUPS).repeat(WINDOWS)
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(GROUPS), WINDOWS)
    label = group % len(CLASSES)

    def said(name: str) -> np.ndarray:
        level = np.sqrt(1 + shared**2) * np.log(rate[name] / (1 - rate[name]))
        right = rng.logistic(0, 1, len(label)) < level + hard
        return np.where(right, label, (label + 1) % len(CLASSES))

    return Evidence(
        recipe_digest="",
        technique="vanilla",
        seeds=list(seeds),
        data_name="watch_gestures",
        data_rows={"train": 900, "val": 100, "test": len(label)},
        test_digest="7e57" * 16,
        classes=CLASSES,
        row_id=np.arange(len(label)) + 1000,
        label=label,
        group=group,
        student={s: said("student") for s in seeds},
        control={s: said("control") for s in seeds},
        teacher=said("teacher"),
        thriving=np.arange(len(label)) % 4 == 0,
        training_cost=1.6,
        store={
            "id": "s",
            "rows": 1240,
            "bytes": 1_240_000,
            "bytes_per_row": 1000.0,
            "codec": "dense",
        },
    )


RATES = {"teacher": 0.97, "student": 0.85, "control": 0.7}


def write(folder: Path, found: Evidence, **keys: Any) -> Path:
    """A finished run in `folder`, as `raykd report` leaves it."""
    raw = {
        "name": "few",
        "terms": TERMS,
        "seeds": list(found.seeds),
        "teacher": {"model": "series_encoder"},
    }
    recipe = Recipe.model_validate(raw | keys)
    made = evidence.build(replace(found, recipe_digest=recipe_digest(recipe))) | {"inputs": "x"}
    answers.write(found, folder)
    write_json(folder / "recipe.json", recipe.model_dump(mode="json"))
    write_json(folder / "report.json", made)
    return folder


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("runs") / "few-11111111", world(RATES))


@pytest.fixture(scope="module")
def second(first) -> Path:
    """The first with one term more, which makes its students better."""
    keys = {"terms": TERMS | {"valence": {"weight": 0.5}}}
    return write(first.with_name("hint-22222222"), world(RATES | {"student": 0.93}, seed=1), **keys)


def build(*folders: Path) -> dict[str, Any]:
    return compare.build(runs.read(folders))


def ends(part: dict[str, Any]) -> tuple[float, float, float]:
    return part["value"], part["lo"], part["hi"]


def width(part: Any) -> float:
    return part.hi - part.lo


def test_a_run_and_its_copy_differ_by_exactly_nothing(first, tmp_path):
    copy = shutil.copytree(first, tmp_path / first.name)
    made = build(first, Path(copy))["runs"][1]
    assert ends(made["accuracy"]) == ends(made["thriving"]) == (0, 0, 0)
    assert made["accuracy"]["verdict"] == "not shown to differ"
    assert made["changes"] == []


@pytest.mark.parametrize("seeds", [(0, 1, 2), (2, 3), (7,)])
def test_the_other_run_first_turns_the_sign(first, tmp_path, seeds):
    other = write(tmp_path / "other", world(RATES | {"student": 0.9}, seed=2, seeds=seeds))
    there = build(first, other)["runs"][1]
    back = build(other, first)["runs"][1]
    for key in ("accuracy", "thriving"):
        value, lo, hi = ends(back[key])
        assert ends(there[key]) == (-value, -hi, -lo)
        assert there[key]["n"] == back[key]["n"]


def test_the_order_of_seeds_changes_nothing(first, second, tmp_path):
    found = world(RATES | {"student": 0.93}, seed=1)
    turned = {s: found.student[s] for s in (2, 0, 1)}
    moved = write(
        tmp_path / second.name, replace(found, student=turned, seeds=[2, 0, 1]), seeds=[2, 0, 1]
    )
    one = build(first, second)["runs"][1]
    other = build(first, moved)["runs"][1]
    assert one["accuracy"] == other["accuracy"]
    assert one["thriving"] == other["thriving"]


def test_the_differences_are_those_of_the_predictions(first, second):
    made = build(first, second)
    found = runs.read([first, second])
    gains = found[1].answers.hits.mean(0) - found[0].answers.hits.mean(0)
    thriving = found[0].answers.thriving == 1
    assert made["runs"][1]["accuracy"]["value"] == pytest.approx(gains.mean())
    assert made["runs"][1]["thriving"]["value"] == pytest.approx(gains[thriving].mean())
    assert made["runs"][1]["thriving"]["n"] == made["thriving_rows"] == thriving.sum()
    assert made["runs"][1]["accuracy"]["verdict"] == "better"
    assert made["runs"][0]["accuracy"] is made["runs"][0]["thriving"] is None


def test_pairing_is_sharper_than_two_intervals_apart(first, tmp_path):
    """Recordings as hard for one run as for the other: the variance that they share leaves the
    difference.
    """
    one, other = runs.read([first, write(tmp_path / "again", world(RATES, seed=4))])
    paired = compare.difference(other, one)
    apart = [
        bootstrap.resample(bootstrap.Hits(r.answers.group, r.answers.hits, [0, 1, 2]), seed=i)
        for i, r in enumerate((one, other))
    ]
    unpaired = bootstrap.interval(apart[1].student - apart[0].student, paired.n)
    assert paired.value == pytest.approx(unpaired.value)
    assert width(paired) < 0.8 * width(unpaired)


def test_the_interval_is_that_of_theory(first, tmp_path):
    """One seed, independent rows: 2 * 1.96 * sd(d) / sqrt(n) with d in {-1, 0, 1}.

    Of 2000 resamples an end of the interval has a standard error of sqrt(.025 * .975 / 2000) /
    .0584 = 0.060 sd, the width one of 2.2 %; four of them are allowed.
    """
    n = 4000
    rng = np.random.default_rng(3)
    base = replace(
        world(RATES, seeds=(0,)),
        control={},
        teacher=None,
        thriving=None,
        store={},
        training_cost=None,
    )
    both = []
    for name, rate in (("a", 0.8), ("b", 0.83)):
        said = {0: (rng.random(n) > rate).astype(int)}
        rows = {"row_id": np.arange(n), "label": np.zeros(n, int), "group": np.arange(n)}
        both.append(write(tmp_path / name, replace(base, student=said, **rows)))
    one, other = (run.answers.hits[0].astype(float) for run in runs.read(both))
    expected = 2 * 1.96 * (other - one).std(ddof=1) / np.sqrt(n)
    found = table.Difference.model_validate(build(*both)["runs"][1]["accuracy"])
    assert found.value == pytest.approx((other - one).mean())
    assert width(found) == pytest.approx(expected, rel=4 * 0.022)
    assert (found.lo + found.hi) / 2 == pytest.approx(found.value, abs=4 * 0.06 * expected / 3.92)


def test_what_differs_is_said_by_its_dotted_key(first, second):
    changed = build(first, second)["runs"][1]["changes"]
    assert [comparison_text.change(c) for c in changed] == ["terms.valence.weight: - -> 0.5"]
    back = build(second, first)["runs"][1]["changes"]
    assert [comparison_text.change(c) for c in back] == ["terms.valence.weight: 0.5 -> -"]


def test_a_file_elsewhere_with_the_same_content_is_no_change(first, tmp_path):
    for name, data in (("a", b"same"), ("b", b"same"), ("c", b"other")):
        (tmp_path / f"{name}.safetensors").write_bytes(data)
    a, b, c = (
        write(tmp_path / n, world(RATES), teacher={"weights": str(tmp_path / f"{n}.safetensors")})
        for n in "abc"
    )
    made = build(a, b, c)["runs"]
    assert [[change["key"] for change in row["changes"]] for row in made] == [
        [],
        [],
        ["teacher.weights"],
    ]


def test_what_the_runs_do_not_share_is_warned_of(first, tmp_path):
    found = world(RATES, seeds=(0, 1, 2, 3))
    teacher = {"model": "series_encoder", "settings": {"width": 8}}
    keys = {"optim": {"steps": 40}, "data": {"label_fraction": 0.1}, "teacher": teacher}
    other = write(tmp_path / "other", replace(found, thriving=~found.thriving), **keys)
    warned = build(first, other)["warnings"]
    for text in (*comparison_text.DIFFERING.values(), comparison_text.UNLIKE, "different seeds"):
        assert any(text in line for line in warned), text
    assert build(first, write(tmp_path / "same", world(RATES)))["warnings"] == []


def test_a_first_run_without_a_teacher_is_held_against_all_the_same(second, tmp_path):
    bare = replace(
        world(RATES), teacher=None, control={}, thriving=None, store={}, training_cost=None
    )
    alone = write(
        tmp_path / "alone", bare, technique="none", terms={"ce": {}}, teacher=None, control=False
    )
    made = build(alone, second)
    assert made["thriving_of"] == second.name
    assert made["runs"][1]["thriving"]["value"] > 0
    assert made["runs"][0]["gap_closed"]["value"] is None
    assert "kd" in comparison_text.table(made)


def spoil(folder: Path, found: Evidence, how: str) -> None:
    """One fault in the run at `folder`."""
    match how:
        case "unfinished":
            (folder / "report.json").unlink()
        case "no run":
            (folder / "recipe.json").unlink()
        case "no answers":
            (folder / run_files.ANSWERS).unlink()
        case "damaged answers":
            (folder / run_files.ANSWERS).write_bytes(b"PAR1 and nothing more PAR1")
        case "damaged report":
            write_json(
                folder / "report.json", read_json(folder / "report.json") | {"seeds": "many"}
            )
        case "other students":
            answers.write(
                replace(found, student={0: found.label, 1: found.label, 2: found.label}), folder
            )
        case "other metric":
            made = read_json(folder / "report.json")
            made["student"]["metrics"] = {"nll": made["student"]["metrics"]["accuracy"]}
            write_json(folder / "report.json", made)
        case "other rows":
            write(folder, replace(found, row_id=found.row_id + 1), data={"stride": 16})
        case "other recordings":
            write(folder, replace(found, group=found.group // 2))
        case "other inputs":
            write(folder, replace(found, test_digest="0" * 64))


REFUSED = {
    "unfinished": (
        StoreError,
        "is not finished: it has no report.json; type: raykd run RECIPE --out",
    ),
    "no run": (StoreError, "is not a run folder"),
    "no answers": (StoreError, "type: raykd report RECIPE"),
    "damaged answers": (StoreError, "is damaged"),
    "damaged report": (StoreError, "another version of raykd: seeds"),
    "other students": (StoreError, "not of the same students"),
    "other metric": (DataError, "is measured by nll"),
    "other rows": (DataError, "data.stride = 8 there, 16 here"),
    "other recordings": (DataError, "not tested on the same rows"),
    "other inputs": (DataError, "not tested on the same rows"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_can_not_be_compared_is_refused(first, tmp_path, how):
    found = world(RATES)
    other = write(tmp_path / "other", found)
    spoil(other, found, how)
    kind, text = REFUSED[how]
    with pytest.raises(kind, match=re.escape(text)):
        runs.read([first, other])


def test_a_run_named_twice_and_no_folder_are_usage_errors(first, tmp_path):
    (tmp_path / "link").symlink_to(first)
    for other, text in (
        (first, "named twice"),
        (tmp_path / "link", "named twice"),
        (tmp_path / "x", "no folder"),
    ):
        with pytest.raises(RecipeError, match=text):
            runs.read([first, other])
    with pytest.raises(RecipeError, match="is a file"):
        runs.read([first, first / "recipe.json"])


def test_answers_survive_a_round_trip_without_unlabelled_rows(tmp_path):
    found = world(RATES)
    label = found.label.copy()
    label[:5] = -100
    answers.write(replace(found, label=label, artefact=found.teacher), tmp_path)
    back = answers.read(tmp_path)
    np.testing.assert_array_equal(back.row_id, found.row_id[5:])
    assert back.student.keys() == found.student.keys()
    for seed, said in back.student.items():
        np.testing.assert_array_equal(said, found.student[seed][5:])
    kept = set(pq.read_table(tmp_path / run_files.ANSWERS).column_names)
    assert {"teacher", "artefact", "control-2", "student-0"} <= kept


def test_rows_of_which_it_is_unknown_whether_they_thrive_are_in_no_part(tmp_path):
    found = world(RATES)
    thriving = found.thriving.astype(np.int8)
    thriving[:40] = -1
    found = replace(found, thriving=thriving)
    folders = [write(tmp_path / name / "few-11111111", found) for name in ("a", "b")]
    assert pq.read_table(folders[0] / run_files.ANSWERS).column("thriving").null_count == 40
    np.testing.assert_array_equal(answers.read(folders[0]).thriving, thriving)
    made = build(*folders)
    other = made["runs"][1]
    high = int((thriving == 1).sum())
    assert made["thriving_rows"] == other["thriving"]["n"] == other["random"]["n"] == high == 50
    assert other["rest"]["n"] == 150
    assert other["accuracy"]["n"] == 240


@pytest.mark.parametrize(
    "columns", [{"row_id": [1]}, {"row_id": [1], "label": ["a"], "group": [0]}]
)
def test_answers_of_other_columns_are_damaged(tmp_path, columns):
    pq.write_table(pa.table(columns), tmp_path / run_files.ANSWERS)
    with pytest.raises(StoreError, match="damaged"):
        answers.read(tmp_path)


def test_the_folder_is_whole_and_the_same_inputs_name_the_same_folder(first, second, tmp_path):
    made = compare.compare([first, second], tmp_path)
    (folder,) = tmp_path.iterdir()
    assert folder.name == f"compare-{made['digest'][:8]}"
    assert {path.name for path in folder.iterdir()} == {"compare.json", "compare.html"}
    assert read_json(folder / "compare.json") == made
    assert table.Comparison.model_validate(made).model_dump(mode="json", by_alias=True) == made
    page = (folder / "compare.html").read_bytes()
    assert compare.compare([first, second], tmp_path) == made
    assert (folder / "compare.html").read_bytes() == page
    compare.compare([second, first], tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_page_that_can_not_be_drawn_leaves_nothing(first, second, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison_page, "render", lambda made: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compare.compare([first, second], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_page_needs_no_network_and_names_are_text_never_markup(first, tmp_path):
    odd = ["<script>alert(1)<", '"><img src=x onerror=y>', "a$b$^{ & co", "\u4e2d\u6587"]
    others = [write(tmp_path / name, world(RATES), setting=f"<b>{name}") for name in odd]
    made = build(first, *others)
    html = comparison_page.render(made)
    seen = Page(html)
    assert seen.open == []
    assert not {tag for tag, _ in seen.seen} & {"script", "link", "iframe", "img", "object", "b>"}
    assert not any(k.startswith("on") for _, a in seen.seen for k in a)
    assert set(re.findall(r"https?://[^\s\"'<>]+", html)) <= {
        "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
    }  # fmt: skip
    assert "@import" not in html
    assert "url(" not in html.replace("url(#", "")
    for name in (first.name, *odd):
        assert name in seen.text
    ids = [a["id"] for _, a in seen.seen if "id" in a]
    assert len(ids) == len(set(ids))
    assert html.count("<svg") == 2


def test_the_table_fits_a_terminal_and_tells_every_run(first, second, tmp_path):
    third = write(
        tmp_path / "worse-33333333", world(RATES | {"student": 0.6}, seed=3), optim={"steps": 40}
    )
    made = build(first, second, third)
    text = comparison_text.table(made)
    assert max(map(len, text.splitlines())) <= 100
    for part in (
        first.name,
        second.name,
        third.name,
        "better",
        "worse",
        "terms.valence.weight: - -> 0.5",
    ):
        assert part in text
    assert (
        comparison_text.headline(made) == f"Of 2 runs held against {first.name}: 1 better, 1 worse"
    )


def test_artefacts_are_told_by_their_size_and_what_is_kept_at_it(first, tmp_path):
    whole = {"params": 10, "bytes": 40_000, "dtype": "F32"}
    folders = [first]
    for size, rate in ((1000, 0.9), (400, 0.8), (2000, 0.7)):
        told = {"path": "artefact", "format": "onnx ternary", "bytes": size}
        found = replace(world(RATES | {"student": rate}), teacher_info=whole, artefact_info=told)
        folders.append(write(tmp_path / f"of-{size}", found, optim={"steps": size}))
    made = build(*folders)
    assert [run["artefact_bytes"] for run in made["runs"]] == [None, 1000, 400, 2000]
    assert [run["compression"] for run in made["runs"]] == [None, 40, 100, 20]
    rows = comparison_text.sizes_by_run(made)
    assert [row[:3] for row in rows] == [
        ("of-1000", "1,000", "40x"),
        ("of-400", "400", "100x"),
        ("of-2000", "2,000", "20x"),
    ]
    assert all(row[1] in comparison_text.table(made) for row in rows)
    html = comparison_page.render(made)
    assert "What is kept, and how much smaller the file is" in html
    assert "of-2000" in html.split('id="frontier-')[-1]
    assert "frontier" not in comparison_page.render(
        build(first, write(tmp_path / "small", world(RATES)))
    )


def test_the_command_line_writes_where_out_says(first, second, tmp_path):
    done = raykd(tmp_path, "report", first, second, "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    made = json.loads(done.out)
    assert read_json(tmp_path / "out" / f"compare-{made['digest'][:8]}" / "compare.json") == made
    assert [run["name"] for run in made["runs"]] == [first.name, second.name]
    told = raykd(tmp_path, "report", first, second, "--out", tmp_path / "out")
    assert told.out.strip() == comparison_text.table(made)


def test_the_pipeline_compares_as_the_command_line_does(first, second, tmp_path):
    asked = [
        sys.executable,
        "-m",
        "pipelines.report",
        str(first),
        str(second),
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "+" in done.stdout
    assert len(list(tmp_path.glob("compare-*/compare.html"))) == 1


def test_exit_codes_of_what_is_refused(first, second, tmp_path):
    bad = write(tmp_path / "bad", world(RATES))
    (bad / "report.json").unlink()
    moved = write(tmp_path / "moved", replace(world(RATES), test_digest="0" * 64))
    asked = {
        (first, first): (2, "named twice"),
        (first,): (2, "is a folder"),
        (first, "nowhere"): (2, "no folder nowhere"),
        (first, "README.md"): (2, "is a file"),
        (first, second, "--smoke", "--set", "seeds=[1]"): (2, "--smoke, --set"),
        (first, bad): (3, "raykd run RECIPE"),
        (first, first.parent): (3, "not a run folder"),
        (first, moved): (3, "not tested on the same rows"),
    }
    for arguments, (code, text) in asked.items():
        done = raykd(tmp_path, "report", *arguments, "--out", tmp_path / "out")
        assert done.code == code, (arguments, done.err)
        assert text in done.err
        assert done.out == ""
        assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()
