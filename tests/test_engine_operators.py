"""One network has one map however it is spelled: of modules, functions, methods, in place, with ``out=``, exported."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import reference
import tsgb
from helpers import SPELLED, InPlaceModules, Step, assert_literal, assert_same_map, relative
from tsgb import rules


def images(count=2, side=10):
    return torch.rand(count, 3, side, side, dtype=torch.float64)


@pytest.mark.parametrize("network", SPELLED, ids=lambda network: network.__name__)
@pytest.mark.parametrize("table", ["PIXELS", "PAPER"])
def test_a_spelling_agrees_with_its_twin(network, table):
    model, x = network(), images()
    found = tsgb.explain(model, x, 3, rules=getattr(rules, table), strict=True)
    expected, f = reference.explain(model.twin, x, 3, table)
    assert found.f == f == (1.0 if table == "PAPER" or network.hidden else 0.75)
    assert float(expected.abs().max()) > 0
    assert relative(found.maps[:, 0], expected) < 1e-7  # batch norm divides by x, which may come near 0


def test_the_spellings_are_many_and_differ_in_table():
    assert len(SPELLED) >= 18
    x = images()
    maps = [tsgb.explain(InPlaceModules(), x, 3, rules=table).maps for table in (rules.PAPER, rules.PIXELS)]
    assert relative(*maps) > 1e-3


# ---- layers with weights


class Layers(nn.Module):
    """One network, its second convolution, its third and the hidden layer above the pooling in several spellings."""

    def __init__(self, second="conv", third="conv", hidden="linear"):
        super().__init__()
        self.second, self.third, self.hidden = second, third, hidden
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.weight2, self.weight3 = nn.Parameter(torch.randn(8, 6, 3, 3)), nn.Parameter(torch.randn(7, 8))
        self.bias3, self.weight4, self.bias4 = (nn.Parameter(torch.randn(*shape)) for shape in ((7,), (9, 7), (9,)))
        self.head = nn.Linear(9, 5)
        self.double().eval()

    def forward(self, x):
        x = torch.relu(self.first(x))
        n, _, height, width = x.shape
        if self.second == "conv":
            x = functional.conv2d(x, self.weight2, padding=1)
        else:
            seen, weight = functional.unfold(x, 3, padding=1), self.weight2.flatten(1)
            if self.second == "unfolded":
                x = torch.matmul(weight, seen)
            elif self.second == "at":
                x = weight @ seen
            else:
                x = functional.linear(seen.transpose(1, 2), weight).transpose(1, 2)
            x = x.reshape(n, 8, height, width)
        x = torch.relu(x)
        if self.third == "conv":
            x = functional.conv2d(x, self.weight3[:, :, None, None], self.bias3)
        elif self.third == "product":
            x = (x.permute(0, 2, 3, 1) @ self.weight3.T + self.bias3).permute(0, 3, 1, 2)
        elif self.third == "channels last":
            x = functional.linear(x.permute(0, 2, 3, 1), self.weight3, self.bias3).permute(0, 3, 1, 2)
        else:
            x = functional.linear(x.flatten(2).mT, self.weight3, self.bias3).mT.unflatten(2, (height, width))
        x = torch.relu(x).mean((2, 3), keepdim=True)
        if self.hidden == "conv":
            x = functional.conv2d(x, self.weight4[:, :, None, None], self.bias4).flatten(1)
        else:
            x = functional.linear(x.flatten(1), self.weight4, self.bias4)
        return self.head(torch.relu(x))


@pytest.mark.parametrize(
    "spelling",
    [{"second": how} for how in ("unfolded", "at", "linear")]
    + [{"third": how} for how in ("channels last", "tokens", "product")]
    + [{"hidden": "conv"}],
    ids=str,
)
def test_a_layer_in_another_spelling_has_the_same_map(spelling):
    x = torch.rand(2, 3, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    tables = [rules.DEFAULT, rules.PIXELS, rules.PAPER]
    if "product" in spelling.values():  # PAPER has no shift for a bias
        tables.remove(rules.PAPER)
    if spelling.keys() & {"second"} or "tokens" in spelling.values():  # fields of tokens lie nowhere on the image
        tables.remove(rules.DEFAULT)
    assert_same_map(Layers(**spelling), Layers(), x, (2, 4), tables)
    found = tsgb.explain(Layers(**spelling), x, 1)
    assert not [row for row in found.coverage if row[1] is None]


def test_layers_have_the_literal_map():
    assert_literal(Layers(), torch.rand(2, 3, 7, 8, dtype=torch.float64), (2, 4))


# ---- the same operator of torch.nn.functional, of torch, written out, of an exported graph


def of(net):
    return net.norm.weight, net.norm.bias


def by_erf(x):
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def by_tanh(x):
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


NONE = (None, None)
STEPS = {
    "group norm": (
        lambda net, x: functional.group_norm(x, 4, *of(net)),
        lambda net, x: torch.group_norm(x, 4, *of(net), 1e-5, False),
    ),
    "layer norm": (
        lambda net, x: functional.layer_norm(x.movedim(1, -1), (8,), *of(net)).movedim(-1, 1),
        lambda net, x: torch.layer_norm(x.movedim(1, -1), (8,), *of(net), 1e-5, False).movedim(-1, 1),
    ),
    "instance norm": (
        lambda net, x: functional.instance_norm(x, *NONE, *of(net)),
        lambda net, x: torch.instance_norm(x, *of(net), *NONE, True, 0.1, 1e-5, False),
    ),
    "batch norm": (
        lambda net, x: net.norm(x),
        lambda net, x: torch.batch_norm(
            x, *of(net), net.norm.running_mean, running_var=net.norm.running_var, training=False, momentum=0.1,
            eps=1e-5, cudnn_enabled=False,
        ),
    ),
    "upsampling": (
        lambda net, x: functional.interpolate(x, scale_factor=2.0, mode="bilinear"),
        lambda net, x: torch.ops.aten.upsample_bilinear2d.vec(x, None, False, [2.0, 2.0]),
    ),
    "convolution": (
        lambda net, x: net.b(x),
        lambda net, x: torch.convolution(x, net.b.weight, net.b.bias, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
    ),
    "transposed convolution": (
        lambda net, x: net.up(x),
        lambda net, x: torch.convolution(x, net.up.weight, net.up.bias, [1, 1], [0, 0], [1, 1], True, [0, 0], 1),
    ),
    "gated linear unit": (
        lambda net, x: functional.glu(x - 0.1, 1),
        lambda net, x: (x - 0.1).chunk(2, 1)[0] * (x - 0.1).chunk(2, 1)[1].sigmoid(),
    ),
    "gelu": (
        lambda net, x: functional.gelu(x - 0.2),
        lambda net, x: by_erf(x - 0.2),
    ),
    "gelu of tanh": (
        lambda net, x: functional.gelu(x - 0.2, approximate="tanh"),
        lambda net, x: by_tanh(x - 0.2),
    ),
    "RMS norm": (
        lambda net, x: functional.rms_norm(x.movedim(1, -1), (8,), net.norm.weight, 1e-5).movedim(-1, 1),
        lambda net, x: x * torch.rsqrt(x.square().mean(1, True) + 1e-5) * net.norm.weight[:, None, None],
    ),
    "constant": (lambda net, x: x + 0.3, lambda net, x: torch.add(torch.tensor(0.3, dtype=torch.float64), x, alpha=1)),
    "cut": (lambda net, x: x[:, :, 1:], lambda net, x: x.narrow(2, 1, x.shape[2] - 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_an_operator_of_torch_or_of_an_exported_graph_is_functionals(name):
    x = torch.rand(2, 3, 9, 10, dtype=torch.float64)
    one, other = STEPS[name]
    assert_literal(Step(one), x, (1, 3))
    tables = (rules.DEFAULT, rules.PIXELS)  # under PAPER a product is no activation
    for model in (Step(other), torch.export.export(Step(one), (x,)).module()):
        assert_same_map(model, Step(one), x, (0, 4), tables)
    found = tsgb.explain(Step(other), x, 1)
    assert not [row for row in found.coverage if row[1] is None]


def test_an_exported_graph_of_core_operators_is_the_network():
    x = torch.rand(2, 3, 9, 10, dtype=torch.float64)
    net = Step(lambda net, x: functional.silu(net.norm(net.b(x))))
    core = torch.export.export(net, (x,)).run_decompositions().module()
    assert_same_map(core, net, x, (0, 4))
