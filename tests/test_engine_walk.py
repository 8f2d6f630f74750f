"""Whole networks: what flows backward on every way, for several classes and images, is what the reference gives."""

import copy

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import reference
import tsgb
from helpers import Branched, Drawn, assert_literal, assert_same_map, assert_steady, mean, relative
from tsgb import rules
from tsgb.vision import import_torchvision

FUSED = rules.DEFAULT


def drawn(draw, seed, height, width):
    """A network drawn at random, images for it and its logits."""
    torch.manual_seed(seed)
    model = Drawn(draw).double().eval()
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    with torch.no_grad():
        try:
            return model, x, model(x)
        except RuntimeError:  # a window larger than what is left
            reject()


sides = st.integers(12, 26)


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(0, 2**31), st.sampled_from(["PIXELS", "PAPER"]), sides, sides)
def test_a_network_drawn_at_random_gets_the_literal_map(data, seed, table, height, width):
    model, x, logits = drawn(data.draw, seed, height, width)
    found = tsgb.explain(model, x, [[0, 1, 2, 3]] * 2, rules=getattr(rules, table))
    assert torch.equal(found.logits, logits)
    alone = tsgb.explain(model, x, 2, rules=getattr(rules, table))
    assert (alone.maps[:, 0] - found.maps[:, 2]).norm() <= 1e-8 * found.maps[:, 2].norm()
    for target in (0, 2):
        expected, f = reference.explain(model, x, target, table)
        assert found.f == f
        assert (found.maps[:, target] - expected).norm() <= 1e-8 * expected.norm(), model.steps


@settings(deadline=None, max_examples=20)
@given(st.data(), st.integers(0, 2**31), sides, sides)
def test_a_network_drawn_at_random_has_a_steady_map_of_all_depths(data, seed, height, width):
    model, x, _ = drawn(data.draw, seed, height, width)
    together = tsgb.explain(model, x, [[0, 1, 2, 3]] * 2)
    for n in range(2):
        alone = tsgb.explain(model, x[n : n + 1], [[3, 1]])
        for k, target in enumerate((3, 1)):
            bound = 1e-7 * together.maps[n, target].norm()
            assert (alone.maps[0, k] - together.maps[n, target]).norm() <= bound, model.steps


@pytest.mark.slow
@settings(deadline=None, max_examples=600)
@given(st.data(), st.integers(0, 2**31), st.sampled_from(["PIXELS", "PAPER"]), sides, sides)
def test_many_networks_drawn_at_random(data, seed, table, height, width):
    model, x, _ = drawn(data.draw, seed, height, width)
    found = tsgb.explain(model, x, 1, rules=getattr(rules, table))
    expected, _ = reference.explain(model, x, 1, table)
    assert (found.maps[:, 0] - expected).norm() <= 1e-8 * expected.norm(), model.steps


def architecture(name):
    torch.manual_seed(1)
    options = {"init_weights": True} if name == "googlenet" else {}
    model = getattr(import_torchvision().models, name)(weights=None, **options).eval().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "squeezenet1_1",
        "mobilenet_v2",
        "shufflenet_v2_x0_5",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("alexnet", "vgg11", "densenet121", "mobilenet_v3_small", "convnext_tiny", "efficientnet_b0")
        ),
    ],
)
def test_networks_of_torchvision_get_the_literal_map(name):
    model, x = architecture(name), torch.rand(1, 3, 64, 64, dtype=torch.float64)
    tolerance = 1e-6 if name.startswith("mobilenet") else 1e-8  # batch norm divides by x, which may come near 0
    assert_literal(model, x, classes=(7, 3), tolerance=tolerance)


# ---- values that are read more than once, or are exactly 0


def sum_read_before(net, x):
    x = functional.relu(net.a(x))
    y = net.b(x) + x
    side = net.c(y)
    return net.head(mean(net.c(functional.relu(y, inplace=True)) + side))


def sum_scaled_before(net, x):
    x = functional.relu(net.a(x))
    y = net.b(x) + x
    side = y * 0.5
    return net.head(mean(net.c(y.relu_()) + side))


def rounded(x):
    return x + (torch.round(x * 8) / 8 - x).detach()


def sums_of_exactly_0(net, x):
    x = rounded(net.a(x))
    y = x + rounded(net.b(functional.relu(x)))
    return net.head(mean(net.c(functional.relu(net.norm(y)))))


def channels_bent(net, x):
    return net.head(mean(net.b(net.bend(net.a(x)))))


def masked(net, x):
    x = functional.relu(net.a(x))
    return net.head(mean(net.b(x * (x > 0.1))))


def pooled(net, x):
    return net.head(mean(net.b(functional.max_pool2d(functional.relu(net.a(x)), (2,), (2,)))))


def raw_and_normed(net, x):
    raw = net.a(x)
    return net.head(torch.cat([mean(raw), mean(functional.relu(net.norm(raw)))], 1))


def two_levels(net, x):
    y = functional.relu(net.b(functional.relu(net.a(x))))
    return net.head(torch.cat([mean(y), mean(functional.relu(net.c(y)))], 1))


def flipped(net, x):
    y = net.head(mean(functional.relu(net.b(functional.relu(net.a(torch.cat([x, x.flip(3)])))))))
    return sum(y.chunk(2))


WAYS = [
    (sum_read_before, 1),
    (sum_scaled_before, 1),
    (sums_of_exactly_0, 1),
    (channels_bent, 1),
    (masked, 1),
    (pooled, 1),
    (raw_and_normed, 2),
    (two_levels, 2),
]


@pytest.mark.parametrize(("how", "levels"), WAYS)
def test_every_way_counts(how, levels):
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    net = Branched(how, levels).double()
    assert_literal(net, x, (1, 3))
    assert_steady(net, x, (1, 3))


def test_in_half_precision_sums_are_exactly_0_by_themselves():
    def forward(net, x):
        x = net.a(x)
        return net.head(mean(net.c(functional.relu(net.norm(x + net.b(functional.relu(x)))))))

    net, x = Branched(forward), torch.rand(2, 3, 32, 32)
    single = tsgb.explain(net, x, 1, rules=rules.PIXELS).maps
    half = tsgb.explain(net.bfloat16(), x.bfloat16(), 1, rules=rules.PIXELS).maps
    assert half.isfinite().all()
    assert torch.corrcoef(torch.stack([half.flatten(), single.flatten()]))[0, 1] > 0.95


class Crossed(nn.Sequential):
    """The sum of a map with the same, its channels and rows exchanged."""

    def forward(self, x):
        x = functional.relu(self[0](x))
        return self[1]((self[2](x) + self[3](x).permute(0, 2, 3, 1)).mean((2, 3)))


def test_layouts_of_one_shape_are_not_confused():
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 4, 3), nn.Linear(4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)]
    assert_literal(Crossed(*convolutions).double().eval(), torch.rand(2, 3, 6, 6).double())


def test_what_is_zero_for_want_of_weights_gives_nothing_back():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4, bias=False),
        nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    ).double().eval()  # fmt: skip
    for place in (0, 3):
        model[place].weight.data[1] = 0
        model[place].weight.data[2, :, 1:] = 0
        nn.init.constant_(model[place + 1].bias, 0.5)
    x = torch.randn(2, 3, 12, 12).double()
    assert_literal(model, x)
    assert_steady(model, x)


def emptied(layer):
    """A layer two of whose channels are 0 wherever they are, as pruning leaves them."""
    with torch.no_grad():
        layer.weight[:2] = 0
        if layer.bias is not None:
            layer.bias[:2] = 0
    return layer


def biased(norm):
    """A norm that shifts."""
    nn.init.uniform_(norm.bias, 0.1, 1)
    return norm


class Last(nn.Module):
    """What is done with the channels last."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Twice(nn.Module):
    """A layer's output beside itself."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.narrow = layer, nn.Conv2d(12, 6, 1)

    def forward(self, x):
        y = functional.group_norm(torch.cat([self.layer(x), self.layer(x)], 1), 3, None, torch.ones(12).to(x))
        return self.narrow(functional.relu(y))


ZEROS = {
    "a pruned convolution before batch norm": lambda: [emptied(nn.Conv2d(6, 6, 3)), biased(nn.BatchNorm2d(6))],
    "pruned batch norm before another": lambda: [emptied(nn.BatchNorm2d(6)), biased(nn.BatchNorm2d(6))],
    "pruned batch norm of a convolution before another": lambda: [
        nn.Conv2d(6, 6, 3, bias=False),
        emptied(nn.BatchNorm2d(6)),
        biased(nn.BatchNorm2d(6)),
    ],
    "pruned batch norm before group norm": lambda: [emptied(nn.BatchNorm2d(6)), biased(nn.GroupNorm(3, 6))],
    "a shift of zeros twice": lambda: [
        emptied(nn.BatchNorm2d(6)),
        emptied(nn.BatchNorm2d(6)),
        biased(nn.BatchNorm2d(6)),
    ],
    "a pruned linear layer before layer norm": lambda: [Last(emptied(nn.Linear(6, 6)), biased(nn.LayerNorm(6)))],
    "groups of which one sees nothing": lambda: [nn.Conv2d(6, 6, 1, groups=6, bias=False), biased(nn.GroupNorm(3, 6))],
    "the same, concatenated": lambda: [Twice(nn.Conv2d(6, 6, 1, groups=6, bias=False))],
}


@pytest.mark.parametrize("name", ZEROS)
def test_what_a_shift_makes_of_zeros_has_no_relevance(name):
    torch.manual_seed(0)
    head = [nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)]
    first = nn.Conv2d(3, 6, 3)
    with torch.no_grad():
        first.weight[:1].abs_().neg_()  # a channel that sees nothing
        first.bias[:1] = 0
    net = nn.Sequential(first, nn.ReLU(), *ZEROS[name](), *head).double().eval()
    x = torch.rand(2, 3, 12, 12).double()
    assert_literal(net, x, (1, 2))
    assert_steady(net, x, (1, 2))


def test_batch_norm_folded_or_not_it_is_one_map():
    """Of channels that see nothing too: what batch norm gives these is shared as if it were the convolution's bias."""
    torch.manual_seed(3)
    separate = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6),
        nn.ReLU(), nn.Conv2d(6, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4),
    ).double().eval()  # fmt: skip
    nn.init.constant_(separate[0].bias, 0.3)  # so that no position is 0 in all channels
    nn.init.constant_(separate[0].bias[1:3], -9)
    nn.init.uniform_(separate[3].bias, 0.1, 0.5)
    folded = copy.deepcopy(separate)
    folded[2] = torch.nn.utils.fuse_conv_bn_eval(separate[2], separate[3])
    folded[3] = nn.Identity()
    x = torch.randn(2, 3, 12, 12).double()
    maps = [tsgb.explain(model, x, [[0, 1], [2, 0]]).maps for model in (separate, folded)]
    assert maps[0].abs().amax((2, 3)).min() > 0
    assert torch.allclose(*maps, rtol=1e-8, atol=1e-12)


# ---- images along other dimensions


class ByImage(nn.Module):
    """A convolution whose weights depend on the image: of all images at once, side by side, as groups."""

    def __init__(self, groups):
        super().__init__()
        self.groups, self.route = groups, nn.Linear(6, 2)
        self.weight = nn.Parameter(torch.randn(2, 6 * (6 // groups) * 9))

    def forward(self, x):
        n, c, height, width = x.shape
        weight = (torch.sigmoid(self.route(mean(x))) @ self.weight).reshape(n * c, c // self.groups, 3, 3)
        x = functional.pad(x.reshape(1, n * c, height, width), (1, 1, 1, 1))
        return functional.conv2d(x, weight, groups=n * self.groups).reshape(n, c, height, width)


@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("table", [FUSED, rules.PIXELS, rules.PAPER], ids=["FUSED", "PIXELS", "PAPER"])
def test_images_side_by_side_keep_their_relevance(groups, table):
    def forward(net, x):
        return net.head(mean(functional.relu(net.c(functional.relu(net.by_image(functional.relu(net.a(x))))))))

    net, images = Branched(forward), torch.rand(3, 3, 16, 16) * torch.tensor([1, 0.2, 5])[:, None, None, None]
    net.by_image = ByImage(groups)
    net, images = net.double(), images.double()
    assert_steady(net, images, (0, 1), table)
    if table is rules.PIXELS:
        assert_literal(net, images, (0, 1), tables=["PIXELS"])


def test_images_one_after_the_other_are_not_side_by_side():
    def forward(net, x):
        outs = [mean(functional.relu(net.by_channel(functional.relu(net.a(one))))) for one in x.split(1)]
        return net.head(torch.cat(outs))

    net, images = Branched(forward), torch.rand(3, 3, 16, 16)
    net.by_channel = nn.Conv2d(6, 6, 3, groups=6)
    found = tsgb.explain(net, images, [1] * 3, rules=rules.PAPER).maps
    assert relative(found[0], tsgb.explain(net, images[:1], 1, rules=rules.PAPER).maps[0]) < 1e-5


def test_a_view_within_one_image_lays_no_images_side_by_side():
    def one_by_one(net, x):
        outs = []
        for one in x.split(1):
            y = functional.relu(net.a(one))
            y = y.view(1, 2, 3, 8, 8).transpose(1, 2).reshape(1, 6, 8, 8)
            outs.append(mean(functional.relu(net.by_channel(y))))
        return net.head(torch.cat(outs))

    net, images = Branched(one_by_one), torch.rand(3, 3, 16, 16)
    net.by_channel = nn.Conv2d(6, 6, 3, groups=6)
    found = tsgb.explain(net, images, 1, rules=rules.PAPER).maps
    assert relative(found[:1], tsgb.explain(net, images[:1], 1, rules=rules.PAPER).maps) < 1e-5


@pytest.mark.parametrize("bias", [None, torch.ones(3)])
def test_a_filter_of_one_channel_for_each_image(bias):
    def forward(net, x):
        x = functional.relu(net.a(x))
        n, c, height, width = x.shape
        filters = torch.linspace(-1, 1, n * c * 9).to(x).reshape(n, c, 3, 3)
        seen = functional.conv2d(
            x.reshape(1, n * c, height, width), filters, None if bias is None else bias.to(x), groups=n
        )
        seen = seen.reshape(n, 1, height - 2, -1)
        return net.head(mean(functional.relu(net.c(functional.relu(seen.expand(-1, 6, -1, -1))))))

    net, images = Branched(forward).double(), torch.rand(3, 3, 16, 16).double()
    assert_literal(net, images, (1, 3), tables=["PIXELS"])


@pytest.mark.parametrize("rows", [slice(0, 3), slice(1, 2)])
def test_an_image_has_one_map_though_the_model_takes_them_one_by_one(rows):
    def one_by_one(net, x):
        return torch.cat([net.head(mean(functional.relu(net.b(functional.relu(net.a(one)))))) for one in x.split(1)])

    images = torch.rand(3, 3, 16, 16)
    together = Branched(lambda net, x: net.head(mean(functional.relu(net.b(functional.relu(net.a(x)))))))
    found = tsgb.explain(Branched(one_by_one), images[rows], [[0, 1]] * len(images[rows]))
    assert found.of_all_depths
    assert relative(found.maps, tsgb.explain(together, images, [[0, 1]] * 3).maps[rows]) < 1e-5


def test_layers_that_take_images_one_by_one_have_their_fields_too():
    def below(net, x):
        x = torch.cat([functional.relu(net.a(one)) for one in x.split(1)])
        return net.head(mean(functional.relu(net.b(x))))

    images = torch.rand(3, 3, 16, 16)
    together = Branched(lambda net, x: net.head(mean(functional.relu(net.b(functional.relu(net.a(x)))))))
    found = tsgb.explain(Branched(below), images, 1)
    assert relative(found.maps, tsgb.explain(together, images, 1).maps) < 1e-5


def of_two_views(net, x):
    x = torch.cat([x, x.flip(3)]) - x.mean(0)  # each image as the others make it
    return sum(net.head(mean(functional.relu(net.b(functional.relu(net.a(x)))))).chunk(2))


def of_three(net, x):
    return torch.cat([net.head(mean(functional.relu(net.b(functional.relu(net.a(x[n : n + 1])))))) for n in range(3)])


@pytest.mark.parametrize("how", [of_two_views, of_three])
def test_what_the_model_says_of_several_is_what_is_explained(how):
    """Explained one by one, images may have other logits, or none."""
    net, images = Branched(how), torch.rand(3, 3, 16, 16)
    found = tsgb.explain(net, images)
    assert torch.allclose(found.logits, net(images), atol=1e-5)
    assert found.targets.flatten().tolist() == net(images).argmax(1).tolist()


class Series(nn.Module):
    """A layer on (T, N, C) between two convolutions, or the same on (N, T, C)."""

    def __init__(self, sequence_first):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv1d(3, 8, 3, 1, 1), nn.Conv1d(8, 8, 3, 1, 1)
        self.middle, self.c, self.sequence_first = nn.Linear(8, 8), nn.Linear(8, 5), sequence_first
        self.double().eval()

    def forward(self, x):
        there, back = ((2, 0, 1), (1, 2, 0)) if self.sequence_first else ((0, 2, 1), (0, 2, 1))
        x = torch.relu(self.middle(torch.relu(self.a(x)).permute(there))).permute(back)
        return 30 * self.c(torch.relu(self.b(x)).mean(2))


def test_a_layer_of_a_sequence_first_has_its_field_too():
    assert_same_map(Series(True), Series(False), torch.rand(2, 3, 20, dtype=torch.float64))


# ---- many classes


def test_many_classes_go_backward_in_chunks(monkeypatch):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 30),
    ).double().eval()  # fmt: skip
    x, classes = torch.rand(2, 3, 12, 12).double(), [[*range(30)]] * 2
    for table in (rules.PIXELS, FUSED):
        together = tsgb.explain(model, x, classes, rules=table)
        for k in (0, 7, 29):
            alone = tsgb.explain(model, x, k, rules=table)
            assert relative(alone.maps[:, 0], together.maps[:, k]) < 1e-12
            assert [reasons[0] for reasons in alone.why_empty] == [reasons[k] for reasons in together.why_empty]
