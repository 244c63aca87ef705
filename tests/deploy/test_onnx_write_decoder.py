"""A language model's ONNX file beside the module that trains, token by token with both caches, on a
model that learnt.

The model reads bytes of the standard library's sources; each scheme trains on under its rounding.
int8 activations of MatMulInteger are rounded over the whole call ("int8"), so there a token by
itself is compared with a token by itself; every other scheme answers alike whatever the size of a
call.
"""

import copy
import textwrap
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import helper
from torch import Tensor, nn

from raykd.deploy.onnx import operators, write_decoder
from raykd.deploy.onnx import session as onnx_session
from raykd.deploy.onnx import write as write_onnx
from raykd.deploy.onnx.decoder import Decoder
from raykd.deploy.parity import BLOCKS, bar_of
from raykd.errors import DataError, StoreError
from raykd.models.llama import Llama
from raykd.quant.linear import QuantLinear
from raykd.quant.swap import quantised
from raykd.recipe.quant import BITS, Quant
from raykd.training import phases

STEPS = 128
ROWS = 8
POSITIONS = ROWS * (STEPS - 1)
SCHEMES = {
    "int8-tensor": Quant(weights="int8", per="tensor"),
    "int8-channel": Quant(weights="int8"),
    "int8-token": Quant(weights="int8", activations="int8_token"),
    "int4-g32": Quant(weights="int4", per="group", activations="none"),
    "ternary-int8": Quant(weights="ternary"),
    "sub-norm": Quant(weights="ternary", activations="none", embeddings="int8", skip=[]),
}
OVER_THE_CALL = ("int8-tensor", "int8-channel")
ROUNDED = pytest.mark.parametrize("name", SCHEMES)


def bytes_of(*names: str) -> Tensor:
    folder = Path(textwrap.__file__).parent
    return torch.tensor(list(b"".join((folder / name).read_bytes() for name in names)))


def train(module: Llama, steps: int, rate: float) -> Llama:
    """Plain cross-entropy on windows of the text, the same ones at every call."""
    text = bytes_of("textwrap.py", "argparse.py", "heapq.py")
    draw = torch.Generator().manual_seed(0)
    optim = torch.optim.AdamW(module.parameters(), lr=rate)
    for _ in range(steps):
        first = torch.randint(len(text) - 65, (8,), generator=draw)
        rows = text[first[:, None] + torch.arange(65)]
        loss = F.cross_entropy(module(rows[:, :-1])["logits"].flatten(0, 1), rows[:, 1:].flatten())
        optim.zero_grad()
        loss.backward()
        optim.step()
    return module.eval()


@dataclass
class Exported:
    """A module as it trains, its file, and held-out text that both read."""

    quant: Quant
    module: Llama
    data: bytes
    tokens: np.ndarray

    def decoder(self, rows: int = ROWS) -> Decoder:
        return Decoder(self.data, rows=rows)

    def trained(self, cuts: list[int]) -> np.ndarray:
        """(B, T, V): the module's logits with its own cache, in chunks between the cuts."""
        cache = self.module.cache(ROWS)
        ids = torch.from_numpy(self.tokens)
        with torch.inference_mode():
            found = [self.module(ids[:, a:b], cache)["logits"] for a, b in pairwise(cuts)]
        return torch.cat(found, 1).numpy()

    def answered(self, cuts: list[int]) -> np.ndarray:
        decoder = self.decoder()
        found = [decoder.step(self.tokens[:, a:b]) for a, b in pairwise(cuts)]
        return np.concatenate(found, 1)


@pytest.fixture(scope="module")
def exported():
    """The model under a scheme, trained on and exported once for all that is asked of it."""
    torch.manual_seed(0)
    shape = {"classes": 256, "steps": STEPS}
    learnt = {sub: train(Llama(**shape, sub_norm=sub), 200, 3e-3) for sub in (False, True)}
    text = bytes_of("shlex.py")[: ROWS * STEPS].reshape(ROWS, STEPS).numpy()
    made = {}

    def get(name: str) -> Exported:
        if name not in made:
            quant = SCHEMES[name]
            module = copy.deepcopy(learnt[name == "sub-norm"])
            phases.round_as(module, quant)
            train(module, 40, 1e-3)
            made[name] = Exported(quant, module, write_decoder.to_onnx(copy.deepcopy(module)), text)
        return made[name]

    return get


def nll(logits: np.ndarray, tokens: np.ndarray) -> float:
    said = torch.from_numpy(logits[:, :-1]).flatten(0, 1)
    return F.cross_entropy(said, torch.from_numpy(tokens[:, 1:]).flatten()).item()


def apart(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(B, T): the largest difference of a position's logits, over the largest logit of all."""
    return np.abs(found - wanted).max(-1) / np.abs(wanted).max()


@ROUNDED
def test_token_by_token_the_file_answers_as_the_module_does(name, exported):
    case = exported(name)
    cuts = list(range(STEPS + 1))
    found = case.answered(cuts)
    wanted = case.trained(cuts)
    assert POSITIONS >= 1000
    expected = nll(wanted, case.tokens)
    assert expected < 3.1, "nats a byte; without context 3.4, untrained 5.5"
    each = apart(found, wanted)
    bar = bar_of(case.quant)
    agreement = (found.argmax(-1) == wanted.argmax(-1)).mean()
    print(
        f"{name}: NLL {expected:.4f} and {nll(found, case.tokens):.4f}, {agreement:.2%} decided "
        "alike, ",
        end="",
    )
    print(f"apart by {each.max():.1e}, 99 % by {np.quantile(each, 0.99):.1e}")
    assert agreement >= bar.agreement
    assert np.quantile(each, 0.99) <= bar.relative
    assert each.max() <= bar.largest
    assert nll(found, case.tokens) == pytest.approx(expected, rel=5e-3)


@ROUNDED
def test_any_chunks_answer_as_one_call_unless_activations_are_rounded_over_it(name, exported):
    """Where they are, the module that trains answers so, too, if it reads the same chunks."""
    case = exported(name)
    bar = bar_of(exported(name).quant)
    cuts = [0, 1, 6, 40, 41, STEPS]
    found = case.answered(cuts)
    whole = case.answered([0, STEPS])
    if name in OVER_THE_CALL:
        assert np.quantile(apart(found, whole), 0.5) > 1e-3, "the range is that of the call"
        whole = case.trained(cuts)
    assert np.quantile(apart(found, whole), 0.99) <= bar.relative
    assert apart(found, whole).max() <= bar.largest


@pytest.mark.parametrize("name", ["int8-token", "int4-g32", "ternary-int8"])
def test_rows_do_not_depend_on_each_other(name, exported):
    case = exported(name)
    bar = bar_of(exported(name).quant)
    alone = [case.decoder(rows=1).step(case.tokens[i : i + 1]) for i in range(ROWS)]
    whole = case.answered([0, STEPS])
    assert np.quantile(apart(np.concatenate(alone), whole), 0.99) <= bar.relative
    assert apart(np.concatenate(alone), whole).max() <= bar.largest


def test_a_draft_is_taken_back_as_if_it_had_not_been_read(exported):
    case = exported("int4-g32")
    decoder = case.decoder()
    straight = case.answered([0, STEPS])
    decoder.step(case.tokens[:, :50])
    for kept in (50, 20, 0):
        decoder.step(case.tokens[:, 60:70])
        decoder.rollback(kept)
        assert decoder.length == kept
        found = decoder.step(case.tokens[:, kept : kept + 30])
        assert apart(found, straight[:, kept : kept + 30]).max() <= 1e-5
        decoder.rollback(kept)
    decoder.step(case.tokens)
    decoder.reset()
    assert decoder.length == 0
    assert apart(decoder.step(case.tokens), straight).max() <= 1e-5


def test_greedy_text_is_that_of_the_module(exported):
    case = exported("int4-g32")
    ids = torch.from_numpy(case.tokens[:, :40])
    with torch.inference_mode():
        for _ in range(60):
            ids = torch.cat([ids, case.module(ids)["logits"][:, -1:].argmax(-1)], 1)
    found = case.decoder().generate(case.tokens[:, :40], 60)
    assert found.shape == (ROWS, 60)
    assert len(np.unique(found)) > 5, "not one letter again and again"
    assert np.array_equal(found, ids[:, 40:].numpy())


@ROUNDED
def test_the_file_holds_the_trained_codes_an_operator_for_each_layer_and_no_table_of_positions(
    name, exported
):
    case = exported(name)
    proto = onnx.load_from_string(case.data)
    kind = "MatMulInteger" if case.quant.weights == "int8" else "MatMulNBits"
    count = 2 * 7 + (name == "sub-norm")
    nodes = [n.op_type for n in proto.graph.node if n.op_type in operators.OPERATORS]
    assert nodes.count(kind) == count
    assert len(nodes) - count == (name == "sub-norm"), "the embedding"
    linear = [m for _, m in quantised(case.module) if isinstance(m, QuantLinear) and m.quant]
    assert len(linear) == count
    wanted = sorted(operators.operator_of(m).codes.numpy().tobytes() for m in linear)
    held = [onnx.numpy_helper.to_array(t).tobytes() for t in proto.graph.initializer]
    assert [w for w in wanted if w not in held] == []
    bits = sum(m.weight.numel() for m in linear) * BITS[case.quant.weights]
    table = 256 * (
        64 + 4
    )  # int8, with a scale a row; a tied one stands once, or as the head's own codes too
    scales = sum(operators.operator_of(m).scales.numel() for m in linear)
    assert len(case.data) < bits / 8 + 4 * scales + table + 14_000, "14 kB of graph and norms"
    assert not any(STEPS in t.dims for t in proto.graph.initializer)
    assert {p.key: p.value for p in proto.metadata_props} == {"steps": str(STEPS)}


def test_what_can_not_be_read_is_refused_and_changes_nothing(exported):
    case = exported("int4-g32")
    decoder = exported("int4-g32").decoder(rows=2)
    first = decoder.step(case.tokens[:2, :100])
    assert first.shape == (2, 100, 256)
    for wrong in (case.tokens[:2, :29], case.tokens[:1, :5], case.tokens[:2, :0]):
        with pytest.raises(
            DataError, match="after 100; this decoder takes 2 rows, and 128 tokens in all"
        ):
            decoder.step(wrong)
    for length in (-1, 101):
        with pytest.raises(DataError, match="keep 0 to 100"):
            decoder.rollback(length)
    rest = decoder.step(case.tokens[:2, 100:])
    assert apart(np.concatenate([first, rest], 1), case.answered([0, STEPS])[:2]).max() <= 1e-5


def test_a_file_that_does_not_decode_is_refused():
    value = [
        helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in ("inputs", "logits")
    ]
    graph = helper.make_graph(
        [helper.make_node("Abs", ["inputs"], ["logits"])], "other", value[:1], value[1:]
    )
    opset = [helper.make_opsetid("", operators.OPSET)]
    with pytest.raises(StoreError, match="does not decode"):
        Decoder(helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString())


class One(nn.Module):
    """A layer wide enough for the lookup tables."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(384, 1024, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs)


def test_lookup_tables_answer_within_the_bar_of_blocks_and_others_pass_over_what_they_do_not_know():
    torch.manual_seed(0)
    module = One()
    quant = Quant(weights="ternary", per="group", skip=[])
    phases.round_as(module, quant)
    x = torch.randn(64, 5, 384)
    wanted = module(x).detach().numpy()
    data = write_onnx.to_onnx(module, x[:2])
    plain, tables = (
        onnx_session.session(data, lut=lut).run(None, {"inputs": x.numpy()})[0]
        for lut in (False, True)
    )
    assert np.quantile(np.abs(plain - wanted), 0.99) <= 1e-5 * np.abs(wanted).max()
    assert np.abs(tables - wanted).max() <= BLOCKS.relative * np.abs(wanted).max()
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("mlas.no_such_entry", "1")
    other = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(other.run(None, {"inputs": x.numpy()})[0], plain)


def test_as_many_heads_of_keys_as_of_queries_are_written_too():
    torch.manual_seed(0)
    module = Llama(
        classes=50, steps=32, width=32, layers=1, heads=4, kv_heads=4, inner=64, tied=False
    ).eval()
    tokens = torch.randint(50, (1, 12))
    with torch.inference_mode():
        said = module(tokens)["logits"].numpy()
    decoder = Decoder(write_decoder.to_onnx(module))
    answered = np.concatenate([decoder.step(tokens[:, i : i + 1].numpy()) for i in range(12)], 1)
    assert np.abs(said - answered).max() <= 1e-5 * np.abs(said).max()
