"""Box accuracy and MaxBoxAcc against their literal twins, which label anew at every threshold, and by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference_metrics as plain
from tsgb.metrics import boxes

# Of the maximum 10: the middle 1.0, its ring 0.5, the corner piece 0.3 (behind a gap of nothing).
MAP = torch.tensor([[3.0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 5, 5, 5], [0, 0, 5, 10, 5], [0, 0, 5, 5, 5]])


@st.composite
def cases(draw):
    """Maps, smooth or rough, of few values or many, and up to three boxes."""
    height, width = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    map = random.normal(size=(height, width)) ** draw(st.sampled_from([1, 3]))
    map = map if draw(st.booleans()) else np.round(map * draw(st.sampled_from([0.7, 2, 10])))
    given = []
    for _ in range(draw(st.integers(0, 3))):
        x0, y0 = random.uniform(0, width - 0.5), random.uniform(0, height - 0.5)
        given.append([x0, y0, x0 + random.uniform(0.3, width), y0 + random.uniform(0.3, height)])
    return torch.tensor(map), given


@given(cases())
@settings(max_examples=15, deadline=None)
def test_threshold_hits_are_their_twin(case):
    map, given = case
    assert torch.equal(boxes.threshold_hits(map, given), plain.threshold_hits(map, given))


def test_there_are_as_many_thresholds_as_are_named():
    assert boxes.THRESHOLDS == 1001 == boxes.threshold_hits(MAP, []).shape[1]


@pytest.mark.parametrize("kind", ["blobs", "noise", "flat", "steps", "float32"])
def test_threshold_hits_of_larger_maps_are_their_twin(kind):
    coarse = torch.rand(1, 1, 4, 4, dtype=torch.float64)
    map = torch.nn.functional.interpolate(coarse, size=(23, 19), mode="bilinear")[0, 0]
    if kind == "noise":
        map = torch.randn(23, 19, dtype=torch.float64) * map**2
    elif kind == "flat":
        map = torch.ones(23, 19)
    elif kind == "steps":
        map = (map * 12).floor()
    elif kind == "float32":
        map = map.float() * 1e-30
    given = [[2.0, 3.0, 12.0, 15.0], [0.0, 0.0, 19.0, 23.0], [11.5, 4.0, 18.0, 22.0]]
    found = boxes.threshold_hits(map, given)
    assert torch.equal(found, plain.threshold_hits(map, given))
    assert 0 < found.sum() < found.numel()


def test_threshold_hits_by_hand():
    # Below 0.3 the largest piece is the 3 x 3 ring and middle, 9 pixels, and beside it there is the corner; below 0.5
    # the 3 x 3 alone; from 0.5 on the middle alone, (3, 3, 4, 4), and at 1 nothing (the inequality is strict).
    ring = boxes.threshold_hits(MAP, [[2, 2, 5, 5]])  # IoU 1 to 0.499, then 1/9
    assert [row.nonzero().flatten().tolist() for row in ring] == [list(range(500))] * 4
    corner = boxes.threshold_hits(MAP, [[0, 0, 1, 1]])  # never the largest, IoU 1 to 0.299
    assert [int(row.sum()) for row in corner] == [0, 300, 300, 300]
    middle = boxes.threshold_hits(MAP, [[3, 3, 4, 5]])  # area 2: IoU 2/9 below 0.5, 1/2 from there to 0.999
    assert [row.nonzero().flatten().tolist() for row in middle] == [list(range(500, 1000))] * 3 + [[]]
    either = boxes.threshold_hits(MAP, torch.tensor([[3, 3, 4, 5], [0, 0, 1, 1]]))
    assert torch.equal(either, middle | corner)


def test_of_equal_pieces_the_first_has_the_largest_box():
    map = torch.tensor([[0.0, 0.0, 1.0], [2.0, 0.0, 0.0]])
    first = boxes.threshold_hits(map, [[2, 0, 3, 1]])
    other = boxes.threshold_hits(map, [[0, 1, 1, 2]])
    assert first[0].nonzero().flatten().tolist() == list(range(500))
    assert other[0].nonzero().flatten().tolist() == list(range(500, 1000))
    assert other[1].nonzero().flatten().tolist() == list(range(1000))


def test_iou_at_the_limit_counts():
    # 3 of 10 pixels, 1 of 2, 7 of 10.
    for row, (shared, width) in enumerate(((3, 10), (1, 2), (7, 10)), 1):
        map = torch.zeros(1, 10)
        map[0, :shared] = 1
        assert boxes.threshold_hits(map, [[0, 0, width, 1]])[row, :1000].all()
        assert not boxes.threshold_hits(map, [[0, 0, width + 0.001, 1]])[row].any()


@given(cases(), st.sampled_from([0.1, 0.3, 0.5, 0.7]))
@settings(max_examples=100, deadline=None)
def test_box_accuracy_is_its_twin(case, iou):
    map, given = case
    found = boxes.box_accuracy(map, given, iou)
    assert isinstance(found, bool)
    assert found == plain.box_accuracy(map, given, iou)


def test_box_accuracy_by_hand():
    # The mean is 53 / 25 = 2.12, the largest piece the 3 x 3. Against (2, 2, 5, 4): 6 / 9; against (3, 3, 5, 5): 4 / 9.
    assert boxes.box_accuracy(MAP, [[2, 2, 5, 4]])
    assert boxes.box_accuracy(MAP, [[2, 2, 5, 4]], iou=6 / 9)
    assert not boxes.box_accuracy(MAP, [[2, 2, 5, 4]], iou=0.67)
    assert not boxes.box_accuracy(MAP, [[3, 3, 5, 5]])
    assert not boxes.box_accuracy(MAP, [[0, 0, 1, 1]])  # a piece, but not the largest
    assert boxes.box_accuracy(MAP, np.array([[0, 0, 1, 1], [2, 2, 5, 4]]))


@pytest.mark.parametrize("map", [torch.zeros(3, 4), -torch.ones(3, 4)])
def test_nothing_found_or_nothing_given_is_no_hit(map):
    assert not boxes.threshold_hits(map, [[0, 0, 4, 3]]).any()
    assert not boxes.box_accuracy(map, [[0, 0, 4, 3]])
    for nothing in ([], torch.zeros(0, 4), np.zeros((0, 4))):
        assert not boxes.threshold_hits(MAP, nothing).any()
        assert not boxes.box_accuracy(MAP, nothing)


@given(st.integers(2, 9), st.integers(1, 6), st.data())
@settings(max_examples=60, deadline=None)
def test_max_box_accuracy_is_its_twin(count, thresholds, data):
    rows = st.lists(st.booleans(), min_size=thresholds, max_size=thresholds)
    hits = torch.tensor(data.draw(st.lists(rows, min_size=count, max_size=count)))
    some = data.draw(st.lists(st.booleans(), min_size=count - 2, max_size=count - 2))
    tune = torch.tensor([*some, True, False])
    assert boxes.max_box_accuracy(hits, tune) == plain.max_box_accuracy(hits, tune)


def test_the_threshold_is_not_chosen_on_what_is_reported():
    hits = torch.tensor([[True, False], [True, False], [False, True], [False, True]])
    assert boxes.max_box_accuracy(hits, torch.tensor([True, True, False, False])) == (0.0, 0)
    assert boxes.max_box_accuracy(hits, torch.tensor([True, False, False, False])) == (1 / 3, 0)


def test_wrong_arguments_are_named():
    for function in (boxes.box_accuracy, boxes.threshold_hits):
        for error, message, args in (
            (ValueError, "map must be finite, but map 0 holds NaN", (MAP / 0 * 0, [])),
            (TypeError, r"map must be a floating tensor \(H, W\), got ndarray", (MAP.numpy(), [])),
            (TypeError, r"map must be a floating tensor \(H, W\), got \(1, 5, 5\)", (MAP[None], [])),
            (TypeError, "map must be a floating tensor .* got int64", (MAP.long(), [])),
            (ValueError, r"boxes must have shape \(n, 4\), left, upper, .* got \(4,\)", (MAP, [0, 0, 1, 1])),
            (ValueError, r"boxes must have shape \(n, 4\), .* got \(1, 5\)", (MAP, [[0, 0, 1, 1, 1]])),
            (ValueError, "boxes must have left < right and upper < lower, got", (MAP, [[0, 0, 0, 1]])),
            (ValueError, "boxes must have left < right and upper < lower, got", (MAP, [[0, 2, 1, 1]])),
            (ValueError, "boxes must have left < right and upper < lower, got", (MAP, [[0, 0, 1, float("inf")]])),
        ):
            with pytest.raises(error, match=message):
                function(*args)
    for iou in (0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="iou must be above 0 and at most 1, got"):
            boxes.box_accuracy(MAP, [], iou)
    hits, tune = torch.ones(2, 3).bool(), torch.tensor([True, False])
    for error, message, args in (
        (TypeError, "hits must be a bool tensor, got float32", (hits.float(), tune)),
        (TypeError, "tune must be a bool tensor, got list", (hits, [True, False])),
        (ValueError, r"hits must be \(N, T\) and tune \(N,\), got \(2, 3\) and \(1,\)", (hits, tune[:1])),
        (ValueError, r"hits must be \(N, T\) and tune \(N,\), got \(2, 0\) and \(2,\)", (hits[:, :0], tune)),
        (ValueError, "tune must leave cases on both sides, got 2 of 2", (hits, tune | True)),
        (ValueError, "tune must leave cases on both sides, got 0 of 2", (hits, tune & False)),
    ):
        with pytest.raises(error, match=message):
            boxes.max_box_accuracy(*args)
