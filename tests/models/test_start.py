"""A student that begins as another model, or as some of its layers: it answers as that model does
without the other layers, and what cannot be is refused before any work.
"""

import copy
from pathlib import Path
from typing import Any

import folders
import pytest
import texts
import torch
from digests import recipe_digest
from safetensors.torch import save_file
from torch import nn

from raykd import data, models
from raykd.deploy import text_artefact
from raykd.errors import RecipeError
from raykd.models import hf_folder, start
from raykd.models.llama import Llama
from raykd.models.series_encoder import SeriesEncoder
from raykd.recipe.tables import StudentRef
from raykd.stages.load import resolve
from raykd.training.arm import World
from raykd.training.run_arms import run_arms

SETTINGS = {"width": 32, "layers": 4, "heads": 4, "kv_heads": 2, "inner": 48}
SHAPE = {"channels": 2, "classes": 60, "steps": 24}
TOKENS = torch.randint(60, (3, 24), generator=torch.Generator().manual_seed(1))


def loud(module: nn.Module) -> nn.Module:
    """Weights so large that each layer matters."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(6) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    return module.eval()


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory) -> Path:
    """A Llama of four layers, with eight columns of padding."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llama")
    hf_folder.write(loud(Llama(classes=68, steps=40, tied=request.param, **SETTINGS)), path)
    return path


def student_of(folder: Path, layers: list[int] | None) -> Llama:
    raw = {"model": "llama", "weights": str(folder)}
    raw |= {"layers": layers} if layers else {}
    table, problems = start.resolved(raw, {})
    assert problems == []
    ref = StudentRef.model_validate(table)
    return models.build_model(ref, **SHAPE, key="student").eval()


@pytest.mark.parametrize("layers", [None, [0, 1, 2, 3], [0, 3], [2]])
def test_a_student_answers_as_the_model_without_the_other_layers(folder, layers):
    whole = hf_folder.read(folder)
    cut = copy.deepcopy(whole)
    if layers:
        cut.model.layers = nn.ModuleList(whole.model.layers[n] for n in layers)
    expected = cut(TOKENS)["logits"][..., :60]
    student = student_of(folder, layers)
    assert student.settings["layers"] == len(layers or SETTINGS["layers"] * [0])
    torch.testing.assert_close(student(TOKENS)["logits"], expected, rtol=0, atol=0)
    assert (len(layers or []) in (0, 4)) == torch.equal(
        student(TOKENS)["logits"], whole(TOKENS)["logits"][..., :60]
    )


def test_layers_of_a_file_are_kept_too(tmp_path):
    torch.manual_seed(0)
    shape = {"channels": 3, "classes": 5, "steps": 16}
    sizes = {"width": 16, "layers": 3, "heads": 2}
    whole = loud(SeriesEncoder(**shape, **sizes))
    save_file(models.weights_of(whole), tmp_path / "w.safetensors")
    ref = StudentRef(
        weights=str(tmp_path / "w.safetensors"), settings=sizes | {"layers": 2}, layers=[0, 2]
    )
    student = models.build_model(ref, **shape, key="student").eval()
    del whole.blocks[1]
    rows = torch.randn(2, 16, 3)
    torch.testing.assert_close(student(rows), whole(rows), rtol=0, atol=0)
    gone = ref.model_copy(update={"layers": [0, 3]})
    with pytest.raises(RecipeError, match=r"student\.layers: 3 is not among .* 0 to 2"):
        models.build_model(gone, **shape, key="student")


def raw_of(home: Path, **student: Any) -> dict[str, Any]:
    raw = folders.load(home).model_dump(mode="json", exclude={"scale", "track"})
    return raw | {"student": student}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return folders.home(tmp_path_factory.mktemp("home"))


def test_a_student_like_its_teacher_is_one_that_names_its_folder(home):
    like = resolve(raw_of(home, like="teacher", layers=[0]))
    named = resolve(raw_of(home, model="llama", weights=str(home / "wide"), layers=[0]))
    assert like.student == named.student
    assert like.student.settings["layers"] == 1
    assert not {"classes", "steps"} & like.student.settings.keys()
    assert recipe_digest(like) == recipe_digest(named)
    assert resolve(like.model_dump(mode="json")) == like


REFUSED = {
    "a model of its own": ({"like": "teacher", "model": "llama"}, "student.model", "leave one out"),
    "settings of its own": (
        {"like": "teacher", "settings": {"width": 8}},
        "student.settings",
        "leave one out",
    ),
    "no such layer": (
        {"like": "teacher", "layers": [0, 7]},
        "student.layers",
        "7 is not among the layers of student.weights",
    ),
    "an order": (
        {"like": "teacher", "layers": [1, 0]},
        "student.layers",
        "each must be above the one before it",
    ),
    "no layer": ({"like": "teacher", "layers": []}, "student.layers", "at least 1 item"),
    "another word": ({"like": "me"}, "student.like", "'teacher'"),
    "nothing to keep": (
        {"model": "llama", "settings": {"layers": 1}, "layers": [0]},
        "student.layers",
        "name these, or leave it out",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_a_student_cannot_begin_as_is_refused(fault, home):
    student, key, words = REFUSED[fault]
    with pytest.raises(RecipeError) as caught:
        resolve(raw_of(home, **student))
    told = {problem.key: problem.message for problem in caught.value.problems}
    assert words in told[key]


def test_a_count_of_other_layers_and_a_teacher_that_is_not_there_are_refused(home):
    file = {"model": "llama", "weights": str(home / "narrow.safetensors")}
    with pytest.raises(RecipeError, match=r"settings\.layers: 3, but student\.layers keeps 1"):
        resolve(raw_of(home, **file, settings={"layers": 3}, layers=[0]))
    alone = raw_of(home, like="teacher") | {"teacher": None, "technique": "none"}
    del alone["terms"]
    with pytest.raises(RecipeError, match=r"student\.like: .* no \[teacher\] with weights"):
        resolve(alone)


def test_a_folder_too_small_for_the_data_is_refused(folder):
    table, _ = start.resolved({"model": "llama", "weights": str(folder)}, {})
    ref = StudentRef.model_validate(table)
    with pytest.raises(RecipeError, match="knows 68 tokens, and the data's tokeniser 70"):
        models.build_model(ref, channels=2, classes=70, steps=24, key="student")
    with pytest.raises(RecipeError, match=r"reads at most 40 tokens; lower data\.window"):
        models.build_model(ref, channels=2, classes=60, steps=41, key="student")


def test_a_student_like_its_teacher_trains_and_is_shipped(home, tmp_path):
    """Before its first step it is its teacher, so little training leaves it near."""
    raw = raw_of(home, like="teacher") | {"technique": "none", "control": False}
    del raw["terms"]
    raw["optim"] |= {"steps": 2, "learning_rate": 1e-6, "evaluate_every": 1, "warmup": 0}
    recipe = resolve(raw)
    run_arms(
        recipe, None, tmp_path, world=World(), device=torch.device("cpu"), report=lambda *_: None
    )
    dataset = data.load(recipe.data)
    manifest = text_artefact.export(recipe, dataset, tmp_path)
    assert manifest["parity"]["agreement"] == 1
    teacher = models.build_model(recipe.teacher, **dataset.shape, key="teacher")
    student = models.build_model(recipe.student.bare, **dataset.shape, key="student")
    weights = next(tmp_path.glob("arms/student-*/weights.safetensors"))
    models.load_weights(student, weights, "student")
    rows = torch.randint(len(dataset.classes), (2, texts.STEPS))
    with torch.no_grad():
        found = student(rows)["logits"]
        expected = teacher(rows)["logits"][..., : len(dataset.classes)]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
