"""Where the classes compete: wherever the channels stand, at one place on every path, in a callable's logits too."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

import reference
import tsgb
from helpers import Branched, assert_same_map, assert_steady, mean, relative
from tsgb import rules
from tsgb.fusion import Fusion, competition_gate, fused_map

FUSED = rules.FUSED
UNFUSED = {**FUSED, rules.FUSION: None}  # the relevance of the pixels, less what all classes share
ALWAYS = {**FUSED, rules.FUSION: Fusion(floor=1.0)}  # where no rival takes anything
COPYING = "where evidence and fields are of other images than those that came, they make no map of these"


class Chain(nn.Module):
    """What can be written out layer by layer; ``scale`` makes its logits as large as a trained network's."""

    def __init__(self, classes=4):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 5, 3, 1, 1)
        self.c = nn.Linear(5, classes)

    def top(self, x):
        return torch.relu(self.b(torch.relu(self.a(x))))

    def forward(self, x):
        return self.c(mean(self.top(x))) * 30


def chain(classes=4, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return Chain(classes).to(dtype).eval()


def evidence_of(model, x):
    """(classes, N, h, w) at the top of a chain, and the rows that compete with a class: those of the best logits."""
    with torch.no_grad():
        top = model.top(x)
        evidence = torch.einsum("nchw,kc->knhw", top, 30 * model.c.weight) / top[0, 0].numel()
        best = model(x).topk(len(evidence)).indices
        rows = torch.stack([evidence[best[:, r], torch.arange(len(x))] for r in range(len(evidence))])
    return evidence, rows


@pytest.mark.parametrize(
    ("seed", "place", "signs"), [(3, 3, (True, False)), (0, 3, (True, True)), (3, 2, (False, True))]
)
def test_a_network_written_out(seed, place, signs):
    model = chain(seed=seed)
    x = torch.rand(1, 3, 12, 10, dtype=torch.float64)
    evidence, rows = evidence_of(model, x)
    with torch.no_grad():
        target = int(model(x).argsort()[0, place])
        one = torch.relu(model.a(x))
        top = torch.relu(model.b(one))
        gate = competition_gate(torch.cat([evidence[target][None], rows]), 1, Fusion())[0]
        own = gate * (evidence[target] - evidence.mean(0))  # (N, h, w)
        weights = 30 * model.c.weight / top[0, 0].numel()
        gradient = gate[:, None] * (weights[target] - weights.mean(0))[:, None, None]
        below = reference.conv(gradient * (top > 0), one, model.b.weight, model.b.bias, 1, 1)
        fields = [own[None], (below * one).sum(1)[None]]
        passed = torch.stack([own.clamp(min=0).sum((1, 2)), own.clamp(max=0).sum((1, 2))])[:, None]
        found = fused_map(fields, passed, x, Fusion())
    assert (own.max() > 0, own.min() < 0) == signs
    assert torch.allclose(tsgb.explain(model, x, target, rules=FUSED).maps[:, 0], found[0], atol=1e-12)
    assert gate.min() < 0.9, "no rival had a say"


# ---- wherever the channels stand


class Net(nn.Module):
    """Two convolutions and a head, told by ``end`` how to come from features (N, 8, 8, W) to logits."""

    def __init__(self, end):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.LayerNorm(8)
        self.c, self.end = nn.Linear(8, 5), end
        self.double().eval()

    def forward(self, x):
        return 30 * self.end(self, torch.relu(self.b(torch.relu(self.a(x)))))


MOVES = {
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "movedim": lambda x: x.movedim(1, -1),
    "moveaxis": lambda x: torch.moveaxis(x, 1, -1),
    "swapaxes": lambda x: x.swapaxes(1, 2).swapaxes(2, 3),
    "transpose": lambda x: x.transpose(1, 3).transpose(1, 2),
    "einsum": lambda x: torch.einsum("nchw->nhwc", x),
    "contiguous": lambda x: x.permute(0, 2, 3, 1).contiguous(),
    "there and back": lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2).movedim(1, 3),
    "in place": lambda x: x.permute(0, 2, 3, 1).mul_(1.0),
}


@pytest.mark.parametrize("side", [8, 6])  # as many rows as channels, and fewer
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("move", MOVES)
def test_the_classes_compete_wherever_the_channels_stand(move, normed, side):
    def end(net, x):
        x = MOVES[move](x)
        x = torch.relu(net.norm(x)) if normed else x
        return net.c(x.mean((1, 2)))

    def first(net, x):
        if normed:
            x = functional.layer_norm(x.movedim(1, -1), (8,), net.norm.weight, net.norm.bias).movedim(-1, 1)
        return net.c((torch.relu(x) if normed else x).mean((2, 3)))

    x = torch.rand(2, 3, 16, 2 * side, dtype=torch.float64)
    assert_same_map(Net(end), Net(first), x, (0, 3))


def test_tokens_are_positions():
    x = torch.rand(2, 3, 16, 12, dtype=torch.float64)
    tokens = Net(lambda net, x: net.c(x.flatten(2).mT.mean(1)))
    assert_same_map(tokens, Net(lambda net, x: net.c(mean(x))), x, (0, 3))


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: x.mean(3).mean(2),
        lambda x: x.mean(-1, keepdim=True).mean(-2, keepdim=True).flatten(1),
        lambda x: x.sum(2).sum(2) / 48,
        lambda x: x.movedim(1, -1).mean(1).mean(1),
        lambda x: functional.adaptive_avg_pool2d(x, 1)[:, :, 0, 0],
        lambda x: functional.avg_pool2d(x, x.shape[2:]).squeeze((2, 3)),
        lambda x: x.flatten(2) @ torch.ones(48, dtype=x.dtype) / 48,
    ],
    ids=["one by one", "kept", "sums", "channels last", "adaptive", "window", "product with ones"],
)
def test_pooling_may_be_written_in_any_way(pool):
    x = torch.rand(2, 3, 16, 12, dtype=torch.float64)
    assert_same_map(Net(lambda net, x: net.c(pool(x))), Net(lambda net, x: net.c(mean(x))), x, (0, 3))


# ---- at one place on every path


class Reduced(nn.Module):
    """A block that leaves one position, whose branches have theirs at several heights; and a convolution beside."""

    def __init__(self, beside):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.a, self.b = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 1, 1), nn.Conv2d(6, 6, 4)
        self.side = nn.Conv2d(3, 6, 8) if beside else None
        self.c = nn.Linear(12, 5)
        self.double().eval()

    def parts(self, x):
        y = torch.relu(self.stem(x))
        z = self.b(torch.relu(self.a(y)))
        z = z + self.side(x) if self.side is not None else z
        return y, torch.cat([functional.max_pool2d(y, 4), torch.relu(z)], 1).flatten(1)

    def forward(self, x):
        return 30 * self.c(self.parts(x)[1])


@pytest.mark.parametrize("beside", [False, True])
def test_where_one_site_lies_below_another_the_classes_compete_once(beside):
    """At the stem's output, or where a path goes past it at the image itself."""
    model, x = Reduced(beside), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    assert_steady(model, x, (0, 3))
    if beside:  # then its evidence is the relevance of the pixels
        own = {**rules.PIXELS, rules.HEAD: FUSED[rules.HEAD], rules.F: None}
        evidence = tsgb.explain(model, x, [[*range(5)]] * 2, rules=own).maps.transpose(0, 1)
        best = model(x).topk(5).indices
        rows = torch.stack([evidence[best[:, r], torch.arange(2)] for r in range(5)])
        gate = competition_gate(torch.cat([evidence[1:2], rows]), 1, Fusion())[0]
        passed = (gate * (evidence[1] - evidence.mean(0))).clamp(min=0).sum((1, 2))
        found = tsgb.explain(model, x, 1, rules=FUSED).maps[:, 0].clamp(min=0).sum((1, 2))
        assert torch.allclose(found, passed, rtol=1e-6)


def two_levels(net, x):
    y = functional.relu(net.b(functional.relu(net.a(x))))
    return net.head(torch.cat([mean(y), mean(functional.relu(net.c(y)))], 1))


def test_several_levels_at_the_head_have_a_map_of_all_depths():
    net, x = Branched(two_levels, 2), torch.rand(1, 3, 16, 16)
    found = tsgb.explain(net, x, 1)
    assert found.of_all_depths
    assert relative(found.maps, tsgb.explain(net, x, 1, rules=UNFUSED).maps) > 0.1


def test_a_convolution_right_below_pooling_is_a_site_itself():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)
    )
    model, x = model.eval().double(), torch.rand(2, 3, 14, 14, dtype=torch.float64)
    assert assert_steady(model, x, (0, 3)).of_all_depths


def test_what_only_speaks_against_is_below_zero():
    model, x = chain(), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        model.c.weight.abs_()
        model.c.weight[1] = 0
        model.c.weight[2] = model.c.weight.mean(0)
        model.c.weight[2, 0] += 1e-9  # a hair more than what all classes share, where a feature is on
    e = tsgb.explain(model, x, [[0, 1, 2]] * 2, rules=FUSED)
    assert e.maps[:, 0].amax() > 0 >= e.maps[:, 1].amax() > e.maps[:, 1].amin()
    assert e.why_empty[0][1] == "evidence against the target outweighs the evidence for it at every pixel"
    evidence, _ = evidence_of(model, x)
    against = (evidence[1] - evidence.mean(0)).clamp(max=0).sum((1, 2))
    passed = e.maps[:, 1].sum((1, 2))
    assert ((passed < 0.3 * against * 0.999) & (passed > 1.001 * against)).all()


def test_a_rival_elsewhere_takes_what_is_its_own():
    """One channel tells red, the other green; both classes share the first half of red's evidence."""
    model = nn.Sequential(
        nn.Conv2d(3, 2, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)
    ).eval()
    model[0].weight.data = torch.tensor([[1.0, 0, 0], [0, 1, 0]])[:, :, None, None]
    model[4].weight.data = torch.tensor([[30.0, 10], [10, 30]])
    x = torch.zeros(1, 3, 16, 16)
    x[:, 0, :, :8], x[:, 1, :, 8:] = 1, 1
    with_rivals = tsgb.explain(model, x, 0, rules=FUSED).maps[0, 0]
    without = tsgb.explain(model, x, 0, rules=ALWAYS).maps[0, 0]
    assert with_rivals[:, :4].mean() > 0 > with_rivals[:, 12:].mean() > without[:, 12:].mean()


def test_the_map_sums_to_the_evidence_that_passed():
    model, x = chain(), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    evidence, rows = evidence_of(model, x)
    own = evidence[1] - evidence.mean(0)
    gate = competition_gate(torch.cat([evidence[1:2], rows]), 1, Fusion())[0]
    for table, passed in ((ALWAYS, own), (FUSED, gate * own)):
        maps = tsgb.explain(model, x, 1, rules=table).maps[:, 0]
        assert torch.allclose(maps.clamp(min=0).sum((1, 2)), passed.clamp(min=0).sum((1, 2)), rtol=1e-4)
        assert maps.min() < 0, "nothing speaks against it"
        assert (maps.clamp(max=0).sum((1, 2)) > passed.clamp(max=0).sum((1, 2)) - 1e-4).all()


def test_numbers_of_the_fusion_are_those_of_the_table():
    model, x = chain(), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    expected = tsgb.explain(model, x, 1, rules=FUSED).maps
    for change in ({"alike": 2.0}, {"floor": 0.1}, {"halo": 0.0}, {"reach": 2.0}, {"radius": 2}, {"rivals": 1}):
        table = {**FUSED, rules.FUSION: replace(Fusion(), **change)}
        assert relative(tsgb.explain(model, x, 1, rules=table).maps, expected) > 1e-6, change


def test_without_a_fusion_the_map_is_the_pixels_less_what_all_classes_share():
    model, x = chain(), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    own = {**rules.PIXELS, rules.HEAD: FUSED[rules.HEAD], rules.F: None}
    found = tsgb.explain(model, x, 1, rules=own)
    assert not found.of_all_depths
    evidence, _ = evidence_of(model, x)
    assert torch.allclose(found.maps[:, 0].sum((1, 2)), evidence[1].sum((1, 2)))  # relevance is conserved below


# ---- in a callable's logits


def test_a_callable_of_the_logits_competes_as_its_classes_do():
    model, x = chain(), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    asked = tsgb.explain(model, x, [[1, 2]] * 2, rules=FUSED).maps
    tripled = tsgb.explain(model, x, lambda out: 3 * out[:, 2], rules=FUSED).maps[:, 0]
    assert torch.allclose(tripled, 3 * asked[:, 1])
    evidence, rows = evidence_of(model, x)
    own = (evidence[1] - evidence[2])[None]
    weighed = (own * competition_gate(torch.cat([own, rows]), 1, Fusion()))[0]
    difference = tsgb.explain(model, x, lambda out: 5 * (out[:, 1] - out[:, 2]), rules=FUSED).maps[:, 0]
    expected = 5 * weighed.clamp(min=0).sum((1, 2))
    assert torch.allclose(difference.clamp(min=0).sum((1, 2)), expected)


class Beside(nn.Module):
    """Logits, and features that they come from."""

    def __init__(self):
        super().__init__()
        self.net = chain()

    def forward(self, x):
        features = self.net.top(x)
        return self.net.c(mean(features)) * 30, features


def test_a_callable_that_reads_more_than_the_logits_does_not_compete():
    model, x = Beside().double().eval(), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    for competes, target in (
        (False, lambda out: out[0][:, 1] + out[1].mean((1, 2, 3))),
        (True, lambda out: out[0][:, 1] + out[1].detach().mean((1, 2, 3))),
    ):
        maps = [tsgb.explain(model, x, target, rules=table).maps for table in (FUSED, ALWAYS)]
        assert torch.equal(*maps) != competes


class Parted(Chain):
    """Logits in two parts of one call."""

    def forward(self, x):
        return super().forward(x).split([2, 2], 1)


def test_a_target_of_two_parts_of_one_call_is_more_than_the_first():
    torch.manual_seed(0)
    model, x = Parted().double().eval(), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    one, both = (lambda out: out[0][:, 1]), (lambda out: out[0][:, 1] + 5 * out[1][:, 0])
    maps = [tsgb.explain(model, x, target).maps for target in (one, both)]
    assert relative(*maps) > 0.1


def test_a_target_may_write_on_the_logits():
    model, x = chain(), torch.rand(2, 3, 16, 16, dtype=torch.float64)

    def zeroed(out):
        out[:, 0] = 0
        return out[:, 1]

    asked = tsgb.explain(model, x, 1, rules=FUSED).maps
    doubled = tsgb.explain(model, x, lambda out: out.mul_(2)[:, 1], rules=FUSED).maps
    assert relative(doubled, 2 * asked) < 1e-9
    assert relative(tsgb.explain(model, x, zeroed, rules=FUSED).maps, asked) < 1e-9


# ---- several images and inputs, other dimensions


def test_a_class_has_one_map_whatever_else_is_asked():
    model, x = chain(30, torch.float32), torch.rand(3, 3, 16, 16)
    alone = tsgb.explain(model, x[1:2], 7, rules=FUSED).maps[0, 0]
    together = tsgb.explain(model, x, [[3, 7, 9]] * 3, rules=FUSED).maps[1, 1]
    assert torch.allclose(alone, together, atol=1e-5 * float(alone.abs().max()))


def flipped(net, x):
    y = net.head(mean(functional.relu(net.b(functional.relu(net.a(torch.cat([x, x.flip(3)])))))))
    return sum(y.chunk(2))


def flipped_within(net, x):
    x = functional.relu(net.a(x))
    return sum(net.head(mean(functional.relu(net.b(torch.cat([x, x.flip(3)]))))).chunk(2))


@pytest.mark.parametrize("how", [flipped, flipped_within])
@pytest.mark.parametrize("count", [1, 2])
def test_images_that_the_model_copies_have_the_map_of_the_pixels(how, count):
    net, x = Branched(how), torch.rand(count, 3, 16, 16)
    found = tsgb.explain(net, x, [[0, 1]] * count)
    assert found.maps.shape == (count, 2, 16, 16)
    assert not found.of_all_depths, COPYING
    assert found.maps.any()


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(3, 4, 3), nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, x, y):
        return self.out((torch.relu(self.a(x)) + torch.relu(self.b(y))).mean((2, 3)))


def test_of_several_inputs_each_has_its_relevance():
    torch.manual_seed(0)
    model, inputs = Both().double().eval(), (torch.rand(1, 3, 8, 8).double(), torch.rand(1, 1, 8, 8).double())
    e = tsgb.explain(model, inputs, 1, rules=FUSED)
    assert [m.shape for m in e.maps] == [(1, 1, 8, 8)] * 2
    assert all(torch.isfinite(m).all() and m.any() for m in e.maps)
    assert not e.of_all_depths


class Tabled(nn.Module):
    """An image and what a table says of it; ``is_mixed``: what is made of the latter also weighs the channels."""

    def __init__(self, is_mixed):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(2, 4)
        self.out, self.is_mixed = nn.Linear(8 if is_mixed else 6, 3), is_mixed

    def forward(self, x, v):
        x = torch.relu(self.b(torch.relu(self.a(x))))
        if self.is_mixed:
            v = torch.relu(self.c(v))
            x = torch.relu(x + v[:, :, None, None])
        return self.out(torch.cat([x.mean((2, 3)), v], 1))


@pytest.mark.parametrize("is_mixed", [False, True])
def test_what_has_no_positions_goes_past_where_classes_compete(is_mixed):
    model, inputs = Tabled(is_mixed).double().eval(), (torch.rand(2, 3, 9, 9).double(), torch.rand(2, 2).double())
    e = tsgb.explain(model, inputs, [[0, 2], [1, 1]])
    for k in range(2):
        one = tsgb.explain(model, inputs, e.targets[:, k])
        assert all(torch.allclose(both[:, k], alone[:, 0]) for both, alone in zip(e.maps, one.maps, strict=True))
        if not is_mixed:
            weight = model.out.weight[:, 4:].detach()
            assert torch.allclose(e.maps[1][:, k], inputs[1] * (weight[e.targets[:, k]] - weight.mean(0)))


class Vectors(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv, self.out = nn.Conv1d(3, 6, 3, padding=1), nn.Linear(6, classes)

    def forward(self, x):
        return self.out(torch.relu(self.conv(x)).amax(-1))


def test_other_dimensions_targets_and_heads():
    torch.manual_seed(0)
    x = torch.rand(2, 3, 20)
    assert tsgb.explain(Vectors(5).eval(), x, "top2", rules=FUSED).maps.shape == (2, 2, 20)
    assert tsgb.explain(Vectors(1).eval(), x, 0, rules=FUSED).maps.shape == (2, 1, 20)  # no rival, no mean of classes
    assert tsgb.explain(Vectors(2).eval(), x, 1, rules=FUSED).maps.shape == (2, 1, 20)
    block = nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 3)).eval()
    assert tsgb.explain(block, torch.rand(1, 1, 6, 6, 6), 2, rules=FUSED).maps.shape == (1, 1, 6, 6, 6)
    segmenter = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 1)).eval()
    image = torch.rand(2, 3, 9, 9)
    e = tsgb.explain(segmenter, image, lambda out: out[:, 2].sum((1, 2)), rules=FUSED)
    assert e.maps.shape == (2, 1, 9, 9)


def test_a_series_has_the_map_of_one_that_is_an_image_of_one_row():
    torch.manual_seed(0)
    line = nn.Sequential(
        nn.Conv1d(3, 6, 3, 2), nn.ReLU(), nn.Conv1d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4)
    )
    row = nn.Sequential(
        nn.Conv2d(3, 6, (1, 3), (1, 2)), nn.ReLU(), nn.Conv2d(6, 6, (1, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4)
    )
    state = line.state_dict()
    row.load_state_dict({k: v[:, :, None] if v.dim() == 3 else v for k, v in state.items()})
    x = torch.rand(2, 3, 30, dtype=torch.float64)
    for table in (rules.PIXELS, rules.PAPER):
        one = tsgb.explain(line.double().eval(), x, [[0, 2]] * 2, rules=table).maps
        two = tsgb.explain(row.double().eval(), x[:, :, None], [[0, 2]] * 2, rules=table).maps
        assert relative(two[:, :, 0], one) < 1e-9


def test_of_channels_each_has_its_share():
    model, x = chain(dtype=torch.float32), torch.rand(2, 3, 16, 16)
    x[0, :, 3, 3] = 0  # a black pixel may be evidence too
    whole = tsgb.TSGB(model, rules=FUSED).attribute(x, 1)
    maps = tsgb.explain(model, x, 1, rules=FUSED).maps
    assert torch.allclose(whole.sum(1), maps[:, 0], atol=1e-6)


def test_there_is_no_f():
    with pytest.raises(ValueError, match=r"these rules have no f.*got f=0.5: leave it out"):
        tsgb.explain(chain(dtype=torch.float32), torch.rand(1, 3, 8, 8), 1, f=0.5, rules=FUSED)


def test_in_half_precision():
    model = tsgb.load("bundled").model
    x = torch.rand(2, 3, 128, 128)
    expected = tsgb.explain(model, x, "top2", rules=FUSED)
    with torch.autocast("cpu", torch.bfloat16):
        found = tsgb.explain(model, x, expected.targets, rules=FUSED).maps
    assert found.dtype == torch.float32
    assert torch.corrcoef(torch.stack([found[:, 0].flatten(), expected.maps[:, 0].flatten()]))[0, 1] > 0.999


def test_functional_modules_shared_and_in_place():
    model, x = chain(dtype=torch.float32), torch.rand(1, 3, 16, 16)

    def run(x):
        x = functional.relu(model.a(x), inplace=True)
        return 30 * model.c(functional.relu_(model.b(x)).mean((2, 3)))

    expected = tsgb.explain(model, x, 1, rules=FUSED).maps
    assert torch.allclose(tsgb.explain(run, x, 1, rules=FUSED).maps, expected, atol=1e-6)
