"""Our fake rounding against torchao's, where both define the same: levels, scales, codes, rounded
values, gradients.

Ours divides by the scale and theirs multiplies with its reciprocal, so that the two codes of a
quotient within 4 ulp of a tie may differ, by one. Everywhere else, and everywhere under scales that
are powers of two, they are equal. torchao's own recipes have another range: max / 7.5 on -8..7 for
int4, where ours is max / 7 on -7..7.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raykd.quant.rounding import LEAST, Activations, Blocks, codes_of, scale_of
from raykd.quant.swap import QuantLinear
from raykd.recipe.quant import LEVELS, Quant

pytest.importorskip("torchao", reason="pip install 'raykd[torchao]'")

from torchao.quantization.quant_primitives import (  # pyright: ignore[reportMissingImports]
    MappingType,
    _fake_quantize_affine,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)

NEAR = 4 * torch.finfo(torch.float32).eps
SCHEMES = {
    "int8-channel": Quant(),
    "int8-tensor": Quant(per="tensor"),
    "int4-g32": Quant(weights="int4", per="group"),
    "int4-channel": Quant(weights="int4"),
}
EACH = pytest.mark.parametrize("quant", SCHEMES.values(), ids=SCHEMES)
OUTPUTS = 24
INPUTS = 96


def gaussian(draws: torch.Generator) -> Tensor:
    return torch.randn(OUTPUTS, INPUTS, generator=draws)


def heavy_tailed(draws: torch.Generator) -> Tensor:
    return gaussian(draws) / torch.randn(OUTPUTS, INPUTS, generator=draws)


def one_sided(draws: torch.Generator) -> Tensor:
    return -gaussian(draws).abs()


def of_many_sizes(draws: torch.Generator) -> Tensor:
    """Rows from 1e-7 to 1e7, some of their scales below the least one."""
    return gaussian(draws) * torch.logspace(-7, 7, OUTPUTS)[:, None]


def with_zeros(draws: torch.Generator) -> Tensor:
    weight = gaussian(draws) * (torch.rand(OUTPUTS, INPUTS, generator=draws) < 0.1)
    weight[::3] = 0
    return weight


KINDS = [gaussian, heavy_tailed, one_sided, of_many_sizes, with_zeros]
WEIGHTS = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def layer_of(weight: Tensor, quant: Quant) -> QuantLinear:
    layer = QuantLinear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
    layer.set(quant)
    return layer


def block_of(quant: Quant, weight: Tensor) -> list[int]:
    """The weights that share a scale, as torchao says it."""
    return [len(weight), INPUTS] if quant.per == "tensor" else [1, quant.columns(INPUTS)]


def theirs(weight: Tensor, block: Sequence[int], largest: int) -> tuple[Tensor, Tensor, Tensor]:
    """torchao's scales, codes and rounded values in the symmetric range -largest..largest."""
    shared: dict[str, Any] = {"quant_min": -largest, "quant_max": largest}
    scale, zero = choose_qparams_affine(
        weight, MappingType.SYMMETRIC, block, torch.int8, eps=LEAST, keepdim=True, **shared
    )
    codes = quantize_affine(weight, block, scale, zero, torch.int8, **shared)
    return scale, codes, dequantize_affine(codes, block, scale, zero, torch.int8, **shared)


def assert_equal_codes(ours: Tensor, others: Tensor, quotient: Tensor) -> None:
    """Equal, or one apart where the quotient lies within rounding errors of a tie."""
    apart = (ours.int() - others.int()).abs()
    tie = ((quotient.abs() % 1) - 0.5).abs() <= NEAR * quotient.abs().clamp(min=1)
    assert not apart[~tie].any()
    assert apart.max() <= 1


@WEIGHTS
@EACH
def test_scales_are_torchaos_bit_for_bit_and_codes_away_from_ties(quant, kind):
    layer = layer_of(kind(torch.Generator().manual_seed(0)), quant)
    weight = layer.weight.detach()
    scale, codes, values = theirs(weight, block_of(quant, weight), LEVELS[quant.weights])
    assert torch.equal(
        layer.scales(), scale.expand(OUTPUTS, -1) if quant.per == "tensor" else scale
    )
    spread = layer.scales().repeat_interleave(INPUTS // scale.shape[1], 1)
    assert_equal_codes(layer.codes(), codes, weight / spread)
    same = layer.codes() == codes
    assert same.float().mean() >= 0.999
    assert torch.equal(layer.rounded().detach()[same], values[same])


@EACH
def test_on_a_grid_of_ties_codes_are_equal_where_scales_are_powers_of_two(quant):
    """Every half and every whole number of the range, the largest among them in each group: ties go
    to even.
    """
    largest = LEVELS[quant.weights]
    halves = torch.arange(-2 * largest, 2 * largest + 1) / 2
    draws = torch.Generator().manual_seed(0)
    weight = halves[torch.randint(len(halves), (OUTPUTS, INPUTS), generator=draws)]
    weight[:, ::16] = float(largest)
    weight *= 1 if quant.per == "tensor" else 2.0 ** torch.arange(-12, 12)[:, None]
    layer = layer_of(weight, quant)
    scale, codes, values = theirs(weight, block_of(quant, weight), largest)
    assert torch.equal(layer.codes(), codes)
    assert torch.equal(layer.rounded().detach(), values)
    assert set((weight[0] / scale[0, 0] % 1).abs().tolist()) == {0.0, 0.5}


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=64),
    st.sampled_from([7, 127]),
)
def test_any_group_of_weights_has_torchaos_scale_and_codes(values, largest):
    weight = torch.tensor([[values]])
    scale = scale_of(weight, "absmax", largest)
    other, codes, _ = theirs(weight[0], [1, len(values)], largest)
    assert torch.equal(scale[0], other)
    assert_equal_codes(codes_of(weight, scale, "absmax", largest)[0], codes, (weight / scale)[0])


@WEIGHTS
@EACH
def test_gradients_are_torchaos(quant, kind):
    """Straight through; under absmax no weight is out of range, so that nothing is cut off in
    either.
    """
    weight = kind(torch.Generator().manual_seed(1))
    upstream = torch.randn(OUTPUTS, INPUTS)
    largest = LEVELS[quant.weights]
    ours = layer_of(weight, quant)
    ours.rounded().backward(upstream)
    other = weight.clone().requires_grad_()
    block = block_of(quant, weight)
    scale, _, _ = theirs(weight, block, largest)
    _fake_quantize_affine(
        other, block, scale, torch.zeros_like(scale), torch.int8, -largest, largest
    ).backward(upstream)
    torch.testing.assert_close(ours.weight.grad, other.grad, rtol=1e-6, atol=0)


def activations(draws: torch.Generator) -> list[Tensor]:
    x = torch.randn(64, 96, generator=draws)
    return [x, x.abs(), -x.abs(), x + 3, x * 1e4, torch.zeros(64, 96)]


def asymmetric(x: Tensor, block: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """torchao's int8 activations: scales, codes and rounded values."""
    scale, zero = choose_qparams_affine(
        x, MappingType.ASYMMETRIC, block, torch.int8, eps=LEAST, keepdim=True
    )
    codes = quantize_affine(x, block, scale, zero, torch.int8)
    return scale, zero, dequantize_affine(codes, block, scale, zero, torch.int8)


def close(ours: Tensor, others: Tensor, scale: Tensor, share: float = 0.999) -> bool:
    """Equal in nearly all places, and a level apart at a tie."""
    apart = (ours - others).abs()
    return bool((apart <= 1e-5 * scale).float().mean() >= share and (apart <= 1.001 * scale).all())


@pytest.mark.parametrize("kind", range(6))
def test_activations_of_a_call_are_torchaos_with_one_range_for_all(kind):
    """uint8 from zero on ours, int8 from -128 on theirs: the same 256 levels."""
    x = activations(torch.Generator().manual_seed(0))[kind]
    scale, zero, values = asymmetric(x, list(x.shape))
    found = Activations.apply(x)
    assert close(found, values, scale)
    if kind == 1:
        assert zero.item() == -128, "nothing below zero"


@pytest.mark.parametrize("kind", range(6))
def test_activations_of_one_step_are_torchaos_per_token(kind):
    """What its recipes and XNNPACK do at every step; ours does so over a call of one, and else
    coarser.
    """
    x = activations(torch.Generator().manual_seed(0))[kind] * torch.logspace(-2, 2, 64)[:, None]
    scale, _, values = asymmetric(x, [1, 96])
    alone = torch.stack([Activations.apply(row) for row in x])
    assert close(alone, values, scale)
    if kind != 5:
        assert not close(Activations.apply(x), values, scale)


@pytest.mark.parametrize("kind", range(6))
def test_activations_in_blocks_are_torchaos_symmetric_groups(kind):
    x = activations(torch.Generator().manual_seed(0))[kind]
    scale, _, values = theirs(x, [1, 32], 127)
    assert close(Blocks.apply(x, 32), values, scale.repeat_interleave(32, 1))


@pytest.mark.parametrize(
    "ours", [Activations.apply, lambda x: Blocks.apply(x, 32)], ids=["call", "blocks"]
)
def test_gradients_of_activations_go_straight_through_as_torchaos(ours: Callable[[Tensor], Tensor]):
    x = torch.randn(8, 96, requires_grad=True)
    upstream = torch.randn(8, 96)
    ours(x).backward(upstream)
    other = x.detach().clone().requires_grad_()
    scale, zero = choose_qparams_affine(
        x.detach(), MappingType.ASYMMETRIC, [8, 96], torch.int8, eps=LEAST
    )
    _fake_quantize_affine(other, [8, 96], scale, zero, torch.int8, -128, 127).backward(upstream)
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-6, atol=0)


def test_the_range_of_torchaos_recipes_is_another():
    """Its int4 leaves -8 to the lowest and cuts the highest: half a level from ours."""
    weight = gaussian(torch.Generator().manual_seed(0))
    layer = layer_of(weight, SCHEMES["int4-g32"])
    scale, _ = choose_qparams_affine(
        weight, MappingType.SYMMETRIC, [1, 32], torch.int8, -8, 7, keepdim=True
    )
    torch.testing.assert_close(layer.scales() / scale, torch.full_like(scale, 7.5 / 7))
    codes = quantize_affine(weight, [1, 32], scale, torch.zeros_like(scale), torch.int8, -8, 7)
    assert codes.min() == -8
    assert layer.codes().min() == -7
