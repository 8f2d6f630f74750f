"""What several test files share: files to load from, networks of a few weights, networks drawn at random, results.

The functions without arguments under "factories" are also models for `--model tests/helpers.py:NAME`.
"""

import copy
import io
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional

import reference
import tsgb
from tsgb import rules
from tsgb.models import ModelError, load


def relative(ours, theirs):
    """The distance of two maps, over the norm of the second."""
    return float((ours - theirs).norm() / theirs.norm())


def mean(x):
    """Pooling of the whole map."""
    return x.mean((2, 3))


def assert_literal(model, x, classes=(0, 2), tables=("PIXELS", "PAPER"), tolerance=1e-8, twin=None, single=None):
    """Check that the maps of float64 images are those of `reference`, whether classes come together or alone.

    Args:
        twin: the network that the reference explains; None for the same.
        single: how far the map of the network in float32 may be off, where it is looked at, too.
    """
    for table in tables:
        together = tsgb.explain(model, x, [list(classes)] * len(x), rules=getattr(rules, table))
        for k, target in enumerate(classes):
            expected, f = reference.explain(twin or model, x, target, table)
            assert together.f == f
            assert expected.any(), f"{table}: no map of class {target}"
            off = relative(together.maps[:, k], expected)
            assert off <= tolerance, f"{table}, class {target}: {off:.1e}"
        alone = tsgb.explain(model, x, classes[-1], rules=getattr(rules, table))
        assert relative(alone.maps[:, 0], together.maps[:, -1]) <= tolerance, f"{table}: alone and together"
        if single is not None:
            single_model = copy.deepcopy(model).float()
            found = tsgb.explain(single_model, x.float(), [list(classes)] * len(x), rules=getattr(rules, table))
            assert relative(found.maps, together.maps) <= single, table


def assert_steady(model, x, classes=(0, 2), table=rules.DEFAULT, tolerance=1e-8):
    """Check that a class has one map whatever other classes are asked for, an image whatever others there are."""
    together = tsgb.explain(model, x, [list(classes)] * len(x), rules=table)
    for k, target in enumerate(classes):
        alone = tsgb.explain(model, x, target, rules=table)
        assert relative(alone.maps[:, 0], together.maps[:, k]) <= tolerance
        assert alone.coverage == together.coverage
        for n in range(len(x)):
            single = tsgb.explain(model, x[n : n + 1], target, rules=table).maps[0, 0]
            assert (single - together.maps[n, k]).norm() <= tolerance * together.maps.norm()
    return together


def assert_same_map(model, twin, x, classes=(0, 2), tables=None, tolerance=1e-9):
    """Check that two spellings of one network have the same logits, map and f under each table."""
    for table in tables or (rules.DEFAULT, rules.PIXELS, rules.PAPER):
        found, expected = (tsgb.explain(net, x, [list(classes)] * len(x), rules=table) for net in (model, twin))
        assert torch.allclose(found.logits, expected.logits, rtol=1e-5)
        assert found.f == expected.f
        assert expected.maps.any()
        off = relative(found.maps, expected.maps)
        assert off <= tolerance, f"{table}: {off:.1e}"


# ---- files and processes


def saved(model, path):
    (safetensors.torch.save_file if path.suffix == ".safetensors" else torch.save)(model.state_dict(), path)
    return path


def printed(program, *folders):
    """What a fresh Python prints that finds modules in these folders first, and the tsgb under test."""
    path = os.pathsep.join(map(str, [*folders, Path(tsgb.__file__).parents[1]]))
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def refused(*arguments, **options):
    with pytest.raises(ModelError) as caught:
        load(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def written(folder, text, name="nets.py"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def same(model, other):
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


# ---- factories

NAMES = ["cat", "dog", "owl", "fox", "hen"]
SAID = {"size": 32, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "names": NAMES}


def chain(*extra):
    """Convolution, batch norm, ReLU, what is given, pooling and a linear head for five classes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), *extra]
        return nn.Sequential(*body, nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


class Act(nn.Module):
    """A layer that is one function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Training(nn.Sequential):
    """Whoever asks it for eval mode gets training mode."""

    def train(self, mode=True):
        return super().train(True)


class Counting(nn.Module):
    """Counts its calls in a buffer, as no network may while it is explained."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        with torch.no_grad():
            self.calls += 1
        return x


def cnn():
    return chain(), SAID


def unnamed():
    return chain(), {"size": 32}


def too_few_names():
    return chain(), {**SAID, "names": NAMES[:3]}


def too_many_names():
    return chain(), {**SAID, "names": [*NAMES, "eel"]}


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.ReLU(), nn.Linear(8, 5)), SAID


def cosine():
    return chain(Act(torch.cos)), SAID


def training():
    return Training(*chain()), SAID


def counting():
    return chain(Counting()), SAID


def batch_dependent():
    return chain(Act(lambda x: x - x.mean(0, keepdim=True) / 2)), SAID


def _refuse(x):
    raise LookupError("no such layer\nin this network")


def failing():
    return chain(Act(_refuse)), SAID


def raising():
    raise ValueError("no weights here\nnor there")


class Branched(nn.Module):
    """Three convolutions, and what happens between them and the head: ``how(net, x)``."""

    def __init__(self, how, levels=1):
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.a = nn.Conv2d(3, 6, 3, 2, 1, bias=False)
        self.b, self.c = nn.Conv2d(6, 6, 3, 1, 1), nn.Conv2d(6, 6, 3, 1, 1)
        self.norm, self.bend = nn.BatchNorm2d(6), nn.PReLU(6)
        self.norm.running_mean.normal_()
        self.head = nn.Linear(6 * levels, 5)
        self.eval()

    def forward(self, x):
        return self.how(self, x)


class Step(nn.Module):
    """Two convolutions and what is done between them."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.a, self.b, self.up, self.c = (
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 8, 3),
            nn.ConvTranspose2d(8, 8, 2),
            nn.Linear(8, 5),
        )
        self.norm = nn.BatchNorm2d(8)
        for values in (self.norm.weight, self.norm.bias, self.norm.running_mean):
            nn.init.uniform_(values, 0.2, 1)
        self.double().eval()

    def forward(self, x):
        x = torch.relu(self.how(self, torch.relu(self.a(x))))
        return self.c((torch.relu(self.b(x)) if x.shape[1] == 8 else x.repeat(1, 2, 1, 1)).mean((2, 3)))


# ---- networks drawn at random


class ChannelsLast(nn.Module):
    """ConvNeXt's block: depthwise, then norm and linear layers with the channels last, scaled and added."""

    def __init__(self, channels, act, is_added):
        super().__init__()
        self.depth = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm, self.act, self.is_added = nn.LayerNorm(channels), act, is_added
        self.up, self.down = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)
        self.scale = nn.Parameter(torch.rand(channels, 1, 1) + 0.1)

    def forward(self, x):
        y = self.depth(x).permute(0, 2, 3, 1)
        z = self.down(self.act(self.up(self.norm(y))))
        y = z + y if self.is_added else z
        return x + self.scale * torch.permute(y, (0, 3, 1, 2))


STEPS = ("conv", "residual", "shared", "dense", "branches", "pool", "average", "gate", "shift", "last", "norm")


class Drawn(nn.Module):
    """A network drawn at random: strides, dilation, groups, pooling, branches, sums, dense blocks, shared modules."""

    def __init__(self, draw):
        super().__init__()
        self.steps, self.layers, channels = [], nn.ModuleList(), 4
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        for _ in range(draw(st.integers(1, 5))):
            step = draw(st.sampled_from(STEPS))
            block = nn.ModuleList([self._unit(draw, channels, channels, step in ("conv",)) for _ in range(2)])
            if step == "dense":
                block.append(nn.Conv2d(2 * channels, 2 * channels, 1, bias=False))
                channels = 2 * channels
            elif step == "pool":
                kernel = draw(st.integers(2, 3))
                stride, padding = draw(st.integers(1, 3)), draw(st.integers(0, 1))
                block = nn.ModuleList([nn.MaxPool2d(kernel, stride, padding, ceil_mode=draw(st.booleans()))])
            elif step == "average":
                options = {"ceil_mode": draw(st.booleans()), "count_include_pad": draw(st.booleans())}
                block = nn.ModuleList([nn.AvgPool2d(draw(st.integers(2, 3)), draw(st.integers(1, 2)), 1, **options)])
            elif step == "last":
                act = draw(st.sampled_from([nn.GELU, nn.ReLU, nn.SiLU]))()
                block = nn.ModuleList([ChannelsLast(channels, act, draw(st.booleans()))])
            elif step == "norm":
                block = nn.ModuleList([nn.GroupNorm(2, channels), nn.Conv2d(channels, channels, 1)])
            self.steps.append(step)
            self.layers.append(block)
        self.last, self.hidden = nn.Conv2d(channels, 6, 1), draw(st.booleans())
        self.between, self.head = nn.Linear(6, 6), nn.Linear(6, 5)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.2)

    @staticmethod
    def _unit(draw, inputs, outputs, is_free):
        kernel = draw(st.sampled_from([1, 3]))
        dilation = draw(st.integers(1, 2)) if kernel > 1 else 1
        stride = draw(st.integers(1, 2)) if is_free else 1
        padding = draw(st.integers(0, 2)) if is_free else dilation * (kernel // 2)
        groups = draw(st.sampled_from([1, 2, inputs]))
        bias, inplace = draw(st.booleans()), draw(st.booleans())
        act = draw(st.sampled_from([nn.ReLU, nn.ReLU6, nn.SiLU, nn.LeakyReLU, nn.Hardswish]))(inplace=inplace)
        conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=bias)
        parts = [conv, nn.BatchNorm2d(outputs), act] if draw(st.booleans()) else [conv, act]
        return nn.Sequential(*(parts if draw(st.booleans()) else [*parts, nn.BatchNorm2d(outputs)]))

    def forward(self, x):
        x = self.stem(x)
        for step, block in zip(self.steps, self.layers, strict=True):
            if step == "conv":
                x = block[0](x)
            elif step == "residual":
                y = block[1](block[0](x))
                y += x
                x = functional.relu(y, inplace=True)
            elif step == "shared":
                x = x + block[0](block[0](x))
            elif step == "dense":
                x = block[2](torch.cat([x, functional.relu(block[0](x))], 1))
            elif step == "branches":
                x = torch.add(block[0](x), block[1](x))
            elif step in ("pool", "average", "last"):
                x = block[0](x)
            elif step == "norm":
                x = block[1](block[0](functional.relu(x)))
            elif step == "gate":
                x = block[0](x) * torch.sigmoid(block[1](x))
            else:
                x = block[0](x) - 0.3
        x = functional.relu(self.last(x)).mean((2, 3))
        return self.head(functional.relu(self.between(x)) if self.hidden else x)


# ---- networks with real weights, which are no part of the project

REAL = {
    "mobilenet_v2": {"weights": "mobilenet_v2_qat_dequant.pth"},
    "squeezenet1_1": {"weights": "squeezenet1_1_mxnet.pth"},
    "tiny_darknet": {"weights": "tiny_darknet_imagenet.pth", "mean": [0.0] * 3, "std": [1.0] * 3},
}


def real(name, shared, which):
    """A network with its weights, and photographs for it."""
    options = {**REAL[name], "weights": shared / "weights" / REAL[name]["weights"]}
    network = tsgb.load(f"{shared}/tools/nets.py:{name}" if name == "tiny_darknet" else name, **options)
    pictures = sorted((shared / "data" / "imagenet_val400").rglob("*.jpg"))[which]
    x = torch.stack([network.preprocessing.tensor(Image.open(path).convert("RGB")) for path in pictures])
    return network.model, x


# ---- the spellings of one network


class Spelled(nn.Module):
    """A network: `forward` as users write it, `twin` in plain functions. float64, in evaluation mode, seeded."""

    hidden = False  # whether a hidden layer lies below the head, which sets f

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.build()
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_(0, 0.1)
        self.double().eval()

    def build(self) -> None:
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(4, eps=1e-3)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def twin(self, x, act=functional.relu):
        """What most of the spellings below spell."""
        x = act(self.norm1(self.conv1(x)))
        return self.head(mean(act(self.norm2(self.conv2(x)) + x)))


class InPlaceModules(Spelled):
    def build(self):
        super().build()
        self.relu = nn.ReLU(inplace=True)  # one module for all places

    def forward(self, x):
        x = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(x))
        y += x
        return self.head(torch.flatten(functional.adaptive_avg_pool2d(self.relu(y), 1), 1))


class Functions(InPlaceModules):
    def forward(self, x):
        x = functional.conv2d(input=x, weight=self.conv1.weight, bias=self.conv1.bias, padding=(1, 1))
        x = functional.relu(functional.batch_norm(x, **self._norm(self.norm1)))
        y = torch.conv2d(x, self.conv2.weight, self.conv2.bias, 1, 1)
        y = functional.batch_norm(y, **self._norm(self.norm2))
        y = torch.relu(torch.add(x, y))
        return functional.linear(y.mean(dim=(2, 3)), self.head.weight, bias=self.head.bias)

    @staticmethod
    def _norm(norm):
        return {
            "running_mean": norm.running_mean,
            "running_var": norm.running_var,
            "weight": norm.weight,
            "bias": norm.bias,
            "eps": norm.eps,
        }


class Methods(InPlaceModules):
    def forward(self, x):
        x = self.norm1(self.conv1(x)).relu()
        y = self.norm2(self.conv2(x)).add(x).clamp(min=0)
        return torch.addmm(self.head.bias, y.mean([2, 3]), self.head.weight.t())


class DroppedReturns(InPlaceModules):
    def forward(self, x):
        x = self.norm1(self.conv1(x))
        functional.relu(x, inplace=True)
        y = self.norm2(self.conv2(x))
        y.add_(x)
        y.relu_()
        return y.mean((2, 3)) @ self.head.weight.T + self.head.bias


class PositionalInPlace(InPlaceModules):
    def forward(self, x):
        x = self.norm1(self.conv1(x))
        functional.relu(x, True)
        y = self.norm2(self.conv2(x))
        y = torch.relu_(y.add_(x))
        return self.head(y.flatten(2).mean(-1))


class WithOut(InPlaceModules):
    """Results that go to tensors at hand, which torch allows where no gradients are kept."""

    def forward(self, x):
        x = self.norm1(self.conv1(x)).relu()
        y = self.norm2(self.conv2(x))
        if torch.is_grad_enabled():
            return self.head(mean((y + x).clamp_min(0)))
        torch.add(y, x, out=y)
        return self.head(mean(torch.clamp_min(y, 0, out=torch.empty_like(y))))


class OverwritesWhatBackwardNeeds(Spelled):
    """Right in inference, an error in ordinary training: the input of a convolution is changed after it."""

    def forward(self, x):
        x = functional.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(x))
        x += y
        x.relu_()
        return self.head(mean(x))


class ReLU6(Spelled):
    def forward(self, x):
        x = functional.hardtanh(self.norm1(self.conv1(x * 3)), 0.0, 6.0, inplace=True)
        y = self.norm2(self.conv2(x))
        return self.head(mean((y + x).clamp_(0, 6)))

    def twin(self, x):
        return super().twin(x * 3, functional.relu6)


class SiLUByHand(Spelled):
    def forward(self, x):
        x = self.norm1(self.conv1(x))
        x = x * torch.sigmoid(x)
        y = self.norm2(self.conv2(x)) + x
        gate = y.sigmoid()
        y *= gate
        return self.head(mean(y))

    def twin(self, x):
        return super().twin(x, functional.silu)


class SiLUInPlace(SiLUByHand):
    def forward(self, x):
        x = self.norm1(self.conv1(x))
        functional.silu(x, inplace=True)
        y = self.norm2(self.conv2(x))
        y += x
        return self.head(mean(functional.silu(y)))


class HardswishByHand(Spelled):
    def forward(self, x):
        x = self.norm1(self.conv1(x * 2))
        x = x * functional.relu6(x + 3) / 6
        y = self.norm2(self.conv2(x)) + x
        return self.head(mean(y * functional.hardsigmoid(y)))

    def twin(self, x):
        return super().twin(x * 2, functional.hardswish)


class SqueezeAndExcitation(Spelled):
    def build(self):
        super().build()
        self.squeeze, self.excite = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x):
        x = functional.relu(self.norm1(self.conv1(x)))
        gate = self.excite(functional.relu(self.squeeze(functional.adaptive_avg_pool2d(x, 1)))).sigmoid()
        x = self.conv2(gate.expand_as(x) * x)
        return self.head(functional.leaky_relu(x, 0.1, inplace=True).mean((2, 3)))

    def twin(self, x):
        x = functional.relu(self.norm1(self.conv1(x)))
        gate = functional.relu(self.squeeze(x.mean((2, 3), keepdim=True)))
        x = self.conv2(x * torch.sigmoid(self.excite(gate)))
        return self.head(mean(functional.leaky_relu(x, 0.1)))


class Geometries(Spelled):
    def build(self):
        self.same = nn.Conv2d(3, 6, 3, padding="same", dilation=2)
        self.grouped = nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2, bias=False)
        self.depthwise = nn.Conv2d(4, 4, (3, 1), padding=(1, 0), groups=4)
        self.wide = nn.Conv2d(4, 4, 2)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = functional.max_pool2d(functional.relu(self.same(x)), 3, 2, ceil_mode=True)
        x = functional.relu(self.depthwise(self.grouped(x)))
        return self.head(mean(functional.relu(self.wide(x))))

    def twin(self, x):
        x = functional.conv2d(x, self.same.weight, self.same.bias, 1, 2, 2)
        x = functional.max_pool2d(functional.relu(x), 3, 2, ceil_mode=True)
        x = functional.relu(self.depthwise(self.grouped(x)))
        return self.head(mean(functional.relu(self.wide(x))))


class Halves(Spelled):
    """Parts of a tensor that are written in place."""

    def forward(self, x):
        x = self.norm1(self.conv1(x))
        a, b = x.chunk(2, dim=1)
        functional.relu_(a)
        b.clamp_(min=0)
        y = self.norm2(self.conv2(x)).add(other=x)
        y[:, ::2] += y[:, 1::2]
        return self.head(mean(y.relu_()))

    def twin(self, x):
        x = functional.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(x)) + x
        y = torch.stack([y[:, 0] + y[:, 1], y[:, 1], y[:, 2] + y[:, 3], y[:, 3]], 1)
        return self.head(mean(functional.relu(y)))


class ScaledLogits(Spelled):
    """What stands above the head is no evidence: its derivative counts, not its values."""

    def build(self):
        super().build()
        self.last = nn.BatchNorm1d(5)
        self.last.bias.data.normal_()

    def forward(self, x):
        x = functional.relu(self.norm1(self.conv1(x)))
        return self.last(self.head(mean(x))) / 0.5 - 0.1

    def twin(self, x):
        last, x = self.last, functional.relu(self.norm1(self.conv1(x)))
        scale = last.weight / (last.running_var + last.eps).sqrt()
        return ((self.head(mean(x)) - last.running_mean) * scale + last.bias) / 0.5 - 0.1


class Reused(Spelled):
    """One convolution and one norm in two places."""

    def forward(self, x):
        x = self.conv1(x)
        for _ in range(2):
            x = self.norm2(self.conv2(x)).relu()
        return self.head(mean(x))

    twin = forward


class Dense(Spelled):
    def build(self):
        super().build()
        self.head = nn.Linear(11, 5)

    def forward(self, x):
        y = functional.relu(self.norm1(self.conv1(x)))
        y = torch.cat([x, y], 1)
        z = self.conv2(y[:, 3:])
        y = torch.cat((y, functional.relu(z)), dim=1)
        return self.head(functional.avg_pool2d(y, y.shape[2:]).flatten(1))

    def twin(self, x):
        y = functional.relu(self.norm1(self.conv1(x)))
        return self.head(mean(torch.cat([x, y, functional.relu(self.conv2(y))], 1)))


class HiddenLayers(Spelled):
    hidden = True

    def build(self):
        super().build()
        self.hidden1, self.hidden2 = nn.Linear(4 * 9, 16), nn.Linear(16, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = functional.relu(self.norm1(self.conv1(x)))
        x = functional.adaptive_max_pool2d(self.conv2(x), 3).flatten(1)
        x = functional.dropout(torch.tanh(self.hidden1(x)), 0.5, self.training)
        return self.head(functional.relu(torch.matmul(x, self.hidden2.weight.mT) + self.hidden2.bias))

    def twin(self, x):
        x = functional.relu(self.norm1(self.conv1(x)))
        x = functional.adaptive_max_pool2d(self.conv2(x), 3).flatten(1)
        return self.head(functional.relu(self.hidden2(torch.tanh(self.hidden1(x)))))


class ConvolutionalHead(Spelled):
    def build(self):
        super().build()
        self.classifier = nn.Conv2d(4, 5, 1)

    def forward(self, x):
        x = functional.leaky_relu(self.norm1(self.conv1(x)), 0.1)
        return functional.relu(self.classifier(x) + 0.5).mean((2, 3))

    twin = forward


class NormalisesItsInput(Spelled):
    def build(self):
        super().build()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6])[:, None, None])
        self.register_buffer("std", torch.tensor([0.2, 0.3, 0.25])[:, None, None])

    def forward(self, x):
        x = functional.relu(self.norm1(self.conv1((x - self.mean) / self.std)))
        return self.head(mean(functional.relu(1 - self.conv2(x))))

    twin = forward


class NormalisesInPlace(NormalisesItsInput):
    def forward(self, x):
        x.sub_(self.mean).div_(self.std)
        x = functional.relu(self.norm1(self.conv1(x)))
        return self.head((1 - self.conv2(x)).relu_().mean((2, 3)))


class Transitions(Spelled):
    """Average pooling over small windows, which the paper treats in its own way."""

    def forward(self, x):
        x = functional.avg_pool2d(self.norm1(self.conv1(x)), 3, 2, 1)
        return self.head(mean(functional.relu(self.conv2(x))))

    twin = forward


def _all(base: type[Spelled]) -> list[type[Spelled]]:
    found = [base] if "forward" in vars(base) else []
    return found + [network for child in base.__subclasses__() for network in _all(child)]


SPELLED = _all(Spelled)


# ---- results of a benchmark, drawn from a seed, with everything that may be in them

METHODS = {
    "tsgb": "TSGB", "tsgb-paper": "TSGB, as published", "gradcam": "Grad-CAM", "layercam": "LayerCAM",
    "gradient": "Gradient", "inputxgradient": "Input x gradient", "smoothgrad": "SmoothGrad",
    "integrated-gradients": "Integrated gradients", "guided": "Guided backprop", "deconvnet": "Deconvnet",
    "guided-gradcam": "Guided Grad-CAM", "ebp": "Excitation backprop", "cebp": "Contrastive excitation backprop",
    "deeplift": "DeepLIFT", "lrp": "LRP", "occlusion": "Occlusion", "rise": "RISE", "center": "Center",
    "random": "Random",
}  # fmt: skip
METRICS = {
    "mask_ap": ("Mask AP", "%", "higher", "order"), "box_ap": ("Box AP", "%", "higher", "order"),
    "grid_ap": ("Grid AP 2 x 2", "%", "higher", "order"), "pointing": ("Pointing", "%", "higher", "order"),
    "pointing_class": ("Pointing, classes", "%", "higher", "order"),
    "pointing_15": ("Pointing +15", "%", "higher", "order"),
    "pointing_difficult": ("Pointing, difficult", "%", "higher", "order"),
    "energy": ("Energy", "%", "higher", "share"), "grid": ("Grid share 2 x 2", "%", "higher", "share"),
    "box_accuracy": ("Box accuracy", "%", "higher", "boxes"),
    "max_box_accuracy": ("MaxBoxAcc", "%", "higher", "boxes"),
    "insertion": ("Insertion", "", "higher", "perturbation"), "deletion": ("Deletion", "", "lower", "perturbation"),
    "sensitivity": ("Class sensitivity", "", "lower", "sanity"),
    "cascade": ("Cascade", "", "neither", "sanity"), "speed": ("Time", "", "lower", "cost"),
    "memory": ("Memory", "", "lower", "cost"),
}  # fmt: skip


def results(seed=0):
    """19 methods, 16 metrics: one method fails, one is left out, as is one metric more; one method fails in part, some
    figures are missing, one has no interval."""
    chance = random.Random(seed)
    rows, differences = [], []
    for metric, (_, unit, _, kind) in METRICS.items():
        if metric == "sensitivity":
            continue
        controls = ["gradcam^2", "gradcam^3", "tsgb^0.5", "tsgb^2"] if kind == "share" else []
        for place, method in enumerate([*METHODS, *controls]):
            if method in ("deeplift", "lrp"):
                continue
            value = chance.uniform(30, 92) if unit else chance.uniform(0.1, 0.7)
            value = 1.15 * 1.6**place if metric == "speed" else value
            wide = value * chance.uniform(0.03, 0.12)
            row = {"method": method, "metric": metric, "value": value, "low": value - wide, "high": value + wide}
            n = 12 if metric == "grid" else 58 if metric == "pointing_difficult" else 101
            rows.append({**row, "n": n - 9 if method == "rise" else n})
            if method == "center" and metric == "cascade":
                rows[-1] |= {"value": None, "low": None, "high": None}
            if method == "random" and metric == "memory":
                rows[-1] |= {"low": float("nan"), "high": None}
            if method != "tsgb" and metric not in ("speed", "memory"):
                middle, wide = chance.gauss(0, 0.08 * value), chance.uniform(0.03, 0.12) * value
                ends = {"value": middle, "low": middle - wide, "high": middle + wide, "n": n}
                differences.append({"method": method, "metric": metric, **ends})
    failures = [
        {"method": "deeplift", "reason": "RuntimeError: a module was used more than once in the forward pass, which "
         "this method cannot follow", "count": 101, "images": ["000000000139.jpg", "000000000285.jpg"]},
        {"method": "rise", "reason": "out of memory", "count": 13, "images": ["a_long_name_of_a_picture.jpg"]},
    ]  # fmt: skip
    return {
        "protocol": {
            "model": "mobilenet_v2", "weights": "mobilenet_v2-7ebf99e0.pth", "weights_sha256": "7ebf99e0" * 8,
            "data": "imagenet_val400", "data_sha256": "0123456789abcdef" * 4, "layout": "coco", "seed": 0,
            "batch_size": 8,
            "preprocessing": {"size": [224, 224], "mean": [0.485, 0.456, 0.406], "resize": "squash"},
            "images": 100, "cases": 101, "grids": {"grid": 12, "grid_3x3": 4}, "confidence": 0.9,
            "distant": 3, "asked": list(METRICS),
            "versions": {"tsgb": "0.1.0", "torch": "2.13.0", "python": "3.11.9"},
            "methods": {
                name: {"title": title, "source": f"tsgb.methods, {title}, with every parameter that it takes"}
                for name, title in METHODS.items()
            },
            "metrics": {
                name: {"title": title, "text": f"how {title} is taken, with every parameter, mean over image and class",
                       "unit": unit, "better": better, "kind": kind}
                for name, (title, unit, better, kind) in METRICS.items()
            },
        },
        "rows": rows, "differences": differences, "failures": failures,
        "problems": ["images/broken.jpg: not a picture", "images/<img src=x onerror=alert(1)>.jpg: not a picture"],
        "left_out": {"lrp": "needs zennit: pip install 'tsgb[zennit]'", "sensitivity": "no second class"},
    }  # fmt: skip


def jpeg(seed=0, size=(224, 224)):
    """A picture of a few discs, as a JPEG file's bytes."""
    chance = random.Random(seed)
    picture = Image.new("RGB", size, tuple(chance.randrange(60, 200) for _ in range(3)))
    draw = ImageDraw.Draw(picture)
    for _ in range(6):
        x, y, r = chance.randrange(size[0]), chance.randrange(size[1]), chance.randrange(8, 70)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(chance.randrange(256) for _ in range(3)))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return file.getvalue()


def gallery(images=12, methods=tuple(METHODS)):
    """Pictures with a map of each method, worst first."""
    names = ["<img src=x onerror=alert(1)>.jpg", *(f"ILSVRC2012_val_{k:08}.jpg" for k in range(1, images))]
    return [
        {
            "image": names[k], "target": f"{200 + k} bull mastiff", "score": 0.12 + 0.05 * k, "picture": jpeg(k),
            "cells": [
                {"method": method, "overlay": jpeg(100 * k + place),
                 "note": "miss, AP 0.31" if place % 3 else "hit, AP 0.62"}
                for place, method in enumerate(methods) if method not in ("deeplift", "lrp")
            ],
        }
        for k in range(images)
    ]  # fmt: skip
