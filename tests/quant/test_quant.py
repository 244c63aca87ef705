"""Quantisers: levels, scales and gradients by their definitions, and what rounding must leave
alone.

Signal-to-noise ratios of Gaussian weights are known numbers of each rule, given to 0.3 dB; the
gradients of LSQ stand against autograd of its formula with a straight-through rounding, in float64.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from child import start, wait
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raykd.errors import RecipeError
from raykd.models.series_encoder import SeriesEncoder
from raykd.quant.pack import pack, pack_trits, unpack, unpack_trits
from raykd.quant.rounding import LEAST, Activations, Blocks, Learned, Rounded, codes_of, scale_of
from raykd.quant.swap import QuantLinear, prepare, quantised
from raykd.recipe.quant import BITS, LEVELS, Quant

SCHEMES = {
    "int8-tensor": Quant(weights="int8", per="tensor"),
    "int8-channel": Quant(weights="int8"),
    "int4-channel": Quant(weights="int4"),
    "int4-g32": Quant(weights="int4", per="group"),
    "int4-learned": Quant(weights="int4", per="group", scale="learned"),
    "ternary-tensor": Quant(weights="ternary", per="tensor"),
    "ternary-channel": Quant(weights="ternary"),
    "ternary-g32": Quant(weights="ternary", per="group"),
    "ternary-twn": Quant(weights="ternary", scale="twn"),
    "ternary-learned": Quant(weights="ternary", scale="learned"),
}
LAWS = pytest.mark.parametrize("quant", SCHEMES.values(), ids=SCHEMES)
SQNR = {
    "int8-channel": 42.1,
    "int4-channel": 16.9,
    "int4-g32": 20.2,
    "ternary-channel": 5.8,
    "ternary-twn": 7.2,
}


def layer_of(
    quant: Quant | None, inputs: int = 64, outputs: int = 16, seed: int = 0
) -> QuantLinear:
    torch.manual_seed(seed)
    layer = QuantLinear.of(nn.Linear(inputs, outputs))
    nn.init.normal_(layer.weight)
    layer.set(quant)
    return layer


@LAWS
def test_codes_have_no_more_levels_than_their_bits_and_the_weights_are_scale_times_code(quant):
    layer = layer_of(quant)
    codes = layer.codes()
    scales = layer.scales()
    largest = LEVELS[quant.weights]
    assert codes.abs().max() <= largest
    assert len(codes.unique()) <= 2 ** BITS[quant.weights]
    if quant.weights == "ternary":
        assert set(codes.unique().tolist()) == {-1, 0, 1}
    spread = scales.repeat_interleave(64 // scales.shape[1], dim=1)
    torch.testing.assert_close(layer.rounded(), spread * codes, rtol=0, atol=0)


@LAWS
def test_without_blend_a_layer_is_the_plain_one_bit_for_bit(quant):
    layer = layer_of(quant)
    layer.blend = 0.0
    x = torch.randn(5, 64)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    layer.blend = 1e-6
    torch.testing.assert_close(layer.rounded(), layer.weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SQNR)
def test_the_noise_of_gaussian_weights_is_the_known_one(name):
    layer = layer_of(SCHEMES[name], inputs=4096, outputs=64)
    noise = (layer.rounded() - layer.weight).square().mean() / layer.weight.square().mean()
    # per channel of 4,096 Gaussians the largest is 3.6 sd, of 1,024 (where the figures come from)
    # 3.2: 1 dB in absmax
    allowed = 1.2 if SCHEMES[name].rule == "absmax" else 0.3
    assert -10 * torch.log10(noise).item() == pytest.approx(SQNR[name], abs=allowed)


@pytest.mark.parametrize("name", ["int8-tensor", "int8-channel", "int4-channel", "int4-g32"])
def test_absmax_may_be_applied_twice(name):
    layer = layer_of(SCHEMES[name])
    once = layer.rounded().detach()
    with torch.no_grad():
        layer.weight.copy_(once)
    torch.testing.assert_close(layer.rounded(), once, rtol=1e-6, atol=0)


def test_absmean_may_not_so_that_its_scale_must_be_carried():
    """A third of Gaussian weights become 0, so that the mean of the rest over all is 0.69 of the
    scale.
    """
    layer = layer_of(Quant(weights="ternary", per="tensor"), inputs=1024, outputs=256)
    gamma = layer.scales()[0, 0].clone()
    with torch.no_grad():
        layer.weight.copy_(layer.rounded())
    assert (layer.scales()[0, 0] / gamma).item() == pytest.approx(0.69, abs=0.01)


@pytest.mark.parametrize("name", [n for n in SCHEMES if "learned" not in n])
def test_rows_scaled_by_powers_of_two_round_alike_unless_they_share_a_scale(name):
    quant = SCHEMES[name]
    layer = layer_of(SCHEMES[name])
    power = 2.0 ** torch.arange(-8, 8)[:, None]
    before = layer.rounded().detach()
    with torch.no_grad():
        layer.weight.mul_(power)
    same = torch.equal(layer.rounded().detach(), before * power)
    assert same == (quant.per != "tensor")


@pytest.mark.parametrize("rule", ["absmax", "absmean", "twn"])
def test_the_gradient_goes_straight_through(rule):
    weight = torch.randn(4, 1, 32, requires_grad=True)
    upstream = torch.randn(4, 1, 32)
    Rounded.apply(weight, scale_of(weight.detach(), rule, 1), rule, 1).backward(upstream)
    assert torch.equal(weight.grad, upstream)


def straight_through(ratio: Tensor, largest: int) -> Tensor:
    clipped = ratio.clamp(-largest, largest)
    return clipped + (clipped.round() - clipped).detach()


@pytest.mark.parametrize("largest", [1, 7, 127])
def test_lsq_equals_autograd_of_its_formula(largest):
    """The product rule through clip and rounding, times 1 / sqrt(n largest) for the scale."""
    torch.manual_seed(0)
    weight = torch.randn(3, 2, 40, dtype=torch.float64)
    scale = scale_of(weight, "learned", largest).double()
    upstream = torch.randn(3, 2, 40, dtype=torch.float64)
    found = [weight.clone().requires_grad_(), scale.clone().requires_grad_()]
    Learned.apply(found[0].float(), found[1].float(), largest).backward(upstream.float())
    expected = [weight.clone().requires_grad_(), scale.clone().requires_grad_()]
    (straight_through(expected[0] / expected[1], largest) * expected[1]).backward(upstream)
    torch.testing.assert_close(found[0].grad, expected[0].grad, rtol=1e-5, atol=1e-6)
    share = (40 * largest) ** -0.5
    torch.testing.assert_close(found[1].grad, share * expected[1].grad, rtol=1e-4, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 8)),
        elements=st.floats(-50, 50, width=32),
    )
)
def test_activations_are_those_of_dynamic_quantize_linear(x):
    """ONNX's definition in numpy: uint8 over the range of the whole tensor, zero included, ties to
    even.
    """
    low = min(x.min(), 0)
    high = max(x.max(), 0)
    scale = np.float32(max((high - low) / np.float32(255), 1e-8))
    zero = np.clip(np.rint(-low / scale), 0, 255)
    expected = (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale
    found = Activations.apply(torch.from_numpy(x))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.integers(1, 70)),
        elements=st.floats(-50, 50, width=32),
    ),
    st.sampled_from([16, 32]),
)
def test_blocks_of_activations_have_a_scale_each(x, block):
    """Against one block at a time: max|x| / 127, ties to even, the last block as long as it is."""
    found = Blocks.apply(torch.from_numpy(x), block).numpy()
    for row, said in zip(x, found, strict=True):
        for first in range(0, len(row), block):
            part = row[first : first + block]
            scale = np.float32(max(np.abs(part).max() / np.float32(127), 1e-8))
            np.testing.assert_allclose(
                said[first : first + block], np.rint(part / scale) * scale, rtol=1e-6, atol=1e-6
            )


@pytest.mark.parametrize("quant", [Quant(weights="int4"), Quant(weights="ternary", per="group")])
def test_a_row_of_int4_or_ternary_does_not_depend_on_its_batch(quant):
    layer = layer_of(quant)
    x = torch.randn(8, 64) * torch.logspace(-2, 2, 8)[:, None]
    torch.testing.assert_close(
        torch.cat([layer(row[None]) for row in x]), layer(x), rtol=1e-5, atol=1e-5
    )


def round_shares(rank: int, size: int, meeting: Path, out: Path, x: Tensor) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    layer = QuantLinear.of(identity(x.shape[-1]))
    layer.set(Quant(weights="int8", activations="int8"))
    share = x.tensor_split(size)[rank]
    found = {"train": layer(share).detach()}
    if rank == 0:  # alone: others do not wait for it
        found["eval"] = layer.eval()(share).detach()
    save_file(found, out / f"{rank}.safetensors")
    dist.destroy_process_group()


def identity(width: int) -> nn.Linear:
    layer = nn.Linear(width, width, bias=False)
    nn.init.eye_(layer.weight)
    return layer


def test_workers_round_activations_over_the_range_of_the_whole_batch(tmp_path):
    """Each rounded over its own rows, so two workers trained another student than one."""
    x = torch.randn(7, 3, 8, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0] = 9.0
    x[6, 2, 7] = -7.0
    workers = [start(round_shares, rank, 2, tmp_path / "meet", tmp_path, x) for rank in range(2)]
    assert wait(workers) == [0, 0]
    found = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    layer = QuantLinear.of(identity(8))
    layer.set(Quant(weights="int8", activations="int8"))
    assert torch.equal(torch.cat([part["train"] for part in found]), layer(x))
    first = x.tensor_split(2)[0]
    assert torch.equal(found[0]["eval"], layer(first))
    assert not torch.equal(found[0]["eval"], found[0]["train"])


@pytest.mark.parametrize("rule", [Activations.apply, lambda x: Blocks.apply(x, 32)])
def test_the_gradient_of_rounded_activations_goes_straight_through(rule):
    x = torch.randn(4, 40, requires_grad=True)
    upstream = torch.randn(4, 40)
    rule(x).backward(upstream)
    assert torch.equal(x.grad, upstream)


def test_the_scale_of_clipped_weights_has_the_gradient_of_finite_differences():
    """Where every weight is beyond the range, LSQ's slope is the true one: the outer code."""
    weight = torch.tensor([[[3.0, -5.0, 9.0]]])
    scale = torch.full((1, 1, 1), 0.25, requires_grad=True)
    Learned.apply(weight, scale, 7).sum().backward()
    step = 1e-3
    rise = [Learned.apply(weight, scale.detach() + sign * step, 7).sum() for sign in (1, -1)]
    share = (3 * 7) ** -0.5
    assert scale.grad.item() == pytest.approx(
        share * ((rise[0] - rise[1]) / (2 * step)).item(), rel=1e-3
    )


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(np.float32, (2, 3, 5), elements=st.floats(-4, 4, width=32)),
    hnp.arrays(np.float32, (2, 3, 1), elements=st.floats(-2, 2, width=32)),
    st.sampled_from([1, 7, 127]),
)
def test_no_learned_scale_flips_a_sign_or_divides_by_zero(weight, scale, largest):
    found = [torch.from_numpy(weight).requires_grad_(), torch.from_numpy(scale).requires_grad_()]
    rounded = Learned.apply(*found, largest)
    assert rounded.isfinite().all()
    assert (rounded * found[0] >= 0).all()
    rounded.square().sum().backward()
    assert all(each.grad.isfinite().all() for each in found)


@pytest.mark.parametrize("start", [0.0, -0.5, LEAST])
def test_a_learned_scale_at_its_least_takes_only_what_raises_it(start):
    """As clipped to the range of what divides; and so it comes back to the weights, whose sizes are
    1.
    """
    weight = torch.tensor([[[1.0, -1.0]]])
    scale = torch.full((1, 1, 1), start, requires_grad=True)
    Learned.apply(weight, scale, 7).sub(weight).square().sum().backward()
    assert scale.grad.item() < 0, "descent raises it"
    scale.grad = None
    Learned.apply(weight, scale, 7).mul(weight).sum().backward()
    assert scale.grad.item() == 0, "and would lower it further"
    optimizer = torch.optim.SGD([scale], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        Learned.apply(weight, scale, 7).sub(weight).square().sum().backward()
        optimizer.step()
    assert torch.allclose(Learned.apply(weight, scale, 7), weight, atol=0.1)


@pytest.mark.parametrize("name", ["int4-learned", "ternary-learned"])
@pytest.mark.parametrize("rate", [1e-2, 1.0])
def test_training_with_learned_scales_stays_finite_at_any_rate(name, rate):
    """At 1.0 a first step of Adam takes many a scale far below 0."""
    layer = layer_of(SCHEMES[name])
    x = torch.randn(32, 64)
    goal = torch.randn(32, 16)
    least = np.inf
    optimizer = torch.optim.AdamW(layer.parameters(), lr=rate)
    for _ in range(30):
        optimizer.zero_grad()
        (layer(x) - goal).square().mean().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters())
        optimizer.step()
        least = min(least, layer.scale.min().item())
        assert (layer.rounded() * layer.weight >= 0).all()
        assert (layer.scales() >= LEAST).all()
    assert rate < 1 or least < 0, "the case was met"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scales_and_weights_that_are_not_finite_give_no_codes(value):
    layer = layer_of(SCHEMES["int4-learned"])
    with torch.no_grad():
        layer.scale[0, 0] = value
    for call in (layer.codes, layer.scales):
        with pytest.raises(RecipeError, match="scales are NaN or infinite"):
            call()
    plain = layer_of(SCHEMES["int8-channel"])
    with torch.no_grad():
        plain.weight[0, 0] = value
    with pytest.raises(RecipeError, match="weights are NaN or infinite"):
        plain.codes()


@LAWS
def test_a_layer_in_bfloat16_computes_in_float32(quant):
    half = QuantLinear.of(nn.Linear(64, 16).bfloat16())
    whole = QuantLinear.of(nn.Linear(64, 16))
    whole.load_state_dict({k: v.float() for k, v in half.state_dict().items()})
    for layer in (half, whole):
        layer.set(quant)
        layer.blend = 0.5
    x = torch.randn(5, 64).bfloat16()
    assert torch.equal(half(x), whole(x.float()).bfloat16())
    half(x).sum().backward()
    assert half.weight.grad.dtype == torch.bfloat16


@LAWS
def test_zeros_round_to_zeros_and_nan_is_refused(quant):
    layer = layer_of(quant)
    with torch.no_grad():
        layer.weight.zero_()
    layer.set(quant)
    assert (layer.codes() == 0).all()
    assert (layer(torch.randn(3, 64)) == layer.bias).all()
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    with pytest.raises(RecipeError, match="NaN or infinite"):
        layer.set(quant)


@LAWS
def test_every_parameter_learns(quant):
    layer = layer_of(quant)
    layer(torch.randn(8, 64)).square().mean().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@given(st.integers(1, 3), st.sampled_from([2, 4, 8]), st.data())
def test_packing_is_undone(rows, bits, data):
    size = data.draw(st.integers(1, 6)) * 8
    codes = data.draw(
        hnp.arrays(
            np.int8, (rows, size), elements=st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        )
    )
    packed = pack(codes, bits)
    assert packed.nbytes == rows * size * bits // 8
    assert np.array_equal(unpack(packed, bits), codes)


def test_packing_starts_at_the_low_end():
    assert pack(np.array([-1, 0, 1, 0], np.int8), 2).tolist() == [1 | 2 << 2 | 3 << 4 | 2 << 6]
    assert pack(np.array([-8, 7], np.int8), 4).tolist() == [0 | 15 << 4]


@given(hnp.arrays(np.int8, st.integers(0, 40), elements=st.integers(-1, 1)))
def test_trits_are_undone_at_five_a_byte(codes):
    packed = pack_trits(codes)
    assert len(packed) == -(-len(codes) // 5)
    assert np.array_equal(unpack_trits(packed, len(codes)), codes)


def test_bytes_that_hold_no_trits_are_refused():
    with pytest.raises(ValueError, match="do not hold"):
        unpack_trits(np.array([243], np.uint8), 5)
    with pytest.raises(ValueError, match="do not hold"):
        unpack_trits(np.array([0], np.uint8), 6)


def test_layers_are_swapped_by_name_and_keep_their_weights():
    torch.manual_seed(0)
    module = SeriesEncoder(channels=3, classes=4, steps=8, width=32)
    plain = {k: v.clone() for k, v in module.state_dict().items()}
    x = torch.randn(2, 8, 3)
    before = module(x)["logits"]
    names = prepare(module, Quant())
    assert names == [
        "blocks.0.attention.qkv",
        "blocks.0.attention.out",
        "blocks.0.mlp.0",
        "blocks.0.mlp.2",
    ]
    assert [n for n, _ in quantised(module)] == names
    assert torch.equal(module(x)["logits"], before), "in full precision until a Quant is set"
    assert module.state_dict().keys() == plain.keys()
    module.load_state_dict(plain)
    for _, layer in quantised(module):
        layer.set(Quant(weights="ternary"))
    assert not torch.equal(module(x)["logits"], before)
    with pytest.raises(RecipeError, match="no linear layer is left"):
        prepare(module, Quant(skip=["*"]))


def test_a_layer_with_two_names_stays_one_layer():
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    module.append(module[0])
    assert prepare(module, Quant(skip=["2"])) == ["0"]
    assert isinstance(module[0], QuantLinear)
    assert module[3] is module[0]
    assert type(module[2]) is nn.Linear


def test_torchs_encoder_layer_does_not_slip_past_rounding_in_evaluation():
    """It reads the weights of submodules that have no hook, in a fused path."""
    module = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True).eval()
    x = torch.randn(4, 8, 32)
    assert prepare(module, Quant(skip=[])) == ["linear1", "linear2"], (
        "not out_proj, which is never called"
    )
    for _, layer in quantised(module):
        layer.set(Quant(weights="ternary", activations="none"))
    with torch.inference_mode():
        evaluated = module(x)
    torch.testing.assert_close(evaluated, module(x).detach())


def test_what_no_runtime_executes_is_refused():
    for wrong, words in (
        ({"weights": "int8", "per": "group"}, "no runtime"),
        ({"weights": "int8", "activations": "none"}, "int8 activations"),
        ({"weights": "int4", "scale": "twn"}, "ternary"),
        ({"weights": "int8", "scale": "absmean"}, "ternary"),
        ({"weights": "int4", "group": 64}, 'needs per = "group"'),
        ({"weights": "ternary", "per": "group", "group": 16}, "no runtime"),
    ):
        with pytest.raises(ValueError, match=words):
            Quant(**wrong)


def test_a_layer_that_no_group_divides_shares_a_scale_in_each_output():
    layer = layer_of(Quant(weights="int4", per="group"), inputs=48)
    assert layer.scales().shape == (16, 1)
    assert layer_of(Quant(weights="int4", per="group"), inputs=96).scales().shape == (16, 3)


def test_codes_round_ties_to_even():
    weight = torch.tensor([[[0.5, 1.5, 2.5, -0.5]]])
    assert codes_of(weight, torch.ones(1, 1, 1), "absmax", 7).flatten().tolist() == [0, 2, 2, 0]
