"""Laws of the figures that count each class alike: a frequent class cannot carry the rare ones."""

import json

import arm_records
import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from raykd.cli import cli
from raykd.recipe.digest import recipe_identity
from raykd.recipe.recipe import Recipe
from raykd.reports import bootstrap, class_rates, sentences
from raykd.reports.bootstrap import Hits
from raykd.reports.evidence import Evidence, build
from raykd.stages import walk
from raykd.training.arms import best_seed
from raykd.training.tally import Tally

CLASSES = [f"often {i}" for i in range(6)] + [f"rare {i}" for i in range(6)]
PLAIN = "none"


def rates_by_hand(label, answer):
    """(macro-F1, balanced accuracy), class by class from precision and recall."""
    scores = []
    recalls = []
    for name in sorted(set(label)):
        right = sum(1 for a, b in zip(label, answer, strict=True) if a == b == name)
        recall = right / list(label).count(name)
        precision = right / list(answer).count(name) if right else 0
        scores.append(2 * precision * recall / (precision + recall) if right else 0)
        recalls.append(recall)
    return float(np.mean(scores)), float(np.mean(recalls))


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    """Six classes of 15 % and six of 1.5 %; the student loses half of the rare ones, and answers a
    frequent class there.
    """
    rng = np.random.default_rng(0)
    label = np.concatenate([np.repeat(np.arange(6), 150), np.repeat(np.arange(6, 12), 15)])
    group = rng.permutation(len(label)) // 5

    def answers(kept):
        lost = (label >= 6) & (rng.random(len(label)) > kept)
        return np.where(lost, label - 6, label)

    return Evidence(
        recipe_digest="3f9a" * 16,
        technique="vanilla",
        seeds=[0, 1, 2],
        data_name="faults",
        data_rows={"train": 10, "val": 10, "test": len(label)},
        classes=CLASSES,
        label=label,
        group=group,
        teacher=label.copy(),
        student={seed: answers(0.5) for seed in range(3)},
        control={seed: answers(0.2) for seed in range(3)},
        artefact=answers(0.5),
    )


@pytest.fixture(scope="module")
def made(evidence):
    return build(evidence)


def test_the_figures_are_those_of_precision_and_recall(made, evidence):
    by_seed = [rates_by_hand(evidence.label, p) for p in evidence.student.values()]
    metrics = made["student"]["metrics"]
    for name, values in zip(class_rates.NAMES, zip(*by_seed, strict=True), strict=True):
        assert metrics[name]["value"] == pytest.approx(np.mean(values))
        assert metrics[name]["lo"] < metrics[name]["value"] < metrics[name]["hi"]
        assert made["teacher"]["metrics"][name]["value"] == 1
        assert made["kept"][name]["value"] == pytest.approx(np.mean(values))
        assert name in made["control"]["metrics"]
        assert name in made["artefact"]["metrics"]
        assert made["gains"][name]["lo"] > 0


def test_accuracy_alone_hides_what_rare_classes_lose(made):
    assert made["retention"]["all"]["value"] > 0.95
    assert made["kept"]["balanced_accuracy"]["value"] < 0.85
    (warning,) = [w for w in made["warnings"] if w.startswith("classes that keep less than 80 %")]
    assert "'rare 0'" in warning
    assert "(15 rows)" in warning
    assert "often" not in warning
    text = sentences.table(made)
    assert "kept, macro-F1" in text
    assert max(map(len, text.splitlines())) <= 100


def test_many_lost_classes_are_counted_not_listed():
    rows = [{"name": f"c{i}", "rows": 9, "teacher": 1.0, "student": 0.1} for i in range(40)]
    (warning,) = sentences.lost_classes(rows)
    assert "'c5' 10 % (9 rows) and 34 more" in warning
    fine = [{"name": "a", "rows": 9, "teacher": 0.0, "student": 0.0}]
    fine.append({"name": "b", "rows": 0, "teacher": None, "student": None})
    assert sentences.lost_classes(fine) == []


def test_the_draws_are_those_of_the_accuracy(evidence):
    """Where every class has equally many rows in every recording, balanced accuracy is accuracy."""
    rng = np.random.default_rng(1)
    label = np.tile(np.arange(4), 30)
    group = np.repeat(np.arange(30), 4)
    arms = {
        "student": {s: np.where(rng.random(120) < 0.7, label, 0) for s in (0, 1, 2)},
        "control": {s: np.where(rng.random(120) < 0.5, label, 0) for s in (1, 2, 5)},
        "teacher": {0: np.where(rng.random(120) < 0.9, label, 0)},
    }
    hits = Hits(
        groups=group,
        student=np.stack(list(arms["student"].values())) == label,
        student_seeds=(0, 1, 2),
        control=np.stack(list(arms["control"].values())) == label,
        control_seeds=(1, 2, 5),
        teacher=arms["teacher"][0] == label,
    )
    wanted = bootstrap.resample(hits, num=200)
    balanced = class_rates.samples(label, group, arms, num=200)["balanced_accuracy"]
    for name in arms:
        np.testing.assert_allclose(getattr(balanced, name), getattr(wanted, name))
    assert balanced.artefact is None


def macro_f1(label: NDArray[np.integer], answer: NDArray[np.integer]) -> float:
    """What training measures, by its sums."""
    tally = Tally(classes=len(CLASSES))
    tally.add(0, label, answer, np.zeros(len(label), np.float32), None)
    return tally.metrics()["macro_f1"]


def test_a_class_without_a_row_in_a_resample_is_left_out_of_it():
    label = np.array([0] * 20 + [1])
    answer = label.copy()
    sample = class_rates.samples(label, np.arange(21), {"student": {0: answer}}, num=100)
    for name in class_rates.NAMES:
        np.testing.assert_array_equal(sample[name].student, np.ones(101))


def test_a_class_that_is_only_answered_does_not_count():
    label = np.array([0, 0, 1, 1])
    answer = np.array([0, 7, 1, 1])
    found = class_rates.samples(label, np.arange(4), {"student": {0: answer}}, num=10)
    wanted = rates_by_hand(label, answer)
    assert [found[name].student[0] for name in class_rates.NAMES] == pytest.approx(wanted)
    assert macro_f1(label, answer) == pytest.approx(wanted[0])


def test_training_measures_the_same_macro_f1(evidence, made):
    hidden = np.append(evidence.label, -100)
    by_seed = [macro_f1(hidden, np.append(p, 3)) for p in evidence.student.values()]
    assert np.mean(by_seed) == pytest.approx(made["student"]["metrics"]["macro_f1"]["value"])
    assert np.isnan(macro_f1(np.array([-100]), np.array([0])))


@pytest.mark.parametrize(("select", "seed"), [("accuracy", 0), ("macro_f1", 1)])
def test_the_best_seed_is_that_of_the_selected_metric(select, seed, tmp_path):
    recipe = Recipe(technique=PLAIN, terms={"ce": {}}, seeds=[0, 1], select=select)
    metrics = [
        {"val_accuracy": 0.9, "val_macro_f1": 0.5},
        {"val_accuracy": 0.8, "val_macro_f1": 0.7},
    ]
    for number, values in enumerate(metrics):
        arm_records.write(tmp_path, "student", number, values)
    assert best_seed(recipe, tmp_path) == seed


def test_training_ends_with_the_accuracy_of_every_arm(tmp_path, monkeypatch, capfd):
    recipe = tmp_path / "teacher.toml"
    recipe.write_text('technique = "none"\ncontrol = false\n')
    arm_records.write(tmp_path / "run", "student", 0, {"val_accuracy": 0.875})
    monkeypatch.setattr(walk, "train", lambda *_, **__: tmp_path / "run")
    done = CliRunner().invoke(cli, ["train", str(recipe)])
    assert done.exit_code == 0
    assert capfd.readouterr().out == f"student-0: validation accuracy 0.875\n{tmp_path / 'run'}\n"
    CliRunner().invoke(cli, ["train", str(recipe), "--json"])
    assert json.loads(capfd.readouterr().out)["val_accuracy"] == {"student-0": 0.875}


def test_a_selection_by_accuracy_leaves_digests_as_they_were():
    plain = recipe_identity(Recipe(technique=PLAIN, terms={"ce": {}}))
    assert "select" not in plain
    by_f1 = recipe_identity(Recipe(technique=PLAIN, terms={"ce": {}}, select="macro_f1"))
    assert by_f1 == plain | {"select": "macro_f1"}
