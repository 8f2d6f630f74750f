import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference_metrics as plain
from tsgb.metrics import intervals
from tsgb.metrics.intervals import class_mean_interval, mean_interval, mean_over_classes, median_interval

CASES = st.lists(
    st.tuples(st.floats(-10, 10), st.integers(-2, 3), st.integers(-3, 6)), min_size=1, max_size=25
)  # value, class, image


@settings(max_examples=40, deadline=None)
@given(CASES, st.integers(0, 5), st.sampled_from([0.95, 0.5]))
def test_intervals_are_their_twins(cases, seed, level):
    values, classes, groups = (np.array(column) for column in zip(*cases, strict=True))
    found = class_mean_interval(values, classes, groups, seed, 20, level)
    assert found == pytest.approx(plain.class_interval(values, classes, groups, seed, 20, level), abs=1e-9)
    found = mean_interval(values, groups, seed, 20, level)
    assert found == pytest.approx(plain.class_interval(values, values * 0, groups, seed, 20, level), abs=1e-9)
    expected = plain.mean_of_classes(zip(values, classes, strict=True))
    assert mean_over_classes(values, classes) == pytest.approx(expected, abs=1e-12)


def test_means_over_classes_worked_by_hand():
    # Class 1: 1, 0, 0, 1 -> 1/2; class 4: 1 -> 1; class 9: 0, 1, 0 -> 1/3. (1/2 + 1 + 1/3) / 3 = 11/18.
    values, classes = np.array([1, 0, 0, 1, 1, 0, 1, 0]), np.array([1, 1, 1, 1, 4, 9, 9, 9])
    assert mean_over_classes(values, classes) == pytest.approx(11 / 18, abs=1e-12)
    assert mean_over_classes(values[::-1] > 0, classes[::-1]) == pytest.approx(11 / 18, abs=1e-12)


def test_the_interval_of_a_mean_is_that_of_the_normal_law():
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = mean_interval(values, np.arange(400), resamples=4000)
    half = 1.96 * values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)


def test_the_intervals_cover_what_they_should():
    chance = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        low, high = mean_interval(chance.normal(size=60), np.arange(60), seed=trial, resamples=200)
        covered += low <= 0 <= high
    assert 172 <= covered <= 198  # 188 expected of 200, give or take 3.4


def test_cases_of_one_image_are_drawn_together():
    # Ten images of 50 equal cases tell no more than ten cases do.
    values = np.random.default_rng(0).normal(size=10)
    alone = mean_interval(values, np.arange(10))
    assert mean_interval(np.repeat(values, 50), np.repeat(np.arange(10), 50)) == pytest.approx(alone, abs=1e-12)
    low, high = mean_interval(np.repeat(values, 50), np.arange(500))
    assert high - low < 0.3 * (alone[1] - alone[0])


def test_a_class_that_is_not_drawn_is_left_out():
    # Class 0 has 1 in one image of two, class 1 has 0 in the other: a resample means 1, 0 or 1/2, never 0.25.
    ends = class_mean_interval(np.array([1.0, 0.0]), np.array([0, 1]), np.array([0, 1]))
    assert ends == (0.0, 1.0)
    assert class_mean_interval(np.array([1.0, 0.0]), np.array([0, 1]), np.array([5, 5])) == (0.5, 0.5)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-10, 10), min_size=2, max_size=25), st.integers(0, 5), st.sampled_from([0.95, 0.5]), st.randoms()
)
def test_the_interval_of_a_median_is_its_twin(values, seed, level, random):
    expected = plain.median_interval(values, seed, 20, level)
    assert median_interval(np.array(values), seed, 20, level) == pytest.approx(expected, abs=1e-9)
    random.shuffle(values)
    assert median_interval(np.array(values), seed, 20, level) == pytest.approx(expected, abs=1e-9)


def test_the_interval_of_a_median_worked_by_hand():
    # Two draws of 0 and 1 have the median 0, 1/2, 1 in 1, 2, 1 of 4 cases; 30 % and 70 % lie in the 1/2.
    # Three draws of 5, 1, 30 have the median 1 in 3 * 2 + 1 = 7 of 27 cases (26 %), 30 as often, else 5.
    for values, ends, middle in (([0, 1], (0, 1), 0.5), ([5, 1, 30], (1, 30), 5)):
        assert median_interval(np.array(values)) == ends
        assert median_interval(np.array(values), level=0.4) == (middle, middle)
    assert median_interval(np.full(5, 3.5)) == (3.5, 3.5)


def test_the_intervals_of_medians_cover_what_they_should():
    chance = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        low, high = median_interval(chance.exponential(size=61), seed=trial, resamples=200)
        covered += low <= math.log(2) <= high
    assert 172 <= covered <= 198  # as for means


def test_seed_level_and_memory_of_medians(monkeypatch):
    values = np.random.default_rng(0).normal(size=30)
    found = median_interval(values)
    assert found == median_interval(values)
    assert found != median_interval(values, seed=1)
    narrow = median_interval(values, level=0.5)
    assert found[0] < narrow[0] < np.median(values) < narrow[1] < found[1]
    assert median_interval(values, resamples=1)[0] == median_interval(values, resamples=1)[1]
    monkeypatch.setattr(intervals, "_DRAWN_AT_ONCE", 210)  # seven rows at a time
    assert median_interval(values) == found


def test_seed_level_and_order():
    values, groups = np.random.default_rng(0).normal(size=40), np.arange(40) // 2
    found = mean_interval(values, groups)
    assert found == mean_interval(values, groups)
    assert found != mean_interval(values, groups, seed=1)
    narrow = mean_interval(values, groups, level=0.5)
    assert found[0] < narrow[0] < values.mean() < narrow[1] < found[1]
    shuffled = np.random.default_rng(1).permutation(40)
    assert mean_interval(values[shuffled], groups[shuffled]) == pytest.approx(found, abs=1e-12)
    assert mean_interval(values, groups * 1000 - 7) == found
    assert mean_interval(values, groups, resamples=1)[0] == mean_interval(values, groups, resamples=1)[1]


def test_memory_does_not_change_the_draws(monkeypatch):
    values, classes, groups = np.random.default_rng(0).normal(size=30), np.arange(30) % 4, np.arange(30) // 2
    found = class_mean_interval(values, classes, groups, resamples=100)
    monkeypatch.setattr(intervals, "_DRAWN_AT_ONCE", 210)  # seven rows at a time
    assert class_mean_interval(values, classes, groups, resamples=100) == found


def test_wrong_arguments_are_named():
    values, labels = np.array([1.0, 2.0]), np.array([0, 1])
    for value in (math.nan, math.inf):
        for call in (mean_interval, mean_over_classes):
            with pytest.raises(ValueError, match="values must be finite"):
                call(np.array([1.0, value]), labels)
    for wrong in ((values[:0], labels[:0]), (values, labels[:1]), (values[None], labels[None]), (1.0, labels)):
        with pytest.raises(ValueError, match="must be of one shape"):
            mean_interval(*wrong)
    with pytest.raises(ValueError, match="values and classes must be of one shape"):
        mean_over_classes(values, labels[:1])
    with pytest.raises(ValueError, match="values and groups must be of one shape"):
        class_mean_interval(values, labels, labels[:1])
    with pytest.raises(TypeError, match="groups must be integers, got float64"):
        mean_interval(values, values)
    for options in ({"resamples": 0}, {"level": 0}, {"level": 1}, {"level": 95}):
        with pytest.raises(ValueError, match="resamples must be 1 or more"):
            mean_interval(values, labels, **options)
        with pytest.raises(ValueError, match="resamples must be 1 or more"):
            median_interval(values, **options)
    for few in (values[:0], values[:1]):
        with pytest.raises(ValueError, match=f"two or more, got {len(few)}: one value has no interval"):
            median_interval(few)
    with pytest.raises(ValueError, match="values must be finite, got nan"):
        median_interval(np.array([1.0, math.nan, 2.0]))
    for shaped in (values[None], np.float64(3)):
        with pytest.raises(ValueError, match=r"values must be of shape \(N,\), got"):
            median_interval(shaped)
