"""The ExecuTorch program of a rounded module: the trained integers, and answers alike under
XNNPACK's own rounding.

Two references. One rounds activations as XNNPACK does, at every step, and has bfloat16 scales under
4 bits: 99 % of the logits are within 1e-5 of the largest (measured: 2e-7), and a flip at a tie is
worth 1e-2. The module that trains rounds activations over the call (int8), or not at all (int4
here): 99 % are within 1e-2, the largest 5e-2 away.
"""

import copy
import gc
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raykd import data
from raykd.deploy import pte
from raykd.errors import RecipeError
from raykd.models.series_encoder import SeriesEncoder
from raykd.quant.pack import pack
from raykd.quant.swap import QuantLinear, prepare, quantised, replace
from raykd.recipe.quant import Quant
from raykd.recipe.tables import DataRef

pytest.importorskip("executorch", reason="pip install 'raykd[executorch]'")

ROWS = 500
INT8 = Quant()
INT4 = Quant(weights="int4", per="group", activations="none")
SMALL = {
    "int8-channel": Quant(skip=[]),
    "int8-tensor": Quant(per="tensor", skip=[]),
    "int8-learned": Quant(scale="learned", skip=[]),
    "int4-channel": Quant(weights="int4", skip=[]),
    "int4-g32": Quant(weights="int4", per="group", skip=[]),
    "int4-learned": Quant(weights="int4", per="group", group=64, scale="learned", skip=[]),
}


def four_bits(layer: QuantLinear) -> bool:
    return layer.quant is not None and layer.quant.weights == "int4" and layer.in_features % 32 == 0


class AsXnnpack(nn.Module):
    """A layer with activations rounded over each step's own range, and scales as XNNPACK holds
    them.
    """

    def __init__(self, layer: QuantLinear):
        super().__init__()
        scales = layer.scales().bfloat16().float() if four_bits(layer) else layer.scales()
        spread = scales.repeat_interleave(layer.in_features // scales.shape[1], 1)
        self.weight = spread * layer.codes()
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        low = x.amin(-1, keepdim=True).clamp(max=0)
        high = x.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / 255
        zero = (-low / scale).round()
        return F.linear(
            ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale, self.weight, self.bias
        )


def rounding(module: nn.Module, quant: Quant) -> nn.Module:
    prepare(module, quant)
    for name, layer in quantised(module):
        layer.set(None if quant.skips(name) else quant)
    return module.eval()


def as_xnnpack(module: nn.Module) -> nn.Module:
    """A copy that computes as the program should."""
    copied = copy.deepcopy(module)
    replace(copied, {layer: AsXnnpack(layer) for _, layer in quantised(copied)})
    return copied


def encoder() -> nn.Module:
    return SeriesEncoder(channels=6, classes=7, steps=16, width=32)


def copy_of(state: dict[str, Tensor], quant: Quant) -> nn.Module:
    module = encoder()
    module.load_state_dict(state)
    return rounding(module, quant)


def rounded(quant: Quant, *parts: nn.Module) -> nn.Sequential:
    module = nn.Sequential(*parts)
    rounding(module, quant)
    return module


def stored(module: nn.Module) -> list[tuple[bytes, bytes]]:
    """The codes and scales of every rounded layer, as bytes."""
    found = []
    for _, layer in quantised(module):
        codes = layer.codes().numpy()
        scales = layer.scales()
        if four_bits(layer):
            found.append(
                (pack(codes, 4).tobytes(), scales.bfloat16().view(torch.int16).numpy().tobytes())
            )
        else:
            found.append((codes.tobytes(), scales.numpy().tobytes()))
    return found


def train(module: nn.Module, steps: int) -> None:
    rows = data.load(DataRef()).splits["train"]
    inputs = torch.from_numpy(rows.inputs.copy())
    label = torch.from_numpy(rows.label.copy())
    optimizer = torch.optim.AdamW(module.parameters(), 3e-3)
    draws = torch.Generator().manual_seed(0)
    for _ in range(steps):
        at = torch.randint(len(label), (64,), generator=draws)
        loss = F.cross_entropy(module(inputs[at])["logits"].mean(1), label[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def student() -> dict[str, Tensor]:
    """The state of a student of the gestures, in full precision."""
    torch.manual_seed(0)
    module = encoder()
    train(module, 300)
    return module.state_dict()


@pytest.fixture(scope="module")
def windows() -> tuple[Tensor, np.ndarray]:
    rows = data.load(DataRef()).splits["test"]
    every = len(rows) // ROWS
    return torch.from_numpy(rows.inputs[::every][:ROWS].copy()), rows.label[::every][:ROWS]


def alone(answer: Callable[[Tensor], Tensor], inputs: Tensor) -> np.ndarray:
    """(N, T, C): logits of windows that are answered one by one."""
    with torch.no_grad():
        return torch.cat([answer(inputs[i : i + 1]) for i in range(len(inputs))]).numpy()


def decided(logits: np.ndarray) -> np.ndarray:
    return logits.mean(1).argmax(-1)


def apart(found: np.ndarray, expected: np.ndarray, share: float = 1.0) -> float:
    """The difference that this share of the answers does not exceed, relative to the largest
    answer.
    """
    return float(np.quantile(np.abs(found - expected), share) / np.abs(expected).max())


@pytest.mark.parametrize("quant", [INT8, INT4], ids=["int8-channel", "int4-g32"])
def test_a_gesture_students_program_answers_as_the_module_that_trained(quant, student, windows):
    inputs, label = windows
    module = copy_of(student, quant)
    train(module, 100)
    wanted = alone(lambda x: module(x)["logits"], inputs)
    expected = alone(lambda x: as_xnnpack(module)(x)["logits"], inputs)
    layers = stored(module)
    program = pte.to_pte(module, inputs[:1], quant)
    answer = pte.load(program)
    found = alone(lambda x: answer(x)[0], inputs)
    assert [tuple(said.shape) for said in answer(inputs[:1])] == [(1, 16, 7), (1, 16)], (
        "the valence, too"
    )
    assert len(layers) == 4
    assert all(part in program for layer in layers for part in layer)
    assert apart(found, expected, 0.99) <= 1e-5
    assert apart(found, expected) <= 3e-2
    assert apart(found, wanted, 0.99) <= 2e-2
    same = decided(found) == decided(wanted)
    assert same.mean() >= 0.98
    assert abs((decided(found) == label).mean() - (decided(wanted) == label).mean()) <= 0.01


@pytest.mark.parametrize("name", SMALL)
def test_a_program_holds_the_trained_codes_and_scales_bit_for_bit(name):
    """In 4 bits where 32 divides a layer's inputs, and in 8 where it does not."""
    quant = SMALL[name]
    x = torch.randn(20, 3, 64)
    module = rounded(quant, nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 40, bias=False))
    expected = as_xnnpack(module)(x).detach().numpy()
    parts = [part for layer in stored(module) for part in layer]
    program = pte.to_pte(module, x, quant)
    assert [part in program for part in parts] == [True] * 4
    assert len(parts[0]) == 24 * 64 * (4 if quant.weights == "int4" else 8) // 8
    assert apart(pte.load(program)(x)[0].numpy(), expected, 0.98) <= 1e-5


def test_scales_that_training_made_negative_are_executed_above_zero():
    quant = SMALL["int4-learned"]
    x = torch.randn(2, 3, 64)
    module = rounded(quant, nn.Linear(64, 24))
    _, layer = next(quantised(module))
    assert layer.scale is not None
    with torch.no_grad():
        layer.scale[::2].neg_()
    expected = as_xnnpack(module)(x).detach().numpy()
    assert apart(pte.load(pte.to_pte(module, x, quant))(x)[0].numpy(), expected) <= 1e-5


def test_a_step_is_answered_alone_as_among_others():
    """XNNPACK's ranges are those of a step; ours are of the call."""
    quant = SMALL["int8-channel"]
    x = torch.randn(1, 8, 64) * torch.logspace(-2, 2, 8)[:, None]
    module = rounded(quant, nn.Linear(64, 24))
    trained = module(x).detach()[:, :1], module(x[:, :1]).detach()
    answers = [
        pte.load(pte.to_pte(copy.deepcopy(module), part, quant))(part)[0] for part in (x, x[:, :1])
    ]
    assert torch.equal(answers[0][:, :1], answers[1])
    assert not torch.allclose(*trained, rtol=1e-2)


def test_a_loaded_program_keeps_its_bytes_and_answers_stay():
    quant = SMALL["int8-channel"]
    x = torch.randn(1, 3, 64)
    program = pte.to_pte(rounded(quant, nn.Linear(64, 24)), x, quant)
    held = sys.getrefcount(program)
    answer = pte.load(program)
    gc.collect()
    assert sys.getrefcount(program) > held
    (first,) = answer(x)
    kept = first.clone()
    answer(-x)
    assert torch.equal(first, kept)


@pytest.mark.parametrize(
    ("quant", "words"),
    [
        (Quant(weights="ternary"), "no ternary kernels"),
        (Quant(weights="int4", per="group", group=16), "multiples of 32, found 16"),
    ],
)
def test_what_xnnpack_has_no_kernel_for_is_refused(quant, words):
    with pytest.raises(RecipeError, match=words):
        pte.to_pte(nn.Identity(), torch.randn(1, 2, 32), quant)


def test_without_the_package_it_says_what_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    monkeypatch.setitem(sys.modules, "executorch.runtime", None)
    with pytest.raises(RecipeError, match=r"pip install 'raykd\[executorch\]'"):
        pte.to_pte(nn.Identity(), torch.randn(1, 2, 32), Quant())
    with pytest.raises(RecipeError, match=r"pip install 'raykd\[executorch\]'"):
        pte.load(b"")


def test_what_can_not_be_exported_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs if self.layer(inputs).sum().item() > 0 else -inputs

    quant = Quant(skip=[])
    with pytest.raises(
        RecipeError, match=r"Odd cannot be written as an ExecuTorch program: .*; write that part"
    ):
        pte.to_pte(rounding(Odd(), quant), torch.randn(1, 2, 32), quant)
    assert torch.backends.mha.get_fastpath_enabled()
