"""The parameters that no layer rounds, as int8: by themselves, in training, and in the file."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import nn

from raykd import models
from raykd.deploy.onnx import session as onnx_session
from raykd.deploy.onnx import write as write_onnx
from raykd.errors import RecipeError
from raykd.models.series_encoder import SeriesEncoder
from raykd.quant.other_parameters import Stored, bake, codes_and_scales, plain, plain_name, stored
from raykd.recipe.quant import Quant
from raykd.recipe.tables import Phase
from raykd.training import phases

QUANT = Quant(weights="ternary", activations="none")
KEPT = ("conv.weight", "positions", "head.weight", "value.weight")


def encoder() -> SeriesEncoder:
    torch.manual_seed(0)
    return SeriesEncoder(channels=3, classes=5, steps=12, width=32, layers=2)


def rounding(quant: Quant = QUANT) -> SeriesEncoder:
    module = encoder()
    phases.round_as(module, quant)
    return module


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**31), st.sampled_from([1e-6, 1.0, 1e6])
)
def test_codes_times_scales_are_within_half_a_step_and_round_to_themselves(
    rows, columns, seed, size
):
    value = size * torch.randn(rows, columns, 2, generator=torch.Generator().manual_seed(seed))
    codes, scales = codes_and_scales(value)
    again = codes * scales[:, None, None]
    assert codes.abs().max() <= 127
    assert ((value - again).abs() <= 0.5001 * scales[:, None, None]).all()
    twice, same = codes_and_scales(again)
    assert torch.equal(twice, codes)
    torch.testing.assert_close(same, scales, rtol=1e-6, atol=0)


def test_a_slice_scaled_by_a_power_of_two_keeps_its_codes():
    value = torch.randn(6, 7)
    powers = 2.0 ** torch.arange(-3, 3)[:, None]
    codes, scales = codes_and_scales(value)
    scaled, larger = codes_and_scales(powers * value)
    assert torch.equal(codes, scaled)
    assert torch.equal(larger, powers[:, 0] * scales)


def test_what_it_holds_is_all_that_is_no_vector_and_no_rounded_layer():
    module = rounding()
    names = {plain_name(name) for name in module.state_dict() if name.endswith(".original")}
    assert names == set(KEPT)
    assert len(list(stored(module))) == len(KEPT)
    assert plain(module.state_dict()).keys() == encoder().state_dict().keys()


def test_in_full_precision_it_changes_no_bit():
    module = encoder()
    plainly = encoder()
    x = torch.randn(4, 12, 3)
    phases.prepare(module, [Phase(until=1.0, quant=QUANT)])
    assert torch.equal(module(x)["logits"], plainly(x)["logits"])
    phases.enter(module, Phase(until=1.0, quant=QUANT.model_copy(update={"rest": "fp32"})))
    assert not any(held.quant for _, held in stored(module))


def test_a_module_reads_its_parameters_rounded_and_trains_them_whole():
    module = rounding()
    for name in KEPT:
        owner, _, own = name.rpartition(".")
        read = getattr(module.get_submodule(owner), own)
        codes, scales = codes_and_scales(encoder().get_parameter(name))
        assert torch.equal(read, codes * scales.reshape(-1, *[1] * (codes.dim() - 1)))
    value = torch.randn(3, 4, requires_grad=True)
    held = Stored()
    upstream = torch.randn(3, 4)
    held.set(QUANT)
    held(value).backward(upstream)
    assert torch.equal(value.grad, upstream)


def test_blend_is_a_straight_line():
    held = Stored()
    value = torch.randn(4, 9)
    held.set(QUANT)
    whole = held(value)
    held.blend = 0.25
    torch.testing.assert_close(held(value), 0.75 * value + 0.25 * whole)
    held.blend = 0.0
    assert held(value) is value


def test_the_file_holds_the_codes_and_answers_as_the_module():
    module = rounding().eval()
    x = torch.randn(200, 12, 3)
    wanted = {n: codes_and_scales(encoder().get_parameter(n))[0].numpy() for n in KEPT}
    with torch.inference_mode():
        said = module(x)
    data = write_onnx.to_onnx(module, x[:2])
    proto = onnx.load_from_string(data)
    held = [
        numpy_helper.to_array(t)
        for t in proto.graph.initializer
        if t.data_type == onnx.TensorProto.INT8
    ]
    assert sorted(a.shape for a in held) == sorted(a.shape for a in wanted.values())
    for name, codes in wanted.items():
        assert any(np.array_equal(codes, a) for a in held), name
    assert not any(n.domain == "raykd" for n in proto.graph.node)
    assert {o.domain for o in proto.opset_import} == {"", "com.microsoft"}
    answers = onnx_session.session(data).run(["logits", "valence"], {"inputs": x.numpy()})
    for answer, key in zip(answers, ("logits", "valence"), strict=True):
        reference = said[key].numpy()
        assert np.abs(answer - reference).max() <= 1e-5 * np.abs(reference).max()


def test_rounding_saves_the_bytes_it_says():
    x = torch.randn(2, 12, 3)
    sizes = {}
    for rest in ("fp32", "int8"):
        sizes[rest] = len(
            write_onnx.to_onnx(rounding(QUANT.model_copy(update={"rest": rest})).eval(), x)
        )
    values = [encoder().get_parameter(name) for name in KEPT]
    saved = sum(3 * value.numel() - 4 * len(value) for value in values)
    assert abs(sizes["fp32"] - sizes["int8"] - saved) < 100 * len(KEPT)


def test_weights_are_written_and_read_under_the_names_of_the_users_module(tmp_path):
    from safetensors.torch import save_file

    module = rounding()
    save_file(
        {k: v.contiguous() for k, v in plain(module.state_dict()).items()},
        tmp_path / "w.safetensors",
    )
    plainly = encoder()
    again = rounding()
    for other in (plainly, again):
        with torch.no_grad():
            for value in other.parameters():
                value.zero_()
        models.load_weights(other, tmp_path / "w.safetensors", "student")
    assert all(
        torch.equal(a, b) for a, b in zip(encoder().parameters(), plainly.parameters(), strict=True)
    )
    x = torch.randn(3, 12, 3)
    assert torch.equal(module(x)["logits"], again(x)["logits"])


def test_zeros_stay_zeros_and_nan_is_refused():
    codes, scales = codes_and_scales(torch.zeros(3, 4))
    assert not codes.any()
    assert (scales > 0).all()
    module = encoder()
    with torch.no_grad():
        module.positions[0, 0] = torch.nan
    with pytest.raises(RecipeError, match="positions is NaN or infinite"):
        phases.round_as(module, QUANT)


def test_a_head_tied_to_a_table_stays_tied():
    """Both read the one parameter: rounded once, by the scales of its rows."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, 32)
            self.inner = nn.Linear(32, 32)
            self.head = nn.Linear(32, 11, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.inner(self.table(ids)))

    module = Tied()
    phases.round_as(module, QUANT)
    module(torch.arange(11)).sum().backward()
    values = {id(value) for value, _ in stored(module)}
    assert len(values) == 1
    assert module.table.weight.equal(module.head.weight)
    assert len({id(p) for p in module.parameters()}) == 3  # the shared one, the inner layer's two


def test_baked_it_is_a_plain_module_that_answers_alike():
    module = rounding()
    x = torch.randn(3, 12, 3)
    said = module(x)["logits"]
    kept = {name: module.get_parameter(f"{name}") for name in ("norm.weight", "head.bias")}
    bake(module)
    assert not list(stored(module))
    assert torch.equal(module(x)["logits"], said)
    assert {name for name, _ in module.named_parameters()} == {
        name for name, _ in encoder().named_parameters()
    }
    assert all(module.get_parameter(name) is value for name, value in kept.items())
