import functools
import json
import math
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tsgb.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}
SIZES = [(500, 375), (375, 500), (224, 224), (64, 64), (33, 91), (91, 33), (257, 256), (1000, 301), (7, 5), (300, 1)]


@functools.cache
def torchvision() -> types.ModuleType:
    """Import torchvision also where its operators were built for another torch."""
    try:
        import torchvision.transforms
    except ModuleNotFoundError:
        pytest.skip("torchvision is not installed")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torchvision_schemas.append(library)  # the schemas go when the library does
        import torchvision.transforms
    import torchvision.transforms._presets

    return torchvision.transforms


torchvision_schemas: list[torch.library.Library] = []


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def smooth(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(x / (5 + 3 * i) + y / (9 - 2 * i)) for i in range(3)]
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8))


@pytest.mark.parametrize("image_size", SIZES)
@pytest.mark.parametrize(("short_side", "crop"), [(256, 224), (232, 224), (64, 64), (40, 57), (31, 64)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crop_is_torchvisions_preset(image_size, short_side, crop, interpolation):
    mode = torchvision().InterpolationMode(interpolation)
    preset = torchvision()._presets.ImageClassification(crop_size=crop, resize_size=short_side, interpolation=mode)
    ours = Preprocessing((crop, crop), resize="crop", short_side=short_side, interpolation=interpolation)
    for image in (noise(*image_size), smooth(*image_size)):
        got, expected = ours.tensor(image), preset(image)
        assert got.shape == expected.shape
        assert got.dtype == expected.dtype
        assert got.is_contiguous()
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("image_size", SIZES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_squash_is_torchvisions_resize(image_size, interpolation):
    t = torchvision()
    mode = t.InterpolationMode(interpolation)
    chain = t.Compose([t.Resize((48, 80), mode), t.ToTensor(), t.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 1 / 255))])
    ours = Preprocessing((48, 80), (0.5, 0.4, 0.3), (0.2, 0.3, 1 / 255), interpolation=interpolation)
    assert torch.equal(ours.tensor(noise(*image_size)), chain(noise(*image_size)))


def triangle(length: int, n: int) -> np.ndarray:
    """Literal antialiased bilinear scaling of one axis, as a matrix (n, length)."""
    matrix = np.zeros((n, length))
    scale = length / n
    for i in range(n):
        for j in range(length):
            matrix[i, j] = max(0, 1 - abs((i + 0.5) * scale - (j + 0.5)) / max(scale, 1))
        matrix[i] /= matrix[i].sum()
    return matrix


@pytest.mark.parametrize(("width", "height"), [(40, 30), (9, 70), (20, 10), (5, 4)])
def test_squash_is_the_literal_formula(width, height):
    image = noise(width, height)
    expected = np.einsum("ih,jw,hwc->cij", triangle(height, 10), triangle(width, 20), np.asarray(image) / 255.0)
    expected = (expected - np.reshape(IMAGENET_MEAN, (3, 1, 1))) / np.reshape(IMAGENET_STD, (3, 1, 1))
    error = (Preprocessing((10, 20)).tensor(image).numpy() - expected) * np.reshape(IMAGENET_STD, (3, 1, 1))
    assert abs(error).max() < 1.1 / 255  # rounded once in either direction


def test_a_crop_larger_than_the_image_is_filled_up_with_black():
    white = Image.new("RGB", (20, 10), "white")
    colours = Preprocessing((16, 17), **PLAIN, resize="crop", short_side=9).tensor(white)
    assert colours[0].sum(0).tolist() == [9] * 17
    assert colours[0].sum(1).tolist() == [0] * 3 + [17] * 9 + [0] * 4
    restored = Preprocessing((16, 17), resize="crop", short_side=9).restore(np.ones((16, 17)), (20, 10))
    assert np.isnan(restored).tolist() == [[False] * 19 + [True]] * 10  # 18 wide at scale 0.9, seen up to 17


def test_a_needle_does_not_fill_the_memory():
    preprocessing = Preprocessing((224, 224), **PLAIN, resize="crop", short_side=256)
    for needle, name in ((noise(30_001, 1), "30001 x 1"), (noise(1, 30_001), "1 x 30001")):
        with pytest.raises(ValueError, match=f"image of {name} pixels is too long and thin: with short_side=256 "):
            preprocessing.tensor(needle)
        assert Preprocessing((224, 224)).tensor(needle).shape == (3, 224, 224)
        restored = preprocessing.restore(np.ones((224, 224)), needle.size)
        assert np.isfinite(restored).sum() == 1
        assert np.isfinite(restored).ravel()[15_000]


def test_a_window_between_two_pixel_centres_shows_no_pixel():
    restored = Preprocessing((2, 2), resize="crop", short_side=4).restore(np.ones((2, 2)), (2, 1))
    assert restored.shape == (1, 2)
    assert np.isnan(restored).all()


def literal_restore(preprocessing: Preprocessing, values: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """The map, constant beyond its outermost pixel centres, averaged with a triangle around each image pixel."""
    height, width = values.shape
    result = np.full(image_size[::-1], np.nan)
    for y in range(image_size[1]):
        for x in range(image_size[0]):
            x0, y0, x1, y1 = preprocessing.to_network((x, y, x + 1, y + 1), image_size)
            u, v, reach_x, reach_y = (x0 + x1) / 2, (y0 + y1) / 2, max(x1 - x0, 1), max(y1 - y0, 1)
            if not (0 <= u <= width and 0 <= v <= height):
                continue
            total = weight = 0.0
            for j in range(math.floor(v - reach_y) - 1, math.ceil(v + reach_y) + 1):
                for i in range(math.floor(u - reach_x) - 1, math.ceil(u + reach_x) + 1):
                    w = max(0, 1 - abs(i + 0.5 - u) / reach_x) * max(0, 1 - abs(j + 0.5 - v) / reach_y)
                    total += w * values[min(max(j, 0), height - 1), min(max(i, 0), width - 1)]
                    weight += w
            result[y, x] = total / weight
    return result


@pytest.mark.parametrize("image_size", [(40, 30), (7, 5), (12, 8), (3, 61), (1, 1), (9, 2)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"resize": "crop"},
        {"resize": "crop", "short_side": 17},
        {"resize": "crop", "short_side": 5},
    ],
)
def test_restore_is_the_literal_formula(image_size, options):
    values = np.random.default_rng(1).normal(size=(9, 12)).astype(np.float32)
    preprocessing = Preprocessing((9, 12), **options)
    got = preprocessing.restore(values, image_size)
    assert got.dtype == np.float32
    assert got.shape == image_size[::-1]
    np.testing.assert_allclose(got, literal_restore(preprocessing, values, image_size), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"resize": "crop"}, {"resize": "crop", "short_side": 72}])
@pytest.mark.parametrize("image_size", [(160, 90), (90, 160), (64, 64), (50, 40)])
def test_a_mark_is_found_where_it_was(options, image_size):
    preprocessing = Preprocessing((64, 64), **PLAIN, **options)
    x, y = image_size[0] // 2 - 6, image_size[1] // 2 + 5
    pixels = np.zeros((*image_size[::-1], 3), np.uint8)
    pixels[y : y + 8, x : x + 8] = 255
    seen = preprocessing.tensor(Image.fromarray(pixels))[0].numpy()
    box = preprocessing.to_network((x, y, x + 8, y + 8), image_size)
    rows, columns = np.mgrid[:64, :64] + 0.5
    centre = [(seen * columns).sum() / seen.sum(), (seen * rows).sum() / seen.sum()]
    np.testing.assert_allclose(centre, [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2], atol=0.05)
    back = preprocessing.restore(seen, image_size)
    rows, columns = np.mgrid[: image_size[1], : image_size[0]] + 0.5
    centre = [np.nansum(back * columns) / np.nansum(back), np.nansum(back * rows) / np.nansum(back)]
    np.testing.assert_allclose(centre, [x + 4, y + 4], atol=0.1)


@pytest.mark.parametrize("options", [{}, {"resize": "crop", "short_side": 40}])
def test_restore_gives_back_constants_and_takes_tensors_lists_and_negative_values(options):
    restored = Preprocessing((32, 32), **options).restore(torch.full((32, 32), -2.5), (100, 70))
    assert np.nanmin(restored) == np.nanmax(restored) == -2.5
    assert np.isnan(restored).any() == bool(options)


LENGTHS = st.integers(1, 3000)


@given(
    image_size=st.tuples(LENGTHS, LENGTHS),
    size=st.tuples(st.integers(1, 600), st.integers(1, 600)),
    short_side=st.none() | st.integers(1, 600),
    resize=st.sampled_from(["squash", "crop"]),
    box=st.lists(st.floats(-50, 3000), min_size=4, max_size=4),
)
def test_boxes_there_and_back(image_size, size, short_side, resize, box):
    preprocessing = Preprocessing(size, resize=resize, short_side=short_side if resize == "crop" else None)
    there = preprocessing.to_network([[box, box]], image_size)
    assert there.shape == (1, 2, 4)
    np.testing.assert_allclose(preprocessing.to_image(there, image_size)[0, 1], box, rtol=1e-9, atol=1e-6)
    # The window reaches beyond the image by less than a pixel more on one side than on the other.
    left, top, right, bottom = preprocessing.to_network((0, 0, *image_size), image_size)
    assert abs(left - (size[1] - right)) <= 1 + 1e-9
    assert abs(top - (size[0] - bottom)) <= 1 + 1e-9


def test_crop_defaults_to_a_window_without_filling():
    assert Preprocessing((224, 224), resize="crop").short_side == 224
    oblong = Preprocessing((100, 200), **PLAIN, resize="crop")
    assert oblong.short_side == 200
    assert (oblong.tensor(Image.new("RGB", (33, 90), "white")) == 1).all()


def test_record_is_json_and_gives_the_same_preprocessing():
    for preprocessing in (Preprocessing((3, 4)), Preprocessing((3, 4), (0, 0, 0), (1, 1, 1), "crop", 9, "bicubic")):
        assert Preprocessing(**json.loads(json.dumps(preprocessing.record()))) == preprocessing
    assert Preprocessing((3, 4), (0, 0, 0), (1, 1, 1), "crop", None, "bicubic").record() == {
        "size": [3, 4],
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
        "resize": "crop",
        "short_side": 4,
        "interpolation": "bicubic",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": (0, 5)}, r"size must be two integers of at least 1, \(height, width\), got \(0, 5\)"),
        ({"size": 224}, r"size must be two integers .* got 224"),
        ({"size": (224.0, 224)}, r"size must be two integers .* got \(224.0, 224\)"),
        ({"size": (True, 1)}, r"size must be two integers"),
        ({"mean": (0.5, 0.5)}, r"mean must be 3 numbers, got \(0.5, 0.5\)"),
        ({"mean": 0.5}, r"mean must be 3 numbers, got 0.5"),
        ({"mean": ("0", 0, 0)}, r"mean must be 3 numbers"),
        ({"mean": (123.7, 116.3, 103.5)}, r"mean must be from 0 to 1, .* got \(123.7, 116.3, 103.5\)"),
        ({"mean": (math.nan, 0, 0)}, r"mean must be from 0 to 1"),
        ({"mean": (0, 0, -0.1)}, r"mean must be from 0 to 1"),
        ({"std": (0.2, 0, 0.2)}, r"std must be above 0 and at most 1, .* got \(0.2, 0, 0.2\)"),
        ({"std": (58.4, 57.1, 57.4)}, r"std must be above 0 and at most 1"),
        ({"resize": "stretch"}, r"resize must be 'squash' or 'crop', got 'stretch'"),
        ({"interpolation": "nearest"}, r"interpolation must be 'bilinear' or 'bicubic', got 'nearest'"),
        ({"short_side": 256}, r"short_side belongs to resize='crop'; it must be None here, got 256"),
        ({"resize": "crop", "short_side": 0}, r"short_side must be an integer of at least 1, got 0"),
        ({"resize": "crop", "short_side": 2.5}, r"short_side must be an integer of at least 1, got 2.5"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**{"size": (4, 4), **arguments})


def test_wrong_images_maps_and_boxes_are_named():
    preprocessing = Preprocessing((4, 6))
    with pytest.raises(ValueError, match="image must be of mode RGB, got L"):
        preprocessing.tensor(Image.new("L", (9, 9)))
    with pytest.raises(ValueError, match=r"map must be of shape \(4, 6\), got \(6, 4\)"):
        preprocessing.restore(np.zeros((6, 4)), (9, 9))
    for call in (preprocessing.to_image, preprocessing.to_network):
        with pytest.raises(ValueError, match=r"boxes must be of shape \(\.\.\., 4\), got \(3,\)"):
            call((1, 2, 3), (9, 9))
        with pytest.raises(
            ValueError, match=r"image_size must be two integers of at least 1, \(width, height\), got \(0, 9\)"
        ):
            call((1, 2, 3, 4), (0, 9))


def test_the_image_is_left_as_it_was():
    image = noise(9, 9)
    before = np.array(image)
    tensor = Preprocessing((9, 9)).tensor(image)
    tensor.zero_()
    assert (np.asarray(image) == before).all()
