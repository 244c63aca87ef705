"""The ExecuTorch program of a rounded module: the trained integers, and answers alike under XNNPACK's own rounding.

Two references. The module that trains rounds activations over the call (int8) or not at all (int4 here): 4e-2 of the
largest logit at most, measured 9e-3 to 2e-2. One that rounds them as XNNPACK does, at every step, and has bfloat16
scales under 4 bits: 1e-5 for most answers, and a flip at a tie now and then.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raykd import data, pte_file
from raykd.errors import RecipeError
from raykd.models.series import SeriesEncoder
from raykd.quant.layers import QuantLinear, prepare, quantised, replace
from raykd.quant.pack import pack
from raykd.quant.scheme import Quant
from raykd.recipe import DataRef

pytest.importorskip("executorch", reason="pip install 'raykd[executorch]'")

ROWS = 500
INT8, INT4 = Quant(), Quant(weights="int4", per="group", activations="none")
SMALL = {
    "int8-channel": Quant(skip=[]),
    "int8-tensor": Quant(per="tensor", skip=[]),
    "int8-learned": Quant(scale="learned", skip=[]),
    "int4-channel": Quant(weights="int4", skip=[]),
    "int4-g32": Quant(weights="int4", per="group", skip=[]),
    "int4-learned": Quant(weights="int4", per="group", group=64, scale="learned", skip=[]),
}


class AsXnnpack(nn.Module):
    """A layer with activations rounded over each step's own range, and scales as XNNPACK holds them."""

    def __init__(self, layer: QuantLinear, four_bits: bool):
        super().__init__()
        scales = layer.scales().bfloat16().float() if four_bits else layer.scales()
        spread = scales.repeat_interleave(layer.in_features // scales.shape[1], 1)
        self.weight, self.bias = spread * layer.codes(), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / 255
        zero = (-low / scale).round()
        return F.linear(((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale, self.weight, self.bias)


def rounding(module: nn.Module, quant: Quant) -> nn.Module:
    prepare(module, quant)
    for name, layer in quantised(module):
        layer.set(None if quant.skips(name) else quant)
    return module.eval()


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return SeriesEncoder(channels=6, classes=7, steps=16, width=32)


def train(module: nn.Module, steps: int) -> None:
    rows = data.load(DataRef()).splits["train"]
    inputs, label = torch.from_numpy(rows.inputs.copy()), torch.from_numpy(rows.label.copy())
    optimizer = torch.optim.AdamW(module.parameters(), 3e-3)
    draws = torch.Generator().manual_seed(0)
    for _ in range(steps):
        at = torch.randint(len(label), (64,), generator=draws)
        loss = F.cross_entropy(module(inputs[at])["logits"].mean(1), label[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def trained() -> dict[str, Tensor]:
    """The state of a student of the gestures, in full precision."""
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


def apart(found: np.ndarray, expected: np.ndarray, share: float = 1.0) -> float:
    """The difference that this share of the answers does not exceed, relative to the largest answer."""
    return float(np.quantile(np.abs(found - expected), share) / np.abs(expected).max())


@pytest.mark.parametrize("quant", [INT8, INT4], ids=["int8-channel", "int4-g32"])
def test_a_gesture_students_program_decides_as_the_module_that_trained(quant, trained, windows):
    module, inputs = encoder(), windows[0]
    module.load_state_dict(trained)
    rounding(module, quant)
    train(module, 100)
    wanted = alone(lambda x: module(x)["logits"], inputs)
    layers = {layer: AsXnnpack(layer, quant.weights == "int4") for _, layer in quantised(module)}
    stored = {name: (layer.codes().numpy(), layer.scales()) for name, layer in quantised(module)}
    program = pte_file.to_pte(module, inputs[:1], quant)
    answer = pte_file.load(program)
    found = alone(lambda x: answer(x)[0], inputs)
    print(quant.weights, len(program), apart(found, wanted), apart(found, wanted, .99), (found.mean(1).argmax(-1)==wanted.mean(1).argmax(-1)).mean(), [(a.mean(1).argmax(-1)==windows[1]).mean() for a in (found,wanted)])
    module = encoder(); module.load_state_dict(trained)
    raise SystemExit
