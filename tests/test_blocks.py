"""The blocks of modern networks: each hands relevance on as its literal twin does, and loses none."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import plain
import tsgb
from tsgb import rules
from tsgb.backprop import recording

# A twin takes the block, its input and the relevance of its output, and gives that of its input.


def passes(block, x, relevance):
    """Relevance passes unchanged, value by value."""
    return relevance


class SqueezeAndExcitation(nn.Module):
    twin = staticmethod(passes)

    def __init__(self, opens=torch.sigmoid):
        super().__init__()
        self.down, self.up, self.opens = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1), opens

    def forward(self, x):
        return x * self.opens(self.up(torch.relu(self.down(functional.adaptive_avg_pool2d(x, 1)))))


class LayerScale(nn.Module):
    twin = staticmethod(passes)

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(4, 1, 1) + 0.1)

    def forward(self, x):
        return self.gamma * x


class NormOfChannels(nn.Module):
    """Layer norm over the channels, as F.layer_norm on NHWC and spelled out."""

    twin = staticmethod(passes)

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

    twin = staticmethod(passes)


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

    def twin(self, block, x, relevance):
        weight, bias = self.branch.weight, self.branch.bias
        grad = relevance / self.forward(x)  # a sum gives each operand relevance in proportion to its value
        return x * grad + x * plain.conv(grad, x, weight, bias, padding=(1, 1))


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

    def twin(self, block, x, relevance):
        below = torch.zeros_like(x)
        below[:, 0], below[:, 1] = relevance[:, 0], relevance[:, 2]
        weight, bias = self.branch.weight, self.branch.bias
        o, _ = plain.conv_output(x[:, 2:], weight, bias, (1, 1), (1, 1), (1, 1), 2)
        grad = relevance[:, [1, 3]] / o
        below[:, 2:] = x[:, 2:] * plain.conv(
            grad, x[:, 2:], weight, bias, padding=(1, 1), groups=2, lumped=block.lumped
        )
        return below


class Slices(nn.Module):
    """Focus of the YOLO networks: every second row and column becomes a channel."""

    def forward(self, x):
        return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)

    def twin(self, block, x, relevance):
        below, c = torch.zeros_like(x), x.shape[1]
        for k, (a, b) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
            for i in range(relevance.shape[2]):
                for j in range(relevance.shape[3]):
                    below[:, :, 2 * i + a, 2 * j + b] = relevance[:, k * c : (k + 1) * c, i, j]
        return below


class Unshuffled(nn.Module):
    def forward(self, x):
        return functional.pixel_unshuffle(x, 2)

    def twin(self, block, x, relevance):
        below = torch.zeros_like(x)
        for c in range(x.shape[1]):
            for i in range(x.shape[2]):
                for j in range(x.shape[3]):
                    below[:, c, i, j] = relevance[:, 4 * c + 2 * (i % 2) + j % 2, i // 2, j // 2]
        return below


class Blur(nn.Module):
    """Blur pooling: a fixed binomial kernel, channel by channel, with a stride."""

    def __init__(self):
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("kernel", (row[:, None] * row / 16).expand(4, 1, 3, 3).clone())

    def forward(self, x):
        return functional.conv2d(functional.pad(x, (1, 1, 1, 1), mode="reflect"), self.kernel, stride=2, groups=4)

    def twin(self, block, x, relevance):
        padded = functional.pad(x, (1, 1, 1, 1), mode="reflect")
        o = self.forward(x)
        wide = padded * plain.conv(relevance / o, padded, self.kernel, stride=(2, 2), groups=4, lumped=block.lumped)
        below = torch.zeros_like(x)
        height, width = x.shape[2:]
        for i in range(height + 2):
            for j in range(width + 2):
                row, column = abs(i - 1), abs(j - 1)
                row, column = min(row, 2 * (height - 1) - row), min(column, 2 * (width - 1) - column)
                below[:, :, row, column] += wide[:, :, i, j]
        return below


class Upsampled(nn.Module):
    """Enlarged, by copies or by interpolation, whose weights a unit image in each place tells."""

    def __init__(self, mode):
        super().__init__()
        self.mode = mode

    def forward(self, x):
        return functional.interpolate(x, scale_factor=2, mode=self.mode)

    def twin(self, block, x, relevance):
        grad, below = relevance / self.forward(x), torch.zeros_like(x)
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                unit = torch.zeros(1, 1, *x.shape[2:], dtype=x.dtype)
                unit[..., i, j] = 1
                below[:, :, i, j] = x[:, :, i, j] * (grad * self.forward(unit)).sum((2, 3))
        return below


class StandardisedWeights(nn.Conv2d):
    def __init__(self):
        super().__init__(4, 6, 3, padding=1)

    def standardised(self):
        var, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, unbiased=False)
        return (self.weight - mean) / torch.sqrt(var + 1e-5)

    def forward(self, x):
        return functional.conv2d(x, self.standardised(), self.bias, padding=1)

    def twin(self, block, x, relevance):
        return x * plain.conv(relevance / self.forward(x), x, self.standardised(), self.bias, padding=(1, 1))


class Separable(nn.Module):
    def __init__(self):
        super().__init__()
        self.depth, self.point = nn.Conv2d(4, 8, 3, padding=1, groups=4), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        return self.point(self.depth(x))

    def twin(self, block, x, relevance):
        between = self.depth(x)
        below = between * plain.conv(relevance / self.point(between), between, self.point.weight, self.point.bias)
        depth = self.depth
        return x * plain.conv(
            below / between, x, depth.weight, depth.bias, padding=(1, 1), groups=4, lumped=block.lumped
        )


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
}


def made(name):
    torch.manual_seed(0)
    return BLOCKS[name]().double().eval()


class Copied(NormOfChannels):
    """The same layer norm, its input copied after the mean was taken."""

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        x = x.clone()
        var = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean).view(x.shape) / torch.sqrt(var + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


BLOCKS["layer norm of a copy"] = lambda: Copied(True)


@pytest.mark.parametrize("table", [rules.DEFAULT, rules.PIXELS], ids=["DEFAULT", "PIXELS"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_its_twin(name, table):
    block, x = made(name), torch.rand(2, 4, 6, 6, dtype=torch.float64) + 0.1
    relevance = torch.randn_like(block(x))
    leaf = x.clone().requires_grad_()
    image = leaf.clone()
    with recording(table):
        o = block(image)
    block.lumped = table is rules.DEFAULT  # whether groups of channels share as one
    (grad,) = torch.autograd.grad(o, leaf, relevance / o)
    assert torch.allclose(leaf * grad, block.twin(block, x, relevance), rtol=1e-6, atol=1e-9)
    assert torch.allclose((leaf * grad).sum(), relevance.sum())


@pytest.mark.parametrize("handing", [True, False], ids=["handing", "plain"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_network_with_the_block_conserves_relevance(name, handing):
    block = made(name)
    torch.manual_seed(1)
    x = torch.rand(2, 3, 10, 10, dtype=torch.float64) + 0.1
    stem, features = nn.Conv2d(3, 4, 3).double(), []
    width = block(stem(x)).shape[1]
    head = nn.Linear(width, 5).double()

    def model(x):
        features.append(block(functional.leaky_relu(stem(x), 0.2)).mean((2, 3)))
        return head(features[-1])

    table = rules.PIXELS if handing else rules.plain(rules.PIXELS)
    explanation = tsgb.explain(model, x, [[0, 1], [2, 4]], rules=table)
    assert explanation.f == 0.75
    evidence = head.weight[explanation.targets] * features[0].detach()[:, None]
    speaks_against = (evidence < 0).any(2)
    expected = evidence.clamp(min=0).sum(2) * torch.where(speaks_against, 0.25, 1)
    assert torch.allclose(explanation.maps.sum((2, 3)), expected, rtol=1e-6)
    assert not [row for row in explanation.coverage if row[1] is None]


class SeveralHeads(nn.Module):
    """Age, sex and species from one trunk."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU())
        self.age, self.kind = nn.Linear(6, 1), nn.Linear(6, 4)

    def forward(self, x):
        x = self.trunk(x).mean((2, 3))
        return {"age": self.age(x), "logits": self.kind(x)}


def test_each_of_several_heads_is_asked_by_itself():
    torch.manual_seed(0)
    model, x = SeveralHeads().double().eval(), torch.rand(2, 3, 9, 9, dtype=torch.float64)
    alone = {
        "age": nn.Sequential(model.trunk, Pooled(model.age)),
        "logits": nn.Sequential(model.trunk, Pooled(model.kind)),
    }
    kind = tsgb.explain(model, x, [3, 1])
    assert torch.allclose(kind.maps, tsgb.explain(alone["logits"].eval(), x, [3, 1]).maps)
    age = tsgb.explain(model, x, lambda output: output["age"][:, 0])
    assert torch.allclose(age.maps, tsgb.explain(alone["age"].eval(), x, 0).maps)
    assert not torch.allclose(age.maps, kind.maps)


class Pooled(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return self.head(x.mean((2, 3)))


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
    stem, head, x = nn.Conv2d(3, 4, 3).double(), nn.Linear(2, 3).double(), torch.rand(2, 3, 7, 7, dtype=torch.float64)

    def model(x, product=PRODUCTS[how]):
        return head(product(stem(x)).mean((2, 3)))

    def literal(x):
        o = stem(x)
        return head((o[:, :2] * functional.silu(o[:, 2:]).detach()).mean((2, 3)))

    expected = tsgb.explain(literal, x, [[0, 1], [2, 0]])
    assert expected.maps.any()
    for table in (rules.DEFAULT, rules.plain(rules.DEFAULT)):
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
    x = torch.rand(3, 3, 7, 7, dtype=torch.float64)

    def model(x, product=VECTORS[how]):
        return head(product(torch.relu(stem(x)).mean((2, 3)), layer))

    classes = [[0, 3], [1, 2], [4, 0]]
    together = tsgb.explain(model, x, classes)
    assert together.maps.flatten(2).any(2).sum() > 3
    for n in range(3):
        for k in range(2):
            alone = tsgb.explain(model, x[n : n + 1], classes[n][k])
            assert torch.allclose(alone.maps[0, 0], together.maps[n, k], rtol=1e-9, atol=1e-12)


def test_what_an_operator_with_an_entry_is_made_of_needs_none():
    stem, scores, head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 1, 1), nn.Linear(4, 3)

    def model(x):
        x = torch.relu(stem(x))
        return head(torch.einsum("ncp,nop->nc", x.flatten(2), scores(x).flatten(2).softmax(2)))

    with pytest.raises(tsgb.CoverageError, match="as attention does"):
        tsgb.explain(model, torch.rand(2, 3, 7, 7), 1)
    table = {**rules.DEFAULT, torch.einsum: rules.ORDINARY}
    assert tsgb.explain(model, torch.rand(2, 3, 7, 7), 1, rules=table, strict=True).maps.any()


def test_what_the_target_does_not_come_from_needs_no_rule():
    torch.manual_seed(0)
    stem, head, other = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), nn.Linear(4, 1)

    def model(x):
        x = torch.relu(stem(x))
        return {"logits": head(x.mean((2, 3))), "waves": other(torch.sin(x).mean((2, 3)))}

    x = torch.rand(2, 3, 7, 7)
    assert tsgb.explain(model, x, 1, strict=True).maps.any()
    with pytest.raises(tsgb.CoverageError, match="no rule for sin"):
        tsgb.explain(model, x, lambda output: output["logits"][:, 1] + output["waves"][:, 0], strict=True)


def test_a_gate_of_what_was_copied_since():
    torch.manual_seed(0)
    stem, head, x = nn.Conv2d(3, 4, 3).double(), nn.Linear(2, 3).double(), torch.rand(2, 3, 7, 7, dtype=torch.float64)

    def model(x, cell):
        return head(cell(*stem(x).chunk(2, 1)).mean((2, 3)))

    literal = tsgb.explain(lambda x: model(x, lambda h, g: (1 - functional.softsign(g + h)).detach() * h), x, [0, 2])
    assert torch.allclose(
        tsgb.explain(lambda x: model(x, updated), x, [0, 2]).maps, literal.maps, rtol=1e-9, atol=1e-12
    )
