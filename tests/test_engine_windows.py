"""Sums over a convolution's windows and their transpose, against loops over positions."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from tsgb.engine.windows import Windows


def positions(windows, size, out):
    """Every window's place and those that it sees, one after the other."""
    for place in itertools.product(*(range(n) for n in out)):
        for offset in itertools.product(*(range(k) for k in windows.kernel)):
            seen = tuple(
                p * s + j * d - b
                for p, s, j, d, b in zip(place, windows.stride, offset, windows.dilation, windows.before, strict=True)
            )
            if all(0 <= at < n for at, n in zip(seen, size, strict=True)):
                yield place, seen


geometries = st.fixed_dictionaries(
    {
        "kernel": st.lists(st.integers(1, 4), min_size=1, max_size=3),
        "stride": st.integers(1, 3),
        "padding": st.one_of(st.integers(0, 2), st.sampled_from(["same", "valid"])),
        "dilation": st.integers(1, 2),
        "channels": st.sampled_from([1, 3]),
    }
)


@settings(deadline=None, max_examples=40)
@given(geometries)
def test_windows_are_their_literal_twin(geometry):
    kernel, channels, size = geometry["kernel"], geometry["channels"], (9, 8, 7)[: len(geometry["kernel"])]
    stride = 1 if geometry["padding"] == "same" else geometry["stride"]
    arguments = stride, geometry["padding"], geometry["dilation"]
    windows = Windows.of(kernel, *arguments)
    convolution = (functional.conv1d, functional.conv2d, functional.conv3d)[len(kernel) - 1]
    x = torch.rand(2, channels, *size, dtype=torch.float64)
    expected = convolution(x, torch.ones(channels, 1, *kernel, dtype=torch.float64), None, *arguments, channels)
    before = x.clone()
    assert torch.allclose(windows.sums(x), expected)
    assert torch.allclose(windows.sums(x, 0.5), expected + 0.5)
    assert torch.equal(x, before)  # nothing is written on what was given

    values = torch.rand(2, *expected.shape, dtype=torch.float64)
    spread = torch.zeros(2, *x.shape, dtype=torch.float64)
    for place, seen in positions(windows, size, expected.shape[2:]):
        spread[(..., *seen)] += values[(..., *place)]
    assert torch.allclose(windows.spread(values, size), spread)
    assert torch.allclose(traced(lambda v: windows.spread(v, size), values), spread)


def traced(function, *tensors):
    """What the graph of a function gives, of images and places that it was not made with."""
    return make_fx(function)(*(torch.rand_like(tensor) for tensor in tensors))(*tensors)


def test_windows_of_one_position_are_the_positions():
    x = torch.rand(2, 1, 5, 6)
    point = Windows.of((1, 1), 1, 0, 1)
    assert torch.equal(point.sums(x), x)
    assert torch.equal(point.spread(x, (5, 6)), x)
