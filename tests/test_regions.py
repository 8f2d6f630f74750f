"""Regions of maps against scipy's labels and numbers worked by hand, and an explanation's boxes and masks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

import reference_metrics as plain
from tsgb import Explanation, regions, render
from tsgb.preprocessing import Preprocessing

# Mean of the positive part 16 / 16 = 1. Above it lie the 2s at the left, which touch at a corner, and the 5.
MAP = np.array([[2, 0, 0, 0], [0, 2, 0, 5], [-9, 2, 0, 0], [0, 1, 1, 3]], dtype=float)


@st.composite
def maps(draw):
    """Maps of few or many values, some without any positive."""
    shape = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    values = draw(st.sampled_from([[-1, 0], [-3, 0, 1], [-2, 0, 1, 2, 3, 1000], list(range(-20, 60))]))
    return np.random.default_rng(draw(st.integers(0, 2**31))).choice(values, shape).astype(float)


@given(maps(), st.sampled_from(["mean", 0, 0.0, 0.2, 1 / 3, 0.999, 1]))
@settings(max_examples=150, deadline=None)
def test_mask_and_boxes_are_their_twins(map, threshold):
    inside = regions.mask(map, threshold)
    assert inside.dtype == bool
    assert np.array_equal(inside, plain.region(map, threshold))
    expected = [box for _, box in plain.pieces(inside)]
    found = regions.boxes(map, threshold, "all")
    assert (found.dtype, found.shape) == (np.float64, (len(expected), 4))
    assert [tuple(box) for box in found.tolist()] == expected
    assert np.array_equal(regions.boxes(map, threshold), found[:1])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (37, 53), (200, 150)])
def test_components_are_those_of_scipy(share, shape):
    inside = np.random.default_rng(0).random(shape) < share
    found = regions.components(inside)
    assert found.dtype == np.int64
    assert np.array_equal(found, ndimage.label(inside, np.ones((3, 3)))[0])


def test_long_and_nested_pieces_are_one():
    snake = np.zeros((61, 60), bool)
    snake[::2], snake[1::4, -1], snake[3::4, 0] = True, True, True
    spiral = np.zeros((60, 60), bool)
    y = x = 0
    for turn, length in enumerate(range(59, 0, -1)):
        dy, dx = ((0, 1), (1, 0), (0, -1), (-1, 0))[turn % 4]
        for _ in range(length if turn % 2 else length - turn % 4 // 2):
            spiral[y, x] = True
            y, x = y + dy, x + dx
    comb = np.zeros((40, 41), bool)
    comb[:, ::2], comb[-1] = True, True
    for inside in (snake, snake.T, spiral, comb, comb[::-1], comb.T):
        assert np.array_equal(regions.components(inside), ndimage.label(inside, np.ones((3, 3)))[0])
    assert regions.components(snake).max() == regions.components(comb).max() == 1


@given(st.integers(1, 30), st.data())
@settings(max_examples=80, deadline=None)
def test_join_finds_the_lowest_node_connected(count, data):
    node = st.integers(0, count - 1)
    edges = data.draw(st.lists(st.tuples(node, node), max_size=40))
    lowest = list(range(count))
    for _ in range(count):
        for a, b in edges:
            lowest[a] = lowest[b] = min(lowest[a], lowest[b])
    ends = np.array(edges, dtype=np.int64).reshape(-1, 2)
    assert regions.join(count, ends[:, 0], ends[:, 1]).tolist() == lowest


def test_regions_by_hand():
    assert regions.boxes(MAP, component="all").tolist() == [[0, 0, 2, 3], [3, 1, 4, 2], [3, 3, 4, 4]]
    assert regions.boxes(MAP).tolist() == [[0, 0, 2, 3]]
    assert regions.mask(MAP, 0.4).sum() == 2  # above 2: the inequality is strict
    assert regions.mask(MAP, 0.39).sum() == 5
    assert regions.boxes(MAP, 0).tolist() == [[0, 0, 4, 4]]  # the 1s join the 2s and the 3
    assert regions.boxes(MAP, 1).shape == (0, 4)


def test_of_equal_pieces_the_first_is_the_largest():
    assert regions.boxes([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]], 0.5, "all").tolist() == [[2, 0, 3, 1], [0, 1, 1, 2]]


@pytest.mark.parametrize("map", [np.zeros((3, 4)), -np.ones((3, 4))])
@pytest.mark.parametrize("threshold", ["mean", 0, 0.5])
def test_a_map_without_positive_values_has_no_region(map, threshold):
    assert not regions.mask(map, threshold).any()
    assert regions.boxes(map, threshold, "all").shape == (0, 4)


def test_wrong_arguments_are_named():
    for message, call in (
        (r"map must have shape \(H, W\), got \(2, 3, 4\)", lambda: regions.boxes(np.ones((2, 3, 4)))),
        (r"map must have shape \(H, W\), got \(0, 4\)", lambda: regions.mask(np.ones((0, 4)))),
        ("map must be finite, but it holds NaN or infinity", lambda: regions.mask([[1.0, float("nan")]])),
        ("map must be finite, but it holds NaN or infinity", lambda: regions.mask([[1.0, -float("inf")]])),
        (r"threshold must be 'mean' or 0..1, a share of the map's maximum, got 1.5", lambda: regions.mask(MAP, 1.5)),
        (r"threshold must be 'mean' or 0..1, .* got -0.1", lambda: regions.mask(MAP, -0.1)),
        (r"threshold must be 'mean' or 0..1, .* got nan", lambda: regions.mask(MAP, float("nan"))),
        (r"threshold must be 'mean' or 0..1, .* got 'median'", lambda: regions.mask(MAP, "median")),
        (r"threshold must be 'mean' or 0..1, .* got True", lambda: regions.mask(MAP, True)),
        ("component must be 'largest' or 'all', got 'first'", lambda: regions.boxes(MAP, component="first")),
        (r"mask must be an array of bool, \(H, W\), got float64 \(4, 4\)", lambda: regions.components(MAP)),
        (r"mask must be an array of bool, \(H, W\), got bool \(4,\)", lambda: regions.components(MAP[0] > 0)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def explanation(*maps):
    """An explanation of N images with K maps each, from N lists of K arrays."""
    values = torch.tensor(np.array(maps), dtype=torch.float32)
    targets = torch.zeros(values.shape[:2], dtype=torch.long)
    reasons = [[None] * values.shape[1] for _ in values]
    images = torch.zeros(len(values), 3, *values.shape[2:])
    return Explanation(values, targets, None, [], reasons, 1.0, images)


def test_without_images_regions_are_in_the_networks_pixels():
    found = explanation([MAP, -MAP], [MAP.T, 0 * MAP])
    boxes, masks = found.boxes("mean", "all"), found.mask()
    for n, row in enumerate(([MAP, -MAP], [MAP.T, 0 * MAP])):
        for k, map in enumerate(row):
            assert np.array_equal(boxes[n][k], regions.boxes(map, "mean", "all"))
            assert np.array_equal(masks[n][k], regions.mask(map))
    assert [[len(each) for each in row] for row in found.boxes()] == [[1, 1], [1, 0]]
    assert found.boxes(0.5)[0][0].tolist() == [[3, 1, 4, 2]]
    assert found.mask(0.5)[0][0].sum() == 2
    assert found.boxes()[1][1].shape == (0, 4)


def test_squashed_regions_are_in_the_images_pixels(tmp_path):
    # The 4 x 4 map over an image of 8 x 12: a pixel of it is 2 wide and 3 high.
    found = explanation([MAP])
    Image.new("RGB", (8, 12)).save(tmp_path / "image.png")
    for image in ((8, 12), Image.new("L", (8, 12)), tmp_path / "image.png", str(tmp_path / "image.png")):
        assert found.boxes(images=[image])[0][0].tolist() == [[0, 0, 4, 9]]
        (mask,) = found.mask(images=[image])[0]
        assert np.array_equal(mask, np.repeat(np.repeat(regions.mask(MAP), 3, 0), 2, 1))
    way = Preprocessing(size=(4, 4))
    assert found.boxes(images=[(8, 12)], preprocessing=way)[0][0].tolist() == [[0, 0, 4, 9]]


def test_every_image_has_its_own_size():
    boxes = explanation([MAP], [MAP]).boxes(images=[(4, 8), (40, 4)])
    assert [row[0].tolist() for row in boxes] == [[[0, 0, 2, 6]], [[0, 0, 20, 3]]]


def test_a_turned_file_is_as_it_is_shown(tmp_path):
    image = Image.new("RGB", (8, 12))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter: shown 12 wide and 8 high
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert explanation([MAP]).mask(images=[tmp_path / "turned.jpg"])[0][0].shape == (8, 12)


@pytest.mark.parametrize("size", [(16, 8), (9, 17), (5, 5), (31, 4), (640, 480)])
@pytest.mark.parametrize("short_side", [None, 3, 6])
def test_cropped_regions_are_where_the_crop_was(size, short_side):
    map = np.random.default_rng(1).normal(size=(4, 5))
    way = Preprocessing(size=(4, 5), resize="crop", short_side=short_side)
    found = explanation([map])
    (mask,) = found.mask(0.3, [size], way)[0]
    inside = regions.mask(map.astype(np.float32), 0.3)
    seen = ~np.isnan(way.restore(map, size))
    assert mask.shape == seen.shape == size[::-1]
    for y in range(0, size[1], max(size[1] // 12, 1)):
        for x in range(0, size[0], max(size[0] // 12, 1)):
            u, v, _, _ = way.to_network((x + 0.5, y + 0.5, 0, 0), size)
            assert mask[y, x] == (seen[y, x] and inside[min(int(v), 3), min(int(u), 4)])
    (boxes,) = found.boxes(0.3, "all", [size], way)[0]
    carried = way.to_image(regions.boxes(map.astype(np.float32), 0.3, "all"), size)
    expected = [
        [max(x0, 0), max(y0, 0), min(x1, size[0]), min(y1, size[1])]
        for x0, y0, x1, y1 in carried
        if x0 < size[0] and y0 < size[1] and x1 > 0 and y1 > 0
    ]
    assert boxes.tolist() == expected


def test_an_overlay_lies_where_the_crop_was(tmp_path):
    way = Preprocessing(size=(4, 4), resize="crop", short_side=4)
    image, found = Image.new("RGB", (12, 6), "white"), explanation([MAP, 2 * MAP])
    drawn = found.overlay(image, target=1, preprocessing=way)
    assert np.array_equal(drawn, render.overlay(image, way.restore(2 * MAP, image.size)))
    assert not np.array_equal(drawn, found.overlay(image, target=1))
    found.save(tmp_path, [image], way)
    found.overlay(image, preprocessing=way).save(tmp_path / "expected.png")
    assert np.array_equal(Image.open(tmp_path / "0_0.png"), Image.open(tmp_path / "expected.png"))
    with pytest.raises(ValueError, match="preprocessing needs the original images"):
        found.overlay(preprocessing=way)
    with pytest.raises(ValueError, match=r"of the maps' size \(4, 4\), got \(5, 4\)"):
        found.overlay(image, preprocessing=Preprocessing(size=(5, 4)))
    for place in ({"target": 2}, {"index": 1}):
        with pytest.raises(IndexError, match=r"index must be below 1 and target, which counts the classes asked for"):
            found.overlay(image, **place)


def test_a_box_beyond_the_image_is_left_out_and_one_across_its_edge_ends_there():
    # An image of 4 x 2 in a window of 4 x 4 is filled up by one row above and one below.
    way = Preprocessing(size=(4, 4), resize="crop", short_side=2)
    map = np.array([[0, 0, 0, 7], [0, 0, 0, 0], [0, 5, 0, 0], [0, 5, 0, 0]], dtype=float)
    assert explanation([map]).boxes("mean", "all", [(4, 2)], way)[0][0].tolist() == [[1, 1, 2, 2]]
    assert explanation([map]).mask("mean", [(4, 2)], way)[0][0].tolist() == [[False] * 4, [False, True, False, False]]


def test_the_first_of_several_inputs_is_judged():
    found = explanation([MAP])
    both = Explanation(
        (found.maps, found.maps * 0), found.targets, None, [], [[None]], 1.0, (found.images, found.images)
    )
    assert both.boxes()[0][0].tolist() == [[0, 0, 2, 3]]


def test_no_images_have_no_regions():
    nothing = Explanation(torch.zeros(0, 2, 4, 4), torch.zeros(0, 2).long(), None, [], [], 1.0, torch.zeros(0, 3, 4, 4))
    way = Preprocessing(size=(4, 4))
    for method in (nothing.boxes, nothing.mask):
        assert method() == method(images=[]) == method(images=[], preprocessing=way) == []
        with pytest.raises(ValueError, match="images must be a list of 0, one for each input, got 1"):
            method(images=[(4, 4)])


def test_images_without_targets_have_no_regions():
    untargeted = Explanation(
        torch.zeros(2, 0, 4, 4), torch.zeros(2, 0).long(), None, [], [[], []], 1.0, torch.zeros(2, 3, 4, 4)
    )
    assert untargeted.boxes() == untargeted.mask() == [[], []]


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int32])
def test_sizes_may_be_integers_of_numpy(kind):
    found = explanation([MAP])
    size = (kind(200), kind(12))
    assert found.boxes(images=[size])[0][0].tolist() == [[0, 0, 100, 9]]
    for way in (None, Preprocessing(size=(4, 4), resize="crop", short_side=5)):
        for method in (found.boxes, found.mask):
            assert np.array_equal(
                method(0.1, images=[size], preprocessing=way), method(0.1, images=[(200, 12)], preprocessing=way)
            )


def test_wrong_images_are_named():
    found = explanation([MAP], [MAP])
    way = Preprocessing(size=(4, 5))
    for message, arguments in (
        ("images must be a list of 2, one for each input, got 1", {"images": [(4, 4)]}),
        ("images must be a list of 2, one for each input, got str", {"images": "ab"}),
        ("images must be a list of 2, one for each input, got Image", {"images": Image.new("RGB", (4, 4))}),
        (r"images must be Pillow images, files, or \(width, height\), at least 1, got 640", {"images": (640, 480)}),
        (r"images must be Pillow images, .* at least 1, got \(4, 0\)", {"images": [(4, 0), (4, 4)]}),
        (r"images must be Pillow images, .* at least 1, got \(True, 4\)", {"images": [(True, 4), (4, 4)]}),
        (r"images must be Pillow images, .* at least 1, got \(4.0, 4\)", {"images": [(4.0, 4), (4, 4)]}),
        (r"images must be Pillow images, .* at least 1, got .*0", {"images": [(np.int64(0), 4), (4, 4)]}),
        (r"images must be Pillow images, .* at least 1, got .*True", {"images": [(np.True_, 4), (4, 4)]}),
        ("no such.png: no such file", {"images": ["no such.png", "no such.png"]}),
        ("preprocessing needs the original images", {"preprocessing": way}),
        (
            r"preprocessing must be of the maps' size \(4, 4\), got \(4, 5\)",
            {"images": [(4, 4)] * 2, "preprocessing": way},
        ),
        ("threshold must be 'mean' or 0..1", {"threshold": 2}),
    ):
        for method in (found.boxes, found.mask):
            with pytest.raises(ValueError, match=message):
                method(**arguments)
    with pytest.raises(ValueError, match="component must be"):
        found.boxes(component="best")
    series = Explanation(torch.rand(1, 1, 9), torch.zeros(1, 1), None, [], [[None]], 1.0, torch.rand(1, 1, 9))
    with pytest.raises(ValueError, match=r"boxes and masks are of maps \(N, K, H, W\)"):
        series.boxes()
