"""Text classifiers of transformers as teachers and as students: read from a folder, cut to some of
its layers, and written as one. Stands against a head that is missing or of other classes, classes
in another order, and answers that padding moves.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentences
import torch
from torch import Tensor

from raykd import data, models
from raykd.data import Rows
from raykd.data.table import Held
from raykd.deploy import classifier_folder
from raykd.deploy.parity import EXACT
from raykd.errors import RecipeError
from raykd.models import hf_classifier
from raykd.models.adapter import Adapter
from raykd.recipe.tables import ModelRef, StudentRef
from raykd.stages.check import check_with_data
from raykd.stages.load import load, resolve
from raykd.training import predictions

transformers = pytest.importorskip("transformers")
TOKENS = 23
SHAPE = {"channels": 1, "classes": 3, "steps": 14, "tokens": TOKENS}
NAMES = dict(enumerate(sentences.CLASSES))
SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
KINDS: dict[str, dict[str, Any]] = {
    "bert": {**SMALL, "num_hidden_layers": 3, "max_position_embeddings": 32},
    "distilbert": {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32},
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 2, "pad_token_id": 0},
    "qwen2": {**SMALL, "num_hidden_layers": 3, "num_key_value_heads": 1, "pad_token_id": 0},
}


def folder_of(home: Path, kind: str, *, head: bool = True, **changes: Any) -> Path:
    """A folder of a random model, as transformers writes it."""
    settings = {"vocab_size": TOKENS, "id2label": NAMES} | KINDS[kind] | changes
    config = transformers.AutoConfig.for_model(kind, **settings)
    auto = transformers.AutoModelForSequenceClassification if head else transformers.AutoModel
    torch.manual_seed(0)
    model = auto.from_config(config)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value), alpha=0.2)
    path = home / f"{kind}-{len(list(home.iterdir()))}"
    model.save_pretrained(path)
    return path


def texts() -> tuple[Tensor, Tensor]:
    """Tokens (B, T, 1) and their mask, of texts of 2 to 14 tokens."""
    mask = torch.arange(14) < torch.tensor([14, 2, 9, 5])[:, None]
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, TOKENS, mask.shape, generator=draw)
    return torch.where(mask, tokens, 0)[..., None].int(), mask


def student_of(folder: Path, **own: Any) -> StudentRef:
    """The [student] of a recipe with `like = "teacher"`."""
    raw = {
        "data": {"source": str(folder.parent), "tokenizer": str(folder / "config.json")},
        "task": {"label": "class"},
        "teacher": {"model": "transformers", "weights": str(folder)},
        "student": {"like": "teacher", **own},
    }
    return resolve(raw).student


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_folder_teaches_is_cut_to_its_layers_and_is_a_folder_again(kind, tmp_path):
    folder = folder_of(tmp_path, kind)
    inputs, mask = texts()
    ref = ModelRef(model="transformers", weights=str(folder))
    teacher = Adapter(models.build_model(ref, **SHAPE, key="teacher")).eval()
    together = teacher(inputs, mask).logits[:, 0]
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    for row, valid, found in zip(inputs, mask, together, strict=True):
        alone = theirs(input_ids=row[valid, 0].long()[None]).logits[0]
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)

    ref = student_of(folder, layers=[0, 2])
    student = models.build_model(ref, **SHAPE, key="student").eval()
    assert isinstance(student, hf_classifier.TransformersClassifier)
    kept = dict(hf_classifier.layers_of(student.model)[1][-1].named_parameters())
    for name, value in hf_classifier.layers_of(theirs)[1][-1].named_parameters():
        torch.testing.assert_close(kept[name], value)
    answers = Adapter(student)(inputs, mask).logits[:, 0]
    assert (answers - together).abs().max() > 1e-3, "a layer less is another model"

    written = tmp_path / "written"
    written.mkdir()
    classifier_folder.write(student, written, sentences.CLASSES)
    rows = Rows(
        row_id=np.arange(4),
        inputs=inputs.numpy(),
        mask=mask.numpy(),
        label=np.zeros(4, np.int64),
        group=np.arange(4),
    )
    parity = classifier_folder.parity(written, rows, answers.numpy(), EXACT)
    assert parity["max_abs_diff"] < 1e-5
    config = transformers.AutoConfig.from_pretrained(written)
    assert config.num_hidden_layers == 2
    assert config.id2label == NAMES
    again = student_of(written)
    assert again.settings == ref.settings, "and it begins another student"


def refusal(ref: ModelRef, **shape: int) -> str:
    """Why a model is not built."""
    key = "student" if isinstance(ref, StudentRef) else "teacher"
    with pytest.raises(RecipeError) as refused:
        models.build_model(ref, **SHAPE | shape, key=key)
    return str(refused.value)


def test_what_does_not_fit_is_refused_by_its_key_before_any_work(tmp_path):
    bare = folder_of(tmp_path, "bert", head=False)
    teacher = ModelRef(model="transformers", weights=str(bare))
    assert f"teacher.weights: {bare} has no head that classifies" in refusal(teacher)
    whole = folder_of(tmp_path, "bert")
    teacher = ModelRef(model="transformers", weights=str(whole))
    told = refusal(teacher, classes=2)
    assert "answers with 3 classes (glad, plain, sad), and the data have 2" in told
    assert "knows 23 tokens, and the data's tokeniser 30" in refusal(teacher, tokens=30)
    several = folder_of(tmp_path, "bert", problem_type="multi_label_classification")
    teacher = ModelRef(model="transformers", weights=str(several))
    assert "has problem_type 'multi_label_classification'" in refusal(teacher)

    hf_classifier.check_names(whole, ["Glad", "plain", "sad"], "teacher")
    hf_classifier.check_names(whole, ["0", "1", "2"], "teacher")
    with pytest.raises(RecipeError, match=r"teacher\.weights: .* \['glad', 'plain', 'sad'\], and"):
        hf_classifier.check_names(whole, ["plain", "glad", "sad"], "teacher")
    for own, message in (
        (
            {"settings": {"hiden_size": 8}},
            r"student\.settings\.hiden_size: no key of 'bert'.*hidden_size",
        ),
        ({"settings": {"num_labels": 8}}, r"student\.settings\.num_labels: is what the data say"),
        ({"layers": [0, 3]}, r"student\.layers: 3 is not among the layers .*, 0 to 2"),
        ({"weights": str(whole)}, r"student\.weights: cannot be said beside like"),
    ):
        with pytest.raises(RecipeError, match=message):
            student_of(whole, **own)
    raw = {
        "data": {"source": str(tmp_path), "tokenizer": str(whole / "config.json")},
        "task": {"label": "class"},
        "student": {"model": "transformers", "settings": {"hidden_size": 8}},
    }
    with pytest.raises(RecipeError, match=r"student\.settings\.model_type: missing; write one"):
        resolve(raw)


def test_a_student_may_begin_without_a_head_or_from_settings_and_change_them(tmp_path):
    bare = folder_of(tmp_path, "bert", head=False)
    ref = student_of(bare, settings={"hidden_dropout_prob": 0.0})
    assert ref.settings["hidden_dropout_prob"] == 0
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        student: Any = models.build_model(ref, **SHAPE, key="student")
        assert student.config.hidden_dropout_prob == 0
        heads.append(student.model.classifier.weight)
    assert torch.equal(heads[0], heads[1]), "drawn by the seed"
    assert not torch.equal(heads[0], heads[2])
    raw = {"model_type": "distilbert", **KINDS["distilbert"]}
    student = models.build_model(
        StudentRef(model="transformers", settings=raw), **SHAPE, key="student"
    )
    assert student.config.vocab_size == TOKENS, "the tokeniser's"
    assert student.config.num_labels == 3


RECIPE = """
control = false
[data]
source = "./rows"
tokenizer = "./tokenizer.json"
window = 16
[task]
label = "class"
[teacher]
model = "transformers"
weights = "./teacher"
[student]
like = "teacher"
layers = [0]
[optim]
steps = 10
batch = 16
evaluate_every = 5
"""


def test_a_check_with_data_refuses_folders_of_other_classes_and_other_orders(tmp_path):
    sentences.write(tmp_path, sentences.rows(train=6, others=3))
    sentences.tokenizer(tmp_path)
    for name, named in (("teacher", "glad plain sad"), ("turned", "sad plain glad")):
        folder = folder_of(tmp_path, "bert", id2label=dict(enumerate(named.split())))
        folder.rename(tmp_path / name)
    folder_of(tmp_path, "bert", id2label=dict(enumerate("ab"))).rename(tmp_path / "two")
    folder_of(tmp_path, "gpt2", pad_token_id=None).rename(tmp_path / "unpadded")
    turned = RECIPE.replace("./teacher", "./turned")
    apart = RECIPE.replace('like = "teacher"', 'model = "transformers"\nweights = "./two"')
    unpadded = RECIPE.replace("./teacher", "./unpadded")
    for text, message in (
        (RECIPE, None),
        (
            unpadded,
            r"student: its model has no padding token, .* pad_token_id in student\.settings",
        ),
        (turned, r"teacher\.weights: .*turned has the classes \['sad', 'plain', 'glad'\], and the"),
        (apart, r"student\.weights: .*two answers with 2 classes \(a, b\), and the data have 3"),
    ):
        (tmp_path / "recipe.toml").write_text(text)
        recipe = load(tmp_path / "recipe.toml")
        source = Held(data.load(recipe.data, recipe.task))
        if message is None:
            check_with_data(recipe, source, tmp_path)
            continue
        with pytest.raises(RecipeError, match=message):
            check_with_data(recipe, source, tmp_path)


def test_twenty_lines_give_a_folder_that_transformers_reads_and_answers_equally(tmp_path):
    sentences.write(tmp_path, sentences.rows())
    sentences.tokenizer(tmp_path)
    folder_of(tmp_path, "bert").rename(tmp_path / "teacher")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    assert len(RECIPE.strip().splitlines()) <= 20
    recipe = load(tmp_path / "recipe.toml")
    walked = sentences.walk(recipe, tmp_path / "runs")
    assert walked.manifest["format"] == "onnx fp32"
    assert walked.manifest["parity"]["agreement"] == 1
    artefact = walked.folder / "artefact"
    assert (artefact / "README.md").read_text().startswith("---\nlibrary_name: transformers\n")
    tokenizer = transformers.AutoTokenizer.from_pretrained(artefact)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(artefact).eval()
    said = [row["text"] for row in sentences.rows() if row["split"] == "test"]
    given = tokenizer(said, padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = model(given["input_ids"], attention_mask=given["attention_mask"]).logits.numpy()
    path = walked.folder / "arms" / "student-0" / "predictions.parquet"
    trained = predictions.read(path).logits
    assert trained is not None
    np.testing.assert_allclose(logits, trained, atol=1e-5)
    assert list(model.config.id2label.values()) == list(sentences.CLASSES)
