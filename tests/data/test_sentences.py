"""Texts with one label each: the rows they become, what is refused before any work, and that
padding moves no answer. Stands against texts that lose their end, labels that go astray, models
that read padding, and a task that is silently another.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import by_hand
import numpy as np
import pytest
import sentences
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from raykd import data
from raykd.data import Dataset
from raykd.data.table import Held
from raykd.deploy import own_script
from raykd.errors import DataError, RecipeError
from raykd.losses.shared_terms import kd
from raykd.models.adapter import Adapter
from raykd.recipe.digest import recipe_identity
from raykd.recipe.recipe import Recipe
from raykd.recipe.tables import DataRef, Task
from raykd.stages.check import check_with_data
from raykd.stages.load import resolve
from raykd.store.reader import Store
from raykd.targets import UNLABELLED
from raykd.training import predictions
from raykd.training.device_rows import to_device

TESTS = Path(__file__).parents[1]
CLASS = Task(label="class")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder of rows, a tokeniser, and a teacher of random weights that is far from uniform."""
    folder = tmp_path_factory.mktemp("sentences")
    sentences.write(folder, sentences.rows())
    tokens = Tokenizer.from_file(str(sentences.tokenizer(folder))).get_vocab_size()
    torch.manual_seed(1)
    teacher = sentences.Bag(classes=3, tokens=tokens, width=32)
    teacher.head.weight.data.mul_(20)
    save_file(teacher.state_dict(), folder / "teacher.safetensors")
    return folder


@pytest.fixture
def recipe_of(home, monkeypatch):
    """A function that gives the recipe of the folder with some tables changed."""
    monkeypatch.chdir(TESTS)

    def recipe(**changes: Any) -> Recipe:
        raw: dict[str, Any] = {
            "data": {
                "source": str(home / "rows"),
                "tokenizer": str(home / "tokenizer.json"),
                "window": sentences.WINDOW,
            },
            "task": {"label": "class"},
            "teacher": {
                "model": "sentences:Bag",
                "weights": str(home / "teacher.safetensors"),
                "settings": {"width": 32},
            },
            "student": {"model": "sentences:Bag"},
            "terms": {"kd": {"temperature": 2.0}, "ce": {}},
            "store": {"rows_per_shard": 32},
            "optim": {"steps": 20, "batch": 16, "evaluate_every": 10},
        }
        for key, table in changes.items():
            raw[key] = raw.get(key, {}) | table if isinstance(table, dict) else table
        return resolve(raw)

    return recipe


def load(folder: Path, home: Path, **settings: Any) -> Dataset:
    ref = {"source": str(folder), "tokenizer": str(home / "tokenizer.json"), "window": 16}
    return data.load(DataRef.model_validate(ref | settings), CLASS)


def test_a_text_is_a_row_of_what_its_tokeniser_says_with_its_class(home):
    found = load(home / "rows", home)
    assert found.classes == ("glad", "plain", "sad")
    assert found.shape == {"channels": 1, "classes": 3, "steps": 14, "tokens": 23}
    tokenizer = Tokenizer.from_file(str(home / "tokenizer.json"))
    split = found.splits["test"]
    for i, row in enumerate(row for row in sentences.rows() if row["split"] == "test"):
        ids = split.inputs[i, split.mask[i], 0].tolist()
        assert ids == tokenizer.encode(row["text"]).ids
        assert found.classes[split.label[i]] == row["label"]
    assert not split.inputs[~split.mask].any()


def test_a_long_text_is_cut_between_what_the_tokeniser_puts_around_it_and_that_is_told(home):
    found = load(home / "rows", home, window=6)
    train = found.splits["train"]
    last = train.inputs[np.arange(len(train)), train.mask.sum(1) - 1, 0]
    assert (train.inputs[:, 0, 0] == 2).all(), "[CLS]"
    assert (last == 3).all(), "[SEP]"
    lengths = [len(row["text"].split()) for row in sentences.rows()]
    cut = sum(length + 2 > 6 for length in lengths)
    assert f"{cut} of {len(lengths)} texts cut to data.window = 6 tokens" in found.cautions
    with pytest.raises(RecipeError, match=r"data\.window: 2, but the tokeniser puts 2 tokens"):
        load(home / "rows", home, window=2)


def test_all_but_its_inputs_is_what_a_series_with_these_labels_becomes(home, tmp_path):
    """Split, class, group, hidden labels and row ids come of one code path."""
    rows = sentences.rows()
    for number, row in enumerate(rows):
        row |= {"group": f"g{number % 7}", "label": None if number % 10 == 1 else row["label"]}
    texts = load(
        sentences.write(tmp_path, rows), home, columns={"group": "group"}, label_fraction=0.5
    )
    tokenizer = Tokenizer.from_file(str(home / "tokenizer.json"))
    for row in rows:
        row["inputs"] = [[float(i)] for i in tokenizer.encode(row.pop("text")).ids]
    (tmp_path / "series").mkdir()
    series = data.load(
        DataRef.model_validate(
            {
                "source": str(sentences.write(tmp_path / "series", rows)),
                "columns": {"group": "group"},
                "label_fraction": 0.5,
            }
        )
    )
    assert texts.classes == series.classes
    for name, split in texts.splits.items():
        for key, values in vars(split).items():
            expected = getattr(series.splits[name], key)
            if values is None:
                assert expected is None
            else:
                np.testing.assert_array_equal(values, expected, err_msg=f"{name}.{key}")
    assert (texts.splits["train"].label == UNLABELLED).sum() > 20


def test_empty_texts_are_unfit_and_other_things_are_named_by_their_row(home, tmp_path):
    rows = sentences.rows()
    rows[3]["text"] = "  "
    found = load(sentences.write(tmp_path, rows), home, max_unfit=0.05)
    assert [(one.row, one.why) for one in found.unfit] == [(3, "has an empty text")]
    assert 3 not in found.splits["train"].row_id
    with pytest.raises(DataError, match="row 3 has an empty text"):
        load(tmp_path / "rows", home, max_unfit=0)
    rows[4]["text"] = None  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match=r"text of row 4 is None, not text"):
        load(sentences.write(tmp_path, rows), home)


def test_json_lines_are_the_same_rows(home, tmp_path):
    lines = [json.dumps(row) for row in sentences.rows()]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    assert load(tmp_path, home).digest == load(home / "rows", home).digest


def test_labels_beside_texts_want_a_task(home):
    ref = DataRef(source=str(home / "rows"), tokenizer=str(home / "tokenizer.json"))
    with pytest.raises(RecipeError, match=r'write \[task\] label = "class" to classify texts'):
        data.load(ref)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {"label": "next"}, "data": {"tokenizer": None}}, r'task\.label: "next" is of'),
        ({"drafter": {}}, r'drafter: serves task\.label = "next", and here it is "class"'),
        ({"source": {}}, r'source: serves task\.label = "next"'),
        ({"terms": {"gkd": {}}, "source": {}}, r"terms\.gkd: reads what the student writes"),
        ({"data": {"source": "python_library"}}, r"data\.source: python_library has no texts"),
        ({"optim": {"order": "blocks"}}, r'optim\.order: "blocks", but texts with a class'),
        ({"student": {"model": "llama"}}, r'student\.model: "llama" is of next tokens'),
        ({"student": {"model": "series_encoder"}}, r'student\.model: "series_encoder" is of ser'),
        ({"teacher": {"weights": str(TESTS)}}, r"teacher\.model: .* is a folder, which is read"),
        (
            {"data": {"columns": {"prompt": "a", "completion": "b"}}},
            r"data\.columns\.prompt: of language models",
        ),
    ],
)
def test_what_does_not_serve_the_task_is_refused_by_its_key(recipe_of, changes, message):
    with pytest.raises(RecipeError, match=message):
        recipe_of(**changes)


def test_a_form_of_other_rows_is_refused_by_its_key(recipe_of, tmp_path):
    recipe = recipe_of(export={"stream": True, "pte": True})
    with pytest.raises(RecipeError) as refused:
        check_with_data(recipe, Held(data.load(recipe.data, CLASS)), tmp_path)
    assert {problem.key for problem in refused.value.problems} == {"export.stream", "export.pte"}


def test_a_model_that_reads_padding_is_refused_by_its_key(recipe_of, tmp_path):
    for key in ("student", "teacher"):
        recipe = recipe_of(**{key: {"model": "sentences:Leaking"}})
        with pytest.raises(RecipeError, match=rf"{key}\.model: Leaking: answers a row of 5 steps"):
            check_with_data(recipe, Held(data.load(recipe.data, CLASS)), tmp_path)
    recipe = recipe_of()
    check_with_data(recipe, Held(data.load(recipe.data, CLASS)), tmp_path)


def test_the_default_of_the_task_is_in_no_digest(recipe_of):
    assert "task" not in recipe_identity(resolve({"technique": "none"}))
    assert recipe_identity(recipe_of())["task"] == {"label": "class"}


def test_padding_moves_no_answer_and_a_teacher_diverges_from_itself_by_nothing(
    recipe_of, home, tmp_path
):
    recipe = recipe_of()
    store = Store(by_hand.score(recipe, tmp_path))
    dataset = data.load(recipe.data, CLASS)
    rows = to_device(
        dataset.splits["test"], "test", store, frozenset({"logits"}), torch.device("cpu")
    )
    batch = rows.batch(torch.arange(len(rows.label)))
    assert batch.document is None
    teacher = Adapter(by_hand.scorer_of(recipe)[0].teacher.module).eval()
    with torch.inference_mode():
        together = teacher(batch.inputs, batch.mask)
        for i, mask in enumerate(batch.mask):
            alone = teacher(batch.inputs[i : i + 1, mask], mask[mask][None])
            torch.testing.assert_close(alone.logits[0], together.logits[i], atol=1e-5, rtol=0)
        divergence = kd(together, batch, temperature=1.0)
    assert batch.teacher is not None
    stored = batch.teacher.logits.float()
    torch.testing.assert_close(stored, together.logits, atol=2e-2, rtol=1e-3)
    assert divergence.value.abs().max() < 1e-5, "but for what a stored logit is rounded by"


def test_such_a_recipe_goes_through_all_stages_and_run_py_answers_texts(recipe_of, tmp_path):
    walked = sentences.walk(recipe_of(control=False), tmp_path)
    metrics = walked.report["student"]["metrics"]
    assert metrics.keys() >= {"accuracy", "macro_f1"}
    assert metrics["accuracy"]["lo"] <= metrics["accuracy"]["value"] <= metrics["accuracy"]["hi"]
    assert walked.manifest["parity"]["agreement"] == 1
    artefact = walked.folder / "artefact"
    texts = [row["text"] for row in sentences.rows() if row["split"] == "test"]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    said = own_script.run(artefact, tmp_path / "texts.txt", limit_s=60)
    answers = predictions.read(walked.folder / "arms" / "student-0" / "predictions.parquet").answer
    classes = [line.partition("\t")[0] for line in said.splitlines()]
    assert classes == [sentences.CLASSES[answer] for answer in answers]
    (tmp_path / "none.txt").touch()
    script = artefact / "run.py"
    command = [sys.executable, script, tmp_path / "none.txt", "--logits", tmp_path / "none.npy"]
    subprocess.run(command, check=True, timeout=60)
    assert np.load(tmp_path / "none.npy").shape == (0, len(sentences.CLASSES))
