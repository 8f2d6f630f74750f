import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

import reference_metrics as plain
from tsgb.metrics.similarity import correlation, spearman, ssim

FUNCTIONS = (correlation, spearman, ssim)
VALUES = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e3, 1e3, allow_subnormal=False))
PAIRS = hnp.arrays(float, (2, 2, 6, 7), elements=VALUES)


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(PAIRS)
def test_correlations_are_scipys(pair):
    a, b = torch.from_numpy(pair)
    for function, twin in ((spearman, stats.spearmanr), (correlation, stats.pearsonr)):
        found = function(a, b)
        assert found.shape == (2,)
        assert found.dtype == torch.float64
        for n in range(2):
            p, q = pair[0, n].ravel(), pair[1, n].ravel()
            if min(p.max() - p.min(), q.max() - q.min()) == 0:
                assert found[n] == 0
            elif min(p.std(), q.std()) > 1e-6 or function is spearman:
                assert found[n].item() == pytest.approx(twin(p, q).statistic, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(PAIRS)
def test_ssim_is_its_twin(pair):
    a, b = torch.from_numpy(pair)
    assert ssim(a, b).tolist() == pytest.approx([plain.ssim(a[n], b[n]) for n in range(2)], abs=1e-9)


def test_ssim_is_its_twin_where_a_percentile_cuts():
    a, b = noise(1, 30, 20) ** 3, noise(1, 30, 20) - 0.5
    a[0, 3, 4] = 1e3
    assert ssim(a, b).item() == pytest.approx(plain.ssim(a[0], b[0]), abs=1e-12)
    assert ssim(a.float(), b.float()).item() == pytest.approx(plain.ssim(a[0], b[0]), abs=1e-5)
    assert ssim(a.abs(), -b.abs()).item() == pytest.approx(plain.ssim(a[0].abs(), -b[0].abs()), abs=1e-12)


def test_rank_correlation_of_a_four_by_four_map_worked_by_hand():
    # Ranks of a: 1 .. 16. b swaps the neighbours of each pair, so every rank is off by one: d^2 sums to 16, and
    # 1 - 6 * 16 / (16 * (256 - 1)) = 1 - 96 / 4080.
    a = torch.arange(16.0).reshape(1, 4, 4)
    b = a.reshape(8, 2).flip(1).reshape(1, 4, 4)
    assert spearman(a, b.exp()).item() == pytest.approx(1 - 96 / 4080, abs=1e-12)
    # For ranks the deviations are the values' own: Pearson's is the same number; of a and a^2 it is not 1.
    assert correlation(a, b).item() == pytest.approx(1 - 96 / 4080, abs=1e-12)
    assert spearman(a, a**2).item() == pytest.approx(1, abs=1e-12)
    assert correlation(a, a**2).item() < 0.98


def test_ties_share_the_mean_rank():
    # a: 0 0 0 1 has ranks 2 2 2 4, b: 0 1 2 3 has 1 2 3 4; deviations -.5 -.5 -.5 1.5 and -1.5 -.5 .5 1.5:
    # (0.75 + 0.25 - 0.25 + 2.25) / sqrt(3 * 5) = 3 / sqrt(15).
    a, b = torch.tensor([[[0.0, 0.0], [0.0, 1.0]]]), torch.arange(4.0).reshape(1, 2, 2)
    assert spearman(a, b).item() == pytest.approx(3 / math.sqrt(15), abs=1e-12)


def test_ssim_of_one_window_worked_by_hand():
    # One 5 x 5 window; a is one pixel of 1, so mean 1/25, variance (1 - 1/25) / 24 = 0.04; b is a turned, the pixel
    # elsewhere: covariance -(1/25) / 24 = -1/600. C1 = 0.0004, C2 = 0.0036, the mean's factor is 1:
    # (-2/600 + 0.0036) / (0.08 + 0.0036).
    a, b = torch.zeros(1, 5, 5), torch.zeros(1, 5, 5)
    a[0, 0, 0], b[0, 4, 4] = 7.0, 0.1
    assert ssim(a, b).item() == pytest.approx((0.0036 - 1 / 300) / 0.0836, abs=1e-12)
    # With b negative the mean's factor is (-2/625 + 0.0004) / (2/625 + 0.0004), and the covariance is 1/600.
    expected = (0.0004 - 0.0032) / (0.0004 + 0.0032) * (0.0036 + 1 / 300) / 0.0836
    assert ssim(a, -b).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_alike(function):
    a, b = noise(4, 8, 9), noise(4, 8, 9).flip(0)
    assert torch.allclose(function(a, b), function(b, a), atol=1e-12)
    assert torch.allclose(function(a, a), torch.ones(4, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(function(a, b), function(3 * a, b / 7), atol=1e-12)
    assert torch.allclose(function(a, b)[1:2], function(a[1:2], b[1:2]), atol=1e-12)
    assert bool((function(a, -a) < function(a, b)).all()) or function is ssim
    assert bool((function(a, b).abs() <= 1).all())
    assert function(a[:0], b[:0]).shape == (0,)
    assert not function(a.requires_grad_(), b).requires_grad


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("size", [1e-300, 1e300])
def test_any_scale_is_right(function, size):
    a, b = noise(1, 8, 9), noise(1, 8, 9).flip(1)
    assert torch.allclose(function(a * size, b * size), function(a, b), atol=1e-9)


def test_empty_and_constant_maps():
    a, nothing = noise(1, 6, 6), torch.zeros(1, 6, 6, dtype=torch.float64)
    for function in (correlation, spearman):
        for constant in (nothing, nothing + 0.1, nothing - 1e9):
            assert function(a, constant).item() == function(constant, constant).item() == 0
    assert ssim(nothing, nothing).item() == 1
    assert -1 <= ssim(a, nothing).item() < 0.1


@pytest.mark.parametrize("function", FUNCTIONS)
def test_wrong_arguments_are_named(function):
    good = torch.zeros(1, 6, 6)
    for wrong in (torch.zeros(2, 6, 6), torch.zeros(1, 6, 5)):
        with pytest.raises(ValueError, match="a and b must be of one shape"):
            function(good, wrong)
    for wrong in (torch.zeros(6, 6), torch.zeros(1, 0, 6)):
        with pytest.raises(ValueError, match="b must have shape"):
            function(good, wrong)
    for value in (math.nan, math.inf):
        wrong = good.clone()
        wrong[0, 2, 3] = value
        with pytest.raises(ValueError, match="b must be finite"):
            function(good, wrong)
        with pytest.raises(ValueError, match="a must be finite"):
            function(wrong, good)
    with pytest.raises(TypeError, match="b must be a floating tensor"):
        function(good, good.long())


def test_ssim_needs_a_window():
    with pytest.raises(ValueError, match="5 x 5 pixels or more"):
        ssim(torch.zeros(1, 4, 9), torch.zeros(1, 4, 9))
