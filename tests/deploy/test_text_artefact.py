"""The folder of a language model: what it says of itself is so, and it is there only if it answers
as its student.

Its tokeniser is held against the tokenizers library, on any text.
"""

import copy
import importlib.util
import json
import shutil
import subprocess
from hashlib import sha256
from importlib import resources

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from language import END, HELD_OUT, READ, TOKENS, bpe, text, train
from tokenizers import Tokenizer

from raykd.data import byte_bpe
from raykd.deploy.onnx import write_decoder
from raykd.deploy.onnx.decoder import Decoder
from raykd.deploy.text_artefact import export_decoder
from raykd.errors import DataError, GateError, RecipeError
from raykd.models.llama import Llama
from raykd.quant.swap import quantised
from raykd.recipe.quant import Quant
from raykd.training import phases

STEPS = 128
ROWS = 10
SCHEMES = {
    "fp32": None,
    "int8-tensor": Quant(per="tensor", activations="int8_token"),
    "int8-channel": Quant(activations="int8_token"),
    "int4-g32": Quant(weights="int4", per="group", activations="none"),
    "ternary": Quant(weights="ternary", embeddings="int8"),
}
EACH = pytest.mark.parametrize("name", SCHEMES)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("language") / "tokenizer.json"
    return bpe(path), path


@pytest.fixture(scope="module")
def student(tokenizer):
    """Models under each scheme that trained on, and text that they have not read."""
    ids = text(tokenizer[0], *READ)
    torch.manual_seed(0)
    learnt = train(Llama(classes=TOKENS, steps=STEPS), ids, 200, 3e-3)
    made = {}

    def get(name: str) -> Llama:
        if name not in made:
            made[name] = copy.deepcopy(learnt)
            quant = SCHEMES[name]
            if quant:
                phases.round_as(made[name], quant)
                train(made[name], ids, 30, 1e-3)
        return made[name]

    return get, text(tokenizer[0], HELD_OUT)[: ROWS * STEPS].reshape(ROWS, STEPS)


@pytest.fixture(scope="module")
def exported(student, tokenizer, tmp_path_factory):
    """(folder, manifest) of each scheme, written once for all that is asked of it."""
    (get, tokens) = student
    made = {}

    def written(name: str):
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "artefact"
            before = copy.deepcopy(get(name).state_dict())
            made[name] = (
                folder,
                export_decoder(
                    get(name), folder, tokens=tokens, tokenizer=tokenizer[1], title="Small"
                ),
            )
            after = get(name).state_dict().values()
            assert all(torch.equal(a, b) for a, b in zip(before.values(), after, strict=True)), (
                "it is not changed"
            )
        return made[name]

    return written


@EACH
def test_its_own_script_writes_the_decoders_greedy_text_without_anything_of_ours(
    name, python, exported, tokenizer, tmp_path
):
    """With its tokeniser from text to text, without from ids to ids."""
    folder = shutil.copytree(exported(name)[0], tmp_path / "artefact")
    prompt = "def shorten(text, width=70):\n    # caf\u00e9, \u4e09 m\u00b2 - it's\n"
    ids = tokenizer[0].encode(prompt).ids
    said = Decoder(folder / "student.onnx").generate(np.array([ids]), 40)[0].tolist()
    assert len(set(said)) > 2, "not one word again and again"

    def answered(prompt: str) -> bytes:
        script = [python, "-I", folder / "run.py", prompt, "40"]
        done = subprocess.run(script, capture_output=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert answered(prompt).decode("utf-8", "replace") == tokenizer[0].decode(said) + "\n"
    (folder / "tokenizer.json").unlink()
    assert answered(" ".join(map(str, ids))).split() == [str(i).encode() for i in said]


@EACH
def test_the_manifest_says_what_is_there(name, student, exported):
    module = student[0](name)
    quant = SCHEMES[name]
    (folder, manifest) = exported(name)
    assert manifest == json.loads((folder / "manifest.json").read_text())
    held = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"}
    assert held.keys() == {"student.onnx", "model.json", "tokenizer.json", "run.py", "README.md"}
    assert manifest["files"] == {
        n: {"bytes": len(d), "sha256": sha256(d).hexdigest()} for n, d in held.items()
    }
    assert held["README.md"].startswith(b"# Small\n")
    kinds = manifest["bytes_by_kind"]
    assert sum(kinds.values()) == manifest["bytes"] == len(held["student.onnx"])
    rounded = [m for _, m in quantised(module) if m.quant]
    proto = onnx.load_from_string(held["student.onnx"])
    floats = [t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert kinds["scales"] + kinds["float32"] == sum(len(t.raw_data) for t in floats)
    stored = 1 if quant else 0  # the tied table and head, once
    assert len(manifest["tensors"]) == len(rounded) + stored
    if quant:
        assert kinds["float32"] < 5 * 64 * 4 + 100, "norms"
    described = json.loads(held["model.json"])
    assert Llama(**described["settings"]).settings == module.settings
    assert (Quant.model_validate(described["quant"]) if described["quant"] else None) == quant
    left = {each["name"] for each in manifest["computed_in_float32"]}
    table = set() if quant is None or quant.embeddings != "none" else {"model.embed_tokens"}
    assert left == ({"lm_head"} | table if quant else set())


@EACH
def test_parity_is_that_of_plain_answers_and_of_a_model_that_learnt(name, student, exported):
    (get, tokens) = student
    quant = SCHEMES[name]
    (folder, manifest) = exported(name)
    module = get(name)
    found = manifest["parity"]
    decoder = Decoder(folder / "student.onnx", rows=ROWS)
    with torch.inference_mode():
        said = {
            "trained": module(tokens)["logits"],
            "artefact": torch.from_numpy(decoder.step(tokens.numpy())),
        }
    exact = (
        quant is None or quant.activations == "none"
    )  # else the size of a call matters, or where a tie falls
    for key, logits in said.items():
        nll = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()
        accuracy = (logits[:, :-1].argmax(-1) == tokens[:, 1:]).float().mean().item()
        assert nll < 4.5, "nats a token; untrained 5.95"
        assert found["nll"][key] == pytest.approx(nll, rel=1e-5 if exact else 1e-2)
        assert found["accuracy"][key] == pytest.approx(accuracy, abs=1e-6 if exact else 0.01)
    print(f"\n{name}: {found}")
    assert found["positions"] == ROWS * STEPS >= 1000
    assert found["nll"]["artefact"] == pytest.approx(
        found["nll"]["trained"], rel=1e-5 if exact else 5e-3
    )
    assert abs(found["accuracy"]["artefact"] - found["accuracy"]["trained"]) <= (
        0 if exact else 0.01
    )
    assert found["agreement"] >= (1 if exact else 0.98)
    assert found["alone_agreement"] >= (1 if exact else 0.9)


def test_a_file_that_answers_otherwise_is_refused_and_an_older_folder_stays(
    student, exported, monkeypatch
):
    (get, tokens) = student
    (folder, _) = exported("int4-g32")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    written = write_decoder.to_onnx

    def other(module: Llama) -> bytes:
        with torch.no_grad():
            module.model.norm.weight[0] *= 1.5
        return written(module)

    monkeypatch.setattr(write_decoder, "to_onnx", other)
    with pytest.raises(GateError, match=r"differ .* on 1280 tokens; no artefact was written"):
        export_decoder(get("int4-g32"), folder, tokens=tokens)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["artefact"]


def test_too_few_tokens_and_anothers_tokeniser_are_refused(student, tokenizer, tmp_path):
    get, tokens = student
    for wrong in (tokens[:7], tokens[:, :1], torch.cat([tokens, tokens], 1)):
        with pytest.raises(
            DataError, match="give rows of 2 to 128, with 1,000 tokens that follow another"
        ):
            export_decoder(get("fp32"), tmp_path / "artefact", tokens=wrong)
    small = Llama(classes=50, steps=STEPS, width=16, layers=1)
    with pytest.raises(RecipeError, match="384 tokens, and the model has 50 classes"):
        export_decoder(small, tmp_path / "artefact", tokens=tokens % 50, tokenizer=tokenizer[1])
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def card():
    """run.py as a module."""
    with resources.as_file(resources.files("raykd.deploy") / "card/run_lm.py") as path:
        spec = importlib.util.spec_from_file_location("run_lm", path)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


WRITTEN = st.text(
    st.characters(exclude_categories=["Cs", "Cn"])
    | st.sampled_from(" \n\t'strevmld09_-\xa0\u2028\x1c\x85")
)


@pytest.fixture(scope="module")
def by_digits(tokenizer, tmp_path_factory):
    """The same tokeniser with every digit a word of its own, and without tokens for some bytes."""
    path = tmp_path_factory.mktemp("digits") / "tokenizer.json"
    held = json.loads(tokenizer[1].read_bytes())
    cut = {"type": "Digits", "individual_digits": True}
    held["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [cut, held["pre_tokenizer"]]}
    gone = {byte_bpe.letters()[byte]: f"<none {byte}>" for byte in (4, 196, 241)}
    held["model"]["vocab"] = {
        gone.get(token, token): i for token, i in held["model"]["vocab"].items()
    }
    path.write_text(json.dumps(held))
    return Tokenizer.from_file(str(path)), path


@given(WRITTEN)
@example("12 a  34\u00bd\u0663 x1y\n\n 7\x04 \u0110\U000f0000b \u2167 \u4e09 10-20 -3.14")
def test_run_py_cuts_out_digits_and_leaves_out_bytes_as_the_library_does(card, by_digits, written):
    library, path = by_digits
    found = byte_bpe.read(path)
    assert found.digits
    ranks = {m: i for i, m in enumerate(found.merges)}
    assert (
        card.encode(written, {t: i for i, t in enumerate(found.tokens)}, ranks, True)
        == library.encode(written).ids
    )


@given(WRITTEN)
@example(
    "it's  I'll\t\n  42\u00b2 \u2167 \u4e09\u3007 caf\u00e9 \u0e01\u0e33 a\u0301 \U0001f600!? _x_  "
    "\xa0 y"
)
def test_run_py_tokenises_as_the_tokenizers_library_does(card, tokenizer, written):
    library, path = tokenizer
    found = byte_bpe.read(path)
    ids = card.encode(
        written,
        {t: i for i, t in enumerate(found.tokens)},
        {m: i for i, m in enumerate(found.merges)},
    )
    assert ids == library.encode(written).ids
    assert card.decode([0, *ids], json.loads(path.read_bytes())).decode() == written, (
        "token 0 is the end, and silent"
    )


def test_a_vocabulary_is_read_as_the_tokenizers_library_has_it(tokenizer):
    library, path = tokenizer
    found = byte_bpe.read(path)
    assert {t: i for i, t in enumerate(found.tokens)} == library.get_vocab(with_added_tokens=True)
    assert [found.tokens[i] for i in found.special] == [END]
    assert len(found.merges) == TOKENS - 257


OTHERS = {
    "normalizer": {"normalizer": {"type": "NFC"}},
    "pre_tokenizer": {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
    "pre_tokenizer ": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}}},
    "post_processor": {"post_processor": {"type": "TemplateProcessing"}},
    "not special": {"added_tokens": [{"id": 0, "content": END, "special": False}]},
    "model.ignore_merges": {"model": {"ignore_merges": True}},
    "model.type": {"model": {"type": "WordPiece"}},
    "ids": {"model": {"vocab": {"a": 0, "b": 7}}},
    "no token": {"model": {"merges": ["\u0120 \u0120\u0120\u0120\u0120\u0120x"]}},
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_tokeniser_of_another_kind_is_refused_by_the_key_that_says_so(name, tokenizer, tmp_path):
    held = json.loads(tokenizer[1].read_bytes())
    held |= OTHERS[name] | {"model": held["model"] | OTHERS[name].get("model", {})}
    (tmp_path / "tokenizer.json").write_text(json.dumps(held))
    with pytest.raises(RecipeError, match=f"{name.strip()}.* is .*; leave the tokenizer out"):
        byte_bpe.read(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"model": 3}', b'{"model": {"vocab": {}, "merges": [3]}}']
)
def test_what_is_no_tokeniser_is_refused(data, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(RecipeError, match=r"not a tokenizer\.json of BPE"):
        byte_bpe.read(tmp_path / "tokenizer.json")


def test_merges_may_be_written_as_pairs_or_as_one_string(tokenizer, tmp_path):
    held = json.loads(tokenizer[1].read_bytes())
    pairs = [m.split(" ") if isinstance(m, str) else m for m in held["model"]["merges"]]
    for merges in (pairs, [" ".join(m) for m in pairs]):
        held["model"]["merges"] = merges
        (tmp_path / "tokenizer.json").write_text(json.dumps(held))
        assert byte_bpe.read(tmp_path / "tokenizer.json") == byte_bpe.read(tokenizer[1])
        assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size() == TOKENS
