"""The method on whole networks: the authors' maps, the formulas edited into copies of networks, and the properties.

The properties are numbered: 1 conservation, 2 one gradient for all colours, 3 class-independent below a convolution
that every path crosses, 4 the backward pass needs one-channel fields, 5 finite, 6 float32 near float64.
"""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

import reference
import tsgb
from helpers import REAL, real, relative
from tsgb import models, networks, rules, scenes, vision


def randomised(model):
    """Random statistics, drawn in the order of the golden networks."""
    for module in model.eval().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
    return model


def torchvision_network(name):
    try:
        torchvision = vision.import_torchvision()
    except models.ModelError:
        pytest.skip("needs torchvision, an extra")
    return torchvision.models.get_model(name, weights=None)


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn"])
def test_paper_is_the_authors_map_of_random_networks(name, shared):
    golden = np.load(shared / "golden" / f"random_{name}_authors.npz")
    torch.manual_seed(0)
    model = randomised(torchvision_network(name))
    e = tsgb.explain(model, torch.randn(1, 3, 224, 224), [[3, 7]], rules=rules.PAPER)
    assert relative(e.logits, torch.tensor(golden["logits"])) < 1e-5
    for k, target in enumerate((3, 7)):
        assert relative(e.maps[:, k], torch.tensor(golden[f"target_{target}"])[:, 0]) < 1e-3


def test_paper_is_the_authors_map_of_a_trained_network(shared):
    network = models.load("mobilenet_v2", shared / "weights" / "mobilenet_v2_qat_dequant.pth")
    golden = np.load(shared / "golden" / "mobilenet_v2_authors.npz")
    for key in golden.files:
        file, target = key.split("/")
        image = Image.open(shared / "data" / "two_class" / file).convert("RGB")
        pixels = torch.tensor(np.array(image)).permute(2, 0, 1)[None]
        resized = functional.interpolate(pixels, (224, 224), mode="bilinear", antialias=True).float() / 255
        mean, std = (torch.tensor(getattr(network.preprocessing, n))[:, None, None] for n in ("mean", "std"))
        maps = tsgb.explain(network.model, (resized - mean) / std, int(target), rules=rules.PAPER).maps
        assert relative(maps, torch.tensor(golden[key])) < 1e-3


# The same formulas edited into a copy of a network, module by module, as the authors do.


def _edited_conv(module, x):
    kernel, geometry = module.kernel_size, (module.stride, module.padding, module.dilation)

    def backward(grad, x):
        o = functional.conv2d(x, module.weight, module.bias, *geometry, module.groups)
        c, n = (grad * o).sum(1, keepdim=True), x.abs().sum(1, keepdim=True)
        ones = torch.ones(1, 1, *kernel, dtype=x.dtype)
        n = functional.conv2d(n, ones, None, *geometry)
        left = [
            (x.shape[2 + d] + 2 * module.padding[d] - module.dilation[d] * (kernel[d] - 1) - 1) % module.stride[d]
            for d in (0, 1)
        ]
        strided = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
        return x.sign() * functional.conv_transpose2d(c / (n + 1e-10), ones, **strided, output_padding=left)

    run = partial(functional.conv2d, weight=module.weight, bias=module.bias)
    return reference.Operator.apply(
        x,
        lambda s: run(s, stride=geometry[0], padding=geometry[1], dilation=geometry[2], groups=module.groups),
        backward,
    )


def _edited_norm(module, x):
    def run(x):
        scale = module.weight / (module.running_var + module.eps).sqrt()
        return (x - module.running_mean[:, None, None]) * scale[:, None, None] + module.bias[:, None, None]

    return reference.Operator.apply(x, run, lambda grad, x: grad * run(x) / (x + 1e-10))


def _edited_pool(module, x):
    def backward(grad, x):
        relevance = grad * functional.avg_pool2d(x, 2)
        return functional.interpolate(relevance, scale_factor=2, mode="nearest") / 4 / (x + 1e-10)

    return reference.Operator.apply(x, lambda s: functional.avg_pool2d(s, 2), backward)


def _edited_head(module, x):
    def backward(grad, x):
        above, below = module.weight.clamp(min=0), module.weight.clamp(max=0)
        beta = (x @ above.T) / (x @ below.T).abs()
        return grad @ above + (beta * grad) @ below

    return reference.Operator.apply(x, lambda s: functional.linear(s, module.weight, module.bias), backward)


def edited(model):
    model = copy.deepcopy(model)
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    edits = {nn.Conv2d: _edited_conv, nn.BatchNorm2d: _edited_norm, nn.AvgPool2d: _edited_pool}
    for module in model.modules():
        if isinstance(module, (nn.ReLU, nn.ReLU6)):
            module.inplace = False
        for kind, edit in edits.items():
            if isinstance(module, kind):
                module.forward = partial(edit, module)
    head.forward = partial(_edited_head, head)
    return model


@pytest.mark.parametrize("name", ["densenet121", "resnet50", "resnext50_32x4d", "mobilenet_v2", "mnasnet0_5"])
def test_paper_is_what_editing_a_network_gives(name):
    model = randomised(torchvision_network(name)).double()
    x = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    found = tsgb.explain(model, x, 7, rules=rules.PAPER)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(edited(model)(leaf)[0, 7], leaf)
    assert relative(found.maps[:, 0], (leaf * grad).sum(1).detach()) < 1e-6


# The properties.


class Chain(nn.Module):
    """Convolution, batch norm, activation, twice; pooling; a linear head. Relevance is lost nowhere in it."""

    def __init__(self, act=functional.relu, grouped=1):
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, 2, 1, groups=grouped)
        self.head = nn.Linear(8, 6)
        self.act = act
        randomised(self).double()

    def forward(self, x):
        x = self.act(self.norm1(self.conv1(x)))
        return self.head(self.act(self.conv2(functional.max_pool2d(x, 2))).mean((2, 3)))


def images(count=2):
    return torch.randn(count, 3, 16, 16, dtype=torch.float64)


@pytest.mark.parametrize("f", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("act", [functional.relu, functional.silu, partial(functional.leaky_relu, negative_slope=0.1)])
@pytest.mark.parametrize("grouped", [1, 8])
def test_1_a_signed_map_sums_to_the_evidence_that_f_leaves(f, act, grouped):
    model, x = Chain(act, grouped), images()
    features = {}
    model.head.register_forward_pre_hook(lambda module, args: features.update(x=args[0].detach()))
    for target in range(3):
        total = tsgb.explain(model, x, target, rules=rules.PIXELS, f=f).maps.flatten(1).sum(1)
        z_for = (features["x"] * model.head.weight[target]).clamp(min=0).sum(1)
        assert torch.allclose(total, (1 - f) * z_for, rtol=1e-5, atol=1e-6)


def test_1_on_a_trained_network_with_skip_additions():
    model = networks.bundled().double()
    x = networks.inputs(np.stack([scenes.render(seed, count=2).image for seed in (1, 2)])).double()
    features = {}
    (head,) = (module for module in model.modules() if isinstance(module, nn.Linear))
    head.register_forward_pre_hook(lambda module, args: features.update(x=args[0].detach()))
    e = tsgb.explain(model, x, rules=rules.PIXELS)
    z_for = (features["x"] * head.weight[e.targets[:, 0]]).clamp(min=0).sum(1)
    total = e.maps.flatten(1).sum(1)
    assert e.f == 0.75
    assert torch.allclose(total, 0.25 * z_for, rtol=0.02)  # exact but for windows in which n = 0


def test_2_one_gradient_for_all_colours_of_one_sign():
    model, x = Chain(), images()
    gradient = tsgb.TSGB(model, rules=rules.PIXELS).attribute(x, 1) / x
    field = gradient * x.sign()
    assert torch.allclose(field, field[:, :1].expand_as(field), rtol=1e-6, atol=1e-12)
    maps = tsgb.explain(model, x, 1, rules=rules.PIXELS).maps[:, 0]
    assert torch.allclose(maps, field[:, 0] * x.abs().sum(1), rtol=1e-6, atol=1e-12)
    x[:, :, 4, 4] = 0  # a pixel at the mean colour
    assert not tsgb.explain(model, x, 1, rules=rules.PIXELS).maps[:, 0, 4, 4].any()


def test_3_below_a_convolution_the_map_is_a_linear_function_of_its_field_alone():
    class Flat(Chain):
        def features(self, x):
            return functional.softplus(self.conv2(self.act(self.norm1(self.conv1(x)))))

        def forward(self, x):
            return functional.linear(self.features(x).flatten(1), self.rows)

    # The activation above conv2 has no rule here, so that the head's rows are the gradients at its output.
    model, x = Flat(), images(1)
    o = model.conv2(model.act(model.norm1(model.conv1(x)))).detach()
    slope = torch.sigmoid(o)  # of softplus
    fields = torch.rand(2, 1, *o.shape[2:], dtype=torch.float64)
    gradients = [field.expand_as(o[0]) / o[0] for field in fields]  # c = 8 * field, shared alike by the channels
    mixed = torch.zeros_like(o[0])
    mixed[2], mixed[5] = 3 * fields[0, 0], 5 * fields[0, 0]
    gradients += [mixed / o[0], 2 * gradients[0] + gradients[1]]
    model.rows = torch.stack([(g / slope[0]).flatten() for g in gradients])
    one, other, same, combined = tsgb.explain(
        model, x, [[0, 1, 2, 3]], rules={**rules.PIXELS, rules.HEAD: _plain_head()}
    ).maps[0]
    assert relative(same, one) < 1e-9  # other channels, so other "classes", but the same field
    assert relative(combined, 2 * one + other) < 1e-9
    assert relative(other, one) > 0.1


def _plain_head():
    """Heads that keep their ordinary gradient, to set what arrives below."""

    return dict.fromkeys(rules.PIXELS[rules.HEAD], rules.ORDINARY)


def test_4_what_a_convolution_receives_from_the_one_above_is_its_field_times_the_size_of_the_features():
    model, x = Chain(), images()
    seen = []

    def watched(grad, x, *args, **kwargs):
        seen.append((grad, x, args, kwargs))
        return reference.conv(grad, x, *args, **kwargs)

    model.forward = lambda x: model.head(model.act(model.conv2(model.act(model.norm1(model.conv1(x))))).mean((2, 3)))
    found = tsgb.explain(model, x, 2, rules={**rules.PIXELS, functional.conv2d: watched})
    assert relative(found.maps, tsgb.explain(model, x, 2, rules=rules.PIXELS).maps) < 1e-9
    (grad2, x2, *upper), (grad1, x1, *lower) = seen
    field = reference.conv(grad2, x2, *upper[0], **upper[1])[:, :1] * x2[:, :1].sign()
    where = x2[:, :1] != 0  # the field can be read off where a feature is on
    c = (grad1 * functional.conv2d(x1, *lower[0], **lower[1])).sum(1, keepdim=True)
    expected = field * x2.abs().sum(1, keepdim=True)
    assert torch.allclose(c[where], expected[where], rtol=1e-6, atol=1e-12)
    assert where.double().mean() > 0.2


@pytest.mark.parametrize("fill", [0.0, -1.0, 1e-20, 1e4])
@pytest.mark.parametrize("table", [rules.FUSED, rules.PIXELS, rules.PAPER], ids=["FUSED", "PIXELS", "PAPER"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_5_flat_images_stay_finite(fill, table, dtype):
    model = Chain().to(dtype)
    x = torch.full((1, 3, 16, 16), fill, dtype=dtype)
    assert tsgb.explain(model, x, 0, rules=table).maps.isfinite().all()


def test_6_float32_is_near_float64():
    model, x = networks.bundled(), networks.inputs(scenes.render(3, count=2).image[None])
    single = tsgb.explain(model, x, "top2").maps
    assert relative(single, tsgb.explain(model.double(), x.double(), "top2").maps) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("table", ["FUSED", "PIXELS"])
def test_6_on_trained_networks(name, table, shared):
    model, x = real(name, shared, slice(2))
    targets = [[3, 281], [281, 7]]
    single = tsgb.explain(model, x, targets, rules=getattr(rules, table)).maps
    alone = tsgb.explain(model, x, [281, 7], rules=getattr(rules, table)).maps[:, 0]
    assert relative(alone, torch.stack([single[0, 1], single[1, 1]])) < 1e-4
    double = tsgb.explain(model.double(), x.double(), targets, rules=getattr(rules, table)).maps
    assert relative(single, double) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", REAL)
def test_trained_networks_in_half_precision(name, dtype, shared):
    model, x = real(name, shared, slice(None, None, 80))
    single = tsgb.explain(model, x)
    with torch.autocast("cpu", dtype=dtype):
        half = tsgb.explain(model, x, single.targets)
    for ours, theirs in zip(half.maps.flatten(1), single.maps.flatten(1), strict=True):
        assert float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1]) > 0.999


def test_selective_for_each_of_two_objects():
    """What all of it is for: each object's map lies on that object, not on the other."""
    model, shares = networks.bundled(), []
    for seed in range(20):
        scene = scenes.render(50_000 + seed, count=2)
        maps = tsgb.explain(model, networks.inputs(scene.image[None]), [list(scene.classes)]).maps[0].clamp(min=0)
        for k in (0, 1):
            own, other = (float(maps[k][torch.from_numpy(scene.masks[m])].sum()) for m in (k, 1 - k))
            shares.append(own / (own + other))
    assert sum(shares) / len(shares) > 0.8
