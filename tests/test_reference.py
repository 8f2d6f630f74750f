"""The formulas of `reference` against its loops, the authors' golden arrays, and the properties of the method."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

import reference
from reference import activation, avg_pool, batch_norm, conv, conv_head, linear_head, shift


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-300))


GEOMETRY = [
    {},
    {"stride": (2, 1), "padding": (1, 2)},
    {"dilation": (2, 2), "padding": (2, 2)},
    {"groups": 2, "padding": (1, 1)},
    {"groups": 4, "stride": (2, 2)},
]


@pytest.mark.parametrize("geometry", GEOMETRY, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_conv_is_its_loop(geometry, with_bias, merged):
    x = double(2, 4, 7, 6)
    x[torch.rand(x.shape) < 0.3] = 0
    x[:, :, :4, :4] = 0  # windows in which n = 0
    full = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1} | geometry
    weight, bias = double(8, 4 // full["groups"], 3, 2), double(8) if with_bias else None
    expected_o, windows = reference.conv_output(x, weight, bias, **full)
    assert torch.allclose(functional.conv2d(x, weight, bias, **full), expected_o)
    grad = torch.randn_like(expected_o)
    expected = reference.share_by_loops(grad * expected_o, x, windows, 1 if merged else full["groups"])
    assert relative(conv(grad, x, weight, bias, **full, merged=merged), expected) < 1e-12


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_conv_takes_padding_by_name(padding):
    x, weight = double(1, 3, 7, 7), double(4, 3, 3, 5)
    grad = torch.randn_like(functional.conv2d(x, weight, padding=padding))
    expected = conv(grad, x, weight, padding=(1, 2) if padding == "same" else (0, 0))
    assert relative(conv(grad, x, weight, padding=padding), expected) < 1e-12


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_conv_pads_an_even_kernel_as_torch_does():
    x, weight = double(1, 3, 6, 6), double(4, 3, 2, 4)
    grad = torch.randn_like(functional.conv2d(x, weight, padding="same"))
    padded = functional.pad(x, (1, 2, 0, 1))  # torch puts the odd one behind
    expected = conv(grad, padded, weight)[:, :, :6, 1:7]
    assert relative(conv(grad, x, weight, padding="same"), expected) < 1e-12


def test_conv_of_one_and_three_dimensions_is_that_of_two():
    x, weight = double(2, 3, 9), double(4, 3, 3)
    grad = torch.randn_like(functional.conv1d(x, weight, padding=1))
    expected = conv(grad[:, :, None], x[:, :, None], weight[:, :, None], padding=(0, 1))[:, :, 0]
    assert relative(conv(grad, x, weight, padding=1), expected) < 1e-12
    x, weight = double(2, 3, 1, 5, 6), double(4, 3, 1, 3, 3)
    grad = torch.randn_like(functional.conv3d(x, weight))
    expected = conv(grad[:, :, 0], x[:, :, 0], weight[:, :, 0])[:, :, None]
    assert relative(conv(grad, x, weight), expected) < 1e-12


def test_conv_of_one_position_is_a_linear_layer():
    x, weight, bias, grad = double(2, 4, 1, 1), double(6, 4, 3, 3), double(6), double(2, 6, 1, 1)
    for merged in (False, True):
        below = conv(grad, x, weight, bias, padding=1, merged=merged)
        assert torch.allclose(below[..., 0, 0], grad[..., 0, 0] @ weight[..., 1, 1])


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "more", "groups", "dilation"),
    [(2, 2, 0, 0, 1, 1), (3, 2, 1, 1, 1, 1), (3, 1, 1, 0, 2, 1), (3, 2, 2, 1, 2, 2), (1, 2, 0, 1, 1, 1)],
)
def test_transposed_conv_is_its_loop(kernel, stride, padding, more, groups, dilation, biased):
    x, weight, bias = double(2, 4, 4, 3), double(4, 3, kernel, kernel), double(3 * groups) if biased else None
    arguments = (stride, padding, more, groups, dilation)
    o = functional.conv_transpose2d(x, weight, bias, *arguments)
    grad = torch.randn_like(o)
    found, windows = reference.conv_transposed_output(x, weight, bias, stride, padding, dilation, groups, o.shape[2:])
    assert torch.allclose(o, found)
    below = reference.share_by_loops(grad * o, x, windows, groups)
    assert torch.allclose(reference.conv_transposed(grad, x, weight, bias, *arguments), below)
    assert torch.allclose(reference.conv_transposed(grad[0], x[0], weight, bias, *arguments), below[0])


def test_a_linear_layer_on_positions_is_the_convolution_of_one():
    x, weight, bias, grad = double(2, 3, 4, 5), double(6, 5), double(6), double(2, 3, 4, 6)
    as_channels = [t.permute(0, 3, 1, 2) for t in (grad, x)]
    twin = conv(*as_channels, weight[:, :, None, None], bias).permute(0, 2, 3, 1)
    assert torch.allclose(reference.linear(grad, x, weight, bias), twin)


@pytest.mark.parametrize("split", ["contributions", "weights"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("f", [0.0, 0.75, 1.0])
def test_heads_are_their_loops(split, signed, f):
    x, weight, grad = double(3, 6), double(4, 6), double(3, 4)
    x = x if signed else x.abs()
    x[0, 2] = 0
    weight[2] = weight[2].abs()  # a class without z-
    expected = reference.head_by_loops(grad[:, None], x[:, None], weight, f, split)[:, 0]
    assert relative(linear_head(grad, x, weight, f=f, split=split), expected) < 1e-12
    x, weight, grad = double(2, 5, 3, 2), double(4, 5, 1, 1), double(2, 4, 3, 2)
    x = x if signed else x.abs()
    rows = reference.head_by_loops(grad.flatten(2).mT, x.flatten(2).mT, weight[:, :, 0, 0], f, split)
    expected = rows.mT.reshape(x.shape)
    assert relative(conv_head(grad, x, weight, f=f, split=split), expected) < 1e-12
    rows = linear_head(grad.movedim(1, -1), x.movedim(1, -1), weight[:, :, 0, 0], f=f, split=split)
    assert relative(rows.movedim(-1, 1), expected) < 1e-12


@pytest.mark.parametrize("split", ["contributions", "weights"])
def test_a_transposed_head_is_a_convolution_of_one_at_each_place_of_its_kernel(split):
    x, weight, grad = double(2, 5, 3, 2), double(5, 4, 2, 2), double(2, 4, 6, 4)
    wide = weight.movedim(0, -1).permute(1, 2, 0, 3).reshape(16, 5, 1, 1)  # a class for each place
    apart = torch.stack([grad[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], 1).flatten(1, 2)
    parts = {
        name: functional.conv2d(x.clamp(min=0), wide.clamp(**side))
        + functional.conv2d(x.clamp(max=0), wide.clamp(**other))
        for name, side, other in (("for", {"min": 0}, {"max": 0}), ("against", {"max": 0}, {"min": 0}))
    }
    if split == "weights":
        parts = {"for": functional.conv2d(x, wide.clamp(min=0)), "against": functional.conv2d(x, wide.clamp(max=0))}
    sign = torch.where(grad.sum((2, 3), keepdim=True) < 0, -1, 1).repeat(1, 4, 1, 1)
    z = {name: (sign * apart * o).sum((2, 3)).reshape(2, 4, 4).sum(1).repeat(1, 4) for name, o in parts.items()}
    beta = (0.75 * z["for"] / z["against"].abs())[:, :, None, None] * apart
    w, expected = wide[:, :, 0, 0], torch.zeros_like(x)
    for c in range(5):
        for n in range(2):
            for p in range(16):
                value = x[n, c] if split == "contributions" else torch.ones(3, 2)
                expected[n, c] += w[p, c] * torch.where(w[p, c] * value > 0, apart[n, p], beta[n, p])
    assert relative(reference.conv_transposed_head(grad, x, weight, None, 2, f=0.75, split=split), expected) < 1e-12


def test_a_head_with_a_larger_kernel_sums_over_all_its_windows():
    x, weight, grad = double(1, 3, 5, 5).abs(), double(2, 3, 3, 3), torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    grad[:, 1] = 1 / 9
    below = conv_head(grad, x, weight, f=0.25)
    z_for = functional.conv2d(x, weight.clamp(min=0))[0, 1].mean()
    assert float((x * below).sum()) == pytest.approx(0.75 * float(z_for), rel=1e-12)


def test_the_subtracted_class_of_a_difference_is_weighed_like_the_other():
    x, weight, grad = double(1, 5, 3, 3).abs(), double(2, 5, 1, 1), torch.full((1, 2, 3, 3), 1 / 9, dtype=torch.float64)
    assert torch.allclose(conv_head(-grad, x, weight, f=0.75), -conv_head(grad, x, weight, f=0.75), rtol=1e-12)


def test_avg_pool_is_its_loop():
    x = double(2, 3, 6, 6)
    for kernel, stride, padding in ((2, 2, 0), (3, 2, 1)):
        pool = partial(functional.avg_pool2d, kernel_size=kernel, stride=stride, padding=padding)
        grad = torch.randn_like(pool(x))
        assert relative(avg_pool(grad, x, pool), reference.avg_pool_by_loops(grad, x, kernel, stride, padding)) < 1e-12
    whole = partial(functional.avg_pool2d, kernel_size=6)
    assert torch.equal(avg_pool(torch.ones(2, 3, 1, 1).double(), x, whole), torch.full_like(x, 1 / 36))


ACTIVATIONS = {  # function, derivative at 0
    functional.relu: 0.0,
    functional.relu6: 0.0,
    functional.silu: 0.5,
    functional.gelu: 0.5,
    functional.hardswish: 0.5,
    functional.mish: 0.6,
    functional.elu: 1.0,
    functional.softsign: 1.0,
    functional.tanhshrink: 0.0,
    functional.hardshrink: 0.0,
    torch.tanh: 1.0,
    torch.abs: 0.0,
    torch.square: 0.0,
    partial(functional.leaky_relu, negative_slope=0.1): 0.1,
    partial(torch.clamp, min=-0.5, max=1): 1.0,
    partial(functional.hardtanh, min_val=-0.5, max_val=0.5): 1.0,
}


@pytest.mark.parametrize("function", ACTIVATIONS, ids=lambda f: getattr(f, "func", f).__name__)
def test_activations_pass_relevance_one_number_at_a_time(function):
    x, grad = double(200) * 3, double(200)
    x[:3] = 0
    values = [float(function(torch.tensor(value, dtype=torch.float64))) for value in x.tolist()]
    slopes = [v / at if at else ACTIVATIONS[function] for v, at in zip(values, x.tolist(), strict=True)]
    assert relative(activation(grad, x, function), grad * torch.tensor(slopes, dtype=torch.float64)) < 1e-12


def test_an_activation_that_does_not_vanish_at_zero_keeps_its_gradient():
    x, grad = double(50), double(50)
    expected = grad * ((x > 0.5) & (x < 1))
    assert torch.equal(activation(grad, x, partial(torch.clamp, min=0.5, max=1)), expected)


def test_shift_passes_relevance():
    x, grad, mean = double(2, 3, 4), double(2, 3, 4), double(3, 1)
    assert relative(x * shift(grad, x, lambda s: s - mean), grad * (x - mean)) < 1e-12
    narrow = double(3, 1)  # broadcast to the output
    expected = (grad * (narrow + x)).sum((0, 2))[:, None]
    assert relative(narrow * shift(grad, narrow, lambda s: s + x), expected) < 1e-12


def test_golden_operators(shared):
    golden = np.load(shared / "golden" / "operators.npz")
    for spec in json.loads(str(golden["spec"])):
        values = {
            name.split(".")[1]: torch.tensor(golden[name])
            for name in golden.files
            if name.startswith(spec["key"] + ".")
        }
        x, grad, expected = (values.pop(name) for name in ("x", "grad_output", "grad_input"))
        if spec["op"] == "conv2d":
            geometry = {name: spec[name] for name in ("stride", "padding", "dilation", "groups")}
            found = conv(grad, x, values["weight"], values.get("bias"), **geometry)
        elif spec["op"] == "batch_norm":
            found = batch_norm(grad, x, values["running_mean"], values["running_var"], values["weight"], values["bias"],
                               eps=spec["eps"])  # fmt: skip
        elif spec["op"] == "avg_pool2d":
            pool = partial(functional.avg_pool2d, **{n: spec[n] for n in ("kernel_size", "stride", "padding")})
            found = avg_pool(grad, x, pool)
        else:
            assert spec["op"] == "linear (head)"
            found = linear_head(grad, x, values["weight"], values.get("bias"), f=spec["scale"], split="weights")
        assert relative(found, expected) < 1e-9, spec


# Properties, numbered as the method has them.


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
)
def test_1_conv_conserves_relevance(seed, kernel, stride, dilation, groups, bias):
    torch.manual_seed(seed)
    x, weight = double(2, 4, 9, 8), double(8, 4 // groups, kernel, kernel)
    geometry = {"stride": stride, "padding": kernel // 2, "dilation": dilation, "groups": groups}
    b = double(8) if bias else None
    o = functional.conv2d(x, weight, b, **geometry)
    grad = torch.randn_like(o)
    below = (x * conv(grad, x, weight, b, **geometry)).flatten(1).sum(1)
    assert torch.allclose(below, (o * grad).flatten(1).sum(1), rtol=1e-6, atol=1e-6)  # 1e-10 is added to n


def test_1_conv_loses_exactly_what_stands_where_n_is_zero():
    x, weight, bias = double(1, 2, 6, 6), double(3, 2, 3, 3), double(3)
    x[:, :, :3, :3] = 0
    relevance = torch.randn(1, 3, 4, 4, dtype=torch.float64) * (o := functional.conv2d(x, weight, bias))
    lost = relevance.sum(1)[0, 0, 0]  # the one window that sees nothing
    below = float((x * conv(relevance / o, x, weight, bias)).sum())
    assert below == pytest.approx(float(relevance.sum() - lost), rel=1e-7)


@pytest.mark.parametrize("f", [0.0, 0.5, 0.75, 1.0])
def test_1_head_leaves_a_fraction_of_the_evidence(f):
    x, weight = double(4, 10).abs(), double(6, 10)
    grad = functional.one_hot(torch.tensor([0, 3, 5, 2]), 6).double()
    z_for = (grad * (x @ weight.clamp(min=0).T)).sum(1)
    below = (x * linear_head(grad, x, weight, f=f)).sum(1)
    assert torch.allclose(below, (1 - f) * z_for, rtol=1e-10, atol=1e-10)


def test_2_conv_gives_all_channels_of_one_sign_the_same_gradient():
    x, weight, grad = double(1, 3, 8, 8), double(5, 3, 3, 3), double(1, 5, 6, 6)
    field = conv(grad, x, weight) * x.sign()
    assert torch.allclose(field[:, 0], field[:, 1])
    assert torch.allclose(field[:, 0], field[:, 2])


# ---- excitation backprop


def test_a_convolution_shares_by_hand():
    """A 4 x 4 image, a kernel of 2 x 2 with stride 2 and weights [[1, -1], [2, 0]], probability 1 on each output.

    The upper left window holds [[1, 2], [3, 4]]: w x = [[1, -2], [6, 0]], Z = 7, so 1/7 and 6/7 go below. The upper
    right holds [[-1, -2], [0, 5]]: w x = [[-1, 2], [0, 0]], Z = 2: all of it goes to the -2. The lower left holds
    [[0, 9], [0, 9]]: Z = 0 (only -9), nothing goes below. The lower right holds ones: w x = [[1, -1], [2, 0]], so 1/3
    and 2/3.
    """
    x = torch.tensor([[1.0, 2, -1, -2], [3, 4, 0, 5], [0, 9, 1, 1], [0, 9, 1, 1]], dtype=torch.float64)[None, None]
    weight = torch.tensor([[1.0, -1], [2, 0]], dtype=torch.float64)[None, None]
    function = lambda s, weight: functional.conv2d(s, weight, stride=2)  # noqa: E731
    o = function(x, weight)
    ours = x * reference.excitation(1 / o, x, function, weight, o)
    expected = [[1 / 7, 0, 0, 1], [6 / 7, 0, 0, 0], [0, 0, 1 / 3, 0], [0, 0, 2 / 3, 0]]
    assert torch.allclose(ours[0, 0], torch.tensor(expected, dtype=torch.float64), rtol=1e-12)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("geometry", [{}, {"stride": 2, "padding": 1}, {"groups": 2}], ids=str)
def test_excitation_is_its_loop(signed, geometry):
    x, weight, bias = double(2, 4, 5, 4), double(4, 4 // geometry.get("groups", 1), 3, 2), double(4)
    x = x if signed else x.abs()
    x[0, :, :3, :3] = 0  # windows in which nothing excites
    o = functional.conv2d(x, weight, bias, **geometry)
    grad = torch.randn_like(o)
    function = lambda s, weight: functional.conv2d(s, weight, **geometry)  # noqa: E731
    ours = x * reference.excitation(grad, x, function, weight, o)
    assert torch.allclose(ours, reference.excitation_by_loops(grad * o, x, weight, **geometry), rtol=1e-9, atol=1e-12)


def test_excitation_of_a_linear_layer_and_the_head():
    x, weight, grad = double(2, 6), double(4, 6), double(2, 4).abs()
    function = lambda s, weight: functional.linear(s, weight)  # noqa: E731
    hidden = x * reference.excitation(grad, x, function, weight, x @ weight.T)
    head = x * reference.excitation_head(grad, x, function, weight)
    contrast = x * reference.contrastive_head(grad, x, function, weight)
    for n in range(2):
        assert torch.allclose(hidden[n], reference.excitation_of_vector((grad * (x @ weight.T))[n], x[n], weight))
        winner = reference.excitation_of_vector(grad[n], x[n], weight)
        dual = reference.excitation_of_vector(grad[n], x[n], -weight)
        assert torch.allclose(head[n], winner)
        assert torch.allclose(contrast[n], winner - dual)
