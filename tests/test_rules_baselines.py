"""Guided backprop, deconvnet and excitation backprop: their literal twins, Captum, and what their papers promise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import reference
import tsgb
from helpers import SPELLED, Act, Drawn, relative
from tsgb import rules

TABLES = ("GUIDED", "DECONVNET", "EXCITATION", "CONTRASTIVE")


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


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


def assert_literal(model, x, table, classes=(0, 2), tolerance=1e-9):
    together = tsgb.explain(model, x, [list(classes)] * len(x), rules=getattr(rules, table))
    for k, target in enumerate(classes):
        expected, _ = reference.explain(model, x, target, table)
        assert (together.maps[:, k] - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("network", SPELLED, ids=lambda network: network.__name__)
def test_every_spelling_is_its_literal_twin(network, table):
    model = network()
    x = torch.rand(2, 3, 10, 10, dtype=torch.float64)
    found = tsgb.explain(model, x, 3, rules=getattr(rules, table)).maps[:, 0]
    expected, _ = reference.explain(model, x, 3, table)
    assert (found - expected).norm() <= 1e-7 * expected.norm()


@pytest.mark.parametrize("table", TABLES)
def test_a_chain_is_its_literal_twin(table):
    chains = (nn.ReLU(), nn.SiLU(), True), (nn.LeakyReLU(0.2), nn.ELU(), True), (nn.ReLU(), nn.ReLU(), False)
    for first, second, bias in chains:
        assert_literal(conv_net(first, second, bias=bias), double(2, 3, 8, 8), table)


@settings(deadline=None, max_examples=20)
@given(st.data(), st.integers(0, 2**31), st.sampled_from(["GUIDED", "DECONVNET"]))
def test_a_network_drawn_at_random_is_its_literal_twin(data, seed, table):
    torch.manual_seed(seed)
    model = Drawn(data.draw).double().eval()
    assert_literal(model, double(2, 3, 23, 21), table, tolerance=1e-8)


# ---- guided backprop, deconvnet


@pytest.mark.parametrize("table", ["GUIDED", "DECONVNET"])
@pytest.mark.parametrize(
    "act",
    [
        nn.ReLU(inplace=True),
        Act(functional.relu),
        Act(lambda x: x.relu()),
        Act(torch.relu_),
        Act(lambda x: x.clamp(min=0)),
        nn.ReLU6(),
    ],
    ids=["inplace", "functional", "method", "relu_", "clamp", "relu6"],
)
def test_agrees_with_captum_on_relu_modules(table, act):
    from captum.attr import Deconvolution, GuidedBackprop

    x = double(2, 3, 8, 8)
    model = conv_net(nn.ReLU(), nn.ReLU())
    assert model[:5](x).max() < 6  # there ReLU6 is ReLU
    method = {"GUIDED": GuidedBackprop, "DECONVNET": Deconvolution}[table](model)
    expected = x * method.attribute(x.clone().requires_grad_(), 1).detach()
    found = tsgb.TSGB(conv_net(act, act), rules=getattr(rules, table)).attribute(x, 1)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
    (gradient,) = torch.autograd.grad(model(leaf := x.clone().requires_grad_())[:, 1].sum(), leaf)
    assert relative(found, x * gradient) > 0.1


def test_guided_passes_nothing_where_relu6_is_full():
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU6(), nn.Flatten(), nn.Linear(2, 1, bias=False)).eval()
    nn.init.ones_(model[0].weight)
    nn.init.ones_(model[3].weight)
    x = torch.tensor([[[[7.0, 3.0]]]])
    assert tsgb.explain(model, x, 0, rules=rules.GUIDED).maps.flatten().tolist() == [0.0, 3.0]


# ---- excitation backprop


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
        assert torch.allclose(without_dual.maps, e.maps, rtol=1e-12)


@pytest.mark.parametrize("table", ["EXCITATION", "CONTRASTIVE"])
def test_a_head_before_pooling_is_the_head_after_it(table):
    torch.manual_seed(0)
    trunk, head = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU()).double(), nn.Linear(5, 4, bias=False).double()
    x = torch.rand(2, 3, 8, 7, dtype=torch.float64)
    spellings = [
        lambda x: head(trunk(x).mean((2, 3))),
        lambda x: functional.conv2d(trunk(x), head.weight[:, :, None, None]).mean((2, 3)),
        lambda x: head(trunk(x).flatten(2).mT).mean(1),
    ]
    maps = [tsgb.explain(model, x, 1, rules=getattr(rules, table)).maps for model in spellings]
    assert maps[0].any()
    assert relative(maps[1], maps[0]) < 1e-9
    assert relative(maps[2], maps[0]) < 1e-9


def test_a_head_without_evidence_gives_nothing_on():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        model[4].weight[0] = -1
    assert not tsgb.explain(model, torch.rand(1, 3, 8, 8), 0, rules=rules.EXCITATION).maps.any()


def test_faint_features_share_as_strong_ones_do():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(4, 2, bias=False),
    ).double().eval()  # fmt: skip
    x = torch.rand(1, 3, 9, 9, dtype=torch.float64)
    maps = [tsgb.explain(model, scale * x, 1, rules=rules.EXCITATION).maps for scale in (1, 1e-12)]
    assert maps[0].any()
    assert torch.allclose(*maps, rtol=1e-9)


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
            self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
            self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
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
    e = tsgb.explain(model, images, [[0, 3], [1, 2]], rules=getattr(rules, table), strict=True)
    assert e.maps.shape == (2, 2, 64, 64)
    assert not torch.allclose(e.maps[0, 0], e.maps[0, 1])
    alone = tsgb.explain(model, images[:1], [[0, 3]], rules=getattr(rules, table)).maps
    assert torch.allclose(alone, e.maps[:1], rtol=1e-3, atol=1e-4 * float(e.maps.abs().max()))
