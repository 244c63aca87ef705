"""The language model and its cache: every way of reading the same tokens gives the same logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from raykd.errors import DataError
from raykd.models.adapter import KeepsAttention
from raykd.models.kv_cache import Cache
from raykd.models.llama import Attention, Llama, rotate, rotations
from raykd.quant.swap import prepare, quantised
from raykd.recipe.quant import Quant

VOCABULARY = 50
STEPS = 24
SHAPES = {
    "shared": {"heads": 4, "kv_heads": 2},
    "one": {"heads": 4, "kv_heads": 1},
    "each": {"heads": 4, "kv_heads": 4, "tied": False},
    "sub_norm": {"heads": 2, "kv_heads": 1, "sub_norm": True},
}


def llama(seed: int = 0, **shape) -> Llama:
    """Weights large enough that attention is not flat."""
    torch.manual_seed(seed)
    module = Llama(classes=VOCABULARY, steps=STEPS, width=32, layers=2, inner=48, **shape)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(6) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    return module.eval()


def tokens(rows: int = 3, count: int = STEPS, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, count), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(SHAPES)), st.data())
def test_any_chunks_and_any_rollbacks_give_the_logits_of_the_whole_pass(name, data):
    """Other tokens are read now and then, and taken back."""
    module = llama(**SHAPES[name])
    ids = tokens()
    cache = module.cache(len(ids))
    found = []
    with torch.no_grad():
        whole = module(ids)["logits"]
        while cache.length < STEPS:
            here = cache.length
            drafted = data.draw(st.integers(0, STEPS - here))
            if drafted:
                module(tokens(count=drafted, seed=2), cache)
                assert cache.length == here + drafted
                cache.length = here
            count = data.draw(st.integers(1, STEPS - here))
            found.append(module(ids[:, here : here + count], cache)["logits"])
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-5, atol=1e-5)


def test_token_by_token_is_the_whole_pass_and_a_cache_is_used_again():
    module = llama()
    ids = tokens()
    cache = module.cache(len(ids))
    place = cache.keys.data_ptr()
    with torch.no_grad():
        whole = module(ids)["logits"]
        for _ in range(2):
            cache.length = 0
            found = [module(ids[:, i : i + 1], cache)["logits"] for i in range(STEPS)]
            torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-5, atol=1e-5)
    assert cache.keys.data_ptr() == place, "nothing is allocated again"


def test_no_position_sees_a_later_one_and_every_one_sees_the_first():
    module = llama()
    ids = tokens(rows=1)
    other = ids.clone()
    other[0, 10] = (ids[0, 10] + 1) % VOCABULARY
    with torch.no_grad():
        apart = (module(other)["logits"] - module(ids)["logits"]).abs().amax(-1)[0]
    assert (apart[:10] == 0).all()
    assert (apart[10:] > 1e-4).all()


def test_rows_do_not_depend_on_each_other_with_or_without_a_cache():
    module = llama()
    ids = tokens(rows=4)
    cache = module.cache(4)
    with torch.no_grad():
        module(ids[:, :9], cache)
        found = module(ids[:, 9:], cache)["logits"]
        for row in range(4):
            alone = module(ids[row : row + 1])["logits"][:, 9:]
            torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-5, atol=1e-5)


@given(st.integers(0, 5000), st.integers(0, 50), st.integers(0, 5000))
def test_rotated_products_depend_on_the_distance_alone(at, apart, shift):
    q, k = torch.randn(
        2, 1, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )

    def product(first: int, second: int) -> float:
        turned = [
            rotate(x, rotations(torch.tensor([i]), 8, 100.0)) for x, i in ((q, first), (k, second))
        ]
        return (turned[0] * turned[1]).sum().item()

    assert product(at + apart, at) == pytest.approx(
        product(at + apart + shift, at + shift), abs=3e-3
    )
    assert rotate(q, rotations(torch.tensor([at]), 8, 100.0)).norm().item() == pytest.approx(
        q.norm().item(), rel=1e-6
    )


def test_heads_that_share_keys_are_heads_whose_keys_are_equal():
    shared = llama(heads=4, kv_heads=2)
    each = llama(heads=4, kv_heads=4)
    state = shared.state_dict()
    for name in state:
        if "k_proj" in name or "v_proj" in name:
            state[name] = state[name].unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
    each.load_state_dict(state)
    torch.testing.assert_close(
        each(tokens())["logits"], shared(tokens())["logits"], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", SHAPES)
def test_attention_maps_are_those_that_are_mixed_with(name):
    module = llama(**SHAPES[name])
    ids = tokens()
    cache = module.cache(len(ids))
    maps = [m for m in module.modules() if isinstance(m, Attention)]
    assert all(isinstance(m, KeepsAttention) for m in maps)
    with torch.no_grad():
        plain = module(ids)["logits"]
        for layer in maps:
            layer.keep_attention = True
        torch.testing.assert_close(module(ids)["logits"], plain, rtol=1e-5, atol=1e-5)
        whole = maps[1].attention
        module(ids[:, :7], cache)
        module(ids[:, 7:], cache)
    assert whole.shape == (3, SHAPES[name]["heads"], STEPS, STEPS)
    torch.testing.assert_close(whole.sum(-1), torch.ones(whole.shape[:-1]))
    assert (whole.triu(1) == 0).all()
    torch.testing.assert_close(maps[1].scores.softmax(-1), maps[1].attention)
    torch.testing.assert_close(maps[1].attention, whole[:, :, 7:], rtol=1e-5, atol=1e-5)


def test_more_tokens_than_there_is_room_for_are_refused_and_change_nothing():
    module = llama()
    ids = tokens()
    with pytest.raises(DataError, match="25 after 0, but this model was built for at most 24"):
        module(tokens(count=25))
    cache = module.cache(3)
    module(ids[:, :20], cache)
    with pytest.raises(DataError, match="5 after 20"):
        module(ids[:, :5], cache)
    assert cache.length == 20
    with pytest.raises(DataError, match="2 rows of tokens, but it was made for 3"):
        module(ids[:2, :1], cache)
    small = Cache(layers=2, rows=3, heads=2, steps=4, width=8)
    with pytest.raises(DataError, match="5 tokens after 0, but it was made for 4"):
        module(ids[:, :5], small)


@pytest.mark.parametrize(
    "wrong", [{"width": 30}, {"heads": 4, "kv_heads": 3}, {"width": 4, "heads": 4, "kv_heads": 4}]
)
def test_heads_that_do_not_divide_are_refused(wrong):
    with pytest.raises(ValueError, match="heads must be a multiple of kv_heads"):
        Llama(classes=VOCABULARY, steps=STEPS, **wrong)


@pytest.mark.parametrize("name", SHAPES)
def test_every_projection_can_be_rounded_and_every_parameter_learns(name):
    module = llama(**SHAPES[name])
    ids = tokens()
    plain = module(ids)["logits"]
    quant = Quant(weights="ternary")
    assert len(prepare(module, quant)) == 2 * 7
    for _, layer in quantised(module):
        layer.set(quant)
    rounded = module(ids)["logits"]
    assert (rounded - plain).abs().max() > 1e-2
    nn.functional.cross_entropy(rounded[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_a_tied_head_is_the_embedding():
    tied = llama()
    free = llama(tied=False)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert (
        sum(p.numel() for p in free.parameters()) - sum(p.numel() for p in tied.parameters())
        == VOCABULARY * 32
    )


def test_under_sub_norm_the_last_projections_see_inputs_of_unit_scale():
    module = llama(sub_norm=True)
    seen = []
    for block in module.model.layers:
        for norm in (block.self_attn.attn_sub_norm, block.mlp.ffn_sub_norm):
            nn.init.ones_(norm.weight)
        for layer in (block.self_attn.o_proj, block.mlp.down_proj):
            layer.register_forward_pre_hook(lambda _, x: seen.append(x[0].square().mean(-1)))
    with torch.no_grad():
        module(tokens())
    assert len(seen) == 4
    for squares in seen:
        torch.testing.assert_close(squares, torch.ones_like(squares), rtol=1e-2, atol=0)


def packed(*lengths: int) -> torch.Tensor:
    """(1, T): the places of documents of these lengths in one row."""
    return torch.cat([torch.arange(n) for n in lengths])[None]


@pytest.mark.parametrize("name", SHAPES)
def test_a_document_in_a_packed_row_answers_as_alone(name):
    module = llama(**SHAPES[name])
    ids = tokens(rows=1)
    places = packed(7, 1, 12)
    ids = ids[:, : places.shape[1]]
    with torch.no_grad():
        whole = module(torch.stack([ids, places], -1))["logits"]
        alone = torch.cat([module(part)["logits"] for part in ids.split([7, 1, 12], 1)], 1)
    torch.testing.assert_close(whole, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cut", [1, 6, 7, 9, 19])
def test_a_packed_row_is_read_on_from_a_cache_and_after_a_rollback(cut):
    module = llama()
    places = packed(7, 1, 12)
    row = torch.stack([tokens(rows=1)[:, : places.shape[1]], places], -1)
    cache = module.cache(1)
    with torch.no_grad():
        whole = module(row)["logits"]
        module(row.flip(1)[:, : places.shape[1] // 2], cache)
        cache.length = 0
        parts = [module(part, cache)["logits"] for part in (row[:, :cut], row[:, cut:])]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


def test_padding_before_a_row_changes_nothing():
    module = llama()
    ids = tokens(rows=2)[:, :9]
    places = torch.arange(9).expand(2, -1)
    padding = torch.zeros(2, 5, dtype=torch.int64)
    before = torch.stack([torch.cat([padding, ids], 1), torch.cat([padding, places], 1)], -1)
    with torch.no_grad():
        torch.testing.assert_close(
            module(before)["logits"][:, 5:], module(ids)["logits"], rtol=1e-5, atol=1e-5
        )
