"""The ONNX file of a rounded module, executed by stock onnxruntime: the same integers, and answers
alike.

The reference is the module that trains, with fake rounding. With float activations every answer is
within 1e-5 of the largest. Where they are rounded, a sum in another order moves the code of an
activation by one where it lies at a tie, and that moves answers by 2e-2 of the largest at most. A
code is some 42 levels (a third of 127), and a sum of 32 terms in float32 is off by sqrt(32) 2^-24
of itself, 1.4e-5 levels: so often does a code lie on the other side. A row has 5,376 codes (12
steps, two blocks of 224), so that 8 % of rows have one that moved, and the answers of all others
are within 1e-5. Of a module that rounds activations otherwise than the runtime, no row's are.
"""

from dataclasses import dataclass

import numpy as np
import onnx
import pytest
import torch
from encoders import CHANNELS, CLASSES, SCHEMES, STEPS, encoder_of, onnx_of, rounding
from onnx import numpy_helper
from torch import Tensor, nn

from raykd.deploy.onnx import operators
from raykd.deploy.onnx import session as onnx_session
from raykd.deploy.onnx import write as write_onnx
from raykd.errors import RecipeError
from raykd.quant.pack import unpack
from raykd.quant.rounding import LEAST
from raykd.quant.swap import QuantLinear, quantised
from raykd.recipe.quant import BITS, Quant

ROWS = 1000
TOUCHED = 0.08  # of rows: those with a code at a tie
EACH = pytest.mark.parametrize("name", [None, *SCHEMES], ids=["fp32", *SCHEMES])
ROUNDED = pytest.mark.parametrize("name", SCHEMES)


@dataclass
class Exported:
    """A module as it trains, its layers, and its file."""

    quant: Quant | None
    module: nn.Module
    layers: dict[str, QuantLinear]
    data: bytes
    inputs: Tensor
    session: object

    def trained(self, rows: slice = slice(None)) -> list[np.ndarray]:
        with torch.inference_mode():
            said = self.module(self.inputs[rows])
        return [said["logits"].numpy(), said["valence"].numpy()]

    def answered(self, rows: slice = slice(None)) -> list[np.ndarray]:
        return self.session.run(["logits", "valence"], {"inputs": self.inputs[rows].numpy()})


def copy_of(module: nn.Module, quant: Quant | None) -> nn.Module:
    copied = encoder_of(quant)
    copied.load_state_dict(module.state_dict())
    return copied


def run(data: bytes, folder) -> object:
    (folder / "student.onnx").write_bytes(data)
    return onnx_session.session(folder / "student.onnx")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The encoder under a scheme, exported once for all that is asked of it."""
    made = {}

    def get(name: str | None) -> Exported:
        if name not in made:
            quant = SCHEMES.get(name)
            module = encoder_of(quant)
            inputs = torch.randn(ROWS, STEPS, CHANNELS)
            data = onnx_of(name)
            session = run(data, tmp_path_factory.mktemp("onnx"))
            made[name] = Exported(quant, module, dict(quantised(module)), data, inputs, session)
        return made[name]

    return get


def apart(found: np.ndarray, expected: np.ndarray, share: float = 1.0) -> float:
    """The difference that this share of the answers does not exceed, relative to the largest
    answer.
    """
    return float(np.quantile(np.abs(found - expected), share) / np.abs(expected).max())


def alike(
    found: np.ndarray, expected: np.ndarray, quant: Quant | None, worst: float = 2e-2
) -> bool:
    if quant is None or quant.activations == "none":
        return apart(found, expected) <= 1e-5
    off = np.abs(found - expected).reshape(len(found), -1).max(1) / np.abs(expected).max()
    most = TOUCHED + 3 * (TOUCHED * (1 - TOUCHED) / len(found)) ** 0.5
    return (off > 1e-5).mean() <= most and off.max() <= worst


@EACH
def test_the_file_answers_as_the_module_does(name, exported):
    case = exported(name)
    (logits, valence) = case.answered()
    (wanted, value) = case.trained()
    assert alike(logits, wanted, case.quant)
    assert alike(valence, value, case.quant, worst=5e-2), (
        "tanh of one neuron, at its steepest where it is small"
    )
    same = logits.argmax(-1) == wanted.argmax(-1)
    assert same.mean() >= (1 if case.quant is None or case.quant.activations == "none" else 0.999)


@ROUNDED
def test_the_file_holds_the_trained_codes_and_scales_bit_for_bit(name, exported):
    """Layer by layer, in their places; what fills a last block is zeros."""
    case = exported(name)
    held = stored(case.data)
    assert len(held) == len(case.layers) == 8
    for (codes, scales), layer in zip(held, case.layers.values(), strict=True):
        inputs = layer.in_features
        assert np.array_equal(codes[:, :inputs], layer.codes().numpy())
        assert not codes[:, inputs:].any()
        spread = layer.scales().repeat_interleave(inputs // layer.scales().shape[1], 1).numpy()
        assert np.array_equal(
            scales.repeat(codes.shape[1] // scales.shape[1], 1)[:, :inputs], spread
        )


@ROUNDED
def test_the_file_has_no_more_values_a_scale_than_its_bits_allow(name, exported):
    case = exported(name)
    most = {"ternary": 3, "int4": 16, "int8": 256}[case.quant.weights]
    for codes, scales in stored(case.data):
        groups = (codes.reshape(*scales.shape, -1) * scales[..., None]).reshape(scales.size, -1)
        assert max(len(np.unique(values)) for values in groups) <= most
        assert len(np.unique(codes)) <= most
        if case.quant.per == "tensor":
            assert len(np.unique(np.abs(scales))) == 1
            assert len(np.unique(groups)) <= most


def stored(data: bytes) -> list[tuple[np.ndarray, np.ndarray]]:
    """(codes (N, K'), scales (N, G)) of every rounded layer, in the order of their execution."""
    graph = onnx.load_from_string(data).graph
    held = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    users = {i: n for n in graph.node for i in n.input}
    found = []
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            times = users[
                users[node.output[0]].output[0]
            ]  # the cast, then total x (scale of activations x ours)
            made = next(n for n in graph.node if n.output[0] in times.input and n.op_type == "Mul")
            scales = next(held[i] for i in made.input if i in held)
            found.append((held[node.input[1]].T, scales.reshape(-1, 1)))
        elif node.op_type == "MatMulNBits":
            attributes = {a.name: a.i for a in node.attribute}
            packed = held[node.input[1]]
            scales = held[node.input[2]].reshape(attributes["N"], -1)
            found.append((unpack(packed.reshape(attributes["N"], -1), attributes["bits"]), scales))
    return found


@ROUNDED
def test_its_operators_are_those_of_the_scheme(name, exported):
    case = exported(name)
    proto = onnx.load_from_string(case.data)
    nodes = [n for n in proto.graph.node if n.op_type in operators.OPERATORS]
    assert {n.op_type for n in nodes} == {
        "MatMulInteger" if case.quant.weights == "int8" else "MatMulNBits"
    }
    for node in nodes if case.quant.weights != "int8" else []:
        attributes = {a.name: a.i for a in node.attribute}
        assert attributes["bits"] == BITS[case.quant.weights]
        assert attributes["accuracy_level"] == (4 if case.quant.activations == "int8" else 1)
    plain = [n.op_type for n in proto.graph.node if n.op_type in ("MatMul", "Gemm")]
    assert len(plain) == 2, "two heads"
    assert [n.op_type for n in proto.graph.node].count("Attention") == 2
    assert not proto.graph.value_info
    assert not any(n.doc_string or n.metadata_props for n in proto.graph.node)


@EACH
def test_a_row_is_answered_alone_as_in_a_batch_unless_activations_are_rounded_over_the_call(
    name, exported
):
    case = exported(name)
    whole = case.answered(slice(0, 50))[0]
    alone = np.concatenate([case.answered(slice(i, i + 1))[0] for i in range(50)])
    if case.quant is None or case.quant.weights != "int8":
        assert alike(alone, whole, case.quant)
        return
    assert 1e-4 < apart(alone, whole, 0.5) < 1e-2, "the range is that of the batch"
    expected = np.concatenate([case.trained(slice(i, i + 1))[0] for i in range(50)])
    assert alike(alone, expected, case.quant), "and the module that trains answers so, too"


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("int8-channel", 8),
        ("int4-g32", 4 + 1),
        ("int4-g64", 4.5),
        ("ternary-channel", 2.25),
        ("ternary-g16", 4),
    ],
)
def test_a_file_is_as_small_as_its_bits_say(name, bits, tmp_path):
    """Codes and a float32 scale a block: 2.25 bits of a ternary weight in blocks of 128."""
    quant = SCHEMES[name]
    width = 128
    module = encoder_of(quant, width=width)
    rounded = sum(layer.weight.numel() for _, layer in quantised(module))
    rest = sum(p.numel() for p in module.parameters()) - rounded
    size = len(write_onnx.to_onnx(module, torch.randn(2, STEPS, CHANNELS)))
    scales = 4 * sum(
        len(layer.codes) for layer in module.modules() if isinstance(layer, operators.MatMulNBits)
    )
    assert size == pytest.approx(rounded * bits / 8 + 4 * rest, abs=16_000 + scales), (
        "16 kB of graph"
    )


def test_a_block_is_what_takes_the_fewest_bytes():
    channel = Quant(weights="ternary")
    assert [channel.block(k) for k in (16, 32, 64, 100, 128, 256, 384)] == [
        32,
        32,
        64,
        128,
        128,
        128,
        128,
    ]
    assert Quant(weights="int4", per="group", group=16).block(64) == 16
    assert Quant(weights="int4", per="group", group=64).block(96) == 32, (
        "no group divides it: channel"
    )


@pytest.mark.parametrize("name", ["int8-channel", "ternary-channel"])
def test_a_file_may_take_any_number_of_steps(name, tmp_path):
    quant = SCHEMES[name]
    module = encoder_of(quant)
    session = run(
        write_onnx.to_onnx(copy_of(module, quant), torch.randn(2, 8, CHANNELS), most_steps=STEPS),
        tmp_path,
    )
    for steps in (1, 2, 7, STEPS):
        inputs = torch.randn(100, steps, CHANNELS)
        with torch.inference_mode():
            expected = module(inputs)["logits"].numpy()
        assert alike(session.run(["logits"], {"inputs": inputs.numpy()})[0], expected, quant)


def test_a_file_for_so_many_rows_answers_as_that_for_any(tmp_path):
    """It is what a model is timed as."""
    row = torch.randn(1, STEPS, CHANNELS)
    module = encoder_of(None)
    answers = []
    for any_rows in (False, True):
        file = write_onnx.to_onnx(copy_of(module, None), row, any_rows=any_rows)
        answers += run(file, tmp_path).run(["logits"], {"inputs": row.numpy()})
    assert apart(*answers) <= 1e-6


def test_a_module_of_one_number_of_steps_can_not_take_any():
    module = nn.Sequential(nn.Flatten(), nn.Linear(STEPS * CHANNELS, CLASSES))
    with pytest.raises(RecipeError, match="width follows the number of steps"):
        write_onnx.to_onnx(
            rounding(module, Quant(skip=[])), torch.randn(2, STEPS, CHANNELS), most_steps=STEPS
        )


def test_scales_that_training_made_negative_are_executed_as_the_least(tmp_path):
    quant = SCHEMES["ternary-learned"]
    module = encoder_of(quant)
    with torch.no_grad():
        for _, layer in quantised(module):
            layer.scale[::2].neg_()
            assert (layer.scales()[::2] == LEAST).all()
            assert torch.equal(layer.codes()[::2], layer.weight[::2].sign().to(torch.int8)), (
                "no sign flips"
            )
    inputs = torch.randn(20, STEPS, CHANNELS)
    expected = module(inputs)["logits"].detach().numpy()
    found = run(write_onnx.to_onnx(module, inputs[:2]), tmp_path).run(
        ["logits"], {"inputs": inputs.numpy()}
    )[0]
    assert apart(found, expected) <= 1e-5


class Torchs(nn.Module):
    """torch's own encoder, whose layers in evaluation read their linear layers' weights instead of
    calling them.
    """

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


class Shared(nn.Module):
    """A layer with two names and two calls, one that is never called, and an answer that is an
    object.
    """

    @dataclass
    class Answer:
        logits: Tensor

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.again = self.first
        self.idle = nn.Linear(32, 32)

    def forward(self, inputs: Tensor) -> "Shared.Answer":
        return Shared.Answer(self.again(torch.relu(self.first(inputs))))


def logits_of(answer: Tensor | Shared.Answer) -> Tensor:
    return answer if isinstance(answer, Tensor) else answer.logits


@pytest.mark.parametrize("kind", [Torchs, Shared])
@pytest.mark.parametrize("weights", ["int8", "ternary"])
def test_other_peoples_modules_are_rounded_too_where_they_are_evaluated(kind, weights, tmp_path):
    torch.manual_seed(0)
    module = rounding(kind(), Quant(weights=weights, skip=[]))
    inputs = torch.randn(20, 8, 32)
    quant = Quant(weights=weights, skip=[])
    learned = logits_of(module(inputs)).detach().numpy()
    with torch.inference_mode():
        evaluated = logits_of(module(inputs)).numpy()
    assert alike(evaluated, learned, quant)
    data = write_onnx.to_onnx(module, inputs[:2])
    nodes = [
        n.op_type
        for n in onnx.load_from_string(data).graph.node
        if n.op_type in operators.OPERATORS
    ]
    assert len(nodes) == (4 if kind is Torchs else 2)
    assert alike(run(data, tmp_path).run(["logits"], {"inputs": inputs.numpy()})[0], learned, quant)
    assert torch.backends.mha.get_fastpath_enabled()


def test_what_has_no_operator_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, inputs: Tensor) -> Tensor:
            return torch.linalg.eigvals(self.layer(inputs)).real

    with pytest.raises(
        RecipeError, match=r"Odd cannot be written as ONNX: .*linalg_eig.*; write that part"
    ):
        write_onnx.to_onnx(rounding(Odd(), Quant(skip=[])), torch.randn(2, 32, 32))
    assert torch.backends.mha.get_fastpath_enabled()
