"""GGUF files: the trained codes as gguf's own reader gives them back, and llama.cpp's answers
beside torch's.

llama.cpp rounds activations to int8 over blocks of 256 or 32 inputs, and scales are float16, so its
log-probabilities are alike, not equal; of a file of float32 they are equal up to the order of its
sums.
"""

import copy
import sys

import numpy as np
import pytest
import torch
from ggufs import SCHEMES, STEPS, TERNARY, llama
from hypothesis import given
from hypothesis import strategies as st
from language import END, HELD_OUT, READ, TOKENS, bpe, text, train
from torch import Tensor

from raykd.deploy.gguf import blocks as gguf_blocks
from raykd.deploy.gguf import write as write_gguf
from raykd.errors import RecipeError
from raykd.models.llama import Llama, rotate, rotations
from raykd.quant.swap import quantised
from raykd.recipe.quant import Quant
from raykd.training import phases

gguf = pytest.importorskip("gguf", reason="pip install 'raykd[gguf]'")

TURN = rotations(torch.arange(3, 8), 64, 10_000.0)
LARGEST = {"TQ2_0": 1, "TQ1_0": 1, "Q4_0": 7, "Q8_0": 127}
EACH = pytest.mark.parametrize("name", SCHEMES)


def kind(name: str):
    return gguf.GGMLQuantizationType[name]


@given(
    st.sampled_from(list(gguf_blocks.SIZES)),
    st.integers(1, 3),
    st.sampled_from([1, 2]),
    st.integers(0, 2**32 - 1),
)
def test_ggufs_own_reader_finds_the_codes_and_the_scales_as_float16(name, rows, groups, seed):
    draw = np.random.default_rng(seed)
    codes = draw.integers(-LARGEST[name], LARGEST[name] + 1, (rows, 512)).astype(np.int8)
    codes[0, :256] = draw.choice([0, LARGEST[name], -LARGEST[name]])
    scales = np.exp(draw.normal(-4, 1, (rows, groups))).astype(np.float32)
    packed = gguf_blocks.blocks(name, codes, scales, "layer")
    assert packed.shape == (
        rows,
        512 // gguf.GGML_QUANT_SIZES[kind(name)][0] * gguf.GGML_QUANT_SIZES[kind(name)][1],
    )
    found = gguf.quants.dequantize(packed, kind(name))
    wanted = scales.astype(np.float16).astype(np.float32).repeat(512 // groups, 1) * codes
    np.testing.assert_array_equal(found, wanted)
    if name.startswith("TQ"):  # and its writer, of ternary values, writes these bytes
        ones = gguf.quants.quantize(codes.astype(np.float32), kind(name)).reshape(rows, 2, -1)
        np.testing.assert_array_equal(packed.reshape(rows, 2, -1)[..., :-2], ones[..., :-2])


def test_a_scale_that_float16_can_not_hold_is_refused_unless_its_codes_are_zero():
    codes = np.ones((2, 256), np.int8)
    for scale in (1e-6, 1e5):
        scales = np.array([[1.0], [scale]], np.float32)
        with pytest.raises(
            RecipeError, match=r"layer: scales from .* float16 holds 6.1e-05 to 65504"
        ):
            gguf_blocks.blocks("TQ2_0", codes, scales, "layer")
    codes[1] = 0
    found = gguf.quants.dequantize(
        gguf_blocks.blocks("TQ2_0", codes, np.array([[1], [1e-8]], np.float32), ""), kind("TQ2_0")
    )
    np.testing.assert_array_equal(found, codes)


@EACH
def test_a_file_holds_every_weight_the_student_computes_with(name, tmp_path):
    """Under llama.cpp's names; rows of q and k turn with their neighbours as ours do with those
    half a head away.
    """
    quant, shape, layers, _ = SCHEMES[name]
    table = SCHEMES[name][3]
    module = llama(**shape).eval()
    if quant:
        phases.round_as(module, quant)
    before = copy.deepcopy(module.state_dict())
    sizes = write_gguf.write(
        module, tmp_path / "m.gguf", matrices="F32", ternary=layers if layers[0] == "T" else "TQ2_0"
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(before.values(), module.state_dict().values(), strict=True)
    )
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert sizes == {
        k: sum(int(t.n_bytes) for t in tensors.values() if t.tensor_type.name == k) for k in sizes
    }
    found = {n: gguf.quants.dequantize(t.data, t.tensor_type) for n, t in tensors.items()}
    rounded = {n: layer.rounded() for n, layer in quantised(module) if layer.quant}
    parts = {n: rounded.get(n, getattr(m, "weight", None)) for n, m in module.named_modules()}
    wanted = {n: w.detach().numpy() for n, w in parts.items() if isinstance(w, Tensor)}
    same = np.array_equal(wanted["lm_head"], wanted["model.embed_tokens"])
    assert len(found) == len(wanted) - same
    assert ("output.weight" in found) != same
    kinds = {n: t.tensor_type.name for n, t in tensors.items()}
    assert kinds["token_embd.weight"] == table
    for i in range(2):
        block = f"blk.{i}."
        ours = f"model.layers.{i}."
        assert {kinds[n] for n in kinds if n.startswith(block) and "norm" not in n} == {layers}
        for theirs, own in (
            ("attn_v", "self_attn.v_proj"),
            ("ffn_down", "mlp.down_proj"),
            ("ffn_up", "mlp.up_proj"),
        ):
            np.testing.assert_allclose(
                found[f"{block}{theirs}.weight"], wanted[ours + own], rtol=2**-11, atol=0
            )
        for letter, heads in (("q", 4), ("k", module.settings["kv_heads"])):
            x = torch.randn(5, 256)
            held = found[f"{block}attn_{letter}.weight"]
            own = wanted[f"{ours}self_attn.{letter}_proj"]
            given, expected = (
                (x @ torch.tensor(w).T).unflatten(-1, (heads, 64)).transpose(0, 1)
                for w in (held, own)
            )
            given = rotate(given, TURN) if shape.get("sub_norm") else rotate_neighbours(given)
            torch.testing.assert_close(
                given, rotate(expected, TURN), rtol=0, atol=1e-3 * expected.abs().max().item()
            )


def rotate_neighbours(x: Tensor) -> Tensor:
    """The pairs (2 i, 2 i + 1) turned, as the paper does (arXiv 2104.09864, eq. 15); first all 2 i,
    then 2 i + 1.
    """
    a = x[..., ::2]
    b = x[..., 1::2]
    return torch.cat([a * TURN[0] - b * TURN[1], b * TURN[0] + a * TURN[1]], -1)


REFUSED = {
    "group": (
        Quant(weights="ternary", per="group", activations="none"),
        {},
        "quant.group: TQ2_0 has a scale for 256",
    ),
    "group-int4": (
        Quant(weights="int4", per="group", group=16, activations="none"),
        {},
        "or group = 32",
    ),
    "width": (
        TERNARY,
        {"inner": 320},
        "down_proj: TQ2_0 takes rows of a multiple of 256, found 320",
    ),
    "free-sub-norm": (
        None,
        {"sub_norm": True, "tied": False},
        "build the student with tied = true",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_form_in_gguf_is_refused_with_its_key_and_writes_nothing(name, tmp_path):
    quant, shape, words = REFUSED[name]
    module = Llama(classes=50, steps=8, width=256, layers=1, **({"inner": 256} | shape))
    if quant:
        phases.round_as(module, quant)
    with pytest.raises(RecipeError, match=words):
        write_gguf.write(module, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_without_the_package_it_says_what_to_type(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(RecipeError, match=r"pip install 'raykd\[gguf\]'"):
        write_gguf.write(llama(layers=1), tmp_path / "m.gguf")


def test_a_tokeniser_of_another_model_or_without_an_end_is_refused(tmp_path):
    bpe(tmp_path / "tokenizer.json")
    small = Llama(classes=50, steps=8, width=32, layers=1)
    with pytest.raises(RecipeError, match="384 tokens, and the model has 50 classes"):
        write_gguf.write(small, tmp_path / "m.gguf", tokenizer=tmp_path / "tokenizer.json")
    with pytest.raises(RecipeError, match="'def' is no special token"):
        write_gguf.write(
            llama(), tmp_path / "m.gguf", tokenizer=tmp_path / "tokenizer.json", end="def"
        )
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


class LlamaCpp:
    """A file as llama.cpp executes it, on one thread, keys and values in float32."""

    def __init__(self, path):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = STEPS
        params.n_parallel = 1
        params.warmup = False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.verbosity = 0
        self.server = xllamacpp.Server(params)

    def answer(self, prompt, **asked):
        return self.server.handle_completions(
            {"prompt": prompt, "temperature": 0.0, "cache_prompt": False, **asked}
        )

    def log_probabilities(self, ids: list[int]) -> Tensor:
        """(V,): of what follows; drawn by a bias, as only whole characters are reported."""
        letter = [[34, 1000.0]]
        said = self.answer(ids, n_predict=1, n_probs=TOKENS, logprobs=TOKENS, logit_bias=letter)
        found = torch.full((TOKENS,), float("nan"))
        for token in said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[token["id"]] = token["logprob"]
        return found


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A tokeniser, and models that have read a text in full precision."""
    path = tmp_path_factory.mktemp("language") / "tokenizer.json"
    tokenizer = bpe(path)
    made = {}
    ids = text(tokenizer, *READ)

    def get(name: str) -> Llama:
        quant, shape, *_ = SCHEMES[name]
        if repr(shape) not in made:
            made[repr(shape)] = train(llama(**shape), ids, 150, 3e-3)
        module = copy.deepcopy(made[repr(shape)])
        if quant:
            phases.round_as(module, quant)
            train(module, ids, 30, 1e-3)
        return module

    return path, tokenizer, get


@pytest.mark.slow
@EACH
def test_llama_cpp_answers_as_the_module_does(name, learnt, tmp_path):
    pytest.importorskip("xllamacpp", reason="pip install xllamacpp")
    path, tokenizer, get = learnt
    module = get(name)
    layers = SCHEMES[name][2]
    file = tmp_path / "m.gguf"
    ends = range(3, STEPS, 6)
    settings = {
        "matrices": "F32",
        "ternary": layers if layers[0] == "T" else "TQ2_0",
        "tokenizer": path,
        "end": END,
    }
    write_gguf.write(module, file, **settings)
    cpp = LlamaCpp(file)
    ids = text(tokenizer, HELD_OUT)[: 2 * STEPS].reshape(2, STEPS)
    with torch.inference_mode():
        wanted = module(ids)["logits"].log_softmax(-1)[:, list(ends)]
    found = torch.stack(
        [torch.stack([cpp.log_probabilities(row[: i + 1].tolist()) for i in ends]) for row in ids]
    )
    apart = (found - wanted).abs().amax(-1)
    following = torch.stack([ids[:, i + 1] for i in ends], 1)[..., None]
    nll = [-x.gather(-1, following).mean().item() for x in (found, wanted)]
    alike = (found.argmax(-1) == wanted.argmax(-1)).float().mean().item()
    print(
        f"\n{name}: {file.stat().st_size:,} bytes, NLL {nll[0]:.4f} and {nll[1]:.4f}, {alike:.1%} "
        "decided alike,"
    )
    print(f"log-probabilities apart by {apart.max():.1e}, half by {apart.median():.1e}")
    exact = SCHEMES[name][0] is None
    assert nll[1] < 5, "nats a token; untrained 5.95"
    assert apart.max() <= (1e-2 if exact else 0.2)
    assert apart.median() <= (1e-3 if exact else 0.05)
    assert alike >= (1 if exact else 0.95)
    assert nll[0] == pytest.approx(nll[1], rel=1e-3 if exact else 5e-3)


def test_llama_cpp_reads_and_writes_text_as_the_tokeniser_and_the_module_do(learnt, tmp_path):
    pytest.importorskip("xllamacpp", reason="pip install xllamacpp")
    path, tokenizer, get = learnt
    module = get("fp32")
    prompt = "def shorten(text, width=70):\n    caf\u00e9 = 2\u00b2  # it's 3\n"
    write_gguf.write(module, tmp_path / "m.gguf", matrices="F32", tokenizer=path, end=END)
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    length = ids.shape[1]
    with torch.inference_mode():
        while ids.shape[1] < length + 24:
            ids = torch.cat([ids, module(ids)["logits"][:, -1:].argmax(-1)], 1)
    said = LlamaCpp(tmp_path / "m.gguf").answer(prompt, n_predict=24)
    assert said["usage"]["prompt_tokens"] == length
    assert said["choices"][0]["text"] == tokenizer.decode(ids[0, length:].tolist())
