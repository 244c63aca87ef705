"""The codecs' laws, against dense softmax in float64: no bias where none is claimed, a bound where
one is, and bytes that are the same however rows are batched and never decode to nonsense.
"""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raykd.errors import DataError, RecipeError, StoreError
from raykd.losses.fused import dense_kl, sparse_kl
from raykd.store.codecs import CODECS, Codec, check_serves, default_codec, draws, layout, ranked
from raykd.store.codecs.comb import Comb
from raykd.store.codecs.dense import Dense
from raykd.store.codecs.hidden import Hidden, head_digest
from raykd.store.codecs.topk import TopK
from raykd.targets import SparseTargets

GRID = (1.0, 1.5, 2.0, 4.0)
KEY = draws.key_of("a store")
V = 100
SPARSE = [Comb(V), Comb(V, GRID), Comb(V, (2.0,), points=12), TopK(V, k=8), TopK(V, GRID, k=8)]
EVERY = [*SPARSE, Dense(V), Dense(V, "int8")]


def rows(
    lengths: list[int], vocab: int = V, seed: int = 0, scale: float = 2.5
) -> tuple[Tensor, Tensor, np.ndarray]:
    """Logits (B, T, vocab), mask (B, T) and row ids (B,)."""
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(len(lengths), max(lengths), vocab, generator=g)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return logits, mask, np.arange(len(lengths)) + 1000


def steps_of(mask: Tensor) -> np.ndarray:
    return mask.sum(1).numpy().astype(np.int32)


def own(codec: Codec) -> float:
    """A temperature that the codec serves."""
    return getattr(codec, "grid", (1.0,))[-1]


def targets(
    codec: Codec, logits: Tensor, mask: Tensor, row_id: np.ndarray, temperature: float = 1.0
) -> SparseTargets:
    found = codec.decode(codec.encode(logits, mask, row_id, KEY), steps_of(mask), temperature)
    assert isinstance(found, SparseTargets)
    return found


@pytest.mark.parametrize("temperature", GRID)
@pytest.mark.parametrize("grid", [GRID, None], ids=["mixture", "alone"])
def test_the_mean_stored_gradient_is_the_dense_one_within_3_standard_errors(grid, temperature):
    """W q - w per class, 20,000 draws of one place; its direction towards q - p too, where errors
    would add up.
    """
    draws_count = 20_000
    vocab = 24
    g = torch.Generator().manual_seed(3)
    z = 2.5 * torch.randn(vocab, generator=g)
    q = torch.randn(vocab, generator=g).softmax(0)
    codec = Comb(vocab, grid or (temperature,), points=5)
    logits = z.expand(draws_count, 1, vocab)
    t = targets(
        codec,
        logits,
        torch.ones(draws_count, 1, dtype=torch.bool),
        np.arange(draws_count),
        temperature,
    )
    w = t.dense().double()
    exact = q.double() - (z.double() / temperature).softmax(0)
    stored = w.sum(1, keepdim=True) * q.double() - w
    for found, wanted in ((stored, exact), (stored @ exact, exact @ exact)):
        error = found.std(0) / draws_count**0.5
        assert ((found.mean(0) - wanted).abs() <= 3 * error).all()
    if grid is None:
        assert torch.equal(
            t.weight.new_zeros(len(t)).index_add_(0, t.rows(), t.weight).round(decimals=6),
            torch.ones(len(t)),
        )
        assert t.entropy is not None
        p = (z.double() / temperature).softmax(0)
        assert abs(float(t.entropy.double().mean() + (p * p.log()).sum())) < 0.02


@pytest.mark.parametrize("points", [1, 12, 50, 255])
def test_counts_are_floor_or_ceil_of_n_p_and_sum_to_n(points):
    logits, mask, row_id = rows([40, 40])
    t = targets(Comb(V, points=points), logits, mask, row_id)
    counts = t.dense().double() * points
    expected = points * logits[mask].double().softmax(1)
    assert torch.equal(counts.round().sum(1), torch.full((80,), float(points), dtype=torch.float64))
    assert ((counts - expected).abs() < 1 + 1e-3).all()


def test_weights_are_bounded_by_the_size_of_the_grid():
    logits, mask, row_id = rows([60], scale=6.0)
    codec = Comb(V, GRID)
    for temperature in GRID:
        t = targets(codec, logits, mask, row_id, temperature)
        assert t.weight.min() >= 0
        assert t.weight.max() <= len(GRID) * 1.0001


def test_the_comb_has_less_variance_than_independent_draws_of_each_temperature():
    logits, mask, row_id = rows([1500])
    p = {t: (logits[mask].double() / t).softmax(1) for t in GRID}
    for temperature in GRID:
        alone = targets(Comb(V, (temperature,)), logits, mask, row_id, temperature).dense()
        mixed = targets(Comb(V, GRID), logits, mask, row_id, temperature).dense()
        multinomial = (1 - p[temperature].square().sum(1)).mean() / 50
        assert (alone - p[temperature]).square().sum(1).mean() < 0.75 * multinomial
        assert (mixed - p[temperature]).square().sum(1).mean() < 1.5 * multinomial


@pytest.mark.parametrize("temperature", GRID)
def test_the_tail_bucket_is_at_most_the_full_kl_and_equal_where_all_classes_are_listed(temperature):
    logits, mask, row_id = rows([50])
    g = torch.Generator().manual_seed(8)
    hidden = torch.randn(50, 6, generator=g)
    weight = torch.randn(V, 6, generator=g)
    full = dense_kl(hidden, weight, None, logits[mask], temperature=temperature)
    last = torch.zeros(50)
    for k in (1, 8, 40, V):
        t = targets(TopK(V, GRID, k=k), logits, mask, row_id, temperature)
        value = sparse_kl(hidden, weight, None, t, temperature=temperature)
        assert (value <= full + 4e-3 * (1 + full)).all()  # log p is stored as fp16
        assert (value >= last - 4e-3 * (1 + full)).all()
        last = value
    assert torch.allclose(last, full, rtol=4e-3, atol=4e-3)


def test_dense_values_are_within_the_bounds_of_their_formats():
    logits, mask, row_id = rows([9, 4, 0, 7])
    log_p = logits[mask].log_softmax(1)
    fp16, int8 = (
        c.decode(c.encode(logits, mask, row_id, KEY), steps_of(mask))
        for c in (Dense(V), Dense(V, "int8"))
    )
    bound = 2**-10 * logits[mask].abs().max()
    assert (fp16.float().log_softmax(1) - log_p).abs().max() <= bound
    assert (int8 - log_p).abs().max() <= (0.5 / 255 + 2**-10) * log_p.abs().max()
    with pytest.raises(DataError, match=r"fp16-overflowing values for rows \[1001\]"):
        Dense(V).encode(logits.index_fill(0, torch.tensor([1]), 1e5), mask, row_id, KEY)


def test_hidden_states_and_their_own_head_give_the_logits_and_another_head_is_refused():
    g = torch.Generator().manual_seed(9)
    hidden = torch.randn(2, 5, 16, generator=g)
    weight = torch.randn(V, 16, generator=g)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    codec = Hidden(16, head_digest(weight))
    found = codec.decode(codec.encode(hidden, mask, np.arange(2), KEY), steps_of(mask))
    codec.check_head(weight)
    assert (found.float() @ weight.T - hidden[mask] @ weight.T).abs().max() < 0.02
    with pytest.raises(
        StoreError, match=r"belong to the output head \w{12}, and this teacher's is"
    ):
        codec.check_head(weight + 1e-6)


@pytest.mark.parametrize("codec", EVERY, ids=str)
def test_bytes_are_the_same_however_rows_are_batched_and_padded(codec):
    logits, mask, row_id = rows([9, 1, 0, 7, 30, 2])
    whole = codec.encode(logits, mask, row_id, KEY)
    parts = [
        codec.encode(logits[i : i + n], mask[i : i + n], row_id[i : i + n], KEY)
        for i, n in ((0, 1), (1, 3), (4, 2))
    ]
    assert pa.concat_arrays(parts).equals(whole)
    left = torch.stack([z.roll(30 - int(m.sum()), 0) for z, m in zip(logits, mask, strict=True)])
    assert codec.encode(left, mask.flip(1), row_id, KEY).equals(whole)
    assert codec.encode(
        torch.nn.functional.pad(logits, (0, 5), value=99.0), mask, row_id, KEY
    ).equals(whole)


def test_draws_depend_on_store_row_and_step_and_nothing_else():
    logits, mask, row_id = rows([8, 8])
    logits = logits[:1, :1].expand(2, 8, V)
    one = Comb(V).encode(logits, mask, row_id, KEY)
    assert not one.equals(Comb(V).encode(logits, mask, row_id, KEY + 1))
    t = targets(Comb(V), logits, mask, row_id)
    assert len({tuple(x.tolist()) for x in t.dense()}) > 8
    u = draws.uniform(draws.words(KEY, np.repeat(np.arange(200), 50), np.tile(np.arange(50), 200)))
    assert abs(u.mean() - 0.5) < 0.01
    assert abs(np.histogram(u, 10, (0, 1))[0] - 1000).max() < 120
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.03


@pytest.mark.parametrize("codec", EVERY, ids=str)
def test_packed_columns_decode_the_same_from_parquet_and_in_any_slices(codec, tmp_path):
    logits, mask, row_id = rows([9, 1, 0, 7, 30, 2])
    steps = steps_of(mask)
    column = codec.encode(logits, mask, row_id, KEY)
    packed, name = codec.pack(column, steps)
    assert layout.compressed(packed) <= layout.compressed(column)
    pq.write_table(
        pa.table({"logits": packed}), tmp_path / "t.parquet", row_group_size=4, use_dictionary=False
    )
    read = pq.read_table(tmp_path / "t.parquet")["logits"]
    whole = codec.decode(column, steps, own(codec))
    for found, places in (
        (codec.decode(read, steps, own(codec), name), None),
        (codec.decode(packed[2:5], steps[2:5], own(codec), name), (10, 47)),
    ):
        if isinstance(whole, Tensor):
            assert torch.equal(found, whole if places is None else whole[places[0] : places[1]])
        else:
            wanted = whole if places is None else whole.take(torch.arange(*places))
            assert all(
                torch.equal(a, b) for a, b in zip(parts_of(found), parts_of(wanted), strict=True)
            )


def parts_of(t: SparseTargets) -> list[Tensor]:
    return [x for x in vars(t).values() if isinstance(x, Tensor)]


@pytest.mark.parametrize("codec", EVERY, ids=str)
def test_a_column_without_a_step_is_read_back_as_one(codec):
    logits, mask, row_id = rows([3, 2])
    column = codec.encode(logits, mask & False, row_id, KEY)
    none = np.zeros(2, np.int32)
    assert len(codec.decode(codec.pack(column, none)[0], none, own(codec))) == 0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ids_of_every_width_survive_every_layout(data):
    vocab = data.draw(
        st.sampled_from([2, 300, 1 << 16, (1 << 16) + 1, 1 << 24, (1 << 24) + 1, (1 << 32) - 1])
    )
    places = data.draw(
        st.lists(st.sets(st.integers(0, vocab - 1), min_size=1, max_size=9), max_size=12)
    )
    cut = data.draw(st.integers(0, len(places)))
    ids = np.array([i for p in places for i in sorted(p)], np.int64)
    start = np.concatenate([[0], np.cumsum([len(p) for p in places], dtype=np.int64)]).astype(
        np.int64
    )
    entries = np.array([start[cut], start[-1] - start[cut]])
    for name in ("plain", "planes", "delta"):
        stream = layout.put_ids(ids, start, entries, vocab, name)
        assert stream.length.sum() == len(ids) * layout.id_bytes(vocab) == len(stream.data)
        assert np.array_equal(layout.take_ids(stream, start, entries, vocab, name), ids)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ranked_entries_come_back_as_they_were_in_any_slices(data):
    """Every width of gap, places without a repeated class and places without a single one, rows
    without a place.
    """
    vocab = data.draw(st.sampled_from([3, 300, 40_000, ranked.LARGEST]))
    points = data.draw(st.integers(1, 12))
    kinds = st.lists(st.integers(0, vocab - 1), min_size=points, max_size=points)
    rows = [
        *data.draw(st.lists(st.lists(kinds, max_size=4), min_size=1, max_size=5)),
        [[1] * points] * 70,
    ]
    found = entries_of(rows)
    streams, name = ranked.put(found, np.array([len(r) for r in rows]), vocab)
    cut = data.draw(st.integers(0, len(rows)))
    for part in (slice(0, cut), slice(cut, None), slice(None)):
        kept = layout.streams_of(layout.struct(streams)[part], ranked.STREAMS)
        back = ranked.take(
            kept, np.array([len(r) for r in rows[part]], np.int64), vocab, points, name
        )
        assert all(np.array_equal(a, b) for a, b in zip(back, entries_of(rows[part]), strict=True))


def entries_of(rows: list[list[list[int]]]) -> ranked.Entries:
    each = [np.unique(np.array(p, np.int64), return_counts=True) for r in rows for p in r]
    none = np.zeros(0, np.int64)
    ids = np.concatenate([none, *(i for i, _ in each)])
    counts = np.concatenate([none, *(n for _, n in each)]).astype(np.uint8)
    start = np.cumsum([0, *(len(i) for i, _ in each)])
    return ranked.Entries(
        ids, counts, start, np.array([sum(len(set(p)) for p in r) for r in rows], np.int64)
    )


def test_a_large_shard_is_ranked_smaller_and_damage_to_it_is_noticed():
    logits, mask, row_id = rows([150, 130], vocab=3000, scale=1.0)
    codec = Comb(3000)
    steps = steps_of(mask)
    likely = torch.randperm(3000, generator=torch.Generator().manual_seed(1))
    column = codec.encode(logits - 1.2 * (1 + likely).log(), mask, row_id, KEY)
    packed, name = codec.pack(column, steps)
    assert len(name) > len(ranked.PREFIX) + 10
    assert layout.compressed(packed) < 0.95 * layout.compressed(column)
    assert codec.unpack(packed, steps, name).equals(column)
    for other in (
        "ranked:~",
        "ranked:" + 2 * name.removeprefix("ranked:"),
        name[:-5] + "\u00e9" * 5,
    ):
        with pytest.raises(StoreError, match="frequent classes"):
            codec.decode(packed, steps, 1.0, other)
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(300):
        try:
            found = codec.decode(damaged(packed, rng), steps, 1.0, name)
        except StoreError:
            refused += 1
            continue
        assert len(found) == steps.sum()
        assert 0 <= found.ids.min() <= found.ids.max() < 3000
    assert refused > 60


def test_older_stores_with_an_entropy_for_each_step_are_read():
    logits, mask, row_id = rows([9, 1, 0, 7])
    old, new = (targets(Comb(V, entropy=kind), logits, mask, row_id) for kind in (True, "row"))
    assert old.entropy is not None
    assert new.entropy is not None
    assert torch.equal(old.weight, new.weight)
    assert len(new.entropy[:9].unique()) == 1
    assert abs(float(old.entropy[:9].mean() - new.entropy[0])) < 0.25


@pytest.mark.parametrize("codec", EVERY, ids=str)
def test_damaged_bytes_give_a_store_error_or_targets_that_are_in_range(codec):
    logits, mask, row_id = rows([9, 4, 7])
    steps = steps_of(mask)
    packed, name = codec.pack(codec.encode(logits, mask, row_id, KEY), steps)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        try:
            found = codec.decode(damaged(packed, rng), steps, own(codec), name)
        except StoreError:
            refused += 1
            continue
        assert torch.isfinite(found if isinstance(found, Tensor) else found.weight).all()
        if isinstance(found, SparseTargets):
            assert len(found) == steps.sum()
            assert 0 <= found.ids.min() <= found.ids.max() < V
    assert refused > 60


def damaged(column: pa.Array, rng: np.random.Generator) -> pa.Array:
    """One bit flipped, or one value cut short or made longer, in one stream."""
    streams = (
        [column.field(i) for i in range(column.type.num_fields)]
        if column.type != pa.binary()
        else [column]
    )
    at = int(rng.integers(len(streams)))
    values = [bytearray(v.as_py()) for v in streams[at]]
    row = int(rng.integers(len(values)))
    kind = int(rng.integers(3))
    if not values[row]:
        values[row] += b"\1"
    elif kind == 0:
        values[row][int(rng.integers(len(values[row])))] ^= 1 << int(rng.integers(8))
    else:
        values[row] = (
            values[row][: int(rng.integers(len(values[row])))] if kind == 1 else values[row] + b"\1"
        )
    streams[at] = pa.array([bytes(v) for v in values], pa.binary())
    return (
        streams[0]
        if column.type == pa.binary()
        else pa.StructArray.from_arrays(streams, fields=list(column.type))
    )


@pytest.mark.parametrize("codec", EVERY, ids=str)
def test_sizes_are_checked_before_anything_is_allocated(codec):
    """Steps of a billion rows' worth against a column of a few bytes: an array of that size would
    be gigabytes.
    """
    logits, mask, row_id = rows([3, 2])
    column = codec.encode(logits, mask, row_id, KEY)
    with pytest.raises(StoreError, match="damaged"):
        codec.decode(column, np.array([3, 2_000_000_000], np.int32), own(codec))
    with pytest.raises(StoreError, match="damaged"):
        codec.decode(column, np.array([5], np.int32), own(codec))
    with pytest.raises(StoreError):
        codec.decode(pa.array([1, 2]), steps_of(mask), own(codec))
    other = TopK(V) if codec.name == "comb" else Comb(V)
    with pytest.raises(StoreError, match=r"another codec|not binary"):
        codec.decode(other.encode(logits, mask, row_id, KEY), steps_of(mask), own(codec))


def test_what_a_codec_can_not_serve_is_refused_by_name():
    assert [default_codec(n) for n in (2, 64, 65, 152_064)] == ["dense", "dense", "comb", "comb"]
    for name, codec in CODECS.items():
        assert codec.name == name
        check_serves(codec, "forward")
        if name in ("comb", "topk"):
            for divergence in ("reverse", "js", "tv"):
                with pytest.raises(
                    RecipeError, match=rf"{name}.*not {divergence!r}.*codec = \"dense\""
                ):
                    check_serves(codec, divergence)
        else:
            check_serves(codec, "reverse", 3.0)
    with pytest.raises(
        RecipeError, match=r"temperature 3 is not in this store's grid \(1, 1.5, 2, 4\)"
    ):
        check_serves(Comb(V, GRID), "forward", 3.0)
    logits, mask, row_id = rows([3])
    with pytest.raises(RecipeError, match=r"temperature 2 is not in this store's grid \(1\)"):
        targets(Comb(V), logits, mask, row_id, 2.0)
