"""What newcomers get wrong, and what they are told."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import tsgb
from test_callers import Net
from tsgb.preprocessing import Preprocessing


@pytest.fixture
def x():
    return torch.rand(2, 3, 14, 14, generator=torch.Generator().manual_seed(0))


def wide(width=64, height=32):
    return Image.new("RGB", (width, height), "red")


@pytest.mark.parametrize("draw", ["overlay", "boxes", "mask"])
def test_an_image_of_another_shape_without_its_preprocessing_is_told(draw, x):
    e = tsgb.explain(Net(), x, 1)
    size = tuple(x.shape[2:])
    options = {"image": wide()} if draw == "overlay" else {"images": [wide()] * len(x)}
    with pytest.warns(UserWarning, match=r"64 x 32 pixels is taken as squashed .* preprocessing="):
        getattr(e, draw)(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(e, draw)(**options, preprocessing=Preprocessing(size=size))
        square = wide(32, 32)
        getattr(e, draw)(**({"image": square} if draw == "overlay" else {"images": [square] * len(x)}))


def test_what_is_no_image_or_no_index_is_named(x):
    e = tsgb.explain(Net(), x, 1)
    with pytest.raises(TypeError, match="a Pillow image or a file, got ndarray"):
        e.overlay(np.zeros((4, 4, 3), dtype=np.uint8))
    with pytest.raises(TypeError, match=r"must be a Pillow image, .* got str"):
        Preprocessing(size=(4, 4)).tensor("image.png")
    with pytest.raises(TypeError, match="target counts those asked for, 0 for the first, got 'heart'"):
        e.overlay(target="heart")


def test_one_image_without_its_batch_is_told(x):
    with pytest.raises(ValueError, match=r"one image \(C, H, W\) is given as images\[None\]"):
        tsgb.explain(Net(), x[0], 1)


def test_what_else_the_model_takes_is_asked_for(x):
    class Beside(Net):
        def forward(self, x, meta):
            return super().forward(x) + meta

    with pytest.raises(TypeError, match=r"'meta': pass what else the model takes as forward_kwargs=.* tuple"):
        tsgb.explain(Beside(), x, 1)
    assert tsgb.explain(Beside(), x, 1, forward_kwargs={"meta": torch.zeros(5)}).maps.any()


def test_several_functions_are_refused(x):
    with pytest.raises(tsgb.TargetError, match=r"one function of the output: explain several .* one after the other"):
        tsgb.explain(Net(), x, [lambda y: y[:, 0], lambda y: y[:, 1]])
