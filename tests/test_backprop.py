"""The mechanism: all spellings of a network agree with its plain twin, and in-place calls lose nothing."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional

import plain
import tsgb
from networks_spelled import SPELLED, Functions, InPlaceModules, NormalisesItsInput
from tsgb import rules
from tsgb.backprop import recording


def images(count=2, side=10):
    return torch.rand(count, 3, side, side, dtype=torch.float64)


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("network", SPELLED, ids=lambda network: network.__name__)
@pytest.mark.parametrize("table", ["PIXELS", "PAPER"])
def test_a_spelling_agrees_with_its_twin(network, table):
    model, x = network(), images()
    paper = table == "PAPER"
    f = 1.0 if paper or network.hidden else 0.75
    found = tsgb.explain(model, x, 3, rules=getattr(rules, table), strict=True)
    assert found.f == f
    expected = plain.explain(model.twin, x, 3, paper, f)
    assert float(expected.abs().max()) > 0
    assert relative(found.maps[:, 0], expected) < 1e-7  # batch norm divides by x, which may come near 0


def test_the_spellings_are_many_and_differ_in_table():
    assert len(SPELLED) >= 18
    x = images()
    maps = [tsgb.explain(InPlaceModules(), x, 3, rules=table).maps for table in (rules.PAPER, rules.PIXELS)]
    assert relative(*maps) > 1e-3


def test_a_model_that_normalises_its_input_gets_the_map_of_the_one_that_is_fed_normalised():
    model, x = NormalisesItsInput(), images()
    x[:, :, 2:5] = 0  # black pixels: image * gradient has nothing to carry, and yet they speak

    def fed(normalised):
        y = functional.relu(model.norm1(model.conv1(normalised)))
        return model.head(functional.relu(1 - model.conv2(y)).mean((2, 3)))

    inside = tsgb.explain(model, x, 2).maps
    outside = tsgb.explain(fed, (x - model.mean) / model.std, 2).maps
    assert relative(inside, outside) < 1e-6
    assert float(outside[:, :, 2:5].abs().sum()) > 0


def test_a_zero_pixel_that_nothing_shifts_carries_nothing():
    x = images()
    x[:, :, 2:5] = 0
    assert not tsgb.explain(InPlaceModules(), x, 2, rules=rules.PIXELS).maps[:, :, 2:5].any()


def test_a_dynamic_weight_is_held_constant():
    class Dynamic(nn.Module):
        def __init__(self, detached):
            super().__init__()
            self.detached, self.weight = detached, nn.Parameter(torch.randn(4, 3, 3, 3).double())
            self.head = nn.Linear(4, 3).double()

        def forward(self, x):
            scale = x.mean().detach() if self.detached else x.mean()
            return self.head(functional.conv2d(x, self.weight * (1 + scale)).relu().mean((2, 3)))

    free, detached = Dynamic(False), Dynamic(True)
    detached.load_state_dict(free.state_dict())
    x = images(1)
    assert torch.equal(tsgb.explain(free, x, 0).maps, tsgb.explain(detached, x, 0).maps)


def test_a_product_of_equals_keeps_its_gradient():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Linear(4, 3)

        def forward(self, x):
            return self.head((self.a(x) * self.b(x)).mean((2, 3)))

    found = tsgb.explain(Product().double().eval(), images(), 0)
    assert ("mul", "ordinary", 1) in found.coverage


def test_a_signal_gated_by_another_branch():
    class Gated(nn.Module):
        def __init__(self, detached):
            super().__init__()
            self.detached, self.a, self.b, self.head = detached, nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Linear(4, 3)

        def forward(self, x):
            gate = torch.sigmoid(self.b(x))
            return self.head((self.a(x) * (gate.detach() if self.detached else gate)).mean((2, 3)))

    free, detached = Gated(False).double().eval(), Gated(True).double().eval()
    detached.load_state_dict(free.state_dict())
    x = images()
    found = tsgb.explain(free, x, 0)
    assert ("mul", "gate", 1) in found.coverage
    assert relative(found.maps, tsgb.explain(detached, x, 0).maps) < 1e-12


def test_coverage_names_the_unknown_and_strict_refuses_it():
    class Unknown(InPlaceModules):
        def forward(self, x):
            return self.head(torch.sin(torch.cosh(self.conv1(x))).mean((2, 3)))

    found = tsgb.explain(Unknown(), images(), 0)
    assert {row for row in found.coverage if row[1] is None} == {("cosh", None, 1), ("sin", None, 1)}
    with pytest.raises(tsgb.CoverageError, match="strict: no rule for cosh, sin"):
        tsgb.explain(Unknown(), images(), 0, strict=True)
    known = {**rules.DEFAULT, torch.sin: rules.ORDINARY, torch.cosh: rules.ORDINARY}
    assert torch.equal(tsgb.explain(Unknown(), images().fill_(0.3), 0, rules=known, strict=True).maps,
                       tsgb.explain(Unknown(), images().fill_(0.3), 0).maps)  # fmt: skip


def test_a_rule_of_the_users_own_serves_every_spelling():
    def mine(grad, x, *args, **kwargs):
        calls.append(x.shape)
        return grad * 0

    calls = []
    table = {**rules.DEFAULT, functional.relu: mine}
    for network in (InPlaceModules, Functions):
        found = tsgb.explain(network(), images(), 0, rules=table)
        assert not found.maps.any()
        assert ("relu", "mine", 2) in found.coverage
    assert len(calls) >= 2


def test_two_heads_are_both_heads():
    class TwoHeads(InPlaceModules):
        def forward(self, x):
            y = functional.relu(self.norm1(self.conv1(x)))
            return self.head(y.mean((2, 3))) + self.head(y.amax((2, 3)))

    assert ("linear", "gradient_head", 2) in tsgb.explain(TwoHeads(), images(), 0).coverage


def test_a_head_that_the_table_does_not_know_is_an_error():
    class Einsum(InPlaceModules):
        def forward(self, x):
            return torch.einsum("nc,kc->nk", self.conv1(x).relu().mean((2, 3)), self.head.weight)

    with pytest.raises(tsgb.CoverageError, match="`einsum`"):
        tsgb.explain(Einsum(), images(), 0)


def test_no_head_and_no_convolution_are_errors():
    with pytest.raises(tsgb.CoverageError, match="no head was found"):
        tsgb.explain(lambda x: x.relu().mean((2, 3)), images(), 0)
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(300, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    with pytest.raises(tsgb.CoverageError, match="no convolution"):
        tsgb.explain(mlp, images(), 0)
    with pytest.raises(tsgb.CoverageError, match="does not depend on the images"):
        tsgb.explain(torch.no_grad()(InPlaceModules()), images(), 0)


def test_copies_are_made_on_write_only_and_nothing_is_kept():
    leaf = torch.ones(3, requires_grad=True)
    x = leaf.clone()
    with recording(rules.DEFAULT):
        y = functional.silu(x)
        z = x * x
        x += 1  # both needed x as it was
        x[0] = 5
    (grad,) = torch.autograd.grad((y + z).sum(), leaf)
    assert torch.allclose(grad, torch.sigmoid(torch.ones(3)) + 1)  # silu: act(x) / x; x * x: gated by itself
    alive = weakref.ref(y.grad_fn)
    del x, y, z, grad
    gc.disable()  # no cycles: reference counts alone must free the graph
    try:
        assert alive() is None
    finally:
        gc.enable()


def test_the_innermost_table_is_not_changed():
    before = dict(rules.PIXELS)
    tsgb.explain(InPlaceModules(), images(), 0, rules=rules.PIXELS, f=0.3)
    assert before == rules.PIXELS


class OwnLinear(torch.autograd.Function):
    """A linear layer that torch's functions never see."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.saved_tensors[0], None


def test_what_the_mode_cannot_see_is_never_silent():
    model, x = Functions(), images()

    def pooled(x):
        return functional.relu(model.norm1(model.conv1(x))).mean((2, 3))

    scripted = torch.jit.script(nn.Linear(4, 5).double())
    for head in (lambda y: OwnLinear.apply(y, model.head.weight), scripted):
        with pytest.raises(tsgb.CoverageError, match="so the head cannot be told"):
            tsgb.explain(lambda x, head=head: head(pooled(x)), x, 2)
    block = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()).double().eval())
    found = tsgb.explain(lambda x: model.head(block(model.conv1(x)).mean((2, 3))), x, 2)
    assert ("ConvolutionBackward0", None, 1) in found.coverage


def test_the_head_may_lie_in_the_target():
    model, x = Functions(), images()
    probe = torch.randn(5, 4, dtype=torch.float64)

    def pooled(x):
        return functional.relu(model.norm1(model.conv1(x))).mean((2, 3))

    inside = tsgb.explain(lambda x: pooled(x) @ probe.T, x, 2, rules=rules.PIXELS)
    outside = tsgb.explain(pooled, x, lambda output: (output @ probe.T)[:, 2], rules=rules.PIXELS)
    assert relative(outside.maps, inside.maps) < 1e-12
    changed = tsgb.explain(model, x, lambda output: output.mul_(3)[:, 1])
    assert torch.equal(changed.logits, tsgb.explain(model, x, 1).logits)


def test_zeros_of_the_image_are_the_models_zeros():
    model, x = NormalisesItsInput(), images()
    x[:, :, 2:5] = 0

    def choosing(x):
        return model(torch.where(x == 0, torch.full_like(x, -5.0), x))

    with torch.no_grad():
        assert torch.equal(tsgb.explain(choosing, x, 2).logits, choosing(x))


def test_a_sequence_first_head_sums_over_positions():
    model, x = Functions(), images()

    def columns(x):
        return functional.relu(model.conv1(x)).mean(2)

    first = tsgb.explain(lambda x: model.head(columns(x).permute(2, 0, 1)).mean(0), x, 2).maps
    last = tsgb.explain(lambda x: model.head(columns(x).permute(0, 2, 1)).mean(1), x, 2).maps
    assert relative(first, last) < 1e-12


def test_what_left_a_sigmoid_is_the_gate_also_of_a_smaller_signal():
    model, x = Functions(), images()

    def network(x, detached):
        y = functional.relu(model.conv1(x))
        gate = torch.sigmoid(model.conv2(y))
        return model.head((y.mean(1, keepdim=True) * (gate.detach() if detached else gate)).mean((2, 3)))

    free, held = (tsgb.explain(lambda x, d=detached: network(x, d), x, 2).maps for detached in (False, True))
    assert relative(free, held) < 1e-12


def test_a_linear_layer_on_an_image_is_no_convolution():
    mlp = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Flatten(), nn.Linear(240, 5)).double()
    with pytest.raises(tsgb.CoverageError, match="no convolution"):
        tsgb.explain(mlp, images(), 2)


def test_strict_needs_no_rule_above_the_head():
    model, x = Functions(), images()
    found = tsgb.explain(lambda x: model(x).log_softmax(1), x, 2, strict=True)
    assert ("log_softmax", "ordinary", 1) in found.coverage


def test_checkpointing_is_refused_in_one_line():
    from torch.utils.checkpoint import checkpoint

    model = Functions()

    def network(x):
        return model.head(checkpoint(lambda x: functional.relu(model.conv1(x)), x, use_reentrant=False).mean((2, 3)))

    with pytest.raises(RuntimeError, match=r"gradient checkpointing.*switch it off"):
        tsgb.explain(network, images(), 2)
