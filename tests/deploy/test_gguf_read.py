"""Laws of GGUF files read back: what was written is found, in our order; what is another's, or
damaged, is refused.
"""

import pytest
import torch
from ggufs import SCHEMES, STEPS, llama
from hypothesis import given
from hypothesis import strategies as st
from language import END, HELD_OUT, bpe, text
from tokenizers import Tokenizer

from raykd.deploy.gguf import read as read_gguf
from raykd.deploy.gguf import write as write_gguf
from raykd.errors import RecipeError
from raykd.training import phases

gguf = pytest.importorskip("gguf", reason="pip install 'raykd[gguf]'")

EACH = pytest.mark.parametrize("name", SCHEMES)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(file, model in it, library's tokeniser) by scheme."""
    home = tmp_path_factory.mktemp("gguf")
    found = {}
    tokenizer = bpe(home / "tokenizer.json")

    def get(name: str):
        if name not in found:
            quant, shape, layers, _ = SCHEMES[name]
            module = llama(**{"layers": 1, **shape}).eval()
            file = home / f"{name}.gguf"
            if quant:
                phases.round_as(module, quant)
            ternary = layers if layers[0] == "T" else "TQ2_0"
            write_gguf.write(
                module,
                file,
                matrices="F32",
                ternary=ternary,
                tokenizer=home / "tokenizer.json",
                end=END,
            )
            found[name] = file, module.eval(), tokenizer
        return found[name]

    return get


@EACH
def test_a_file_answers_as_the_model_that_was_written(name, made):
    file, module, tokenizer = made(name)
    read = read_gguf.read(file)
    ids = text(tokenizer, HELD_OUT)[: 2 * STEPS].reshape(2, STEPS)
    assert read.settings == pytest.approx(module.settings, rel=1e-6)  # keys are float32
    if SCHEMES[name][0] is None:
        kept = module.state_dict()
        assert all(torch.equal(value, kept[key]) for key, value in read.state_dict().items())
    else:
        for layer in (m for m in module.modules() if hasattr(m, "quant")):
            layer.quant = layer.quant.model_copy(update={"activations": "none"})
    with torch.inference_mode():
        wanted, found = (m(ids)["logits"] for m in (module, read))
    torch.testing.assert_close(
        found, wanted, rtol=0, atol=2e-3 * wanted.abs().max().item()
    )  # scales are float16


@pytest.fixture(scope="module")
def tokenizers(made):
    file, _, library = made("fp32")
    return library, Tokenizer.from_str(read_gguf.tokenizer(file))


@given(st.text())
def test_its_tokeniser_is_the_one_that_was_written(tokenizers, written):
    library, read = tokenizers
    assert read.encode(written).ids == library.encode(written).ids
    assert read.get_vocab() == library.get_vocab()


def test_what_is_no_llama_or_damaged_is_refused(made, tmp_path):
    whole = made("fp32")[0].read_bytes()
    path = tmp_path / "m.gguf"
    for cut in (0, 3, 20, 900, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:cut])
        with pytest.raises(RecipeError, match=r"m\.gguf: not a GGUF file that can be read here"):
            read_gguf.read(path)
    for theirs, message in (("llamo", "general.architecture is 'llamo'"),):
        path.write_bytes(whole.replace(b"llama", theirs.encode(), 1))
        with pytest.raises(RecipeError, match=message):
            read_gguf.read(path)
    path.write_bytes(whole.replace(b"block_count", b"block_coint", 1))
    with pytest.raises(RecipeError, match=r"no llama\.block_count in it"):
        read_gguf.read(path)
    two = made("fp32")[0].with_name("two.gguf")
    write_gguf.write(llama(layers=2), two, matrices="F32")
    key = b"llama.block_count"
    kind = (4).to_bytes(4, "little")
    less = two.read_bytes().replace(key + kind + bytes([2]), key + kind + bytes([1]))
    path.write_bytes(less)
    with pytest.raises(
        RecipeError, match=r"blk\.1\.\w+\.weight is in it, which this Llama has not"
    ):
        read_gguf.read(path)
    path.write_bytes(whole.replace(b"blk.0.attn_q", b"blk.0.attn_x", 1))
    with pytest.raises(RecipeError, match=r"no tensor blk\.0\.attn_q\.weight"):
        read_gguf.read(path)


def test_a_model_without_a_vocabulary_has_no_tokeniser(tmp_path):
    write_gguf.write(llama(layers=1), tmp_path / "m.gguf")
    with pytest.raises(RecipeError, match="its tokeniser is 'none'"):
        read_gguf.tokenizer(tmp_path / "m.gguf")
    assert gguf.GGUFReader(tmp_path / "m.gguf").tensors
