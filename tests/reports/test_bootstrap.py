"""Laws of the intervals: against row-by-row resampling, exact limits, theory, data whose truth is
known.
"""

from dataclasses import replace

import numpy as np
import pytest

from raykd.reports import bootstrap
from raykd.reports.bootstrap import Hits

ALL = ("student", "control", "teacher", "artefact")


def logistic(x):
    return 1 / (1 + np.exp(-x))


def world(seed, *, groups=40, rows=5, seeds=3, spread=1.0, training=0.2) -> Hits:
    """A teacher, students and controls; `spread` and `training` are log odds of recordings and
    seeds.
    """
    rng = np.random.default_rng(seed)
    ease = rng.normal(0, spread, groups).repeat(rows)
    n = groups * rows

    def arm(level):
        return rng.random((seeds, n)) < logistic(level + ease + rng.normal(0, training, (seeds, 1)))

    teacher = rng.random(n) < logistic(2 + ease)
    return Hits(
        groups=np.arange(groups).repeat(rows),
        student=arm(1.0),
        student_seeds=range(seeds),
        control=arm(0.2),
        control_seeds=range(seeds),
        teacher=teacher,
        artefact=rng.random(n) < logistic(1 + ease),
    )


def width(found):
    return found.hi - found.lo


def same(a, b):
    return all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ALL)


@pytest.mark.parametrize("right", [True, False])
def test_constant_hits_have_no_width(right):
    n = 50
    hits = Hits(np.arange(n), np.full((3, n), right), range(3), teacher=np.ones(n, bool))
    sample = bootstrap.resample(hits)
    assert bootstrap.interval(sample.student, n) == bootstrap.Interval(right, right, right, n)
    kept = bootstrap.retention(sample)
    assert kept
    assert (kept.value, kept.lo, kept.hi) == (right, right, right)


def test_the_interval_covers_the_truth():
    """400 data sets: the share covered has a standard error of 1.1 points, and 0.95 must lie within
    four.
    """
    spread = 1.0
    training = 0.2
    z = np.random.default_rng(9).normal(0, 1, 1_000_000)
    teacher = logistic(2 + spread * z).mean()
    student, control = (logistic(m + np.hypot(spread, training) * z).mean() for m in (1.0, 0.2))
    truths = [
        student,
        student / teacher,
        (student - control) / (teacher - control),
        student - control,
    ]
    covered = np.zeros(4)
    for seed in range(400):
        sample = bootstrap.resample(
            world(seed, spread=spread, training=training), num=400, seed=seed
        )
        found = [
            bootstrap.interval(sample.student, sample.n),
            bootstrap.retention(sample),
            bootstrap.gap_closed(sample),
            bootstrap.difference(sample),
        ]
        covered += [f is not None and f.lo <= t <= f.hi for f, t in zip(found, truths, strict=True)]
    assert np.all(np.abs(covered / 400 - 0.95) < 0.044), covered / 400


def test_independent_rows_are_groups_of_one():
    """The weighted sums equal resampling row by row with the same draws."""
    num = 300
    n = 60
    rng = np.random.default_rng(0)
    hits = Hits(np.arange(n), rng.random((1, n)) < 0.7, [0], teacher=rng.random(n) < 0.9)
    sample = bootstrap.resample(hits, num=num, seed=5)
    draws = np.random.Generator(np.random.Philox(5))
    draws.integers(1, size=(num, 1))  # the one seed
    rows = draws.integers(n, size=(num, n - 1))
    np.testing.assert_allclose(sample.student[1:], hits.student[0][rows].mean(1), rtol=1e-12)
    np.testing.assert_allclose(sample.teacher[1:], hits.teacher[rows].mean(1), rtol=1e-12)


def test_copies_of_rows_in_a_group_do_not_narrow_the_interval():
    hits = world(1)
    copied = Hits(
        groups=hits.groups.repeat(4),
        student=hits.student.repeat(4, axis=1),
        student_seeds=hits.student_seeds,
        control=hits.control.repeat(4, axis=1),
        control_seeds=hits.control_seeds,
        teacher=hits.teacher.repeat(4),
        artefact=hits.artefact.repeat(4),
    )
    assert same(bootstrap.resample(hits), bootstrap.resample(copied))


def test_a_row_bootstrap_would_be_too_narrow():
    hits = world(2, rows=20, spread=2.0)
    by_row = replace(hits, groups=np.arange(len(hits.groups)))
    wide, narrow = (
        bootstrap.interval(s.teacher, s.n) for s in map(bootstrap.resample, (hits, by_row))
    )
    assert width(wide) > 1.5 * width(narrow)


def test_pairing_sharpens_a_difference():
    hits = world(3, spread=2.0)
    sample = bootstrap.resample(hits)
    other = bootstrap.resample(hits, seed=1)
    unpaired = bootstrap.interval(sample.student - other.control, sample.n)
    assert width(bootstrap.difference(sample)) < 0.9 * width(unpaired)


def test_a_student_like_the_teacher_closes_the_gap():
    hits = world(4)
    sample = bootstrap.resample(replace(hits, student=np.tile(hits.teacher, (3, 1))))
    assert bootstrap.gap_closed(sample) == bootstrap.Interval(1, 1, 1, 200)
    assert bootstrap.retention(sample) == bootstrap.Interval(1, 1, 1, 200)
    assert bootstrap.corrected_retention(sample, 0.2) == bootstrap.Interval(1, 1, 1, 200)


def test_a_student_like_its_control_closes_nothing():
    hits = world(5)
    sample = bootstrap.resample(replace(hits, student=hits.control))
    assert (
        bootstrap.gap_closed(sample)
        == bootstrap.difference(sample)
        == bootstrap.Interval(0, 0, 0, 200)
    )


def test_order_of_rows_and_of_seeds_changes_nothing():
    hits = world(6)
    rows = np.random.default_rng(0).permutation(200)
    seeds = [2, 0, 1]
    moved = Hits(
        groups=hits.groups[rows],
        student=hits.student[seeds][:, rows],
        student_seeds=seeds,
        control=hits.control[:, rows],
        control_seeds=hits.control_seeds,
        teacher=hits.teacher[rows],
        artefact=hits.artefact[rows],
    )
    assert same(bootstrap.resample(hits), bootstrap.resample(moved))


def test_a_part_of_the_rows_is_the_same_as_those_rows_alone():
    hits = world(7)
    part = np.random.default_rng(1).random(200) < 0.3
    alone = replace(
        hits,
        groups=hits.groups[part],
        student=hits.student[:, part],
        control=hits.control[:, part],
        teacher=hits.teacher[part],
        artefact=hits.artefact[part],
    )
    assert same(bootstrap.resample(replace(hits, rows=part)), bootstrap.resample(alone))


def test_blocks_do_not_change_the_draws(monkeypatch):
    hits = world(8)
    whole = bootstrap.resample(hits)
    monkeypatch.setattr(bootstrap, "BLOCK", 1000)
    assert same(whole, bootstrap.resample(hits))


def test_same_seed_same_numbers():
    assert same(bootstrap.resample(world(9), seed=3), bootstrap.resample(world(9), seed=3))
    assert not same(bootstrap.resample(world(9), seed=3), bootstrap.resample(world(9), seed=4))


def test_seeds_are_paired_where_both_arms_have_them():
    """Control and student move together by seed, so the difference is constant although each is
    not.
    """
    level = np.zeros((4, 40), bool)
    for seed in range(4):
        level[seed, : 8 * (seed + 1)] = True
    hits = Hits(np.zeros(40), level, [0, 1, 2, 3], control=level[::-1], control_seeds=[3, 2, 1, 0])
    sample = bootstrap.resample(hits)
    assert width(bootstrap.interval(sample.student, 40)) > 0.2
    assert bootstrap.difference(sample) == bootstrap.Interval(0, 0, 0, 40)


def test_a_seed_that_one_arm_lacks_still_counts_for_the_other():
    hits = world(10)
    sample = bootstrap.resample(replace(hits, control=hits.control[:1], control_seeds=[0]))
    assert sample.student[0] == pytest.approx(hits.student.mean())
    assert sample.control[0] == pytest.approx(hits.control[0].mean())
    assert np.isfinite(sample.control).all()


@pytest.mark.parametrize("level", ["teacher", "noise", "above"])
def test_no_gap_where_the_control_reaches_the_teacher(level):
    hits = world(11)
    control = {
        "teacher": hits.teacher,
        "noise": hits.teacher ^ (np.arange(200) == np.flatnonzero(hits.teacher)[0]),
        "above": np.ones(200, bool),
    }[level]
    sample = bootstrap.resample(replace(hits, control=np.tile(control, (3, 1))))
    assert bootstrap.gap_closed(sample) is None


def test_nothing_is_kept_of_a_teacher_at_chance_or_absent():
    hits = world(12)
    sample = bootstrap.resample(hits)
    assert bootstrap.corrected_retention(sample, float(sample.teacher[0])) is None
    bare = bootstrap.resample(
        replace(hits, teacher=None, control=None, control_seeds=(), artefact=None)
    )
    assert (
        bootstrap.retention(bare)
        is bootstrap.gap_closed(bare)
        is bootstrap.difference(bare)
        is None
    )


def test_chance_is_the_most_frequent_class():
    label = np.array([0, 0, 0, 1, 1, 2])
    assert bootstrap.chance(label) == 0.5
    assert bootstrap.chance(label, label > 0) == pytest.approx(2 / 3)


def test_the_width_agrees_with_theory():
    """sqrt(p (1 - p) / n) * 2 * 1.96 for independent rows; 2000 resamples know a width to about 4
    %.
    """
    n = 1000
    hits = Hits(np.arange(n), (np.arange(n) < 800)[None], [0])
    expected = 2 * 1.96 * np.sqrt(0.8 * 0.2 / n)
    sample = bootstrap.resample(hits)
    assert width(bootstrap.interval(sample.student, n)) == pytest.approx(expected, rel=0.12)


def test_seeds_spread_the_mean_by_their_unbiased_variance():
    """Var of the drawn mean is s^2 / S with s^2 over S - 1, which S of S draws would miss by (S -
    1) / S.
    """
    n = 1000
    rates = np.array([0.5, 0.6, 0.8])
    student = np.arange(n) < (rates * n)[:, None]
    sample = bootstrap.resample(Hits(np.zeros(n), student, range(3)), num=20_000)
    assert sample.student[1:].var() == pytest.approx(rates.var(ddof=1) / 3, rel=0.05)
