"""Which rule an operator has: tables of the package, tables of one's own, and what of a network met which."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import tsgb
from helpers import SPELLED, Branched, Functions, InPlaceModules, mean, relative
from tsgb import rules

aten = torch.ops.aten
FUSED, PIXELS, PAPER = rules.FUSED, rules.PIXELS, rules.PAPER


def images(count=2, side=10):
    return torch.rand(count, 3, side, side, dtype=torch.float64)


class Unknown(InPlaceModules):
    """Two operators of which no table tells."""

    def forward(self, x):
        return self.head(torch.cos(torch.erfc(self.conv1(x))).mean((2, 3)))


def test_coverage_names_the_unknown_and_strict_refuses_it():
    found = tsgb.explain(Unknown(), images(), 0)
    assert {row for row in found.coverage if row[1] is None} == {("cos", None, 1), ("erfc", None, 1)}
    with pytest.raises(tsgb.CoverageError, match="strict: no rule for cos, erfc"):
        tsgb.explain(Unknown(), images(), 0, strict=True)


@pytest.mark.parametrize(
    "keys", [(torch.cos, torch.erfc), (aten.cos, aten.erfc), (torch.Tensor.cos_, aten.erfc.default)]
)
def test_ordinary_says_that_the_gradient_is_right(keys):
    known = {**FUSED, **dict.fromkeys(keys, rules.ORDINARY)}
    x = images()
    found = tsgb.explain(Unknown(), x, 0, rules=known, strict=True)
    assert torch.equal(found.maps, tsgb.explain(Unknown(), x, 0).maps)
    assert ("cos", "ordinary", 1) in found.coverage


@pytest.mark.parametrize("table", [FUSED, PIXELS, PAPER], ids=["FUSED", "PIXELS", "PAPER"])
@pytest.mark.parametrize("key", [functional.relu, torch.relu_, torch.Tensor.relu, aten.relu, aten.relu.default])
def test_a_rule_of_the_users_own_serves_every_spelling(key, table):
    def mine(grad, x, *args, **kwargs):
        shapes.append(x.shape)
        return grad * 0

    shapes = []
    for network in (InPlaceModules, Functions):
        found = tsgb.explain(network(), images(), 0, rules={**table, key: mine})
        assert not found.maps.any()
        assert ("relu", "mine", 2) in found.coverage
    assert set(shapes) == {(2, 4, 10, 10)}


def test_a_rule_of_the_users_own_is_a_gradient_class_by_class():
    def half(grad, x, *args, **kwargs):
        assert grad.shape == x.shape
        return 0.5 * grad * (x > 0)

    model, x = InPlaceModules(), images()
    for table in (PIXELS, PAPER):
        plain = tsgb.explain(model, x, [[0, 3]] * 2, rules=table)
        found = tsgb.explain(model, x, [[0, 3]] * 2, rules={**table, functional.relu: half})
        # Through one of the two ReLUs on one path and through both on the other; all relevance is halved above.
        assert relative(found.maps, plain.maps) > 0.1
        alone = tsgb.explain(model, x, 3, rules={**table, functional.relu: half})
        assert relative(alone.maps[:, 0], found.maps[:, 1]) < 1e-9


@pytest.mark.parametrize(
    ("key", "arguments"),
    [
        (functional.conv2d, {"weight", "bias", "stride", "padding", "dilation", "groups"}),
        (functional.leaky_relu, {"negative_slope"}),
        (functional.batch_norm, {"running_mean", "running_var", "weight", "bias", "eps"}),
    ],
    ids=["conv2d", "leaky_relu", "batch_norm"],
)
def test_a_rule_is_given_the_operators_own_arguments(key, arguments):
    """Under torch's names, by place or by name: what a formula of `torch.nn.functional` is written with."""

    def mine(grad, x, *args, **kwargs):
        given.append((args, kwargs))
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(key(leaf, *args, **kwargs), leaf, grad)[0]

    def forward(net, x):
        return net.head(mean(functional.leaky_relu(net.norm(net.b(net.a(x))), 0.3)))

    given, net, x = [], Branched(forward).double(), images()
    found = tsgb.explain(net, x, 1, rules={**PIXELS, key: mine})
    assert found.maps.any()
    assert given
    if key is functional.leaky_relu:
        assert all((args, kwargs) in [((0.3,), {}), ((), {"negative_slope": 0.3})] for args, kwargs in given)
    assert all(len(args) + len(kwargs) <= len(arguments) + 2 for args, kwargs in given)


@pytest.mark.parametrize("table", [FUSED, PIXELS, PAPER], ids=["FUSED", "PIXELS", "PAPER"])
def test_what_a_rule_of_ones_own_gives_is_looked_at(table):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(144, 3))
    net, x = net.double().eval(), images()
    for given, kind, message in (
        (lambda grad: grad[:, :1], ValueError, r"'mine' of gelu must return the gradient at its input, .*got \(2, 1, "),
        (lambda grad: None, ValueError, "'mine' of gelu must return .*got NoneType"),
        (lambda grad: grad * float("nan"), FloatingPointError, "or a rule of your own"),
    ):

        def mine(grad, x, given=given, **arguments):
            return given(grad)

        with pytest.raises(kind, match=message):
            tsgb.explain(net, x, 0, rules={**table, functional.gelu: mine})


@pytest.mark.parametrize("key", ["relu", nn.ReLU, nn.ReLU(), nn.ReLU().forward])
def test_a_key_that_no_operator_can_meet_is_refused(key):
    """It would be a rule that is silently none."""
    with pytest.raises(TypeError, match="rule"):
        tsgb.explain(InPlaceModules(), images(), 0, rules={**FUSED, key: rules.ORDINARY})


def test_a_rule_that_is_none_is_refused():
    with pytest.raises(TypeError, match=r"the rule of relu must be callable, or tsgb.rules.ORDINARY, got 3"):
        tsgb.explain(InPlaceModules(), images(), 0, rules={**FUSED, functional.relu: 3})


@pytest.mark.parametrize("name", ["fused", "pixels", "paper"])
def test_a_table_may_be_named(name):
    model, x = InPlaceModules(), images()
    expected = tsgb.explain(model, x, 1, rules=rules.TABLES[name])
    assert torch.equal(tsgb.explain(model, x, 1, rules=name).maps, expected.maps)


def test_tables_are_not_changed():
    before = dict(PIXELS)
    tsgb.explain(InPlaceModules(), images(), 0, rules=PIXELS, f=0.3)
    assert before == PIXELS


@pytest.mark.parametrize("network", SPELLED, ids=lambda network: network.__name__)
def test_every_operator_of_the_spellings_is_known(network):
    for table in (FUSED, PIXELS, PAPER):
        found = tsgb.explain(network(), images(), 0, rules=table)
        assert not [row for row in found.coverage if row[1] is None]
        counts = [count for _, _, count in found.coverage]
        assert min(counts) >= 1
        assert len({row[:2] for row in found.coverage}) == len(counts)
