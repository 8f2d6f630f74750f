"""Each rule against its slow, literal twin, the authors' golden arrays, and the properties of the method."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

import plain
from tsgb import rules

torch.set_default_dtype(torch.float32)


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


def case(geometry, with_bias):
    x = double(2, 4, 7, 6)
    x[torch.rand(x.shape) < 0.3] = 0
    x[:, :, :4, :4] = 0  # windows in which n = 0
    weight = double(8, 4 // geometry.get("groups", 1), 3, 2)
    bias = double(8) if with_bias else None
    full = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1} | geometry
    grad = torch.randn_like(functional.conv2d(x, weight, bias, **full))
    return x, weight, bias, full, grad


@pytest.mark.parametrize("geometry", GEOMETRY, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("lumped", [False, True])
def test_conv_is_its_twin(geometry, with_bias, lumped):
    x, weight, bias, full, grad = case(geometry, with_bias)
    rule = rules.conv_lumped if lumped else rules.conv
    expected = plain.conv(grad, x, weight, bias, **full, lumped=lumped)
    assert relative(rule(grad, x, weight, bias, **full), expected) < 1e-12


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_conv_takes_padding_by_name(padding):
    x, weight = double(1, 3, 7, 7), double(4, 3, 3, 5)
    grad = torch.randn_like(functional.conv2d(x, weight, padding=padding))
    sides = (1, 2) if padding == "same" else (0, 0)
    expected = plain.conv(grad, x, weight, padding=sides)
    assert relative(rules.conv(grad, x, weight, padding=padding), expected) < 1e-12


def test_conv_pads_an_even_kernel_as_torch_does():
    x, weight = double(1, 3, 6, 6), double(4, 3, 2, 4)
    grad = torch.randn_like(functional.conv2d(x, weight, padding="same"))
    padded = functional.pad(x, (1, 2, 0, 1))  # torch puts the odd one behind
    expected = plain.conv(grad, padded, weight)[:, :, :6, 1:7]
    assert relative(rules.conv(grad, x, weight, padding="same"), expected) < 1e-12


def test_conv_of_one_and_three_dimensions_is_that_of_two():
    x, weight = double(2, 3, 9), double(4, 3, 3)
    grad = torch.randn_like(functional.conv1d(x, weight, padding=1))
    expected = plain.conv(grad[:, :, None], x[:, :, None], weight[:, :, None], padding=(0, 1))[:, :, 0]
    assert relative(rules.conv(grad, x, weight, padding=1), expected) < 1e-12
    x, weight = double(2, 3, 1, 5, 6), double(4, 3, 1, 3, 3)
    grad = torch.randn_like(functional.conv3d(x, weight))
    expected = plain.conv(grad[:, :, 0], x[:, :, 0], weight[:, :, 0])[:, :, None]
    assert relative(rules.conv(grad, x, weight), expected) < 1e-12


def test_conv_of_an_image_without_batch():
    x, weight = double(3, 6, 6), double(4, 3, 3, 3)
    grad = double(4, 4, 4)
    assert torch.equal(rules.conv(grad, x, weight), rules.conv(grad[None], x[None], weight)[0])


@pytest.mark.parametrize("split", ["contributions", "weights"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("f", [0.0, 0.75, 1.0])
def test_heads_are_their_twins(split, signed, f):
    x, weight, grad = double(3, 6), double(4, 6), double(3, 4)
    x = x if signed else x.abs()
    x[0, 2] = 0
    weight[2] = weight[2].abs()  # a class without z-
    expected = plain.linear_head(grad, x, weight, f=f, split=split)
    assert relative(rules.linear_head(grad, x, weight, f=f, split=split), expected) < 1e-12
    x, weight, grad = double(2, 5, 3, 2), double(4, 5, 1, 1), double(2, 4, 3, 2)
    x = x if signed else x.abs()
    expected = plain.conv_head(grad, x, weight, f=f, split=split)
    assert relative(rules.conv_head(grad, x, weight, f=f, split=split), expected) < 1e-12
    rows = rules.linear_head(grad.movedim(1, -1), x.movedim(1, -1), weight[:, :, 0, 0], f=f, split=split)
    assert relative(rows.movedim(-1, 1), expected) < 1e-12


def test_images_side_by_side_are_lumped_each_by_itself():
    x, weight, grad = double(3, 4, 5, 5), double(6, 2, 3, 3), double(3, 6, 5, 5)
    apart = rules.conv_lumped(grad, x, weight, padding=1, groups=2)
    beside = rules.conv_lumped(
        grad.reshape(1, 18, 5, 5), x.reshape(1, 12, 5, 5), weight.repeat(3, 1, 1, 1), padding=1, groups=6, parts=3
    )
    assert torch.allclose(beside.reshape(x.shape), apart)


@pytest.mark.parametrize("split", ["contributions", "weights"])
def test_a_transposed_head_is_its_twin(split):
    """Each place of the kernel writes on other positions: it is a convolution of one, at a quarter of the output."""
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
    assert relative(rules.conv_transposed_head(grad, x, weight, None, 2, f=0.75, split=split), expected) < 1e-12


def test_a_head_with_a_larger_kernel_sums_over_all_its_windows():
    x, weight, grad = double(1, 3, 5, 5).abs(), double(2, 3, 3, 3), torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    grad[:, 1] = 1 / 9
    below = rules.conv_head(grad, x, weight, f=0.25)
    z_for = functional.conv2d(x, weight.clamp(min=0))[0, 1].mean()
    assert float((x * below).sum()) == pytest.approx(0.75 * float(z_for), rel=1e-12)


def test_the_subtracted_class_of_a_difference_is_weighed_like_the_other():
    x, weight, grad = double(1, 5, 3, 3).abs(), double(2, 5, 1, 1), torch.full((1, 2, 3, 3), 1 / 9, dtype=torch.float64)
    assert torch.allclose(
        rules.conv_head(-grad, x, weight, f=0.75), -rules.conv_head(grad, x, weight, f=0.75), rtol=1e-12
    )


def test_batch_norm_and_avg_pool_are_their_twins():
    x, grad = double(2, 3, 6, 6), double(2, 3, 6, 6)
    x[0, 0, 0] = 0
    x[0, 0, 1] = 1e-9
    mean, var, weight, bias = double(3), double(3).abs(), double(3), double(3)
    expected = plain.batch_norm(grad, x, mean, var, weight, bias, 1e-3)
    assert relative(rules.batch_norm(grad, x, mean, var, weight, bias, False, 0.1, 1e-3), expected) < 1e-12
    for kernel, stride, padding in ((2, 2, 0), (3, 2, 1)):
        grad = torch.randn_like(functional.avg_pool2d(x, kernel, stride, padding))
        expected = plain.avg_pool(grad, x, kernel, stride, padding)
        assert relative(rules.avg_pool(grad, x, kernel, stride, padding), expected) < 1e-12


def test_avg_pool_of_the_whole_map_is_ordinary():
    x = double(2, 3, 4, 4)
    assert torch.equal(rules.avg_pool(torch.ones(2, 3, 1, 1).double(), x, 4), torch.full_like(x, 1 / 16))


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
def test_activation_is_its_twin(function):
    x, grad = double(200) * 3, double(200)
    x[:3] = 0
    one = lambda value: float(function(torch.tensor(value, dtype=torch.float64)))  # noqa: E731
    expected = plain.activation(grad, x, one, ACTIVATIONS[function])
    assert relative(rules.activation(grad, x, function=function), expected) < 1e-12


def test_prelu_takes_its_weights():
    x, grad, weight = double(2, 3, 4), double(2, 3, 4), torch.tensor([0.1, 0.2, 0.3]).double()
    expected = torch.where(x > 0, grad, grad * weight[:, None])
    assert relative(rules.activation(grad, x, weight, function=functional.prelu), expected) < 1e-12


def test_an_activation_that_does_not_vanish_at_zero_keeps_its_gradient():
    x, grad = double(50), double(50)
    expected = grad * ((x > 0.5) & (x < 1))
    assert torch.equal(rules.activation(grad, x, 0.5, 1, function=torch.clamp), expected)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**30), several=st.integers(0, 3), is_hidden=st.booleans())
def test_a_linear_layers_gradient_is_that_of_the_product(seed, several, is_hidden):
    """Rows that ask for nothing, for one class with any factor, and for two; or, where it is hidden, for all."""
    draw = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(5, 7, generator=draw).double(), torch.randn(6, 7, generator=draw).double()
    grad = torch.zeros(6, 5).double()
    grad[1:, 2] = torch.randn(5, generator=draw).double()
    grad[3 : 3 + several, 4] = torch.randn(several, generator=draw).double()
    grad = torch.randn(6, 5, generator=draw).double() if is_hidden else grad
    expected = torch.autograd.grad(functional.linear(x.requires_grad_(), weight), x, grad)[0]
    assert relative(rules.gradient(grad, x.detach(), weight, function=functional.linear), expected) < 1e-12


@pytest.mark.parametrize("rows", [1, 15, 16, 40])
def test_a_hidden_linear_layer_with_many_weights_has_the_gradient_of_the_product(rows):
    """As many as go the other way round, with rows enough for it and without."""
    draw = torch.Generator().manual_seed(rows)
    weight, x = torch.randn(4096, 4096, generator=draw), torch.randn(rows, 4096, generator=draw)
    grad = torch.randn(rows, 4096, generator=draw)
    assert weight.numel() >= rules.formulas._LARGE
    expected = torch.einsum("ro,oc->rc", grad.double(), weight[:, ::97].double())
    for found in (rules.linear(grad, x, weight), rules.gradient(grad, x, weight, function=functional.linear)):
        assert found.is_contiguous()
        assert relative(found[:, ::97].double(), expected) < 1e-5


def test_shift_passes_relevance_and_gate_holds_the_gate():
    x, grad, mean, gate = double(2, 3, 4), double(2, 3, 4), double(3, 1), double(2, 3, 1)
    assert relative(x * rules.shift(grad, x, mean, function=torch.sub), grad * (x - mean)) < 1e-12
    assert torch.equal(rules.gate(grad, x, gate, function=torch.mul), grad * gate)
    narrow = double(3, 1)  # broadcast to the output
    expected = (grad * (narrow + x)).sum((0, 2))[:, None]
    assert relative(narrow * rules.shift(grad, narrow, x, function=torch.add), expected) < 1e-12


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
            found = rules.conv(grad, x, values["weight"], values.get("bias"), **geometry)
        elif spec["op"] == "batch_norm":
            found = rules.batch_norm(grad, x, **values, eps=spec["eps"])
        elif spec["op"] == "avg_pool2d":
            found = rules.avg_pool(grad, x, *(spec[name] for name in ("kernel_size", "stride", "padding")))
        else:
            assert spec["op"] == "linear (head)"
            found = rules.linear_head(grad, x, values["weight"], values.get("bias"), f=spec["scale"], split="weights")
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
    below = (x * rules.conv(grad, x, weight, b, **geometry)).flatten(1).sum(1)
    assert torch.allclose(below, (o * grad).flatten(1).sum(1), rtol=1e-6, atol=1e-6)  # 1e-10 is added to n


def test_1_conv_loses_exactly_what_stands_where_n_is_zero():
    x, weight, bias = double(1, 2, 6, 6), double(3, 2, 3, 3), double(3)
    x[:, :, :3, :3] = 0
    o = functional.conv2d(x, weight, bias)
    grad = torch.randn_like(o)
    relevance = (grad * o).sum(1)
    lost = relevance[0, 0, 0]  # the one window that sees nothing
    assert float((x * rules.conv(grad, x, weight, bias)).sum()) == pytest.approx(
        float(relevance.sum() - lost), rel=1e-7
    )


@pytest.mark.parametrize("f", [0.0, 0.5, 0.75, 1.0])
def test_1_head_leaves_a_fraction_of_the_evidence(f):
    x, weight = double(4, 10).abs(), double(6, 10)
    grad = functional.one_hot(torch.tensor([0, 3, 5, 2]), 6).double()
    z_for = (grad * (x @ weight.clamp(min=0).T)).sum(1)
    below = (x * rules.linear_head(grad, x, weight, f=f)).sum(1)
    assert torch.allclose(below, (1 - f) * z_for, rtol=1e-10, atol=1e-10)


def test_2_conv_gives_all_channels_of_one_sign_the_same_gradient():
    x, weight, grad = double(1, 3, 8, 8), double(5, 3, 3, 3), double(1, 5, 6, 6)
    below = rules.conv(grad, x, weight)
    field = below * x.sign()
    assert torch.allclose(field[:, 0], field[:, 1])
    assert torch.allclose(field[:, 0], field[:, 2])
    assert torch.allclose((x * below).sum(1), field[:, 0] * x.abs().sum(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_5_nothing_becomes_nan_or_infinite(dtype):
    tiny = torch.finfo(dtype).smallest_normal
    values = torch.tensor([0.0, -0.0, tiny, -tiny, 1e-10, -1e-10, 1.0, -1.0], dtype=torch.float64).to(dtype)
    single = values.float() if dtype in (torch.float16, torch.bfloat16) else values
    x = single.repeat(9)[:64].reshape(1, 1, 8, 8)
    grad = torch.full((1, 1, 8, 8), 100.0, dtype=x.dtype)
    one = torch.ones(1, dtype=x.dtype)
    found = [
        rules.conv(grad, x, one.reshape(1, 1, 1, 1), one),
        rules.conv_lumped(grad[:, :, :6, :6], torch.zeros_like(x), torch.ones(1, 1, 3, 3, dtype=x.dtype), one),
        rules.batch_norm(grad, x, one, one, one, one),
        rules.avg_pool(grad[:, :, :4, :4], x, 2),
        rules.shift(grad, x, 1.0, function=torch.sub),
        rules.linear_head(grad[0, 0], torch.zeros_like(x[0, 0]), torch.zeros(8, 8, dtype=x.dtype), f=1.0),
        rules.conv_head(grad, x, one.reshape(1, 1, 1, 1), f=1.0),
        *(rules.activation(grad, x, function=function) for function in ACTIVATIONS),
    ]
    assert all(value.isfinite().all() for value in found)
    assert all((value * x[0, 0] if value.dim() == 2 else value * x).isfinite().all() for value in found)
