"""Laws of a training's throughput: arithmetic in closed form, rates that are counted, and a module
that torch cannot count ends no training.
"""

from typing import Any

import pytest
import torch
from torch import nn

from raykd.models.adapter import Adapter
from raykd.models.llama import Llama
from raykd.recipe.precision import FP32
from raykd.signals import Batch
from raykd.training import throughput
from raykd.training.throughput import PASSES, Pace, forward_flops, peak_flops

STEPS = 5
CPU = torch.device("cpu")


class Straight(nn.Module):
    """Two linear layers, at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 4))

    def forward(self, inputs: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.layers(inputs)}


class Uncountable(Straight):
    """A module that fails where its operations are looked at."""

    def forward(self, inputs: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        raise NotImplementedError("only for eyes of the device")


def batch_of(rows: int, inputs: torch.Tensor | None = None) -> Batch:
    if inputs is None:
        inputs = torch.ones(rows, STEPS, 3)
    mask = torch.ones(rows, STEPS, dtype=torch.bool)
    mask[:, -1] = False
    number = torch.arange(rows)
    return Batch(inputs=inputs, mask=mask, label=number, row_id=number)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_forward_passs_arithmetic_is_that_of_its_products(rows):
    products = 3 * 8 + 8 * 4
    assert forward_flops(Adapter(Straight()), batch_of(rows)) == 2 * rows * STEPS * products


def test_a_head_that_is_left_to_the_losses_counts():
    settings: dict[str, Any] = {"width": 16, "layers": 1, "heads": 2, "kv_heads": 2, "inner": 24}
    torch.manual_seed(0)
    student = Adapter(Llama(classes=9000, steps=STEPS, **settings))
    batch = batch_of(2, torch.ones(2, STEPS, dtype=torch.int64))
    whole = forward_flops(student, batch)
    student.find_head(batch.inputs, batch.mask)
    assert student(batch.inputs, batch.mask).headed is not None
    assert forward_flops(student, batch) == whole


def test_a_module_that_cannot_be_counted_ends_nothing_and_stays_in_its_mode():
    student = Adapter(Uncountable()).train()
    assert forward_flops(student, batch_of(1)) == 0
    assert student.training
    pace = Pace(seconds=1.0)
    told = pace.told(student, batch_of(1), FP32, workers=1)
    assert "flops_per_row" not in told
    assert "peak_memory_mb" in told


def test_rates_are_what_was_counted():
    pace = Pace()
    pace.read([batch_of(6), batch_of(2)], waiting=0.5)
    pace.read([batch_of(8)], waiting=0.5)
    pace.seconds = 4.0
    assert pace.rates(workers=3) == {
        "rows_per_second": 3 * 16 / 4,
        "tokens_per_second": 3 * 16 * (STEPS - 1) / 4,
        "waiting_share": 0.25,
    }
    told = pace.told(Adapter(Straight()), batch_of(1), FP32, workers=3)
    assert told["flops_per_row"] == PASSES * 2 * STEPS * (3 * 8 + 8 * 4)
    assert 0 < told["peak_share"] < 1


def test_a_training_that_takes_no_step_tells_nothing():
    assert Pace().told(Adapter(Straight()), batch_of(1), FP32, workers=1) == {}


def test_a_larger_product_shows_no_lower_peak(monkeypatch):
    """The rate of a product that is mostly overhead is not taken for the device's."""
    large = peak_flops(CPU, FP32)
    monkeypatch.setitem(throughput.SIDE, "cpu", 4)
    assert peak_flops(CPU, FP32) < large
