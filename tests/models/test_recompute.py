"""Blocks that are computed again in the backward pass: the same bits, fewer kept values."""

import pytest
import torch
from torch import nn

from raykd.errors import RecipeError
from raykd.losses.objective import Objective
from raykd.models.adapter import Adapter
from raykd.models.form import computing
from raykd.models.llama import Llama
from raykd.models.recompute import blocks_of, check_blocks, recompute_blocks
from raykd.models.series_encoder import SeriesEncoder
from raykd.recipe.precision import FP32, Precision
from raykd.recipe.tables import TermSpec
from raykd.signals import Batch, Signals
from raykd.stages.load import resolve

WANT = frozenset({"hidden.blocks.1", "hidden.blocks.0.mlp", "attention.blocks.0.attention"})


def step(is_again: bool, precision: Precision = FP32) -> tuple[Signals, list[torch.Tensor], int]:
    """(signals, gradients, bytes kept for the backward pass)."""
    torch.manual_seed(0)
    module = SeriesEncoder(channels=3, classes=4, steps=32, width=16, layers=4)
    if is_again:
        recompute_blocks(module)
    student = Adapter(module, want=WANT)
    inputs = torch.randn(8, 32, 3)
    mask = torch.ones(8, 32, dtype=torch.bool)
    kept: dict[int, int] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        kept[value.data_ptr()] = value.numel() * value.element_size()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        with computing(precision, inputs.device):
            said = student(inputs, mask)
        batch = Batch(torch.arange(8), inputs, mask, torch.arange(8) % 4)
        objective = Objective({"ce": TermSpec()})
        loss = objective.total(*objective(said, batch))
        loss = loss + sum(layer.float().square().mean() for layer in said.layers.values())
    loss.backward()
    return said, [p.grad for p in module.parameters() if p.grad is not None], sum(kept.values())


@pytest.mark.parametrize("precision", [FP32, Precision(student="bf16")], ids=["fp32", "bf16"])
def test_values_and_gradients_are_the_same_bits_and_less_is_kept(precision):
    plain, gradients, size = step(False, precision)
    again, others, less = step(True, precision)
    assert torch.equal(plain.logits, again.logits)
    assert plain.layers.keys() == again.layers.keys() == WANT
    assert len(gradients) == len(others) > 0
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
    assert less < 0.6 * size


def test_names_hooks_and_answers_without_a_gradient_stay():
    module = SeriesEncoder(channels=3, classes=4, steps=8, layers=2)
    names = list(module.state_dict())
    inputs = torch.randn(2, 8, 3)
    with torch.no_grad():
        before = module(inputs)["logits"]
        recompute_blocks(module)
        assert torch.equal(module(inputs)["logits"], before)
    assert list(module.state_dict()) == names


def test_blocks_are_the_members_of_a_list_of_one_class():
    assert len(blocks_of(Llama(classes=8, steps=4, layers=3))) == 3
    check_blocks(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 2))
    mixed = nn.ModuleList([nn.Linear(2, 2), nn.GELU()])
    with pytest.raises(RecipeError, match=r'scale\.recompute: "blocks", but ModuleList has no'):
        check_blocks(mixed)


def test_workers_do_not_meet_again_in_the_backward_pass():
    raw = {
        "technique": "none",
        "scale": {"recompute": "blocks", "workers": 2},
        "phases": [{"until": 1.0, "quant": {}}],
    }
    with pytest.raises(RecipeError, match=r"scale\.recompute: .*rows of all workers"):
        resolve(raw)
    assert resolve(raw | {"scale": {"recompute": "blocks"}}).scale.recompute == "blocks"
