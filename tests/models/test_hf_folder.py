"""Hugging Face's layout: what is written is read back alike, and their own Llama answers alike from
the same folder.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from raykd.errors import RecipeError
from raykd.models import hf_folder
from raykd.models.llama import Llama
from raykd.quant.swap import prepare, quantised
from raykd.recipe.quant import Quant
from raykd.recipe.weight_files import INDEX

SHAPES = {
    "tied": {"kv_heads": 2},
    "free": {"kv_heads": 4, "tied": False, "rope_theta": 500.0, "norm_eps": 1e-3},
    "sub_norm": {"kv_heads": 1, "sub_norm": True},
}
EACH = pytest.mark.parametrize("name", SHAPES)


def llama(name: str = "tied") -> Llama:
    """Weights large enough that attention is not flat and every norm matters."""
    torch.manual_seed(0)
    module = Llama(classes=50, steps=40, width=32, inner=48, **SHAPES[name])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(6) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    return module.eval()


TOKENS = torch.randint(50, (3, 40), generator=torch.Generator().manual_seed(1))


@EACH
def test_what_is_written_is_read_back(name, tmp_path):
    module = llama(name)
    hf_folder.write(module, tmp_path)
    found = hf_folder.read(tmp_path)
    assert found.settings == module.settings
    assert all(
        torch.equal(a, b)
        for a, b in zip(found.state_dict().values(), module.state_dict().values(), strict=True)
    )
    assert torch.equal(found(TOKENS)["logits"], module(TOKENS)["logits"])
    assert (hf_folder.HEAD in load_file(tmp_path / hf_folder.WEIGHTS)) != module.settings["tied"]


@EACH
def test_weights_in_several_files_are_those_of_one(name, tmp_path):
    module = llama(name)
    hf_folder.write(module, tmp_path)
    tensors = load_file(tmp_path / hf_folder.WEIGHTS)
    (tmp_path / hf_folder.WEIGHTS).unlink()
    places = {n: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, n in enumerate(tensors)}
    for file in set(places.values()):
        save_file({n: tensors[n] for n in tensors if places[n] == file}, tmp_path / file)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert torch.equal(hf_folder.read(tmp_path)(TOKENS)["logits"], module(TOKENS)["logits"])


@EACH
def test_their_model_answers_alike_from_the_folder(name, tmp_path):
    """Theirs from ours, and ours from what theirs writes."""
    transformers = pytest.importorskip("transformers")
    module = llama(name)
    hf_folder.write(module, tmp_path / "ours")
    theirs, said = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert type(theirs).__name__ == (
        "BitNetForCausalLM" if module.settings["sub_norm"] else "LlamaForCausalLM"
    )
    assert not any(said[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs.save_pretrained(tmp_path / "theirs")
    again = hf_folder.read(tmp_path / "theirs")
    assert again.settings == module.settings
    with torch.no_grad():
        wanted = theirs.eval()(TOKENS).logits
        assert wanted.std() > 0.1
        torch.testing.assert_close(module(TOKENS)["logits"], wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(again(TOKENS)["logits"], wanted, rtol=1e-4, atol=1e-5)


def test_older_keys_mean_what_they_meant(tmp_path):
    """No key heads of their own, no tie, rotary settings in rope_parameters or at the top."""
    hf_folder.write(llama("free"), tmp_path)
    config = json.loads((tmp_path / hf_folder.CONFIG).read_text())
    for key in ("num_key_value_heads", "tie_word_embeddings"):
        del config[key]
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    (tmp_path / hf_folder.CONFIG).write_text(json.dumps(config))
    assert hf_folder.read(tmp_path).settings == llama("free").settings


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model_type", "mistral", "model_type is 'mistral'; this Llama has 'llama' or 'bitnet'"),
        ("hidden_act", "relu2", "hidden_act is 'relu2'"),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}, "rope_type is 'llama3'"),
        ("head_dim", 16, "head_dim is 16; this Llama has 8"),
        ("attention_bias", True, "attention_bias is True"),
        ("quantization_config", {"quant_method": "bitnet"}, "quantization_config is"),
        ("intermediate_size", None, "no intermediate_size"),
        (
            "intermediate_size",
            64,
            r"mlp.down_proj.weight: the module has \(32, 64\), the file \(32, 48\)",
        ),
    ],
)
def test_what_is_another_model_is_named(key, value, words, tmp_path):
    hf_folder.write(llama(), tmp_path)
    config = json.loads((tmp_path / hf_folder.CONFIG).read_text())
    config[key] = value
    if value is None:
        del config[key]
    (tmp_path / hf_folder.CONFIG).write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=words):
        hf_folder.read(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"no config\.json"):
        hf_folder.read(tmp_path)
    hf_folder.write(llama(), tmp_path)
    (tmp_path / hf_folder.WEIGHTS).write_bytes(b"pickle")
    with pytest.raises(RecipeError, match="not a readable safetensors file"):
        hf_folder.read(tmp_path)


def test_learned_scales_have_no_place_there(tmp_path):
    module = llama()
    quant = Quant(weights="ternary", scale="learned")
    prepare(module, quant)
    for _, layer in quantised(module):
        layer.set(quant)
    with pytest.raises(RecipeError, match=r"has no place for model.layers.0.mlp.down_proj.scale"):
        hf_folder.write(module, tmp_path)
