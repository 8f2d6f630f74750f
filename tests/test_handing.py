"""Handing relevance on gives what the rules give in their plain form, gradient in and gradient out."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

import tsgb
from tsgb import passes, rules
from tsgb.backprop.relevance import Dense, Gradient, LostError, Product, Relevance, dense, summed
from tsgb.backprop.windows import Windows


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def assert_handed(model, x, targets, tables=(rules.DEFAULT, rules.PIXELS), tolerance=1e-8):
    for table in tables:
        ours = tsgb.explain(model, x, targets, rules=table)
        theirs = tsgb.explain(model, x, targets, rules=rules.plain(table))
        assert theirs.maps.abs().sum() > 0
        assert ours.coverage == theirs.coverage
        assert relative(ours.maps, theirs.maps) < tolerance
        for k in range(ours.maps.shape[1]):
            alone = tsgb.explain(model, x, ours.targets[:, k], rules=table)
            assert relative(alone.maps[:, 0], ours.maps[:, k]) < tolerance


# ---- windows


def positions(windows, size, out):
    """Every window's place and those that it sees, one after the other."""
    for place in itertools.product(*(range(n) for n in out)):
        for offset in itertools.product(*(range(k) for k in windows.kernel)):
            seen = tuple(
                p * s + j * d - b
                for p, s, j, d, b in zip(place, windows.stride, offset, windows.dilation, windows.before, strict=True)
            )
            if all(0 <= at < n for at, n in zip(seen, size, strict=True)):
                yield place, seen


geometries = st.fixed_dictionaries(
    {
        "kernel": st.lists(st.integers(1, 4), min_size=1, max_size=3),
        "stride": st.integers(1, 3),
        "padding": st.one_of(st.integers(0, 2), st.sampled_from(["same", "valid"])),
        "dilation": st.integers(1, 2),
        "channels": st.sampled_from([1, 3]),
    }
)


@settings(deadline=None, max_examples=40)
@given(geometries)
def test_windows_are_their_literal_twin(geometry):
    kernel, channels, size = geometry["kernel"], geometry["channels"], (9, 8, 7)[: len(geometry["kernel"])]
    stride = 1 if geometry["padding"] == "same" else geometry["stride"]
    arguments = stride, geometry["padding"], geometry["dilation"]
    windows = Windows.of(kernel, *arguments)
    convolution = (functional.conv1d, functional.conv2d, functional.conv3d)[len(kernel) - 1]
    x = torch.rand(2, channels, *size, dtype=torch.float64)
    expected = convolution(x, torch.ones(channels, 1, *kernel, dtype=torch.float64), None, *arguments, channels)
    assert torch.allclose(windows.sums(x), expected)

    values = torch.rand(2, *expected.shape, dtype=torch.float64)
    spread = torch.zeros(2, *x.shape, dtype=torch.float64)
    for place, seen in positions(windows, size, expected.shape[2:]):
        spread[(..., *seen)] += values[(..., *place)]
    assert torch.allclose(windows.spread(values, size), spread)
    assert torch.allclose(traced(lambda v: windows.spread(v, size), values), spread)

    field, weighting = values[:, :, :1], torch.rand(expected.shape, dtype=torch.float64)
    total = (x * windows.spread(field * weighting, size)).sum(2, keepdim=True)
    assert torch.allclose(windows.spread_products(field, weighting, x), total)
    products = traced(lambda f, w, v: windows.spread_products(f, w, v), field, weighting, x)
    assert torch.allclose(products, total)


def traced(function, *tensors):
    """What the graph of a function gives; on slices it writes nothing, which torch's compiler may get wrong."""
    graph = make_fx(function)(*(torch.rand_like(tensor) for tensor in tensors))
    written = {str(node.target) for node in graph.graph.nodes if str(node.target).endswith("_.default")}
    assert not written
    return graph(*tensors)


# ---- what flows backward


def test_parts_are_summed_and_made_dense():
    field, base = torch.rand(3, 2, 1, 4, 4), torch.rand(2, 5, 4, 4)
    parts = [Product(field, base.sum(1, keepdim=True), base), Dense(torch.rand(3, 2, 5, 4, 4))]
    whole = field * base + parts[1].values
    assert torch.allclose(summed(parts), whole.sum(2, keepdim=True), atol=1e-5)
    assert torch.allclose(dense(parts), whole)
    weights = torch.rand(3, 2, 5, 1, 1)
    assert torch.allclose(summed([Product(weights, None, base)]), (weights * base).sum(2, keepdim=True), atol=1e-5)
    with pytest.raises(LostError, match="Product has no channels"):
        dense([Product(field, base.sum(1, keepdim=True), None)])
    with pytest.raises(LostError, match="gradient arrived"):
        summed([Gradient(field)])


def test_products_of_one_base_are_joined():
    base = torch.rand(1, 2, 3, 3)
    total = base.sum(1, keepdim=True)
    field = torch.rand(2, 1, 1, 3, 3)
    (part,) = Relevance(base.shape, base.dtype, [Product(field, total, base)] * 2).parts
    assert torch.equal(part.factor, 2 * field)


def test_an_operator_without_a_rule_gets_each_class_gradient():
    grads = torch.rand(3, 2, 4)
    found = Relevance(grads.shape[1:], grads.dtype, [Gradient(grads)]).flip(1).reshape(4, 2)
    assert torch.equal(found.gradients(), grads.flip(2).reshape(3, 4, 2))
    with pytest.raises(LostError, match="writes on what flows backward"):
        found.mul_(2)


# ---- whole networks


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


@settings(deadline=None, max_examples=80)
@given(
    st.data(),
    st.integers(0, 2**31),
    st.sampled_from(["DEFAULT", "PIXELS", "PAPER"]),
    st.integers(12, 26),
    st.integers(12, 26),
)
def test_a_network_drawn_at_random_gets_the_plain_map(data, seed, table, height, width):
    torch.manual_seed(seed)
    model = Drawn(data.draw).double().eval()
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    with torch.no_grad():
        try:
            logits = model(x)
        except RuntimeError:  # a window larger than what is left
            reject()
    ours = tsgb.explain(model, x, [[0, 1, 2, 3]] * 2, rules=getattr(rules, table))
    theirs = tsgb.explain(model, x, [[0, 1, 2, 3]] * 2, rules=rules.plain(getattr(rules, table)))
    assert torch.equal(ours.logits, logits)
    assert (ours.maps - theirs.maps).norm() <= 1e-8 * theirs.maps.norm()
    one = tsgb.explain(model, x, 2, rules=getattr(rules, table))
    assert (one.maps[:, 0] - theirs.maps[:, 2]).norm() <= 1e-8 * theirs.maps.norm()


class Crossed(nn.Sequential):
    """The sum of a map with the same, its channels and rows exchanged."""

    def forward(self, x):
        x = functional.relu(self[0](x))
        return self[1]((self[2](x) + self[3](x).permute(0, 2, 3, 1)).mean((2, 3)))


def test_layouts_of_one_shape_are_not_confused():
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 4, 3), nn.Linear(4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)]
    assert_handed(Crossed(*convolutions).double().eval(), torch.rand(2, 3, 6, 6).double(), [[0, 1], [2, 0]])


def test_what_is_zero_for_want_of_weights_gives_nothing_back():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4, bias=False),
        nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    ).double().eval()  # fmt: skip
    for place in (0, 3):
        model[place].weight.data[1] = 0
        model[place].weight.data[2, :, 1:] = 0
        nn.init.constant_(model[place + 1].bias, 0.5)
    assert_handed(model, torch.randn(2, 3, 12, 12).double(), [[0, 1], [2, 0]])


@pytest.mark.parametrize("plainly", [False, True])
def test_batch_norm_folded_or_not_it_is_one_map(plainly):
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
    x, table = torch.randn(2, 3, 12, 12).double(), rules.plain(rules.DEFAULT) if plainly else rules.DEFAULT
    maps = [tsgb.explain(model, x, [[0, 1], [2, 0]], rules=table).maps for model in (separate, folded)]
    assert maps[0].abs().amax((2, 3)).min() > 0
    assert torch.allclose(*maps, rtol=1e-8, atol=1e-12)


class Strided(nn.Module):
    """What reads or writes memory as if the image were contiguous."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.head, self.how = nn.Conv2d(3, 4, 3), nn.Linear(4 * 64, 3), how

    def forward(self, x):
        x = functional.relu(self.conv(x))
        if self.how == "view":
            return self.head(x.view(len(x), -1))
        if self.how == "written view":
            flat = x.view(len(x), -1)
            flat[:, ::2] *= 0.5
            return self.head(x.flatten(1))
        if self.how == "chunks":
            a, b = x.chunk(2, 1)
            a.mul_(2)
            return self.head(torch.cat([b, a], 1).flatten(1))
        if self.how == "written moved":
            moved = x.permute(0, 2, 3, 1)
            moved[..., 1:] *= 3
            return self.head(x.flatten(1))
        if self.how == "written moved twice":
            last = x.permute(0, 2, 3, 1)
            last.mul_(torch.tensor([1.0, 2.0, 3.0, 4.0])).add_(0.5)
            return self.head(last.permute(0, 3, 1, 2).flatten(1))
        if self.how == "scaled in place":
            x.mul_(torch.tensor([1.0, 0.0, 3.0, 4.0])[:, None, None]).add_(0.5)
            return self.head(x.flatten(1))
        windows = torch.as_strided(x, (len(x), 4, 64), (256, 64, 1))
        return self.head(windows.flatten(1))


HOWS = ["view", "written view", "written moved", "written moved twice", "scaled in place", "chunks", "as_strided"]


@pytest.mark.parametrize("how", HOWS)
def test_how_the_model_lays_its_tensors_out_does_not_matter(how):
    model, x = Strided(how).eval(), torch.rand(2, 3, 10, 10)
    assert_handed(model, x, [[0, 1], [2, 0]], tolerance=1e-5)
    with torch.no_grad():
        assert torch.allclose(tsgb.explain(model, x, 0).logits, model(x), atol=1e-6)


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


@pytest.mark.parametrize("name", REAL)
def test_real_networks_in_float32(name, shared):
    model, x = real(name, shared, slice(2))
    assert_handed(model, x, [[3, 281], [281, 7]], tolerance=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", REAL)
def test_real_networks_in_half_precision(name, dtype, shared):
    model, x = real(name, shared, slice(None, None, 80))
    single = tsgb.explain(model, x)
    with torch.autocast("cpu", dtype=dtype):
        half = tsgb.explain(model, x, single.targets)
    for ours, theirs in zip(half.maps.flatten(1), single.maps.flatten(1), strict=True):
        assert float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1]) > 0.999


def test_many_classes_go_backward_in_parts_that_fit(monkeypatch):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 30),
    ).double().eval()  # fmt: skip
    x, classes = torch.rand(2, 3, 12, 12).double(), [[*range(30)]] * 2
    together = tsgb.explain(model, x, classes, rules=rules.PIXELS)
    arrived = []
    monkeypatch.setattr("tsgb.passes._AT_ONCE", 7 * x.numel())
    monkeypatch.setattr("tsgb.passes._gradients", lambda *a, f=passes._gradients: arrived.append(len(a[2])) or f(*a))
    apart = tsgb.explain(model, x, classes, rules=rules.PIXELS)
    assert arrived == [7, 7, 7, 7, 2]
    assert relative(apart.maps, together.maps) < 1e-12
    assert apart.why_empty == together.why_empty
    del arrived[:]
    monkeypatch.setattr("tsgb.passes._AT_ONCE", 2**26)
    whole = tsgb.explain(model, x, classes).maps
    monkeypatch.setattr("tsgb.passes._AT_ONCE", 7 * x.numel())
    assert relative(tsgb.explain(model, x, classes).maps, whole) < 1e-12
    assert arrived == [30 + 21, *[7 + 21] * 4, 2 + 21]  # with 20 rivals and the mean of all
