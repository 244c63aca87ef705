"""Rounded students as packed files: equal answers, the bytes that their bits say, and files that
were made to harm.

Those are sealed as their author would seal them, so that only the checks of each tensor stand.
"""

import json
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

from raykd.deploy import packed as packed_file
from raykd.errors import StoreError
from raykd.quant.coded import FixedEmbedding, FixedLinear
from raykd.quant.other_parameters import Stored, codes_and_scales
from raykd.quant.swap import quantised
from raykd.recipe.quant import LEVELS, Quant
from raykd.training import phases

WORDS = 21
WIDTH = 33
STEPS = 6
SCHEMES = {
    "int8": Quant(embeddings="int8"),
    "int8-tensor": Quant(per="tensor", activations="int8_token", embeddings="int8"),
    "int8-learned": Quant(scale="learned", rest="fp32"),
    "int4": Quant(weights="int4", embeddings="int4"),
    "int4-g16": Quant(weights="int4", per="group", group=16, embeddings="int4"),
    "int4-learned": Quant(
        weights="int4", per="group", group=16, scale="learned", activations="none"
    ),
    "ternary": Quant(weights="ternary", embeddings="ternary", activations="none"),
    "ternary-twn": Quant(weights="ternary", scale="twn", embeddings="int4", rest="fp32"),
    "ternary-untabled": Quant(weights="ternary", skip=["outer", "head"]),
    "ternary-head": Quant(weights="ternary", skip=["outer"]),
    "ternary-everything": Quant(weights="ternary", per="tensor", embeddings="int8", skip=[]),
}
EACH = pytest.mark.parametrize("quant", SCHEMES.values(), ids=SCHEMES)


class Speaker(nn.Module):
    """A table tied to the head, another, a convolution, a norm with a buffer of integers, a layer
    with two names.
    """

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.words = nn.Embedding(WORDS, width, padding_idx=0)
        self.places = nn.Embedding(STEPS, width)
        self.mix = nn.Conv1d(width, width, 1)
        self.norm = nn.BatchNorm1d(STEPS)
        self.inner = nn.Linear(width, 48)
        self.outer = nn.Linear(48, width, bias=False)
        self.again = self.inner
        self.head = nn.Linear(width, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        x = self.norm(self.mix(x.mT).mT)
        return self.head(x + self.outer(torch.relu(self.again(x))))


def speaker(quant: Quant, seed: int = 0, **settings: int) -> nn.Module:
    torch.manual_seed(seed)
    module = Speaker(**settings)
    phases.round_as(module, quant)
    with torch.no_grad():  # what training moves away from where it began
        for parameter in module.parameters():
            parameter.mul_(1 + 0.2 * torch.rand(parameter.shape))
    module(torch.randint(WORDS, (4, STEPS)))
    return module.eval()


def plain(seed: int = 1, **settings: int) -> nn.Module:
    torch.manual_seed(seed)
    return Speaker(**settings).eval()


def ids_of(rows: int = 5) -> Tensor:
    return torch.randint(WORDS, (rows, STEPS), generator=torch.Generator().manual_seed(2))


def answers(module: nn.Module) -> Tensor:
    with torch.inference_mode():
        return module(ids_of())


def parts(data: bytes) -> tuple[str, dict[str, Tensor]]:
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    return header["__metadata__"]["layers"].partition(" ")[2], load(data)


@EACH
def test_what_is_read_answers_bit_for_bit_as_what_was_written(quant):
    module = speaker(quant)
    found = plain()
    before = answers(module)
    packed_file.read(packed_file.write(module), found)
    assert torch.equal(answers(found), before)
    assert torch.equal(answers(module), before), "what is written is not changed"
    for name, layer in quantised(module):
        if isinstance(layer, Stored):
            continue
        held = found.get_submodule(name)
        assert isinstance(held, FixedLinear | FixedEmbedding) == (layer.quant is not None)
        if layer.quant is not None:
            assert torch.equal(held.codes, layer.codes())
            assert torch.equal(held.scales, layer.scales())
    assert found.again is found.inner


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("nested", [False, True])
def test_torchs_encoder_in_a_file_answers_in_evaluation_as_the_one_that_was_written(nested):
    """In evaluation it looks at the weights of its layers, and calls only those with a hook."""

    def encoder() -> nn.Module:
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()

    torch.manual_seed(0)
    module = encoder()
    phases.round_as(module, Quant(weights="ternary", activations="none", skip=[]))
    found = encoder()
    packed_file.read(packed_file.write(module), found)
    inputs = torch.randn(4, 8, 32)
    padding = torch.zeros(4, 8, dtype=torch.bool)
    padding[1, 5:] = True
    for keywords in ({}, {"src_key_padding_mask": padding}):
        with torch.inference_mode():
            assert torch.equal(found(inputs, **keywords), module(inputs, **keywords))


@EACH
def test_writing_again_gives_the_same_bytes(quant):
    assert packed_file.write(speaker(quant)) == packed_file.write(speaker(quant))


def test_scales_are_carried_for_found_again_they_would_be_smaller():
    quant = SCHEMES["ternary"]
    module = speaker(quant)
    found = plain()
    packed_file.read(packed_file.write(module), found)
    layer = module.inner
    carried = found.inner.scales
    with torch.no_grad():
        layer.weight.copy_(layer.rounded())
    assert torch.equal(carried, speaker(quant).inner.scales())
    assert (layer.scales() < 0.95 * carried).all()


@pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("int4", 4), ("ternary", 1.6)])
def test_codes_take_the_bytes_that_their_bits_say_and_the_rest_is_small(name, bits):
    module = speaker(SCHEMES[name])
    data = packed_file.write(module)
    tensors = parts(data)[1]
    rounding = [
        (n, layer)
        for n, layer in quantised(module)
        if layer.quant and not isinstance(layer, Stored)
    ]
    assert len(rounding) == 4
    for layer, rounded in rounding:
        packed = tensors[f"{layer}.codes"].nbytes
        assert packed == math.ceil(rounded.weight.numel() * bits / 8)
    assert "words.weight" not in tensors
    assert tensors["head.weight.codes"].nbytes == WORDS * WIDTH, (
        "once: the table that is tied to it has its own"
    )
    assert tensors["mix.weight.codes"].nbytes == WIDTH * WIDTH
    assert len(data) - sum(t.nbytes for t in tensors.values()) < 2_500, "names and settings"


@EACH
def test_codes_have_the_levels_of_their_scheme(quant):
    found = plain()
    packed_file.read(packed_file.write(speaker(quant)), found)
    for layer, kind in ((found.inner, quant.weights), (found.words, quant.embeddings)):
        if isinstance(layer, FixedLinear | FixedEmbedding):
            assert layer.codes.dtype == torch.int8
            assert int(layer.codes.to(torch.int16).abs().max()) <= LEVELS[kind]


def test_other_dtypes_are_kept(tmp_path):
    torch.manual_seed(0)
    module = Speaker().bfloat16()
    found = Speaker().bfloat16()
    phases.round_as(module, SCHEMES["int4"])
    packed_file.read(packed_file.write(module.eval()), found.eval())
    assert answers(found).dtype == torch.bfloat16
    assert torch.equal(answers(found), answers(module))
    with pytest.raises(StoreError, match=r"bfloat16 .* the module asks torch.float32"):
        packed_file.read(packed_file.write(module), plain())


def test_the_metadata_names_every_rounded_layer_and_how(tmp_path):
    (tmp_path / "student").write_bytes(packed_file.write(speaker(SCHEMES["int8-tensor"])))
    with safe_open(tmp_path / "student", "np") as file:
        layers = json.loads(file.metadata()["layers"].partition(" ")[2])
    assert layers.keys() == {"words", "places", "inner", "outer"}
    assert (
        layers["inner"].items()
        >= {"weights": "int8", "per": "tensor", "activations": "int8_token"}.items()
    )


def test_a_tied_parameter_is_stored_once_under_its_first_name():
    tensors = parts(packed_file.write(speaker(SCHEMES["int8-learned"])))[1]
    assert "head.weight" in tensors, "in full precision"
    assert not any(name.startswith("words.") for name in tensors)
    tensors = parts(packed_file.write(speaker(SCHEMES["ternary-untabled"])))[1]
    assert {"head.weight.codes", "head.weight.scales"} < tensors.keys()
    assert not any(name.startswith("words.") for name in tensors)


def test_what_no_layer_rounds_is_read_as_codes_times_scales():
    module = speaker(SCHEMES["ternary"])
    found = plain()
    codes, scales = codes_and_scales(module.mix.parametrizations.weight.original)
    packed_file.read(packed_file.write(module), found)
    assert torch.equal(found.mix.weight, codes * scales.reshape(-1, 1, 1))
    assert torch.equal(found.mix.weight, module.mix.weight)
    assert not torch.equal(found.mix.weight, module.mix.parametrizations.weight.original)


QUANT = SCHEMES["ternary"]
DATA = packed_file.write(speaker(QUANT))
INT4 = packed_file.write(speaker(SCHEMES["int4"]))


def changed(name: str, value: Tensor | None, data: bytes = DATA) -> bytes:
    """The file with one tensor replaced, or left out, and sealed anew."""
    layers, tensors = parts(data)
    others = {n: t for n, t in tensors.items() if n != name}
    return packed_file.sealed(layers, others if value is None else others | {name: value})


def edited(data: bytes, edit) -> bytes:
    """The file with the text of its header edited."""
    length = struct.unpack("<Q", data[:8])[0]
    text = edit(data[8 : 8 + length].decode()).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def requanted(**values: object) -> bytes:
    layers, tensors = parts(DATA)
    quants = json.loads(layers)
    quants["inner"] |= values
    return packed_file.sealed(json.dumps(quants), tensors)


HOSTILE = {
    "nothing": (b"", "damaged"),
    "a pickle": (b"\x80\x04\x95\x10" * 9, "damaged"),
    "half of it": (DATA[: len(DATA) // 2], "damaged"),
    "bytes after the end": (DATA + b"\0", "damaged"),
    "no metadata": (save(load(DATA)), "no 'layers'"),
    "null as metadata": (
        edited(save(load(DATA)), lambda t: '{"__metadata__":null,' + t[1:]),
        "no 'layers'",
    ),
    "a tensor of another dtype": (
        changed("inner.scales", torch.ones(48, 1).double()),
        r"inner.scales: torch.float64",
    ),
    "a tensor of another shape": (changed("inner.scales", torch.ones(48, 2)), r"\(48, 2\)"),
    "codes of another shape": (
        changed("inner.codes", torch.zeros(3, dtype=torch.uint8)),
        r"inner.codes: .*\(3,\)",
    ),
    "trits above 242": (
        changed("inner.codes", torch.full((317,), 243, dtype=torch.uint8)),
        "do not hold",
    ),
    "a nibble below -7": (
        changed("inner.codes", torch.zeros(792, dtype=torch.uint8), INT4),
        "codes below -7",
    ),
    "a scale of zero": (changed("inner.scales", torch.zeros(48, 1)), "above 0"),
    "a scale below zero": (changed("inner.scales", -torch.ones(48, 1)), "above 0"),
    "a scale of NaN": (changed("inner.scales", torch.full((48, 1), torch.nan)), "finite"),
    "no scales": (changed("inner.scales", None), "inner.scales: missing"),
    "no bias": (changed("inner.bias", None), "inner.bias: missing"),
    "no head": (changed("head.weight.codes", None), "head.weight: missing"),
    "scales of the head of zero": (
        changed("head.weight.scales", torch.zeros(WORDS)),
        "head.weight.scales: not all",
    ),
    "a head twice": (
        changed("head.weight", torch.zeros(WORDS, WIDTH)),
        "head.weight: the module has no such",
    ),
    "a vector as codes": (
        changed(
            "norm.bias.codes", torch.zeros(STEPS, dtype=torch.int8), changed("norm.bias", None)
        ),
        "norm.bias: missing",
    ),
    "one tensor more": (changed("zzz", torch.zeros(2)), "zzz: the module has no such tensor"),
    "weights beside codes": (
        changed("inner.weight", torch.zeros(48, WIDTH)),
        "inner.weight: the module has no such",
    ),
    "a dtype torch has not": (edited(DATA, lambda t: t.replace('"U8"', '"F4"')), "damaged"),
    "a key twice": (
        edited(
            DATA,
            lambda t: (
                '{"head.weight.codes":' + t[t.index('{"dtype') :].split("}")[0] + "}," + t[1:]
            ),
        ),
        "a key stands twice",
    ),
    "another digest": (edited(DATA, lambda t: t.replace('"layers":"', '"layers":"0')), "digest"),
    "a Quant that is none": (
        requanted(weights="int9"),
        r"inner.weights Input should be 'int8', 'int4' or 'ternary'",
    ),
    "another Quant": (
        requanted(weights="int8", activations="int8"),
        r"inner.codes: torch.uint8 .* asks torch.int8",
    ),
    "a setting more": (requanted(run="os.system"), "inner.run Extra inputs"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_file_that_was_made_to_harm_is_refused_and_leaves_the_module_alone(kind):
    data, words = HOSTILE[kind]
    found = plain()
    before = answers(found)
    with pytest.raises(StoreError, match=words):
        packed_file.read(data, found)
    assert torch.equal(answers(found), before)
    assert isinstance(found.inner, nn.Linear)


def test_layers_that_the_module_has_not_are_named():
    layers, tensors = parts(DATA)
    for name in ("", "mix", "nowhere", "again"):
        quants = json.loads(layers)
        quants[name] = quants["inner"]
        with pytest.raises(StoreError, match="no linear layer or embedding"):
            packed_file.read(packed_file.sealed(json.dumps(quants), tensors), plain())
    twice = layers[:-1] + ',"inner":{}}'
    with pytest.raises(StoreError, match="stands twice"):
        packed_file.read(packed_file.sealed(twice, tensors), plain())
    with pytest.raises(StoreError, match="damaged"):
        packed_file.read(packed_file.sealed("[" * 100_000, tensors), plain())
    with pytest.raises(StoreError, match=r"words.codes: .*139,.* asks .*135,"):
        packed_file.read(DATA, plain(width=32))


def test_an_embedding_without_embeddings_is_refused():
    layers, tensors = parts(DATA)
    quants = json.loads(layers)
    quants["words"]["embeddings"] = "none"
    with pytest.raises(StoreError, match='embeddings = "none"'):
        packed_file.read(packed_file.sealed(json.dumps(quants), tensors), plain())


EXPECTED = answers(speaker(QUANT))


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(DATA) - 1), st.integers(1, 255)), min_size=1, max_size=3)
)
def test_flipped_bytes_are_refused_or_change_nothing(flips):
    mutant = bytearray(DATA)
    for where, by in flips:
        mutant[where] ^= by
    refused_or_equal(bytes(mutant))


@settings(max_examples=400, deadline=None)
@given(st.integers(8, 8 + struct.unpack("<Q", DATA[:8])[0] - 1), st.binary(min_size=1, max_size=4))
def test_another_header_is_refused_or_changes_nothing(where, word):
    refused_or_equal(DATA[:where] + word + DATA[where + len(word) :])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_sealed_mutants_are_refused_or_answer(data):
    """Their author chose the codes: whatever is accepted holds codes and scales that training could
    have left.
    """
    layers, tensors = parts(DATA)
    name = data.draw(st.sampled_from(sorted(tensors)))
    raw = tensors[name].contiguous().flatten().view(torch.uint8).numpy().copy()
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    tensors[name] = torch.from_numpy(raw).view(tensors[name].dtype).reshape(tensors[name].shape)
    found = plain()
    try:
        packed_file.read(packed_file.sealed(layers, tensors), found)
    except StoreError:
        return
    assert answers(found).shape == EXPECTED.shape
    for layer in (m for m in found.modules() if isinstance(m, FixedLinear | FixedEmbedding)):
        assert np.isin(layer.codes.numpy(), [-1, 0, 1]).all()
        assert (layer.scales > 0).all()


def refused_or_equal(data: bytes) -> None:
    found = plain()
    try:
        packed_file.read(data, found)
    except StoreError:
        assert isinstance(found.inner, nn.Linear)
        return
    # to less than a flipped code: CPU kernels choose by the alignment of memory, which differs from
    # call to call
    torch.testing.assert_close(
        answers(found), EXPECTED, rtol=0, atol=1e-2 * float(EXPECTED.abs().max())
    )
