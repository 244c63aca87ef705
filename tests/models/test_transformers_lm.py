"""A model of transformers as a teacher: documents that share a row are read as alone, whatever its
architecture.

The reference is that model on each document by itself; where the library is missing, our Llama
stands in its place.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import folders
import numpy as np
import pytest
import texts
import torch
from folders import PADDING, llama, load, split, stored
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from raykd import data, models
from raykd.errors import DataError, RecipeError
from raykd.generation.sampling import FrozenTeacher, on_policy
from raykd.models import adapter, transformers_lm
from raykd.models.adapter import Adapter
from raykd.models.llama import Llama
from raykd.models.transformers_lm import TransformersLM, documents_by_length
from raykd.recipe.tables import ModelRef
from raykd.recipe.weight_files import CONFIG, WEIGHTS

CLASSES = 50
STEPS = 24
LENGTHS = ((7, 5, 8, 4), (24,), (1, 1, 16, 1, 5))  # of the documents in each row


def packed() -> torch.Tensor:
    """(3, STEPS, 2): rows of text, whose documents have LENGTHS."""
    tokens = torch.randint(
        CLASSES, (len(LENGTHS), STEPS), generator=torch.Generator().manual_seed(1)
    )
    places = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    return torch.stack([tokens, places], -1).int()


def each_alone(read) -> torch.Tensor:
    """What `read` answers to every document of `packed` by itself, laid out as its rows."""
    rows = []
    for row, lengths in zip(packed()[..., 0].long(), LENGTHS, strict=True):
        rows.append(torch.cat([read(document[None])[0] for document in row.split(lengths)]))
    return torch.stack(rows)


class Theirs(nn.Module):
    """Our Llama with the calls of a model of transformers, which knows of no documents."""

    def __init__(self, module: Llama):
        super().__init__()
        self.inner = module

    def forward(self, input_ids, use_cache):
        assert input_ids.dim() == 2
        assert not use_cache
        return SimpleNamespace(logits=self.inner(input_ids)["logits"])


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=4))
def test_parts_hold_every_token_of_every_document_once_and_in_order(rows):
    steps = max(map(sum, rows))
    rows = [[*row, *[1] * (steps - sum(row))] for row in rows]  # padding of place 0
    places = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    found = documents_by_length(places)
    seen = torch.cat([at[inside] for at, inside in found])
    assert seen.sort().values.tolist() == list(range(places.numel()))
    for at, inside in found:
        own = places.flatten()[at]
        assert (own[inside] == torch.arange(at.shape[1]).expand(at.shape)[inside]).all()
        assert (own[~inside] == 0).all()
        assert inside.sum(1).min() * 2 > at.shape[1]


def test_documents_that_share_a_row_are_read_as_alone_by_a_model_without_masks_between_them():
    ours = llama(CLASSES)
    theirs = TransformersLM(Theirs(ours), classes=CLASSES, steps=64).eval()
    want = ("hidden.model.layers.0", "embedding.model.layers.1")
    inner = tuple(name.replace(".", ".model.inner.", 1) for name in want)
    mask = torch.ones(len(LENGTHS), STEPS, dtype=torch.bool)
    with torch.no_grad():
        expected = Adapter(ours, want=frozenset(want))(packed(), mask)
        found = Adapter(theirs, want=frozenset(inner))(packed(), mask)
        torch.testing.assert_close(
            theirs(packed()[..., 0])["logits"], ours(packed()[..., 0])["logits"]
        )
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    for name, same in zip(inner, want, strict=True):
        torch.testing.assert_close(found.layers[name], expected.layers[same], rtol=1e-5, atol=1e-5)
    with pytest.raises(DataError, match="65, but this model takes at most 64"):
        theirs(torch.zeros(1, 65, dtype=torch.int32))


def test_a_teacher_without_a_cache_scores_what_a_student_writes_and_its_padding_is_cut():
    wide = TransformersLM(Theirs(llama(CLASSES + PADDING)), classes=CLASSES + PADDING, steps=64)
    uniforms = torch.rand(3, 6, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    draw = {"row_id": torch.arange(3), "uniforms": uniforms, "vocab": CLASSES}
    prompt = packed()[:, :7]
    for mixed in (0.0, 0.5):
        batch = on_policy(
            llama(CLASSES, width=16), FrozenTeacher(wide), prompt, mixed=mixed, **draw
        )()
        assert batch.teacher is not None
        expected = wide.model.inner(batch.inputs)["logits"][..., :CLASSES]
        torch.testing.assert_close(batch.teacher.logits, expected, rtol=1e-4, atol=1e-4)


def test_the_head_of_a_model_that_reads_in_parts_is_left_to_the_losses(monkeypatch):
    monkeypatch.setattr(adapter, "MANY", CLASSES - 1)
    theirs = TransformersLM(Theirs(llama(CLASSES)), classes=CLASSES, steps=64).eval()
    plain = theirs(packed())["logits"]
    mask = torch.ones(len(LENGTHS), STEPS, dtype=torch.bool)
    made = Adapter(theirs)
    made.find_head(packed(), mask)
    assert made.head == "model.inner.lm_head"
    said = made(packed(), mask)
    assert said.headed is not None
    torch.testing.assert_close(said.logits, plain, rtol=1e-5, atol=1e-5)


# With the library itself.


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return folders.home(tmp_path_factory.mktemp("home"))


SHAPE = {"vocab_size": CLASSES, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# Learned positions, a window of 3 tokens, slopes for positions, a state for attention.
KINDS = {
    "GPT2": {"vocab_size": CLASSES, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2},
    "Qwen2": SHAPE | {"intermediate_size": 48, "num_key_value_heads": 2, "use_sliding_window": True}
    | {"sliding_window": 3, "max_window_layers": 0},
    "Bloom": {"vocab_size": CLASSES, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Mamba": {"vocab_size": CLASSES, "hidden_size": 32, "num_hidden_layers": 2},
}  # fmt: skip


def made(kind: str, folder: Path, settings: dict):
    """A model of transformers with random weights, which are written to a folder."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = getattr(transformers, f"{kind}Config")(**settings | ends)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_documents_that_share_a_row_are_read_as_alone_by_any_architecture(kind, tmp_path):
    theirs = made(kind, tmp_path, KINDS[kind])
    found = transformers_lm.read(tmp_path)
    assert found.settings["classes"] == CLASSES
    with torch.no_grad():
        expected = each_alone(lambda tokens: theirs(tokens).logits)
        answer = found(packed())["logits"]
    assert expected.std() > 0.1
    torch.testing.assert_close(
        answer / expected.abs().max(), expected / expected.abs().max(), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("files", [1, 2])
def test_a_llama_is_the_same_model_read_by_either(files, home, tmp_path):
    pytest.importorskip("transformers")
    where = home / "wide"
    if files == 2:
        split(where, tmp_path / "two")
        where = tmp_path / "two"
    rows = data.load(load(home).data).splits["train"].inputs[:4]
    shape = {"channels": 2, "classes": 300, "steps": texts.STEPS}
    refs = ("llama", "transformers")
    both = [
        models.build_model(ModelRef(model=m, weights=str(where)), **shape, key="teacher")
        for m in refs
    ]
    with torch.no_grad():
        ours, theirs = (module.eval()(torch.from_numpy(rows))["logits"] for module in both)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    stores = [stored(load(home, f"teacher.weights={where}", f"teacher.model={m}")) for m in refs]
    np.testing.assert_allclose(stores[0]["log_p"], stores[1]["log_p"], atol=2e-3)


def test_the_hidden_codec_keeps_what_the_head_of_any_architecture_reads(home):
    pytest.importorskip("transformers")
    heads = (("llama", "lm_head"), ("transformers", "model.lm_head"))
    ours, theirs = (
        stored(load(home, f"teacher.model={m}", "store.codec=hidden", f"store.head={head}"))
        for m, head in heads
    )
    np.testing.assert_allclose(theirs["logits"], ours["logits"], rtol=2e-3, atol=2e-3)


def test_a_model_that_sees_what_follows_is_refused(tmp_path):
    made("Bert", tmp_path, SHAPE | {"intermediate_size": 48})
    with pytest.raises(RecipeError, match="it must be causal"):
        transformers_lm.read(tmp_path)


def test_weights_that_are_missing_are_named_not_drawn(tmp_path):
    made("GPT2", tmp_path, KINDS["GPT2"])
    tensors = load_file(tmp_path / WEIGHTS)
    tensors.pop("transformer.h.1.mlp.c_fc.weight")
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(RecipeError, match=r"its files lack transformer\.h\.1\.mlp\.c_fc\.weight"):
        transformers_lm.read(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({"model_type": "unheard"}))
    with pytest.raises(RecipeError, match="transformers cannot read it as a causal language model"):
        transformers_lm.read(tmp_path)
