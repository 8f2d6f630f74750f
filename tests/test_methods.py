"""The registry: one door, and what it promises of every method."""

import copy
import gc
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import tsgb
from tsgb import methods
from tsgb.methods import METHODS, attribute, registry

ORDER = (
    "tsgb-fused",
    "tsgb-pixels",
    "tsgb-paper",
    "gradcam",
    "layercam",
    "gradient",
    "inputxgradient",
    "smoothgrad",
    "integrated-gradients",
    "guided",
    "deconvnet",
    "guided-gradcam",
    "ebp",
    "cebp",
    "deeplift",
    "lrp",
    "occlusion",
    "rise",
    "center",
    "random",
)
TARGETS = torch.tensor([[0, 3], [4, 1]])


def small():
    """Convolutions, batch norm, a skip, ReLU and ReLU6, in place, a frozen layer and one with a gradient."""

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
            self.block = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
            self.down = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU(inplace=True))
            self.drop, self.head = nn.Dropout(0.2), nn.Linear(12, 5)

        def forward(self, x):
            x = self.stem(x)
            x = x + self.block(x)
            return self.head(self.drop(self.down(x).mean((2, 3))))

    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = Small().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.bias.data.normal_()
    model.stem[0].weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    return model


def images(count=2, side=24):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def state(model):
    """All that could be changed about a model, and torch's random state."""
    tensors = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    flags = [(p.requires_grad, p.is_leaf) for p in model.parameters()]
    modules = []
    for name, module in model.named_modules():
        own = {
            key: list(value) if isinstance(value, dict) else None
            for key, value in vars(module).items()
            if key not in ("_parameters", "_buffers")
        }
        modules.append((name, id(module), type(module), module.training, getattr(module, "inplace", None), own))
    return tensors, grads, flags, modules, torch.get_rng_state(), np.random.get_state()[1].tolist()


def assert_same(before, after):
    for one, other in zip(before[:2], after[:2], strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)
    assert before[2:4] == after[2:4]
    assert torch.equal(before[4], after[4])
    assert before[5] == after[5]


@pytest.fixture(scope="module")
def maps():
    """Maps of each method for two images with two targets, computed once."""
    model, x = small(), images()
    found = {}
    for name in METHODS:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found[name] = attribute(name, model, x, TARGETS, seed=7)
    return found


def test_the_names_and_their_order():
    assert tuple(METHODS) == ORDER
    for method in METHODS.values():
        assert "\n" not in method.source
        assert method.title


@pytest.mark.parametrize("name", ORDER)
def test_maps_have_the_shape_and_are_of_the_class(maps, name):
    found = maps[name]
    assert found.shape == (2, 2, 24, 24)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert found.isfinite().all()
    assert (found.flatten(2).std(2) > 0).all()
    if name == "center":
        assert torch.equal(found[0, 0], found[1, 1])
    else:
        assert not torch.allclose(found[0, 0], found[0, 1], rtol=1e-3)
    if name in ("gradcam", "layercam", "gradient", "smoothgrad", "guided", "deconvnet", "guided-gradcam", "cebp"):
        assert (found >= 0).all()


@pytest.mark.parametrize("name", ORDER)
def test_a_map_does_not_depend_on_the_batch_or_the_other_target(maps, name):
    model, x = small(), images()
    for n in range(2):
        alone = attribute(name, model, x[n : n + 1], TARGETS[n : n + 1, 1:], seed=7)
        scale = maps[name][n, 1].abs().max()
        assert torch.allclose(alone[0, 0], maps[name][n, 1], rtol=1e-3, atol=1e-4 * float(scale))


@pytest.mark.parametrize("name", ORDER)
def test_the_model_and_the_random_state_are_the_same_afterwards(name):
    model, x = small(), images(1)
    given = x.clone()
    before = state(model)
    attribute(name, model, x, TARGETS[:1])
    assert_same(before, state(model))
    assert torch.equal(x, given)
    assert not x.requires_grad


_LOOKING = [name for name in ORDER if name not in ("center", "random")]  # at the model
_ONCE = ("tsgb-fused", "tsgb-pixels", "tsgb-paper", "guided", "deconvnet", "gradient", "inputxgradient")


@pytest.mark.parametrize(
    ("name", "call"), [(name, call) for name in _LOOKING for call in (1, 2) if call == 1 or name not in _ONCE]
)
def test_the_model_is_left_clean_where_the_method_fails(name, call):
    model = small()
    calls = []

    class Failing(nn.Module):
        def forward(self, x):
            calls.append(1)
            if len(calls) == call:
                raise LookupError("broken")
            return x

    model.drop = Failing()
    before = state(model)
    with pytest.raises(LookupError, match="broken"):
        attribute(name, model, images(1), TARGETS[:1])
    assert_same(before, state(model))


@pytest.mark.parametrize("name", ["smoothgrad", "rise", "random"])
def test_the_seed_is_the_only_chance(maps, name):
    model, x = small(), images(1)
    torch.manual_seed(99)
    assert torch.equal(attribute(name, model, x, TARGETS[:1], 7)[0, 0], attribute(name, model, x, TARGETS[:1], 7)[0, 0])
    assert not torch.allclose(attribute(name, model, x, TARGETS[:1], 8)[0, 0], maps[name][0, 0], rtol=1e-3)


@pytest.mark.parametrize("name", [name for name in ORDER if name not in ("rise", "occlusion")])
def test_the_bundled_network(name):
    model = tsgb.load("bundled").model
    found = attribute(name, model, images(1, 128) / 2, torch.tensor([[2]]))
    assert found.shape == (1, 1, 128, 128)


def test_under_inference_mode_and_for_float64():
    model = small()
    with torch.inference_mode():
        found = attribute("gradcam", model, images(), TARGETS)
        guided = attribute("guided", model, images(), TARGETS)
    assert found.shape == guided.shape == (2, 2, 24, 24)
    assert attribute("ebp", model.double(), images().double(), TARGETS).dtype == torch.float32


class Functional(nn.Module):
    """No module but what holds weights; the skip is written in place."""

    def __init__(self, act=functional.relu):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.head, self.act = nn.Linear(8, 5), act

    def forward(self, x):
        x = self.act(self.conv1(x))
        y = self.conv2(x)
        y += x
        return self.head(functional.adaptive_avg_pool2d(self.act(y), 1).flatten(1))


@pytest.mark.parametrize("name", ORDER)
def test_a_network_without_modules_for_its_functions(name):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Functional().eval()
    if name == "deeplift":
        with pytest.raises(ValueError, match=r"does not see it \(relu\).*knows the modules ReLU, ELU"):
            attribute(name, model, images(1), TARGETS[:1])
    else:
        assert attribute(name, model, images(1), TARGETS[:1]).any()


def test_what_zennit_has_no_rule_for_is_refused():
    class Gated(Functional):
        def forward(self, x):
            x = self.conv1(x)
            return self.head((x * x.sigmoid()).mean((2, 3)))

    for name, why in (("lrp", "multiplies two signals"), ("deeplift", r"\(mul, sigmoid\)")):
        with pytest.raises(ValueError, match=why):
            attribute(name, Gated().eval(), images(1), TARGETS[:1])

    class Unwrapped(Functional):
        def forward(self, x):
            return functional.linear(self.conv1(x).relu().mean((2, 3)), self.head.weight)

    with pytest.raises(ValueError, match="applies weights as a function in `linear`"):
        attribute("lrp", Unwrapped().eval(), images(1), TARGETS[:1])


# ---- refusals


def test_an_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match=r"name must be one of tsgb-fused, .*gradcam.*got 'grad-cam'"):
        attribute("grad-cam", small(), images(), TARGETS)


@pytest.mark.parametrize(("package", "name", "extra"), [("captum", "gradcam", "bench"), ("zennit", "lrp", "zennit")])
def test_a_missing_package_names_the_extra(monkeypatch, package, name, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"method '{name}' needs {package}: pip install 'tsgb\[{extra}\]'"):
        attribute(name, small(), images(), TARGETS)
    assert attribute("ebp", small(), images(), TARGETS).any()


@pytest.mark.parametrize(
    ("x", "targets", "error", "message"),
    [
        (torch.zeros(1, 1, 8, 8), [[0]], ValueError, r"images must have shape \(N, 3, H, W\), got \(1, 1, 8, 8\)"),
        (torch.zeros(3, 8, 8), [[0]], ValueError, r"images must have shape \(N, 3, H, W\), got \(3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8).byte(), [[0]], TypeError, "images must be floating"),
        (torch.full((1, 3, 8, 8), torch.nan), [[0]], ValueError, "images must be finite"),
        (torch.zeros(2, 3, 8, 8), [[0]], ValueError, r"shape \(2, K\).*got \(1, 1\)"),
        (torch.zeros(1, 3, 8, 8), [0], ValueError, r"got \(1,\): for one class an image call targets\[:, None\]"),
        (torch.zeros(1, 3, 8, 8), [[]], TypeError, "got float32: call targets.long"),
        (torch.zeros(1, 3, 8, 8), [[-1]], ValueError, "0 or more, got -1"),
    ],
)
def test_arguments_are_checked(x, targets, error, message):
    with pytest.raises(error, match=message):
        attribute("gradcam", small(), x, torch.tensor(targets))


def test_targets_must_be_a_tensor():
    with pytest.raises(TypeError, match=r"targets must be int64.*got list"):
        attribute("gradcam", small(), images(), [[0], [1]])


def test_training_mode_is_refused():
    with pytest.raises(RuntimeError, match=r"call model.eval\(\)|Call model.eval\(\)"):
        attribute("gradcam", small().train(), images(), TARGETS)


@pytest.mark.parametrize("name", [name for name in ORDER if name not in ("center", "random")])
def test_a_class_that_the_model_does_not_have_is_refused(name):
    with pytest.raises((ValueError, IndexError, AssertionError, RuntimeError)):
        attribute(name, small(), images(1), torch.tensor([[5]]))


@pytest.mark.parametrize("name", ["gradcam", "inputxgradient", "rise", "integrated-gradients", "occlusion"])
def test_maps_that_are_not_finite_are_refused(name):
    model = small()
    model.head.bias.data.fill_(torch.nan)
    model.head.weight.data.fill_(torch.nan)
    with pytest.raises(ArithmeticError, match=f"{name}: the map of image 0 holds NaN or infinity"):
        attribute(name, model, images(), TARGETS)


def test_a_method_that_overflows_is_named(monkeypatch):
    def overflow(*_):
        raise FloatingPointError("the map is not finite")

    monkeypatch.setitem(METHODS, "tsgb-fused", registry.Method("TSGB", "", overflow))
    with pytest.raises(ArithmeticError, match="tsgb-fused: the map is not finite"):
        attribute("tsgb-fused", small(), images(), TARGETS)
    monkeypatch.setitem(METHODS, "tsgb-fused", registry.Method("TSGB", "", lambda *_: torch.zeros(2, 2, 8, 8)))
    with pytest.raises(RuntimeError, match=r"must have shape \(2, 2, 24, 24\), got \(2, 2, 8, 8\)"):
        attribute("tsgb-fused", small(), images(), TARGETS)


def test_the_default_method_has_a_short_name():
    model, x = small(), images()
    assert torch.equal(attribute("tsgb", model, x, TARGETS), attribute("tsgb-fused", model, x, TARGETS))


def test_the_door_is_exported():
    assert methods.attribute is attribute
    assert copy.copy(METHODS["tsgb-fused"]) == METHODS["tsgb-fused"]


@pytest.mark.parametrize("name", ORDER)
def test_nothing_is_kept_between_calls(name):
    model, x = small(), images(1)

    def tensors():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what looks at every object meets deprecated ones
            return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    attribute(name, model, x, TARGETS[:1])  # what is kept once is no growth
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        for _ in range(3):
            attribute(name, model, x, TARGETS[:1])
        assert tensors() <= before + 1
    finally:
        gc.enable()
