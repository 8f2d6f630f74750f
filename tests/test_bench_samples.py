"""What maps are judged against: regions in the network's pixels, the network's classes, grids."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tsgb.bench.samples import Classifier, compose, grids, image_of, prepare_sample
from tsgb.data import Category, Dataset, Region, Sample
from tsgb.models import Network
from tsgb.preprocessing import Preprocessing

SQUASH = Preprocessing(size=(6, 8))
CROP = Preprocessing(size=(8, 8), resize="crop", short_side=10)


def network(preprocessing, names=None):
    return Network(torch.nn.Identity(), preprocessing, names, "spec", "weights", "0")


def sample(region, preprocessing=SQUASH, size=(16, 12), logits=(0.0, 2.0, 1.0), others=(), names=None, annotated=None):
    regions = (region, *others)
    categories = tuple(sorted(region.category for region in regions))
    sample = Sample("a.png", categories, lambda: None, lambda: regions, annotated)
    data = Dataset("d", "coco", {n: Category(f"class {n}") for n in range(9)}, [sample], ())
    image = Image.new("RGB", size)
    return prepare_sample(
        sample, 4, image, preprocessing.tensor(image), torch.tensor(logits), data, network(preprocessing, names)
    )


def boxed(*boxes, category=1, mask=None):
    return Region(category, np.array(boxes, dtype=float).reshape(-1, 4), mask)


def plain_inside(boxes, preprocessing, size):
    """A pixel is inside if its centre, carried to the image, lies in a box: pixel by pixel."""
    height, width = preprocessing.size
    found = np.zeros((height, width), dtype=bool)
    for i in range(height):
        for j in range(width):
            x, y, _, _ = preprocessing.to_image([j + 0.5, i + 0.5, j + 0.5, i + 0.5], size)
            found[i, j] = any(x0 <= x < x1 and y0 <= y < y1 for x0, y0, x1, y1 in boxes)
    return found


@pytest.mark.parametrize("preprocessing", [SQUASH, CROP])
@given(box=st.tuples(*[st.integers(0, 15) for _ in range(4)]))
def test_a_box_covers_the_pixels_whose_centres_lie_in_it(preprocessing, box):
    box = [min(box[0], box[2]), min(box[1], box[3], 11), max(box[0], box[2]) + 1, min(max(box[1], box[3]), 11) + 1]
    found = sample(boxed(box), preprocessing)
    expected = plain_inside([box], preprocessing, (16, 12))
    if expected.any():
        assert (found.cases[0].region.numpy() == expected).all()
    else:
        assert not found.cases
        assert "holds no pixel" in found.problems[0]


@pytest.mark.parametrize("preprocessing", [SQUASH, CROP])
def test_a_mask_is_read_at_the_pixels_centres(preprocessing):
    mask = np.random.default_rng(0).random((12, 16)) > 0.5
    found = sample(boxed((0, 0, 16, 12), mask=mask), preprocessing).cases[0]
    height, width = preprocessing.size
    for i in range(height):
        for j in range(width):
            x, y, _, _ = preprocessing.to_image([j + 0.5, i + 0.5, 0, 0], (16, 12))
            assert found.region[i, j] == mask[int(np.floor(y)), int(np.floor(x))]
    assert found.has_mask


def test_nothing_of_a_mask_lies_in_the_filling_of_a_crop():
    preprocessing = Preprocessing(size=(8, 8), resize="crop", short_side=4)
    found = sample(boxed((0, 0, 16, 16), mask=np.ones((16, 16), bool)), preprocessing, size=(16, 16))
    assert found.cases[0].region.sum() == 16  # the image is 4 x 4 in the middle of 8 x 8


def test_scale_is_image_pixels_per_input_pixel():
    assert sample(boxed((0, 0, 16, 12))).scale == (2.0, 2.0)
    assert sample(boxed((0, 0, 16, 12)), CROP).scale == pytest.approx((1.2, 16 / 13))


def test_difficult_is_small_and_not_alone():
    small, large = boxed((0, 0, 6, 7)), boxed((0, 0, 7, 7))  # 42 and 49 of 192 pixels; a quarter is 48
    other = boxed((0, 0, 16, 12), category=2)
    assert sample(small, others=[other]).cases[0].is_difficult
    assert not sample(large, others=[other]).cases[0].is_difficult
    assert not sample(small).cases[0].is_difficult


def test_what_cannot_be_judged_is_named():
    assert "no class 'class 7'" in sample(boxed((0, 0, 5, 5), category=7)).problems[0]
    assert "annotated as 9 x 9, but the image is 16 x 12" in sample(boxed((0, 0, 5, 5)), annotated=(9, 9)).problems[0]


def test_a_group_is_asked_about_as_its_most_probable_class():
    dog = Region(12, np.array([[0.0, 0, 5, 5]]), None)
    sample = Sample("a.png", (12,), lambda: None, lambda: (dog,), None)
    data = Dataset("d", "voc", {12: Category("dog")}, [sample], ())
    image = Image.new("RGB", (16, 12))
    logits = torch.zeros(1000)
    logits[[200, 210]] = torch.tensor([5.0, 6.0])
    asked = [sample, 0, image, SQUASH.tensor(image)]
    assert prepare_sample(*asked, logits, data, network(SQUASH)).cases[0].target == 210
    logits[:150] = 9.0  # now no dog is among the 20 most probable
    unseen = prepare_sample(*asked, logits, data, network(SQUASH))
    assert not unseen.cases
    assert not unseen.problems


@given(st.lists(st.integers(0, 12), max_size=60), st.integers(0, 3), st.sampled_from([2, 3]))
def test_grids_hold_distinct_classes_and_every_image_once(classes, seed, side):
    pool = list(enumerate(classes))
    found = grids(pool, side, 500, seed)
    used = [index for grid in found for index, _ in grid]
    assert len(used) == len(set(used))
    assert all(classes[index] == target for grid in found for index, target in grid)
    assert all(len({target for _, target in grid}) == side**2 for grid in found)
    assert found == grids(pool[::-1], side, 500, seed)
    if len(set(classes)) >= side**2:
        assert found
    assert grids(pool, side, 1, seed) == found[:1]


def test_a_grid_is_laid_out_row_by_row():
    cells = [torch.full((3, 2, 4), float(k)) for k in range(9)]
    laid = compose(cells)
    assert laid.shape == (3, 6, 12)
    assert laid[0, ::2, ::4].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_the_image_of_an_input_is_the_image():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(image_of(SQUASH.tensor(image), SQUASH)), np.asarray(image))


def test_logits_with_positions_are_averaged():
    class Dense(torch.nn.Module):
        def forward(self, images):
            return {"out": images * 2}

    images = torch.rand(2, 3, 4, 5)
    assert torch.allclose(Classifier(Dense())(images), 2 * images.mean((2, 3)))
