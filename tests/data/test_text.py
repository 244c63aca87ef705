"""Laws of text as rows: what is told, from what, and what is refused; then a small walk from a
teacher to a report.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import texts
import torch
from digests import recipe_digest
from hypothesis import given
from hypothesis import strategies as st
from texts import END, STEPS, sentence
from tokenizers import Tokenizer

from raykd import data
from raykd import models as ours
from raykd.data import python_library, text
from raykd.data.vocabulary import check_digest
from raykd.errors import DataError, RecipeError
from raykd.losses.objective import Objective
from raykd.losses.terms import wants_of
from raykd.models.adapter import Adapter
from raykd.models.llama import Llama
from raykd.models.weights import fill
from raykd.recipe.tables import DataRef, TermSpec
from raykd.stages import walk
from raykd.stages.load import load
from raykd.stages.run_folder import RunFolder
from raykd.store.reader import Store
from raykd.targets import UNLABELLED
from raykd.training import predictions
from raykd.training.device_rows import to_device

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return texts.tokenizer(tmp_path_factory.mktemp("tokenizer"))


def ref(tokenizer: Path, **settings) -> DataRef:
    return DataRef(source="./x", tokenizer=str(tokenizer), end=END, window=STEPS, **settings)


def records(**more) -> list[dict]:
    splits = ["train"] * 8 + ["val"] * 2 + ["test"] * 3
    return [
        {"split": s, "group": i, "text": sentence(i, 3 + 5 * i)} | more
        for i, s in enumerate(splits)
    ]


documents = st.lists(st.integers(2, 40), min_size=1, max_size=12)


@given(documents, st.integers(1, 12), st.booleans())
def test_every_token_but_a_documents_first_is_told_once_from_its_own_document(
    lengths, steps, shared
):
    numbered = np.split(np.arange(sum(lengths), dtype=np.int32), np.cumsum(lengths)[:-1])
    rows = text.laid_out(
        [text.Document(t) for t in numbered], steps, shared=shared, whole=False, first_id=0
    )
    np.testing.assert_array_equal(rows.label[rows.mask], np.concatenate([t[1:] for t in numbered]))
    np.testing.assert_array_equal(
        rows.inputs[rows.mask][:, 0], np.concatenate([t[:-1] for t in numbered])
    )
    assert (rows.label[~rows.mask] == UNLABELLED).all()
    starts = (rows.inputs[..., 1] == 0) & rows.mask
    first = {int(t[0]) for t in numbered}
    cut = {int(row[0]) for row in rows.inputs[..., 0]}  # the first of a row
    assert {int(t) for t in rows.inputs[..., 0][starts]} <= first | cut
    assert first <= {int(t) for t in rows.inputs[..., 0][starts]}


@given(documents, st.integers(2, 12))
def test_rows_are_full_where_they_are_shared_and_of_one_document_where_not(lengths, steps):
    made = [text.Document(np.zeros(n, np.int32), group=i) for i, n in enumerate(lengths)]
    shared = text.laid_out(made, steps, shared=True, whole=False, first_id=5)
    assert shared.mask[:-1].all()
    assert shared.row_id.tolist() == list(range(5, 5 + len(shared)))
    alone = text.laid_out(made, steps, shared=False, whole=False, first_id=0)
    assert ((alone.inputs[..., 1] == 0) & alone.mask).sum(1).tolist() == [1] * len(alone)
    assert len(alone) == sum(-(-(n - 1) // steps) for n in lengths)


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=8), st.booleans()
)
def test_of_a_prompt_nothing_is_told_and_of_its_completion_all_that_fits(parts, shared):
    made = [
        text.Document(np.arange(p + c, dtype=np.int32), first_label=p, group=i)
        for i, (p, c) in enumerate(parts)
    ]
    rows = text.laid_out(made, 8, shared=shared, whole=True, first_id=0)
    told = [np.arange(p, p + c)[: 9 - p] for p, c in parts]
    np.testing.assert_array_equal(rows.label[rows.mask], np.concatenate(told))


def test_packing_changes_no_answer(tokenizer):
    made = text.load(records(), "r", ref(tokenizer))
    module = Llama(
        **{k: v for k, v in made.shape.items() if k != "channels"}, width=16, layers=2, heads=2
    ).eval()
    rows = made.splits["train"]
    with torch.no_grad():
        packed = module(torch.from_numpy(rows.inputs))["logits"][torch.from_numpy(rows.mask)]
        pieces = torch.cumsum(torch.from_numpy(rows.inputs[..., 1] == 0), 1)
        alone = []
        for row, piece in zip(torch.from_numpy(rows.inputs), pieces, strict=True):
            for number in piece.unique():
                alone.append(module(row[piece == number][None, :, 0])["logits"][0])
    known = torch.cat(alone)[torch.from_numpy(rows.mask).flatten()]
    torch.testing.assert_close(packed, known, rtol=1e-4, atol=1e-5)


def test_a_text_that_spells_the_end_holds_its_letters(tokenizer):
    spelt = [r | {"text": f"a {END} b"} for r in records()]
    made = text.load(spelt, "r", ref(tokenizer))
    end = made.classes.index(END)
    rows = made.splits["test"]
    assert (rows.inputs[..., 0][rows.mask] != end).all()
    assert (rows.label == end).sum() == 3


def test_parquet_and_records_are_the_same_rows(tokenizer, tmp_path):
    pq.write_table(pa.Table.from_pylist(records()), tmp_path / "a.parquet")
    columns = {"group": "group"}
    there = data.load(ref(tokenizer, columns=columns).model_copy(update={"source": str(tmp_path)}))
    assert there.digest == text.load(records(), "r", ref(tokenizer)).digest
    pq.write_table(pa.table({"text": ["a"], "half": ["train"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column 'split' \(data.columns.split\)"):
        data.load(ref(tokenizer).model_copy(update={"source": str(tmp_path)}))


def prompts(prompt="the cat", completion="sat on a mat") -> list[dict]:
    return [
        {"split": s, "prompt": prompt, "completion": completion} for s in ("train", "val", "test")
    ]


FAULTS = {
    "empty completion": (prompts(completion=""), {}, "row 0 has an empty completion"),
    "empty prompt": (prompts(prompt=""), {}, "row 0 has an empty prompt"),
    "long prompt": (prompts(prompt=sentence(0, 80)), {}, "raise data.window"),
    "a null": (records(text=None), {}, "text of row 0 is None, not text"),
    "no such end": (records(), {"end": "<ende>"}, "Did you mean <end>"),
    "a strange split": (records(split="dev"), {}, r"\['dev'\]; write train, val or test"),
    "no test": (records()[:10], {}, "split 'test' has 0 rows"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_text_that_can_not_be_used_is_refused_in_words(name, tokenizer):
    rows, settings, words = FAULTS[name]
    with pytest.raises((DataError, RecipeError), match=words):
        data.rows.check_dataset(text.load(rows, "r", ref(tokenizer).model_copy(update=settings)))


def test_what_a_tokeniser_cuts_or_fills_by_itself_it_does_not_here(tokenizer, tmp_path):
    found = Tokenizer.from_file(str(tokenizer))
    found.enable_truncation(8)
    found.enable_padding(length=64, pad_token=END)
    found.save(str(tmp_path / "tokenizer.json"))
    plain, odd = (
        text.load(records(), "r", ref(path)) for path in (tokenizer, tmp_path / "tokenizer.json")
    )
    assert plain.digest == odd.digest


def test_completions_that_are_cut_are_counted(tokenizer):
    assert (
        "3 completions cut"
        in text.load(prompts(completion=sentence(0, 90)), "r", ref(tokenizer)).describe()
    )


def test_a_file_of_another_shape_of_tie_is_refused():
    tied, apart = (
        Llama(classes=9, steps=4, width=8, heads=2, kv_heads=1, tied=t) for t in (True, False)
    )
    with pytest.raises(RecipeError, match="set tied = false"):
        fill(tied, apart.state_dict(), "a file")
    fill(tied, ours.weights_of(tied), "a file")


def test_a_file_that_is_no_tokeniser_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"not a tokenizer\.json"):
        text.load(records(), "r", ref(tmp_path / "tokenizer.json"))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'technique = "none"\n[data]\nsource = "python_library"\ntokenizer = "none.json"\n'
    )
    with pytest.raises(RecipeError, match=r"data\.tokenizer: no file"):
        load(recipe)


def test_the_library_is_that_of_the_list_or_refused(tokenizer, monkeypatch):
    listed = {name: digest for name, digest in python_library.listed().items() if name < "b"}
    monkeypatch.setattr(python_library, "listed", lambda: listed)
    small = ref(tokenizer, settings={"share": 1.0, "pinned": False}).model_copy(
        update={"source": "python_library"}
    )
    described = python_library.load(small).splits
    assert all(map(len, described.values()))
    name = next(iter(listed))
    monkeypatch.setattr(python_library, "listed", lambda: listed | {name: "0" * 64})
    with pytest.raises(DataError, match=f"1 of {len(listed)} files of Python .*first: {name}"):
        python_library.load(small.model_copy(update={"settings": {}}))
    assert python_library.load(small).digest  # as another data set


@pytest.fixture(scope="module")
def walked(cluster, tokenizer, tmp_path_factory):
    """(report, folder, recipe) of a small text recipe under a teacher of random weights."""
    home = tmp_path_factory.mktemp("text")
    found = load(texts.recipe(home, tokenizer))
    report = walk.run(found, home / "out")
    (folder,) = (home / "out").glob("text-*")
    return report, folder, found


def test_a_text_recipe_walks_from_a_teacher_to_a_report(walked):
    report, folder, found = walked
    assert report["classes"] == report["per_class"] == report["confusion"] == []
    assert report["teacher"]["metrics"].keys() == {"accuracy", "nll"}
    assert report["student"]["metrics"].keys() == {"accuracy", "nll", "kl"}
    test = data.load(found.data).splits["test"]
    assert report["student"]["metrics"]["nll"]["n"] == test.mask.sum()
    assert report["data"]["groups"] == 30
    assert set(report["gains"]) == {"nll", "kl"}
    artefact = report["artefact"]
    assert artefact["parity"]["positions"] >= 1000
    assert (
        artefact["metrics"]["accuracy"]["value"]
        == report["student"]["metrics"]["accuracy"]["value"]
    )
    assert {p.name for p in (folder / "artefact").iterdir()} >= {
        "student.onnx",
        "run.py",
        "tokenizer.json",
    }
    assert (folder / "report.html").exists()


def test_a_text_students_artefact_holds_gguf_where_it_is_asked_for(walked):
    pytest.importorskip("gguf")
    _, folder, found = walked
    asked = found.model_copy(update={"export": found.export.model_copy(update={"gguf": True})})
    assert recipe_digest(asked) == recipe_digest(found)
    walk.export(asked, folder.parent)
    manifest = json.loads((folder / "artefact" / "manifest.json").read_text())
    assert (
        manifest["files"]["student.gguf"]["bytes"]
        == (folder / "artefact" / "student.gguf").stat().st_size
    )
    assert manifest["export"]["gguf"]
    series = found.model_copy(update={"export": found.export.model_copy(update={"packed": True})})
    with pytest.raises(RecipeError, match=r"export\.packed: is of rows of series"):
        walk.export(series, folder.parent)


def test_how_a_language_model_relates_its_steps_can_be_taught(walked):
    """The relation's KL between queries, keys and values: 0 with no gradient where both are the
    same model.
    """
    _, _, found = walked
    made = data.load(found.data)
    rows = to_device(made.splits["train"], "train", None, frozenset(), CPU)
    layers = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    spec = {"attention": TermSpec(pairs=[[name, name] for name in layers])}  # type: ignore[call-arg]
    wants = wants_of(spec)
    assert found.teacher
    models = [
        Adapter(ours.build_model(ref, **made.shape, key="m"), want=wants)
        for ref in (found.teacher, found.student)
    ]
    batch = rows.batch(torch.arange(8))
    with torch.no_grad():
        teacher = models[0](batch.inputs, batch.mask)
    losses = []
    for model in models:
        sums, counts = Objective(spec)(
            model(batch.inputs, batch.mask), replace(batch, teacher=teacher)
        )
        losses.append(sums / counts)
        losses[-1].sum().backward()
    assert losses[0].item() == pytest.approx(0, abs=1e-6)
    assert losses[1] > 1e-5
    grads = [
        model.module.model.layers[0].self_attn.k_proj.weight.grad.abs().max() for model in models
    ]
    assert grads[0] < 0.01 * grads[1]


def test_what_is_reported_of_text_is_what_the_models_say(walked):
    report, folder, found = walked
    made = data.load(found.data)
    split = made.splits["test"]
    shape = made.shape
    rows = to_device(split, "test", None, frozenset(), CPU)
    teacher = ours.build_model(found.teacher, **shape, key="teacher")
    student = ours.build_model(found.student, **shape, key="student")
    ours.load_weights(student, folder / "arms/student-0/weights.safetensors", "student")
    said = predictions.of_text(Adapter(teacher), split, rows)
    assert report["teacher"]["metrics"]["nll"]["value"] == pytest.approx(
        said.metrics()["nll"], abs=2e-3
    )  # fp16
    assert report["teacher"]["metrics"]["accuracy"]["value"] == said.metrics()["accuracy"]
    own = predictions.of_text(Adapter(student), split, rows)
    kept = predictions.read(folder / "arms/student-0/predictions.parquet")
    np.testing.assert_array_equal(own.answer, kept.answer)
    np.testing.assert_allclose(own.log_q, kept.log_q, atol=1e-5)
    with torch.no_grad():
        batch = rows.batch(torch.arange(len(split)))
        p, q = (m(batch.inputs)["logits"].log_softmax(-1)[batch.mask] for m in (teacher, student))
    exact = (p.exp() * (p - q)).sum(-1)
    assert kept.kl is not None
    apart = kept.kl - exact.numpy()
    assert (
        abs(apart.mean()) < 4 * apart.std() / len(apart) ** 0.5 + 1e-3
    )  # a comb is unbiased, its entropies rounded


def test_a_store_of_text_knows_its_tokeniser(walked, tokenizer):
    _, _, found = walked
    place = RunFolder(found, walked[1].parent)
    vocabulary = Store(place.store).manifest["statistics"]["vocabulary"]
    table = json.loads(tokenizer.read_text())["model"]["vocab"]
    assert check_digest(vocabulary["sha256"], vocabulary["size"], table) == len(table)
    with pytest.raises(DataError, match="different in meaning"):
        check_digest(
            vocabulary["sha256"],
            vocabulary["size"],
            {t: (i + 1) % len(table) for t, i in table.items()},
        )
