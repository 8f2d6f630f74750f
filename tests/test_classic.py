"""The classic rules against their twins, Captum, and what their papers promise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import plain_classic
import tsgb
from tsgb import rules
from tsgb.backprop import recording

TABLES = {
    "guided": rules.GUIDED,
    "deconvnet": rules.DECONVNET,
    "excitation": rules.EXCITATION,
    "contrastive": rules.CONTRASTIVE,
}


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def gradient_of(model, x, k, table, find_heads=False):
    leaf = x.clone().requires_grad_()
    image = leaf.clone()
    with recording(table) as run:
        logits = model(image)
    if find_heads:
        run.find_heads(logits, len(x))
    return torch.autograd.grad(logits[:, k].sum(), leaf)[0]


def conv_net(first, second, *, bias=True):
    """Two convolutions with the activations given, pooling, two linear layers."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layers = [
            *(nn.Conv2d(3, 6, 3, padding=1, bias=bias), first, nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 8, 3, padding=1, bias=bias), second, nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            *(nn.Linear(8, 7, bias=bias), nn.ReLU(), nn.Linear(7, 4, bias=bias)),
        ]
        return nn.Sequential(*layers).double().eval()


class Called(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


# ---- guided backprop, deconvnet


def slope(name, x):
    sigmoid = 1 / (1 + math.exp(-x))
    return {
        "relu": float(x > 0),
        "relu6": float(0 < x < 6),
        "leaky_relu": 1.0 if x > 0 else 0.01,
        "silu": sigmoid * (1 + x * (1 - sigmoid)),
        "elu": 1.0 if x > 0 else math.exp(x),
    }[name]


@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu", "silu", "elu"])
def test_guided_is_its_twin(name):
    x, grad = double(30) * 5, double(30)
    expected = [max(g, 0.0) * slope(name, v) for g, v in zip(grad.tolist(), x.tolist(), strict=True)]
    ours = rules.GUIDED[getattr(functional, name)](grad, x)
    assert torch.allclose(ours, torch.tensor(expected, dtype=torch.float64), rtol=1e-12)


def test_deconvnet_is_its_twin():
    x, grad = double(30) * 5, double(30)
    expected = torch.tensor([max(g, 0.0) for g in grad.tolist()], dtype=torch.float64)
    for function in (functional.relu, functional.relu6, functional.silu, torch.clamp):
        assert torch.equal(rules.DECONVNET[function](grad, x), expected)


@pytest.mark.parametrize("table", ["guided", "deconvnet"])
@pytest.mark.parametrize(
    "act",
    [
        nn.ReLU(inplace=True),
        Called(functional.relu),
        Called(lambda x: x.relu()),
        Called(torch.relu_),
        Called(lambda x: x.clamp(min=0)),
        nn.ReLU6(),
    ],
    ids=["inplace", "functional", "method", "relu_", "clamp", "relu6"],
)
def test_agrees_with_captum_on_relu_modules(table, act):
    from captum.attr import Deconvolution, GuidedBackprop

    x = double(2, 3, 8, 8)
    reference = conv_net(nn.ReLU(), nn.ReLU())
    assert reference[:5](x).max() < 6  # there ReLU6 is ReLU
    method = {"guided": GuidedBackprop, "deconvnet": Deconvolution}[table](reference)
    expected = method.attribute(x.clone().requires_grad_(), 1)
    ours = gradient_of(conv_net(act, act), x, 1, TABLES[table])
    plain_gradient = gradient_of(reference, x, 1, rules.PAPER | {functional.conv2d: rules.ORDINARY})
    assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(ours, plain_gradient, rtol=0.1)


def test_guided_passes_nothing_where_relu6_is_full():
    x = torch.tensor([7.0, 3.0], dtype=torch.float64)
    assert rules.GUIDED[functional.relu6](torch.ones(2).double(), x).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("table", ["guided", "deconvnet"])
def test_explain_shows_image_times_gradient(table):
    model, x = conv_net(nn.ReLU(), nn.SiLU()), double(2, 3, 8, 8)
    expected = (x * gradient_of(model, x, 2, TABLES[table])).sum(1)
    e = tsgb.explain(model, x, 2, rules=TABLES[table], strict=True)
    assert torch.allclose(e.maps[:, 0], expected, rtol=1e-9, atol=1e-14)


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
    o = functional.conv2d(x, weight, stride=2)
    ours = x * rules.excitation(1 / o, x, weight, None, 2, function=functional.conv2d)
    expected = torch.tensor(
        [[1 / 7, 0, 0, 1], [6 / 7, 0, 0, 0], [0, 0, 1 / 3, 0], [0, 0, 2 / 3, 0]], dtype=torch.float64
    )
    assert torch.allclose(ours[0, 0], expected, rtol=1e-12)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("geometry", [{}, {"stride": 2, "padding": 1}, {"groups": 2}], ids=str)
def test_a_convolution_is_its_twin(signed, geometry):
    x, weight, bias = double(2, 4, 5, 4), double(4, 4 // geometry.get("groups", 1), 3, 2), double(4)
    x = x if signed else x.abs()
    x[0, :, :3, :3] = 0  # windows in which nothing excites
    o = functional.conv2d(x, weight, bias, **geometry)
    grad = torch.randn_like(o)
    expected = plain_classic.excitation(grad * o, x, weight, **geometry)
    for given_o in (None, o):
        ours = x * rules.excitation(grad, x, weight, bias, function=functional.conv2d, o=given_o, **geometry)
        assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-12)


def test_a_linear_layer_and_the_head_are_their_twins():
    x, weight, grad = double(2, 6), double(4, 6), double(2, 4).abs()
    o = x @ weight.T
    hidden = x * rules.excitation(grad, x, weight, function=functional.linear)
    head = x * rules.excitation_head(grad, x, weight, function=functional.linear, f=1.0)
    contrast = x * rules.contrastive_head(grad, x, weight, function=functional.linear, f=1.0)
    for n in range(2):
        assert torch.allclose(hidden[n], plain_classic.excitation_vector((grad * o)[n], x[n], weight))
        winner = plain_classic.excitation_vector(grad[n], x[n], weight)
        dual = plain_classic.excitation_vector(grad[n], x[n], -weight)
        assert torch.allclose(head[n], winner)
        assert torch.allclose(contrast[n], winner - dual)


@pytest.mark.parametrize("name", ["excitation_head", "contrastive_head"])
@pytest.mark.parametrize("signed", [False, True])
def test_a_head_before_pooling_is_the_head_after_it(name, signed):
    rule = getattr(rules, name)
    x, weight = double(2, 5, 3, 2), double(4, 5)
    x = x if signed else x.abs()
    seed = torch.zeros(2, 4, dtype=torch.float64)
    seed[:, 1] = 1
    grad = (seed / 6)[:, :, None, None].expand(2, 4, 3, 2)
    ours = x * rule(grad, x, weight[:, :, None, None], function=functional.conv2d)
    if signed:  # contributions of both signs at the positions of one channel: only the sums can be told
        assert torch.allclose(ours.sum((1, 2, 3)), torch.full((2,), 0.0 if "con" in name else 1.0).double(), atol=1e-12)
        return
    pooled = x.mean((2, 3))
    expected = rule(seed, pooled, weight, function=functional.linear)[:, :, None, None] / 6 * x
    assert torch.allclose(ours, expected, rtol=1e-9)
    rows = x.flatten(2).mT * rule(grad.flatten(2).mT, x.flatten(2).mT, weight, function=functional.linear)
    assert torch.allclose(rows.mT.reshape(x.shape), expected, rtol=1e-9)


def test_a_head_without_evidence_hands_nothing_on():
    x, weight = double(1, 3).abs(), -double(2, 3).abs()
    assert not rules.excitation_head(torch.ones(1, 2).double(), x, weight, function=functional.linear).any()
    assert not rules.excitation(torch.ones(1, 2).double(), x, weight, function=functional.linear).any()
    for rule in (rules.excitation, rules.excitation_head):  # o is the bias alone
        below = rule(torch.ones(1, 2).double(), 0 * x, -weight, torch.ones(2).double(), function=functional.linear)
        assert not below.any()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_probability_is_kept_down_to_the_image(seed, signed):
    torch.manual_seed(seed)
    model = conv_net(nn.ReLU(), nn.ReLU(), bias=False)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter).abs() if not signed else torch.randn_like(parameter)
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    e = tsgb.explain(model, x, 1, rules=rules.EXCITATION, strict=True)
    assert (e.maps >= -1e-12).all()
    if signed:  # some of it may stop at units that nothing excites
        assert float(e.maps.sum()) <= 1 + 1e-9
    else:
        assert float(e.maps.sum()) == pytest.approx(1, rel=1e-9)
        without_dual = tsgb.explain(model, x, 1, rules=rules.CONTRASTIVE)
        assert torch.equal(without_dual.maps, e.maps)


def test_faint_features_share_as_strong_ones_do():
    x, weight, grad = double(2, 4, 5, 5).abs(), double(3, 4, 3, 3), double(2, 3, 3, 3).abs()
    strong = x * rules.excitation(grad, x, weight, function=functional.conv2d)
    faint = 1e-12 * x * rules.excitation(grad * 1e12, 1e-12 * x, weight, function=functional.conv2d)
    assert torch.allclose(strong, faint, rtol=1e-9)
    head = x * rules.excitation_head(grad, x, weight, function=functional.conv2d)
    assert torch.allclose(1e-12 * x * rules.excitation_head(grad, 1e-12 * x, weight, function=functional.conv2d), head)


def test_contrast_sums_to_nothing_below_the_head():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(*model, nn.Linear(8, 4, bias=False)).double().eval()
    model[0].weight.data.abs_()
    model[4].weight.data[1] = torch.tensor([1.0, -1, 2, -2, 1, -1, 0, 1])
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    map = tsgb.explain(model, x, 1, rules=rules.CONTRASTIVE).maps
    assert abs(float(map.sum())) < 1e-12
    assert map.abs().sum() > 1e-3


def test_skips_gates_shifts_and_norms_keep_the_sum():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = (
                nn.Conv2d(3, 4, 3, padding=1, bias=False),
                nn.Conv2d(4, 4, 3, padding=1, bias=False),
            )
            self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 2, bias=False)
            for parameter in (self.conv1.weight, self.conv2.weight, self.head.weight):
                parameter.data.abs_()
            self.norm.bias.data.fill_(0.3)
            self.norm.running_mean.fill_(0.1)

        def forward(self, x):
            x = functional.silu(self.norm(self.conv1(x + 1)))
            x = x + self.conv2(x).relu()
            x = x * torch.sigmoid(x.mean((2, 3), keepdim=True))
            return self.head(x.mean((2, 3)))

    model, x = Block().double().eval(), torch.rand(1, 3, 6, 6, dtype=torch.float64)
    e = tsgb.explain(model, x, 1, rules=rules.EXCITATION, strict=True)
    assert float(e.maps.sum()) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("table", TABLES)
def test_every_table_explains_the_bundled_network(table):
    model = tsgb.load("bundled").model
    images = torch.rand(2, 3, 64, 64)
    e = tsgb.explain(model, images, [[0, 3], [1, 2]], rules=TABLES[table], strict=True)
    assert e.maps.shape == (2, 2, 64, 64)
    assert not torch.allclose(e.maps[0, 0], e.maps[0, 1])
    alone = tsgb.explain(model, images[:1], [[0, 3]], rules=TABLES[table]).maps
    assert torch.allclose(alone, e.maps[:1], rtol=1e-3, atol=1e-4 * float(e.maps.abs().max()))
