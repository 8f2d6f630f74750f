import numpy as np
import pytest
import torch
from torch import nn

import tsgb
from tsgb import plots, render


def is_coloured(image):
    """Where an image is not grey."""
    return np.ptp(np.asarray(image).astype(int), axis=2) > 0


def is_black(image):
    return (np.asarray(image) == 0).all(2)


def test_a_series_is_drawn_over_its_evidence():
    signal, map = np.zeros((2, 700)), np.zeros(700)
    signal[0, 100:110], signal[1, 500] = 1, -1
    map[200:210] = 2
    image = plots.series(signal, map)
    assert image.size == (700, 216)
    coloured, black = is_coloured(image), is_black(image)
    assert coloured[:, 200:210].mean() > 0.9
    assert not coloured[:, :200].any()
    assert not coloured[:, 210:].any()
    first, second = black[:108], black[108:]
    assert first[8:104, 100:110].any(1).argmax() == 0  # the highest value at the top of its row
    assert black.any(0).all()  # a line through every column
    assert np.flatnonzero(second.sum(0) > 50)[0] == 500  # and down to the lowest value
    assert first.sum(0)[99:112].max() >= 96  # joined where it jumps


@pytest.mark.parametrize(
    ("length", "width"), [(1, 640), (3, 642), (640, 640), (1600, 1600), (1601, 1600), (99_999, 1600)]
)
def test_a_series_of_any_length_fits(length, width):
    map = np.zeros(length)
    map[length // 2] = 1
    image = plots.series(np.random.default_rng(0).normal(size=(1, length)), map)
    assert image.size == (width, 112)
    assert is_coloured(image).any()  # the one sample with evidence is seen


def test_a_volume_is_shown_slice_by_slice():
    volume, map = np.zeros((1, 5, 100, 70)), np.zeros((5, 100, 70))
    volume[0, 3] = 1
    map[1, 20:30, 30:40] = 1
    image = plots.montage(volume, map)
    assert image.size == (8 + 3 * 148, 8 + 2 * 208)
    coloured = is_coloured(image)
    rows, columns = np.flatnonzero(coloured.any(1)), np.flatnonzero(coloured.any(0))
    assert (rows[0], rows[-1]) == (8 + 40, 8 + 59)
    assert (columns[0], columns[-1]) == (8 + 148 + 60, 8 + 148 + 79)
    assert np.asarray(image)[216 + 100, 8 + 70].min() > np.asarray(image)[8 + 100, 8 + 70].max()  # slice 3 is bright


def test_many_slices_are_shown_at_even_steps_and_on_one_scale():
    map = np.zeros((100, 128, 128))
    map[0], map[99] = 1, 4
    image = np.asarray(plots.montage(np.zeros((3, 100, 128, 128)), map)).astype(int)
    assert image.shape[:2] == (8 + 6 * 136, 8 + 6 * 136)
    weak, strong = image[70, 70], image[8 + 5 * 136 + 64, 8 + 5 * 136 + 64]
    assert weak[2] > weak[0]
    assert strong[0] > strong[2]


@pytest.mark.parametrize(
    ("draw", "shown", "map"),
    [
        (plots.series, np.zeros(5), np.zeros(5)),
        (plots.series, np.zeros((2, 5)), np.zeros(4)),
        (plots.series, np.zeros((2, 0)), np.zeros(0)),
        (plots.montage, np.zeros((1, 5, 5)), np.zeros((5, 5))),
        (plots.montage, np.zeros((1, 2, 5, 5)), np.zeros((3, 5, 5))),
    ],
)
def test_other_shapes_are_refused(draw, shown, map):
    with pytest.raises(ValueError, match="got"):
        draw(shown, map)


@pytest.mark.parametrize("colormap", render.COLORMAPS)
def test_nothing_is_drawn_for_no_evidence(colormap):
    assert not is_coloured(plots.series(np.ones((1, 700)), np.zeros(700), colormap=colormap)).any()
    assert not is_coloured(plots.montage(np.ones((1, 2, 9, 9)), np.zeros((2, 9, 9)), colormap=colormap)).any()


@pytest.mark.parametrize("dimensions", [1, 3])
def test_explanations_of_series_and_volumes(dimensions, tmp_path):
    conv, norm, pool, mean = (
        getattr(nn, f"{name}{dimensions}d") for name in ("Conv", "BatchNorm", "MaxPool", "AdaptiveAvgPool")
    )
    torch.manual_seed(0)
    layers = conv(2, 6, 3, padding=1), norm(6), nn.ReLU(), pool(2), conv(6, 8, 3, groups=2), nn.ReLU(), mean(1)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 4)).eval()
    x = torch.rand(2, 2, *(12, 10, 8)[:dimensions])
    found = tsgb.explain(model, x, [[0, 1], [2, 3]], strict=True)
    assert found.maps.shape == (2, 2, *x.shape[2:])
    draw = plots.series if dimensions == 1 else plots.montage
    drawn = draw(x[1].numpy(), found.maps[1, 0].numpy(), colormap="bwr")
    assert np.array_equal(np.asarray(found.overlay(index=1, colormap="bwr")), np.asarray(drawn))
    paths = found.save(tmp_path)
    assert sorted(path.name for path in paths) == sorted(
        f"{n}_{k}.{kind}" for n, classes in enumerate(((0, 1), (2, 3))) for k in classes for kind in ("png", "npy")
    )
    assert np.load(tmp_path / "1_3.npy").shape == x.shape[2:]
    with pytest.raises(ValueError, match="an image can be given for maps"):
        found.overlay(drawn)
    with pytest.raises(ValueError, match="an image can be given for maps"):
        found.save(tmp_path / "none", [drawn, drawn])
    assert not (tmp_path / "none").exists()
