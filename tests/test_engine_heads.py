"""The head: the first operators with weights on the way from the target to the image, however they are written."""

import contextlib
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

import reference
import tsgb
from helpers import Branched, Functions, InPlaceModules, assert_literal, assert_same_map, mean, relative
from tsgb import rules

TABLES = (rules.DEFAULT, rules.PIXELS, rules.PAPER)
NAMES = ["FUSED", "PIXELS", "PAPER"]


def images(count=2, side=10):
    return torch.rand(count, 3, side, side, dtype=torch.float64)


def pooled(model, x):
    return functional.relu(model.norm1(model.conv1(x))).mean((2, 3))


def features(net, x):
    return functional.relu(net.b(functional.relu(net.a(x))))


def together(net, x):
    return net.head(mean(features(net, x)))


# ---- where the head is


def test_two_heads_are_both_heads():
    class TwoHeads(InPlaceModules):
        def forward(self, x):
            y = functional.relu(self.norm1(self.conv1(x)))
            return self.head(y.mean((2, 3))) + self.head(y.amax((2, 3)))

    counts = {name: count for name, rule, count in tsgb.explain(TwoHeads(), images(), 0).coverage if "head" in rule}
    assert counts == {"linear": 2}
    assert_literal(TwoHeads(), images())


def test_the_head_may_lie_in_the_target():
    model, x = Functions(), images()
    probe = torch.randn(5, 4, dtype=torch.float64)
    inside = tsgb.explain(lambda x: pooled(model, x) @ probe.T, x, 2, rules=rules.PIXELS)
    outside = tsgb.explain(lambda x: pooled(model, x), x, lambda o: (o @ probe.T)[:, 2], rules=rules.PIXELS)
    assert relative(outside.maps, inside.maps) < 1e-12
    changed = tsgb.explain(model, x, lambda output: output.mul_(3)[:, 1])
    assert torch.equal(changed.logits, tsgb.explain(model, x, 1).logits)


def test_no_head_and_no_convolution_are_errors():
    with pytest.raises(tsgb.CoverageError, match="no head was found"):
        tsgb.explain(lambda x: x.relu().mean((2, 3)), images(), 0)
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(300, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    with pytest.raises(tsgb.CoverageError, match="no convolution"):
        tsgb.explain(mlp, images(), 0)
    model = Functions()
    with pytest.raises(tsgb.CoverageError, match="does not depend on the images"):
        tsgb.explain(lambda x: model(torch.ones_like(x)), images(), 0)


def test_a_linear_layer_on_an_image_is_no_convolution():
    mlp = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Flatten(), nn.Linear(240, 5)).double()
    with pytest.raises(tsgb.CoverageError, match="no convolution"):
        tsgb.explain(mlp, images(), 2)


@pytest.mark.parametrize(
    "spelling",
    [
        lambda y, w: y @ w.T,
        lambda y, w: torch.mm(y, w.t()),
        lambda y, w: torch.addmm(torch.zeros(5, dtype=y.dtype), y, w.T),
        lambda y, w: functional.linear(y[:, None], w).squeeze(1),
        lambda y, w: functional.conv2d(y[:, :, None, None], w[:, :, None, None]).flatten(1),
    ],
    ids=["matmul", "mm", "addmm", "of one position", "convolution"],
)
@pytest.mark.parametrize("table", TABLES, ids=NAMES)
def test_a_head_in_another_spelling(spelling, table):
    model = Functions()
    assert_same_map(
        lambda x: spelling(pooled(model, x), model.head.weight),
        lambda x: functional.linear(pooled(model, x), model.head.weight),
        images(),
        tables=[table],
    )


@pytest.mark.parametrize(
    "spelling",
    [
        lambda y, w: torch.einsum("nc,kc->nk", y, w),
        lambda y, w: torch.bmm(y[:, None], w.T.expand(len(y), -1, -1))[:, 0],
    ],
    ids=["einsum", "bmm"],
)
def test_a_head_that_is_not_known_as_one_is_right_or_refused(spelling):
    model, x = Functions(), images()
    expected = tsgb.explain(lambda x: functional.linear(pooled(model, x), model.head.weight), x, [[0, 1]] * 2)
    with contextlib.suppress(tsgb.CoverageError):
        found = tsgb.explain(lambda x: spelling(pooled(model, x), model.head.weight), x, [[0, 1]] * 2)
        assert relative(found.maps, expected.maps) < 1e-9


@pytest.mark.parametrize("table", TABLES, ids=NAMES)
def test_a_sequence_first_head_sums_over_positions(table):
    model, x = Functions(), images()

    def columns(x):
        return functional.relu(model.conv1(x)).mean(2)

    first = tsgb.explain(lambda x: model.head(columns(x).permute(2, 0, 1)).mean(0), x, 2, rules=table).maps
    last = tsgb.explain(lambda x: model.head(columns(x).permute(0, 2, 1)).mean(1), x, 2, rules=table).maps
    assert relative(first, last) < 1e-12


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("table", TABLES, ids=NAMES)
def test_a_head_on_vectors_without_a_batch(count, table):
    def squeezed(net, x):
        return net.head(mean(features(net, x)).squeeze()).view(len(x), -1)

    x = torch.rand(count, 3, 16, 16)
    found, same = (tsgb.explain(Branched(how), x, "top2", rules=table) for how in (squeezed, together))
    assert relative(found.maps, same.maps) < 1e-5
    assert found.why_empty == same.why_empty


@pytest.mark.parametrize("table", TABLES, ids=NAMES)
def test_a_transposed_head_may_have_as_many_classes_as_channels(table):
    def scored(net, x, end):
        return end(features(net, x)).mean((2, 3))

    weight = torch.randn(6, 6, 1, 1)
    ends = (lambda x: functional.conv_transpose2d(x, weight), lambda x: functional.conv2d(x, weight.transpose(0, 1)))
    models = [Branched(partial(scored, end=end)) for end in ends]
    assert_same_map(*models, torch.rand(2, 3, 16, 16), tables=[table], tolerance=1e-4)


class Decoder(nn.Module):
    """Scores of each pixel: by a convolution and its copies, or a transposed one, which may be the former's."""

    def __init__(self, end):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.score, self.end = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1), end
        self.double().eval()

    def forward(self, x):
        x, weight, bias = torch.relu(self.b(torch.relu(self.a(x)))), self.score.weight, self.score.bias
        if self.end == "transposed":
            return functional.conv_transpose2d(x, weight.transpose(0, 1).repeat(1, 1, 2, 2), bias, 2)
        if self.end == "enlarged":
            ones = torch.ones_like(weight[:, :1]).repeat(1, 1, 2, 2)
            return functional.conv_transpose2d(self.score(x), ones, None, 2, groups=4)
        return functional.interpolate(self.score(x), scale_factor=2.0)


@pytest.mark.parametrize("table", TABLES, ids=NAMES)
@pytest.mark.parametrize("end", ["transposed", "enlarged"])
def test_a_transposed_convolution_is_a_head_or_enlarges_what_one_says(end, table):
    x = torch.rand(2, 3, 9, 10, dtype=torch.float64)
    expected, found = (
        tsgb.explain(Decoder(how), x, lambda logits: logits[:, 1].mean((1, 2)), rules=table) for how in ("copied", end)
    )
    assert torch.allclose(found.logits, expected.logits)
    assert expected.maps.any()
    assert relative(found.maps, expected.maps) < 1e-9


@pytest.mark.parametrize("end", ["copied", "transposed", "enlarged"])
@pytest.mark.parametrize("table", ["PIXELS", "PAPER"])
def test_a_region_of_a_segmentation_has_the_literal_map(end, table):
    def region(o):
        return o[:, 1, 2:5].mean((1, 2))

    x = torch.rand(2, 3, 9, 10, dtype=torch.float64)
    found = tsgb.explain(Decoder(end), x, region, rules=getattr(rules, table))
    expected, f = reference.explain(Decoder(end), x, region, table)
    assert found.f == f
    assert relative(found.maps[:, 0], expected) < 1e-9


# ---- what is above it


def test_strict_needs_no_rule_above_the_head():
    model = Functions()
    found = tsgb.explain(lambda x: model(x).log_softmax(1), images(), 2, strict=True)
    assert ("log_softmax", "ordinary", 1) in {(name.strip("_"), rule, count) for name, rule, count in found.coverage}


@pytest.mark.parametrize(
    ("by_hand", "by_torch"),
    [
        (lambda o: o.exp() / o.exp().sum(1, keepdim=True), lambda o: o.softmax(1)),
        (lambda o: o - o.logsumexp(1, keepdim=True), lambda o: o.log_softmax(1)),
        (lambda o: o * o.sigmoid(), functional.silu),
        (lambda o: o / (1 + o.abs()), functional.softsign),
    ],
    ids=["softmax", "log softmax", "silu", "softsign"],
)
@pytest.mark.parametrize("table", [rules.DEFAULT, rules.PIXELS], ids=NAMES[:2])
def test_what_a_target_writes_by_hand_has_its_own_derivative(by_hand, by_torch, table):
    model, x = Functions(), images()
    ours, theirs = (tsgb.explain(model, x, lambda o, f=f: f(o)[:, 2], rules=table).maps for f in (by_hand, by_torch))
    assert theirs.any()
    assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


class SeveralHeads(nn.Module):
    """Age, sex and species from one trunk."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU())
        self.age, self.kind = nn.Linear(6, 1), nn.Linear(6, 4)
        self.double().eval()

    def forward(self, x):
        x = self.trunk(x).mean((2, 3))
        return {"age": self.age(x), "logits": self.kind(x)}


def test_each_of_several_heads_is_asked_by_itself():
    model, x = SeveralHeads(), images(side=9)
    kind = tsgb.explain(model, x, [3, 1])
    assert torch.allclose(kind.maps, tsgb.explain(lambda x: model.kind(mean(model.trunk(x))), x, [3, 1]).maps)
    age = tsgb.explain(model, x, lambda output: output["age"][:, 0])
    assert torch.allclose(age.maps, tsgb.explain(lambda x: model.age(mean(model.trunk(x))), x, 0).maps)
    assert not torch.allclose(age.maps, kind.maps)


def test_what_the_target_does_not_come_from_needs_no_rule():
    torch.manual_seed(0)
    stem, head, other = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), nn.Linear(4, 1)

    def model(x):
        x = torch.relu(stem(x))
        return {"logits": head(x.mean((2, 3))), "waves": other(torch.cos(x).mean((2, 3)))}

    x = torch.rand(2, 3, 7, 7)
    assert tsgb.explain(model, x, 1, strict=True).maps.any()
    with pytest.raises(tsgb.CoverageError, match="no rule for cos"):
        tsgb.explain(model, x, lambda output: output["logits"][:, 1] + output["waves"][:, 0], strict=True)


def test_a_target_may_ask_of_each_image_of_several_its_own_class():
    def one_by_one(net, x):
        return torch.cat([together(net, one) for one in x.split(1)])

    labels, x = torch.tensor([2, 0, 1]), torch.rand(3, 3, 16, 16)
    found = tsgb.explain(Branched(one_by_one), x, lambda logits: logits[range(3), labels])
    assert found.maps.shape == (3, 1, 16, 16)
    found = tsgb.explain(Branched(together), x, lambda logits: logits[range(3), labels])
    assert relative(found.maps, tsgb.explain(Branched(together), x, labels).maps) < 1e-5


# ---- why a map is empty


def test_what_f_balances_in_one_position_is_told():
    net = nn.Sequential(nn.Conv2d(1, 2, 2, bias=False), nn.Flatten(), nn.Linear(2, 2, bias=False)).eval()
    nn.init.constant_(net[0].weight, 0.5)
    net[2].weight.data = torch.tensor([[1.0, -1.0], [0.5, -1.0]])
    x = torch.ones(1, 1, 2, 2)
    ((reason, _),) = tsgb.explain(net, x, [[0, 1]], f=1.0, rules=rules.PIXELS).why_empty
    assert "give f=0.75" in reason
    assert tsgb.explain(net, x, 0, f=0.75, rules=rules.PIXELS).why_empty == [[None]]


@pytest.mark.parametrize("alone", [torch.Tensor.squeeze, lambda v: v, lambda v: v.unsqueeze(0)[0]])
def test_a_logit_cut_in_each_image_is_told(alone):
    def by_image(net, x):
        return torch.stack([functional.relu(net.head(alone(v))) for v in mean(functional.relu(net.a(x)))])

    def at_once(net, x):
        return functional.relu(net.head(mean(functional.relu(net.a(x)))))

    nets, x = (Branched(by_image), Branched(at_once)), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        for net in nets:
            net.head.bias[1] = -100
    found, expected = (tsgb.explain(net, x, [[0, 1]] * 2) for net in nets)
    assert all("cut by a ReLU" in reasons[1] for reasons in found.why_empty)
    assert torch.equal(found.maps[:, 1], expected.maps[:, 1])
