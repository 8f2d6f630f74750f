"""Average precision and the pointing game against their literal twins, scikit-learn, and numbers worked by hand."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference_metrics as plain
from tsgb import metrics
from tsgb.metrics import ranking

# Ranked 16, 15, .. 1: row by row from the lower right.
MAP = torch.arange(1.0, 17.0).reshape(1, 4, 4)
MASK = torch.tensor([[[0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]]).bool()


@st.composite
def cases(draw):
    """Maps with many ties, and masks."""
    count, height, width = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    levels = draw(st.sampled_from([1, 3, 1000]))
    maps = torch.randint(-levels, levels + 1, (count, height, width), generator=generator).float()
    masks = torch.rand(maps.shape, generator=generator) < draw(st.sampled_from([0.0, 0.2, 0.7, 1.0]))
    return maps, masks, draw(st.integers(0, 5))


@given(cases())
@settings(max_examples=80, deadline=None)
def test_ranking_and_average_precision_are_their_twins(case):
    maps, masks, seed = case
    ranked = ranking.ranking(maps, seed)
    found = ranking.average_precision(maps, masks, seed)
    for n, map in enumerate(maps):
        assert [divmod(pixel, map.shape[1]) for pixel in ranked[n].tolist()] == plain.ranking(map, seed)
        assert float(found[n]) == pytest.approx(plain.average_precision(map, masks[n], seed), abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.95])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_ties_average_precision_is_that_of_scikit_learn(share, dtype):
    score = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn, the twin").average_precision_score
    maps = torch.stack([torch.randperm(29 * 31).reshape(29, 31) for _ in range(5)]).to(dtype) - 400
    masks = torch.rand(maps.shape) < share
    masks[:, 3, 4] = True
    found = ranking.average_precision(maps, masks)
    assert found.dtype == torch.float64
    for n in range(5):
        assert float(found[n]) == pytest.approx(score(masks[n].flatten(), maps[n].flatten()), abs=1e-12)


def test_average_precision_by_hand():
    # The mask holds the values 16, 10 and 4, which are at ranks 1, 7 and 13: (1/1 + 2/7 + 3/13) / 3.
    assert float(ranking.average_precision(MAP, MASK)) == pytest.approx((1 + 2 / 7 + 3 / 13) / 3, abs=1e-15)


def test_average_precision_of_everything_nothing_and_the_mask_itself():
    assert ranking.average_precision(MAP, torch.ones_like(MASK)).tolist() == [1.0]
    assert ranking.average_precision(MASK.float(), MASK).tolist() == [1.0]
    assert ranking.average_precision(MAP, torch.zeros_like(MASK)).isnan().all()


def test_sharpening_leaves_the_order_alone():
    maps, masks = torch.rand(3, 12, 12), torch.rand(3, 12, 12) < 0.3
    assert torch.equal(ranking.average_precision(maps, masks), ranking.average_precision(maps**3, masks))


def test_ties_are_broken_by_the_seed_and_fairly():
    # One pixel of 100 in a map without evidence: its rank is uniform, so that AP is H_100 / 100 on average, 0.0519.
    maps, masks = torch.zeros(1, 10, 10), torch.zeros(1, 10, 10, dtype=torch.bool)
    masks[0, 0, 0] = True
    found = [float(ranking.average_precision(maps, masks, seed)) for seed in range(600)]
    assert found[:20] == [float(ranking.average_precision(maps, masks, seed)) for seed in range(20)]
    assert len({round(1 / value) for value in found}) > 90
    assert sum(found) / 600 == pytest.approx(0.0519, abs=0.02)


def test_a_map_has_its_figure_whatever_else_is_in_the_batch():
    maps, masks = torch.randint(0, 3, (6, 9, 7)).double(), torch.rand(6, 9, 7) < 0.3
    for n in range(6):
        alone = ranking.average_precision(maps[n : n + 1], masks[n : n + 1])
        assert float(alone) == float(ranking.average_precision(maps, masks)[n])
        assert bool(ranking.pointing(maps[n : n + 1], masks[n : n + 1])) == bool(ranking.pointing(maps, masks)[n])


@given(cases(), st.sampled_from([0.0, 1.0, 1.5, 3.0, 4.2]), st.sampled_from([(1.0, 1.0), (2.0, 0.5), (1.4, 3.0)]))
@settings(max_examples=100, deadline=None)
def test_pointing_is_its_twin(case, tolerance, scale):
    maps, masks, seed = case
    found = ranking.pointing(maps, masks, tolerance, scale, seed)
    assert found.dtype == torch.bool
    assert found.tolist() == [plain.pointing(m, k, tolerance, scale, seed) for m, k in zip(maps, masks, strict=True)]


def test_pointing_by_hand():
    # The highest pixel is (0, 0), the mask's only one (3, 2). At a scale of (2, 1) they are (6, 2) apart, squared 40.
    map, mask = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.bool)
    map[0, 0, 0], mask[0, 3, 2] = 1, True
    assert not ranking.pointing(map, mask, tolerance=40**0.5 - 1e-9, scale=(2, 1))
    assert ranking.pointing(map, mask, tolerance=40**0.5 + 1e-9, scale=(2, 1))
    assert not ranking.pointing(map, mask, tolerance=5, scale=(1, 2))  # (3, 4) apart, 5: the inequality is strict
    assert ranking.pointing(map, mask, tolerance=5.01, scale=(1, 2))
    assert not ranking.pointing(map, mask)
    assert ranking.pointing(map, torch.ones_like(mask))


def test_every_map_may_have_its_own_scale():
    map, mask = torch.zeros(2, 4, 4), torch.zeros(2, 4, 4, dtype=torch.bool)
    map[:, 0, 0], mask[:, 0, 3] = 1, True  # 3 pixels apart, horizontally
    assert ranking.pointing(map, mask, 15, torch.tensor([[9.0, 4.9], [1.0, 5.0]])).tolist() == [True, False]


def test_one_of_several_highest_pixels_is_drawn():
    map, mask = torch.zeros(1, 1, 4), torch.tensor([[[True, False, False, False]]])
    hits = [bool(ranking.pointing(map, mask, seed=seed)) for seed in range(400)]
    assert 60 < sum(hits) < 140  # a quarter


def test_wrong_arguments_are_named():
    maps, masks = torch.rand(2, 4, 5), torch.rand(2, 4, 5) > 0.5
    broken = maps.clone()
    broken[1, 0, 0] = float("nan")
    endless = maps.clone()
    endless[0, 0, 0] = float("inf")
    for function in (ranking.average_precision, ranking.pointing):
        for error, message, args in (
            (ValueError, "maps must be finite, but map 1 holds NaN or infinity", (broken, masks)),
            (ValueError, "maps must be finite, but map 0 holds NaN or infinity", (endless, masks)),
            (TypeError, r"maps must be a floating tensor \(N, H, W\), got int64", (maps.long(), masks)),
            (TypeError, r"maps must be a floating tensor \(N, H, W\), got ndarray", (maps.numpy(), masks)),
            (ValueError, r"maps must have shape \(N, H, W\), got \(4, 5\)", (maps[0], masks[0])),
            (ValueError, r"maps must have shape \(N, H, W\), got \(2, 0, 5\)", (maps[:, :0], masks[:, :0])),
            (TypeError, r"masks must be a bool tensor \(N, H, W\), got uint8", (maps, masks.byte())),
            (ValueError, r"masks must have the maps' shape \(2, 4, 5\), got \(1, 4, 5\)", (maps, masks[:1])),
            (ValueError, "masks must be on the maps' device cpu, got meta", (maps, masks.to("meta"))),
        ):
            with pytest.raises(error, match=message):
                function(*args)
    with pytest.raises(ValueError, match="map 1 holds NaN"):
        ranking.ranking(broken)
    for tolerance in (-1, float("nan")):
        with pytest.raises(ValueError, match=r"tolerance must be 0 or more, in pixels of the original image, got"):
            ranking.pointing(maps, masks, tolerance)
    for scale in ((1.0,), (1.0, 0.0), (1.0, -1.0), (1.0, float("nan")), (1.0, float("inf")), torch.ones(3, 2)):
        with pytest.raises(ValueError, match=r"scale must be positive, \(vertical, horizontal\) or \(N, 2\), got"):
            ranking.pointing(maps, masks, 1, scale)


def test_metric_classes_are_loaded_when_asked_for():
    code = "import sys, tsgb.metrics.ranking, tsgb.metrics.boxes; print('torchmetrics' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = metrics.nonsense
    if importlib.util.find_spec("torchmetrics") is None:
        pytest.skip("needs torchmetrics")
    assert metrics.Energy.__module__ == "tsgb.metrics.modules"
    with pytest.raises(AttributeError, match="no attribute 'Tensor'"):  # which modules only imports
        _ = metrics.Tensor
