"""The tables, one line an operator: which rule it meets, and that its map is the literal one in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import reference
import tsgb
from helpers import assert_literal, relative
from tsgb import rules

F = functional
RANDOM = torch.Generator().manual_seed(7)


def weight(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=RANDOM)


def weighted(function, *shape, bias=0, before=lambda x: x, **options):
    """An operator with random weights of a shape, and perhaps as many biases."""
    weights, biases = weight(*shape), weight(bias) if bias else None
    return lambda x: function(before(x), weights, biases, **options)


# Running mean and variance, weight and bias of a batch norm; a kernel of one row; a number for each channel; slopes.
NORM = weight(4), weight(4).abs() + 0.5, weight(4), weight(4)
W12, ODD, SLOPES = weight(4, 4, 1, 2), weight(4)[:, None, None], weight(4).abs()

CONV, DECONV, LINEAR = ("conv", "conv_merged_groups"), ("conv_transposed",) * 2, ("linear", "linear")
ACTIVATION, SHIFT, OWN, NONE, ANY = ("activation", "ordinary"), ("shift",) * 2, ("ordinary",) * 2, ("-",) * 2, ("",) * 3
POOL = "ordinary", "avg_pool"

# Each line: the operator on x (N, 4, 7, 8), its name in the coverage, and its rules under PIXELS and PAPER. ANY: by any
# name and rule, as what torch runs below autograd differs.
OPERATORS = {
    # Shared in proportion to |x|.
    "conv2d": (weighted(F.conv2d, 6, 4, 3, 3), "conv2d", *CONV),
    "conv2d, bias": (weighted(F.conv2d, 6, 4, 3, 3, bias=6, stride=2, padding=1), "conv2d", *CONV),
    "conv2d, dilated": (weighted(F.conv2d, 6, 4, 2, 3, padding=2, dilation=2), "conv2d", *CONV),
    "conv2d, uneven": (weighted(F.conv2d, 6, 4, 3, 1, stride=(2, 1), padding=(1, 2)), "conv2d", *CONV),
    "conv2d, groups": (weighted(F.conv2d, 6, 2, 3, 3, groups=2), "conv2d", *CONV),
    "conv2d, depthwise": (weighted(F.conv2d, 8, 1, 3, 3, bias=8, groups=4), "conv2d", *CONV),
    "conv2d, same": (weighted(F.conv2d, 6, 4, 3, 5, padding="same"), "conv2d", *CONV),
    "conv2d, even and same": (weighted(F.conv2d, 6, 4, 2, 4, padding="same"), "conv2d", *CONV),
    "conv2d, points": (weighted(F.conv2d, 6, 4, 1, 1), "conv2d", *CONV),
    "conv2d, leaves rows out": (weighted(F.conv2d, 6, 4, 1, 1, stride=2), "conv2d", *CONV),
    "conv2d, one position": (weighted(F.conv2d, 6, 4, 1, 1, before=lambda x: x.mean((2, 3), True)), "conv2d", *CONV),
    "conv1d": (weighted(F.conv1d, 6, 4, 3, before=lambda x: x.flatten(2), stride=2), "conv1d", *CONV),
    "conv3d": (weighted(F.conv3d, 6, 4, 2, 2, 3, before=lambda x: x.unflatten(3, (2, 4)), padding=1), "conv3d", *CONV),
    "conv_transpose2d": (weighted(F.conv_transpose2d, 4, 3, 2, 2, stride=2), "conv_transpose2d", *DECONV),
    "conv_transpose2d, uneven": (
        weighted(F.conv_transpose2d, 4, 3, 3, 3, bias=6, stride=2, padding=1, output_padding=1, groups=2),
        "conv_transpose2d",
        *DECONV,
    ),
    "conv_transpose1d": (
        weighted(F.conv_transpose1d, 4, 3, 3, before=lambda x: x.flatten(2), stride=2), "conv_transpose1d", *DECONV,
    ),
    "linear, of a vector": (weighted(F.linear, 6, 4, before=lambda x: x.mean((2, 3))), "linear", *LINEAR),
    "linear, of positions": (weighted(F.linear, 6, 4, bias=6, before=lambda x: x.movedim(1, 3)), "linear", *LINEAR),
    "linear, of tokens": (weighted(F.linear, 6, 4, before=lambda x: x.flatten(2).mT), "linear", *LINEAR),
    # Relevance passes.
    "relu": (F.relu, "relu", *ACTIVATION),
    "relu6": (lambda x: F.relu6(9 * x), "relu6", *ACTIVATION),
    "hardtanh": (lambda x: F.hardtanh(x, -0.3, 0.4), "hardtanh", *ACTIVATION),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.3), "leaky_relu", *ACTIVATION),
    "prelu": (lambda x: F.prelu(x, SLOPES), "prelu", *ACTIVATION),
    "elu": (lambda x: F.elu(x, 0.7), "elu", *ACTIVATION),
    "selu": (F.selu, "selu", *ACTIVATION),
    "celu": (F.celu, "celu", *ACTIVATION),
    "gelu": (F.gelu, "gelu", *ACTIVATION),
    "gelu, tanh": (lambda x: F.gelu(x, approximate="tanh"), "gelu", *ACTIVATION),
    "silu": (F.silu, "silu", *ACTIVATION),
    "mish": (F.mish, "mish", *ACTIVATION),
    "hardswish": (F.hardswish, "hardswish", *ACTIVATION),
    "threshold": (lambda x: F.threshold(x, 0.1, 0.0), "threshold", *ACTIVATION),
    "clamp": (lambda x: x.clamp(-0.2, 0.5), "clamp", *ACTIVATION),
    "clamp, away from 0": (lambda x: x.clamp(0.1, 0.5), "clamp", *OWN),
    "clamp_min": (lambda x: x.clamp_min(0), "clamp_min", *ACTIVATION),
    "clamp_max": (lambda x: x.clamp_max(0.3), "clamp_max", *ACTIVATION),
    "tanh": (torch.tanh, "tanh", *ACTIVATION),
    "abs": (torch.abs, "abs", *ACTIVATION),
    "atan": (torch.atan, "atan", *ACTIVATION),
    "erf": (torch.erf, "erf", *ACTIVATION),
    "square": (torch.square, *ANY),
    "pow": (lambda x: x.pow(3), "pow", *ACTIVATION),
    "hardshrink": (lambda x: F.hardshrink(x, 0.1), "hardshrink", *ACTIVATION),
    "softshrink": (lambda x: F.softshrink(x, 0.1), "softshrink", *ACTIVATION),
    "softsign": (F.softsign, *ANY),
    "tanhshrink": (F.tanhshrink, *ANY),
    "batch_norm": (lambda x: F.batch_norm(x, *NORM, False, 0.1, 1e-3), "batch_norm", "shift", "batch_norm"),
    "batch_norm, no affine": (lambda x: F.batch_norm(x, *NORM[:2]), "batch_norm", "shift", "batch_norm"),
    "layer_norm": (lambda x: F.layer_norm(x, (7, 8)), "layer_norm", *SHIFT),
    "layer_norm, last": (
        lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (4,), *NORM[2:]), "layer_norm", *SHIFT),
    "group_norm": (lambda x: F.group_norm(x, 2, *NORM[2:]), "group_norm", *SHIFT),
    "instance_norm": (lambda x: F.instance_norm(x, weight=NORM[2], bias=NORM[3]), "instance_norm", *SHIFT),
    "rms_norm": (lambda x: F.rms_norm(x.permute(0, 2, 3, 1), (4,), NORM[2]), "rms_norm", *SHIFT),
    "add a number": (lambda x: x + 0.3, "add", "shift", "ordinary"),
    "add a channel's": (lambda x: ODD + x, "add", "shift", "ordinary"),
    "subtract": (lambda x: x - ODD, "sub", "shift", "ordinary"),
    "subtract from": (lambda x: 1 - x, "rsub", "shift", "ordinary"),
    "multiply": (lambda x: x * 2.5, "mul", *OWN),
    "multiply a channel": (lambda x: ODD * x, "mul", *OWN),
    "divide": (lambda x: x / (ODD + 3), "div", *OWN),
    "neg": (torch.neg, "neg", *OWN),
    # Of a signal and a gate, or of equals.
    "gate": (lambda x: x * torch.sigmoid(x.mean((2, 3), True)), "mul", "gate", "ordinary"),
    "gate of its own": (lambda x: x * torch.sigmoid(x), "mul", "gate", "ordinary"),
    "quotient": (lambda x: x / (x.abs().mean((2, 3), True) + 1), "div", "gate", "ordinary"),
    "centre": (lambda x: x - x.mean((2, 3), True), "sub", "shift", "ordinary"),
    "equals": (lambda x: x[..., 1:] * F.conv2d(x, W12), "mul", *OWN),
    "glu": (lambda x: F.glu(x, 1), "glu", "glu", "ordinary"),
    "scalar over x": (lambda x: 1 / (x.abs() + 1), *ANY),
    # Copied.
    "reshape": (lambda x: x.reshape(len(x), 8, 7, 4), *ANY),
    "flatten": (lambda x: x.flatten(2), *ANY),
    "permute": (lambda x: x.permute(0, 3, 1, 2), "permute", *OWN),
    "transpose": (lambda x: x.transpose(1, 2), "transpose", *OWN),
    "slice": (lambda x: x[:, 1:3, ::2, 1:], "slice", *OWN),
    "select": (lambda x: x[:, :, 2], "select", *OWN),
    "index": (lambda x: x[:, [2, 0, 2]], "index", *OWN),
    "index_select": (lambda x: x.index_select(2, torch.tensor([1, 1, 4])), "index_select", *OWN),
    "gather": (lambda x: x.gather(1, torch.zeros(len(x), 2, 7, 8, dtype=torch.long)), "gather", *OWN),
    "split": (lambda x: torch.cat(x.split([1, 3], 1)[::-1], 1), "cat", *OWN),
    "chunk": (lambda x: sum(x.chunk(2, 1)), "add", *OWN),
    "unbind": (lambda x: torch.stack(x.unbind(1)[::-1], 1), "stack", *OWN),
    "cat": (lambda x: torch.cat([x, F.relu(x)], 1), "cat", *OWN),
    "cat, rows": (lambda x: torch.cat([x, 2 * x], 2), "cat", *OWN),
    "cat, constant": (lambda x: torch.cat([x, torch.ones_like(x)], 1), "cat", *OWN),
    "stack": (lambda x: torch.stack([x, -x], 1), "stack", *OWN),
    "expand": (lambda x: x[:, :1].expand(-1, 3, -1, -1), "expand", *OWN),
    "repeat": (lambda x: x.repeat(1, 2, 1, 1), "repeat", *OWN),
    "pad": (lambda x: F.pad(x, (1, 2, 0, 1)), *ANY),
    "pad, cut": (lambda x: F.pad(x, (-1, 2, 0, -2)), *ANY),
    "pad, number": (lambda x: F.pad(x, (1, 1), value=0.5), *ANY),
    "pad, mirrored": (lambda x: F.pad(x, (1, 2, 1, 1), mode="reflect"), *ANY),
    "pad, repeated": (lambda x: F.pad(x, (1, 2, 1, 1), mode="replicate"), *ANY),
    "pad, round": (lambda x: F.pad(x, (1, 2, 1, 1), mode="circular"), *ANY),
    "flip": (lambda x: x.flip(3), "flip", *OWN),
    "roll": (lambda x: x.roll((1, 2), (2, 3)), "roll", *OWN),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), "pixel_shuffle", *OWN),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x[:, :, :6], 2), "pixel_unshuffle", *OWN),
    "channel_shuffle": (lambda x: torch.channel_shuffle(x, 2), "channel_shuffle", *OWN),
    "unfold": (lambda x: F.unfold(x, 3, padding=1), "im2col", *OWN),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), *ANY),
    "nearest, exact": (lambda x: F.interpolate(x, size=(9, 5), mode="nearest-exact"), *ANY),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), "max_pool2d", *OWN),
    "max_pool2d, over": (lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True), "max_pool2d", *OWN),
    "max_pool2d, dilated": (lambda x: F.max_pool2d(x, 2, 1, 0, 2), "max_pool2d", *OWN),
    "max_pool1d": (lambda x: F.max_pool1d(x.flatten(2), 3), *ANY),
    "max_pool3d": (lambda x: F.max_pool3d(x.unflatten(3, (2, 4)), 2), *ANY),
    "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, 3), *ANY),
    "amax": (lambda x: x.amax((2, 3)), "amax", *OWN),
    "maximum": (lambda x: torch.maximum(x, 0.2 - x), "maximum", *OWN),
    "where": (lambda x: torch.where(x > 0.1, x, 0.2 * x), "where", *OWN),
    "masked_fill": (lambda x: x.masked_fill(x > 0.3, 0.3), "masked_fill", *OWN),
    # Summed.
    "add": (lambda x: x[..., 1:] + F.conv2d(x, W12), "add", *OWN),
    "add, broadcast": (lambda x: x + x.mean((2, 3), True), "add", *OWN),
    "sub": (lambda x: x[..., 1:] - F.conv2d(x, W12), "sub", *OWN),
    "add with a factor": (lambda x: torch.add(x[..., 1:], F.conv2d(x, W12), alpha=0.3), "add", *OWN),
    "sum": (lambda x: x.sum(1), "sum", *OWN),
    "mean": (lambda x: x.mean((2, 3)), "mean", *OWN),
    "mean, rows": (lambda x: x.mean(2), "mean", *OWN),
    "mean, channels": (lambda x: x.mean(1, True), "mean", *OWN),
    "cumsum": (lambda x: x.cumsum(2), "cumsum", *OWN),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2), "avg_pool2d", *POOL),
    "avg_pool2d, over": (lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), "avg_pool2d", *POOL),
    "avg_pool2d, whole": (lambda x: F.avg_pool2d(x, (7, 8)), "avg_pool2d", *POOL),
    "avg_pool1d": (lambda x: F.avg_pool1d(x.flatten(2), 3), "avg_pool1d", *POOL),
    "avg_pool3d": (lambda x: F.avg_pool3d(x.unflatten(3, (2, 4)), 2), "avg_pool3d", *POOL),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, 1), "adaptive_avg_pool2d", *OWN),
    "adaptive_avg_pool2d, 3": (lambda x: F.adaptive_avg_pool2d(x, 3), "adaptive_avg_pool2d", *OWN),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), *ANY),
    "bicubic": (lambda x: F.interpolate(x, size=(9, 5), mode="bicubic"), *ANY),
    "antialiased": (lambda x: F.interpolate(x, size=(3, 5), mode="bilinear", antialias=True), *ANY),
    "fold": (lambda x: F.fold(F.unfold(x, 2), (7, 8), 2), "col2im", *OWN),
    # Each class's own gradient.
    "sigmoid": (torch.sigmoid, "sigmoid", *OWN),
    "hardsigmoid": (F.hardsigmoid, "hardsigmoid", *OWN),
    "softplus": (F.softplus, "softplus", *OWN),
    "softmax": (lambda x: x.softmax(1), "softmax", *OWN),
    "sqrt": (lambda x: (x.abs() + 0.1).sqrt(), "sqrt", *OWN),
    "exp": (torch.exp, "exp", *OWN),
    "cos": (torch.cos, "cos", *NONE),
}  # fmt: skip


class Around(nn.Module):
    """A convolution before an operator, and a linear layer that reads all it gives."""

    def __init__(self, operator):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.operator = nn.Conv2d(3, 4, 3), operator
        with torch.no_grad():
            size = operator(torch.rand(1, 4, 7, 8, dtype=torch.float64)).numel()
        self.head = nn.Linear(size, 4)
        self.double().eval()

    def forward(self, x):
        return self.head(self.operator(F.leaky_relu(self.stem(x), 0.2)).flatten(1))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_has_its_rule_and_the_literal_map(name):
    operator, called, *expected = OPERATORS[name]
    model = Around(operator)
    x = torch.rand(2, 3, 9, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for table, rule in zip(("PIXELS", "PAPER"), expected, strict=True):
        coverage = tsgb.explain(model, x, 1, rules=getattr(rules, table)).coverage
        met = {operator: rule for operator, rule, _ in coverage}
        if called:
            seen = {r for o, r, _ in coverage if o == called}
            assert (None if rule == "-" else rule) in seen, f"{table}: {coverage}"
            assert rule == "-" or None not in seen
        else:
            assert None not in met.values(), f"{table}: {coverage}"
    # The literal twin sees one call of torch, the engine what that is made of; so they differ where it is no operator.
    assert_literal(model, x, (1, 3))


SPELLED_OUT = {
    "normalize": lambda x: F.normalize(x, dim=1),
    "local_response_norm": lambda x: F.local_response_norm(x, 3),
    "lp_pool2d": lambda x: F.lp_pool2d(x.abs(), 2, 2),
}


@pytest.mark.parametrize("name", SPELLED_OUT)
def test_what_torch_spells_out_has_the_literal_map_of_the_whole(name):
    x = torch.rand(2, 3, 9, 10, dtype=torch.float64)
    assert_literal(Around(SPELLED_OUT[name]), x, (1, 3), tables=["PIXELS"])


@settings(deadline=None, max_examples=40)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
    is_biased=st.booleans(),
    transposed=st.booleans(),
)
def test_convolutions_of_all_geometries(kernel, stride, padding, dilation, groups, is_biased, transposed):
    draw = torch.Generator().manual_seed(3)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    weights = torch.randn(4, 8 // groups if transposed else 4 // groups, *kernel, generator=draw).double()
    bias = torch.randn(8 if transposed else 4, generator=draw).double() if is_biased else None
    function = F.conv_transpose2d if transposed else F.conv2d
    reach = [dilation * (k - 1) + 1 for k in kernel]
    if not transposed and min(7 + 2 * padding - reach[0], 8 + 2 * padding - reach[1]) < 0:
        return
    if transposed and min((6 * stride - 2 * padding + reach[0]), (7 * stride - 2 * padding + reach[1])) < 1:
        return
    model = Around(lambda x: function(x, weights, bias, **options))
    x = torch.rand(2, 3, 9, 10, dtype=torch.float64, generator=draw) - 0.3
    x[:, :, :5, :5] = 0  # windows in which n may be 0
    for table in ("PIXELS", "PAPER"):
        found = tsgb.explain(model, x, 1, rules=getattr(rules, table)).maps[:, 0]
        expected, _ = reference.explain(model, x, 1, table)
        assert (found - expected).norm() <= 1e-8 * expected.norm()


@pytest.mark.parametrize("fill", [0.0, -0.0, -1.0, 1e-20, 1e-10, 1e4])
@pytest.mark.parametrize("table", ["FUSED", "PIXELS", "PAPER"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_becomes_nan_or_infinite(fill, table, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Hardswish(), nn.Conv2d(4, 4, 3, groups=4), nn.GELU(),
        nn.AvgPool2d(2), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ).to(dtype).eval()  # fmt: skip
    x = torch.full((1, 3, 14, 14), fill, dtype=dtype)
    x[..., 5:7] = 0.3
    found = tsgb.explain(model, x, [[0, 1]], rules=getattr(rules, table))
    assert found.maps.isfinite().all()


def test_tables_are_values():
    for name in ("FUSED", "PIXELS", "PAPER", "GUIDED", "DECONVNET", "EXCITATION", "CONTRASTIVE"):
        table = getattr(rules, name)
        assert repr({**table}) != repr(table) or name not in ("FUSED", "PIXELS", "PAPER")
        assert {**table} == table
        assert rules.HEAD in table
        assert rules.F in table
    assert rules.DEFAULT is rules.FUSED
    assert {name: repr(table) for name, table in rules.TABLES.items()} == {
        name: f"tsgb.rules.{name.upper()}" for name in ("fused", "pixels", "paper")
    }
    x = torch.rand(1, 3, 9, 10, dtype=torch.float64)
    model = Around(F.gelu)
    maps = [tsgb.explain(model, x, 1, rules={**table}).maps for table in rules.TABLES.values()]
    assert min(relative(a, b) for a in maps for b in maps if a is not b) > 1e-3
