"""Laws of batches made ahead: each number once, in any number of threads, and faults handed on."""

import threading

import pytest

from raykd.training.prefetch import Ahead


@pytest.mark.parametrize("threads", [1, 3])
def test_each_number_is_made_once_up_to_the_end(threads):
    made: list[int] = []
    ahead = Ahead(lambda n: made.append(n) or n * n, end=9, threads=threads)
    assert [ahead(n) for n in range(3, 9)] == [n * n for n in range(3, 9)]
    ahead.close()
    assert sorted(made) == [3, 4, 5, 6, 7, 8]


def test_as_many_are_made_at_once_as_there_are_threads():
    together = threading.Barrier(3, timeout=60)
    ahead = Ahead(lambda n: together.wait() if n else 0, end=4, threads=3)
    assert ahead(0) == 0
    assert sorted(ahead(n) for n in range(1, 4)) == [0, 1, 2]
    ahead.close()


def test_what_was_raised_is_handed_on_and_the_next_is_made_all_the_same():
    ahead = Ahead(lambda n: 10 // (5 - n), end=7)
    assert [ahead(n) for n in range(3, 5)] == [5, 10]
    with pytest.raises(ZeroDivisionError):
        ahead(5)
    assert ahead(6) == -10
    ahead.close()


@pytest.mark.parametrize("threads", [1, 4])
def test_numbers_may_be_asked_for_in_any_order(threads):
    """As a training does that goes on from a checkpoint, or enters another phase."""
    ahead = Ahead(lambda n: -n, end=20, threads=threads)
    asked = [0, 1, 7, 8, 2, 19, 0]
    assert [ahead(n) for n in asked] == [-n for n in asked]
    ahead.close()
