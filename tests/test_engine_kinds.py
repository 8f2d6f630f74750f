"""Which kind of rule an operator meets: what passes, copies, shares or sums relevance, what keeps its gradient."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import tsgb
from helpers import (
    Branched,
    Functions,
    InPlaceModules,
    NormalisesItsInput,
    assert_literal,
    assert_same_map,
    mean,
    relative,
)
from tsgb import rules

TABLES = (rules.DEFAULT, rules.PIXELS, rules.PAPER)
NAMES = ["FUSED", "PIXELS", "PAPER"]


def images(count=2, side=10):
    return torch.rand(count, 3, side, side, dtype=torch.float64)


# ---- the blocks of modern networks


class SqueezeAndExcitation(nn.Module):
    def __init__(self, opens=torch.sigmoid):
        super().__init__()
        self.down, self.up, self.opens = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1), opens

    def forward(self, x):
        return x * self.opens(self.up(torch.relu(self.down(functional.adaptive_avg_pool2d(x, 1)))))


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(4, 1, 1) + 0.1)

    def forward(self, x):
        return self.gamma * x


class NormOfChannels(nn.Module):
    """Layer norm over the channels, as F.layer_norm on NHWC and spelled out."""

    def __init__(self, spelled):
        super().__init__()
        self.spelled, self.weight, self.bias = spelled, nn.Parameter(torch.rand(4) + 0.5), nn.Parameter(torch.rand(4))

    def forward(self, x):
        if not self.spelled:
            return functional.layer_norm(x.permute(0, 2, 3, 1), (4,), self.weight, self.bias, 1e-6).permute(0, 3, 1, 2)
        mean = x.mean(1, keepdim=True)
        var = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(var + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ResponseNorm(nn.Module):
    """ConvNeXt V2's: the product of a signal with the size of its channels, added to it."""

    def __init__(self):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.rand(4, 1, 1)), nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x):
        size = x.norm(2, (2, 3), keepdim=True)
        return x + (self.gamma * (x * (size / (size.mean(1, keepdim=True) + 1e-6))) + self.beta)


class StochasticDepth(nn.Module):
    """A branch that is left out at random in training, and never after."""

    def __init__(self):
        super().__init__()
        self.branch, self.p = nn.Conv2d(4, 4, 3, padding=1), 0.3

    def forward(self, x):
        branch = self.branch(x)
        if self.training:
            branch = branch * (torch.rand(len(x), 1, 1, 1) > self.p) / (1 - self.p)
        return x + branch


class Shuffle(nn.Module):
    """ShuffleNet's: half of the channels go round a convolution, then both halves are interleaved."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Conv2d(2, 2, 3, padding=1, groups=2)

    def forward(self, x):
        left, right = x.chunk(2, 1)
        x = torch.cat([left, self.branch(right)], 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Slices(nn.Module):
    """Focus of the YOLO networks: every second row and column becomes a channel."""

    def forward(self, x):
        return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)


class Unshuffled(nn.Module):
    def forward(self, x):
        return functional.pixel_unshuffle(x, 2)


class Blur(nn.Module):
    """Blur pooling: a fixed binomial kernel, channel by channel, with a stride."""

    def __init__(self):
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("kernel", (row[:, None] * row / 16).expand(4, 1, 3, 3).clone())

    def forward(self, x):
        return functional.conv2d(functional.pad(x, (1, 1, 1, 1), mode="reflect"), self.kernel, stride=2, groups=4)


class Upsampled(nn.Module):
    """Enlarged, by copies or by interpolation, whose weights a unit image in each place tells."""

    def __init__(self, mode):
        super().__init__()
        self.mode = mode

    def forward(self, x):
        return functional.interpolate(x, scale_factor=2, mode=self.mode)


class StandardisedWeights(nn.Conv2d):
    def __init__(self):
        super().__init__(4, 6, 3, padding=1)

    def standardised(self):
        var, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, unbiased=False)
        return (self.weight - mean) / torch.sqrt(var + 1e-5)

    def forward(self, x):
        return functional.conv2d(x, self.standardised(), self.bias, padding=1)


class Separable(nn.Module):
    def __init__(self):
        super().__init__()
        self.depth, self.point = nn.Conv2d(4, 8, 3, padding=1, groups=4), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        return self.point(self.depth(x))


class Copied(NormOfChannels):
    """The same layer norm, its input copied after the mean was taken."""

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        x = x.clone()
        var = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean).view(x.shape) / torch.sqrt(var + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


BLOCKS = {
    "squeeze-and-excitation": SqueezeAndExcitation,
    "hard squeeze-and-excitation": lambda: SqueezeAndExcitation(functional.hardsigmoid),
    "layer scale": LayerScale,
    "layer norm": lambda: NormOfChannels(False),
    "layer norm spelled out": lambda: NormOfChannels(True),
    "response norm": ResponseNorm,
    "stochastic depth": StochasticDepth,
    "shuffle": Shuffle,
    "slices": Slices,
    "pixel unshuffle": Unshuffled,
    "blur pooling": Blur,
    "upsampled by copies": lambda: Upsampled("nearest"),
    "upsampled bilinearly": lambda: Upsampled("bilinear"),
    "weight standardisation": StandardisedWeights,
    "separable": Separable,
    "layer norm of a copy": lambda: Copied(True),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_network_with_the_block_conserves_relevance(name):
    torch.manual_seed(0)
    block = BLOCKS[name]().double().eval()
    torch.manual_seed(1)
    x = images() + 0.1
    stem, features = nn.Conv2d(3, 4, 3).double(), []
    width = block(stem(x)).shape[1]
    head = nn.Linear(width, 5).double()

    def model(x):
        features.append(mean(block(functional.leaky_relu(stem(x), 0.2))))
        return head(features[-1])

    explanation = tsgb.explain(model, x, [[0, 1], [2, 4]], rules=rules.PIXELS)
    assert explanation.f == 0.75
    evidence = head.weight[explanation.targets] * features[0].detach()[:, None]
    speaks_against = (evidence < 0).any(2)
    expected = evidence.clamp(min=0).sum(2) * torch.where(speaks_against, 0.25, 1)
    assert torch.allclose(explanation.maps.sum((2, 3)), expected, rtol=1e-6)
    assert not [row for row in explanation.coverage if row[1] is None]
    assert_literal(model, x, (0, 4))


# ---- products


def written(u, gate):
    u *= gate
    return u


def updated(h, g):
    """A recurrent cell's update; the gate was computed from h, not from its copy."""
    z = functional.softsign(g + h)
    h = h.clone()
    return (1 - z) * h


PRODUCTS = {
    "split": lambda x: (lambda u, g: u * functional.silu(g))(*x.chunk(2, 1)),
    "split, gate first": lambda x: (lambda u, g: functional.silu(g) * u)(*x.chunk(2, 1)),
    "cloned": lambda x: (lambda u, g: u.clone() * functional.silu(g))(*x.chunk(2, 1)),
    "sliced": lambda x: x[:, :2] * functional.silu(x[:, 2:]),
    "in place": lambda x: (lambda u, g: written(u, functional.silu(g)))(*x.chunk(2, 1)),
    "in place on a clone": lambda x: (lambda u, g: written(u.clone(), functional.silu(g)))(*x.chunk(2, 1)),
}


@pytest.mark.parametrize("how", PRODUCTS)
def test_a_gated_linear_unit_has_one_map_however_it_is_written(how):
    torch.manual_seed(0)
    stem, head, x = nn.Conv2d(3, 4, 3).double(), nn.Linear(2, 3).double(), images(side=7)

    def model(x, product=PRODUCTS[how]):
        return head(product(stem(x)).mean((2, 3)))

    def literal(x):
        o = stem(x)
        return head((o[:, :2] * functional.silu(o[:, 2:]).detach()).mean((2, 3)))

    for table in (rules.DEFAULT, rules.PIXELS):
        expected = tsgb.explain(literal, x, [[0, 1], [2, 0]], rules=table)
        assert expected.maps.any()
        found = tsgb.explain(model, x, [[0, 1], [2, 0]], rules=table)
        assert torch.allclose(found.maps, expected.maps, rtol=1e-9, atol=1e-12)


VECTORS = {
    "gate": lambda p, layer: p * torch.sigmoid(layer(p)),
    "length": lambda p, layer: p / p.norm(dim=1, keepdim=True),
    "sum": lambda p, layer: p / (p.sum(1, keepdim=True) + 1),
    "softsign": lambda p, layer: p / (p + 1),
    "centred": lambda p, layer: (p - p.mean(1, keepdim=True)) / (p.var(1, keepdim=True) + 1e-5).sqrt(),
    "norm": lambda p, layer: functional.layer_norm(p, (4,)),
}


@pytest.mark.parametrize("how", VECTORS)
def test_products_of_vectors_are_those_of_each_image_and_class(how):
    torch.manual_seed(0)
    stem, layer, head = nn.Conv2d(3, 4, 3).double(), nn.Linear(4, 4).double(), nn.Linear(4, 5).double()
    x = images(3, 7)

    def model(x, product=VECTORS[how]):
        return head(product(torch.relu(stem(x)).mean((2, 3)), layer))

    classes = [[0, 3], [1, 2], [4, 0]]
    together = tsgb.explain(model, x, classes)
    assert together.maps.flatten(2).any(2).sum() > 3
    for n in range(3):
        for k in range(2):
            alone = tsgb.explain(model, x[n : n + 1], classes[n][k])
            assert torch.allclose(alone.maps[0, 0], together.maps[n, k], rtol=1e-9, atol=1e-12)
    assert_literal(model, x, (0, 3), tables=["PIXELS"])


def test_a_gate_of_what_was_copied_since():
    torch.manual_seed(0)
    stem, head, x = nn.Conv2d(3, 4, 3).double(), nn.Linear(2, 3).double(), images(side=7)

    def model(x, cell):
        return head(cell(*stem(x).chunk(2, 1)).mean((2, 3)))

    literal = tsgb.explain(lambda x: model(x, lambda h, g: (1 - functional.softsign(g + h)).detach() * h), x, [0, 2])
    found = tsgb.explain(lambda x: model(x, updated), x, [0, 2])
    assert torch.allclose(found.maps, literal.maps, rtol=1e-9, atol=1e-12)


class Dynamic(nn.Module):
    """A convolution whose weight depends on the image."""

    def __init__(self, detached):
        super().__init__()
        torch.manual_seed(1)
        self.detached, self.weight, self.head = detached, nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        scale = x.mean().detach() if self.detached else x.mean()
        return self.head(functional.conv2d(x, self.weight * (1 + scale)).relu().mean((2, 3)))


@pytest.mark.parametrize("table", TABLES, ids=NAMES)
def test_a_weight_that_depends_on_the_image_is_held_constant(table):
    x = images(1)
    free, held = (tsgb.explain(Dynamic(detached), x, [[0, 1, 2]], rules=table).maps for detached in (False, True))
    assert free.any()
    assert relative(free, held) < 1e-12


class Two(nn.Module):
    """Two convolutions of the image, and what is made of both."""

    def __init__(self, join):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head, self.join = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Linear(4, 3), join
        self.double().eval()

    def forward(self, x):
        return self.head(self.join(self.a(x), self.b(x)).mean((2, 3)))


def test_a_product_of_equals_keeps_its_gradient():
    model, x = Two(torch.mul), images()
    assert ("mul", "ordinary", 1) in tsgb.explain(model, x, 0).coverage
    assert_literal(model, x, (1, 2))


def test_a_signal_gated_by_another_branch():
    free, held = Two(lambda a, b: a * torch.sigmoid(b)), Two(lambda a, b: a * torch.sigmoid(b).detach())
    assert ("mul", "gate", 1) in tsgb.explain(free, images(), 0).coverage
    assert_same_map(free, held, images(), tables=(rules.DEFAULT, rules.PIXELS), tolerance=1e-12)


def test_what_left_a_sigmoid_is_the_gate_also_of_a_smaller_signal():
    model, x = Functions(), images()

    def network(x, detached):
        y = functional.relu(model.conv1(x))
        gate = torch.sigmoid(model.conv2(y))
        return model.head((y.mean(1, keepdim=True) * (gate.detach() if detached else gate)).mean((2, 3)))

    free, held = (tsgb.explain(lambda x, d=detached: network(x, d), x, 2).maps for detached in (False, True))
    assert relative(free, held) < 1e-12


@pytest.mark.parametrize("table", [rules.DEFAULT, rules.PIXELS], ids=NAMES[:2])
def test_a_gated_signal_is_no_multiple_of_itself(table):
    """What was computed from the signal was not computed from the gated one: their product is one of equals."""

    def product(same):
        def forward(net, x):
            y = functional.relu(net.a(x))
            return net.head(mean(functional.relu(net.b(same(y * torch.sigmoid(net.c(y))) * net.norm(net.c(y))))))

        return Branched(forward)

    assert_same_map(
        product(lambda y: y), product(lambda y: y + 0), torch.rand(2, 3, 16, 16), tables=[table], tolerance=1e-5
    )


@pytest.mark.parametrize("same", [torch.Tensor.float, lambda gate: functional.dropout(gate, 0.5, False)])
def test_a_gate_may_pass_what_leaves_it_as_it_is(same):
    def gated(same):
        def forward(net, x):
            x = net.a(x)
            return net.head(mean(net.b(x * same(torch.sigmoid(mean(x))[:, :, None, None]))))

        return Branched(forward)

    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(tsgb.explain(gated(same), x, 1).maps, tsgb.explain(gated(lambda gate: gate), x, 1).maps)


# ---- shifts


def test_a_model_that_normalises_its_input_gets_the_map_of_the_one_that_is_fed_normalised():
    model, x = NormalisesItsInput(), images()
    x[:, :, 2:5] = 0  # black pixels: image * gradient has nothing to carry, and yet they speak

    def fed(normalised):
        y = functional.relu(model.norm1(model.conv1(normalised)))
        return model.head(functional.relu(1 - model.conv2(y)).mean((2, 3)))

    for table in (rules.DEFAULT, rules.PIXELS):
        inside = tsgb.explain(model, x, 2, rules=table).maps
        outside = tsgb.explain(fed, (x - model.mean) / model.std, 2, rules=table).maps
        assert relative(inside, outside) < 1e-6
        assert float(outside[:, :, 2:5].abs().sum()) > 0


def test_a_zero_pixel_that_nothing_shifts_carries_nothing():
    x = images()
    x[:, :, 2:5] = 0
    assert not tsgb.explain(InPlaceModules(), x, 2, rules=rules.PIXELS).maps[:, :, 2:5].any()


@pytest.mark.parametrize("shifts_image", [False, True])
def test_a_model_runs_once_whether_or_not_it_shifts_the_image(shifts_image):
    def forward(net, x):
        calls.append(x)
        x = functional.relu(net.a(x - 0.5 if shifts_image else x))
        return net.head(mean(functional.relu(net.b(x) + 0.1)))

    net, x, calls = Branched(forward), torch.rand(1, 3, 16, 16), []
    x[..., 3, 4] = 0
    tsgb.explain(net, x, 1)
    assert len(calls) == 1


@pytest.mark.parametrize("between", [lambda y: 2 * y, lambda y: y.permute(0, 2, 3, 1)])
def test_what_a_norm_makes_of_zeros_that_were_scaled_or_moved(between):
    def forward(net, x):
        y = between(net.by_channel(functional.relu(net.a(x))))
        if y.shape[1] == 6:
            return net.head(mean(functional.relu(net.b(functional.relu(net.norm(y))))))
        y = functional.layer_norm(y, (6,), None, torch.ones(6).to(y)).permute(0, 3, 1, 2)
        return net.head(mean(functional.relu(net.b(y))))

    net, x = Branched(forward), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    net.by_channel = nn.Conv2d(6, 6, 1, groups=6, bias=False)
    assert_literal(net.double(), x, (1, 3))


# ---- whole channels, whole images


def test_hidden_layers_of_many_weights_have_their_gradient():
    """Of one class and of twenty, which are multiplied another way."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 4096),
        nn.ReLU(), nn.Linear(4096, 30),
    ).eval()  # fmt: skip
    x = torch.rand(2, 3, 10, 10)
    many = tsgb.explain(model, x, [[*range(20)]] * 2, rules=rules.PIXELS).maps
    for k in (0, 19):
        assert relative(tsgb.explain(model, x, k, rules=rules.PIXELS).maps[:, 0], many[:, k]) < 1e-4


@pytest.mark.parametrize("product", [lambda y: y * y, lambda y: y * y.sigmoid(), lambda y: y / (1 + y.abs())])
def test_a_gate_of_a_vector_is_held_also_where_it_is_the_signal_itself(product):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.hidden, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(product(self.hidden(self.a(x).relu().mean((2, 3)))))

    torch.manual_seed(0)
    assert_literal(Net().double().eval(), torch.rand(2, 3, 9, 9, dtype=torch.float64), (1, 2))
