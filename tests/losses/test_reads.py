"""What a recipe reads of a teacher's store, and that all who ask are told the same."""

from pathlib import Path

import pytest
import stored
import torch

from raykd.errors import StoreError
from raykd.losses.reads import reads_of, stored_for
from raykd.losses.weighting import RowWeights
from raykd.recipe.tables import Weighting
from raykd.reports.gather import _asks_valence
from raykd.stages.load import resolve
from raykd.stages.plan import _disk
from raykd.stages.run_folder import RunFolder
from raykd.training.arms import arms_of
from raykd.training.run_arms import ArmRunner

CPU = torch.device("cpu")
ESS = {"mode": "ess", "boost": 2.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return stored.write(tmp_path_factory.mktemp("stored"))


def recipe_of(folder: Path, **tables):
    teacher = {"weights": str(folder / "teacher.safetensors"), "settings": {"width": 8}}
    raw = {"technique": "none", "teacher": teacher, "data": {"source": str(folder / "rows")}}
    return resolve(raw | tables)


def test_weights_of_rows_are_read_where_no_term_reads(folder, tmp_path):
    plain = recipe_of(folder)
    weighted = recipe_of(folder, weighting=ESS)
    assert reads_of(plain) == set()
    assert reads_of(recipe_of(folder, weighting={"mode": "uniform"})) == set()
    assert reads_of(weighted) == stored_for(weighted) == {"saliency"}
    assert RunFolder(plain, tmp_path).store is None
    assert RunFolder(weighted, tmp_path).store is not None
    assert _asks_valence(weighted)
    assert _disk(RunFolder(plain, tmp_path), False) == {"store": 0, "cache": 0}
    disk = _disk(RunFolder(weighted, tmp_path), False)
    assert disk["cache"] == disk["store"] > 0


@pytest.mark.parametrize(
    ("key", "values", "signals"),
    [
        ("terms.kd.weight", [0.0, 0.5], {"logits"}),
        ("weighting.boost", [0.0, 2.0], {"saliency"}),
        ("optim.learning_rate", [1e-3, 1e-2], set()),
    ],
)
def test_a_store_is_there_for_what_a_trial_reads(folder, tmp_path, key, values, signals):
    """Without it the trials had no teacher."""
    found = recipe_of(folder, search={key: {"choice": values}})
    assert reads_of(found) == set()
    assert stored_for(found) == signals
    assert (RunFolder(found, tmp_path).store is not None) == bool(signals)


def test_a_training_of_labels_alone_is_weighed(folder):
    """It was trained as if [weighting] were not there."""
    optim = {"steps": 6, "batch": 16, "evaluate_every": 6}
    trained = {}
    for mode in ("ess", "uniform", None):
        table = {"technique": "none", "terms": {"ce": {}}, "optim": optim}
        table |= {"weighting": {"mode": mode, "boost": 4.0}} if mode else {}
        recipe, store = stored.scored(folder, "fp16", **table)
        assert list(recipe.terms) == ["ce"]
        runner = ArmRunner(recipe, store.folder, CPU)
        student = next(arm for arm in arms_of(recipe) if arm.name == "student")
        state = runner.train_arm(student, runner.student(student))
        assert ("weights" in state.history[-1]) == (mode is not None)
        trained[mode] = state.learner.student.module.state_dict()["head.weight"]
    assert not torch.equal(trained["ess"], trained["uniform"])
    assert not torch.equal(trained["uniform"], trained[None]), "rows weigh alike, not steps"


def test_weights_need_a_saliency_unless_all_are_1():
    assert RowWeights.of(None, None) is None
    uniform = RowWeights.of(None, Weighting(mode="uniform"))
    assert uniform is not None
    weight, spread = uniform(torch.arange(5).numpy(), slice(1, 4))
    assert weight.tolist() == [1, 1, 1]
    assert spread.ess == 1
    with pytest.raises(StoreError, match="holds no saliency"):
        RowWeights.of(None, Weighting())
