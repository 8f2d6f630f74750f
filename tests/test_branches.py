"""Values that are read more than once, on more than one way, or in other images: both forms of the rules agree."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

import tsgb
from test_handing import relative
from tsgb import rules
from tsgb.rules import maps as rule_maps

TABLES = (rules.DEFAULT, rules.PIXELS, rules.PAPER)


class Branched(nn.Module):
    """Three convolutions, and what happens between them and the head."""

    def __init__(self, how, levels=1):
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.a, self.b, self.c = (
            nn.Conv2d(3, 6, 3, 2, 1, bias=False),
            nn.Conv2d(6, 6, 3, 1, 1),
            nn.Conv2d(6, 6, 3, 1, 1),
        )
        self.norm, self.bend = nn.BatchNorm2d(6), nn.PReLU(6)
        self.norm.running_mean.normal_()
        self.head = nn.Linear(6 * levels, 5)
        self.eval()

    def forward(self, x):
        return self.how(self, x)


def mean(x):
    return x.mean((2, 3))


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


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("target", [1, [[0, 1], [2, 3]]])
@pytest.mark.parametrize(
    ("how", "levels"),
    [
        (sum_read_before, 1),
        (sum_scaled_before, 1),
        (sums_of_exactly_0, 1),
        (channels_bent, 1),
        (masked, 1),
        (pooled, 1),
        (raw_and_normed, 2),
        (two_levels, 2),
    ],
)
def test_both_forms_give_one_map(how, levels, target, table):
    net, images = Branched(how, levels), torch.rand(2, 3, 16, 16)
    found = tsgb.explain(net, images, target, rules=table)
    plainly = tsgb.explain(net, images, target, rules=rules.plain(table))
    assert found.coverage == plainly.coverage
    assert relative(found.maps, plainly.maps) < 2e-4


def test_in_half_precision_sums_are_exactly_0_by_themselves():
    def forward(net, x):
        x = net.a(x)
        return net.head(mean(net.c(functional.relu(net.norm(x + net.b(functional.relu(x)))))))

    net, images = Branched(forward).bfloat16(), torch.rand(2, 3, 32, 32).bfloat16()
    found = tsgb.explain(net, images, 1, rules=rules.PIXELS)
    assert relative(found.maps, tsgb.explain(net, images, 1, rules=rules.plain(rules.PIXELS)).maps) < 0.05


def flipped(net, x):
    y = net.head(mean(functional.relu(net.b(functional.relu(net.a(torch.cat([x, x.flip(3)])))))))
    return sum(y.chunk(2))


def flipped_within(net, x):
    x = functional.relu(net.a(x))
    return sum(net.head(mean(functional.relu(net.b(torch.cat([x, x.flip(3)]))))).chunk(2))


@pytest.mark.parametrize("how", [flipped, flipped_within])
@pytest.mark.parametrize("count", [1, 2])
def test_images_that_the_model_copies_have_the_map_of_the_pixels(how, count):
    """Where evidence and fields are of other images than those that came, they make no map of these."""
    net, images = Branched(how), torch.rand(count, 3, 16, 16)
    found = tsgb.explain(net, images, [[0, 1]] * count)
    assert found.maps.shape == (count, 2, 16, 16)
    assert not found.of_all_depths
    without = {role: rule for role, rule in rules.DEFAULT.items() if role != rules.MAP}
    assert relative(found.maps, tsgb.explain(net, images, [[0, 1]] * count, rules=without).maps) < 1e-5


@pytest.mark.parametrize("rows", [slice(0, 3), slice(1, 2)])
def test_an_image_has_one_map_though_the_model_takes_them_one_by_one(rows):
    def one_by_one(net, x):
        return torch.cat([net.head(mean(functional.relu(net.b(functional.relu(net.a(one)))))) for one in x.split(1)])

    images = torch.rand(3, 3, 16, 16)
    together = Branched(lambda net, x: net.head(mean(functional.relu(net.b(functional.relu(net.a(x)))))))
    found = tsgb.explain(Branched(one_by_one), images[rows], [[0, 1]] * len(images[rows]))
    assert found.of_all_depths
    assert relative(found.maps, tsgb.explain(together, images, [[0, 1]] * 3).maps[rows]) < 1e-5
    with pytest.raises(RuntimeError, match="give it one image"):
        tsgb.compile(Branched(one_by_one), images, backend="eager")


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("table", [rules.DEFAULT, rules.PIXELS, rules.PAPER])
def test_a_head_on_vectors_without_a_batch(count, table):
    def squeezed(net, x):
        return net.head(mean(functional.relu(net.b(functional.relu(net.a(x))))).squeeze()).view(len(x), -1)

    together = Branched(lambda net, x: net.head(mean(functional.relu(net.b(functional.relu(net.a(x)))))))
    images = torch.rand(count, 3, 16, 16)
    found, same = (tsgb.explain(model, images, "top2", rules=table) for model in (Branched(squeezed), together))
    assert relative(found.maps, same.maps) < 1e-5
    assert found.why_empty == same.why_empty


def test_several_levels_at_the_head_have_a_map_of_all_depths():
    net, images = Branched(two_levels, 2), torch.rand(1, 3, 16, 16)
    without = {role: rule for role, rule in rules.DEFAULT.items() if role != rules.MAP}
    assert relative(tsgb.explain(net, images, 1).maps, tsgb.explain(net, images, 1, rules=without).maps) > 0.1


def test_a_call_that_hands_its_operand_on_hides_nothing():
    def forward(net, x):
        return net.head(mean(net.b(functional.dropout(torch.sin(net.a(x)), 0.5, net.training))))

    images = torch.rand(1, 3, 16, 16)
    assert ("sin", None, 1) in tsgb.explain(Branched(forward), images, 1).coverage
    with pytest.raises(tsgb.CoverageError, match="no rule for sin"):
        tsgb.explain(Branched(forward), images, 1, strict=True)

    def gated(net, x, same=lambda gate: gate):
        x = net.a(x)
        return net.head(mean(net.b(x * same(torch.sigmoid(mean(x))[:, :, None, None]))))

    plain = tsgb.explain(Branched(gated), images, 1)
    for same in (torch.Tensor.float, lambda gate: functional.dropout(gate, 0.5, False)):
        found = tsgb.explain(Branched(partial(gated, same=same)), images, 1)
        assert torch.equal(found.maps, plain.maps)


def test_what_was_made_of_weights_before_is_constant():
    def forward(net, x):
        return net.head(mean(net.b(functional.relu(net.a(x)) + net.cached)))

    net, images = Branched(forward), torch.rand(1, 3, 16, 16)
    net.cached = torch.full((1, 6, 1, 1), 0.1)
    expected = tsgb.explain(net, images, 1)
    net.cached = nn.Parameter(net.cached) * 1
    with ThreadPoolExecutor(1) as pool:
        for found in (tsgb.explain(net, images, 1), pool.submit(tsgb.explain, net, images, 1).result()):
            assert torch.equal(found.maps, expected.maps)
            assert found.coverage == expected.coverage


def test_where_the_head_is_folded_a_model_is_compiled_too():
    def forward(net, x):
        return mean(functional.relu(net.norm(net.b(functional.relu(net.a(x))))))

    net, images = Branched(forward), torch.rand(1, 3, 16, 16)
    net.b = nn.Conv2d(6, 6, 3, bias=False)
    found = tsgb.compile(net, images, backend="eager")(images)  # of the class that the last rectifier lets pass
    assert relative(found.maps, tsgb.explain(net, images).maps) < 1e-4


def test_claims_have_the_likeness_and_temperature_of_the_table(monkeypatch):
    given, claims = [], rule_maps.claims
    monkeypatch.setattr(rules, "claims", lambda *args, **options: given.append(options) or claims(*args, **options))
    table = {**rules.DEFAULT, rules.RIVALS: partial(rules.rivalry, temperature=1.0, alike=0.8, floor=0.1)}
    tsgb.explain(Branched(two_levels, 2), torch.rand(1, 3, 16, 16), 1, rules=table)
    assert given == [{"alike": 0.8, "temperature": 1.0}]


def test_what_no_form_can_follow_is_an_error_of_ones_own():
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(True), nn.Conv2d(6, 6, 3), nn.ReLU(True), nn.Flatten(), nn.Linear(864, 5)
    )
    for module in net:
        module.register_full_backward_hook(lambda module, given, got: None)
    with pytest.raises(tsgb.CoverageError, match="the model writes on a view of what passed a rule"):
        tsgb.explain(net.eval(), torch.rand(1, 3, 16, 16), 1)


def emptied(layer, is_biased=True):
    """A layer two of whose channels are 0 wherever they are, as pruning leaves them."""
    with torch.no_grad():
        layer.weight[:2] = 0
        if is_biased:
            layer.bias[:2] = 0
    return layer


class Last(nn.Module):
    """What is done with the channels last."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def biased(norm):
    """A norm that shifts."""
    nn.init.uniform_(norm.bias, 0.1, 1)
    return norm


ZEROS = {
    "a pruned convolution before batch norm": lambda: [emptied(nn.Conv2d(6, 6, 3)), biased(nn.BatchNorm2d(6))],
    "pruned batch norm before another": lambda: [emptied(nn.BatchNorm2d(6)), biased(nn.BatchNorm2d(6))],
    "the same, folded": lambda: [
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
    "groups of which one sees nothing": lambda: [
        nn.Conv2d(6, 6, 1, groups=6, bias=False),
        biased(nn.GroupNorm(3, 6)),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", ZEROS)
@pytest.mark.parametrize("table", [rules.DEFAULT, rules.PIXELS, rules.PAPER])
def test_what_a_shift_makes_of_zeros_has_no_relevance_in_either_form(name, table):
    torch.manual_seed(0)
    head = [nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)]
    net, images = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), *ZEROS[name](), *head).eval(), torch.rand(2, 3, 12, 12)
    found, plainly = (tsgb.explain(net, images, 1, rules=form) for form in (table, rules.plain(table)))
    assert relative(found.maps, plainly.maps) < 1e-4


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
@pytest.mark.parametrize("table", TABLES)
def test_images_side_by_side_keep_their_relevance(groups, table):
    def forward(net, x):
        return net.head(mean(functional.relu(net.c(functional.relu(net.by_image(functional.relu(net.a(x))))))))

    net, images = Branched(forward), torch.rand(3, 3, 16, 16) * torch.tensor([1, 0.2, 5])[:, None, None, None]
    net.by_image = ByImage(groups)
    found = tsgb.explain(net, images, [[0, 1]] * 3, rules=table)
    for n in range(3):
        assert relative(found.maps[n], tsgb.explain(net, images[n : n + 1], [[0, 1]], rules=table).maps[0]) < 1e-4
    assert relative(found.maps, tsgb.explain(net, images, [[0, 1]] * 3, rules=rules.plain(table)).maps) < 1e-4


def test_images_one_after_the_other_are_not_side_by_side():
    def forward(net, x):
        outs = [mean(functional.relu(net.by_channel(functional.relu(net.a(one))))) for one in x.split(1)]
        return net.head(torch.cat(outs))

    net, images = Branched(forward), torch.rand(3, 3, 16, 16)
    net.by_channel = nn.Conv2d(6, 6, 3, groups=6)
    found = tsgb.explain(net, images, [1] * 3, rules=rules.PAPER).maps
    assert relative(found[0], tsgb.explain(net, images[:1], 1, rules=rules.PAPER).maps[0]) < 1e-5


@pytest.mark.parametrize(("shifts_image", "forwards"), [(False, 1), (True, 2)])
def test_zeros_are_filled_where_the_image_itself_is_shifted(shifts_image, forwards):
    def forward(net, x):
        calls.append(x)
        x = functional.relu(net.a(x - 0.5 if shifts_image else x))
        return net.head(mean(functional.relu(net.b(x) + 0.1)))

    net, images, calls = Branched(forward), torch.rand(1, 3, 16, 16), []
    images[..., 3, 4] = 0
    tsgb.explain(net, images, 1)
    assert len(calls) == forwards


def test_what_f_balances_in_one_position_is_told():
    net = nn.Sequential(nn.Conv2d(1, 2, 2, bias=False), nn.Flatten(), nn.Linear(2, 2, bias=False)).eval()
    nn.init.constant_(net[0].weight, 0.5)
    net[2].weight.data = torch.tensor([[1.0, -1.0], [0.5, -1.0]])
    images = torch.ones(1, 1, 2, 2)
    ((reason, _),) = tsgb.explain(net, images, [[0, 1]], f=1.0, rules=rules.PIXELS).why_empty
    assert "give f=0.75" in reason
    assert tsgb.explain(net, images, 0, f=0.75, rules=rules.PIXELS).why_empty == [[None]]


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


def test_a_target_may_ask_of_each_image_of_several_its_own_class():
    def one_by_one(net, x):
        return torch.cat([net.head(mean(functional.relu(net.b(functional.relu(net.a(one)))))) for one in x.split(1)])

    labels, images = torch.tensor([2, 0, 1]), torch.rand(3, 3, 16, 16)
    found = tsgb.explain(Branched(one_by_one), images, lambda logits: logits[range(3), labels])
    assert found.maps.shape == (3, 1, 16, 16)


def test_layers_that_take_images_one_by_one_have_their_fields_too():
    def below(net, x):
        x = torch.cat([functional.relu(net.a(one)) for one in x.split(1)])
        return net.head(mean(functional.relu(net.b(x))))

    images = torch.rand(3, 3, 16, 16)
    together = Branched(lambda net, x: net.head(mean(functional.relu(net.b(functional.relu(net.a(x)))))))
    found = tsgb.explain(Branched(below), images, 1)
    assert relative(found.maps, tsgb.explain(together, images, 1).maps) < 1e-5


@pytest.mark.parametrize("bias", [None, torch.ones(3)])
def test_a_filter_of_one_channel_for_each_image(bias):
    def forward(net, x):
        x = functional.relu(net.a(x))
        n, c, height, width = x.shape
        filters = torch.linspace(-1, 1, n * c * 9).reshape(n, c, 3, 3)
        seen = functional.conv2d(x.reshape(1, n * c, height, width), filters, bias, groups=n).reshape(
            n, 1, height - 2, -1
        )
        return net.head(mean(functional.relu(net.c(functional.relu(seen.expand(-1, 6, -1, -1))))))

    net, images = Branched(forward), torch.rand(3, 3, 16, 16)
    found = tsgb.explain(net, images, 1)
    assert relative(found.maps, tsgb.explain(net, images, 1, rules=rules.plain(rules.DEFAULT)).maps) < 1e-4


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


@pytest.mark.parametrize("table", [rules.DEFAULT, rules.PIXELS])
def test_a_gated_signal_is_no_multiple_of_itself(table):
    """What was computed from the signal was not computed from the gated one: their product is one of equals."""

    def product(net, x, same=lambda y: y):
        y = functional.relu(net.a(x))
        return net.head(mean(functional.relu(net.b(same(y * torch.sigmoid(net.c(y))) * net.norm(net.c(y))))))

    images = torch.rand(2, 3, 16, 16)
    one, other = (Branched(partial(product, same=same)) for same in (lambda y: y, lambda y: y + 0))
    assert (
        relative(tsgb.explain(one, images, 1, rules=table).maps, tsgb.explain(other, images, 1, rules=table).maps)
        < 1e-5
    )


@pytest.mark.parametrize("alone", [torch.Tensor.squeeze, lambda v: v, lambda v: v.unsqueeze(0)[0]])
def test_a_logit_cut_in_each_image_is_told(alone):
    def by_image(net, x):
        features = mean(functional.relu(net.a(x)))
        return torch.stack([functional.relu(net.head(alone(v))) for v in features])

    def together(net, x):
        return functional.relu(net.head(mean(functional.relu(net.a(x)))))

    nets, images = (Branched(by_image), Branched(together)), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        for net in nets:
            net.head.bias[1] = -100
    found, expected = (tsgb.explain(net, images, [[0, 1]] * 2) for net in nets)
    assert all("cut by a ReLU" in reasons[1] for reasons in found.why_empty)
    assert torch.equal(found.maps[:, 1], expected.maps[:, 1])


@pytest.mark.parametrize("between", [lambda y: 2 * y, lambda y: y.permute(0, 2, 3, 1)])
def test_zeros_are_carried_right_after_their_convolution_alone(between):
    def forward(net, x):
        y = between(net.by_channel(functional.relu(net.a(x))))
        if y.shape[1] == 6:
            return net.head(mean(functional.relu(net.b(functional.relu(net.norm(y))))))
        y = functional.layer_norm(y, (6,), None, torch.ones(6)).permute(0, 3, 1, 2)
        return net.head(mean(functional.relu(net.b(y))))

    net, images = Branched(forward), torch.rand(2, 3, 16, 16)
    net.by_channel = nn.Conv2d(6, 6, 1, groups=6, bias=False)
    found = tsgb.explain(net, images, 1)
    assert relative(found.maps, tsgb.explain(net, images, 1, rules=rules.plain(rules.DEFAULT)).maps) < 1e-4


@pytest.mark.parametrize("table", TABLES)
def test_a_transposed_head_may_have_as_many_classes_as_channels(table):
    def scored(net, x, end):
        return end(functional.relu(net.b(functional.relu(net.a(x))))).mean((2, 3))

    weight = torch.randn(6, 6, 1, 1)
    ends = (lambda x: functional.conv_transpose2d(x, weight), lambda x: functional.conv2d(x, weight.transpose(0, 1)))
    images = torch.rand(2, 3, 16, 16)
    found, expected = (tsgb.explain(Branched(partial(scored, end=end)), images, 1, rules=table) for end in ends)
    assert relative(found.maps, expected.maps) < 1e-4


def test_zeros_are_lost_behind_a_concatenation_too():
    def forward(net, x):
        x = functional.relu(net.a(x))
        y = torch.cat([net.by_channel(x), net.by_channel(x)], 1)
        return net.head(mean(functional.relu(functional.group_norm(y, 3, None, torch.ones(12)))))

    net, images = Branched(forward, 2), torch.rand(2, 3, 16, 16)
    net.by_channel = nn.Conv2d(6, 6, 1, groups=6, bias=False)
    with torch.no_grad():
        net.a.weight[:2].abs_().neg_()  # channels that see nothing
    found = tsgb.explain(net, images, 1)
    assert relative(found.maps, tsgb.explain(net, images, 1, rules=rules.plain(rules.DEFAULT)).maps) < 1e-4
