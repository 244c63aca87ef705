"""Laws of the order of rows in parts: a function of the recipe and the step, whoever asks.

Positions are those in the split: where its part begins, and the place in it. Reading is counted as
a worker does it that keeps a part until its lanes have left it.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raykd.data.order import Order
from raykd.data.walk import Walk
from raykd.training.arm import World

UNEVEN = np.random.default_rng(0).integers(300, 520, 171)


def positions(walk: Walk, step: int, which: np.ndarray | None = None) -> np.ndarray:
    part, place = walk.at(step, which)
    assert (place >= 0).all()
    assert (place < walk.sizes[part]).all()
    return (np.cumsum(walk.sizes) - walk.sizes)[part] + place


@st.composite
def walks(draw) -> Walk:
    sizes = draw(st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any))
    return Walk(
        np.array(sizes),
        size=draw(st.integers(1, 20)),
        lanes=draw(st.integers(1, 24)),
        window=draw(st.integers(1, 6)),
        seed=draw(st.integers(0, 3)),
        tag=draw(st.integers(0, 1)),
    )


@settings(deadline=None, max_examples=60)
@given(walks())
def test_an_epoch_sees_a_row_once_and_leaves_out_less_than_a_step(walk):
    total = int(walk.sizes.sum())
    for epoch in range(2):
        steps = range(epoch * walk.steps, (epoch + 1) * walk.steps)
        seen = np.bincount(np.concatenate([positions(walk, step) for step in steps]))
        assert seen.max() <= walk.repeats
        assert walk.repeats * total - seen.sum() < walk.size
        assert walk.repeats == 1 or total < walk.size


@settings(deadline=None, max_examples=60)
@given(walks(), st.integers(0, 200), st.integers(1, 5))
def test_any_number_of_workers_asks_at_any_step_for_parts_of_one_batch(walk, step, size):
    whole = positions(walk, step)
    fresh = Walk(walk.sizes, walk.size, walk.lanes, walk.window, walk.seed, walk.tag)
    shares = [World(rank, size).share(walk.size) for rank in range(size)]
    parts = [positions(fresh, step, np.arange(walk.size)[share]) for share in shares]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_workers_see_equal_global_batches_with_labelled_rows_dealt_among_them(size):
    class Of:
        def __init__(self, walk: Walk):
            self.walk = walk
            self.size = walk.size

        def rows(self, step: int, which: np.ndarray) -> np.ndarray:
            return positions(self.walk, step, which) + 100_000 * self.walk.tag

    order = Order([Of(Walk(UNEVEN // 9, 20, 64, 4, 7, 1)), Of(Walk(UNEVEN, 44, 64, 4, 7, 0))])
    for step in (0, 1, 50, 5000):
        whole = order.rows(step)
        assert ((whole >= 100_000).sum(), len(set(whole.tolist()))) == (20, 64)
        shares = [World(rank, size).share(64) for rank in range(size)]
        parts = [order.rows(step, share) for share in shares]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
        labelled = [(part >= 100_000).sum() for part in parts]
        assert max(labelled) - min(labelled) <= 1


def test_each_epoch_seed_and_tag_has_an_order_of_its_own():
    walk = Walk(UNEVEN, 64, 16, 4, 3)
    others = [Walk(UNEVEN, 64, 16, 4, 4), Walk(UNEVEN, 64, 16, 4, 3, 1)]
    firsts = [positions(walk, 0), positions(walk, walk.steps), *(positions(w, 0) for w in others)]
    assert len({tuple(first) for first in firsts}) == 4


@pytest.mark.parametrize(
    ("parts", "lanes", "sizes"), [(171, 16, (1, 2, 4, 8)), (320, 32, (1, 2, 4)), (640, 64, (3, 5))]
)
def test_all_workers_together_read_the_data_about_once_an_epoch(parts, lanes, sizes):
    """A part is read again only where one lane ends in it and the next begins.

    No worker keeps a part for longer than a lane walks over a window.
    """
    walk = Walk(np.random.default_rng(0).integers(100, 180, parts), 64, lanes, 4, 3)
    drawn = np.array([walk.at(step)[0] for step in range(walk.steps)])
    kept = walk.rows_of_window * lanes // 64
    for size in sizes:
        read = 0
        for rank in range(size):
            last_step: dict[int, int] = {}
            for step, row in enumerate(drawn[:, World(rank, size).share(64)]):
                for part in set(row.tolist()):
                    read += step - last_step.get(part, -kept - 1) > kept
                    last_step[part] = step
        assert 1 <= read / parts <= 1.2


def test_a_batch_mixes_parts_nearly_as_a_shuffle_of_all_rows_does():
    walk = Walk(UNEVEN, 64, 64, 4, 3)
    seen = np.mean([len(set(walk.at(step)[0].tolist())) for step in range(0, walk.steps, 37)])
    shuffled = 171 * (1 - (1 - 1 / 171) ** 64)
    assert seen / shuffled > 0.9


def test_reading_is_even():
    """In no turn are more new parts needed than one lane's window spans, and its neighbours."""
    walk = Walk(UNEVEN, 64, 16, 4, 3)
    known: set[int] = set()
    fresh = []
    for first in range(0, walk.steps, walk.turn):
        steps = range(first, min(first + walk.turn, walk.steps))
        needed = {part for step in steps for part in walk.at(step)[0].tolist()}
        fresh.append(len(needed - known))
        known |= needed
    assert max(fresh[1:]) <= 2 * (walk.window + 2)


def test_rows_of_one_part_lie_far_apart_within_a_window():
    """Were only parts shuffled, neighbours would follow each other."""
    walk = Walk(np.full(32, 100), 8, 8, 4, 0)
    lane = np.concatenate([positions(walk, step, np.array([0])) for step in range(walk.steps)])
    assert np.mean(np.abs(np.diff(lane)) == 1) < 0.02
